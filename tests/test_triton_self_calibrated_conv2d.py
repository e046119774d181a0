"""The Triton kernel of self_calibrated_conv2d where there is no GPU: its values in Triton's interpreter, and its code.

Triton decides at import whether it interprets, hence the processes. The interpreter cannot multiply bfloat16 (it takes
its bits for integers), so bfloat16 is compiled here and run on GPUs only.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent

VALUES = """
import torch
from cascadeops.reference.self_calibrated_gate import self_calibrated_gate
from cascadeops.triton.self_calibrated_conv2d import CONFIGS, gated_conv2d

torch.manual_seed(0)
torch.backends.cudnn.allow_tf32 = False
smallest = CONFIGS[-1]
# Channels that fill no block, sizes that the pooling by 4 does not divide, and one where float32's rounding decides.
for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-3)):
    for layout in (torch.contiguous_format, torch.channels_last):
        for channels, size, cells, dilation, has_bias in (
            (20, (7, 9), (1, 2), 1, True), (33, (5, 8), (1, 1), 2, False), (16, (2, 74), (1, 6), 1, True),
        ):
            x = torch.randn(2, channels, *size).to(dtype).contiguous(memory_format=layout)
            weight = (torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5).to(dtype)
            weight = weight.contiguous(memory_format=layout)
            bias = torch.randn(channels).to(dtype) if has_bias else None
            k2 = torch.randn(2, channels, *cells).to(dtype).contiguous(memory_format=layout)
            out = gated_conv2d(x, weight, bias, k2, dilation, config=smallest)
            assert out.is_contiguous(memory_format=layout) and out.dtype == dtype
            doubles = [None if tensor is None else tensor.double() for tensor in (weight, bias)]
            k3 = torch.nn.functional.conv2d(x.double(), *doubles, 1, dilation, dilation)
            expected = self_calibrated_gate(x.double(), k3, k2.double())
            torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
x = torch.zeros(1, 8, 4, 4)
assert gated_conv2d(x[:0], torch.zeros(8, 8, 3, 3), None, x[:0]).shape == (0, 8, 4, 4)
for arguments in (
    (x.double(), torch.zeros(8, 8, 3, 3), None, x), (x, torch.zeros(8, 4, 3, 3), None, x),
    (x, torch.zeros(8, 8, 3, 3), torch.zeros(7), x), (x, torch.zeros(8, 8, 3, 3), None, x[:, :4]),
):
    try:
        gated_conv2d(*arguments)
    except ValueError as error:
        assert str(error).startswith("gated_conv2d: "), error
    else:
        raise AssertionError("no error")
print("equal")
"""

CODE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cascadeops.triton.self_calibrated_conv2d import CONFIGS, gated_conv2d_kernel as kernel

architecture = int(sys.argv[1])
tensors = ("x", "weight", "bias", "k2", "out")
cases = [("bf16", config) for config in CONFIGS] + [(dtype, CONFIGS[3]) for dtype in ("fp16", "fp32")]
for dtype, config in cases:
    # As the launcher sees channels-last maps of 64 channels: strides of 1, everything else a multiple of 16.
    constants = {"CHANNELS": 64, "DILATION": 1, "HAS_BIAS": True, "PRECISION": "tf32", **config.kwargs}
    constants |= dict.fromkeys(("x_channel", "weight_in", "k2_channel", "out_channel"), 1)
    signature, aligned = {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else f"*{dtype}" if name in tensors else "i32"
        if name in tensors or ("_" in name and name.split("_")[0] in tensors and name not in constants):
            aligned[(position,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    ptx = compiled.asm["ptx"]
    copies = ptx.count("cp.async.cg") + ptx.count("cp.async.ca")
    print(dtype, len(compiled.asm["cubin"]), compiled.metadata.shared, "mma" in ptx, copies, ptx.count("ld.global.v4"))
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_values_in_the_interpreter():
    assert run(VALUES, TRITON_INTERPRET="1") == "equal\n"


@pytest.mark.parametrize(("architecture", "most_shared"), [(80, 163 * 1024), (90, 227 * 1024)])
def test_compiles_to_tensor_cores_and_asynchronous_copies(architecture, most_shared, tmp_path):
    """Every configuration fits a block's shared memory and loads 16 bytes at a time."""
    lines = run(CODE, str(architecture), TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert {line.split()[0] for line in lines} == {"bf16", "fp16", "fp32"}
    for line in lines:
        _, size, shared, tensor_cores, copies, wide_loads = line.split()
        assert int(size) > 0 and tensor_cores == "True" and int(copies) > 0 and int(wide_loads) > 0, line
        assert int(shared) <= most_shared, line
