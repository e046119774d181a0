"""match_boxes: the IoU assigner without a matrix of IoUs."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascadeops import match_boxes
from cascadeops.reference.match_boxes import IGNORED, NEGATIVE, box_iou
from cascadeops.reference.match_boxes import match_boxes as reference

EXAMPLES = int(os.environ.get("CASCADEOPS_EXAMPLES", 100))
RPN, BOX_HEAD, CASCADE = (0.7, 0.3, 0.3), (0.5, 0.5, 0.5), (0.6, 0.6, None)


def random_boxes(batch, rows, integers=False, extent=100.0):
    """Boxes that overlap a good deal; with integers many IoUs are equal, and some boxes have no area."""
    corner, size = torch.rand(batch, rows, 2) * extent, torch.rand(batch, rows, 2) * extent / 3
    if integers:
        corner, size = (corner / 10).round(), (size / 10).round()
    return torch.cat([corner, corner + size], -1)


def grid_of_anchors(height, width, stride, sizes):
    """[height * width * len(sizes), 4], neighbours side by side as an RPN has them."""
    y, x = torch.meshgrid(torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij")
    centre = torch.stack([x, y, x, y], -1)[:, :, None].float()
    half = torch.tensor(sizes)[:, None] / 2 * torch.tensor([-1.0, -1, 1, 1])
    return (centre + half).flatten(0, 2)


def problem(batch, rows, gt_rows, integers):
    valid, gt_valid = torch.rand(batch, rows) < 0.8, torch.rand(batch, gt_rows) < 0.8
    return random_boxes(batch, rows, integers), valid, random_boxes(batch, gt_rows, integers), gt_valid


def assert_same(result, expected):
    assert result.dtype == torch.int64
    assert torch.equal(result.cpu(), expected)


@pytest.mark.parametrize("thresholds", [RPN, BOX_HEAD, CASCADE, (0.0, 0.0, 0.0), (0.4, 0.0, 1.0), (1.0, 0.2, 0.1)])
@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize(("rows", "gt_rows"), [(0, 3), (1, 1), (63, 7), (64, 0), (300, 33), (1000, 300)])
def test_equals_reference(device, poisoned_memory, rows, gt_rows, integers, thresholds):
    inputs = problem(2, rows, gt_rows, integers)
    expected = reference(*inputs, *thresholds)
    assert_same(match_boxes(*(tensor.to(device) for tensor in inputs), *thresholds), expected)


def test_equals_reference_on_anchors(device):
    anchors = torch.cat([grid_of_anchors(50, 84, 16, [64.0, 90.5, 128.0]), grid_of_anchors(25, 42, 32, [256.0])])
    corner, size = torch.rand(3, 60, 2) * torch.tensor([1300, 780.0]), 8 * 50 ** torch.rand(3, 60, 2)
    gt_boxes, gt_valid = torch.cat([corner, corner + size], -1), torch.arange(60) < torch.tensor([[60], [7], [0]])
    valid = (anchors[:, :2] >= 0).all(1) & (anchors[:, 2:] < torch.tensor([1333, 800])).all(1)
    expanded = anchors.expand(3, -1, -1), valid.expand(3, -1)
    result = match_boxes(*(tensor.to(device) for tensor in (*expanded, gt_boxes, gt_valid)), *RPN)
    assert_same(result, reference(*expanded, gt_boxes, gt_valid, *RPN))
    assert (result[0] >= 0).sum() >= 40 and (result[0] == IGNORED).any() and (result[2] < 0).all()


def assign_by_blocks(boxes, valid, gt_boxes, low, high):
    """The rules of mmdetection's MaxIoUAssigner, min_pos_iou = low, with never more than a block of the matrix."""
    rows = torch.arange(len(boxes)).split(16_384)
    ious = lambda block: torch.where(valid[block], box_iou(gt_boxes[None], boxes[None, block])[0], -1.0)  # noqa: E731
    best_of_gt = torch.stack([ious(block).amax(1) for block in rows]).amax(0)
    match = torch.full((len(boxes),), IGNORED)
    for block in rows:
        iou = ious(block)
        best, gt = iou.max(0)
        match[block[best < low]] = NEGATIVE
        match[block[best >= high]] = gt[best >= high]
        for row in (best_of_gt >= low).nonzero()[:, 0].tolist():  # later ground truths overwrite
            match[block[iou[row] == best_of_gt[row]]] = row
    return torch.where(valid, match, IGNORED)


