"""SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 ask a run to save itself and end; a second one ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_REQUEST = 3.0
"""Seconds within which another SIGTERM is the same request: Slurm sends it to every process of a job, and torchrun
hands it on to its processes."""


class Interrupted(KeyboardInterrupt):
    """The run ended because a signal asked for it. `exit_code` is 128 + the signal's number: 143, 130 or 138."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.exit_code = 128 + number


class StopSignals:
    """While its block runs, the first signal waits for the end of a step (after `after_step`), or raises Interrupted
    where the program is (after `at_once`, where there is nothing to lose). A second one always does.

    Only the main thread can be told of signals; in another, the block changes nothing.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._at_once = True
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def at_once(self) -> None:
        """From here on the first signal ends the program where it is, as one that came before does now."""
        self._at_once = True
        if self.asked is not None:
            raise Interrupted(self.asked, f"stopped by {signal.Signals(self.asked).name}")

    def after_step(self) -> None:
        """From here on the first signal is noted in `asked`, for the end of the step."""
        self._at_once = False

    def end(self, step: int) -> None:
        """Raises Interrupted, for a signal here or in another process of the job. To be called when `step` is saved."""
        self.asked = self.asked or signal.SIGTERM
        name = signal.Signals(self.asked).name
        raise Interrupted(self.asked, f"stopped by {name} after step {step}, which is saved: --resume goes on")

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker process: the one that it works for decides
            return
        name = signal.Signals(number).name
        if self.asked == number == signal.SIGTERM and time.monotonic() < self._asked_at + SAME_REQUEST:
            return
        if self._at_once or self.asked is not None:
            raise Interrupted(number, f"stopped by {name}")
        self.asked, self._asked_at = number, time.monotonic()
        # Not print(): the program may be in the middle of one. Who reads it may have ended: Ctrl-C in `... | tee log`.
        with contextlib.suppress(OSError):
            os.write(sys.__stderr__.fileno(), f"{name}: saving after this step; once more ends at once\n".encode())
