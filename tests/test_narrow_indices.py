"""More than 2^15 of everything that an operator counts: elements, boxes, RoIs, masks, runs, points, pixels, classes.

Ordinary tests of large inputs, and what `scripts/sanitize.py narrow` needs: there an int has 16 bits, so that these
tensors are what those beyond 2^31 are to the real kernels. A kernel may count up to 2^31 - 1 boxes in an int: 32,767.
"""

import pytest
import torch
from operator_cases import arguments_of, call, identical
from tolerances import assert_close_to_reference
from torch import Tensor

import cascadeops
from cascadeops import _binary
from cascadeops.reference.box_proposals import box_proposals as proposals_reference
from cascadeops.reference.deform_conv2d import deform_conv2d as deform_reference
from cascadeops.reference.mask_targets import mask_targets as mask_reference
from cascadeops.reference.match_boxes import match_boxes as match_reference
from cascadeops.reference.multiscale_roi_align import multiscale_roi_align as roi_reference
from cascadeops.reference.paste_masks import paste_masks as paste_reference
from cascadeops.reference.paste_masks_rle import paste_masks_rle as rle_reference
from cascadeops.reference.polygon_mask_targets import polygon_mask_targets as polygon_reference
from cascadeops.reference.preprocess import preprocess as preprocess_reference
from cascadeops.reference.self_calibrated_gate import self_calibrated_gate as gate_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

MOST = 2**15 - 1
"""What an int of 16 bits counts."""
LAYOUTS = (torch.contiguous_format, torch.channels_last)
NARROW = _binary.cpu.build is not None and "narrow" in _binary.cpu.build["compiler"]


def repeated(value: Tensor, count: int) -> Tensor:
    """`count` rows, those of the value again and again."""
    return value[torch.arange(count) % len(value)]


