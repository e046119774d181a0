// Deformable convolution on the CPU, gradients.
//
// With grad_sample[n, c, t, p] = sum over outputs o of weight[o, c, t] * grad[n, o, p]:
//   grad_input[n, c, cell]  = sum over the samples that read the cell of weight of the cell * mask * grad_sample
//   grad_offset[n, t, p]    = mask * sum over c of grad_sample * slope of the sample by y and by x
//   grad_mask[n, t, p]      = sum over c of grad_sample * sample before the mask
//   grad_weight[o, c, t]    = sum over n, p of grad[n, o, p] * sample[n, c, t, p]
//
// A task owns a slice of at most 64 channels, so that no two add to the same number: of the input's gradient (one image
// at a time), or of the weights' gradient (all images). Within it, blocks of output pixels are walked in order, and
// grad_sample or the samples exist for one block at a time, as a tile (tile_product.h). The sums over channels that
// grad_offset and grad_mask need are kept for each slice and added at the end, in order. So nothing depends on the
// number of threads.

#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>

#include "checks_deform_conv2d.h"
#include "cpu/deform_tile.h"
#include "cpu/simd.h"
#include "deform_operands.h"
#include "dispatch.h"
#include "layout.h"

namespace cascadeops {
namespace {

using torch::stable::Tensor;

// Channels of one offset group, and the outputs of all weight groups that they belong to.
struct Slice {
  int64_t first, channels, offset_group, part;  // part: number of the slice in its offset group
  int64_t first_output, outputs;

