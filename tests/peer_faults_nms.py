"""NMS: faults of torchvision, mmcv, maskrcnn-benchmark and others."""

import math

import torch
from peer_faults import Fault, gives, raises, tested

from cascadeops import batched_nms, nms
from cascadeops.reference import nms as reference

TORCHVISION = "torchvision 0.26"
BOXES = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 30, 30]])
SCORES = torch.tensor([0.9, 0.8, 0.7])
FINITE = "nms: boxes must be finite and scores not NaN; see row 1"


def kept(box=None, score=None, threshold=0.5):
    """What remains of three boxes, the first two alike, after the second was changed."""
    boxes, scores = BOXES.clone(), SCORES.clone()
    if box is not None:
        boxes[1] = torch.tensor(box)
    if score is not None:
        scores[1] = score
    return nms(boxes, scores, threshold).tolist()


def random_corners_are_decided_as_the_reference_does(threshold: float) -> bool:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        boxes, scores = torch.rand(400, 4), torch.rand(400)  # three in four are inverted
    return torch.equal(nms(boxes, scores, threshold), reference.nms(boxes, scores, threshold))


def half_boxes_of_80_classes() -> bool:
    # Two boxes of each class, whose IoU of 0.43 is kept; float16 numbers beyond 32,768 are 32 pixels apart.
    classes = torch.arange(80).repeat_interleave(2)
    boxes = torch.tensor([[600.0, 100, 640, 140], [616, 100, 656, 140]]).repeat(80, 1).half()
    scores = torch.linspace(1, 0.1, 160).half()
    moved = boxes + (classes.half() * (boxes.max() + 1))[:, None]
    return len(batched_nms(boxes, scores, classes, 0.5)) == 160 and len(nms(moved, scores, 0.5)) < 160


def pairs_at_a_threshold() -> bool:
    # IoU 7/10 is kept, and one float32 step below; one step above is dropped.
    at = torch.tensor(700.0)
    edges = (at.nextafter(torch.tensor(0.0)), at, at.nextafter(torch.tensor(1e9)))
    rows = (nms(torch.tensor([[0.0, 0, 1000, 1000], [0, 0, edge, 1000]]), SCORES[:2], 0.7) for edge in edges)
    return [len(row) for row in rows] == [2, 2, 1]


def areas_beyond_int32() -> bool:
    boxes = torch.tensor([[0.0, 0, 1e5, 1e5], [0, 0, 1e5, 5.1e4]])  # IoU 0.51
    return nms(boxes, SCORES[:2], 0.505).tolist() == [0] and nms(boxes, SCORES[:2], 0.515).tolist() == [0, 1]