def test_equals_mmdetection_on_268569_anchors_and_500_ground_truths(device):
    """Three anchors a cell of P2 to P6 at 800 x 1344: 537 MB as a matrix of float32."""
    sizes = [[8.0 * stride * ratio for ratio in (1.0, 1.26, 1.59)] for stride in (4, 8, 16, 32, 64)]
    levels = zip((200, 100, 50, 25, 13), (336, 168, 84, 42, 21), (4, 8, 16, 32, 64), sizes, strict=True)
    boxes = torch.cat([grid_of_anchors(*level) for level in levels])
    valid = (boxes[:, :2] >= 0).all(1) & (boxes[:, 2:] < torch.tensor([1344, 800])).all(1)
    corner, size = torch.rand(500, 2) * torch.tensor([1300, 780.0]), 8 * 50 ** torch.rand(500, 2)
    gt_boxes = torch.cat([corner, corner + size], 1)
    gt_boxes[250:300] = gt_boxes[:50]  # ties between ground truths
    gt_boxes[300:350] = boxes[valid][:: valid.sum() // 50][:50]  # IoUs of 1
    assert len(boxes) == 268_569
    inputs = boxes[None], valid[None], gt_boxes[None], torch.ones(1, 500, dtype=torch.bool)
    result = match_boxes(*(tensor.to(device) for tensor in inputs), *RPN)[0].cpu()
    assert torch.equal(result, assign_by_blocks(boxes, valid, gt_boxes, 0.3, 0.7))
    assert (result >= 0).sum() > 500 and (result == NEGATIVE).sum() > 10_000 and (result[valid] == IGNORED).any()


MEMORY = """
import torch, cascadeops

def memory(field):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))

corner, gt_corner = torch.rand(1, 268_569, 2) * 1000, torch.rand(1, 500, 2) * 1000
boxes, gt_boxes = torch.cat([corner, corner + 50], 2), torch.cat([gt_corner, gt_corner + 60], 2)
valid, gt_valid = torch.ones(1, 268_569, dtype=torch.bool), torch.ones(1, 500, dtype=torch.bool)
cascadeops.match_boxes(boxes[:, :9], valid[:, :9], gt_boxes, gt_valid, 0.7, 0.3, 0.3)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
before = memory("VmRSS")
cascadeops.match_boxes(boxes, valid, gt_boxes, gt_valid, 0.7, 0.3, 0.3)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")
def test_memory_is_that_of_boxes_and_ground_truths():
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # or memory freed before would hide some
    result = subprocess.run([sys.executable, "-c", MEMORY], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 8 * 268_569 < int(result.stdout) < 16 * (268_569 + 500)  # the result takes 8 bytes a box


@st.composite
def problems(draw):
    """Coordinates from a short list, so that equal IoUs and empty boxes are common."""
    box = st.tuples(*[st.integers(-3, 5)] * 4)
    boxes, gt_boxes = (draw(st.lists(st.tuples(box, st.booleans()), min_size=1, max_size=size)) for size in (80, 8))
    scale = draw(st.sampled_from([1.0, 0.37, 1e-4, 1e15]))
    rows = [torch.tensor([box for box, _ in some], dtype=torch.float32)[None] * scale for some in (boxes, gt_boxes)]
    valid = [torch.tensor([valid for _, valid in some])[None] for some in (boxes, gt_boxes)]
    return rows[0], valid[0], rows[1], valid[1]


@settings(max_examples=EXAMPLES, deadline=None)
@given(problem=problems(), thresholds=st.tuples(st.sampled_from([0.0, 0.1, 1 / 3, 0.5, 1.0]), st.booleans()))
def test_property_equals_reference(problem, thresholds):
    level, low_quality = thresholds
    assert_same(
        match_boxes(*problem, level, level / 2, 0.2 if low_quality else None),
        reference(*problem, level, level / 2, 0.2 if low_quality else None),
    )


def test_by_hand(device):
    # Ground truth 0 is box 0 (IoU 1). Boxes 1 and 2 cover 60 and 40 of its 100; box 3 lies elsewhere; ground truth 1
    # meets only box 4, a quarter of it.
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 6], [0, 0, 10, 4], [50, 0, 60, 10], [100, 0, 105, 5.0]])
    gt_boxes = torch.tensor([[0, 0, 10, 10], [100, 0, 110, 10.0]])
    valid, gt_valid = torch.ones(1, 5, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)
    inputs = [tensor.to(device) for tensor in (boxes[None], valid, gt_boxes[None], gt_valid)]
    assert match_boxes(*inputs, 0.7, 0.5).tolist() == [[0, IGNORED, NEGATIVE, NEGATIVE, NEGATIVE]]
    assert match_boxes(*inputs, 0.7, 0.5, 0.2).tolist() == [[0, IGNORED, NEGATIVE, NEGATIVE, 1]]
    assert match_boxes(*inputs, 0.7, 0.5, 0.3).tolist() == [[0, IGNORED, NEGATIVE, NEGATIVE, NEGATIVE]]


def test_first_ground_truth_wins_a_tie_and_the_last_one_a_claim(device):
    boxes = torch.tensor([[[0.0, 0, 10, 10]]], device=device)
    gt_boxes, gt_valid = boxes.expand(1, 3, 4), torch.ones(1, 3, dtype=torch.bool, device=device)
    valid = gt_valid[:, :1]
    assert match_boxes(boxes, valid, gt_boxes, gt_valid, 0.5, 0.5).item() == 0
    assert match_boxes(boxes, valid, gt_boxes, gt_valid, 0.5, 0.5, 0.5).item() == 2


def test_every_box_with_exactly_the_best_iou_is_claimed(device):
    # Of mirrored boxes the roundings differ little or not at all: those of equal float32 IoU are claimed, no others.
    gt_boxes = torch.tensor([[[0.1, 0.1, 7.3, 5.9]]])
    boxes = torch.tensor([0.1, 0.1, 3.7, 5.9]).repeat(200, 1)
    boxes[1::2] = torch.tensor([3.7, 0.1, 7.3, 5.9])
    boxes[7] = torch.tensor([0.1, 0.1, 3.6999, 5.9])
    valid, gt_valid = torch.ones(1, 200, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)
    inputs = boxes[None], valid, gt_boxes, gt_valid
    result = match_boxes(*(tensor.to(device) for tensor in inputs), 0.7, 0.3, 0.3)
    assert_same(result, reference(*inputs, 0.7, 0.3, 0.3))
    assert result[0, 7] == IGNORED and (result[0] == 0).sum() >= 99


def test_rows_that_are_not_valid_are_not_looked_at(device):
    boxes, valid, gt_boxes, gt_valid = problem(2, 200, 9, False)
    expected = reference(boxes, valid, gt_boxes, gt_valid, *RPN)
    boxes[~valid], gt_boxes[~gt_valid] = float("nan"), float("inf")
    assert_same(match_boxes(*(tensor.to(device) for tensor in (boxes, valid, gt_boxes, gt_valid)), *RPN), expected)


def test_no_valid_ground_truth_makes_every_valid_box_negative(device):
    boxes, valid, gt_boxes, gt_valid = (tensor.to(device) for tensor in problem(1, 70, 4, False))
    for given_gt in ((gt_boxes, torch.zeros_like(gt_valid)), (gt_boxes[:, :0], gt_valid[:, :0])):
        for thresholds in (RPN, (0.0, 0.0, 0.0)):
            result = match_boxes(boxes, valid, *given_gt, *thresholds)
            assert torch.equal(result, torch.where(valid, NEGATIVE, IGNORED))


def test_non_contiguous_input(device):
    inputs = problem(3, 90, 8, True)
    expected = reference(*inputs, *RPN)
    spread = [tensor.transpose(0, 1).contiguous().transpose(0, 1).to(device) for tensor in inputs]
    last = inputs[0].permute(2, 0, 1).contiguous().permute(1, 2, 0).to(device)
    shifted = torch.cat([torch.zeros(1), inputs[0].flatten()]).to(device)[1:].view_as(inputs[0])
    assert_same(match_boxes(*spread, *RPN), expected)
    assert_same(match_boxes(last, *spread[1:], *RPN), expected)
    assert_same(match_boxes(shifted, *spread[1:], *RPN), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_dtypes_are_read_as_float32(device, dtype):
    boxes, valid, gt_boxes, gt_valid = problem(1, 100, 5, False)
    boxes, gt_boxes = boxes.to(dtype), gt_boxes.to(dtype)
    expected = reference(boxes.float(), valid, gt_boxes.float(), gt_valid, *RPN)
    assert_same(match_boxes(*(tensor.to(device) for tensor in (boxes, valid, gt_boxes, gt_valid)), *RPN), expected)


def test_no_gradient():
    boxes, valid, gt_boxes, gt_valid = problem(1, 20, 5, False)
    assert not match_boxes(boxes.requires_grad_(), valid, gt_boxes.requires_grad_(), gt_valid, *RPN).requires_grad


def test_same_result_for_any_number_of_threads():
    inputs = problem(1, 5000, 40, True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(match_boxes(*inputs, *RPN))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(("name", "index"), [("boxes", 0), ("gt_boxes", 2)])
def test_box_that_is_not_finite(device, kernels, name, index):
    inputs = list(problem(2, 30, 6, False))
    inputs[index + 1][:] = True
    inputs[index][1, 4, 2] = float("nan")
    if kernels == "cpu":
        with pytest.raises(RuntimeError, match=f"match_boxes: {name} must be finite in valid rows; see image 1, row 4"):
            match_boxes(*inputs, *RPN)
    else:
        result = match_boxes(*(tensor.to(device) for tensor in inputs), *RPN).cpu()
        inputs[index][1, 4] = 0.0  # without area: IoU 0 with everything
        assert torch.equal(result, reference(*inputs, *RPN))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": torch.zeros(3, 4)}, r"boxes must have shape \[N, P, 4\], got \[3, 4\]"),
        ({"valid": torch.ones(2, 4, dtype=torch.bool)}, r"valid must have shape \[N, P\] = \[2, 3\], got \[2, 4\]"),
        ({"valid": torch.ones(2, 3)}, "valid must have dtype Bool, got Float"),
        ({"gt_boxes": torch.zeros(2, 5, 3)}, r"gt_boxes must have shape \[N, G, 4\], got \[2, 5, 3\]"),
        ({"gt_valid": torch.ones(2, 4).bool()}, r"gt_valid must have shape \[N, G\] = \[2, 5\], got \[2, 4\]"),
        (
            {"gt_boxes": torch.zeros(1, 5, 4), "gt_valid": torch.ones(1, 5).bool()},
            "gt_boxes must have the batch size of boxes, 2, got 1",
        ),
        ({"positive_iou": 1.5}, r"positive_iou must be in \[0, 1\], got 1.5"),
        ({"positive_iou": float("nan")}, r"positive_iou must be in \[0, 1\], got -?nan"),
        ({"negative_iou": 0.8}, r"negative_iou must be in \[0, positive_iou\], got 0.8 with positive_iou 0.7"),
        ({"low_quality_iou": -0.5}, r"low_quality_iou must be in \[0, 1\] or None, got -0.5"),
    ],
)
def test_errors(device, changes, message):
    arguments = {"boxes": torch.zeros(2, 3, 4), "valid": torch.ones(2, 3).bool()}
    arguments |= {"gt_boxes": torch.zeros(2, 5, 4), "gt_valid": torch.ones(2, 5).bool()}
    arguments |= {"positive_iou": 0.7, "negative_iou": 0.3, "low_quality_iou": 0.3} | changes
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    with pytest.raises(RuntimeError, match="match_boxes: " + message):
        match_boxes(**moved)


def test_opcheck(device):
    inputs = tuple(tensor.to(device) for tensor in problem(2, 20, 3, False))
    permuted = tuple(tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in inputs)
    empty = (inputs[0][:, :0], inputs[1][:, :0], *inputs[2:])
    for given_inputs in (inputs, permuted, empty):
        for low_quality in (0.3, None):
            torch.library.opcheck(torch.ops.cascadeops.match_boxes.default, (*given_inputs, 0.7, 0.3, low_quality))


def test_compiles_and_exports(device):
    def positives(*inputs):
        return match_boxes(*inputs, *RPN) >= 0

    class Positives(torch.nn.Module):
        def forward(self, *inputs):
            return positives(*inputs)

    inputs = tuple(tensor.to(device) for tensor in problem(2, 20, 3, False))
    expected = positives(*inputs)
    assert torch.equal(torch.compile(positives, fullgraph=True, backend="aot_eager")(*inputs), expected)
    assert torch.equal(torch.export.export(Positives(), inputs).module()(*inputs), expected)


def test_autocast_changes_nothing(device):
    inputs = tuple(tensor.to(device) for tensor in problem(2, 200, 9, False))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        result = match_boxes(*inputs, *RPN)
    assert torch.equal(result, match_boxes(*inputs, *RPN))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_does_not_wait_for_the_device():
    inputs = tuple(tensor.cuda() for tensor in problem(2, 200, 9, False))
    torch.cuda.set_sync_debug_mode("error")
    try:
        match_boxes(*inputs, *RPN)
    finally:
        torch.cuda.set_sync_debug_mode("default")
