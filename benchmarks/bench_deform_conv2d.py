"""deform_conv2d against torchvision, forward and backward: the 3 x 3 layers of a deformable ResNet-50's last stages."""

import pytest
import shapes
import torch

import cascadeops
from cascadeops.reference.deform_conv2d import deform_conv2d as reference

SIZES = {128: 1, 256: 2, 512: 3}  # channels: level of the pyramid whose size their map has


def workload(channels, device):
    """Channels-last input, offset, weight, bias, mask; offsets of about two cells."""
    generator = torch.Generator().manual_seed(0)
    height, width = (side // shapes.STRIDES[SIZES[channels]] for side in shapes.IMAGE_SIZE)
    input = torch.randn(1, channels, height, width, generator=generator).contiguous(memory_format=torch.channels_last)
    offset = 2 * torch.randn(1, 18, height, width, generator=generator)
    weight = torch.randn(channels, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    mask = torch.rand(1, 9, height, width, generator=generator)
    return [tensor.to(device) for tensor in (input, offset, weight, torch.zeros(channels), mask)]


def function_of(implementation):
    if implementation == "torchvision":
        return pytest.importorskip("torchvision").ops.deform_conv2d
    return cascadeops.deform_conv2d if implementation == "cascadeops" else reference


def assert_close(result, expected):
    assert (result - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("implementation", ["cascadeops", "torchvision", "reference"])
@pytest.mark.parametrize("channels", SIZES)
def bench_deform_conv2d(measure, device, channels, implementation):
    function, (*tensors, mask) = function_of(implementation), workload(channels, device)
    expected = cascadeops.deform_conv2d(*tensors, padding=1, mask=mask)
    measure(
        f"deform_conv2d, {channels} channels of {expected.shape[2]} x {expected.shape[3]}",
        implementation,
        lambda: function(*tensors, padding=1, mask=mask),
        lambda result: assert_close(result, expected),
        bytes_moved=sum(tensor.nbytes for tensor in (*tensors, mask, expected)),
    )


@pytest.mark.parametrize("implementation", ["cascadeops", "torchvision"])
@pytest.mark.parametrize("channels", SIZES)
def bench_deform_conv2d_backward(measure, device, channels, implementation):
    """All five gradients. The reference is left out: it takes gigabytes."""
    function, leaves = function_of(implementation), [t.requires_grad_() for t in workload(channels, device)]

    def graph(function):
        return function(*leaves[:4], padding=1, mask=leaves[4])

    out = graph(function)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(graph(cascadeops.deform_conv2d), leaves, grad)

    def check(result):
        for ours, theirs in zip(expected, result, strict=True):
            assert_close(theirs, ours)

    measure(
        f"deform_conv2d backward, {channels} channels of {out.shape[2]} x {out.shape[3]}",
        implementation,
        lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True),
        check,
        bytes_moved=grad.nbytes + 2 * sum(leaf.nbytes for leaf in leaves),
    )
