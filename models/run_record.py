"""What a training run has kept, read back for a report: settings, metrics, starts, results of the last evaluation.

Folders of runs are handed around, and a run may still be going or have been cut off at any moment: what is not there,
or not as it should be, is a DataError or a note for the reader, and nothing in a folder is believed.
"""

from __future__ import annotations

import bisect
import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .config_files import MAX_BYTES, json_of, unfolded
from .data.segmentation import MalformedAnnotation, are_numbers, checked_run_lengths
from .errors import DataError
from .files import check_regular, read_bytes
from .progress import metric_lines
from .starts import NAME as STARTS

LARGEST_RESULTS, LARGEST_LOG = 4 * 2**30, 2**30
"""Bytes. Results of COCO's 5,000 images with 100 masks each take about 0.3 GB; a line of metrics takes 0.5 kB."""

DEEPEST, LONGEST_NAMES = 50, 2**20
"""Levels of objects and lists in settings, and characters of all their dotted names; a run's have 4 and 2,000."""

RESULT_KEYS = {"bbox": "bbox", "segm": "segmentation"}


@dataclass(frozen=True)
class RunRecord:
    """Numbers that are not finite are NaN throughout."""

    folder: Path
    settings: dict[str, object]
    """Of config.json, unfolded: {"detector.rpn.top_k": 1000, ...}"""
    steps: list[dict[str, float]]
    """Lines of metrics.jsonl from training"""
    evaluations: list[dict[str, float]]
    """... and from evaluations"""
    starts: list[dict]
    """A line for each time that it was started or continued, by time: `models.starts`"""

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def epoch(self, step: float) -> float:
        """The epochs that `step` steps are; NaN where no line says."""
        return step * self._epochs_of_a_step

    @functools.cached_property
    def _epochs_of_a_step(self) -> float:
        known = (line for line in reversed(self.steps) if line.get("epoch", 0) > 0 and line["step"] > 0)
        return next((line["epoch"] / line["step"] for line in known), math.nan)

    def data(self, split: str) -> dict:
        """What the last start wrote of the "train" or "val" data: name, folder, images, classes; {} if nothing."""
        described = self.starts[-1].get("data") if self.starts else None
        described = described.get(split) if isinstance(described, dict) else None
        return described if isinstance(described, dict) else {}

    def seconds(self) -> float:
        """How long it has run: from each start to its last line. NaN where no time was kept.

        Steps that an interruption undid are not in it, nor is what came behind the last line.
        """
        lines = [line["time"] for line in self._by_time()]
        starts = [start["time"] for start in self.starts]
        if not lines or not starts:
            return math.nan
        total, before = 0.0, starts[0]
        for moment in lines:
            total += moment - _begun(starts, before, moment)
            before = moment
        return total

    def evaluation_seconds(self) -> float:
        """How much of that were evaluations."""
        total, before = 0.0, math.nan
        starts = [start["time"] for start in self.starts]
        for line in self._by_time():
            if "images" in line and not math.isnan(before):
                total += line["time"] - _begun(starts, before, line["time"])
            before = line["time"]
        return total if not math.isnan(before) else math.nan

    def _by_time(self) -> list[dict[str, float]]:
        return sorted((x for x in self.steps + self.evaluations if "time" in x), key=lambda line: line["time"])

    def last_step(self) -> int:
        return int(max([0, *(line["step"] for line in self.steps + self.evaluations)]))

    def is_finished(self) -> bool:
        """Whether the step that was to be the last has been evaluated."""
        limit, epochs = self.settings.get("max_iterations"), self.settings.get("epochs")
        step = self.last_step()
        if not any(line["step"] == step for line in self.evaluations):
            return False
        reached = isinstance(epochs, int) and self.epoch(step) >= epochs - 1e-6
        return reached or (isinstance(limit, int) and step >= limit)


def _begun(starts: Sequence[float], before: float, moment: float) -> float:
    """When what ended at `moment` began: at the moment `before`, or at the last of the `starts` (sorted) behind it."""
    place = bisect.bisect_right(starts, moment)
    return max(before, starts[place - 1]) if place else before


