"""Mask R-CNN ("Mask R-CNN", He, Gkioxari, Dollar, Girshick, ICCV 2017, https://arxiv.org/abs/1703.06870, figure 4,
right).

    images -> backbone -> FPN -> P2..P6 -> RPN -> proposals
              RoI features 7x7   at the proposals  -> box head  -> classes, one box a class
              RoI features 14x14 at the detections -> mask head -> one mask a class, of which the own class's is kept

Every tensor has a fixed capacity and a count; nothing is read on the host. Differs from the paper as mmdetection does:
both box losses are L1, and anchors that leave the image are trained (`config.py`).
"""

from __future__ import annotations

from torch import Tensor, nn

from .arithmetic import ARITHMETICS
from .backbones import build_backbone
from .boxes import boxes_to_rois, decode_class_boxes
from .config import MaskRCNNConfig
from .detections import Detections, best_detections, mask_probabilities
from .fpn import FPN
from .heads import BOX_SIZE, MASK_SIZE, BoxHead, MaskHead
from .padding import rows_below, used_capacity
from .pooling import pool_rois
from .roi_training import box_head_losses, mask_head_loss, positives_in_front, sample_rois
from .rpn import RPN


class MaskRCNN(nn.Module):
    arch = "mask_rcnn"

    def __init__(self, config: MaskRCNNConfig):
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config.backbone)
        self.fpn = FPN(self.backbone.out_channels, config.channels)
        self.rpn = RPN(config.channels, FPN.strides, config.rpn, ARITHMETICS[config.arithmetic])
        self.box_head = BoxHead(
            config.channels, BOX_SIZE, config.box_channels, config.num_classes, config.class_specific_boxes
        )
        self.mask_head = MaskHead(config.channels, config.mask_convs, config.num_classes)

    def forward(self, images: Tensor, image_sizes: Tensor) -> Detections:
        """Detects objects.

        Args:
            images: [N, 3, H, W] normalised, padded to multiples of 32.
            image_sizes: [N, 2] int64 (height, width) before padding, on the images' device.
        """
        config = self.config
        features = self.fpn(self.backbone(images))
        boxes, _, count = self.rpn.proposals(*self.rpn(features), image_sizes)
        capacity = used_capacity(count, boxes.shape[1])
        boxes, valid = boxes[:, :capacity], rows_below(count, capacity)

        logits, deltas, _ = self.box_head(self.roi_features(features, boxes_to_rois(boxes, valid), BOX_SIZE))
        boxes = decode_class_boxes(boxes, deltas, config.box_stds, image_sizes, ARITHMETICS[config.arithmetic])
        boxes, scores, labels, count = best_detections(boxes, logits, valid, config)

        capacity = used_capacity(count, config.max_detections)
        valid = rows_below(count, capacity)
        rois = boxes_to_rois(boxes[:, :capacity], valid)
        mask_logits = self.mask_head(self.roi_features(features, rois, MASK_SIZE), labels[:, :capacity].flatten())
        masks = mask_probabilities([mask_logits], valid, config.max_detections)
        return Detections(boxes, scores, labels, masks, count)

    def roi_features(self, features: list[Tensor], rois: Tensor, size: int) -> Tensor:
        """P2..P6 at rois [R, 5]: [R, C, size, size]"""
        return pool_rois(features[:-1], rois, size, self.config)

    def losses(
        self,
        images: Tensor,
        image_sizes: Tensor,
        gt_boxes: Tensor,
        gt_labels: Tensor,
        gt_masks,
        semantic: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Every loss of the detector; their sum is what is minimised.

        Args:
            images, image_sizes: as in `forward`.
            gt_boxes: [N, G, 4], G >= 1; gt_labels: [N, G], -1 in padding rows.
            gt_masks: `PackedMasks` of those objects.
            semantic: not read.
        """
        config = self.config
        features = self.fpn(self.backbone(images))
        rpn_outputs = self.rpn(features)
        losses = self.rpn.losses(*rpn_outputs, image_sizes, gt_boxes, gt_labels >= 0)
        boxes, _, count = self.rpn.proposals(*rpn_outputs, image_sizes)

        valid = rows_below(count, boxes.shape[1])
        samples = sample_rois(boxes, valid, gt_boxes, gt_labels, config.positive_iou, config)
        logits, deltas, _ = self.box_head(self.roi_features(features, samples.rois, BOX_SIZE))
        losses["loss_class"], losses["loss_box"] = box_head_losses(
            logits, deltas, samples, gt_boxes, config.box_stds, config
        )

        positives = positives_in_front(samples, config)
        mask_features = self.roi_features(features, positives.rois, MASK_SIZE)
        mask_logits = self.mask_head(mask_features, positives.labels.flatten())
        losses["loss_mask"] = mask_head_loss(mask_logits, positives, gt_masks)
        return losses
