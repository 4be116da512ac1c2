// The patch projection of all stages in one call each way, where rows are multiplied as they lie
// (common/row_products.h). Rows without a valid token have X = c + st + pos and dX = 0: they are in
// no product.
//
//   X_jr = W_j row_jr + c_j + st_j + pos_i        drow_jr = W_j^T dX_jr        dW_j = sum_r dX_jr
//   row_jr^T
#pragma once

#include "common/kept_group.h"
#include "common/row_products.h"
#include "view_aligned_attention/patch_rows.h"

#if defined(DF_LEVEL_avx512)
namespace deepfusion::inline DF_LEVEL {

using torch::stable::Tensor;

template <typename T>
void project(const Cut& cut, const Rows<T>& rows, const Tensor& weight, const Tensor& bias,
             const std::optional<Tensor>& position, const std::optional<Tensor>& stage, Tensor& x) {
  constexpr int64_t WIDTH = kColumns<T>;
  const Products of{cut.count(), cut.live_rows(), weight.size(1), cut.width()};
  const T* c = bias.const_data_ptr<T>();
  const T* pos = position ? position->const_data_ptr<T>() : nullptr;
  const T* st = stage ? stage->const_data_ptr<T>() : nullptr;
  T* out = x.mutable_data_ptr<T>();
  const int64_t D = of.columns, patches = cut.patches, all = cut.rows();
  const auto shift = [&](int64_t j, int64_t r, int64_t column, int64_t count, float* lanes) {
    alignas(64) float more[WIDTH];
    const auto add = [&](const T* row) {
      load_lanes<WIDTH>(row + column, count, more);
      for (int64_t i = 0; i < WIDTH; ++i) lanes[i] += more[i];
    };
    add(c + j * D);
    if (st) add(st + j * D);
    if (pos) add(pos + r % patches * D);
    round_lanes<T, WIDTH>(lanes, count, out + (j * all + r) * D + column);
  };
  multiply<T>(
      of, [&](int64_t j, int64_t v) { return as_units<T>(rows.at(j, cut.live_row(v))); }, 1,
      ByRows<T>{weight.const_data_ptr<T>(), &of},
      [&](int64_t j, int64_t v, int64_t column, int64_t count, const float* sums) {
        alignas(64) float lanes[WIDTH];
        std::copy_n(sums, WIDTH, lanes);
        shift(j, cut.live_row(v), column, count, lanes);
      });
  if (of.rows == all) return;
  for_rows(cut.count() * all, 8, [&](int64_t task) {
    if (cut.patch(task % all).count()) return;
    for (int64_t column = 0; column < D; column += WIDTH) {
      alignas(64) float lanes[WIDTH] = {};
      shift(task / all, task % all, column, std::min(WIDTH, D - column), lanes);
    }
  });
}

// Tokens of no patch, and of patches without a valid one, get 0.
template <typename T>
void clear_others(const Cut& cut, const std::vector<T*>& places) {
  const int64_t length = cut.length, width = cut.channels;
  const int64_t count = static_cast<int64_t>(places.size());
  for_rows(cut.batch * count, 16, [&](int64_t task) {
    const int64_t b = task / count, last = (b + 1) * cut.patches - 1;
    if (!places[task % count]) return;
    T* sample = places[task % count] + b * length * width;
    const auto clear = [&](int64_t begin, int64_t end) {
      std::fill(sample + begin * width, sample + end * width, T(0));
    };
    clear(0, cut.patch(b * cut.patches).begin);
    clear(cut.patch(last).end, length);
    for (int64_t r = b * cut.patches; r <= last; ++r)
      if (const Patch patch = cut.patch(r); !patch.count()) clear(patch.begin, patch.end);
  });
}

// Lanes of a broken row to its valid tokens; the others get 0.
template <typename T>
void mend_back(const Cut& cut, int64_t r, int64_t column, int64_t count, const float* sums,
               T* tokens) {
  const Patch patch = cut.patch(r);
  T* to = tokens + cut.place(r) + column;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = patch.begin + (column + i) / cut.channels;
    if (token >= patch.end) return;
    to[i] = patch.holds(token) ? from_wide<T>(sums[i]) : T(0);
  }
}

// Lanes of a row of means to every token of its patch.
template <typename T>
void share_out(const Cut& cut, int64_t r, int64_t column, int64_t count, const float* sums,
               bool streams, T* tokens) {
  constexpr int64_t WIDTH = kColumns<T>;
  const Patch patch = cut.patch(r);
  const float share = 1.0f / static_cast<float>(std::max<int64_t>(patch.count(), 1));
  alignas(64) float lanes[WIDTH];
  for (int64_t i = 0; i < WIDTH; ++i) lanes[i] = sums[i] * share;
  // rounded once, not token by token
  alignas(64) T narrow[WIDTH], none[WIDTH] = {};
  round_lanes<T, WIDTH>(lanes, narrow);
  T* sample = tokens + r / cut.patches * cut.length * cut.channels + column;
  for (int64_t t = patch.begin; t < patch.end; ++t) {
    const T* row = patch.holds(t) ? narrow : none;
    T* to = sample + t * cut.channels;
    if (streams && count == WIDTH)
      stream_copy<WIDTH>(row, to);
    else
      std::memcpy(to, row, sizeof(T) * count);
  }
}

