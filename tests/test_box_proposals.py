"""box_proposals: the tail of a region proposal network for a batch."""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascadeops import box_proposals
from cascadeops.reference.box_proposals import box_proposals as reference

EXAMPLES = int(os.environ.get("CASCADEOPS_EXAMPLES", 50))


def random_levels(batch, rows, extent=100.0, ties=False):
    """(logits, deltas, anchors) of levels with so many anchors; with ties, many logits are equal."""
    logits = [torch.randn(batch, count) * 2 for count in rows]
    if ties:
        logits = [level.round() for level in logits]
    deltas = [torch.randn(batch, count, 4) * 0.4 for count in rows]
    corners = [torch.rand(count, 2) * extent - 10 for count in rows]
    anchors = [torch.cat([corner, corner + torch.rand_like(corner) * extent / 2], 1) for corner in corners]
    return logits, deltas, anchors


def moved(levels, device):
    return [[tensor.to(device) for tensor in tensors] for tensors in levels]


def assert_same(result, expected):
    for got, want in zip(result, expected, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("top_k", "max_proposals"), [(1, 5), (40, 60), (1000, 1000), (63, 0)])
@pytest.mark.parametrize("rows", [(1,), (300, 75, 19), (129, 64, 0, 3)])
def test_equals_reference(device, poisoned_memory, rows, top_k, max_proposals, ties):
    levels = random_levels(2, rows, ties=ties)
    sizes = torch.tensor([[90, 110], [64, 50]])
    stds = (0.5, 1.0, 0.7, 0.9)
    result = box_proposals(*moved(levels, device), sizes.to(device), top_k, max_proposals, 0.5, stds)
    assert_same(result, reference(*levels, sizes, top_k, max_proposals, 0.5, stds))


def test_equals_the_float64_formulas_to_rounding(device):
    levels, sizes = random_levels(2, (200, 50)), torch.tensor([[90, 110], [64, 50]])
    exact = reference(*[[tensor.double() for tensor in tensors] for tensors in levels], sizes, 30, 40, 0.5)
    boxes, scores, count = box_proposals(*moved(levels, device), sizes.to(device), 30, 40, 0.5)
    assert torch.equal(count.cpu(), exact[2])
    torch.testing.assert_close(boxes.cpu().double(), exact[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.cpu().double(), exact[1], atol=1e-7, rtol=0)


def test_top_k_of_a_long_level(device):
    """Far apart anchors are all kept, so the result is the top-k itself, whatever the order of the logits."""
    count, top_k = 20_000, 700
    x, y = torch.arange(count) % 200 * 10.0, torch.arange(count) // 200 * 10.0
    anchors = torch.stack([x, y, x + 5, y + 5], 1)
    values = torch.randn(count)
    for logits in (values, values.sort().values, values.sort(descending=True).values, values.round(), values * 0):
        deltas, sizes = torch.zeros(1, count, 4), torch.tensor([[4000, 4000]])
        levels = [logits[None]], [deltas], [anchors]
        boxes, scores, found = box_proposals(*moved(levels, device), sizes.to(device), top_k, 2000, 0.5)
        top = logits.sort(descending=True, stable=True).indices[:top_k]
        assert found.item() == top_k and boxes.shape == (1, top_k, 4)
        assert torch.equal(boxes[0].cpu(), anchors[top])
        torch.testing.assert_close(scores[0].cpu(), logits[top].sigmoid())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 700, 4500])
def test_levels_of_every_length(device, poisoned_memory, dtype, top_k):
    """A CUDA device cuts levels of more than 4096 rows; here among levels that it does not cut, and that go whole."""
    logits, deltas, anchors = random_levels(2, (4097, 300, 9000, 4096, 5), extent=3000.0)
    logits[2][0] = logits[2][0].abs() * 1e-3 + 1  # the first bits of these decide nothing
    levels = [level.to(dtype) for level in logits], [level.to(dtype) for level in deltas], anchors
    sizes = torch.tensor([[3000, 3100], [2000, 2500]])
    result = box_proposals(*moved(levels, device), sizes.to(device), top_k, 60, 0.5)
    single = [level.float() for level in levels[0]], [level.float() for level in levels[1]], anchors
    assert_same(result, reference(*single, sizes, top_k, 60, 0.5))


