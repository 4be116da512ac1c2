// Products of 16 x 16 tiles by a warp: tensor cores for two-byte floats, IEEE float32 for float32.
//
// Which lane holds which element of a sum is for the hardware to know; `Places` asks it.
#pragma once

#include "common/cuda.cuh"

#include <mma.h>

#include <type_traits>

namespace deepfusion {
inline namespace device {

namespace wmma = nvcuda::wmma;
constexpr int kTile = 16;
constexpr int kHeld = 8;  // elements of a tile of sums in one lane

__device__ __forceinline__ float to_float(float value) {
  return value;
}
__device__ __forceinline__ float to_float(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
__device__ __forceinline__ float to_float(__half value) {
  return __half2float(value);
}

template <typename T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (std::is_same_v<T, float>) return value;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(value);
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(value);
}

// float32: lane l holds row l / 2, columns 8 (l % 2) and the seven after.
struct LaneSums {
  float x[kHeld];
};
template <typename T>
using Sums = std::conditional_t<std::is_same_v<T, float>, LaneSums,
                                wmma::fragment<wmma::accumulator, kTile, kTile, kTile, float>>;

__device__ __forceinline__ int lane_row() {
  return static_cast<int>(threadIdx.x) % kWarp / 2;
}
__device__ __forceinline__ int lane_column() {
  return static_cast<int>(threadIdx.x) % 2 * kHeld;
}

template <typename S, int kTiles>
__device__ __forceinline__ void clear(S (&sums)[kTiles]) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) sums[t].x[i] = 0.0f;
  }
}

__device__ __forceinline__ void store_sums(float* to, const LaneSums& from, int pitch) {
#pragma unroll
  for (int i = 0; i < kHeld; ++i) to[lane_row() * pitch + lane_column() + i] = from.x[i];
}
template <typename S>
__device__ __forceinline__ void store_sums(float* to, const S& from, int pitch) {
  wmma::store_matrix_sync(to, from, pitch, wmma::mem_row_major);
}

// Row and column of every element that this lane holds of a tile of sums: a byte each.
template <typename T>
struct Places {
  uint32_t packed[kHeld / 4];

  // `numbers` holds 0 .. 255 as floats.
  __device__ __forceinline__ explicit Places(const float* numbers) {
    Sums<T> tile;
    wmma::load_matrix_sync(tile, numbers, kTile, wmma::mem_row_major);
#pragma unroll
    for (int word = 0; word < kHeld / 4; ++word) {
      packed[word] = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        packed[word] |= static_cast<uint32_t>(tile.x[4 * word + i]) << (8 * i);
    }
  }
  __device__ __forceinline__ int row(int i) const {
    return static_cast<int>(packed[i / 4] >> (8 * (i % 4) + 4) & 15u);
  }
  __device__ __forceinline__ int column(int i) const {
    return static_cast<int>(packed[i / 4] >> (8 * (i % 4)) & 15u);
  }
};

template <>
struct Places<float> {
  __device__ __forceinline__ explicit Places(const float*) {}
  __device__ __forceinline__ int row(int) const { return lane_row(); }
  __device__ __forceinline__ int column(int i) const { return lane_column() + i; }
};

enum class Along { kRows, kColumns };  // which elements of a matrix are neighbours in memory

template <Along kAlong, typename T>
__device__ __forceinline__ const T* element(const T* matrix, int pitch, int row, int column) {
  return kAlong == Along::kRows ? matrix + row * pitch + column : matrix + column * pitch + row;
}

// sums[t] += left [16, kDepth] right [kDepth, 16 kTiles], tile by tile
template <Along kLeft, Along kRight, int kDepth, int kTiles, typename T>
__device__ __forceinline__ void multiply(Sums<T> (&sums)[kTiles], const T* left, int left_pitch,
                                         const T* right, int right_pitch) {
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll(kTiles > 4 ? 1 : 2)
    for (int k = 0; k < kDepth; ++k) {
      const float factor = *element<kLeft>(left, left_pitch, lane_row(), k);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
          const int column = t * kTile + lane_column() + i;
          sums[t].x[i] =
              fmaf(factor, *element<kRight>(right, right_pitch, k, column), sums[t].x[i]);
        }
      }
    }
  } else {
    using Left = std::conditional_t<kLeft == Along::kRows, wmma::row_major, wmma::col_major>;
    using Right = std::conditional_t<kRight == Along::kRows, wmma::row_major, wmma::col_major>;
// not unrolled: fragments of several steps would not fit the registers
#pragma unroll 1
    for (int k = 0; k < kDepth; k += kTile) {
      wmma::fragment<wmma::matrix_a, kTile, kTile, kTile, T, Left> a;
      wmma::load_matrix_sync(a, element<kLeft>(left, left_pitch, 0, k), left_pitch);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        wmma::fragment<wmma::matrix_b, kTile, kTile, kTile, T, Right> b;
        wmma::load_matrix_sync(b, element<kRight>(right, right_pitch, k, t * kTile), right_pitch);
        wmma::mma_sync(sums[t], a, b, sums[t]);
      }
    }
  }
}

}  // namespace device
}  // namespace deepfusion
