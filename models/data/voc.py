"""PASCAL VOC: boxes from Annotations/*.xml, or instance masks from SegmentationObject/*.png or a COCO-style JSON file.

Layout and conventions: the VOC development kit (Everingham et al., 2007 to 2012). In its files a box names its first
and its last pixel, counted from 1; all four numbers are taken minus 1, as in mmdetection and maskrcnn-benchmark.
"""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from pycocotools import mask as mask_api

from ..errors import DataError, UserError
from ..files import read_bytes
from ..images import path_inside, read_label_map
from .annotation_json import read_content
from .annotations import pack_annotations, read_annotations
from .coco import existing_folder
from .dataset import AnnotatedImages, VocMetric
from .segmentation import MalformedAnnotation, check_drawable
from .voc_xml import VocFile, VocObject, read_voc_file

CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)

MASKS = " (masks)"

MAX_LIST = 2**28
"""Bytes of a list of images or classes: ten million names."""

VOID = 255
"""In maps of objects: the border around them. Objects have the numbers from 1 to 254."""

MOST_CHANGES = 2**22
"""From one object to another along the columns of a map, which are runs of both. A picture of 7000 x 7000 has a million
with 140 across each column."""

LAST_YEAR_OF_ELEVEN_POINTS = 2009


def is_voc(root: Path) -> bool:
    """Whether a folder has VOC's layout: VOCdevkit/VOC2012, or VOCdevkit itself."""
    return _is_year(root) or any(map(_is_year, root.glob("VOC*")))


def _is_year(folder: Path) -> bool:
    return (folder / "JPEGImages").is_dir() and (folder / "Annotations").is_dir()


class VocDataset(AnnotatedImages):
    """One split of a folder in VOC's layout.

    With masks, from the first of these that is there: Annotations/pascal_{split}{year}.json (COCO's form; also
    conversions of SBD, under the name that `annotation_file` gives), or SegmentationObject/{name}.png of the images
    listed in ImageSets/Segmentation/{split}.txt, whose colour k is object k of the XML file. With `boxes_only` the
    images listed in ImageSets/Main/{split}.txt.

    Difficult objects are not trained on; the VOC metric ignores them. The classes are VOC's 20, or those in
    labels.txt of the folder, one a line.

    Args:
        root: VOCdevkit/VOC2012, or a VOCdevkit.
        split: "train", "val", "trainval" or "test"; "train2012" and "voc_2012_train" choose among the years of a
            VOCdevkit, and "voc_2012_train_cocostyle" is the same (masks are read where the detector needs them).
        training: leave out images without any object. Evaluation has all.
        boxes_only: masks are not read, and need not be there (for detectors without a mask head).
        annotation_file: a COCO-style file instead of the ones looked for; relative to `root` or absolute.

    Raises:
        DataError: says what is wrong, where, why, and what mends it.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        training: bool = False,
        boxes_only: bool = False,
        annotation_file: str | Path | None = None,
    ) -> None:
        year, split = _year_and_name(split)
        folder = year_folder(existing_folder(root), year)
        year = year or _year_of(folder)
        file = folder / (annotation_file or f"Annotations/pascal_{split}{year or ''}.json")
        self._folder, self._boxes_only = folder, boxes_only
        self._from_json = annotation_file is not None or (not boxes_only and file.is_file())
        if self._from_json:
            annotations = read_annotations(file, boxes_only)
        else:
            file = _image_set(folder, split, boxes_only)
            annotations = pack_annotations(_content(folder, file, boxes_only), file, boxes_only)
        self.voc = VocMetric(year is not None and year <= LAST_YEAR_OF_ELEVEN_POINTS, not self._from_json)
        super().__init__(folder, split, file, folder / "JPEGImages", None, annotations, training, min_side=0)

    def ground_truth(self) -> dict:
        """The annotations as the content of a COCO file, read again; difficult objects have "ignore": 1."""
        if self._from_json:
            return read_content(self.annotation_file)
        return _content(self._folder, self.annotation_file, self._boxes_only)


def _year_and_name(split: str) -> tuple[int | None, str]:
    """(2012, "train") of "train2012" and of "voc_2012_train"; (None, "train") of "train"."""
    if match := re.fullmatch(r"voc_(\d{4})_(\w+?)(_cocostyle)?", split):
        return int(match[1]), match[2]
    match = re.fullmatch(r"(train|val|trainval|test)(\d{4})", split)
    return (int(match[2]), match[1]) if match else (None, split)


def year_folder(root: Path, year: int | None = None) -> Path:
    """The folder of a year in a VOCdevkit, or `root` itself. DataError where there is none, or more than one."""
    if _is_year(root) and (year is None or _year_of(root) in (None, year)):
        return root
    if _is_year(root):
        raise DataError("the folder is of another year", where=root, why=f"asked for is {year}", fix=f"{root.parent}")
    years = sorted(path for path in root.glob("VOC*") if _is_year(path))
    chosen = [path for path in years if year is None or path.name == f"VOC{year}"]
    if len(chosen) != 1:
        raise DataError(
            "the VOC folder has several years" if chosen else "the VOC folder lacks this year",
            where=root,
            why=f"it has {', '.join(path.name for path in years)}",
            fix="give the split's year, as trainval2007 or trainval2007+trainval2012; or the folder of one year",
        )
    return chosen[0]


def _year_of(folder: Path) -> int | None:
    name = folder.absolute().name  # the folder may be given as "."
    return int(name[3:]) if re.fullmatch(r"VOC\d{4}", name) else None


def _image_set(folder: Path, split: str, boxes_only: bool) -> Path:
    """The file that lists the split's images."""
    file = folder / "ImageSets" / ("Main" if boxes_only else "Segmentation") / f"{split}.txt"
    if file.is_file() and (boxes_only or (folder / "SegmentationObject").is_dir()):
        return file
    if boxes_only:
        have = sorted(path.stem for path in file.parent.glob("*.txt") if "_" not in path.stem)
        why = f"looked for {file}; there are {', '.join(have) or 'no lists'}"
        raise DataError(f"the VOC folder has no split {split!r}", where=folder, why=why)
    raise DataError(
        f"the VOC folder has no masks for the split {split!r}",
        where=folder,
        why=f"looked for Annotations/pascal_{split}*.json, and for {file} with the folder SegmentationObject",
        fix="--arch faster_rcnn is trained on the boxes alone",
    )


