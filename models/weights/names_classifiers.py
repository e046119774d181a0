"""ImageNet classifiers: torchvision's ResNet and ResNeXt, the Res2Net and self-calibrated authors', mmdetection's own.

Their names are ours, without `backbone.`; `from_mmdetection` of names_backbones.py knows mmdetection's deep stem.
"""

from __future__ import annotations

from collections.abc import Set


def source(names: Set[str]) -> str | None:
    """Whose classifier, by its names; None: none that is known."""
    if "layer1.0.conv1_a.weight" in names:
        return "self-calibrated networks, their authors"
    if "stem.0.weight" in names:
        return "mmdetection's ImageNet backbones"
    if "layer1.0.convs.0.weight" in names:
        return "Res2Net, its authors"
    if {"conv1.weight", "layer1.0.conv1.weight"} <= names:
        return "torchvision ResNet"
    return None
