"""Batches in an order, and with augmentations, that are pure functions of the seed, the epoch and the image.

So a run that is resumed at any batch of any epoch, with any number of worker processes, sees what it would have seen.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from ..errors import DataError
from .batch import Batch, collate
from .dataset import IGNORED, AnnotatedImages
from .transforms import Augmentation, Sample, padded_size, resized_size
from .workers import Workers

SUBSTITUTES = 5
"""How many images are tried in place of a broken one; beyond that, it is the data set that is broken."""


def epoch_batches(upright: np.ndarray, global_batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """The batches of one epoch: int64 [batches, global_batch_size] of image indices.

    Images of one orientation go together, so that little is padded; the few that are left over share batches. The last
    batch is filled up with images from the start of the order: batches are always full.

    Args:
        upright: bool [images], whether the image is higher than wide.
        global_batch_size: images in a step, over all ranks.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(upright))
    groups = [order[upright[order]], order[~upright[order]]]
    full = [group[: len(group) - len(group) % global_batch_size] for group in groups]
    rest = np.concatenate([group[len(kept) :] for group, kept in zip(groups, full, strict=True)])
    batches = np.concatenate([*full, rest])
    missing = -len(batches) % global_batch_size
    batches = np.concatenate([batches, np.resize(order, missing)]).reshape(-1, global_batch_size)
    return batches[random.permutation(len(batches))]


