// Input checks of deform_conv2d, for CPU and CUDA alike; they also gather the sizes of a call.
#pragma once

#include <optional>
#include <vector>

#include "checks.h"
#include "common/deform.h"

namespace cascadeops {

inline DeformGeometry check_deform_conv2d(const torch::stable::Tensor& input, const torch::stable::Tensor& offset,
                                          const std::optional<torch::stable::Tensor>& mask,
                                          const torch::stable::Tensor& weight,
                                          const std::optional<torch::stable::Tensor>& bias,
                                          const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                          const std::vector<int64_t>& dilation) {
  constexpr const char* op = "deform_conv2d";
  using torch::headeronly::ScalarType;
  check(input.dim() == 4, op, ": input must have shape [N, C, H, W], got ", shape_of(input));
  const auto dtype = input.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
            dtype == ScalarType::BFloat16,
        op, ": input must have dtype float32, float64, float16 or bfloat16, got ", torch::headeronly::toString(dtype));
  check(weight.dim() == 4, op, ": weight must have shape [out_channels, C / groups, kernel_height, kernel_width], got ",
        shape_of(weight));
  for (int i = 0; i < 4; ++i) check(weight.size(i) > 0, op, ": weight must not be empty, got shape ", shape_of(weight));
  const int64_t channels = input.size(1), out_channels = weight.size(0);
  check(channels > 0 && channels % weight.size(1) == 0, op, ": input must have a positive multiple of ", weight.size(1),
        " channels (weight has shape ", shape_of(weight), "), got ", channels);
  const int64_t groups = channels / weight.size(1);
  check(out_channels % groups == 0, op, ": weight must have a multiple of ", groups, " (groups) output channels, got ",
        out_channels);

  // The limits keep positions far from overflow.
  constexpr int64_t limit = int64_t{1} << 31;
  const auto check_pair = [&](const char* name, const std::vector<int64_t>& pair, int64_t least) {
    check(pair.size() == 2, op, ": ", name, " must be one number or two, got ", pair.size());
    for (const int64_t value : pair)
      check(value >= least && value < limit, op, ": ", name, " must be in [", least, ", 2**31), got ", value);
  };
  check_pair("stride", stride, 1);
  check_pair("padding", padding, 0);
  check_pair("dilation", dilation, 1);
  for (int i = 2; i < 4; ++i) {
    check(input.size(i) < limit, op, ": input must have fewer than 2**31 rows and columns, got ", shape_of(input));
    check(weight.size(i) < limit, op, ": weight must have fewer than 2**31 rows and columns, got ", shape_of(weight));
  }
  const auto out_size = [&](int i) {
    const int64_t reach = dilation[i] * (weight.size(2 + i) - 1) + 1, room = input.size(2 + i) + 2 * padding[i];
    return room < reach ? 0 : (room - reach) / stride[i] + 1;
  };
  const int64_t out_height = out_size(0), out_width = out_size(1);
  check(out_height > 0 && out_width > 0, op,
        ": the kernel must fit into the padded input; the output would have shape [", out_height, ", ", out_width, "]");

  const int64_t taps = weight.size(2) * weight.size(3);
  const auto check_map = [&](const char* name, const torch::stable::Tensor& map, int64_t numbers) {
    check(map.dim() == 4 && map.size(0) == input.size(0) && map.size(1) > 0 && map.size(1) % (numbers * taps) == 0 &&
              map.size(2) == out_height && map.size(3) == out_width,
          op, ": ", name, " must have shape [N, offset_groups * ", numbers * taps, ", out_height, out_width] = [",
          input.size(0), ", offset_groups * ", numbers * taps, ", ", out_height, ", ", out_width, "], got ",
          shape_of(map));
    check(map.scalar_type() == dtype || map.scalar_type() == ScalarType::Float, op, ": ", name,
          " must have the dtype of input, ", torch::headeronly::toString(dtype), ", or Float, got ",
          torch::headeronly::toString(map.scalar_type()));
    check_same_device(op, name, map, "input", input);
  };
  check_map("offset", offset, 2);
  const int64_t offset_groups = offset.size(1) / (2 * taps);
  check(channels % offset_groups == 0, op, ": offset must have a number of groups that divides ", channels,
        " (channels of input), got ", offset_groups);
  if (mask) {
    check_map("mask", *mask, 1);
    check(mask->size(1) == offset_groups * taps, op, ": mask must have the groups of offset, ", offset_groups, ", so ",
          offset_groups * taps, " channels, got ", mask->size(1));
  }
  check_dtype(op, "weight", weight, dtype);
  check_same_device(op, "weight", weight, "input", input);
  if (bias) {
    check(bias->dim() == 1 && bias->size(0) == out_channels, op, ": bias must have shape [out_channels] = [",
          out_channels, "], got ", shape_of(*bias));
    check_dtype(op, "bias", *bias, dtype);
    check_same_device(op, "bias", *bias, "input", input);
  }
  return {input.size(0), channels,       input.size(2),  input.size(3), out_channels, out_height,
          out_width,     weight.size(2), weight.size(3), stride[0],     stride[1],    padding[0],
          padding[1],    dilation[0],    dilation[1],    groups,        offset_groups};
}

inline DeformGeometry check_deform_conv2d_backward(
    const torch::stable::Tensor& grad, const torch::stable::Tensor& input, const torch::stable::Tensor& offset,
    const std::optional<torch::stable::Tensor>& mask, const torch::stable::Tensor& weight,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  constexpr const char* op = "deform_conv2d";
  const DeformGeometry g = check_deform_conv2d(input, offset, mask, weight, std::nullopt, stride, padding, dilation);
  check(grad.dim() == 4 && grad.size(0) == g.images && grad.size(1) == g.out_channels && grad.size(2) == g.out_height &&
            grad.size(3) == g.out_width,
        op, ": grad must have shape [", g.images, ", ", g.out_channels, ", ", g.out_height, ", ", g.out_width,
        "], got ", shape_of(grad));
  check_dtype(op, "grad", grad, input.scalar_type());
  check_same_device(op, "grad", grad, "input", input);
  return g;
}

}  // namespace cascadeops
