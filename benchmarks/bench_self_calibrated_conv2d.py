"""SelfCalibratedConv2d in inference: folded around the fused gate, against its layers one by one, eager and compiled.

Three convolutions take most of the time, and they are the framework's on every side, but for "cascadeops triton", where
k3 and the gate are one Triton kernel (CUDA only).
"""

import pytest
import shapes
import torch
from torch import nn

import cascadeops


class Layers(nn.Module):
    """The same parameters, each layer by itself, as in the authors' code."""

    def __init__(self, module: cascadeops.SelfCalibratedConv2d):
        super().__init__()
        self.k2, self.k3, self.k4 = module.k2, module.k3, module.k4

    def forward(self, x):
        gate = torch.sigmoid(x + nn.functional.interpolate(self.k2(x), x.shape[2:]))
        return self.k4(self.k3(x) * gate)


@pytest.mark.parametrize("implementation", ["cascadeops", "cascadeops triton", "eager", "torch.compile"])
@pytest.mark.parametrize("stage", shapes.STAGES)
@torch.inference_mode()
def bench_self_calibrated_conv2d(measure, device, stage, implementation):
    if implementation == "cascadeops triton":
        pytest.importorskip("triton")
        if device.type != "cuda":
            pytest.skip("a CUDA kernel")
    if implementation == "torch.compile" and stage != "res2":
        pytest.skip("compiles for a minute")
    x, _, _ = shapes.self_calibrated(stage, device, batch=1)
    torch.manual_seed(0)
    module = cascadeops.SelfCalibratedConv2d(x.size(1)).to(device).eval().to(memory_format=torch.channels_last)
    expected = Layers(module)(x)
    if implementation == "cascadeops triton":
        module.implementation = "triton"
    elif implementation != "cascadeops":
        module = Layers(module)
    if implementation == "torch.compile":
        torch.compiler.reset()
        module = torch.compile(module)

    def check(result):
        tolerance = 1e-2 if device.type == "cuda" else 1e-4  # TF32 there
        assert (result - expected).abs().max() <= tolerance * expected.abs().max()

    measure(f"self_calibrated_conv2d, {stage}", implementation, lambda: module(x), check)
