// Host code that the CPU and CUDA kernels of multiscale_roi_align share.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "common/roi_placement.h"

namespace cascadeops {

// The options of the operator, after its checks. extra_subdivision: 0 if all maps belong to the pyramid.
inline RoiPlacement placement_of(const std::vector<torch::stable::Tensor>& maps, int64_t bins_y, int64_t bins_x,
                                 const std::vector<double>& spatial_scales, int64_t sampling_ratio, bool aligned,
                                 double finest_size, bool epsilon_inside_log, int64_t extra_subdivision) {
  RoiPlacement placement{};
  placement.maps = static_cast<int>(maps.size());
  placement.levels = placement.maps - (extra_subdivision > 0 ? 1 : 0);
  for (int map = 0; map < placement.maps; ++map) {
    placement.height[map] = maps[map].size(2);
    placement.width[map] = maps[map].size(3);
    placement.spatial_scale[map] = spatial_scales[map];
  }
  placement.images = maps[0].size(0);
  placement.bins_y = bins_y;
  placement.bins_x = bins_x;
  placement.subdivision = extra_subdivision;
  placement.sampling_ratio = sampling_ratio;
  placement.aligned = aligned;
  placement.epsilon_inside_log = epsilon_inside_log;
  placement.finest_size = static_cast<float>(finest_size);
  return placement;
}

}  // namespace cascadeops