// dF of the stages whose place is not null.
template <typename T>
void stage_gradients(const Cut& cut, const Tensor& weight, const Tensor& dx,
                     const std::vector<T*>& places) {
  std::vector<int64_t> wanted;
  for (int64_t j = 0; j < cut.count(); ++j)
    if (places[j]) wanted.push_back(j);
  const int64_t D = weight.size(1), width = cut.width(), all = cut.rows();
  const Products of{std::ssize(wanted), cut.live_rows(), width, D};
  const T* w = weight.const_data_ptr<T>();
  const T* source = dx.const_data_ptr<T>();
  const bool streams = of.count * cut.stages[0].numel() * int64_t{sizeof(T)} >= kStreamedBytes &&
                       can_stream(places[wanted[0]], cut.channels);
  if (!cut.p || of.rows < all) clear_others(cut, places);
  multiply<T>(
      of,
      [&](int64_t m, int64_t v) {
        return as_units<T>(source + (wanted[m] * all + cut.live_row(v)) * D);
      },
      1, by_columns<T>([&](int64_t m, int64_t d) { return w + (wanted[m] * D + d) * width; }),
      [&](int64_t m, int64_t v, int64_t column, int64_t count, const float* sums) {
        const int64_t r = cut.live_row(v);
        T* to = places[wanted[m]];
        if (!cut.p)
          share_out(cut, r, column, count, sums, streams, to);
        else if (cut.is_broken(r))
          mend_back(cut, r, column, count, sums, to);
        else
          put_lanes<T>(sums, count, streams, to + cut.place(r) + column);
      });
}

template <typename T>
void weight_gradient(const Cut& cut, const Rows<T>& rows, const Tensor& dx, T* dweight) {
  const int64_t D = dx.size(3), width = cut.width(), all = cut.rows();
  const Products of{cut.count(), D, width, cut.live_rows()};
  if (!of.depth) {
    std::fill_n(dweight, cut.count() * D * width, T(0));
    return;
  }
  const T* source = dx.const_data_ptr<T>();
  const auto row_of = [&](int64_t j, int64_t v) {
    return source + (j * all + cut.live_row(v)) * D;
  };
  const Turned<T> left(of, row_of);
  const bool streams =
      of.count * D * width * int64_t{sizeof(T)} >= kStreamedBytes && can_stream(dweight, width);
  multiply<T>(
      of, [&](int64_t j, int64_t d) { return left.at(j, d); }, left.kStrip,
      by_columns<T>([&](int64_t j, int64_t v) { return rows.at(j, cut.live_row(v)); }),
      [&](int64_t j, int64_t d, int64_t column, int64_t count, const float* sums) {
        put_lanes<T>(sums, count, streams, dweight + (j * D + d) * width + column);
      });
}

// dF of every stage, then dW; what is not needed is an empty tensor. `means` as forward pooled
// them, null to pool again. The stages have a block of their own: theirs are freed on the way, the
// parameters' gradients after the step.
template <typename T>
std::vector<Tensor> projection_gradients(const Cut& cut, const Tensor& weight, const Tensor& dx,
                                         const std::vector<int64_t>& needs, bool needs_weight,
                                         const T* means, KeptGroup& of_stages, KeptGroup& memory) {
  const std::vector<int64_t> tokens{cut.batch, cut.length, cut.channels};
  std::vector<Tensor> results;
  std::vector<T*> places;
  for (int64_t need : needs) {
    results.push_back(need ? of_stages.empty(weight, tokens)
                           : torch::stable::new_empty(weight, {0}));
    places.push_back(need ? results.back().mutable_data_ptr<T>() : nullptr);
  }
  if (std::count(needs.begin(), needs.end(), 1)) stage_gradients<T>(cut, weight, dx, places);
  if (!needs_weight) {
    results.push_back(torch::stable::new_empty(weight, {0}));
    return results;
  }
  results.push_back(memory.empty(weight, {weight.size(0), weight.size(1), weight.size(2)}));
  weight_gradient<T>(cut, means ? Rows<T>(cut, means) : Rows<T>(cut), dx,
                     results.back().mutable_data_ptr<T>());
  return results;
}

inline int64_t bytes_of_stages(const Cut& cut, const std::vector<int64_t>& needs) {
  const Tensor& stage = cut.stages[0];
  return std::count(needs.begin(), needs.end(), 1) *
         KeptGroup::room(stage.numel() * stage.element_size());
}
inline int64_t bytes_like(const Tensor& tensor) {
  return KeptGroup::room(tensor.numel() * tensor.element_size());
}

}  // namespace deepfusion::inline DF_LEVEL
#endif
