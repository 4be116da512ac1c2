// The patch projection of all stages in one call each way, where rows are multiplied as they lie
// (common/row_products.h): conv rows are read in place, pooled ones are means of a patch's tokens.
//
//   X_jr = W_j row_jr + c_j + st_j + pos_i        drow_jr = W_j^T dX_jr        dW_j = sum_r dX_jr
//   row_jr^T
#pragma once

#include "common/checks.h"
#include "common/patches.h"
#include "common/kept_group.h"
#include "common/row_products.h"

#include <optional>
#include <vector>

#if defined(DF_LEVEL_avx512)
namespace deepfusion::inline DF_LEVEL {

using torch::stable::Tensor;

// stages [B, L, H]; p tokens a row, or means of patches if p is 0. Sizes are asked for once: a
// tensor answers through a call into the library.
struct Cut {
  const std::vector<Tensor>& stages;
  const int32_t* offsets;
  const bool* mask;
  int64_t p, batch, length, channels, patches;

  Cut(const std::vector<Tensor>& all, const Tensor& cuts, const bool* valid, int64_t patch_size)
      : stages(all),
        offsets(cuts.const_data_ptr<int32_t>()),
        mask(valid),
        p(patch_size),
        batch(all[0].size(0)),
        length(all[0].size(1)),
        channels(all[0].size(2)),
        patches(cuts.size(1) - 1) {}
  int64_t rows() const { return batch * patches; }
  int64_t width() const { return channels * std::max<int64_t>(p, 1); }
  int64_t count() const { return static_cast<int64_t>(stages.size()); }
  Patch patch(int64_t r) const {
    return patch_at(offsets, mask, patches, length, r / patches, r % patches);
  }
};

// Where the rows of every stage begin: in the stage, or in a buffer of means [J, rows, H].
template <typename T>
class Rows {
 public:
  explicit Rows(const Cut& cut) : Rows(cut, nullptr) {
    if (cut.p) return;
    own_.emplace(cut.count() * cut.rows() * cut.width());
    pool(cut, own_->get());
    read(cut, own_->get());
  }
  // means that were found before, null where the rows lie in the stages
  Rows(const Cut& cut, const T* means) : patches_(cut.patches) {
    for (const Tensor& stage : cut.stages) {
      base_.push_back(stage.const_data_ptr<T>());
      sample_.push_back(stage.stride(0));
      row_.push_back(cut.p * stage.stride(1));
    }
    if (means) read(cut, means);
  }
  const T* at(int64_t j, int64_t r) const {
    return base_[j] + r / patches_ * sample_[j] + r % patches_ * row_[j];
  }
  static void pool(const Cut& cut, T* means) {
    const int64_t rows = cut.rows(), width = cut.width();
    for_rows(cut.count() * rows, 16, [&](int64_t task) {
      const int64_t j = task / rows, r = task % rows;
      const Tensor& stage = cut.stages[j];
      thread_local std::vector<float> mean;
      mean.resize((width + 15) / 16 * 16);  // store_row reads whole lanes
      pool_row(stage.const_data_ptr<T>() + r / cut.patches * stage.stride(0), stage.stride(1),
               cut.patch(r), width, mean.data());
      store_row(mean.data(), width, means + task * width);
    });
  }

 private:
  void read(const Cut& cut, const T* means) {
    const int64_t width = cut.width();
    for (int64_t j = 0; j < cut.count(); ++j) {
      base_[j] = means + j * cut.rows() * width;
      sample_[j] = patches_ * width;
      row_[j] = width;
    }
  }
  static void store_row(const float* row, int64_t width, T* to) {
    for (int64_t c = 0; c < width; c += 16)
      store_lanes<16>(row + c, std::min<int64_t>(16, width - c), to + c);
  }

