"""A run that was stopped and goes on is, bit by bit, the run that never was."""

import dataclasses
import errno
import json
import os
import shutil
import signal

import pytest
import torch
from tiny_runs import Killed, black_picture, differences, outcome, stopped_after, tiny_config, write_tiny_data

from models import checkpoints, training, training_step
from models.checkpoints import checkpoint_folders, read_checkpoint, write_checkpoint
from models.config_files import as_json, config_from_json, read_config, starting_points
from models.errors import DataError, MachineError, UsageError
from models.interrupts import Interrupted
from models.recipes import presets
from models.resume import PARTS, STATE
from models.run_folder import owned_folder

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory):
    """What a run gives that is never stopped."""
    output = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "save_comparison", black_picture)
        training.train(tiny_config(tiny_data, output))
    return outcome(output)


@pytest.mark.parametrize("workers", [0, 2])
def test_from_every_step(tiny_data, tmp_path, monkeypatch, whole, workers):
    """Epochs have 3 steps: 1, 2, 4 and 5 are inside of one; 3 and 6 lie between a checkpoint and its evaluation."""
    for step in range(1, 7) if workers == 0 else (1, 3, 5):
        config = tiny_config(tiny_data, tmp_path / str(step), workers=workers)
        stopped_after(step, monkeypatch, config)
        training.train(dataclasses.replace(config, resume=True))
        assert differences(outcome(config.output), whole) == [], f"stopped after step {step}"


def test_a_checkpoint_that_comes_rarely_is_gone_back_to(tiny_data, tmp_path, monkeypatch, whole):
    """Steps 4 and 5 are computed, and logged, a second time."""
    config = tiny_config(tiny_data, tmp_path, checkpoint_every_steps=0)
    original = training_step.check_finite

    def die_in_step_6(config, output, world, step, *arguments):
        original(config, output, world, step, *arguments)
        if step == 6:
            raise Killed

    with monkeypatch.context() as inner, pytest.raises(Killed):
        inner.setattr(training_step, "check_finite", die_in_step_6)
        training.train(config)
    assert [path.name for path in checkpoint_folders(tmp_path / "checkpoints")] == ["step-00000003"]
    training.train(dataclasses.replace(config, resume=True))
    assert differences(outcome(tmp_path), whole) == []


def test_a_run_stopped_before_its_first_checkpoint_starts_again(tiny_data, tmp_path, monkeypatch, whole, capsys):
    config = tiny_config(tiny_data, tmp_path)

    def die(*_):
        raise Killed

    with monkeypatch.context() as inner, pytest.raises(Killed):
        inner.setattr(training_step, "check_finite", die)
        training.train(config)
    training.train(dataclasses.replace(config, resume=True))
    assert "stopped before its first checkpoint: it starts again" in capsys.readouterr().out
    assert differences(outcome(tmp_path), whole) == []


def test_a_damaged_checkpoint_costs_the_steps_behind_the_one_before(tiny_data, tmp_path, monkeypatch, whole, capsys):
    config = tiny_config(tiny_data, tmp_path)
    stopped_after(5, monkeypatch, config)
    path = tmp_path / "checkpoints" / "step-00000005" / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    training.train(dataclasses.replace(config, resume=True))
    assert "step-00000005 is damaged" in (out := capsys.readouterr().out) and "continued after step 4" in out
    assert differences(outcome(tmp_path), whole) == []


def test_the_best_checkpoint_outlives_the_last_ones(tiny_data, tmp_path, monkeypatch):
    scores = iter([0.5, 0.1, 0.2, 0.3])
    evaluate = training.evaluate_detector

    def scored(*arguments, **options):
        metrics = evaluate(*arguments, **options)
        return dataclasses.replace(metrics, mask=None, box=dataclasses.replace(metrics.box, ap=next(scores)))

    monkeypatch.setattr(training, "evaluate_detector", scored)
    training.train(tiny_config(tiny_data, tmp_path, epochs=4, checkpoint_every_steps=0, keep_checkpoints=1))
    names = [path.name for path in checkpoint_folders(tmp_path / "checkpoints")]
    assert names == ["step-00000003", "step-00000012"]


