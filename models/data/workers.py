"""Processes that make batches ahead of time. One that dies or hangs is named with its images, and replaced once.

All processes of torch's DataLoader share one queue, and a tensor is fetched from the process that made it. So one that
is killed may leave the queue locked, takes finished batches with it, and is told by an exception out of a signal
handler, wherever the program is: also in the middle of an optimiser's step. Here each process has a connection of its
own, and what it made comes as one piece of anonymous memory, which outlives it and needs one descriptor for a moment.
"""

import collections
import contextlib
import copy
import dataclasses
import itertools
import math
import multiprocessing.connection
import multiprocessing.reduction
import multiprocessing.util
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import MachineError

AHEAD = 2
"""Tasks that each process is given beyond what has been taken."""
HUNG_AFTER = 240.0
"""Seconds for one task, beyond which a process is taken for hung; a network file system may stall for minutes. Two such
times are less than the 600 that a process of a job may take for loading (`rank_timeout`), so that one that hangs is
replaced, and one that hangs again is named with its images, before the watchdog ends the job."""
FOR_THE_PARENT = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
"""Signals that a terminal or a scheduler sends to all processes of a job. The parent decides what they mean."""
ALIGNMENT = 64
"""Of each tensor in its piece of memory, bytes: what torch's own allocator gives."""


class Workers:
    """Calls `make` with tasks in other processes; these are started when they are first needed, and live on.

    Args:
        make: gives a dataclass of tensors and of what can be pickled, or anything that can be. It has to give the same
            whenever it is called with the same task: what a dead process had not finished is made again.
        count: how many processes.
        name: what a person is to read about a task, "images 12.jpg, 7.jpg".
    """

    def __init__(self, make: Callable[[Any], object], count: int, name: Callable[[Any], str]) -> None:
        self._make, self._count, self._name = make, count, name
        # Forked processes share the annotations' memory; from Python 3.14 on, forking has to be asked for.
        self._context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self._workers: list[_Worker] = []
        self._numbers = itertools.count()
        self._has_killed: set[int] = set()
        multiprocessing.util.Finalize(self, _stop_all, args=(self._workers,), exitpriority=1)

    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    def results(self, tasks: Iterable) -> Iterator:
        """What `make` gives for each task, in their order. An exception that it raises is raised here.

        Raises:
            MachineError: two processes died of the same task, or took longer than HUNG_AFTER for it.
        """
        while len(self._workers) < self._count:
            self._workers.append(self._start(len(self._workers)))
        left, waiting, done = iter(tasks), collections.deque(), {}
        while self._give(left, waiting):
            while waiting[0] not in done:
                for number, result in self._finished():
                    if number in waiting:  # else of an iteration that was left before its end
                        done[number] = result
            result = done.pop(waiting.popleft())
            self._give(left, waiting)
            if isinstance(result, _Raised):
                raise result.error from RuntimeError(f"in a process that reads images:\n{result.traceback}")
            yield result

    def _give(self, tasks: Iterator, waiting: collections.deque) -> bool:
        """Tasks for all who have few; false if there are none, and none that are waited for."""
        for task in itertools.islice(tasks, AHEAD * self._count - len(waiting)):
            worker = min(self._workers, key=lambda worker: len(worker.tasks))
            if not worker.tasks and not worker.process.is_alive():
                worker = self._replace(worker, None)
            waiting.append(next(self._numbers))
            worker.give(waiting[-1], task)
        return bool(waiting)

    def _finished(self) -> Iterator[tuple[int, object]]:
        """Waits for a process that has finished a task, or has died and is replaced."""
        busy = [worker for worker in self._workers if worker.tasks]
        handles = [handle for worker in busy for handle in (worker.connection, worker.process.sentinel)]
        patience = min(worker.since for worker in busy) + HUNG_AFTER - time.monotonic()
        ready = multiprocessing.connection.wait(handles, max(patience, 0))
        for worker in busy:
            if worker.connection in ready or worker.process.sentinel in ready:
                try:
                    result = worker.take()
                except (EOFError, OSError):
                    worker.process.join(1)
                    self._replace(worker, _ending(worker.process.exitcode))
                    continue
                number, _ = worker.tasks.popleft()
                worker.since = time.monotonic()
                yield number, result
            elif time.monotonic() - worker.since >= HUNG_AFTER:
                self._replace(worker, f"it took longer than {HUNG_AFTER:g} seconds")

    def _start(self, place: int) -> "_Worker":
        ours, theirs = self._context.Pipe()
        # A forked process that kept our end of a connection would keep the other end from being told of our death.
        inherited = [ours, *(worker.connection for worker in self._workers)]
        if self._context.get_start_method() != "fork":
            inherited = []
        arguments = (self._make, theirs, inherited, os.getpid(), place)
        process = self._context.Process(target=_work, args=arguments, daemon=True)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_PARENT)  # until the process ignores them
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        return _Worker(process, ours)

    def _replace(self, worker: "_Worker", ending: str | None) -> "_Worker":
        """A new process with the tasks of one that is of no use any more. ending: why; None: it had nothing to do."""
        worker.stop()
        if worker.tasks:
            number, task = worker.tasks[0]
            if number in self._has_killed:
                raise MachineError(
                    "a process that reads images was lost twice at the same images",
                    where=self._name(task),
                    why=ending,
                    fix="killed for its memory? fewer --workers need less. Else look at these images.\n"
                    "--resume goes on from the last checkpoint",
                )
            self._has_killed.add(number)
            print(f"a process that reads images is started again: {ending}, at {self._name(task)}", file=sys.stderr)
        place = self._workers.index(worker)
        self._workers[place] = self._start(place)
        for number, task in worker.tasks:
            self._workers[place].give(number, task)
        return self._workers[place]


