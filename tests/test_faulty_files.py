"""Every file operation of saving and removing a checkpoint fails or is the last; runs are killed at random moments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from preloaded import built_library

KILLS = int(os.environ.get("CASCADEOPS_KILLS", "500"))
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    return built_library("faulty_files", tmp_path_factory.mktemp("shim"))


def report_of(shim: Path, program: str, *arguments: str, timeout: float) -> dict:
    environment = os.environ | {"LD_PRELOAD": str(shim), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / program), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_file_operation_of_saving_and_removing(shim):
    report = report_of(shim, "faulty_saves.py", timeout=300)
    assert report["wrong"] == []
    # The run's folder synced; 3 files written and synced, the checkpoint's folder made, synced, renamed and its parent
    # synced; two old checkpoints removed.
    calls = report["calls"]
    assert calls.count("write") >= 3 and calls.count("fsync") == 6 and calls.count("rename") == 3, calls
    assert sum(map(calls.count, ("unlink", "unlinkat"))) == 6, calls
    outcomes = report["outcomes"]
    assert set(outcomes["kill before"]) == set(outcomes["kill after"]) == {"-9"}
    for error in ("EIO", "ENOSPC"):
        assert outcomes[error].get("7", 0) >= 12, outcomes
    assert set(outcomes["ESTALE"]) == {"0"}  # the names are looked up anew, and it is saved
    assert set(outcomes["short write"]) == {"0"}
    assert set(outcomes["short write, then a full disk"]) == {"7"}


def test_killed_runs_end_as_one_that_was_left_alone(shim):
    """Weights, optimiser, random numbers, metrics. `make soak` makes 10,000 kills."""
    report = report_of(shim, "kill_runs.py", "--kills", str(KILLS), timeout=120 + 2 * KILLS)
    print(json.dumps(report))
    assert report["wrong"] == []
    assert sum(report["kills"].values()) >= KILLS and len(report["kills"]) == 4
    assert report["runs compared"] >= KILLS // 100
    assert report["killed"]["in a save"] >= KILLS // 10
    assert report["slowest SIGTERM"] < 10
