"""The self-calibrated convolution: as a function of folded weights, and as a module that trains."""

import itertools
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d

from cascadeops.self_calibrated_gate import self_calibrated_gate

_IMPLEMENTATIONS = ("convolutions", "triton", "measured")


def self_calibrated_conv2d(
    x: Tensor,  # [N, C, H, W]
    k2_weight: Tensor,  # [C, C / groups, 3, 3]
    k3_weight: Tensor,  # [C, C / groups, 3, 3]
    k4_weight: Tensor,  # [D, C / groups, 3, 3]
    k2_bias: Tensor | None = None,  # [C]
    k3_bias: Tensor | None = None,  # [C]
    k4_bias: Tensor | None = None,  # [D]
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    pooling: int = 4,
    implementation: str = "convolutions",
) -> Tensor:
    """Three 3x3 convolutions, of which one at reduced size gates another: ``k4(k3(x) * sigmoid(x + up(k2(pool(x)))))``.

    The self-calibrated convolution of the SCNet *backbones* (CVPR 2020), not to be confused with the detector SCNet.
    Batch norms, which follow each convolution in the paper, are folded into weights and biases: `SelfCalibratedConv2d`
    does that in eval mode. The convolutions are PyTorch's; `self_calibrated_gate` is everything between them.

    Args:
        x: ``[N, C, H, W]``; channels-last is the fast layout. A map smaller than ``pooling`` is pooled to one cell.
        k2_weight, k3_weight, k4_weight: 3x3, padded by ``dilation``; the dtype of ``x``, unless under autocast.
        k2_bias, k3_bias, k4_bias: one number for each output channel, or None.
        stride: of k4, the last convolution.
        dilation, groups: of all three.
        pooling: side of the cells that k2 sees, in pixels; what is left over at the end is not pooled.
        implementation: ``"convolutions"``: PyTorch's three and the gate. ``"triton"``: k3 and the gate as one Triton
            kernel, for inference on an NVIDIA GPU with groups=1; it saves writing and reading k3's result. It is tuned
            at the first call for each shape. ``"measured"``: the first call for each shape also times both on the GPU,
            and the faster one serves all calls of that shape; ``"convolutions"`` where the kernel cannot serve, or
            nothing can be timed (while compiling, exporting or capturing a CUDA graph). It pays where few shapes
            return often: tuning takes seconds a shape. Not the default, since no GPU has timed the kernel yet.

    Returns:
        ``[N, D, ceil(H / stride), ceil(W / stride)]``.

    Raises:
        ValueError: wrong rank or size of ``x`` or a weight; an unknown implementation, or one that cannot serve the
            call (for "triton": not on CUDA, groups, a gradient asked for).
        RuntimeError: other wrong shapes, dtypes or devices.

    Source: Liu et al., "Improving Convolutional Networks with Self-Calibrated Convolutions", CVPR 2020, section 3.2.
    """
    _check(x, k2_weight, k3_weight, k4_weight, stride, dilation, groups, pooling, implementation)
    pooled = avg_pool2d(x, (min(pooling, x.size(2)), min(pooling, x.size(3))))
    k2 = conv2d(pooled, k2_weight, k2_bias, 1, dilation, dilation, groups)
    if implementation == "measured":
        implementation = _measured_choice(x, k3_weight, k3_bias, k2, dilation, groups)
    gated_conv2d = _triton_gated_conv2d if implementation == "triton" else _gated_conv2d
    gated = gated_conv2d(x, k3_weight, k3_bias, k2, dilation, groups)
    return conv2d(gated, k4_weight, k4_bias, stride, dilation, dilation, groups)


def _check(x, k2_weight, k3_weight, k4_weight, stride, dilation, groups, pooling, implementation) -> None:
    def check(condition: bool, rule: str, got) -> None:
        if not condition:
            raise ValueError(f"self_calibrated_conv2d: {rule}, got {got}")

    check(
        x.dim() == 4 and min(x.shape[2:]) > 0, "x must have shape [N, C, H, W] with at least one pixel", list(x.shape)
    )
    for name, number in (("stride", stride), ("dilation", dilation), ("groups", groups), ("pooling", pooling)):
        check(number >= 1, f"{name} must be at least 1", number)
    channels = x.size(1)
    check(channels % groups == 0, f"groups must divide the {channels} channels of x", groups)
    inner = channels // groups
    for name, weight, rows in (
        ("k2_weight", k2_weight, channels),
        ("k3_weight", k3_weight, channels),
        ("k4_weight", k4_weight, k4_weight.size(0) if k4_weight.dim() else 0),
    ):
        rule = f"{name} must have shape [{'D' if name == 'k4_weight' else rows}, {inner}, 3, 3]"
        check(weight.shape == (rows, inner, 3, 3), rule, list(weight.shape))
    check(implementation in _IMPLEMENTATIONS, f"implementation must be one of {_IMPLEMENTATIONS}", repr(implementation))


def _gated_conv2d(x, k3_weight, k3_bias, k2, dilation, groups) -> Tensor:
    return self_calibrated_gate(x, conv2d(x, k3_weight, k3_bias, 1, dilation, dilation, groups), k2)


def _triton_gated_conv2d(x, k3_weight, k3_bias, k2, dilation, groups) -> Tensor:
    problem = _problem_of_triton(x, k3_weight, k2, groups)
    if problem is not None:
        raise ValueError(f'self_calibrated_conv2d: implementation="triton" {problem}')
    from cascadeops.triton.self_calibrated_conv2d import gated_conv2d  # Triton is not everywhere

    return gated_conv2d(x, k3_weight, k3_bias, k2, dilation)


