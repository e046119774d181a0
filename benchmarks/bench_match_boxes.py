"""match_boxes against the matrix of IoUs: an RPN's anchors, and a box head's proposals."""

import pytest
import shapes
import torch

import cascadeops
from cascadeops.reference.match_boxes import match_boxes as reference
from models.anchors import grid_anchors


def anchors_of_image(device) -> torch.Tensor:
    """[268,569, 4] of P2 to P6, three to a cell."""
    strides = [*shapes.STRIDES, 64]
    sizes = [tuple(-(-side // stride) for side in shapes.IMAGE_SIZE) for stride in strides]
    return torch.cat(grid_anchors(sizes, strides, 8.0, (0.5, 1.0, 2.0), torch.device(device)))


def torchvision_way(boxes, gt_boxes, positive, negative):
    torchvision = pytest.importorskip("torchvision")
    matcher = torchvision.models.detection._utils.Matcher(positive, negative, allow_low_quality_matches=True)
    return lambda: matcher(torchvision.ops.box_iou(gt_boxes, boxes))


def detectron2_way(boxes, gt_boxes, positive, negative):
    structures, matcher = (
        pytest.importorskip("detectron2.structures"),
        pytest.importorskip("detectron2.modeling.matcher"),
    )
    thresholds, labels = [negative, positive], [0, -1, 1]
    if positive == negative:
        thresholds, labels = [positive], [0, 1]
    assign = matcher.Matcher(thresholds, labels, allow_low_quality_matches=True)
    rows, gt_rows = structures.Boxes(boxes), structures.Boxes(gt_boxes)
    return lambda: assign(structures.pairwise_iou(gt_rows, rows))


def as_match(result) -> torch.Tensor:
    """detectron2's (ground truth of each box, its label) as one number."""
    if isinstance(result, torch.Tensor):
        return result
    gt, label = result
    return torch.where(label == 1, gt, torch.where(label == 0, -1, -2))


PEERS = {"torchvision": torchvision_way, "detectron2": detectron2_way}


@pytest.mark.parametrize("implementation", ["cascadeops", *PEERS, "reference"])
@pytest.mark.parametrize(
    ("boxes_of", "gt_count"), [("anchors", 20), ("anchors", 500), ("proposals", 20)], ids=lambda value: str(value)
)
def bench_match_boxes(measure, device, boxes_of, gt_count, implementation):
    if implementation != "cascadeops" and gt_count == 500 and device.type == "cpu":
        pytest.skip("4 GB of matrices")
    boxes = anchors_of_image(device) if boxes_of == "anchors" else shapes.boxes(2_000, device)
    gt_boxes = shapes.boxes(gt_count, device, smallest=8, largest=600, seed=3)
    positive, negative = (0.7, 0.3) if boxes_of == "anchors" else (0.5, 0.5)
    batch = boxes[None], torch.ones(1, len(boxes), dtype=torch.bool, device=device)
    batch += gt_boxes[None], torch.ones(1, gt_count, dtype=torch.bool, device=device)
    if implementation in PEERS:
        function = PEERS[implementation](boxes, gt_boxes, positive, negative)
    else:
        operator = cascadeops.match_boxes if implementation == "cascadeops" else reference
        function = lambda: operator(*batch, positive, negative, negative)[0]  # noqa: E731
    expected = cascadeops.match_boxes(*batch, positive, negative, negative)[0]

    def check(result):
        # The peers give every low-quality match its own best ground truth, not the one that claims it.
        wrong = (as_match(result) != expected).float().mean().item()
        assert wrong <= (1e-2 if implementation in PEERS else 0)

    name = f"match_boxes, {len(boxes):,} {boxes_of}, {gt_count} ground truths"
    measure(name, implementation, function, check, bytes_moved=25 * len(boxes))