@pytest.mark.parametrize("part", [*STATE, *sorted(PARTS)])
def test_a_checkpoint_that_lacks_a_part_is_refused(tiny_data, tmp_path, monkeypatch, part):
    """Written anew without it, so that every hash is right."""
    config = tiny_config(tiny_data, tmp_path, ema_decay=0.9)
    stopped_after(3, monkeypatch, config)
    checkpoint = read_checkpoint(path := tmp_path / "checkpoints/step-00000003")
    tensors = {name: value for name, value in checkpoint.tensors.items() if name.partition("/")[0] != part}
    facts = {name: value for name, value in checkpoint.facts.items() if name != part}
    assert (len(tensors) < len(checkpoint.tensors)) or (len(facts) < len(checkpoint.facts))
    shutil.rmtree(path)
    write_checkpoint(path.parent, 3, tensors, facts)
    with pytest.raises(DataError, match="checkpoint lacks"):
        training.train(dataclasses.replace(config, resume=True))


@pytest.mark.parametrize("error", [errno.ETIMEDOUT, errno.EMFILE])
def test_a_disk_that_does_not_answer_now_costs_no_checkpoint(tiny_data, tmp_path, monkeypatch, whole, error):
    config = tiny_config(tiny_data, tmp_path)
    stopped_after(3, monkeypatch, config)

    def unanswered(path, most):
        raise OSError(error, os.strerror(error), str(path))

    with monkeypatch.context() as inner, pytest.raises(MachineError, match="the checkpoint cannot be read"):
        inner.setattr(checkpoints, "read_bytes", unanswered)
        training.train(dataclasses.replace(config, resume=True))
    assert [path.name for path in checkpoint_folders(tmp_path / "checkpoints")][-1] == "step-00000003"
    training.train(dataclasses.replace(config, resume=True))
    assert differences(outcome(tmp_path), whole) == []


def test_a_run_that_is_longer_already_is_told(tiny_data, tmp_path, monkeypatch):
    config = tiny_config(tiny_data, tmp_path)
    stopped_after(3, monkeypatch, config)
    with pytest.raises(UsageError, match="the run is longer already"):
        training.train(dataclasses.replace(config, resume=True, max_iterations=2))


@pytest.mark.parametrize(("amp", "state"), [("bfloat16", {}), ("float16", {"scale", "_growth_tracker"})])
def test_a_run_in_half_precision_goes_on_bit_for_bit(tiny_data, tmp_path, monkeypatch, amp, state):
    """In float16 the scale of the gradients starts too large, and falls with each step that overflows: a part of what
    is saved."""
    monkeypatch.setattr(training, "choose_amp_dtype", lambda *_: getattr(torch, amp))
    config = tiny_config(tiny_data, tmp_path / "stopped", amp=amp)
    training.train(dataclasses.replace(config, output=tmp_path / "whole"))
    stopped_after(4, monkeypatch, config)
    assert read_checkpoint(config.output / "checkpoints/step-00000004").facts["scaler"].keys() >= set(state)
    training.train(dataclasses.replace(config, resume=True))
    assert differences(outcome(config.output), outcome(tmp_path / "whole")) == []


def test_other_data_are_refused(tiny_data, tmp_path, monkeypatch):
    config = tiny_config(tiny_data, tmp_path / "run")
    stopped_after(1, monkeypatch, config)
    other = write_tiny_data(tmp_path / "other", train=8)
    with pytest.raises(DataError, match="not the data that the run was started with"):
        training.train(dataclasses.replace(config, resume=True, data=other))


# ---- the configuration


@pytest.mark.parametrize("arch", ["faster_rcnn", "mask_rcnn", "cascade_mask_rcnn", "htc", "scnet"])
def test_every_preset_survives_its_file(arch):
    for config in presets(arch).values():
        assert config_from_json(json.loads(json.dumps(as_json(config)))) == config


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"batch_sise": 1}, "batch_sise: no such field; did you mean batch_size"),
        ({"optimizer": {"momentun": 1}}, "optimizer.momentun: no such field; did you mean momentum"),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr: expected float, got 'fast'"),
        ({"batch_size": 1.5}, "batch_size: expected int, got 1.5"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"resize": [1, 2, 3]}, r"resize: expected tuple\[int, int\], got \[1, 2, 3\]"),
        ({"detector": {"rpn": {"top_k": None}}}, "detector.rpn.top_k: expected int, got None"),
        ({"detector": []}, "detector: expected an object"),
        ({"arch": "yolo"}, "arch: expected one of faster_rcnn"),
    ],
)
def test_a_wrong_configuration_file_is_told(tmp_path, change, text):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(as_json(presets("htc")["small"]) | change))
    with pytest.raises(DataError, match=text):
        read_config(path)