def read_run(folder: Path) -> RunRecord:
    """Raises DataError if it is no folder of a run, or its settings cannot be read."""
    config = folder / "config.json"
    if not config.is_file():
        runs = sorted(path.parent for path in folder.glob("*/config.json"))[:5] if folder.is_dir() else []
        why = "it has no config.json, which a run begins with" if folder.is_dir() else "there is no such folder"
        near = "\n".join(f"python -m models.report {run}" for run in runs)
        fix = near or "name the --output of a models.train: python -m models.report runs/scnet-small"
        raise DataError("this is not the folder of a training run", where=folder, why=why, fix=fix)
    try:
        folded = _json_file(config, dict, MAX_BYTES)
        _check_extent(folded)
        settings = unfolded(folded)
        for name in ("metrics.jsonl", STARTS):
            if (folder / name).exists() and check_regular(folder / name) > LARGEST_LOG:
                raise ValueError(f"{name} has more than {LARGEST_LOG:,} bytes")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError("what the run has written cannot be read", where=config, why=error) from error
    lines = [_numbers(values) for _, values in metric_lines(folder / "metrics.jsonl")]
    lines = [line for line in lines if line.get("step", -1) >= 0 and line.get("images", 0) >= 0]  # no NaN
    starts = [values for values in _json_lines(folder / STARTS) if _is_time(values.get("time"))]
    return RunRecord(
        folder,
        settings,
        [line for line in lines if "images" not in line],
        [line for line in lines if "images" in line],
        sorted(starts, key=lambda start: start["time"]),
    )


def read_results(path: Path, kind: str, ground_truth: Mapping) -> list[dict]:
    """The entries of a COCO results file, checked against the annotations.

    Args:
        kind: "bbox" or "segm": what every entry must have.

    Raises:
        DataError: not such a file, or with an entry that cannot be of these annotations.
    """
    what = "the detections of the run cannot be used"
    sizes = {image["id"]: (image["height"], image["width"]) for image in ground_truth["images"]}
    categories = {category["id"] for category in ground_truth["categories"]}
    try:
        entries = _json_file(path, list, LARGEST_RESULTS)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(what, where=path, why=error) from error
    for number, entry in enumerate(entries):
        try:
            _check_entry(entry, RESULT_KEYS[kind], sizes, categories)
        except (MalformedAnnotation, KeyError, TypeError, ValueError, OverflowError) as error:
            why = f"entry {number}: " + (f"{error} is missing" if isinstance(error, KeyError) else str(error))
            raise DataError(what, where=path, why=why, fix="python -m models.evaluate writes such a file") from error
    return entries


def _check_entry(entry: dict, needed: str, sizes: Mapping, categories: set) -> None:
    if entry["image_id"] not in sizes or entry["category_id"] not in categories:
        raise ValueError(f"image {entry['image_id']!r:.40} or category {entry['category_id']!r:.40} is not in the data")
    if needed not in entry:
        raise KeyError(needed)
    numbers, expected = [entry["score"], *entry.get("bbox", ())], 5 if "bbox" in entry else 1
    if len(numbers) != expected or not are_numbers(numbers) or not all(map(math.isfinite, numbers)):
        raise ValueError("score and bbox must be finite numbers")
    if "segmentation" in entry:
        if not isinstance(entry["segmentation"], dict):
            raise ValueError("segmentation must be run lengths")
        checked_run_lengths(entry["segmentation"], *sizes[entry["image_id"]])


def _check_extent(values: dict) -> None:
    """ValueError if `values` nest so deep that they could not be printed, or unfold to far more than their file holds:
    every dotted name repeats the names around it."""
    characters, waiting = 0, [(values, 0, 1)]  # (an object or a list, the length of its dotted name, depth)
    while waiting:
        value, length, depth = waiting.pop()
        if depth > DEEPEST:
            raise ValueError(f"it nests deeper than {DEEPEST} levels")
        named = isinstance(value, dict)
        if named:
            characters += sum(length + len(name) + 1 for name in value)
        if characters > LONGEST_NAMES:
            raise ValueError(f"its dotted names together have more than {LONGEST_NAMES:,} characters")
        items = ((length + len(name) + 1, x) for name, x in value.items()) if named else ((0, x) for x in value)
        waiting += [(inner, reach, depth + 1) for reach, inner in items if isinstance(inner, dict | list)]


def _json_file(path: Path, kind: type, most: int):
    """Raises OSError, ValueError or RecursionError."""
    value = json_of(read_bytes(path, most))
    if not isinstance(value, kind):
        raise ValueError(f"expected {'a list' if kind is list else 'an object'}, got {type(value).__name__}")
    return value


def _json_lines(path: Path) -> list[dict]:
    """The objects of a file of lines; what a crash has cut off is left out."""
    result = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            value = json.loads(line)
            if isinstance(value, dict):
                _check_extent(value)
                result.append(value)
        except (ValueError, RecursionError):
            continue
    return result


def _numbers(values: Mapping) -> dict[str, float]:
    """Only what is a number; null, as the log writes NaN, is NaN."""
    kept = {name: value for name, value in values.items() if value is None or type(value) in (int, float)}
    return {
        name: float(value) if value is not None and abs(value) < 1e300 else math.nan for name, value in kept.items()
    }


def _is_time(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e11  # seconds since 1970, and no NaN
