// The largest values of a warp, one a round: by value, then by lowest index, in full float32.
//
// A key is a float as an unsigned number of the same order. Lane l holds the keys of indices
// l, l + 32, l + 64, ...; 0 stands for an index past the end. A key that is taken gives its place
// to its rank, and all ranks lie below all keys, so no round finds it again.
#pragma once

#include "common/cuda.cuh"

namespace deepfusion {
inline namespace device {

constexpr uint32_t kNoKey = 0;
constexpr uint32_t kLowestKey = 0x007fffffu;  // -inf

// Equal for both zeros; NaN sorts as -inf.
__device__ __forceinline__ uint32_t sort_key(float value) {
  if (value != value) return kLowestKey;
  const uint32_t bits = value == 0.0f ? 0u : __float_as_uint(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The rank of a taken key, -1 for others.
__device__ __forceinline__ int32_t rank_of(uint32_t key) {
  return key != kNoKey && key < kLowestKey ? static_cast<int32_t>(key) - 1 : -1;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

// Gives the largest key left the rank `rank`. NOTE: some key must be left, or a rank is taken
// again.
template <int kValues>
__device__ __forceinline__ void take_largest(uint32_t (&keys)[kValues], int32_t rank) {
  const unsigned lane = threadIdx.x % kWarp;
  uint32_t best = keys[0];
#pragma unroll
  for (int i = 1; i < kValues; ++i) best = max(best, keys[i]);
  best = __reduce_max_sync(kAllLanes, best);
  unsigned index = 0xffffffffu;
#pragma unroll
  for (int i = kValues - 1; i >= 0; --i) index = keys[i] == best ? i * kWarp + lane : index;
  index = __reduce_min_sync(kAllLanes, index);
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (index == i * kWarp + lane) keys[i] = static_cast<uint32_t>(rank) + 1;
  }
}

}  // namespace device
}  // namespace deepfusion
