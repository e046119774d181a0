"""Several splits as one data set: VOC 2007 and 2012, COCO 2014's train and valminusminival."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from test_voc import write_voc
from tiny_runs import tiny_config, write_tiny_data

from models.data import CocoDataset, VocDataset, open_dataset, training_loader
from models.errors import DataError
from models.recipes import presets
from models.training import train

OF_2007 = {"000005": [("dog", (1, 1, 40, 30), 0)], "000007": [("cat", (5, 6, 30, 20), 0), ("dog", (9, 9, 20, 20), 1)]}


@pytest.fixture
def devkit(tmp_path):
    root = tmp_path / "VOCdevkit"
    write_voc(root, 2012)
    folder = write_voc(root, 2007, OF_2007)
    shutil.copy(folder / "ImageSets/Main/val.txt", folder / "ImageSets/Main/test.txt")
    return root


def test_two_years_of_voc(devkit):
    joined = open_dataset(devkit, "trainval2007+trainval2012", training=True, boxes_only=True)
    parts = [VocDataset(devkit / f"VOC{year}", "trainval", True, boxes_only=True) for year in (2007, 2012)]
    assert len(joined) == 4 and joined.split == "trainval+trainval"
    assert [joined.image_info(i).image_id for i in range(4)] == [5, 7, 2007000027, 2007000032]
    assert joined.images_left_out == {"no annotation": 1} and joined.objects_left_out == {"a difficult object": 2}
    assert np.array_equal(joined.sizes, np.concatenate([part.sizes for part in parts]))
    for index, (part, inside) in enumerate([(parts[0], 0), (parts[0], 1), (parts[1], 0), (parts[1], 1)]):
        assert np.array_equal(joined.image(index), part.image(inside))
        ours, theirs = joined.sample(index, (20, 30)), part.sample(inside, (20, 30))
        assert np.array_equal(ours.image, theirs.image) and np.array_equal(ours.boxes, theirs.boxes)
        assert ours.image_id == theirs.image_id
    batches = [batch.gt_labels[batch.gt_labels >= 0].tolist() for batch in training_loader(joined, 2, seed=0)]
    assert sorted(label for labels in batches for label in labels) == [0, 7, 11, 11]
    truth = joined.ground_truth()
    assert [entry["id"] for entry in truth["annotations"]] == [1, 2, 3, 4, 5, 6] and len(truth["images"]) == 5
    assert joined.voc is None  # they are scored differently
    assert open_dataset(devkit, "test2007", boxes_only=True).voc.eleven_points


def test_masks_of_two_years(devkit):
    joined = open_dataset(devkit, "voc_2007_val+voc_2012_val")
    assert [int(joined.mask(i, 0).sum()) for i in range(4)] == [38 * 28, 24 * 13 - 12 * 11, 18 * 18, 18 * 8]
    assert joined.objects(3)[0].tolist() == [[0, 0, 19, 9]]


@pytest.mark.parametrize("names", [("img_a", "img_b", "img_c"), ("1_0", "10", "9"), ("sub/a", "sub/b", "c")], ids=str)
def test_parts_of_a_voc_folder_whose_names_are_no_numbers(tmp_path, names):
    flat = [name.removeprefix("sub/") for name in names]
    folder = write_voc(tmp_path, objects_of=dict.fromkeys(flat, OF_2007["000005"]))
    for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        (folder / kind / "sub").mkdir()
        for name, stem in zip(names, flat, strict=True):
            (folder / kind / f"{stem}.{suffix}").rename(folder / kind / f"{name}.{suffix}")
    lists = {"train": names[1:2], "val": names[:1], "test": names[2:], "twice": names[:1] * 2, "none": ("gone",)}
    for split, listed in lists.items():
        (folder / f"ImageSets/Main/{split}.txt").write_text("\n".join(listed))
    joined = open_dataset(folder, "train+val+test", boxes_only=True)
    infos = [joined.image_info(i) for i in range(3)]
    assert [info.file_name for info in infos] == [f"{names[i]}.jpg" for i in (1, 0, 2)]
    alone = [VocDataset(folder, split, boxes_only=True).image_info(0).image_id for split in ("train", "val", "test")]
    assert [info.image_id for info in infos] == alone and len(set(alone)) == 3
    with pytest.raises(DataError, match="share images"):
        open_dataset(folder, "train+train", boxes_only=True)
    with pytest.raises(DataError, match="an id is used twice"):
        VocDataset(folder, "twice", boxes_only=True)
    with pytest.raises(DataError, match=r"cannot be read\n.*gone.xml"):
        VocDataset(folder, "none", boxes_only=True)


def test_two_years_whose_names_are_no_numbers(tmp_path):
    for year in (2007, 2012):
        write_voc(tmp_path, year, dict.fromkeys(("img_a", "img_b"), OF_2007["000005"]))
    joined = open_dataset(tmp_path, "trainval2007+trainval2012", boxes_only=True)
    ids = [joined.image_info(index).image_id for index in range(len(joined))]
    assert ids == [2007000000001, 2007000000002, 2012000000001, 2012000000002]


def test_the_usual_recipe_of_voc_trains_on_both_years(devkit, tmp_path):
    recipe = presets("faster_rcnn")["voc"]
    assert (recipe.train_split, recipe.val_split) == ("trainval2007+trainval2012", "test2007")
    assert (recipe.epochs, recipe.decay_epochs, recipe.batch_size, recipe.optimizer.lr) == (12, (9,), 16, 0.01)
    tiny = tiny_config(devkit, tmp_path / "run", epochs=1, max_iterations=1)
    splits = {"train_split": recipe.train_split, "val_split": recipe.val_split}
    train(dataclasses.replace(tiny, **splits))
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert line["images"] == 2 and "voc_map" in line


@pytest.fixture
def coco(tmp_path):
    """COCO 2014 with the maps of COCO-stuff: other ids and images in valminusminival."""
    source, root = write_tiny_data(tmp_path / "source", val=3), tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    for split, name, folder in (("train", "train2014", "train2014"), ("val", "valminusminival2014", "val2014")):
        shutil.copytree(source / split, root / folder)
        content = json.loads((source / f"annotations/instances_{split}.json").read_text())
        for entry in [*content["images"], *content["annotations"]]:
            key = "image_id" if "image_id" in entry else "id"
            entry[key] += 1000 * (split == "val")
        (root / f"annotations/instances_{name}.json").write_text(json.dumps(content))
        (root / "stuffthingmaps" / folder).mkdir(parents=True)
        for number, path in enumerate(sorted((root / folder).iterdir())):
            Image.new("L", (32, 32), number).save(root / "stuffthingmaps" / folder / f"{path.stem}.png")
    return root


def test_cocos_splits_of_2014(coco):
    joined = open_dataset(coco, "train2014+valminusminival2014", training=True)
    parts = CocoDataset(coco, "train2014"), CocoDataset(coco, "coco_2014_valminusminival")
    assert len(joined) == 9 and joined.has_semantic and joined.num_semantic_classes == 6
    assert joined.image_info(7).image_id == 1011 and np.array_equal(joined.image(7), parts[1].image(1))
    assert np.array_equal(joined.semantic_map(7), parts[1].semantic_map(1)) and joined.semantic_map(7).max() == 1
    assert np.array_equal(joined.mask(6, 0), parts[1].mask(0, 0))
    batch = next(iter(training_loader(joined, 9, seed=0)))
    assert sorted(batch.semantic.amax((1, 2)).tolist()) == [0, 0, 1, 1, 2, 2, 3, 4, 5]


def test_what_does_not_go_together_is_refused(coco):
    with pytest.raises(DataError, match=r"share images[\s\S]*6 image ids are in more than one part, the first is 10"):
        open_dataset(coco, "train2014+train2014")
    shutil.rmtree(coco / "stuffthingmaps/val2014")
    with pytest.raises(DataError, match=r"some parts have no stuff maps[\s\S]*only train2014[\s\S]*--semantic no"):
        open_dataset(coco, "train2014+valminusminival2014")
    assert not open_dataset(coco, "train2014+valminusminival2014", semantic="no").has_semantic
    path = coco / "annotations/instances_valminusminival2014.json"
    path.write_text(path.read_text().replace('"green"', '"blue"'))
    with pytest.raises(DataError, match=r"parts of the data set have different classes[\s\S]*2 green +2 blue"):
        open_dataset(coco, "train2014+valminusminival2014", semantic="no")
