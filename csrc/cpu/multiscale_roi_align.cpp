// RoIAlign over a feature pyramid on the CPU: the forward pass.
//
// out[k, c, p, q] = vector[image k, c] + sum over maps m, y, x of wy[m][p][y] * wx[m][q][x] * map m[image k][c, y, x],
// where m is the RoI's level, and the extra map if there is one, and wy and wx are the averaged bilinear weights of the
// RoI's samples along one axis (axis_taps.h): a bin of b x b cells then reads about (b + 1)^2 cells instead of 4 *
// ceil(b)^2.
//
// For each bin some vectors of channels are summed in registers over the cells. That needs the channels of a cell side
// by side, as in channels-last maps: those are read where they are, a row of bins at a time, and the next channels of a
// cell are asked for while these are summed. The cells of other maps are packed that way first, some channels of the
// whole RoI at a time.
//
// Threads share the RoIs, which are visited by level and place: neighbours read the same cells while those are in the
// cache.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/fresh_pages.h"
#include "cpu/roi_taps.h"
#include "cpu/simd.h"
#include "cpu/transpose.h"
#include "dispatch.h"
#include "layout.h"
#include "roi_maps.h"

namespace cascadeops {
namespace {

using torch::stable::Tensor;

constexpr int kChunk = 4;  // vectors of channels that are summed at a time: 64 of float32

// One of the maps that a RoI reads.
template <typename scalar_t>
struct Source {
  MapView<const scalar_t> map;
  RoiTaps<accumulate_t<scalar_t>> taps;
  std::vector<scalar_t> packed;  // cells with adjacent channels, of maps that do not have them so
};

// What a RoI is made of: one map or two, and a vector [C] that is added everywhere.
template <typename scalar_t>
struct RoiSources {
  Source<scalar_t> source[2];
  int count;
  const scalar_t* vector;
  std::vector<scalar_t> pooled;  // bins with adjacent channels, of results that do not have them so
};

// Sums the bins of the rows [begin, end) for `lanes` channels in `vectors` vectors; from[s] holds these channels of
// source s, side by side.
template <int vectors, typename scalar_t>
CASCADEOPS_INLINE void pool_channels(const RoiSources<scalar_t>& roi, const MapView<const scalar_t> (&from)[2],
                                     int64_t begin_row, int64_t end_row, int64_t lanes, const scalar_t* vector,
                                     const MapView<scalar_t>& out) {
  using real = accumulate_t<scalar_t>;
  using Vector = typename Lanes<real>::type;
  constexpr int64_t chunk = vectors * Lanes<real>::count, kPair = 128 / sizeof(scalar_t);  // two cache lines
  Vector begin[vectors];
  load_chunk(vector, lanes, begin);
  for (int64_t p = begin_row; p < end_row; ++p) {
    for (int64_t q = 0; q < roi.source[0].taps.x.bins(); ++q) {
      Vector sum[vectors];
      for (int v = 0; v < vectors; ++v) sum[v] = begin[v];
      for (int s = 0; s < roi.count; ++s) {
        const auto &y = roi.source[s].taps.y, &x = roi.source[s].taps.x;
        for (int64_t i = y.begin[p]; i < y.begin[p + 1]; ++i) {
          const scalar_t* row = from[s].data + y.cell[i] * from[s].row;
          for (int64_t j = x.begin[q]; j < x.begin[q + 1]; ++j) {
            Vector value[vectors];
            const scalar_t* cell = row + x.cell[j] * from[s].column;
            load_chunk(cell, lanes, value);
            for (int64_t ahead = 0; ahead + kPair <= chunk; ahead += kPair) __builtin_prefetch(cell + chunk + ahead);
            const real weight = y.weight[i] * x.weight[j];
            for (int v = 0; v < vectors; ++v) sum[v] += weight * value[v];
          }
        }
      }
      store_chunk(sum, lanes, out.data + p * out.row + q * out.column);
    }
  }
}

// The cells that a RoI reads, with `lanes` channels from `channel` on side by side.
template <typename scalar_t>
CASCADEOPS_INLINE MapView<const scalar_t> pack(Source<scalar_t>& source, int64_t channel, int64_t lanes) {
  const auto &rows = source.taps.y.distinct(), &columns = source.taps.x.distinct();
  const int64_t row = static_cast<int64_t>(columns.size()) * lanes;
  source.packed.resize(rows.size() * row);
  scalar_t* to = source.packed.data();
  for (size_t i = 0; i < rows.size(); ++i, to += row) {
    const scalar_t* from = source.map.data + channel * source.map.channel + rows[i] * source.map.row;
    if (i + 1 < rows.size() && !columns.empty()) {
      // Every channel is a line or two elsewhere in memory, which no processor foresees.
      const int64_t below = (rows[i + 1] - rows[i]) * source.map.row;
      for (int64_t lane = 0; lane < lanes; ++lane) {
        __builtin_prefetch(from + below + lane * source.map.channel + columns.front() * source.map.column);
        __builtin_prefetch(from + below + lane * source.map.channel + columns.back() * source.map.column);
      }
    }
    for (size_t j = 0, end; j < columns.size(); j = end) {
      end = j + 1;  // of a run of adjacent columns
      if (source.map.column == 1)
        while (end < columns.size() && columns[end] == columns[end - 1] + 1) ++end;
      transpose(from + columns[j] * source.map.column, source.map.channel, lanes, static_cast<int64_t>(end - j),
                to + static_cast<int64_t>(j) * lanes, lanes);
    }
  }
  return {source.packed.data(), 1, row, lanes};
}

template <typename scalar_t>
CASCADEOPS_INLINE void pool_roi(RoiSources<scalar_t>& roi, int64_t channels, MapView<scalar_t> out) {
  constexpr int64_t width = Lanes<accumulate_t<scalar_t>>::count;
  bool in_place = out.channel == 1;
  for (int s = 0; s < roi.count; ++s) {
    if (roi.source[s].map.channel == 1) continue;
    roi.source[s].taps.y.compact();
    roi.source[s].taps.x.compact();
    in_place = false;
  }
  const int64_t bins_y = roi.source[0].taps.y.bins(), bins_x = roi.source[0].taps.x.bins();
  if (out.channel != 1) roi.pooled.resize(bins_y * bins_x * std::min(channels, kChunk * width));
  const int64_t step = in_place ? 1 : bins_y;  // rows of bins
  for (int64_t p = 0; p < bins_y; p += step) {
    for (int64_t c = 0, lanes; c < channels; c += lanes) {
      lanes = channels - c >= kChunk * width ? kChunk * width : std::min(channels - c, width);
      MapView<const scalar_t> from[2];
      for (int s = 0; s < roi.count; ++s) {
        const MapView<const scalar_t>& map = roi.source[s].map;
        from[s] = map.channel == 1 ? MapView<const scalar_t>{map.data + c, 1, map.row, map.column}
                                   : pack(roi.source[s], c, lanes);
      }
      MapView<scalar_t> to = out;
      to.data += c * out.channel;
      if (out.channel != 1) to = {roi.pooled.data(), 1, bins_x * lanes, lanes};
      if (lanes == kChunk * width)
        pool_channels<kChunk>(roi, from, p, p + step, lanes, roi.vector + c, to);
      else
        pool_channels<1>(roi, from, p, p + step, lanes, roi.vector + c, to);
      if (out.channel != 1)
        transpose(roi.pooled.data(), lanes, bins_y * bins_x, lanes, out.data + c * out.channel, out.channel);
    }
  }
}

// The same, compiled for each type and instruction set.
#define CASCADEOPS_POOL(scalar_t)                                                                          \
  CASCADEOPS_CLONES void pool(RoiSources<scalar_t>& roi, int64_t channels, const MapView<scalar_t>& out) { \
    pool_roi(roi, channels, out);                                                                          \
  }
CASCADEOPS_POOL(float)
CASCADEOPS_POOL(double)
CASCADEOPS_POOL(torch::headeronly::Half)
CASCADEOPS_POOL(torch::headeronly::BFloat16)
#undef CASCADEOPS_POOL

// Rows of rois that have a place, neighbours one after the other: by level and image, then in bands of 64 finest cells.
std::vector<int64_t> visiting_order(const RoiPlacement& placement, const float* rois, int64_t rows) {
  std::vector<int64_t> order;
  std::vector<std::tuple<int, float, float, float>> key(rows);
  for (int64_t k = 0; k < rows; ++k) {
    const float* roi = rois + 5 * k;
    if (roi[0] < 0) continue;
    const int level = placement.level(roi);
    const float band = std::floor(roi[2] * static_cast<float>(placement.spatial_scale[level]) / 16);
    key[k] = {level, roi[0], band, roi[1]};
    order.push_back(k);
  }
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return key[a] < key[b]; });
  return order;
}

