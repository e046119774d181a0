"""Hybrid Task Cascade ("Hybrid Task Cascade for Instance Segmentation", Chen et al., CVPR 2019,
https://arxiv.org/abs/1901.07518, figure 2d).

    images -> backbone -> FPN -> P2..P6 -+-> RPN -----------> proposals
                                         +-> semantic head -> S  (stride 8)

    three times:  RoI features + S -> box head ------------------------> classes, refined boxes
                  RoI features + S at the refined boxes -> mask head --> masks, and a feature for the next mask head

Boxes and masks take turns in each stage, mask features flow from stage to stage, and S is context for both. At test
time the three mask heads run in a row on the final boxes. Every tensor has a fixed capacity and a count; nothing is
read on the host. Differs from mmdetection 3.x in two defaults, which are those of the published numbers: masks are the
mean over the stages, and the semantic loss is a mean over labelled pixels (`config.py`).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from .arithmetic import ARITHMETICS
from .backbones import build_backbone
from .boxes import boxes_to_rois, decode_boxes
from .config import HTCConfig
from .detections import Detections, best_detections, mask_probabilities
from .fpn import FPN
from .heads import BOX_SIZE, MASK_SIZE, BoxHead, MaskHead, SemanticHead, conv_stack
from .losses import semantic_loss
from .padding import rows_below, used_capacity
from .pooling import pool_rois
from .roi_training import RoISamples, box_head_losses, mask_head_loss, positives_in_front, refine, sample_rois
from .rpn import RPN


class Context(NamedTuple):
    """What every RoI of an image shares."""

    features: list[Tensor]
    """P2..P5."""
    semantic: Tensor | None
    """S: [N, C, H/8, W/8]"""


class HTC(nn.Module):
    arch = "htc"

    def __init__(self, config: HTCConfig):
        super().__init__()
        self.config = config
        channels, num_classes, num_stages = config.channels, config.num_classes, len(config.stage_iou)
        self.backbone = build_backbone(config.backbone)
        self.fpn = FPN(self.backbone.out_channels, channels)
        self.rpn = RPN(channels, FPN.strides, config.rpn, ARITHMETICS[config.arithmetic])
        self.box_heads = nn.ModuleList(
            BoxHead(channels, BOX_SIZE, config.box_channels, num_classes) for _ in range(num_stages)
        )
        self.mask_heads = nn.ModuleList(
            MaskHead(channels, config.mask_convs, num_classes, takes_previous=config.mask_info_flow and stage > 0)
            for stage in range(num_stages)
        )
        self.semantic_head = None
        if config.semantic:
            trunk = conv_stack(channels, config.semantic_convs)
            self.semantic_head = SemanticHead(channels, len(FPN.strides), trunk, config.num_semantic_classes)

    def forward(self, images: Tensor, image_sizes: Tensor) -> Detections:
        """Detects objects.

        Args:
            images: [N, 3, H, W] normalised, padded to multiples of 32.
            image_sizes: [N, 2] int64 (height, width) before padding, on the images' device.
        """
        features = self.fpn(self.backbone(images))
        boxes, _, count = self.rpn.proposals(*self.rpn(features), image_sizes)
        _, context = self.context(features)
        capacity = used_capacity(count, boxes.shape[1])
        boxes, valid = boxes[:, :capacity], rows_below(count, capacity)
        boxes, class_logits = self.box_stages(context, boxes, valid, image_sizes)
        boxes, scores, labels, count = best_detections(boxes, class_logits, valid, self.config)
        return Detections(boxes, scores, labels, self.detection_masks(context, boxes, labels, count), count)

    def box_stages(self, context: Context, boxes: Tensor, valid: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes [N, P, 4], valid [N, P], through all stages: refined boxes [N, P, 4], and the mean of the stages' class
        logits [N * P, K + 1], background last."""
        class_logits, arithmetic = 0.0, ARITHMETICS[self.config.arithmetic]
        for head, stds in zip(self.box_heads, self.config.stage_stds, strict=True):
            logits, deltas, _ = head(self.box_features(context, boxes_to_rois(boxes, valid)))
            class_logits = class_logits + logits
            boxes = decode_boxes(boxes, deltas.view_as(boxes), stds, image_sizes, arithmetic)
        return boxes, class_logits / len(self.box_heads)

    def context(self, features: list[Tensor]) -> tuple[Tensor | None, Context]:
        """Semantic logits (None without that branch), and what the RoI heads share."""
        logits = semantic = None
        if self.semantic_head is not None:
            logits, semantic = self.semantic_head(features)
        return logits, Context(features[:-1], semantic)

    def box_features(self, context: Context, rois: Tensor) -> Tensor:
        """RoI features + S for rois [R, 5]: [R, C, 7, 7]"""
        # S is pooled as for the mask head, and the mean of 2 x 2 bins taken.
        semantic = context.semantic if "box" in self.config.semantic_fusion else None
        return pool_rois(context.features, rois, BOX_SIZE, self.config, semantic, MASK_SIZE // BOX_SIZE)

    def mask_features(self, context: Context, rois: Tensor) -> Tensor:
        """RoI features + S for rois [R, 5]: [R, C, 14, 14]"""
        semantic = context.semantic if "mask" in self.config.semantic_fusion else None
        return pool_rois(context.features, rois, MASK_SIZE, self.config, semantic)

    def detection_masks(self, context: Context, boxes: Tensor, labels: Tensor, count: Tensor) -> Tensor:
        """Own-class mask probabilities of the final boxes: [N, D, 28, 28]"""
        capacity = used_capacity(count, labels.shape[1])
        valid = rows_below(count, capacity)
        roi_features = self.mask_features(context, boxes_to_rois(boxes[:, :capacity], valid))
        logits, flow = [], None
        for head in self.mask_heads:
            hidden = head.features(roi_features, flow)
            logits.append(head.mask_logits(hidden, labels[:, :capacity].flatten()))
            flow = hidden if self.config.mask_info_flow else None
        if self.config.mask_average == "last":
            logits = logits[-1:]
        return mask_probabilities(logits, valid, labels.shape[1])

    def losses(
        self,
        images: Tensor,
        image_sizes: Tensor,
        gt_boxes: Tensor,
        gt_labels: Tensor,
        gt_masks,
        semantic: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Every loss of the detector, weighted; their sum is what is minimised.

        Args:
            images, image_sizes: as in `forward`.
            gt_boxes: [N, G, 4], G >= 1; gt_labels: [N, G], -1 in padding rows.
            gt_masks: `PackedMasks` of those objects.
            semantic: [N, H/8, W/8] uint8, 255 = ignored; needed if the detector has the semantic branch.
        """
        config = self.config
        features = self.fpn(self.backbone(images))
        rpn_outputs = self.rpn(features)
        losses = self.rpn.losses(*rpn_outputs, image_sizes, gt_boxes, gt_labels >= 0)
        boxes, _, count = self.rpn.proposals(*rpn_outputs, image_sizes)
        semantic_logits, context = self.context(features)
        if semantic_logits is not None:
            loss = semantic_loss(semantic_logits, semantic, config.semantic_loss_mean)
            losses["loss_semantic"] = config.semantic_loss_weight * loss

        valid = rows_below(count, boxes.shape[1])
        for stage, head in enumerate(self.box_heads):
            iou, weight, stds = config.stage_iou[stage], config.stage_weights[stage], config.stage_stds[stage]
            samples = sample_rois(boxes, valid, gt_boxes, gt_labels, iou, config)
            logits, deltas, _ = head(self.box_features(context, samples.rois))
            loss_class, loss_box = box_head_losses(logits, deltas, samples, gt_boxes, stds, config)
            losses[f"stage{stage}.loss_class"] = weight * loss_class
            losses[f"stage{stage}.loss_box"] = weight * loss_box
            boxes, valid = refine(samples, deltas, stds, image_sizes, config)
            if config.interleaved:
                samples = sample_rois(boxes, valid, gt_boxes, gt_labels, iou, config)
            losses[f"stage{stage}.loss_mask"] = weight * self.mask_loss(stage, context, samples, gt_masks)
        return losses

    def mask_loss(self, stage: int, context: Context, samples: RoISamples, gt_masks) -> Tensor:
        """Loss of a stage's mask head on the positives among the samples."""
        positives = positives_in_front(samples, self.config)
        roi_features = self.mask_features(context, positives.rois)
        flow = None
        # The earlier heads' features are computed anew, for these RoIs; gradients reach those heads, too.
        for head in self.mask_heads[:stage] if self.config.mask_info_flow else ():
            flow = head.features(roi_features, flow)
        mask_logits = self.mask_heads[stage](roi_features, positives.labels.flatten(), flow)
        return mask_head_loss(mask_logits, positives, gt_masks)
