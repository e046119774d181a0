"""polygon_mask_targets: polygons drawn inside RoIs, cell for cell as pycocotools draws them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from cascadeops import polygon_mask_targets
from cascadeops.reference.polygon_mask_targets import polygon_mask_targets as reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def flat(objects, device="cpu"):
    """objects: for each its polygons, [n, 2] each -> vertices, polygon_offsets, object_offsets."""
    polygons = [torch.as_tensor(polygon, dtype=torch.float32).view(-1, 2) for o in objects for polygon in o]
    vertices = torch.cat([torch.zeros(0, 2), *polygons])
    polygon_offsets = torch.tensor([0, *np.cumsum([len(polygon) for polygon in polygons])], dtype=torch.int64)
    object_offsets = torch.tensor([0, *np.cumsum([len(o) for o in objects])], dtype=torch.int64)
    return vertices.to(device), polygon_offsets.to(device), object_offsets.to(device)


def drawn_by_pycocotools(vertices, polygon_offsets, object_offsets, boxes, index, size):
    targets = torch.zeros(len(boxes), size, size, dtype=torch.uint8)
    for target, box, g in zip(targets, boxes.double().numpy(), index.tolist(), strict=True):
        if g < 0:
            continue
        scale = size / np.maximum(box[2:] - box[:2], 0.1)
        pieces = [
            (vertices[polygon_offsets[p] : polygon_offsets[p + 1]].double().numpy() - box[:2]) * scale
            for p in range(object_offsets[g], object_offsets[g + 1])
        ]
        pieces = [piece.ravel().tolist() for piece in pieces if len(piece) > 2]  # it takes 2 points for a box
        if pieces:
            target.copy_(torch.from_numpy(coco.decode(coco.merge(coco.frPyObjects(pieces, size, size)))))
    return targets


def star(corners, centre, radius):
    """An outline as of an object: a vertex at every angle, at a random distance."""
    angles = torch.arange(corners) * (2 * math.pi / corners)
    return centre + radius * (0.4 + 0.6 * torch.rand(corners, 1)) * torch.stack([angles.cos(), angles.sin()], 1)


def random_objects(count):
    """Outlines, some in two pieces; scribbles that cross themselves; corners on whole pixels; an object of nothing."""
    objects = []
    for i in range(count):
        centre, radius = torch.rand(2) * 100, 5 + 40 * torch.rand(1)
        kinds = [
            [star(40, centre, radius), star(7, centre + radius, radius / 2)],
            [torch.rand(12, 2) * 120 - 10],
            [torch.randint(0, 13, (6, 2)) * 8.0, torch.rand(3, 2) * 100],
            [star(150, centre, radius)],
        ]
        objects.append(kinds[i % 4])
    return [*objects, []]


def random_boxes(count):
    first = torch.rand(count, 2) * 90 - 5
    boxes = torch.cat([first, first + torch.rand(count, 2) * 60], 1)
    boxes[::3] = boxes[::3].round()
    return boxes


@pytest.mark.parametrize("size", [28, 1, 7, 33, 64])
def test_is_what_pycocotools_draws(device, size):
    objects = flat(random_objects(40), device)
    boxes, index = random_boxes(160).to(device), torch.randint(-1, 41, (160,), device=device)
    targets = polygon_mask_targets(*objects, boxes, index, size)
    assert targets.shape == (160, size, size) and targets.dtype == torch.uint8
    arguments = [argument.cpu() for argument in (*objects, boxes, index)]
    expected = drawn_by_pycocotools(*arguments, size)
    assert 0.05 < expected.float().mean() < 0.95
    assert torch.equal(targets.cpu(), expected)
    if size == 28:
        assert torch.equal(reference(*arguments, size), expected)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    polygon=st.lists(st.tuples(*[st.floats(-50, 150, width=32) | st.integers(-20, 80)] * 2), min_size=1, max_size=8),
    box=st.tuples(*[st.floats(-20, 100, width=32) | st.integers(-20, 100)] * 4),
    size=st.sampled_from([1, 5, 14, 28]),
)
def test_any_polygon_and_box(polygon, box, size):
    arguments = *flat([[polygon]]), torch.tensor([box], dtype=torch.float32), torch.tensor([0])
    targets = polygon_mask_targets(*arguments, size)
    assert torch.equal(targets, drawn_by_pycocotools(*arguments, size))
    if min(box[2] - box[0], box[3] - box[1]) > 5:  # in a smaller box the reference walks along a million grid points
        assert torch.equal(targets, reference(*arguments, size))


def test_by_hand(device):
    # A square over the left half of the box; and two squares, of which the second is beyond the box's lower edge.
    square = [[10, 20], [14, 20], [14, 28], [10, 28]]
    objects = flat(
        [[square], [[[10, 20], [18, 20], [18, 22], [10, 22]], [[14, 26], [18, 26], [18, 90], [14, 90]]]], device
    )
    boxes = torch.tensor([[10.0, 20, 18, 28]] * 2, device=device)
    targets = polygon_mask_targets(*objects, boxes, torch.tensor([0, 1], device=device), 4)
    assert targets[0].tolist() == [[1, 1, 0, 0]] * 4
    assert targets[1].tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]]


def test_a_polygon_within_another_is_united_and_a_crossing_one_is_not(device):
    outer, inner = [[0, 0], [9, 0], [9, 9], [0, 9]], [[3, 3], [6, 3], [6, 6], [3, 6]]
    twice = [*outer, *outer]  # round twice: every cell is enclosed an even number of times
    objects = flat([[outer, inner], [twice]], device)
    boxes = torch.tensor([[0.0, 0, 9, 9]] * 2, device=device)
    targets = polygon_mask_targets(*objects, boxes, torch.tensor([0, 1], device=device), 9)
    assert targets[0].all() and not targets[1].any()


def test_padding_nothing_to_draw_and_no_boxes_at_all(device):
    objects = flat([[], [[[5, 5]], [[0, 0], [20, 20]]], [[[0, 0], [9, 0], [9, 9]]]], device)
    boxes = torch.tensor([[torch.nan, 0, 5, 5], [0, 0, 16, 16], [0, 0, 16, 16]], device=device)
    index = torch.tensor([-1, 0, 1], device=device)  # padding, no polygon, polygons of one and two vertices
    assert not polygon_mask_targets(*objects, boxes, index).any()
    assert polygon_mask_targets(*objects, boxes[:0], index[:0], 14).shape == (0, 14, 14)
    assert not polygon_mask_targets(*flat([[]], device), boxes[1:2], index[1:2]).any()


@pytest.mark.parametrize("far", [1e8, 1e9, -1e9, 3e38])
def test_vertices_that_end_pycocotools_process(device, far):
    # RELIABILITY: frPyObjects of these allocates by the length of the outline, without a check.
    corners = [[0, 0], [far, 0], [far, 8], [0, 8]]
    objects = flat([[corners], [[[y, x] for x, y in corners]]], device)
    boxes = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 8], [8, 8, 16, 16]], device=device)
    targets = polygon_mask_targets(*objects, boxes, torch.tensor([0, 1, 0], device=device), 8)
    assert targets[:2].all().item() == (far > 0) and targets[:2].any().item() == (far > 0)
    assert not targets[2].any()


def test_sides_of_a_box_below_a_tenth_of_a_pixel(device):
    objects = flat([[[[0, 0], [9, 0], [9, 9], [0, 9]]]], device)
    boxes = torch.tensor([[4.0, 4, 4, 4], [4, 4, 3, 5], [8.95, 8.95, 8.95, 8.95]], device=device)
    index = torch.zeros(3, dtype=torch.int64, device=device)
    targets = polygon_mask_targets(*objects, boxes, index, 10)
    expected = drawn_by_pycocotools(*(argument.cpu() for argument in (*objects, boxes, index)), 10)
    assert torch.equal(targets.cpu(), expected) and expected[0].all() and 0 < expected[2].sum() < 100


def test_arguments_of_any_strides(device):
    objects = flat(random_objects(8), device)
    boxes, index = random_boxes(20).to(device), torch.randint(0, 9, (20,), device=device)
    strided = [torch.stack([argument, argument], dim=-1)[..., 0] for argument in (*objects, boxes, index)]
    assert not any(argument.is_contiguous() for argument in strided)
    assert torch.equal(polygon_mask_targets(*strided), polygon_mask_targets(*objects, boxes, index))


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "strided", "empty"])
def test_opcheck(device, layout):
    arguments = [*flat(random_objects(4), device), random_boxes(6).to(device), torch.arange(-1, 5, device=device)]
    if layout == "permuted":
        arguments[0], arguments[3] = (arguments[i].T.contiguous().T for i in (0, 3))
    elif layout == "strided":
        arguments = [torch.stack([argument, argument], dim=-1)[..., 0] for argument in arguments]
    elif layout == "empty":
        arguments[3:] = [argument[:0] for argument in arguments[3:]]
    torch.library.opcheck(torch.ops.cascadeops.polygon_mask_targets.default, (*arguments, 7))


def test_compiles_exports_and_ignores_autocast(device):
    arguments = *flat(random_objects(4), device), random_boxes(6).to(device), torch.arange(-1, 5, device=device)
    expected = polygon_mask_targets(*arguments)
    compiled = torch.compile(polygon_mask_targets, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), expected)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(polygon_mask_targets(*arguments), expected)

    class Module(torch.nn.Module):
        def forward(self, *arguments):
            return polygon_mask_targets(*arguments)

    assert torch.equal(torch.export.export(Module(), arguments).module()(*arguments), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vertices": torch.zeros(6)}, r"vertices must have shape \[V, 2\], got \[6\]"),
        ({"vertices": torch.zeros(3, 2).double()}, "vertices must have dtype Float, got Double"),
        ({"vertices": torch.full((3, 2), math.nan)}, r"vertices\[0, 0\] must be finite, got nan"),
        ({"polygon_offsets": torch.zeros(0).long()}, r"polygon_offsets must have shape \[P \+ 1\], got \[0\]"),
        ({"polygon_offsets": torch.tensor([0, 4])}, r"polygon_offsets\[1\] must be in \[0, 3\], .* vertices, got 4"),
        ({"polygon_offsets": torch.tensor([-1, 3])}, r"polygon_offsets\[0\] must be in \[0, 3\], .*, got -1"),
        ({"polygon_offsets": torch.tensor([2, 1])}, r"polygon_offsets must not decrease, got 1 at \[1\] after 2"),
        ({"object_offsets": torch.tensor([[0, 1]])}, r"object_offsets must have shape \[G \+ 1\], got \[1, 2\]"),
        ({"object_offsets": torch.tensor([0, 2])}, r"object_offsets\[1\] must be in \[0, 1\], .* polygons, got 2"),
        ({"object_offsets": torch.tensor([0, 1]).int()}, "object_offsets must have dtype Long, got Int"),
        ({"boxes": torch.zeros(1, 5)}, r"boxes must have shape \[K, 4\], got \[1, 5\]"),
        ({"boxes": torch.tensor([[0.0, 0, torch.inf, 1]])}, r"boxes\[0, 2\] must be finite, got inf"),
        ({"index": torch.tensor([0, 0])}, r"index must have shape \[K\] = \[1\], got \[2\]"),
        ({"index": torch.tensor([1])}, r"index\[0\] must be in \[-1, 1\), got 1"),
        ({"index": torch.tensor([-2])}, r"index\[0\] must be in \[-1, 1\), got -2"),
        ({"output_size": 0}, r"output_size must be in \[1, 4096\], got 0"),
        ({"output_size": 5000}, r"output_size must be in \[1, 4096\], got 5000"),
    ],
)
def test_errors_say_what_is_wrong(changes, message):
    arguments = {
        "vertices": torch.tensor([[0.0, 0], [9, 0], [9, 9]]),
        "polygon_offsets": torch.tensor([0, 3]),
        "object_offsets": torch.tensor([0, 1]),
        "boxes": torch.tensor([[0.0, 0, 4, 4]]),
        "index": torch.tensor([0]),
    }
    with pytest.raises(RuntimeError, match=f"polygon_mask_targets: {message}"):
        polygon_mask_targets(**(arguments | changes))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_0_for_bad_rows():
    objects, boxes = flat([[[[0, 0], [9, 0], [9, 9]]]] * 2, "cuda"), torch.tensor([[0.0, 0, 4, 4]] * 4, device="cuda")
    index = torch.tensor([0, 1, 7, -3], device="cuda")
    assert polygon_mask_targets(*objects, boxes, index).flatten(1).any(1).tolist() == [True, True, False, False]
    objects[0][4, 1] = torch.nan
    assert polygon_mask_targets(*objects, boxes, index).flatten(1).any(1).tolist() == [True, False, False, False]
    objects[1][1] = 100
    assert not polygon_mask_targets(*objects, boxes, index).any()
