"""Layouts that groups have on their disks, checked and trained on: LVIS with 1,203 classes; COCO with COCO-stuff."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny_runs import tiny_config, write_tiny_data

from models import recipes
from models.data import CocoDataset, open_dataset
from models.data.check import check_dataset
from models.images import read_label_map
from models.training import train

CLASSES = 1203


@pytest.fixture
def lvis(tmp_path):
    """LVIS's own form: images are named by their address, and the files say which classes were looked for."""
    source, root = write_tiny_data(tmp_path / "source"), tmp_path / "lvis"
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        shutil.copytree(source / split, root / f"{split}2017")
        content = json.loads((source / f"annotations/instances_{split}.json").read_text())
        content["categories"] = [{"id": i, "name": f"thing_{i}", "frequency": "r"} for i in range(1, CLASSES + 1)]
        for image in content["images"]:
            image["coco_url"] = f"http://images.cocodataset.org/{split}2017/{image.pop('file_name')}"
            image |= {"not_exhaustive_category_ids": [], "neg_category_ids": [5]}
        for annotation in content["annotations"]:
            annotation["category_id"] = CLASSES - annotation["category_id"]
            del annotation["iscrowd"]  # LVIS has no crowds
        (root / f"annotations/lvis_v1_{split}.json").write_text(json.dumps(content))
    return root


def test_1203_classes_are_trained_and_evaluated(lvis, tmp_path):
    tiny = tiny_config(lvis, tmp_path / "run", epochs=1, max_iterations=1)
    small = {name: getattr(tiny.detector, name) for name in ("backbone", "channels", "box_channels", "rpn")}
    detector = dataclasses.replace(recipes.small("mask_rcnn").detector, **small, num_samples=8, mask_convs=1)
    train(dataclasses.replace(tiny, arch="mask_rcnn", detector=detector))
    config = json.loads((tmp_path / "run/config.json").read_text())
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert config["detector"]["num_classes"] == CLASSES and line["images"] == 2
    assert {name for name in line if name.startswith("mask_ap/")} == {"mask_ap/thing_1201", "mask_ap/thing_1202"}


def test_lvis_is_checked_and_mended(lvis, tmp_path):
    assert check_dataset(lvis)[0].all == []
    path = lvis / "annotations/lvis_v1_train.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["category_id"] = CLASSES + 1
    content["images"][1]["coco_url"] = "http://images.cocodataset.org/../secret.png"
    path.write_text(json.dumps(content))
    findings, _ = check_dataset(lvis, fix=tmp_path / "copy")
    names = {finding.kind: finding.image for finding in findings.all}
    assert names["annotation of an unknown category"] == "train2017/0.png"
    assert names["image outside its folder"] == "../secret.png"
    assert check_dataset(tmp_path / "copy")[0].all == []
    copy = CocoDataset(tmp_path / "copy", "train")
    assert len(copy) == 5 and copy.num_classes == CLASSES and copy.image(0).shape == (32, 32, 3)


@pytest.fixture(params=["2017", "2014"])
def coco(tmp_path, request):
    """(folder, year) in COCO's layout with COCO-stuff's maps; 2014 has minival, whose images lie in val2014."""
    source, root, year = write_tiny_data(tmp_path / "source"), tmp_path / "coco", request.param
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        shutil.copytree(source / split, root / f"{split}{year}")
        name = "minival2014" if (split, year) == ("val", "2014") else split + year
        shutil.copy(source / f"annotations/instances_{split}.json", root / f"annotations/instances_{name}.json")
        maps = root / "stuffthingmaps" / f"{split}{year}"
        maps.mkdir(parents=True)
        for path in (root / f"{split}{year}").iterdir():
            Image.new("L", (32, 32), 7).save(maps / f"{path.stem}.png")
    return root, year


def test_coco_with_stuff_is_checked_and_mended(coco, tmp_path):
    root, year = coco
    validation = "minival2014" if year == "2014" else "val"
    findings, folders = check_dataset(root, fix=tmp_path / "same")
    assert findings.all == [] and {path.name for path in folders.values()} == {f"train{year}", f"val{year}"}
    for path in [path for path in root.rglob("*") if path.is_file()]:
        same = (tmp_path / "same" / path.relative_to(root)).read_bytes()
        assert same == path.read_bytes() or json.loads(same) == json.loads(path.read_text()), path
    maps = root / "stuffthingmaps" / f"train{year}"
    (maps / "0.png").unlink()
    Image.new("L", (31, 32)).save(maps / "1.png")
    (maps / "2.png").write_bytes((maps / "3.png").read_bytes()[:-30])
    Image.new("RGB", (32, 32)).save(maps / "4.png")
    findings, _ = check_dataset(root, fix=tmp_path / "copy")
    assert findings.serious and {finding.kind for finding in findings.all} == {"unusable stuff map"}
    assert sorted(finding.image for finding in findings.all) == ["0.png", "1.png", "2.png", "4.png"]
    assert check_dataset(root, quick=True)[0].counts["unusable stuff map"] == 2  # sizes and missing ones
    copy = open_dataset(tmp_path / "copy", "train", training=True)
    assert len(copy) == 6 and copy.has_semantic and open_dataset(tmp_path / "copy", validation).has_semantic
    for name in ("0", "1", "2", "4"):
        assert np.all(read_label_map(tmp_path / f"copy/stuffthingmaps/train{year}/{name}.png") == 255)
    assert os.path.samefile(maps / "3.png", tmp_path / f"copy/stuffthingmaps/train{year}/3.png")
    assert copy.semantic_map(3).tolist() == [[7] * 32] * 32
