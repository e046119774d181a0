"""The power is cut at every moment, and the disk holds whatever it may: what was promised is there and intact."""

import contextlib
import dataclasses
import json
import os
import random
import shutil

import pytest
import torch
from power_cuts import Entry, Recorder, Rename, Sync, Truncate, Write, states, write_state
from tiny_runs import VARYING, black_picture, differences, outcome, tiny_config, write_tiny_data

from models import progress, training
from models.checkpoints import newest_checkpoint, prune, write_checkpoint
from models.files import write_json
from models.resume import RunFolder

STATES = int(os.environ.get("CASCADEOPS_POWER_CUTS", "200"))
"""Of each of the two recordings; 10,000 is the long form."""
RESUMED = max(4, STATES // 200)
"""So many of a run's states are continued to the end."""


# ---- the recorder itself


def contents(recorder: Recorder, count: int = 200) -> set[bytes | None]:
    """What "a" may hold, of the states of a recording."""
    return {state.files.get("a", None) for state in states(recorder, count, random.Random(0))}


def test_what_is_written_without_care_may_be_lost(tmp_path):
    """The textbook's mistake: a new content in the old one's place by a rename, with nothing synced."""
    (tmp_path / "a").write_bytes(b"old.")
    with Recorder(tmp_path) as recorder:
        (tmp_path / "b").write_bytes(b"new!")
        os.rename(tmp_path / "b", tmp_path / "a")
    assert [type(operation) for operation in recorder.operations] == [Entry, Write, Rename]
    found = contents(recorder)
    parts, with_zeros = {b"n", b"ne", b"new"}, {b"n\0\0\0", b"ne\0\0", b"new\0"}
    assert found - parts - with_zeros == {b"old.", b"", bytes(4), b"new!"} and found & parts and found & with_zeros


def test_what_is_written_with_care_is_old_or_new(tmp_path):
    (tmp_path / "a").write_bytes(b"old.")
    with Recorder(tmp_path) as recorder:
        write_json(tmp_path / "a", 2222)
        recorder.mark("written")
    kinds = [type(operation) for operation in recorder.operations]
    assert kinds[:5] == [Entry, Write, Sync, Rename, Sync]
    assert contents(recorder) == {b"old.", b"2222"}
    assert {state.files["a"] for state in states(recorder, 200, random.Random(0)) if state.marks} == {b"2222"}


def test_a_file_that_is_begun_anew_or_removed_may_be_any(tmp_path):
    (tmp_path / "a").write_bytes(b"old.")
    with Recorder(tmp_path) as recorder:
        (tmp_path / "a").write_bytes(b"new!")
        os.remove(tmp_path / "a")
    assert [type(operation) for operation in recorder.operations] == [Truncate, Write, Entry]
    assert contents(recorder) >= {b"old.", b"", b"new!", b"ne", bytes(4), None}


# ---- saving and removing


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"a": torch.full((30,), float(step)), "b": torch.arange(step)}


def assert_newest(folder, allowed: set[int]) -> int:
    """It is of one of these steps, is found without a word, and is what was saved; 0: there is none."""
    found = newest_checkpoint(folder, pytest.fail)
    step = 0 if found is None else found.step
    assert step in allowed
    if found is not None:
        assert found.facts == {"step": step}
        assert all(torch.equal(found.tensors[name], value) for name, value in tensors(step).items())
    return step


@pytest.mark.parametrize("before", [0, 3])
def test_every_state_of_saving_and_removing_has_the_newest_checkpoint_or_the_one_before(tmp_path, before):
    root, folder = tmp_path / "root", tmp_path / "root/run/checkpoints"
    root.mkdir()
    for step in range(1, before + 1):
        write_checkpoint(folder, step, tensors(step), {"step": step})
    with Recorder(root) as recorder:
        for step in range(before + 1, before + 4):
            write_checkpoint(folder, step, tensors(step), {"step": step})
            recorder.mark(step)
            prune(folder, keep=2)
    count = 0
    for state in states(recorder, STATES // 2, random.Random(before)):
        count += 1
        shutil.rmtree(root)
        write_state(state, root)
        promised = state.marks[-1] if state.marks else before
        step = assert_newest(folder, {promised, promised + 1})
        if count % 3 == 0:  # nothing that the cut has left is in the way
            write_checkpoint(folder, step + 1, tensors(step + 1), {"step": step + 1})
            prune(folder, keep=1)
            assert os.listdir(folder) == [f"step-{step + 1:08}"]
    print(f"{count} states of {len(recorder.operations)} operations")
    assert count >= STATES // 3


# ---- a whole run

GROWING = {"metrics.jsonl", "starts.jsonl", "evaluation.partial.jsonl", "owner.lock"}
"""Files that are not replaced as a whole."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(recorder of a run from its first file to its last, configuration, folder of the whole run)."""
    room = tmp_path_factory.mktemp("run")
    config = tiny_config(write_tiny_data(room / "data"), room / "root" / "runs" / "mine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "save_comparison", black_picture)
        patch.setattr(progress.importlib.util, "find_spec", lambda name: None)  # TensorBoard's files are not ours
        (room / "root").mkdir()
        save = RunFolder.save
        with Recorder(room / "root") as recorder:

            def marked(self, step, *arguments):
                save(self, step, *arguments)
                recorder.mark(step)

            patch.setattr(RunFolder, "save", marked)
            training.train(config)
        os.rename(room / "root", room / "whole")
        patch.setattr(RunFolder, "save", save)
        yield recorder, config, room / "whole" / "runs" / "mine"


def test_every_state_of_a_run_can_be_continued(recorded):
    recorder, config, whole = recorded
    root = config.output.parent.parent
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    every = list(states(recorder, STATES, random.Random(1)))
    to_resume = set(random.Random(2).sample(range(len(every)), RESUMED))
    resumed = 0
    for number, state in enumerate(every):
        shutil.rmtree(root, ignore_errors=True)
        write_state(state, root)
        promised = state.marks[-1] if state.marks else 0
        found = newest_checkpoint(config.output / "checkpoints", pytest.fail)
        step = 0 if found is None else found.step
        assert step in (promised, promised + 1)
        if step:
            kept = [json.loads(line) for line in progress._lines_up_to(config.output / "metrics.jsonl", step)]
            # The line of an evaluation comes behind its checkpoint, and is made again if it is lost.
            known = [line for line in lines if line["step"] <= step]
            assert kept in (known, [line for line in known if line["step"] < step or "images" not in line])
            assert (config.output / "config.json").exists()
        for path, content in state.files.items():
            name = path.rpartition("/")[2]
            if content is not None and "checkpoints/" not in path and name not in GROWING and name[0] != ".":
                assert content in recorder.contents.values(), path
        if number in to_resume:
            with contextlib.redirect_stdout(None):
                has_begun = (config.output / "config.json").exists()
                training.train(dataclasses.replace(config, resume=has_begun))
            assert differences(outcome(config.output), outcome(whole)) == []
            resumed += 1
    print(f"{len(every)} states of {len(recorder.operations)} operations, {resumed} of them continued to the end")
    assert len(every) >= STATES // 2 and resumed == RESUMED and {"step", "loss"} <= lines[0].keys() - VARYING
