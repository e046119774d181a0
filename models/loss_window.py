"""Means of losses between two lines of the log."""

from __future__ import annotations

import time

import torch
from torch import Tensor

import cascadeops


class LossWindow:
    """Means since they were last asked for; sums stay on the device until then. `sums` and `steps` are in checkpoints:
    a run that goes on inside a window writes the line that it would have written.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = self._images = 0
        self._start = time.monotonic()

    def add(self, values: dict[str, Tensor], images: int) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()
        self.steps += 1
        self._images += images

    def leave_out(self, seconds: float) -> None:
        """Time that was spent on something else."""
        self._start += seconds

    def means(self) -> dict[str, float]:
        names = list(self.sums)
        sums = torch.stack([self.sums[name].float() for name in names])
        cascadeops.raise_device_faults(sums.device)
        values = {name: total / self.steps for name, total in zip(names, sums.tolist(), strict=True)}
        values["images_per_second"] = self._images / (time.monotonic() - self._start)
        self.clear()
        return values
