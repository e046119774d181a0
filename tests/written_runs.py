"""Folders of runs, written rather than trained: what a report has to show is known, and it takes no time."""

import dataclasses
import json
import shutil
from pathlib import Path

from pycocotools import mask as mask_api
from tiny_runs import tiny_config, write_tiny_data

from models import recipes
from models.coco_evaluation import average_precision, result_entries
from models.config_files import as_json

START = 1_700_000_000.0
"""2023-11-14 22:13 UTC"""


def write_run(folder: Path, data: Path, /, rate: float = 0.03, quality: int = 1, steps: int = 6, **facts) -> Path:
    """A Mask R-CNN run of 3 steps an epoch on `write_tiny_data`, evaluated after each epoch.

    Args:
        quality: by how many pixels detections are moved; beside each object there is one of the other class.
        facts: of starts.jsonl.
    """
    folder.mkdir(parents=True)
    base = recipes.small("mask_rcnn").detector
    config = dataclasses.replace(
        tiny_config(data, folder),
        arch="mask_rcnn",
        detector=dataclasses.replace(base, num_classes=2),
    )
    (folder / "config.json").write_text(json.dumps(as_json(config)))
    truth = json.loads((data / "annotations/instances_val.json").read_text())
    entries: dict[str, list] = {"bbox": [], "segm": []}
    for annotation in truth["annotations"]:
        x, y, width, height = annotation["bbox"]
        box = [x + quality, y, x + width + quality, y + height]
        corners = [[box[0], box[1], box[2], box[1], box[2], box[3], box[0], box[3]]]
        mask = mask_api.merge(mask_api.frPyObjects(corners, 32, 32))
        label = annotation["category_id"] - 1
        found = ([box, box], [0.9, 0.4], [label, 1 - label], [mask, mask])
        for kind, new in result_entries(annotation["image_id"], *found, [1, 2]).items():
            entries[kind] += new
    for kind, results in entries.items():
        (folder / f"detections.{kind}.json").write_text(json.dumps(results))
    names = [category["name"] for category in truth["categories"]]
    scores = {"images": len(truth["images"]), "images_per_second": 40.0}
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        precision = average_precision(truth, entries[kind], kind)
        scores |= {f"{name}_ap": precision.ap, f"{name}_ap50": precision.ap50}
        scores |= {f"{name}_ap75": precision.ap75, f"{name}_ap_small": precision.small}
        scores |= {f"{name}_ap/{key}": precision.per_class[key] for key in names}
    lines = []
    for step in range(1, steps + 1):
        losses = {"loss": 2 / step, "loss_class": 1 / step, "loss_mask": 1 / step, "gradient_norm": 3.0}
        measured = {"images_per_second": 20.0 + step, "learning_rate": rate, "epoch": step / 3, "memory_gib": 1.5}
        lines.append({"step": step, "time": START + 10 * step} | losses | measured)
        if step % 3 == 0:
            lines.append({"step": step, "time": START + 10 * step + 4} | scores)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = {
        "time": START,
        "step": 0,
        "device": "cpu",
        "processes": 1,
        "processor": "Abacus 9000",
        "processors": 2,
        "memory_gib": 8.0,
        "system": "Linux",
        "versions": {"torch": "2.13.0"},
        "data": {
            split: {"name": str(data), "folder": str(data), "images": count, "classes": 2}
            for split, count in (("train", 6), ("val", 2))
        },
    }
    (folder / "starts.jsonl").write_text(json.dumps(start | facts) + "\n")
    return folder


def write_data(folder: Path, class_names: tuple[str, str] = ("red", "green"), first_file: str | None = None) -> Path:
    """`write_tiny_data`, with other names of its classes and of the first validation image."""
    write_tiny_data(folder)
    for split in ("train", "val"):
        path = folder / f"annotations/instances_{split}.json"
        content = json.loads(path.read_text())
        for category, name in zip(content["categories"], class_names, strict=True):
            category["name"] = name
        if split == "val" and first_file is not None:
            shutil.move(folder / "val" / content["images"][0]["file_name"], folder / "val" / first_file)
            content["images"][0]["file_name"] = first_file
        path.write_text(json.dumps(content))
    return folder
