"""Jobs of several ranks that start at no cost: ranks and launcher are forked from a process that has imported torch.

The launcher does for its ranks what torchrun does: it tells them their place, serves their store, hands SIGTERM on, and
ends all when one ends with an error. Real ones are in test_torchrun.py.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tiny_runs import black_picture
from torch.distributed import TCPStore

from models import distributed, progress, training
from models.command_line import _machine_fault, tell
from models.errors import UserError

PR_SET_CHILD_SUBREAPER = 36


def prepare_process() -> None:
    """Of the process that jobs are forked from. Orphans of a launcher become its children, so that it sees their end;
    what is of no interest and costs more than the rest of a run is left out."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    training.save_comparison = black_picture
    progress.importlib.util.find_spec = lambda name: None
    distributed.MEETING = 5.0  # of a rank that is stopped before the watchdog runs


def start_job(config, ranks: int, log: Path, prepare: Callable[[int], None] = lambda rank: None) -> int:
    """The launcher's process id. It ends as the first rank with an error does; "log.0" and so on get what ranks print.

    Args:
        prepare: called in each rank before it begins.
    """
    launcher = os.fork()
    if launcher:
        return launcher
    # Kept, so that nobody else is given its port before the store serves it.
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    members: dict[int, int] = {}

    def begin(rank: int) -> None:
        listening.close()  # with the launcher its store is gone
        prepare(rank)

    def hand_on(number, _frame) -> None:
        for process in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
        process = _start_rank(config, place if ranks > 1 else {}, Path(f"{log}.{rank}"), lambda r=rank: begin(r))
        members[process] = rank
    signal.signal(signal.SIGTERM, hand_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    # After all forks: its threads may hold locks that a child would find held for ever.
    store = TCPStore(  # noqa: F841 (as long as the launcher)
        "127.0.0.1", port, None, True, wait_for_workers=False, master_listen_fd=listening.detach()
    )
    first, codes, asked = 0, {}, None
    while members:
        process, status = os.waitpid(-1, os.WNOHANG if asked else 0)
        if not process:
            if time.monotonic() - asked > 10:  # a rank may wait for one that is gone
                hand_on(signal.SIGKILL, None)
            time.sleep(0.01)
            continue
        codes[members.pop(process)] = code = os.waitstatus_to_exitcode(status)
        if code and not first:
            first, asked = code, time.monotonic()
            hand_on(signal.SIGTERM, None)
    Path(f"{log}.codes").write_text(json.dumps(codes))
    os._exit(first % 256)


def _start_rank(config, place: dict, log: Path, prepare: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ |= {name: str(value) for name, value in place.items()}
        prepare()
        resume = (config.output / "config.json").exists()
        training.train(dataclasses.replace(config, resume=resume))
        code = 0
    except KeyboardInterrupt as stop:
        print(stop)
        code = getattr(stop, "exit_code", 130)
    except Exception as error:  # as `models.command_line.run` would end it
        fault = error if isinstance(error, UserError) else _machine_fault(error)
        if fault is None:
            traceback.print_exc()
        else:
            code = tell(fault)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def children_of(process: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(key) for key in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return []


def descendants(process: int) -> list[int]:
    return [each for child in children_of(process) for each in (child, *descendants(child))]


def end_of_job(launcher: int, timeout: float = 60.0) -> int:
    """The launcher's exit code, when it and every rank, orphans too, have ended. TimeoutError if they do not: then they
    are killed."""
    deadline, code = time.monotonic() + timeout, None
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if process == launcher:
            code = os.waitstatus_to_exitcode(status)
        if not process:
            if time.monotonic() > deadline:
                left = descendants(os.getpid())
                for each in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(each, signal.SIGKILL)
                raise TimeoutError(f"job {launcher} did not end: {left}")
            time.sleep(0.01)
