"""Faults of a run, one by one: what it says, and what is left."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import differences, flip_a_bit, outcome, tiny_config, write_tiny_data

import models
from models import files, replay, training, training_step
from models.checkpoints import checkpoint_folders, read_checkpoint
from models.errors import DataError, MachineError
from models.resume import MOST_FAILED_SAVES

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.usefixtures("no_pictures")


# ---- a loss that is not finite


def broken_in_step(step: int, monkeypatch, spoil) -> None:
    """`spoil(detector)` before the forward pass of a step."""
    detectors, steps = [], []
    build, luck = training.build_from_config, training_step.luck_of_images
    monkeypatch.setattr(training, "build_from_config", lambda *a: detectors.append(build(*a)) or detectors[-1])

    def counted(*arguments):
        steps.append(1)
        if len(steps) == step:
            spoil(detectors[-1])
        return luck(*arguments)

    monkeypatch.setattr(training_step, "luck_of_images", counted)


def infinite_weight(detector: torch.nn.Module) -> None:
    with torch.no_grad():
        detector.rpn.conv.weight[0, 0, 0, 0] = float("inf")


def test_a_loss_that_is_not_finite_stops_before_the_step(tiny_data, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as inner, pytest.raises(DataError) as error:
        broken_in_step(5, inner, infinite_weight)
        training.train(tiny_config(tiny_data, tmp_path))
    assert error.value.where.startswith("step 5, images [1")
    assert "loss_rpn_objectness is inf" in error.value.why and "gradient_norm is nan" in error.value.why
    folder = tmp_path / "replay" / "step-00000005"
    assert f"python -m models.replay {folder}" in error.value.fix
    # The last checkpoint is of the step before, and holds what training gave.
    assert checkpoint_folders(tmp_path / "checkpoints")[-1].name == "step-00000004"
    last = read_checkpoint(tmp_path / "checkpoints" / "step-00000004")
    assert all(value.isfinite().all() for name, value in last.tensors.items() if name.startswith("detector/"))

    replay.main(replay.Replay(folder=folder, device="cpu"))
    shown = capsys.readouterr().out
    assert "weights: rpn.conv.weight is not finite before the step" in shown
    assert "now:    loss_rpn_objectness inf" in shown
    assert "first output that is not finite: rpn.conv" in shown


def test_a_replay_computes_what_the_step_computed(tiny_data, tmp_path, monkeypatch, capsys):
    """The step is a sound one that is taken for a bad one: its losses come out again to the last digit."""
    seen = {}

    def judged_bad(config, output, world, step, values, *arguments):
        if step == 2:
            seen.update({name: value.item() for name, value in values.items()})
            values = values | {"loss": values["loss"] * float("nan")}
        replay.check_finite(config, output, world, step, values, *arguments)

    monkeypatch.setattr(training_step, "check_finite", judged_bad)
    with pytest.raises(DataError, match="loss is nan"):
        training.train(tiny_config(tiny_data, tmp_path))
    capsys.readouterr()
    replay.main(replay.Replay(folder=tmp_path / "replay" / "step-00000002", device="cpu"))
    shown = capsys.readouterr().out
    for name in seen.keys() - {"loss", "gradient_norm"}:
        assert f"now:    {name} {seen[name]:.9g}\n" in shown
    assert "every value is finite here" in shown


def test_a_run_goes_on_after_a_replay_was_written(tiny_data, tmp_path, monkeypatch):
    config = tiny_config(tiny_data, tmp_path / "broken")
    with monkeypatch.context() as inner, pytest.raises(DataError):
        broken_in_step(5, inner, infinite_weight)
        training.train(config)
    training.train(dataclasses.replace(config, resume=True))
    training.train(tiny_config(tiny_data, tmp_path / "whole"))
    assert differences(outcome(tmp_path / "broken"), outcome(tmp_path / "whole")) == []


def overflowing_step(step: int, monkeypatch) -> None:
    """The loss and the gradient of a step are finite, and its rate is so large that the weights behind it are not."""
    rate = training.learning_rate
    monkeypatch.setattr(training, "learning_rate", lambda *a: 3e38 if a[1] == step - 1 else rate(*a))


def test_weights_that_are_not_finite_are_never_saved(tiny_data, tmp_path, monkeypatch):
    config = tiny_config(tiny_data, tmp_path, keep_checkpoints=1)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, clip_gradient_norm=0.0))
    with monkeypatch.context() as inner, pytest.raises(DataError) as error:
        overflowing_step(3, inner)
        training.train(config)
    assert error.value.what == "training has diverged: the weights are no longer finite"
    assert error.value.where == "step 3" and "detector/" in error.value.why
    assert [path.name for path in checkpoint_folders(tmp_path / "checkpoints")] == ["step-00000002"]
    training.train(dataclasses.replace(config, resume=True))


def test_what_an_operator_says_of_such_weights_is_told_with_a_replay(tiny_data, tmp_path, monkeypatch, capsys):
    config = tiny_config(tiny_data, tmp_path, checkpoint_every_steps=0)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, clip_gradient_norm=0.0))
    with monkeypatch.context() as inner, pytest.raises(DataError) as error:
        overflowing_step(1, inner)
        training.train(config)
    assert error.value.where.startswith("step 2, images [1") and "not finite" in error.value.why
    folder = tmp_path / "replay" / "step-00000002"
    assert f"python -m models.replay {folder}" in error.value.fix
    with pytest.raises(RuntimeError, match="must not be NaN"):
        replay.main(replay.Replay(folder=folder, device="cpu"))
    assert "is not finite before the step" in capsys.readouterr().out


# ---- a processor or a memory that errs


@pytest.mark.parametrize("norm", ["frozen_batch", "batch"])
def test_steps_that_are_computed_twice_change_nothing(tiny_data, tmp_path, norm):
    config = tiny_config(tiny_data, tmp_path)
    backbone = dataclasses.replace(config.detector.backbone, norm=norm)
    config = dataclasses.replace(config, detector=dataclasses.replace(config.detector, backbone=backbone))
    for every in (0, 2):
        training.train(dataclasses.replace(config, output=tmp_path / str(every), repeat_every=every))
    assert differences(outcome(tmp_path / "0"), outcome(tmp_path / "2")) == []


def test_a_step_with_two_results_ends_the_run_before_it_is_made(tiny_data, tmp_path, monkeypatch):
    """The second of its two forward passes is of another bit of the weights, as a memory that errs makes it."""
    with monkeypatch.context() as inner, pytest.raises(MachineError) as error:
        broken_in_step(4, inner, flip_a_bit)  # the forward passes 3 and 4 are both of step 3
        training.train(tiny_config(tiny_data, tmp_path, repeat_every=3))
    assert error.value.what == "step 3 was computed twice, with two results"
    assert error.value.where.startswith("rank 0 on ")
    assert checkpoint_folders(tmp_path / "checkpoints")[-1].name == "step-00000002"


# ---- a full disk


def full_disk(monkeypatch, failing: range) -> None:
    """The saves of these numbers, from 1, meet a full disk when they are brought to it."""
    saves = []
    rename = files.os.rename

    def refused(old, new):
        if ".step-" in str(old) and str(old).endswith(".part"):
            saves.append(1)
            if len(saves) in failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(old, new)

    monkeypatch.setattr(files.os, "rename", refused)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tiny_data, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as inner:
        full_disk(inner, range(2, 4))
        training.train(tiny_config(tiny_data, tmp_path / "full", keep_checkpoints=9))
    shown = capsys.readouterr().out
    assert "step 2: cannot write the checkpoint; the earlier ones are kept as they were" in shown
    assert f"where: {tmp_path / 'full/checkpoints/step-00000002'}" in shown
    assert "No space left on device (" in shown and "MiB free in" in shown
    steps = [int(path.name[5:]) for path in checkpoint_folders(tmp_path / "full/checkpoints")]
    assert steps == [1, 4, 5, 6]
    training.train(tiny_config(tiny_data, tmp_path / "whole"))
    assert differences(outcome(tmp_path / "full"), outcome(tmp_path / "whole")) == []


def test_a_disk_that_stays_full_ends_the_run_with_what_was_saved(tiny_data, tmp_path, monkeypatch):
    full_disk(monkeypatch, range(2, 99))
    with pytest.raises(MachineError, match="the earlier ones are kept"):
        training.train(tiny_config(tiny_data, tmp_path, epochs=3))
    assert [path.name for path in checkpoint_folders(tmp_path / "checkpoints")] == ["step-00000001"]
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert last <= 1 + MOST_FAILED_SAVES


# ---- out of memory


def test_out_of_memory_says_the_sum_and_the_flag(tiny_data, tmp_path, monkeypatch):
    """The real thing: a step that asks the allocator for 2^60 bytes."""

    def greedy(*_):
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(models.faster_rcnn.FasterRCNN, "losses", greedy)
    with pytest.raises(MachineError) as error:
        training.train(tiny_config(tiny_data, tmp_path))
    assert error.value.what == "out of memory at step 1"
    assert error.value.where.startswith("2 images padded to 32 x 32, with up to 1 objects: [1")
    assert error.value.why.startswith("weights 0.00 + gradients 0.00 + momentum 0.00 + images 0.00 + activations and")
    assert "and 1073741824.00 GiB more were asked for; cpu has" in error.value.why
    assert error.value.fix.startswith("--accumulate 2, a smaller --resize SHORT LONG, or --amp bfloat16")


def test_cuda_and_numpy_say_it_in_other_words():
    from models.out_of_memory import _asked_for

    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ...")
    assert _asked_for(cuda) == ", and 2.50 GiB more were asked for"
    assert _asked_for(MemoryError("Unable to allocate 512. MiB for an array")) == ", and 0.50 GiB more were asked for"
    assert _asked_for(MemoryError()) == ", and more was asked for"
    assert _asked_for(RuntimeError("shapes differ")) is None


# ---- two runs, one folder

RACE = """
import os, sys
from pathlib import Path
from models.errors import UsageError
from models.run_folder import owned_folder

