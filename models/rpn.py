"""Region proposal network (Ren et al. 2015, section 3), shared over the levels of a pyramid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cascadeops

from .anchors import grid_anchors
from .boxes import encode_boxes
from .config import RPNConfig
from .data.transforms import DIVISOR
from .losses import box_loss, objectness_loss
from .matching import sample_matches

STDS = (1.0, 1.0, 1.0, 1.0)


class RPN(nn.Module):
    def __init__(self, channels: int, strides: tuple[int, ...], config: RPNConfig):
        super().__init__()
        self.config, self.strides = config, strides
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
        anchors = grid_anchors(sizes, self.strides, config.anchor_scale, config.anchor_ratios, features[0].device)
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
        trained = trained_anchors(anchors, image_sizes, config.allowed_border)
        match = cascadeops.match_boxes(
            anchors, trained, gt_boxes, gt_valid, config.positive_iou, config.negative_iou, config.low_quality_iou
        )
        samples = sample_matches(match, config.num_samples, config.positive_fraction)
        row = samples.index[..., None].expand(-1, -1, 4)
        gt_row = samples.gt_index[..., None].expand(-1, -1, 4)
        targets = encode_boxes(anchors.gather(1, row), gt_boxes.gather(1, gt_row), STDS)
        num_samples = samples.valid.sum().clamp(min=1)
        positive, valid = samples.positive.flatten(), samples.valid.flatten()
        chosen = deltas.gather(1, row).flatten(0, 1)
        return {
            "loss_rpn_objectness": objectness_loss(
                logits.gather(1, samples.index).flatten(), positive, valid, num_samples
            ),
            "loss_rpn_box": box_loss(chosen, targets.flatten(0, 1), positive, num_samples, config.smooth_l1_beta),
        }


def trained_anchors(anchors: Tensor, image_sizes: Tensor, allowed_border: int) -> Tensor:
    """Validity [N, A] of anchors [N, A, 4] in the loss: centred in the image or in its own padding to a multiple of 32,
    and, unless allowed_border is -1, leaving the image by at most so many pixels (Faster R-CNN, section 3.3)."""
    image = image_sizes.flip(-1)[:, None]
    padded = (image + DIVISOR - 1) // DIVISOR * DIVISOR
    centre = (anchors[..., :2] + anchors[..., 2:]) / 2
    # Centres are whole pixels but for rounding, which half a pixel keeps out of the comparison.
    trained = centre < padded - 0.5
    if allowed_border >= 0:
        trained = trained & (anchors[..., :2] >= -allowed_border) & (anchors[..., 2:] < image + allowed_border)
    return trained.all(dim=-1)
