// Deformable convolution on the CPU, forward.
//
// out[n, o, p] = bias[o] + sum over taps t and channels c of o's group of weight[o, c, t] * sample[n, c, t, p], where a
// sample is bilinear, displaced by its offset and multiplied by its mask (common/deform.h).
//
// Threads share blocks of output pixels. A block's samples are gathered into a small tile, as many taps or channels at
// a time as it has columns, and multiplied there with the packed weights (tile_product.h). So the samples of the whole
// image never exist: besides the result, memory holds the weights in packed order, and three tiles for each thread.
// Every output is a sum in one fixed order, whatever the threads and the blocks.

#include <torch/csrc/stable/library.h>

#include "checks_deform_conv2d.h"
#include "cpu/deform_tile.h"
#include "deform_operands.h"
#include "dispatch.h"
#include "layout.h"

namespace cascadeops {
namespace {

using torch::stable::Tensor;

// The weights of some consecutive outputs, one vector of them: data[tap][channel - first_channel][output]. Where groups
// are narrower than a vector, a panel spans several, and its weights between different groups are 0.
template <typename real>
struct WeightPanel {
  int64_t first_channel, channels;
  real* data;
};

template <typename real>
std::vector<WeightPanel<real>> lay_out_panels(const DeformGeometry& g, int64_t& numbers) {
  std::vector<WeightPanel<real>> panels;
  numbers = 0;
  for (int64_t first = 0; first < g.out_channels; first += kPanel<real>) {
    const int64_t last = std::min(first + kPanel<real>, g.out_channels) - 1;
    const int64_t first_group = first / g.group_outputs(), last_group = last / g.group_outputs();
    const int64_t channels = (last_group - first_group + 1) * g.group_channels();
    panels.push_back({first_group * g.group_channels(), channels, nullptr});
    numbers += g.taps() * channels * kPanel<real>;
  }
  return panels;
}

template <typename scalar_t, typename real>
void pack_panel(const DeformGeometry& g, const WeightView<const scalar_t>& weight, int64_t first_output,
                const WeightPanel<real>& panel) {
  // Some channels at a time: an output's weights are then read in a row, and written to lines that stay in cache.
  constexpr int64_t block = 16;
  const int64_t lanes = std::min(kPanel<real>, g.out_channels - first_output);
  const int64_t tap_size = panel.channels * kPanel<real>;
  if (panel.channels > g.group_channels() || lanes < kPanel<real>)
    std::fill_n(panel.data, g.taps() * tap_size, real(0));
  for (int64_t first = 0; first < panel.channels; first += block) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t output = first_output + lane, group = output / g.group_outputs();
      const int64_t skip = group * g.group_channels() - panel.first_channel;  // the group's first channel in the panel
      const int64_t last = std::min({first + block, skip + g.group_channels(), panel.channels});
      for (int64_t c = std::max(first, skip); c < last; ++c)
        weight.for_each_tap(g, output, c - skip, [&](int64_t tap, scalar_t value) {
          panel.data[tap * tap_size + c * kPanel<real> + lane] = static_cast<real>(value);
        });
    }
  }
}

// All that a block needs.
template <typename scalar_t>
struct Convolution {
  using real = accumulate_t<scalar_t>;
  DeformGeometry g;
  const scalar_t* input;  // [N, H, W, C]
  Displacements<real> displacements;
  std::vector<WeightPanel<real>> panels;
  std::vector<real> bias;  // of whole panels

  int64_t out_stride() const { return static_cast<int64_t>(panels.size()) * kPanel<real>; }
};

// Adds to `out` the products of the samples in the tile, those of channels [first, first + channels) for some taps.
template <typename scalar_t, typename real>
void multiply_samples(const Convolution<scalar_t>& conv, const real* tile, int64_t rows, int64_t first_tap,
                      int64_t taps, int64_t first, int64_t channels, real* out) {
  const size_t count = conv.panels.size();
  for (size_t i = 0, next; i < count; i = next) {
    // Panels of the same channels lie one after the other, and are multiplied in one go.
    const WeightPanel<real>& panel = conv.panels[i];
    for (next = i + 1; next < count && conv.panels[next].first_channel == panel.first_channel &&
                       conv.panels[next].channels == panel.channels;)
      ++next;
    const int64_t begin = std::max(first, panel.first_channel);
    const int64_t end = std::min(first + channels, panel.first_channel + panel.channels);
    if (begin >= end) continue;
    const int64_t b_segment = panel.channels * kPanel<real>;
    multiply_rows(tile + begin - first,
                  panel.data + first_tap * b_segment + (begin - panel.first_channel) * kPanel<real>,
                  out + static_cast<int64_t>(i) * kPanel<real>,
                  {rows, static_cast<int64_t>(next - i), end - begin, taps, channels, b_segment,
                   conv.g.taps() * b_segment, conv.out_stride()});
  }
}

