"""benchmarks/learning.py: what it asks of models.train, how it goes on, and its table; without training anything."""

import json
from pathlib import Path

import pytest

from benchmarks import learning
from models.command_line import parse
from models.config_backbones import BACKBONES
from models.config_files import starting_points
from models.recipes import TrainConfig

PAGE = Path(__file__).parent.parent / "docs/learning.md"


@pytest.fixture
def clean_tree(monkeypatch):
    """A commit without changes."""
    monkeypatch.setattr(learning, "_git", lambda command, *_: "0123abc" if command == "describe" else "")


def configuration(options: list[str]) -> TrainConfig:
    return parse(TrainConfig, options, "train", [], starting_points(options))


def test_rows_differ_in_what_they_are_called_and_share_the_budget():
    found = {row: configuration([*o, *learning.budget(250)]) for row, o in learning.ROWS.items()}
    shared = {(c.batch_size, c.max_iterations, c.epochs, c.decay_epochs, c.warmup_iterations) for c in found.values()}
    assert shared == {(4, 250, 1, (0.4, 0.475), 25)}
    assert {(c.optimizer, c.resize, c.data, c.detector.channels) for c in found.values()} == {
        (found["SCNet"].optimizer, None, None, 32)
    }
    archs = ["mask_rcnn", "cascade_mask_rcnn", "htc", "htc", "scnet", "scnet", "mask_rcnn", "mask_rcnn"]
    assert [c.arch for c in found.values()] == archs
    assert [c.semantic for c in found.values()][2:6] == ["no", "yes", "no", "yes"]
    plain, calibrated = (c.detector.backbone for c in list(found.values())[6:])
    assert (plain.block, calibrated.block) == ("bottleneck", "self_calibrated")
    assert (plain.layers, plain.width) == (calibrated.layers, calibrated.width) == ((2, 2, 2, 2), 32)
    assert found["Mask R-CNN"].detector.backbone == BACKBONES["resnet18_narrow"]


def made_up(options: list[str]) -> dict:
    seed = int(options[-1].removeprefix("--seed="))
    ap = 0.1 + 0.01 * seed + 0.1 * ("--arch=scnet" in options)
    return {"box_ap": ap, "mask_ap": ap / 2, "cpu_seconds": 60.0, "seconds": 90.0, "images": 300, "millions": 3.1}


def test_it_goes_on_behind_what_is_done(clean_tree, monkeypatch, tmp_path):
    asked = []

    def train(options):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(options)
        return made_up(options)

    with pytest.raises(KeyboardInterrupt):
        learning.train_all(tmp_path / "r.json", train)
    assert len(json.loads((tmp_path / "r.json").read_text())["runs"]) == 3
    rest = []
    learning.train_all(tmp_path / "r.json", lambda options: rest.append(options) or made_up(options))
    everything = [
        [*o, *learning.budget(learning.STEPS), f"--seed={seed}"] for seed in (0, 1, 2) for o in learning.ROWS.values()
    ]
    assert asked + rest == everything
    learning.train_all(tmp_path / "r.json", lambda options: pytest.fail("all is done"))
    with pytest.raises(SystemExit, match="is of another steps, budget; move it away"):
        learning.train_all(tmp_path / "r.json", made_up, steps=2000)
    assert {"--epochs=4", "--decay-epochs=3.2,3.8", "--warmup-iterations=200"} <= set(learning.budget(2000))
    monkeypatch.setattr(learning, "_git", lambda *command: " M models/train.py")
    with pytest.raises(SystemExit, match="commit first"):
        learning.train_all(tmp_path / "r.json", made_up)


def test_the_table(clean_tree, tmp_path):
    learning.train_all(tmp_path / "r.json", made_up)
    document = json.loads((tmp_path / "r.json").read_text())
    lines = learning.table(document).splitlines()
    assert "seeds 0, 1, 2; AP on 300 validation images" in lines[0] and "commit 0123abc" in lines[0]
    assert lines[4] == "| Mask R-CNN | 3 | 3.1 M | 0.110 | 0.100 to 0.120 | 0.055 | 0.050 to 0.060 | 60 s |"
    assert lines[9].startswith("| SCNet | 3 | 3.1 M | **0.210** | 0.200 to 0.220 | **0.105** |") and len(lines) == 12
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- learning: table -->\nold\n<!-- /learning -->\nafter\n")
    learning.main(["--results", str(tmp_path / "r.json"), "--rewrite", str(page)])
    assert "| SCNet |" in page.read_text() and "old" not in page.read_text() and page.read_text().endswith("after\n")
    document["runs"] = [run for run in document["runs"] if "SCNet" not in run["row"] or run["seed"] == 2]
    document["runs"] = [run for run in document["runs"] if run["row"] != "HTC"]
    lines = learning.table(document).splitlines()
    assert (
        lines[9].startswith("| SCNet | 1 of 3 | 3.1 M | 0.220 |") and lines[7] == "| HTC | 0 of 3 |  |  |  |  |  |  |"
    )
    assert lines[4].startswith("| Mask R-CNN | 3 | 3.1 M | **0.110** |")
    with pytest.raises(SystemExit, match="no section"):
        learning.rewritten("no marks", document)


def test_the_page_shows_the_stored_results():
    document = json.loads(learning.STORED.read_text())
    assert (document["rows"], document["budget"]) == (learning.ROWS, learning.budget(document["steps"]))
    assert learning.rewritten(PAGE.read_text(), document) == PAGE.read_text(), (
        "python -m benchmarks.learning --rewrite docs/learning.md"
    )
