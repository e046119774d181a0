"""A step whose loss was not finite: kept in a folder with all that it was computed from, and computed again.

python -m models.replay runs/mine/replay/step-00001234
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from .command_line import run
from .errors import DataError, MachineError

if TYPE_CHECKING:  # --help answers without importing torch, so what needs it is imported where it is used
    import torch
    from torch import Tensor

    from .data.batch import Batch
    from .distributed import World
    from .recipes import TrainConfig

EXAMPLES = ("{program} runs/mine/replay/step-00001234", "{program} FOLDER --device cpu")


@dataclass(frozen=True)
class Replay:
    """Computes a training step again that ended a run because a loss was not finite: the same weights, the same images
    with their ground truth, the same random numbers. Prints every loss, and where the first such value comes from.
    """

    folder: Positional[Path]
    """What the run wrote: OUTPUT/replay/step-..."""
    device: str = "auto"
    """cpu, cuda, cuda:1; auto takes CUDA where it is."""


def check_finite(
    config: TrainConfig,
    output: Path,
    world: World,
    step: int,
    values: dict[str, Tensor],
    own: dict[str, Tensor],
    detector: torch.nn.Module,
    parts: Sequence[Batch],
) -> None:
    """DataError if one of `values` is not finite, after writing a replay folder for each batch that is to blame. To be
    called before the optimiser's step, so that no weight is touched. One wait for the device.

    Args:
        step: the number of the step that is about to be made, from 1.
        values: of all processes, so that all of them raise.
        own: of this process: whether its images are to blame.
        parts: its batches.
    """
    bad = _not_finite(values)
    if not bad:
        return
    from .distributed import gather

    mine = _whose(world, parts)
    # Where only the norm of the gradient is at fault, nobody knows whose images it came from.
    blamed = world.size == 1 or bool(_not_finite(own)) or bad[0].startswith("gradient_norm")
    look = _write_replays(config, output, world, step, bad, detector, parts) if blamed else ""
    found = gather([mine, look] if blamed else None)
    where, looks = zip(*filter(None, found or [[mine, look]]), strict=True)
    error = diverged(
        "a loss or the gradient is", "; ".join([f"step {step}, {where[0]}", *where[1:]]), bad, filter(None, looks)
    )
    error.told_by_another = not world.main
    raise error


@contextlib.contextmanager
def explained_divergence(
    config: TrainConfig, output: Path, world: World, step: int, detector: torch.nn.Module, parts: Sequence[Batch]
) -> Iterator[None]:
    """Turns what an operator says of NaN in the middle of a step into the DataError of `check_finite`, with a replay:
    the step before may have had a finite loss and a finite gradient, and weights out of float32's range behind it."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        weights = [name for name, value in detector.named_parameters() if not value.isfinite().all()]
        if not weights and "NaN" not in str(error):
            raise
        bad = [f"{weights[0]} and {len(weights) - 1} more are not finite"] if weights else [str(error).splitlines()[0]]
        look = _write_replays(config, output, world, step, bad, detector, parts)
        what = "the weights are" if weights else "a value is"
        raise diverged(what, f"step {step}, {_whose(world, parts)}", bad, [look]) from error


def _whose(world: World, parts: Sequence[Batch]) -> str:
    images = f"images {[image_id for batch in parts for image_id in batch.image_ids]}"
    return images if world.size == 1 else f"rank {world.rank}, {images}"


def diverged(what: str, where: str, why: Iterable[str], looks: Iterable[str] = ()) -> DataError:
    """looks: commands that show where it comes from."""
    return DataError(
        f"training has diverged: {what} no longer finite",
        where=where,
        why=", ".join(why),
        fix="".join(f"{look}\n" for look in looks)
        + "a smaller --optimizer.lr, longer --warmup-iterations, or --optimizer.clip-gradient-norm 10 may avoid it;\n"
        "the last checkpoint is of before, and intact",
    )


def _not_finite(values: dict[str, Tensor]) -> list[str]:
    import torch

    numbers = torch.stack([value.detach().float() for value in values.values()]).tolist()
    return [f"{name} is {number}" for name, number in zip(values, numbers, strict=True) if not math.isfinite(number)]


