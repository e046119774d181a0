"""One everyday call of every operator, for the tests that all operators share: bad input, guarded memory, threads.

A new operator takes one entry in OPERATORS. Two images (or objects) each, so that 2 is the first wrong index; boxes
within 40 pixels; sizes small enough for thousands of calls, large enough for two threads.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import cascadeops


@dataclass(frozen=True)
class Operator:
    arguments: Callable[[], dict[str, Any]]
    gradients: tuple[str, ...] = ()
    """The arguments that the result is differentiable in."""


def boxes(*shape: int) -> Tensor:
    """[*shape, 4] with corners in [0, 40] and sides of at least 2 pixels."""
    corners = torch.rand(*shape, 2, 2).sort(dim=-2).values * 38
    corners[..., 1, :] += 2
    return corners.flatten(-2)


def rois(count: int) -> Tensor:
    return torch.cat([torch.arange(count)[:, None] % 2, boxes(count)], 1)


def objects() -> dict[str, Tensor]:
    """Two crops of 12 x 10 and 9 x 14 pixels inside a border of zeros."""
    crops = [torch.zeros(10, 12, dtype=torch.uint8), torch.zeros(14, 9, dtype=torch.uint8)]
    for crop in crops:
        crop[1:-1, 1:-1] = torch.rand(crop.shape[0] - 2, crop.shape[1] - 2) < 0.7
    return {
        "bitmaps": torch.cat([crop.flatten() for crop in crops]),
        "offsets": torch.tensor([0, 120]),
        "windows": torch.tensor([[3, 5, 12, 10], [20, 8, 9, 14]], dtype=torch.int32),
    }


OPERATORS = {
    "batched_nms": Operator(
        lambda: {
            "boxes": boxes(30),
            "scores": torch.rand(30),
            "idxs": torch.randint(3, (30,)),
            "iou_threshold": 0.5,
        }
    ),
    "box_proposals": Operator(
        lambda: {
            "logits": [torch.randn(2, 90), torch.randn(2, 20)],
            "deltas": [torch.randn(2, 90, 4) * 0.3, torch.randn(2, 20, 4) * 0.3],
            "anchors": [boxes(90), boxes(20)],
            "image_sizes": torch.tensor([[35, 40], [30, 20]]),
            "top_k": 30,
            "max_proposals": 25,
            "iou_threshold": 0.6,
            "stds": [1.0, 1.0, 0.5, 0.5],
        }
    ),
    "deform_conv2d": Operator(
        lambda: {
            "input": torch.randn(2, 8, 7, 6).contiguous(memory_format=torch.channels_last),
            "offset": torch.randn(2, 36, 4, 3) * 2,
            "weight": torch.randn(6, 4, 3, 3),
            "bias": torch.randn(6),
            "stride": (2, 2),
            "padding": (1, 1),
            "dilation": (1, 1),
            "mask": torch.rand(2, 18, 4, 3),
        },
        gradients=("input", "offset", "weight", "bias", "mask"),
    ),
    "mask_targets": Operator(
        lambda: {**objects(), "boxes": boxes(6), "index": torch.tensor([0, 1, -1, 0, 1, 1]), "output_size": 7}
    ),
    "match_boxes": Operator(
        lambda: {
            "boxes": boxes(2, 70),
            "valid": torch.rand(2, 70) < 0.9,
            "gt_boxes": boxes(2, 5),
            "gt_valid": torch.rand(2, 5) < 0.9,
            "positive_iou": 0.6,
            "negative_iou": 0.4,
            "low_quality_iou": 0.2,
        }
    ),
    "multiclass_nms": Operator(
        lambda: {
            "boxes": boxes(2, 20),
            "scores": torch.rand(2, 20, 3),
            "score_threshold": 0.3,
            "iou_threshold": 0.5,
            "max_detections": 9,
        }
    ),
    "multiscale_roi_align": Operator(
        lambda: {
            "features": [
                torch.randn(2, 19, 10, 9).contiguous(memory_format=torch.channels_last),
                torch.randn(2, 19, 5, 4),
            ],
            "rois": rois(6),
            "output_size": (3, 2),
            "strides": [4.0, 8.0],
            "sampling_ratio": 0,
            "aligned": True,
            "finest_size": 14.0,
            "level_rule": "mmdet",
            "extra": torch.randn(2, 19, 7, 6),
            "extra_stride": 6.0,
            "extra_subdivision": 2,
            "image_vector": torch.randn(2, 19),
            "count": torch.tensor([5]),
        },
        gradients=("features", "extra", "image_vector"),
    ),
    "nms": Operator(lambda: {"boxes": boxes(30), "scores": torch.rand(30), "iou_threshold": 0.5}),
    "padded_nms": Operator(
        lambda: {
            "boxes": boxes(2, 30),
            "scores": torch.rand(2, 30),
            "groups": torch.randint(3, (2, 30)),
            "iou_threshold": 0.5,
            "max_output": 9,
        }
    ),
    "paste_masks": Operator(
        lambda: {
            "probs": torch.rand(3, 5, 7),
            "boxes": boxes(3),
            "image_size": (33, 37),
            "threshold": 0.5,
            "packed": False,
        }
    ),
    "paste_masks_rle": Operator(
        lambda: {"probs": torch.rand(3, 5, 7), "boxes": boxes(3), "image_size": (33, 37), "threshold": 0.5}
    ),
    "polygon_mask_targets": Operator(
        lambda: {
            "vertices": torch.rand(13, 2) * 40,
            "polygon_offsets": torch.tensor([0, 5, 9, 13]),
            "object_offsets": torch.tensor([0, 2, 3]),
            "boxes": boxes(6),
            "index": torch.tensor([0, 1, -1, 0, 1, 1]),
            "output_size": 7,
        }
    ),
    "preprocess": Operator(
        lambda: {
            "images": [torch.randint(256, (9, 13, 3)).byte(), torch.randint(256, (12, 7, 3)).byte()],
            "resize": (10.0, 16.0),
            "mean": [123.675, 116.28, 103.53],
            "std": [58.395, 57.12, 57.375],
            "divisor": 4,
            "dtype": torch.float32,
            "memory_format": torch.channels_last,
        }
    ),
    "roi_align": Operator(
        lambda: {
            "input": torch.randn(2, 5, 10, 9),
            "boxes": rois(6),
            "output_size": (3, 2),
            "spatial_scale": 0.25,
            "sampling_ratio": 2,
            "aligned": True,
        },
        gradients=("input",),
    ),
    "self_calibrated_gate": Operator(
        lambda: {
            "x": torch.randn(2, 20, 9, 14).contiguous(memory_format=torch.channels_last),
            "k3": torch.randn(2, 20, 9, 14).contiguous(memory_format=torch.channels_last),
            "k2": torch.randn(2, 20, 2, 3),
        },
        gradients=("x", "k3", "k2"),
    ),
}


@functools.cache
def _arguments(name: str) -> dict[str, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return OPERATORS[name].arguments()


def arguments_of(name: str) -> dict[str, Any]:
    """Fresh tensors, of the same values at every call."""
    return map_tensors(torch.clone, _arguments(name))


def call(name: str, arguments: dict[str, Any]) -> list[Any]:
    """Runs the operator; its result as a list of tensors and plain objects."""
    result = getattr(cascadeops, name)(**arguments)
    return list(result) if isinstance(result, tuple | list) else [result]


def map_tensors(change: Callable[[Tensor], Any], value: Any) -> Any:
    """`change` of every tensor in nested dicts, lists and tuples; everything else as it is."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(change, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(change, item) for item in value)
    return value


def identical(first: Any, second: Any) -> bool:
    """Equal to the bit; tensors also in dtype and shape, but in any strides."""
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(identical, first, second))
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return type(first) is type(second) and first == second
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    as_bytes = [tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in (first, second)]
    return torch.equal(*as_bytes)
