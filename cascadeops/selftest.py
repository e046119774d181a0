"""One numeric check for each operator: the kernel of this installation against the plain PyTorch definition."""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import cascadeops


@dataclass(frozen=True)
class Outcome:
    operator: str
    device: str
    error: float | None
    """Largest difference, or share of differing values for whole numbers and masks; None if the operator raised."""
    limit: float
    message: str = ""

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.limit


def run(device: str) -> list[Outcome]:
    """Checks every operator on "cpu" or "cuda". Never raises: an operator that does gets an outcome that says so."""
    outcomes = []
    for name, (check, limit) in CHECKS.items():
        try:
            outcomes.append(Outcome(name, device, check(device, torch.Generator().manual_seed(0)), limit))
        except Exception as error:  # whatever a broken installation throws belongs into the report
            message = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            outcomes.append(Outcome(name, device, None, limit, message))
    return outcomes


def _reference(name: str) -> Callable:
    return getattr(importlib.import_module(f"cascadeops.reference.{name}"), name)


def _boxes(generator: torch.Generator, *shape: int, largest: float) -> Tensor:
    """Random boxes [*shape, 4] with corners in [0, largest] and sides of at least 2 pixels."""
    corners = torch.rand(*shape, 2, 2, generator=generator).sort(dim=-2).values * (largest - 2)
    corners[..., 1, :] += 2
    return corners.flatten(-2)


def _difference(ours: Tensor, expected: Tensor) -> float:
    """Largest absolute difference of floating-point values, share of differing values otherwise."""
    ours = ours.cpu()
    if ours.shape != expected.shape or ours.dtype != expected.dtype:
        got, due = (f"{tensor.dtype} {list(tensor.shape)}" for tensor in (ours, expected))
        raise ValueError(f"{got} instead of {due}")
    if not expected.dtype.is_floating_point:
        return (ours != expected).double().mean().item()
    difference = torch.where(ours == expected, 0.0, (ours - expected).abs()).max().item()
    if not math.isfinite(difference):
        raise ValueError("NaN or infinity where the reference has numbers")
    return difference


def _multiscale_roi_align(device: str, generator: torch.Generator) -> float:
    """Values, and the gradient of their weighted sum, over two channels-last levels."""
    sizes = [(25, 19), (13, 10)]
    features = [torch.randn(2, 16, *size, generator=generator) for size in sizes]
    index = torch.tensor([0, 1, 0, 1, -1, 0, 1, 0], dtype=torch.float32)
    rois = torch.cat([index[:, None], _boxes(generator, 8, largest=90)], dim=1)
    weight = torch.randn(8, 16, 7, 7, generator=generator)

    def values_and_gradients(function, maps, rois, weight):
        maps = [m.to(memory_format=torch.channels_last).requires_grad_() for m in maps]
        pooled = function(maps, rois, 7, [4, 8], finest_size=28.0)
        return [pooled.detach(), *torch.autograd.grad((pooled * weight).sum(), maps)]

    ours = values_and_gradients(
        cascadeops.multiscale_roi_align, [m.to(device) for m in features], rois.to(device), weight.to(device)
    )
    expected = values_and_gradients(_reference("multiscale_roi_align"), features, rois, weight)
    return max(_difference(a, b) for a, b in zip(ours, expected, strict=True))


def _roi_align(device: str, generator: torch.Generator) -> float:
    input = torch.randn(2, 5, 25, 19, generator=generator)
    boxes = torch.cat([torch.tensor([[0.0], [1.0], [1.0]]), _boxes(generator, 3, largest=40)], dim=1)
    ours = cascadeops.roi_align(input.to(device), boxes.to(device), (5, 7), 0.5)
    return _difference(ours, _reference("roi_align")(input, boxes, (5, 7), 0.5))


def _padded_nms(device: str, generator: torch.Generator) -> float:
    boxes, scores = _boxes(generator, 2, 200, largest=60), torch.rand(2, 200, generator=generator)
    scores[1, 150:] = -torch.inf
    groups = torch.randint(3, (2, 200), generator=generator)
    ours = cascadeops.padded_nms(boxes.to(device), scores.to(device), groups.to(device), 0.5, 80)
    expected = _reference("padded_nms")(boxes, scores, groups, 0.5, 80)
    return max(_difference(a, b) for a, b in zip(ours, expected, strict=True))


def _nms(device: str, generator: torch.Generator) -> float:
    boxes, scores = _boxes(generator, 300, largest=60), torch.rand(300, generator=generator)
    return _difference(cascadeops.nms(boxes.to(device), scores.to(device), 0.5), _reference("nms")(boxes, scores, 0.5))


