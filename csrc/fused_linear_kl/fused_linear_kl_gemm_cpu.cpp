// The GEMMs of the fused linear loss, results in float32: float32 factors at the rate of the best
// library even for a chunk of 128 rows, bfloat16 factors as they are, at twice the rate of widened
// ones and without widened copies.
//
//   logits = hidden W^T + bias        dhidden += dS W        dW (+)= dS^T hidden
//
// Every factor that is read again is packed first; sums are cut at kSumSteps and their order is the
// same however the work is shared out.
#include "common/checks.h"
#include "common/large_pages.h"
#include "common/lanes.h"
#include "common/pack.h"

#include <cstdlib>
#include <memory>
#include <optional>

namespace {

using namespace deepfusion;
using torch::headeronly::ScalarType;

// Whether this file serves the dtype here; at the other levels the library's GEMM does.
bool fused_linear_kl_multiplies_cpu([[maybe_unused]] const Tensor& like) {
#if defined(DF_LEVEL_avx512)
  return like.scalar_type() == ScalarType::Float ||
         (like.scalar_type() == ScalarType::BFloat16 && multiplies_bfloat16());
#else
  return false;
#endif
}

#if defined(DF_LEVEL_avx512)

template <typename S>
constexpr int64_t kWidth = kColumns<S>;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Memory for units, on a cache line's boundary as panels want it.
template <typename S>
class Panel {
 public:
  explicit Panel(int64_t count) : memory_(std::aligned_alloc(64, (count * kUnit + 63) / 64 * 64)) {}
  unit_t<S>* get() const { return static_cast<unit_t<S>*>(memory_.get()); }

 private:
  static constexpr int64_t kUnit = sizeof(S) * Operand<S>::kDepth;
  std::unique_ptr<void, Free> memory_;
};

template <typename S>
const unit_t<S>* units(const S* elements) {
  return reinterpret_cast<const unit_t<S>*>(elements);
}

// body(first, count) for groups of kWidth of `columns`, shared out among the threads.
template <int64_t WIDTH, typename Body>
void for_groups(int64_t columns, const Body& body) {
  for_rows((columns + WIDTH - 1) / WIDTH, 1,
           [&](int64_t group) { body(group * WIDTH, std::min(WIDTH, columns - group * WIDTH)); });
}

// to[i] = f(i) for i < count; a whole group is a loop of known length, so vector code.
template <int64_t WIDTH, typename F>
[[gnu::always_inline]] inline void for_lanes(int64_t count, const F& f) {
  if (count == WIDTH) {
#pragma omp simd
    for (int64_t i = 0; i < WIDTH; ++i) f(i);
  } else {
    for (int64_t i = 0; i < count; ++i) f(i);
  }
}

template <typename S>
void project(const S* hidden, const S* weight, const float* bias, int64_t T, int64_t D, int64_t V,
             float* out, int64_t pitch) {
  constexpr int64_t WIDTH = kWidth<S>;
  const int64_t steps = steps_of<S>(D);
  torch::stable::parallel_for(0, (V + WIDTH - 1) / WIDTH, 1, [&](int64_t begin, int64_t end) {
    // whole squares are packed: up to one vector's steps beyond the last
    const Panel<S> panel((steps + kLanes<S>)*WIDTH);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * WIDTH, count = std::min(WIDTH, V - first);
      const S* sources[WIDTH];
      for (int64_t v = 0; v < WIDTH; ++v)
        sources[v] = v < count ? weight + (first + v) * D : nullptr;
      alignas(64) float offsets[WIDTH] = {};
      for (int64_t v = 0; bias && v < count; ++v) offsets[v] = bias[first + v];
      pack_rows<S>(sources, D, panel.get());
      const Ahead next{weight + (first + WIDTH) * D,
                       std::clamp<int64_t>(V - first - WIDTH, 0, WIDTH), D * int64_t(sizeof(S)),
                       D * int64_t(sizeof(S))};
      sweep<S>([&](int64_t t) { return units<S>(hidden + t * D); }, T, 1, panel.get(), steps, next,
               [&](int64_t t, const float* sums) {
                 float* to = out + t * pitch + first;
                 for_lanes<WIDTH>(count, [&](int64_t v) { to[v] = sums[v] + offsets[v]; });
               });
    }
  });
}

// dS of a tile as the factors' dtype: where it lies, or rounded once, rows padded to whole units.
template <typename S>
struct Slopes {
  Slopes(const float* dlogits, int64_t rows, int64_t columns)
      : pitch((columns + 1) / 2 * 2), memory(rows * pitch / 2) {
    for_rows(rows, 16, [&](int64_t t) {
      S* to = start() + t * pitch;
      for (int64_t v = 0; v < columns; v += kWidth<S>) {
        const int64_t count = std::min(kWidth<S>, columns - v);
        alignas(64) float lanes[kWidth<S>];
        load_lanes<kWidth<S>>(dlogits + t * columns + v, count, lanes);
        store_lanes<kWidth<S>>(lanes, count, to + v);
      }
      if (pitch > columns) to[columns] = from_wide<S>(0.0f);
    });
  }
  S* start() const { return reinterpret_cast<S*>(memory.get()); }
  const S* row(int64_t t) const { return start() + t * pitch; }

  int64_t pitch;
  Panel<S> memory;
};
template <>
struct Slopes<float> {
  Slopes(const float* dlogits, int64_t, int64_t columns) : pitch(columns), memory(dlogits) {}
  const float* row(int64_t t) const { return memory + t * pitch; }

  int64_t pitch;
  const float* memory;
};