// out: [kTileRows, out_stride]
template <typename scalar_t, typename real>
void convolve(const Convolution<scalar_t>& conv, const PixelBlock& block, std::vector<BlockSamples<real>>& samples,
              real* tile, real* out) {
  const DeformGeometry& g = conv.g;
  for (int64_t p = 0; p < block.count; ++p) std::copy(conv.bias.begin(), conv.bias.end(), out + p * conv.out_stride());
  for (int64_t i = 0; i < g.offset_groups * g.taps(); ++i)
    locate(g, conv.displacements, block, i / g.taps(), i % g.taps(), samples[i]);

  const scalar_t* image = conv.input + block.image * g.cells() * g.channels;
  for (int64_t first = 0; first < g.channels; first += kTileColumns) {
    const int64_t channels = std::min(kTileColumns, g.channels - first), most_taps = kTileColumns / channels;
    for (int64_t first_tap = 0; first_tap < g.taps(); first_tap += most_taps) {
      const int64_t taps = std::min(most_taps, g.taps() - first_tap);
      for (int64_t t = 0; t < taps; ++t) {
        for (int64_t begin = first, end; begin < first + channels; begin = end) {
          const int64_t group = begin / g.offset_channels();
          end = std::min(first + channels, (group + 1) * g.offset_channels());
          gather(image + begin, g.channels, samples[group * g.taps() + first_tap + t], block.count, end - begin,
                 tile + t * channels + begin - first);
        }
      }
      multiply_samples(conv, tile, block.count, first_tap, taps, first, channels, out);
    }
  }
}

template <typename scalar_t, typename real>
void write_block(const DeformGeometry& g, const PixelBlock& block, const real* from, int64_t from_stride,
                 const Tensor& out) {
  MapView<scalar_t> to = view_of(out.mutable_data_ptr<scalar_t>(), out, block.image);
  to.data += block.first * to.column;  // rows follow each other without a gap
  if (to.channel == 1) {
    for (int64_t p = 0; p < block.count; ++p, to.data += to.column, from += from_stride)
      for (int64_t o = 0; o < g.out_channels; ++o) to.data[o] = static_cast<scalar_t>(from[o]);
    return;
  }
  for (int64_t o = 0; o < g.out_channels; ++o, to.data += to.channel)
    for (int64_t p = 0; p < block.count; ++p) to.data[p * to.column] = static_cast<scalar_t>(from[p * from_stride + o]);
}

Tensor deform_conv2d_cpu(Tensor input, Tensor offset, std::optional<Tensor> mask, Tensor weight,
                         std::optional<Tensor> bias, std::vector<int64_t> stride, std::vector<int64_t> padding,
                         std::vector<int64_t> dilation) {
  const DeformGeometry g = check_deform_conv2d(input, offset, mask, weight, bias, stride, padding, dilation);
  const auto dtype = input.scalar_type();
  Tensor out = empty_map(input, {g.images, g.out_channels, g.out_height, g.out_width}, dtype, memory_format_of(input));
  if (out.numel() == 0) return out;
  const auto sum_dtype = sum_dtype_of(dtype);
  input = channels_last(input);
  offset = as_planes(offset, sum_dtype);
  if (mask) mask = as_planes(*mask, sum_dtype);
  if (bias) bias = as_planes(*bias, sum_dtype);

  dispatch_floating(dtype, "deform_conv2d", [&](auto zero) {
    using scalar_t = decltype(zero);
    using real = accumulate_t<scalar_t>;
    int64_t numbers = 0;
    Convolution<scalar_t> conv{g,
                               input.const_data_ptr<scalar_t>(),
                               {offset.const_data_ptr<real>(), mask ? mask->const_data_ptr<real>() : nullptr},
                               lay_out_panels<real>(g, numbers),
                               {}};
    conv.bias.resize(conv.out_stride());
    if (bias) std::copy_n(bias->const_data_ptr<real>(), g.out_channels, conv.bias.begin());

    const Tensor packed = torch::stable::new_empty(input, {numbers}, sum_dtype);
    real* next = packed.mutable_data_ptr<real>();
    for (WeightPanel<real>& panel : conv.panels) {
      panel.data = next;
      next += g.taps() * panel.channels * kPanel<real>;
    }
    const auto kernels = weight_view(weight.const_data_ptr<scalar_t>(), weight);
    torch::stable::parallel_for(0, static_cast<int64_t>(conv.panels.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pack_panel(g, kernels, i * kPanel<real>, conv.panels[i]);
    });

    // Threads share the pixels evenly, up to a register block; each cuts its own into blocks.
    const int64_t strips = (g.pixels() + kStripRows - 1) / kStripRows;  // of an image
    torch::stable::parallel_for(0, g.images * strips, 1, [&](int64_t begin, int64_t end) {
      std::vector<BlockSamples<real>> samples(g.offset_groups * g.taps());
      LineBuffer<real> tile = make_tile<real>(), sums(kTileRows * conv.out_stride());
      while (begin < end) {
        const int64_t last = std::min({begin + kTileRows / kStripRows, end, (begin / strips + 1) * strips});
        const int64_t first_row = begin % strips * kStripRows, rows = (last - begin) * kStripRows;
        const PixelBlock block{begin / strips, first_row, std::min(rows, g.pixels() - first_row)};
        convolve(conv, block, samples, tile.data(), sums.data());
        write_block<scalar_t>(g, block, sums.data(), conv.out_stride(), out);
        begin = last;
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CPU, library) { library.impl("deform_conv2d", TORCH_BOX(&deform_conv2d_cpu)); }

}  // namespace cascadeops
