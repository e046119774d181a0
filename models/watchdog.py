"""Ends a job in which one process hangs or was stopped, and says which one, where, and why.

with Watchdog(rank, size, store, timeout) as watchdog:
    watchdog.note(step, "forward")   # as often as one likes: it only remembers the time

A thread of each process writes what was noted to the store of the job, once a second; a second thread judges, and never
waits for the network. Up to 16 processes, spread over the job, read the notes of all. A process may wait for others as
long as one of them works within its limit; if all of them wait, the one that waits elsewhere, or does not wait at all,
is to blame.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .processes import children, identity, kill_with_stacks, state_of

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

    from .distributed import World

EXIT_CODE = 75
"""Of a process that ends for a hang: EX_TEMPFAIL of sysexits.h, "try again"."""
WAITING = ("forward", "backward", "all-reduce", "waiting")
"""In which a process may wait for others: losses divide by sums over all ranks, gradients are reduced as they come."""
COMMUNICATION = ("/torch/distributed/", "/torch/nn/parallel/distributed.py")
"""Files that a process is in while it waits for others."""
LIMITS = {"starting": 1800.0, "first step": 1800.0, "saving": 1800.0, "evaluating": 3600.0}
"""Seconds that these may take at least, whatever the timeout: data are indexed, kernels chosen and compiled, a slow
disk is written to, average precision is computed by one process."""
BEAT = 1.0
"""Seconds between two notes at the store."""
WATCHERS = 16
SUSPENDED = 5.0
"""Seconds by which this process wakes late that are not held against anybody: it was suspended (Ctrl-Z, a laptop)."""
ENDED = "ended"


class Watchdog:
    """Watches while its block runs. A hang ends this process with EXIT_CODE, less than `timeout` + 5 s after it began.

    Args:
        rank, size: of this process, and how many there are.
        store: of the job, with the `identity` of every process under process/{rank}, by a connection of its own: on
            one that is shared, whoever waits for a key keeps it from us. None: a single process, which is watched all
            the same.
        timeout: seconds without progress that are a hang; what takes longer by nature has its limit in LIMITS.
    """

    def __init__(self, rank: int, size: int, store: Store | None, timeout: float) -> None:
        if timeout <= 0:
            raise ValueError(f"watchdog: timeout must be above 0 seconds, got {timeout}")
        self._rank, self._size, self._store, self._timeout = rank, size, store, timeout
        self._watcher = rank % -(-size // WATCHERS) == 0
        self._process = identity()
        self._lost = 0.0
        self._known: dict[int, tuple[dict, float]] = {}  # by rank: its last note, and when it came
        self._store_time = self._now()
        self._store_fault: str | None = None
        self._verdict: dict | None = None  # what the job ends for
        self._proposed: dict | None = None
        self._wake, self._leaving, self._left = threading.Event(), threading.Event(), threading.Event()
        self._waits_for_ends = False
        self.note(0, "starting")

    def note(self, step: int, what: str) -> None:
        """This process has got as far as `what` ("loading", "forward", "all-reduce", "saving" ...) of a step."""
        self._at = (step, what, self._now())
        self._thread = threading.get_ident()

    def __enter__(self) -> Watchdog:
        self._parent = os.getppid()
        # For a process whose threads cannot run any more, and for its workers, which inherit it. Needs no interpreter.
        faulthandler.register(signal.SIGUSR2, file=sys.__stderr__, all_threads=True)
        jobs = [self._judge] if self._store is None else [self._judge, self._exchange]
        self._threads = [threading.Thread(target=job, name="watchdog", daemon=True) for job in jobs]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        self.note(self._at[0], ENDED)
        # One that is stopped now would keep the launcher waiting, with nobody left to say so.
        self._waits_for_ends = kind is None and self._watcher and self._store is not None
        self._leaving.set()
        self._wake.set()
        judge, *exchange = self._threads
        for thread in exchange:
            thread.join(None if self._waits_for_ends else 2.0)  # after an error nobody is waited for
        self._left.set()
        judge.join(2.0)
        faulthandler.unregister(signal.SIGUSR2)

    def _now(self) -> float:
        return time.monotonic() - self._lost

    def _described(self) -> dict:
        step, what, since = self._at
        now = self._now()
        note = {"step": step, "what": what, "idle": max(0.0, now - since), "time": now} | self._process
        frame = sys._current_frames().get(self._thread)
        if frame is not None:
            code = frame.f_code
            note["in"] = f"{code.co_name} ({os.path.basename(code.co_filename)}:{frame.f_lineno})"
            note["communicates"] = what == "backward" or any(part in code.co_filename for part in COMMUNICATION)
        return note

    # ---- at the store

    def _exchange(self) -> None:
        ranks = [rank for rank in range(self._size) if rank != self._rank] if self._watcher else []
        without_note = set(ranks)
        while True:
            leaving = self._leaving.is_set()
            try:
                self._store.set(f"note/{self._rank}", json.dumps(self._described()))
                without_note = {rank for rank in without_note if not self._store.check([f"note/{rank}"])}
                keys = {rank: f"process/{rank}" if rank in without_note else f"note/{rank}" for rank in ranks}
                known = [rank for rank in ranks if rank not in without_note or self._store.check([keys[rank]])]
                for rank, note in zip(known, self._read([keys[rank] for rank in known]), strict=True):
                    if rank in without_note:  # stopped, perhaps, before its watchdog has begun
                        note |= {"step": 0, "what": "starting", "idle": 0.0}
                    if rank not in self._known or self._known[rank][0] != note:
                        self._known[rank] = (note, self._now())
                if self._proposed is not None:  # the first one is everybody's
                    self._store.compare_set("verdict", "", json.dumps(self._proposed))
                if self._store.check(["verdict"]):
                    (self._verdict,) = self._read(["verdict"])
                self._store_time = self._now()
            except RuntimeError as error:  # DistError: the store's process has ended; a connection is not made again
                self._store_fault = str(error).splitlines()[0]
                return
            if leaving and not (self._waits_for_ends and self._others_work()):
                return
            self._wake.wait(0.1 if leaving else BEAT)
            self._wake.clear()

    def _others_work(self) -> bool:
        return len(self._known) < self._size - 1 or any(note["what"] != ENDED for note, _ in self._known.values())

    def _read(self, keys: list[str]) -> list[dict]:
        return [json.loads(value) for value in self._store.multi_get(keys)] if keys else []

    # ---- judging

    def _judge(self) -> None:
        pause = min(0.25, self._timeout / 10)
        before = time.monotonic()
        while not self._left.wait(pause):
            now = time.monotonic()
            if now - before > SUSPENDED:
                self._lost += now - before
            before = now
            if self._verdict is not None:
                self._end(self._verdict)
            found = self._fault()
            if found is None:
                continue
            if self._store is None or self._store_fault is not None:
                self._end(found)
            self._proposed = found
            self._wake.set()
            deadline = time.monotonic() + 2 * BEAT
            while self._verdict is None and time.monotonic() < deadline:
                time.sleep(0.05)
            self._end(self._verdict or found)

    def _fault(self) -> dict | None:
        """What the job has to end for."""
        if self._store is not None and os.getppid() != self._parent:
            return self._report(f"the launcher (process {self._parent}) has ended", {}, {})
        ranks = {rank: (note, self._now() - time) for rank, (note, time) in self._known.copy().items()}
        ranks[self._rank] = (self._described(), 0.0)
        if self._store is not None:
            late = self._now() - self._store_time
            if late > (3 * BEAT if self._store_fault else self._timeout):
                stopped = {rank: found for rank, found in ranks.items() if "stopped" in (state_of(found[0]) or "")}
                text = f"the job's store has not answered for {late:.0f} s"
                text += f": {self._store_fault}" if self._store_fault else ""
                return self._report(text, stopped, ranks)
        culprits = {rank: found for rank, found in ranks.items() if self._is_over(*found)}
        if culprits:
            return self._report("the job hangs", culprits, ranks)
        if self._watcher and self._size > 1 and len(ranks) == self._size and self._all_wait(ranks):
            odd = _odd_ones(ranks)
            why = "" if odd else ", at the same place: the network, or tensors whose shapes differ between them"
            return self._report(f"the job hangs: all ranks wait for each other{why}", odd, ranks)
        return None

    def _is_over(self, note: dict, silence: float) -> bool:
        if note["what"] == ENDED:
            return False
        silent = silence > max(self._timeout, 4 * BEAT)  # on a busy machine a beat or two may be late
        waits = note["what"] in WAITING and self._size > 1
        return silent or (not waits and note["idle"] + silence > self._limit(note["what"]))

    def _all_wait(self, ranks: dict) -> bool:
        """For too long, and all of them alive: one that is not will be found by its silence."""
        waits = [note["idle"] + silence for note, silence in ranks.values() if note["what"] in WAITING]
        calm = all(
            note["what"] == ENDED or (note["what"] in WAITING and silence < 3 * BEAT)
            for note, silence in ranks.values()
        )
        return calm and bool(waits) and min(waits) > self._timeout

    def _limit(self, what: str) -> float:
        return max(self._timeout, LIMITS.get(what, 0.0))

    def _report(self, text: str, culprits: dict, ranks: dict) -> dict:
        """As it goes through the store. `culprits`, `ranks`: (last note, seconds since it came) by rank."""
        lines = [text] + [f"  culprit: {_where(rank, *found)}" for rank, found in culprits.items()]
        waiting = [
            note["step"] for rank, (note, _) in ranks.items() if rank not in culprits and note["what"] in WAITING
        ]
        if culprits and waiting:
            lines.append(f"  at:      step {min(waiting)}, where the others wait")
        others = [(rank, found) for rank, found in sorted(ranks.items()) if rank not in culprits]
        lines += [f"  other:   {_where(rank, *found)}" for rank, found in others[:WATCHERS]]
        lines.append(f"  timeout: {self._timeout:g} s; --resume goes on from the last checkpoint")
        return {
            "text": "\n".join(lines),
            "by": self._rank,
            "culprits": {
                str(rank): note | {"silent": silence > 2 * BEAT} for rank, (note, silence) in culprits.items()
            },
        }

    # ---- the end

    def _end(self, verdict: dict) -> None:
        try:
            self._tell_and_kill(verdict)
        finally:
            os._exit(EXIT_CODE)

    def _tell_and_kill(self, verdict: dict) -> None:
        mine = verdict["by"] == self._rank
        text = verdict["text"] if mine else verdict["text"].splitlines()[0]
        name = f"rank {self._rank} (process {self._process['pid']} on {self._process['host']})"
        _say(f"{text}\n{name} ends; the stacks of its threads:\n")
        with contextlib.suppress(OSError):
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        if self._size > 1:
            # The others have to read the verdict before this process, with the store perhaps, or the culprit is gone.
            time.sleep(1.2 * BEAT)
        for child in children():
            _say(f"process {child['pid']}, started by rank {self._rank}, is {state_of(child)}, and killed:\n")
            kill_with_stacks(child)
        for rank, note in verdict["culprits"].items():
            # One that is alive ends itself; one that is not would be waited for by the launcher, for 30 s.
            state = state_of(note)
            if int(rank) != self._rank and state not in (None, "dead") and (note["silent"] or "stopped" in state):
                _say(f"rank {rank} (process {note['pid']}) is {state}, and killed:\n")
                kill_with_stacks(note)


@contextlib.contextmanager
def watched(world: World, device: torch.device, timeout: float) -> Iterator[Watchdog]:
    """While the block runs, the processes of the job can speak to each other (`distributed.joined`) and are watched."""
    from .distributed import joined, meet

    store, own_store = meet(world)
    # Who waits too long is for the watchdog to say, which knows for what; a collective's own timeout comes later.
    last = max(LIMITS.values()) + timeout
    with Watchdog(world.rank, world.size, own_store, timeout) as watchdog, joined(world, device, store, last):
        yield watchdog


def _odd_ones(ranks: dict[int, tuple[dict, float]]) -> dict[int, tuple[dict, float]]:
    """Those that do not wait, or at another place than most; of two halves those ahead, which left something out."""
    busy = [rank for rank, (note, _) in ranks.items() if note["what"] != ENDED and not note.get("communicates", True)]
    if 0 < len(busy) < len(ranks):
        return {rank: ranks[rank] for rank in busy}
    places: dict[tuple, list[int]] = {}
    for rank, (note, _) in ranks.items():
        places.setdefault((note["what"] == ENDED, note["step"], note["what"]), []).append(rank)
    usual = max(places, key=lambda place: (len(places[place]), not place[0], -place[1]))
    return {rank: ranks[rank] for place, members in places.items() if place != usual for rank in members}


def _where(rank: int, note: dict, silence: float) -> str:
    text = f"rank {rank} (process {note['pid']} on {note['host']}), step {note['step']}, {note['what']}"
    if silence > 2 * BEAT:
        text += f", when last heard of {silence:.0f} s ago"
    else:
        text += f", for {note['idle'] + silence:.0f} s, in {note.get('in', 'no code of Python')}"
    state = state_of(note)
    return text if state is None else f"{text}: {state}"


def _say(text: str) -> None:
    """Not print(): the main thread may hang in the middle of one, and holds its lock. A full disk behind a log, or a
    reader that has ended, must not keep the job from ending."""
    with contextlib.suppress(OSError):
        os.write(sys.__stderr__.fileno(), text.encode())
