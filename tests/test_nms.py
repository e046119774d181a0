"""nms and batched_nms: torchvision's functions, with a result as long as the data asks for."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascadeops import batched_nms, nms
from cascadeops.reference import nms as reference
from cascadeops.reference.padded_nms import iou_with

INFINITY, NAN = float("inf"), float("nan")
EXAMPLES = int(os.environ.get("CASCADEOPS_EXAMPLES", 100))


def random_rows(rows, extent=100.0, integers=False):
    """Boxes that overlap a good deal; with integers, scores are often equal and IoUs often meet a threshold exactly."""
    corner, size = torch.rand(rows, 2) * extent, torch.rand(rows, 2) * extent / 3
    scores = torch.rand(rows)
    if integers:
        corner, size, scores = corner.round(), size.round(), (scores * 10).round() / 10
    return torch.cat([corner, corner + size], -1), scores


def assert_kept(result, expected):
    assert result.dtype == torch.int64
    assert result.tolist() == expected.tolist()


def forward_greedy(boxes, scores, idxs, threshold):
    """The same result by another order of work, fast enough for thousands: each kept box strikes out what follows."""
    order = scores.sort(descending=True, stable=True).indices
    exact, idxs = boxes[order].double(), idxs[order]
    struck, kept = torch.zeros(len(boxes), dtype=torch.bool), []
    for row in range(len(boxes)):
        if not struck[row]:
            kept.append(order[row])
            struck |= (iou_with(exact[row], exact) > threshold) & (idxs == idxs[row])
    return torch.stack(kept)


# ---- the reference


@pytest.mark.parametrize("threshold", [0.0, 1 / 3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 17, 300])
def test_equals_reference(device, poisoned_memory, rows, integers, threshold):
    boxes, scores = random_rows(rows, integers=integers)
    scores[torch.rand(rows) < 0.1] = -INFINITY  # no padding here: the worst score
    idxs = torch.randint(-2, 3, (rows,)) * 10**12
    moved = boxes.to(device), scores.to(device)
    assert_kept(nms(*moved, threshold), reference.nms(boxes, scores, threshold))
    assert_kept(batched_nms(*moved, idxs.to(device), threshold), reference.batched_nms(boxes, scores, idxs, threshold))


@pytest.mark.parametrize("extent", [30.0, 1000.0])
@pytest.mark.parametrize("groups", [1, 3])
def test_equals_reference_where_boxes_lie_in_a_grid_of_cells(device, groups, extent):
    # Large groups look only at cells near a candidate; sizes from a pixel to the image reach over few and over all.
    size = extent ** torch.rand(2000, 2)
    corner = torch.rand(2000, 2) * extent - extent / 2
    boxes, scores = torch.cat([corner, corner + size], 1), torch.rand(2000)
    idxs = torch.randint(groups, (2000,))
    for threshold in (0.0, 0.05, 0.3, 0.9):
        result = batched_nms(boxes.to(device), scores.to(device), idxs.to(device), threshold)
        assert_kept(result, forward_greedy(boxes, scores, idxs, threshold))


@pytest.mark.parametrize("rows", [1024, 1025, 2600])
def test_large_images_that_go_in_rounds(device, poisoned_memory, rows):
    """A CUDA device takes 1024 candidates at a time, compared with all boxes kept before, and among themselves."""
    for extent, threshold in ((50.0, 0.7), (300.0, 0.0), (1000.0, 0.3)):
        boxes, scores = random_rows(rows, extent, integers=extent == 50)
        expected = forward_greedy(boxes, scores, torch.zeros(rows), threshold)
        assert_kept(nms(boxes.to(device), scores.to(device), threshold), expected)
    # A row of boxes each of which would suppress the next: every other one is kept, and decided one after the other.
    left = torch.arange(rows).float()
    chain = torch.stack([left, left * 0, left + 2, left * 0 + 1], 1)
    assert nms(chain.to(device), -left.to(device), 0.3).tolist() == list(range(0, rows, 2))


@st.composite
def crowds(draw):
    """(boxes, scores, idxs): coordinates from a short list, so that duplicates, ties and IoU = threshold are common."""
    scale = draw(st.sampled_from([1.0, 0.1, 1e-20, 1e18, 3e37]))
    row = st.tuples(*[st.integers(-4, 6)] * 4, st.integers(-2, 2), st.sampled_from([0, 1, -(2**63), 2**63 - 1]))
    rows = draw(st.lists(row, min_size=1, max_size=40))
    table = torch.tensor([row[:5] for row in rows], dtype=torch.float32)
    return table[:, :4] * scale, table[:, 4], torch.tensor([row[5] for row in rows])


@settings(max_examples=EXAMPLES, deadline=None)
@given(crowd=crowds(), threshold=st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.75, 1.0]))
def test_property_equals_reference(crowd, threshold):
    assert_kept(batched_nms(*crowd, threshold), reference.batched_nms(*crowd, threshold))


def test_by_hand(device):
    # Row 1 is row 0 moved by a third of its width: IoU = 20 / 40. Row 2 stands alone.
    boxes = torch.tensor([[0, 0, 3, 10], [1, 0, 4, 10], [50, 50, 60, 60]], dtype=torch.float32, device=device)
    scores = torch.tensor([0.8, 0.9, 0.3], device=device)
    assert nms(boxes, scores, 0.49).tolist() == [1, 2]
    assert nms(boxes, scores, 0.5).tolist() == [1, 0, 2]  # equal to the threshold: kept
    assert batched_nms(boxes, scores, torch.tensor([0, 1, 0], device=device), 0.1).tolist() == [1, 0, 2]


def test_equals_what_torchvision_0_26_kept(device):
    arrays = np.load(Path(__file__).parent / "goldens" / "torchvision_nms.npz")
    golden = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    boxes, scores, idxs = (golden[name].to(device) for name in ("boxes", "scores", "idxs"))
    for percent in (30, 50, 70):
        assert_kept(nms(boxes, scores, percent / 100), golden[f"nms_{percent}"])
        assert_kept(batched_nms(boxes, scores, idxs, percent / 100), golden[f"batched_nms_{percent}"])
    many = [golden[f"many_{name}"].to(device) for name in ("boxes", "scores", "idxs")]  # 203 groups, without offsets
    assert_kept(batched_nms(*many, 0.5), golden["many_batched_nms_50"])


@pytest.mark.parametrize("groups", [1, 5, 80])
def test_equals_torchvision(device, groups):
    torchvision = pytest.importorskip("torchvision")
    boxes, scores = (tensor.to(device) for tensor in random_rows(2000, extent=600.0))
    idxs = torch.randint(groups, (2000,), device=device)
    assert_kept(nms(boxes, scores, 0.5), torchvision.ops.nms(boxes, scores, 0.5))
    assert set(batched_nms(boxes, scores, idxs, 0.5).tolist()) == set(
        torchvision.ops.batched_nms(boxes, scores, idxs, 0.5).tolist()
    )


# ---- what other libraries got wrong


def test_equal_scores_go_by_row_on_every_device(device):
    """torchvision #2157: of two equal boxes the CPU kept the first and CUDA the last."""
    boxes = torch.tensor([0.0, 0.0, 10.0, 10.0], device=device).repeat(3, 1)
    assert nms(boxes, torch.ones(3, device=device), 0.5).tolist() == [0]
    assert nms(boxes, torch.ones(3, device=device), 1.0).tolist() == [0, 1, 2]


