"""The guards themselves: a read beyond a guarded tensor ends the process, and the operators' arguments get guards.

`pytest --guarded end` and `--guarded start` run every operator test that way.
"""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from guarded_memory import GuardedArguments, guarded, guarded_empty
from operator_cases import OPERATORS, arguments_of, call, identical, map_tensors


@pytest.mark.parametrize(("edge", "beyond"), [("end", 12), ("start", -1)])
def test_one_byte_beyond_is_a_fault(edge, beyond):
    code = (
        f"import ctypes, torch; from guarded_memory import guarded; tensor = guarded(torch.ones(3), {edge!r})\n"
        f"print(ctypes.string_at(tensor.data_ptr(), 12) == tensor.numpy().tobytes(), flush=True)\n"
        f"ctypes.string_at(tensor.data_ptr() + {beyond}, 1)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (-signal.SIGSEGV, "True\n")


def test_a_guarded_tensor_is_the_same_tensor_elsewhere():
    for tensor in (torch.rand(2, 3, 4, 5).permute(0, 2, 3, 1), torch.rand(4).expand(3, 4), torch.rand(9)[::3]):
        for edge in ("end", "start"):
            copy = guarded(tensor, edge)
            assert copy.data_ptr() != tensor.data_ptr() and copy.stride() == tensor.stride()
            assert torch.equal(copy, tensor)


def test_untouched_memory_is_free():
    assert guarded_empty(2**34, torch.float32)[2**33 :: 2**32].tolist() == [0.0, 0.0]  # of 64 GiB


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("edge", ["end", "start"])
def test_operators_get_guarded_arguments(operator, edge, monkeypatch):
    arguments, moved = arguments_of(operator), []
    monkeypatch.setattr("guarded_memory.guarded", lambda tensor, edge: moved.append(tensor) or guarded(tensor, edge))
    with GuardedArguments(edge):
        result = call(operator, map_tensors(torch.clone, arguments))
    assert moved
    assert identical(result, call(operator, arguments))
