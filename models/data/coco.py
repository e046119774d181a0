"""A data set in COCO's folder layout: annotations/, a folder of images for each split, stuffthingmaps/ when present."""

import json
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from ..errors import DataError
from ..images import read_image, read_label_map
from .annotations import Annotations, read_annotations
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


class CocoDataset:
    """One split of a COCO-layout folder.

    Args:
        root: the folder. It holds annotations/instances_{split}.json and the images in {split}/, or the same with 2017
            after the split's name.
        split: "train", "val", or any other name that the folder has.
        semantic: whether to read stuffthingmaps/{split}/{image's name}.png; "auto": if that folder exists.
        training: leave out images without any annotation and those with a side below `min_side`. Evaluation has all.
        min_side: pixels.
        annotation_file, image_folder, map_folder: instead of the ones looked for in `root`; relative to it or absolute.

    Raises:
        DataError: says what is wrong, where, why, and what mends it.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        semantic: Literal["auto", "yes", "no"] = "auto",
        training: bool = False,
        min_side: int = 32,
        annotation_file: str | Path | None = None,
        image_folder: str | Path | None = None,
        map_folder: str | Path | None = None,
    ) -> None:
        self.root, self.split = Path(root).expanduser(), split
        if not self.root.is_dir():
            raise DataError(
                "no such data set folder",
                where=self.root,
                why="it is a file" if self.root.exists() else "it does not exist",
                fix=f"python -m models.data --out {self.root}   writes the default data set there",
            )
        found = _find_split(self.root, split, annotation_file, image_folder)
        self.annotation_file, self.image_folder = found
        self.map_folder = _find_maps(self.root, self.image_folder.name, semantic, map_folder)
        self.annotations: Annotations = read_annotations(self.annotation_file)
        keep = np.ones(len(self.annotations.image_ids), bool)
        if training:
            keep = self.annotations.annotated & (self.annotations.sizes.min(1) >= min_side)
            if not keep.any():
                raise DataError(
                    "there is nothing to train on",
                    where=self.annotation_file,
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
        path, size = self.image_folder / info.file_name, (info.height, info.width)
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
        path = self.map_folder / Path(info.file_name).with_suffix(".png")
        ids = read_label_map(path)
        _check_size("the stuff map", path, ids, (info.height, info.width))
        return ids

    def objects(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes float32 [g, 4] in pixels of the file, and labels int64 [g], of image `index`."""
        rows = self._object_rows(index)
        return self.annotations.boxes[rows], self.annotations.labels[rows].astype(np.int64)

    def mask(self, index: int, which: int) -> np.ndarray:
        """Mask uint8 [H, W] of object `which` of image `index`."""
        height, width = self.annotations.sizes[self._kept[index]].tolist()
        return self.annotations.segmentations.decode(self._object_rows(index).start + which, height, width)

    def ground_truth(self) -> dict:
        """The content of the annotation file, as it is."""
        return json.loads(self.annotation_file.read_text(encoding="utf-8"))

    def sample(
        self,
        index: int,
        resize: tuple[int, int] | None,
        augmentation: Augmentation | None = None,
        random: np.random.Generator | None = None,
    ) -> Sample:
        """Image `index` with its ground truth, resized within (short, long), and augmented from `random`."""
        boxes, labels = self.objects(index)
        sample = transform(
            self.image(index),
            boxes,
            labels,
            lambda which: self.mask(index, which),
            self.semantic_map(index),
            image_id=self.image_info(index).image_id,
            resize=resize,
            augmentation=augmentation,
            random=random,
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


def _find_split(
    root: Path, split: str, annotation_file: str | Path | None, image_folder: str | Path | None
) -> tuple[Path, Path]:
    """The annotation file and the image folder of a split."""
    files = [root / annotation_file] if annotation_file else _candidates(root, split, "annotations/instances_{}.json")
    folders = [root / image_folder] if image_folder else _candidates(root, split, "{}")
    file = next((path for path in files if path.is_file()), None)
    folder = next((path for path in folders if path.is_dir()), None)
    for found, looked_for, kind in ((file, files, "annotation file"), (folder, folders, "image folder")):
        if found is None:
            raise DataError(
                f"the data set has no {kind} for the split {split!r}",
                where=root,
                why="looked for " + " and ".join(str(path) for path in looked_for),
                fix=f"find {root} -maxdepth 2   shows what is there; python -m models.data --out DIR   writes one",
            )
    return file, folder


def _candidates(root: Path, split: str, pattern: str) -> list[Path]:
    return [root / pattern.format(name) for name in (f"{split}2017", split)]


def _find_maps(root: Path, split: str, semantic: str, map_folder: str | Path | None) -> Path | None:
    if semantic not in ("auto", "yes", "no"):
        raise ValueError(f"CocoDataset: semantic must be auto, yes or no, got {semantic!r}")
    if semantic == "no":
        return None
    folder = root / (map_folder or Path("stuffthingmaps") / split)
    if folder.is_dir():
        return folder
    if semantic == "yes" or map_folder:
        raise DataError(
            "the data set has no stuff maps",
            where=root,
            why=f"looked for {folder}",
            fix="put the maps there; or do without the semantic branch: --semantic no",
        )
    return None


def _check_size(what: str, path: Path, pixels: np.ndarray, size: tuple[int, int]) -> None:
    if pixels.shape[:2] != size:
        raise DataError(
            f"{what} has another size than the annotations say",
            where=path,
            why=f"(height, width) is {pixels.shape[:2]}, the annotations were made for {size}",
            fix="restore the file that the annotations were made for",
        )