FAULTS: dict[str, Fault] = {
    # Reports.
    "torchvision-3371": tested("pytorch/vision#3371, pytorch/vision#3383", "float16 boxes whose area exceeds 65,504",
        "areas overflow, nothing is suppressed", "areas in float64",
        "tests/test_nms.py::test_half_boxes_whose_area_overflows_half"),
    "torchvision-2157": gives("pytorch/vision#2157", "equal scores", "the CPU keeps the first, CUDA the last",
        "equal scores go by row, on every device", lambda: nms(BOXES[[0, 0, 0]], torch.ones(3), 0.5).tolist() == [0]),
    "torchvision-1556": gives("pytorch/vision#1556", "an IoU of exactly the threshold", "dropped on one device only",
        "kept: the exact quotient decides, one float32 step to either side", pairs_at_a_threshold),
    "torchvision-4071": tested("pytorch/vision#4071", "batched_nms in the binaries of a release", "crashes",
        "every installed binary answers a self-test of each operator: python -m cascadeops",
        "tests/test_packaging.py::test_console_doctor_reports_the_wheel",
        "tests/test_doctor.py::test_every_public_operator_has_a_check_and_a_cpu_kernel"),
    "pytorch-31568": tested("pytorch/pytorch#31568", "some inputs on CUDA",
        '"Trying to create tensor with negative dimension -532064992"', "as many rows as are kept, also none",
        "tests/test_nms.py::test_negative_scores_and_an_empty_result_of_a_group"),
    "mmcv-2542": tested("open-mmlab/mmcv#2542", "boxes that are not contiguous (there: rotated ones)",
        "reads them as if they were", "the result of a copy", "tests/test_nms.py::test_non_contiguous_input"),
    "mmcv-1239": gives("open-mmlab/mmcv#1239", "torch.rand(N, 4) as boxes, threshold 0", "CPU and GPU differ",
        "one definition for both: inverted boxes overlap nothing",
        lambda: random_corners_are_decided_as_the_reference_does(0.0)),
    "mmcv-1476": gives("open-mmlab/mmcv#1476", "boxes with x1 > x2", "CPU and GPU differ",
        "one definition for both: inverted boxes overlap nothing",
        lambda: random_corners_are_decided_as_the_reference_does(0.45)),
    "maskrcnn-benchmark-289": gives("facebookresearch/maskrcnn-benchmark#289", "scores that are not sorted",
        "the GPU keeps both of two boxes with an IoU of 0.97", "input of any order",
        lambda: nms(torch.tensor([[7.0, 0, 12, 63], [7, 0, 12, 65]]), torch.tensor([0.0, 1]), 0.3).tolist() == [1]),
    "mmcv-nms-half": gives("mmcv 2", "float16 boxes", "float32 only", "read as float32",
        lambda: nms(BOXES.half(), SCORES.half(), 0.5).tolist() == [0, 2]),
    "yolo-234": gives("MultimediaTechLab/YOLO#234", "float16 boxes of 80 classes, moved apart by class",
        "offsets round the boxes away", "classes are kept apart without offsets", half_boxes_of_80_classes),
    "offsets-of-lvis": tested("mmcv 2, torchvision 0.26", "1,203 classes x 1,333 pixels, moved apart by class",
        "coordinates are rounded to 1/8 pixel", "classes are kept apart without offsets",
        "tests/test_nms.py::test_many_classes_do_not_round_coordinates",
        "tests/test_nms_at_scale.py::test_every_pair_of_box_and_class_is_decided_as_in_float64"),
    "mmcv-nms-262144": tested("mmcv 2", "more than 262,144 boxes",
        "the grid is capped and bits are read with another stride than written: silently wrong",
        "every decision as in float64, up to 1,000,000 boxes",
        "tests/test_nms.py::test_more_boxes_than_others_can_number",
        "tests/test_nms_at_scale.py::test_every_row_is_decided_as_in_float64"),
    "torchvision-nms-370728": tested("mmcv 2, torchvision 0.26", "more than 370,728 boxes", "an index of 32 bits wraps",
        "as above", "tests/test_nms_at_scale.py::test_every_row_is_decided_as_in_float64"),
    "torchvision-nms-393216": tested("torchvision 0.26", "more than 393,216 boxes",
        "a row of bits outgrows the shared memory", "memory of O(N), at most 64 bytes a box",
        "tests/test_nms_at_scale.py::test_memory_is_at_most_64_bytes_a_box",
        "tests/test_nms.py::test_memory_does_not_grow_with_the_square"),
    # torchvision 0.26 on the CPU: silently wrong.
    "torchvision-nms-nan-score": raises(TORCHVISION, "a NaN score", "sorts first", FINITE,
        lambda: kept(score=math.nan)),
    "torchvision-nms-nan-box": raises(TORCHVISION, "a NaN coordinate", "is kept", FINITE,
        lambda: kept((0, math.nan, 10, 10))),
    "torchvision-nms-inf-box": raises(TORCHVISION, "an infinite coordinate", "is kept", FINITE,
        lambda: kept((0, 0, math.inf, 10))),
    "torchvision-nms-inverted-box": gives(TORCHVISION, "x1 > x2", "is kept",
        "is kept, by definition: it overlaps nothing", lambda: kept((10, 10, 0, 0), threshold=0.0) == [0, 1, 2]),
    "torchvision-nms-nan-threshold": raises(TORCHVISION, "a threshold of NaN", "keeps every box",
        "nms: iou_threshold must be in [0, 1], got nan", lambda: kept(threshold=math.nan)),
    "torchvision-nms-zero-area": gives(TORCHVISION, "two equal boxes without area", "both are kept",
        "both are kept, by definition: they overlap nothing",
        lambda: nms(torch.tensor([[5.0, 5, 5, 9], [5, 5, 5, 9]]), SCORES[:2], 0.0).tolist() == [0, 1]),
    "torchvision-box-area-int32": raises(TORCHVISION, "int32 boxes of 100,000 x 100,000 pixels",
        "an area of 1,410,065,408", "nms: boxes must have a floating dtype, got int32",
        lambda: nms(torch.tensor([[0, 0, 100_000, 100_000]], dtype=torch.int32), SCORES[:1], 0.5)),
    "torchvision-box-area-float": gives(TORCHVISION, "boxes of 100,000 x 100,000 pixels", "as above",
        "areas in float64", areas_beyond_int32),
    "torchvision-batched-nms-1e8": tested(TORCHVISION, "coordinates of 1e8 in batched_nms",
        "moved apart by class, which rounds; not shown to be wrong", "as they are",
        "tests/test_nms.py::test_huge_coordinates"),
    # torchvision 0.26 on the CPU: an error of the wrong kind.
    "torchvision-nms-half": gives(TORCHVISION, "float16 boxes on the CPU", '"not implemented"', "read as float32",
        lambda: nms(BOXES.half(), SCORES.half(), 0.5).tolist() == [0, 2]),
}  # fmt: skip
