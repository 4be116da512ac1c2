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

// Blocks that begin at large pages, in eight sizes an octave: batches differ by rows, and a block
// for each number of them would fill the memory. Beyond a few, at most twice as much is kept as was
// ever in use at once: not all blocks of a training step live together. Larger kept blocks are
// marked as free to the kernel: it takes them back when memory is short, and only then are they
// cleared again.
class KeptMemory {
 public:
  static constexpr int64_t kPage = int64_t{2} << 20;
  static constexpr int64_t kMostKept = int64_t{1} << 30;
  // blocks that are never alive together must not drive each other out
  static constexpr int64_t kAlwaysKept = int64_t{32} << 20;
  // the mark walks every page of a block, which small calls notice
  static constexpr int64_t kUnmarked = int64_t{4} << 20;

  static KeptMemory& instance() {
    // NOTE: never destroyed, since tensors may outlive every static object
    static KeptMemory* memory = new KeptMemory;
    return *memory;
  }

  // what tensors of so many bytes touch of a block: the rest of it has no pages
  static int64_t whole_pages(int64_t bytes) { return (bytes + 4095) / 4096 * 4096; }

  static int64_t block_bytes(int64_t bytes) {
    int64_t step = 4096;
    while (step * 16 <= bytes) step *= 2;
    return (bytes + step - 1) / step * step;
  }

#if defined(__linux__)
  // Null if there is no memory. `bytes` are whole pages.
  void* take(int64_t bytes) {
    const int64_t size = block_bytes(bytes);
    void* data = reuse(size);
    if (!data) data = map(size);
    if (!data) return nullptr;
    HeldBytes::add(bytes);
    const std::lock_guard guard(lock_);
    used_bytes_ += size;
    most_used_ = std::max(most_used_, used_bytes_);
    return data;
  }

  void give(void* data, int64_t bytes) {
    const int64_t size = block_bytes(bytes);
    HeldBytes::add(-bytes);
    if (size > kUnmarked) madvise(data, bytes, MADV_FREE);
    const std::lock_guard guard(lock_);
    used_bytes_ -= size;
    kept_.push_back({data, size});
    kept_bytes_ += size;
    // oldest first: sizes that nobody asks for any more
    while (kept_bytes_ > std::clamp(2 * most_used_, kAlwaysKept, kMostKept)) {
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

#if defined(__linux__)
  // the block of this size that was freed last, or null
  void* reuse(int64_t size) {
    const std::lock_guard guard(lock_);
    const auto found = std::find_if(kept_.rbegin(), kept_.rend(),
                                    [&](const Block& block) { return block.bytes == size; });
    if (found == kept_.rend()) return nullptr;
    void* data = found->data;
    kept_.erase(std::next(found).base());
    kept_bytes_ -= size;
    return data;
  }

  static void* map(int64_t size) {
    void* mapped = mmap(nullptr, size + kPage, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    char* begin = static_cast<char*>(mapped);
    char* data = begin + (kPage - reinterpret_cast<uintptr_t>(begin) % kPage) % kPage;
    if (data > begin) munmap(begin, data - begin);
    if (begin + kPage > data) munmap(data + size, begin + kPage - data);
    madvise(data, size, MADV_HUGEPAGE);
    return data;
  }
#endif

  std::mutex lock_;
  std::vector<Block> kept_;
  int64_t kept_bytes_ = 0;
  int64_t used_bytes_ = 0;
  int64_t most_used_ = 0;
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
