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

  // As for_each_cell; keeps the vectors' memory from RoI to RoI.
  void build(const RoiAxis<real>& axis, int64_t bins, int64_t origin, int64_t size, real sample_weight) {
    begin.assign(1, 0);
    cell.clear();
    weight.clear();
    for (int64_t bin = 0; bin < bins; ++bin) {
      for_each_cell(axis, bin, origin, size, sample_weight, [&](int64_t index, real value) {
        cell.push_back(index);
        weight.push_back(value);
      });
      begin.push_back(static_cast<int64_t>(cell.size()));
    }
  }

  // From here on `cell` counts among the distinct cells, which are in ascending order, instead of along the axis.
  void compact() {
    distinct_ = cell;
    std::sort(distinct_.begin(), distinct_.end());
    distinct_.erase(std::unique(distinct_.begin(), distinct_.end()), distinct_.end());
    for (int64_t& index : cell) index = std::lower_bound(distinct_.begin(), distinct_.end(), index) - distinct_.begin();
  }

  const std::vector<int64_t>& distinct() const { return distinct_; }

 private:
  std::vector<int64_t> distinct_;
};

}  // namespace cascadeops
