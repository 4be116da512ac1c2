// What both directions of moe_experts share: sizes, operands, scratch memory, and the sum over a
// token's rows.
//
// S is what factors are multiplied as (common/gemm.h): T itself, or float32 where T has no product
// of its own.
#pragma once

#include "common/checks.h"
#include "common/gated_activation.h"
#include "common/kept_memory.h"
#include "common/lanes.h"
#include "common/pack.h"
#include "common/row_blocks.h"

namespace deepfusion::inline DF_LEVEL {

// Rows of one expert that pass through all layers together: their activations stay in the
// second-level cache.
constexpr int64_t kBlockRows = 256;
constexpr int64_t kMostBlockRows = kBlockRows + kBlockRows / 2;

struct Sizes {
  int64_t T, K, D, F, E;
  int64_t rows() const { return T * K; }
};

// What both directions read. x and dout are in S, their rows `pitch` apart.
template <typename T, typename S>
struct Experts {
  using Wide = typename Operand<S>::Wide;
  Sizes size;
  Activation activation;
  const T* gate_up;
  const T* down;
  const S* x;
  int64_t pitch;
  const int32_t* order;
  const int32_t* slots;
  const int32_t* offsets;
  const int32_t* token;
  const S* row(const S* tokens, int64_t r) const { return tokens + token[r] * pitch; }
};

template <typename S>
const unit_t<S>* units(const S* row) {
  return reinterpret_cast<const unit_t<S>*>(row);
}

template <typename S>
constexpr ScalarType kDtype = std::is_same_v<S, double>    ? ScalarType::Double
                              : std::is_same_v<S, float>   ? ScalarType::Float
                              : std::is_same_v<S, int32_t> ? ScalarType::Int
                                                           : ScalarType::BFloat16;

// A tensor [rows, columns] as S with an even row pitch where S pairs neighbours: a copy only where
// it must be.
template <typename S>
Tensor as_factor(const Tensor& tensor) {
  Tensor result = tensor.scalar_type() == kDtype<S> ? tensor : torch::stable::to(tensor, kDtype<S>);
  if (tensor.size(1) % Operand<S>::kDepth)
    result = torch::stable::pad(result, {0, 1}, "constant", 0.0);
  return result;
}

// Room for `count` elements of S a share, from torch's allocator.
template <typename S>
struct Scratch {
  Tensor memory;
  int64_t pitch;
  Scratch(const Tensor& like, int64_t shares, int64_t count)
      : memory(kept_empty(like, {shares, (count + 63) / 64 * 64}, kDtype<S>, sizeof(S))),
        pitch((count + 63) / 64 * 64) {}
  S* of(int64_t share) { return memory.mutable_data_ptr<S>() + share * pitch; }
};

// out_t = sum_k w_tk rows[slots_tk], k ascending, one rounding; no weights: all are 1.
template <typename T, typename W>
void combine(const W* rows, const W* weights, const int32_t* slots, Sizes size, T* out) {
  constexpr int64_t kPiece = 64;
  for_rows(size.T, 16, [&](int64_t t) {
    for (int64_t d = 0; d < size.D; d += kPiece) {
      const int64_t count = std::min(kPiece, size.D - d);
      W sums[kPiece] = {};
      for (int64_t slot = t * size.K; slot < (t + 1) * size.K; ++slot) {
        if (slots[slot] < 0) continue;
        const W weight = weights ? weights[slot] : W(1);
        const W* row = rows + slots[slot] * size.D + d;
        for (int64_t i = 0; i < count; ++i) sums[i] += weight * row[i];
      }
      for (int64_t i = 0; i < count; ++i) out[t * size.D + d + i] = from_wide<T>(sums[i]);
    }
  });
}

}  // namespace deepfusion::inline DF_LEVEL
