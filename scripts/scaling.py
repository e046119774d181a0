"""The tables of docs/scaling.md, from the measured and published figures below: python scripts/scaling.py [--write]"""

import argparse
import math
import re
import sys
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs/scaling.md"
GPUS = (8, 64, 128, 256, 1000)

# Measured here; the page says how.
TRAINED = {  # parameters with a gradient
    "mask_rcnn_r2_101_fpn_2x_coco": 63_822_400,
    "htc_r50_fpn_1x_coco": 80_032_949,
    "scnet_r50_fpn_1x_coco": 94_573_925,
    "htc_x101_64x4d_fpn_16x1_20e_coco": 137_753_781,
}
CHECKPOINT_BYTES, CHECKPOINT_SECONDS, READ_SECONDS = 641_558_941, 9.92, 3.26  # HTC R-50
LOADER_IMAGES = 143  # a second and core, for a GPU
RESULTS_SECONDS = 14.5  # 5,000 images to run lengths, the two results files included
AP_SECONDS = {"pycocotools": 1.15, "faster-coco-eval": 0.26}  # of 100 images
# Published.
NVLINK, NETWORK = 450e9, 50e9  # bytes/s of a GPU in one direction: H100's NVLink 4; one NDR InfiniBand port a GPU
COCO_BYTES, COCO_IMAGES = 18e9, 118_287  # train2017
FAILURES = 419 / 54 / 16_384  # a day and GPU: Llama 3's pre-training
LARGEST_BATCH = 256  # MegDet; beyond it plain SGD loses AP, and fails at 1,024 (AGVM)
V100_INFERENCE = 5.8  # images/s of HTC R-50
# Assumed.
LATENCY = 10e-6  # seconds a message between machines
IMAGES = 2  # a GPU and step
STEP = 0.25  # seconds: a GPU four times a V100, a training step three times the work of inference
RESTART = 120.0  # seconds from a failure to the first step
MACHINE = 8  # GPUs


def all_reduce(size: float, gpus: int) -> float:
    """Seconds at the peak rates: a machine's GPUs over NVLink, then each one with its like in the other machines, as a
    ring or as a tree, whichever is faster."""
    inside, machines = min(gpus, MACHINE), max(1, gpus // MACHINE)
    seconds = 2 * (inside - 1) / inside * size / NVLINK
    if machines > 1:
        share = size / inside
        ring = 2 * (machines - 1) / machines * share / NETWORK + 2 * (machines - 1) * LATENCY
        tree = 2 * share / NETWORK + 2 * math.log2(machines) * LATENCY
        seconds += min(ring, tree)
    return seconds


def epoch_seconds(gpus: int) -> float:
    return COCO_IMAGES / (gpus * IMAGES / STEP)


def evaluation_seconds(gpus: int) -> float:
    """With pycocotools, of boxes and of masks."""
    return 5000 / (gpus * 4 * V100_INFERENCE) + RESULTS_SECONDS + 2 * 50 * AP_SECONDS["pycocotools"]


def gradients() -> list[list[str]]:
    rows = [["detector", "trained parameters", "MB a step, float32", "bfloat16"] + [f"{n} GPUs" for n in (8, 64, 1000)]]
    for name, count in TRAINED.items():
        times = [
            f"{1e3 * all_reduce(4 * count, n):.1f} / {1e3 * all_reduce(2 * count, n):.1f} ms" for n in (8, 64, 1000)
        ]
        rows.append([f"`{name}`", f"{count:,}", f"{4e-6 * count:.0f}", f"{2e-6 * count:.0f}", *times])
    return rows


def load() -> list[list[str]]:
    rows = [["GPUs", "images a step", "images/s", "loader cores, all (a GPU)", "read from files", "12 epochs"]]
    for gpus in GPUS:
        rate = gpus * IMAGES / STEP
        hours = 12 * epoch_seconds(gpus) / 3600
        cores = rate / LOADER_IMAGES
        rows.append(
            [
                f"{gpus:,}",
                f"{gpus * IMAGES:,}" + (" (plain SGD loses AP)" if gpus * IMAGES > LARGEST_BATCH else ""),
                f"{rate:,.0f}",
                f"{cores:,.1f} ({cores / gpus:.2f})",
                f"{rate * COCO_BYTES / COCO_IMAGES / 1e9:.2f} GB/s",
                f"{60 * hours:.0f} min" if hours < 2 else f"{hours:.1f} h",
            ]
        )
    return rows


def checkpoints() -> list[list[str]]:
    rows = [["GPUs", "failures a day", "one every", "best interval (Young)", "lost in all", "of it saving"]]
    for gpus in GPUS:
        between = 86_400 / (FAILURES * gpus)
        interval = math.sqrt(2 * CHECKPOINT_SECONDS * between)
        saving = CHECKPOINT_SECONDS / interval
        lost = saving + (interval / 2 + RESTART + READ_SECONDS) / between
        rows.append(
            [
                f"{gpus:,}",
                f"{FAILURES * gpus:.3f}",
                f"{between / 3600:,.0f} h",
                f"{interval / 60:.0f} min",
                f"{100 * lost:.2f}%",
                f"{100 * saving:.2f}%",
            ]
        )
    return rows


def evaluation() -> list[list[str]]:
    rows = [["GPUs", "detection", "results, on rank 0", *AP_SECONDS, "all, with the first"]]
    seconds = [50 * value for value in AP_SECONDS.values()]
    for gpus in GPUS:
        detection = 5000 / (gpus * 4 * V100_INFERENCE)
        columns = [f"{detection:.1f} s", f"{RESULTS_SECONDS:.1f} s", *(f"2 x {s:.0f} s" for s in seconds)]
        rows.append([f"{gpus:,}", *columns, f"{evaluation_seconds(gpus):.0f} s"])
    return rows


def table(rows: list[list[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "| " + " | ".join(["---"] * len(rows[0])) + " |", *body])


TABLES = {"gradients": gradients, "load": load, "checkpoints": checkpoints, "evaluation": evaluation}


def page(text: str) -> str:
    """The text with every table between its marks made anew."""
    for name, make in TABLES.items():
        marks = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(marks, lambda m, make=make: f"{m[1]}\n{table(make())}\n\n{m[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/scaling.md")
    if parser.parse_args().write:
        PAGE.write_text(page(PAGE.read_text()))
    else:
        for make in TABLES.values():
            sys.stdout.write(table(make()) + "\n\n")
