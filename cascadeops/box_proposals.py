"""The tail of a region proposal network for a batch: from logits and deltas to the boxes that are looked at."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cascadeops._arguments import as_floating, as_list, check_range, check_shapes, check_tensors

HALF_TYPES = (torch.float16, torch.bfloat16)


def box_proposals(
    logits: list[Tensor],  # L x [N, A_l]
    deltas: list[Tensor],  # L x [N, A_l, 4]
    anchors: list[Tensor],  # L x [A_l, 4]
    image_sizes: Tensor,  # [N, 2]
    top_k: int,
    max_proposals: int,
    iou_threshold: float,
    stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k of each level, decoding, clipping, removal of empty boxes, NMS within each level, and the best that remain.

    Everything is ordered by logits, as the sigmoid is monotone; equal logits by level, then by anchor. Only the
    ``top_k`` anchors of a level are decoded. There is no synchronisation with the host and no gradient.

    Args:
        logits: one ``[N, A_l]`` a level, 1 to 8 levels; any floating dtype, read as float32, as all the others are.
            float16 and bfloat16, the same for logits and deltas, are not copied for that.
        deltas: one ``[N, A_l, 4]`` a level, (dx, dy, dw, dh): the shift of the centre in sizes of the anchor, and the
            logarithm of the growth, clamped to 62.5-fold.
        anchors: one ``[A_l, 4]`` a level, (x1, y1, x2, y2) in pixels, the same for all images.
        image_sizes: ``[N, 2]`` (height, width) in pixels, integers or floating; boxes are clipped to it.
        top_k: anchors of a level that go into NMS, at least 1.
        max_proposals: most proposals of an image; the capacity is P = min(max_proposals, sum of min(top_k, A_l)).
        iou_threshold: in [0, 1]; decided as in ``padded_nms``.
        stds: what the four deltas are multiplied by.

    Returns:
        boxes: float32 ``[N, P, 4]``, best first, then zeros.
        scores: float32 ``[N, P]``, the sigmoid of the logits, then -inf.
        count: int64 ``[N]``, the number of proposals.

    Raises:
        RuntimeError: wrong shape, dtype or device, numbers out of range; on the CPU also for a NaN logit, which on
            CUDA is no candidate and noted for `raise_device_faults`. A box that becomes NaN counts as empty.

    Source: Ren et al., "Faster R-CNN", NIPS 2015, section 3.3, with Lin et al., "Feature Pyramid Networks", CVPR 2017,
    section 4.1; results as mmdetection 3's ``RPNHead.predict_by_feat`` where no two logits have the same sigmoid.
    """
    op = "box_proposals"
    lists = {"logits": logits, "deltas": deltas, "anchors": anchors}
    for name, values in lists.items():
        lists[name] = [as_floating(op, name, value) for value in as_list(op, name, values, Tensor)]
    outputs = lists["logits"] + lists["deltas"]
    in_half = outputs and outputs[0].dtype in HALF_TYPES and all(x.dtype == outputs[0].dtype for x in outputs)
    logits, deltas, anchors = (
        values if in_half and name != "anchors" else [value.float() for value in values]
        for name, values in lists.items()
    )
    check_tensors(op, image_sizes=image_sizes)
    image_sizes, stds = image_sizes.to(torch.float32), as_list(op, "stds", stds, (int, float))
    return torch.ops.cascadeops.box_proposals(
        logits, deltas, anchors, image_sizes, top_k, max_proposals, iou_threshold, stds
    )


@torch.library.register_fake("cascadeops::box_proposals")
def _(logits, deltas, anchors, image_sizes, top_k, max_proposals, iou_threshold, stds):
    check_range("box_proposals", "the number of levels in logits", len(logits), 1, 8)
    for name, levels in (("deltas", deltas), ("anchors", anchors)):
        check_range("box_proposals", f"the number of levels in {name}", len(levels), len(logits), len(logits))
    check_range("box_proposals", "the length of stds", len(stds), 4, 4)
    for level, tensors in enumerate(zip(logits, deltas, anchors, strict=True)):
        names = (f"logits[{level}]", f"deltas[{level}]", f"anchors[{level}]")
        patterns = ("N A", "N A 4", "A 4")
        named = {name: pair for name, *pair in zip(names, tensors, patterns, strict=True)}
        check_shapes("box_proposals", image_sizes=(image_sizes, "N 2"), **named)
    check_range("box_proposals", "top_k", top_k, 1, 2**30)
    check_range("box_proposals", "max_proposals", max_proposals, 0, 2**31 - 1)
    batch = image_sizes.shape[0]
    capacity = sum(torch.sym_min(top_k, level.shape[1]) for level in logits)
    capacity = torch.sym_min(max_proposals, capacity)
    boxes = image_sizes.new_empty(batch, capacity, 4)
    return boxes, boxes.new_empty(batch, capacity), boxes.new_empty(batch, dtype=torch.int64)
