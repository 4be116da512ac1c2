// Runs CUDA kernels on the host, for tests: every thread of a block is a fiber, blocks run one
// after the other, and lanes of a warp meet at its shuffles and votes as on the device.
//
// What it finds: wrong results, lanes that do not meet, barriers that not all reach, shared memory
// read before it is written (it begins as NaN), and, by schedules that let other warps and lanes
// run first, missing barriers. What it cannot find: speed, alignment, memory order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <tuple>
#include <utility>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned of_x = 1, unsigned of_y = 1, unsigned of_z = 1)
      : x(of_x), y(of_y), z(of_z) {}
};

namespace cuda_on_host {

constexpr unsigned kLanes = 32;

// What lanes meet for; all lanes of a warp must come for the same.
enum class Meeting { kShuffle, kBallot, kReduce, kMatch, kSync, kProduct };

struct Exchange {
  unsigned arrived = 0, read = 0;
  Meeting meeting = Meeting::kSync;
  uint64_t values[kLanes] = {};
};

extern dim3 block_index, block_extent, grid_extent;

// Of the running thread.
const dim3& thread_index();
unsigned lane();

// Leaves a value and waits until all lanes have left theirs.
Exchange& meet(Meeting meeting, unsigned mask, uint64_t value);
void leave(Exchange& exchange);
void sync_block();

// Ends the launch with std::runtime_error.
[[noreturn]] void refuse(const char* what);

// Shared memory of the launch, `bytes` of it; NaN when a block begins, and nothing past its end may
// be written.
unsigned char* dynamic_shared();

// More than 48 KiB are asked for by name of the kernel first, and no target has more than 227.
void allow_shared(const void* kernel, size_t bytes);

// Runs body once for every thread of every block; throws std::runtime_error if threads never meet.
void run(dim3 grid, dim3 block, const std::function<void()>& body, size_t shared_bytes = 0,
         const void* kernel = nullptr);

// 0: threads in their order; else each seed is another order of warps and of lanes.
void set_schedule(uint64_t seed);

// Fills shared memory with NaN when the first thread of a block comes to its declaration.
void poison(void* memory, size_t bytes, uint64_t& block_seen);

template <typename Use>
auto exchange(Meeting meeting, unsigned mask, uint64_t value, const Use& use) {
  Exchange& at = meet(meeting, mask, value);
  const auto result = use(at.values);
  leave(at);
  return result;
}

struct NoDevice {
  explicit NoDevice(int32_t) {}
};

// kernel<<<grid, block, bytes, stream>>>(arguments...)
template <typename... Parameters>
class Launch {
 public:
  Launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t bytes = 0, void* = nullptr)
      : kernel_(kernel), grid_(grid), block_(block), bytes_(bytes) {}

  template <typename... Arguments>
  void operator()(Arguments&&... arguments) const {
    const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
    run(
        grid_, block_, [&] { std::apply(kernel_, values); }, bytes_,
        reinterpret_cast<const void*>(kernel_));
  }

 private:
  void (*kernel_)(Parameters...);
  dim3 grid_, block_;
  size_t bytes_;
};

}  // namespace cuda_on_host