def voc_splits(
    root: Path, names: Sequence[str], fault: Callable[[str, str, UserError], None]
) -> Iterator[tuple[str, Path, dict]]:
    """(name, its list, content in COCO's form) of each split: the lists of ImageSets/Main with boxes alone, and those
    of ImageSets/Segmentation, with MASKS after the name, with masks.

    Args:
        names: of the lists; all that are there by default.
        fault: called with (split, image's name, error) for each image that cannot be used; it is left out.
    """
    folder = year_folder(root)
    for kind, title in (("Main", "{}"), ("Segmentation", "{}" + MASKS)):
        for file in sorted((folder / "ImageSets" / kind).glob("*.txt")):
            split = title.format(file.stem)
            if file.stem in names or (not names and "_" not in file.stem):
                yield split, file, _content(folder, file, kind == "Main", functools.partial(fault, split))


def _content(
    folder: Path, image_set: Path, boxes_only: bool, fault: Callable[[str, UserError], None] | None = None
) -> dict:
    """The images that `image_set` lists, in COCO's form. One that cannot be used is an error, or goes to `fault`."""
    category_of, id_of = _categories(folder), _image_ids(folder / "Annotations")
    images, annotations = [], []
    for name in listed_names(image_set):
        try:
            file = read_voc_file(path_inside(folder / "Annotations", f"{name}.xml"))
            masks = None if boxes_only else _instance_masks(folder, name, file)
            objects = [_object(thing, category_of, f"{folder}/Annotations/{name}.xml") for thing in file.objects]
            if name not in id_of:
                why = f"it lists {name!r}, which leads to an XML file of another name, or through a link"
                raise DataError("a list names an image in another way than its XML file", where=image_set, why=why)
        except UserError as error:
            if fault is None:
                raise
            fault(name, error)
            continue
        image_id = id_of[name]
        images.append({"id": image_id, "file_name": f"{name}.jpg", "height": file.height, "width": file.width})
        for number, entry in enumerate(objects):
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "number": number, **entry})
            if masks is not None:
                mask = masks[number]
                annotations[-1] |= {
                    "area": int(mask_api.area(mask)),
                    "segmentation": mask | {"counts": mask["counts"].decode()},
                }
    categories = [{"id": number, "name": name} for name, number in category_of.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _image_ids(annotations: Path) -> dict[str, int]:
    """By name, of all images of a folder, so that an image has the same id in each list.

    VOC's own names are numbers, which its COCO-style files take as ids, too: 2007_000027 is 2007000027. Names of which
    one is none, or two are the same, count by their order, from 2012000000001 in VOC2012: no id is one of another year.
    """
    names = sorted(path.relative_to(annotations).with_suffix("").as_posix() for path in annotations.glob("**/*.xml"))
    numbers = {int(name.replace("_", "")) for name in names if re.fullmatch(r"_*\d[\d_]{0,17}", name)}
    if len(numbers) == len(names):
        return {name: int(name.replace("_", "")) for name in names}
    return {name: number for number, name in enumerate(names, (_year_of(annotations.parent) or 0) * 10**9 + 1)}


def listed_names(image_set: Path) -> list[str]:
    """The images' names in a list of ImageSets."""
    return [line.split()[0] for line in _lines(image_set)]


def _categories(folder: Path) -> dict[str, int]:
    """Category ids by name: VOC's, or from labels.txt of the folder."""
    file = folder / "labels.txt"
    names = _lines(file) if file.is_file() else CLASSES
    return {name.strip(): number for number, name in enumerate(names, 1)}


def _lines(path: Path) -> list[str]:
    """The lines of a list that are not blank."""
    try:
        text = read_bytes(path, MAX_LIST).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", error)
        raise DataError("a list of the data set cannot be read", where=path, why=why) from error
    return [line for line in text.splitlines() if line.strip()]


def _object(thing: VocObject, category_of: dict[str, int], where: str) -> dict:
    """An object as COCO has it, but for its ids and its mask."""
    if thing.name not in category_of:
        raise DataError(
            "an object is of no known class",
            where=where,
            why=f"its name is {thing.name!r}; known are {', '.join(category_of)}",
            fix="write your classes, one a line, into labels.txt beside JPEGImages",
        )
    x1, y1, x2, y2 = (side - 1 for side in thing.box)
    return {
        "category_id": category_of[thing.name],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": (x2 - x1) * (y2 - y1),
        "iscrowd": 0,
        "ignore": int(thing.difficult),
        "difficult": int(thing.difficult),
    }


def _instance_masks(folder: Path, name: str, file: VocFile) -> list[dict]:
    """COCO RLE of each object: the pixels that hold its number, counted from 1."""
    path = path_inside(folder / "SegmentationObject", f"{name}.png")
    numbers = read_label_map(path)
    if numbers.shape != (file.height, file.width):
        why = f"(height, width) is {numbers.shape}, the XML file says {(file.height, file.width)}"
        raise DataError("a map of objects has another size than its image", where=path, why=why)
    try:
        check_drawable(file.height, file.width)
    except MalformedAnnotation as error:
        raise DataError("a map of objects is too large", where=path, why=error) from error
    if len(file.objects) >= VOID:
        why = f"the XML file lists {len(file.objects)} objects, a map of 8 bits has numbers for {VOID - 1}"
        fix = f"take {name} out of ImageSets/Segmentation/*.txt"
        raise DataError("an image has more objects than a map can number", where=path, why=why, fix=fix)
    highest = int(numbers.max(where=numbers != VOID, initial=0))
    if highest > len(file.objects):
        why = f"it has pixels of object {highest}, the XML file lists {len(file.objects)} objects"
        raise DataError("a map of objects has more objects than the XML file", where=path, why=why)
    changes = np.count_nonzero(numbers[1:] != numbers[:-1])
    if changes > MOST_CHANGES:
        why = f"from pixel to pixel down its columns the object changes {changes:,} times, at most {MOST_CHANGES:,}"
        raise DataError("a map of objects is noise", where=path, why=why)
    numbers = np.asfortranarray(numbers)
    # a mask at a time: of a large image with many objects, all bitmaps would take gigabytes
    return [mask_api.encode((numbers == number).view(np.uint8)) for number in range(1, len(file.objects) + 1)]
