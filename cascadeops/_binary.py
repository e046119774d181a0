"""Loads the compiled kernels next to this file."""

from pathlib import Path

import torch


def load() -> None:
    torch.ops.load_library(str(Path(__file__).with_name("_C.abi3.so")))
