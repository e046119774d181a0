"""padded_nms: greedy NMS of a batch with groups, padding and a fixed capacity."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from cascadeops import padded_nms
from cascadeops.reference.padded_nms import iou_with
from cascadeops.reference.padded_nms import padded_nms as reference

GOLDENS = np.load(Path(__file__).with_name("goldens") / "ops.npz")
INFINITY, NAN = float("inf"), float("nan")


def random_rows(batch, rows, extent=100.0, integers=False):
    """Boxes that overlap a good deal; with integers, scores are often equal and IoUs often meet a threshold exactly."""
    corner, size = torch.rand(batch, rows, 2) * extent, torch.rand(batch, rows, 2) * extent / 3
    scores = torch.rand(batch, rows)
    if integers:
        corner, size, scores = corner.round(), size.round(), (scores * 10).round() / 10
    return torch.cat([corner, corner + size], -1), scores


def assert_same(result, expected):
    for got, want in zip(result, expected, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("threshold", [0.0, 1 / 3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("rows", [1, 15, 17, 300])
def test_equals_reference(device, poisoned_memory, rows, integers, threshold):
    boxes, scores = random_rows(3, rows, integers=integers)
    scores[torch.rand(3, rows) < 0.1] = -INFINITY
    groups = torch.randint(-2, 3, (3, rows)) * 10**12
    for group, max_output in itertools.product((None, groups), (7, rows + 5)):
        given = None if group is None else group.to(device)
        result = padded_nms(boxes.to(device), scores.to(device), given, threshold, max_output)
        assert_same(result, reference(boxes, scores, group, threshold, max_output))


def test_kept_boxes_do_not_overlap_and_dropped_boxes_overlap_a_better_one(device):
    boxes, scores = random_rows(1, 400)
    index, count = padded_nms(boxes.to(device), scores.to(device), None, 0.4, 400)
    kept = index[0, : count[0]].tolist()
    assert scores[0, kept].tolist() == sorted(scores[0, kept].tolist(), reverse=True)
    exact = boxes[0].double()
    for row in range(400):
        better = [other for other in kept if scores[0, other] > scores[0, row]]
        assert (row in kept) == (not (iou_with(exact[row], exact[better]) > 0.4).any())


def test_equals_mmdetection(device):
    boxes, scores, classes = (
        torch.from_numpy(GOLDENS[f"nms_{name}"])[None].to(device) for name in ("boxes", "scores", "cls")
    )
    for groups, threshold, key in (
        (None, 0.5, "nms_keep_05"),
        (classes, 0.5, "bnms_keep_05"),
        (classes, 0.7, "bnms_keep_07"),
    ):
        index, count = padded_nms(boxes, scores, groups, threshold, 600)
        assert index[0, : count[0]].tolist() == GOLDENS[key].tolist(), key


def test_by_hand(device):
    # Row 1 is row 0 moved by a third of its width: IoU = 20 / 40. Row 2 stands alone. Row 3 is padding.
    boxes = torch.tensor([[[0, 0, 3, 10], [1, 0, 4, 10], [50, 50, 60, 60], [0, 0, 9, 9]]], dtype=torch.float32)
    scores = torch.tensor([[0.8, 0.9, 0.3, -INFINITY]])
    for threshold, expected in ((0.49, [1, 2, -1]), (0.5, [1, 0, 2])):  # equal to the threshold: kept
        index, count = padded_nms(boxes.to(device), scores.to(device), None, threshold, 3)
        assert index.tolist() == [expected]
        assert count.tolist() == [3 - expected.count(-1)]


def test_decides_one_float32_step_around_the_threshold(device):
    # The second box is the left part of the first: IoU = x / 1000 with x one step below, at and above 700.
    at = torch.tensor(700.0)
    edges = torch.stack([at.nextafter(torch.tensor(0.0)), at, at.nextafter(torch.tensor(INFINITY))])
    boxes = torch.tensor([0.0, 0.0, 1000.0, 1000.0]).repeat(3, 2, 1)
    boxes[:, 1, 2] = edges
    scores = torch.tensor([0.9, 0.8]).repeat(3, 1)
    assert padded_nms(boxes.to(device), scores.to(device), None, 0.7, 2)[1].tolist() == [2, 2, 1]


def test_decides_where_float32_overflows_and_underflows(device):
    # 3.5e-24: of the areas only that of the first box is not 0; 2.4e18: only that one overflows.
    scale = torch.tensor([1e-30, 3.5e-24, 1.0, 2.4e18, 1e30])[:, None, None]
    boxes = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 5], [0, 0, 4, 8]]) * scale  # IoU with the first: 5/8, 1/2
    scores = torch.tensor([0.9, 0.8, 0.7]).repeat(5, 1)
    index, _ = padded_nms(boxes.to(device), scores.to(device), None, 0.6, 3)
    assert index.tolist() == [[0, 2, -1]] * 5


def test_threshold_too_small_for_float32(device):
    boxes = torch.tensor([[[0.0, 0, 1e5, 1e5], [0, 0, 1e-15, 1.7e-20]]])  # IoU 1.7e-45; float32 has 1.4e-45 and 2.8e-45
    scores = torch.tensor([[0.9, 0.8]])
    counts = [padded_nms(boxes.to(device), scores.to(device), None, t, 2)[1].item() for t in (1.6e-45, 2.0e-45)]
    assert counts == [1, 2]


@pytest.mark.parametrize(("rows", "groups", "max_output"), [(3000, 40, 3000), (3000, 1000, 1100), (5000, 3, 1500)])
def test_many_groups_and_a_large_capacity(device, rows, groups, max_output):
    """Where CUDA shares the groups of an image out among blocks, and the CPU looks only at cells near a candidate."""
    boxes, scores = random_rows(2, rows, extent=400.0)
    scores[torch.rand(2, rows) < 0.1] = -INFINITY
    scores[1, rows // 4 :] = -INFINITY
    scores[0] = (scores[0] * 500).round() / 500
    group = torch.randint(groups, (2, rows)) * 3 - 7
    index, count = (x.cpu() for x in padded_nms(*(x.to(device) for x in (boxes, scores, group)), 0.4, max_output))
    for image in range(2):
        kept = strike_out(boxes[image].double(), scores[image], group[image], 0.4)[:max_output]
        assert index[image].tolist() == kept + [-1] * (max_output - len(kept))
        assert count[image] == len(kept)


def strike_out(boxes, scores, groups, threshold):
    """The reference's result by another order of work, fast enough for thousands: each kept box strikes out others."""
    struck, kept = scores == -INFINITY, []
    for row in scores.sort(descending=True, stable=True).indices.tolist():
        if not struck[row]:
            kept.append(row)
            struck |= (iou_with(boxes[row], boxes) > threshold) & (groups == groups[row])
    return kept


