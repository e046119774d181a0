"""Small detectors of every architecture and ablation, and input for them."""

import dataclasses

import numpy as np
import torch

from models import recipes
from models.build import build_from_config
from models.data.batch import PackedMasks
from models.detections import Detections
from models.inference import make_batch

ARCHS = ["faster_rcnn", "mask_rcnn", "cascade_mask_rcnn", "htc", "scnet"]
ABLATIONS = [
    ("cascade_mask_rcnn", {"masks": False}),
    ("htc", {"semantic": False}),
    ("htc", {"interleaved": False}),
    ("htc", {"mask_info_flow": False}),
    ("htc", {"semantic_fusion": ("mask",)}),
    ("htc", {"semantic_fusion": ()}),
    ("scnet", {"semantic": False}),
    ("scnet", {"global_context": False}),
    ("scnet", {"feature_relay": False}),
    ("mask_rcnn", {"class_specific_boxes": False}),
]
VARIANTS = [(arch, {}) for arch in ARCHS] + ABLATIONS


def variant_id(value) -> str:
    return value if isinstance(value, str) else "-".join(f"{key}={choice}" for key, choice in value.items()) or "whole"


def small_detector(arch: str, **fields) -> torch.nn.Module:
    """The detector of `--preset small` for 5 classes, with the scores spread so that something is detected."""
    torch.manual_seed(0)
    detector = recipes.small(arch).detector
    if hasattr(detector, "semantic"):
        fields = {"num_semantic_classes": 9} | fields
    detector = build_from_config(arch, dataclasses.replace(detector, num_classes=5, **fields))
    # With larger weights elsewhere, too, mask logits would reach millions, whose last bits alone decide some
    # probabilities.
    for name, parameter in detector.named_parameters():
        if name.startswith("box_head") and parameter.dim() > 1:
            parameter.data.mul_(3)
    return detector


def shallow_detector(arch: str, **fields) -> torch.nn.Module:
    """`small_detector` with every repeated layer once, for what takes time in proportion to the number of layers."""
    config = recipes.small(arch).detector
    repeated = ("mask_convs", "semantic_convs", "mask_blocks", "semantic_blocks", "global_blocks")
    once = {name: 1 for name in repeated if hasattr(config, name)}
    return small_detector(arch, backbone=dataclasses.replace(config.backbone, layers=(1, 1, 1, 1)), **once | fields)


def exported_without_sync(module: torch.nn.Module, *inputs: torch.Tensor) -> torch.nn.Module:
    """The exported program. `.item()`, `.nonzero()` and boolean indexing, which wait for a GPU, do not stop the export
    (nor torch.compile); they leave symbols for what they read."""
    program = torch.export.export(module, inputs)
    assert not program.range_constraints, "a number or a shape depends on the content of a tensor"
    return program.module()


def random_images(*sizes: tuple[int, int]) -> list[np.ndarray]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator).numpy() for size in sizes]


def padded(images: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Images [N, 3, H, W] with zeros at the right and below: [N, 3, *shape]"""
    height, width = images.shape[2:]
    return torch.nn.functional.pad(images, (0, shape[1] - width, 0, shape[0] - height))


def identical_detections(ours: Detections, theirs: Detections) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def training_batch() -> tuple:
    """What `losses` takes: two images of different sizes with two objects and one, whose masks fill their boxes."""
    images, sizes = make_batch(random_images((64, 96), (96, 64)), None, "cpu")
    boxes = [[[8.0, 8, 40, 50], [50, 10, 90, 40]], [[10, 20, 60, 80], [0, 0, 0, 0]]]
    labels = torch.tensor([[1, 4], [0, -1]])
    windows = torch.tensor(boxes).int()
    windows[..., 2:] -= windows[..., :2]
    areas = windows[..., 2:].prod(-1).flatten()
    masks = PackedMasks(
        torch.ones(int(areas.sum()), dtype=torch.uint8), (areas.cumsum(0) - areas).long().view(2, 2), windows
    )
    semantic = torch.randint(0, 9, (2, 12, 12), dtype=torch.uint8)
    return images, sizes, torch.tensor(boxes), labels, masks, semantic