def test_a_level_of_32_chunks(device):
    """The most there are, so each is longer than 4096 rows. Far apart anchors are all kept."""
    count, top_k = 135_000, 300
    left = torch.arange(count) * 10.0
    anchors = torch.stack([left, left * 0, left + 5, left * 0 + 5], 1)
    logits = (torch.randn(count) * 50).round() / 50
    levels, sizes = ([logits[None]], [torch.zeros(1, count, 4)], [anchors]), torch.tensor([[10, 2_000_000]])
    boxes, _, found = box_proposals(*moved(levels, device), sizes.to(device), top_k, top_k, 0.5)
    best = logits.sort(descending=True, stable=True).indices[:top_k]
    assert found.item() == top_k and torch.equal(boxes[0].cpu(), anchors[best])


def test_by_hand(device):
    # Level 0: anchor 0 moves right by half its width and grows e-fold; anchor 1 is anchor 2's double, and worse.
    # Level 1: the same box as anchor 2 stays, as levels do not meet; an anchor outside the image has no area.
    logits = [torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.5, 9.0]])]
    deltas = [torch.zeros(1, 3, 4), torch.zeros(1, 2, 4)]
    deltas[0][0, 0] = torch.tensor([0.5, 0, 1, 1])
    anchors = [
        torch.tensor([[100.0, 100, 120, 120], [0, 0, 10, 10], [0, 0, 10, 10]]),
        torch.tensor([[0.0, 0, 10, 10], [300, 0, 310, 10]]),
    ]
    levels, sizes = (logits, deltas, anchors), torch.tensor([[130, 200]])
    boxes, scores, count = box_proposals(*moved(levels, device), sizes.to(device), 10, 4, 0.7)
    half = 10 * math.e
    expected = torch.tensor([[120 - half, 110 - half, 120 + half, 130], [0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 0, 0]])
    torch.testing.assert_close(boxes[0].cpu(), expected)
    assert count.tolist() == [3]
    torch.testing.assert_close(scores[0, :3].cpu(), torch.tensor([2.0, 1.0, 0.5]).sigmoid())
    assert scores[0, 3] == -math.inf


def test_equal_logits_go_by_level_then_anchor(device):
    anchors = [torch.tensor([[0.0, 0, 5, 5], [20, 0, 25, 5]]), torch.tensor([[40.0, 0, 45, 5], [60, 0, 65, 5]])]
    levels = [torch.full((1, 2), 40.0)] * 2, [torch.zeros(1, 2, 4)] * 2, anchors
    levels[0][1] = torch.tensor([[40.0, 41.0]])  # the sigmoid of both is 1
    boxes, scores, _ = box_proposals(*moved(levels, device), torch.tensor([[90, 90]], device=device), 5, 4, 0.5)
    assert boxes[0, :, 0].tolist() == [60, 0, 20, 40]
    assert scores.tolist() == [[1.0] * 4]


def test_growth_is_limited_and_stays_inside_the_image(device):
    levels = [torch.zeros(1, 1)], [torch.tensor([[[0.0, 0, 100, -100]]])], [torch.tensor([[500.0, 500, 516, 516]])]
    boxes, _, _ = box_proposals(*moved(levels, device), torch.tensor([[2000, 2000]], device=device), 1, 1, 0.5)
    torch.testing.assert_close(boxes[0, 0].cpu(), torch.tensor([8.0, 507.872, 1008.0, 508.128]), atol=1e-3, rtol=0)


def test_boxes_that_are_nan_or_without_area_are_left_out(device):
    levels = random_levels(1, (6,))
    levels[1][0][0, 0, 0], levels[1][0][0, 1, 3] = math.nan, math.nan
    levels[1][0][0, 2, 1] = math.inf  # beyond the lower edge
    levels[2][0][3] = torch.tensor([5.0, 5, 5, 9])
    sizes = torch.tensor([[200, 200]])
    result = box_proposals(*moved(levels, device), sizes.to(device), 6, 6, 1.0)
    assert result[2].item() <= 2
    assert_same(result, reference(*levels, sizes, 6, 6, 1.0))


def test_infinite_logits_are_the_best_and_the_worst(device):
    levels = random_levels(1, (50,))
    levels[0][0][0, 7], levels[0][0][0, 3] = math.inf, -math.inf
    sizes = torch.tensor([[200, 200]])
    result = box_proposals(*moved(levels, device), sizes.to(device), 50, 50, 1.0)
    assert_same(result, reference(*levels, sizes, 50, 50, 1.0))
    assert result[1][0, 0] == 1 and result[1][0, result[2] - 1] == 0


