// RoIAlign over a feature pyramid on the CPU.
//
// out[k, c, p, q] = sum over y, x of wy[p][y] * wx[q][x] * feature[level k, image k][c, y, x], where wy and wx are the
// averaged bilinear weights of the RoI's samples along one axis (axis_taps.h): a bin of b x b cells then reads about
// (b + 1)^2 cells instead of 4 * ceil(b)^2.
//
// For each bin a vector of channels is summed in registers over the cells. That needs the channels of a cell side by
// side, as in channels-last maps; of other maps the RoI's cells are first packed that way, a vector of channels at a
// time.
//
// Forward: threads share the RoIs. Backward is the same walk transposed: a task owns some channels of one image of one
// map and goes through the RoIs in order, so that nothing is added concurrently and the result does not depend on the
// threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/axis_taps.h"
#include "cpu/simd.h"
#include "dispatch.h"
#include "layout.h"

namespace cascadeops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The weights of one RoI on its map.
template <typename real>
struct RoiTaps {
  AxisTaps<real> y, x;
};

template <typename scalar_t, int vectors, typename real>
CASCADEOPS_INLINE void pool_bin(const MapView<const scalar_t>& map, const RoiTaps<real>& taps, int64_t p, int64_t q,
                                int64_t lanes, scalar_t* out, int64_t out_stride) {
  using Vector = typename Lanes<real>::type;
  Vector sum[vectors] = {};
  for (int64_t i = taps.y.begin[p]; i < taps.y.begin[p + 1]; ++i) {
    for (int64_t j = taps.x.begin[q]; j < taps.x.begin[q + 1]; ++j) {
      const scalar_t* cell = map.data + taps.y.cell[i] * map.row + taps.x.cell[j] * map.column;
      const real weight = taps.y.weight[i] * taps.x.weight[j];
      for (int v = 0; v < vectors; ++v) {
        Vector value;
        load_lanes(cell + v * Lanes<real>::count, 1, lanes, value);
        sum[v] += weight * value;
      }
    }
  }
  for (int v = 0; v < vectors; ++v) store_lanes(sum[v], out + v * Lanes<real>::count * out_stride, out_stride, lanes);
}

// The transpose of pool_bin: adds a bin's gradient to the cells that it read.
template <typename scalar_t, int vectors, typename real>
CASCADEOPS_INLINE void spread_bin(const scalar_t* grad, int64_t grad_stride, const RoiTaps<real>& taps, int64_t p,
                                  int64_t q, int64_t lanes, const MapView<real>& map) {
  using Vector = typename Lanes<real>::type;
  Vector value[vectors];
  for (int v = 0; v < vectors; ++v)
    load_lanes(grad + v * Lanes<real>::count * grad_stride, grad_stride, lanes, value[v]);
  for (int64_t i = taps.y.begin[p]; i < taps.y.begin[p + 1]; ++i) {
    for (int64_t j = taps.x.begin[q]; j < taps.x.begin[q + 1]; ++j) {
      real* cell = map.data + taps.y.cell[i] * map.row + taps.x.cell[j] * map.column;
      const real weight = taps.y.weight[i] * taps.x.weight[j];
      for (int v = 0; v < vectors; ++v) {
        Vector sum;
        load_lanes(cell + v * Lanes<real>::count, 1, lanes, sum);
        sum += weight * value[v];
        store_lanes(sum, cell + v * Lanes<real>::count, 1, lanes);
      }
    }
  }
}

template <typename scalar_t, typename real>
CASCADEOPS_INLINE void pool_channels_last(MapView<const scalar_t> map, int64_t channels, const RoiTaps<real>& taps,
                                          const MapView<scalar_t>& out) {
  constexpr int64_t lanes = Lanes<real>::count;
  for (int64_t p = 0; p < taps.y.bins(); ++p) {
    for (int64_t q = 0; q < taps.x.bins(); ++q) {
      MapView<const scalar_t> from = map;
      scalar_t* to = out.data + p * out.row + q * out.column;
      int64_t left = channels;
      for (; left >= 4 * lanes; left -= 4 * lanes, from.data += 4 * lanes, to += 4 * lanes * out.channel)
        pool_bin<scalar_t, 4>(from, taps, p, q, lanes, to, out.channel);
      for (; left >= lanes; left -= lanes, from.data += lanes, to += lanes * out.channel)
        pool_bin<scalar_t, 1>(from, taps, p, q, lanes, to, out.channel);
      if (left > 0) pool_bin<scalar_t, 1>(from, taps, p, q, left, to, out.channel);
    }
  }
}

