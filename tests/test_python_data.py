"""Custom data: a folder with any classes by --data alone, a data set of a few lines of Python, and class tables that
do not agree."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from program_cases import write_data
from pycocotools import mask as mask_api

import models
from models.classes import check_same_classes
from models.config import RPNConfig
from models.data import CocoDataset, PythonDataset, training_loader
from models.errors import DataError, UsageError


class Blocks:
    """Bright rectangles; masks in each of the four forms in turn."""

    class_names = ("low", "high block")

    def __init__(self, number: int = 4):
        self.number = number

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        height, width = (64, 96) if index % 2 == 0 else (96, 64)
        image = np.full((height, width, 3), 50, np.uint8)
        mask = np.zeros((height, width), np.uint8)
        mask[8:40, 16:48] = 1
        image[mask == 1] = (200, 60 * (index % 2), 30)
        forms = [
            mask[None],
            [mask.astype(bool)],
            [mask_api.encode(np.asfortranarray(mask))],
            [[[16, 8, 48, 8, 48, 40, 16, 40]]],
        ]
        return image, {"labels": [index % 2], "masks": forms[index % 4]}


def test_every_form_of_mask_is_the_same_mask_and_boxes_come_from_it():
    dataset = PythonDataset(Blocks(), "blocks")
    truth = dataset.ground_truth()
    assert [(a["bbox"], a["area"], a["category_id"]) for a in truth["annotations"]] == [
        ([16.0, 8.0, 32.0, 32.0], 1024, 1 + index % 2) for index in range(4)
    ]
    assert dataset.sizes.tolist() == [[64, 96], [96, 64]] * 2


def test_batches_are_those_of_the_same_data_as_a_coco_folder(tmp_path):
    folder = write_data(tmp_path / "coco")
    coco = CocoDataset(folder, "val", semantic="no", training=True)

    class Same:
        class_names, category_ids = coco.class_names, coco.category_ids

        def __len__(self):
            return len(coco)

        def __getitem__(self, index):
            boxes, labels = coco.objects(index)
            masks = [coco.mask(index, which) for which in range(len(labels))]
            return coco.image(index), {"boxes": boxes, "labels": labels, "masks": masks}

    ours, theirs = (
        next(iter(training_loader(dataset, 2, seed=3, resize=(64, 128))))
        for dataset in (PythonDataset(Same(), "same", training=True), coco)
    )
    for name in ("images", "image_sizes", "gt_boxes", "gt_labels"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.gt_masks.bitmaps, theirs.gt_masks.bitmaps)


def test_images_without_objects_are_for_evaluation_only():
    class WithEmpty(Blocks):
        def __getitem__(self, index):
            image, target = super().__getitem__(index)
            return (image, {"labels": [], "masks": []}) if index == 1 else (image, target)

    assert len(PythonDataset(WithEmpty(), "blocks")) == 4
    training = PythonDataset(WithEmpty(), "blocks", training=True)
    assert [training.image_info(index).image_id for index in range(len(training))] == [0, 2, 3]


IMAGE = np.zeros((8, 8, 3), np.uint8)
MASK = np.ones((8, 8), np.uint8)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (IMAGE, "an item must be"),
        ((IMAGE[:, :, 0], {}), "an item's image is not RGB"),
        ((IMAGE.astype(np.float32), {}), "an item's image is not RGB"),
        ((IMAGE, {"labels": [0]}), "other annotations than expected"),
        ((IMAGE, {"labels": [2], "masks": [MASK]}), "labels that are no classes"),
        ((IMAGE, {"labels": [0.5], "masks": [MASK]}), "labels that are no classes"),
        ((IMAGE, {"labels": [0, 1], "masks": [MASK]}), "not as many boxes, labels and masks"),
        ((IMAGE, {"labels": [0], "masks": [MASK[:4]]}), "a mask that cannot be used"),
        ((IMAGE, {"labels": [0], "masks": [MASK * 255]}), "a mask that cannot be used"),
        ((IMAGE, {"labels": [0], "masks": [{"size": [8, 8], "counts": b"zzz"}]}), "a mask that cannot be used"),
        ((IMAGE, {"labels": [0], "masks": [[[1, 1, 5, 5]]]}), "a mask that cannot be used"),
        ((IMAGE, {"labels": [0], "masks": [0 * MASK]}), "an object without any pixel"),
        ((IMAGE, {"labels": [0], "masks": [MASK], "boxes": [[4, 4, 4, 8]]}), "an object without any pixel"),
    ],
)
def test_items_that_are_wrong_are_named_before_training_starts(item, message):
    class Wrong(Blocks):
        def __getitem__(self, index):
            return item if index == 2 else super().__getitem__(index)

    with pytest.raises(DataError, match=message) as error:
        PythonDataset(Wrong(), "train_set")
    assert error.value.where == "train_set (Wrong), item 2"


def test_a_data_set_without_class_names_is_refused():
    with pytest.raises(UsageError, match="has to name its classes"):
        PythonDataset([], "train_set")


def config(output, **fields) -> models.TrainConfig:
    small = models.presets("scnet")["small"]
    detector = dataclasses.replace(
        small.detector,
        channels=16,
        box_channels=16,
        mask_blocks=1,
        num_samples=8,
        max_detections=5,
        rpn=RPNConfig(anchor_scale=4.0, top_k=40, top_k_training=40, max_proposals=20, max_proposals_training=20),
    )
    values = {"epochs": 1, "batch_size": 2, "max_iterations": 1, "detector": detector} | fields
    return dataclasses.replace(small, output=output, **values)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One step on the Python data set."""
    folder = tmp_path_factory.mktemp("run") / "blocks"
    models.train(config(folder), train_set=Blocks(4), val_set=Blocks(2))
    return folder


