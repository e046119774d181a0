"""The processes that read images: what they make arrives whole, whatever happens to them."""

import dataclasses
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from tiny_runs import differences, outcome, tiny_config

from models import training
from models.data import loader, workers
from models.data.workers import Workers
from models.errors import DataError, MachineError
from models.recipes import TrainConfig

KILLS = int(os.environ.get("CASCADEOPS_WORKER_KILLS", "40"))
ROOT = Path(__file__).parent.parent


@dataclasses.dataclass
class Inner:
    flags: torch.Tensor
    words: tuple[str, ...]


@dataclasses.dataclass
class Made:
    task: int
    image: torch.Tensor
    empty: torch.Tensor
    inner: Inner
    nothing: None = None


def make(task: int) -> Made:
    shape = (1 + task % 3, 3, 16 + task % 50, 40)
    image = torch.rand(shape, generator=torch.Generator().manual_seed(task))
    if task % 2:
        image = image.contiguous(memory_format=torch.channels_last)
    return Made(task, image, torch.zeros(2, 0), Inner(torch.arange(task % 7) > 2, (f"ü{task}",)))


def names(task: int) -> str:
    return f"images {task}.png"


def assert_same(ours: Made, theirs: Made) -> None:
    assert ours.task == theirs.task and ours.inner.words == theirs.inner.words and ours.nothing is None
    for one, other in (
        (ours.image, theirs.image),
        (ours.empty, theirs.empty),
        (ours.inner.flags, theirs.inner.flags),
    ):
        assert one.dtype == other.dtype and one.stride() == other.stride() and torch.equal(one, other)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_results_come_in_order_with_their_layout_and_can_be_changed():
    pool = Workers(make, 3, names)
    for number, made in enumerate(pool.results(range(40))):
        assert_same(made, make(number))
        made.image += 1
    assert number == 39
    assert list(pool.results([])) == []


@dataclasses.dataclass
class Pair:
    first: object
    second: object = None


def same(one: object, other: object) -> bool:
    if isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    return one == other


def test_what_holds_no_bytes_arrives_as_it_was():
    made = [
        Pair(torch.zeros(2, 0), torch.zeros(0, dtype=torch.int64)),
        Pair(torch.zeros(0, 4, dtype=torch.bool)),
        torch.zeros(0, 3),
        Pair("no tensor", Pair(7)),
        "nothing",
    ]
    for found, expected in zip(Workers(made.__getitem__, 1, names).results(range(5)), made, strict=True):
        assert type(found) is type(expected)
        if isinstance(expected, Pair):
            assert same(found.first, expected.first) and same(found.second, expected.second)
        else:
            assert same(found, expected)


def test_a_process_that_hangs_twice_is_named_before_the_watchdog_ends_the_job():
    assert TrainConfig.rank_timeout > 2 * workers.HUNG_AFTER + 60


def test_a_process_that_stops_with_half_a_result_has_no_time_of_its_own(monkeypatch):
    """Between the two messages of a result; the limit is that of the whole task."""
    monkeypatch.setattr(workers, "HUNG_AFTER", 2.0)
    ours, theirs = multiprocessing.Pipe()
    worker = workers._Worker(None, ours)
    worker.give(0, "task")
    time.sleep(1.5)
    theirs.send((make(1), 64))
    start = time.monotonic()
    with pytest.raises(EOFError):
        worker.take()
    assert time.monotonic() - start < 1.5


def test_an_iteration_that_was_left_does_not_show_in_the_next():
    pool = Workers(make, 2, names)
    for _ in range(5):
        iterator = pool.results(range(100, 120))
        assert [next(iterator).task for _ in range(3)] == [100, 101, 102]
        assert [made.task for made in pool.results(range(6))] == list(range(6))


def test_its_memory_and_descriptors_are_given_back():
    before = descriptors()
    pool = Workers(make, 2, names)
    kept = list(pool.results(range(50)))
    assert descriptors() <= before + 2 * 3  # of the processes, none of the batches
    del pool
    assert descriptors() == before
    assert_same(kept[7], make(7))


def test_random_kills_lose_nothing(capfd):
    """By a thread beside the iteration; CASCADEOPS_WORKER_KILLS=2000 is the long form."""
    pool, choose, kills, done = Workers(make, 3, names), random.Random(0), 0, 0

    def kill() -> None:
        nonlocal kills
        after = 3
        while kills < KILLS:
            time.sleep(choose.random() * 0.005)
            if done < after:
                continue
            victim = choose.choice(pool.pids())
            os.kill(victim, signal.SIGKILL)
            kills += 1
            while victim in pool.pids():  # on a busy machine even a death takes a while
                time.sleep(0.001)
            after = done + 8  # then what had been begun is over: no two at one batch

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    for made in pool.results(range(10**9)):
        assert made.task == done
        assert_same(made, make(done))
        done += 1
        if not thread.is_alive():
            break
    at_work = capfd.readouterr().err.count("started again")
    print(f"{kills} kills in {done} batches, {at_work} of them at work on one")
    assert kills == KILLS and at_work >= KILLS // 4


