"""Training runs that take a fraction of a second, for tests that interrupt, break and repeat them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import recipes, training
from models.checkpoints import checkpoint_folders, read_checkpoint
from models.recipes import TrainConfig
from models.resume import RunFolder

VARYING = {"time", "images_per_second", "memory_gib"}
"""Of a line of metrics: what is measured rather than computed."""


def write_tiny_data(folder: Path, train: int = 6, val: int = 2) -> Path:
    """A COCO folder of 32 x 32 images with a square each."""
    random = np.random.default_rng(0)
    (folder / "annotations").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        (folder / split).mkdir()
        images, annotations = [], []
        for index in range(count):
            image = random.integers(0, 60, (32, 32, 3), np.uint8)
            x, y = random.integers(0, 12, 2).tolist()
            image[y : y + 16, x : x + 16, index % 3] = 220
            Image.fromarray(image).save(folder / split / f"{index}.png")
            images.append({"id": 10 + index, "file_name": f"{index}.png", "height": 32, "width": 32})
            polygon = [x, y, x + 16, y, x + 16, y + 16, x, y + 16]
            target = {"id": index + 1, "image_id": 10 + index, "category_id": 1 + index % 2, "iscrowd": 0}
            annotations.append(target | {"bbox": [x, y, 16, 16], "area": 256, "segmentation": [polygon]})
        categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "green"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def tiny_config(data: Path, output: Path, **fields) -> TrainConfig:
    """Faster R-CNN of 20,000 parameters: 3 steps an epoch, 2 epochs, a checkpoint a step, an evaluation an epoch."""
    base = recipes.small("faster_rcnn")
    few = {"top_k": 8, "top_k_training": 8, "max_proposals": 8, "max_proposals_training": 8, "num_samples": 8}
    detector = dataclasses.replace(
        base.detector,
        backbone=dataclasses.replace(base.detector.backbone, layers=(1, 1, 1, 1), width=4),
        channels=4,
        box_channels=8,
        num_samples=8,
        max_detections=3,
        rpn=dataclasses.replace(base.detector.rpn, **few),
    )
    settings = {
        "epochs": 2,
        "batch_size": 2,
        "log_every": 2,
        "evaluate_every": 1,
        "checkpoint_every_steps": 1,
        "warmup_iterations": 4,
        "amp": "off",
        "detector": detector,
    }
    return dataclasses.replace(base, data=data, output=output, **(settings | fields))


def black_picture(*_, **__) -> np.ndarray:
    """For `models.training.save_comparison`, whose drawing takes longer than the rest of such a run."""
    return np.zeros((2, 2, 3), np.uint8)


class Killed(BaseException):
    pass


def stopped_after(step: int, patch: pytest.MonkeyPatch, config: TrainConfig) -> None:
    """The run up to the moment behind its save of a step, as a kill there would leave it."""
    save = RunFolder.save

    def save_and_die(self, at, *arguments):
        save(self, at, *arguments)
        if at == step:
            raise Killed

    with patch.context() as inner, pytest.raises(Killed):
        inner.setattr(RunFolder, "save", save_and_die)
        training.train(config)


def flip_a_bit(detector: torch.nn.Module) -> None:
    """The lowest one of a weight."""
    detector.rpn.conv.weight.data.view(torch.int32)[0, 0, 0, 0] ^= 1


def outcome(output: Path) -> dict:
    """All that a run has computed: its last checkpoint, bit by bit, and its lines of metrics."""
    checkpoint = read_checkpoint(checkpoint_folders(output / "checkpoints")[-1])
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {
        "step": checkpoint.step,
        "tensors": checkpoint.tensors,
        "optimizer_groups": checkpoint.facts["optimizer_groups"],
        "metrics": [{key: value for key, value in line.items() if key not in VARYING} for line in lines],
    }


def differences(ours: dict, theirs: dict) -> list[str]:
    """Names of what two outcomes do not have in common."""
    found = [key for key in ours if key != "tensors" and ours[key] != theirs[key]]
    left, right = ours["tensors"], theirs["tensors"]
    for name in left.keys() | right.keys():
        if name not in left or name not in right or not torch.equal(left[name], right[name]):
            found.append(name)
    return sorted(found)
