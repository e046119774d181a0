"""The SCNet detector as a program: batches, padding, static shapes, compile, resume."""

import dataclasses
import json

import pytest
import torch

import models
from models import recipes
from models.config import BACKBONES
from models.errors import DataError
from models.inference import make_batch
from models.norms import fold_batch_norms
from models.padding import used_capacity


def small_detector(**fields):
    torch.manual_seed(0)
    config = dataclasses.replace(recipes.SMALL.detector, num_classes=5, num_semantic_classes=9, **fields)
    from models.build import build_from_config

    detector = build_from_config("scnet", config)
    # Spreads the scores, so that something is detected. With larger weights elsewhere, too, mask logits would reach
    # millions, whose last bits alone decide some probabilities.
    for parameter in detector.box_heads.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    return detector


def random_images(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator).numpy() for size in sizes]


@pytest.mark.parametrize("semantic", [True, False])
def test_shapes_are_fixed_and_padding_rows_say_so(semantic):
    detector = small_detector(semantic=semantic)
    images, sizes = make_batch(random_images((90, 120), (64, 128)), None, "cpu")
    with torch.inference_mode():
        found = detector(images, sizes)
    capacity = detector.config.max_detections
    assert found.boxes.shape == (2, capacity, 4)
    assert found.mask_probs.shape == (2, capacity, 28, 28)
    assert (found.count > 0).all()
    for i, count in enumerate(found.count.tolist()):
        assert (found.scores[i, count:] == -torch.inf).all()
        assert (found.labels[i, count:] == -1).all()
        assert (found.scores[i, :count].diff() <= 0).all()
        assert (found.boxes[i, :count] <= sizes[i].flip(0).repeat(2)).all()


def test_a_batch_gives_what_its_images_give_alone():
    detector = small_detector()
    images = random_images((96, 128), (96, 128))
    together = models.predict(detector, images)
    for image, batched in zip(images, together, strict=True):
        alone = models.predict(detector, image)
        assert len(alone) == len(batched) > 0
        torch.testing.assert_close(alone.boxes, batched.boxes, atol=1e-2, rtol=0)
        torch.testing.assert_close(alone.scores, batched.scores, atol=1e-4, rtol=0)
        assert torch.equal(alone.labels, batched.labels)


def test_dropping_padding_rows_changes_nothing(monkeypatch):
    detector = small_detector()
    images, sizes = make_batch(random_images((64, 96)), None, "cpu")
    with torch.inference_mode():
        trimmed = detector(images, sizes)
        monkeypatch.setattr("models.scnet.used_capacity", lambda count, capacity: capacity)
        whole = detector(images, sizes)
    assert torch.equal(trimmed.count, whole.count)
    for ours, theirs in zip(trimmed, whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_folded_batch_norms_compute_the_same():
    detector = small_detector().eval()
    for module in detector.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.5, 0.5)
    folded = fold_batch_norms(detector)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert not folded.training
    images, _ = make_batch(random_images((64, 96)), None, "cpu")
    with torch.inference_mode():
        for expected, level in zip(detector.backbone(images), folded.backbone(images), strict=True):
            torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_nothing_found_is_a_result_of_length_zero():
    detector = small_detector(score_threshold=1.0)
    result = models.predict(detector, random_images((64, 64))[0])
    assert len(result) == len(result.masks) == 0
    assert result.boxes.shape == (0, 4)
    assert result.masks == []
    assert models.predict(detector, []) == []


