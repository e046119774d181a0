"""Every operator against its reference on random problems of all small sizes, in guarded memory.

2,000 problems an operator; CASCADEOPS_EXAMPLES=1000000 asks for more (make fuzz). Hypothesis draws sizes, options and
a seed, and looks for the smallest that fails; the seed draws the values. Float results are compared with the reference
in float64, discrete ones have to be equal.
"""

import itertools
import os

import numpy as np
import pytest
import torch
from guarded_memory import guarded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_cases import call, map_tensors
from pycocotools import mask as coco
from test_polygon_mask_targets import drawn_by_pycocotools
from tolerances import assert_close_to_reference
from torch import Tensor

from cascadeops.reference.box_proposals import box_proposals as reference_box_proposals
from cascadeops.reference.deform_conv2d import deform_conv2d as reference_deform_conv2d
from cascadeops.reference.mask_targets import mask_coverage
from cascadeops.reference.match_boxes import match_boxes as reference_match_boxes
from cascadeops.reference.multiclass_nms import multiclass_nms as reference_multiclass_nms
from cascadeops.reference.multiscale_roi_align import choose_levels, sample_positions
from cascadeops.reference.multiscale_roi_align import multiscale_roi_align as reference_multiscale_roi_align
from cascadeops.reference.nms import batched_nms as reference_batched_nms
from cascadeops.reference.padded_nms import padded_nms as reference_padded_nms
from cascadeops.reference.paste_masks import paste_masks as reference_paste_masks
from cascadeops.reference.paste_masks import paste_probs
from cascadeops.reference.preprocess import preprocess as reference_preprocess
from cascadeops.reference.self_calibrated_gate import self_calibrated_gate as reference_self_calibrated_gate

EXAMPLES = int(os.environ.get("CASCADEOPS_EXAMPLES", 2000))
THRESHOLDS = st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 0.7, 1.0])
REAL = st.sampled_from([torch.float32, torch.float64])

many = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 2000,  # CI sees the same problems every time; a longer search sees others
    database=None,
    suppress_health_check=list(HealthCheck),
)


def problems(**strategies):
    """Runs a test for many draws of the strategies, with a generator of tensors as its first argument."""

    def decorate(test):
        def run(seed, **drawn):
            test(torch.Generator().manual_seed(seed), **drawn)

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return many(given(seed=st.integers(0, 2**32 - 1), **strategies)(run))

    return decorate


def guarded_call(operator: str, edge: str, **arguments) -> list:
    return call(operator, map_tensors(lambda tensor: guarded(tensor, edge), arguments))


