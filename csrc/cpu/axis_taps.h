// The cells that the bins of a RoI read along one axis.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/bilinear.h"

namespace cascadeops {

// Averaged bilinear sampling is a matrix product per axis, [bins, samples] x [samples, cells]. This is that matrix, row
// by row: bin p reads cell[i] with weight[i] for i in [begin[p], begin[p + 1]). Neighbouring samples share cells, so
// that about bin size + 1 entries stand for twice as many samples.
template <typename real>
struct AxisTaps {
  std::vector<int64_t> begin, cell;
  std::vector<real> weight;

  int64_t bins() const { return static_cast<int64_t>(begin.size()) - 1; }

  // The map has `size` cells, the first of them at coordinate `origin` of the axis. Samples outside the map are left
  // out, and not visited if there are many. Keeps the vectors' memory from RoI to RoI.
  void build(const RoiAxis<real>& axis, int64_t bins, int64_t origin, int64_t size, real sample_weight) {
    begin.assign(1, 0);
    cell.clear();
    weight.clear();
    const bool ascending = axis.bin > 0;
    for (int64_t bin = 0; bin < bins; ++bin) {
      for (int64_t i = ascending ? first_sample_from(axis, bin, static_cast<real>(origin - 1)) : 0; i < axis.samples;
           ++i) {
        const real position = axis.position(bin, i) - static_cast<real>(origin);
        if (ascending && position > static_cast<real>(size)) break;
        const Taps<real> taps = bilinear_taps(position, size);
        if (!taps.inside) continue;
        add(taps.low, taps.low_weight * sample_weight);
        if (taps.high != taps.low) add(taps.high, taps.high_weight * sample_weight);
      }
      begin.push_back(static_cast<int64_t>(cell.size()));
    }
  }

  // The distinct cells in ascending order; `cell` then counts among these instead of along the axis.
  const std::vector<int64_t>& compact() {
    distinct_ = cell;
    std::sort(distinct_.begin(), distinct_.end());
    distinct_.erase(std::unique(distinct_.begin(), distinct_.end()), distinct_.end());
    for (int64_t& index : cell) index = std::lower_bound(distinct_.begin(), distinct_.end(), index) - distinct_.begin();
    return distinct_;
  }

 private:
  std::vector<int64_t> distinct_;

  // Consecutive samples share at most the last two cells.
  void add(int64_t index, real value) {
    const int64_t count = static_cast<int64_t>(cell.size());
    for (int64_t i = count - 1; i >= std::max(begin.back(), count - 2); --i) {
      if (cell[i] == index) {
        weight[i] += value;
        return;
      }
    }
    cell.push_back(index);
    weight.push_back(value);
  }
};

}  // namespace cascadeops
