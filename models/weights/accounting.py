"""Does every tensor have its place? If not: which have none, and what each would have meant."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from .translation import Translation

PARTS = [
    (r"backbone\.layer(\d)", "layer {} of the backbone"),
    (r"layer(\d)", "layer {} of the backbone"),
    (r"backbone\.(conv1|bn1|stem)", "stem of the backbone"),
    (r"(conv1|bn1|stem)\b", "stem of the backbone"),
    (r"fc\b", "ImageNet classifier"),
    (r"fpn|neck", "feature pyramid"),
    (r"rpn\.(?:conv|objectness|deltas)|rpn_head", "region proposal network"),
    (r"box_heads\.(\d)", "box head of stage {}"),
    (r"box_head", "box head"),
    (r"mask_heads\.(\d)\.previous", "way of stage {}'s mask head to the mask features of the stage before"),
    (r"mask_heads\.(\d)", "mask head of stage {}"),
    (r"mask_head", "mask head"),
    (r"semantic_head", "semantic branch"),
    (r"global_context_head", "global context branch"),
    (r"feature_relay", "feature relay from the box to the mask head"),
    # names that no table translates, of heads that are not known here
    (r"(?:\w+\.)*(?:fpn|neck)", "feature pyramid"),
    (r"(?:\w+\.)*(?:rpn|rpn_head)\b", "region proposal network"),
    (r"(?:\w+\.)*\w*mask\w*", "mask head"),
    (r"(?:\w+\.)*\w*box\w*", "box head"),
    (r"backbone", "backbone"),
]
SHOWN_LINES = 24
CLASS_ROWS = re.compile(r"(?:^|\.)(class_logits|fc)\.(?:weight|bias)$")


def part_of(key: str) -> tuple[str, str]:
    """(names of the part that a tensor belongs to, what the part is): ("box_heads.0.*", "box head of stage 0")."""
    for pattern, meaning in PARTS:
        if match := re.match(pattern, key):
            return match[0] + ".*", meaning.format(*match.groups())
    return key, "nothing that is known here"


def differences(expected: Mapping[str, Tensor], translation: Translation) -> list[str]:
    """One line for each tensor that is missing, left over, or of another shape; up to a part's tensors in one line.

    Args:
        expected: the state dict to be filled.
        translation: what there is; `num_batches_tracked` may be absent (frozen norms have none, nobody reads it).
    """
    given = translation.state
    old_names = {step.new: step.old for step in translation.steps}
    missing = [key for key in expected if key not in given and not key.endswith("num_batches_tracked")]
    extra = [key for key in given if key not in expected]
    shaped = [key for key in expected if key in given and given[key].shape != expected[key].shape]
    lines = _by_part(missing, {}, set(given), "the file has none", "the file lacks it")
    lines += _by_part(extra, old_names, set(expected), "the detector has none", "the detector has no such tensor")
    for key in shaped:
        line = (
            f"{old_names.get(key, key)} {list(given[key].shape)}: {part_of(key)[1]}, {list(expected[key].shape)} here"
        )
        if CLASS_ROWS.search(key) and given[key].dim():
            line += f" ({_classes(key, given[key])} classes in the file, {_classes(key, expected[key])} here)"
        lines.append(line)
    return lines


def shorten(lines: list[str]) -> str:
    more = [f"and {len(lines) - SHOWN_LINES} more"] if len(lines) > SHOWN_LINES else []
    return "\n".join(lines[:SHOWN_LINES] + more)


def _classes(key: str, value: Tensor) -> int:
    return len(value) - (0 if key.startswith("fc.") else 1)  # without the background


def _by_part(keys: list[str], old_names: Mapping[str, str], there: set[str], whole: str, single: str) -> list[str]:
    """Lines by part: one for a part of which nothing is there, else its tensors, by name."""
    parts_there = {part_of(key)[0] for key in there}
    parts: dict[str, list[str]] = {}
    for key in keys:
        parts.setdefault(part_of(key)[0], []).append(key)
    lines = []
    for part, members in parts.items():
        meaning = part_of(members[0])[1]
        names = [old_names.get(key, key) for key in members]
        if part in parts_there or len(members) == 1:
            lines += [f"{text}: {meaning}; {single}" for text in _compressed(names)]
        else:
            lines.append(f"{_common(names)} ({len(members)} tensors): {meaning}; {whole}")
    return lines


def _compressed(names: list[str]) -> list[str]:
    """Names that differ in one number or in their last word as one: "fpn.output_convs.{0,1,2,3}.{weight,bias}"."""
    words: dict[str, list[str]] = {}
    for name in names:
        stem, _, last = name.rpartition(".")
        words.setdefault(stem, []).append(last)
    numbers: dict[tuple[str, str], list[str]] = {}
    for stem, last in words.items():
        found = re.search(r"\.(\d+)(?=\.|$)", stem)
        pattern = stem if found is None else f"{stem[: found.start(1)]}#{stem[found.end(1) :]}"
        numbers.setdefault((pattern, _braces(last)), []).append(found[1] if found else "")
    return [f"{pattern.replace('#', _braces(found))}.{last}".lstrip(".") for (pattern, last), found in numbers.items()]


def _braces(words: list[str]) -> str:
    return words[0] if len(words) == 1 else "{" + ",".join(words) + "}"


def _common(names: list[str]) -> str:
    """ "roi_head.mask_head.0.*" of names that begin so."""
    first, last = min(names).split("."), max(names).split(".")
    same = [a for a, b in zip(first, last, strict=False) if a == b]
    common = [part for part, other in zip(first, same, strict=False) if part == other]
    return ".".join([*common, "*"])
