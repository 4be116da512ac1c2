// The stand-in for CUDA itself: what it computes, and that it finds what is wrong with a kernel.
#include "cuda_on_host/engine.cpp"
#include "cuda_on_host/cuda_bf16.h"
#include "cuda_on_host/cuda_fp16.h"
#include "cuda_on_host/mma.h"

#include <cassert>
#include <cstdio>
#include <limits>
#include <numeric>

namespace {

using cuda_on_host::Launch;
using cuda_on_host::set_schedule;

void collectives(unsigned* out) {
  const unsigned thread = threadIdx.x, lane = thread % 32;
  unsigned sum = thread;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  const unsigned up = __shfl_up_sync(~0u, lane, 3), third = __shfl_sync(~0u, lane * 2, 3);
  const unsigned odd = __ballot_sync(~0u, lane % 2), same = __match_any_sync(~0u, int(lane % 5));
  const unsigned most = __reduce_max_sync(~0u, thread), least = __reduce_min_sync(~0u, thread);
  const unsigned warp = thread / 32;
  bool is_right = sum == 32 * 32 * warp + 496 && up == (lane < 3 ? lane : lane - 3) && third == 6;
  is_right &= odd == 0xaaaaaaaau && most == 32 * warp + 31 && least == 32 * warp;
  for (unsigned other = 0; other < 32; ++other)
    is_right &= (same >> other & 1) == (other % 5 == lane % 5);
  atomicAdd(out + blockIdx.x, is_right ? 1u : 1000u);
}

// A reversal through shared memory, with or without its barrier.
void reverse(int* out, bool waits) {
  static int shared[64];
  static uint64_t seen = 0;
  cuda_on_host::poison(shared, sizeof(shared), seen);
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (waits) __syncthreads();
  out[threadIdx.x] = shared[63 - threadIdx.x];
}

void some_lanes_leave(int) {
  if (threadIdx.x % 32 < 4) return;
  __syncwarp();
}

void lanes_part(int) {
  if (threadIdx.x < 16) {
    __syncwarp();
  } else {
    __ballot_sync(~0u, true);
  }
}

void half_a_warp(int) {
  __shfl_xor_sync(0xffffu, 1, 1);
}

// sums = left right by two warps, half of the depth each, added in order.
void multiply(const __half* left, const __half* right, float* sums) {
  using namespace nvcuda::wmma;
  for (unsigned half = 0; half < 2; ++half) {
    if (threadIdx.x / 32 == half) {
      fragment<matrix_a, 16, 16, 16, __half, row_major> a;
      fragment<matrix_b, 16, 16, 16, __half, col_major> b;
      fragment<accumulator, 16, 16, 16, float> c;
      load_matrix_sync(a, left + 16 * half, 32);
      load_matrix_sync(b, right + 16 * half, 32);
      load_matrix_sync(c, sums, 16, mem_row_major);
      mma_sync(c, a, b, c);
      store_matrix_sync(sums, c, 16, mem_row_major);
    }
    __syncthreads();
  }
}

void products_are_products() {
  alignas(32) __half left[16 * 32], right[16 * 32];
  alignas(32) float sums[256] = {};
  for (int i = 0; i < 512; ++i) {
    left[i] = __float2half_rn(static_cast<float>(i % 7 - 3));
    right[i] = __float2half_rn(static_cast<float>(i % 5 - 2));
  }
  Launch(multiply, 1, 64)(left, right, sums);
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 16; ++column) {
      float sum = 0;
      for (int k = 0; k < 32; ++k)
        sum += __half2float(left[row * 32 + k]) * __half2float(right[column * 32 + k]);
      assert(sums[row * 16 + column] == sum);
    }
}

void odd_addresses(int) {
  alignas(32) static float memory[512];
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> tile;
  nvcuda::wmma::load_matrix_sync(tile, memory + 4, 16, nvcuda::wmma::mem_row_major);
}

void a_word_too_far(int words) {
  reinterpret_cast<int*>(cuda_on_host::dynamic_shared())[words] = 1;
}

template <typename Kernel>
bool throws(Kernel kernel, unsigned threads, size_t bytes = 0, int argument = 0) {
  try {
    Launch(kernel, 1, threads, bytes)(argument);
  } catch (const std::runtime_error&) {
    return true;
  }
  return false;
}

std::vector<int> reversed(bool waits) {
  std::vector<int> out(64);
  Launch(reverse, 1, 64)(out.data(), waits);
  return out;
}

void finds_missing_barriers() {
  std::vector<int> right(64);
  std::iota(right.rbegin(), right.rend(), 0);
  int wrong = 0;
  for (uint64_t seed : {0, 1, 2}) {
    set_schedule(seed);
    assert(reversed(true) == right);
    wrong += reversed(false) != right;
  }
  set_schedule(0);
  assert(wrong == 3);
}

void floats_are_rounded_as_defined() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float half = __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
    if (half == half) assert(__half_as_ushort(__float2half_rn(half)) == bits);
  }
  assert(__float2half_rn(1.0f + 0x1p-11f).bits == 0x3c00);  // between two halves: to the even
  assert(__float2half_rn(1.0f + 0x3p-11f).bits == 0x3c02);
  assert(__float2half_rn(0x1p-25f).bits == 0 && __float2half_rn(0x1.8p-25f).bits == 1);
  assert(__float2half_rn(0x1.ffep-15f).bits == 0x0400);  // carries into the exponent
  assert(__float2half_rn(65519.0f).bits == 0x7bff && __float2half_rn(-65520.0f).bits == 0xfc00);
  assert(__float2bfloat16_rn(1.0f + 0x1p-8f).bits == 0x3f80);
  assert(__float2bfloat16_rn(1.0f + 0x3p-8f).bits == 0x3f82);
  assert(__float2bfloat16_rn(std::numeric_limits<float>::max()).bits == 0x7f80);
}

}  // namespace

int main() {
  std::vector<unsigned> right(3, 0);
  for (uint64_t seed : {0, 1, 7}) {
    set_schedule(seed);
    std::fill(right.begin(), right.end(), 0u);
    Launch(collectives, 3, 96)(right.data());
    assert(right == std::vector<unsigned>(3, 96));
  }
  finds_missing_barriers();
  assert(throws(some_lanes_leave, 64) && throws(lanes_part, 32) && throws(half_a_warp, 32));
  assert(throws(some_lanes_leave, 33));
  assert(reversed(true).front() == 63);  // and runs on after a failure
  floats_are_rounded_as_defined();
  products_are_products();
  assert(throws(odd_addresses, 32));
  assert(throws(a_word_too_far, 32, 64, 16) && !throws(a_word_too_far, 32, 64, 15));
  assert(throws(a_word_too_far, 32, 50 << 10));
  cudaFuncSetAttribute(a_word_too_far, cudaFuncAttributeMaxDynamicSharedMemorySize, 50 << 10);
  assert(!throws(a_word_too_far, 32, 50 << 10));
  std::puts("test_cuda_on_host: passed");
  return 0;
}
