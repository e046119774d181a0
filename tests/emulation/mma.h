// Stands for the CUDA toolkit's header of this name: 16 x 16 x 16 products of half types with float32 sums. Each lane
// holds a row's half of every fragment, and the warp's 32 lanes bring theirs together; so all must take part, at the
// same place and with the same addresses. Sums are added in another order than by a tensor core, with float32 rounding.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "cuda_runtime.h"

namespace nvcuda::wmma {

struct row_major {};
struct col_major {};
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
enum layout_t { mem_row_major };

constexpr int kSide = 16, kOwn = kSide * kSide / emulation::kWarp;

template <typename Use, int m, int n, int k, typename T, typename Layout = row_major>
struct fragment {
  static_assert(m == kSide && n == kSide && k == kSide);
  float x[kOwn];
};

inline int own_lane() { return static_cast<int>(threadIdx.x) % emulation::kWarp; }  // blocks are one-dimensional

// Element i of this lane's part.
inline int own_row(int i) { return (own_lane() * kOwn + i) / kSide; }
inline int own_column(int i) { return (own_lane() * kOwn + i) % kSide; }

// Checks what the warp must agree on: address and distance of rows, both aligned.
inline void check_matrix(const char* operation, const void* data, unsigned stride, size_t element,
                         emulation::Place place) {
  if (reinterpret_cast<uintptr_t>(data) % 32 != 0 || stride * element % 16 != 0)
    emulation::fault(std::string(operation) + ": the matrix is not aligned to 32 bytes, or its rows not to 16");
  const uint64_t own = reinterpret_cast<uintptr_t>(data) + (uint64_t{stride} << 48);
  const uint64_t* all = emulation::meet_warp(operation, place, ~0u, own);
  for (int lane = 0; lane < emulation::kWarp; ++lane)
    if (all[lane] != own) emulation::fault(std::string(operation) + ": lanes name different matrices");
}

template <typename Use, typename T>
void fill_fragment(fragment<Use, 16, 16, 16, T>& to, float value) {
  for (float& element : to.x) element = value;
}

template <typename Use, typename T, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& to, const T* from, unsigned stride,
                      emulation::Place place = emulation::Place::here()) {
  check_matrix("load_matrix_sync", from, stride, sizeof(T), place);
  for (int i = 0; i < kOwn; ++i) {
    const int row = own_row(i), column = own_column(i);
    to.x[i] = static_cast<float>(std::is_same_v<Layout, row_major> ? from[row * stride + column]
                                                                   : from[column * stride + row]);
  }
}

template <typename TA, typename LayoutA, typename TB, typename LayoutB>
void mma_sync(fragment<accumulator, 16, 16, 16, float>& d, const fragment<matrix_a, 16, 16, 16, TA, LayoutA>& a,
              const fragment<matrix_b, 16, 16, 16, TB, LayoutB>& b, const fragment<accumulator, 16, 16, 16, float>& c,
              emulation::Place place = emulation::Place::here()) {
  const auto all = [&](const float* own, const float*(&parts)[emulation::kWarp]) {
    const uint64_t* addresses = emulation::meet_warp("mma_sync", place, ~0u, reinterpret_cast<uintptr_t>(own));
    for (int lane = 0; lane < emulation::kWarp; ++lane) parts[lane] = reinterpret_cast<const float*>(addresses[lane]);
  };
  const auto at = [](const float* const* parts, int row, int column) {
    return parts[(row * kSide + column) / kOwn][(row * kSide + column) % kOwn];
  };
  const float *left[emulation::kWarp], *right[emulation::kWarp];
  all(a.x, left);
  all(b.x, right);
  float sums[kOwn];
  for (int i = 0; i < kOwn; ++i) {
    sums[i] = c.x[i];
    for (int k = 0; k < kSide; ++k) sums[i] += at(left, own_row(i), k) * at(right, k, own_column(i));
  }
  __syncwarp(~0u, place);  // nobody's part is read any more
  for (int i = 0; i < kOwn; ++i) d.x[i] = sums[i];
}

inline void store_matrix_sync(float* to, const fragment<accumulator, 16, 16, 16, float>& from, unsigned stride,
                              layout_t, emulation::Place place = emulation::Place::here()) {
  check_matrix("store_matrix_sync", to, stride, sizeof(float), place);
  for (int i = 0; i < kOwn; ++i) to[own_row(i) * stride + own_column(i)] = from.x[i];
}

}  // namespace nvcuda::wmma
