"""Pictures from whatever they are given as: paths, folders, patterns, Pillow images, arrays, tensors, videos, lists."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from .errors import DataError, MachineError
from .images import SUFFIXES, image_files, image_size, pillow_pixels, read_image

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")


class Picture(NamedTuple):
    pixels: np.ndarray  # uint8 RGB [H, W, 3]
    source: str | None  # where it is from, None for pixels that were given


def is_one_picture(source) -> bool:
    """Whether the source is one image by its nature: pixels, a Pillow image, the path of an image file."""
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        return not path.is_dir() and not is_video(path) and (path.exists() or not glob.has_magic(str(path)))
    return isinstance(source, np.ndarray | Tensor | Image.Image)


def is_endless(source) -> bool:
    """Whether the source may hold more pictures than fit into memory: a video, a generator, a data loader."""
    if isinstance(source, str | os.PathLike):
        return is_video(Path(source))
    return isinstance(source, Iterable) and not isinstance(source, list | tuple | np.ndarray | Tensor | Image.Image)


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def pictures(source, on_error: Callable[[DataError], None] | None = None) -> Iterator[Picture]:
    """The pictures of a source, one after the other, each read when it is asked for.

    Args:
        source: the path of an image or a video (OpenCV reads it), of a folder (its images by name), or a pattern such
            as "holiday/*.jpg"; a Pillow image, turned upright by its EXIF data; uint8 RGB [H, W, 3] as an array or a
            tensor, or a tensor [3, H, W]; or a list or any other iterable of these.
        on_error: told of each image file that cannot be read, which is then left out; None: the error is raised.

    Raises:
        DataError: nothing of this name, not an image, too large. TypeError, ValueError: pixels that are not uint8 RGB.
        MachineError: a video without OpenCV.
    """
    if isinstance(source, str | os.PathLike):
        for path in files_of(Path(source)):
            if is_video(path):
                yield from video_frames(path)
                continue
            try:
                picture = Picture(read_image(path), str(path))
            except DataError as error:
                if on_error is None:
                    raise
                on_error(error)
                continue
            yield picture
    elif isinstance(source, Image.Image):
        yield Picture(pillow_pixels(source), getattr(source, "filename", None) or None)
    elif isinstance(source, np.ndarray | Tensor):
        channels_first = isinstance(source, Tensor) and source.ndim == 3 and source.shape[0] == 3 != source.shape[2]
        yield Picture(checked_pixels(source.permute(1, 2, 0) if channels_first else source), None)
    elif isinstance(source, Iterable):
        for item in source:
            yield from pictures(item, on_error)
    else:
        raise TypeError(
            "pictures come as a path, a Pillow image, an array or tensor uint8 [H, W, 3], or several of these; "
            f"got {type(source).__name__}"
        )


def files_of(path: Path) -> list[Path]:
    """The file itself, the images of a folder by name, or what matches a pattern (images and videos) by name.

    Raises:
        DataError: there is nothing of this name, or a folder without images.
    """
    if path.is_dir():
        return list(image_files([path]))
    if path.exists() or (is_video(path) and not glob.has_magic(str(path))):
        return [path]
    if glob.has_magic(str(path)):
        matching = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        found = [entry for entry in matching if entry.suffix.lower() in SUFFIXES + VIDEO_SUFFIXES]
        if not found:
            raise DataError(
                "no image matches this pattern",
                where=path,
                why=f"{len(matching)} files match, and end in none of {', '.join(SUFFIXES + VIDEO_SUFFIXES)}",
            )
        return found
    if str(path).startswith(("http:", "https:")):
        raise DataError("nothing is fetched from the network", where=path, fix="fetch it first, and name the file")
    image_size(path)  # raises the error that names what is there
    return [path]


def video_frames(path: Path) -> Iterator[Picture]:
    """The frames of a video in their order, read by OpenCV one by one."""
    if not path.is_file():
        raise DataError("no such video file", where=path, fix=f"ls {path.parent}   shows what is there")
    try:
        import cv2
    except ImportError as error:
        raise MachineError(
            "reading a video needs OpenCV", where=path, fix="pip install opencv-python-headless"
        ) from error
    capture = cv2.VideoCapture(str(path))
    try:
        number = 0
        while True:
            there, frame = capture.read()  # uint8 BGR [H, W, 3]
            if not there:
                break
            yield Picture(np.ascontiguousarray(frame[:, :, ::-1]), f"{path}, frame {number}")
            number += 1
    finally:
        capture.release()
    if number == 0:
        raise DataError(
            "the video cannot be read",
            where=path,
            why="OpenCV finds no frame in it: the file is damaged, or its codec is not known",
            fix=f"ffmpeg -i {path} {path.stem}_%05d.png   writes its frames as images",
        )


def checked_pixels(image, name: str = "image") -> np.ndarray:
    """An array or tensor that is uint8 RGB [H, W, 3], as an array; else TypeError or ValueError."""
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(f"predict: {name} must have shape [H, W, 3], got {list(array.shape)}")
    if array.dtype != np.uint8:
        raise TypeError(f"predict: {name} must be uint8, got {array.dtype}")
    return array


def batches(items: Iterable[Picture], size: int) -> Iterator[list[Picture]]:
    """Pictures in their order, as batches of at most `size` that have one height and width.

    So nothing is padded to a larger neighbour, and what is found in an image does not depend on the others.
    """
    batch: list[Picture] = []
    for item in items:
        if batch and item.pixels.shape != batch[0].pixels.shape:
            yield batch
            batch = []
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
