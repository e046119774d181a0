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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cascadeops

from .backbones import build_backbone
from .boxes import boxes_to_rois, decode_boxes, encode_boxes
from .config import SCNetConfig
from .fpn import FPN
from .heads import BoxHead, FeatureRelay, GlobalContextHead, ResidualMaskHead, ResidualSemanticHead
from .losses import box_loss, class_loss, image_label_loss, mask_loss, semantic_loss
from .matching import IGNORED, sample_matches
from .padding import rows_below, used_capacity
from .rpn import RPN

BOX_SIZE, MASK_SIZE = 7, 14


class Detections(NamedTuple):
    """Detections of a batch, best first; rows from count on are padding."""

    boxes: Tensor
    """[N, D, 4] pixels of the network's input."""
    scores: Tensor
    """[N, D]; -inf in padding rows."""
    labels: Tensor
    """[N, D] int64; -1 in padding rows."""
    mask_probs: Tensor
    """[N, D, 28, 28]: the mask inside the box."""
    count: Tensor
    """[N] int64."""


class Context(NamedTuple):
    """What every RoI of an image shares."""

    features: list[Tensor]
    """P2..P5."""
    semantic: Tensor | None
    """S: [N, C, H/8, W/8]"""
    image: Tensor
    """G: [N, C, 1, 1]"""


