"""The README's Python examples run as they are printed, and its commands exist."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from program_cases import CLASS_NAMES, write_weights

import models
from models import recipes

README = (Path(__file__).parent.parent / "README.md").read_text()
MODELS, CUSTOM_DATA, OPERATORS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_models_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs/scnet-small").mkdir(parents=True)
    write_weights(Path("runs/scnet-small/weights.safetensors"))
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("street.jpg")
    torch.save(models.build_detector("scnet").state_dict(), "scnet_r50_fpn_1x_coco.pth")
    names: dict = {}
    code = MODELS.replace("from cascadeops import models", "import models")
    exec(code.replace("result.scores > 0.5", "result.scores > 0"), names)  # untrained weights are sure of nothing
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(names["result"]) == len(names["result"].masks) > 0
    assert all(line.split()[0] in " ".join(CLASS_NAMES) for line in lines)
    assert Image.open("found.jpg").size == (128 * 5, 96 * 5)
    assert sum(parameter.numel() for parameter in names["detector"].parameters()) == 94_799_269


def test_the_custom_data_example(tmp_path, monkeypatch):
    """As it is printed, but for a smaller detector and one step."""
    monkeypatch.chdir(tmp_path)
    short = dataclasses.replace(recipes.tiny(), max_iterations=1)
    monkeypatch.setattr(recipes, "presets", lambda arch: {"small": short})
    exec(CUSTOM_DATA.replace("from cascadeops import models", "import models"), {})
    assert models.Predictor("runs/blocks/weights.safetensors", device="cpu").class_names == ("block",)


def test_the_operators_example():
    """The last three lines that are expressions give what their comments say."""
    names: dict = {}
    claims = []
    for line in OPERATORS.splitlines():
        code, _, comment = line.partition("  # ")
        if code.startswith(("index[", "cascadeops.")):
            claims.append((eval(code, names), comment.strip()))
        else:
            exec(line, names)
    (kept, shape, encodings), comments = zip(*claims, strict=True)
    assert comments[0] == f"tensor({kept.tolist()})"
    assert comments[1] == str(list(shape))
    assert list(encodings[0]) == ["size", "counts"] and encodings[0]["size"] == [800, 1216]


@pytest.mark.parametrize("program", ["train", "evaluate", "predict", "data"])
def test_the_commands_name_programs_and_options_that_exist(program):
    commands = re.findall(rf"python -m models\.{program} (.*)", README)
    assert commands
    source = "".join(path.read_text() for path in (Path(models.__file__).parent).rglob("*.py"))
    for option in re.findall(r"--([a-z-]+)", " ".join(commands)):
        assert re.search(rf"\b{option.replace('-', '_')}:", source), option