def _problem_of_triton(x, k3_weight, k2, groups) -> str | None:
    """Why the Triton kernel cannot serve a call."""
    if not x.is_cuda:
        return f"needs CUDA tensors, got {x.device}"
    if groups != 1:
        return f"needs groups=1, got {groups}"
    if torch.is_grad_enabled() and any(map.requires_grad for map in (x, k3_weight, k2)):
        return "has no gradient: use it under torch.no_grad() or torch.inference_mode()"
    return None


_choices: dict[tuple, str] = {}
"""What a call looks like -> the implementation that was faster, for the life of the process."""


def _measured_choice(x, k3_weight, k3_bias, k2, dilation, groups) -> str:
    cannot_time = torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    if cannot_time or _problem_of_triton(x, k3_weight, k2, groups) is not None:
        return "convolutions"
    if x.dtype == torch.float64 or find_spec("triton") is None:
        return "convolutions"
    maps = [(map.dtype, map.shape, map.stride()) for map in (x, k3_weight, k2)]
    key = (x.device, *maps, k3_bias is None, dilation, torch.backends.cudnn.allow_tf32)
    if key not in _choices:
        arguments = x, k3_weight, k3_bias, k2, dilation, groups
        convolutions = _milliseconds(lambda: _gated_conv2d(*arguments))
        faster = _milliseconds(lambda: _triton_gated_conv2d(*arguments)) < convolutions
        _choices[key] = "triton" if faster else "convolutions"
    return _choices[key]


def _milliseconds(function: Callable[[], Tensor], calls: int = 20) -> float:
    """The GPU's time of one call, the least of three averages. The first calls, which tune, do not count."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
    for _ in range(3):
        function()
    for event in events:
        event.record()
        if event is not events[-1]:
            for _ in range(calls):
                function()
    events[-1].synchronize()
    return min(begin.elapsed_time(end) for begin, end in itertools.pairwise(events)) / calls


class SelfCalibratedConv2d(nn.Module):
    """The self-calibrated convolution with its batch norms, see `self_calibrated_conv2d`.

    In training the three branches run around the fused gate, which saves only its arguments. In eval mode, where batch
    norms are affine, they are folded into the convolutions. Parameters are named as in the authors' checkpoints:
    ``k2.1.weight, k2.2.*, k3.0.weight, k3.1.*, k4.0.weight, k4.1.*``.

    Args:
        channels: C, of the input and the output.
        stride: of the last convolution.
        dilation, groups: of all three; padding equals the dilation.
        pooling: side of the cells that k2 sees.
        implementation: of eval mode, see `self_calibrated_conv2d`.
        norm: makes the norm of so many channels. Batch norms, and subclasses, are folded where they are affine; others
            (group norm) run around the fused gate.

    Shapes: ``[N, C, H, W]`` to ``[N, C, ceil(H / stride), ceil(W / stride)]``; H and W at least 1.

    Source: Liu et al., CVPR 2020, figure 2 (the lower half); layers and names as github.com/MCG-NKU/SCNet, `SCConv`.
    """

    def __init__(
        self,
        channels: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        pooling: int = 4,
        implementation: str = "convolutions",
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ):
        super().__init__()
        self.stride, self.dilation, self.groups, self.pooling = stride, dilation, groups, pooling
        self.implementation = implementation

        def conv(stride: int) -> nn.Conv2d:
            return nn.Conv2d(channels, channels, 3, stride, dilation, dilation, groups, bias=False)

        self.k2 = nn.Sequential(_AveragePool2d(pooling), conv(1), norm(channels))
        self.k3 = nn.Sequential(conv(1), norm(channels))
        self.k4 = nn.Sequential(conv(stride), norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        branches = [(branch[-2], branch[-1]) for branch in (self.k2, self.k3, self.k4)]
        if not all(_is_affine(norm) for _, norm in branches):
            return self.k4(self_calibrated_gate(x, self.k3(x), self.k2(x)))
        weights, biases = zip(*(_fold(conv, norm) for conv, norm in branches), strict=True)
        settings = self.stride, self.dilation, self.groups, self.pooling, self.implementation
        return self_calibrated_conv2d(x, *weights, *biases, *settings)

    def extra_repr(self) -> str:
        return f"pooling={self.pooling}, implementation={self.implementation!r}"


class _AveragePool2d(nn.Module):
    """Over cells of size x size pixels; a map smaller than that is one cell."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return avg_pool2d(x, (min(self.size, x.size(2)), min(self.size, x.size(3))))

    def extra_repr(self) -> str:
        return str(self.size)


def _is_affine(norm: nn.Module) -> bool:
    """Whether a norm is the same affine map for every batch; Identity is what a norm folded before leaves behind."""
    if isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm):
        return not norm.training and norm.running_mean is not None
    return isinstance(norm, nn.Identity)


def _fold(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the convolution with the norm behind it; small next to the convolution, so not kept."""
    if isinstance(norm, nn.Identity):
        return conv.weight, conv.bias
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    bias = -norm.running_mean * scale
    bias = bias if norm.bias is None else bias + norm.bias
    return conv.weight * scale.to(conv.weight.dtype)[:, None, None, None], bias.to(conv.weight.dtype)
