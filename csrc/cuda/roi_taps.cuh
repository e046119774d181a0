// The cells that the bins of a RoI read, in shared memory: the CUDA counterpart of csrc/cpu/axis_taps.h.
#pragma once

#include <cstdint>

#include "common/bilinear.h"

namespace cascadeops {

// One axis: bin p reads cell[i] with weight[i] for i in [begin[p], begin[p + 1]).
template <typename real>
struct SharedTaps {
  int* begin;    // [bins + 1]
  real* weight;  // [capacity]
  int* cell;     // [capacity]

  // Neighbouring bins share at most two cells, so an axis of `size` cells never has more entries.
  static __host__ __device__ int64_t capacity(int64_t bins, int64_t size) { return size + 2 * bins; }

  // Shared memory of one axis, a multiple of 16 bytes.
  static __host__ __device__ int64_t bytes(int64_t bins, int64_t size) {
    return round_up((bins + 1) * sizeof(int)) + round_up(capacity(bins, size) * (sizeof(real) + sizeof(int)));
  }

  SharedTaps() = default;
  __device__ SharedTaps(char* memory, int64_t bins, int64_t size)
      : begin(reinterpret_cast<int*>(memory)),
        weight(reinterpret_cast<real*>(memory + round_up((bins + 1) * sizeof(int)))),
        cell(reinterpret_cast<int*>(weight + capacity(bins, size))) {}

 private:
  static __host__ __device__ int64_t round_up(int64_t bytes) { return (bytes + 15) / 16 * 16; }
};

// What for_each_cell needs to know about an axis.
template <typename real>
struct AxisOnMap {
  RoiAxis<real> axis;
  int64_t bins, origin, size;
  real sample_weight;
};

// Fills both axes' taps with one thread per bin; called by the whole block, and synchronises it.
template <typename real>
__device__ void build_taps(const AxisOnMap<real>& y, const AxisOnMap<real>& x, const SharedTaps<real>& y_taps,
                           const SharedTaps<real>& x_taps) {
  for (int64_t t = threadIdx.x; t < y.bins + x.bins; t += blockDim.x) {
    const AxisOnMap<real> on = t < y.bins ? y : x;
    const int64_t bin = t < y.bins ? t : t - y.bins;
    int count = 0;
    for_each_cell(on.axis, bin, on.origin, on.size, on.sample_weight, [&](int64_t, real) { ++count; });
    (t < y.bins ? y_taps : x_taps).begin[bin + 1] = count;
  }
  __syncthreads();
  if (threadIdx.x < 2) {
    int* begin = threadIdx.x == 0 ? y_taps.begin : x_taps.begin;
    begin[0] = 0;
    for (int64_t bin = 0; bin < (threadIdx.x == 0 ? y.bins : x.bins); ++bin) begin[bin + 1] += begin[bin];
  }
  __syncthreads();
  for (int64_t t = threadIdx.x; t < y.bins + x.bins; t += blockDim.x) {
    const AxisOnMap<real> on = t < y.bins ? y : x;
    const int64_t bin = t < y.bins ? t : t - y.bins;
    const SharedTaps<real> taps = t < y.bins ? y_taps : x_taps;
    int entry = taps.begin[bin];
    for_each_cell(on.axis, bin, on.origin, on.size, on.sample_weight, [&](int64_t cell, real weight) {
      taps.cell[entry] = static_cast<int>(cell);
      taps.weight[entry++] = weight;
    });
  }
  __syncthreads();
}

}  // namespace cascadeops
