"""Scores a detector on a data set: a function for the training loop, and the program `python -m models.evaluate`."""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .command_line import run
from .files import make_folder, write_json

if TYPE_CHECKING:  # --help answers without importing torch, so what needs it is imported where it is used
    import numpy as np
    import torch
    from torch import nn

    from .coco_evaluation import Metrics
    from .data import AnnotatedImages
    from .distributed import World
    from .progress import Progress
    from .tta import Views

EXAMPLES = (
    "{program} --weights runs/scnet/weights.safetensors",
    "{program} --weights W --data coco --split val2017 --resize 800 1333 --batch-size 8",
    "{program} --weights W --data my-data --max-images 200 --output runs/quick-look",
    "{program} --weights W --data coco --split val2017 --tta --batch-size 1",
    "torchrun --nproc-per-node=8 -m models.evaluate --weights W --data coco   several processes share the images",
)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Scores a detector on a data set: COCO average precision of boxes and masks; on VOC's data its own, too.

    The output folder gets metrics.json, detections.bbox.json and detections.segm.json (COCO results, which every COCO
    tool reads), and comparison.png: detections beside the ground truth.
    """

    weights: Path
    """A weights file that models.train wrote (.safetensors)."""
    data: Path | None = None
    """Folder in COCO layout (annotations/*.json and image folders) or VOC's (VOCdevkit/VOC2012). Default: the embedded
    data set of shapes."""
    split: str = "val"
    """Which part of it: val, train, val2017, minival2014, test ..."""
    output: Path = Path("runs/evaluate")
    """Folder for the scores, the results and the pictures; made if it is not there."""
    resize: tuple[int, int] | None = None
    """SHORT LONG: the largest size within these limits in pixels. Default: as the weights were trained."""
    tta: bool = False
    """Test-time augmentation (HTC, SCNet): every image in several sizes, plain and mirrored, and the mean of the
    answers. Better and slower; see docs/tta.md."""
    tta_scales: tuple[tuple[int, int], ...] = ()
    """SHORT LONG SHORT LONG ...: the sizes for --tta, each the largest within these limits in pixels. Default: 600 900
    800 1200 1000 1500 1200 1800 1400 2100."""
    tta_flip: bool = True
    """With --tta: each size mirrored, too."""
    batch_size: int = 4
    """Images that go through the detector together (with --tta: that are read together)."""
    max_images: int | None = None
    """Score the first images only."""
    pictures: int = 8
    """How many images comparison.png shows; 0: no such picture."""
    workers: int = 0
    """Processes that read and prepare images; 0: this process itself."""
    half: bool = False
    """Compute in 16 bits: bfloat16 where the hardware does, else float16 on a GPU; other CPUs stay in float32."""
    tf32: bool = False
    """On an NVIDIA GPU: linear layers, too, in TF32 (convolutions are, by PyTorch's default)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1; auto takes a GPU where there is one."""
    rank_timeout: float = 600.0
    """Several processes: seconds without progress of one after which the job ends, naming it."""

    def __post_init__(self):
        if not 0 < self.rank_timeout < math.inf:
            raise ValueError(f"rank_timeout must be above 0 seconds and finite, got {self.rank_timeout}")
        for name, least in (("batch_size", 1), ("max_images", 1), ("pictures", 0), ("workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.resize is not None and not 1 <= self.resize[0] <= self.resize[1]:
            raise ValueError(f"resize must be SHORT LONG with 1 <= SHORT <= LONG, got {self.resize}")


def evaluate_detector(
    detector: nn.Module,
    dataset: AnnotatedImages,
    batch_size: int,
    resize: tuple[int, int] | None = None,
    max_images: int | None = None,
    workers: int = 0,
    progress: Progress | None = None,
    results_folder: Path | None = None,
    tta: Views | None = None,
    half: bool = False,
    partial: Path | None = None,
    world: World | None = None,
    note: Callable[[str], None] = lambda what: None,
) -> Metrics | None:
    """COCO average precision of a detector on a data set. Masks go from 28 x 28 straight to run lengths.

    Args:
        detector: on any device; a copy of it is used, folded (`models.folding`).
        resize: None: images as they are; (short, long): the largest size within these limits.
        max_images: only the first images of the data set.
        progress: advanced by each batch.
        results_folder: where to write the COCO results; None: nowhere.
        tta: test-time augmentation, with `resize` None.
        half: compute in 16 bits, as in `Predictor`.
        partial: a file that the results are kept in while it lasts; where it holds some of the same evaluation, which
            was interrupted, they are not computed again.
        world: processes that share the images; the result is the main one's, and None in the others.
        note: told what is done, with each batch, for the watchdog.
    """
    import torch

    from .arithmetic import ARITHMETICS
    from .coco_evaluation import Metrics, average_precision, has_masks, result_entries, write_results
    from .data import evaluation_loader
    from .devices import half_dtype
    from .distributed import World, gather, wait_for_all
    from .folding import folded
    from .inference import unpack_detections
    from .partial_results import PartialResults
    from .tta import detect_in_views
    from .voc_evaluation import voc_average_precision

    world = world or World()
    device = next(detector.parameters()).device
    dtype = half_dtype(device) if half else torch.float32
    entries: dict[str, list[dict]] = {"bbox": []}
    image_ids: list[int] = []
    times: list[tuple[int, float]] = []  # (images, seconds) of each batch
    subject = {}
    if partial is not None:
        subject = _subject(detector, dataset, batch_size, resize, max_images, tta, half) | {"of": world.size}
        partial = partial if world.main else partial.with_name(f"{partial.name}.{world.rank}")
    kept = PartialResults(partial, subject)
    detector = folded(detector)
    arithmetic = ARITHMETICS[detector.config.arithmetic]
    for batch in kept.batches:
        for kind, new in batch["entries"].items():
            entries.setdefault(kind, []).extend(new)
        image_ids += batch["image_ids"]
    if kept.batches and progress is not None:
        progress.advance(len(image_ids) * world.size, speed="continued")
    loader = evaluation_loader(dataset, batch_size, resize, workers, world.rank, world.size, max_images=max_images)
    loader.set_epoch(0, start_batch=len(kept.batches))
    note("detecting")
    for batch in loader:
        start = time.perf_counter()
        with torch.inference_mode(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
            images, sizes = batch.images.to(device), batch.image_sizes.to(device)
            originals = [tuple(size) for size in batch.original_sizes.tolist()]
            if tta is None:
                detections = detector(images, sizes)
            else:
                detections = detect_in_views(detector, images, batch.image_sizes, tta)
            results = unpack_detections(detections, batch.image_sizes, originals, arithmetic)
        times.append((len(results), time.perf_counter() - start))
        batch_entries: dict[str, list[dict]] = {}
        for image_id, result in zip(batch.image_ids, results, strict=True):
            found = [x.numpy() for x in (result.boxes, result.scores, result.labels)]
            for kind, new in result_entries(image_id, *found, result.masks, dataset.category_ids).items():
                batch_entries.setdefault(kind, []).extend(new)
        kept.add(batch.image_ids, batch_entries)
        for kind, new in batch_entries.items():
            entries.setdefault(kind, []).extend(new)
        image_ids += batch.image_ids
        note("detecting")
        if progress is not None:
            speed = _images_per_second(times) * world.size
            progress.advance(len(results) * world.size, speed=f"{speed:.1f} images/s")
    note("waiting")
    shares = gather({"entries": entries, "image_ids": image_ids, "speed": _images_per_second(times)})
    if shares is None:
        wait_for_all()  # should the main process be lost, what was found here is not
        kept.remove()
        return None
    note("evaluating")
    for other in shares[1:]:
        for kind, new in other["entries"].items():
            entries.setdefault(kind, []).extend(new)
        image_ids += other["image_ids"]
    if results_folder is not None:
        write_results(results_folder, entries)
    truth = dataset.ground_truth()
    with_masks = "segm" in entries and has_masks(truth)
    voc = None
    if dataset.voc is not None:
        voc = voc_average_precision(truth, entries["bbox"], *dataset.voc, image_ids)
    metrics = Metrics(
        box=average_precision(truth, entries["bbox"], "bbox", image_ids),
        mask=average_precision(truth, entries["segm"], "segm", image_ids) if with_masks else None,
        images=len(image_ids),
        images_per_second=sum(share["speed"] for share in shares),
        voc=voc,
    )
    wait_for_all()
    kept.remove()
    return metrics


def _subject(detector, dataset, batch_size: int, resize, max_images: int | None, tta: Views | None, half: bool) -> dict:
    """All that decides what a batch is and what is found in it, as JSON holds it."""
    import torch

    from .partial_results import fingerprint
    from .starts import versions

    return {
        "weights": fingerprint(detector),
        "config": repr(getattr(detector, "config", None)),
        "data": str(dataset.annotation_file),
        "images": [len(dataset), hashlib.sha256(dataset.sizes.tobytes()).hexdigest()],
        "batch_size": batch_size,
        "resize": resize,
        "max_images": max_images,
        "half": half,
        "tta": None if tta is None else repr(tta),
        "device": next(detector.parameters()).device.type,
        "tf32": torch.get_float32_matmul_precision() != "highest",
        "versions": versions(),
    }


def _images_per_second(times: Sequence[tuple[int, float]]) -> float:
    """Without the first batch where there are others: it also warms caches and chooses algorithms."""
    if not times:  # all of them had been done before an interruption
        return math.nan
    images, seconds = map(sum, zip(*(times[1:] or times), strict=True))
    return images / seconds


def save_comparison(
    detector: nn.Module,
    dataset: AnnotatedImages,
    path: Path,
    resize: tuple[int, int] | None = None,
    count: int = 8,
    score_threshold: float = 0.3,
    tta: Views | None = None,
) -> np.ndarray:
    """Writes a picture of the detections in the first `count` images beside their ground truth; uint8 RGB [H, W, 3]."""
    from .coco_evaluation import truth_rle
    from .inference import predict
    from .visualise import comparison_grid, overlay, save_picture

    truth = dataset.ground_truth()
    annotations: dict[int, list[Mapping]] = {image["id"]: [] for image in truth["images"]}
    for annotation in truth["annotations"]:
        if not annotation.get("iscrowd"):
            annotations[annotation["image_id"]].append(annotation)
    label_of = {int(key): label for label, key in enumerate(dataset.category_ids)}
    rows = []
    for index, record in enumerate(truth["images"][:count]):
        image = dataset.image(index)
        objects = annotations[record["id"]]
        left = overlay(
            image,
            [[x, y, x + width, y + height] for x, y, width, height in (o["bbox"] for o in objects)],
            [label_of[o["category_id"]] for o in objects],
            dataset.class_names,
            masks=[truth_rle(o.get("segmentation"), record["height"], record["width"]) for o in objects] or None,
        )
        found = predict(detector, image, resize=resize, tta=tta)
        shown = (found.scores >= score_threshold).nonzero()[:, 0]
        masks = None if found.masks is None else [found.masks[i] for i in shown]
        right = overlay(image, found.boxes[shown], found.labels[shown], dataset.class_names, found.scores[shown], masks)
        rows.append((left, right))
    picture = comparison_grid(rows)
    save_picture(path, picture)
    return picture


def main(options: Evaluate) -> None:
    from .distributed import own_device, world_from_environment
    from .watchdog import watched

    world = world_from_environment()
    device = own_device(options.device, world)
    timeout = options.rank_timeout if world.size > 1 else math.inf
    with watched(world, device, timeout) as watchdog:
        _evaluate(options, world, device, functools.partial(watchdog.note, 0))


def _evaluate(options: Evaluate, world: World, device: torch.device, note: Callable[[str], None]) -> None:
    from rich.console import Console

    from .checkpoint import load_detector
    from .classes import check_same_classes
    from .data import default_dataset, open_dataset
    from .devices import allow_tf32
    from .distributed import first_on_its_machine, on_main
    from .progress import Progress
    from .tta import check_detector, chosen_views

    folder = Path(on_main(lambda: make_folder(options.output)))
    views = chosen_views(options.tta, options.tta_scales, options.tta_flip, options.resize)
    if options.tf32:
        allow_tf32()
    detector, facts = load_detector(options.weights)
    detector.to(device)
    console = Console(highlight=False, quiet=not world.main)
    if views is not None:
        check_detector(detector)
        console.print(str(views), soft_wrap=True, markup=False)
    boxes_only = facts["arch"] == "faster_rcnn"
    with first_on_its_machine(world):
        dataset = open_dataset(options.data or default_dataset(), options.split, semantic="no", boxes_only=boxes_only)
    check_same_classes(
        "the weights know other classes than the data",
        ("weights", facts["class_names"], facts["category_ids"]),
        ("data", dataset.class_names, dataset.category_ids),
        where=f"{options.weights} and {dataset.annotation_file}",
        fix="evaluate on data of the same classes, in the same order and with the same category ids",
    )
    resize = None if views is not None else options.resize or facts["extra"].get("resize")

    total = min(len(dataset), options.max_images or len(dataset))
    with Progress("evaluate", total=total, unit="images", console=console) as progress:
        metrics = evaluate_detector(
            detector,
            dataset,
            options.batch_size,
            resize,
            max_images=options.max_images,
            workers=options.workers,
            progress=progress,
            results_folder=folder,
            tta=views,
            half=options.half,
            partial=folder / "partial.jsonl",
            world=world,
            note=note,
        )
    if metrics is None:  # the main process has them
        return
    write_json(folder / "metrics.json", metrics.flat())
    console.print(score_table(metrics))
    console.print(class_table(metrics))
    console.print(
        f"{metrics.images} images, {metrics.images_per_second:.1f} images/s on {device} (without reading them)"
    )
    if options.pictures:
        save_comparison(detector, dataset, folder / "comparison.png", resize, options.pictures, tta=views)
    console.print(f"results: {folder}", soft_wrap=True, markup=False)


def score_table(metrics: Metrics):
    """AP of boxes and masks as a rich table."""
    from rich.table import Table

    table = Table("", "AP", "AP50", "AP75", "small", "medium", "large", box=None, padding=(0, 2), pad_edge=False)
    for name, precision in (("box", metrics.box), ("mask", metrics.mask)):
        if precision is not None:
            values = (precision.ap, precision.ap50, precision.ap75, precision.small, precision.medium, precision.large)
            table.add_row(name, *map(_score, values))
    if metrics.voc is not None:
        table.add_row("box, VOC's mAP", "", _score(metrics.voc.mean))
    return _numbers_right(table)


def _numbers_right(table):
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def class_table(metrics: Metrics):
    """AP of each class as a rich table."""
    from rich.table import Table

    table = Table("class", "box AP", "mask AP", box=None, padding=(0, 2), pad_edge=False)
    for name, box_ap in metrics.box.per_class.items():
        mask_ap = math.nan if metrics.mask is None else metrics.mask.per_class[name]
        table.add_row(name, _score(box_ap), _score(mask_ap))
    return _numbers_right(table)


def _score(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


if __name__ == "__main__":
    run(Evaluate, main, examples=EXAMPLES)
