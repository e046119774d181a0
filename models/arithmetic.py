"""How projects compute with boxes, where they differ from mmdetection 2 and 3, whose arithmetic is the default.

A detector's configuration names its arithmetic (`config.arithmetic`), so that weights go on being used as they were
trained. In older projects a box ends on its last pixel and is x2 - x1 + 1 wide. Here every box ends one pixel further,
at its edge: its width, its regression and its IoU are then those of all other boxes, and what remains different is
below. Nothing here imports torch: `--help` is built from configurations.
"""

from __future__ import annotations

from typing import NamedTuple


class Arithmetic(NamedTuple):
    """Defaults are mmdetection's, 2 and 3."""

    inclusive: bool = False
    """Boxes ended on their last pixel. They keep at least one pixel when clipped, and that pixel is not resized."""
    anchors: str = "exact"
    """exact; rounded: corners in whole pixels; centred: so, and around the middle of a cell, not its corner;
    centred_ratios: so, from sides that were rounded first."""
    limits_shrinking: bool = True
    """A box shrinks by at most 1000 / 16 in one regression; False: only its growth is limited."""
    roi_samples: int = 0
    """Samples of RoIAlign along each side of a bin; 0: one for each cell."""
    roi_aligned: bool = True
    """RoIAlign shifts by half a cell; False: not, and RoIs are at least one cell wide and high."""
    roi_last_pixel: bool = True
    """Inclusive boxes are pooled with their last pixel, and then have no least size; False: without it."""
    level_rule: str = "mmdet"
    """See `cascadeops.multiscale_roi_align`."""
    level_epsilon: float = 1e-6
    """What keeps inclusive boxes of an exact power of two on the coarser level."""
    least_sizes: tuple[float, float] = (0.0, 0.0)
    """Width and height in pixels below which a proposal and a detection are dropped."""
    mask_border: int | None = None
    """None: a mask is sampled at the centres of pixels. Else: it gets a border of so many zeros, and is resized to the
    whole pixels that its box truncates to."""


ARITHMETICS = {
    "mmdetection": Arithmetic(),
    "mmdetection_1": Arithmetic(
        inclusive=True, anchors="centred", roi_samples=2, roi_aligned=False, level_epsilon=1e-6, mask_border=0
    ),
    "maskrcnn_benchmark": Arithmetic(
        inclusive=True,
        anchors="centred_ratios",
        limits_shrinking=False,
        roi_samples=2,
        roi_aligned=False,
        roi_last_pixel=False,
        level_epsilon=4e-6,
        mask_border=1,
    ),
    "torchvision": Arithmetic(
        anchors="rounded",
        limits_shrinking=False,
        roi_samples=2,
        roi_aligned=False,
        level_rule="torchvision",
        least_sizes=(1e-3, 1e-2),
        mask_border=1,
    ),
}
"""mmdetection 2 and 3, and Paddle's HTC; mmdetection 1 (2019); maskrcnn-benchmark, which Res2Net's tables were made
with; torchvision."""
MMDETECTION = ARITHMETICS["mmdetection"]
