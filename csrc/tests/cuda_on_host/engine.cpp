// Fibers by ucontext, switched by _setjmp and _longjmp, which make no system call.
#include "engine.h"

#include <algorithm>
#include <csetjmp>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <ucontext.h>
#include <vector>

namespace cuda_on_host {

dim3 block_index, block_extent, grid_extent;

namespace {

constexpr size_t kStackBytes = 128 << 10;
// what a kernel has without asking, and what a block of the largest target has
constexpr size_t kSharedUnasked = 48 << 10, kSharedMost = 227 << 10;
constexpr size_t kGuardBytes = 256;
constexpr unsigned char kGuard = 0xa5;

enum class State { kReady, kInWarp, kInBlock, kDone };

struct Fiber {
  jmp_buf where;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool is_started = false;
  State state = State::kReady;
  dim3 index;
  unsigned linear = 0, turn = 0;
  uint64_t barrier = 0;
  const Exchange* waits_for = nullptr;
};

// Two exchanges by turns: a lane cannot come to the next but one before all have left this one.
struct Warp {
  Exchange exchanges[2];
};

jmp_buf scheduler;
Fiber* self = nullptr;
const std::function<void()>* body = nullptr;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
unsigned live = 0, at_barrier = 0;
uint64_t barriers = 0, blocks = 0, schedule = 0;
std::string failure;
std::mutex one_launch;
std::map<const void*, size_t> shared_allowed;
alignas(128) unsigned char shared_memory[kSharedMost + kGuardBytes];

// Back to the scheduler, until it resumes this fiber.
__attribute__((noinline)) void yield() {
  if (_setjmp(self->where) == 0) _longjmp(scheduler, 1);
}

void open_barrier_if_all_came() {
  if (live > 0 && at_barrier == live) {
    ++barriers;
    at_barrier = 0;
  }
}

void fiber_main() {
  for (;;) {
    (*body)();
    self->state = State::kDone;
    --live;
    open_barrier_if_all_came();
    yield();
  }
}

__attribute__((noinline)) void resume(Fiber& fiber) {
  self = &fiber;
  if (_setjmp(scheduler) != 0) return;
  if (self->is_started) _longjmp(self->where, 1);
  self->is_started = true;
  setcontext(&self->context);
}

[[noreturn]] void fail(const std::string& what) {
  if (failure.empty()) failure = what;
  for (;;) yield();
}

void prepare(Fiber& fiber, unsigned linear) {
  if (!fiber.is_started) {
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  fiber.state = State::kReady;
  fiber.turn = 0;
  fiber.linear = linear;
  fiber.index = dim3(linear % block_extent.x, linear / block_extent.x % block_extent.y,
                     linear / (block_extent.x * block_extent.y));
}

bool can_run(const Fiber& fiber) {
  if (fiber.state == State::kInWarp) return fiber.waits_for->arrived == kLanes;
  if (fiber.state == State::kInBlock) return fiber.barrier != barriers;
  return fiber.state == State::kReady;
}

// 0 .. count - 1 in the order of the schedule: as they are, backwards, or shuffled.
std::vector<unsigned> order_of(unsigned count, uint64_t seed) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  for (unsigned i = count; seed != 0 && i > 1; --i) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    std::swap(order[i - 1], order[(seed >> 33) % i]);
  }
  return order;
}

// Each warp as far as it comes alone, then the next.
void run_block(const std::vector<unsigned>& warp_order, const std::vector<unsigned>& lane_order) {
  while (live > 0) {
    bool has_moved = false;
    for (unsigned warp : warp_order) {
      for (bool moves = true; moves && failure.empty();) {
        moves = false;
        for (unsigned lane : lane_order) {
          Fiber& fiber = *fibers[warp * kLanes + lane];
          if (fiber.state == State::kDone || !can_run(fiber)) continue;
          resume(fiber);
          moves = has_moved = true;
        }
      }
    }
    if (!failure.empty()) return;
    if (!has_moved) failure = "threads wait for others that never come";
  }
}

}  // namespace

const dim3& thread_index() {
  return self->index;
}

unsigned lane() {
  return self->linear % kLanes;
}

Exchange& meet(Meeting meeting, unsigned mask, uint64_t value) {
  if (mask != 0xffffffffu) fail("only whole warps are served");
  Exchange& at = warps[self->linear / kLanes].exchanges[self->turn++ % 2];
  if (at.arrived == 0) at.meeting = meeting;
  if (at.meeting != meeting) fail("lanes of one warp meet for different things");
  at.values[lane()] = value;
  if (++at.arrived < kLanes) {
    self->state = State::kInWarp;
    self->waits_for = &at;
    yield();
    self->state = State::kReady;
  }
  return at;
}

void leave(Exchange& exchange) {
  if (++exchange.read == kLanes) exchange.arrived = exchange.read = 0;
}

void sync_block() {
  self->barrier = barriers;
  self->state = State::kInBlock;
  ++at_barrier;
  open_barrier_if_all_came();
  if (self->barrier == barriers) yield();
  self->state = State::kReady;
}

void refuse(const char* what) {
  fail(what);
}

unsigned char* dynamic_shared() {
  return shared_memory;
}

void allow_shared(const void* kernel, size_t bytes) {
  const std::lock_guard<std::mutex> lock(one_launch);
  shared_allowed[kernel] = bytes;
}

void run(dim3 grid, dim3 block, const std::function<void()>& kernel, size_t shared_bytes,
         const void* name) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const auto asked = shared_allowed.find(name);
  const size_t allowed = asked == shared_allowed.end() ? 0 : asked->second;
  if (shared_bytes > std::max(kSharedUnasked, allowed) || shared_bytes > kSharedMost)
    throw std::runtime_error("cuda_on_host: more shared memory than the kernel may have");
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > 1024 || threads % kLanes != 0 || grid.x == 0 || grid.y > 65535)
    throw std::runtime_error("cuda_on_host: not a launch of whole warps within the limits");
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  body = &kernel;
  grid_extent = grid;
  block_extent = block;
  failure.clear();
  const auto warp_order = order_of(threads / kLanes, schedule);
  const auto lane_order = order_of(kLanes, schedule == 0 ? 0 : schedule + 1);
  const uint64_t count = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t index = 0; index < count && failure.empty(); ++index) {
    block_index =
        dim3(static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
             static_cast<unsigned>(index / grid.x / grid.y));
    for (unsigned linear = 0; linear < threads; ++linear) prepare(*fibers[linear], linear);
    warps.assign(threads / kLanes, Warp());
    live = threads;
    at_barrier = 0;
    ++blocks;
    if (shared_bytes) std::memset(shared_memory, 0xff, shared_bytes);
    std::memset(shared_memory + shared_bytes, kGuard, kGuardBytes);
    run_block(warp_order, lane_order);
    for (size_t i = 0; i < kGuardBytes && failure.empty(); ++i)
      if (shared_memory[shared_bytes + i] != kGuard) failure = "written past shared memory";
  }
  if (failure.empty()) return;
  // threads stand in the middle of a kernel that nobody ends
  fibers.clear();
  throw std::runtime_error("cuda_on_host: " + failure);
}

void set_schedule(uint64_t seed) {
  schedule = seed;
}

void poison(void* memory, size_t bytes, uint64_t& block_seen) {
  if (block_seen == blocks) return;
  block_seen = blocks;
  std::memset(memory, 0xff, bytes);
}

}  // namespace cuda_on_host

extern "C" __attribute__((visibility("default"))) void df_cuda_on_host_schedule(uint64_t seed) {
  cuda_on_host::set_schedule(seed);
}
