"""Another project's weights file -> the detector that it belongs to, with its weights and its classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from ..build import backbone_config, build_from_config, known
from ..checkpoint import load_translation
from ..coco_classes import COCO_CLASSES
from ..config import DETECTOR_CONFIGS
from .architecture import find_architecture, find_backbone, find_config, unknown_architecture
from .contents import Contents
from .translation import Translation


class Recognised(NamedTuple):
    detector: nn.Module
    loaded: Translation
    """What was loaded and what was left out."""
    backbone: str
    """Its name."""
    deformable: bool


def recognise_detector(
    contents: Contents,
    translation: Translation,
    arch: str | None = None,
    backbone: str | None = None,
) -> Recognised:
    """Builds the detector that translated weights belong to, in their arithmetic, and loads them.

    Args:
        arch, backbone: None: by the names and shapes of the tensors.

    Raises:
        UsageError: architecture or backbone cannot be seen, or are not known. DataError: as `load_weights`.
    """
    arch = arch or find_architecture(translation.state)
    if arch is None:
        raise unknown_architecture(contents.where, "--arch")
    known("architecture", arch, DETECTOR_CONFIGS)
    found = (backbone, None) if backbone else find_backbone(translation.state)
    if found is None:
        raise unknown_architecture(contents.where, "--backbone")
    deformable = any(key.endswith(".offset.weight") for key in translation.state)
    config = find_config(arch, backbone_config(found[0], deformable), translation.state, translation.fields)
    detector = build_from_config(arch, config)
    loaded = load_translation(detector, translation, contents.where)
    return Recognised(detector, loaded, found[0], deformable)


def classes_of(names: Sequence[str] | None, number: int) -> tuple[list[str], list[int]]:
    """(class names, category ids) by label, of the names in a file, if it has any, and its number of classes.

    80 classes without names are COCO's; so are 90, torchvision's, which keeps the ids that have no class.
    """
    if number == len(COCO_CLASSES) and (names is None or list(names) == list(COCO_CLASSES.values())):
        return list(COCO_CLASSES.values()), list(COCO_CLASSES)
    if names is None and number == max(COCO_CLASSES):
        return [COCO_CLASSES.get(i, f"no class {i}") for i in range(1, number + 1)], list(range(1, number + 1))
    if names is None or len(names) != number:
        names = [f"class {i}" for i in range(1, number + 1)]
    return list(names), list(range(1, number + 1))
