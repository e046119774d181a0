"""Images for classifiers: folders in ImageNet's layout, class names from files, and the network's square of each image.

Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..errors import DataError
from ..files import read_bytes
from ..images import SUFFIXES, read_image

MAX_BYTES = 16 << 20
"""Of a file of class names."""


class ClassName(NamedTuple):
    key: str
    """What folders are called: "n02123045"."""
    name: str
    """What people read: "tabby"; the same as the key where there is only one name."""


def class_folders(folder: Path) -> dict[str, list[Path]]:
    """Images by class of FOLDER/val/CLASS/IMAGE or FOLDER/CLASS/IMAGE, both in the order of their names.

    {} for a folder of which no folder holds an image.
    """
    root = folder / "val" if (folder / "val").is_dir() else folder
    found = {}
    for entry in sorted(entry for entry in root.iterdir() if entry.is_dir()):
        found[entry.name] = sorted(path for path in entry.iterdir() if path.suffix.lower() in SUFFIXES)
    return found if any(found.values()) else {}


def read_class_names(path: str | os.PathLike) -> list[ClassName]:
    """Classes by label, from a file or from the names of a folder's folders.

    A text file has a class a line: "tabby", or "n02123045 tabby, tabby cat" (ImageNet's synset_words.txt). A JSON file
    has a list of names, or {"281": "tabby"}, or {"281": ["n02123045", "tabby"]} (imagenet_class_index.json).

    Raises:
        DataError: no such file, not text, not one of these forms.
    """
    path = Path(path)
    if path.is_dir():
        root = path / "val" if (path / "val").is_dir() else path
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        return [ClassName(name, name) for name in names]
    try:
        text = read_bytes(path, MAX_BYTES).decode("utf-8")
    except OSError as error:
        raise DataError("the file of class names cannot be read", where=path, why=error.strerror) from error
    except UnicodeDecodeError as error:
        raise DataError("the file of class names is not text", where=path, why=str(error)) from error
    if path.suffix.lower() != ".json":
        return [_from_line(line) for line in text.splitlines() if line.strip()]
    try:
        content = json.loads(text)
        if isinstance(content, dict):
            content = [content[str(label)] for label in range(len(content))]
        return [ClassName(name, name) if isinstance(name, str) else ClassName(*map(str, name)) for name in content]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            "the file of class names has another form",
            where=path,
            why=f"{type(error).__name__}: {error}",
            fix='["tabby", ...], {"0": "tabby", ...}, {"0": ["n02123045", "tabby"], ...}, or text with a class a line',
        ) from error


def _from_line(line: str) -> ClassName:
    if match := re.fullmatch(r"(n\d{8})\s+(.+)", line.strip()):
        return ClassName(match[1], match[2])
    return ClassName(line.strip(), line.strip())


def folder_labels(folders: Sequence[str], classes: Sequence[ClassName] | None, num_classes: int) -> list[int]:
    """The label of each class folder: its place among the class names, or without them among the sorted folders.

    Raises:
        DataError: a folder that is none of the classes; without names, another number of folders than of classes.
    """
    if classes is None:
        if len(folders) != num_classes:
            raise DataError(
                "the folder has other classes than the weights",
                why=f"{len(folders)} class folders, {num_classes} classes in the weights",
                fix="--class-names FILE   a class a line, in the order of training",
            )
        return list(range(num_classes))
    labels = {spelling: label for label, names in reversed(list(enumerate(classes))) for spelling in names}
    unknown = [name for name in folders if name not in labels]
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(folders)} class folders are none of the classes",
            where=", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else ""),
            why=f"the classes are {', '.join(name.key for name in classes[:5])}{', ...' if len(classes) > 5 else ''}",
        )
    return [labels[name] for name in folders]


def read_square(path: str | os.PathLike, resize: int, crop: int) -> np.ndarray:
    """The middle of an image as uint8 RGB [crop, crop, 3], after its short side was made `resize` pixels.

    Bilinear with antialiasing, sizes and offsets as torchvision's Resize and CenterCrop have them: published accuracies
    of ImageNet classifiers were measured so.

    Raises:
        DataError: as `read_image`.
    """
    pixels = read_image(path)
    height, width = pixels.shape[:2]
    short = min(height, width)
    size = (int(resize * width / short), int(resize * height / short))
    if size != (width, height):
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
    top, left = (round((side - crop) / 2) for side in pixels.shape[:2])
    return np.ascontiguousarray(pixels[top : top + crop, left : left + crop])
