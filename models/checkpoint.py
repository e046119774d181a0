"""Weights: our own safetensors files, and other projects' files translated name by name.

A weights file of ours is self-contained: its header holds the architecture, the configuration and the class names, so
that `load_detector(path)` needs nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile

import torch
from torch import Tensor

from .build import build_from_config, config_from_dict
from .errors import DataError
from .files import atomic_path
from .names_mmdetection import rename

FORMAT = "cascadeops-weights-1"


def translate_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames a state dict of a known project to ours; ours is returned as it is."""
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if not any(key.startswith("roi_head.") for key in state):
        return state
    return {rename(key): value for key, value in state.items()}


def load_weights(detector: torch.nn.Module, source: str | os.PathLike | dict[str, Tensor]) -> None:
    """Copies weights into a detector; the format is recognised by its names.

    Args:
        detector: what `build_detector` returned.
        source: a file (ours, or a .pth that holds only tensors) or a state dict; ours or mmdetection's names.

    Raises:
        DataError: no such file, a damaged file, or weights of another architecture: names the first differing tensors.
    """
    where, state = "state dict", source
    if not isinstance(source, dict):
        where, state = os.fspath(source), read_state(source)
    state = translate_names(state)
    expected = detector.state_dict()
    # Absent in files of frozen batch norm; it only matters to a momentum that nobody uses.
    for key in expected.keys() - state.keys():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros_like(expected[key])
    problems = [f"missing {key} {list(expected[key].shape)}" for key in expected if key not in state]
    problems += [f"unexpected {key} {list(value.shape)}" for key, value in state.items() if key not in expected]
    problems += [
        f"{key} is {list(state[key].shape)}, the detector's is {list(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if problems:
        shown = "\n".join(problems[:6] + ([f"and {len(problems) - 6} more"] if len(problems) > 6 else []))
        raise DataError(
            "these weights are of another architecture than the detector",
            where=where,
            why=f"{len(problems)} of {len(expected)} tensors differ:\n{shown}",
            fix="build the detector that they belong to: architecture, backbone, number of classes, semantic branch",
        )
    detector.load_state_dict(state)


def read_state(path: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors of a weights file by name; never runs code from the file."""
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise DataError("no such weights file", where=path, fix="train some: python -m models.train --arch scnet")
    if zipfile.is_zipfile(path):
        return _read_torch_file(path)
    return _read_safetensors(path)[0]


def _read_torch_file(path: str) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(
            "this weights file holds more than tensors, or is damaged", where=path, why=str(error).splitlines()[0]
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise DataError("this file does not hold a state dict", where=path, why="expected tensors by name")
    return content


def _read_safetensors(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    import safetensors

    try:
        with safetensors.safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise DataError(
            "this is not a weights file that can be read",
            where=path,
            why=f"neither safetensors nor a torch archive ({error})",
            fix="copy the file again, or name another one",
        ) from error


def save_weights(
    path: str | os.PathLike,
    detector: torch.nn.Module,
    class_names: list[str],
    category_ids: list[int],
    extra: dict | None = None,
) -> None:
    """Writes the detector, its configuration and its classes to one safetensors file, atomically.

    Args:
        class_names, category_ids: by label; the ids are the data set's own, used in result files.
        extra: anything that JSON holds, kept under "extra": metrics, recipe, resize limits.
    """
    from safetensors.torch import save_file

    metadata = {
        "format": FORMAT,
        "arch": detector.arch,
        "config": json.dumps(dataclasses.asdict(detector.config)),
        "class_names": json.dumps(list(class_names)),
        "category_ids": json.dumps([int(key) for key in category_ids]),
        "extra": json.dumps(extra or {}),
    }
    state = {key: value.detach().cpu().contiguous() for key, value in detector.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata)


def load_detector(path: str | os.PathLike) -> tuple[torch.nn.Module, dict]:
    """Builds the detector that a weights file of ours describes, ready for inference.

    Returns:
        The detector in eval mode, and {"arch", "class_names", "category_ids", "extra"}.
    """
    path = os.fspath(path)
    state = read_state(path)
    metadata = {} if zipfile.is_zipfile(path) else _read_safetensors(path)[1]
    if metadata.get("format") != FORMAT:
        raise DataError(
            "this weights file does not say which detector it belongs to",
            where=path,
            why="its header has no CascadeOps configuration",
            fix="build_detector(...) with its architecture, then load_weights(detector, path)",
        )
    config = config_from_dict(metadata["arch"], json.loads(metadata["config"]))
    detector = build_from_config(metadata["arch"], config)
    load_weights(detector, state)
    facts = {key: json.loads(metadata[key]) for key in ("class_names", "category_ids", "extra")}
    return detector.eval(), {"arch": metadata["arch"], **facts}


def load_backbone(backbone: torch.nn.Module, path: str | os.PathLike) -> None:
    """Copies ImageNet weights with torchvision's names into a backbone; the classifier (`fc`) is left out."""
    state = {key: value for key, value in read_state(path).items() if not key.startswith("fc.")}
    expected = backbone.state_dict()
    wrong = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    wrong += [key for key in state if key not in expected or state[key].shape != expected[key].shape]
    if wrong:
        raise DataError(
            "these weights are of another backbone",
            where=os.fspath(path),
            why=f"{len(wrong)} of {len(expected)} tensors are missing or of another shape: {', '.join(wrong[:4])}",
            fix="name the file of the same network, with torchvision's names",
        )
    backbone.load_state_dict(state, strict=False)
