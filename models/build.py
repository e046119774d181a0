"""From names and numbers to a detector."""

from __future__ import annotations

import dataclasses
import difflib

import torch

from .config import BACKBONES, ResNetConfig, RPNConfig, SCNetConfig
from .errors import UsageError
from .scnet import SCNet

DETECTORS = {"scnet": (SCNet, SCNetConfig)}


def build_detector(
    arch: str, backbone: str = "resnet50", num_classes: int = 80, semantic: bool = True, **fields
) -> torch.nn.Module:
    """Builds a detector with random weights, in eval mode, channels-last.

    Args:
        arch: "scnet", the sample-consistency detector.
        backbone: a key of `models.config.BACKBONES`, "resnet50".
        num_classes: foreground classes.
        semantic: with the semantic branch; False for data without semantic maps.
        fields: any other field of the detector's configuration (`models.config.SCNetConfig`), by name.

    Raises:
        UsageError: an unknown architecture, backbone or field; names the nearest ones.
    """
    _, config_class = DETECTORS[_known("architecture", arch, DETECTORS)]
    names = [field.name for field in dataclasses.fields(config_class)]
    for name in fields:
        _known(f"field of {config_class.__name__}", name, names)
    config = config_class(
        backbone=BACKBONES[_known("backbone", backbone, BACKBONES)],
        num_classes=num_classes,
        semantic=semantic,
        **fields,
    )
    return build_from_config(arch, config)


def build_from_config(arch: str, config) -> torch.nn.Module:
    detector_class, _ = DETECTORS[_known("architecture", arch, DETECTORS)]
    return detector_class(config).to(memory_format=torch.channels_last).eval()


def config_from_dict(arch: str, values: dict):
    """Inverse of dataclasses.asdict for a detector's configuration, after a trip through JSON (lists become tuples)."""
    _, config_class = DETECTORS[_known("architecture", arch, DETECTORS)]
    nested = {"backbone": ResNetConfig, "rpn": RPNConfig}
    values = {key: nested[key](**_tuples(value)) if key in nested else value for key, value in values.items()}
    return config_class(**_tuples(values))


def _tuples(values: dict) -> dict:
    def convert(value):
        return tuple(convert(item) for item in value) if isinstance(value, list) else value

    return {key: convert(value) for key, value in values.items()}


def _known(what: str, name: str, names) -> str:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or sorted(names)
        raise UsageError(f"unknown {what} {name!r}", fix=f"did you mean {' or '.join(near)}?")
    return name
