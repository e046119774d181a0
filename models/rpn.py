"""Region proposal network (Ren et al. 2015, section 3), shared over the levels of a pyramid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cascadeops

from .anchors import grid_anchors
from .arithmetic import MMDETECTION, Arithmetic
from .boxes import LAST_PIXEL, constant, decode_boxes, encode_boxes, smaller_than
from .config import RPNConfig
from .data.transforms import DIVISOR
from .losses import box_loss, normaliser, objectness_loss
from .matching import sample_matches

STDS = (1.0, 1.0, 1.0, 1.0)


class RPN(nn.Module):
    def __init__(
        self, channels: int, strides: tuple[int, ...], config: RPNConfig, arithmetic: Arithmetic = MMDETECTION
    ):
        super().__init__()
        self.config, self.strides, self.arithmetic = config, strides, arithmetic
        num_ratios = len(config.anchor_ratios)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, num_ratios, 1)
        self.deltas = nn.Conv2d(channels, num_ratios * 4, 1)
        for conv in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per level: logits [N, A_l], deltas [N, A_l, 4] and anchors [A_l, 4], A_l = H_l * W_l * ratios."""
        logits, deltas = [], []
        for x in features:
            hidden = F.relu_(self.conv(x))
            logits.append(self.objectness(hidden).permute(0, 2, 3, 1).flatten(1).float())
            deltas.append(self.deltas(hidden).permute(0, 2, 3, 1).reshape(len(x), -1, 4).float())
        sizes = [tuple(x.shape[2:]) for x in features]
        config = self.config
        anchors = grid_anchors(
            sizes,
            self.strides,
            config.anchor_scale,
            config.anchor_ratios,
            features[0].device,
            self.arithmetic.anchors,
        )
        return logits, deltas, anchors

    @torch.no_grad()
    def proposals(
        self, logits: list[Tensor], deltas: list[Tensor], anchors: list[Tensor], image_sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Best boxes of the batch after NMS within each level.

        Returns:
            boxes [N, P, 4] clipped to the images, best first; scores [N, P] in [0, 1], -inf in padding rows; count [N].
        """
        top_k = self.config.top_k_training if self.training else self.config.top_k
        capacity = self.config.max_proposals_training if self.training else self.config.max_proposals
        if self.arithmetic != MMDETECTION:
            return composed_proposals(
                logits, deltas, anchors, image_sizes, top_k, capacity, self.config.nms_iou, self.arithmetic
            )
        return cascadeops.box_proposals(
            logits, deltas, anchors, image_sizes, top_k, capacity, self.config.nms_iou, STDS
        )

    def losses(
        self,
        logits: list[Tensor],
        deltas: list[Tensor],
        anchors: list[Tensor],
        image_sizes: Tensor,
        gt_boxes: Tensor,
        gt_valid: Tensor,
    ) -> dict[str, Tensor]:
        """Objectness and box loss, both / sampled anchors of the batch (Faster R-CNN, equation 1)."""
        config = self.config
        logits, deltas, anchors = torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(anchors)
        anchors = anchors.expand(len(logits), -1, -1)
        trained = trained_anchors(anchors, image_sizes, config.allowed_border, self.arithmetic)
        match = cascadeops.match_boxes(
            anchors, trained, gt_boxes, gt_valid, config.positive_iou, config.negative_iou, config.low_quality_iou
        )
        samples = sample_matches(match, config.num_samples, config.positive_fraction)
        row = samples.index[..., None].expand(-1, -1, 4)
        gt_row = samples.gt_index[..., None].expand(-1, -1, 4)
        targets = encode_boxes(anchors.gather(1, row), gt_boxes.gather(1, gt_row), STDS)
        num_samples = normaliser(samples.valid.sum())
        positive, valid = samples.positive.flatten(), samples.valid.flatten()
        chosen = deltas.gather(1, row).flatten(0, 1)
        return {
            "loss_rpn_objectness": objectness_loss(
                logits.gather(1, samples.index).flatten(), positive, valid, num_samples
            ),
            "loss_rpn_box": box_loss(chosen, targets.flatten(0, 1), positive, num_samples, config.smooth_l1_beta),
        }


def composed_proposals(
    logits: list[Tensor],
    deltas: list[Tensor],
    anchors: list[Tensor],
    image_sizes: Tensor,
    top_k: int,
    max_proposals: int,
    iou_threshold: float,
    arithmetic: Arithmetic,
) -> tuple[Tensor, Tensor, Tensor]:
    """`cascadeops.box_proposals` in another arithmetic than its own, step by step."""
    scores, boxes, levels = [], [], []
    for level, (level_logits, level_deltas, level_anchors) in enumerate(zip(logits, deltas, anchors, strict=True)):
        best, index = level_logits.topk(min(top_k, level_logits.shape[1]), dim=1)
        chosen = level_deltas.gather(1, index[..., None].expand(-1, -1, 4))
        boxes.append(decode_boxes(level_anchors[index], chosen, STDS, image_sizes, arithmetic))
        scores.append(best)
        levels.append(torch.full_like(index, level))
    boxes, scores = torch.cat(boxes, 1), torch.cat(scores, 1)
    scores = scores.masked_fill(smaller_than(boxes, arithmetic.least_sizes[0]), -torch.inf)
    capacity = min(max_proposals, scores.shape[1])
    index, count = cascadeops.padded_nms(boxes, scores, torch.cat(levels, 1), iou_threshold, capacity)
    kept, index = index >= 0, index.clamp(min=0)
    boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4)) * kept[..., None]
    return boxes, scores.gather(1, index).sigmoid().masked_fill(~kept, -torch.inf), count


def trained_anchors(
    anchors: Tensor, image_sizes: Tensor, allowed_border: int, arithmetic: Arithmetic = MMDETECTION
) -> Tensor:
    """Validity [N, A] of anchors [N, A, 4] in the loss: centred in the image or in its own padding to a multiple of 32,
    and, unless allowed_border is -1, leaving the image by at most so many pixels (Faster R-CNN, section 3.3)."""
    image = image_sizes.flip(-1)[:, None]
    padded = (image + DIVISOR - 1) // DIVISOR * DIVISOR
    centre = (anchors[..., :2] + anchors[..., 2:]) / 2
    # Centres are whole pixels but for rounding, which half a pixel keeps out of the comparison.
    trained = centre < padded - 0.5
    if allowed_border >= 0:
        anchors = anchors - constant(LAST_PIXEL, anchors) if arithmetic.inclusive else anchors
        trained = trained & (anchors[..., :2] >= -allowed_border) & (anchors[..., 2:] < image + allowed_border)
    return trained.all(dim=-1)
