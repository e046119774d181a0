"""The conversion program: whose weights, what became of each tensor, and a file that loads by itself."""

import contextlib
import io
import os
import subprocess

import numpy as np
import pytest
import torch
from golden_cases import golden_state
from program_cases import run_program
from test_weight_sources import tiny, to_mmdetection
from weight_files import to_mmdetection_1, to_torchvision

import models
from models.coco_classes import COCO_CLASSES
from models.command_line import run
from models.convert import EXAMPLES, Convert, main
from models.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(1)
    return tiny(num_classes=80)


def convert(*arguments: object) -> subprocess.CompletedProcess:
    """The program in this process, which has imported torch already."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), pytest.raises(SystemExit) as stop:
        run(Convert, main, examples=EXAMPLES, arguments=[str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, stop.value.code, out.getvalue(), error.getvalue())


def lines(process) -> dict[str, str]:
    """{first words: the rest} of the account."""
    assert process.returncode == 0, process.stderr
    return {line[:21].strip(): line[22:] for line in process.stdout.splitlines()}


def test_mmdetections_weights_become_a_file_that_loads_by_itself(folder, detector):
    state = to_mmdetection(detector.state_dict())
    torch.save({"state_dict": state, "optimizer": {"state": {}}, "meta": {"epoch": 1}}, folder / "a.pth")
    account = lines(convert(folder / "a.pth", "--output", folder / "a.safetensors"))
    assert account["recognised as"] == "mmdetection 2.x or 3.x"
    assert account["tensors loaded"] == str(len(state))
    assert account["renamed"] == str(sum(not key.startswith("backbone.") for key in state))
    assert account["left out"] == "2: optimizer, meta: a part of the training state"
    assert account["detector"] == "mask_rcnn, resnet18_narrow"
    loaded, facts = models.load_detector(folder / "a.safetensors")
    for key, value in detector.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert facts["class_names"][:2] == ["person", "bicycle"]
    assert facts["category_ids"] == list(COCO_CLASSES)
    assert facts["extra"]["source"] == "mmdetection 2.x or 3.x"


def test_class_names_come_from_the_file_or_from_a_list(folder):
    state = to_mmdetection(tiny().state_dict())
    torch.save({"state_dict": state, "meta": {"CLASSES": ("cat", "dog")}}, folder / "b.pth")
    lines(convert(folder / "b.pth", "--output", folder / "b.safetensors"))
    assert models.load_detector(folder / "b.safetensors")[1]["class_names"] == ["cat", "dog"]
    (folder / "names.txt").write_text("disc\nstar\n")
    names = ["--class-names", folder / "names.txt"]
    lines(convert(folder / "b.pth", "--output", folder / "b.safetensors", *names))
    assert models.load_detector(folder / "b.safetensors")[1]["class_names"] == ["disc", "star"]
    (folder / "names.txt").write_text("disc\n")
    process = convert(folder / "b.pth", "--output", folder / "b.safetensors", *names)
    assert (process.returncode, "1 names, 2 classes" in process.stderr) == (3, True)


def test_arithmetic_is_stored(folder, detector):
    torch.save(to_torchvision(to_mmdetection(detector.state_dict())), folder / "c.pth")
    command = [folder / "c.pth", "--output", folder / "c.safetensors"]
    account = lines(convert(*command))
    assert account["config.arithmetic"] == "'torchvision', as torchvision detector has it"
    assert account["config.backbone.norm"] == "'fixed_batch', as torchvision detector has it"
    loaded, _ = models.load_detector(folder / "c.safetensors")
    assert loaded.config.arithmetic == "torchvision"
    assert (loaded.config.backbone.norm, loaded.config.backbone.norm_eps) == ("fixed_batch", 0.0)
    assert torch.equal(loaded.box_head.class_logits.weight, detector.box_head.class_logits.weight)
    with pytest.raises(DataError, match=r"config.backbone.norm_eps must be 0.0"):
        models.load_weights(tiny(num_classes=80), folder / "c.safetensors")


def test_transformed_rows_are_counted(folder, detector):
    torch.save(to_mmdetection_1(to_mmdetection(detector.state_dict())), folder / "d.pth")
    command = [folder / "d.pth", "--output", folder / "d.safetensors"]
    process = convert(*command)
    assert process.returncode == 0, process.stderr
    for text in ("background row moved from first to last", "the background's 4 rows left out"):
        assert f"  transformed         2: {text}\n" in process.stdout


def test_a_backbone_stays_one(folder, detector):
    state = {key[9:]: value for key, value in detector.state_dict().items() if key.startswith("backbone.")}
    torch.save(state, folder / "e.pth")
    account = lines(convert(folder / "e.pth", "--output", folder / "e.safetensors"))
    assert account["written"].endswith("a backbone's weights")
    other = tiny().backbone
    models.load_weights(other, folder / "e.safetensors")
    assert torch.equal(other.layer1[0].conv1.weight, detector.backbone.layer1[0].conv1.weight)


@pytest.mark.parametrize(
    ("arguments", "code", "texts"),
    [
        (["--output", "x.safetensors"], 2, ["no file is named"]),
        (["nowhere.pth", "--output", "x.safetensors"], 3, ["no such weights file", "python -m models.weights"]),
        ([__file__, "--output", "x.safetensors"], 3, ["not a weights file that can be read", "it starts with"]),
    ],
)
def test_mistakes_are_answered_without_a_traceback(arguments, code, texts):
    process = convert(*arguments)
    assert process.returncode == code
    assert process.stderr.startswith("error: ") and "Traceback" not in process.stderr
    for text in texts:
        assert text in process.stderr


def test_the_program_by_its_name():
    process = run_program("convert", "--output", "x.safetensors")
    assert process.returncode == 2
    assert "error: no file is named\n" in process.stderr
    assert "fix:   python -m models.convert weights.pth --output" in process.stderr


def test_our_own_file_needs_no_conversion(folder, detector):
    models.save_weights(folder / "ours.safetensors", detector, ["a"] * 80, list(range(80)))
    process = convert(folder / "ours.safetensors", "--output", folder / "x.safetensors")
    assert (process.returncode, "ours already" in process.stderr) == (2, True)


@pytest.mark.skipif("CASCADEOPS_GOLDENS" not in os.environ, reason="needs CASCADEOPS_GOLDENS")
def test_a_whole_scnet_detects_the_same_after_conversion(tmp_path):
    state = golden_state("scnet_r50_fpn_1x")
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "scnet.pth")
    account = lines(convert(tmp_path / "scnet.pth", "--output", tmp_path / "scnet.safetensors"))
    assert (account["detector"], account["tensors loaded"]) == ("scnet, resnet50", "426")
    converted, _ = models.load_detector(tmp_path / "scnet.safetensors")
    direct = models.build_detector("scnet")
    models.load_weights(direct, state)
    image = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    first, second = models.predict(direct, image), models.predict(converted, image)
    assert len(first.boxes) > 0
    assert torch.equal(first.boxes, second.boxes) and torch.equal(first.scores, second.scores)
    assert first.masks == second.masks