template <typename scalar_t, typename real>
CASCADEOPS_INLINE void spread_channels_last(const MapView<const scalar_t>& grad, int64_t channels,
                                            const RoiTaps<real>& taps, const MapView<real>& map) {
  constexpr int64_t lanes = Lanes<real>::count;
  for (int64_t p = 0; p < taps.y.bins(); ++p) {
    for (int64_t q = 0; q < taps.x.bins(); ++q) {
      const scalar_t* from = grad.data + p * grad.row + q * grad.column;
      MapView<real> to = map;
      int64_t left = channels;
      for (; left >= 4 * lanes; left -= 4 * lanes, from += 4 * lanes * grad.channel, to.data += 4 * lanes)
        spread_bin<scalar_t, 4>(from, grad.channel, taps, p, q, lanes, to);
      for (; left >= lanes; left -= lanes, from += lanes * grad.channel, to.data += lanes)
        spread_bin<scalar_t, 1>(from, grad.channel, taps, p, q, lanes, to);
      if (left > 0) spread_bin<scalar_t, 1>(from, grad.channel, taps, p, q, left, to);
    }
  }
}

// Calls visit(packed element, map element) for every cell that the RoI reads, with `lanes` channels from `channel` on;
// a packed cell has room for a whole vector.
template <typename scalar_t, typename Visit>
CASCADEOPS_INLINE void for_each_packed(const MapView<scalar_t>& map, int64_t channel, int64_t lanes, int64_t width,
                                       const std::vector<int64_t>& rows, const std::vector<int64_t>& columns,
                                       const Visit& visit) {
  for (size_t i = 0; i < rows.size(); ++i) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      scalar_t* from = map.data + (channel + lane) * map.channel + rows[i] * map.row;
      for (size_t j = 0; j < columns.size(); ++j)
        visit((static_cast<int64_t>(i * columns.size() + j)) * width + lane, from[columns[j] * map.column]);
    }
  }
}

template <typename scalar_t, typename real>
CASCADEOPS_INLINE void pool_packed(const MapView<const scalar_t>& map, int64_t channels, RoiTaps<real>& taps,
                                   std::vector<scalar_t>& packed, MapView<scalar_t> out) {
  constexpr int64_t width = Lanes<real>::count;
  const auto &rows = taps.y.compact(), &columns = taps.x.compact();
  const int64_t row = static_cast<int64_t>(columns.size()) * width;
  packed.resize(rows.size() * row);
  for (int64_t c = 0; c < channels; c += width, out.data += width * out.channel) {
    const int64_t lanes = std::min(width, channels - c);
    for_each_packed(map, c, lanes, width, rows, columns,
                    [&](int64_t to, const scalar_t& from) CASCADEOPS_INLINE_LAMBDA { packed[to] = from; });
    pool_channels_last(MapView<const scalar_t>{packed.data(), 1, row, width}, lanes, taps, out);
  }
}

template <typename scalar_t, typename real>
CASCADEOPS_INLINE void spread_packed(MapView<const scalar_t> grad, int64_t channels, RoiTaps<real>& taps,
                                     std::vector<real>& packed, const MapView<real>& map) {
  constexpr int64_t width = Lanes<real>::count;
  const auto &rows = taps.y.compact(), &columns = taps.x.compact();
  const int64_t row = static_cast<int64_t>(columns.size()) * width;
  for (int64_t c = 0; c < channels; c += width, grad.data += width * grad.channel) {
    const int64_t lanes = std::min(width, channels - c);
    packed.assign(rows.size() * row, real(0));
    spread_channels_last(grad, lanes, taps, MapView<real>{packed.data(), 1, row, width});
    for_each_packed(map, c, lanes, width, rows, columns,
                    [&](int64_t from, real& to) CASCADEOPS_INLINE_LAMBDA { to += packed[from]; });
  }
}

