"""Weights: our own safetensors files, and other projects' files translated name by name.

A weights file of ours is self-contained: its header holds the architecture, the configuration and the class names, so
that `load_detector(path)` needs nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import os

from torch import Tensor, nn

from .build import build_from_config, config_from_dict
from .errors import DataError
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
        translation = translation._replace(fields=arithmetic_of(json.loads(contents.metadata["config"])))
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
    metadata = read_contents(path).metadata or {}
    if metadata.get("format") != FORMAT:
        return None
    return json.loads(metadata["class_names"]), json.loads(metadata["category_ids"])


def load_detector(path: str | os.PathLike) -> tuple[nn.Module, dict]:
    """Builds the detector that a weights file of ours describes, ready for inference.

    Returns:
        The detector in eval mode, and {"arch", "class_names", "category_ids", "extra"}.
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
    config = config_from_dict(metadata["arch"], json.loads(metadata["config"]))
    detector = build_from_config(metadata["arch"], config)
    load_translation(detector, translate(contents.state, contents.where), contents.where)
    facts = {key: json.loads(metadata[key]) for key in ("class_names", "category_ids", "extra")}
    return detector.eval(), {"arch": metadata["arch"], **facts}


def load_backbone(backbone: nn.Module, path: str | os.PathLike) -> None:
    """Copies ImageNet weights, or the backbone of a detector's, into a backbone; all else in the file is left out."""
    load_weights(backbone, path)
