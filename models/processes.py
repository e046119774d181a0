"""Processes of this machine, by /proc: what state they are in, whether they are still the same, their end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

STATES = {"T": "stopped (SIGSTOP)", "t": "stopped by a debugger", "D": "disk sleep", "R": "running", "S": "sleeping"}
ANSWER_TIME = 0.2
"""Seconds that a process is given to print its stacks."""


def identity() -> dict[str, object]:
    """Of this process, for others to know it by: a number and a host name alone may come back, or be a container's."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        machine = ""
    started = "".join(_fields(os.getpid())[19:20])
    return {"pid": os.getpid(), "started": started, "host": socket.gethostname(), "machine": machine}


def state_of(process: dict[str, object]) -> str | None:
    """ "running", "stopped (SIGSTOP)" ...; "dead" where it has ended; None where it is of another machine."""
    here = identity()
    if not here["machine"] or any(process[key] != here[key] for key in ("host", "machine")):
        return None
    fields = _fields(process["pid"])
    if not fields or fields[0] in "ZX" or fields[19] != process["started"]:
        return "dead"
    return STATES.get(fields[0], fields[0])


def children() -> list[dict[str, object]]:
    """The identities of the processes that this one has started, such as a loader's workers."""
    here, found = identity(), []
    for tasks in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            for number in map(int, tasks.read_text().split()):
                found.append(here | {"pid": number, "started": "".join(_fields(number)[19:20])})
    return found


def kill_with_stacks(process: dict[str, object]) -> None:
    """SIGUSR2, at which a process under `faulthandler.register` prints the stacks of its threads, then SIGKILL. One
    that is stopped prints nothing. Only for processes of this machine."""
    for number, pause in ((signal.SIGUSR2, ANSWER_TIME), (signal.SIGKILL, 0.0)):
        state = state_of(process)
        if state in (None, "dead"):
            return
        if number == signal.SIGKILL or "stopped" not in state:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process["pid"], number)
            time.sleep(pause)


def _fields(process: int) -> list[str]:
    """Of /proc/PID/stat from the third, the state, on; empty where there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
