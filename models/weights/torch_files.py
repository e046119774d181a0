"""Tensors of a .pth file, without running anything from it: the zip archives of torch >= 1.6 and the older format.

`torch.load` is not used. Even with `weights_only=True` it refuses the checkpoints that mmcv and mmengine wrote (their
notes hold objects of those packages), checks no checksum, and trusts sizes in the file. Here a tensor is made only if
its numbers fit the bytes that are there; every other object stays a record (pickles.py) and is left alone.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import struct
import zipfile
from collections.abc import Callable

import torch
from torch import Tensor

from .pickles import PERSISTENT, Call, Global, PickleFault, read_pickle

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_MAGIC_BYTES = LEGACY_MAGIC.to_bytes(10, "little")
MAX_PICKLE = 64 << 20
"""Bytes of an archive's data.pkl: names and notes, no numbers. A training state of a large detector has 1 MiB."""
MAX_RECORDS, MAX_DIRECTORY = 20_000, 2 << 20
"""An archive's records and the bytes of their list: one for each storage, of about a hundred bytes."""
DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
REBUILD_TENSOR = {("torch._utils", "_rebuild_tensor"), ("torch._utils", "_rebuild_tensor_v2")}
REBUILD_PARAMETER = ("torch._utils", "_rebuild_parameter")

ReadStorage = Callable[[object, torch.dtype, int], Tensor]
"""(key, dtype, number of elements) -> 1-d tensor."""