def _write_replays(config, output: Path, world: World, step: int, bad: list[str], detector, parts) -> str:
    """A folder for each part of the step: OUTPUT/replay[/rank-1][/part-0]/step-00001234. Gives the command to look."""
    from .checkpoints import write_checkpoint
    from .config_files import as_json

    weights = {f"detector/{name}": value for name, value in detector.state_dict().items()}
    place = world.rank * sum(len(batch.image_ids) for batch in parts)
    parent = output / "replay" / (f"rank-{world.rank}" if world.size > 1 else "")
    looks = []
    for index, batch in enumerate(parts):
        folder = parent / f"part-{index}" if len(parts) > 1 else parent
        look = f"python -m models.replay {folder / f'step-{step:08}'}   shows where it comes from"
        facts = {"config": as_json(config), "image_ids": batch.image_ids, "found": bad, "place": place}
        try:
            if not (folder / f"step-{step:08}").exists():
                write_checkpoint(folder, step, weights | batch_tensors(batch), facts)
        except MachineError as error:
            look = f"(no replay was written to {folder}: {error.why})"
        looks.append(look)
        place += len(batch.image_ids)
    return "\n".join(looks)


def batch_tensors(batch: Batch) -> dict[str, Tensor]:
    masks = batch.gt_masks
    tensors = {
        "images": batch.images,
        "image_sizes": batch.image_sizes,
        "gt_boxes": batch.gt_boxes,
        "gt_labels": batch.gt_labels,
        "bitmaps": masks.bitmaps,
        "offsets": masks.offsets,
        "windows": masks.windows,
        "semantic": batch.semantic,
    }
    return {f"batch/{name}": value for name, value in tensors.items() if value is not None}


def main(options: Replay) -> None:
    import torch

    from .build import build_from_config
    from .checkpoint import check_size
    from .checkpoints import read_checkpoint
    from .config_files import config_from_json
    from .data.batch import PackedMasks
    from .devices import choose_amp_dtype, choose_device
    from .matching import luck_of_images

    checkpoint = read_checkpoint(options.folder)
    device = choose_device(options.device)
    parts: dict[str, dict[str, Tensor]] = {"detector": {}, "batch": {}}
    try:
        config = config_from_json(checkpoint.facts["config"])
        image_ids, found, place = (checkpoint.facts[name] for name in ("image_ids", "found", "place"))
        for name, value in checkpoint.tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = value
        check_size(config.arch, config.detector, parts["detector"], options.folder)
        detector = build_from_config(config.arch, config.detector)
        detector.load_state_dict(parts["detector"])
        batch = {name: value.to(device) for name, value in parts["batch"].items()}
        batch["images"] = batch["images"].contiguous(memory_format=torch.channels_last)
        masks = PackedMasks(batch["bitmaps"], batch["offsets"], batch["windows"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DataError("this is not a replay of a step", where=options.folder, why=error) from error
    detector.to(device).train()

    first: list[str] = []
    for name, module in detector.named_modules():
        module.register_forward_hook(lambda _module, _input, out, name=name: _note(first, name, out))
    print(f"step {checkpoint.step}, images {image_ids}\nthen:   {', '.join(found)}")
    for name, value in detector.named_parameters():
        if not value.isfinite().all():
            print(f"weights: {name} is not finite before the step")
    amp_dtype = choose_amp_dtype(config.amp, device)
    with (
        luck_of_images(config.seed, checkpoint.step, place, len(image_ids), device),
        torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None),
    ):
        losses = detector.losses(
            batch["images"], batch["image_sizes"], batch["gt_boxes"], batch["gt_labels"], masks, batch.get("semantic")
        )
        loss = sum(losses.values())
    loss.backward()
    for name, value in losses.items():
        print(f"now:    {name} {value.item():.9g}")
    if first:
        print(f"first output that is not finite: {first[0]}")
    gradients = [name for name, p in detector.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    if gradients:
        print(f"gradients that are not finite: {len(gradients)}, of {', '.join(gradients[:5])}")
    if not first and not gradients and loss.isfinite():
        print("every value is finite here: it came from the device, or the versions differ")


def _note(first: list[str], name: str, output: object) -> None:
    import torch

    values = output if isinstance(output, list | tuple) else [output]
    if any(isinstance(v, torch.Tensor) and v.is_floating_point() and not v.isfinite().all() for v in values):
        first.append(name)


if __name__ == "__main__":
    run(Replay, main, examples=EXAMPLES)