class _Worker:
    def __init__(self, process: multiprocessing.Process, connection: multiprocessing.connection.Connection) -> None:
        self.process, self.connection = process, connection
        self.tasks: collections.deque[tuple[int, object]] = collections.deque()  # (number, task), the current one first
        self.since = 0.0  # when the current one began, or later

    def give(self, number: int, task: object) -> None:
        if not self.tasks:
            self.since = time.monotonic()
        self.tasks.append((number, task))
        with contextlib.suppress(OSError):  # it has died, which is noticed when its result is asked for
            self.connection.send(task)

    def take(self) -> object:
        """The next result. Raises EOFError or OSError if the process has died."""
        try:
            if not self.connection.poll():
                raise EOFError
            result, size = self.connection.recv()
            if size == 0:  # of tensors, if there are any, all are empty
                return _with_tensors(result, torch.empty(0, dtype=torch.uint8))
            if not self.connection.poll(max(self.since + HUNG_AFTER - time.monotonic(), 1.0)):
                raise EOFError
            return _with_tensors(result, _received_memory(self.connection, size))
        except BaseException:
            self.connection.close()  # what is left in it begins in the middle
            raise

    def stop(self) -> None:
        """At once: it has nothing to lose."""
        self.connection.close()
        self.process.kill()
        self.process.join(5)


def _stop_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.stop()


def _ending(exit_code: int | None) -> str:
    if exit_code is None:
        return "its connection broke"
    return f"killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"it ended with exit code {exit_code}"


# ---- in the process


class _Raised(NamedTuple):
    error: Exception
    traceback: str


def _work(make, connection, inherited, parent: int, place: int) -> None:
    """The life of a process: until its connection ends, or its parent."""
    for number in FOR_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FOR_THE_PARENT)
    for other in inherited:
        other.close()
    torch.set_num_threads(1)
    for seed in (torch.manual_seed, np.random.seed, random.seed):  # else all would have the parent's next numbers
        seed(place)
    with contextlib.suppress(EOFError, OSError):
        while True:
            while not connection.poll(5.0):
                if os.getppid() != parent:
                    return
            _answer(connection, make, connection.recv())


def _answer(connection, make, task) -> None:
    memory = None
    try:
        result, tensors, size = _without_tensors(make(task))
        if size > 0:
            memory = _written_memory(tensors)
    except Exception as error:
        result, size = _sendable(error), 0
    connection.send((result, size))
    if size > 0:
        with memory:
            multiprocessing.reduction.send_handle(connection, memory.fileno(), os.getppid())


def _sendable(error: Exception) -> _Raised:
    text = traceback.format_exc()
    try:
        copy.copy(error)  # as a pickle is read: an exception whose __init__ takes other arguments cannot be
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return _Raised(error, text)


# ---- tensors as one piece of memory


class _Place(NamedTuple):
    """Stands for a tensor."""

    start: int  # bytes
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _each(value, kind: type, change: Callable):
    """A dataclass, and those in it, with each entry of a kind changed."""
    if isinstance(value, kind):
        return change(value)
    if not dataclasses.is_dataclass(value):
        return value
    entries = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
    return dataclasses.replace(value, **{name: _each(entry, kind, change) for name, entry in entries.items()})


def _without_tensors(value) -> tuple[object, list[tuple[int, torch.Tensor]], int]:
    """(the value with places in it, the tensors' bytes in their order in memory with where each starts, size)."""
    tensors, size = [], 0

    def placed(tensor: torch.Tensor) -> _Place:
        nonlocal size
        # Channels last stays that: the order in memory decides which kernels run, and so the last digits of results.
        if not (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
            tensor = tensor.contiguous()
        start = size
        tensors.append((start, tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)))
        size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return _Place(start, tensor.dtype, tuple(tensor.shape), tensor.stride())

    return _each(value, torch.Tensor, placed), tensors, size


def _with_tensors(value, memory: torch.Tensor):
    def tensor(place: _Place) -> torch.Tensor:
        size = math.prod(place.shape) * place.dtype.itemsize
        return memory[place.start : place.start + size].view(place.dtype).as_strided(place.shape, place.stride)

    return _each(value, _Place, tensor)


def _written_memory(tensors: list[tuple[int, torch.Tensor]]):
    """An open file of the tensors' bytes, which has no name."""
    descriptor = os.memfd_create("batch") if sys.platform == "linux" else None
    file = tempfile.TemporaryFile() if descriptor is None else open(descriptor, "w+b")  # noqa: SIM115
    for start, content in tensors:
        file.seek(start)
        file.write(memoryview(content.numpy()))
    start, content = tensors[-1]
    file.truncate(-(-(start + content.nbytes) // ALIGNMENT) * ALIGNMENT)
    file.flush()
    return file


def _received_memory(connection, size: int) -> torch.Tensor:
    """uint8 [size]"""
    try:
        descriptor = multiprocessing.reduction.recv_handle(connection)
    except RuntimeError as error:  # "received 0 items of ancdata": there was no number free for it
        raise MachineError(
            "too many open files", why=str(error), fix="ulimit -n 4096 allows more; fewer --workers need less"
        ) from error
    try:
        # Not mmap.mmap, which keeps a descriptor for as long as the memory lives.
        return torch.from_file(f"/dev/fd/{descriptor}", shared=True, size=size, dtype=torch.uint8)
    finally:
        os.close(descriptor)
