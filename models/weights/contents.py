"""What a weights file of any kind holds: tensors by the file's own names. Nothing from the file is run."""

from __future__ import annotations

import os
import zipfile
from typing import NamedTuple

from torch import Tensor

from ..errors import DataError, MachineError
from .paddle import read_paddle_file
from .pickles import PickleFault
from .torch_files import LEGACY_MAGIC_BYTES, read_torch_file


class Contents(NamedTuple):
    where: str
    """File name, for messages."""
    state: dict[str, Tensor]
    left_out: dict[str, str]
    """{name in the file: why it is no weight}"""
    class_names: list[str] | None = None
    """As the file has them."""
    metadata: dict[str, str] | None = None
    """Header of a safetensors file."""


def read_contents(path: str | os.PathLike) -> Contents:
    """Reads safetensors, .pth (both formats of torch.save) or .pdparams, told apart by their first bytes.

    Args:
        path: a file, or the name of a published one that is in the cache (`python -m models.weights`).

    Raises:
        DataError: no such file, damaged, or of another kind.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        path = _fetched(path)
    try:
        with open(path, "rb") as file:
            start = file.read(32)
    except OSError as error:
        raise MachineError("the weights file cannot be opened", where=path, why=error.strerror) from error
    # A safetensors file begins with the length of its header, any byte of which may look like the start of a pickle.
    header_fits = int.from_bytes(start[:8], "little") + 8 <= os.path.getsize(path)
    try:
        if start[8:9] == b"{" and header_fits:
            return _from_safetensors(path)
        if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and LEGACY_MAGIC_BYTES in start):
            return _from_torch(path)
        if start[:1] == b"\x80":
            state, left_out = read_paddle_file(path)
            return Contents(path, state, left_out)
    except PickleFault as fault:
        raise DataError(
            "this weights file holds more than weights, or is damaged",
            where=path,
            why=str(fault),
            fix="copy or download the file again",
        ) from None
    raise DataError(
        "this is not a weights file that can be read",
        where=path,
        why=f"neither safetensors nor .pth nor .pdparams: it starts with {start[:16]!r}" if start else "it is empty",
        fix="copy the file again, or name another one",
    )


def _fetched(name: str) -> str:
    """Where a published file of this name was fetched to; nothing is fetched now."""
    from .download import cached
    from .published import PUBLISHED

    for file in PUBLISHED:
        if name in (file.name, file.file_name):
            path = cached(file)
            if path is None:
                fix = f"python -m models.weights {file.name}   fetches it (licence: {file.licence})"
                raise DataError("this published weights file has not been fetched", where=name, fix=fix)
            return os.fspath(path)
    fix = "train some: python -m models.train --arch scnet; or fetch published ones: python -m models.weights"
    raise DataError("no such weights file", where=name, fix=fix)


def _from_torch(path: str) -> Contents:
    try:
        content, to_tensor = read_torch_file(path)
        left_out: dict[str, str] = {}
        meta = content.get("meta") if isinstance(content, dict) else None
        for key in ("state_dict", "model"):
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                left_out |= {str(name): "a part of the training state" for name in content if name != key}
                content = content[key]
        if not isinstance(content, dict):
            raise PickleFault("it holds no state dict: expected tensors by name")
        state = {}
        for name, record in content.items():
            tensor = to_tensor(record)
            if tensor is None:
                left_out[str(name)] = "it is no tensor"
            else:
                state[str(name)] = tensor
    except PickleFault:
        raise
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError, EOFError, KeyError) as error:
        # zipfile's and torch's own words for a wrong checksum, an offset beyond the end and so on
        raise PickleFault(f"it is damaged: {error}") from None
    if not state:
        raise PickleFault("it holds no tensors by name")
    return Contents(path, state, left_out, _class_names(meta))


def _class_names(meta: object) -> list[str] | None:
    """mmdetection's notes: meta["CLASSES"] (1.x, 2.x) or meta["dataset_meta"]["classes"] (3.x)."""
    if not isinstance(meta, dict):
        return None
    nested = meta.get("dataset_meta")
    for notes in (meta, nested if isinstance(nested, dict) else {}):
        for key in ("CLASSES", "classes"):
            names = notes.get(key)
            if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
                return list(names)
    return None


def _from_safetensors(path: str) -> Contents:
    import safetensors

    try:
        with safetensors.safe_open(path, "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return Contents(path, state, {}, None, file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise DataError(
            "this is not a weights file that can be read",
            where=path,
            why=f"neither safetensors nor a torch archive ({error})",
            fix="copy the file again, or name another one",
        ) from error
