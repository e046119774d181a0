"""The embedded default data set: drawn from a seed and written to a folder in exactly COCO's layout.

    annotations/instances_train.json   annotations/instances_val.json
    train/000000000001.jpg ...         val/...
    stuffthingmaps/train/000000000001.png ...
    contact_sheet.png                  a look at it for people
    shapes.json                        the settings that made it

Things have category ids 1 .. 8; in the stuff maps, as in COCO's own, a pixel is the category id less one for a
thing, a higher id for a background material, 255 where nothing is labelled.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from ..errors import MachineError, UsageError
from ..files import explained
from .contact_sheet import contact_sheet
from .materials import MATERIALS
from .outline import outline_polygons, rasterise
from .scene import CLASSES, Annotated, SceneSettings, draw_scene

VERSION = 4
"""Raised whenever the same settings give other files, so that an old cache is not taken for the new data set."""

SETTINGS_FILE = "shapes.json"
SPLITS = ("train", "val")


@dataclass(frozen=True)
class ShapesSettings:
    """Everything that decides the content of a generated data set."""

    train: int = 2000
    """Pictures to train on."""
    val: int = 300
    """Pictures to evaluate on."""
    size: tuple[int, int] = (160, 192)
    """Short and long side of a picture, pixels; half of them stand upright."""
    seed: int = 0
    scene: SceneSettings = field(default_factory=SceneSettings)

    def __post_init__(self) -> None:
        if self.train < 1 or self.val < 1:
            raise ValueError(f"shapes: train and val must be at least 1, got {self.train} and {self.val}")
        if not 64 <= self.size[0] <= self.size[1] <= 4096:
            raise ValueError(f"shapes: size must be (short, long) with 64 <= short <= long <= 4096, got {self.size}")
        if self.seed < 0:
            raise ValueError(f"shapes: seed must not be negative, got {self.seed}")

    def fingerprint(self) -> str:
        text = json.dumps({"version": VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def cache_root() -> Path:
    """Where generated data lives: $CASCADEOPS_CACHE, else $XDG_CACHE_HOME/cascadeops, else ~/.cache/cascadeops."""
    if own := os.environ.get("CASCADEOPS_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cascadeops"


def default_dataset(settings: ShapesSettings | None = None, *, workers: int | None = None, quiet: bool = False) -> Path:
    """The folder of the generated data set in the cache; written first when it is not there.

    Args:
        settings: what to draw; None is the default data set.
        workers: processes that draw; None means one for each processor that this process may use.
        quiet: print no progress.
    """
    settings = settings or ShapesSettings()
    folder = cache_root() / f"shapes-{VERSION}-{settings.fingerprint()}"
    if not (folder / SETTINGS_FILE).is_file():
        write_dataset(folder, settings, workers=workers, quiet=quiet)
    return folder


def write_dataset(folder: Path, settings: ShapesSettings, *, workers: int | None = None, quiet: bool = False) -> None:
    """Draw a data set and write it to `folder`, which appears at once and complete, or not at all.

    A folder that already holds this very data set is left as it is.

    Raises:
        UsageError: `folder` holds anything else.
        MachineError: it cannot be written: disk full, no permission.
    """
    folder = Path(folder).expanduser().absolute()
    if _holds(folder, settings):
        return
    with explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
        try:
            _write(partial, settings, workers or _processors(), _silent if quiet else _report(folder))
            partial.chmod(0o755)  # mkdtemp makes it private
            partial.rename(folder)
        except OSError:
            if not _holds(folder, settings):  # else another process was faster
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _holds(folder: Path, settings: ShapesSettings) -> bool:
    """Whether `folder` is this data set. UsageError when it is anything else but empty or missing."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = json.loads((folder / SETTINGS_FILE).read_text())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found == settings.fingerprint():
        return True
    why = "it holds files of something else" if found is None else "it holds a data set drawn with other settings"
    raise UsageError("the folder is not empty", where=folder, why=why, fix=f"--out {folder}-2; nothing was changed")


def _sweep(folder: Path) -> None:
    """Remove what killed runs left beside `folder` more than a day ago."""
    for partial in folder.parent.glob(f".{folder.name}.partial-*"):
        if time.time() - partial.stat().st_mtime > 86400:
            shutil.rmtree(partial, ignore_errors=True)


