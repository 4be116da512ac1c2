// Rows that the patch projection multiplies: conv rows are read in place, pooled ones are means of
// a patch's tokens.
#pragma once

#include "common/checks.h"
#include "common/pack.h"
#include "common/panels.h"
#include "common/patch_tables.h"
#include "common/row_blocks.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#if defined(DF_LEVEL_avx512)
namespace deepfusion::inline DF_LEVEL {

using torch::stable::Tensor;

// stages [B, L, H]; p tokens a row, or means of patches if p is 0. Sizes are asked for once: a
// tensor answers through a call into the library. Rows without a valid token are left out of the
// products.
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
        patches(cuts.size(1) - 1) {
    if (p && !mask && length % p == 0) return;
    for (int64_t r = 0; r < rows(); ++r) {
      const int64_t valid_tokens = patch(r).count();
      if (valid_tokens) live_.push_back(r);
      broken_.push_back(p && valid_tokens < p);
    }
    skips_ = std::ssize(live_) < rows();
    if (!std::count(broken_.begin(), broken_.end(), true)) broken_.clear();
  }
  int64_t rows() const { return batch * patches; }
  int64_t live_rows() const { return skips_ ? std::ssize(live_) : rows(); }
  int64_t live_row(int64_t v) const { return skips_ ? live_[v] : v; }
  // a conv row that is not p valid tokens one after the other
  bool is_broken(int64_t r) const { return !broken_.empty() && broken_[r]; }
  bool breaks() const { return !broken_.empty(); }
  int64_t width() const { return channels * std::max<int64_t>(p, 1); }
  int64_t count() const { return static_cast<int64_t>(stages.size()); }
  Patch patch(int64_t r) const {
    return patch_at(offsets, mask, patches, length, r / patches, r % patches);
  }
  // where row r begins in a dense [B, L, H]
  int64_t place(int64_t r) const { return (r / patches * length + r % patches * p) * channels; }

 private:
  std::vector<int64_t> live_;
  std::vector<bool> broken_;
  bool skips_ = false;
};

// Where the rows of every stage begin: in the stage, or in a buffer of means [J, rows, H]; broken
// ones in a buffer of their own, with 0 for what does not count.
template <typename T>
class Rows {
 public:
  explicit Rows(const Cut& cut) : Rows(cut, nullptr) {
    if (cut.p) {
      if (cut.breaks()) mend(cut);
      return;
    }
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
    if (!slots_.empty() && slots_[r] >= 0) return mended_[j] + slots_[r];
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
  void mend(const Cut& cut) {
    const int64_t width = cut.width(), channels = cut.channels;
    std::vector<int64_t> broken;
    slots_.assign(cut.rows(), -1);
    for (int64_t v = 0; v < cut.live_rows(); ++v) {
      const int64_t r = cut.live_row(v);
      if (!cut.is_broken(r)) continue;
      slots_[r] = std::ssize(broken) * width;
      broken.push_back(r);
    }
    const int64_t each = std::ssize(broken);
    own_.emplace(cut.count() * each * width);
    for (int64_t j = 0; j < cut.count(); ++j) mended_.push_back(own_->get() + j * each * width);
    for_rows(cut.count() * each, 1, [&](int64_t task) {
      const int64_t j = task / each, r = broken[task % each];
      const Tensor& stage = cut.stages[j];
      const T* sample = base_[j] + r / patches_ * sample_[j];
      const Patch patch = cut.patch(r);
      T* to = own_->get() + task * width;
      std::fill_n(to, width, T(0));
      for (int64_t token = patch.begin; token < patch.end; ++token, to += channels)
        if (patch.holds(token)) std::copy_n(sample + token * stage.stride(1), channels, to);
    });
  }
  static void store_row(const float* row, int64_t width, T* to) {
    for (int64_t c = 0; c < width; c += 16)
      store_lanes<16>(row + c, std::min<int64_t>(16, width - c), to + c);
  }

  int64_t patches_;
  std::optional<Aligned<T>> own_;
  std::vector<const T*> base_;
  std::vector<int64_t> sample_, row_;
  std::vector<const T*> mended_;
  std::vector<int64_t> slots_;
};

inline Cut cut_of(const std::vector<Tensor>& stages, const Tensor& offsets,
                  const std::optional<Tensor>& mask, int64_t patch_size) {
  for (const Tensor& stage : stages)
    check_dense_rows(stage, "view_aligned_attention", "student_stages");
  return {stages, offsets, mask_of(mask), patch_size};
}

// Whether few enough rows of a conv are broken to be mended: two a sample, as padding at either end
// breaks them.
inline bool reads_in_place(const Tensor& mask, int64_t patch_size) {
  const int64_t batch = mask.size(0), length = mask.size(1);
  const bool* valid = mask.const_data_ptr<bool>();
  int64_t broken = 0;
  for (int64_t b = 0; b < batch; ++b, valid += length)
    for (int64_t first = 0; first < length; first += patch_size) {
      const int64_t count =
          std::count(valid + first, valid + std::min(length, first + patch_size), true);
      broken += count > 0 && count < patch_size;
    }
  return broken <= 2 * batch;
}

}  // namespace deepfusion::inline DF_LEVEL
#endif
