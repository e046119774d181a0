"""The gate of a self-calibrated convolution: upsampling, sum, sigmoid and product in one pass, and so the gradient."""

import torch
from torch import Tensor

from cascadeops._arguments import check_shapes, check_tensors
from cascadeops.reference.self_calibrated_gate import nearest_upsample


def self_calibrated_gate(
    x: Tensor,  # [N, C, H, W]
    k3: Tensor,  # [N, C, H, W]
    k2: Tensor,  # [N, C, h, w]
) -> Tensor:
    """``k3 * sigmoid(x + interpolate(k2, (H, W), mode="nearest"))``, each map read once and the result written once.

    Half types are computed in float32 and rounded once. The backward pass is one pass, too: it recomputes the sigmoid,
    so that nothing is saved but the three arguments. The gradient of ``k2``, a sum over the pixels that take a cell, is
    added in a fixed order, on every device. Differentiable any number of times.

    Args:
        x: ``[N, C, H, W]``, float32, float16, bfloat16 or float64, of any strides; channels-last is the fast case on a
            GPU. H and W at most 2^24.
        k3: ``[N, C, H, W]``, same dtype.
        k2: ``[N, C, h, w]``, same dtype, of any size (h, w): pixel y takes row floor(y * (h / H)), in float32, as
            PyTorch's "nearest" does; columns likewise.
        Under autocast all three are cast to autocast's dtype, except float64.

    Returns:
        ``[N, C, H, W]``, dtype of the arguments; channels-last in memory if the channels of ``x`` are adjacent.

    Raises:
        RuntimeError: wrong shape, dtype or device.

    Source: Liu et al., "Improving Convolutional Networks with Self-Calibrated Convolutions", CVPR 2020, equation 3.
    """
    check_tensors("self_calibrated_gate", x=x, k3=k3, k2=k2)
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        castable = (torch.float32, torch.float16, torch.bfloat16)
        x, k3, k2 = (map.to(dtype) if map.dtype in castable else map for map in (x, k3, k2))
    return torch.ops.cascadeops.self_calibrated_gate(x, k3, k2)


def _memory_format(x):
    """The rule of csrc/layout.h."""
    channels_adjacent = x.size(1) > 1 and x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if channels_adjacent else torch.contiguous_format


@torch.library.register_fake("cascadeops::self_calibrated_gate")
def _(x, k3, k2):
    check_shapes("self_calibrated_gate", x=(x, "N C H W"), k3=(k3, "N C H W"), k2=(k2, "N C * *"))
    return torch.empty_like(x, memory_format=_memory_format(x))


@torch.library.register_fake("cascadeops::self_calibrated_gate_backward")
def _(grad, x, k3, k2):
    shapes = {"x": (x, "N C H W"), "grad": (grad, "N C H W"), "k3": (k3, "N C H W"), "k2": (k2, "N C * *")}
    check_shapes("self_calibrated_gate", **shapes)
    return tuple(torch.empty_like(map, memory_format=_memory_format(x)) for map in (x, k3, k2))


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return torch.ops.cascadeops.self_calibrated_gate_backward(grad, *ctx.saved_tensors)


torch.library.register_autograd("cascadeops::self_calibrated_gate", _backward, setup_context=_save_for_backward)


def _double_backward(ctx, of_grad_x, of_grad_k3, of_grad_k2):
    # With s the sigmoid and s' = s (1 - s), the first backward pass is
    #   grad_k3 = grad s,  grad_x = grad k3 s',  grad_k2 = the sum of grad_x over each cell's pixels.
    grad, x, k3, k2 = ctx.saved_tensors
    gate = torch.sigmoid(x + nearest_upsample(k2, x.shape[2:]))
    slope = gate * (1 - gate)
    of_slope = of_grad_x + nearest_upsample(of_grad_k2, x.shape[2:])
    # What multiplies s' in the derivative by x, for the operator to multiply and sum.
    inner = grad * (of_grad_k3 + of_slope * k3 * (1 - 2 * gate))
    second_x, _, second_k2 = torch.ops.cascadeops.self_calibrated_gate_backward(inner, x, torch.ones_like(k3), k2)
    return of_grad_k3 * gate + of_slope * k3 * slope, second_x, of_slope * grad * slope, second_k2


torch.library.register_autograd(
    "cascadeops::self_calibrated_gate_backward", _double_backward, setup_context=_save_for_backward
)
