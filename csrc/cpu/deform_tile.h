// What the forward and backward passes of deform_conv2d do with tiles (tile_product.h): fill them with the samples of
// some output pixels, or with the gradients there.
//
// Images are read channels last, so that the channels of a cell are vectors.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <vector>

#include "common/deform.h"
#include "cpu/tile_product.h"

namespace cascadeops {

// Consecutive output pixels of one image, a tile's rows.
struct PixelBlock {
  int64_t image, first, count;
};

// Block `index` when every image is cut into blocks of `rows` pixels.
inline PixelBlock pixel_block(const DeformGeometry& g, int64_t rows, int64_t index) {
  const int64_t blocks = (g.pixels() + rows - 1) / rows;
  const int64_t first = index % blocks * rows;
  return {index / blocks, first, std::min(rows, g.pixels() - first)};
}

inline int64_t count_blocks(const DeformGeometry& g, int64_t rows) {
  return g.images * ((g.pixels() + rows - 1) / rows);
}

// Where a block samples for one tap and offset group, and by what the samples are multiplied.
template <typename real>
struct BlockSamples {
  DeformSample<real> sample[kTileRows];
  real mask[kTileRows];
};

void locate(const DeformGeometry& g, const Displacements<float>& displacements, const PixelBlock& block,
            int64_t offset_group, int64_t tap, BlockSamples<float>& samples);
void locate(const DeformGeometry& g, const Displacements<double>& displacements, const PixelBlock& block,
            int64_t offset_group, int64_t tap, BlockSamples<double>& samples);

// Writes the samples of `channels` channels, times the mask, to the first columns of a tile. image: [cells, stride], at
// its first channel. Up to one vector beyond the columns is overwritten.
void gather(const float* image, int64_t stride, const BlockSamples<float>& samples, int64_t count, int64_t channels,
            float* tile);
void gather(const double* image, int64_t stride, const BlockSamples<double>& samples, int64_t count, int64_t channels,
            double* tile);
void gather(const torch::headeronly::Half* image, int64_t stride, const BlockSamples<float>& samples, int64_t count,
            int64_t channels, float* tile);
void gather(const torch::headeronly::BFloat16* image, int64_t stride, const BlockSamples<float>& samples, int64_t count,
            int64_t channels, float* tile);

// Copies `columns` numbers of `count` rows, which lie `stride` apart, into a tile. Up to one vector beyond the columns
// is overwritten.
void load_tile(const float* rows, int64_t stride, int64_t count, int64_t columns, float* tile);
void load_tile(const double* rows, int64_t stride, int64_t count, int64_t columns, double* tile);
void load_tile(const torch::headeronly::Half* rows, int64_t stride, int64_t count, int64_t columns, float* tile);
void load_tile(const torch::headeronly::BFloat16* rows, int64_t stride, int64_t count, int64_t columns, float* tile);

// A weight [out_channels, C / groups, kernel_height, kernel_width]. Asking a tensor for a stride costs a call.
template <typename scalar_t>
struct WeightView {
  scalar_t* data;
  int64_t output, channel, row, column;  // strides, in elements

  // Calls visit(tap, element) for one output and one channel of its group.
  template <typename Visit>
  void for_each_tap(const DeformGeometry& g, int64_t o, int64_t c, const Visit& visit) const {
    scalar_t* kernel = data + o * output + c * channel;
    for (int64_t y = 0, tap = 0; y < g.kernel_height; ++y)
      for (int64_t x = 0; x < g.kernel_width; ++x, ++tap) visit(tap, kernel[y * row + x * column]);
  }
};

template <typename scalar_t>
WeightView<scalar_t> weight_view(scalar_t* data, const torch::stable::Tensor& weight) {
  return {data, weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
}

// Numbers in memory that begins on a cache line; zero at first.
template <typename real>
class LineBuffer {
 public:
  explicit LineBuffer(int64_t numbers) : lines_((numbers + kPanel<real> - 1) / kPanel<real>) {}
  real* data() { return lines_.data()->number; }

 private:
  struct alignas(64) Line {
    real number[kPanel<real>];
  };
  std::vector<Line> lines_;
};

template <typename real>
LineBuffer<real> make_tile() {
  return LineBuffer<real>(kTileRows * kTileStride);
}

}  // namespace cascadeops