@pytest.mark.parametrize(
    ("rows", "max_output", "extent"), [(1025, 129, 200.0), (2300, 800, 160.0), (2300, 1500, 1e5), (3100, 4000, 600.0)]
)
def test_large_images_that_go_in_rounds(device, poisoned_memory, rows, max_output, extent):
    """A CUDA device takes 1024 candidates at a time; images end in any round, by rows or by capacity."""
    corner, size = torch.rand(2, rows, 2) * extent, torch.rand(2, rows, 2) * 60 + 5
    boxes, scores = torch.cat([corner, corner + size], -1), (torch.rand(2, rows) * rows).round() / rows
    scores[1, torch.rand(rows) < 0.4] = -INFINITY
    for groups in (torch.zeros(2, rows, dtype=torch.int64), torch.randint(-1, 2, (2, rows))):
        given = groups.to(device) if groups.any() else None
        index, count = padded_nms(boxes.to(device), scores.to(device), given, 0.5, max_output)
        for image in range(2):
            kept = strike_out(boxes[image].double(), scores[image], groups[image], 0.5)[:max_output]
            assert index[image].tolist() == kept + [-1] * (max_output - len(kept))
            assert count[image] == len(kept)


def test_boxes_without_area_overlap_nothing(device):
    boxes = torch.tensor([[[5.0, 5, 5, 9], [5, 5, 5, 9], [0, 0, 10, 10], [8, 8, 2, 2], [8, 8, 2, 2], [4, 4, 4, 4]]])
    scores = torch.linspace(1, 0.5, 6)[None]
    assert padded_nms(boxes.to(device), scores.to(device), None, 0.0, 6)[0].tolist() == [[0, 1, 2, 3, 4, 5]]


