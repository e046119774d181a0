"""Mask R-CNN and HTC as mmdetection 1 and maskrcnn-benchmark computed them, box by box, in float64.

Written from the definitions (a box ends on its last pixel and is x2 - x1 + 1 wide), without a look at how
models/arithmetic.py gets there. The networks are the detector's own; everything between them is here. One image.
"""

import math

import numpy as np
import torch

MMDETECTION_1, MASKRCNN_BENCHMARK = "mmdetection_1", "maskrcnn_benchmark"
LARGEST = math.log(1000 / 16)


def cell_anchors(stride: int, family: str) -> np.ndarray:
    """[3, 4] first and last pixel: base size = stride, scale 8, ratios 0.5, 1, 2."""
    middle, rows = (stride - 1) / 2, []
    for ratio in (0.5, 1.0, 2.0):
        if family == MMDETECTION_1:
            width, height = 8 * stride / math.sqrt(ratio), 8 * stride * math.sqrt(ratio)
        else:
            width = np.round(math.sqrt(stride * stride / ratio))
            width, height = 8 * width, 8 * np.round(width * ratio)
        row = np.array([-(width - 1) / 2, -(height - 1) / 2, (width - 1) / 2, (height - 1) / 2]) + middle
        rows.append(np.round(row) if family == MMDETECTION_1 else row)
    return np.array(rows)


def decode(box, delta, stds, size, family):
    height, width = size
    dx, dy, dw, dh = np.asarray(delta, dtype=np.float64) * stds
    least = -LARGEST if family == MMDETECTION_1 else -math.inf
    dw, dh = (min(max(value, least), LARGEST) for value in (dw, dh))
    box_width, box_height = box[2] - box[0] + 1, box[3] - box[1] + 1
    x, y = box[0] + box_width / 2 + dx * box_width, box[1] + box_height / 2 + dy * box_height
    new_width, new_height = box_width * math.exp(dw), box_height * math.exp(dh)
    moved = [x - new_width / 2, y - new_height / 2, x + new_width / 2 - 1, y + new_height / 2 - 1]
    return np.clip(moved, 0, [width - 1, height - 1, width - 1, height - 1])


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0] + 1) * (a[3] - a[1] + 1) + (b[2] - b[0] + 1) * (b[3] - b[1] + 1) - shared)


def nms(candidates, threshold):
    """Of (score, box, anything) those that none of a higher score covers, best first."""
    kept = []
    for one in sorted(candidates, key=lambda one: -one[0]):
        if all(iou(one[1], other[1]) <= threshold for other in kept):
            kept.append(one)
    return kept


def bilinear(feature, y, x):
    height, width = feature.shape[1:]
    if y < -1 or y > height or x < -1 or x > width:
        return np.zeros(feature.shape[0])
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = feature[:, top, left] * (1 - (x - left)) + feature[:, top, right] * (x - left)
    lower = feature[:, bottom, left] * (1 - (x - left)) + feature[:, bottom, right] * (x - left)
    return upper * (1 - (y - top)) + lower * (y - top)


def roi_align(feature, box, stride, size, family):
    """2 x 2 samples a bin, no shift by half a cell: [C, size, size]"""
    end = box[2:] + 1 if family == MMDETECTION_1 else box[2:]
    least = 0 if family == MMDETECTION_1 else 1
    (left, top), (right, bottom) = box[:2] / stride, end / stride
    width, height = max(right - left, least) / size, max(bottom - top, least) / size
    pooled = np.zeros((feature.shape[0], size, size))
    for row in range(size):
        for column in range(size):
            for i in (0.25, 0.75):
                for j in (0.25, 0.75):
                    pooled[:, row, column] += bilinear(feature, top + (row + i) * height, left + (column + j) * width)
    return pooled / 4


