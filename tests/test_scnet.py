"""A detector, SCNet, as a program: building, weights files, images that are refused, training and its resumption."""

import dataclasses
import json

import pytest
import torch
from small_detectors import ARCHS, random_images, small_detector

import models
from models import recipes
from models.config_backbones import BACKBONES
from models.errors import DataError
from models.folding import folded
from models.inference import make_batch
from models.padding import used_capacity


@pytest.mark.parametrize("arch", ARCHS)
def test_a_folded_detector_computes_the_same(arch):
    detector = small_detector(arch).eval()
    for module in detector.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.5, 0.5)
    copy = folded(folded(detector))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in copy.modules())
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    images, sizes = make_batch(random_images((64, 96)), None, "cpu")
    features = torch.randn(3, detector.config.channels, 7, 7).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = [*detector.backbone(images), *box_head(detector)(features)]
        found = [*copy.backbone(images), *box_head(copy)(features)]
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
        expected, found = detector(images, sizes), copy(images, sizes)
    assert found.count == expected.count > 0
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-4)


def box_head(detector) -> torch.nn.Module:
    return detector.box_heads[-1] if hasattr(detector, "box_heads") else detector.box_head


def test_weights_do_not_load_into_a_folded_detector():
    detector = small_detector("scnet")
    with pytest.raises(RuntimeError, match=r"fc1\.weight"):
        folded(detector).load_state_dict(detector.state_dict())


def test_used_capacity_is_the_capacity_under_compile():
    seen = torch.compile(lambda count: torch.zeros(used_capacity(count, 7)), fullgraph=True, backend="eager")
    assert len(seen(torch.tensor([3]))) == 7


def test_resize_gives_boxes_in_pixels_of_the_image_that_was_given():
    detector = small_detector("scnet")
    (image,) = random_images((60, 80))
    result = models.predict(detector, image, resize=(120, 160))
    assert len(result) > 0
    assert (result.boxes[:, 2] <= 80).all() and (result.boxes[:, 3] <= 60).all()
    assert result.masks[0]["size"] == [60, 80]


@pytest.mark.parametrize(
    ("image", "error", "text"),
    [
        (torch.zeros(3, 8, 8, dtype=torch.uint8), ValueError, r"image must have shape \[H, W, 3\], got \[3, 8, 8\]"),
        (torch.zeros(8, 8, 3), TypeError, "image must be uint8, got float32"),
        ([torch.zeros(8, 8, dtype=torch.uint8)], ValueError, r"image 0 must have shape"),
    ],
)
def test_wrong_images_are_named(image, error, text):
    with pytest.raises(error, match=text):
        models.predict(small_detector("scnet"), image)


# ---- building and weights


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("scnett",), "did you mean scnet"),
        (("scnet", "resnet51"), "did you mean resnet50"),
        (("scnet", "resnet50", 80, True), None),
    ],
)
def test_unknown_names_get_the_nearest(arguments, text):
    if text is None:
        assert sum(p.numel() for p in models.build_detector(*arguments).parameters()) == 94_799_269
        return
    with pytest.raises(Exception, match=text):
        models.build_detector(*arguments)


