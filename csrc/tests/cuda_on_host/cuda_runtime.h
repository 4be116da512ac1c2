// Stands in for the toolkit's header when kernels are compiled for the host: its words and
// intrinsics.
#pragma once

#include "engine.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __host__
#define __device__
#define __global__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx ::cuda_on_host::thread_index()
#define blockIdx ::cuda_on_host::block_index
#define blockDim ::cuda_on_host::block_extent
#define gridDim ::cuda_on_host::grid_extent

using cudaStream_t = void*;
using cudaError_t = int;
using std::max;
using std::min;

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <typename... Parameters>
inline cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute,
                                        int bytes) {
  cuda_on_host::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
  return 0;
}

template <typename T>
inline T __ldg(const T* from) {
  return *from;
}
inline float __uint_as_float(unsigned bits) {
  return std::bit_cast<float>(bits);
}
inline unsigned __float_as_uint(float value) {
  return std::bit_cast<unsigned>(value);
}
inline float rsqrtf(float x) {
  return 1.0f / std::sqrt(x);
}
inline float __expf(float x) {
  return std::exp(x);
}
inline int __popc(unsigned bits) {
  return std::popcount(bits);
}
template <typename T>
inline T atomicAdd(T* at, T value) {
  static_assert(std::is_integral_v<T>, "sums of floats by atomics depend on the order");
  const T before = *at;
  *at += value;
  return before;
}

template <typename T>
inline uint64_t df_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
inline T df_shuffle(unsigned mask, T value, unsigned from) {
  using namespace cuda_on_host;
  const uint64_t bits = exchange(Meeting::kShuffle, mask, df_bits(value),
                                 [from](const auto& lanes) { return lanes[from % kLanes]; });
  T result;
  std::memcpy(&result, &bits, sizeof(T));
  return result;
}
template <typename T>
inline T __shfl_sync(unsigned mask, T value, int from) {
  return df_shuffle(mask, value, from);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int step) {
  return df_shuffle(mask, value, cuda_on_host::lane() ^ step);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, int step) {
  const int lane = static_cast<int>(cuda_on_host::lane());
  return df_shuffle(mask, value, lane >= step ? lane - step : lane);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  using namespace cuda_on_host;
  return exchange(Meeting::kBallot, mask, vote, [](const auto& lanes) {
    unsigned bits = 0;
    for (unsigned lane = 0; lane < kLanes; ++lane) bits |= lanes[lane] != 0 ? 1u << lane : 0u;
    return bits;
  });
}
inline bool __any_sync(unsigned mask, bool vote) {
  return __ballot_sync(mask, vote) != 0;
}
inline unsigned __match_any_sync(unsigned mask, int value) {
  using namespace cuda_on_host;
  return exchange(Meeting::kMatch, mask, df_bits(value), [value](const auto& lanes) {
    unsigned bits = 0;
    for (unsigned lane = 0; lane < kLanes; ++lane)
      bits |= lanes[lane] == df_bits(value) ? 1u << lane : 0u;
    return bits;
  });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  using namespace cuda_on_host;
  return exchange(Meeting::kReduce, mask, value, [](const auto& lanes) {
    return static_cast<unsigned>(*std::max_element(lanes, lanes + kLanes));
  });
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  using namespace cuda_on_host;
  return exchange(Meeting::kReduce, mask, value, [](const auto& lanes) {
    return static_cast<unsigned>(*std::min_element(lanes, lanes + kLanes));
  });
}
inline void __syncwarp() {
  using namespace cuda_on_host;
  exchange(Meeting::kSync, 0xffffffffu, 0, [](const auto&) { return 0; });
}
inline void __syncthreads() {
  cuda_on_host::sync_block();
}