folder, racers, rounds = Path(sys.argv[1]), 4, int(sys.argv[2])
owners = 0
for number in range(rounds):
    (gate, start), (reader, writer), (hold, release) = os.pipe(), os.pipe(), os.pipe()
    children = []
    for racer in range(racers):
        children.append(os.fork())
        if children[-1] == 0:
            os.close(release)
            os.close(start)
            os.read(gate, 1)  # until all are there
            try:
                with owned_folder(folder):
                    os.write(writer, b"1")
                    os.read(hold, 1)  # until all have tried
                    if number % 10 == 0:
                        os.kill(os.getpid(), 9)  # nothing is left that keeps the next round out
            except UsageError:
                os.write(writer, b"0")
            os._exit(0)
    os.close(start)
    answers = b"".join(os.read(reader, 1) for _ in range(racers))
    for end in (gate, release, hold, reader, writer):
        os.close(end)
    for child in children:
        os.waitpid(child, 0)
    owners += answers.count(b"1")
    assert answers.count(b"1") == 1, (number, answers)
print(owners)
"""


def test_one_of_four_wins_each_of_1000_races(tmp_path):
    command = [sys.executable, "-c", RACE, str(tmp_path), "1000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == "1000\n", done.stdout + done.stderr
    assert os.listdir(tmp_path) == ["owner.lock"]


# ---- broken images


@pytest.fixture
def broken_data(tmp_path):
    """The second of six images is cut off."""
    folder = write_tiny_data(tmp_path / "broken")
    path = folder / "train" / "1.png"
    path.write_bytes(path.read_bytes()[:200])
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_stops_the_run_and_is_named(broken_data, tmp_path, workers):
    with pytest.raises(DataError) as error:
        training.train(tiny_config(broken_data, tmp_path / "run", workers=workers))
    assert str(broken_data / "train" / "1.png") in error.value.where


def test_a_broken_image_is_replaced_named_and_counted(broken_data, tmp_path, capsys):
    outcomes = []
    for name, workers in (("alone", 0), ("workers", 2)):
        config = tiny_config(broken_data, tmp_path / name, workers=workers, on_bad_image="substitute")
        training.train(config)
        outcomes.append(outcome(config.output))
        shown = capsys.readouterr().out
        assert shown.count("bad image 1, another takes its place: ") == 1
        (line,) = (config.output / "bad_images.txt").read_text().splitlines()
        assert str(broken_data / "train" / "1.png") in line
    assert differences(*outcomes) == []


def test_too_many_broken_images_stop_the_run(tmp_path):
    from models.bad_images import AT_LEAST, BadImages

    told = []
    bad = BadImages(tmp_path, 6, told.append)
    bad.note(f"{number}.png: cut off" for number in range(AT_LEAST))
    bad.note(["0.png: cut off"])  # known
    assert len(told) == AT_LEAST
    with pytest.raises(DataError, match="too many images"):
        BadImages(tmp_path, 6, told.append).note(["another.png: cut off"])  # as a resumed run counts on
    BadImages(tmp_path, 1000 * (AT_LEAST + 1), told.append).note(())


def test_the_limit_of_broken_images_is_that_of_all_processes(tmp_path):
    """Each notes its own ones in the same file; whoever finds one too many tells it, and a resumed job counts as they
    did."""
    from models.bad_images import AT_LEAST, BadImages

    told: list[str] = []
    ranks = [BadImages(tmp_path, 6, told.append) for _ in range(2)]
    for index in range(AT_LEAST):
        ranks[index % 2].note([f"{index}.png: cut off"])
    for rank in (*ranks, BadImages(tmp_path, 6, told.append)):
        rank.note(())
    with pytest.raises(DataError, match="too many images cannot be used"):
        ranks[0].note(["one more.png: cut off"])