def test_a_run_starts_again_from_its_configuration_alone(tiny_data, tmp_path, monkeypatch, whole):
    first = tiny_config(tiny_data, tmp_path / "first")
    stopped_after(1, monkeypatch, first)
    monkeypatch.chdir(tmp_path)
    again = starting_points(["--preset", "first/config.json"])["first/config.json"]
    training.train(dataclasses.replace(again, output=tmp_path / "again"))
    assert differences(outcome(tmp_path / "again"), whole) == []
    (own,) = starting_points(["--output", "first", "--resume"]).values()
    training.train(dataclasses.replace(own, resume=True))
    assert differences(outcome(tmp_path / "first"), whole) == []


# ---- signals and owners


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_saves_after_the_step_and_ends(tiny_data, tmp_path, monkeypatch, whole, number, code):
    config = tiny_config(tiny_data, tmp_path, checkpoint_every_steps=0)
    original = training_step.check_finite

    def signal_in_step_2(config, output, world, step, *arguments):
        original(config, output, world, step, *arguments)
        if step == 2:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with monkeypatch.context() as inner, pytest.raises(Interrupted, match="after step 2, which is saved") as stop:
        inner.setattr(training_step, "check_finite", signal_in_step_2)
        training.train(config)
    assert stop.value.exit_code == code
    assert signal.getsignal(number) is before
    training.train(dataclasses.replace(config, resume=True))
    assert differences(outcome(tmp_path), whole) == []


def test_a_signal_in_an_evaluation_ends_at_once(tiny_data, tmp_path, monkeypatch, whole):
    config = tiny_config(tiny_data, tmp_path)

    def signalled(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the evaluation went on")

    with monkeypatch.context() as inner, pytest.raises(Interrupted, match="stopped by SIGTERM"):
        inner.setattr(training, "evaluate_detector", signalled)
        training.train(config)
    training.train(dataclasses.replace(config, resume=True))
    assert differences(outcome(tmp_path), whole) == []


def test_a_second_run_is_refused_and_told_who_is_first(tiny_data, tmp_path):
    with owned_folder(tmp_path), pytest.raises(UsageError, match="another run is writing"):
        training.train(tiny_config(tiny_data, tmp_path))
    assert not (tmp_path / "config.json").exists()


def test_torchs_generator_goes_on_where_it_was(tiny_data, tmp_path, monkeypatch):
    """No step draws from it today; here each draws three numbers, and they depend on those before."""
    drawn: list[list[float]] = []
    step = training_step.TrainingStep.__call__

    def and_draw(self, *arguments):
        drawn.append(torch.rand(3).tolist())
        return step(self, *arguments)

    monkeypatch.setattr(training_step.TrainingStep, "__call__", and_draw)
    training.train(tiny_config(tiny_data, tmp_path / "whole"))
    undisturbed, drawn[:] = drawn[:], []
    config = tiny_config(tiny_data, tmp_path / "stopped")
    stopped_after(3, monkeypatch, config)
    torch.manual_seed(99)
    training.train(dataclasses.replace(config, resume=True))
    assert len(undisturbed) == 6 and drawn == undisturbed
    assert differences(outcome(config.output), outcome(tmp_path / "whole")) == []


@pytest.mark.parametrize("spelling", ["--resume", "resume=yes", "--resume=1", "--no-resume=0", "resume=True"])
def test_every_spelling_of_resume_takes_the_runs_own_settings(tiny_data, tmp_path, spelling):
    run = tiny_config(tiny_data, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(as_json(run)))
    (found,) = starting_points(["--output", str(tmp_path), spelling]).values()
    assert found == run
    assert len(starting_points(["--output", str(tmp_path), spelling, "--no-resume"])) > 1