def assert_equal(result: list, expected) -> None:
    for got, want in zip(result, expected, strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


def integer(generator: torch.Generator, low: int, high: int) -> int:
    """In [low, high]."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def random_boxes(generator: torch.Generator, *shape: int, extent: float, kind: str) -> Tensor:
    """[*shape, 4]. kind: "any", also reversed and beyond the extent; "whole" numbers, often equal; "tiny"; "huge"."""
    boxes = torch.rand(*shape, 4, generator=generator) * 1.5 - 0.25
    if kind == "any":
        return boxes * extent
    if kind == "whole":
        return (boxes * min(extent, 6)).round()
    boxes[..., 2:] = boxes[..., :2] + boxes[..., 2:].abs()
    return boxes * {"tiny": 1e-20, "huge": 1e18}[kind]


def random_scores(generator: torch.Generator, *shape: int, kind: str) -> Tensor:
    scores = torch.randn(*shape, generator=generator)
    return scores.round() if kind == "whole" else scores


EDGES = st.sampled_from(["start", "end"])
KINDS = st.sampled_from(["any", "whole", "tiny", "huge"])
LAYOUTS = st.sampled_from([torch.contiguous_format, torch.channels_last])


# ---- NMS and matching


@problems(batch=st.integers(0, 2), rows=st.integers(0, 12), groups=st.integers(0, 3), kind=KINDS, threshold=THRESHOLDS,
          spare=st.integers(-3, 2), edge=EDGES)  # fmt: skip
def test_padded_nms(generator, batch, rows, groups, kind, threshold, spare, edge):
    boxes, scores = (draw(generator, batch, rows, kind=kind) for draw in (whole_boxes, random_scores))
    scores[torch.rand(batch, rows, generator=generator) < 0.1] = -torch.inf
    group = torch.randint(groups, (batch, rows), generator=generator) * 2**40 if groups else None
    capacity = max(rows + spare, 0)
    result = guarded_call(
        "padded_nms", edge, boxes=boxes, scores=scores, groups=group, iou_threshold=threshold, max_output=capacity
    )
    assert_equal(result, reference_padded_nms(boxes, scores, group, threshold, capacity))


def whole_boxes(generator, *shape, kind):
    return random_boxes(generator, *shape, extent=20.0, kind=kind)


@problems(rows=st.integers(0, 20), groups=st.integers(1, 3), kind=KINDS, threshold=THRESHOLDS, edge=EDGES)
def test_nms_and_batched_nms(generator, rows, groups, kind, threshold, edge):
    boxes, scores = whole_boxes(generator, rows, kind=kind), random_scores(generator, rows, kind=kind)
    idxs = torch.randint(groups, (rows,), generator=generator) - 1
    arguments = {"boxes": boxes, "scores": scores, "iou_threshold": threshold}
    if groups == 1:
        result = guarded_call("nms", edge, **arguments)
    else:
        result = guarded_call("batched_nms", edge, idxs=idxs, **arguments)
    assert_equal(result, [reference_batched_nms(boxes, scores, idxs, threshold)])


@problems(batch=st.integers(0, 2), rows=st.integers(0, 6), classes=st.integers(0, 3), kind=KINDS, threshold=THRESHOLDS,
          per_class=st.booleans(), capacity=st.integers(0, 20), edge=EDGES)  # fmt: skip
def test_multiclass_nms(generator, batch, rows, classes, kind, threshold, per_class, capacity, edge):
    boxes = whole_boxes(generator, batch, rows, classes if per_class else 1, kind=kind).flatten(2)
    scores = random_scores(generator, batch, rows, classes, kind=kind)
    if boxes.shape[2] == 0:
        boxes = boxes.new_zeros(batch, rows, 4)
    arguments = (boxes, scores, -0.5, threshold, capacity)
    names = ("boxes", "scores", "score_threshold", "iou_threshold", "max_detections")
    result = guarded_call("multiclass_nms", edge, **dict(zip(names, arguments, strict=True)))
    assert_equal(result, reference_multiclass_nms(*arguments))


@problems(batch=st.integers(0, 2), rows=st.integers(0, 12), truths=st.integers(0, 5), kind=KINDS, low=THRESHOLDS,
          high=THRESHOLDS, low_quality=st.none() | THRESHOLDS, edge=EDGES)  # fmt: skip
def test_match_boxes(generator, batch, rows, truths, kind, low, high, low_quality, edge):
    boxes, gt_boxes = (whole_boxes(generator, batch, count, kind=kind) for count in (rows, truths))
    valid, gt_valid = (torch.rand(batch, count, generator=generator) < 0.8 for count in (rows, truths))
    arguments = (boxes, valid, gt_boxes, gt_valid, max(low, high), min(low, high), low_quality)
    names = ("boxes", "valid", "gt_boxes", "gt_valid", "positive_iou", "negative_iou", "low_quality_iou")
    result = guarded_call("match_boxes", edge, **dict(zip(names, arguments, strict=True)))
    assert_equal(result, [reference_match_boxes(*arguments)])


@problems(batch=st.integers(0, 2), rows=st.lists(st.integers(0, 9), min_size=1, max_size=3), kind=KINDS,
          top_k=st.integers(1, 10), capacity=st.integers(0, 20), threshold=THRESHOLDS, edge=EDGES)  # fmt: skip
def test_box_proposals(generator, batch, rows, kind, top_k, capacity, threshold, edge):
    arguments = {
        "logits": [random_scores(generator, batch, count, kind=kind) for count in rows],
        "deltas": [torch.randn(batch, count, 4, generator=generator) for count in rows],
        "anchors": [whole_boxes(generator, count, kind=kind) for count in rows],
        "image_sizes": torch.randint(1, 25, (batch, 2), generator=generator),
        "top_k": top_k, "max_proposals": capacity, "iou_threshold": threshold, "stds": (0.5, 1.0, 0.3, 2.0),
    }  # fmt: skip
    assert_equal(guarded_call("box_proposals", edge, **arguments), reference_box_proposals(**arguments))


# ---- masks


@problems(masks=st.integers(0, 3), h=st.integers(1, 9), w=st.integers(1, 9), height=st.integers(1, 40),
          width=st.integers(1, 40), threshold=st.sampled_from([0.5, 0.1, 0.9, -1.0]), whole=st.booleans(),
          edge=EDGES)  # fmt: skip
def test_paste_masks_and_paste_masks_rle(generator, masks, h, w, height, width, threshold, whole, edge):
    probs = torch.rand(masks, h, w, generator=generator)
    boxes = random_boxes(generator, masks, extent=float(max(height, width)), kind="whole" if whole else "any")
    arguments = {"probs": probs, "boxes": boxes, "image_size": (height, width), "threshold": threshold}
    (result,) = guarded_call("paste_masks", edge, **arguments)
    assert_equal([result], [reference_paste_masks(probs, boxes, (height, width), threshold)])
    if threshold > 0:
        exact = paste_probs(probs.double(), boxes.double(), (height, width))
        clear = (exact - threshold).abs() > 1e-3 * (1 + boxes.abs().amax(1)[:, None, None])
        assert torch.equal(result[clear], (exact >= threshold)[clear])
        encoded = [coco.encode(np.asfortranarray(mask.numpy().view(np.uint8))) for mask in result]
        assert guarded_call("paste_masks_rle", edge, **arguments) == encoded


@problems(objects=st.integers(1, 3), count=st.integers(0, 4), size=st.integers(1, 7), whole=st.booleans(), edge=EDGES)
def test_mask_targets(generator, objects, count, size, whole, edge):
    image = (20, 24)
    crops, windows = [], []
    for _ in range(objects):
        height, width = integer(generator, 2, 12), integer(generator, 2, 12)
        crop = torch.zeros(height, width, dtype=torch.uint8)
        crop[1:-1, 1:-1] = torch.rand(max(height - 2, 0), max(width - 2, 0), generator=generator) < 0.6
        windows.append(
            [integer(generator, 0, image[1] - width), integer(generator, 0, image[0] - height), width, height]
        )
        crops.append(crop.flatten())
    offsets = torch.tensor([sum(map(len, crops[:i])) for i in range(objects)])
    boxes = random_boxes(generator, count, extent=22.0, kind="whole" if whole else "any")
    index = torch.randint(-1, objects, (count,), generator=generator)
    problem = (torch.cat(crops), offsets, torch.tensor(windows, dtype=torch.int32), boxes, index, size)
    names = ("bitmaps", "offsets", "windows", "boxes", "index", "output_size")
    (result,) = guarded_call("mask_targets", edge, **dict(zip(names, problem, strict=True)))
    coverage = mask_coverage(*problem, image)
    clear = (coverage - 0.5).abs() > 1e-5  # at a half, the order of the sums decides
    assert torch.equal(result[clear], (coverage >= 0.5).to(torch.uint8)[clear])


@problems(polygons=st.lists(st.integers(1, 6), max_size=3), count=st.integers(0, 3), size=st.sampled_from([1, 5, 14]),
          whole=st.booleans(), edge=EDGES)  # fmt: skip
def test_polygon_mask_targets(generator, polygons, count, size, whole, edge):
    """pycocotools is the oracle: the mask is its definition."""
    vertices = torch.rand(sum(polygons), 2, generator=generator) * 60 - 20
    boxes = random_boxes(generator, count, extent=40.0, kind="whole" if whole else "any")
    problem = {
        "vertices": vertices.round() if whole else vertices,
        "polygon_offsets": torch.tensor([0, *itertools.accumulate(polygons)]),
        "object_offsets": torch.tensor([0, len(polygons) // 2, len(polygons)]),
        "boxes": boxes,
        "index": torch.randint(-1, 2, (count,), generator=generator),
    }
    (result,) = guarded_call("polygon_mask_targets", edge, **problem, output_size=size)
    assert_equal([result], [drawn_by_pycocotools(*problem.values(), size)])


# ---- sampling


def is_clear(low: Tensor, high: Tensor, cells: int, bins: int, ratio: int, aligned: bool) -> bool:
    """Whether rounding moves no sample of the axis onto or off the map, and does not change the number of samples."""
    size = float(high - low)
    if abs(size - (0 if aligned else 1)) < 1e-3:
        return False
    samples = size / bins
    if ratio == 0 and abs(samples - round(samples)) < 1e-3:
        return False
    positions = sample_positions(low, high, bins, ratio, aligned)
    return not (torch.minimum((positions + 1).abs(), (positions - cells).abs()) < 1e-3).any()


@problems(levels=st.integers(1, 3), channels=st.integers(0, 20), count=st.integers(0, 3), height=st.integers(1, 3),
          width=st.integers(1, 3), ratio=st.integers(0, 3), aligned=st.booleans(), layout=LAYOUTS, dtype=REAL,
          edge=EDGES)  # fmt: skip
def test_multiscale_roi_align(generator, levels, channels, count, height, width, ratio, aligned, layout, dtype, edge):
    sizes = [(integer(generator, 1, 9), integer(generator, 1, 9)) for _ in range(levels)]
    strides = [4.0 * 2**level for level in range(levels)]
    maps = [torch.randn(2, channels, *size, generator=generator, dtype=dtype) for size in sizes]
    index = torch.randint(-1, 2, (count,), generator=generator)
    rois = torch.cat([index[:, None].float(), random_boxes(generator, count, extent=40.0, kind="any")], 1)
    options = {"output_size": (height, width), "strides": strides, "sampling_ratio": ratio, "aligned": aligned}
    options["finest_size"] = 10.0
    features = [map.contiguous(memory_format=layout) for map in maps]
    leaves = [guarded(map, edge).requires_grad_() for map in features]
    (result,) = call("multiscale_roi_align", {"features": leaves, "rois": guarded(rois, edge), **options})
    exact_leaves = [map.double().requires_grad_() for map in maps]
    exact = reference_multiscale_roi_align(exact_leaves, rois, **options)
    clear = torch.ones(count, dtype=torch.bool)
    for k, level in enumerate(choose_levels(rois, levels, 10.0, "mmdet").tolist()):
        x1, y1, x2, y2 = rois[k, 1:].double() / strides[level] - (0.5 if aligned else 0.0)
        for low, high, cells, bins in zip((y1, x1), (y2, x2), sizes[level], (height, width), strict=True):
            clear[k] &= is_clear(low, high, cells, bins, ratio, aligned)
    assert_close_to_reference(result.detach()[clear], exact.detach()[clear])
    weight = torch.randn(exact.shape, generator=generator, dtype=torch.float64) * clear[:, None, None, None]
    gradients = torch.autograd.grad((result * guarded(weight.to(dtype), edge)).sum(), leaves)
    if not exact.requires_grad:  # no RoI but padding
        assert not any(gradient.any() for gradient in gradients)
        return
    exact_gradients = torch.autograd.grad((exact * weight).sum(), exact_leaves, allow_unused=True)
    for gradient, wanted, map in zip(gradients, exact_gradients, maps, strict=True):
        assert_close_to_reference(gradient, torch.zeros_like(map).double() if wanted is None else wanted)


@problems(images=st.integers(0, 2), groups=st.integers(1, 2), offset_groups=st.integers(1, 2),
          per_group=st.integers(1, 9), kernel=st.tuples(*[st.integers(1, 3)] * 2), stride=st.integers(1, 2),
          dilation=st.integers(1, 2), out_channels=st.integers(1, 9), modulated=st.booleans(), biased=st.booleans(),
          layout=LAYOUTS, dtype=REAL, edge=EDGES)  # fmt: skip
def test_deform_conv2d(generator, images, groups, offset_groups, per_group, kernel, stride, dilation, out_channels,
                       modulated, biased, layout, dtype, edge):  # fmt: skip
    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    padding = integer(generator, 0, 2)
    size = [integer(generator, 1, 6) + max(dilation * (side - 1) - 2 * padding, 0) for side in kernel]
    out = [(a + 2 * padding - dilation * (side - 1) - 1) // stride + 1 for a, side in zip(size, kernel, strict=True)]
    taps, channels = kernel[0] * kernel[1], per_group * groups * offset_groups
    exact = {
        "input": normal(images, channels, *size),
        "offset": normal(images, 2 * taps * offset_groups, *out) * 2,
        "weight": normal(out_channels * groups, channels // groups, *kernel),
        "bias": normal(out_channels * groups) if biased else None,
        "mask": torch.rand(images, taps * offset_groups, *out, generator=generator).double() if modulated else None,
    }
    exact = {name: tensor if tensor is None else tensor.to(dtype).double() for name, tensor in exact.items()}
    given_tensors = {name: tensor if tensor is None else tensor.to(dtype) for name, tensor in exact.items()}
    given_tensors["input"] = given_tensors["input"].contiguous(memory_format=layout)
    options = {"stride": stride, "padding": padding, "dilation": dilation}

    def values_and_gradients(function, tensors, place):
        leaves = {name: place(tensor).requires_grad_() for name, tensor in tensors.items() if tensor is not None}
        result = function(**(tensors | leaves), **options)
        weight = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape)
        return [result.detach(), *torch.autograd.grad((result * weight).sum(), list(leaves.values()))]

    ours = values_and_gradients(
        lambda **arguments: call("deform_conv2d", arguments)[0], given_tensors, lambda tensor: guarded(tensor, edge)
    )
    for result, wanted in zip(ours, values_and_gradients(reference_deform_conv2d, exact, torch.clone), strict=True):
        assert_close_to_reference(result, wanted, largest_term=1.0)


@problems(images=st.integers(0, 2), channels=st.integers(0, 20), height=st.integers(1, 9), width=st.integers(1, 9),
          h=st.integers(1, 5), w=st.integers(1, 5), layout=LAYOUTS, dtype=REAL, edge=EDGES)  # fmt: skip
def test_self_calibrated_gate(generator, images, channels, height, width, h, w, layout, dtype, edge):
    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).contiguous(memory_format=layout)

    sizes = {"x": (height, width), "k3": (height, width), "k2": (h, w)}
    tensors = [normal(images, channels, *size) for size in sizes.values()]
    leaves = [guarded(tensor, edge).requires_grad_() for tensor in tensors]
    exact_leaves = [tensor.double().requires_grad_() for tensor in tensors]
    (result,) = call("self_calibrated_gate", dict(zip(sizes, leaves, strict=True)))
    exact = reference_self_calibrated_gate(*exact_leaves)
    assert_close_to_reference(result.detach(), exact.detach())
    weight = torch.linspace(-1, 1, exact.numel(), dtype=torch.float64).view(exact.shape)
    gradients = torch.autograd.grad((result * weight.to(dtype)).sum(), leaves)
    for gradient, wanted in zip(gradients, torch.autograd.grad((exact * weight).sum(), exact_leaves), strict=True):
        assert_close_to_reference(gradient, wanted)


@problems(images=st.integers(1, 3), resize=st.none() | st.tuples(*[st.sampled_from([5.0, 9.5, 16.0, 30.0])] * 2),
          divisor=st.sampled_from([1, 4, 7]), layout=LAYOUTS, turned=st.booleans(), edge=EDGES)  # fmt: skip
def test_preprocess(generator, images, resize, divisor, layout, turned, edge):
    pixels = [
        torch.randint(256, (integer(generator, 1, 15), integer(generator, 1, 15), 3), generator=generator).byte()
        for _ in range(images)
    ]
    given_pixels = [image.permute(2, 0, 1).contiguous().permute(1, 2, 0) if turned else image for image in pixels]
    batch, sizes = guarded_call(
        "preprocess", edge, images=given_pixels, resize=resize, divisor=divisor, memory_format=layout
    )
    exact, exact_sizes = reference_preprocess(pixels, resize, divisor=divisor)
    assert_close_to_reference(batch, exact)
    assert torch.equal(sizes, exact_sizes)


def test_a_wrong_result_is_found():
    """The comparison itself: a problem whose result is off by one part in ten thousand fails."""
    with pytest.raises(AssertionError):
        assert_close_to_reference(torch.ones(3) * 1.0001, torch.ones(3, dtype=torch.float64))
