"""A training configuration as JSON, and back: config.json of a run, from which alone another can start.

    python -m models.train --preset runs/mine/config.json --output runs/again

Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path

from .command_line import given_switch, given_value
from .config import DETECTOR_CONFIGS
from .errors import DataError, UsageError
from .files import read_bytes
from .published_rows import presets_for
from .recipes import TrainConfig

PATHS = ("data", "weights", "backbone_weights")
"""Written as absolute paths: a run may start from the file in another folder."""


MAX_BYTES = 2**20
"""Of a configuration file; a run's has 4 kB."""

LARGEST = 2**64
"""No number of a configuration is as large."""


def as_json(config: TrainConfig) -> dict:
    values = dataclasses.asdict(config) | {name: getattr(config, name) for name in PATHS}
    absolute = {name: str(values[name].resolve()) for name in PATHS if values[name] is not None}
    return json.loads(json.dumps(values | absolute | {"resume": False}, default=str))


def settings(config: TrainConfig) -> list[str]:
    """Every field with its value, for a person: ["arch=scnet", "detector.rpn.top_k=1000", ...]."""

    texts = {
        name: json.dumps(value).replace('"', "") if isinstance(value, list) else value
        for name, value in unfolded(as_json(config)).items()
    }
    return [f"{name}={text}" for name, text in texts.items()]


def unfolded(values: dict, prefix: str = "") -> dict[str, object]:
    """{"arch": "scnet", "optimizer.lr": 0.02, ...}"""
    found = {}
    for name, value in values.items():
        found |= unfolded(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def read_config(path: Path) -> TrainConfig:
    """The configuration that a run wrote.

    Raises:
        DataError: no such file, or it holds an unknown field, a wrong type or a value that is not allowed.
    """
    try:
        return config_from_json(json_of(read_bytes(path, MAX_BYTES)))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError("the configuration cannot be read", where=path, why=error) from error


def json_of(text: str | bytes) -> object:
    """What `text` holds. ValueError or RecursionError: it is no JSON, or has NaN or infinity, which are none."""

    def refuse(name: str) -> None:
        raise ValueError(f"it contains {name}, which is no number")

    return json.loads(text, parse_constant=refuse)


def config_from_json(values: object) -> TrainConfig:
    """Inverse of `as_json`. ValueError names the field that is wrong."""
    arch = values.get("arch") if isinstance(values, dict) else None
    if not isinstance(arch, str) or arch not in DETECTOR_CONFIGS:
        raise ValueError(f"arch: expected one of {', '.join(DETECTOR_CONFIGS)}, got {arch!r}")
    return dataclass_from_json(TrainConfig, values, "", {"detector": DETECTOR_CONFIGS[arch]})


def starting_points(arguments: Sequence[str]) -> dict[str, TrainConfig]:
    """What `--preset` may name on a command line; the first is the default.

    A file of a run is one of them, and `--resume` starts from the file in the run's own folder, so that nothing of the
    first command line needs to be typed again.
    """
    preset = given_value("preset", arguments)
    if preset is not None and preset.endswith(".json"):
        return {preset: read_config(Path(preset))}
    presets = presets_for(preset, given_value("arch", arguments))
    own = Path(given_value("output", arguments) or next(iter(presets.values())).output) / "config.json"
    if preset is None and given_switch("resume", arguments) and own.is_file():
        return {str(own): read_config(own)}
    return presets


def dataclass_from_json(kind: type, values: object, name: str, decided: dict[str, type] | None = None):
    if not isinstance(values, dict):
        raise ValueError(f"{name}: expected an object, got {values!r:.80}")
    hints = _type_hints(kind) | (decided or {})
    fields = [field.name for field in dataclasses.fields(kind)]
    dotted = f"{name}." if name else ""
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=3)
            raise ValueError(f"{dotted}{key}: no such field" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    try:
        return kind(**{key: _value(hints[key], value, dotted + key) for key, value in values.items()})
    except TypeError as error:
        raise ValueError(f"{name or 'the configuration'}: {error}") from error


_type_hints = functools.cache(typing.get_type_hints)


def _value(kind: object, value: object, name: str):
    """`value`, as JSON holds it, as the type `kind`."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return dataclass_from_json(kind, value, name)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in parts:
            return None
        return _value(next(part for part in parts if part is not type(None)), value, name)
    if origin is tuple and isinstance(value, list):
        kinds = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
        if len(kinds) == len(value):
            return tuple(_value(part, item, name) for part, item in zip(kinds, value, strict=True))
    elif origin is typing.Literal and value in parts:
        return value
    elif kind is float and type(value) in (int, float) and abs(value) < LARGEST:
        return float(value)
    elif kind is int and type(value) is int and abs(value) < LARGEST:
        return value
    elif kind is Path and isinstance(value, str) and "\0" not in value:
        return Path(value)
    elif origin is None and kind not in (int, float) and type(value) is kind:
        return value
    expected = getattr(kind, "__name__", str(kind)) if origin is None else str(kind)
    raise ValueError(f"{name}: expected {expected}, got {value!r:.80}")


def check_same_settings(before: dict, config: TrainConfig, where: Path) -> None:
    """UsageError, with the differences, if a run that began with the settings `before` is to go on with others."""
    now, before = unfolded(as_json(config)), unfolded(before)
    differing = [key for key in now if key not in MAY_CHANGE and now[key] != before.get(key)]
    if differing:
        raise UsageError(
            "the run was started with other settings",
            where=where,
            why="\n".join(f"{key}: {before.get(key)} then, {now[key]} now" for key in differing),
            fix="leave them out: --output FOLDER --resume takes all settings from the run itself",
        )


MAY_CHANGE = {
    "resume",
    "output",
    "data",
    "weights",
    "backbone_weights",
    "device",
    "workers",
    "max_iterations",
    "evaluate_every",
    "log_every",
    "checkpoint_every",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "on_bad_image",
    "max_evaluation_images",
    "checkpoint_activations",
    "rank_timeout",
}
"""Settings that do not change what a step computes, so that a resumed run may have others."""
