"""Annotations on disk, as they are in memory: read in a moment, and shared by all processes that use them.

A cached file is mapped, not read: the system keeps one copy for every process of a machine. It has safetensors' format
and a checksum after it, which is checked before anything is used: one that is damaged is made again. Its name is a hash
of what it was made from.
"""

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ..errors import UserError
from ..files import atomic_path
from .annotations import Annotations
from .segmentation import PackedSegmentations
from .shapes import cache_root

VERSION = 2
"""Part of the key: to be raised when the cleaning or the arrays change, of which a test reminds."""

SMALLEST = 8 * 2**20
"""Files below this many bytes are read in less than a second, and not cached."""

KEPT = 20
"""So many cached files are kept, those that were used last."""

PREFIX = 2**20
"""Bytes at the start and at the end of an annotation file that are part of its key."""

DAMAGE = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)
"""What reading a file raises that is not as it was written."""

DTYPES = {"BOOL": np.bool_, "U8": np.uint8, "I16": np.int16, "I32": np.int32, "I64": np.int64}
DTYPES |= {"F32": np.float32, "F64": np.float64}


def cached_annotations(path: Path, boxes_only: bool, read: Callable[[Path, bool], Annotations]) -> Annotations:
    """`read(path, boxes_only)`, or what an earlier call read from the same file.

    The same file is one of the same path, size, time of its last change, and first and last bytes. Where the cache
    cannot be written the annotations are read all the same.
    """
    try:
        facts = path.stat()
        if facts.st_size < SMALLEST:
            return read(path, boxes_only)
        cached = cache_root() / "annotations" / f"{_key(path, facts, boxes_only)}.safetensors"
    except OSError:
        return read(path, boxes_only)  # which says what is wrong with the file
    with _one_at_a_time(cached.parent):  # of several processes that start together, one reads the annotation file
        with contextlib.suppress(OSError, *DAMAGE):  # not there, or damaged
            found = load(cached)
            os.utime(cached)
            return found
        annotations = read(path, boxes_only)
        with contextlib.suppress(OSError, UserError):  # a full or read-only disk
            save(cached, annotations)
            _discard_old(cached.parent)
            return load(cached)
        return annotations


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Waits for the lock of a folder, which is made. Without locks (some network disks have none) nobody waits."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / ".lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _key(path: Path, facts: os.stat_result, boxes_only: bool) -> str:
    with path.open("rb") as file:
        ends = file.read(PREFIX)
        file.seek(-min(PREFIX, facts.st_size), os.SEEK_END)
        ends += file.read(PREFIX)
    made_from = [VERSION, str(path.resolve()), facts.st_size, facts.st_mtime_ns, boxes_only]
    return hashlib.sha256(json.dumps(made_from).encode() + ends).hexdigest()[:32]


def save(path: Path, annotations: Annotations) -> None:
    """Writes the cached file, atomically."""
    arrays, rest = {}, {}
    for prefix, part in (("", annotations), ("segmentations.", annotations.segmentations)):
        for field in fields(part) if part is not None else ():
            value = getattr(part, field.name)
            if isinstance(value, np.ndarray):
                arrays[prefix + field.name] = np.ascontiguousarray(value)
            elif field.name != "segmentations":
                rest[prefix + field.name] = value
    names = arrays["file_names"]
    rest["file_name_length"] = names.dtype.itemsize
    arrays["file_names"] = names.view(np.uint8)  # safetensors has no texts
    with atomic_path(path) as temporary:
        save_file(arrays, temporary, metadata={"rest": json.dumps(rest)})
        with open(temporary, "ab") as file:
            file.write(_checksum(_mapped(temporary)))


def load(path: Path) -> Annotations:
    """The annotations of a cached file, mapped. Raises OSError or one of DAMAGE for a damaged one."""
    view = _mapped(path)
    if _checksum(view[:-4]) != view[-4:]:
        raise ValueError("the checksum is another")
    length = int.from_bytes(view[:8], "little")
    header = json.loads(bytes(view[8 : 8 + length]))
    rest = json.loads(header.pop("__metadata__")["rest"])
    values = {}
    for name, entry in header.items():
        offset = 8 + length + entry["data_offsets"][0]
        values[name] = np.ndarray(entry["shape"], DTYPES[entry["dtype"]], view, offset)
    values["file_names"] = values["file_names"].view(f"S{rest.pop('file_name_length')}")
    rest["class_names"] = tuple(rest["class_names"])
    rest["left_out"] = tuple((why, count) for why, count in rest["left_out"])
    prefix = "segmentations."
    parts = {name.removeprefix(prefix): values.pop(name) for name in list(values) if name.startswith(prefix)}
    return Annotations(**values, **rest, segmentations=PackedSegmentations(**parts) if parts else None)


def _mapped(path: Path) -> memoryview:
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _checksum(data: memoryview) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little")


def _discard_old(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    for path in files[:-KEPT]:
        path.unlink(missing_ok=True)
