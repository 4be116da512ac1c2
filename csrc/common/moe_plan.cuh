// The plan's counting sort in a block of threads: ranks by warp match, never by the order in which
// threads come.
//
//   rank of a slot = slots of its expert before it: within its warp, then warps before, then blocks
#pragma once

#include "common/cuda.cuh"

namespace deepfusion {
inline namespace device {

constexpr int kMaxExperts = 1024;
constexpr int kPlanWarps = 16;
constexpr int kPlanThreads = kPlanWarps * kWarp;
// Counts of one warp's slots by expert, then of all warps before it. Two bytes: a block takes at
// most kMostSlots.
using PlanCounters = uint16_t[kPlanWarps][kMaxExperts];
constexpr int64_t kMostSlots = 32768;

// The expert of an id, -1 for a sentinel.
template <typename Id>
__device__ __forceinline__ int32_t expert_of(Id id, int32_t num_experts) {
  return id >= 0 && id < num_experts ? static_cast<int32_t>(id) : -1;
}

// Slots begin .. end of one block, one piece of them a warp.
struct PlanPiece {
  int64_t begin, end;

  __device__ PlanPiece(int64_t block_begin, int64_t block_end) {
    const int64_t tiles = (block_end - block_begin + kPlanThreads - 1) / kPlanThreads;
    begin = block_begin + tiles * kWarp * (threadIdx.x / kWarp);
    end = begin + tiles * kWarp < block_end ? begin + tiles * kWarp : block_end;
  }
};

// slots[s] = rank of slot s among its warp's, -1 for sentinels; counters = the warps' counts.
template <typename Id>
__device__ void rank_in_warp(const Id* experts, const PlanPiece& piece, int32_t num_experts,
                             PlanCounters& counters, int32_t* slots) {
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int32_t e = threadIdx.x; e < num_experts; e += kPlanThreads) {
    for (int32_t w = 0; w < kPlanWarps; ++w) counters[w][e] = 0;
  }
  __syncthreads();
  for (int64_t first = piece.begin; first < piece.end; first += kWarp) {
    const int64_t slot = first + lane;
    const int32_t e = slot < piece.end ? expert_of(__ldg(experts + slot), num_experts) : -1;
    const unsigned peers = __match_any_sync(kAllLanes, e);
    const int32_t before = e < 0 ? 0 : counters[warp][e];
    const int32_t rank = before + __popc(peers & ((1u << lane) - 1));
    __syncwarp();
    // the highest of the peers
    if (e >= 0 && peers >> lane == 1) counters[warp][e] = static_cast<uint16_t>(rank + 1);
    __syncwarp();
    if (slot < piece.end) slots[slot] = e < 0 ? -1 : rank;
  }
  __syncthreads();
}

// counters[w][e] = slots of expert e in the warps before w; returns all of them.
__device__ inline int32_t sum_over_warps(PlanCounters& counters, int32_t e) {
  int32_t total = 0;
#pragma unroll
  for (int32_t w = 0; w < kPlanWarps; ++w) {
    const int32_t count = counters[w][e];
    counters[w][e] = static_cast<uint16_t>(total);
    total += count;
  }
  return total;
}

// values[i] = sum of the values before i, for up to two values a thread; returns the sum of all.
__device__ inline int32_t exclusive_scan(int32_t* values, int32_t count) {
  __shared__ int32_t of_warp[kPlanWarps];
  const int32_t thread = threadIdx.x, lane = thread % kWarp, i = 2 * thread;
  __syncthreads();
  const int32_t low = i < count ? values[i] : 0, high = i + 1 < count ? values[i + 1] : 0;
  int32_t sum = low + high;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, sum, step);
    sum += lane >= step ? other : 0;
  }
  if (lane == kWarp - 1) of_warp[thread / kWarp] = sum;
  __syncthreads();
  int32_t before = 0, total = 0;
#pragma unroll
  for (int32_t w = 0; w < kPlanWarps; ++w) {
    before += w < thread / kWarp ? of_warp[w] : 0;
    total += of_warp[w];
  }
  if (i < count) values[i] = before + sum - low - high;
  if (i + 1 < count) values[i + 1] = before + sum - high;
  __syncthreads();
  return total;
}

}  // namespace device
}  // namespace deepfusion
