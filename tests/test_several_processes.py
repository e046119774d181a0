"""Several processes train one detector: what they compute is what one process computes, whatever happens to them."""

import json
import re
from pathlib import Path

import pytest
import torch
from job_runs import run_jobs
from tiny_runs import differences, outcome, write_tiny_data

from models.checkpoints import checkpoint_folders
from models.watchdog import EXIT_CODE

FIELDS = {"batch_size": 4, "log_every": 1}
JOBS = {
    "one": {"ranks": 1},
    "four": {"ranks": 4},
    "four, stopped": {"ranks": 4, "signal": (1, 4), "code": 143},
    "four, continued": {"ranks": 4, "output": "four, stopped"},
    "two": {"ranks": 2, "signal": (0, 2), "code": 143},
    "two, then one": {"ranks": 1, "output": "two", "signal": (0, 4), "code": 143},
    "two, then one, then four": {"ranks": 4, "output": "two"},
    "batch norm and average, one": {"ranks": 1, "norm": "batch", "fields": {"ema_decay": 0.9}},
    "batch norm and average, two": {"ranks": 2, "norm": "sync_batch", "fields": {"ema_decay": 0.9}},
    "in parts, one": {"ranks": 1, "fields": {"accumulate": 4}},
    "in parts, two": {"ranks": 2, "fields": {"accumulate": 2, "repeat_every": 2}},
    "bfloat16 gradients": {"ranks": 2, "fields": {"compress_gradients": True}},
    "a bit of three": {"ranks": 3, "flip": (1, 3), "code": 4, "fields": {"batch_size": 6}},
    "batch norms of their own": {"ranks": 2, "norm": "batch", "fingerprints": True},
    "another run's folder": {"ranks": 2, "output": "one", "restarted": True, "code": 2},
    "in parts, stopped": {"ranks": 2, "signal": (1, 4), "code": 143, "fields": {"accumulate": 2}},
    "in parts, continued": {"ranks": 2, "output": "in parts, stopped", "fields": {"accumulate": 2}},
    "a bit of two": {"ranks": 2, "flip": (0, 2), "code": 4},
    **{
        f"{program}, {name}": {"ranks": ranks, "program": program}
        for program in ("evaluate", "predict")
        for name, ranks in (("one", 1), ("three", 3))
    },
    **{
        f"{program}, hung": {"ranks": 3, "program": program, "hangs": 1, "code": EXIT_CODE}
        for program in ("evaluate", "predict")
    },
}
"""A job whose output another has begun goes on with it."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiny_data(tmp_path_factory.mktemp("tiny") / "data", train=12, val=5)


@pytest.fixture(scope="module")
def outputs(data, tmp_path_factory):
    """The folder of each job, all of them done."""
    folder = tmp_path_factory.mktemp("jobs")
    outputs = {name: folder / job.get("output", name) for name, job in JOBS.items()}
    jobs = [
        {"weights": outputs["one"] / "weights.safetensors", "data": data, "output": outputs[name]}
        | {**job, "output": outputs[name], "fields": FIELDS | job.get("fields", {})}
        for name, job in JOBS.items()
    ]
    for name, job, code in zip(JOBS, jobs, run_jobs(jobs), strict=True):
        logs = "\n".join(path.read_text() for path in folder.glob(f"{outputs[name].name}.log.?"))
        assert code == job.get("code", 0), f"{name}\n{logs}"
    return outputs


def log(output: Path, rank: int) -> str:
    return Path(f"{output}.log.{rank}").read_text()


def close(one: dict, other: dict, tolerance: float = 2e-6) -> None:
    """Losses, scores and weights are equal but for rounding."""
    assert len(one["metrics"]) == len(other["metrics"]) > 6
    for ours, theirs in zip(one["metrics"], other["metrics"], strict=True):
        assert ours.keys() == theirs.keys() and ours["step"] == theirs["step"]
        for name in ours.keys() - {"images"}:
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), (ours["step"], name)
    names = {name for name in one["tensors"] if not name.startswith("random/")}
    assert names == {name for name in other["tensors"] if not name.startswith("random/")}
    for name in names:
        torch.testing.assert_close(one["tensors"][name], other["tensors"][name], rtol=1e-4, atol=1e-5, msg=name)


def test_they_compute_what_one_process_computes(outputs):
    close(outcome(outputs["one"]), outcome(outputs["four"]))


def test_batch_norms_with_common_statistics_are_those_of_one_process(outputs):
    one, two = (outcome(outputs[f"batch norm and average, {size}"]) for size in ("one", "two"))
    close(one, two)
    average, weights = one["tensors"]["averaged/module.rpn.conv.weight"], one["tensors"]["detector/rpn.conv.weight"]
    assert not torch.equal(average, weights)


def test_parts_of_a_step_may_be_shared(outputs):
    close(outcome(outputs["in parts, one"]), outcome(outputs["in parts, two"]))
    assert outcome(outputs["in parts, one"])["metrics"] != outcome(outputs["one"])["metrics"]


def test_a_stopped_job_goes_on_bit_for_bit(outputs):
    """One of its processes was told to stop, and all of them did after that step."""
    assert differences(outcome(outputs["four, continued"]), outcome(outputs["four"])) == []
    assert "SIGTERM: saving after this step" in log(outputs["four, stopped"], 1)
    assert "continued after step 4" in log(outputs["four, stopped"], 0)


def test_a_job_that_takes_its_images_in_parts_goes_on_bit_for_bit(outputs):
    assert differences(outcome(outputs["in parts, continued"]), outcome(outputs["in parts, two"])) == []


def test_all_processes_evaluate_what_is_saved(outputs):
    """Each has batch norms with statistics of its own images; the main one's are what is written."""
    seen = [re.findall("evaluated (.*)", log(outputs["batch norms of their own"], rank)) for rank in (0, 1)]
    assert len(seen[0]) == 2 and seen[0] == seen[1]


