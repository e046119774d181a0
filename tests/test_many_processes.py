"""Jobs of 1, 2 and 4 ranks over gloo, and what ends them: the others end too, say why, and the run goes on from there.

Killed at random moments in test_killed_jobs.py; started by torchrun itself in test_torchrun.py.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from models import distributed
from models.distributed import World
from models.watchdog import EXIT_CODE

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def report() -> dict:
    """All scenarios, from one process that imports torch once."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/job_scenarios.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_order_of_images_does_not_depend_on_the_number_of_ranks(report):
    """1, 2, 4 and 1 rank, a step each, stopped and continued in between."""
    found = report["changing"]
    assert found["codes"] == [143, 143, 143, 0]
    assert found["changing"] == found["alone"]
    first, second, *_ = found["alone"]
    assert sorted(first + second) == list(range(10, 26))  # each image of the data once in the epoch


def test_a_stopped_rank_is_named_killed_and_continued_from(report):
    found = report["stopped"]
    assert found["codes"] == {"0": EXIT_CODE, "1": -9}
    text = found["logs"][0]
    culprit = (
        r"culprit: rank 1 \(process \d+ on \S+\), step \d, [\w -]+, when last heard of \d+ s ago: stopped \(SIGSTOP\)"
    )
    assert re.search(culprit, text)
    assert "at:      step 2, where the others wait" in text and "in train_together" in text
    assert found["seconds"] < 5 + 5  # the timeout, and what is promised beyond it
    assert found["continued"] == 0 and found["differences"] == []


@pytest.mark.parametrize(("place", "phase"), [("joining", "starting"), ("evaluation", "waiting"), ("end", "ended")])
def test_a_rank_stopped_elsewhere_is_named_and_not_the_one_that_waits_for_it(report, place, phase):
    found = report["stopped_elsewhere"][place]
    assert found["codes"] == {"0": EXIT_CODE, "1": -9} and found["seconds"] < 5 + 5
    assert re.findall(r"culprit: (rank \d)", found["logs"][0]) == ["rank 1"]
    assert re.search(rf"other:   rank 0 .*, {phase}, for \d s, in ", found["logs"][0])


def test_a_loss_that_is_not_finite_in_one_rank_stops_all_before_the_step(report):
    found = report["nan"]
    # The launcher ends the one that is left.
    assert found["code"] == 3 and set(found["codes"].values()) <= {3, -15}
    assert f"step 2, rank 1, images {found['images']}" in found["logs"][0]
    assert "replay/rank-1/step-00000002   shows where" in found["logs"][0]
    assert found["checkpoints"] == ["step-00000001"]
    assert found["replays"] == ["replay/rank-1/step-00000002"]


def test_out_of_memory_in_one_rank_ends_all(report):
    found = report["memory"]
    # The other is told by its broken connection, and by the launcher's SIGTERM, whichever comes first.
    assert found["codes"]["1"] == 4 and found["codes"]["0"] in (4, -15)
    assert "out of memory at step 2" in found["logs"][1]
    assert found["checkpoints"] == ["step-00000001"]
    assert found["continued"] == 0 and found["differences"] == []  # no half of a step was made


def test_a_killed_loader_worker_of_one_rank_is_replaced(report):
    found = report["worker"]
    assert found["codes"] == {"0": 0, "1": 0} and found["differences"] == []
    assert "is started again: killed by SIGKILL" in "".join(found["logs"])


def test_the_launchers_end_ends_its_ranks(report):
    """SIGKILL, which leaves it no time to do it."""
    found = report["launcher"]
    assert found["code"] == -9 and found["seconds"] < 10
    assert all(re.search(r"the launcher \(process \d+\) has ended", log) for log in found["logs"])
    assert found["continued"] == 0 and found["differences"] == []


def test_an_interrupted_evaluation_of_two_ranks_goes_on(report):
    """SIGTERM to the launcher when each rank has evaluated one batch of its two."""
    found = report["evaluation"]
    assert found["whole"] == ["0", "0", "1", "1"]  # the ranks of all forward passes
    # The launcher hands SIGTERM on a second time when the first rank has ended.
    assert found["code"] != 0 and {143} <= set(found["codes"].values()) <= {143, -15}
    assert found["first"] == ["0", "1"] and found["second"] == ["0", "1"]
    assert found["continued"] == 0 and found["differences"] == []


def test_annotations_are_read_once_a_machine(report):
    """By the first of two ranks, in the first of two runs."""
    found = report["reading"]
    assert found["codes"] == [0, 0]
    assert found["readers"] == ["0 instances_train.json", "0 instances_val.json"]


@pytest.mark.parametrize(("rank", "local_rank", "events"), [(2, 0, ["read", "wait"]), (3, 1, ["wait", "read"])])
def test_the_first_process_of_a_machine_reads_before_its_others(monkeypatch, rank, local_rank, events):
    seen = []
    monkeypatch.setattr(distributed, "wait_for_all", lambda: seen.append("wait"))
    with distributed.first_on_its_machine(World(rank=rank, size=4, local_rank=local_rank, local_size=2)):
        seen.append("read")
    assert seen == events
