"""docs/scaling.md: its tables are those of scripts/scaling.py, and what can be counted here is counted."""

import importlib.util
from pathlib import Path

import pytest
import torch

from models.build import build_from_config
from models.published_rows import PUBLISHED_ROWS

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("scaling", ROOT / "scripts/scaling.py")
scaling = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scaling)


def test_the_tables_are_computed():
    text = scaling.PAGE.read_text()
    assert text.count("| ---") >= len(scaling.TABLES)
    assert scaling.page(text) == text, "python scripts/scaling.py --write"


@pytest.mark.parametrize("name", scaling.TRAINED)
def test_trained_parameters(name):
    recipe = PUBLISHED_ROWS[name].recipe
    with torch.device("meta"):
        detector = build_from_config(recipe.arch, recipe.detector)
    assert sum(p.numel() for p in detector.parameters() if p.requires_grad) == scaling.TRAINED[name]


def test_the_size_of_a_checkpoint_is_weights_and_momentum():
    """And norms' statistics, names, the manifest: a share of a thousandth."""
    assert 1 < scaling.CHECKPOINT_BYTES / (8 * scaling.TRAINED["htc_r50_fpn_1x_coco"]) < 1.003


def test_all_reduce_by_hand():
    """8 GPUs of a machine: 7/8 of the bytes twice. 16 in two machines: besides, an eighth of them over the network."""
    assert scaling.all_reduce(450e9, 8) == pytest.approx(1.75)
    assert scaling.all_reduce(450e9, 16) == pytest.approx(1.75 + 450 / 8 / 50, rel=1e-4)


def test_from_where_on_the_evaluation_takes_longer_than_the_epoch():
    longer = [gpus for gpus in scaling.GPUS if scaling.evaluation_seconds(gpus) > scaling.epoch_seconds(gpus)]
    assert longer == [128, 256, 1000]
    assert f"From {longer[0]} GPUs on, the evaluation" in " ".join(scaling.PAGE.read_text().split())


def test_measured_figures_are_those_of_the_other_pages():
    page = scaling.PAGE.read_text()
    data, performance = (ROOT / "docs/data.md").read_text(), (ROOT / "docs/performance.md").read_text()
    assert f"rest is `Batch.prepared` on the device | {scaling.LOADER_IMAGES} |" in data
    assert all(f"{measured} s" in text for text in (data, page) for measured in ("11.3 to 11.4", "24.1 to 29.6"))
    assert f"| ours, 5,000 images | {scaling.RESULTS_SECONDS} s |" in performance
    assert all(f"{seconds} s" in performance for seconds in scaling.AP_SECONDS.values())