def read_torch_file(path: str) -> tuple[object, Callable[[object], Tensor | None]]:
    """What the file holds, and a function that makes the tensor of one of its records (None: it is no tensor).

    Raises:
        PickleFault: damaged, or not what torch.save writes.
    """
    with open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04":
            content, read_storage = _read_archive(path)
        else:
            content, read_storage = _read_legacy(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return content, lambda record: _tensor(record, read_storage)


def _tensor(record: object, read_storage: ReadStorage) -> Tensor | None:
    if isinstance(record, Call) and record.function == REBUILD_PARAMETER and isinstance(record.arguments, tuple):
        record = record.arguments[0] if record.arguments else None
    if not isinstance(record, Call) or not isinstance(record.function, Global):
        return None
    if record.function not in REBUILD_TENSOR:
        return None
    try:
        storage, offset, size, stride = record.arguments[:4]
        dtype, key, numel = _storage(storage)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise PickleFault(f"a tensor is described in an unknown way ({type(error).__name__})") from None
    numbers = (numel, offset, *size, *stride) if isinstance(size, tuple) and isinstance(stride, tuple) else (None,)
    possible = all(type(number) is int and 0 <= number < 1 << 40 for number in numbers)
    if not possible or len(size) != len(stride) or len(size) > 8:
        raise PickleFault("a tensor has a size, stride or offset that is not possible")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    # A stride of 0 would make a terabyte of four bytes; weights are never stored so.
    if math.prod(size) > numel or (math.prod(size) and last >= numel):
        raise PickleFault(f"a tensor of shape {list(size)[:8]} does not fit its storage of {numel} elements")
    return read_storage(key, dtype, numel).as_strided(size, stride, offset)


def _storage(record: Call) -> tuple[torch.dtype, object, int]:
    if record.function != PERSISTENT:
        raise ValueError
    kind, storage_type, key, _, numel = record.arguments[0][:5]
    if kind != "storage" or not isinstance(key, str | int):
        raise ValueError
    if len(record.arguments[0]) > 5 and record.arguments[0][5] is not None:
        raise PickleFault("a storage is a view of another one, which torch has not written since 2017")
    return DTYPES[storage_type.name if isinstance(storage_type, Global) else None], key, numel


def _read_archive(path: str) -> tuple[object, ReadStorage]:
    """The zip format. Its checksums are checked for what is read."""
    _check_directory(path)
    archive, length = zipfile.ZipFile(path), os.path.getsize(path)
    records = {info.filename: info for info in archive.infolist()}
    folders = [name.removesuffix("data.pkl") for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(records) != len(archive.infolist()) or len(folders) != 1:
        raise PickleFault("it is a zip archive, but not one that torch.save wrote (one data.pkl, each name once)")
    (folder,) = folders
    if folder + "constants.pkl" in records:
        raise PickleFault("it is a TorchScript program, which holds code; save its state_dict() instead")

    def read(name: str, size: int | None = None) -> bytes:
        info = records.get(folder + name)
        if info is None:
            raise PickleFault(f"the archive has no record {name[:80]}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size > length:
            raise PickleFault(f"the record {name[:80]} is compressed or encrypted, which torch never does")
        if size is not None and info.file_size != size:
            raise PickleFault(f"the record {name[:80]} has {info.file_size} bytes, its tensors say {size}")
        return archive.read(info)

    if records[folder + "data.pkl"].file_size > MAX_PICKLE:
        raise PickleFault("its table of contents is longer than that of any weights")
    if folder + "byteorder" in records and read("byteorder") != b"little":
        raise PickleFault("its numbers are big-endian")
    content = read_pickle(io.BytesIO(read("data.pkl")))
    storages: dict[str, Tensor] = {}

    def read_storage(key: object, dtype: torch.dtype, numel: int) -> Tensor:
        if key not in storages:
            storages[key] = _elements(read(f"data/{key}", numel * dtype.itemsize), dtype)
        return _same(storages[key], dtype, numel)

    return content, read_storage


def _check_directory(path: str) -> None:
    """Refuses an archive of a million entries before Python's zipfile reads them all."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - (66 << 10)))
        tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) < end + 22:
        raise PickleFault("the archive's end is missing: it was not copied whole")
    count, size = struct.unpack_from("<HI", tail, end + 10)
    wide = tail.rfind(b"PK\x06\x06", 0, end)
    if wide >= 0 and len(tail) >= wide + 48:
        count, size = struct.unpack_from("<QQ", tail, wide + 32)
    # the size counts too: zipfile believes it rather than the number of entries
    if count > MAX_RECORDS or size > MAX_DIRECTORY:
        raise PickleFault(
            f"the archive has {count} records in a directory of {size} bytes; weights have a few thousand"
        )


def _read_legacy(data: mmap.mmap) -> tuple[object, ReadStorage]:
    """Before torch 1.6: pickles of a magic number, a version, the machine, the content and the storages' keys, then
    for each storage its number of elements and the elements."""
    if read_pickle(data) != LEGACY_MAGIC or read_pickle(data) != 1001:
        raise PickleFault("it is a pickle, but not one that torch.save wrote")
    machine = read_pickle(data)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise PickleFault("its numbers are big-endian")
    content, keys = read_pickle(data), read_pickle(data)
    if not isinstance(keys, list) or not all(isinstance(key, str | int) for key in keys):
        raise PickleFault("the list of its storages is damaged")
    start = data.tell()
    places: dict[object, tuple[int, int]] = {}
    storages: dict[object, Tensor] = {}
    sizes = _storage_sizes(content)
    for key in keys:
        (numel,) = struct.unpack("<q", data[start : start + 8].ljust(8, b"\xff"))
        if key in places or numel < 0 or key not in sizes:
            raise PickleFault("a storage is missing: the file was not copied whole, or is damaged")
        places[key] = (start + 8, numel)
        start += 8 + numel * sizes[key]
        if start > len(data):
            raise PickleFault("it ends in the middle of a tensor: it was not copied whole")

    def read_storage(key: object, dtype: torch.dtype, numel: int) -> Tensor:
        at, stored = places.get(key, (0, None))
        if stored != numel:
            raise PickleFault(f"a storage has {stored} elements, its tensors say {numel}")
        if key not in storages:
            storages[key] = _elements(data[at : at + numel * dtype.itemsize], dtype)
        return _same(storages[key], dtype, numel)

    return content, read_storage


def _storage_sizes(content: object) -> dict[object, int]:
    """Bytes an element by storage key, for every storage that the content mentions."""
    sizes, seen, left = {}, set(), [content]
    while left:
        item = left.pop()
        if id(item) in seen or not isinstance(item, dict | list | tuple | Call):
            continue
        seen.add(id(item))
        if isinstance(item, Call):
            if item.function == PERSISTENT:
                try:
                    dtype, key, _ = _storage(item)
                except (TypeError, ValueError, KeyError, IndexError, AttributeError):
                    raise PickleFault("a storage is described in an unknown way") from None
                sizes[key] = dtype.itemsize
            left += [item.function, item.arguments, item.state]
        else:
            left += item.values() if isinstance(item, dict) else item
    return sizes


def _elements(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _same(storage: Tensor, dtype: torch.dtype, numel: int) -> Tensor:
    if storage.dtype != dtype or storage.numel() != numel:
        raise PickleFault("one storage is read as two types")
    return storage
