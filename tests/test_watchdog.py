"""A rank that hangs ends its job: named, with its step, within the timeout and 5 s."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from models.processes import identity
from models.watchdog import BEAT, EXIT_CODE, Watchdog, _odd_ones

ROOT = Path(__file__).parent.parent
TRIALS = int(os.environ.get("CASCADEOPS_HANGS", "5"))


def test_a_hung_rank_is_named_and_the_job_ends():
    """Stopped, in a loop, with the interpreter's lock, or a sum left out; jobs of 2 to 4 ranks. Tensors of different
    shapes are no hang: gloo ends all ranks before the timeout. CASCADEOPS_HANGS=200 makes more trials."""
    command = [sys.executable, str(ROOT / "tests/hung_ranks.py"), "--trials", str(TRIALS)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60 + 5 * TRIALS)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    print(done.stdout)
    assert report["wrong"] == []
    assert sum(report["trials"].values()) == TRIALS and len(report["trials"]) == 5
    assert max(report["largest delay beyond the timeout"].values()) < 5


def alone(code: str, tmp_path: Path) -> tuple[int, str, float]:
    """Of a program with a watchdog, without a job and without torch: exit code, stderr, and when it ended, in seconds
    after the time that it printed."""
    program = tmp_path / "alone.py"
    program.write_text(f"import os, signal, sys, time\nfrom models.watchdog import Watchdog\n{code}")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr, time.monotonic() - float(done.stdout)


def test_a_single_process_names_step_stacks_and_its_workers(tmp_path):
    code = """
def a_worker_that_hangs():
    time.sleep(1000)

with Watchdog(0, 1, None, 1.0) as dog:
    if os.fork() == 0:
        a_worker_that_hangs()
    dog.note(7, "loading")
    print(time.monotonic(), flush=True)
    time.sleep(1000)
"""
    status, text, seconds = alone(code, tmp_path)
    assert status == EXIT_CODE
    assert re.search(r"culprit: rank 0 \(process \d+ on \S+\), step 7, loading, for \d s", text)
    assert "in <module>" in text and "in a_worker_that_hangs" in text
    assert "started by rank 0, is sleeping, and killed" in text
    assert 1.0 < seconds < 6.0


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_single_process_waits_for_nobody(phase, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    dog = Watchdog(0, 1, None, timeout=10.0)
    dog.note(3, phase)
    clock[0] = 9.0
    assert dog._fault() is None
    clock[0] = 11.0
    assert f"step 3, {phase}, for 11 s" in dog._fault()["text"]


def test_progress_and_long_phases_are_no_hangs(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    dog = Watchdog(0, 1, None, timeout=10.0)  # and notes that it is starting

    def fault_after(seconds: float) -> dict | None:
        clock[0] += seconds
        return dog._fault()

    assert fault_after(1000) is None
    dog.note(1, "first step")
    assert fault_after(1000) is None
    for step in range(1, 5):
        dog.note(step, "forward")
        assert fault_after(9) is None
    for phase in ("saving", "evaluating"):
        dog.note(4, phase)
        assert fault_after(1000) is None
    assert "step 4, evaluating" in fault_after(3000)["text"]


class Notes:
    """A store's interface, in one process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.values[key] for key in keys]

    def compare_set(self, key: str, _expected: str, value: str) -> None:
        self.values.setdefault(key, value.encode())


