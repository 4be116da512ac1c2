// Around the library products of the patch projection: tokens to the rows that are multiplied, and
// back.
//
//   conv  rows = vec(m F)[patch], missing tail tokens 0       pool  rows = mean of the patch's
//   valid tokens
#include "common/checks.h"
#include "common/patches.h"

#include <type_traits>
#include <vector>

namespace {

using namespace deepfusion;
using torch::stable::Tensor;

constexpr const char* kOp = "view_aligned_attention";

struct Shape {
  int64_t length, width, patches, sample_stride, token_stride;
};

Shape shape_of(const Tensor& tokens, const Tensor& offsets) {
  check_dense_rows(tokens, kOp, "student_stages");
  return {tokens.size(1), tokens.size(2), offsets.size(1) - 1, tokens.stride(0), tokens.stride(1)};
}

// body(row, sample, patch, patch index) for rows [first, first + rows) of all B Q patches.
template <typename Body>
void for_patches(const Shape& shape, const Tensor& offsets, const std::optional<Tensor>& mask,
                 int64_t first, int64_t rows, const Body& body) {
  const int32_t* cuts = offsets.const_data_ptr<int32_t>();
  const bool* valid = mask ? mask->const_data_ptr<bool>() : nullptr;
  for_rows(rows, 8, [&](int64_t r) {
    const int64_t b = (first + r) / shape.patches, i = (first + r) % shape.patches;
    body(r, b, patch_at(cuts, valid, shape.patches, shape.length, b, i), i);
  });
}

// rows [C, p H] <- patches first .. first + C of tokens [B, L, H].
void pack_patches_cpu(Tensor tokens, Tensor offsets, std::optional<Tensor> mask, int64_t first,
                      Tensor rows) {
  const Shape shape = shape_of(tokens, offsets);
  const int64_t row_width = rows.size(1);
  DF_DISPATCH_FLOAT(tokens.scalar_type(), kOp, [&] {
    const scalar_t* source = tokens.const_data_ptr<scalar_t>();
    scalar_t* out = rows.mutable_data_ptr<scalar_t>();
    for_patches(shape, offsets, mask, first, rows.size(0),
                [&](int64_t r, int64_t b, const Patch& patch, int64_t) {
                  scalar_t* cell = out + r * row_width;
                  for (int64_t t = patch.begin; t < patch.end; ++t, cell += shape.width) {
                    if (patch.holds(t))
                      std::copy_n(source + b * shape.sample_stride + t * shape.token_stride,
                                  shape.width, cell);
                    else
                      std::fill_n(cell, shape.width, scalar_t(0));
                  }
                  std::fill(cell, out + (r + 1) * row_width, scalar_t(0));
                });
  });
}

// The gradient of pack_patches: rows [C, p H] -> tokens [B, L, H], 0 where masked.
void unpack_patches_cpu(Tensor rows, Tensor offsets, std::optional<Tensor> mask, int64_t first,
                        Tensor tokens) {
  const Shape shape = shape_of(tokens, offsets);
  const int64_t row_width = rows.size(1);
  DF_DISPATCH_FLOAT(tokens.scalar_type(), kOp, [&] {
    const scalar_t* source = rows.const_data_ptr<scalar_t>();
    scalar_t* out = tokens.mutable_data_ptr<scalar_t>();
    for_patches(shape, offsets, mask, first, rows.size(0),
                [&](int64_t r, int64_t b, const Patch& patch, int64_t) {
                  const scalar_t* cell = source + r * row_width;
                  for (int64_t t = patch.begin; t < patch.end; ++t, cell += shape.width) {
                    scalar_t* token = out + b * shape.sample_stride + t * shape.token_stride;
                    if (patch.holds(t))
                      std::copy_n(cell, shape.width, token);
                    else
                      std::fill_n(token, shape.width, scalar_t(0));
                  }
                });
  });
}

// rows [B Q, H] <- means of the patches of tokens [B, L, H]; rows may be wider than tokens.
void pool_patches_cpu(Tensor tokens, Tensor offsets, std::optional<Tensor> mask, Tensor rows) {
  const Shape shape = shape_of(tokens, offsets);
  const bool is_wide = rows.scalar_type() != tokens.scalar_type();
  DF_DISPATCH_FLOAT(tokens.scalar_type(), kOp, [&] {
    using W = wide_t<scalar_t>;
    const scalar_t* source = tokens.const_data_ptr<scalar_t>();
    void* out = rows.mutable_data_ptr();
    for_patches(shape, offsets, mask, 0, rows.size(0),
                [&](int64_t r, int64_t b, const Patch& patch, int64_t) {
                  const scalar_t* sample = source + b * shape.sample_stride;
                  if (is_wide || std::is_same_v<scalar_t, W>) {
                    pool_row(sample, shape.token_stride, patch, shape.width,
                             static_cast<W*>(out) + r * shape.width);
                    return;
                  }
                  thread_local std::vector<W> mean;
                  mean.resize(shape.width);
                  pool_row(sample, shape.token_stride, patch, shape.width, mean.data());
                  scalar_t* row = static_cast<scalar_t*>(out) + r * shape.width;
                  for (int64_t c = 0; c < shape.width; ++c) row[c] = from_wide<scalar_t>(mean[c]);
                });
  });
}

template <typename R, typename T>
void unpool(const Shape& shape, const Tensor& offsets, const std::optional<Tensor>& mask,
            const R* source, int64_t rows, T* out) {
  using W = wide_t<T>;
  for_patches(shape, offsets, mask, 0, rows,
              [&](int64_t r, int64_t b, const Patch& patch, int64_t i) {
                T* sample = out + b * shape.sample_stride;
                const auto clear = [&](int64_t begin, int64_t end) {
                  for (int64_t t = begin; t < end; ++t)
                    std::fill_n(sample + t * shape.token_stride, shape.width, T(0));
                };
                if (i == 0) clear(0, patch.begin);
                if (i == shape.patches - 1) clear(patch.end, shape.length);
                const W share = W(1) / static_cast<W>(std::max<int64_t>(patch.count(), 1));
                const R* row = source + r * shape.width;
                for (int64_t t = patch.begin; t < patch.end; ++t) {
                  T* token = sample + t * shape.token_stride;
                  if (!patch.holds(t)) {
                    std::fill_n(token, shape.width, T(0));
                    continue;
                  }
                  for (int64_t c = 0; c < shape.width; ++c)
                    token[c] = from_wide<T>(to_wide(row[c]) * share);
                }
              });
}

// The gradient of pool_patches: every token of [B, L, H] is written, those of no patch with 0.
void unpool_patches_cpu(Tensor rows, Tensor offsets, std::optional<Tensor> mask, Tensor tokens) {
  const Shape shape = shape_of(tokens, offsets);
  const bool is_wide = rows.scalar_type() != tokens.scalar_type();
  DF_DISPATCH_FLOAT(tokens.scalar_type(), kOp, [&] {
    using W = wide_t<scalar_t>;
    scalar_t* out = tokens.mutable_data_ptr<scalar_t>();
    if (is_wide)
      unpool(shape, offsets, mask, rows.const_data_ptr<W>(), rows.size(0), out);
    else
      unpool(shape, offsets, mask, rows.const_data_ptr<scalar_t>(), rows.size(0), out);
  });
}

}  // namespace

DF_REGISTER_CPU(m) {
  m.impl("pack_patches", TORCH_BOX(&pack_patches_cpu));
  m.impl("unpack_patches", TORCH_BOX(&unpack_patches_cpu));
  m.impl("pool_patches", TORCH_BOX(&pool_patches_cpu));
  m.impl("unpool_patches", TORCH_BOX(&unpool_patches_cpu));
}