def test_weights_round_trip_with_everything_that_inference_needs(tmp_path):
    detector = small_detector("scnet")
    models.save_weights(tmp_path / "w.safetensors", detector, list("abcde"), [1, 3, 5, 7, 9], {"resize": None})
    loaded, facts = models.load_detector(tmp_path / "w.safetensors")
    assert loaded.config == detector.config
    assert facts["class_names"] == list("abcde") and facts["category_ids"] == [1, 3, 5, 7, 9]
    for (name, ours), theirs in zip(loaded.state_dict().items(), detector.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_weights_of_another_architecture_are_refused_by_name(tmp_path):
    other = small_detector("scnet", semantic=False)
    with pytest.raises(DataError, match="another architecture") as caught:
        models.load_weights(other, small_detector("scnet").state_dict())
    assert "semantic_head" in str(caught.value)
    (tmp_path / "not.pth").write_bytes(b"hello")
    with pytest.raises(DataError, match="not a weights file"):
        models.load_weights(other, tmp_path / "not.pth")
    with pytest.raises(DataError, match="no such weights file"):
        models.load_weights(other, tmp_path / "absent.pth")


def test_frozen_stages_stay_as_they_are():
    detector = models.build_detector("scnet", backbone="resnet50").train()
    assert not detector.backbone.layer1.training and not detector.backbone.bn1.training
    assert not detector.backbone.conv1.weight.requires_grad
    assert detector.backbone.layer2[0].conv1.weight.requires_grad
    assert not detector.backbone.layer2[0].bn1.training
    assert not BACKBONES["resnet18_narrow"].frozen_stages


# ---- training


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    from models.data import ShapesSettings, write_dataset

    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_dataset(folder, ShapesSettings(train=12, val=3, size=(96, 128)))
    return folder


def training_config(shapes, output, **fields):
    detector = dataclasses.replace(recipes.small("scnet").detector, num_samples=16, mask_blocks=1, max_detections=5)
    fields = {"epochs": 2, "batch_size": 4, "log_every": 1, "evaluate_every": 0, "detector": detector} | fields
    return dataclasses.replace(recipes.small("scnet"), data=shapes, output=output, **fields)


def test_a_resumed_run_equals_one_without_a_break(shapes, tmp_path):
    """12 images in batches of 4, two epochs: stopped in the middle of the second, and continued."""
    from models.checkpoints import newest_checkpoint
    from models.training import train

    train(training_config(shapes, tmp_path / "whole"))
    train(training_config(shapes, tmp_path / "broken", max_iterations=4))
    train(training_config(shapes, tmp_path / "broken", resume=True))
    whole, broken = (newest_checkpoint(tmp_path / name / "checkpoints", pytest.fail) for name in ("whole", "broken"))
    assert whole.step == broken.step == 6
    assert whole.tensors.keys() == broken.tensors.keys()
    for name, value in whole.tensors.items():
        assert torch.equal(value, broken.tensors[name]), name
    losses = [
        [
            line["loss"]
            for line in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
            if "loss" in line
        ]
        for name in ("whole", "broken")
    ]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]


def test_a_used_folder_and_other_settings_are_refused(shapes, tmp_path):
    from models.errors import UsageError
    from models.training import train

    train(training_config(shapes, tmp_path, max_iterations=1))
    with pytest.raises(UsageError, match="holds a run already"):
        train(training_config(shapes, tmp_path))
    with pytest.raises(UsageError, match=r"optimizer\.lr: 0\.03 then, 0\.5 now"):
        train(training_config(shapes, tmp_path, resume=True, optimizer=recipes.OptimizerConfig(lr=0.5)))
    with pytest.raises(DataError, match="no checkpoint to resume from"):
        train(training_config(shapes, tmp_path / "fresh", resume=True))


def test_data_without_semantic_maps_is_trained_without_that_branch(shapes, tmp_path):
    from models.training import train

    train(training_config(shapes, tmp_path, max_iterations=1, semantic="no"))
    loaded, _ = models.load_detector(tmp_path / "weights.safetensors")
    assert loaded.semantic_head is None
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert "loss_semantic" not in line and "loss_mask" in line


def test_one_step_of_the_published_recipe(shapes):
    """ResNet-50, 512 samples, 2000 proposals: every trainable weight gets a gradient."""
    from models.build import build_from_config
    from models.data import CocoDataset, training_loader
    from models.training import fit_to_data

    dataset = CocoDataset(shapes, "train", training=True)
    detector = build_from_config("scnet", fit_to_data(recipes.coco("scnet"), dataset).detector).train()
    batch = next(iter(training_loader(dataset, 1, seed=0, resize=(128, 192))))
    losses = detector.losses(
        batch.images, batch.image_sizes, batch.gt_boxes, batch.gt_labels, batch.gt_masks, batch.semantic
    )
    assert len(losses) == 11
    sum(losses.values()).backward()
    without = [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    frozen = {n.split(".")[1] for n, p in detector.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1"}
