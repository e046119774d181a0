""".github/workflows: what runs on the public host can do no harm there, and asks for what there is."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECKS = ROOT / ".github/workflows/checks.yml"


def workflow() -> dict:
    yaml = pytest.importorskip("yaml")
    return yaml.load(CHECKS.read_text(), yaml.BaseLoader)  # `on` is a text, not a truth


def steps() -> list[dict]:
    return [step for job in workflow()["jobs"].values() for step in job["steps"]]


def test_actions_are_pinned_by_hash_and_named_by_version():
    used = re.findall(r"uses: (.*)", CHECKS.read_text())
    assert len(used) >= 4
    assert all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", text) for text in used)
    assert len(set(used)) == len({text.split("@")[0] for text in used})  # one version of each


def test_it_may_read_and_nothing_else():
    content = workflow()
    assert content["permissions"] == {"contents": "read"}
    assert all("permissions" not in job and "timeout-minutes" in job for job in content["jobs"].values())
    checkouts = [step for step in steps() if step.get("uses", "").startswith("actions/checkout@")]
    assert len(checkouts) == len(content["jobs"])
    assert all(step["with"] == {"persist-credentials": "false"} for step in checkouts)
    assert "secrets." not in CHECKS.read_text() and "pull_request_target" not in content["on"]


def test_what_it_runs_are_targets_of_the_makefile():
    content = workflow()
    assert content["on"].keys() == {"push", "pull_request", "schedule"}
    assert content["jobs"]["checks"]["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    assert content["jobs"]["audit"]["if"] == "github.event_name == 'schedule'"
    commands = [step["run"] for step in steps() if "run" in step]
    assert commands == ["make lint", "make test", "make audit"]
    targets = re.findall(r"^(\w+): \$\(VENV\)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {command.removeprefix("make ") for command in commands} <= set(targets)


def test_zizmor_finds_nothing():
    """As `make audit` asks it, which installs it."""
    program = shutil.which("zizmor", path=str(Path(sys.executable).parent)) or shutil.which("zizmor")
    if program is None:
        pytest.skip("zizmor is not installed")
    (options,) = re.findall(r"^\t\S+/zizmor (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    done = subprocess.run([program, *options.split()], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
