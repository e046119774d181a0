"""Test-time augmentation of HTC and SCNet: an image is looked at in several sizes, plain and mirrored, and the views
give one answer. Source: mmdetection 2.x (`aug_test` of its heads), which made the TTA columns of SCNet's table.

    1. every view: backbone, FPN, RPN -> proposals, mapped to the image; all together through one NMS
    2. every view: those proposals through the box stages -> boxes, mapped to the image, and scores; means over views
    3. score threshold and NMS within each class -> detections
    4. every view: masks of those detections, un-mirrored; means over views

Differs from mmdetection in what is computed when: the two views of one size are one batch, and a view goes through the
backbone once instead of three times, for the features of all views are kept (docs/tta.md: memory).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cascadeops

from .data.transforms import padded_size, resized_size
from .detections import Detections
from .errors import UsageError
from .padding import rows_below, used_capacity

ARCHITECTURES = ("htc", "scnet")


@dataclass(frozen=True)
class Views:
    """The views of an image."""

    scales: tuple[tuple[int, int], ...] = ((600, 900), (800, 1200), (1000, 1500), (1200, 1800), (1400, 2100))
    """(short, long) each: the largest size within these limits in pixels, aspect ratio kept (SCNet's published
    numbers)."""
    flip: bool = True
    """Each size also as its mirror image, left to right."""

    def __post_init__(self):
        if not self.scales or not all(len(scale) == 2 and 1 <= scale[0] <= scale[1] for scale in self.scales):
            raise UsageError(
                "test-time augmentation needs scales SHORT LONG with 1 <= SHORT <= LONG",
                why=f"got {self.scales}",
                fix="models.Views(scales=((600, 900), (800, 1200)))   or   --tta-scales 600 900 800 1200",
            )

    def __len__(self) -> int:
        return len(self.scales) * (1 + self.flip)

    def __str__(self) -> str:
        sizes = ", ".join(f"{short} x {long}" for short, long in self.scales)
        each = ", each plain and mirrored" if self.flip else ""
        return f"{len(self)} views of an image: {sizes} (short x long side at most){each}"


def chosen_views(
    tta: bool, scales: tuple[tuple[int, int], ...], flip: bool, resize: tuple[int, int] | None
) -> Views | None:
    """The views that a program's options ask for: --tta, --tta-scales, --tta-flip. UsageError where they disagree."""
    if not tta:
        if scales or not flip:
            raise UsageError("--tta-scales and --no-tta-flip are for --tta", fix="add --tta, or leave them out")
        return None
    if resize is not None:
        raise UsageError("--resize and --tta both set the size", fix="leave --resize out; --tta-scales SHORT LONG ...")
    return Views(scales or Views.scales, flip)


class SameSizeViews(NamedTuple):
    """The views of one size: V = 1, the plain one, or V = 2, that and its mirror image."""

    context: NamedTuple
    """What the detector's RoI heads share, of V images."""
    proposals: Tensor
    """[V, P, 4], pixels of the view."""
    scores: Tensor
    """[V, P]; -inf in padding rows."""
    size: tuple[int, int]
    """(height, width) in pixels, without padding."""
    image_size: tuple[int, int]
    """(height, width) of the image itself."""

    @property
    def sizes(self) -> Tensor:
        """[V, 2]"""
        return torch.tensor([self.size], device=self.proposals.device).expand(len(self.proposals), -1)

    def from_image(self, boxes: Tensor) -> Tensor:
        """Boxes [1, P, 4] in pixels of the image -> [V, P, 4] in pixels of each view."""
        return self._turned((boxes * self._factors).expand(len(self.proposals), -1, -1))

    def to_image(self, boxes: Tensor) -> Tensor:
        """The way back: [V, P, 4] -> [V, P, 4]."""
        return self._turned(boxes) / self._factors

    def _turned(self, boxes: Tensor) -> Tensor:
        """[V, P, 4], those of the second view mirrored; its own inverse."""
        return torch.cat([boxes[:1], mirror_boxes(boxes[1:], self.size[1])])

    @property
    def _factors(self) -> Tensor:
        """[4] (x, y, x, y): pixels of the view in one of the image. Rounding to whole sizes makes x and y differ."""
        (height, width), (image_height, image_width) = self.size, self.image_size
        return self.proposals.new_tensor((width / image_width, height / image_height)).repeat(2)