@pytest.mark.parametrize("way", ["abort", "exit", "hang"])
def test_a_task_that_ends_its_process_twice_is_named(monkeypatch, capfd, way):
    if way == "hang":
        monkeypatch.setattr(workers, "HUNG_AFTER", 2.0)
    ends = {"abort": os.abort, "exit": lambda: os._exit(3), "hang": lambda: time.sleep(60)}

    def bad_make(task: int) -> Made:
        if task == 7:
            ends[way]()
        return make(task)

    results = Workers(bad_make, 2, names).results(range(20))
    assert [next(results).task for _ in range(7)] == list(range(7))  # what was made before arrives
    with pytest.raises(MachineError) as error:
        list(results)
    why = {"abort": "killed by SIGABRT", "exit": "it ended with exit code 3", "hang": "it took longer than 2 seconds"}
    assert error.value.what == "a process that reads images was lost twice at the same images"
    assert (error.value.where, error.value.why) == ("images 7.png", why[way])
    told = [line for line in capfd.readouterr().err.splitlines() if "started again" in line]
    assert told == [f"a process that reads images is started again: {why[way]}, at images 7.png"]


def test_tasks_that_end_their_process_once_are_only_told(tmp_path, capfd):
    def fragile(task: int) -> Made:
        mark = tmp_path / str(task)
        if task % 3 == 0 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return make(task)

    for number, made in enumerate(Workers(fragile, 2, names).results(range(9))):
        assert_same(made, make(number))
    told = [line for line in capfd.readouterr().err.splitlines() if "started again" in line]
    assert sorted(line.rpartition(" ")[2] for line in told) == ["0.png", "3.png", "6.png"]


class Odd(Exception):
    """Cannot be pickled: its __init__ takes what its args do not have."""

    def __init__(self, number, text):
        super().__init__(f"{number}: {text}")


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        (KeyError("mask"), KeyError, "mask"),
        (MemoryError("much"), MemoryError, "much"),
        (DataError("broken", "a.png"), DataError, "broken"),
        (Odd(3, "odd"), RuntimeError, "Odd: 3: odd"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_raised_there_is_raised_here_and_the_process_lives(raised, kind, text):
    def bad_make(task: int) -> int:
        if task == 1:
            raise raised
        return task

    pool = Workers(bad_make, 1, names)
    with pytest.raises(kind, match=text) as error:
        list(pool.results(range(3)))
    assert "in a process that reads images:" in str(error.value.__cause__)
    assert "bad_make" in str(error.value.__cause__)
    (pid,) = pool.pids()
    assert list(pool.results([0, 2, 3])) == [0, 2, 3]
    assert pool.pids() == [pid]


def test_signals_for_all_are_for_the_parent():
    pool = Workers(make, 2, names)
    results = pool.results(range(20))
    next(results)
    pids = pool.pids()
    for pid in pids:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(pid, number)
    assert len(list(results)) == 19 and pool.pids() == pids


ORPHANS = """
    import os, sys
    from models.data.workers import Workers
    for way in ("killed", "ended"):
        if os.fork() == 0:
            pool, other = Workers(abs, 2, str), Workers(abs, 1, str)
            kept = [next(pool.results(range(9))), next(other.results(range(9)))]
            print(*pool.pids(), *other.pids(), flush=True)
            os.kill(os.getpid(), 9) if way == "killed" else sys.exit(0)
        os.wait()
"""


def test_no_process_outlives_its_parent():
    command = [sys.executable, "-c", textwrap.dedent(ORPHANS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 6
    until = time.monotonic() + 20
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < until, alive
        time.sleep(0.01)


# ---- in a training run


def dying(monkeypatch, marks: Path, once: bool) -> None:
    """In a loader's process, the image with index 4 kills it in the first epoch."""
    batch = loader._batch

    def deadly(samples, keys, **options):
        mark = marks / "died"
        if (0, 4) in keys and not (once and mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return batch(samples, keys, **options)

    monkeypatch.setattr(loader, "_batch", deadly)


@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_loses_a_process_ends_as_one_that_did_not(tiny_data, tmp_path, monkeypatch, capfd):
    training.train(tiny_config(tiny_data, tmp_path / "whole"))
    with monkeypatch.context() as inner:
        dying(inner, tmp_path, once=True)
        training.train(tiny_config(tiny_data, tmp_path / "dying", workers=2))
    told = [line for line in capfd.readouterr().err.splitlines() if "started again" in line]
    assert len(told) == 1 and "4.png" in told[0]
    assert differences(outcome(tmp_path / "dying"), outcome(tmp_path / "whole")) == []


@pytest.mark.usefixtures("no_pictures")
def test_a_run_whose_images_kill_twice_ends_with_their_names(tiny_data, tmp_path, monkeypatch):
    with monkeypatch.context() as inner, pytest.raises(MachineError) as error:
        dying(inner, tmp_path, once=False)
        training.train(tiny_config(tiny_data, tmp_path / "run", workers=2))
    assert "4.png" in error.value.where and error.value.why == "killed by SIGKILL"
    assert "--resume" in error.value.fix and error.value.exit_code == 4