// The walks of one RoI, compiled for each instruction set and type.
#define CASCADEOPS_ROI_WALKS(scalar_t)                                                                              \
  CASCADEOPS_CLONES void pool(const MapView<const scalar_t>& map, int64_t channels,                                 \
                              RoiTaps<accumulate_t<scalar_t>>& taps, std::vector<scalar_t>& packed,                 \
                              const MapView<scalar_t>& out) {                                                       \
    if (map.channel == 1) return pool_channels_last(map, channels, taps, out);                                      \
    pool_packed(map, channels, taps, packed, out);                                                                  \
  }                                                                                                                 \
  CASCADEOPS_CLONES void spread(const MapView<const scalar_t>& grad, int64_t channels,                              \
                                RoiTaps<accumulate_t<scalar_t>>& taps, std::vector<accumulate_t<scalar_t>>& packed, \
                                const MapView<accumulate_t<scalar_t>>& map) {                                       \
    if (map.channel == 1) return spread_channels_last(grad, channels, taps, map);                                   \
    spread_packed(grad, channels, taps, packed, map);                                                               \
  }
CASCADEOPS_ROI_WALKS(float)
CASCADEOPS_ROI_WALKS(double)
CASCADEOPS_ROI_WALKS(torch::headeronly::Half)
CASCADEOPS_ROI_WALKS(torch::headeronly::BFloat16)
#undef CASCADEOPS_ROI_WALKS

// How RoIs are placed on the pyramid.
struct Placement {
  std::vector<double> spatial_scales;
  int64_t sampling_ratio;
  bool aligned;
  double finest_size;
  bool epsilon_inside_log;

  // roi: (batch index, x1, y1, x2, y2)
  int level(const float* roi) const {
    return roi_level(roi[3] - roi[1], roi[4] - roi[2], static_cast<float>(finest_size), epsilon_inside_log,
                     static_cast<int>(spatial_scales.size()));
  }

  template <typename real>
  void build_taps(const float* roi, const Tensor& map, int64_t height, int64_t width, RoiTaps<real>& taps) const {
    const real scale = static_cast<real>(spatial_scales[level(roi)]);
    const auto xs = roi_axis<real>(roi[1], roi[3], scale, width, sampling_ratio, aligned);
    const auto ys = roi_axis<real>(roi[2], roi[4], scale, height, sampling_ratio, aligned);
    taps.x.build(xs, width, 0, map.size(3), real(1) / static_cast<real>(xs.samples));
    taps.y.build(ys, height, 0, map.size(2), real(1) / static_cast<real>(ys.samples));
  }
};

Tensor multiscale_roi_align_cpu(std::vector<Tensor> features, Tensor rois, int64_t height, int64_t width,
                                std::vector<double> spatial_scales, int64_t sampling_ratio, bool aligned,
                                double finest_size, bool epsilon_inside_log) {
  check_multiscale_roi_align(features, rois, height, width, spatial_scales, finest_size);
  rois = torch::stable::contiguous(rois);
  check_roi_values(rois, features[0].size(0));
  const Placement placement{spatial_scales, sampling_ratio, aligned, finest_size, epsilon_inside_log};
  const auto dtype = features[0].scalar_type();
  const int64_t channels = features[0].size(1);
  Tensor out = empty_map(features[0], {rois.size(0), channels, height, width}, dtype, memory_format_of(features[0]));
  if (out.numel() == 0) return out;

  dispatch_floating(dtype, "multiscale_roi_align", [&](auto zero) {
    using scalar_t = decltype(zero);
    scalar_t* out_data = out.mutable_data_ptr<scalar_t>();
    const float* roi_data = rois.const_data_ptr<float>();
    torch::stable::parallel_for(0, rois.size(0), 1, [&](int64_t begin, int64_t end) {
      RoiTaps<accumulate_t<scalar_t>> taps;
      std::vector<scalar_t> packed;
      for (int64_t k = begin; k < end; ++k) {
        const float* roi = roi_data + 5 * k;
        if (roi[0] < 0) {
          std::fill_n(out_data + k * channels * height * width, channels * height * width, zero);
          continue;
        }
        const Tensor& map = features[placement.level(roi)];
        placement.build_taps(roi, map, height, width, taps);
        pool(view_of(map.const_data_ptr<scalar_t>(), map, static_cast<int64_t>(roi[0])), channels, taps, packed,
             view_of(out_data, out, k));
      }
    });
  });
  return out;
}