template <typename S>
void add_dhidden(const Slopes<S>& slopes, const S* weight, int64_t T, int64_t D, int64_t V,
                 float* dhidden) {
  constexpr int64_t WIDTH = kWidth<S>;
  // one panel stays in the second-level cache beside the rows of dS that it meets
  constexpr int64_t kPiece = kSumSteps * Operand<S>::kDepth;
  for_groups<WIDTH>(D, [&](int64_t first, int64_t count) {
    const Panel<S> panel(kSumSteps * WIDTH);
    for (int64_t top = 0; top < V; top += kPiece) {
      const int64_t depth = std::min(kPiece, V - top);
      pack_columns<S, WIDTH>([&](int64_t v) { return weight + (top + v) * D + first; }, depth,
                             count, panel.get());
      sweep<S>([&](int64_t t) { return units<S>(slopes.row(t) + top); }, T, 1, panel.get(),
               steps_of<S>(depth),
               [&](int64_t t, const float* sums) {
                 float* to = dhidden + t * D + first;
                 for_lanes<WIDTH>(count, [&](int64_t d) { to[d] += sums[d]; });
               });
    }
  });
}

template <typename S, typename Out>
void write_dweight(const Slopes<S>& slopes, const S* hidden, int64_t T, int64_t D, int64_t V,
                   bool first_block, Out* dweight) {
  constexpr int64_t WIDTH = kWidth<S>;
  const int64_t steps = steps_of<S>(T), groups = (D + WIDTH - 1) / WIDTH;
  if (first_block) advise_large_pages(dweight, V * D * sizeof(Out));
  const Panel<S> hidden_panels(groups * steps * WIDTH);
  for_groups<WIDTH>(D, [&](int64_t first, int64_t count) {
    pack_columns<S, WIDTH>([&](int64_t t) { return hidden + t * D + first; }, T, count,
                           hidden_panels.get() + first * steps);
  });
  torch::stable::parallel_for(0, (V + WIDTH - 1) / WIDTH, 1, [&](int64_t begin, int64_t end) {
    const Panel<S> turned(steps * WIDTH);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t top = block * WIDTH, rows = std::min(WIDTH, V - top);
      pack_columns<S, WIDTH>([&](int64_t t) { return slopes.row(t) + top; }, T, rows, turned.get());
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t first = group * WIDTH, count = std::min(WIDTH, D - first);
        const Ahead next{dweight + top * D + first + WIDTH,
                         !first_block && first + WIDTH < D ? rows : 0, D * int64_t{sizeof(Out)},
                         WIDTH * int64_t{sizeof(Out)}};
        sweep<S>([&](int64_t v) -> const unit_t<S>* { return turned.get() + v; }, rows, WIDTH,
                 hidden_panels.get() + group * steps * WIDTH, steps, next,
                 [&](int64_t v, const float* sums) {
                   Out* to = dweight + (top + v) * D + first;
                   alignas(64) float lanes[WIDTH] = {};
                   if (!first_block) load_lanes<WIDTH>(to, count, lanes);
                   for (int64_t d = 0; d < WIDTH; ++d) lanes[d] += sums[d];
                   store_lanes<WIDTH>(lanes, count, to);
                 });
      }
    }
  });
}

template <typename S>
void gradients(const Tensor& dlogits, const Tensor& hidden, const Tensor& weight,
               std::optional<Tensor>& dhidden, std::optional<Tensor>& dweight, bool first) {
  const int64_t T = dlogits.size(0), V = dlogits.size(1), D = hidden.size(1);
  const Slopes<S> slopes(dlogits.const_data_ptr<float>(), T, V);
  if (dhidden)
    add_dhidden<S>(slopes, weight.const_data_ptr<S>(), T, D, V, dhidden->mutable_data_ptr<float>());
  const S* rows = hidden.const_data_ptr<S>();
  if (dweight && dweight->scalar_type() == ScalarType::Float) {
    write_dweight<S>(slopes, rows, T, D, V, first, dweight->mutable_data_ptr<float>());
  } else if (dweight) {
    write_dweight<S>(slopes, rows, T, D, V, first, dweight->mutable_data_ptr<BFloat16>());
  }
}

void fused_linear_kl_project_cpu(const Tensor& hidden, const Tensor& weight,
                                 const std::optional<Tensor>& bias, Tensor out) {
  const float* offsets = bias ? bias->const_data_ptr<float>() : nullptr;
  const int64_t T = hidden.size(0), D = hidden.size(1), V = weight.size(0), pitch = out.stride(0);
  float* to = out.mutable_data_ptr<float>();
  advise_large_pages(to, T * pitch * sizeof(float));
  if (hidden.scalar_type() == ScalarType::Float) {
    project<float>(hidden.const_data_ptr<float>(), weight.const_data_ptr<float>(), offsets, T, D, V,
                   to, pitch);
  } else {
    project<BFloat16>(hidden.const_data_ptr<BFloat16>(), weight.const_data_ptr<BFloat16>(), offsets,
                      T, D, V, to, pitch);
  }
}

void fused_linear_kl_gradients_cpu(const Tensor& dlogits, const Tensor& hidden,
                                   const Tensor& weight, std::optional<Tensor> dhidden,
                                   std::optional<Tensor> dweight, bool first) {
  if (hidden.scalar_type() == ScalarType::Float) {
    gradients<float>(dlogits, hidden, weight, dhidden, dweight, first);
  } else {
    gradients<BFloat16>(dlogits, hidden, weight, dhidden, dweight, first);
  }
}

#endif

}  // namespace

DF_REGISTER_CPU(m) {
  m.impl("fused_linear_kl_multiplies", TORCH_BOX(&fused_linear_kl_multiplies_cpu));
#if defined(DF_LEVEL_avx512)
  m.impl("fused_linear_kl_project", TORCH_BOX(&fused_linear_kl_project_cpu));
  m.impl("fused_linear_kl_gradients", TORCH_BOX(&fused_linear_kl_gradients_cpu));
#endif
}
