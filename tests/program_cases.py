"""A small COCO folder, weights of a small detector, and a way to run a program: for the tests of the programs."""

import json
import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as mask_api

ROOT = Path(__file__).parent.parent
CLASS_NAMES, CATEGORY_IDS = ["disc", "traffic light", "star"], [3, 7, 8]
SIZES = [(96, 128), (128, 96), (96, 128)]
"""(height, width) of the images."""
OBJECTS = [[(0, [8, 16, 40, 32]), (2, [64, 24, 48, 64])], [(1, [16, 40, 64, 80])], []]
"""For each image (label, [x, y, width, height])."""


def rectangle_rle(box: list[int], size: tuple[int, int]) -> dict:
    x, y, width, height = box
    mask = np.zeros(size, np.uint8)
    mask[y : y + height, x : x + width] = 1
    rle = mask_api.encode(np.asfortranarray(mask))
    return {"size": list(size), "counts": rle["counts"].decode()}


def write_data(folder: Path, class_names: list[str] = CLASS_NAMES) -> Path:
    """Images with filled rectangles, in COCO's layout."""
    random = np.random.default_rng(0)
    (folder / "annotations").mkdir(parents=True)
    (folder / "val").mkdir()
    images, annotations = [], []
    for image_id, (size, objects) in enumerate(zip(SIZES, OBJECTS, strict=True), 11):
        pixels = random.integers(60, 120, (*size, 3), dtype=np.uint8)
        for label, (x, y, width, height) in objects:
            pixels[y : y + height, x : x + width] = (40, 200, 90 + 60 * label)
            box = [x, y, width, height]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": CATEGORY_IDS[label],
                    "bbox": box,
                    "area": width * height,
                    "iscrowd": 0,
                    "segmentation": rectangle_rle(box, size),
                }
            )
        Image.fromarray(pixels).save(folder / "val" / f"{image_id}.png")
        images.append({"id": image_id, "file_name": f"{image_id}.png", "height": size[0], "width": size[1]})
    categories = [{"id": key, "name": name} for key, name in zip(CATEGORY_IDS, class_names, strict=True)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / "instances_val.json").write_text(json.dumps(content))
    return folder


def write_weights(path: Path) -> Path:
    """Random weights of an SCNet with the narrowest heads."""
    import torch

    import models
    from models.config import RPNConfig

    torch.manual_seed(0)
    detector = models.build_detector(
        "scnet",
        backbone="resnet18_narrow",
        num_classes=len(CLASS_NAMES),
        semantic=False,
        channels=16,
        box_channels=32,
        mask_blocks=1,
        global_blocks=1,
        rpn=RPNConfig(anchor_scale=4.0, top_k=40, max_proposals=20),
        max_detections=10,
    )
    models.save_weights(path, detector, CLASS_NAMES, CATEGORY_IDS, {"resize": None})
    return path


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "models.predictor", "models.coco_evaluation"])
LONGEST = 120.0
"""Seconds."""


def run_program(program: str, *arguments: object, largest_file: int | None = None) -> subprocess.CompletedProcess:
    """Runs `python -m models.PROGRAM`; `largest_file`: bytes beyond which the system refuses to write.

    In a process of its own, forked from one that has imported torch, which would be most of the time.
    """
    command = [f"models.{program}", *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        process = PROCESSES.Process(target=_become, args=(command, folder, dict(os.environ), largest_file))
        process.start()
        process.join(LONGEST)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command, LONGEST)
        shown = [(Path(folder) / name).read_text() for name in STREAMS]
    return subprocess.CompletedProcess(command, process.exitcode, *shown)


STREAMS = ("stdout", "stderr")


def _become(command: list[str], folder: str, environment: dict[str, str], largest_file: int | None) -> None:
    """What `python -m` does, in this process; its output goes to files in `folder`."""
    for descriptor, name in enumerate(STREAMS, start=1):
        os.dup2(os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = command
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