def mirror_boxes(boxes: Tensor, width: int) -> Tensor:
    """Boxes [..., 4] in the mirror image of an image of this width; its own inverse."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([width - x2, y1, width - x1, y2], dim=-1)


def detect_in_views(detector: nn.Module, images: Tensor, image_sizes: Tensor, views: Views) -> Detections:
    """`detector(images, image_sizes)` with test-time augmentation.

    One image after the other, so that what is found in one does not depend on its batch.

    Args:
        detector: an HTC or an SCNet in eval mode.
        images: [N, 3, H, W] normalised, at the size that the views are resized from; padding is cut off.
        image_sizes: [N, 2] int64 (height, width) before padding; read on the host, for it decides the views' sizes.

    Returns:
        Boxes in pixels of `images`; masks are means over the views, and an HTC's over its stages, too.

    Raises:
        UsageError: another detector.
    """
    check_detector(detector)
    found = [
        detect_in_views_of_image(detector, image[None, :, :height, :width], views)
        for image, (height, width) in zip(images, image_sizes.tolist(), strict=True)
    ]
    return Detections(*map(torch.cat, zip(*found, strict=True)))


def check_detector(detector: nn.Module) -> None:
    if detector.arch not in ARCHITECTURES:
        raise UsageError(
            f"test-time augmentation is not made for {detector.arch}",
            why=f"the detectors that have it are {' and '.join(ARCHITECTURES)}",
            fix="leave --tta (in Python tta=) out",
        )


def detect_in_views_of_image(detector: nn.Module, image: Tensor, views: Views) -> Detections:
    """`detect_in_views` of one image [1, 3, H, W] without padding. Nothing is read on the host."""
    config = detector.config
    groups = [look(detector, image, scale, views.flip) for scale in views.scales]
    boxes, count = merged_proposals(groups, config.rpn)
    boxes, scores = mean_boxes(detector, groups, boxes, count)
    boxes, scores, labels, _, count = cascadeops.multiclass_nms(
        boxes, scores, config.score_threshold, config.nms_iou, config.max_detections
    )
    return Detections(boxes, scores, labels, mean_masks(detector, groups, boxes, labels, count), count)


def look(detector: nn.Module, image: Tensor, scale: tuple[int, int], flip: bool) -> SameSizeViews:
    """The views of an image [1, 3, H, W] within one scale (short, long), as far as their proposals."""
    image_size = tuple(image.shape[2:])
    height, width = resized_size(*image_size, *scale)
    view = F.interpolate(image, size=(height, width), mode="bilinear", align_corners=False)
    pixels = torch.cat([view, view.flip(-1)]) if flip else view
    padded_height, padded_width = padded_size(height, width)
    pixels = F.pad(pixels, (0, padded_width - width, 0, padded_height - height))
    sizes = torch.tensor([(height, width)], device=image.device).expand(len(pixels), -1)

    features = detector.fpn(detector.backbone(pixels.contiguous(memory_format=torch.channels_last)))
    proposals, scores, _ = detector.rpn.proposals(*detector.rpn(features), sizes)
    *_, context = detector.context(features)
    return SameSizeViews(context, proposals, scores, (height, width), image_size)


def merged_proposals(groups: list[SameSizeViews], config) -> tuple[Tensor, Tensor]:
    """The best proposals of all views, in pixels of the image.

    The NMS is a plain one, which levels of the pyramid share. One view alone has nothing to merge, and keeps its
    proposals as they are (as in mmdetection 2.x: of one view, `BaseDetector.forward_test` calls `simple_test`).

    Returns:
        boxes [1, P, 4], best first; count [1].
    """
    boxes = torch.cat([group.to_image(group.proposals).flatten(0, 1) for group in groups])[None]
    scores = torch.cat([group.scores.flatten() for group in groups])[None]
    if sum(len(group.proposals) for group in groups) == 1:
        return boxes, (scores > -torch.inf).sum(dim=1)
    index, count = cascadeops.padded_nms(boxes, scores, None, config.nms_iou, config.max_proposals)
    return boxes.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, 4)), count


def mean_boxes(detector: nn.Module, groups: list[SameSizeViews], boxes: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """What the box stages of every view make of the same proposals, row by row the mean.

    Args:
        boxes: [1, P, 4], pixels of the image; count: [1].

    Returns:
        boxes [1, P, 4] in pixels of the image; probabilities of the foreground classes [1, P, K], 0 in padding rows.
    """
    capacity = used_capacity(count, boxes.shape[1])
    boxes, valid = boxes[:, :capacity], rows_below(count, capacity)
    refined, probs = [], []
    for group in groups:
        start = group.from_image(boxes)
        end, class_logits = detector.box_stages(group.context, start, valid.expand(len(start), -1), group.sizes)
        refined.append(group.to_image(end))
        probs.append(class_logits.softmax(dim=-1)[:, :-1].unflatten(0, end.shape[:2]))
    return _mean(refined), _mean(probs) * valid[..., None]


def mean_masks(
    detector: nn.Module, groups: list[SameSizeViews], boxes: Tensor, labels: Tensor, count: Tensor
) -> Tensor:
    """Mask probabilities [1, D, 28, 28] of detections (boxes [1, D, 4] in pixels of the image), the mean over views."""
    masks = []
    for group in groups:
        seen = group.from_image(boxes)
        probs = detector.detection_masks(group.context, seen, labels.expand(len(seen), -1), count.expand(len(seen)))
        masks.append(torch.cat([probs[:1], probs[1:].flip(-1)]))
    return _mean(masks)


def _mean(groups: list[Tensor]) -> Tensor:
    """Mean over all views: a list of [V, ...] -> [1, ...]"""
    return torch.cat(groups).mean(dim=0, keepdim=True)
