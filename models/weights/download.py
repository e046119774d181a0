"""Fetches a published file into the cache: what is there already is kept, what arrives is checked."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO

from ..errors import DataError, MachineError
from ..files import explained, make_folder
from ..progress import Progress
from .published import Published

CHUNK = 1 << 18
SECONDS_WITHOUT_DATA = 30.0
ATTEMPTS = 3
NETWORK_FAULTS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


def cache_folder() -> Path:
    """CASCADEOPS_CACHE; else cascadeops/ in XDG_CACHE_HOME; else in ~/.cache."""
    own = os.environ.get("CASCADEOPS_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cascadeops"


def cached(file: Published, folder: Path | None = None) -> Path | None:
    """Where the file is, if it was fetched or put there."""
    path = (folder or cache_folder()) / file.file_name
    return path if path.is_file() else None


def fetch(file: Published, folder: Path | None = None, wait: float = 1.0) -> Path:
    """Downloads `file`, unless it is there, and returns where it is.

    A broken download stays beside it as NAME.part and goes on from there, at once and at the next call. The file
    appears under its name only when it is whole and its SHA-256 begins as published.

    Args:
        folder: default `cache_folder()`.
        wait: seconds before the second attempt; doubles.

    Raises:
        MachineError: no network, or CASCADEOPS_OFFLINE=1: says where to put the file. The disk is full.
        DataError: what arrived is another file.
    """
    folder = make_folder(folder or cache_folder(), "--folder")
    path = folder / file.file_name
    if path.is_file():
        _check(path, file)
        return path
    if os.environ.get("CASCADEOPS_OFFLINE", "") not in ("", "0"):
        raise _no_network(file, path, "CASCADEOPS_OFFLINE is set")
    part = folder / f"{file.file_name}.part"
    with explained(part):
        stream = open(part, "ab")  # noqa: SIM115 (closed by the with below)
    with stream:
        _lock(stream, part)
        for attempt in range(ATTEMPTS):
            try:
                _receive(file, stream, part)
                break
            except NETWORK_FAULTS as error:
                refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
                if refused or attempt == ATTEMPTS - 1:
                    kept = part.stat().st_size
                    if not kept:
                        part.unlink()
                    raise _no_network(file, path, _reason(error), kept) from None
                time.sleep(wait * 2**attempt)
        with explained(path):
            stream.flush()
            os.fsync(stream.fileno())
        _check(part, file)
        with explained(path):
            os.replace(part, path)
    return path


def _receive(file: Published, stream: BinaryIO, part: Path) -> None:
    """Appends to the part what it lacks."""
    start = os.fstat(stream.fileno()).st_size
    headers = {"User-Agent": "cascadeops"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(file.url, headers=headers), timeout=SECONDS_WITHOUT_DATA
        )
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing is left to send: whole, or not the right one, which the hash tells
            return
        raise
    with response:
        sent = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        if response.status != 206 or sent is None or int(sent[1]) != start:
            stream.truncate(0)  # the server sends all of it, or another piece than was asked for
            if response.status == 206:
                raise ConnectionError("the server sent another part of the file than it was asked for")
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length and length.isdigit() else None
        received = start
        with Progress(file.name, _mebibytes(total or 0), "MiB", done=_mebibytes(start)) as progress:
            while chunk := response.read(CHUNK):
                with explained(part):
                    stream.write(chunk)
                    stream.flush()
                steps = _mebibytes(received + len(chunk)) - _mebibytes(received)
                received += len(chunk)
                if steps:
                    progress.advance(steps)
    if total is not None and received != total:
        raise ConnectionError(f"the connection ended after {received} of {total} bytes")


def _mebibytes(size: int) -> int:
    return size >> 20


def _lock(stream: BinaryIO, part: Path) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise MachineError("another process downloads this file", where=part, fix="wait for it") from None
        # a file system without locks


def _check(path: Path, file: Published) -> None:
    """Removes what is not the published file."""
    with open(path, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if not found.startswith(file.sha256_prefix):
        path.unlink()
        raise DataError(
            "this is not the file that was published; it is removed",
            where=path,
            why=f"its SHA-256 begins with {found[:8]}, the published one's with {file.sha256_prefix}",
            fix=f"python -m models.weights {file.name}   fetches it again",
        )


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} {error.reason}"
    return str(getattr(error, "reason", error)) or type(error).__name__


def _no_network(file: Published, path: Path, why: str, kept: int = 0) -> MachineError:
    fix = f"fetch it elsewhere and put it where it belongs:\n{file.url}\n-> {path}"
    if kept:
        fix = f"python -m models.weights {file.name}   goes on from byte {kept}; or " + fix
    return MachineError(f"{file.file_name} cannot be downloaded", where=file.url, why=why, fix=fix)