def test_the_whole_forward_is_one_graph():
    detector = small_detector()
    images, sizes = make_batch(random_images((64, 96), (64, 64)), None, "cpu")
    compiled = torch.compile(detector, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad():
        eager, graph = detector(images, sizes), compiled(images, sizes)
    assert torch.equal(eager.count, graph.count)
    assert (eager.count > 0).all()
    for ours, theirs in zip(eager, graph, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_used_capacity_is_the_capacity_under_compile():
    seen = torch.compile(lambda count: torch.zeros(used_capacity(count, 7)), fullgraph=True, backend="eager")
    assert len(seen(torch.tensor([3]))) == 7


def test_resize_gives_boxes_in_pixels_of_the_image_that_was_given():
    detector = small_detector()
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
        models.predict(small_detector(), image)


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
    detector = small_detector()
    models.save_weights(tmp_path / "w.safetensors", detector, list("abcde"), [1, 3, 5, 7, 9], {"resize": None})
    loaded, facts = models.load_detector(tmp_path / "w.safetensors")
    assert loaded.config == detector.config
    assert facts["class_names"] == list("abcde") and facts["category_ids"] == [1, 3, 5, 7, 9]
    for (name, ours), theirs in zip(loaded.state_dict().items(), detector.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_weights_of_another_architecture_are_refused_by_name(tmp_path):
    other = small_detector(semantic=False)
    with pytest.raises(DataError, match="another architecture") as caught:
        models.load_weights(other, small_detector().state_dict())
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
    detector = dataclasses.replace(recipes.SMALL.detector, num_samples=16, mask_blocks=1, max_detections=5)
    fields = {"epochs": 2, "batch_size": 4, "log_every": 1, "evaluate_every": 0, "detector": detector} | fields
    return dataclasses.replace(recipes.SMALL, data=shapes, output=output, **fields)


def test_a_resumed_run_equals_one_without_a_break(shapes, tmp_path):
    """12 images in batches of 4, two epochs: stopped in the middle of the second, and continued."""
    from models.training import train

    train(training_config(shapes, tmp_path / "whole"))
    train(training_config(shapes, tmp_path / "broken", max_iterations=4))
    train(training_config(shapes, tmp_path / "broken", resume=True))
    whole, broken = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "broken"))
    assert whole["iteration"] == broken["iteration"] == 6
    for part in ("detector", "random"):
        for name, value in whole[part].items():
            assert torch.equal(value, broken[part][name]), name
    for ours, theirs in zip(whole["optimizer"]["state"].values(), broken["optimizer"]["state"].values(), strict=True):
        assert torch.equal(ours["momentum_buffer"], theirs["momentum_buffer"])
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
    with pytest.raises(UsageError, match=r"learning_rate: 0\.\d+ then, 0\.5 now"):
        train(training_config(shapes, tmp_path, resume=True, learning_rate=0.5))
    with pytest.raises(DataError, match="no checkpoint to resume from"):
        train(training_config(shapes, tmp_path / "fresh", resume=True))


def test_data_without_semantic_maps_is_trained_without_that_branch(shapes, tmp_path):
    from models.training import train

    train(training_config(shapes, tmp_path, max_iterations=1, semantic="no"))
    loaded, _ = models.load_detector(tmp_path / "weights.safetensors")
    assert loaded.semantic_head is None
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert "loss_semantic" not in line and "loss_mask" in line


def test_images_without_objects_still_train():
    from models.data.batch import PackedMasks

    detector = small_detector().train()
    images, sizes = make_batch(random_images((64, 64)), None, "cpu")
    empty = PackedMasks(
        torch.zeros(0, dtype=torch.uint8), torch.zeros(1, 1).long(), torch.zeros(1, 1, 4, dtype=torch.int32)
    )
    semantic = torch.full((1, 8, 8), 255, dtype=torch.uint8)
    labels = torch.full((1, 1), -1)
    losses = detector.losses(images, sizes, torch.zeros(1, 1, 4), labels, empty, semantic)
    sum(losses.values()).backward()
    assert losses["loss_mask"].item() == 0 and losses["loss_semantic"].item() == 0
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in detector.parameters())


def test_one_step_of_the_published_recipe(shapes):
    """ResNet-50, 512 samples, 2000 proposals: every trainable weight gets a gradient."""
    from models.build import build_from_config
    from models.data import CocoDataset, training_loader
    from models.training import fit_to_data

    dataset = CocoDataset(shapes, "train", training=True)
    detector = build_from_config("scnet", fit_to_data(recipes.COCO, dataset).detector).train()
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