  // In a tile a tap has whole vectors of channels.
  template <typename real>
  int64_t columns() const {
    return (channels + kPanel<real> - 1) / kPanel<real> * kPanel<real>;
  }
};

// Narrow slices are more tasks; wide ones are faster, and leave fewer sums to keep for each sample.
int64_t slice_width(const DeformGeometry& g) { return g.offset_channels() < 512 ? 32 : 64; }

std::vector<Slice> cut_slices(const DeformGeometry& g) {
  std::vector<Slice> slices;
  for (int64_t group = 0; group < g.offset_groups; ++group) {
    for (int64_t begin = 0, part = 0; begin < g.offset_channels(); begin += slice_width(g), ++part) {
      const int64_t channels = std::min(slice_width(g), g.offset_channels() - begin);
      const int64_t first = group * g.offset_channels() + begin;
      const int64_t first_group = first / g.group_channels(), last_group = (first + channels - 1) / g.group_channels();
      slices.push_back({first, channels, group, part, first_group * g.group_outputs(),
                        (last_group - first_group + 1) * g.group_outputs()});
    }
  }
  return slices;
}

// Calls visit(tap, element) for the weights between one output and one channel; for none where their groups differ.
template <typename scalar_t, typename Visit>
void for_each_tap_between(const DeformGeometry& g, const WeightView<scalar_t>& weight, int64_t output, int64_t channel,
                          const Visit& visit) {
  const int64_t group = channel / g.group_channels();
  if (output / g.group_outputs() == group) weight.for_each_tap(g, output, channel - group * g.group_channels(), visit);
}

template <typename scalar_t>
struct Problem {
  using real = accumulate_t<scalar_t>;
  DeformGeometry g;
  const scalar_t *grad, *input;  // [N, out_height, out_width, out_channels], [N, H, W, C]
  Displacements<real> displacements;
};

template <typename scalar_t>
Problem<scalar_t> problem_of(const DeformGeometry& g, const Tensor& grad, const Tensor& input, const Tensor& offset,
                             const std::optional<Tensor>& mask) {
  using real = accumulate_t<scalar_t>;
  return {g,
          grad.const_data_ptr<scalar_t>(),
          input.const_data_ptr<scalar_t>(),
          {offset.const_data_ptr<real>(), mask ? mask->const_data_ptr<real>() : nullptr}};
}

// Sums over the channels of a slice, for each sample: [slope by y | slope by x | sample before the mask].
template <typename real>
struct SliceSums {
  real *y, *x, *value;
};

// The sum of a vector's numbers, in an order that lets four of these run side by side.
template <typename real>
CASCADEOPS_INLINE real sum_lanes(const typename Lanes<real>::type& vector) {
  constexpr int64_t quarter = Lanes<real>::count / 4;
  real part[4][quarter], sum = 0;
  memcpy(part, &vector, sizeof(vector));
  for (int64_t i = 0; i < quarter; ++i) sum += (part[0][i] + part[1][i]) + (part[2][i] + part[3][i]);
  return sum;
}

// One tap of a block: adds grad_sample to the cells that were read, and sums up what grad_offset and grad_mask need.
template <typename scalar_t, typename real>
CASCADEOPS_INLINE void spread_samples(const real* tile, const scalar_t* image, real* grad_image, int64_t stride,
                                      const BlockSamples<real>& samples, int64_t count, int64_t channels,
                                      const SliceSums<real>& sums) {
  using Vector = typename Lanes<real>::type;
  constexpr int64_t lanes = Lanes<real>::count;
  for (int64_t p = 0; p < count; ++p, tile += kTileStride) {
    const DeformSample<real>& sample = samples.sample[p];
    real corner[4] = {};  // grad_sample times the cell, summed over the channels
    for (int i = 0; i < 4; ++i) {
      if (sample.cell[i] < 0) continue;
      const scalar_t* from = image + sample.cell[i] * stride;
      real* to = grad_image + sample.cell[i] * stride;
      const real weight = sample.weight(i) * samples.mask[p];
      Vector products{};
      for (int64_t c = 0; c < channels; c += lanes) {
        const int64_t some = std::min(lanes, channels - c);
        Vector grad, value, sum;
        load_lanes(tile + c, 1, some, grad);
        load_lanes(from + c, 1, some, value);
        load_lanes(to + c, 1, some, sum);
        products += grad * value;
        sum += weight * grad;
        store_lanes(sum, to + c, 1, some);
      }
      corner[i] = sum_lanes<real>(products);
    }
    sums.y[p] = samples.mask[p] * sample.slope_y(corner);
    sums.x[p] = samples.mask[p] * sample.slope_x(corner);
    if (!sums.value) continue;
    sums.value[p] = 0;
    for (int i = 0; i < 4; ++i) sums.value[p] += sample.weight(i) * corner[i];
  }
}

#define CASCADEOPS_SPREAD(scalar_t)                                                                                   \
  CASCADEOPS_CLONES void spread(const accumulate_t<scalar_t>* tile, const scalar_t* image,                            \
                                accumulate_t<scalar_t>* grad_image, int64_t stride,                                   \
                                const BlockSamples<accumulate_t<scalar_t>>& samples, int64_t count, int64_t channels, \
                                const SliceSums<accumulate_t<scalar_t>>& sums) {                                      \
    spread_samples(tile, image, grad_image, stride, samples, count, channels, sums);                                  \
  }
CASCADEOPS_SPREAD(float)
CASCADEOPS_SPREAD(double)
CASCADEOPS_SPREAD(torch::headeronly::Half)
CASCADEOPS_SPREAD(torch::headeronly::BFloat16)
#undef CASCADEOPS_SPREAD

// The weights of a slice as panels, one vector of channels each: [tap][vector][output][channel].
template <typename scalar_t, typename real>
void pack_slice(const DeformGeometry& g, const WeightView<const scalar_t>& weight, const Slice& slice,
                LineBuffer<real>& packed) {
  const int64_t panel = slice.outputs * kPanel<real>, tap_size = slice.columns<real>() * slice.outputs;
  for (int64_t o = 0; o < slice.outputs; ++o) {
    for (int64_t c = 0; c < slice.channels; ++c) {
      real* to = packed.data() + c / kPanel<real> * panel + o * kPanel<real> + c % kPanel<real>;
      for_each_tap_between(g, weight, slice.first_output + o, slice.first + c,
                           [&](int64_t tap, scalar_t value) { to[tap * tap_size] = static_cast<real>(value); });
    }
  }
}

// The gradients of one image that depend on one slice. packed: of pack_slice; grad_image: [cells, C]; sums: of the
// slice, [3][taps][pixels].
template <typename scalar_t, typename real>
void backward_data_of_slice(const Problem<scalar_t>& problem, int64_t image, const Slice& slice, const real* packed,
                            real* grad_image, const SliceSums<real>& sums) {
  const DeformGeometry& g = problem.g;
  const int64_t columns = slice.columns<real>(), tap_size = columns * slice.outputs, most_taps = kTileColumns / columns;
  LineBuffer<real> grad_tile = make_tile<real>(), tile = make_tile<real>();
  std::vector<BlockSamples<real>> samples(1);
  const scalar_t* from = problem.input + image * g.cells() * g.channels + slice.first;
  const scalar_t* grad = problem.grad + image * g.pixels() * g.out_channels + slice.first_output;
  for (int64_t first = 0; first < g.pixels(); first += kTileRows) {
    const PixelBlock block{image, first, std::min(kTileRows, g.pixels() - first)};
    for (int64_t first_tap = 0; first_tap < g.taps(); first_tap += most_taps) {
      const int64_t taps = std::min(most_taps, g.taps() - first_tap);
      for (int64_t p = 0; p < block.count; ++p) std::fill_n(tile.data() + p * kTileStride, taps * columns, real(0));
      for (int64_t o = 0; o < slice.outputs; o += kTileColumns) {
        const int64_t outputs = std::min(kTileColumns, slice.outputs - o);
        load_tile(grad + first * g.out_channels + o, g.out_channels, block.count, outputs, grad_tile.data());
        multiply_rows(
            grad_tile.data(), packed + first_tap * tap_size + o * kPanel<real>, tile.data(),
            {block.count, taps * columns / kPanel<real>, outputs, 1, 0, 0, slice.outputs * kPanel<real>, kTileStride});
      }
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t at = (first_tap + t) * g.pixels() + first;
        locate(g, problem.displacements, block, slice.offset_group, first_tap + t, samples[0]);
        spread(tile.data() + t * columns, from, grad_image, g.channels, samples[0], block.count, slice.channels,
               {sums.y + at, sums.x + at, sums.value ? sums.value + at : nullptr});
      }
    }
  }
}

// to[i] = sum over the parts of from[part][i]
template <typename scalar_t, typename real>
void add_parts(const real* from, int64_t parts, int64_t part_stride, int64_t count, scalar_t* to) {
  for (int64_t i = 0; i < count; ++i) {
    real sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += from[part * part_stride + i];
    to[i] = static_cast<scalar_t>(sum);
  }
}

std::tuple<Tensor, Tensor, Tensor> deform_conv2d_backward_data_cpu(Tensor grad, Tensor input, Tensor offset,
                                                                   std::optional<Tensor> mask, Tensor weight,
                                                                   std::vector<int64_t> stride,
                                                                   std::vector<int64_t> padding,
                                                                   std::vector<int64_t> dilation, bool) {
  const DeformGeometry g = check_deform_conv2d_backward(grad, input, offset, mask, weight, stride, padding, dilation);
  const auto dtype = input.scalar_type(), offset_dtype = offset.scalar_type();
  const auto sum_dtype = sum_dtype_of(dtype);
  const auto format = memory_format_of(input);
  const int64_t samples = g.taps() * g.pixels();  // of one image and offset group
  Tensor grad_input = empty_map(input, {g.images, g.channels, g.height, g.width}, sum_dtype,
                                torch::headeronly::MemoryFormat::ChannelsLast);
  torch::stable::zero_(grad_input);
  Tensor grad_offset = torch::stable::new_empty(
      offset, {g.images, 2 * g.offset_groups * g.taps(), g.out_height, g.out_width}, sum_dtype);
  Tensor grad_mask = mask ? torch::stable::new_empty(
                                *mask, {g.images, g.offset_groups * g.taps(), g.out_height, g.out_width}, sum_dtype)
                          : torch::stable::new_empty(offset, {0}, sum_dtype);
  const auto mask_dtype = mask ? mask->scalar_type() : offset_dtype;
  if (grad.numel() > 0) {
    grad = channels_last(grad);
    input = channels_last(input);
    offset = as_planes(offset, sum_dtype);
    if (mask) mask = as_planes(*mask, sum_dtype);
    const std::vector<Slice> slices = cut_slices(g);
    const int64_t parts = slices.back().part + 1;
    const int64_t all = g.images * g.offset_groups * samples;  // samples of the call
    const Tensor sums = torch::stable::new_empty(grad, {mask ? 3 : 2, parts, all}, sum_dtype);

    dispatch_floating(dtype, "deform_conv2d", [&](auto zero) {
      using scalar_t = decltype(zero);
      using real = accumulate_t<scalar_t>;
      const auto problem = problem_of<scalar_t>(g, grad, input, offset, mask);
      real* sum_data = sums.mutable_data_ptr<real>();
      real* grad_data = grad_input.mutable_data_ptr<real>();
      const auto kernels = weight_view(weight.const_data_ptr<scalar_t>(), weight);
      torch::stable::parallel_for(
          0, g.images * static_cast<int64_t>(slices.size()), 1, [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end;) {
              // Tasks of a slice follow each other, so that its weights are packed once.
              const Slice& slice = slices[task / g.images];
              LineBuffer<real> packed(g.taps() * slice.columns<real>() * slice.outputs);
              pack_slice(g, kernels, slice, packed);
              for (const int64_t last = std::min(end, (task / g.images + 1) * g.images); task < last; ++task) {
                const int64_t image = task % g.images;
                real* y = sum_data + slice.part * all + (image * g.offset_groups + slice.offset_group) * samples;
                backward_data_of_slice(problem, image, slice, packed.data(),
                                       grad_data + image * g.cells() * g.channels + slice.first,
                                       SliceSums<real>{y, y + parts * all, mask ? y + 2 * parts * all : nullptr});
              }
            }
          });

      real* to_offset = grad_offset.mutable_data_ptr<real>();
      real* to_mask = mask ? grad_mask.mutable_data_ptr<real>() : nullptr;
      torch::stable::parallel_for(0, all / g.pixels(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t plane = begin; plane < end; ++plane) {
          const real* from = sum_data + plane * g.pixels();
          add_parts(from, parts, all, g.pixels(), to_offset + 2 * plane * g.pixels());
          add_parts(from + parts * all, parts, all, g.pixels(), to_offset + (2 * plane + 1) * g.pixels());
          if (mask) add_parts(from + 2 * parts * all, parts, all, g.pixels(), to_mask + plane * g.pixels());
        }
      });
    });
  } else {
    torch::stable::zero_(grad_offset);
    torch::stable::zero_(grad_mask);
  }
  const auto rounded = torch::stable::to(grad_input, dtype);
  return {torch::stable::contiguous(rounded, format), torch::stable::to(grad_offset, offset_dtype),
          torch::stable::to(grad_mask, mask_dtype)};
}

