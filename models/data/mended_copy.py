"""The mended copies that `check --fix` writes, each in the layout of the data set that was checked."""

import itertools
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from pycocotools import mask as mask_api

from ..errors import DataError
from ..images import label_map_palette, path_inside, read_label_map
from .voc import VOID, listed_names
from .voc_xml import PARTS

Take = Callable[[dict, dict | None], object]
"""Takes an annotation as it was, and mended; None: it is taken out."""


class Split(NamedTuple):
    name: str
    source: Path
    """The annotation file; for VOC's XML files the list of images."""
    image_folder: Path
    map_folder: Path | None
    content: dict
    """Of the annotation file, without its annotations."""
    chunks: Iterator[list]
    """The annotations."""
    boxes_only: bool = False
    """Masks are not expected."""


class CocoCopy:
    """Annotation files, written an annotation at a time, since they may not fit into memory as objects; links to the
    images and the stuff maps."""

    def __init__(self, source: Path, folder: Path) -> None:
        self._source, self._folder = source, folder
        (folder / "annotations").mkdir(parents=True)

    @contextmanager
    def annotations(self, split: Split, images: list[dict], unlabelled: set[str]) -> Iterator[Take]:
        """images: those that are kept. unlabelled: names of those that get a map without labels."""
        with _written(self._folder / "annotations" / split.source.name, split, images) as take:
            yield take
        for entry in images:
            self._link(split.image_folder / entry["file_name"])
            if split.map_folder is not None:
                map_ = split.map_folder / Path(entry["file_name"]).with_suffix(".png")
                if entry["file_name"] in unlabelled:
                    target = self._folder / map_.relative_to(self._source)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    Image.new("L", (entry["width"], entry["height"]), 255).save(target)
                else:
                    self._link(map_)

    def _link(self, path: Path) -> None:
        _link(path, self._folder / path.relative_to(self._source))

    def finish(self) -> None:
        """Nothing is left to do."""


class VocCopy:
    """A folder in VOC's layout: XML files and maps of objects that are written anew where an object has changed, lists
    without the images that are taken out, links to all else.

    An object has one place in the XML file, for boxes and masks alike: what either split says is done to it. The folder
    of a year, VOC2012, keeps its name: the metric depends on it.
    """

    def __init__(self, source: Path, folder: Path) -> None:
        folder = folder / source.name if source.name.startswith("VOC") else folder
        self._source, self._folder = source, folder
        self._kept: dict[Path, list[str]] = {}  # by list
        self._listed: set[str] = set()
        self._changes: dict[str, dict[int, tuple | None]] = defaultdict(dict)  # by image's name and object's number
        (folder / "Annotations").mkdir(parents=True)

    @contextmanager
    def annotations(self, split: Split, images: list[dict], unlabelled: set[str]) -> Iterator[Take]:
        """As CocoCopy's; there are no stuff maps."""
        if split.source.suffix == ".json":
            with _written(self._folder / "Annotations" / split.source.name, split, images) as take:
                yield take
            return
        image_of = {entry["id"]: entry for entry in images}
        self._kept[split.source] = [Path(entry["file_name"]).stem for entry in images]
        self._listed.update(listed_names(split.source))

        def take(original: dict, mended: dict | None) -> None:
            image = image_of.get(original["image_id"])
            if image is not None and (mended is None or mended["bbox"] != original["bbox"]):
                changes, number = self._changes[Path(image["file_name"]).stem], original["number"]
                if changes.get(number, ()) is not None:
                    changes[number] = None if mended is None else _corners(mended, image)

        yield take

    def finish(self) -> None:
        out = self._listed - {name for names in self._kept.values() for name in names}
        for pattern in ("ImageSets/*/*.txt", "JPEGImages/*", "Annotations/*.xml", "Segmentation*/*.png", "labels.txt"):
            for path in sorted(self._source.glob(pattern)):
                with suppress(DataError):  # a link that leads out of the folder
                    path_inside(path.parent, path.name)
                    if path.suffix == ".txt" or path.stem not in out:
                        self._copy(path, self._folder / path.relative_to(self._source), out)

    def _copy(self, path: Path, target: Path, out: set[str]) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.parent.parent.name == "ImageSets":
            lines = self._kept[path] if path in self._kept else path.read_text(encoding="utf-8").splitlines()
            target.write_text("".join(f"{line}\n" for line in lines if line.strip() and line.split()[0] not in out))
            return
        changes = self._changes.get(path.stem, {})
        removed = {number for number, box in changes.items() if box is None}
        if changes and path.parent.name == "Annotations":
            _write_xml(path, target, changes)
        elif removed and path.parent.name == "SegmentationObject":
            _write_map(path, target, removed)
        else:
            _link(path, target)


def _corners(annotation: dict, image: dict) -> tuple[float, ...]:
    """A mended box as XML files have it: the first and the last pixel, counted from 1."""
    x, y, w, h = annotation["bbox"]
    mask = annotation.get("segmentation")
    # A mask's box ends behind its last pixel; what was read from an XML file ends at the last pixel.
    end = 0 if mask and annotation["bbox"] == mask_api.toBbox(mask).tolist() else 1
    sides = (x + 1, y + 1, min(x + w + end, image["width"]), min(y + h + end, image["height"]))
    return tuple(int(side) if side == int(side) else side for side in sides)


def _write_xml(path: Path, target: Path, changes: dict[int, tuple | None]) -> None:
    """The file has been read before, by `read_voc_file`, which refuses document types and entities."""
    tree = ElementTree.parse(path)
    objects = tree.getroot().findall("object")
    for number, box in changes.items():
        if box is None:
            tree.getroot().remove(objects[number])
            continue
        for part, side in zip(PARTS, box, strict=True):
            objects[number].find(f"bndbox/{part}").text = str(side)
    tree.write(target, encoding="utf-8")


def _write_map(path: Path, target: Path, removed: set[int]) -> None:
    """Pixels of removed objects are VOID; later objects move up."""
    new_number = np.arange(256, dtype=np.uint8)
    # Numbers of XML objects count from 0, those of the map from 1; objects beyond its last number have no pixels.
    for number in sorted((number + 1 for number in removed if number + 1 < VOID), reverse=True):
        new_number[(new_number > number) & (new_number < VOID)] -= 1
        new_number[number] = VOID
    palette = label_map_palette(path)
    map_ = Image.fromarray(new_number[read_label_map(path)])
    if palette is not None:
        map_.putpalette(palette)
    map_.save(target)


@contextmanager
def _written(path: Path, split: Split, images: list[dict]) -> Iterator[Take]:
    head = {**split.content, "images": images}
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(head)[:-1] + ', "annotations": [')
        separators = itertools.chain([""], itertools.repeat(", "))
        yield lambda _, mended: mended is None or file.write(next(separators) + json.dumps(mended))
        file.write("]}")


def _link(source: Path, target: Path) -> None:
    """A hard link, which needs no space; a copy where the disk has none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        return  # named twice
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)
