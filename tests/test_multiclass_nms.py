"""multiclass_nms: NMS of every class and image in one call."""

import pytest
import torch

from cascadeops import multiclass_nms, padded_nms
from cascadeops.reference.multiclass_nms import multiclass_nms as reference

INFINITY, NAN = float("inf"), float("nan")


def random_rows(batch, rows, classes, box_per_class=False, integers=False):
    shape = (batch, rows, classes if box_per_class else 1, 2)
    corner, size = torch.rand(shape) * 100, torch.rand(shape) * 40
    scores = torch.rand(batch, rows, classes)
    if integers:
        corner, size, scores = corner.round(), size.round(), (scores * 10).round() / 10
    return torch.cat([corner, corner + size], -1).flatten(2), scores


def assert_same(result, expected):
    for got, want in zip(result, expected, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("max_detections", [0, 9, 500])
@pytest.mark.parametrize("box_per_class", [False, True])
@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (33, 4), (90, 3)])
def test_equals_reference(device, poisoned_memory, rows, classes, integers, box_per_class, max_detections):
    boxes, scores = random_rows(2, rows, classes, box_per_class, integers)
    result = multiclass_nms(boxes.to(device), scores.to(device), 0.3, 0.5, max_detections)
    assert_same(result, reference(boxes, scores, 0.3, 0.5, max_detections))


def test_is_padded_nms_of_the_pairs_with_classes_as_groups(device):
    boxes, scores = (tensor.to(device) for tensor in random_rows(2, 60, 5, box_per_class=True))
    labels = torch.arange(5, device=device).expand(2, 60, 5).flatten(1)
    index, count = padded_nms(boxes.view(2, 300, 4), scores.flatten(1), labels, 0.4, 300)
    result = multiclass_nms(boxes, scores, -1.0, 0.4, 300)
    assert torch.equal(result[3] * 5 + result[2], torch.where(index < 0, -6, index))
    assert torch.equal(result[4], count)


def test_by_hand(device):
    # Rows 0 and 1 overlap: class 0 keeps the better one, class 1 has only row 1, row 2 fails the (strict) threshold.
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 1, 10, 11], [50, 50, 60, 60]]])
    scores = torch.tensor([[[0.9, 0.1], [0.8, 0.7], [0.5, 0.5]]])
    result = multiclass_nms(boxes.to(device), scores.to(device), 0.5, 0.5, 3)
    assert result[0].tolist() == [[[0, 0, 10, 10], [0, 1, 10, 11], [0, 0, 0, 0]]]
    assert result[1].cpu().equal(torch.tensor([[0.9, 0.7, -INFINITY]]))
    assert [tensor.tolist() for tensor in result[2:]] == [[[0, 1, -1]], [[0, 1, -1]], [2]]


def test_equal_scores_go_by_row_then_class(device):
    boxes = torch.tensor([[[0.0, 0, 10, 10], [50, 0, 60, 10]]])
    result = multiclass_nms(boxes.to(device), torch.ones(1, 2, 2).to(device), 0.5, 0.5, 4)
    assert (result[3] * 2 + result[2]).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
def test_empty(device, shape):
    result = multiclass_nms(torch.zeros(*shape[:2], 4).to(device), torch.zeros(shape).to(device), 0.5, 0.5, 3)
    assert_same(result, reference(torch.zeros(*shape[:2], 4), torch.zeros(shape), 0.5, 0.5, 3))


def test_nothing_above_the_threshold(device):
    boxes, scores = random_rows(2, 10, 3)
    result = multiclass_nms(boxes.to(device), scores.to(device), 1.0, 0.5, 3)
    assert result[4].tolist() == [0, 0]
    assert_same(result, reference(boxes, scores, 1.0, 0.5, 3))


def test_padding_rows_are_not_looked_at(device):
    boxes, scores = random_rows(1, 20, 3)
    scores[0, 5:] = -INFINITY
    expected = reference(boxes, scores, -INFINITY, 0.5, 20)
    boxes[0, 5:] = NAN
    assert_same(multiclass_nms(boxes.to(device), scores.to(device), -INFINITY, 0.5, 20), expected)


