"""Means of losses between two lines of the log."""

from __future__ import annotations

import time
from collections.abc import Mapping

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


def compact_losses(means: Mapping[str, float]) -> str:
    """The parts of a loss in one line: "rpn 0.05/0.01  class 0.51/0.22/0.1  mask 0.43".

    What belongs together stands together: objectness and boxes of the proposals, the stages of a cascade.
    """
    groups: dict[str, list[str]] = {}
    for name, value in means.items():
        _, found, part = name.partition("loss_")
        if found:
            group = "rpn" if part.startswith("rpn_") else part.replace("_", " ")
            groups.setdefault(group, []).append(f"{value:.2g}")
    return "  ".join(f"{group} {'/'.join(values)}" for group, values in groups.items())