class BatchLoader:
    """Iterates over the batches of one epoch; `set_epoch` goes on to another with the same worker processes.

    Made by `training_loader` and `evaluation_loader`. len() is the number of batches that an iteration gives.
    """

    def __init__(
        self,
        samples: "_Samples",
        batches_of_epoch: Callable[[int], Sequence[Sequence[int]]],
        epoch: int,
        start_batch: int,
        workers: int,
        pin_memory: bool | None,
        semantic_padding: int = IGNORED,
        raw: bool = False,
    ) -> None:
        if samples.dataset.has_semantic:
            _ = samples.dataset.num_semantic_classes  # looks at the maps once, here, and not in every worker
        self._batches_of_epoch = batches_of_epoch
        self.set_epoch(epoch, start_batch)
        self._batch = functools.partial(_batch, samples, semantic_padding=semantic_padding, raw=raw)
        self._workers = Workers(self._batch, workers, samples.names) if workers > 0 else None
        self._pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Let the next iteration give the batches of `epoch` from `start_batch` on."""
        self.epoch, self._batches = epoch, self._batches_of_epoch(epoch)
        if not 0 <= start_batch <= len(self._batches):
            raise ValueError(f"loader: start_batch must be in 0..{len(self._batches)}, got {start_batch}")
        self._batches = self._batches[start_batch:]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.epoch
        keys = ([(epoch, int(index)) for index in batch] for batch in self._batches)
        for batch in map(self._batch, keys) if self._workers is None else self._workers.results(keys):
            if isinstance(batch, DataError):
                raise batch
            yield batch.pin_memory() if self._pin_memory else batch


def training_loader(
    dataset: AnnotatedImages,
    batch_size: int,
    seed: int,
    epoch: int = 0,
    start_batch: int = 0,
    resize: tuple[int, int] | None = None,
    augmentation: Augmentation | None = None,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    parts: int = 1,
    pin_memory: bool | None = None,
    semantic_padding: int = IGNORED,
    raw: bool = False,
    substitute: bool = False,
) -> BatchLoader:
    """Shuffled, augmented, full batches of one epoch.

    Args:
        dataset: the images.
        batch_size: images in a step, over all ranks. Which ones they are does not depend on how many ranks there are.
        seed, epoch: order and augmentations are a pure function of these.
        start_batch: batches of the epoch that are skipped, without reading them.
        resize: limits (short, long) of the sides, pixels; None: images as they are.
        augmentation: None means flips only.
        workers: processes that read; 0 reads in this process.
        rank, world: this process among those that train together.
        parts: batches that this rank's images of a step come in, one after the other.
        pin_memory: None means when there is CUDA.
        semantic_padding: class of the semantic maps beyond an image; 255 is ignored.
        raw: images are only decoded and flipped here; `Batch.prepared` resizes and normalises them, on the device.
        substitute: in place of an image that is broken, or its annotations, take another one, and say so in the
            batch; else the DataError is raised. Which one is a function of seed, epoch and image.
    """
    if batch_size < 1 or not 0 <= rank < world:
        raise ValueError(f"loader: batch_size >= 1 and 0 <= rank < world needed, got {batch_size}, {rank}, {world}")
    if batch_size % (world * parts):
        raise ValueError(f"loader: batch_size must be divisible by {world} ranks x {parts} parts, got {batch_size}")
    upright = dataset.sizes[:, 0] > dataset.sizes[:, 1]
    own = batch_size // world

    def batches_of_epoch(epoch: int) -> np.ndarray:
        steps = epoch_batches(upright, batch_size, seed, epoch)
        return steps[:, rank * own : (rank + 1) * own].reshape(-1, own // parts)

    samples = _Samples(dataset, resize, augmentation or Augmentation(), seed, raw, substitute)
    return BatchLoader(samples, batches_of_epoch, epoch, start_batch, workers, pin_memory, semantic_padding, raw)


def evaluation_loader(
    dataset: AnnotatedImages,
    batch_size: int = 1,
    resize: tuple[int, int] | None = None,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool | None = None,
    max_images: int | None = None,
) -> BatchLoader:
    """Every image once, not augmented, in batches of at most `batch_size` images that are padded to one size.

    So an image is never padded to a larger neighbour, and what is found in it does not depend on the batch size.
    Arguments as for training_loader. With several ranks, rank r takes every world-th image from the r-th on.
    max_images: only the first images of the file.
    """
    if batch_size < 1 or not 0 <= rank < world:
        raise ValueError(f"loader: batch_size >= 1 and 0 <= rank < world needed, got {batch_size}, {rank}, {world}")
    groups: dict[tuple[int, int], list[int]] = {}
    for index in range(len(dataset) if max_images is None else min(max_images, len(dataset)))[rank::world]:
        size = tuple(dataset.sizes[index].tolist())
        groups.setdefault(padded_size(*(resized_size(*size, *resize) if resize else size)), []).append(index)
    batches = [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]
    return BatchLoader(_Samples(dataset, resize), lambda epoch: batches, 0, 0, workers, pin_memory)


class _Samples:
    """The samples by (epoch, image index). A DataError is handed on as a value: `_batch` returns the first."""

    def __init__(
        self,
        dataset: AnnotatedImages,
        resize: tuple[int, int] | None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        raw: bool = False,
        substitute: bool = False,
    ) -> None:
        self.dataset, self._resize, self._augmentation, self._seed = dataset, resize, augmentation, seed
        self._raw, self._substitute = raw, substitute

    def __getitem__(self, key: tuple[int, int]) -> Sample | DataError:
        epoch, index = key
        try:
            return self._sample(index, [self._seed, epoch, index])
        except DataError as error:
            first = error
        for attempt in range(1, SUBSTITUTES + 1) if self._substitute else ():
            numbers = [self._seed, epoch, index, attempt]  # so that a resumed run takes the same image
            other = int(np.random.default_rng(numbers).integers(len(self.dataset)))
            with contextlib.suppress(DataError):
                sample = self._sample(other, numbers)
                return dataclasses.replace(sample, instead_of=f"{first.where}: {first.what}")
        return first

    def names(self, keys: list[tuple[int, int]]) -> str:
        return "images " + ", ".join(self.dataset.image_info(index).file_name for _, index in keys)

    def _sample(self, index: int, numbers: list[int]) -> Sample:
        random = np.random.default_rng(numbers)
        return self.dataset.sample(index, self._resize, self._augmentation, random, not self._raw)


def _batch(samples: _Samples, keys: list[tuple[int, int]], semantic_padding: int, raw: bool) -> Batch | DataError:
    parts = [samples[key] for key in keys]
    error = next((part for part in parts if isinstance(part, DataError)), None)
    return error or collate(parts, semantic_padding, raw)
