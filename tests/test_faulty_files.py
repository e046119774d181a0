"""Every file operation of saving and removing a checkpoint fails, or is the last thing that the process does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler, and LD_PRELOAD")
    library = tmp_path_factory.mktemp("shim") / "faulty_files.so"
    source = ROOT / "tests/native/faulty_files.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", library, source, "-ldl"], check=True)
    return library


def test_every_file_operation_of_saving_and_removing(shim):
    environment = os.environ | {"LD_PRELOAD": str(shim), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/faulty_saves.py")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["wrong"] == []
    # 3 files written and synced, the folder made, synced, renamed and its parent synced; two old checkpoints removed.
    calls = report["calls"]
    assert calls.count("write") >= 3 and calls.count("fsync") == 5 and calls.count("rename") == 3, calls
    assert sum(map(calls.count, ("unlink", "unlinkat"))) == 6, calls
    outcomes = report["outcomes"]
    assert set(outcomes["kill before"]) == set(outcomes["kill after"]) == {"-9"}
    for error in ("EIO", "ENOSPC", "ESTALE"):
        assert outcomes[error].get("7", 0) >= 12, outcomes
    assert set(outcomes["short write"]) == {"0"}
    assert set(outcomes["short write, then a full disk"]) == {"7"}