class SCNet(nn.Module):
    arch = "scnet"

    def __init__(self, config: SCNetConfig):
        super().__init__()
        self.config = config
        channels, num_classes = config.channels, config.num_classes
        self.backbone = build_backbone(config.backbone)
        self.fpn = FPN(self.backbone.out_channels, channels)
        self.rpn = RPN(channels, FPN.strides, config.rpn)
        self.box_heads = nn.ModuleList(
            BoxHead(channels, BOX_SIZE, config.box_channels, num_classes) for _ in config.stage_iou
        )
        self.mask_head = ResidualMaskHead(channels, config.mask_blocks, num_classes)
        self.semantic_head = None
        if config.semantic:
            self.semantic_head = ResidualSemanticHead(
                channels, len(FPN.strides), config.semantic_blocks, config.num_semantic_classes
            )
        self.global_context_head = GlobalContextHead(channels, config.global_blocks, num_classes)
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
        class_logits = 0.0
        for stage, head in enumerate(self.box_heads):
            rois = boxes_to_rois(boxes, valid)
            logits, deltas, _ = head(self.box_features(context, rois))
            class_logits = class_logits + logits
            boxes = decode_boxes(boxes, deltas.view_as(boxes), self.config.stage_stds[stage], image_sizes)
        probs = (class_logits / len(self.box_heads)).softmax(dim=-1)[:, :-1]
        scores = probs.view(*valid.shape, self.config.num_classes) * valid[..., None]

        boxes, scores, labels, _, count = cascadeops.multiclass_nms(
            boxes, scores, self.config.score_threshold, self.config.nms_iou, self.config.max_detections
        )
        return Detections(boxes, scores, labels, self.detection_masks(context, boxes, labels, count), count)

    def context(self, features: list[Tensor]) -> tuple[Tensor | None, Tensor, Context]:
        """Semantic logits (None without that branch), image class logits, and what the RoI heads share."""
        semantic_logits = semantic = None
        if self.semantic_head is not None:
            semantic_logits, semantic = self.semantic_head(features)
        image_logits, image = self.global_context_head(features)
        return semantic_logits, image_logits, Context(features[:-1], semantic, image)

    def box_features(self, context: Context, rois: Tensor) -> Tensor:
        """RoI features + S + G for rois [R, 5]: [R, C, 7, 7]"""
        # S is pooled as for the mask head, and the mean of 2 x 2 bins taken.
        return self.fuse(context, rois, BOX_SIZE, semantic_subdivision=MASK_SIZE // BOX_SIZE)

    def mask_features(self, context: Context, rois: Tensor, shared: Tensor) -> Tensor:
        """RoI features + S + G + relayed box feature (shared [R, hidden]) for rois [R, 5]: [R, C, 14, 14]"""
        return self.fuse(context, rois, MASK_SIZE) + self.feature_relay(shared)

    def fuse(self, context: Context, rois: Tensor, size: int, semantic_subdivision: int = 1) -> Tensor:
        return cascadeops.multiscale_roi_align(
            context.features,
            rois,
            size,
            FPN.strides[:-1],
            finest_size=self.config.finest_size,
            extra=context.semantic,
            extra_stride=FPN.strides[ResidualSemanticHead.fused_level],
            extra_subdivision=semantic_subdivision,
            image_vector=context.image,
        )

    def detection_masks(self, context: Context, boxes: Tensor, labels: Tensor, count: Tensor) -> Tensor:
        """Own-class mask probabilities of the final boxes: [N, D, 28, 28]"""
        num_images, max_detections = labels.shape
        capacity = used_capacity(count, max_detections)
        valid = rows_below(count, capacity)
        rois = boxes_to_rois(boxes[:, :capacity], valid)
        shared = self.box_heads[-1].shared_features(self.box_features(context, rois))
        logits = self.mask_head(self.mask_features(context, rois, shared))
        own_class = labels[:, :capacity].clamp(min=0).flatten()[:, None, None, None]
        probs = logits.gather(1, own_class.expand(-1, 1, *logits.shape[2:])).sigmoid()
        probs = probs.view(num_images, capacity, *logits.shape[2:]) * valid[..., None, None]
        return F.pad(probs, (0, 0, 0, 0, 0, max_detections - capacity))

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
        losses["loss_global_context"] = config.global_loss_weight * image_label_loss(image_logits, gt_labels, gt_valid)

        valid = rows_below(count, boxes.shape[1])
        for stage, head in enumerate(self.box_heads):
            samples, boxes, labels = self.sample_rois(stage, boxes, valid, gt_boxes, gt_labels)
            rois = boxes_to_rois(boxes, samples.valid)
            logits, deltas, shared = head(self.box_features(context, rois))
            matched = gt_boxes.gather(1, samples.gt_index[..., None].expand(-1, -1, 4))
            targets = encode_boxes(boxes, matched, config.stage_stds[stage]).flatten(0, 1)
            num_samples = samples.valid.sum().clamp(min=1)
            weight = config.stage_weights[stage]
            losses[f"stage{stage}.loss_class"] = weight * class_loss(
                logits, labels.flatten(), samples.valid.flatten(), num_samples
            )
            losses[f"stage{stage}.loss_box"] = weight * box_loss(
                deltas, targets, samples.positive.flatten(), num_samples, beta=1.0
            )
            if stage < len(self.box_heads) - 1:
                # Ground truth added by the sampler is not refined: the next stage adds it anew.
                valid = samples.valid & (samples.index >= gt_boxes.shape[1])
                deltas = deltas.detach().view_as(boxes)
                boxes = decode_boxes(boxes, deltas, config.stage_stds[stage], image_sizes)

        # Positives come first, so the mask branch takes the front of each image's samples.
        num_positive = samples.positive.sum(dim=1)
        capacity = used_capacity(num_positive, min(boxes.shape[1], self.max_positives))
        positive = samples.positive[:, :capacity]
        gt_index = samples.gt_index[:, :capacity]
        rois = boxes_to_rois(boxes[:, :capacity], positive)
        shared = shared.view(*labels.shape, -1)[:, :capacity].flatten(0, 1)
        mask_logits = self.mask_head(self.mask_features(context, rois, shared))
        flat_gt = gt_index + torch.arange(len(gt_index), device=gt_index.device)[:, None] * gt_labels.shape[1]
        targets = cascadeops.mask_targets(
            gt_masks.bitmaps,
            gt_masks.offsets.flatten(),
            gt_masks.windows.flatten(0, 1),
            rois[:, 1:],
            torch.where(positive, flat_gt, -1).flatten(),
            2 * MASK_SIZE,
        )
        loss = mask_loss(mask_logits, targets, labels[:, :capacity].flatten(), positive.flatten())
        losses["loss_mask"] = sum(config.stage_weights) * loss
        return losses

    @property
    def max_positives(self) -> int:
        return max(1, int(self.config.num_samples * self.config.positive_fraction))

    @torch.no_grad()
    def sample_rois(self, stage: int, boxes: Tensor, valid: Tensor, gt_boxes: Tensor, gt_labels: Tensor):
        """Matches boxes [N, P, 4] at the stage's IoU, puts the ground truth in front, samples.

        Returns:
            Samples whose rows count ground truth first; boxes [N, S, 4]; labels [N, S], background = num_classes.
        """
        config, gt_valid = self.config, gt_labels >= 0
        iou = config.stage_iou[stage]
        match = cascadeops.match_boxes(boxes, valid, gt_boxes, gt_valid, iou, iou, iou)
        itself = torch.where(gt_valid, torch.arange(gt_boxes.shape[1], device=boxes.device), IGNORED)
        match, boxes = torch.cat([itself, match], dim=1), torch.cat([gt_boxes, boxes], dim=1)
        samples = sample_matches(match, config.num_samples, config.positive_fraction)
        boxes = boxes.gather(1, samples.index[..., None].expand(-1, -1, 4))
        labels = torch.where(samples.positive, gt_labels.gather(1, samples.gt_index), config.num_classes)
        return samples, boxes, labels