def test_iou_equal_to_the_threshold_is_kept(device):
    """torchvision PR 1556: >= on one device, > on the other. One float32 step to either side decides."""
    at = torch.tensor(700.0)
    for edge, kept in ((at.nextafter(torch.tensor(0.0)), 2), (at, 2), (at.nextafter(torch.tensor(INFINITY)), 1)):
        boxes = torch.tensor([[0.0, 0, 1000, 1000], [0, 0, edge, 1000]], device=device)
        assert len(nms(boxes, torch.tensor([0.9, 0.8], device=device), 0.7)) == kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_boxes_whose_area_overflows_half(device, dtype):
    """torchvision #3371: float16 areas above 65,504 were infinite; mmcv's nms takes no half type at all."""
    boxes = torch.tensor([[0, 0, 1024, 1024], [0, 0, 1024, 768], [512, 0, 1536, 1024]], dtype=dtype, device=device)
    scores = torch.tensor([0.75, 0.5, 0.25], dtype=dtype, device=device)
    assert nms(boxes, scores, 0.5).tolist() == [0, 2]  # IoU 3/4 and 1/3
    assert batched_nms(boxes, scores, torch.tensor([0, 1, 0], device=device), 0.3).tolist() == [0, 1]


def test_negative_scores_and_an_empty_result_of_a_group(device):
    """pytorch #31568 (a negative dimension from nms_cuda): rows of any sign, and none at all."""
    boxes, scores = random_rows(50)
    result = nms(boxes.to(device), (scores - 2).to(device), 0.5)
    assert_kept(result, reference.nms(boxes, scores - 2, 0.5))
    assert nms(torch.zeros(0, 4, device=device), torch.zeros(0, device=device), 0.5).shape == (0,)
    no_idxs = torch.zeros(0, dtype=torch.int64, device=device)
    assert batched_nms(torch.zeros(0, 4, device=device), torch.zeros(0, device=device), no_idxs, 0.5).shape == (0,)


