"""match_boxes against the matrix of IoUs: an RPN's anchors, and a box head's proposals."""

import pytest
import shapes
import torch

import cascadeops
from cascadeops.reference.match_boxes import match_boxes as reference
from models.anchors import grid_anchors


def anchors_of_image(device) -> torch.Tensor:
    """[267,750, 4] of P2 to P6, three to a cell."""
    strides = [*shapes.STRIDES, 64]
    sizes = [tuple(-(-side // stride) for side in shapes.IMAGE_SIZE) for stride in strides]
    return torch.cat(grid_anchors(sizes, strides, 8.0, (0.5, 1.0, 2.0), torch.device(device)))


@pytest.mark.parametrize("implementation", ["cascadeops", "reference", "torchvision"])
@pytest.mark.parametrize(
    ("boxes_of", "gt_count"), [("anchors", 20), ("anchors", 500), ("proposals", 20)], ids=lambda value: str(value)
)
def bench_match_boxes(measure, device, boxes_of, gt_count, implementation):
    if implementation != "cascadeops" and gt_count == 500 and device.type == "cpu":
        pytest.skip("2 GB and more of matrices, and minutes")
    boxes = anchors_of_image(device) if boxes_of == "anchors" else shapes.boxes(2_000, device)
    gt_boxes = shapes.boxes(gt_count, device, smallest=8, largest=600, seed=3)
    positive, negative = (0.7, 0.3) if boxes_of == "anchors" else (0.5, 0.5)
    batch = boxes[None], torch.ones(1, len(boxes), dtype=torch.bool, device=device)
    batch += gt_boxes[None], torch.ones(1, gt_count, dtype=torch.bool, device=device)
    if implementation == "torchvision":
        torchvision = pytest.importorskip("torchvision")
        matcher = torchvision.models.detection._utils.Matcher(positive, negative, allow_low_quality_matches=True)
        function = lambda: matcher(torchvision.ops.box_iou(gt_boxes, boxes))  # noqa: E731
    else:
        operator = cascadeops.match_boxes if implementation == "cascadeops" else reference
        function = lambda: operator(*batch, positive, negative, negative)[0]  # noqa: E731
    expected = cascadeops.match_boxes(*batch, positive, negative, negative)[0]

    def check(match: torch.Tensor):
        # torchvision gives every low-quality match its own best ground truth, not the one that claims it.
        wrong = (match != expected).float().mean().item()
        assert wrong <= (1e-2 if implementation == "torchvision" else 0)

    name = f"match_boxes, {len(boxes):,} {boxes_of}, {gt_count} ground truths"
    measure(name, implementation, function, check, bytes_moved=25 * len(boxes))
