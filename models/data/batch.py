"""The batch that detectors take: images padded to one size, ground truth padded to one count."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

import cascadeops  # noqa: F401 - brings the operator

from .dataset import IGNORED
from .transforms import MEAN, STD, Sample, padded_size


class _Movable:
    """Tensors that travel together."""

    def to(self, device: torch.device | str, non_blocking: bool = False):
        """The same on another device."""
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        """The same in page-locked memory."""
        return self._each(lambda value: value.pin_memory())

    def _each(self, change):
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return type(self)(**{n: change(v) if isinstance(v, Tensor | _Movable) else v for n, v in values.items()})


@dataclass(frozen=True)
class PackedMasks(_Movable):
    """Ground-truth masks, each stored only inside its window: the object's box, 1 pixel larger, within the image."""

    bitmaps: Tensor  # uint8 [total], 0 or 1; one window after the other, rows first
    offsets: Tensor  # int64 [N, G]: where an object's window starts in `bitmaps`
    windows: Tensor  # int32 [N, G, 4] (x0, y0, width, height), pixels; width and height 0 on padding rows


@dataclass(frozen=True)
class RawImages(_Movable):
    """Images as they were decoded, to be resized, normalised and padded on the device; N of them."""

    pixels: Tensor  # uint8 [total]: RGB [h, w, 3] of one image after the other
    shapes: list[tuple[int, int]]  # (h, w) of each
    sizes: list[tuple[int, int]]  # (height, width) that each is to have

    def prepared(self) -> Tensor:
        """float32 [N, 3, H, W], channels last: as `Batch.images`. Within a grey level of what the loader would make,
        which rounds to whole ones after resizing."""
        parts = self.pixels.split([height * width * 3 for height, width in self.shapes])
        images = [part.view(*shape, 3) for part, shape in zip(parts, self.shapes, strict=True)]
        height, width = padded_size(*map(max, zip(*self.sizes, strict=True)))
        sides = [side for size in self.sizes for side in size]
        operator = torch.ops.cascadeops.preprocess  # the public function takes one limit for all images
        return operator(images, sides, height, width, MEAN, STD, torch.float32, True)[0]


@dataclass(frozen=True)
class Batch(_Movable):
    """N images and their ground truth; G is the largest number of objects of an image here, and at least 1."""

    images: Tensor | RawImages  # float32 [N, 3, H, W], channels last, normalised, padded with 0 right and below
    image_sizes: Tensor  # int64 [N, 2] (height, width) before padding
    gt_boxes: Tensor  # float32 [N, G, 4], pixels of `images`; 0 on padding rows
    gt_labels: Tensor  # int64 [N, G]; -1 on padding rows
    gt_masks: PackedMasks
    semantic: Tensor | None  # uint8 [N, H / 8, W / 8]: every 8th pixel of the stuff map; 255 is ignored
    image_ids: list[int]
    original_sizes: Tensor | None = None  # int64 [N, 2] (height, width) of the image files
    scale_factors: Tensor | None = None  # float32 [N, 2] (x, y): `images` pixels for one pixel of the file
    broken: tuple[str, ...] = ()  # where and why images were broken that others of the batch stand in for

    def prepared(self) -> "Batch":
        """With raw images made into what the network takes, where they are; itself if they are that already."""
        return replace(self, images=self.images.prepared()) if isinstance(self.images, RawImages) else self


def collate(samples: Sequence[Sample], semantic_padding: int = IGNORED, raw: bool = False) -> Batch:
    """Normalise, pad to the largest sample and a multiple of 32 pixels, stack. At least one sample is needed.

    semantic_padding: class of the semantic maps beyond an image.
    raw: images stay bytes, for `Batch.prepared` to resize and normalise.
    """
    count = len(samples)
    sizes = np.array([sample.size for sample in samples])
    height, width = padded_size(*sizes.max(0).tolist())
    capacity = max(1, *(len(sample.labels) for sample in samples))

    boxes = np.zeros((count, capacity, 4), np.float32)
    labels = np.full((count, capacity), -1, np.int64)
    windows = np.zeros((count, capacity, 4), np.int32)
    for index, sample in enumerate(samples):
        objects = len(sample.labels)
        boxes[index, :objects] = sample.boxes
        labels[index, :objects] = sample.labels
        windows[index, :objects] = sample.windows
    areas = windows[..., 2].astype(np.int64) * windows[..., 3]
    offsets = np.concatenate([[0], np.cumsum(areas.reshape(-1))[:-1]]).reshape(count, capacity)
    bitmaps = np.concatenate([bitmap for sample in samples for bitmap in sample.bitmaps] or [np.zeros(0, np.uint8)])

    targets = None
    if samples[0].semantic is not None:
        targets = np.full((count, height // 8, width // 8), semantic_padding, np.uint8)
        for index, sample in enumerate(samples):
            rows, columns = sample.semantic.shape
            targets[index, :rows, :columns] = sample.semantic
    return Batch(
        images=_raw_images(samples) if raw else _normalised(samples, height, width),
        image_sizes=torch.from_numpy(sizes),
        gt_boxes=torch.from_numpy(boxes),
        gt_labels=torch.from_numpy(labels),
        gt_masks=PackedMasks(torch.from_numpy(bitmaps), torch.from_numpy(offsets), torch.from_numpy(windows)),
        semantic=None if targets is None else torch.from_numpy(targets),
        image_ids=[sample.image_id for sample in samples],
        original_sizes=torch.tensor([sample.original_size for sample in samples]),
        scale_factors=torch.tensor([sample.scale_factors for sample in samples], dtype=torch.float32),
        broken=tuple(sample.instead_of for sample in samples if sample.instead_of is not None),
    )


def _normalised(samples: Sequence[Sample], height: int, width: int) -> Tensor:
    """float32 [N, 3, height, width], channels last."""
    images = np.zeros((len(samples), height, width, 3), np.float32)
    scale, shift = 1 / np.float32(STD), -np.float32(MEAN) / np.float32(STD)
    for plane, sample in zip(images, samples, strict=True):
        h, w = sample.size
        # Whole rows at a time: numpy is 10 times slower where its innermost loop is over the 3 channels.
        inside = plane.reshape(height, -1)[:h, : 3 * w]
        np.multiply(sample.image.reshape(h, -1), np.tile(scale, w), out=inside)
        inside += np.tile(shift, w)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _raw_images(samples: Sequence[Sample]) -> RawImages:
    pixels = np.concatenate([sample.image.reshape(-1) for sample in samples])
    shapes = [sample.image.shape[:2] for sample in samples]
    return RawImages(torch.from_numpy(pixels), shapes, [sample.size for sample in samples])
