"""self_calibrated_gate against the framework's four passes, eager and compiled, at the stages of a ResNet-50."""

import pytest
import shapes
import torch

import cascadeops
from cascadeops.reference.self_calibrated_gate import self_calibrated_gate as reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def eager(x, k3, k2):
    return k3 * torch.sigmoid(x + torch.nn.functional.interpolate(k2, x.shape[2:]))


def function_of(implementation, stage, dtype):
    if implementation == "torch.compile":
        if stage != "res2" or dtype != "float32":
            pytest.skip("compiles for a minute")
        torch.compiler.reset()
        return torch.compile(eager)
    return {"cascadeops": cascadeops.self_calibrated_gate, "eager": eager, "reference": reference}[implementation]


def assert_close(result, expected):
    rounding = torch.finfo(result.dtype).eps
    assert (result.double() - expected.double()).abs().max() <= 20 * rounding * expected.abs().max()


@pytest.mark.parametrize("implementation", ["cascadeops", "eager", "torch.compile", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", shapes.STAGES)
def bench_self_calibrated_gate(measure, device, stage, dtype, implementation):
    maps, function = (
        shapes.self_calibrated(stage, device, dtype=DTYPES[dtype]),
        function_of(implementation, stage, dtype),
    )
    expected = cascadeops.self_calibrated_gate(*maps)
    measure(
        f"self_calibrated_gate, {stage} {dtype}",
        implementation,
        lambda: function(*maps),
        lambda result: assert_close(result, expected),
        bytes_moved=sum(map.nbytes for map in (*maps, expected)),
    )


@pytest.mark.parametrize("implementation", ["cascadeops", "eager", "torch.compile", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", shapes.STAGES)
def bench_self_calibrated_gate_training(measure, device, stage, dtype, implementation):
    """Forward and backward, the three gradients."""
    leaves = [map.requires_grad_() for map in shapes.self_calibrated(stage, device, dtype=DTYPES[dtype])]
    function, grad = function_of(implementation, stage, dtype), torch.randn_like(leaves[0])

    def gradients(function):
        return torch.autograd.grad(function(*leaves), leaves, grad)

    expected = gradients(cascadeops.self_calibrated_gate)

    def check(result):
        for ours, theirs in zip(expected, result, strict=True):
            assert_close(theirs, ours)

    measure(
        f"self_calibrated_gate forward + backward, {stage} {dtype}",
        implementation,
        lambda: gradients(function),
        check,
        bytes_moved=8 * grad.nbytes + 3 * leaves[2].nbytes,
    )
