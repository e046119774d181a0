"""The operators of a detector's forward in ONNX's own, for `torch.onnx.export`: no runtime needs a library of ours.

NonMaxSuppression and NonZero have results whose size depends on data; behind them rows are padded up to the fixed
capacities again. For one image at a time. Each function has the arguments of its operator in csrc/library.cpp and is
tested against it in tests/test_onnx.py; they differ from it in the last bits (IoU and RoIAlign are the runtime's), and
in the order of detections with equal scores.
"""

from __future__ import annotations

import math

import torch
from onnxscript import opset18 as op

MAX_LOG_SCALE = abs(math.log(16 / 1000))


def translations() -> dict:
    """What `torch.onnx.export` takes as custom_translation_table."""
    ours = torch.ops.cascadeops
    functions = (box_proposals, multiclass_nms, multiscale_roi_align, self_calibrated_gate)
    return {getattr(ours, function.__name__).default: function for function in functions}


def box_proposals(logits, deltas, anchors, image_sizes, top_k, max_proposals, iou_threshold, stds):
    boxes, order = [], []
    for level_logits, level_deltas, level_anchors in zip(logits, deltas, anchors, strict=True):
        best = min(top_k, level_logits.shape[1])
        values, top = op.TopK(_rows(level_logits), _integers(best))
        level_boxes = _decode(op.Gather(level_anchors, top), op.Gather(_rows(level_deltas), top), stds, image_sizes)
        size = op.Sub(_columns(level_boxes, 2, 4), _columns(level_boxes, 0, 2))
        not_empty = op.Greater(op.ReduceMin(size, _integers(1), keepdims=0), _number(0))
        # Ranks instead of scores: candidates are in their order already, and those of rank 0 are left out.
        ranks = op.Where(not_empty, _numbers(*range(best, 0, -1)), _number(0))
        kept = op.NonMaxSuppression(
            op.Unsqueeze(level_boxes, _integers(0)),
            op.Unsqueeze(ranks, _integers(0, 1)),
            _integers(max_proposals),
            _numbers(iou_threshold),
            _numbers(0),
        )
        row = op.Squeeze(_columns(kept, 2, 3), _integers(1))
        boxes.append(op.Gather(level_boxes, row))
        order.append(op.Gather(values, row))
    capacity = min(max_proposals, sum(min(top_k, level.shape[1]) for level in logits))
    boxes, order = op.Concat(*boxes, axis=0), op.Concat(*order, axis=0)
    order, valid, index, count = _best(order, capacity)
    boxes = op.Where(op.Unsqueeze(valid, _integers(1)), op.Gather(_padded(boxes, 0.0, capacity, 4), index), _number(0))
    scores = op.Where(valid, op.Sigmoid(order), _number(-math.inf))
    return _batch(boxes), _batch(scores), count


