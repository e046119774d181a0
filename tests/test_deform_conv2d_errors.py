"""Bad input of deform_conv2d: errors that say what is wrong, also where torchvision dies."""

import subprocess
import sys

import pytest
import torch

import cascadeops


def call(**changes):
    arguments = {
        "input": torch.zeros(2, 4, 8, 9),
        "offset": torch.zeros(2, 36, 6, 7),
        "weight": torch.zeros(6, 2, 3, 3),
        "bias": torch.zeros(6),
        "mask": torch.ones(2, 18, 6, 7),
    }
    return cascadeops.deform_conv2d(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": torch.zeros(4, 8, 9)}, r"input must have shape \[N, C, H, W\], got \[4, 8, 9\]"),
        ({"input": torch.zeros(2, 5, 8, 9)}, r"input must have a positive multiple of 2 channels.*got 5"),
        ({"input": torch.zeros(2, 0, 8, 9)}, r"input must have a positive multiple of 2 channels.*got 0"),
        ({"input": torch.zeros(2, 4, 8, 9).int()}, "input must have dtype float32, float64, .* got Int"),
        ({"input": torch.zeros(2, 4, 0, 0)}, r"the kernel must fit .* would have shape \[0, 0\]"),
        ({"weight": torch.zeros(6, 3, 3)}, r"weight must have shape \[out_channels, .* got \[6, 3, 3\]"),
        ({"weight": torch.zeros(0, 2, 3, 3)}, r"weight must not be empty, got shape \[0, 2, 3, 3\]"),
        ({"weight": torch.zeros(6, 2, 3, 0)}, r"weight must not be empty, got shape \[6, 2, 3, 0\]"),
        ({"weight": torch.zeros(5, 2, 3, 3)}, r"weight must have a multiple of 2 \(groups\) output channels, got 5"),
        ({"weight": torch.zeros(6, 2, 9, 3)}, r"the kernel must fit .* would have shape \[0, 7\]"),
        ({"weight": torch.zeros(6, 2, 3, 3).half()}, "weight must have dtype Float, got Half"),
        ({"offset": torch.zeros(2, 35, 6, 7)}, r"offset must have shape .* = \[2, offset_groups \* 18, 6, 7\], got"),
        ({"offset": torch.zeros(2, 0, 6, 7)}, r"offset must have shape .* got \[2, 0, 6, 7\]"),
        ({"offset": torch.zeros(2, 36, 8, 9)}, r"offset must have shape .* got \[2, 36, 8, 9\]"),
        ({"offset": torch.zeros(1, 36, 6, 7)}, r"offset must have shape .* got \[1, 36, 6, 7\]"),
        ({"offset": torch.zeros(2, 54, 6, 7)}, r"offset must have a number of groups that divides 4 .* got 3"),
        ({"offset": torch.zeros(2, 36, 6, 7).half()}, "offset must have the dtype of input, Float, or Float, got Half"),
        ({"offset": torch.zeros(2, 36, 6, 7, device="meta")}, "offset must be on the device of input"),
        ({"mask": torch.ones(2, 9, 6, 7)}, "mask must have the groups of offset, 2, so 18 channels, got 9"),
        ({"mask": torch.ones(2, 18, 6, 8)}, r"mask must have shape .* got \[2, 18, 6, 8\]"),
        ({"bias": torch.zeros(5)}, r"bias must have shape \[out_channels\] = \[6\], got \[5\]"),
        ({"bias": torch.zeros(6).double()}, "bias must have dtype Float, got Double"),
        ({"stride": 0}, r"stride must be in \[1, 2\*\*31\), got 0"),
        ({"stride": (1, -1)}, r"stride must be in \[1, 2\*\*31\), got -1"),
        ({"stride": (1, 2, 3)}, "stride must be one number or two, got 3"),
        ({"padding": -1}, r"padding must be in \[0, 2\*\*31\), got -1"),
        ({"padding": 2**62}, r"padding must be in \[0, 2\*\*31\)"),
        ({"dilation": 0}, r"dilation must be in \[1, 2\*\*31\), got 0"),
        ({"dilation": 2**31 - 1}, r"the kernel must fit .* would have shape \[0, 0\]"),
    ],
)
def test_errors_say_what_is_wrong(changes, message):
    with pytest.raises(RuntimeError, match=f"deform_conv2d: {message}"):
        call(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": 0}, r"stride must be in \[1, 2\*\*31\), got 0"),
        ({"weight": torch.zeros(6, 2, 9, 3)}, "the kernel must fit"),
        ({"offset": torch.zeros(2, 36, 8, 9)}, r"offset must have shape"),
        ({"weight": torch.zeros(6, 0, 3, 3)}, r"weight must have shape"),
    ],
)
def test_errors_on_the_meta_device(changes, message):
    meta = {"input": torch.zeros(2, 4, 8, 9), "offset": torch.zeros(2, 36, 6, 7), "weight": torch.zeros(6, 2, 3, 3)}
    meta = {name: v.to("meta") if isinstance(v, torch.Tensor) else v for name, v in (meta | changes).items()}
    with pytest.raises(RuntimeError, match=f"deform_conv2d: {message}"):
        cascadeops.deform_conv2d(**meta)


def test_error_of_a_gradient_of_another_shape():
    tensors = (torch.zeros(2, 4, 8, 9), torch.zeros(2, 36, 6, 7), None, torch.zeros(6, 2, 3, 3))
    for name, extra in (("data", [False]), ("weight", [])):
        function = getattr(torch.ops.cascadeops, f"deform_conv2d_backward_{name}")
        with pytest.raises(RuntimeError, match=r"grad must have shape \[2, 6, 6, 7\], got \[2, 6, 6, 6\]"):
            function(torch.zeros(2, 6, 6, 6), *tensors, [1, 1], [0, 0], [1, 1], *extra)


def test_what_kills_torchvision_does_not_kill_us():
    # RELIABILITY of peers: NaN offsets forward and backward, stride 0, and no mask; in a process of its own.
    script = """
import torch, cascadeops
x = torch.randn(2, 3, 32, 32, requires_grad=True)
weight = torch.randn(4, 3, 3, 3, requires_grad=True)
offset = torch.full((2, 18, 32, 32), torch.nan, requires_grad=True)
out = cascadeops.deform_conv2d(x, offset, weight, padding=1)
out.sum().backward()
assert not out.any() and not x.grad.any() and not offset.grad.any() and not weight.grad.any()
try:
    cascadeops.deform_conv2d(x, offset, weight, padding=1, stride=0)
except RuntimeError as error:
    assert "stride" in str(error)
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "alive\n", done.stderr
