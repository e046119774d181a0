"""Weights: our own safetensors files, and other projects' files translated name by name.

A weights file of ours is self-contained: its header holds the architecture, the configuration and the class names, so
that `load_detector(path)` needs nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import os

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .build import build_from_config, config_from_dict
from .config_files import json_of
from .errors import DataError, UsageError
from .files import atomic_path
from .weights.accounting import differences, shorten
from .weights.architecture import arithmetic_of, unmet
from .weights.contents import Contents, read_contents
from .weights.translation import Translation, as_classifier, backbone_of, leave_out, translate

FORMAT = "cascadeops-weights-1"


def load_weights(detector: nn.Module, source: str | os.PathLike | dict[str, Tensor]) -> None:
    """Copies weights of any known project into a detector, a backbone or a classifier: all of them, or none.

    The project is recognised by the names of its tensors: mmdetection 1.x to 3.x, torchvision, maskrcnn-benchmark, the
    authors of Res2Net and of the self-calibrated networks, Paddle, or ours. Nothing of the file is run.

    Args:
        detector: what `build_detector` returned. A backbone alone takes the backbone of a detector's file, too.
        source: a file (.safetensors, .pth, .pdparams) or a state dict.

    Raises:
        DataError: no such file, a damaged file, weights of another architecture, which names every tensor that has no
            place, or of another arithmetic than the detector's.
    """
    contents = Contents("state dict", source, {}) if isinstance(source, dict) else read_contents(source)
    translation = translate(contents.state, contents.where)
    if contents.metadata and contents.metadata.get("format") == FORMAT:
        translation = translation._replace(fields=arithmetic_of(dataclasses.asdict(_facts(contents)["config"])))
    load_translation(detector, translation, contents.where)


def load_translation(detector: nn.Module, translation: Translation, where: str) -> Translation:
    """`load_weights` of what is translated already; returns what was loaded and what was left out for this detector."""
    expected = detector.state_dict()
    parts = {key.split(".")[0] for key in expected}
    if "backbone" not in parts:
        translation = backbone_of(translation)
    elif "rpn" not in parts:  # a classifier
        translation = as_classifier(backbone_of(translation))
    elif not translation.whole:
        raise DataError(
            "these weights are of a backbone, not of a detector",
            where=where,
            why=f"they are recognised as: {translation.source}",
            fix="for training: --backbone-weights FILE; in Python: load_weights(detector.backbone, FILE)",
        )
    if "fc" not in parts:
        translation = leave_out(translation, "fc.", "the ImageNet classifier, which a detector has not")
    lines = differences(expected, translation)
    if lines:
        raise DataError(
            "these weights are of another architecture than the detector; nothing was loaded",
            where=where,
            why=f"recognised as {translation.source}; {len(expected)} tensors are expected\n{shorten(lines)}",
            fix="build the detector that they belong to: architecture, backbone, number of classes, semantic branch",
        )
    if "rpn" in parts:
        _check_arithmetic(detector.config, translation, where)
    # num_batches_tracked is absent in files of frozen norms; it only matters to a momentum that nobody uses.
    zeros = {
        key: value.new_zeros(value.shape) for key, value in expected.items() if key.endswith("num_batches_tracked")
    }
    detector.load_state_dict(zeros | translation.state)
    return translation


def _check_arithmetic(config, translation: Translation, where: str) -> None:
    wrong = unmet(config, translation.fields)
    if wrong:
        raise DataError(
            f"weights of {translation.source} need a detector with its arithmetic; nothing was loaded",
            where=where,
            why="\n".join(f"config.{name} must be {value!r}" for name, value in wrong.items()),
            fix="python -m models.convert FILE --output OURS.safetensors   (load_detector(OURS) then has these fields)",
        )


def read_state(path: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors of a weights file by the file's own names; never runs code from the file."""
    return read_contents(path).state