def test_unsorted_input(device):
    """maskrcnn-benchmark #289: silently wrong where scores were not sorted before."""
    boxes, scores = random_rows(100)
    scores = scores.sort().values
    assert_kept(nms(boxes.to(device), scores.to(device), 0.3), reference.nms(boxes, scores, 0.3))


def test_non_contiguous_input(device):
    """mmcv #2542: strides were not looked at."""
    boxes, scores = random_rows(60)
    spread = torch.stack([boxes.T, boxes.T], 2)[..., 0].T.to(device)
    strided = scores.repeat_interleave(2).to(device)[::2]
    idxs = (torch.arange(120, device=device) % 7)[::2]
    assert not (spread.is_contiguous() or strided.is_contiguous() or idxs.is_contiguous())
    assert_kept(nms(spread, strided, 0.5), reference.nms(boxes, scores, 0.5))
    assert_kept(batched_nms(spread, strided, idxs, 0.5), reference.batched_nms(boxes, scores, idxs.cpu(), 0.5))


def test_many_classes_do_not_round_coordinates(device):
    """Class offsets (mmcv, torchvision): at 1203 classes x 1333 pixels a float32 step is 0.125 pixels.

    IoU is 2.25 / 3.75 = 0.6 here; moved by 1202 * 1334 pixels, the boxes are 3.25 and 2.25 wide or so.
    """
    boxes = torch.tensor([[1000.06, 0, 1003.06, 10], [1000.81, 0, 1003.81, 10], [1330, 0, 1333, 10]], device=device)
    scores = torch.tensor([0.9, 0.8, 0.7], device=device)
    for label in (0, 1202, 2**40):
        idxs = torch.full((3,), label, device=device)
        assert batched_nms(boxes, scores, idxs, 0.599).tolist() == [0, 2]
        assert batched_nms(boxes, scores, idxs, 0.601).tolist() == [0, 1, 2]


def test_huge_coordinates(device):
    """Coordinates of 1e8, whose float32 steps are 8 pixels, are exact numbers all the same."""
    boxes = torch.tensor([[1e8, 0, 1e8 + 64, 8], [1e8 + 32, 0, 1e8 + 96, 8], [-3e38, -3e38, 3e38, 3e38]], device=device)
    scores = torch.tensor([0.9, 0.8, 0.7], device=device)
    assert nms(boxes, scores, 0.33).tolist() == [0, 2]
    assert nms(boxes, scores, 0.34).tolist() == [0, 1, 2]


def test_zero_area_duplicates_and_inverted_boxes_are_kept(device):
    boxes = torch.tensor([[5.0, 5, 5, 9], [5, 5, 5, 9], [0, 0, 10, 10], [8, 8, 2, 2], [8, 8, 2, 2]], device=device)
    assert nms(boxes, torch.linspace(1, 0.5, 5, device=device), 0.0).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("place", "value"), [("scores", NAN), ("boxes", NAN), ("boxes", INFINITY), ("boxes", -INFINITY)]
)
def test_not_finite_is_an_error(device, place, value):
    """torchvision 0.26 sorts a NaN score first and keeps NaN and infinite boxes. Both backends raise here."""
    boxes, scores = random_rows(30)
    (scores if place == "scores" else boxes[:, 2])[7] = value
    (scores if place == "scores" else boxes[:, 1])[20] = value
    with pytest.raises(RuntimeError, match=r"^nms: boxes must be finite and scores not NaN; see row 7"):
        nms(boxes.to(device), scores.to(device), 0.5)
    with pytest.raises(RuntimeError, match=r"^batched_nms: boxes must be finite and scores not NaN; see row 7"):
        batched_nms(boxes.to(device), scores.to(device), torch.zeros(30, dtype=torch.int64, device=device), 0.5)


def test_more_boxes_than_others_can_number(device):
    """mmcv reads a wrong bit above 262,144 boxes; torchvision's index overflows at 370,728, its gather at 393,217."""
    x, y = torch.arange(200_000) % 500 * 10.0, torch.arange(200_000) // 500 * 10.0
    boxes = torch.stack([x, y, x + 8, y + 8], 1).repeat(2, 1)
    scores = torch.randperm(200_000).float().repeat(2)
    scores[200_000:] -= 0.5  # the second copy of each box is worse
    kept = nms(boxes.to(device), scores.to(device), 0.5)
    assert torch.equal(kept.cpu(), scores[:200_000].argsort(descending=True))


