"""The JSON of annotation files, a few thousand annotations at a time, so that one of COCO's size needs little memory.

msgspec reads five times as fast as Python's json (docs/data.md), which is used where it is not installed, and whenever
a file cannot be read: its messages name the line.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError
from ..files import read_bytes

try:
    import msgspec
except ImportError:
    msgspec = None

MAX_BYTES = 2**33
"""Larger files are refused; the largest public one (Objects365) has 6 GB."""

CHUNK = 4096


def read_content(path: Path) -> dict:
    """The JSON of an annotation file, by Python's own reader. Raises DataError: it cannot be read, or is no JSON."""

    def refuse(name: str) -> None:
        raise ValueError(f"it contains {name}, which is no number")

    try:
        return json.loads(_text(path), parse_constant=refuse)
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}, column {error.colno}"
        raise DataError(
            "the annotation file is not JSON", where=where, why=error.msg, fix=f"python -m json.tool '{path}'"
        ) from error
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        raise DataError(
            "the annotation file is not usable JSON", where=path, why=str(error), fix=f"file '{path}'"
        ) from error


def read_in_chunks(path: Path) -> tuple[object, Iterator[list] | None]:
    """(the content without its annotations, the annotations in lists of at most CHUNK).

    What the file holds is not checked. Without a list "annotations" there is None in its place.

    Raises:
        DataError: as `read_content`; also while the chunks are read.
    """
    if msgspec is not None:
        try:
            sections = msgspec.json.decode(_text(path), type=dict[str, msgspec.Raw])
            raw = msgspec.json.decode(sections.pop("annotations"), type=list[msgspec.Raw])
            return {name: msgspec.json.decode(section) for name, section in sections.items()}, _decoded(raw, path)
        except (msgspec.MsgspecError, KeyError, ValueError, RecursionError):
            pass  # whatever it is, the other reader says it better
    content = read_content(path)
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        return content, None
    return content, in_chunks(content.pop("annotations"))


def in_chunks(entries: list) -> Iterator[list]:
    """The same entries in lists of at most CHUNK."""
    return (entries[start : start + CHUNK] for start in range(0, len(entries), CHUNK))


def _decoded(raw: list, path: Path) -> Iterator[list]:
    decoder = msgspec.json.Decoder()
    entries = iter(raw)
    try:
        while chunk := [decoder.decode(entry) for entry in itertools.islice(entries, CHUNK)]:
            yield chunk
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        read_content(path)  # raises, with the line
        raise DataError("the annotation file is not usable JSON", where=path, why=str(error)) from error


def _text(path: Path) -> bytes:
    try:
        return read_bytes(path, MAX_BYTES)
    except OSError as error:
        fix = "name the annotation file, or the folder that has annotations/"
        raise DataError(
            "the annotation file cannot be read", where=path, why=error.strerror or str(error), fix=fix
        ) from error
