"""Writing files so that a full disk, a crash or a power cut leaves the old file or the new one, never half of one."""

import contextlib
import errno
import functools
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TypeVar

from .errors import MachineError, UsageError

Result = TypeVar("Result")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`; what was written there replaces `path` when the block ends well.

    The data reaches the disk (fsync) before the rename, and the rename before the return. If the block fails, `path`
    is as it was and the temporary file is gone. A symbolic link stays a link; the mode of an existing file is kept.

    Raises:
        MachineError: the system refused to write (disk full, quota, permission, read-only).
    """
    target = Path(os.path.realpath(path))
    with explained(target):
        new = functools.partial(tempfile.mkstemp, f".{target.name}.", ".part", target.parent)
        descriptor, name = with_fresh_handles(new)
        os.close(descriptor)
        temporary = Path(name)
        try:
            yield temporary
            os.chmod(temporary, _mode_for(target))
            sync(temporary)
            with_fresh_handles(lambda: os.replace(temporary, target))
            with_fresh_handles(lambda: sync(target.parent))
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """As `atomic_path`, for a folder of files: yields an empty one beside `path`, which must not be there yet.

    One process at a time may write it. A kill leaves a folder that is called like `path`, with a dot before
    it and ".part" behind.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.part")
    with explained(target):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for file in sorted(temporary.iterdir()):
                sync(file)
            sync(temporary)
            os.rename(temporary, target)
            with_fresh_handles(lambda: sync(target.parent))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Opens a file for writing ("wb", or "w" for UTF-8 text) that replaces `path` only once it is complete."""
    with atomic_path(path) as temporary, open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file


@contextlib.contextmanager
def explained(target: Path) -> Iterator[None]:
    """Turns the system's errors while `target` is written into a MachineError that says what happened."""
    try:
        yield
    except Exception as error:
        code = _system_error_code(error)
        if code is None:
            raise
        raise _write_error(target, code) from error


def with_fresh_handles(work: Callable[[], Result]) -> Result:
    """What `work` returns. It is called a second time, and so looks its files up anew, where a network file system has
    lost one that was looked up before (ESTALE: its server was restarted, or another machine has replaced the file)."""
    try:
        return work()
    except Exception as error:
        if _system_error_code(error) != errno.ESTALE:
            raise
    return work()


def read_bytes(path: str | os.PathLike, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        OSError: there is none, or it is larger, or a pipe, which would be waited for, or a device, which has no end.
    """

    def read() -> bytes:
        size = check_regular(path)
        if size > most:
            raise OSError(errno.EFBIG, f"it is too large: {size:,} bytes, at most {most:,}", os.fspath(path))
        with open(path, "rb") as file:
            return file.read(size)

    return with_fresh_handles(read)


def check_regular(path: str | os.PathLike) -> int:
    """Bytes of the file `path`; OSError unless it is a regular one, or a link to one."""
    facts = os.stat(path)
    kind = facts.st_mode
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(kind):
        raise OSError(errno.EINVAL, "it is a pipe, a device or a socket, not a file", os.fspath(path))
    return facts.st_size


def write_json(path: str | os.PathLike, value: object) -> None:
    """Writes `value` as JSON, atomically. NaN is refused: most readers of JSON refuse it too."""
    with atomic_write(path, "w") as file:
        if not isinstance(value, list):
            json.dump(value, file, allow_nan=False)
            return
        # json.dump encodes in Python; json.dumps in C, about twice as fast, but into one text. Results of a
        # data set are a list of a million entries: so in parts.
        file.write("[")
        for start in range(0, len(value), 1000):
            file.write(", " * (start > 0) + json.dumps(value[start : start + 1000], allow_nan=False)[1:-1])
        file.write("]")


def make_folder(path: str | os.PathLike, option: str = "--output") -> Path:
    """Makes `path` and its parents, if they are not there, and returns it. A power cut does not take them away again.

    Raises:
        UsageError: a part of the path is a file. MachineError: the system refused.
    """
    folder = Path(path)
    try:
        made = [part for part in folder.parents if not part.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for part in (folder, *made):
            with contextlib.suppress(PermissionError):  # one may write where one may not read, and so not sync
                sync(part.parent)
    except (FileExistsError, NotADirectoryError) as error:
        blocker = next((part for part in (folder, *folder.parents) if part.exists() and not part.is_dir()), folder)
        raise UsageError(
            "the output folder cannot be made, because a file is in its place",
            where=blocker,
            fix=f"name another folder ({option} {folder}-2) or move the file away",
        ) from error
    except OSError as error:
        raise _write_error(folder, error.errno) from error
    return folder


def _mode_for(target: Path) -> int:
    """mkstemp makes private files; the result gets the mode that open() would give, or that of the file it replaces."""
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def sync(path: Path) -> None:
    """Returns when what a file, or the names in a folder, hold has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _system_error_code(error: BaseException | None) -> int | None:
    """errno of the system's error behind `error`; None if there is none.

    Libraries wrap it: safetensors writes it into its text ("... (os error 28)"), torch.save raises its own error while
    the OSError of a Python file object is being handled, and keeps no number for a path: EIO stands for that.
    """
    while error is not None:
        if isinstance(error, OSError):
            return error.errno
        reported = re.search(r"\(os error (\d+)\)", str(error))
        if reported:
            return int(reported.group(1))
        if "iostream error" in str(error):
            return errno.EIO
        error = error.__cause__ or error.__context__
    return None


def _write_error(target: Path, code: int | None) -> MachineError:
    why = os.strerror(code) if code else "the system gave no reason"
    fix = f"check that you may write there: ls -ld {target.parent}"
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        folder = next((part for part in (target.parent, *target.parents) if os.path.isdir(part)), Path("/"))
        why += f" ({shutil.disk_usage(folder).free / 2**20:,.0f} MiB free in {folder})"
        fix = "free some space, or write somewhere else"
    if code in (errno.EMFILE, errno.ENFILE):
        fix = "ulimit -n 4096 allows more; fewer --workers need less"
    kept = "; the old file is kept as it was" if os.path.isfile(target) else ""
    return MachineError(f"cannot write the file{kept}", where=target, why=why, fix=fix)