def test_memory_does_not_grow_with_the_square():
    """torchvision on CUDA and the matrix of IoUs need N^2 / 8 bytes and more: 31 GB here. The process gets 4 GB."""
    program = """
import resource, torch, cascadeops
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
torch.set_num_threads(1)
corner = torch.rand(500_000, 2) * 30_000
idxs = torch.arange(500_000) % 1203
print(len(cascadeops.batched_nms(torch.cat([corner, corner + 40], 1), torch.rand(500_000), idxs, 0.5)))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 400_000


# ---- arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": torch.zeros(3, 5)}, r"boxes must have shape \[N, 4\], got \[3, 5\]"),
        ({"boxes": torch.zeros(1, 3, 4)}, r"boxes must have shape \[N, 4\], got \[1, 3, 4\]"),
        ({"scores": torch.zeros(4)}, r"scores must have shape \[N\] = \[3\], got \[4\]"),
        ({"scores": torch.zeros(3, 1)}, r"scores must have shape \[N\] = \[3\], got \[3, 1\]"),
        ({"idxs": torch.zeros(2, dtype=torch.int64)}, r"idxs must have shape \[N\] = \[3\], got \[2\]"),
        ({"iou_threshold": 1.5}, r"iou_threshold must be in \[0, 1\], got 1.5"),
        ({"iou_threshold": -0.1}, r"iou_threshold must be in \[0, 1\], got -0.1"),
        ({"iou_threshold": NAN}, r"iou_threshold must be in \[0, 1\], got"),
    ],
)
def test_errors(device, changes, message):
    arguments = {"boxes": torch.zeros(3, 4), "scores": torch.zeros(3), "idxs": torch.zeros(3, dtype=torch.int64)}
    arguments |= {"iou_threshold": 0.5} | changes
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    with pytest.raises(RuntimeError, match="batched_nms: " + message):
        batched_nms(**moved)
    if "idxs" not in changes:
        del moved["idxs"]
        with pytest.raises(RuntimeError, match="nms: " + message):
            nms(**moved)


def test_boxes_on_another_kind_of_device():
    with pytest.raises((RuntimeError, NotImplementedError)):
        nms(torch.zeros(3, 4, device="meta"), torch.zeros(3), 0.5)


def test_input_that_requires_grad_gives_a_result_without():
    boxes, scores = random_rows(10)
    assert not nms(boxes.requires_grad_(), scores.requires_grad_(), 0.5).requires_grad


def test_same_result_for_any_number_of_threads():
    boxes, scores = random_rows(20_000, extent=2000.0)
    idxs = torch.randint(7, (20_000,))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(batched_nms(boxes, scores, idxs, 0.5))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


# ---- the rest of PyTorch


def test_opcheck(device):
    boxes, scores = (tensor.to(device) for tensor in random_rows(20))
    idxs = torch.arange(20, device=device) % 3
    spread = boxes.T.contiguous().T
    for given_boxes in (boxes, spread, boxes[:0]):
        rows = len(given_boxes)
        torch.library.opcheck(torch.ops.cascadeops.nms.default, (given_boxes, scores[:rows], 0.5))
        torch.library.opcheck(torch.ops.cascadeops.batched_nms.default, (given_boxes, scores[:rows], idxs[:rows], 0.5))


def kept_boxes(boxes, scores, idxs):
    return boxes[batched_nms(boxes, scores, idxs, 0.5)], boxes[nms(boxes, scores, 0.5)]


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compiles_without_a_graph_break(device):
    inputs = (*random_rows(40), torch.arange(40) % 3)
    inputs = tuple(tensor.to(device) for tensor in inputs)
    for ours, compiled in zip(
        kept_boxes(*inputs), torch.compile(kept_boxes, fullgraph=True, backend="aot_eager")(*inputs), strict=True
    ):
        assert torch.equal(ours, compiled)


def test_exports(device):
    class Kept(torch.nn.Module):
        def forward(self, boxes, scores, idxs):
            return kept_boxes(boxes, scores, idxs)

    inputs = tuple(tensor.to(device) for tensor in (*random_rows(40), torch.arange(40) % 3))
    exported = torch.export.export(Kept(), inputs).module()
    other = tuple(tensor.to(device) for tensor in (*random_rows(40), torch.arange(40) % 2))
    for ours, theirs in zip(kept_boxes(*other), exported(*other), strict=True):
        assert torch.equal(ours, theirs)


def test_autocast_changes_nothing(device):
    boxes, scores = (tensor.to(device) for tensor in random_rows(100))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        result = nms(boxes, scores, 0.5)
    assert torch.equal(result, nms(boxes, scores, 0.5))
