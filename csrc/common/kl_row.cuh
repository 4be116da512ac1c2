// Partial sums of a row on CUDA: eight columns of a thread, then lanes, then warps, always in the
// same order.
#pragma once

#include "common/kl_math.h"

namespace deepfusion {
inline namespace device {

__device__ __forceinline__ float max8(const float (&x)[kLane]) {
  float m = x[0];
#pragma unroll
  for (int i = 1; i < kLane; ++i) m = x[i] > m ? x[i] : m;
  return m > kMissing ? m : kMissing;
}

__device__ __forceinline__ ExpSum<float> exp_sum8(const float (&x)[kLane], float m, float inv_tau) {
  ExpSum<float> sum{m, 0.0f};
#pragma unroll
  for (int i = 0; i < kLane; ++i) sum.l += exp_nonpositive((x[i] - m) * inv_tau);
  return sum;
}

__device__ __forceinline__ KLState<float> state8(const float (&s)[kLane], const float (&t)[kLane],
                                                 float inv_tau) {
  KLState<float> state;
  state.s.m = max8(s);
  state.t.m = max8(t);
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    const float x = (s[i] - state.s.m) * inv_tau, y = (t[i] - state.t.m) * inv_tau;
    const float e_x = exp_nonpositive(x), e_y = exp_nonpositive(y);
    state.s.l += e_x;
    state.t.l += e_y;
    state.a += e_y * (y - x);
    state.r += e_x * (x - y);
    state.teacher_alone |= s[i] <= kMissing && t[i] > kMissing;
    state.student_alone |= t[i] <= kMissing && s[i] > kMissing;
  }
  return state;
}

__device__ __forceinline__ ExpSum<float> from_lane(const ExpSum<float>& sum, int step) {
  return {__shfl_xor_sync(kAllLanes, sum.m, step), __shfl_xor_sync(kAllLanes, sum.l, step)};
}

__device__ __forceinline__ KLState<float> from_lane(const KLState<float>& state, int step) {
  KLState<float> other;
  other.s = from_lane(state.s, step);
  other.t = from_lane(state.t, step);
  other.a = __shfl_xor_sync(kAllLanes, state.a, step);
  other.r = __shfl_xor_sync(kAllLanes, state.r, step);
  const int flags = __shfl_xor_sync(kAllLanes, state.teacher_alone + 2 * state.student_alone, step);
  other.teacher_alone = flags & 1;
  other.student_alone = flags & 2;
  return other;
}

// Merges every thread's partial state; the result is the same in all threads of a block of whole
// warps.
template <int kWarps, typename State>
__device__ State block_merge(State state, float inv_tau) {
  // raw bytes: shared memory runs no constructors
  __shared__ alignas(State) unsigned char bytes[kWarps * sizeof(State)];
  State* of_warp = reinterpret_cast<State*>(bytes);
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    state = merge(state, from_lane(state, step), inv_tau);
  }
  __syncthreads();
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = state;
  __syncthreads();
  state = of_warp[0];
  for (int warp = 1; warp < kWarps; ++warp) state = merge(state, of_warp[warp], inv_tau);
  return state;
}

}  // namespace device
}  // namespace deepfusion
