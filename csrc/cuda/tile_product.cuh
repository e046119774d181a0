// The product of two tiles in shared memory by one block: c[64][128] += a[64][32] * b[32][128].
//
// Half types go through tensor cores (wmma, float32 sums): 8 warps of 2 x 2 fragments of 16 x 16. Other types, and half
// types before sm_80, are multiplied by ordinary instructions: a thread owns 8 rows x 4 columns of c in registers, its
// warp's 32 threads the same rows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>

#include <type_traits>

#include "dispatch.h"

namespace cascadeops {

constexpr int kProductThreads = 256;
constexpr int kTileM = 64, kTileN = 128, kTileK = 32;

// Distances between rows in shared memory: 16 bytes more than a row, so that rows begin on different banks.
template <typename scalar_t, int columns>
constexpr int kRowStride = columns + 16 / static_cast<int>(sizeof(scalar_t));
template <typename scalar_t>
constexpr int kSumStride = kRowStride<accumulate_t<scalar_t>, kTileN>;

// Element (m, k) of a lies at a[m * a_row + k * a_step], one of which is 1; b has rows of kRowStride<scalar_t, kTileN>,
// c of kSumStride<scalar_t>.
template <typename scalar_t, int a_row, int a_step>
class ThreadProduct {
 public:
  using real = accumulate_t<scalar_t>;

  __device__ void multiply(const scalar_t* a, const scalar_t* b) {
    a += row() * a_row;
    b += column();
    for (int k = 0; k < kTileK; ++k, a += a_step, b += kRowStride<scalar_t, kTileN>) {
      real right[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) right[j] = static_cast<real>(b[j]);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const real left = static_cast<real>(a[int64_t{i} * a_row]);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sum_[i][j] = fma(left, right[j], sum_[i][j]);
      }
    }
  }

  __device__ void store(real* c) const {
    c += row() * kSumStride<scalar_t> + column();
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) c[i * kSumStride<scalar_t> + j] = sum_[i][j];
  }

 private:
  static constexpr int kRows = 8, kColumns = 4;
  static_assert(kRows * kColumns * kProductThreads == kTileM * kTileN && kColumns * 32 == kTileN);
  static __device__ int row() { return static_cast<int>(threadIdx.x) / 32 * kRows; }
  static __device__ int column() { return static_cast<int>(threadIdx.x) % 32 * kColumns; }

  real sum_[kRows][kColumns] = {};
};

template <typename scalar_t, int a_row, int a_step>
class TensorProduct {
 public:
  __device__ TensorProduct() {
    for (auto& line : sum_)
      for (auto& fragment : line) nvcuda::wmma::fill_fragment(fragment, 0.0f);
  }

  __device__ void multiply(const scalar_t* a, const scalar_t* b) {
    using namespace nvcuda::wmma;
    using Layout = std::conditional_t<a_step == 1, row_major, col_major>;
    constexpr int b_row = kRowStride<scalar_t, kTileN>;
#pragma unroll
    for (int k = 0; k < kTileK; k += 16) {
      fragment<matrix_a, 16, 16, 16, native_t, Layout> left[2];
      fragment<matrix_b, 16, 16, 16, native_t, row_major> right[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_matrix_sync(left[i], native(a + (row() + 16 * i) * a_row + k * a_step), a_step == 1 ? a_row : a_step);
        load_matrix_sync(right[i], native(b + k * b_row + column() + 16 * i), b_row);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) mma_sync(sum_[i][j], left[i], right[j], sum_[i][j]);
    }
  }

  __device__ void store(float* c) const {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        nvcuda::wmma::store_matrix_sync(c + (row() + 16 * i) * kSumStride<scalar_t> + column() + 16 * j, sum_[i][j],
                                        kSumStride<scalar_t>, nvcuda::wmma::mem_row_major);
  }

 private:
  using native_t = std::conditional_t<std::is_same_v<scalar_t, torch::headeronly::Half>, __half, __nv_bfloat16>;
  static_assert(kProductThreads / 32 * 32 * 32 == kTileM * kTileN);
  static __device__ int row() { return static_cast<int>(threadIdx.x) / 32 / (kTileN / 32) * 32; }
  static __device__ int column() { return static_cast<int>(threadIdx.x) / 32 % (kTileN / 32) * 32; }
  static __device__ const native_t* native(const scalar_t* data) { return reinterpret_cast<const native_t*>(data); }

  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> sum_[2][2];
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
template <typename scalar_t, int a_row, int a_step>
using BlockProduct = std::conditional_t<sizeof(scalar_t) == 2, TensorProduct<scalar_t, a_row, a_step>,
                                        ThreadProduct<scalar_t, a_row, a_step>>;
#else
template <typename scalar_t, int a_row, int a_step>
using BlockProduct = ThreadProduct<scalar_t, a_row, a_step>;
#endif

}  // namespace cascadeops
