"""Which boxes are trained on, of those that `cascadeops.match_boxes` matched. Fixed shapes throughout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NEGATIVE, IGNORED = -1, -2
"""What `cascadeops.match_boxes` gives a box that has no ground truth."""


@dataclass(frozen=True)
class Samples:
    """Boxes chosen for a loss: positives first, then negatives, then padding."""

    index: Tensor
    """[N, S] rows of the boxes that were matched."""
    gt_index: Tensor
    """[N, S] ground truth of the positives, 0 elsewhere."""
    positive: Tensor
    """[N, S] bool."""
    valid: Tensor
    """[N, S] bool: positive or negative."""


_generators: list[torch.Generator] | None = None


@contextlib.contextmanager
def luck_of_images(seed: int, step: int, first: int, count: int, device: torch.device) -> Iterator[None]:
    """Inside, what `sample_matches` draws for an image is a function of the seed, the step and the image's place in it.

    So it does not matter which process trains on the image, or beside which others. Outside, the numbers are those of
    torch's global generator.

    Args:
        first: place in the step, over all processes, of the first image of a batch; count: its images.
    """
    global _generators
    seeds = [np.random.SeedSequence([seed, step, first + i]).generate_state(1, np.uint64)[0] for i in range(count)]
    _generators = [torch.Generator(device).manual_seed(int(seed) >> 1) for seed in seeds]
    try:
        yield
    finally:
        _generators = None


def _luck(like: Tensor) -> Tensor:
    """Numbers in [0, 1) for [N, P]."""
    if _generators is None:
        return torch.rand(like.shape, device=like.device)
    rows = zip(like, _generators, strict=True)
    return torch.stack([torch.rand(row.shape, generator=generator, device=row.device) for row, generator in rows])


def sample_matches(match: Tensor, num_samples: int, positive_fraction: float) -> Samples:
    """A random subset: at most `positive_fraction` positives, filled up with negatives.

    Args:
        match: [N, P] as `match_boxes` returns it.

    Returns:
        Samples with S = min(num_samples, P) rows an image.
    """
    num_samples = min(num_samples, match.shape[1])
    max_positive = min(int(num_samples * positive_fraction) or 1, match.shape[1])
    positive, negative = match >= 0, match == NEGATIVE
    luck = _luck(match)
    lucky_score, lucky = torch.where(positive, luck, -1.0).topk(max_positive, dim=1)
    chosen = torch.zeros_like(positive).scatter(1, lucky, lucky_score >= 0)
    # Halved, because 1 + luck may round to 2: a negative would then pass for a positive, once in some million draws.
    priority = torch.where(chosen, 2 + luck / 2, torch.where(negative, 1 + luck / 2, 0.0))
    priority, index = priority.topk(num_samples, dim=1)
    chosen = priority >= 2
    gt_index = torch.where(chosen, match.gather(1, index), 0)
    return Samples(index, gt_index, chosen, priority >= 1)
