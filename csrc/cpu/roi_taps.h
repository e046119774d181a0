// What one RoI reads of one map on the CPU, and the order in which the kernels visit RoIs.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "common/roi_placement.h"
#include "cpu/axis_taps.h"

namespace cascadeops {

template <typename real>
struct RoiTaps {
  AxisTaps<real> y, x;

  void build(const RoiPlacement& placement, const float* roi, int map) {
    const auto ys = placement.y_axis<real>(roi, map), xs = placement.x_axis<real>(roi, map);
    y.build(ys, placement.bins_y, 0, placement.height[map], real(1) / static_cast<real>(ys.samples));
    x.build(xs, placement.bins_x, 0, placement.width[map], real(1) / static_cast<real>(xs.samples));
  }
};

// Calls body(draw) on every thread, where draw() gives the next of `count` tasks, or a number >= count at the end:
// tasks cost very different times, and a thread that is done helps with the rest. Tasks must not depend on each other.
template <typename Body>
void share_tasks(int64_t count, Body&& body) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(
      0, threads, 1, [&](int64_t, int64_t) { body([&] { return next.fetch_add(1, std::memory_order_relaxed); }); });
}

}  // namespace cascadeops
