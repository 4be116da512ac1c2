// The plan on CUDA: a stable counting sort, the same in every run, without a word to the host.
//
//   up to 8192 slots   one block: rank, scan, place
//   more               count: ranks in blocks of slots, counts [E, blocks]
//                      scan:  a warp an expert, over its blocks
//                      place: offsets from the experts' totals, then every slot
#include "common/checks.h"
#include "common/moe_plan.cuh"
#include "common/torch_cuda.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <tuple>

namespace {

using namespace deepfusion;
using torch::headeronly::ScalarType;

constexpr int64_t kOneBlock = 8192;
constexpr int64_t kLeastSlots = 2048;  // of a block where there are several; not measured
constexpr int64_t kManyBlocks = 1024;
constexpr int kScanWarps = 8;

struct PlanCall {
  int64_t num_slots, slots_per_block, blocks;
  int32_t num_experts;
  int32_t *order, *slots, *offsets;
  int32_t *counts, *totals;  // of several blocks: [E, blocks] and [E]
};

// Writes offsets [E + 1] from the experts' totals, which become their first rows.
__device__ int32_t place_experts(const PlanCall& call, int32_t* totals, bool writes) {
  const int32_t E = call.num_experts;
  const int32_t num_rows = exclusive_scan(totals, E);
  if (writes) {
    for (int32_t e = threadIdx.x; e < E; e += kPlanThreads) call.offsets[e] = totals[e];
    if (threadIdx.x == 0) call.offsets[E] = num_rows;
  }
  return num_rows;
}

// Two blocks a multiprocessor: left alone, ptxas aims at three on sm_120 and spills.
template <typename Id>
__global__ void __launch_bounds__(kPlanThreads, 2)
    plan_one_block_kernel(const Id* experts, PlanCall call) {
  __shared__ PlanCounters counters;
  __shared__ int32_t totals[kMaxExperts];
  const PlanPiece piece(0, call.num_slots);
  const int32_t E = call.num_experts;
  rank_in_warp(experts, piece, E, counters, call.slots);
  for (int32_t e = threadIdx.x; e < E; e += kPlanThreads) totals[e] = sum_over_warps(counters, e);
  const int32_t num_rows = place_experts(call, totals, true);
  for (int64_t s = piece.begin + threadIdx.x % kWarp; s < piece.end; s += kWarp) {
    const int32_t e = expert_of(experts[s], E);
    if (e < 0) continue;
    const int32_t row = totals[e] + counters[threadIdx.x / kWarp][e] + call.slots[s];
    call.slots[s] = row;
    call.order[row] = static_cast<int32_t>(s);
  }
  for (int64_t r = num_rows + threadIdx.x; r < call.num_slots; r += kPlanThreads)
    call.order[r] = -1;
}

template <typename Id>
__global__ void __launch_bounds__(kPlanThreads, 2)
    plan_count_kernel(const Id* experts, PlanCall call) {
  __shared__ PlanCounters counters;
  const int64_t begin = blockIdx.x * call.slots_per_block;
  const PlanPiece piece(begin, min(begin + call.slots_per_block, call.num_slots));
  const int32_t E = call.num_experts;
  rank_in_warp(experts, piece, E, counters, call.slots);
  for (int32_t e = threadIdx.x; e < E; e += kPlanThreads)
    call.counts[e * call.blocks + blockIdx.x] = sum_over_warps(counters, e);
  __syncthreads();
  for (int64_t s = piece.begin + threadIdx.x % kWarp; s < piece.end; s += kWarp) {
    const int32_t e = expert_of(experts[s], E);
    if (e >= 0) call.slots[s] += counters[threadIdx.x / kWarp][e];
  }
}

// Of one expert: counts of a block become counts of the blocks before it.
__global__ void __launch_bounds__(kScanWarps* kWarp) plan_scan_kernel(PlanCall call) {
  const int32_t lane = threadIdx.x % kWarp, e = blockIdx.x * kScanWarps + threadIdx.x / kWarp;
  if (e >= call.num_experts) return;
  int32_t* counts = call.counts + e * call.blocks;
  int32_t total = 0;
  for (int64_t first = 0; first < call.blocks; first += kWarp) {
    const int64_t block = first + lane;
    const int32_t count = block < call.blocks ? counts[block] : 0;
    int32_t sum = count;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int32_t other = __shfl_up_sync(kAllLanes, sum, step);
      sum += lane >= step ? other : 0;
    }
    if (block < call.blocks) counts[block] = total + sum - count;
    total += __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
  if (lane == 0) call.totals[e] = total;
}

template <typename Id>
__global__ void __launch_bounds__(kPlanThreads)
    plan_place_kernel(const Id* experts, PlanCall call) {
  __shared__ int32_t first_row[kMaxExperts];
  const int32_t E = call.num_experts;
  for (int32_t e = threadIdx.x; e < E; e += kPlanThreads) first_row[e] = call.totals[e];
  const int32_t num_rows = place_experts(call, first_row, blockIdx.x == 0);
  const int64_t begin = blockIdx.x * call.slots_per_block;
  const int64_t end = min(begin + call.slots_per_block, call.num_slots);
  for (int64_t s = begin + threadIdx.x; s < end; s += kPlanThreads) {
    const int32_t e = expert_of(__ldg(experts + s), E);
    if (e >= 0) {
      const int32_t before = call.counts[e * call.blocks + blockIdx.x];
      const int32_t row = first_row[e] + before + call.slots[s];
      call.slots[s] = row;
      call.order[row] = static_cast<int32_t>(s);
    }
    if (s >= num_rows) call.order[s] = -1;
  }
}

template <typename Id>
void launch(const Id* experts, const PlanCall& call, cudaStream_t stream) {
  if (call.num_slots <= kOneBlock) {
    plan_one_block_kernel<Id><<<1, kPlanThreads, 0, stream>>>(experts, call);
    return;
  }
  const unsigned blocks = static_cast<unsigned>(call.blocks);
  const unsigned groups = (call.num_experts + kScanWarps - 1) / kScanWarps;
  plan_count_kernel<Id><<<blocks, kPlanThreads, 0, stream>>>(experts, call);
  plan_scan_kernel<<<groups, kScanWarps * kWarp, 0, stream>>>(call);
  plan_place_kernel<Id><<<blocks, kPlanThreads, 0, stream>>>(experts, call);
}

std::tuple<Tensor, Tensor, Tensor> moe_plan_cuda(const Tensor& experts, int64_t num_experts) {
  check_shape(experts, "moe_plan", "experts", "[T, K]", {-1, -1});
  STD_TORCH_CHECK(1 <= num_experts && num_experts <= kMaxExperts,
                  "moe_plan: num_experts must be within 1 .. ", kMaxExperts, " on CUDA, got ",
                  num_experts);
  STD_TORCH_CHECK(experts.numel() < int64_t{1} << 31,
                  "moe_plan: experts must be of fewer than 2^31 slots, got ", experts.numel());
  torch::stable::accelerator::DeviceGuard guard(experts.get_device_index());
  const Tensor ids = torch::stable::contiguous(experts);
  PlanCall call = {};
  call.num_slots = ids.numel();
  call.num_experts = static_cast<int32_t>(num_experts);
  const int64_t even = (call.num_slots / kManyBlocks + kWarp) / kWarp * kWarp;
  call.slots_per_block = std::clamp(even, kLeastSlots, kMostSlots);
  call.blocks = (call.num_slots + call.slots_per_block - 1) / call.slots_per_block;
  const auto ints = [&](int64_t count) {
    return torch::stable::new_empty(ids, {count}, ScalarType::Int);
  };
  const bool is_one_block = call.num_slots <= kOneBlock;
  Tensor order = ints(call.num_slots), offsets = ints(num_experts + 1);
  Tensor slots = torch::stable::new_empty(ids, {ids.size(0), ids.size(1)}, ScalarType::Int);
  Tensor counts = ints(is_one_block ? 0 : num_experts * call.blocks);
  Tensor totals = ints(is_one_block ? 0 : num_experts);
  call.order = order.mutable_data_ptr<int32_t>();
  call.slots = slots.mutable_data_ptr<int32_t>();
  call.offsets = offsets.mutable_data_ptr<int32_t>();
  call.counts = counts.mutable_data_ptr<int32_t>();
  call.totals = totals.mutable_data_ptr<int32_t>();
  const cudaStream_t stream = current_stream(ids.get_device_index());
  THO_DISPATCH_V2(ids.scalar_type(), "moe_plan",
                  AT_WRAP([&] { launch(ids.const_data_ptr<scalar_t>(), call, stream); }),
                  ScalarType::Long, ScalarType::Int);
  check_launch("moe_plan");
  return {order, slots, offsets};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepfusion_native, CUDA, m) {
  m.impl("moe_plan", TORCH_BOX(&moe_plan_cuda));
}