// grad_weight between a slice and outputs [first, first + outputs), at most kTileColumns of them.
template <typename scalar_t, typename real>
void backward_weight_of_slice(const Problem<scalar_t>& problem, const Slice& slice, int64_t first_output,
                              int64_t outputs, const WeightView<scalar_t>& grad_weight) {
  const DeformGeometry& g = problem.g;
  const int64_t columns = slice.columns<real>(), most_taps = kTileColumns / columns;
  const int64_t panels = (outputs + kPanel<real> - 1) / kPanel<real>;
  // Sums of the taps that fit into a tile lie together; the product overwrites up to 13 rows after them.
  const int64_t chunk_rows = most_taps * columns + 13;
  LineBuffer<real> grad_tile = make_tile<real>(), tile = make_tile<real>();
  LineBuffer<real> sums((g.taps() + most_taps - 1) / most_taps * chunk_rows * panels * kPanel<real>);
  std::vector<BlockSamples<real>> samples(1);
  for (int64_t i = 0; i < count_blocks(g, kTileRows); ++i) {
    const PixelBlock block = pixel_block(g, kTileRows, i);
    load_tile(problem.grad + (block.image * g.pixels() + block.first) * g.out_channels + first_output, g.out_channels,
              block.count, outputs, grad_tile.data());
    for (int64_t first_tap = 0; first_tap < g.taps(); first_tap += most_taps) {
      const int64_t taps = std::min(most_taps, g.taps() - first_tap);
      for (int64_t t = 0; t < taps; ++t) {
        locate(g, problem.displacements, block, slice.offset_group, first_tap + t, samples[0]);
        gather(problem.input + block.image * g.cells() * g.channels + slice.first, g.channels, samples[0], block.count,
               slice.channels, tile.data() + t * columns);
      }
      multiply_columns(tile.data(), grad_tile.data(),
                       sums.data() + first_tap / most_taps * chunk_rows * panels * kPanel<real>,
                       {taps * columns, panels, block.count, 1, 0, 0, kPanel<real>, panels * kPanel<real>});
    }
  }
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t c = 0; c < slice.channels; ++c) {
      for_each_tap_between(g, grad_weight, first_output + o, slice.first + c, [&](int64_t tap, scalar_t& value) {
        const int64_t row = tap / most_taps * chunk_rows + tap % most_taps * columns + c;
        value = static_cast<scalar_t>(sums.data()[row * panels * kPanel<real> + o]);
      });
    }
  }
}

