"""Several processes train one detector: what they compute is what one process computes, whatever happens to them."""

import json

import pytest
import torch
from job_runs import run_jobs
from tiny_runs import differences, outcome, write_tiny_data

from models.checkpoints import checkpoint_folders

FIELDS = {"batch_size": 4, "log_every": 1}
JOBS = {
    "one": {"size": 1},
    "four": {"size": 4},
    "four, stopped": {"size": 4, "fault": {"rank": 1, "step": 4, "kind": "signal"}, "codes": [143] * 4},
    "four, continued": {"size": 4, "output": "four, stopped", "fields": {"resume": True}},
    "two": {"size": 2, "fault": {"rank": 0, "step": 2, "kind": "signal"}, "codes": [143] * 2},
    "two, then one": {
        "size": 1,
        "output": "two",
        "fields": {"resume": True},
        "fault": {"rank": 0, "step": 4, "kind": "signal"},
        "codes": [143],
    },
    "two, then one, then four": {"size": 4, "output": "two", "fields": {"resume": True}},
    "not finite": {"size": 2, "fault": {"rank": 1, "step": 2, "kind": "not finite"}, "codes": [3, 3]},
    "batch norm and average, one": {"size": 1, "norm": "batch", "fields": {"ema_decay": 0.9}},
    "batch norm and average, two": {"size": 2, "norm": "sync_batch", "fields": {"ema_decay": 0.9}},
    "in parts, one": {"size": 1, "fields": {"accumulate": 4}},
    "in parts, two": {"size": 2, "fields": {"accumulate": 2}},
    "bfloat16 gradients": {"size": 2, "fields": {"compress_gradients": True}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiny_data(tmp_path_factory.mktemp("tiny") / "data", train=12, val=5)


@pytest.fixture(scope="module")
def outputs(data, tmp_path_factory):
    """The folder of each job, all of them done."""
    folder = tmp_path_factory.mktemp("jobs")
    outputs = {name: folder / job.get("output", name) for name, job in JOBS.items()}
    jobs = [
        job | {"data": data, "output": outputs[name], "fields": FIELDS | job.get("fields", {})}
        for name, job in JOBS.items()
    ]
    for job, codes in zip(jobs, run_jobs(jobs), strict=True):
        logs = [(job["output"] / f"rank-{rank}.log").read_text() for rank in range(job["size"])]
        assert codes == job.get("codes", [0] * job["size"]), "\n".join(logs)
    return outputs


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
    """One of its processes was told to stop, and all of them saved and ended after the same step."""
    assert differences(outcome(outputs["four, continued"]), outcome(outputs["four"])) == []
    ends = [(outputs["four"].parent / "four, stopped" / f"rank-{rank}.log").read_text() for rank in range(4)]
    assert all("stopped by SIGTERM after step 4, which is saved" in text for text in ends)


def test_a_job_goes_on_with_another_number_of_processes(outputs):
    close(outcome(outputs["two, then one, then four"]), outcome(outputs["one"]))


def test_a_loss_of_one_process_that_is_not_finite_stops_all(outputs):
    folder = outputs["not finite"]
    others, blamed = ((folder / f"rank-{rank}.log").read_text() for rank in (0, 1))
    assert "no longer finite" in others and "see the message of the process whose images" in others
    replay = folder / "replay" / "rank-1" / "step-00000002"
    assert "step 2, rank 1, images [" in blamed and str(replay) in blamed and replay.is_dir()
    assert checkpoint_folders(folder / "checkpoints")[-1].name == "step-00000001"


def test_compressed_gradients_are_rounded_and_no_more(outputs):
    rounded, exact = (outcome(outputs[name])["metrics"] for name in ("bfloat16 gradients", "four"))
    assert rounded[0]["loss"] == pytest.approx(exact[0]["loss"], rel=1e-6)
    assert rounded[-2]["loss"] == pytest.approx(exact[-2]["loss"], rel=0.05)
    assert rounded[-2]["loss"] != pytest.approx(exact[-2]["loss"], rel=1e-5)


def test_only_the_main_process_writes(outputs):
    folder = outputs["four"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["images"] for line in lines if "images" in line] == [5, 5]
    assert "4 processes, each on its cpu" in (folder / "rank-0.log").read_text()
    assert (folder / "rank-3.log").read_text() == ""
    assert not list(folder.glob("evaluation.partial*"))
