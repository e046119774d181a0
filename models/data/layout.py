"""Which kind of data set a folder is, seen by its layout."""

from pathlib import Path
from typing import Literal

from .coco import CocoDataset
from .dataset import AnnotatedImages
from .joined import JoinedImages
from .voc import VocDataset, is_voc


def open_dataset(
    root: str | Path,
    split: str,
    semantic: Literal["auto", "yes", "no"] = "auto",
    training: bool = False,
    boxes_only: bool = False,
) -> AnnotatedImages | JoinedImages:
    """One split of a folder in VOC's layout (JPEGImages/ and Annotations/), or else in COCO's.

    Args:
        split: its name; several, joined, as "trainval2007+trainval2012".
        semantic: stuff maps of a COCO folder, as CocoDataset has it.
        training: leave out what cannot be trained on.
        boxes_only: for detectors without a mask head: masks are not read, and need not be there.

    Raises:
        DataError: says what is wrong, where, why, and what mends it.
    """
    if "+" in split:
        parts = [open_dataset(root, name, semantic, training, boxes_only) for name in split.split("+")]
        return JoinedImages(parts)
    if is_voc(Path(root).expanduser()):
        return VocDataset(root, split, training=training, boxes_only=boxes_only)
    return CocoDataset(root, split, semantic=semantic, training=training, boxes_only=boxes_only)
