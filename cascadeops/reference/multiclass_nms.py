"""Per-class NMS: every (row, class) above the score threshold is a candidate, classes do not suppress each other."""

import torch
from torch import Tensor

from cascadeops.reference.padded_nms import greedy_nms


def multiclass_nms(
    boxes: Tensor, scores: Tensor, score_threshold: float, iou_threshold: float, max_detections: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, rows, classes = scores.shape
    per_class = boxes.reshape(batch, rows, boxes.shape[2] // 4, 4).expand(batch, rows, classes, 4)
    out_boxes = boxes.new_zeros(batch, max_detections, 4)
    out_scores = scores.new_full((batch, max_detections), -torch.inf)
    labels = torch.full((batch, max_detections), -1)
    index = torch.full((batch, max_detections), -1)
    count = torch.zeros(batch, dtype=torch.int64)
    for image in range(batch):
        row, label = (scores[image] > score_threshold).nonzero(as_tuple=True)  # ordered by row, then class
        candidates, candidate_scores = per_class[image, row, label], scores[image, row, label]
        kept = greedy_nms(candidates, candidate_scores, label, iou_threshold, max_detections)
        count[image] = len(kept)
        out_boxes[image, : len(kept)] = candidates[kept]
        out_scores[image, : len(kept)] = candidate_scores[kept]
        labels[image, : len(kept)] = label[kept]
        index[image, : len(kept)] = row[kept]
    return out_boxes, out_scores, labels, index, count