std::vector<Tensor> multiscale_roi_align_backward_cpu(Tensor grad, std::vector<Tensor> features, Tensor rois,
                                                      std::vector<double> spatial_scales, int64_t sampling_ratio,
                                                      bool aligned, double finest_size, bool epsilon_inside_log) {
  check_multiscale_roi_align_backward(grad, features, rois, spatial_scales, finest_size);
  rois = torch::stable::contiguous(rois);
  check_roi_values(rois, features[0].size(0));
  const Placement placement{spatial_scales, sampling_ratio, aligned, finest_size, epsilon_inside_log};
  const auto dtype = features[0].scalar_type();
  const int64_t images = features[0].size(0), channels = features[0].size(1), count = rois.size(0);
  const int64_t height = grad.size(2), width = grad.size(3);

  // Which map and image a RoI's gradient goes to; -1 for a padding row.
  const float* roi_data = rois.const_data_ptr<float>();
  std::vector<int64_t> owner(count);
  for (int64_t k = 0; k < count; ++k) {
    const float* roi = roi_data + 5 * k;
    owner[k] = roi[0] < 0 ? -1 : placement.level(roi) * images + static_cast<int64_t>(roi[0]);
  }

  // Half types are summed in float32 and rounded once.
  const auto sum_dtype = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  std::vector<Tensor> sums;
  for (const Tensor& map : features) {
    sums.push_back(empty_map(map, {images, channels, map.size(2), map.size(3)}, sum_dtype, memory_format_of(map)));
    torch::stable::zero_(sums.back());
  }

  dispatch_floating(dtype, "multiscale_roi_align", [&](auto zero) {
    using scalar_t = decltype(zero);
    using real = accumulate_t<scalar_t>;
    const scalar_t* grad_data = grad.const_data_ptr<scalar_t>();
    // Blocks of 64 channels amortise the weights' computation. Few maps are split finer, so that every thread has work;
    // the sums of a channel are the same in either case. Blocks come first in the order of tasks, since levels differ
    // in load.
    const int64_t maps = static_cast<int64_t>(features.size()) * images;
    const int64_t block = (channels / 64) * maps < 4 * int64_t{torch::stable::get_num_threads()} ? 16 : 64;
    const int64_t blocks = (channels + block - 1) / block;
    torch::stable::parallel_for(0, blocks * maps, 1, [&](int64_t begin, int64_t end) {
      RoiTaps<real> taps;
      std::vector<real> packed;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task / maps * block, image = task % images;
        const Tensor& sum = sums[task % maps / images];
        auto to = view_of(sum.mutable_data_ptr<real>(), sum, image);
        to.data += first * to.channel;
        for (int64_t k = 0; k < count; ++k) {
          if (owner[k] != task % maps) continue;
          placement.build_taps(roi_data + 5 * k, sum, height, width, taps);
          auto from = view_of(grad_data, grad, k);
          from.data += first * from.channel;
          spread(from, std::min(block, channels - first), taps, packed, to);
        }
      }
    });
  });
  for (Tensor& sum : sums) sum = torch::stable::to(sum, dtype);
  return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CPU, library) {
  library.impl("multiscale_roi_align", TORCH_BOX(&multiscale_roi_align_cpu));
  library.impl("multiscale_roi_align_backward", TORCH_BOX(&multiscale_roi_align_backward_cpu));
}

}  // namespace cascadeops
