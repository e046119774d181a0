"""Deformable convolution, versions 1 and 2: the function, the module, and the gradients."""

import math
import warnings

import torch
from torch import Tensor, nn

from cascadeops._arguments import as_list, check_tensors


def deform_conv2d(
    input: Tensor,  # [N, C, H, W]
    offset: Tensor,  # [N, offset_groups * taps * 2 (y, x), h, w]
    weight: Tensor,  # [out_channels, C / groups, kernel_height, kernel_width]
    bias: Tensor | None = None,  # [out_channels]
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    mask: Tensor | None = None,  # [N, offset_groups * taps, h, w]
) -> Tensor:
    """Convolves with a kernel whose taps are displaced at every output pixel: a drop-in for torchvision's.

    Tap ``t`` (an element of the kernel, counted row by row) of an output pixel reads the input at its usual place plus
    ``offset``, bilinearly between the four cells around, times ``mask`` (version 2; version 1 is ``mask=None``). Cells
    outside of the input are 0. Differentiable in all five tensors, once.

    The numbers of groups follow from the shapes: ``groups = C / weight.shape[1]`` cuts input and output channels as in
    any convolution, ``offset_groups = offset.shape[1] / (2 * taps)`` cuts the input channels into runs that share
    their offsets and masks.

    Args:
        input: ``[N, C, H, W]``, float32, float16, bfloat16 or float64. Channels-last is the fast case: other layouts
            are copied to it first.
        offset: ``[N, offset_groups * taps * 2, h, w]``, for each tap (dy, dx) in cells of the input. Dtype of the
            input, or float32, which keeps fractions of a cell that half types round away. A sample whose offset is
            NaN or infinite counts as 0 and gives no gradient to its offset.
        weight, bias: as of :func:`torch.nn.functional.conv2d`; dtype of the input.
        stride, padding, dilation: one number, or (vertical, horizontal).
        mask: ``[N, offset_groups * taps, h, w]``, dtype of the input, or float32.

    Returns:
        ``[N, out_channels, h, w]``, dtype of the input; channels-last in memory if the input is. Sums are kept in
        float32 (float64 for float64).

    Raises:
        RuntimeError: a wrong shape, dtype or device; a stride or dilation below 1, a negative padding; a kernel that
            does not fit into the padded input; a second derivative.

    Under autocast everything is computed in the input's dtype, which is that of the layer before: float16 or bfloat16
    inside of a network. Offsets and mask in float32 stay so.

    The results do not depend on the number of threads. On CUDA, half types go through tensor cores, so that samples are
    rounded to the input's dtype before they are multiplied; and the gradient of ``input`` is added up atomically, so
    that its last bits vary from run to run. Under ``torch.use_deterministic_algorithms(True)`` it is added up in 64-bit
    fixed point instead, which has one result (NaN everywhere, if a gradient, weight or mask is not finite, or so large
    that float32 might not hold the sums); float64 has no such way on CUDA and raises.

    Source: Dai et al., "Deformable Convolutional Networks", ICCV 2017, section 2.1; Zhu et al., "Deformable ConvNets
    v2", CVPR 2019, section 3.2. Results are those of torchvision 0.26.
    """
    check_tensors("deform_conv2d", input=input, offset=offset, weight=weight, optional={"bias": bias, "mask": mask})
    kind = input.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        weight, bias = (_cast(tensor, input.dtype) for tensor in (weight, bias))
        offset, mask = _as_usable(offset, input.dtype), _as_usable(mask, input.dtype)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    pairs = [
        _pair(value) if isinstance(value, int) else as_list("deform_conv2d", name, value, int)
        for name, value in geometry.items()
    ]
    return torch.ops.cascadeops.deform_conv2d(input, offset, mask, weight, bias, *pairs)


class DeformConv2d(nn.Module):
    """The parameters of a deformable convolution; drop-in for torchvision.ops.DeformConv2d, parameter names included.

    Offsets and masks are inputs of :meth:`forward`, usually outputs of an ordinary convolution whose weights start at
    0. Arguments, attributes and the initial values of the parameters are those of :class:`torch.nn.Conv2d`.

    Raises:
        ValueError: ``in_channels`` or ``out_channels`` is not a multiple of ``groups``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        for name, number in (("in_channels", in_channels), ("out_channels", out_channels)):
            if number % groups != 0:
                raise ValueError(f"DeformConv2d: {name} must be divisible by groups, got {number} and {groups}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = tuple(_pair(kernel_size))
        self.stride = tuple(_pair(stride))
        self.padding = tuple(_pair(padding))
        self.dilation = tuple(_pair(dilation))
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch.nn.Conv2d: uniform in +-1 / sqrt(fan_in)."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Shapes as of :func:`deform_conv2d`."""
        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding}" if self.padding != (0, 0) else ""
        text += f", dilation={self.dilation}" if self.dilation != (1, 1) else ""
        text += f", groups={self.groups}" if self.groups != 1 else ""
        return text + (", bias=False" if self.bias is None else "")


