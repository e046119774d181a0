"""One run, one folder: who owns it is a lock of the operating system, which ends with its process however that ends."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from .errors import MachineError, UsageError
from .files import explained

_OWNED: set[str] = set()
"""Of this process: it would be given a lock that it has a second time."""


@contextlib.contextmanager
def owned_folder(folder: Path) -> Iterator[None]:
    """Owns `folder` until the block ends. The lock is not inherited by worker processes, and nothing is left to clean
    up after a kill. Between machines it holds where the file system's locks do (NFS and Lustre, unless mounted with
    local locks).

    Raises:
        UsageError: another run owns it; says which process on which machine.
        MachineError: the file system has no locks.
    """
    path = Path(os.path.realpath(folder)) / "owner.lock"
    if str(path) in _OWNED:
        raise _taken(folder, "this very process")
    with explained(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _taken(folder, os.read(descriptor, 500).decode(errors="replace") or "just starting") from None
            why = f"{error.strerror}: the file system cannot lock, so a second run could write into the folder"
            raise MachineError("the output folder cannot be locked", path, why, "an --output elsewhere") from error
        _OWNED.add(str(path))
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            yield
        finally:
            _OWNED.discard(str(path))
    finally:
        os.close(descriptor)


def _taken(folder: Path, owner: str) -> UsageError:
    return UsageError(
        "another run is writing into the output folder",
        where=folder,
        why=f"its owner: {owner}",
        fix=f"wait for it or stop it; --output {folder}-2 starts another run",
    )
