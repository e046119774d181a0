// RoIAlign's arithmetic: the pyramid level of a RoI, where its samples lie, and which cells a sample reads.
//
// Axes are independent: the value of bin (p, q) is the sum over rows y and columns x of wy[p][y] * wx[q][x] *
// map[y][x], where wy and wx hold the averaged bilinear weights of the samples along one axis.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/portable.h"

namespace cascadeops {

// floor(log2(x)) for x > 0, taken from the exponent, because log2 rounds differently from machine to machine; 0 and
// subnormal numbers give -127, infinity gives 128.
CASCADEOPS_HD int floor_log2(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return static_cast<int>(bits >> 23 & 0xff) - 127;
}

// Pyramid level of a box: floor(log2(sqrt(width * height) / finest_size)), clamped to [0, levels). 1e-6 is added inside
// the logarithm, or outside of it, where it amounts to a factor of 2^1e-6. A box whose area is NaN is on level 0.
CASCADEOPS_HD int roi_level(float width, float height, float finest_size, bool epsilon_inside_log, int levels) {
  const float scale = sqrtf(width * height) / finest_size;
  if (!(scale > 0.0f)) return 0;
  const int level = floor_log2(epsilon_inside_log ? scale + 1e-6f : scale * 1.00000069314742f);
  return level < 0 ? 0 : level < levels ? level : levels - 1;
}

// The samples of one RoI along one axis, in cells of the map: `samples` of them in each bin, evenly spaced.
template <typename real>
struct RoiAxis {
  real start;       // where bin 0 begins
  real bin;         // size of a bin
  int64_t samples;  // per bin; a reversed box has none, nor has an empty one that is sampled adaptively

  CASCADEOPS_HD real position(int64_t bin_index, int64_t sample) const {
    return start + static_cast<real>(bin_index) * bin +
           (static_cast<real>(sample) + real(0.5)) * bin / static_cast<real>(samples);
  }
};

// Samples per bin and axis, at most: float32 does not tell more of them apart, and neither a box of absurd size nor an
// absurd sampling_ratio may put billions of them onto one spot of the map.
constexpr int64_t kMostSamples = int64_t{1} << 24;

// low, high: the box's edges in pixels. sampling_ratio <= 0: as many samples as a bin has cells, rounded up. A bin is
// cut into `subdivision` smaller ones with so many samples each: the mean over finer bins.
template <typename real>
CASCADEOPS_HD RoiAxis<real> roi_axis(real low, real high, real spatial_scale, int64_t bins, int64_t sampling_ratio,
                                     bool aligned, int64_t subdivision = 1) {
  const real offset = aligned ? real(0.5) : real(0);
  const real start = low * spatial_scale - offset;
  real size = (high * spatial_scale - offset) - start;
  if (!aligned && !(size > real(1))) size = real(1);
  const real bin = size / static_cast<real>(bins);
  if (!(size >= real(0))) return {start, bin, 0};
  const int64_t most = kMostSamples / subdivision;
  if (sampling_ratio > 0) return {start, bin, (sampling_ratio < most ? sampling_ratio : most) * subdivision};
  const real part = bin / static_cast<real>(subdivision);
  const int64_t samples = static_cast<int64_t>(part < real(most) ? ceil(part) : real(most));
  return {start, bin, samples * subdivision};
}

// The first sample of a bin that lies at `position` or beyond it; axis.samples if none does. Positions grow with the
// index, rounding included, so this is exact, and a box of a billion cells costs no more than its part on the map.
template <typename real>
CASCADEOPS_HD int64_t first_sample_from(const RoiAxis<real>& axis, int64_t bin_index, real position) {
  int64_t low = 0, high = axis.samples;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (axis.position(bin_index, middle) >= position)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// The two cells that a sample reads along one axis, and their weights. Beyond the first and the last cell the border's
// value goes on, for one cell; a sample further out, or at NaN, counts as 0.
template <typename real>
struct Taps {
  int64_t low, high;
  real low_weight, high_weight;
  bool inside;
};

template <typename real>
CASCADEOPS_HD Taps<real> bilinear_taps(real position, int64_t size) {
  if (!(position >= real(-1) && position <= static_cast<real>(size))) return {0, 0, real(0), real(0), false};
  if (position < real(0)) position = real(0);
  const int64_t low = static_cast<int64_t>(position);
  if (low >= size - 1) return {size - 1, size - 1, real(1), real(0), true};
  const real high_weight = position - static_cast<real>(low);
  return {low, low + 1, real(1) - high_weight, high_weight, true};
}

// One row of an axis' sampling matrix: calls emit(cell, weight) for the cells that a bin reads, in the order of its
// samples, with the weights of the samples that share a cell added up and multiplied by `sample_weight`. The map has
// `size` cells, the first of them at coordinate `origin` of the axis. Samples outside are left out, and not visited if
// there are many.
template <typename real, typename Emit>
CASCADEOPS_HD void for_each_cell(const RoiAxis<real>& axis, int64_t bin, int64_t origin, int64_t size,
                                 real sample_weight, Emit&& emit) {
  // A sample reads two cells, and a later one none of those before; so two sums are open at a time.
  int64_t older = -1, newer = -1;
  real older_weight = 0, newer_weight = 0;
  const auto add = [&](int64_t cell, real weight) {
    if (cell == older) {
      older_weight += weight;
    } else if (cell == newer) {
      newer_weight += weight;
    } else {
      if (older >= 0) emit(older, older_weight);
      older = newer;
      older_weight = newer_weight;
      newer = cell;
      newer_weight = weight;
    }
  };
  const real shift = static_cast<real>(origin);
  for (int64_t i = first_sample_from(axis, bin, shift - real(1)); i < axis.samples; ++i) {
    const Taps<real> taps = bilinear_taps(axis.position(bin, i) - shift, size);
    if (!taps.inside) break;  // and so are all that follow
    add(taps.low, taps.low_weight * sample_weight);
    if (taps.high != taps.low) add(taps.high, taps.high_weight * sample_weight);
  }
  if (older >= 0) emit(older, older_weight);
  if (newer >= 0) emit(newer, newer_weight);
}

}  // namespace cascadeops
