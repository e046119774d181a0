"""The results of an evaluation as far as it has come, so that one that was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from .files import explained


class PartialResults:
    """A file with a line for each batch, behind a first one that says what is evaluated.

    A file of another evaluation is begun anew; lines that a kill or a power cut has damaged are computed again.

    Args:
        path: None: nothing is kept.
        subject: all that the results depend on, as JSON holds it.
    """

    def __init__(self, path: Path | None, subject: Mapping) -> None:
        self.batches: list[dict] = []  # of each batch that is done {"image_ids": [...], "entries": {...}}
        self._path = path
        if path is None:
            return
        first = json.dumps(subject) + "\n"
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
        if lines[:1] == [first]:
            for line in lines[1:]:
                batch = _batch(line)
                if batch is None:
                    break
                self.batches.append(batch)
        with explained(path):
            self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (kept open for the whole evaluation)
            self._file.writelines([first, *lines[1 : 1 + len(self.batches)]])
            self._file.flush()

    def add(self, image_ids: list[int], entries: Mapping[str, list[dict]]) -> None:
        if self._path is not None:
            text = json.dumps({"image_ids": image_ids, "entries": entries})
            with explained(self._path):
                self._file.write(f"{hashlib.sha256(text.encode()).hexdigest()} {text}\n")
                self._file.flush()

    def remove(self) -> None:
        """The evaluation is complete."""
        if self._path is not None:
            self._file.close()
            self._path.unlink()


def _batch(line: str) -> dict | None:
    digest, _, text = line.rstrip("\n").partition(" ")
    if not line.endswith("\n") or digest != hashlib.sha256(text.encode()).hexdigest():
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and {"image_ids", "entries"} <= values.keys() else None


def fingerprint(module: torch.nn.Module) -> str:
    """A hash of all its parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