Tensor deform_conv2d_backward_weight_cpu(Tensor grad, Tensor input, Tensor offset, std::optional<Tensor> mask,
                                         Tensor weight, std::vector<int64_t> stride, std::vector<int64_t> padding,
                                         std::vector<int64_t> dilation) {
  const DeformGeometry g = check_deform_conv2d_backward(grad, input, offset, mask, weight, stride, padding, dilation);
  const auto dtype = input.scalar_type();
  const auto sum_dtype = sum_dtype_of(dtype);
  Tensor grad_weight =
      torch::stable::new_empty(weight, {g.out_channels, g.group_channels(), g.kernel_height, g.kernel_width}, dtype);
  grad = channels_last(grad);
  input = channels_last(input);
  offset = as_planes(offset, sum_dtype);
  if (mask) mask = as_planes(*mask, sum_dtype);

  // A task is a slice and some of its outputs; these are cut only as far as it takes to keep the threads busy.
  const std::vector<Slice> slices = cut_slices(g);
  const int64_t wanted = 4 * int64_t{torch::stable::get_num_threads()}, count = static_cast<int64_t>(slices.size());
  const int64_t widest = g.out_channels * count / std::max(wanted, count);
  const int64_t step = std::clamp<int64_t>(widest / 64 * 64, 64, 512);
  std::vector<std::array<int64_t, 3>> tasks;  // slice, first output, outputs
  for (int64_t s = 0; s < count; ++s)
    for (int64_t o = 0; o < slices[s].outputs; o += step)
      tasks.push_back({s, slices[s].first_output + o, std::min(step, slices[s].outputs - o)});

  dispatch_floating(dtype, "deform_conv2d", [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto problem = problem_of<scalar_t>(g, grad, input, offset, mask);
    const auto kernels = weight_view(grad_weight.mutable_data_ptr<scalar_t>(), grad_weight);
    torch::stable::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto [slice, first_output, outputs] = tasks[i];
        backward_weight_of_slice<scalar_t, accumulate_t<scalar_t>>(problem, slices[slice], first_output, outputs,
                                                                   kernels);
      }
    });
  });
  return grad_weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascadeops, CPU, library) {
  library.impl("deform_conv2d_backward_data", TORCH_BOX(&deform_conv2d_backward_data_cpu));
  library.impl("deform_conv2d_backward_weight", TORCH_BOX(&deform_conv2d_backward_weight_cpu));
}

}  // namespace cascadeops