  int64_t patches_;
  std::optional<Aligned<T>> own_;
  std::vector<const T*> base_;
  std::vector<int64_t> sample_, row_;
};

template <typename T>
void project(const Cut& cut, const Rows<T>& rows, const Tensor& weight, const Tensor& bias,
             const std::optional<Tensor>& position, const std::optional<Tensor>& stage, Tensor& x) {
  const Products of{cut.count(), cut.rows(), weight.size(1), cut.width()};
  const T* c = bias.const_data_ptr<T>();
  const T* pos = position ? position->const_data_ptr<T>() : nullptr;
  const T* st = stage ? stage->const_data_ptr<T>() : nullptr;
  T* out = x.mutable_data_ptr<T>();
  const int64_t D = of.columns, patches = cut.patches;
  multiply<T>(
      of, [&](int64_t j, int64_t r) { return as_units<T>(rows.at(j, r)); }, 1,
      ByRows<T>{weight.const_data_ptr<T>(), &of},
      [&](int64_t j, int64_t r, int64_t column, int64_t count, const float* sums) {
        constexpr int64_t WIDTH = kColumns<T>;
        alignas(64) float lanes[WIDTH], more[WIDTH];
        load_lanes<WIDTH>(c + j * D + column, count, lanes);
        for (int64_t i = 0; i < WIDTH; ++i) lanes[i] += sums[i];
        const auto add = [&](const T* row) {
          load_lanes<WIDTH>(row + column, count, more);
          for (int64_t i = 0; i < WIDTH; ++i) lanes[i] += more[i];
        };
        if (st) add(st + j * D);
        if (pos) add(pos + r % patches * D);
        round_lanes<T, WIDTH>(lanes, count, out + (j * of.rows + r) * D + column);
      });
}

// Tokens of no patch get 0.
template <typename T>
void clear_outside(const Cut& cut, const std::vector<T*>& places) {
  const int64_t length = cut.length, width = cut.channels;
  const int64_t count = static_cast<int64_t>(places.size());
  for_rows(cut.batch * count, 16, [&](int64_t task) {
    const int64_t b = task / count, last = (b + 1) * cut.patches - 1;
    if (!places[task % count]) return;
    T* sample = places[task % count] + b * length * width;
    std::fill(sample, sample + cut.patch(b * cut.patches).begin * width, T(0));
    std::fill(sample + cut.patch(last).end * width, sample + length * width, T(0));
  });
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
  const Products of{static_cast<int64_t>(wanted.size()), all, width, D};
  const T* w = weight.const_data_ptr<T>();
  const T* source = dx.const_data_ptr<T>();
  const bool streams = of.count * cut.stages[0].numel() * int64_t{sizeof(T)} >= kStreamedBytes &&
                       can_stream(places[wanted[0]], cut.channels);
  if (!cut.p) clear_outside(cut, places);
  multiply<T>(
      of, [&](int64_t m, int64_t r) { return as_units<T>(source + (wanted[m] * all + r) * D); }, 1,
      by_columns<T>([&](int64_t m, int64_t d) { return w + (wanted[m] * D + d) * width; }),
      [&](int64_t m, int64_t r, int64_t column, int64_t count, const float* sums) {
        T* to = places[wanted[m]];
        if (cut.p)
          put_lanes<T>(sums, count, streams, to + r * width + column);
        else
          share_out(cut, r, column, count, sums, streams, to);
      });
}

template <typename T>
void weight_gradient(const Cut& cut, const Rows<T>& rows, const Tensor& dx, T* dweight) {
  const int64_t D = dx.size(3), width = cut.width(), all = cut.rows();
  const Products of{cut.count(), D, width, all};
  const T* source = dx.const_data_ptr<T>();
  const Turned<T> left(of, [&](int64_t j, int64_t r) { return source + (j * all + r) * D; });
  const bool streams =
      of.count * D * width * int64_t{sizeof(T)} >= kStreamedBytes && can_stream(dweight, width);
  multiply<T>(
      of, [&](int64_t j, int64_t d) { return left.at(j, d); }, left.kStrip,
      by_columns<T>([&](int64_t j, int64_t r) { return rows.at(j, r); }),
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

inline Cut cut_of(const std::vector<Tensor>& stages, const Tensor& offsets,
                  const std::optional<Tensor>& mask, int64_t patch_size) {
  for (const Tensor& stage : stages)
    check_dense_rows(stage, "view_aligned_attention", "student_stages");
  return {stages, offsets, mask ? mask->const_data_ptr<bool>() : nullptr, patch_size};
}

}  // namespace deepfusion::inline DF_LEVEL
#endif
