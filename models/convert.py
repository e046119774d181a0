"""Converts other projects' weights to ours: `python -m models.convert htc_r50.pth --output htc_r50.safetensors`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from .command_line import program_name, run
from .errors import DataError, UsageError

EXAMPLES = (
    "{program} scnet_r50_fpn_1x_coco-c3f09857.pth --output scnet_r50.safetensors",
    "{program} htc_r50_fpn_1x_coco.pdparams --output htc_r50.safetensors",
    "{program} maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth --output mask_rcnn.safetensors",
)


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Converts weights of mmdetection, torchvision, maskrcnn-benchmark, Res2Net, self-calibrated networks or Paddle.

    Whose they are and which detector they belong to is seen from the names and shapes of their tensors. The result is
    one .safetensors file with the detector's configuration and its class names; every tensor is accounted for.
    """

    file: Positional[Path | None] = None
    """.pth or .pdparams; nothing of it is run."""
    output: Path
    """The .safetensors file to write."""
    arch: str | None = None
    """Default: by the names. faster_rcnn, mask_rcnn, cascade_mask_rcnn, htc, scnet."""
    backbone: str | None = None
    """Default: by the shapes. resnet50, resnext101_64x4d, res2net101_v1d_26w4s and so on."""
    class_names: Path | None = None
    """A text file with one class name a line. Default: those in the file; COCO's for 80 classes."""


def main(options: Convert) -> None:
    if options.file is None:
        raise UsageError("no file is named", fix=f"{program_name()} weights.pth --output weights.safetensors")

    # imported here, so that --help and a mistyped option answer at once
    from rich.console import Console

    from .checkpoint import save_weights
    from .weights.contents import read_contents
    from .weights.recognise import recognise_detector
    from .weights.translation import translate

    console = Console(highlight=False)
    contents = read_contents(options.file)
    translation = translate(contents.state, contents.where)
    if translation.source == "ours":
        raise UsageError("these weights are ours already", where=options.file, fix="use the file as it is")
    if not translation.whole:
        _save_backbone(options.output, translation)
        _report(console, contents, translation, [("written", f"{options.output}, a backbone's weights")])
        return
    detector, loaded, backbone, deformable = recognise_detector(contents, translation, options.arch, options.backbone)
    names, ids = _classes(options, contents.class_names, detector.config.num_classes)
    extra = {"source": translation.source, "file": options.file.name}
    save_weights(options.output, detector, names, ids, extra)
    facts = [
        ("detector", f"{detector.arch}, {backbone}{' with deformable layers' if deformable else ''}"),
        ("classes", f"{len(names)}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"),
        *(
            ("config." + name, f"{value!r}, as {translation.source} has it")
            for name, value in translation.fields.items()
        ),
        ("written", str(options.output)),
    ]
    _report(console, contents, loaded, facts)


def _report(console, contents, translation, facts: list[tuple[str, str]]) -> None:
    """The account: how many tensors were loaded, and how; what was left out, and why."""
    kept = [step for step in translation.steps if step.new is not None]
    left_out = [(step.old, step.note) for step in translation.steps if step.new is None] + list(
        contents.left_out.items()
    )
    lines = [
        ("recognised as", translation.source),
        ("tensors loaded", str(len(kept))),
        ("  under their name", str(sum(step.old == step.new and not step.note for step in kept))),
        ("  renamed", str(sum(step.old != step.new and not step.note for step in kept))),
    ]
    for note, count in Counter(step.note for step in kept if step.note).items():
        lines.append(("  transformed", f"{count}: {note}"))
    for why, count in Counter(why for _, why in left_out).items():
        some = [name for name, reason in left_out if reason == why]
        lines.append(("left out", f"{count}: {', '.join(some[:4])}{' ...' if count > 4 else ''}: {why}"))
    for name, text in lines + facts:
        console.print(f"{name:<21} {text}", soft_wrap=True, markup=False)


def _classes(options: Convert, in_file: list[str] | None, number: int) -> tuple[list[str], list[int]]:
    """(names, ids of the data set) by label."""
    from .weights.recognise import classes_of

    names = in_file
    if options.class_names is not None:
        try:
            lines = options.class_names.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError("the class names cannot be read", where=options.class_names, why=str(error)) from error
        names = [line.strip() for line in lines if line.strip()]
        if len(names) != number:
            raise DataError(
                "the class names are not those of these weights",
                where=options.class_names,
                why=f"{len(names)} names, {number} classes in {options.file}",
            )
    return classes_of(names, number)


def _save_backbone(path: Path, translation) -> None:
    import torch
    from safetensors.torch import save_file

    from .files import atomic_path

    # copies, since safetensors refuses shared memory and other layouts
    state = {key: value.clone(memory_format=torch.contiguous_format) for key, value in translation.state.items()}
    with atomic_path(path) as temporary:
        save_file(state, temporary, {"format": "cascadeops-backbone-1", "source": translation.source})


if __name__ == "__main__":
    run(Convert, main, examples=EXAMPLES)