def test_a_python_data_set_is_trained_and_its_classes_travel_in_the_weights(run):
    predictor = models.Predictor(run / "weights.safetensors", device="cpu")
    assert (predictor.class_names, predictor.category_ids) == (("low", "high block"), (1, 2))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("box_ap/high block" in line for line in metrics) and (run / "detections.png").exists()


def test_fine_tuning_on_other_classes_shows_both_tables(run, tmp_path):
    class Others(Blocks):
        class_names = ("low", "tall block")

    fine_tuned = config(tmp_path / "out", weights=run / "weights.safetensors")
    with pytest.raises(DataError, match="the weights know other classes than the data") as error:
        models.train(fine_tuned, train_set=Others(), val_set=Others())
    assert error.value.why.splitlines()[1:] == ["label  weights       data", "    1  2 high block  2 tall block"]
    models.train(dataclasses.replace(fine_tuned, output=tmp_path / "same"), Blocks(2), Blocks(2))


def test_the_backbone_alone_may_come_from_other_classes(run, tmp_path):
    class Others(Blocks):
        class_names = ("a", "b", "c")

    models.train(config(tmp_path / "out", backbone_weights=run / "weights.safetensors"), Others(2), Others(1))
    assert models.Predictor(tmp_path / "out/weights.safetensors", device="cpu").class_names == ("a", "b", "c")


def test_training_and_validation_must_agree_and_come_together(tmp_path):
    class Others(Blocks):
        category_ids = (1, 5)

    with pytest.raises(DataError, match="the training and the validation annotations have different classes") as error:
        models.train(config(tmp_path), train_set=Blocks(), val_set=Others())
    assert "    1  2 high block  5 high block" in error.value.why
    with pytest.raises(UsageError, match="go together"):
        models.train(config(tmp_path), train_set=Blocks())
    with pytest.raises(UsageError, match="two kinds of data"):
        models.train(config(tmp_path, data=tmp_path), train_set=Blocks(), val_set=Blocks())


def test_a_folder_with_any_classes_is_trained_by_its_name_alone(tmp_path):
    folder = write_data(tmp_path / "coco")
    (folder / "val").rename(folder / "train")
    (folder / "val").symlink_to("train")
    annotations = folder / "annotations"
    (annotations / "instances_train.json").write_text((annotations / "instances_val.json").read_text())
    models.train(config(tmp_path / "out", data=folder))
    predictor = models.Predictor(tmp_path / "out" / "weights.safetensors", device="cpu")
    assert (predictor.class_names, predictor.category_ids) == (("disc", "traffic light", "star"), (3, 7, 8))


def test_long_tables_are_shortened_and_missing_rows_are_blank():
    left, right = [f"a{i}" for i in range(20)], [f"b{i}" for i in range(3)]
    with pytest.raises(DataError) as error:
        check_same_classes("they differ", ("one", left, range(20)), ("other", right, range(3)), "here", "mend it")
    lines = error.value.why.splitlines()
    assert lines[0] == "20 classes and 3; they differ in (id and name)" and lines[-1] == "... 8 more"
    assert lines[2] == "    0  0 a0    0 b0" and lines[5] == "    3  3 a3"
