"""How the weights are changed: the rate and its scaling, the average of the weights, the parts of a step."""

import dataclasses

import pytest
import torch
from tiny_runs import differences, outcome, tiny_config

from models.checkpoint import load_detector
from models.command_line import parse
from models.errors import UsageError
from models.optimization import averaged_weights, learning_rate, make_optimizer, scaled
from models.published_rows import PUBLISHED_ROWS, presets_for
from models.recipes import OptimizerConfig, TrainConfig, small
from models.training import train


def parsed(*arguments: str) -> TrainConfig:
    return parse(TrainConfig, arguments, "train", (), presets_for(None, "htc") if "htc" in arguments else None)


def test_every_number_is_an_option():
    config = parsed("--arch", "htc", "--optimizer.lr", "0.01", "optimizer.momentum=0.8", "--detector.rpn.top-k=77")
    assert (config.optimizer.lr, config.optimizer.momentum, config.detector.rpn.top_k) == (0.01, 0.8, 77)
    assert config.optimizer.weight_decay == 1e-4


@pytest.mark.parametrize(
    ("argument", "near"),
    [
        ("--optimizer.lrr", "--optimizer.lr"),
        ("--optimiser.lr", "--optimizer.lr"),
        ("--lr", "--optimizer.lr"),
        ("--momentum", "--optimizer.momentum"),
        ("--optimizer.weight-decai", "--optimizer.weight-decay"),
        ("--acumulate", "--accumulate"),
    ],
)
def test_an_unknown_one_is_answered_with_the_nearest(argument, near):
    with pytest.raises(UsageError) as error:
        parsed("--arch", "htc", argument, "1")
    assert error.value.what == "unknown option" and near in error.value.why.replace(",", "").split()


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("optimizer.lr", "0", "optimizer.lr must be positive, got 0.0"),
        ("accumulate", "0", "accumulate must be at least 1, got 0"),
        ("ema_decay", "1", r"ema_decay must be in \[0, 1\), got 1.0"),
        ("rank_timeout", "0", "rank_timeout must be positive, got 0.0"),
        ("rank_timeout", "inf", "rank_timeout must be a finite number, got inf"),
        ("optimizer.lr", "nan", "optimizer.lr must be a finite number, got nan"),
        ("optimizer.momentum", "-1", "optimizer.momentum must be at least 0, got -1.0"),
        ("detector.rpn.smooth_l1_beta", "nan", r"detector\.rpn\n.* smooth_l1_beta must be 0 to 1,000,000, got nan"),
        ("detector.backbone.width", "-1", r"detector\.backbone\n.* width must be 1 to 1,000,000, got -1"),
        ("max_iterations", "-1", "max_iterations must be at least 1, got -1"),
        ("max_evaluation_images", "0", "max_evaluation_images must be at least 1, got 0"),
        ("workers", "-1", "workers must be at least 0, got -1"),
    ],
)
def test_values_that_make_no_sense_are_refused(name, value, text):
    with pytest.raises(UsageError, match=text):
        parsed("--arch", "htc", f"{name}={value}")


def test_no_warm_up_is_none():
    recipe = dataclasses.replace(small("scnet"), warmup_iterations=0)
    assert [learning_rate(recipe, step, 250) for step in (0, 1, 949, 950, 1150)] == pytest.approx(
        [0.03, 0.03, 0.03, 0.003, 0.0003]
    )


@pytest.mark.parametrize(("batch", "expected"), [(16, 0.02), (8, 0.01), (64, 0.08)])
def test_the_rate_is_scaled_with_the_batch_on_request(batch, expected):
    recipe = dataclasses.replace(PUBLISHED_ROWS["htc_r50_fpn_1x_coco"].recipe, batch_size=batch)
    assert scaled(recipe) == recipe
    asked = scaled(dataclasses.replace(recipe, auto_scale_lr=True))
    assert asked.optimizer.lr == pytest.approx(expected)
    assert scaled(asked) == asked, "what was scaled is not scaled again, when a run is continued"
    assert learning_rate(asked, 0, 7330) == pytest.approx(expected * 0.001)
    assert scaled(dataclasses.replace(small("scnet"), auto_scale_lr=True)).optimizer.lr == 0.03


def test_the_average_of_the_weights():
    """Against its definition, in float64."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    averaged = averaged_weights(module, 0.25)
    expected = {}
    for step in range(6):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
        module[1].running_mean.fill_(step)
        averaged.update_parameters(module)
        keep = min(0.25, (1 + step) / (10 + step)) if step else 0.0
        for name, value in module.named_parameters():
            expected[name] = keep * expected.get(name, 0.0) + (1 - keep) * value.detach().double()
    for name, value in averaged.module.named_parameters():
        torch.testing.assert_close(value.detach().double(), expected[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(averaged.module[1].running_mean, module[1].running_mean)


def test_the_average_is_what_a_run_evaluates_and_writes(tiny_data, tmp_path):
    config = tiny_config(tiny_data, tmp_path / "run", ema_decay=0.9, evaluate_every=0)
    train(dataclasses.replace(config, max_iterations=4))
    train(dataclasses.replace(config, resume=True))
    train(dataclasses.replace(config, output=tmp_path / "whole"))
    names = differences(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))
    assert [name for name in names if "metrics" not in name] == []  # the first part was evaluated, too
    tensors = outcome(tmp_path / "run")["tensors"]
    written = load_detector(tmp_path / "run" / "weights.safetensors")[0].state_dict()
    for name, value in written.items():
        assert torch.equal(value, tensors[f"averaged/module.{name}"]), name
    assert any(not torch.equal(value, tensors[f"detector/{name}"]) for name, value in written.items())


def test_parts_of_a_step_are_means_of_their_losses(tiny_data, tmp_path):
    """Two images whose losses have the same counts: the gradient of the parts is that of the whole."""
    runs = {}
    for accumulate in (1, 2):
        config = tiny_config(
            tiny_data, tmp_path / str(accumulate), accumulate=accumulate, max_iterations=1, evaluate_every=0
        )
        backbone = dataclasses.replace(config.detector.backbone, norm="frozen_batch")
        train(dataclasses.replace(config, detector=dataclasses.replace(config.detector, backbone=backbone)))
        runs[accumulate] = outcome(tmp_path / str(accumulate))
    whole, parts = (runs[n]["metrics"][0] for n in (1, 2))
    for name in ("loss_rpn_objectness", "loss_class"):  # their counts are the samples of an image, always as many
        assert parts[name] == pytest.approx(whole[name], rel=1e-5)


def test_a_batch_that_cannot_be_shared_is_refused(tiny_data, tmp_path):
    with pytest.raises(UsageError, match="3 parts: 1 process times --accumulate 3"):
        train(tiny_config(tiny_data, tmp_path, accumulate=3))


def test_biases_may_have_a_rate_and_a_decay_of_their_own():
    config = dataclasses.replace(small("scnet"), optimizer=OptimizerConfig(bias_lr=2.0, bias_weight_decay=0.0))
    weights, biases = make_optimizer(config, torch.nn.Linear(2, 2)).param_groups
    assert (weights["multiple"], weights["weight_decay"]) == (1.0, 1e-4)
    assert (biases["multiple"], biases["weight_decay"]) == (2.0, 0.0)