def multiclass_nms(boxes, scores, score_threshold, iou_threshold, max_detections):
    num_rows, num_classes = scores.shape[1], scores.shape[2]
    # Classes take the place of a batch, since each may have boxes of its own.
    per_class = op.Reshape(boxes, _integers(num_rows, boxes.shape[2] // 4, 4))
    per_class = op.Expand(op.Transpose(per_class, perm=[1, 0, 2]), _integers(num_classes, 1, 1))
    by_class = op.Transpose(_rows(scores), perm=[1, 0])
    kept = op.NonMaxSuppression(
        per_class,
        op.Unsqueeze(by_class, _integers(1)),
        _integers(max_detections),
        _numbers(iou_threshold),
        _numbers(score_threshold),
    )
    label_and_row = op.Gather(kept, _integers(0, 2), axis=1)
    found, valid, index, count = _best(op.GatherND(by_class, label_and_row), max_detections)
    chosen = op.Gather(_padded(label_and_row, 0, max_detections, 2), index)
    padding = op.Unsqueeze(valid, _integers(1))
    out_boxes = op.Where(padding, op.GatherND(per_class, chosen), _number(0))
    label, row = (
        op.Squeeze(_columns(op.Where(padding, chosen, op.Constant(value_int=-1)), i, i + 1), _integers(1))
        for i in (0, 1)
    )
    return _batch(out_boxes), _batch(found), _batch(label), _batch(row), count


def multiscale_roi_align(
    maps,
    rois,
    output_height,
    output_width,
    spatial_scales,
    sampling_ratio,
    aligned,
    finest_size,
    epsilon_inside_log,
    extra_subdivision,
    image_vector=None,
    count=None,
):
    if count is not None:
        raise NotImplementedError("multiscale_roi_align: no ONNX for a count of RoIs")
    num_levels = len(maps) - (extra_subdivision > 0)
    image = op.Cast(op.Squeeze(_columns(rois, 0, 1), _integers(1)), to=7)
    boxes = _columns(rois, 1, 5)
    valid = op.GreaterOrEqual(image, op.Constant(value_int=0))

    def pool(index, map, scale, subdivision):
        return op.RoiAlign(
            map,
            op.Gather(boxes, index),
            op.Gather(image, index),
            coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
            output_height=output_height * subdivision,
            output_width=output_width * subdivision,
            sampling_ratio=max(sampling_ratio, 0),
            spatial_scale=scale,
        )

    size = op.Sub(_columns(boxes, 2, 4), _columns(boxes, 0, 2))
    scale = op.Div(op.Sqrt(op.ReduceProd(size, _integers(1), keepdims=0)), _number(finest_size))
    scale = op.Add(scale, _number(1e-6)) if epsilon_inside_log else op.Mul(scale, _number(2**1e-6))
    level = op.Constant(value_int=0)
    for power in range(1, num_levels):
        level = op.Add(level, op.Cast(op.GreaterOrEqual(scale, _number(2.0**power)), to=7))
    level = op.Where(valid, level, op.Constant(value_int=-1))

    shape = _integers(rois.shape[0], maps[0].shape[1], output_height, output_width)
    pooled = op.Expand(_number(0), shape)
    for i in range(num_levels):
        index = _where(op.Equal(level, op.Constant(value_int=i)))
        values = pool(index, maps[i], spatial_scales[i], 1)
        pooled = op.ScatterND(pooled, op.Unsqueeze(index, _integers(1)), values)
    index = _where(valid)
    if extra_subdivision > 0:
        values = pool(index, maps[-1], spatial_scales[-1], extra_subdivision)
        side = [extra_subdivision] * 2
        values = op.AveragePool(values, kernel_shape=side, strides=side)
        pooled = op.ScatterND(pooled, op.Unsqueeze(index, _integers(1)), values, reduction="add")
    if image_vector is not None:
        values = op.Unsqueeze(op.Gather(image_vector, op.Gather(image, index)), _integers(2, 3))
        values = op.Expand(values, _integers(1, 1, output_height, output_width))
        pooled = op.ScatterND(pooled, op.Unsqueeze(index, _integers(1)), values, reduction="add")
    return pooled


def self_calibrated_gate(x, k3, k2):
    settings = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    larger = op.Resize(k2, None, None, _integers(*k2.shape[:2], *x.shape[2:]), **settings)
    return op.Mul(k3, op.Sigmoid(op.Add(x, larger)))


def _decode(anchors, deltas, stds, image_sizes):
    """Anchors [K, 4] moved by deltas [K, 4], clipped to image_sizes [1, 2]: see cascadeops/reference/box_proposals."""
    deltas = op.Mul(deltas, _numbers(*stds))
    size = op.Sub(_columns(anchors, 2, 4), _columns(anchors, 0, 2))
    centre = op.Mul(op.Add(_columns(anchors, 0, 2), _columns(anchors, 2, 4)), _number(0.5))
    centre = op.Add(centre, op.Mul(size, _columns(deltas, 0, 2)))
    scale = op.Exp(op.Clip(_columns(deltas, 2, 4), _number(-MAX_LOG_SCALE), _number(MAX_LOG_SCALE)))
    half = op.Mul(op.Mul(size, scale), _number(0.5))
    limit = op.Cast(op.Gather(image_sizes, _integers(1, 0, 1, 0), axis=1), to=1)
    boxes = op.Concat(op.Sub(centre, half), op.Add(centre, half), axis=1)
    return op.Min(op.Max(boxes, _number(0)), limit)


def _best(scores, capacity: int):
    """The `capacity` best of scores [K], -inf where there are fewer; which are there; their rows; their number [1]."""
    best, index = op.TopK(_padded(scores, -math.inf, capacity), _integers(capacity))
    valid = op.Greater(best, _number(-math.inf))
    return best, valid, index, op.ReduceSum(op.Cast(valid, to=7), _integers(0))


def _padded(rows, value: float | int, *shape: int):
    """`rows` with padding of that shape behind them, all `value`."""
    padding = op.Expand(op.Constant(value_int=value) if isinstance(value, int) else _number(value), _integers(*shape))
    return op.Concat(rows, padding, axis=0)


def _where(condition):
    return op.Squeeze(op.NonZero(condition), _integers(0))


def _rows(batch):
    return op.Squeeze(batch, _integers(0))


def _batch(rows):
    return op.Unsqueeze(rows, _integers(0))


def _columns(matrix, begin: int, end: int):
    return op.Slice(matrix, _integers(begin), _integers(end), _integers(1))


def _integers(*values: int):
    return op.Constant(value_ints=list(values))


def _numbers(*values: float):
    return op.Constant(value_floats=list(map(float, values)))


def _number(value: float):
    return op.Constant(value_float=float(value))