def test_groups_do_not_suppress_each_other(device):
    boxes = torch.tensor([0.0, 0.0, 10.0, 10.0]).repeat(1, 5, 1)
    scores = torch.linspace(0.5, 0.9, 5)[None]
    groups = torch.tensor([[2**62, -(2**62), 0, 2**62, 0]])
    assert padded_nms(boxes.to(device), scores.to(device), groups.to(device), 0.5, 5)[0].tolist() == [[4, 3, 1, -1, -1]]


def test_equal_scores_go_by_row_and_both_zeros_are_equal(device):
    boxes = torch.tensor([0.0, 0.0, 10.0, 10.0]).repeat(1, 4, 1) + 20 * torch.arange(4)[None, :, None]
    scores = torch.tensor([[-0.0, 1.0, 0.0, 1.0]])
    assert padded_nms(boxes.to(device), scores.to(device), None, 0.5, 4)[0].tolist() == [[1, 3, 0, 2]]


def test_capacity_cuts_and_nothing_else(device):
    boxes, scores = (tensor.to(device) for tensor in random_rows(2, 200))
    index, count = padded_nms(boxes, scores, None, 0.5, 200)
    for max_output in (0, 1, 50):
        short, short_count = padded_nms(boxes, scores, None, 0.5, max_output)
        assert torch.equal(short, index[:, :max_output])
        assert torch.equal(short_count, count.clamp(max=max_output))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_empty(device, shape):
    index, count = padded_nms(torch.zeros(*shape, 4).to(device), torch.zeros(shape).to(device), None, 0.5, 3)
    assert index.tolist() == [[-1] * 3] * shape[0]
    assert count.tolist() == [0] * shape[0]


def test_padding_rows_are_not_looked_at(device):
    boxes, scores = random_rows(1, 20)
    scores[0, 5:] = -INFINITY
    expected = reference(boxes, scores, None, 0.5, 20)
    boxes[0, 5:] = NAN
    assert_same(padded_nms(boxes.to(device), scores.to(device), None, 0.5, 20), expected)


def test_non_contiguous_and_unaligned_input(device):
    boxes, scores = random_rows(2, 40)
    groups = torch.randint(0, 3, (2, 40), dtype=torch.int32)
    expected = reference(boxes, scores, groups, 0.5, 40)
    spread = boxes.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    shifted = torch.cat([torch.zeros(1), boxes.flatten()])[1:].view_as(boxes)  # starts at the second float
    for given in (spread, shifted):
        strided = scores.repeat_interleave(2, 1)[:, ::2]
        assert_same(
            padded_nms(given.to(device), strided.to(device), groups.T.contiguous().T.to(device), 0.5, 40), expected
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_dtypes_are_read_as_float32(device, dtype):
    boxes, scores = (tensor.to(dtype) for tensor in random_rows(1, 100))
    expected = reference(boxes.float(), scores.float(), None, 0.5, 100)
    assert_same(padded_nms(boxes.to(device), scores.to(device), None, 0.5, 100), expected)


def test_input_that_requires_grad_gives_a_result_without():
    boxes, scores = random_rows(1, 10)
    index, count = padded_nms(boxes.requires_grad_(), scores.requires_grad_(), None, 0.5, 10)
    assert not index.requires_grad and not count.requires_grad


def test_same_result_for_any_number_of_threads():
    boxes, scores = random_rows(5, 200)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(padded_nms(boxes, scores, None, 0.5, 200))
    finally:
        torch.set_num_threads(before)
    assert_same(*results)


@pytest.mark.parametrize(("place", "value"), [("scores", NAN), ("boxes", NAN), ("boxes", INFINITY)])
def test_faulty_row_is_an_error_on_the_cpu_and_skipped_on_cuda(device, kernels, place, value):
    boxes, scores = random_rows(2, 30)
    without = scores.clone()
    without[1, 7] = -INFINITY
    expected = reference(boxes, without, None, 0.5, 30)
    {"scores": scores[1, 7:8], "boxes": boxes[1, 7, 2:3]}[place].fill_(value)
    if kernels == "cpu":
        with pytest.raises(RuntimeError, match=r"boxes must be finite and scores not NaN; see image 1, row 7"):
            padded_nms(boxes, scores, None, 0.5, 30)
    else:
        assert_same(padded_nms(boxes.to(device), scores.to(device), None, 0.5, 30), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": torch.zeros(4, 4)}, r"padded_nms: boxes must have shape \[B, N, 4\], got \[4, 4\]"),
        ({"boxes": torch.zeros(2, 3, 5)}, r"boxes must have shape \[B, N, 4\], got \[2, 3, 5\]"),
        ({"scores": torch.zeros(2, 4)}, r"scores must have shape \[B, N\] = \[2, 3\], got \[2, 4\]"),
        ({"groups": torch.zeros(3, 2, dtype=torch.int64)}, r"groups must have shape \[B, N\] = \[2, 3\], got \[3, 2\]"),
        ({"iou_threshold": 1.5}, r"iou_threshold must be in \[0, 1\], got 1.5"),
        ({"iou_threshold": NAN}, r"iou_threshold must be in \[0, 1\], got"),
        ({"max_output": -1}, r"max_output must be in \[0, 2\*\*31\), got -1"),
    ],
)
def test_errors(device, changes, message):
    arguments = {"boxes": torch.zeros(2, 3, 4), "scores": torch.zeros(2, 3), "groups": None}
    arguments |= {"iou_threshold": 0.5, "max_output": 3} | changes
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    with pytest.raises(RuntimeError, match=message):
        padded_nms(**moved)


