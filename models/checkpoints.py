"""Checkpoints of a run: folders that are complete and intact, or that are not there.

    checkpoints/step-00001200/tensors.safetensors     every tensor, by name
                              manifest.json           format, step, SHA-256 of each tensor, facts that are no tensors
                              manifest.sha256         of the manifest; `sha256sum -c manifest.sha256` checks it

A folder is written under another name, brought to the disk and renamed, so a kill, a power cut or a full disk at any
moment leaves the earlier checkpoints and either this one or none. Reading runs nothing that the files hold, and accepts
no byte that was not written: one flipped bit is damage, and the next older checkpoint takes its place.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import DataError, MachineError, UsageError
from .files import atomic_folder, explained, make_folder, read_bytes, with_fresh_handles

FORMAT = "cascadeops-checkpoint-1"
TENSORS, MANIFEST, MANIFEST_SUM = "tensors.safetensors", "manifest.json", "manifest.sha256"


DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading a manifest raises that is not as it was written."""

GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EFBIG, errno.ELOOP, errno.EIO)
"""What the system says of a file that is not as it was written, or whose disk has lost it. Anything else may pass: a
network that is slow, too many open files."""

MAX_MANIFEST = 64 << 20
"""Bytes of a manifest; one of a large detector's training has half a megabyte."""


class Checkpoint(NamedTuple):
    step: int
    tensors: dict[str, Tensor]  # on the CPU, contiguous
    facts: dict  # what JSON holds


def write_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping) -> Path:
    """Writes the checkpoint of a step, which must have none yet, into `folder`, which is made if it is not there.

    Raises:
        MachineError: the system refused to write; the earlier checkpoints are as they were.
    """
    from safetensors.torch import save

    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    described = {name: _description(value) for name, value in tensors.items()}
    text = json.dumps({"format": FORMAT, "step": step, "tensors": described, "facts": facts}, allow_nan=False)
    path = folder / f"step-{step:08}"

    def write() -> None:
        make_folder(folder)
        with atomic_folder(path) as temporary:
            # Not save_file, which writes under a third name with calls that no test can make fail.
            (temporary / TENSORS).write_bytes(save(tensors))
            (temporary / MANIFEST).write_text(text, encoding="utf-8")
            (temporary / MANIFEST_SUM).write_text(_sum_line(text.encode()), encoding="utf-8")

    try:
        with_fresh_handles(write)
    except MachineError as error:
        what = "cannot write the checkpoint; the earlier ones are kept as they were"
        raise MachineError(what, error.where, error.why, error.fix) from error
    return path


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint of a folder, every byte of it verified.

    Raises:
        DataError: it is damaged, and where. UsageError: another version of CascadeOps wrote it.
        MachineError: the system does not let it be read, now.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        for name in (TENSORS, MANIFEST, MANIFEST_SUM):
            if (path / name).is_symlink():  # it would be read wherever it leads to
                raise _damaged(path, f"{name} is a link")
        text = read_bytes(path / MANIFEST, MAX_MANIFEST)
        if read_bytes(path / MANIFEST_SUM, MAX_MANIFEST) != _sum_line(text).encode():
            raise _damaged(path, f"{MANIFEST} and {MANIFEST_SUM} do not agree")
        manifest = json.loads(text)
        if manifest["format"] != FORMAT:
            why = f"its format is {manifest['format']!r}, and this version reads {FORMAT!r}"
            raise UsageError("the checkpoint is of another version of CascadeOps", where=path, why=why)
        tensors = load(read_bytes(path / TENSORS, _most_bytes(manifest["tensors"])))
        found = {name: _description(value) for name, value in tensors.items()}
        wrong = [name for name in {**manifest["tensors"], **found} if manifest["tensors"].get(name) != found.get(name)]
        if wrong:
            raise _damaged(
                path, f"{TENSORS}: {len(wrong)} of {len(found)} tensors are not as written, first {wrong[0]}"
            )
        return Checkpoint(int(manifest["step"]), tensors, dict(manifest["facts"]))
    except OSError as error:
        if error.errno not in GONE:
            raise MachineError("the checkpoint cannot be read", error.filename or path, error.strerror) from error
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    except (SafetensorError, *DAMAGE) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def newest_checkpoint(folder: Path, tell: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is intact; None where there is none at all.

    Damaged ones before it are set aside, as "damaged-step-...", and `tell` is told about each.

    Raises:
        DataError: there are checkpoints, and all are damaged.
    """
    damaged = []
    for path in reversed(checkpoint_folders(folder)):
        try:
            checkpoint = read_checkpoint(path)
        except DataError as error:
            aside = path.with_name(f"damaged-{path.name}")
            with explained(aside):
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(path, aside)
            damaged.append(path.name)
            tell(f"{path.name} is damaged and was set aside as {aside.name}: {error.why}")
            continue
        if damaged:
            tell(f"continuing from step {checkpoint.step}, the newest checkpoint that is intact")
        return checkpoint
    if damaged:
        why = f"damaged: {', '.join(damaged)}"
        raise DataError("no checkpoint is intact", where=folder, why=why, fix="start the run anew in another --output")
    return None


def prune(folder: Path, keep: int, best: int | None = None) -> None:
    """Removes all checkpoints but the last `keep` and the one of step `best`, and what kills have left."""

    def remove() -> None:
        for path in checkpoint_folders(folder)[:-keep]:
            if _step(path) != best:
                # Renamed first: a checkpoint half removed would look like a damaged one.
                os.rename(path, path.with_name(f".{path.name}.old"))
        for path in [*folder.glob(".step-*.old"), *folder.glob(".step-*.part")]:
            shutil.rmtree(path)

    with explained(folder):
        with_fresh_handles(remove)


def checkpoint_folders(folder: Path) -> list[Path]:
    """By step, oldest first; of whatever state."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _most_bytes(described: dict) -> int:
    """That the file of these tensors has: 8 a number, and a safetensors header."""
    shapes = [entry["shape"] for entry in described.values()]
    if not all(type(side) is int and 0 <= side < 2**48 for shape in shapes for side in shape):
        raise ValueError("a tensor has a shape that is not possible")
    return 8 * sum(map(math.prod, shapes)) + MAX_MANIFEST


def _description(value: Tensor) -> dict:
    content = value.reshape(-1).view(torch.uint8).numpy()
    dtype = str(value.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(value.shape), "sha256": hashlib.sha256(content).hexdigest()}


def _sum_line(text: bytes) -> str:
    """As sha256sum writes it."""
    return f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n"


def _damaged(path: Path, why: str) -> DataError:
    return DataError("the checkpoint is damaged", where=path, why=why)
