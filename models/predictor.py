"""A detector as a component: pictures in any form in, results with class names out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch

from .build import DETECTORS
from .checkpoint import class_table, load_detector, load_weights
from .devices import choose_device, half_dtype
from .errors import DataError, UsageError
from .fixed_shapes import Compile, with_fixed_shapes
from .folding import folded
from .inference import predict
from .results import Result
from .sources import batches, is_endless, is_one_picture, pictures
from .tta import Views, check_detector
from .weights.contents import read_contents
from .weights.recognise import classes_of, recognise_detector
from .weights.translation import translate

ASSETS = Path(__file__).parent / "assets"
TINY_WEIGHTS = ASSETS / "tiny.safetensors"
"""A small SCNet trained on the generated data set by `python -m models.train --preset tiny`; docs/predictor.md."""
SAMPLE_PICTURE = ASSETS / "sample.png"

PUBLISHED_RESIZE = (800, 1333)
"""(short, long) side that the published COCO detectors see."""


class Predictor:
    """Finds objects in pictures.

        predictor = Predictor("runs/mine/weights.safetensors")
        result = predictor("street.jpg")
        for result in predictor.stream("clip.mp4"): ...

    Args:
        detector: a weights file, of ours or of another project (whose detector, backbone and classes are seen from its
            tensors); an architecture, "scnet"; or a detector from `build_detector` or `load_detector`. Default: the
            packaged tiny detector of shapes, which is there to try things out.
        weights: for an architecture or a detector: its weights file. The architecture must be the file's.
        device: "auto" takes a GPU where there is one; "cpu", "cuda", "cuda:1".
        half: compute the network in 16 bits: bfloat16 where the hardware has it, else float16 on a GPU; on a CPU
            without it everything stays in float32, since it would only be slower. `dtype` says what was chosen.
        resize: the largest size within (short, long) pixels, or None for pictures as they are. "trained": as a weights
            file says; (800, 1333) where there is none.
        tta: `models.Views()` or others: test-time augmentation, for HTC and SCNet; it sets the sizes.
        compile: "graph": the whole detector is one CUDA graph for each of a few shapes, to which pictures are padded
            (models/buckets.py); on a GPU only. "inductor": `torch.compile` for each of these. docs/export.md.
        batch_size: pictures that go through the network together, at most; those of one size that follow another do.
        score_threshold: objects below are left out of the results.
        class_names, category_ids: by label; default: the weights file's.

    Raises:
        DataError, UsageError, MachineError: weights, names or a device that cannot be used.
    """

    def __init__(
        self,
        detector: str | os.PathLike | torch.nn.Module | None = None,
        weights: str | os.PathLike | None = None,
        device: str = "auto",
        half: bool = False,
        *,
        resize: tuple[int, int] | Literal["trained"] | None = "trained",
        tta: Views | None = None,
        compile: Compile = "none",
        batch_size: int = 4,
        score_threshold: float = 0.0,
        class_names: Sequence[str] | None = None,
        category_ids: Sequence[int] | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"Predictor: batch_size must be at least 1, got {batch_size}")
        if not 0 <= score_threshold <= 1:
            raise ValueError(f"Predictor: score_threshold must be between 0 and 1, got {score_threshold}")
        module, facts = _load(detector, weights)
        if tta is not None:
            check_detector(module)
            if compile != "none":
                raise UsageError(
                    "test-time augmentation runs uncompiled", where=f"Predictor(tta=..., compile={compile!r})"
                )
        self.device = choose_device(device)
        self.detector = folded(module).to(self.device)  # a copy: the one given stays as it is
        self.dtype = half_dtype(self.device) if half else torch.float32
        self.resize, self.tta = resize, tta
        if resize == "trained":
            self.resize = None if tta is not None else facts.get("extra", {}).get("resize", PUBLISHED_RESIZE)
        self._network = with_fixed_shapes(self.detector, compile, self.device, self.resize)
        self.batch_size, self.score_threshold = batch_size, score_threshold
        self.class_names, self.category_ids = _classes(module.config.num_classes, facts, class_names, category_ids)

    def __call__(self, source) -> Result | list[Result] | Iterator[Result]:
        """Finds objects in `source`, which is anything that `models.sources.pictures` takes.

        Returns:
            One `Result` for one picture; a list for a folder, a pattern or a list; `stream(source)` for a video, a
            generator or another iterable, which may be longer than memory.

        Raises:
            DataError: an image that cannot be read. TypeError, ValueError: pixels that are not uint8 RGB.
        """
        if is_endless(source):
            return self.stream(source)
        results = list(self.stream(source))
        return results[0] if is_one_picture(source) else results

    def stream(self, source, on_error: Callable[[DataError], None] | None = None) -> Iterator[Result]:
        """The results of `source` one after the other, in its order; at most `batch_size` + 1 pictures are held.

        Args:
            source: as for a call. Pictures are read only as results are asked for.
            on_error: told of an image file that cannot be read, which is then left out; None: the error is raised.
        """
        for batch in batches(pictures(source, on_error), self.batch_size):
            results = self._detect([picture.pixels for picture in batch])
            for picture, result in zip(batch, results, strict=True):
                result = dataclasses.replace(
                    result,
                    class_names=self.class_names,
                    category_ids=self.category_ids,
                    source=picture.source,
                    image=picture.pixels,
                )
                yield result[result.scores >= self.score_threshold] if self.score_threshold > 0 else result

    def _detect(self, images: list) -> list[Result]:
        """One batch of uint8 [H, W, 3] through the network."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32):
            return predict(self._network, images, self.resize, self.tta)


def _load(detector, weights) -> tuple[torch.nn.Module, dict]:
    """The detector, and what is known of its weights: class names, category ids, size; {} for a detector as it is."""
    if detector is None and weights is None:
        detector = TINY_WEIGHTS
    if isinstance(detector, torch.nn.Module):
        if weights is not None:
            load_weights(detector, weights)
        return detector, {}
    if detector in DETECTORS and weights is None:
        raise UsageError(
            "an architecture alone has random weights",
            where=f"Predictor({detector!r})",
            fix=f'Predictor("{detector}", "WEIGHTS"), or Predictor("WEIGHTS") alone',
        )
    path = weights or detector
    arch = detector if weights is not None else None
    if class_table(path) is not None:
        module, facts = load_detector(path)
        if arch not in (None, facts["arch"]):
            raise UsageError(
                "the weights are of another architecture",
                where=path,
                why=f"asked for {arch}, its header says {facts['arch']}",
                fix=f"Predictor({str(path)!r})",
            )
        return module, facts
    contents = read_contents(path)
    module = recognise_detector(contents, translate(contents.state, contents.where), arch).detector
    names, ids = classes_of(contents.class_names, module.config.num_classes)
    return module, {"class_names": names, "category_ids": ids}


def _classes(number: int, facts: dict, names, ids) -> tuple[tuple[str, ...] | None, tuple[int, ...] | None]:
    """(class names, category ids) by label: those that were asked for, else the weights file's, else None."""
    names, ids = names or facts.get("class_names"), ids or facts.get("category_ids")
    for what, values in (("class_names", names), ("category_ids", ids)):
        if values is not None and len(values) != number:
            raise UsageError(
                f"{what} must have an entry for each class", why=f"the detector has {number}, got {len(values)}"
            )
    return names and tuple(names), ids and tuple(ids)