def test_operator_itself_takes_float32_and_int64_only():
    boxes, scores = random_rows(1, 3)
    with pytest.raises(RuntimeError, match="scores must have dtype Float, got Half"):
        torch.ops.cascadeops.padded_nms(boxes, scores.half(), None, 0.5, 3)
    with pytest.raises(RuntimeError, match="groups must have dtype Long, got Int"):
        torch.ops.cascadeops.padded_nms(boxes, scores, torch.zeros(1, 3, dtype=torch.int32), 0.5, 3)


def test_opcheck(device):
    boxes, scores = (tensor.to(device) for tensor in random_rows(2, 20))
    groups = torch.zeros(2, 20, dtype=torch.int64, device=device)
    permuted = boxes.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    operator = torch.ops.cascadeops.padded_nms.default
    for given_boxes, rows in ((boxes, 20), (permuted, 20), (boxes[:, :0], 0)):
        for given_groups in (None, groups[:, :rows]):
            torch.library.opcheck(operator, (given_boxes, scores[:, :rows], given_groups, 0.5, 7))


def test_compiles_without_a_graph_break_and_exports(device):
    class Kept(torch.nn.Module):
        def forward(self, boxes, scores):
            return padded_nms(boxes, scores, None, 0.5, 7)

    boxes, scores = (tensor.to(device) for tensor in random_rows(2, 20))
    expected = [tensor.cpu() for tensor in padded_nms(boxes, scores, None, 0.5, 7)]
    compiled = torch.compile(padded_nms, fullgraph=True, backend="aot_eager")
    assert_same(compiled(boxes, scores, None, 0.5, 7), expected)
    assert_same(torch.export.export(Kept(), (boxes, scores)).module()(boxes, scores), expected)


def test_autocast_changes_nothing(device):
    boxes, scores = (tensor.to(device) for tensor in random_rows(2, 200))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        result = padded_nms(boxes, scores, None, 0.5, 100)
    assert_same(result, [tensor.cpu() for tensor in padded_nms(boxes, scores, None, 0.5, 100)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_does_not_wait_for_the_device():
    boxes, scores = (tensor.cuda() for tensor in random_rows(2, 20))
    torch.cuda.set_sync_debug_mode("error")
    try:
        padded_nms(boxes, scores, None, 0.5, 7)
    finally:
        torch.cuda.set_sync_debug_mode("default")
