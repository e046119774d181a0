"""Arrays of a Paddle file (.pdparams): a pickle of NumPy arrays by name, read without Paddle and without unpickling."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

from .pickles import Call, Global, PickleFault, read_pickle

DTYPES = {
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "i8": torch.int64,
    "i4": torch.int32,
    "i2": torch.int16,
    "i1": torch.int8,
    "u1": torch.uint8,
    "b1": torch.bool,
}
RECONSTRUCT = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}
INTERNAL_NAMES, LARGE_ARRAYS = "StructuredToParameterName@@", "UnpackBigParamInfor@@"


def read_paddle_file(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and what else there is: {name: why it is left out}.

    Raises:
        PickleFault: damaged, or not a dict.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        content, budget = read_pickle(data), _Budget(len(data))
    if not isinstance(content, dict):
        raise PickleFault("it is a pickle, but not of arrays by name")
    left_out: dict[str, str] = {}
    if content.pop(INTERNAL_NAMES, None) is not None:
        left_out[INTERNAL_NAMES] = "Paddle's internal names of the same arrays"
    large = content.pop(LARGE_ARRAYS, {})
    if not isinstance(large, dict):
        raise PickleFault("its table of large arrays is damaged")
    found: dict[str, Tensor] = {}
    for name, value in content.items():
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
            value = value[1]  # (internal name, array)
        array = _array(value, budget)
        if array is None:
            left_out[str(name)] = "it is no array"
        else:
            found[str(name)] = array
    for name, parts in large.items():
        found[str(name)] = _join(parts, found)
    if not found:
        raise PickleFault("it is a pickle, but holds no arrays by name")
    return found, left_out


class _Budget:
    """Bytes that the arrays of a file may have in all: a small file whose arrays are one string ends here."""

    def __init__(self, left: int):
        self.left = left

    def take(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise PickleFault("its arrays have more bytes than the file")


def _array(record: object, budget: _Budget) -> Tensor | None:
    """What numpy.ndarray.__reduce__ described; None where it is something else."""
    if not isinstance(record, Call) or not isinstance(record.function, Global) or record.function not in RECONSTRUCT:
        return None
    try:
        _, shape, description, fortran, data = record.state
        code, (_, order, *_) = description.arguments[0], description.state
    except (TypeError, ValueError, AttributeError, IndexError):
        raise PickleFault("an array is described in an unknown way") from None
    if not isinstance(code, str) or code not in DTYPES or order not in ("<", "|", "="):
        raise PickleFault("an array has a type that weights have not")
    if not isinstance(shape, tuple) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
        raise PickleFault("an array has a shape that is not possible")
    dtype = DTYPES[code]
    size = math.prod(shape) * dtype.itemsize
    budget.take(size)
    if isinstance(data, Call) and data.function == Global("_codecs", "encode") and isinstance(data.arguments, tuple):
        data = data.arguments[0] if data.arguments else None  # how Python 3 writes bytes for protocol 2
    if isinstance(data, str) and len(data) == size:  # ... and Python 2
        try:
            data = data.encode("latin-1")
        except UnicodeEncodeError:
            raise PickleFault("an array holds text") from None
    if not isinstance(data, bytes) or len(data) != size:
        raise PickleFault(f"an array of shape {list(shape)} has not the bytes for it")
    if not size:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(bytearray(data), dtype=dtype)
    if fortran:
        return flat.view(shape[::-1]).permute(tuple(reversed(range(len(shape))))).contiguous()
    return flat.view(shape)


def _join(parts: object, found: dict[str, Tensor]) -> Tensor:
    """An array that Paddle split, since pickles of protocols 2 and 3 hold no more than 4 GiB in one piece."""
    try:
        shape, slices = tuple(parts["OriginShape"]), [found.pop(key) for key in parts["slices"]]
        return torch.cat([piece.flatten() for piece in slices]).view(shape)
    except (TypeError, KeyError, RuntimeError):
        raise PickleFault("an array that was split into parts lacks some of them") from None
