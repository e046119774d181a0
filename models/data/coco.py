"""A data set in COCO's folder layout: annotations/, a folder of images for each split, stuffthingmaps/ when present."""

import json
import re
from pathlib import Path
from typing import Literal

from ..errors import DataError
from .annotation_cache import cached_annotations
from .annotations import read_annotations
from .dataset import AnnotatedImages


class CocoDataset(AnnotatedImages):
    """One split of a COCO-layout folder.

    Args:
        root: the folder. It holds annotations/instances_{split}.json and the images in {split}/, or the same with 2017
            or 2014 after the split's name. The splits minival2014 and valminusminival2014 have their images in
            val2014/. A file annotations/lvis_v1_{split}.json is found, too; its images lie in train2017/ and val2017/.
        split: "train", "val", or any other name that the folder has; "coco_2014_minival" is "minival2014".
        semantic: whether to read stuffthingmaps/{split}/{image's name}.png; "auto": if that folder exists.
        training: leave out images without any annotation and those with a side below `min_side`. Evaluation has all.
        min_side: pixels.
        annotation_file, image_folder, map_folder: instead of the ones looked for in `root`; relative to it or absolute.
        boxes_only: masks are not read, and need not be there (for detectors without a mask head).

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
        boxes_only: bool = False,
    ) -> None:
        root = existing_folder(root)
        file, folder = find_split(root, split, annotation_file, image_folder)
        maps = _find_maps(root, folder.name, semantic, map_folder)
        annotations = cached_annotations(file, boxes_only, read_annotations)
        super().__init__(root, split, file, folder, maps, annotations, training, min_side)

    def ground_truth(self) -> dict:
        """The content of the annotation file, as it is."""
        return json.loads(self.annotation_file.read_text(encoding="utf-8"))


def existing_folder(root: str | Path) -> Path:
    """`root` as a path. Raises DataError if it is no folder."""
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(
            "no such data set folder",
            where=root,
            why="it is a file" if root.exists() else "it does not exist",
            fix=f"python -m models.data --out {root}   writes the default data set there",
        )
    return root


def find_split(
    root: Path, split: str, annotation_file: str | Path | None = None, image_folder: str | Path | None = None
) -> tuple[Path, Path]:
    """The annotation file and the image folder of a split; arguments and errors as of CocoDataset."""
    names = _names(split)
    files = [root / f"annotations/instances_{name}.json" for name in names]
    files += [root / f"annotations/lvis_v1_{name}.json" for name in names]
    folders = [root / name.replace("valminusminival", "val").replace("minival", "val") for name in names]
    files = [root / annotation_file] if annotation_file else files
    folders = [root / image_folder] if image_folder else folders
    file = next((path for path in files if path.is_file()), None)
    if file is not None and file.name.startswith("lvis_v1_") and not image_folder:
        folders = [root]  # images of LVIS's splits lie in train2017/ and val2017/: each names its folder
    same_year = folders[files.index(file)] if file in files[: len(folders)] else folders[0]
    folder = next((path for path in (same_year, *folders) if path.is_dir()), None)
    for found, looked_for, kind in ((file, files, "annotation file"), (folder, folders, "image folder")):
        if found is None:
            raise DataError(
                f"the data set has no {kind} for the split {split!r}",
                where=root,
                why="looked for " + " and ".join(str(path) for path in looked_for),
                fix=f"find {root} -maxdepth 2   shows what is there; python -m models.data --out DIR   writes one",
            )
    return file, folder


def _names(split: str) -> list[str]:
    """What files and folders of a split may be called: train -> train2017, train, train2014."""
    if catalogue := re.fullmatch(r"coco_(\d{4})_(\w+)", split):
        return [catalogue[2] + catalogue[1]]
    return [split] if re.search(r"\d{4}$", split) else [f"{split}2017", split, f"{split}2014"]


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