def test_nan_logit(device, kernels):
    for rows, top_k in ((50, 60), (3000, 10), (5000, 10)):
        levels = random_levels(2, (20, rows))
        levels[0][1][1, rows - 4] = math.nan
        sizes = torch.tensor([[200, 200], [200, 200]], device=device)
        if kernels == "cpu":
            with pytest.raises(RuntimeError, match=rf"logits must not be NaN; see logits\[1\]\[1, {rows - 4}\]"):
                box_proposals(*levels, sizes, top_k, 50, 0.7)
        else:
            result = box_proposals(*moved(levels, device), sizes, top_k, 50, 0.7)
            levels[2][1][rows - 4] = 0.0  # without area in both images
            levels[0][1][1, rows - 4] = -1e30
            assert_same([x[1] for x in result], [x[1] for x in reference(*levels, sizes.cpu(), top_k, 50, 0.7)])


@st.composite
def problems(draw):
    levels = draw(st.lists(st.integers(0, 30), min_size=1, max_size=4))
    torch.manual_seed(draw(st.integers(0, 2**20)))
    return random_levels(draw(st.integers(1, 2)), levels, draw(st.sampled_from([20.0, 100.0])), draw(st.booleans()))


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    problem=problems(), top_k=st.integers(1, 40), capacity=st.integers(0, 50), threshold=st.sampled_from([0, 0.3, 1])
)
def test_property_equals_reference(problem, top_k, capacity, threshold):
    sizes = torch.tensor([[90, 110], [64, 50]])[: len(problem[0][0])]
    result = box_proposals(*problem, sizes, top_k, capacity, threshold)
    assert_same(result, reference(*problem, sizes, top_k, capacity, threshold))


@pytest.mark.parametrize("batch", [0, 1])
def test_empty(device, batch):
    levels, sizes = random_levels(batch, (0, 0)), torch.full((batch, 2), 50)
    boxes, scores, count = box_proposals(*moved(levels, device), sizes.to(device), 10, 10, 0.5)
    assert boxes.shape == (batch, 0, 4) and scores.shape == (batch, 0) and count.tolist() == [0] * batch
    levels = random_levels(batch, (5,))
    boxes, scores, count = box_proposals(*moved(levels, device), sizes.to(device), 10, 10, 0.5)
    assert boxes.shape == (batch, 5, 4) and scores.shape == (batch, 5) and count.shape == (batch,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [(80, 20), (3001,)])  # half types have equal logits among thousands
def test_other_floating_dtypes_are_read_as_float32(device, dtype, rows):
    levels, sizes = random_levels(1, rows), torch.tensor([[90, 110]])
    levels = [[tensor.to(dtype) for tensor in tensors] for tensors in levels]
    expected = reference(*[[tensor.float() for tensor in tensors] for tensors in levels], sizes, 30, 40, 0.5)
    assert_same(box_proposals(*moved(levels, device), sizes.to(device), 30, 40, 0.5), expected)


def test_half_types_of_two_kinds_are_read_as_float32(device):
    (logits, deltas, anchors), sizes = random_levels(2, (80, 20)), torch.tensor([[90, 110], [64, 50]])
    logits, deltas = [x.half() for x in logits], [x.bfloat16() for x in deltas]
    expected = reference([x.float() for x in logits], [x.float() for x in deltas], anchors, sizes, 30, 40, 0.5)
    assert_same(box_proposals(*moved((logits, deltas, anchors), device), sizes.to(device), 30, 40, 0.5), expected)


def test_operator_itself_takes_one_dtype_of_three(device):
    logits, deltas, anchors = moved(random_levels(1, (8,)), device)
    sizes, rest = torch.ones(1, 2, device=device), (5, 5, 0.5, [1.0] * 4)
    with pytest.raises(RuntimeError, match=r"deltas\[0\] must have dtype Half, got Float"):
        torch.ops.cascadeops.box_proposals([logits[0].half()], deltas, anchors, sizes, *rest)
    with pytest.raises(RuntimeError, match=r"logits\[0\] must have dtype float32, float16 or bfloat16, got Double"):
        torch.ops.cascadeops.box_proposals([logits[0].double()], deltas, anchors, sizes, *rest)


def test_non_contiguous_input(device):
    levels, sizes = random_levels(2, (80, 20)), torch.tensor([[90, 110], [64, 50]])
    expected = reference(*levels, sizes, 30, 40, 0.5)
    spread = [[tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in tensors] for tensors in levels]
    assert_same(box_proposals(*moved(spread, device), sizes.T.contiguous().T.to(device), 30, 40, 0.5), expected)