def _write(folder: Path, settings: ShapesSettings, workers: int, progress: Callable[[int, int], None]) -> None:
    counts = {"train": settings.train, "val": settings.val}
    (folder / "annotations").mkdir()
    for split in SPLITS:
        (folder / split).mkdir()
        (folder / "stuffthingmaps" / split).mkdir(parents=True)
    tasks = [(folder, settings, split, index) for split in SPLITS for index in range(counts[split])]
    records: dict[str, list[list[dict]]] = {split: [] for split in SPLITS}
    for done, (task, record) in enumerate(zip(tasks, _in_processes(tasks, workers), strict=True), 1):
        records[task[2]].append(record)
        progress(done, len(tasks))
    for split in SPLITS:
        path = folder / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(_coco(records[split], settings, split), separators=(",", ":")))
    contact_sheet(folder, "val").save(folder / "contact_sheet.png")
    (folder / SETTINGS_FILE).write_text(
        json.dumps({"fingerprint": settings.fingerprint(), "version": VERSION, **asdict(settings)}, indent=1)
    )


def _in_processes(tasks: list[tuple], workers: int) -> Iterator[list[dict]]:
    """The results of `_write_picture` for all tasks, in order."""
    # Forked children start in no time and need no importable __main__ (think of `python -`). Only Linux forks safely.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context)
    try:
        yield from pool.map(_write_picture, tasks, chunksize=8)
    except BrokenProcessPool as error:
        raise MachineError(
            "a process that draws pictures was killed",
            why="the system does that when memory runs out",
            fix="--workers 1 needs least memory",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write_picture(task: tuple[Path, ShapesSettings, str, int]) -> list[dict]:
    """Draw and write one picture; returns its annotations, still without ids."""
    folder, settings, split, index = task
    random = np.random.default_rng([settings.seed, SPLITS.index(split), index])
    height, width = _picture_size(settings, index)
    scene = draw_scene(random, height, width, settings.scene)
    stem = f"{index + 1:012d}"
    Image.fromarray(scene.image).save(folder / split / f"{stem}.jpg", quality=92, subsampling=0)
    Image.fromarray(scene.semantic).save(folder / "stuffthingmaps" / split / f"{stem}.png", compress_level=3)
    return [_annotation(random, thing) for thing in scene.things]


def _picture_size(settings: ShapesSettings, index: int) -> tuple[int, int]:
    """(height, width) of a picture: lying and standing ones in turn."""
    short, long = settings.size
    return (short, long) if index % 2 == 0 else (long, short)


def _annotation(random: np.random.Generator, thing: Annotated) -> dict:
    """One entry of COCO's "annotations": outlines where they describe the mask, run lengths otherwise."""
    mask = thing.mask
    polygons = None if thing.crowd else outline_polygons(mask)
    if polygons is not None:
        segmentation: object = polygons
        mask = rasterise(polygons, *mask.shape)  # what readers will see is the truth
    encoded = coco_mask.encode(np.asfortranarray(mask))
    if polygons is None:
        as_text = not thing.crowd and random.random() < 0.75
        counts = encoded["counts"].decode() if as_text else _run_lengths(mask)
        segmentation = {"size": list(mask.shape), "counts": counts}
    return {
        "category_id": thing.label + 1,
        "bbox": [float(value) for value in coco_mask.toBbox(encoded)],
        "area": int(coco_mask.area(encoded)),
        "iscrowd": int(thing.crowd),
        "segmentation": segmentation,
    }


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths: down the columns, zeros first."""
    flat = mask.reshape(-1, order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *changes, flat.size]).tolist()
    return [0, *runs] if flat[0] else runs


def _coco(records: list[list[dict]], settings: ShapesSettings, split: str) -> dict:
    images, annotations = [], []
    for index, record in enumerate(records):
        height, width = _picture_size(settings, index)
        images.append({"id": index + 1, "file_name": f"{index + 1:012d}.jpg", "height": height, "width": width})
        for annotation in record:
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **annotation})
    return {
        "info": {"description": f"CascadeOps shapes, version {VERSION}, seed {settings.seed}, {split}"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": label + 1, "name": name, "supercategory": "shape"} for label, name in enumerate(CLASSES)],
        "stuff": [{"id": len(CLASSES) + index, "name": name} for index, name in enumerate(MATERIALS)],
    }


def _silent(done: int, total: int) -> None:
    pass


def _report(folder: Path) -> Callable[[int, int], None]:
    """A progress line on a terminal; one line at the start and one at the end elsewhere."""
    started = time.monotonic()

    def progress(done: int, total: int) -> None:
        terminal, last = sys.stderr.isatty(), done == total
        if done == 1 and not terminal:
            print(f"Drawing {total} pictures into {folder}", file=sys.stderr)
        if last or (terminal and done % 20 == 0):
            seconds = time.monotonic() - started
            line = f"Drew {done} of {total} pictures in {seconds:.0f} s: {folder}"
            print(f"\r\x1b[K{line}" if terminal else line, end="\n" if last else "", file=sys.stderr, flush=True)

    return progress
