// The gradient of RoIAlign, gathered: a tile of a map collects what the RoIs on it have for its cells.
//
// gradient[y][x] = sum over RoIs, bins p and q of wy[p][y] * wx[q][x] * grad[p][q], with the weights of bilinear.h. The
// owner of a tile adds up its RoIs in order, so nothing is shared, and the sums do not depend on who does what when.
#pragma once

#include <cstdint>

#include "common/bilinear.h"

namespace cascadeops {

constexpr int kTile = 8;         // cells along a side
constexpr int kBinsAtOnce = 16;  // bins along an axis whose weights are held at a time

struct CellRange {
  int64_t first, last;
};

// Cells that samples of an axis with a finite start can read, generously: all of them lie in the range.
template <typename real>
CASCADEOPS_HD CellRange cells_of(const RoiAxis<real>& axis, int64_t bins, int64_t size) {
  const real last_cell = static_cast<real>(size - 1);
  const real low = axis.start - real(1), high = axis.start + static_cast<real>(bins) * axis.bin + real(2);
  // A size beyond the range of the type is infinite, and then some comparison below is not true.
  return {low > real(0) ? static_cast<int64_t>(low < last_cell ? low : last_cell) : 0,
          high < last_cell ? static_cast<int64_t>(high > real(0) ? high : real(0)) : size - 1};
}

// The weights of a bin on the cells [begin, begin + kTile) of an axis of `size` cells; true if one of them is not zero.
template <typename real>
CASCADEOPS_HD bool tile_weights(const RoiAxis<real>& axis, int64_t bin, int64_t begin, int64_t size,
                                real (&weight)[kTile]) {
  for (int i = 0; i < kTile; ++i) weight[i] = 0;
  bool any = false;
  const real sample_weight = real(1) / static_cast<real>(axis.samples);
  const auto add = [&](int64_t cell, real value) {
    const int64_t inside = cell - begin;
    // Written to a place known when compiling, so that the weights stay in registers.
    for (int i = 0; i < kTile; ++i) weight[i] += i == inside ? value : real(0);
    any = any || (inside >= 0 && inside < kTile && value != real(0));
  };
  for (int64_t i = first_sample_from(axis, bin, static_cast<real>(begin - 1)); i < axis.samples; ++i) {
    const Taps<real> taps = bilinear_taps(axis.position(bin, i), size);
    if (!taps.inside || taps.low >= begin + kTile) break;  // and so for all that follow
    add(taps.low, taps.low_weight * sample_weight);
    if (taps.high != taps.low) add(taps.high, taps.high_weight * sample_weight);
  }
  return any;
}

// Weights of up to kBinsAtOnce bins along each axis of one RoI on one tile. Bit p of y_bins is set if bin p has a
// weight that is not zero.
template <typename real>
struct TileTaps {
  real y[kBinsAtOnce][kTile], x[kBinsAtOnce][kTile];
  uint32_t y_bins, x_bins;
};

// Adds the RoI's gradient to one row of a tile: sum[x][c] += sum over p, q of y[p][row] * x[q][x] * grad[p][q][c], with
// the sum over p first, which every cell of the row shares. load(p, q, value) gives the gradient of a bin for the
// `channels` channels at hand.
template <int channels, typename real, typename Load>
CASCADEOPS_HD void gather_row(const TileTaps<real>& taps, int row, Load&& load, real (&sum)[kTile][channels]) {
  uint32_t y_bins = 0;
  for (int p = 0; p < kBinsAtOnce; ++p)
    if ((taps.y_bins >> p & 1) && taps.y[p][row] != real(0)) y_bins |= 1u << p;
  if (y_bins == 0) return;
  for (int q = 0; q < kBinsAtOnce; ++q) {
    if (!(taps.x_bins >> q & 1)) continue;
    real column[channels] = {};
    for (int p = 0; p < kBinsAtOnce; ++p) {
      if (!(y_bins >> p & 1)) continue;
      real value[channels];
      load(p, q, value);
      for (int c = 0; c < channels; ++c) column[c] = fma(taps.y[p][row], value[c], column[c]);
    }
    for (int x = 0; x < kTile; ++x)
      for (int c = 0; c < channels; ++c) sum[x][c] = fma(taps.x[q][x], column[c], sum[x][c]);
  }
}

}  // namespace cascadeops
