"""Recognises whose weights these are by their names, and gives each tensor our name and our order of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from .. import names_backbones, names_mmdetection
from ..errors import DataError
from . import (
    names_classifiers,
    names_maskrcnn_benchmark,
    names_mmdetection_1,
    names_paddle,
    names_torchvision,
)

DETECTOR_SOURCES = (names_mmdetection_1, names_maskrcnn_benchmark, names_torchvision, names_paddle)
"""Each one: SOURCE, recognises(names), translate(key, value), FIELDS (see `Translation`)."""


class Step(NamedTuple):
    """What became of one tensor of the file."""

    old: str
    new: str | None
    """Our name; None: left out."""
    note: str
    """What was done to the numbers, or why it was left out; empty: nothing."""


class Translation(NamedTuple):
    source: str
    """Whose weights: "mmdetection 2.x or 3.x"."""
    state: dict[str, Tensor]
    """By our names; those of a backbone alone have no `backbone.` in front."""
    steps: list[Step]
    """One for each tensor of the file."""
    fields: dict[str, object]
    """Fields of a detector's configuration that these weights need, "backbone.stage_pool": True."""
    whole: bool
    """Weights of a detector; False: of a backbone or an ImageNet classifier."""


def translate(state: Mapping[str, Tensor], where: str) -> Translation:
    """Names and rows of ours for weights of any known project.

    Raises:
        DataError: nobody's names, or two tensors that would get one name.
    """
    plain = {key.removeprefix("module."): key for key in state}  # DistributedDataParallel's prefix
    if all(name.startswith(("backbone.", "fc.")) for name in plain):
        plain = {name.removeprefix("backbone."): key for name, key in plain.items()}  # our classifiers, saved backbones
    if len(plain) < len(state):
        raise DataError("two tensors of this file have one name", where=where, why="but for `module.` or `backbone.`")
    names = plain.keys()
    fields: dict[str, object] = {}
    whole = True
    classifier = names_classifiers.source(names)
    source = next((known for known in DETECTOR_SOURCES if known.recognises(names)), None)
    if any(name.startswith(("fpn.", "rpn.objectness.")) for name in names):
        kind, steps = "ours", [Step(old, name, "") for name, old in plain.items()]
    elif any(name.startswith("roi_head.") for name in names):
        kind, fields = "mmdetection 2.x or 3.x", {"arithmetic": "mmdetection"}
        steps = [_from_mmdetection(old, name, "") for name, old in plain.items()]
    elif source is not None:
        kind, fields = source.SOURCE, dict(source.FIELDS)
        steps, moved = [], {}
        for name, old in plain.items():
            new, value, note = source.translate(name, state[old])
            steps.append(_from_mmdetection(old, new, note))
            moved[old] = value
        state = moved
        whole = any(not step.new.startswith("backbone.") for step in steps)
        if source is names_torchvision and not any(name.endswith("num_batches_tracked") for name in names):
            fields |= names_torchvision.FROZEN_NORMS
    elif classifier is not None:
        kind, whole = classifier, False
        steps = [Step(old, names_backbones.from_mmdetection(name), "") for name, old in plain.items()]
    else:
        raise _unknown(plain, where)
    if _is_mmdetection(kind) and any(".convs.0." in name for name in names if name.startswith("backbone.")):
        fields["backbone.stage_pool"] = False
    if not whole:
        steps = [step._replace(new=step.new.removeprefix("backbone.")) for step in steps]
        fields = {}
    renamed = {step.new: state[step.old] for step in steps}
    if len(renamed) < len(steps):
        raise DataError("two tensors of this file have one meaning", where=where, why=_twice(steps))
    return Translation(kind, renamed, steps, fields, whole)


def backbone_of(translation: Translation) -> Translation:
    """The backbone alone, of a detector's weights or a classifier's: the rest is left out, and said to be."""
    if not translation.whole:
        return translation
    steps = [
        step._replace(new=step.new.removeprefix("backbone."))
        if step.new.startswith("backbone.")
        else Step(step.old, None, "no part of the backbone")
        for step in translation.steps
    ]
    state = {
        key.removeprefix("backbone."): value for key, value in translation.state.items() if key.startswith("backbone.")
    }
    return translation._replace(state=state, steps=steps, fields={}, whole=False)


def as_classifier(translation: Translation) -> Translation:
    """A backbone's or classifier's names as those of our classifiers, whose backbone is a part: `backbone.`, `fc.`"""
    steps = [
        step if step.new is None or step.new.startswith("fc.") else step._replace(new=f"backbone.{step.new}")
        for step in translation.steps
    ]
    state = {key if key.startswith("fc.") else f"backbone.{key}": value for key, value in translation.state.items()}
    return translation._replace(state=state, steps=steps)


def leave_out(translation: Translation, prefix: str, why: str) -> Translation:
    """The same without the tensors whose name of ours begins with `prefix`."""
    state = {key: value for key, value in translation.state.items() if not key.startswith(prefix)}
    steps = [
        Step(step.old, None, why) if step.new is not None and step.new.startswith(prefix) else step
        for step in translation.steps
    ]
    return translation._replace(state=state, steps=steps)


def _is_mmdetection(kind: str) -> bool:
    return kind.startswith("mmdetection") and "ImageNet" not in kind


def _from_mmdetection(old: str, name: str, note: str) -> Step:
    if name.startswith("backbone."):
        return Step(old, names_backbones.from_mmdetection(name), note)
    return Step(old, names_mmdetection.rename(name), note)


def _twice(steps: list[Step]) -> str:
    first: dict[str, str] = {}
    for step in steps:
        if step.new in first:
            return f"{first[step.new]} and {step.old} are both {step.new}"
        first[step.new] = step.old
    return ""


def _unknown(plain: Mapping[str, str], where: str) -> DataError:
    why = f"its {len(plain)} names are like nobody's: {', '.join(list(plain)[:4])}{' ...' if len(plain) > 4 else ''}"
    if any("bottom_up." in name for name in plain):
        why = "their names are detectron2's, whose weights are not read"
    return DataError(
        "these weights are of no project that is known here",
        where=where,
        why=why,
        fix="docs/weights.md lists the projects; rename the tensors to one of those",
    )
