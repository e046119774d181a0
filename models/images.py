"""Reading image files: JPEG, PNG, WebP and BMP only, of a bounded size, with errors that name the file."""

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from .errors import DataError
from .files import check_regular

try:  # the fast path for JPEG: 3 times Pillow's speed on 640 x 480, bit-equal to it (tests/test_images.py)
    import simplejpeg
except ImportError:
    simplejpeg = None

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

MAX_PIXELS = 89_478_485
"""Pillow's own guard against files that are small on disk and huge in memory: 9459 x 9459, 256 MiB as RGB."""

# EXIF orientation -> how to turn the stored pixels [H, W, 3] upright
_UPRIGHT = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}


def read_image(path: str | os.PathLike, upright: bool = True) -> np.ndarray:
    """Pixels of an image file as uint8 RGB [H, W, 3], contiguous. Transparency is dropped, grey is repeated.

    Args:
        upright: turn the picture as its EXIF orientation asks, as viewers (and OpenCV, mmdetection) do.

    Raises:
        DataError: no such file, not one of FORMATS, truncated or corrupt, more than MAX_PIXELS.
    """
    with _open(path) as image:
        pixels = _decode(image, Path(path))
        orientation = _orientation(image) if upright else 1
    return np.ascontiguousarray(_UPRIGHT.get(orientation, lambda pixels: pixels)(pixels))


def pillow_pixels(image: Image.Image) -> np.ndarray:
    """Pixels of a Pillow image as `read_image` gives them: uint8 RGB [H, W, 3], upright by its EXIF orientation.

    Raises:
        DataError: more than MAX_PIXELS, or a file behind it that is truncated or corrupt.
    """
    where = getattr(image, "filename", None) or "a Pillow image"
    if image.width * image.height > MAX_PIXELS:
        why = f"at most {MAX_PIXELS:,} pixels: {image.width} x {image.height}"
        raise DataError("the image is too large", where=where, why=why, fix="cut or shrink it")
    try:
        image.load()
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError("the image file is truncated or corrupt", where=where, why=error) from error
    pixels = _rgb(image)
    return np.ascontiguousarray(_UPRIGHT.get(_orientation(image), lambda pixels: pixels)(pixels))


def read_label_map(path: str | os.PathLike) -> np.ndarray:
    """Values of a single-channel map (a stuff-thing PNG) as uint8 [H, W]; palette indices are not looked up.

    Raises:
        DataError: as read_image, or the file has more than one channel of 8 bits.
    """
    with _open(path) as image:
        if image.mode not in ("L", "P", "1"):
            raise DataError(
                "the label map must have one channel of 8 bits",
                where=path,
                why=f"its mode is {image.mode} ({len(image.getbands())} channels)",
                fix="save it as a greyscale or palette PNG whose pixel values are the labels",
            )
        _load(image, Path(path))
        return np.asarray(image, dtype=np.uint8)


def label_map_palette(path: str | os.PathLike) -> list[int] | None:
    """Colours (red, green, blue, red, ...) of a map's values; None if it has none. Errors are read_image's."""
    with _open(path) as image:
        return image.getpalette()


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """(height, width) of the stored pixels, from the header alone. Raises DataError as read_image does."""
    with _open(path) as image:
        return image.height, image.width


def path_inside(folder: Path, name: str | os.PathLike) -> Path:
    """The file `name` of `folder`, which a data set names: neither `..` nor a symbolic link may lead out of the folder.

    The folder itself may be a link: a person put it there.

    Raises:
        DataError: it lies elsewhere.
    """
    try:
        base, path = os.path.realpath(folder), os.path.realpath(os.path.join(folder, name))
    except ValueError as error:  # a zero byte
        where = f"{folder}, {os.fspath(name)!r}"
        raise DataError("a file of the data set has an impossible name", where=where, why=error) from error
    if not path.startswith(os.path.join(base, "")):
        raise DataError(
            "a file of the data set lies outside its folder",
            where=os.path.join(folder, name),
            why=f"it leads to {path}, the folder is {base}",
            fix="put the file itself there; a copy that follows its links is made by: cp -rL FOLDER COPY",
        )
    return Path(folder) / name


def image_files(arguments: Sequence[Path]) -> Iterator[Path]:
    """Files as they are named, and the images of folders in the order of their names. Each file once.

    Raises:
        DataError: there is nothing of this name, or a folder without images.
    """
    seen = set()
    for argument in arguments:
        found = [argument]
        if argument.is_dir():
            found = sorted(path for path in argument.iterdir() if path.suffix.lower() in SUFFIXES)
            if not found:
                raise DataError(
                    "no image in this folder",
                    where=argument,
                    why=f"its {sum(1 for _ in argument.iterdir())} entries end in none of {', '.join(SUFFIXES)}",
                )
        elif not argument.exists():
            image_size(argument)  # raises the error that names what is there
        for path in found:
            if path.resolve() not in seen:
                seen.add(path.resolve())
                yield path


def _open(path: str | os.PathLike) -> Image.Image:
    """Reads the header: decides format and size before any pixel is decoded."""
    try:
        check_regular(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tags that are damaged and not needed
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(path, formats=FORMATS)
    except FileNotFoundError as error:
        raise DataError("no such image file", where=path, fix=_nearby(Path(path))) from error
    except IsADirectoryError as error:
        raise DataError("an image file is needed, this is a folder", where=path) from error
    except UnidentifiedImageError as error:
        kind = "it is empty" if os.path.getsize(path) == 0 else f"it starts with {_first_bytes(path)}"
        raise DataError(
            "not an image that can be read",
            where=path,
            why=f"it is none of {', '.join(FORMATS)}: {kind}",
            fix="convert it first: python -c \"from PIL import Image; Image.open('IN').save('OUT.png')\"",
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            "the image is too large", where=path, why=f"at most {MAX_PIXELS:,} pixels: {error}", fix="cut or shrink it"
        ) from error
    except PermissionError as error:
        raise DataError("the image file cannot be opened", where=path, why=error.strerror) from error
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises these for damaged headers
        raise _damaged(Path(path), error) from error


def _decode(image: Image.Image, path: Path) -> np.ndarray:
    if simplejpeg is not None and image.format == "JPEG" and image.mode in ("RGB", "L"):
        try:
            return simplejpeg.decode_jpeg(path.read_bytes(), "RGB")
        except ValueError:
            pass  # stricter than Pillow on rare but valid files: Pillow has the last word
    _load(image, path)
    return _rgb(image)


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16"):  # 16-bit grey: the high byte, where convert() would clip at 255
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))  # a copy of our own, since Pillow's is read-only


def _load(image: Image.Image, path: Path) -> None:
    try:
        image.load()
    except (OSError, ValueError, SyntaxError) as error:
        raise _damaged(path, error) from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation of a decoded image; 1, as stored, where there is none or it is damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's complaints about other tags
            return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, ValueError, SyntaxError):
        return 1


def _damaged(path: Path, error: Exception) -> DataError:
    size = f" (the file has {path.stat().st_size:,} bytes)" if path.is_file() else ""
    return DataError(
        "the image file is truncated or corrupt",
        where=path,
        why=f"{error}{size}",
        fix="fetch or copy it again, or leave it out",
    )


def _nearby(path: Path) -> str:
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either: check the path"
    names = sorted(p.name for p in path.parent.iterdir() if p.suffix.lower() in SUFFIXES)
    if not names:
        return f"there is no image in {path.parent}: check the path"
    return f"images in {path.parent}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"


def _first_bytes(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return repr(file.read(12))
