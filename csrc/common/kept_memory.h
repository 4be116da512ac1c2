// Large tensors in memory that is kept when they are freed: the kernel clears every fresh page, and
// for a result of a hundred megabytes that takes a tenth of the time of the products that fill it.
#pragma once

#include "common/held_bytes.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace deepfusion::inline DF_LEVEL {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Blocks that begin at large pages, by exact size. Kept ones are marked as free to the kernel: it
// takes them back when memory is short, and only then are they cleared again.
class KeptMemory {
 public:
  static constexpr int64_t kPage = int64_t{2} << 20;
  static constexpr int64_t kMostKept = int64_t{1} << 30;

  static KeptMemory& instance() {
    // NOTE: never destroyed, since tensors may outlive every static object
    static KeptMemory* memory = new KeptMemory;
    return *memory;
  }

  // the tail of a block lies in small pages: a block is not larger than its tensors
  static int64_t whole_pages(int64_t bytes) { return (bytes + 4095) / 4096 * 4096; }

#if defined(__linux__)
  // Null if there is no memory. `bytes` are whole pages.
  void* take(int64_t bytes) {
    {
      const std::lock_guard guard(lock_);
      const auto found = std::find_if(kept_.rbegin(), kept_.rend(),
                                      [&](const Block& block) { return block.bytes == bytes; });
      if (found != kept_.rend()) {
        void* data = found->data;
        kept_.erase(std::next(found).base());
        kept_bytes_ -= bytes;
        HeldBytes::add(bytes);
        return data;
      }
    }
    void* mapped = mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    char* begin = static_cast<char*>(mapped);
    char* data = begin + (kPage - reinterpret_cast<uintptr_t>(begin) % kPage) % kPage;
    if (data > begin) munmap(begin, data - begin);
    if (begin + kPage > data) munmap(data + bytes, begin + kPage - data);
    madvise(data, bytes, MADV_HUGEPAGE);
    HeldBytes::add(bytes);
    return data;
  }

  void give(void* data, int64_t bytes) {
    HeldBytes::add(-bytes);
    madvise(data, bytes, MADV_FREE);
    const std::lock_guard guard(lock_);
    kept_.push_back({data, bytes});
    kept_bytes_ += bytes;
    // oldest first: sizes that nobody asks for any more
    while (kept_bytes_ > kMostKept) {
      munmap(kept_.front().data, kept_.front().bytes);
      kept_bytes_ -= kept_.front().bytes;
      kept_.erase(kept_.begin());
    }
  }
#endif

 private:
  struct Block {
    void* data;
    int64_t bytes;
  };
  std::mutex lock_;
  std::vector<Block> kept_;
  int64_t kept_bytes_ = 0;
};

// An uninitialised tensor on the CPU. Small ones come from torch, whose allocator keeps them.
inline Tensor kept_empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype,
                         int64_t item_bytes) {
#if defined(__linux__)
  constexpr int64_t kLarge = int64_t{4} << 20;
  std::vector<int64_t> strides(sizes.size());
  int64_t count = 1;
  for (size_t axis = sizes.size(); axis-- > 0; count *= sizes[axis]) strides[axis] = count;
  const int64_t bytes = KeptMemory::whole_pages(count * item_bytes);
  if (count * item_bytes >= kLarge) {
    if (void* data = KeptMemory::instance().take(bytes)) {
      return torch::stable::from_blob(
          data, sizes, strides, like.device(), dtype,
          [bytes](void* freed) { KeptMemory::instance().give(freed, bytes); });
    }
  }
#endif
  return torch::stable::new_empty(like, sizes, dtype);
}

}  // namespace deepfusion::inline DF_LEVEL