def translate_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of a known project with our names, and its rows in our order."""
    return translate(state, "state dict").state


def save_weights(
    path: str | os.PathLike,
    detector: nn.Module,
    class_names: list[str],
    category_ids: list[int],
    extra: dict | None = None,
    half: bool = False,
) -> None:
    """Writes the detector, its configuration and its classes to one safetensors file, atomically.

    Args:
        class_names, category_ids: by label; the ids are the data set's own, used in result files.
        extra: anything that JSON holds, kept under "extra": metrics, recipe, resize limits.
        half: store the weights of layers in float16, for half the size; norms and biases keep their type. Loading gives
            float32 again.
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
    if half:
        state = {key: value.half() if value.ndim > 1 else value for key, value in state.items()}
    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata)


def class_table(path: str | os.PathLike) -> tuple[list[str], list[int]] | None:
    """(class names, category ids) by label of a weights file of ours; None for another project's."""
    contents = read_contents(path)
    if (contents.metadata or {}).get("format") != FORMAT:
        return None
    facts = _facts(contents)
    return facts["class_names"], facts["category_ids"]


def _facts(contents: Contents) -> dict:
    """{"arch", "config", "class_names", "category_ids", "extra"} of a file of ours. Raises DataError."""
    try:
        metadata = contents.metadata
        keys = ("config", "class_names", "category_ids", "extra")
        values, names, ids, extra = (json_of(metadata[key]) for key in keys)
        config = config_from_dict(metadata["arch"], values)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("class_names is no list of texts")
        if not isinstance(ids, list) or not all(type(key) is int and abs(key) < 2**63 for key in ids):
            raise ValueError("category_ids is no list of whole numbers")
        if not len(names) == len(ids) == config.num_classes:
            raise ValueError(f"{config.num_classes} classes, {len(names)} class names, {len(ids)} category ids")
        if not isinstance(extra, dict):
            raise ValueError("extra is no object")
    except (ValueError, KeyError, RecursionError, UsageError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else error
        raise DataError("the header of this weights file is damaged", where=contents.where, why=why) from error
    facts = {"class_names": names, "category_ids": ids, "extra": extra}
    return {"arch": metadata["arch"], "config": config, **facts}


def load_detector(path: str | os.PathLike) -> tuple[nn.Module, dict]:
    """Builds the detector that a weights file of ours describes, ready for inference.

    Returns:
        The detector in eval mode, and {"arch", "class_names", "category_ids", "extra"}.

    Raises:
        DataError: no such file, not one of ours, damaged, or its weights do not fit its configuration.
    """
    contents = read_contents(path)
    metadata = contents.metadata or {}
    if metadata.get("format") != FORMAT:
        raise DataError(
            "this weights file does not say which detector it belongs to",
            where=contents.where,
            why="its header has no CascadeOps configuration",
            fix=f"python -m models.convert {contents.where} --output OURS.safetensors, and load that;"
            "\nor build_detector(...) with its architecture, then load_weights(detector, path)",
        )
    facts = _facts(contents)
    config = facts.pop("config")
    check_size(facts["arch"], config, contents.state, contents.where)
    detector = build_from_config(facts["arch"], config)
    load_translation(detector, translate(contents.state, contents.where), contents.where)
    return detector.eval(), facts


def check_size(arch: str, config, state: dict[str, Tensor], where: object) -> None:
    """DataError if there is no detector of this configuration, or it has more numbers than the file: it is not built
    then."""
    try:
        with torch.device("meta"), _Uninitialised():
            described = build_from_config(arch, config).state_dict()
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise DataError("the configuration of this file describes no detector", where=where, why=error) from error
    needed, there = (sum(value.numel() for value in values.values()) for values in (described, state))
    if needed > there + len(described):  # the counters of norms may be missing
        why = f"its configuration describes a detector of {needed:,} numbers, and it holds {there:,}"
        raise DataError("this file is damaged, or was made to exhaust the memory", where=where, why=why)


class _Uninitialised(TorchFunctionMode):
    """Leaves out what fills a tensor in place, which on the meta device would import PyTorch's compiler: 3 seconds."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords, name = keywords or {}, function.__name__
        if name.endswith("_") and not name.startswith("_") and name != "requires_grad_":
            return arguments[0] if arguments else keywords["tensor"]
        return function(*arguments, **keywords)


def load_backbone(backbone: nn.Module, path: str | os.PathLike) -> None:
    """Copies ImageNet weights, or the backbone of a detector's, into a backbone; all else in the file is left out."""
    load_weights(backbone, path)
