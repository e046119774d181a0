"""What a data set on disk gives to the loaders, the training loop and the evaluation, wherever its annotations come
from: images of a folder, and their objects in the arrays of `Annotations`."""

from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import DataError
from ..images import path_inside, read_image, read_label_map
from .annotations import Annotations
from .transforms import Augmentation, Sample, transform

COCO_CATEGORIES, COCO_SEMANTIC_CLASSES = 80, 183
"""COCO's own data set: its stuff maps are trained 183 ways, though the highest id in them is 181."""

IGNORED = 255
"""Value of stuff maps where nothing is labelled."""

MAPS_SCANNED = 1000
"""So many stuff maps, evenly spread, are looked at to learn how many classes there are."""


class ImageInfo(NamedTuple):
    image_id: int
    file_name: str
    height: int
    width: int


class VocMetric(NamedTuple):
    """How PASCAL VOC scores a data set's boxes."""

    eleven_points: bool
    """AP as the mean precision at 11 recalls (until 2009) instead of the area under the curve."""
    inclusive: bool
    """Boxes name their last pixel (the XML files do), so that a width is x2 - x1 + 1."""


class AnnotatedImages:
    """One split of a data set on disk; `CocoDataset` and `VocDataset` find and read it.

    Args:
        root: the data set's folder.
        split: the split's name.
        annotation_file: what messages call the source of the annotations.
        image_folder: images are looked for here, and nowhere else.
        map_folder: stuff maps, {image's name}.png; None: there are none.
        annotations: the objects.
        training: leave out images without any annotation and those with a side below `min_side`. Evaluation has all.
        min_side: pixels.

    Raises:
        DataError: no image is left to train on.
    """

    voc: VocMetric | None = None
    """How PASCAL VOC scores it; None: it is no VOC data set."""

    def __init__(
        self,
        root: Path,
        split: str,
        annotation_file: Path,
        image_folder: Path,
        map_folder: Path | None,
        annotations: Annotations,
        training: bool,
        min_side: int,
    ) -> None:
        self.root, self.split, self.annotations = root, split, annotations
        self.annotation_file, self.image_folder, self.map_folder = annotation_file, image_folder, map_folder
        keep = np.ones(len(annotations.image_ids), bool)
        self.images_left_out: dict[str, int] = {}
        if training:
            tiny = annotations.sizes.min(1) < min_side
            keep = annotations.annotated & ~tiny
            counts = {
                "no annotation": int((~annotations.annotated).sum()),
                f"a side below {min_side} pixels": int((annotations.annotated & tiny).sum()),
            }
            self.images_left_out = {why: count for why, count in counts.items() if count}
            if not keep.any():
                raise DataError(
                    "there is nothing to train on",
                    where=annotation_file,
                    why=f"all {keep.size} images are without annotations, or have a side below {min_side} pixels",
                )
        self._kept = np.flatnonzero(keep)  # row of image i in the annotations' arrays

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def class_names(self) -> tuple[str, ...]:
        """By label."""
        return self.annotations.class_names

    @property
    def category_ids(self) -> np.ndarray:
        """int64 [C]: category_ids[label] is the id in the file, which results have to name."""
        return self.annotations.category_ids

    @property
    def num_classes(self) -> int:
        return len(self.annotations.class_names)

    @property
    def has_semantic(self) -> bool:
        return self.map_folder is not None

    @property
    def objects_left_out(self) -> dict[str, int]:
        """How many annotations of the source are not among the objects, by the reason."""
        return dict(self.annotations.left_out)

    @cached_property
    def num_semantic_classes(self) -> int:
        """Highest class id in the stuff maps, plus one; 183 for COCO; 0 without stuff maps."""
        if self.map_folder is None:
            return 0
        if self.num_classes == COCO_CATEGORIES and self.category_ids[-1] == 90:
            return COCO_SEMANTIC_CLASSES
        if self.annotations.num_stuff_ids is not None:
            return self.annotations.num_stuff_ids
        found = np.zeros(256, bool)
        for index in np.unique(np.linspace(0, len(self) - 1, min(len(self), MAPS_SCANNED)).astype(int)):
            found[self.semantic_map(int(index))] = True
        return int(np.flatnonzero(found[:IGNORED]).max(initial=-1)) + 1

    @property
    def sizes(self) -> np.ndarray:
        """int32 [len(self), 2] (height, width) of the image files."""
        return self.annotations.sizes[self._kept]

    @property
    def image_ids(self) -> np.ndarray:
        """int64 [len(self)]."""
        return self.annotations.image_ids[self._kept]

    def image_info(self, index: int) -> ImageInfo:
        row = self._kept[index]
        height, width = self.annotations.sizes[row].tolist()
        return ImageInfo(int(self.annotations.image_ids[row]), self.annotations.file_names[row].decode(), height, width)

    def image(self, index: int) -> np.ndarray:
        """uint8 [H, W, 3] RGB.

        The annotations say which way up: the pixels are taken as they are stored, whatever the EXIF orientation is, but
        for a file that only when turned has the annotated size.
        """
        info = self.image_info(index)
        path, size = path_inside(self.image_folder, info.file_name), (info.height, info.width)
        image = read_image(path, upright=False)
        if image.shape[:2] == size[::-1] != size:
            image = read_image(path, upright=True)
        _check_size("the image", path, image, size)
        return image

    def semantic_map(self, index: int) -> np.ndarray | None:
        """Class ids uint8 [H, W], 255 where nothing is labelled; None when the data set has no stuff maps."""
        if self.map_folder is None:
            return None
        info = self.image_info(index)
        path = path_inside(self.map_folder, Path(info.file_name).with_suffix(".png"))
        ids = read_label_map(path)
        _check_size("the stuff map", path, ids, (info.height, info.width))
        return ids

    def objects(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes float32 [g, 4] in pixels of the file, and labels int64 [g], of image `index`."""
        rows = self._object_rows(index)
        return self.annotations.boxes[rows], self.annotations.labels[rows].astype(np.int64)

    def mask(self, index: int, which: int) -> np.ndarray:
        """Mask uint8 [H, W] of object `which` of image `index`. Only where the data set was opened with masks."""
        height, width = self.annotations.sizes[self._kept[index]].tolist()
        return self.annotations.segmentations.decode(self._object_rows(index).start + which, height, width)

    def sample(
        self,
        index: int,
        resize: tuple[int, int] | None,
        augmentation: Augmentation | None = None,
        random: np.random.Generator | None = None,
        resize_image_too: bool = True,
    ) -> Sample:
        """Image `index` with its ground truth, resized within (short, long), and augmented from `random`; see
        `transform`."""
        boxes, labels = self.objects(index)
        sample = transform(
            self.image(index),
            boxes,
            labels,
            None if self.annotations.segmentations is None else lambda which: self.mask(index, which),
            self.semantic_map(index),
            image_id=self.image_info(index).image_id,
            resize=resize,
            augmentation=augmentation,
            random=random,
            resize_image_too=resize_image_too,
        )
        if sample.semantic is not None:
            self._check_ids(index, sample.semantic)
        return sample

    def _check_ids(self, index: int, ids: np.ndarray) -> None:
        """An id beyond the semantic branch's classes would end a CUDA program without a word on where it came from."""
        labelled = ids[ids != IGNORED]
        if labelled.size and labelled.max() >= self.num_semantic_classes:
            raise DataError(
                "a stuff map has an id that is no class",
                where=f"{self.map_folder}, map of {self.image_info(index).file_name}",
                why=f"the ids found in the other maps are below {self.num_semantic_classes}, got {labelled.max()}",
                fix=f"set such pixels to {IGNORED} (unlabelled), or correct the id",
            )

    def _object_rows(self, index: int) -> slice:
        row = self._kept[index]
        return slice(*self.annotations.object_offsets[row : row + 2].tolist())


def _check_size(what: str, path: Path, pixels: np.ndarray, size: tuple[int, int]) -> None:
    if pixels.shape[:2] != size:
        raise DataError(
            f"{what} has another size than the annotations say",
            where=path,
            why=f"(height, width) is {pixels.shape[:2]}, the annotations were made for {size}",
            fix="restore the file that the annotations were made for",
        )
