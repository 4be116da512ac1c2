// Results of one call in one kept block: each alone would be below the size that is worth keeping.
#pragma once

#include "common/kept_memory.h"

#include <memory>

namespace deepfusion::inline DF_LEVEL {

// From here on the C library gives freed memory back to the kernel, which clears it page by page
// when it is asked for again: 280 to 460 pages a call of the joined loss at the demo's shape.
constexpr int64_t kLeastKept = int64_t{256} << 10;

// Gives uninitialised tensors, `bytes` in all; the block is kept when the last of them is freed.
class KeptGroup {
 public:
  static int64_t room(int64_t bytes) { return (bytes + 63) / 64 * 64; }

  explicit KeptGroup(int64_t bytes) {
#if defined(__linux__)
    const int64_t whole = KeptMemory::whole_pages(bytes);
    void* data = bytes >= kLeastKept ? KeptMemory::instance().take(whole) : nullptr;
    if (data) {
      next_ = static_cast<char*>(data);
      end_ = next_ + whole;
      block_ = std::shared_ptr<void>(
          data, [whole](void* freed) { KeptMemory::instance().give(freed, whole); });
    }
#endif
  }

  // of the dtype of `like`
  Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes) {
    const Tensor tensor = lend(like, sizes);
    if (block_) next_ += room(tensor.numel() * like.element_size());
    return tensor;
  }

  // The same for as long as nothing else is asked for: what comes next lies in the same place.
  Tensor lend(const Tensor& like, const std::vector<int64_t>& sizes) {
    std::vector<int64_t> strides(sizes.size());
    int64_t count = 1;
    for (size_t axis = sizes.size(); axis-- > 0; count *= sizes[axis]) strides[axis] = count;
    if (end_ - next_ < count * static_cast<int64_t>(like.element_size()))
      return torch::stable::new_empty(like, sizes);
    return torch::stable::from_blob(next_, sizes, strides, like.device(), like.scalar_type(),
                                    [block = block_](void*) {});
  }

 private:
  std::shared_ptr<void> block_;
  char* next_ = nullptr;
  char* end_ = nullptr;
};

}  // namespace deepfusion::inline DF_LEVEL
