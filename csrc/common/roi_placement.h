// Where RoIs lie on the maps that they are pooled from. Passed to kernels by value.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/bilinear.h"

namespace cascadeops {

// The first `levels` maps are a pyramid, of which a RoI reads the one that fits its size. If there is one map more,
// every RoI reads that one too, with bins cut into subdivision x subdivision smaller ones of their own samples.
struct RoiPlacement {
  static constexpr int kMaxLevels = 8, kMaxMaps = kMaxLevels + 1;

  int64_t height[kMaxMaps], width[kMaxMaps];
  double spatial_scale[kMaxMaps];
  int64_t images;
  int maps, levels;
  int64_t bins_y, bins_x;
  int64_t subdivision, sampling_ratio;
  bool aligned, epsilon_inside_log;
  float finest_size;

  // A row that has no place - padding, a bad batch index, a coordinate that is not finite - belongs to no image.
  // roi: (batch index, x1, y1, x2, y2)
  CASCADEOPS_HD bool is_placed(const float* roi) const {
    bool finite = true;
    for (int i = 1; i < 5; ++i) finite = finite && roi[i] - roi[i] == 0.0f;
    return finite && roi[0] >= 0.0f && roi[0] < static_cast<float>(images);
  }

  CASCADEOPS_HD int level(const float* roi) const {
    return roi_level(roi[3] - roi[1], roi[4] - roi[2], finest_size, epsilon_inside_log, levels);
  }

  CASCADEOPS_HD bool reads(const float* roi, int map) const { return map >= levels || level(roi) == map; }

  template <typename real>
  CASCADEOPS_HD RoiAxis<real> y_axis(const float* roi, int map) const {
    return axis<real>(roi[2], roi[4], map, bins_y);
  }

  template <typename real>
  CASCADEOPS_HD RoiAxis<real> x_axis(const float* roi, int map) const {
    return axis<real>(roi[1], roi[3], map, bins_x);
  }

 private:
  template <typename real>
  CASCADEOPS_HD RoiAxis<real> axis(float low, float high, int map, int64_t bins) const {
    return roi_axis<real>(low, high, static_cast<real>(spatial_scale[map]), bins, sampling_ratio, aligned,
                          map < levels ? 1 : subdivision);
  }
};

}  // namespace cascadeops
