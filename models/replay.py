"""A step whose loss was not finite: kept in a folder with all that it was computed from, and computed again.

python -m models.replay runs/mine/replay/step-00001234
"""

from __future__ import annotations

import math
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
    step: int,
    values: dict[str, Tensor],
    detector: torch.nn.Module,
    batch: Batch,
    random: dict[str, Tensor],
) -> None:
    """DataError if one of `values` is not finite, after writing a replay folder. To be called before the optimiser's
    step, so that no weight is touched. One wait for the device.

    Args:
        step: the number of the step that is about to be made, from 1.
        random: the random state from before its forward pass.
    """
    import torch

    numbers = torch.stack([value.detach().float() for value in values.values()]).tolist()
    bad = [f"{name} is {number}" for name, number in zip(values, numbers, strict=True) if not math.isfinite(number)]
    if not bad:
        return
    from .checkpoints import write_checkpoint
    from .config_files import as_json

    tensors = {f"detector/{name}": value for name, value in detector.state_dict().items()} | random
    tensors |= batch_tensors(batch)
    facts = {"config": as_json(config), "image_ids": batch.image_ids, "found": bad}
    folder = output / "replay" / f"step-{step:08}"
    look = f"python -m models.replay {folder}   shows where it comes from"
    try:
        if not folder.exists():
            write_checkpoint(folder.parent, step, tensors, facts)
    except MachineError as error:
        look = f"(no replay was written to {folder}: {error.why})"
    raise DataError(
        "training has diverged: a loss or the gradient is no longer finite",
        where=f"step {step}, images {batch.image_ids}",
        why=", ".join(bad),
        fix=f"{look};\n"
        "a smaller --learning-rate, longer --warmup-iterations, or --clip-gradient-norm 10 may avoid it;\n"
        "the weights were not touched, and the last checkpoint is intact",
    )


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
    from .checkpoints import read_checkpoint
    from .config_files import config_from_json
    from .data.batch import PackedMasks
    from .devices import choose_amp_dtype, choose_device
    from .resume import restore_random_state

    checkpoint = read_checkpoint(options.folder)
    try:
        config = config_from_json(checkpoint.facts["config"])
        image_ids, found = checkpoint.facts["image_ids"], checkpoint.facts["found"]
    except (ValueError, KeyError) as error:
        raise DataError("this is not a replay of a step", where=options.folder, why=error) from error
    device = choose_device(options.device)
    parts: dict[str, dict[str, Tensor]] = {"detector": {}, "batch": {}, "random": {}}
    for name, value in checkpoint.tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    detector = build_from_config(config.arch, config.detector)
    detector.load_state_dict(parts["detector"])
    detector.to(device).train()
    batch = {name: value.to(device) for name, value in parts["batch"].items()}
    batch["images"] = batch["images"].contiguous(memory_format=torch.channels_last)
    masks = PackedMasks(batch["bitmaps"], batch["offsets"], batch["windows"])

    first: list[str] = []
    for name, module in detector.named_modules():
        module.register_forward_hook(lambda _module, _input, out, name=name: _note(first, name, out))
    print(f"step {checkpoint.step}, images {image_ids}\nthen:   {', '.join(found)}")
    for name, value in detector.named_parameters():
        if not value.isfinite().all():
            print(f"weights: {name} is not finite before the step")
    restore_random_state(checkpoint.tensors, device)
    amp_dtype = choose_amp_dtype(config.amp, device)
    with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
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
