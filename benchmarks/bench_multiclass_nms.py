"""multiclass_nms against thresholding, others' batched_nms and top-k, as mmdetection has it: one image."""

import pytest
import shapes
import torch
from nms_peers import PEERS, batched_nms_of

import cascadeops
from cascadeops.reference.multiclass_nms import multiclass_nms as reference

IOU, CAPACITY = 0.5, 100


def workload(count, classes, device):
    """Boxes [1, count, 4] in clusters, and probabilities [1, count, classes] that are small for all but a few."""
    boxes, _, _ = shapes.crowded_boxes(count, 1, "cpu")
    logits = 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(3))
    return boxes[None].to(device), logits.softmax(1)[None].to(device)


def step_by_step(boxes, scores, threshold, batched_nms):
    row, label = (scores[0] > threshold).nonzero(as_tuple=True)
    score = scores[0, row, label]
    kept = batched_nms(boxes[0, row], score, label, IOU)[:CAPACITY]
    return boxes[0, row[kept]], score[kept], label[kept]


@pytest.mark.parametrize("implementation", ["cascadeops", *PEERS, "reference"])
@pytest.mark.parametrize(("classes", "threshold"), [(80, 0.05), (80, 0.001), (1203, 0.001)])
def bench_multiclass_nms(measure, device, classes, threshold, implementation):
    if implementation == "reference" and threshold < 0.05:
        pytest.skip("takes minutes")
    boxes, scores = workload(1_000, classes, device)
    batch = (boxes, scores, threshold, IOU, CAPACITY)
    if implementation in PEERS:
        batched_nms = batched_nms_of(implementation)
        function = lambda: step_by_step(boxes, scores, threshold, batched_nms)  # noqa: E731
    else:
        function = lambda: (cascadeops.multiclass_nms if implementation == "cascadeops" else reference)(*batch)  # noqa: E731

    _, best, labels, _, _ = cascadeops.multiclass_nms(*batch)
    expected = set(zip(best[0].tolist(), labels[0].tolist(), strict=True))

    def check(result):
        score, label = result[1:3] if implementation in PEERS else (result[1][0], result[2][0])
        found = set(zip(score.tolist(), label.tolist(), strict=True))
        # A pair whose IoU is at the threshold to within rounding may be decided differently in float32.
        assert len(found - expected) <= (1 if implementation in PEERS else 0)

    group = f"multiclass_nms, 1,000 boxes, {classes:,} classes, scores above {threshold}"
    measure(group, implementation, function, check, bytes_moved=boxes.nbytes + scores.nbytes)
