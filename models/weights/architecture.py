"""Which detector weights belong to, by their names and shapes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from ..backbones import build_backbone
from ..config import DETECTOR_CONFIGS
from ..config_backbones import BACKBONES, BackboneConfig, with_deformable
from ..errors import DataError, UsageError

TRAINING_ONLY = {"backbone.norm", "match_low_quality"}
"""Fields of a source's arithmetic that leave the results of given weights as they are."""
ARITHMETIC = (
    "arithmetic",
    "backbone.norm_eps",
    "backbone.stride_in_1x1",
    "backbone.stage_pool",
    "stage_stds",
    "box_stds",
)
"""Fields that no tensor shows, and that change what given weights detect."""


def find_architecture(state: Mapping[str, Tensor]) -> str | None:
    """A key of `models.config.DETECTOR_CONFIGS` from our names; None: none of them."""
    heads = {key.split(".")[0] for key in state}
    if "box_heads" not in heads:
        if "box_head" not in heads:
            return None
        return "mask_rcnn" if "mask_head" in heads else "faster_rcnn"
    if "mask_head" in heads:
        return "scnet"
    if "semantic_head" in heads or any(key.startswith("mask_heads.1.previous.") for key in state):
        return "htc"
    return "cascade_mask_rcnn"


def find_backbone(state: Mapping[str, Tensor]) -> tuple[str, bool] | None:
    """(a key of `models.config_backbones.BACKBONES`, deformable) whose tensors are exactly those named `backbone.`."""
    shapes = {
        key.removeprefix("backbone."): value.shape
        for key, value in state.items()
        if key.startswith("backbone.") and not key.endswith("num_batches_tracked")
    }
    layers = tuple(len({key.split(".")[1] for key in shapes if key.startswith(f"layer{i}.")}) for i in range(1, 5))
    deformable = any(key.endswith(".offset.weight") for key in shapes)
    for name, config in BACKBONES.items():
        if config.layers == layers and not (deformable and config.block == "basic"):
            config = with_deformable(config) if deformable else config
            if _shapes(config) == shapes:
                return name, deformable
    return None


def _shapes(config: BackboneConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        state = build_backbone(config).state_dict()
    return {key: value.shape for key, value in state.items() if not key.endswith("num_batches_tracked")}


def find_config(arch: str, backbone: BackboneConfig, state: Mapping[str, Tensor], needs: Mapping[str, object]):
    """The configuration of a detector of `arch` for these weights.

    Args:
        needs: fields by dotted name ("backbone.norm") that the weights ask for; those that `arch` has not are left out.
    """
    config_class = DETECTOR_CONFIGS[arch]
    names = {field.name for field in dataclasses.fields(config_class)}
    first = "box_head.class_logits.bias" if "box_head.class_logits.bias" in state else "box_heads.0.class_logits.bias"
    if first not in state or state[first].dim() != 1 or len(state[first]) < 2:
        raise DataError("the number of classes cannot be read from these weights", why=f"they have no {first}")
    heads = {key.split(".")[0] for key in state}
    fields = {
        "num_classes": len(state[first]) - 1,
        "semantic": "semantic_head" in heads,
        "masks": "mask_heads" in heads,
        "global_context": "global_context_head" in heads,
        "feature_relay": "feature_relay" in heads,
    }
    widths = {
        "num_semantic_classes": "semantic_head.logits.bias",
        "channels": "fpn.output_convs.0.bias",
        "box_channels": first.replace("class_logits", "fc1"),
    }
    fields |= {name: len(state[key]) for name, key in widths.items() if key in state and state[key].dim() == 1}
    config = config_class(backbone=backbone, **{name: value for name, value in fields.items() if name in names})
    return with_fields(config, needs)


def with_fields(config, needs: Mapping[str, object]):
    """`config` with fields by dotted name; those that it has not are left out."""
    inner = {key.removeprefix("backbone."): value for key, value in needs.items() if key.startswith("backbone.")}
    own = {field.name for field in dataclasses.fields(config)}
    outer = {key: value for key, value in needs.items() if key in own}
    try:
        return dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, **inner), **outer)
    except ValueError as error:
        raise DataError("no detector here has the arithmetic of these weights", why=str(error)) from None


def unmet(config, needs: Mapping[str, object]) -> dict[str, object]:
    """{field: value that the weights need} where `config` has another one, of those that change what is detected."""
    found = {}
    for key, value in needs.items():
        if key in TRAINING_ONLY:
            continue
        holder = config.backbone if key.startswith("backbone.") else config
        name = key.removeprefix("backbone.")
        if hasattr(holder, name) and getattr(holder, name) != value:
            found[key] = value
    return found


def arithmetic_of(config: Mapping[str, object]) -> dict[str, object]:
    """{field: value} of `ARITHMETIC` from a configuration in a file of ours (JSON: lists for tuples)."""
    flat = {**config, **{f"backbone.{key}": value for key, value in config.get("backbone", {}).items()}}
    return {key: _tuples(flat[key]) for key in ARITHMETIC if key in flat}


def _tuples(value: object) -> object:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def unknown_architecture(where: str, option: str) -> UsageError:
    names = DETECTOR_CONFIGS if option == "--arch" else BACKBONES
    return UsageError(
        "these weights do not tell which detector they belong to"
        if option == "--arch"
        else "their backbone is unknown",
        where=where,
        fix=f"name it: {option} {' | '.join(names)}",
    )
