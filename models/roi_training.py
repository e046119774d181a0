"""Training of RoI heads: which RoIs are trained on, box losses, refinement between stages, mask losses.

Fixed shapes throughout; rows that do not count have weight 0. `config` is a detector's configuration, of which
`num_classes`, `num_samples`, `positive_fraction`, `match_low_quality`, `smooth_l1_beta` and `arithmetic` are read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import cascadeops

from .arithmetic import ARITHMETICS
from .boxes import boxes_to_rois, decode_boxes, encode_boxes
from .losses import box_loss, class_loss, mask_loss, normaliser
from .matching import IGNORED, sample_matches
from .padding import used_capacity


class RoISamples(NamedTuple):
    """RoIs chosen for a loss: of each image the positives first, then negatives, then padding."""

    boxes: Tensor
    """[N, S, 4]"""
    labels: Tensor
    """[N, S]; background = num_classes."""
    gt_index: Tensor
    """[N, S] ground truth of the positives, 0 elsewhere."""
    positive: Tensor
    """[N, S] bool."""
    valid: Tensor
    """[N, S] bool: positive or negative."""
    proposed: Tensor
    """[N, S] bool: was a proposal, rather than a ground truth that the sampling added to them."""

    @property
    def rois(self) -> Tensor:
        """[N * S, 5] (batch index, x1, y1, x2, y2)"""
        return boxes_to_rois(self.boxes, self.valid)


@torch.no_grad()
def sample_rois(boxes: Tensor, valid: Tensor, gt_boxes: Tensor, gt_labels: Tensor, iou: float, config) -> RoISamples:
    """Matches boxes [N, P, 4] from this IoU on, adds the ground truth to them (Fast R-CNN, section 2.3), samples."""
    num_gt, gt_valid = gt_boxes.shape[1], gt_labels >= 0
    low_quality_iou = iou if config.match_low_quality else None
    match = cascadeops.match_boxes(boxes, valid, gt_boxes, gt_valid, iou, iou, low_quality_iou)
    itself = torch.where(gt_valid, torch.arange(num_gt, device=boxes.device), IGNORED)
    match, boxes = torch.cat([itself, match], dim=1), torch.cat([gt_boxes, boxes], dim=1)
    samples = sample_matches(match, config.num_samples, config.positive_fraction)
    boxes = boxes.gather(1, samples.index[..., None].expand(-1, -1, 4))
    labels = torch.where(samples.positive, gt_labels.gather(1, samples.gt_index), config.num_classes)
    return RoISamples(
        boxes, labels, samples.gt_index, samples.positive, samples.valid, samples.valid & (samples.index >= num_gt)
    )


def box_head_losses(
    class_logits: Tensor, deltas: Tensor, samples: RoISamples, gt_boxes: Tensor, stds: tuple[float, ...], config
) -> tuple[Tensor, Tensor]:
    """Class and box loss of one box head, both / sampled RoIs of the batch.

    Args:
        class_logits: [N * S, K + 1]; deltas: [N * S, 4], or [N * S, K * 4] with one box a class.
    """
    matched = gt_boxes.gather(1, samples.gt_index[..., None].expand(-1, -1, 4))
    targets = encode_boxes(samples.boxes, matched, stds).flatten(0, 1)
    num_samples, labels = normaliser(samples.valid.sum()), samples.labels.flatten()
    deltas = own_class_deltas(deltas, labels)
    return (
        class_loss(class_logits, labels, samples.valid.flatten(), num_samples),
        box_loss(deltas, targets, samples.positive.flatten(), num_samples, config.smooth_l1_beta),
    )


def own_class_deltas(deltas: Tensor, labels: Tensor) -> Tensor:
    """Of deltas [R, K * 4] those of the labels [R]: [R, 4]; the background gets any. Deltas [R, 4] are all classes'."""
    deltas = deltas.view(len(deltas), -1, 4)
    row = labels.clamp(max=deltas.shape[1] - 1)[:, None, None].expand(-1, 1, 4)
    return deltas.gather(1, row).squeeze(1)


@torch.no_grad()
def refine(
    samples: RoISamples, deltas: Tensor, stds: tuple[float, ...], image_sizes: Tensor, config
) -> tuple[Tensor, Tensor]:
    """The sampled proposals, regressed by deltas [N * S, 4] of their stage: boxes [N, S, 4] and validity [N, S].

    Ground truth added by the sampling is left out: the next sampling adds it anew.
    """
    deltas, arithmetic = deltas.view_as(samples.boxes), ARITHMETICS[config.arithmetic]
    return decode_boxes(samples.boxes, deltas, stds, image_sizes, arithmetic), samples.proposed


def positives_in_front(samples: RoISamples, config) -> RoISamples:
    """The front of each image's samples, where its positives are, for the mask branch: S = the most there may be."""
    most = max(1, int(config.num_samples * config.positive_fraction))
    capacity = used_capacity(samples.positive.sum(dim=1), min(samples.positive.shape[1], most))
    front = RoISamples(*(rows[:, :capacity] for rows in samples))
    return front._replace(valid=front.positive)


def mask_head_loss(mask_logits: Tensor, positives: RoISamples, gt_masks) -> Tensor:
    """Loss of mask logits [N * S, M, M] of own classes against the `PackedMasks` of the batch, cut out by the RoIs."""
    num_images, num_gt = gt_masks.offsets.shape
    first = torch.arange(num_images, device=mask_logits.device)[:, None] * num_gt
    targets = cascadeops.mask_targets(
        gt_masks.bitmaps,
        gt_masks.offsets.flatten(),
        gt_masks.windows.flatten(0, 1),
        positives.boxes.flatten(0, 1),
        torch.where(positives.positive, positives.gt_index + first, -1).flatten(),
        mask_logits.shape[-1],
    )
    return mask_loss(mask_logits, targets, positives.positive.flatten())