def _batched_nms(device: str, generator: torch.Generator) -> float:
    boxes, scores = _boxes(generator, 300, largest=60), torch.rand(300, generator=generator)
    idxs = torch.randint(4, (300,), generator=generator)
    ours = cascadeops.batched_nms(boxes.to(device), scores.to(device), idxs.to(device), 0.5)
    return _difference(ours, importlib.import_module("cascadeops.reference.nms").batched_nms(boxes, scores, idxs, 0.5))


def _box_proposals(device: str, generator: torch.Generator) -> float:
    rows = (120, 30)
    logits = [torch.randn(2, count, generator=generator) for count in rows]
    deltas = [torch.randn(2, count, 4, generator=generator) * 0.3 for count in rows]
    anchors = [_boxes(generator, count, largest=90) - 5 for count in rows]
    inputs = logits, deltas, anchors, torch.tensor([[80, 90], [60, 70]])
    ours = cascadeops.box_proposals(*([t.to(device) for t in x] for x in inputs[:3]), inputs[3].to(device), 50, 40, 0.6)
    expected = _reference("box_proposals")(*inputs, 50, 40, 0.6)
    return max(_difference(a, b) for a, b in zip(ours, expected, strict=True))


def _match_boxes(device: str, generator: torch.Generator) -> float:
    boxes, gt_boxes = _boxes(generator, 2, 300, largest=90), _boxes(generator, 2, 12, largest=90)
    valid, gt_valid = torch.rand(2, 300, generator=generator) < 0.9, torch.rand(2, 12, generator=generator) < 0.9
    inputs = boxes, valid, gt_boxes, gt_valid
    ours = cascadeops.match_boxes(*(tensor.to(device) for tensor in inputs), 0.5, 0.4, 0.3)
    return _difference(ours, _reference("match_boxes")(*inputs, 0.5, 0.4, 0.3))


def _multiclass_nms(device: str, generator: torch.Generator) -> float:
    boxes, scores = _boxes(generator, 2, 100, largest=60), torch.rand(2, 100, 5, generator=generator)
    ours = cascadeops.multiclass_nms(boxes.to(device), scores.to(device), 0.3, 0.5, 60)
    expected = _reference("multiclass_nms")(boxes, scores, 0.3, 0.5, 60)
    return max(_difference(a, b) for a, b in zip(ours, expected, strict=True))


def _mask_targets(device: str, generator: torch.Generator) -> float:
    """Two ellipses in an image of 64 x 48; their crops have the border of zeros that the operator asks for."""
    windows = torch.tensor([[5, 8, 22, 30], [20, 20, 25, 17]], dtype=torch.int32)
    crops = []
    for _, _, width, height in windows.tolist():
        y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        crops.append((y * y + x * x < 0.8).to(torch.uint8).flatten())
    bitmaps, offsets = torch.cat(crops), torch.tensor([0, len(crops[0])])
    boxes, index = _boxes(generator, 12, largest=48), torch.tensor([0, 1, -1] * 4)
    inputs = bitmaps, offsets, windows, boxes, index
    ours = cascadeops.mask_targets(*(tensor.to(device) for tensor in inputs), output_size=28)
    return _difference(ours, _reference("mask_targets")(*inputs, 28, (64, 48)))


def _masks(generator: torch.Generator) -> tuple[Tensor, Tensor, tuple[int, int]]:
    boxes = _boxes(generator, 10, largest=80) - 8  # some reach beyond the image
    return torch.rand(10, 28, 28, generator=generator), boxes, (61, 67)


def _paste_masks(device: str, generator: torch.Generator) -> float:
    probs, boxes, size = _masks(generator)
    probs, boxes, expected = probs.to(device), boxes.to(device), _reference("paste_masks")(probs, boxes, size)
    difference = _difference(cascadeops.paste_masks(probs, boxes, size), expected)
    packed = cascadeops.paste_masks(probs, boxes, size, 0.5, True)
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=device) & 1
    return max(difference, _difference(bits.bool().flatten(-2)[..., : size[1]], expected))


def _paste_masks_rle(device: str, generator: torch.Generator) -> float:
    probs, boxes, size = _masks(generator)
    ours = cascadeops.paste_masks_rle(probs.to(device), boxes.to(device), size)
    expected = _reference("paste_masks_rle")(probs, boxes, size)
    return sum(a != b for a, b in zip(ours, expected, strict=True)) / len(expected)