def test_non_contiguous_input(device):
    boxes, scores = random_rows(2, 30, 3, box_per_class=True)
    expected = reference(boxes, scores, 0.3, 0.5, 20)
    with_background = torch.cat([scores, torch.ones(2, 30, 1)], -1)[..., :-1]  # as after a softmax with background
    spread = boxes.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert_same(multiclass_nms(spread.to(device), with_background.to(device), 0.3, 0.5, 20), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_dtypes_are_read_as_float32(device, dtype):
    boxes, scores = (tensor.to(dtype) for tensor in random_rows(1, 40, 3))
    expected = reference(boxes.float(), scores.float(), 0.3, 0.5, 20)
    assert_same(multiclass_nms(boxes.to(device), scores.to(device), 0.3, 0.5, 20), expected)


@pytest.mark.parametrize(("place", "value"), [("scores", NAN), ("boxes", NAN), ("boxes", -INFINITY)])
def test_faulty_candidate_is_an_error_on_the_cpu_and_skipped_on_cuda(device, kernels, place, value):
    boxes, scores = random_rows(2, 30, 2, box_per_class=True)
    scores[1, 7] = torch.tensor([0.9, 0.1])
    without = scores.clone()
    without[1, 7, 0] = -INFINITY
    expected = reference(boxes, without, 0.3, 0.5, 30)
    {"scores": scores[1, 7, 0:1], "boxes": boxes[1, 7, 2:3]}[place].fill_(value)
    if kernels == "cpu":
        with pytest.raises(RuntimeError, match=r"boxes must be finite and scores not NaN; see image 1, row 7"):
            multiclass_nms(boxes, scores, 0.3, 0.5, 30)
    else:
        assert_same(multiclass_nms(boxes.to(device), scores.to(device), 0.3, 0.5, 30), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": torch.zeros(2, 3)}, r"multiclass_nms: scores must have shape \[B, N, C\], got \[2, 3\]"),
        (
            {"boxes": torch.zeros(2, 3, 12)},
            r"boxes must have shape \[B, N, 4\] or \[B, N, C \* 4\], .* got \[2, 3, 12\]",
        ),
        ({"boxes": torch.zeros(2, 4, 4)}, r"with scores \[2, 3, 5\], got \[2, 4, 4\]"),
        ({"score_threshold": NAN}, "score_threshold must be a number, got NaN"),
        ({"iou_threshold": -0.1}, r"iou_threshold must be in \[0, 1\], got -0.1"),
        ({"max_detections": -1}, r"max_detections must be in \[0, 2\*\*31\), got -1"),
    ],
)
def test_errors(device, changes, message):
    arguments = {"boxes": torch.zeros(2, 3, 4), "scores": torch.zeros(2, 3, 5), "score_threshold": 0.5}
    arguments |= {"iou_threshold": 0.5, "max_detections": 3} | changes
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    with pytest.raises(RuntimeError, match=message):
        multiclass_nms(**moved)


def test_opcheck(device):
    operator = torch.ops.cascadeops.multiclass_nms.default
    for box_per_class in (False, True):
        boxes, scores = (tensor.to(device) for tensor in random_rows(2, 20, 3, box_per_class))
        permuted = [tensor.permute(2, 0, 1).contiguous().permute(1, 2, 0) for tensor in (boxes, scores)]
        for inputs in ((boxes, scores), permuted, (boxes[:, :0], scores[:, :0])):
            torch.library.opcheck(operator, (*inputs, 0.3, 0.5, 7))


def test_compiles_without_a_graph_break_and_exports(device):
    class Detections(torch.nn.Module):
        def forward(self, boxes, scores):
            return multiclass_nms(boxes, scores, 0.3, 0.5, 7)

    boxes, scores = (tensor.to(device) for tensor in random_rows(2, 20, 3))
    compiled = torch.compile(multiclass_nms, fullgraph=True, backend="aot_eager")
    expected = [tensor.cpu() for tensor in multiclass_nms(boxes, scores, 0.3, 0.5, 7)]
    assert_same(compiled(boxes, scores, 0.3, 0.5, 7), expected)
    assert_same(torch.export.export(Detections(), (boxes, scores)).module()(boxes, scores), expected)


def test_autocast_changes_nothing(device):
    boxes, scores = (tensor.to(device) for tensor in random_rows(2, 50, 3))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        result = multiclass_nms(boxes, scores, 0.3, 0.5, 70)
    assert_same(result, [tensor.cpu() for tensor in multiclass_nms(boxes, scores, 0.3, 0.5, 70)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_does_not_wait_for_the_device():
    boxes, scores = (tensor.cuda() for tensor in random_rows(2, 20, 3))
    torch.cuda.set_sync_debug_mode("error")
    try:
        multiclass_nms(boxes, scores, 0.3, 0.5, 7)
    finally:
        torch.cuda.set_sync_debug_mode("default")