def pool(features, boxes, size, family, finest, semantic=None):
    """RoI features [len(boxes), C, size, size], float32; the semantic features are pooled to 14 x 14 bins."""
    pooled = []
    for box in boxes:
        side = math.sqrt((box[2] - box[0] + 1) * (box[3] - box[1] + 1))
        if family == MMDETECTION_1:
            level = math.floor(math.log2(side / finest + 1e-6))
        else:
            level = math.floor(4 + math.log2(side / (4 * finest) + 1e-6)) - 2
        level = min(max(level, 0), 3)
        value = roi_align(features[level], box, 4 * 2**level, size, family)
        if semantic is not None:
            extra = roi_align(semantic, box, 8, 14, family)
            value = value + extra.reshape(-1, size, 14 // size, size, 14 // size).mean(axis=(2, 4))
        pooled.append(value)
    return torch.from_numpy(np.array(pooled)).float()


def proposals(detector, features, size, family):
    config, found = detector.config.rpn, []
    logits, deltas, _ = detector.rpn(features)
    for level, stride in enumerate((4, 8, 16, 32, 64)):
        base = cell_anchors(stride, family)
        width = features[level].shape[3]
        score, delta = logits[level][0].double().numpy(), deltas[level][0].double().numpy()
        candidates = []
        for index in np.argsort(-score)[: config.top_k]:
            cell, ratio = divmod(int(index), 3)
            anchor = base[ratio] + np.array([cell % width, cell // width] * 2) * stride
            candidates.append((score[index], decode(anchor, delta[index], np.ones(4), size, family)))
        found += nms(candidates, config.nms_iou)
    return [box for _, box in sorted(found, key=lambda one: -one[0])[: config.max_proposals]]


def best(boxes, scores, config):
    """(score, box, label) of the best; boxes [P] or, by class, [P][K], scores [P, K]."""
    kept = []
    for label in range(scores.shape[1]):
        own = [box[label] if isinstance(box, list) else box for box in boxes]
        candidates = [
            (score, box, label)
            for score, box in zip(scores[:, label], own, strict=True)
            if score > config.score_threshold
        ]
        kept += nms(candidates, config.nms_iou)
    return sorted(kept, key=lambda one: -one[0])[: config.max_detections]


@torch.inference_mode()
def detect(detector, images, size, family):
    """(boxes [D, 4] first and last pixel, scores [D], labels [D], masks [D, 28, 28]) of images [1, 3, H, W]."""
    config = detector.config
    levels = detector.fpn(detector.backbone(images))
    features = [level[0].double().numpy() for level in levels[:-1]]
    boxes = proposals(detector, levels, size, family)
    semantic = None
    if detector.arch == "mask_rcnn":
        logits, deltas, _ = detector.box_head(pool(features, boxes, 7, family, config.finest_size))
        deltas = deltas.view(len(boxes), -1, 4).numpy()
        boxes = [
            [decode(box, own, config.box_stds, size, family) for own in delta]
            for box, delta in zip(boxes, deltas, strict=True)
        ]
    else:
        semantic = detector.semantic_head(levels)[1][0].double().numpy()
        logits = 0
        for head, stds in zip(detector.box_heads, config.stage_stds, strict=True):
            own, deltas, _ = head(pool(features, boxes, 7, family, config.finest_size, semantic))
            logits = logits + own / len(detector.box_heads)
            boxes = [decode(box, delta, stds, size, family) for box, delta in zip(boxes, deltas.numpy(), strict=True)]
    found = best(boxes, logits.double().softmax(dim=1).numpy()[:, :-1], config)
    boxes, labels = np.array([box for _, box, _ in found]), [label for _, _, label in found]
    roi_features = pool(features, boxes, 14, family, config.finest_size, semantic)
    classes = torch.tensor(labels)
    if detector.arch == "mask_rcnn":
        masks = detector.mask_head(roi_features, classes).sigmoid()
    else:
        masks, flow = 0, None
        for head in detector.mask_heads:
            flow = head.features(roi_features, flow)
            masks = masks + head.mask_logits(flow, classes).sigmoid() / len(detector.mask_heads)
    return boxes, np.array([score for score, _, _ in found]), np.array(labels), masks.numpy()


def paste(mask, box, size, family):
    """[H, W] bool: the mask resized to the whole pixels of its box, above one half."""
    if family == MASKRCNN_BENCHMARK:
        half = (box[2:] - box[:2]) / 2 * 30 / 28
        centre = (box[2:] + box[:2]) / 2
        mask, box = np.pad(mask, 1), np.concatenate([centre - half, centre + half])
    x1, y1, x2, y2 = (int(value) for value in box)
    canvas = np.zeros(size, dtype=bool)
    for y in range(max(y1, 0), min(y2, size[0] - 1) + 1):
        for x in range(max(x1, 0), min(x2, size[1] - 1) + 1):
            v = (y - y1 + 0.5) * mask.shape[0] / max(y2 - y1 + 1, 1) - 0.5
            u = (x - x1 + 0.5) * mask.shape[1] / max(x2 - x1 + 1, 1) - 0.5
            canvas[y, x] = bilinear(mask[None], max(v, 0), max(u, 0))[0] > 0.5
    return canvas
