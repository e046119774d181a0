"""SCNet, the sample-consistency detector ("SCNet: Training Inference Sample Consistency for Instance Segmentation",
Vu, Kang, Yoo, AAAI 2021, https://arxiv.org/abs/2012.10150, figure 2). Not the self-calibrated backbone of that name.

    images -> backbone -> FPN -> P2..P6 -+-> RPN ------------------> proposals
                                         +-> semantic head --------> S  (stride 8)
                                         +-> global context head --> G  (one vector an image)

    three times:  RoI features + S + G -> box head -> classes, refined boxes
    once:         RoI features + S + G + relay(feature of the last box head) -> mask head

At test time the mask head sees the boxes of the last stage, so it is trained on that stage's positives alone: the
samples of training and inference are consistent. Every tensor has a fixed capacity and a count; nothing is read on the
host. Differs from mmdetection 3.x in one default: the semantic loss is a mean over labelled pixels (`config.py`).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from .arithmetic import ARITHMETICS
from .backbones import build_backbone
from .boxes import boxes_to_rois, decode_boxes
from .config import SCNetConfig
from .detections import Detections, best_detections, mask_probabilities
from .fpn import FPN
from .heads import (
    BOX_SIZE,
    MASK_SIZE,
    BoxHead,
    FeatureRelay,
    GlobalContextHead,
    ResidualMaskHead,
    SemanticHead,
    residual_blocks,
)
from .losses import image_label_loss, semantic_loss
from .padding import rows_below, used_capacity
from .pooling import pool_rois
from .roi_training import box_head_losses, mask_head_loss, positives_in_front, refine, sample_rois
from .rpn import RPN


class Context(NamedTuple):
    """What every RoI of an image shares."""

    features: list[Tensor]
    """P2..P5."""
    semantic: Tensor | None
    """S: [N, C, H/8, W/8]"""
    image: Tensor | None
    """G: [N, C, 1, 1]"""


class SCNet(nn.Module):
    arch = "scnet"

    def __init__(self, config: SCNetConfig):
        super().__init__()
        self.config = config
        channels, num_classes = config.channels, config.num_classes
        self.backbone = build_backbone(config.backbone)
        self.fpn = FPN(self.backbone.out_channels, channels)
        self.rpn = RPN(channels, FPN.strides, config.rpn, ARITHMETICS[config.arithmetic])
        self.box_heads = nn.ModuleList(
            BoxHead(channels, BOX_SIZE, config.box_channels, num_classes) for _ in config.stage_iou
        )
        self.mask_head = ResidualMaskHead(channels, config.mask_blocks, num_classes)
        self.semantic_head = None
        if config.semantic:
            trunk = residual_blocks(channels, config.semantic_blocks)
            self.semantic_head = SemanticHead(channels, len(FPN.strides), trunk, config.num_semantic_classes)
        self.global_context_head = self.feature_relay = None
        if config.global_context:
            self.global_context_head = GlobalContextHead(channels, config.global_blocks, num_classes)
        if config.feature_relay:
            self.feature_relay = FeatureRelay(config.box_channels, channels, BOX_SIZE)

    def forward(self, images: Tensor, image_sizes: Tensor) -> Detections:
        """Detects objects.

        Args:
            images: [N, 3, H, W] normalised, padded to multiples of 32.
            image_sizes: [N, 2] int64 (height, width) before padding, on the images' device.
        """
        features = self.fpn(self.backbone(images))
        boxes, scores, count = self.rpn.proposals(*self.rpn(features), image_sizes)
        _, _, context = self.context(features)

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

    def context(self, features: list[Tensor]) -> tuple[Tensor | None, Tensor | None, Context]:
        """Semantic and image class logits (None without those branches), and what the RoI heads share."""
        semantic_logits = semantic = image_logits = image = None
        if self.semantic_head is not None:
            semantic_logits, semantic = self.semantic_head(features)
        if self.global_context_head is not None:
            image_logits, image = self.global_context_head(features)
        return semantic_logits, image_logits, Context(features[:-1], semantic, image)

    def box_features(self, context: Context, rois: Tensor) -> Tensor:
        """RoI features + S + G for rois [R, 5]: [R, C, 7, 7]"""
        # S is pooled as for the mask head, and the mean of 2 x 2 bins taken.
        features, semantic, image = context
        return pool_rois(features, rois, BOX_SIZE, self.config, semantic, MASK_SIZE // BOX_SIZE, image)

    def mask_features(self, context: Context, rois: Tensor, shared: Tensor | None) -> Tensor:
        """RoI features + S + G + relayed box feature (shared [R, hidden]) for rois [R, 5]: [R, C, 14, 14]"""
        features, semantic, image = context
        fused = pool_rois(features, rois, MASK_SIZE, self.config, semantic, image=image)
        return fused if self.feature_relay is None else fused + self.feature_relay(shared)

    def detection_masks(self, context: Context, boxes: Tensor, labels: Tensor, count: Tensor) -> Tensor:
        """Own-class mask probabilities of the final boxes: [N, D, 28, 28]"""
        capacity = used_capacity(count, labels.shape[1])
        valid = rows_below(count, capacity)
        rois, shared = boxes_to_rois(boxes[:, :capacity], valid), None
        if self.feature_relay is not None:
            shared = self.box_heads[-1].shared_features(self.box_features(context, rois))
        logits = self.mask_head(self.mask_features(context, rois, shared), labels[:, :capacity].flatten())
        return mask_probabilities([logits], valid, labels.shape[1])

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
        gt_valid = gt_labels >= 0
        features = self.fpn(self.backbone(images))
        rpn_outputs = self.rpn(features)
        losses = self.rpn.losses(*rpn_outputs, image_sizes, gt_boxes, gt_valid)
        boxes, _, count = self.rpn.proposals(*rpn_outputs, image_sizes)
        semantic_logits, image_logits, context = self.context(features)
        if semantic_logits is not None:
            loss = semantic_loss(semantic_logits, semantic, config.semantic_loss_mean)
            losses["loss_semantic"] = config.semantic_loss_weight * loss
        if image_logits is not None:
            loss = image_label_loss(image_logits, gt_labels, gt_valid)
            losses["loss_global_context"] = config.global_loss_weight * loss

        valid = rows_below(count, boxes.shape[1])
        for stage, head in enumerate(self.box_heads):
            samples = sample_rois(boxes, valid, gt_boxes, gt_labels, config.stage_iou[stage], config)
            stds, weight = config.stage_stds[stage], config.stage_weights[stage]
            logits, deltas, shared = head(self.box_features(context, samples.rois))
            loss_class, loss_box = box_head_losses(logits, deltas, samples, gt_boxes, stds, config)
            losses[f"stage{stage}.loss_class"] = weight * loss_class
            losses[f"stage{stage}.loss_box"] = weight * loss_box
            boxes, valid = refine(samples, deltas, stds, image_sizes, config)

        # The mask head is trained on the positives of the last stage, whose boxes are the best.
        positives = positives_in_front(samples, config)
        shared = shared.view(*samples.valid.shape, -1)[:, : positives.valid.shape[1]].flatten(0, 1)
        mask_features = self.mask_features(context, positives.rois, shared)
        mask_logits = self.mask_head(mask_features, positives.labels.flatten())
        losses["loss_mask"] = sum(config.stage_weights) * mask_head_loss(mask_logits, positives, gt_masks)
        return losses