@pytest.fixture
def three_ranks(monkeypatch):
    """Watchdogs of one job, and what each would end for, found without waiting: the clock is ours."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    store = Notes()
    for rank in range(3):
        store.set(f"process/{rank}", json.dumps(identity()))
    dogs = [Watchdog(rank, 3, store, timeout=10.0) for rank in range(3)]
    for dog in dogs:
        dog._parent = os.getppid()

    def after(seconds: float, silent: tuple[int, ...] = ()) -> str | None:
        """What rank 0 would end for when `seconds` more have passed."""
        for _ in range(round(seconds / BEAT)):
            clock[0] += BEAT
            for rank, dog in enumerate(dogs):
                if rank not in silent:
                    dog._leaving.set()  # one exchange, then back
                    dog._exchange()
        found = dogs[0]._fault()
        return None if found is None else found["text"]

    return dogs, after


def test_ranks_may_wait_as_long_as_one_works_within_its_limit(three_ranks):
    dogs, after = three_ranks
    dogs[0].note(5, "all-reduce")
    dogs[1].note(5, "evaluating")
    dogs[2].note(5, "all-reduce")
    assert after(3000) is None
    assert "culprit: rank 1" in after(700)


def test_a_rank_without_a_sign_of_life_is_named_whatever_it_did(three_ranks):
    dogs, after = three_ranks
    for dog in dogs:
        dog.note(5, "all-reduce")
    assert after(1) is None
    assert after(9, silent=(2,)) is None
    text = after(3, silent=(2,))
    assert "culprit: rank 2" in text and "when last heard of" in text and "culprit: rank 1" not in text


def test_all_wait_at_one_place(three_ranks):
    dogs, after = three_ranks
    for dog in dogs:
        dog.note(5, "all-reduce")
    assert after(9) is None
    text = after(3)
    assert "culprit" not in text and "at the same place: the network, or tensors whose shapes differ" in text


def test_a_rank_stopped_before_its_watchdog_begins_is_named(three_ranks):
    _, after = three_ranks
    assert after(10, silent=(1,)) is None
    where = rf"culprit: rank 1 \(process {os.getpid()} on \S+\), step 0, starting, when last heard of 1[0-9] s ago"
    assert re.search(where, after(2, silent=(1,)))


def test_the_odd_one_out():
    def waits(*places):
        return {rank: ({"step": step, "what": what}, 0.0) for rank, (step, what) in enumerate(places)}

    assert list(_odd_ones(waits((5, "all-reduce"), (5, "all-reduce"), (5, "backward")))) == [2]
    assert list(_odd_ones(waits((6, "all-reduce"), (5, "all-reduce")))) == [0]  # ahead: it left something out
    assert list(_odd_ones(waits((6, "ended"), (6, "all-reduce")))) == [0]
    assert list(_odd_ones(waits((6, "all-reduce"), (6, "all-reduce")))) == []


def test_who_is_done_waits_for_the_others_but_not_after_an_error():
    store = Notes()
    for rank in range(2):
        store.set(f"process/{rank}", json.dumps(identity()))
    first, second = (Watchdog(rank, 2, store, timeout=100.0).__enter__() for rank in range(2))
    leaving = threading.Thread(target=first.__exit__, args=(None, None, None))
    leaving.start()
    leaving.join(1.0)
    assert leaving.is_alive()
    second.__exit__(ValueError, ValueError(), None)
    leaving.join(5.0)
    assert not leaving.is_alive()


def test_the_launchers_end_is_noticed(three_ranks, monkeypatch):
    dogs, after = three_ranks
    dogs[0].note(1, "forward")
    assert after(1) is None
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert re.search(r"the launcher \(process \d+\) has ended", after(1))


def test_a_store_that_is_gone_ends_the_job(three_ranks):
    dogs, after = three_ranks
    dogs[0].note(1, "starting")

    class Gone(Notes):
        def set(self, *_):
            raise RuntimeError("connection reset by peer")

    dogs[0]._store = Gone()
    assert after(2) is None  # it may be that the job is just ending
    assert "store has not answered for 4 s: connection reset by peer" in after(2)


def test_a_log_that_takes_no_more_does_not_keep_a_hung_process(tmp_path):
    """/dev/full is what a log is on a full disk, and a pipe without a reader fails in the same way."""
    program = tmp_path / "alone.py"
    program.write_text(
        "import time\nfrom models.watchdog import Watchdog\n"
        "with Watchdog(0, 1, None, 0.5) as dog:\n    dog.note(1, 'loading')\n    time.sleep(30)\n"
    )
    with open("/dev/full", "w") as full:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, str(program)], env=environment, stderr=full, timeout=60)
    assert done.returncode == EXIT_CODE


def test_a_child_that_ends_meanwhile_is_not_there(monkeypatch):
    from models import processes

    def ended(_self):
        raise ProcessLookupError

    monkeypatch.setattr(Path, "read_text", ended)
    assert list(processes.children()) == []
