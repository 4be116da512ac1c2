// Results of one call in one kept block: each alone would be below the size that is worth keeping.
#pragma once

#include "common/kept_memory.h"

#include <memory>

namespace deepfusion::inline DF_LEVEL {

// Gives uninitialised tensors of the dtype of `like`, `bytes` in all; the block is kept when the
// last of them is freed.
class KeptGroup {
 public:
  static int64_t room(int64_t bytes) { return (bytes + 63) / 64 * 64; }

  KeptGroup(const Tensor& like, int64_t bytes) : like_(like) {
#if defined(__linux__)
    constexpr int64_t kLeast = int64_t{1} << 20;
    const int64_t whole = KeptMemory::whole_pages(bytes);
    void* data = bytes >= kLeast ? KeptMemory::instance().take(whole) : nullptr;
    if (data) {
      next_ = static_cast<char*>(data);
      block_ = std::shared_ptr<void>(
          data, [whole](void* freed) { KeptMemory::instance().give(freed, whole); });
    }
#endif
  }

  Tensor empty(const std::vector<int64_t>& sizes) {
    if (!block_) return torch::stable::new_empty(like_, sizes);
    std::vector<int64_t> strides(sizes.size());
    int64_t count = 1;
    for (size_t axis = sizes.size(); axis-- > 0; count *= sizes[axis]) strides[axis] = count;
    void* data = next_;
    next_ += room(count * like_.element_size());
    return torch::stable::from_blob(data, sizes, strides, like_.device(), like_.scalar_type(),
                                    [block = block_](void*) {});
  }

 private:
  Tensor like_;
  std::shared_ptr<void> block_;
  char* next_ = nullptr;
};

}  // namespace deepfusion::inline DF_LEVEL
