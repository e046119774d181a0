"""deform_conv2d beside torchvision's and mmcv's: the 3 x 3 layers of a deformable ResNet-50's last three stages."""

import functools

import pytest
import shapes
import torch

import cascadeops
from cascadeops.reference.deform_conv2d import deform_conv2d as reference

SIZES = {128: 1, 256: 2, 512: 3}  # channels: level of the pyramid whose size their map has
OURS = ["cascadeops", "cascadeops contiguous", "cascadeops bfloat16"]  # others: channels-last, float32
CASES = [(2, name) for name in [*OURS, "torchvision", "mmcv"]] + [(1, n) for n in ["cascadeops", "torchvision", "mmcv"]]


def workload(channels, version, implementation="cascadeops", device="cpu"):
    """Input, offset, weight and, in version 2, bias and mask.

    Offsets of about two cells, in steps that bfloat16 holds and never on a cell, where their gradient would jump.
    """
    generator = torch.Generator().manual_seed(0)
    height, width = (side // shapes.STRIDES[SIZES[channels]] for side in shapes.IMAGE_SIZE)
    input = torch.randn(1, channels, height, width, generator=generator)
    if implementation != "cascadeops contiguous":
        input = input.contiguous(memory_format=torch.channels_last)
    offset = (2 * torch.randn(1, 18, height, width, generator=generator)).clamp(-7, 7)
    offset = (16 * offset).round() / 16 + 1 / 32
    weight = torch.randn(channels, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    tensors = [input, offset, weight]
    if version == 2:
        tensors += [torch.zeros(channels), torch.rand(1, 9, height, width, generator=generator)]
    dtype = torch.bfloat16 if implementation == "cascadeops bfloat16" else torch.float32
    return [tensor.to(device, dtype) for tensor in tensors]


def convolution(implementation):
    """function(input, offset, weight, bias, mask) with a padding of 1."""
    if implementation == "mmcv":
        ops = pytest.importorskip("mmcv.ops")

        def convolve(input, offset, weight, bias=None, mask=None):
            if mask is None:
                return ops.deform_conv2d(input, offset, weight, 1, 1)
            return ops.modulated_deform_conv2d(input, offset, mask, weight, bias, 1, 1, 1, 1, 1)

        return convolve
    if implementation == "torchvision":
        function = pytest.importorskip("torchvision").ops.deform_conv2d
    else:
        function = reference if implementation == "reference" else cascadeops.deform_conv2d
    return lambda input, offset, weight, bias=None, mask=None: function(
        input, offset, weight, bias, padding=1, mask=mask
    )


@functools.cache
def expected(channels, version):
    """The reference's result and its gradients, all in float32 on the CPU; the gradient of the result is the result."""
    leaves = [tensor.requires_grad_() for tensor in workload(channels, version)]
    out = convolution("reference")(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, out.detach())


def assert_close(result, exact, implementation):
    tolerance = 0.02 if implementation == "cascadeops bfloat16" else 1e-4
    assert (result.cpu().float() - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize(("version", "implementation"), [*CASES, (2, "reference")])
@pytest.mark.parametrize("channels", SIZES)
def bench_deform_conv2d(measure, device, channels, version, implementation):
    function, tensors = convolution(implementation), workload(channels, version, implementation, device)
    exact = expected(channels, version)[0]
    measure(
        f"deform_conv2d, version {version}, {channels} channels of {exact.shape[2]} x {exact.shape[3]}",
        implementation,
        lambda: function(*tensors),
        lambda result: assert_close(result, exact, implementation),
        bytes_moved=sum(tensor.nbytes for tensor in tensors) + tensors[0].nbytes,
    )


@pytest.mark.parametrize(("version", "implementation"), CASES)
@pytest.mark.parametrize("channels", SIZES)
def bench_deform_conv2d_backward(measure, device, channels, version, implementation):
    """All gradients. The reference is left out: it takes gigabytes."""
    function = convolution(implementation)
    leaves = [tensor.requires_grad_() for tensor in workload(channels, version, implementation, device)]
    exact, gradients = expected(channels, version)
    out, grad = function(*leaves), exact.to(device, leaves[0].dtype)

    def check(result):
        for one, other in zip(result, gradients, strict=True):
            assert_close(one, other, implementation)

    measure(
        f"deform_conv2d backward, version {version}, {channels} channels of {exact.shape[2]} x {exact.shape[3]}",
        implementation,
        lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True),
        check,
        bytes_moved=grad.nbytes + 2 * sum(leaf.nbytes for leaf in leaves),
    )
