"""The first signal asks a run to save itself, a second one ends it at once; one request may come as several signals."""

import os
import signal

import pytest

from models import interrupts
from models.interrupts import Interrupted, StopSignals


@pytest.fixture
def clock(monkeypatch):
    """The seconds that signals are timed by; clock[0] is now."""
    now = [100.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: now[0])
    return now


def answer_to(number: int) -> tuple[str, int] | None:
    """(text, exit code) of what a signal raises. Caught here: pytest itself ends for a KeyboardInterrupt."""
    try:
        os.kill(os.getpid(), number)
    except Interrupted as end:
        return str(end), end.exit_code
    return None


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        (signal.SIGINT, signal.SIGINT, 130),
        (signal.SIGUSR1, signal.SIGUSR1, 138),
        (signal.SIGTERM, signal.SIGINT, 130),
        (signal.SIGINT, signal.SIGTERM, 143),
    ],
)
def test_a_second_signal_ends_at_once(clock, capfd, first, second, code):
    with StopSignals() as stop:
        stop.after_step()
        assert answer_to(first) is None and stop.asked == first
        assert "saving after this step; once more ends at once" in capfd.readouterr().err
        assert answer_to(second) == (f"stopped by {second.name}", code)


def test_sigterm_again_within_three_seconds_is_the_same_request(clock, capfd):
    """Slurm sends it to every process, and torchrun hands it on to the same ones."""
    with StopSignals() as stop:
        stop.after_step()
        assert answer_to(signal.SIGTERM) is None
        for clock[0] in (100.0, 101.0, 102.9):
            assert answer_to(signal.SIGTERM) is None
        assert capfd.readouterr().err.count("saving after this step") == 1
        clock[0] = 103.1
        assert answer_to(signal.SIGTERM) == ("stopped by SIGTERM", 143)


def test_a_signal_that_came_before_ends_what_has_nothing_to_lose(clock):
    with StopSignals() as stop:
        stop.after_step()
        assert answer_to(signal.SIGTERM) is None
        with pytest.raises(Interrupted, match=r"^stopped by SIGTERM$") as end:
            stop.at_once()
        assert end.value.exit_code == 143


def test_a_worker_process_leaves_the_decision_to_its_run(clock):
    with StopSignals() as stop:
        stop.after_step()
        worker = os.fork()
        if not worker:
            answers = [answer_to(signal.SIGINT) for _ in range(2)]
            os._exit(7 if answers == [None, None] and stop.asked is None else 8)
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 7
        assert stop.asked is None


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in interrupts.SIGNALS]
    with StopSignals():
        assert [signal.getsignal(number) for number in interrupts.SIGNALS] != before
    assert [signal.getsignal(number) for number in interrupts.SIGNALS] == before


def test_nobody_who_reads_what_it_says_is_no_reason_not_to_save(monkeypatch):
    """Ctrl-C in `python -m models.train 2>&1 | tee log` ends tee, too."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed, StopSignals() as stop:
        monkeypatch.setattr(interrupts.sys, "__stderr__", closed)
        stop.after_step()
        assert answer_to(signal.SIGINT) is None and stop.asked == signal.SIGINT