def test_torchruns_restart_does_not_continue_another_run(outputs):
    """The first start was refused, because the folder holds a run; so is the second."""
    assert "the output folder holds a run already" in log(outputs["one"], 0)


def test_a_job_goes_on_with_another_number_of_processes(outputs):
    close(outcome(outputs["two, then one, then four"]), outcome(outputs["one"]))


def test_compressed_gradients_are_rounded_and_no_more(outputs):
    rounded, exact = (outcome(outputs[name])["metrics"] for name in ("bfloat16 gradients", "four"))
    assert rounded[0]["loss"] == pytest.approx(exact[0]["loss"], rel=1e-6)
    assert rounded[-2]["loss"] == pytest.approx(exact[-2]["loss"], rel=0.05)
    assert rounded[-2]["loss"] != pytest.approx(exact[-2]["loss"], rel=1e-5)


def test_one_flipped_bit_of_one_process_is_found_before_it_is_saved(outputs):
    for name, step, culprits in (("a bit of three", 3, [1]), ("a bit of two", 2, [0, 1])):
        text = log(outputs[name], 0)
        assert "the processes of the job do not have the same weights any more" in text
        assert f"step {step}, " in text and "detector/rpn.conv.weight" in text
        assert [rank for rank in range(3) if f"rank {rank} on" in text] == culprits
        assert [path.name for path in checkpoint_folders(outputs[name] / "checkpoints")][-1] == f"step-{step - 1:08}"


def test_only_the_main_process_writes(outputs):
    folder = outputs["four"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["images"] for line in lines if "images" in line] == [5, 5]
    assert "4 processes, each on its cpu" in log(folder, 0)
    assert log(folder, 3) == ""
    assert not list(folder.glob("evaluation.partial*"))


@pytest.mark.parametrize("program", ["evaluate", "predict"])
def test_results_of_all_processes_are_gathered_exactly(outputs, program):
    """Three processes, five images."""
    found = []
    for name in ("one", "three"):
        folder = outputs[f"{program}, {name}"]
        entries = json.loads((folder / "detections.bbox.json").read_text())
        found.append(sorted(entries, key=lambda entry: (entry["image_id"], -entry["score"], entry["bbox"])))
    one, three = found
    assert len(one) == len(three) >= 5
    for ours, theirs in zip(one, three, strict=True):
        assert (ours["image_id"], ours["category_id"]) == (theirs["image_id"], theirs["category_id"])
        assert [*ours["bbox"], ours["score"]] == pytest.approx([*theirs["bbox"], theirs["score"]], rel=1e-4)
    name = "metrics.json" if program == "evaluate" else "images.json"
    one, three = (json.loads((outputs[f"{program}, {count}"] / name).read_text()) for count in ("one", "three"))
    one.pop("images_per_second", None), three.pop("images_per_second", None)
    assert one == three


@pytest.mark.parametrize("program", ["evaluate", "predict"])
def test_a_process_that_hangs_is_named(outputs, program):
    shown = "".join(log(outputs[f"{program}, hung"], rank) for rank in range(3))
    assert re.search(r"culprit: rank 1 \(process \d+ on \S+\), step 0, detecting, for \d s, in ", shown)
