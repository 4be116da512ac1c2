// Device helpers: 16-byte loads widened to float32, sums in a fixed order, and the primitives of
// kl_math.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace deepfusion {
inline namespace device {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float exp_nonpositive(float x) {
  return __expf(x);
}
__device__ __forceinline__ float expm1_nonpositive(float x) {
  return expm1f(x);
}
__device__ __forceinline__ float log1p_nonpositive(float y) {
  return log1pf(y);
}

// Butterfly: the same tree in every run, and every lane ends with the sum.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// Sum over a block of whole warps, in every thread. `shared` holds one float a warp and may be used
// again at once.
__device__ __forceinline__ float block_sum(float value, float* shared) {
  value = warp_sum(value);
  const int warps = blockDim.x / kWarp;
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  float total = 0.0f;
  for (int warp = 0; warp < warps; ++warp) total += shared[warp];
  __syncthreads();
  return total;
}

enum class Kind : int32_t { kFloat = 0, kBFloat16 = 1, kHalf = 2 };

__host__ __device__ constexpr int bytes_of(Kind kind) {
  return kind == Kind::kFloat ? 4 : 2;
}

__device__ __forceinline__ float widen(uint16_t bits, Kind kind) {
  return kind == Kind::kBFloat16 ? __uint_as_float(static_cast<uint32_t>(bits) << 16)
                                 : __half2float(__ushort_as_half(bits));
}

__device__ __forceinline__ uint16_t narrow(float value, Kind kind) {
  return kind == Kind::kBFloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(value))
                                 : __half_as_ushort(__float2half_rn(value));
}

constexpr int kLane = 8;  // columns a thread takes at once: 16 bytes of a two-byte type

// Eight columns from `row + first`. The kind is one branch for the whole grid; memory is what costs
// here.
__device__ __forceinline__ void load8(const void* row, int64_t first, Kind kind,
                                      float (&out)[kLane]) {
  if (kind == Kind::kFloat) {
    const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(row) + first);
    const float4 low = __ldg(from), high = __ldg(from + 1);
    out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
    out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
    return;
  }
  const uint4 bits =
      __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(row) + first));
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    out[2 * pair] = widen(static_cast<uint16_t>(words[pair]), kind);
    out[2 * pair + 1] = widen(static_cast<uint16_t>(words[pair] >> 16), kind);
  }
}

__device__ __forceinline__ float load1(const void* row, int64_t v, Kind kind) {
  return kind == Kind::kFloat ? __ldg(static_cast<const float*>(row) + v)
                              : widen(__ldg(static_cast<const uint16_t*>(row) + v), kind);
}

__device__ __forceinline__ void store8(void* row, int64_t first, Kind kind,
                                       const float (&values)[kLane]) {
  if (kind == Kind::kFloat) {
    float4* to = reinterpret_cast<float4*>(static_cast<float*>(row) + first);
    to[0] = make_float4(values[0], values[1], values[2], values[3]);
    to[1] = make_float4(values[4], values[5], values[6], values[7]);
    return;
  }
  uint32_t words[4];
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    words[pair] = narrow(values[2 * pair], kind) |
                  static_cast<uint32_t>(narrow(values[2 * pair + 1], kind)) << 16;
  }
  *reinterpret_cast<uint4*>(static_cast<uint16_t*>(row) + first) =
      make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ void store1(void* row, int64_t v, Kind kind, float value) {
  if (kind == Kind::kFloat) {
    static_cast<float*>(row)[v] = value;
  } else {
    static_cast<uint16_t*>(row)[v] = narrow(value, kind);
  }
}

__host__ __device__ __forceinline__ bool is_aligned16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

}  // namespace device
}  // namespace deepfusion
