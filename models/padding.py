"""Fixed capacities and counts (no tensor between image and result has a size that depends on data)."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_below(count: Tensor, capacity: int) -> Tensor:
    """Validity [N, capacity] of rows that are filled from the front up to count [N]."""
    return torch.arange(capacity, device=count.device) < count[:, None]


def used_capacity(count: Tensor, capacity: int) -> int:
    """Rows worth computing: the one place where a count is read on the host.

    A count costs nothing to read from CPU memory, and a head on padding rows is waste, so eager CPU code drops the rows
    that no image of the batch fills. Elsewhere (CUDA: a read would stall the stream; compile and export: no shape may
    depend on data) the capacity is used whole. The results are the same.
    """
    if count.device.type != "cpu" or torch.compiler.is_compiling():
        return capacity
    return min(capacity, int(count.max()))
