"""Runs operators on CPU tensors with their CUDA kernels, which scripts/emulate_cuda.py has compiled for the CPU."""

import ctypes
import os
import warnings
from pathlib import Path

import torch

from cascadeops import _binary

FOLDER = Path(__file__).parent.parent / "build" / "emulation"


def is_built() -> bool:
    return library().exists()


def library() -> Path:
    """The sanitized build when AddressSanitizer is in the process, which it must be from its start."""
    return FOLDER / ("sanitized" if "libasan" in os.environ.get("LD_PRELOAD", "") else "plain") / "cuda.so"


def launches() -> int:
    """How many kernels have been launched."""
    return torch.ops.cascadeops_emulation.launches()


def seed(value: int) -> None:
    """Starts the random order of blocks and threads anew."""
    torch.ops.cascadeops_emulation.seed(value)


def raise_device_faults() -> None:
    """`cascadeops.raise_device_faults` of the emulated device. Does nothing before there was one."""
    if not EmulatedCuda.loaded:
        return
    take = ctypes.CDLL(str(library())).cascadeops_take_device_fault
    take.argtypes, take.restype = [ctypes.c_int], ctypes.c_char_p
    if fault := take(0).decode():
        raise RuntimeError(fault)


class EmulatedCuda:
    """Inside, an operator on CPU tensors is that of csrc/cuda: of every operator that has one."""

    loaded = False

    def __enter__(self) -> "EmulatedCuda":
        if not is_built():
            raise FileNotFoundError(f"{library()} is not there: python scripts/emulate_cuda.py")
        torch.ops.load_library(str(library()))
        EmulatedCuda.loaded = True
        self.operators = [
            name
            for name in _binary.operator_names()
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"cascadeops::{name}", "CUDA")
        ]
        self.library = torch.library.Library("cascadeops", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")  # of overriding, on purpose
            for name in self.operators:
                self.library.impl(name, _call_cuda(name), "CPU", with_keyset=True)
        return self

    def __exit__(self, *exception) -> None:
        self.library._destroy()


def _call_cuda(name: str):
    kernel = torch.library.get_kernel(f"cascadeops::{name}", "CUDA")

    def call(keys, *arguments):
        if name == "deform_conv2d_backward_data" and arguments[1].dtype == torch.float64:
            arguments = (*arguments[:-1], False)  # of a fixed order, which its caller does not ask for on CUDA
        return kernel.call_boxed(keys, *arguments)

    return call