Tensor multiscale_roi_align_cpu(std::vector<Tensor> maps, Tensor rois, int64_t height, int64_t width,
                                std::vector<double> spatial_scales, int64_t sampling_ratio, bool aligned,
                                double finest_size, bool epsilon_inside_log, int64_t extra_subdivision,
                                std::optional<Tensor> image_vector, std::optional<Tensor> count) {
  check_multiscale_roi_align(maps, rois, height, width, spatial_scales, finest_size, extra_subdivision, count);
  check_roi_image_vector(image_vector, maps[0]);
  rois = torch::stable::contiguous(rois);
  const int64_t rows = check_roi_values(rois, maps[0].size(0), count);
  const RoiPlacement placement = placement_of(maps, height, width, spatial_scales, sampling_ratio, aligned, finest_size,
                                              epsilon_inside_log, extra_subdivision);
  const int64_t channels = maps[0].size(1), values = channels * height * width;
  Tensor out =
      empty_map(maps[0], {rois.size(0), channels, height, width}, maps[0].scalar_type(), memory_format_of(maps[0]));
  if (out.numel() == 0) return out;
  ask_for_huge_pages(out);
  if (image_vector) image_vector = torch::stable::contiguous(*image_vector);

  dispatch_floating(maps[0].scalar_type(), "multiscale_roi_align", [&](auto zero) {
    using scalar_t = decltype(zero);
    scalar_t* out_data = out.mutable_data_ptr<scalar_t>();
    const float* roi_data = rois.const_data_ptr<float>();
    const std::vector<scalar_t> zeros(image_vector ? 0 : channels, zero);
    const auto order = visiting_order(placement, roi_data, rows);
    for (int64_t k = 0; k < rois.size(0); ++k)
      if (k >= rows || roi_data[5 * k] < 0) std::fill_n(out_data + k * values, values, zero);

    share_tasks(static_cast<int64_t>(order.size()), [&](const auto& draw) {
      RoiSources<scalar_t> sources;
      for (int64_t task; (task = draw()) < static_cast<int64_t>(order.size());) {
        const float* roi = roi_data + 5 * order[task];
        const int64_t image = static_cast<int64_t>(roi[0]);
        sources.vector = image_vector ? image_vector->const_data_ptr<scalar_t>() + image * channels : zeros.data();
        sources.count = 0;
        for (int map = 0; map < placement.maps; ++map) {
          if (!placement.reads(roi, map)) continue;
          auto& source = sources.source[sources.count++];
          source.map = view_of(maps[map].const_data_ptr<scalar_t>(), maps[map], image);
          source.taps.build(placement, roi, map);
        }
        pool(sources, channels, view_of(out_data, out, order[task]));
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CPU, library) {
  library.impl("multiscale_roi_align", TORCH_BOX(&multiscale_roi_align_cpu));
}

}  // namespace cascadeops