def test_same_result_for_any_number_of_threads():
    levels, sizes = random_levels(3, (4000, 1000)), torch.tensor([[90, 110]] * 3)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(box_proposals(*levels, sizes, 500, 300, 0.7))
    finally:
        torch.set_num_threads(before)
    for result in results:
        assert_same(result, results[0])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": []}, RuntimeError, "logits must hold 1 to 8 levels, got 0"),
        ({"logits": torch.zeros(2, 3)}, TypeError, "logits must be a list of Tensor, got Tensor"),
        ({"deltas": []}, RuntimeError, "deltas and anchors must hold as many levels as logits, 1, got 0 and 1"),
        ({"logits": [torch.zeros(1, 3)]}, RuntimeError, r"logits\[0\] must have shape \[N, A\] with N = 2, got"),
        ({"deltas": [torch.zeros(2, 3, 5)]}, RuntimeError, r"deltas\[0\] must have shape \[N, A, 4\] = \[2, 3, 4\]"),
        ({"anchors": [torch.zeros(4, 4)]}, RuntimeError, r"anchors\[0\] must have shape \[A, 4\] = \[3, 4\], got"),
        ({"anchors": [torch.zeros(3, 4).int()]}, RuntimeError, "anchors must have a floating dtype, got int32"),
        ({"image_sizes": torch.zeros(2)}, RuntimeError, r"image_sizes must have shape \[N, 2\], got \[2\]"),
        ({"top_k": 0}, RuntimeError, r"top_k must be in \[1, 2\*\*30\), got 0"),
        ({"max_proposals": -1}, RuntimeError, r"max_proposals must be in \[0, 2\*\*31\), got -1"),
        ({"iou_threshold": 1.1}, RuntimeError, r"iou_threshold must be in \[0, 1\], got 1.1"),
        ({"stds": (1.0, 1.0)}, RuntimeError, "stds must be four numbers, got 2"),
        ({"stds": (1.0, 1.0, 0.0, 1.0)}, RuntimeError, "stds must be positive, got 0"),
    ],
)  # fmt: skip
def test_errors(device, changes, error, message):
    arguments = {"logits": [torch.zeros(2, 3)], "deltas": [torch.zeros(2, 3, 4)], "anchors": [torch.zeros(3, 4)]}
    arguments |= {"image_sizes": torch.ones(2, 2), "top_k": 5, "max_proposals": 5, "iou_threshold": 0.5} | changes

    def move(value):
        if isinstance(value, list):
            return [move(item) for item in value]
        return value.to(device) if isinstance(value, torch.Tensor) else value

    with pytest.raises(error, match="box_proposals: " + message):
        box_proposals(**{name: move(value) for name, value in arguments.items()})


def test_no_gradient():
    logits, deltas, anchors = random_levels(1, (20,))
    result = box_proposals(
        [logits[0].requires_grad_()], [deltas[0].requires_grad_()], anchors, torch.ones(1, 2), 5, 5, 0.5
    )
    assert not any(tensor.requires_grad for tensor in result)


def test_opcheck(device):
    levels, sizes = moved(random_levels(2, (20, 6)), device), torch.tensor([[90.0, 110], [64, 50]], device=device)
    spread = [[tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in tensors] for tensors in levels]
    empty = [[tensor[:, :0] for tensor in tensors] for tensors in levels[:2]] + [[t[:0] for t in levels[2]]]
    half = [[tensor.bfloat16() for tensor in tensors] for tensors in levels[:2]] + [levels[2]]
    for given_levels in (levels, spread, empty, half):
        arguments = (*given_levels, sizes, 9, 12, 0.5, [1.0, 1.0, 1.0, 1.0])
        torch.library.opcheck(torch.ops.cascadeops.box_proposals.default, arguments)


def test_compiles_and_exports(device):
    def best(logits, deltas, anchors, sizes):
        return box_proposals(logits, deltas, anchors, sizes, 9, 12, 0.5)

    class Best(torch.nn.Module):
        def forward(self, logits, deltas, anchors, sizes):
            return best(logits, deltas, anchors, sizes)

    inputs = (*moved(random_levels(2, (20, 6)), device), torch.tensor([[90, 110], [64, 50]], device=device))
    expected = [tensor.cpu() for tensor in best(*inputs)]
    assert_same(torch.compile(best, fullgraph=True, backend="aot_eager")(*inputs), expected)
    assert_same(torch.export.export(Best(), inputs).module()(*inputs), expected)


def test_autocast_changes_nothing(device):
    inputs = (*moved(random_levels(2, (200, 60)), device), torch.tensor([[90, 110], [64, 50]], device=device))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        result = box_proposals(*inputs, 50, 60, 0.5)
    assert_same(result, [tensor.cpu() for tensor in box_proposals(*inputs, 50, 60, 0.5)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_does_not_wait_for_the_device():
    inputs = (*moved(random_levels(2, (200, 60)), "cuda"), torch.tensor([[90, 110], [64, 50]], device="cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        box_proposals(*inputs, 50, 60, 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
