"""Reading picture files: JPEG through simplejpeg where it is installed, everything else through Pillow."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .errors import DataError

try:
    import simplejpeg
except ImportError:  # slower, and the same pixels
    simplejpeg = None

FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
"""Pillow is asked for these only: its rarer readers are where its security faults are."""


def read_image(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """The picture as uint8 [H, W, 3] RGB.

    Args:
        path: a JPEG, PNG, BMP or WebP file.
        size: the (height, width) that the annotations were made for. The pixels are taken as they are stored, and the
            EXIF orientation is ignored; except where only the turned picture has this size. None turns by EXIF.

    Raises:
        DataError: no such file; not a picture; cut short; another size.
    """
    data = _read(path)
    image = _decode_jpeg(data, size) if size is not None else None
    if image is None:
        image = _decode(data, path, size)
    if size is not None and image.shape[:2] != size:
        why = f"the annotations say (height, width) = {size}, the file has {image.shape[:2]}"
        raise DataError("the image has another size than its annotations say", path, why, "restore the original file")
    return image


def read_map(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A map of class ids, one channel, unchanged: uint8 [H, W] (height, width = size). Raises DataError."""
    data = _read(path)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as file:
            if file.mode not in ("L", "P"):
                why = f"it must have one channel of 8 bits, got mode {file.mode}"
                raise DataError("the stuff map is not a map of class ids", path, why)
            pixels = np.asarray(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError("the stuff map cannot be read", path, str(error), "restore the original PNG file") from error
    if pixels.shape != size:
        why = f"the image is (height, width) = {size}, the map {pixels.shape}"
        raise DataError(
            "the stuff map has another size than its image", path, why, "make the map anew at the image's size"
        )
    return pixels


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        mend = f"ls -l '{path.parent}' shows what is there"
        raise DataError("the file cannot be read", path, error.strerror or str(error), mend) from error


def _decode_jpeg(data: bytes, size: tuple[int, int]) -> np.ndarray | None:
    """The pixels by the fast path; None where Pillow has to look at it (another format, size or colour space, faults)."""
    if simplejpeg is None or not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        return simplejpeg.decode_jpeg(data, "RGB") if (height, width) == size else None
    except ValueError:
        return None


def _decode(data: bytes, path: Path, size: tuple[int, int] | None) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            stored = (file.height, file.width)
            if size is None or (stored != size and stored == size[::-1]):
                return np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
            if stored != size:
                return np.empty((*stored, 0), np.uint8)  # not decoded: its size is refused
            return np.asarray(file.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, Image.UnidentifiedImageError):
            why, what = f"it is none of {', '.join(FORMATS)}", "the file is not an image"
        else:
            why, what = str(error), "the image is damaged"
        raise DataError(what, path, why, "restore the original file, or take it out of the annotations") from error