def pairs(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(boxes, scores, rows kept): two boxes in each cell of a grid, the same but for their scores; of an odd number one
    box is alone."""
    cell = torch.arange(count) // 2
    corner = torch.stack([cell % 181, cell // 181], 1) * 3.0
    scores = torch.randperm(count) / count
    best = torch.full((count // 2 + 1,), -1.0).scatter_reduce(0, cell, scores, "amax")
    kept = (scores == best[cell]).nonzero()[:, 0]
    return torch.cat([corner, corner + 2], 1), scores, kept[scores[kept].argsort(descending=True)]


# Elements of a map, of a RoI, of an image


@pytest.mark.parametrize("layout", LAYOUTS)
def test_multiscale_roi_align_of_a_large_map(layout):
    map = torch.randn(2, 5, 190, 200, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    rois = torch.tensor([[0.0, 2, 3, 30, 20], [1, 150, 160, 199, 189], [1, 0, 0, 200, 190], [0, 170, 120, 195, 185]])
    pooled = cascadeops.multiscale_roi_align([map], rois, (7, 9), [1.0])
    exact = roi_reference([map], rois, (7, 9), [1.0])
    assert_close_to_reference(pooled, exact)
    grad = torch.randn_like(exact)
    assert_close_to_reference(*(torch.autograd.grad(value, map, grad)[0] for value in (pooled, exact)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("channels", "size"), [(2**15 + 100, (1, 1)), (3, (120, 110))])
def test_multiscale_roi_align_of_many_values_in_a_roi(layout, channels, size):
    map = torch.randn(1, channels, 5, 4).contiguous(memory_format=layout)
    rois = torch.tensor([[0.0, 1, 1, 3, 4], [0, 0, 0, 4, 5]])
    exact = roi_reference([map.double()], rois, size, [1.0])
    assert_close_to_reference(cascadeops.multiscale_roi_align([map], rois, size, [1.0]), exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("channels", "side"), [(3, 190), (2**15 + 2, 3)])
def test_deform_conv2d_of_a_large_image(layout, channels, side):
    input = torch.randn(1, channels, side, side, dtype=torch.float64).contiguous(memory_format=layout)
    offset = torch.randn(1, 18, side, side, dtype=torch.float64) * 2
    weight = torch.randn(2, channels, 3, 3, dtype=torch.float64)
    tensors = [tensor.requires_grad_() for tensor in (input, offset, weight)]
    results = [run(*tensors, None, 1, 1) for run in (cascadeops.deform_conv2d, deform_reference)]
    assert_close_to_reference(*results)
    grad = torch.randn_like(results[1])
    for ours, exact in zip(*(torch.autograd.grad(result, tensors, grad) for result in results), strict=True):
        assert_close_to_reference(ours, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("channels", "side"), [(2, 190), (2**15 + 2, 2)])
def test_self_calibrated_gate_of_a_large_image(layout, channels, side):
    x, k3, k2 = (
        torch.randn(1, channels, size, size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
        for size in (side, side, side - 1)
    )
    results = [run(x, k3, k2) for run in (cascadeops.self_calibrated_gate, gate_reference)]
    assert_close_to_reference(*results)
    grad = torch.randn_like(x)
    for ours, exact in zip(*(torch.autograd.grad(result, (x, k3, k2), grad) for result in results), strict=True):
        assert_close_to_reference(ours, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(200, 210), (3, 2**14), (2**14, 3)])
def test_preprocess_of_a_large_image(layout, size):
    images = [torch.randint(256, (*size, 3), dtype=torch.uint8), torch.randint(256, (5, 7, 3), dtype=torch.uint8)]
    for resize in (None, (min(size) * 0.9, max(size) * 0.9)):
        batch, sizes = cascadeops.preprocess(images[:1] if resize else images, resize, divisor=1, memory_format=layout)
        exact, exact_sizes = preprocess_reference(images[:1] if resize else images, resize, divisor=1)
        assert_close_to_reference(batch, exact)
        assert torch.equal(sizes, exact_sizes)


# Boxes, RoIs, classes, candidates


@pytest.mark.parametrize("layout", LAYOUTS)
def test_multiscale_roi_align_of_many_rois(layout):
    map = torch.randn(2, 3, 12, 11, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    few = torch.tensor([[0.0, 1, 1, 3, 4], [-1, 0, 0, 0, 0], [1, 0, 0, 9, 9], [1, 5, 2, 10, 11], [0, 2, 2, 9, 3]])
    pooled, exact = (cascadeops.multiscale_roi_align([map], rois, 2, [1.0]) for rois in (repeated(few, MOST), few))
    assert identical(pooled, repeated(exact, MOST))
    pooled.backward(repeated(torch.ones_like(exact), MOST))
    times = torch.bincount(torch.arange(MOST) % len(few)).view(-1, 1, 1, 1)
    (expected,) = torch.autograd.grad(exact, map, times.expand_as(exact).double())
    torch.testing.assert_close(map.grad, expected)


@pytest.mark.parametrize("count", [MOST, MOST - 1])
def test_nms_of_many_boxes(count):
    boxes, scores, kept = pairs(count)
    assert cascadeops.nms(boxes, scores, 0.5).tolist() == kept.tolist()
    groups = torch.arange(count) // 2 % 1000
    assert cascadeops.batched_nms(boxes, scores, groups, 0.5).tolist() == kept.tolist()
    assert len(cascadeops.batched_nms(boxes, scores, torch.arange(count), 0.5)) == count
    index, number = cascadeops.padded_nms(boxes[None], scores[None], groups[None], 0.5, MOST)
    assert (number.tolist(), index[0, : len(kept)].tolist()) == ([len(kept)], kept.tolist())
    assert (index[0, len(kept) :] == -1).all()


@pytest.mark.parametrize(("rows", "classes"), [(MOST, 1), (1, MOST), (181, 181), (2, MOST // 2)])
def test_multiclass_nms_of_many_candidates(rows, classes):
    boxes = torch.cat([torch.arange(rows)[:, None] * torch.tensor([3.0, 0]), torch.ones(rows, 2)], 1)
    boxes[:, 2:] += boxes[:, :2]
    scores = (1 + torch.randperm(rows * classes)).view(rows, classes) / (rows * classes)
    for given in (boxes, boxes.repeat(1, classes)):
        found, best, labels, index, count = cascadeops.multiclass_nms(given[None], scores[None], 0.0, 0.5, MOST)
        order = scores.flatten().argsort(descending=True)
        assert count.tolist() == [rows * classes]
        assert torch.equal(best[0, : len(order)], scores.flatten()[order])
        assert torch.equal(labels[0, : len(order)], order % classes)
        assert torch.equal(index[0, : len(order)], order // classes)
        assert torch.equal(found[0, : len(order)], boxes[order // classes])


def test_box_proposals_of_many_anchors():
    rows = [MOST // 2, MOST // 2, 1]
    anchors = []
    for count in rows:
        corner = torch.rand(count, 2) * 900
        anchors.append(torch.cat([corner, corner + 10 + torch.rand(count, 2) * 50], 1))
    logits = [torch.randn(2, count) for count in rows]
    deltas = [torch.randn(2, count, 4) * 0.1 for count in rows]
    sizes = torch.tensor([[1000.0, 1000.0], [900.0, 800.0]])
    ours = cascadeops.box_proposals(logits, deltas, anchors, sizes, 300, 100, 0.7)
    exact = proposals_reference(logits, deltas, anchors, sizes, 300, 100, 0.7)
    assert torch.equal(ours[2], exact[2])
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(ours[1], exact[1])
    _, _, count = cascadeops.box_proposals(logits, deltas, anchors, sizes[:1].repeat(2, 1), MOST // 2, MOST, 1.0)
    assert count.tolist() == [MOST, MOST]  # nothing suppresses anything


@pytest.mark.parametrize(("boxes", "ground_truths"), [(2**15 + 70, 3), (65, MOST)])
def test_match_boxes_of_many(boxes, ground_truths):
    def some(count: int) -> Tensor:
        corner = torch.randint(60, (1, count, 2))
        return torch.cat([corner, corner + torch.randint(1, 30, (1, count, 2))], 2).float()

    arguments = (some(boxes), torch.rand(1, boxes) < 0.9, some(ground_truths), torch.rand(1, ground_truths) < 0.9)
    assert torch.equal(cascadeops.match_boxes(*arguments, 0.6, 0.4, 0.3), match_reference(*arguments, 0.6, 0.4, 0.3))


# Masks: pixels, cells, runs, points


@pytest.mark.parametrize("image_size", [(190, 200), (3, 2**14), (2**14, 3)])
@pytest.mark.parametrize("cells", [(28, 28), (190, 180)])
def test_paste_masks_onto_large_images(image_size, cells):
    height, width = image_size
    probs = torch.rand(2, *cells)
    boxes = torch.tensor([[0.0, 0.0, width, height], [width * 0.7, height * 0.3, width * 1.1, height * 0.9]])
    expected = paste_reference(probs, boxes, image_size)
    assert torch.equal(cascadeops.paste_masks(probs, boxes, image_size), expected)
    assert cascadeops.paste_masks_rle(probs, boxes, image_size) == rle_reference(probs, boxes, image_size)


def test_paste_masks_rle_of_many_runs():
    height, width = 182, 200
    probs = ((torch.arange(height)[:, None] + torch.arange(width)) % 2).float()[None]
    boxes = torch.tensor([[0.0, 0.0, width, height]])
    (ours,) = cascadeops.paste_masks_rle(probs, boxes, (height, width))
    assert ours == rle_reference(probs, boxes, (height, width))[0]
    assert len(ours["counts"]) > 2**15


def test_paste_masks_of_many_masks():
    few, boxes = torch.rand(3, 2, 2), torch.tensor([[0.0, 0, 3, 3], [1, 1, 4, 2], [-1, 0, 2, 9]])
    many = [repeated(tensor, 2**15 + 1) for tensor in (few, boxes)]
    assert identical(
        cascadeops.paste_masks(*many, (3, 3)), repeated(cascadeops.paste_masks(few, boxes, (3, 3)), 2**15 + 1)
    )
    runs = cascadeops.paste_masks_rle(few, boxes, (3, 3))
    assert cascadeops.paste_masks_rle(*many, (3, 3)) == (runs * 2**14)[: 2**15 + 1]


@pytest.mark.parametrize("operator", ["mask_targets", "polygon_mask_targets"])
def test_targets_of_many_boxes(operator):
    arguments = arguments_of(operator)
    many = {name: repeated(arguments[name], 2**15 + 1) for name in ("boxes", "index")}
    (expected,) = call(operator, arguments)
    assert identical(call(operator, arguments | many), [repeated(expected, 2**15 + 1)])


def test_mask_targets_of_many_cells():
    height, width, size = 190, 200, 200
    crops = torch.randint(2, (3, height, width), dtype=torch.uint8)
    windows = torch.tensor([[0, 0, width, height]] * 3, dtype=torch.int32)
    boxes = torch.tensor([[0.0, 0.0, width, height], [20, 30, 90, 200], [-5, -9, 400, 300]])
    arguments = (crops.flatten(), torch.arange(3) * height * width, windows, boxes, torch.tensor([2, 0, 1]), size)
    assert torch.equal(cascadeops.mask_targets(*arguments), mask_reference(*arguments, (height, width)))


def test_polygon_mask_targets_of_many_points():
    points = 2**15 + 5
    angle = torch.arange(points) * (2 * torch.pi / points)
    vertices = torch.stack([20 + 15 * angle.cos(), 20 + 12 * (3 * angle).sin()], 1)
    arguments = (
        torch.tensor([0, 7, points]),
        torch.tensor([0, 1, 2]),
        torch.tensor([[0.0, 0, 40, 40], [5, 5, 30, 50]]),
    )
    index = torch.tensor([1, 1])
    ours = cascadeops.polygon_mask_targets(vertices, *arguments, index, 28)
    assert torch.equal(ours, polygon_reference(vertices, *arguments, index, 28))
    assert ours.any()


def test_polygon_mask_targets_of_many_polygons():
    triangle = torch.tensor([[4.0, 4], [30, 8], [9, 33]])
    objects = 2**15 + 1
    offsets = torch.arange(objects + 1)
    boxes, index = torch.tensor([[0.0, 0, 40, 40]] * 2), torch.tensor([0, objects - 1])
    targets = cascadeops.polygon_mask_targets(triangle.repeat(objects, 1), 3 * offsets, offsets, boxes, index, 14)
    exact = polygon_reference(triangle, torch.tensor([0, 3]), torch.tensor([0, 1]), boxes[:1], torch.tensor([0]), 14)
    assert torch.equal(targets, exact.expand(2, -1, -1))


@pytest.mark.skipif(not NARROW, reason="in this build the limits are at 2^31")
def test_what_an_int_cannot_count_is_refused():
    boxes = torch.zeros(MOST + 1, 4)
    with pytest.raises(RuntimeError, match="nms: boxes must have fewer than"):
        cascadeops.nms(boxes, boxes[:, 0], 0.5)
    with pytest.raises(RuntimeError, match="padded_nms: boxes must have fewer than"):
        cascadeops.padded_nms(boxes[None], boxes[None, :, 0], None, 0.5, 3)
    with pytest.raises(RuntimeError, match="multiclass_nms: scores must have fewer than"):
        cascadeops.multiclass_nms(boxes[None, :2], torch.zeros(1, 2, MOST // 2 + 1), 0.5, 0.5, 3)
    with pytest.raises(RuntimeError, match="multiscale_roi_align: rois must have fewer than"):
        cascadeops.multiscale_roi_align([torch.zeros(1, 1, 2, 2)], torch.zeros(MOST + 1, 5), 1, [1.0])