def _deform_conv2d(device: str, generator: torch.Generator) -> float:
    """Values, and the gradients of their weighted sum, in a channels-last map with two offset groups."""
    sizes = (2, 8, 9, 11), (2, 36, 9, 11), (12, 4, 3, 3), (12,), (2, 18, 9, 11), (2, 12, 9, 11)
    tensors = [torch.randn(size, generator=generator) for size in sizes]
    tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)

    def values_and_gradients(function, *tensors):
        *leaves, grad = [tensor.requires_grad_() for tensor in tensors]
        out = function(*leaves[:4], padding=1, mask=leaves[4])
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    ours = values_and_gradients(cascadeops.deform_conv2d, *(tensor.to(device) for tensor in tensors))
    expected = values_and_gradients(_reference("deform_conv2d"), *tensors)
    return max(_difference(a, b) / b.abs().max().item() for a, b in zip(ours, expected, strict=True))


def _self_calibrated_gate(device: str, generator: torch.Generator) -> float:
    """Values, and the gradients of their weighted sum, where the pooling by 4 leaves pixels over."""
    sizes = (9, 14), (9, 14), (2, 3)
    maps = [torch.randn(2, 20, *size, generator=generator).to(memory_format=torch.channels_last) for size in sizes]
    weight = torch.randn(2, 20, 9, 14, generator=generator)

    def values_and_gradients(function, maps, weight):
        maps = [m.detach().requires_grad_() for m in maps]
        gated = function(*maps)
        return [gated.detach(), *torch.autograd.grad((gated * weight).sum(), maps)]

    ours = values_and_gradients(cascadeops.self_calibrated_gate, [m.to(device) for m in maps], weight.to(device))
    expected = values_and_gradients(_reference("self_calibrated_gate"), maps, weight)
    return max(_difference(a, b) for a, b in zip(ours, expected, strict=True))


def _polygon_mask_targets(device: str, generator: torch.Generator) -> float:
    """Three random polygons, which cross themselves; the first object has two of them."""
    vertices = torch.rand(24, 2, generator=generator) * 60
    offsets = torch.tensor([0, 3, 12, 24]), torch.tensor([0, 2, 3])
    boxes, index = _boxes(generator, 12, largest=48), torch.tensor([0, 1, -1] * 4)
    inputs = vertices, *offsets, boxes, index
    ours = cascadeops.polygon_mask_targets(*(tensor.to(device) for tensor in inputs), output_size=28)
    return _difference(ours, _reference("polygon_mask_targets")(*inputs, 28))


def _preprocess(device: str, generator: torch.Generator) -> float:
    images = [torch.randint(256, (*size, 3), dtype=torch.uint8, generator=generator) for size in [(30, 47), (51, 20)]]
    ours, sizes = cascadeops.preprocess([image.to(device) for image in images], (40, 60))
    expected, expected_sizes = _reference("preprocess")(images, (40, 60))
    return max(_difference(ours.double(), expected), _difference(sizes, expected_sizes))


def _self_calibrated_conv2d(device: str, generator: torch.Generator) -> float:
    sizes = (2, 16, 9, 14), *[(16, 16, 3, 3)] * 3, *[(16,)] * 3
    x, *parameters = (torch.randn(size, generator=generator) / math.prod(size[1:]) ** 0.25 for size in sizes)
    x = x.to(memory_format=torch.channels_last)
    ours = cascadeops.self_calibrated_conv2d(x.to(device), *(parameter.to(device) for parameter in parameters))
    expected = _reference("self_calibrated_conv2d")(x, *parameters)
    return _difference(ours, expected) / expected.abs().max().item()


CHECKS = {
    "batched_nms": (_batched_nms, 0.0),
    "box_proposals": (_box_proposals, 1e-4),
    "deform_conv2d": (_deform_conv2d, 1e-4),  # relative; float32 sums in another order
    "mask_targets": (_mask_targets, 1e-3),  # a cell whose coverage rounds to one half may fall on either side
    "match_boxes": (_match_boxes, 0.0),
    "multiclass_nms": (_multiclass_nms, 0.0),
    "multiscale_roi_align": (_multiscale_roi_align, 1e-4),  # float32 sums in another order
    "nms": (_nms, 0.0),
    "padded_nms": (_padded_nms, 0.0),
    "paste_masks": (_paste_masks, 1e-3),  # as mask_targets: a pixel at exactly the threshold
    "paste_masks_rle": (_paste_masks_rle, 0.0),
    "polygon_mask_targets": (_polygon_mask_targets, 0.0),
    "preprocess": (_preprocess, 1e-5),
    "roi_align": (_roi_align, 1e-4),
    "self_calibrated_conv2d": (_self_calibrated_conv2d, 5e-3),  # PyTorch's convolutions on a GPU may use TF32
    "self_calibrated_gate": (_self_calibrated_gate, 1e-4),  # exponentials differ in the last bits
}
"""Operator -> (check, largest difference that passes)."""
