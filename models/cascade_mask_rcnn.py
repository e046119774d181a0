"""Cascade Mask R-CNN ("Cascade R-CNN: High Quality Object Detection and Instance Segmentation", Cai, Vasconcelos,
TPAMI 2019, https://arxiv.org/abs/1906.09756, figures 3d and 6c).

    images -> backbone -> FPN -> P2..P6 -> RPN -> proposals
    three times:  RoI features -> box head  -> classes, refined boxes, which enter the next stage
                  RoI features -> mask head    (training: at the boxes that entered the stage;
                                                inference: all three at the final boxes, their mean)

Each stage counts proposals as positive from a higher IoU on, since the boxes that reach it are better. Every tensor has
a fixed capacity and a count; nothing is read on the host. `masks=False` is Cascade R-CNN.
"""

from __future__ import annotations

from torch import Tensor, nn

from .arithmetic import ARITHMETICS
from .backbones import build_backbone
from .boxes import boxes_to_rois, decode_boxes
from .config import CascadeMaskRCNNConfig
from .detections import Detections, best_detections, mask_probabilities
from .fpn import FPN
from .heads import BOX_SIZE, MASK_SIZE, BoxHead, MaskHead
from .padding import rows_below, used_capacity
from .pooling import pool_rois
from .roi_training import box_head_losses, mask_head_loss, positives_in_front, refine, sample_rois
from .rpn import RPN


class CascadeMaskRCNN(nn.Module):
    arch = "cascade_mask_rcnn"

    def __init__(self, config: CascadeMaskRCNNConfig):
        super().__init__()
        self.config = config
        channels, num_classes, num_stages = config.channels, config.num_classes, len(config.stage_iou)
        self.backbone = build_backbone(config.backbone)
        self.fpn = FPN(self.backbone.out_channels, channels)
        self.rpn = RPN(channels, FPN.strides, config.rpn, ARITHMETICS[config.arithmetic])
        self.box_heads = nn.ModuleList(
            BoxHead(channels, BOX_SIZE, config.box_channels, num_classes) for _ in range(num_stages)
        )
        self.mask_heads = None
        if config.masks:
            self.mask_heads = nn.ModuleList(
                MaskHead(channels, config.mask_convs, num_classes) for _ in range(num_stages)
            )

    def forward(self, images: Tensor, image_sizes: Tensor) -> Detections:
        """Detects objects.

        Args:
            images: [N, 3, H, W] normalised, padded to multiples of 32.
            image_sizes: [N, 2] int64 (height, width) before padding, on the images' device.
        """
        features = self.fpn(self.backbone(images))
        boxes, _, count = self.rpn.proposals(*self.rpn(features), image_sizes)
        capacity = used_capacity(count, boxes.shape[1])
        boxes, valid = boxes[:, :capacity], rows_below(count, capacity)

        class_logits, arithmetic = 0.0, ARITHMETICS[self.config.arithmetic]
        for head, stds in zip(self.box_heads, self.config.stage_stds, strict=True):
            logits, deltas, _ = head(self.roi_features(features, boxes_to_rois(boxes, valid), BOX_SIZE))
            class_logits = class_logits + logits
            boxes = decode_boxes(boxes, deltas.view_as(boxes), stds, image_sizes, arithmetic)
        class_logits = class_logits / len(self.box_heads)
        boxes, scores, labels, count = best_detections(boxes, class_logits, valid, self.config)
        return Detections(boxes, scores, labels, self.detection_masks(features, boxes, labels, count), count)

    def roi_features(self, features: list[Tensor], rois: Tensor, size: int) -> Tensor:
        """P2..P6 at rois [R, 5]: [R, C, size, size]"""
        return pool_rois(features[:-1], rois, size, self.config)

    def detection_masks(self, features: list[Tensor], boxes: Tensor, labels: Tensor, count: Tensor) -> Tensor | None:
        """Own-class mask probabilities of the final boxes, the mean of all stages: [N, D, 28, 28]"""
        if self.mask_heads is None:
            return None
        capacity = used_capacity(count, labels.shape[1])
        valid = rows_below(count, capacity)
        roi_features = self.roi_features(features, boxes_to_rois(boxes[:, :capacity], valid), MASK_SIZE)
        mask_logits = [head(roi_features, labels[:, :capacity].flatten()) for head in self.mask_heads]
        return mask_probabilities(mask_logits, valid, labels.shape[1])

    def losses(
        self,
        images: Tensor,
        image_sizes: Tensor,
        gt_boxes: Tensor,
        gt_labels: Tensor,
        gt_masks=None,
        semantic: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Every loss of the detector, weighted; their sum is what is minimised.

        Args:
            images, image_sizes: as in `forward`.
            gt_boxes: [N, G, 4], G >= 1; gt_labels: [N, G], -1 in padding rows.
            gt_masks: `PackedMasks` of those objects; needed if the detector has masks.
            semantic: not read.
        """
        config = self.config
        features = self.fpn(self.backbone(images))
        rpn_outputs = self.rpn(features)
        losses = self.rpn.losses(*rpn_outputs, image_sizes, gt_boxes, gt_labels >= 0)
        boxes, _, count = self.rpn.proposals(*rpn_outputs, image_sizes)

        valid = rows_below(count, boxes.shape[1])
        for stage, head in enumerate(self.box_heads):
            samples = sample_rois(boxes, valid, gt_boxes, gt_labels, config.stage_iou[stage], config)
            stds, weight = config.stage_stds[stage], config.stage_weights[stage]
            logits, deltas, _ = head(self.roi_features(features, samples.rois, BOX_SIZE))
            loss_class, loss_box = box_head_losses(logits, deltas, samples, gt_boxes, stds, config)
            losses[f"stage{stage}.loss_class"] = weight * loss_class
            losses[f"stage{stage}.loss_box"] = weight * loss_box
            if self.mask_heads is not None:
                positives = positives_in_front(samples, config)
                mask_features = self.roi_features(features, positives.rois, MASK_SIZE)
                mask_logits = self.mask_heads[stage](mask_features, positives.labels.flatten())
                losses[f"stage{stage}.loss_mask"] = weight * mask_head_loss(mask_logits, positives, gt_masks)
            boxes, valid = refine(samples, deltas, stds, image_sizes, config)
        return losses
