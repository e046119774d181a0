"""From names and numbers to a detector."""

from __future__ import annotations

import dataclasses
import difflib

import torch

from .cascade_mask_rcnn import CascadeMaskRCNN
from .config import DETECTOR_CONFIGS
from .config_backbones import BACKBONES, BackboneConfig, with_deformable
from .config_files import dataclass_from_json
from .errors import UsageError
from .faster_rcnn import FasterRCNN
from .htc import HTC
from .mask_rcnn import MaskRCNN
from .published_rows import PUBLISHED_ROWS
from .scnet import SCNet

DETECTORS = {detector.arch: detector for detector in (FasterRCNN, MaskRCNN, CascadeMaskRCNN, HTC, SCNet)}


def build_detector(
    arch: str,
    backbone: str | None = None,
    num_classes: int = 80,
    semantic: bool | None = None,
    dcn: bool = False,
    **fields,
) -> torch.nn.Module:
    """Builds a detector with random weights, in eval mode, channels-last.

    Args:
        arch: "faster_rcnn", "mask_rcnn", "cascade_mask_rcnn", "htc" or "scnet", the sample-consistency detector; or a
            published row (`models.published_rows`), such as "scnet_r50_fpn_20e_coco".
        backbone: a key of `models.config_backbones.BACKBONES`; default: "resnet50", or that of the published row.
        num_classes: foreground classes.
        semantic: HTC and SCNet: with the semantic branch (the default), or without, for data without semantic maps.
        dcn: deformable convolutions in layer2..layer4 of the backbone ("dconv c3-c5").
        fields: any other field of the detector's configuration (`models.config.DETECTOR_CONFIGS`), by name.

    Raises:
        UsageError: an unknown architecture, backbone or field; names the nearest ones. `dcn` for a backbone that has
            no bottleneck blocks.
    """
    if arch in PUBLISHED_ROWS:
        recipe = PUBLISHED_ROWS[arch].recipe
        arch, config = recipe.arch, recipe.detector
        if backbone is not None:
            config = dataclasses.replace(config, backbone=backbone_config(backbone, dcn))
        elif dcn:
            config = dataclasses.replace(config, backbone=deformable(config.backbone, arch))
    else:
        config = DETECTOR_CONFIGS[known("architecture", arch, DETECTORS)](backbone_config(backbone or "resnet50", dcn))
    if semantic is not None:
        fields["semantic"] = semantic
    names = [field.name for field in dataclasses.fields(config)]
    for name in fields:
        known(f"field of {type(config).__name__}", name, names)
    return build_from_config(arch, dataclasses.replace(config, num_classes=num_classes, **fields))


def backbone_config(name: str, dcn: bool = False) -> BackboneConfig:
    """The backbone of a name in `models.config_backbones.BACKBONES`; UsageError names the nearest ones."""
    config = BACKBONES[known("backbone", name, BACKBONES)]
    return deformable(config, name) if dcn else config


def deformable(config: BackboneConfig, name: str) -> BackboneConfig:
    """With deformable convolutions; UsageError where the backbone called `name` has no bottleneck blocks."""
    if config.block == "basic":
        raise UsageError(
            f"{name} has no deformable form", why="dcn is for bottleneck blocks", fix="take resnet50, or another one"
        )
    return with_deformable(config)


def build_from_config(arch: str, config) -> torch.nn.Module:
    detector_class = DETECTORS[known("architecture", arch, DETECTORS)]
    return detector_class(config).to(memory_format=torch.channels_last).eval()


def config_from_dict(arch: str, values: object):
    """Inverse of dataclasses.asdict for a detector's configuration, after a trip through JSON (lists become tuples).
    ValueError names the field that is wrong."""
    config_class = DETECTOR_CONFIGS[known("architecture", arch, DETECTORS)]
    return dataclass_from_json(config_class, values, "")


def known(what: str, name: str, names) -> str:
    """`name`, if it is one of `names`; UsageError names the nearest ones."""
    if name not in names:
        near = [known for known in names if known.startswith(name)]
        near = near or difflib.get_close_matches(name, names, n=3, cutoff=0.4) or sorted(names)
        raise UsageError(f"unknown {what} {name!r}", fix=f"did you mean {' or '.join(near)}?")
    return name