def _pair(value) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _as_usable(displacement: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Offsets or mask in a dtype that the operator takes beside an input of `dtype`."""
    usable = displacement is None or displacement.dtype in (dtype, torch.float32)
    return displacement if usable else _cast(displacement, dtype)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As autocast: integers stay what they are, and are refused."""
    return tensor.to(dtype) if tensor is not None and tensor.is_floating_point() else tensor


def _memory_format(map):
    """The rule of csrc/layout.h."""
    channels_adjacent = map.size(1) > 1 and map.stride(1) == 1 and not map.is_contiguous()
    return torch.channels_last if channels_adjacent else torch.contiguous_format


@torch.library.register_fake("cascadeops::deform_conv2d")
def _(input, offset, mask, weight, bias, stride, padding, dilation):
    # The compiled kernels check everything; this is what keeps a tensor on the meta device from passing for a result.
    def check(condition, message):
        torch._check(condition, lambda: f"deform_conv2d: {message}")

    for name, tensor in (("offset", offset), ("mask", mask), ("weight", weight), ("bias", bias)):
        check(tensor is None or tensor.device == input.device, f"{name} must be on the device of input")
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        check(len(pair) == 2, f"{name} must be one number or two, got {len(pair)}")
        for number in pair:
            check(number >= least, f"{name} must be in [{least}, 2**31), got {number}")
    for name, tensor in (("offset", offset), ("mask", mask)):
        check(tensor is None or tensor.dim() == 4, f"{name} must have shape [N, channels, h, w]")
    check(input.dim() == 4, f"input must have shape [N, C, H, W], got {list(input.shape)}")
    check(
        weight.dim() == 4 and weight.size(1) > 0,
        f"weight must have shape [out_channels, C / groups, kernel_height, kernel_width], got {list(weight.shape)}",
    )
    height, width = (
        (input.size(2 + i) + 2 * padding[i] - dilation[i] * (weight.size(2 + i) - 1) - 1) // stride[i] + 1
        for i in range(2)
    )
    check(height > 0 and width > 0, "the kernel must fit into the padded input")
    for name, tensor in (("offset", offset), ("mask", mask)):
        fits = tensor is None or (tensor.size(0), *tensor.shape[2:]) == (input.size(0), height, width)
        check(fits, f"{name} must have shape [N, channels, {height}, {width}]")
    out = input.new_empty((input.size(0), weight.size(0), height, width))
    return out.contiguous(memory_format=_memory_format(input))


@torch.library.register_fake("cascadeops::deform_conv2d_backward_data")
def _(grad, input, offset, mask, weight, stride, padding, dilation, deterministic):
    grad_input = torch.empty_like(input, memory_format=_memory_format(input))
    grad_offset = torch.empty_like(offset, memory_format=torch.contiguous_format)
    grad_mask = torch.empty_like(mask, memory_format=torch.contiguous_format) if mask is not None else None
    return grad_input, grad_offset, offset.new_empty(0) if grad_mask is None else grad_mask


@torch.library.register_fake("cascadeops::deform_conv2d_backward_weight")
def _(grad, input, offset, mask, weight, stride, padding, dilation):
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _save_for_backward(ctx, inputs, output):
    input, offset, mask, weight, _, *ctx.geometry = inputs
    ctx.save_for_backward(input, offset, mask, weight)


def _backward(ctx, grad):
    input, offset, mask, weight = ctx.saved_tensors
    operands = (grad, input, offset, mask, weight, *ctx.geometry)
    grad_input = grad_offset = grad_mask = grad_weight = grad_bias = None
    needs_input, needs_offset, needs_mask, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    if needs_input or needs_offset or needs_mask:
        deterministic = torch.are_deterministic_algorithms_enabled()
        if deterministic and input.is_cuda and input.dtype == torch.float64:
            _alert_not_deterministic()
            deterministic = False
        grads = torch.ops.cascadeops.deform_conv2d_backward_data(*operands, deterministic)
        grad_input, grad_offset, grad_mask = grads[0], grads[1], grads[2] if mask is not None else None
    if needs_weight:
        grad_weight = torch.ops.cascadeops.deform_conv2d_backward_weight(*operands)
    if needs_bias:
        grad_bias = grad.sum((0, 2, 3))
    return grad_input, grad_offset, grad_mask, grad_weight, grad_bias, None, None, None


def _alert_not_deterministic():
    message = (
        "deform_conv2d: on CUDA the gradient of a float64 input is added up in an order that changes from run to run. "
        "torch.use_deterministic_algorithms(True) asks for a fixed one: turn it off, or pass warn_only=True."
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)


torch.library.register_autograd("cascadeops::deform_conv2d", _backward, setup_context=_save_for_backward)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("deform_conv2d: a second derivative is not implemented")


for _name in ("deform_conv2d_backward_data", "deform_conv2d_backward_weight"):
    torch.library.register_autograd(f"cascadeops::{_name}", _no_second_derivative)
