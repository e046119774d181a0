"""Every detector as a program: batches, padding, static shapes, compile, export, losses, training."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from small_detectors import (
    ABLATIONS,
    ARCHS,
    VARIANTS,
    exported_without_sync,
    random_images,
    shallow_detector,
    small_detector,
    training_batch,
    variant_id,
)

import models
from models import recipes
from models.data.batch import PackedMasks
from models.inference import make_batch

every_arch = pytest.mark.parametrize("arch", ARCHS)
every_variant = pytest.mark.parametrize(("arch", "fields"), VARIANTS, ids=variant_id)


def same_detections(ours, theirs) -> None:
    for one, other in zip(ours, theirs, strict=True):
        if one is not None or other is not None:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@every_variant
def test_shapes_are_fixed_and_padding_rows_say_so(arch, fields):
    detector = small_detector(arch, **fields)
    images, sizes = make_batch(random_images((90, 120), (64, 128)), None, "cpu")
    with torch.inference_mode():
        found = detector(images, sizes)
    capacity = detector.config.max_detections
    assert found.boxes.shape == (2, capacity, 4)
    if arch == "faster_rcnn" or not fields.get("masks", True):
        assert found.mask_probs is None
    else:
        assert found.mask_probs.shape == (2, capacity, 28, 28)
    assert (found.count > 0).all()
    for i, count in enumerate(found.count.tolist()):
        assert (found.scores[i, count:] == -torch.inf).all()
        assert (found.labels[i, count:] == -1).all()
        assert (found.scores[i, :count].diff() <= 0).all()
        assert (found.boxes[i, :count] <= sizes[i].flip(0).repeat(2)).all()


@every_arch
def test_a_batch_gives_what_its_images_give_alone(arch):
    detector = small_detector(arch)
    images = random_images((96, 128), (96, 128))
    together = models.predict(detector, images)
    for image, batched in zip(images, together, strict=True):
        alone = models.predict(detector, image)
        assert len(alone) == len(batched) > 0
        torch.testing.assert_close(alone.boxes, batched.boxes, atol=1e-2, rtol=0)
        torch.testing.assert_close(alone.scores, batched.scores, atol=1e-4, rtol=0)
        assert torch.equal(alone.labels, batched.labels)


@every_arch
def test_dropping_padding_rows_changes_nothing(arch, monkeypatch):
    detector = small_detector(arch)
    images, sizes = make_batch(random_images((64, 96)), None, "cpu")
    with torch.inference_mode():
        trimmed = detector(images, sizes)
        monkeypatch.setattr(f"models.{arch}.used_capacity", lambda count, capacity: capacity)
        whole = detector(images, sizes)
    assert torch.equal(trimmed.count, whole.count)
    same_detections(trimmed, whole)


@every_arch
def test_the_whole_forward_is_one_graph(arch):
    detector = shallow_detector(arch)
    images, sizes = make_batch(random_images((64, 96), (64, 64)), None, "cpu")
    compiled = torch.compile(detector, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad():
        eager, graph = detector(images, sizes), compiled(images, sizes)
    assert (eager.count > 0).all()
    same_detections(eager, graph)


@every_arch
def test_the_forward_is_exported(arch):
    detector = shallow_detector(arch)
    images, sizes = make_batch(random_images((64, 96), (64, 64)), None, "cpu")
    with torch.no_grad():
        exported = exported_without_sync(detector, images, sizes)
        same_detections(detector(images, sizes), exported(images, sizes))


class GivenPyramid(torch.nn.Module):
    """P2..P6 by one layer, in the place of backbone and FPN."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, channels, 4, 4)

    def forward(self, images):
        levels = [self.conv(images)]
        for _ in range(4):
            levels.append(F.max_pool2d(levels[-1], 2))
        return levels


class GivenProposals(torch.nn.Module):
    """Three boxes and a padding row for each image, in the place of the RPN."""

    def forward(self, features):
        return ()

    def proposals(self, image_sizes):
        boxes = torch.tensor([[8.0, 8, 60, 30], [0, 20, 50, 60], [4, 0, 24, 24], [0, 0, 0, 0]])
        scores = torch.tensor([0.9, 0.6, 0.3, -torch.inf])
        count = torch.full_like(image_sizes[:, 0], 3)
        return boxes.expand(len(count), -1, -1), scores.expand(len(count), -1), count


@pytest.mark.parametrize(("arch", "fields"), ABLATIONS, ids=variant_id)
def test_every_ablation_is_one_graph_and_exported(arch, fields):
    """To save time without the third stage, and without what no ablation changes: backbone, FPN and RPN."""
    config = recipes.small(arch).detector
    stages = {name: getattr(config, name)[:2] for name in vars(config) if name.startswith("stage_")}
    detector = shallow_detector(arch, **stages, **fields)
    detector.backbone, detector.fpn = torch.nn.Identity(), GivenPyramid(config.channels)
    detector.rpn = GivenProposals()
    images, sizes = make_batch(random_images((64, 96), (64, 64)), None, "cpu")
    compiled = torch.compile(detector, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        found = detector(images, sizes)
        same_detections(found, compiled(images, sizes))
        same_detections(found, exported_without_sync(detector, images, sizes)(images, sizes))
    assert (found.count > 0).all()


@pytest.mark.parametrize(("arch", "masks"), [("faster_rcnn", None), ("htc", [])])
def test_nothing_found_is_a_result_of_length_zero(arch, masks):
    detector = small_detector(arch, score_threshold=1.0)
    result = models.predict(detector, random_images((64, 64))[0])
    assert len(result) == 0
    assert result.boxes.shape == (0, 4)
    assert result.masks == masks
    assert models.predict(detector, []) == []


# ---- training


@every_variant
def test_every_weight_gets_a_gradient(arch, fields):
    """What an ablation leaves out has no weights that would stay as they are."""
    detector = small_detector(arch, **fields).train()
    losses = detector.losses(*training_batch())
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values()), losses
    sum(losses.values()).backward()
    without = {name for name, parameter in detector.named_parameters() if parameter.grad is None}
    if fields.get("semantic_fusion") == ():  # no RoI reads the semantic features
        without -= {"semantic_head.embedding.weight", "semantic_head.embedding.bias"}
    assert without == set()


@every_variant
def test_images_without_objects_still_train(arch, fields):
    detector = small_detector(arch, **fields).train()
    images, sizes = make_batch(random_images((64, 64)), None, "cpu")
    empty = PackedMasks(
        torch.zeros(0, dtype=torch.uint8), torch.zeros(1, 1).long(), torch.zeros(1, 1, 4, dtype=torch.int32)
    )
    semantic = torch.full((1, 8, 8), 255, dtype=torch.uint8)
    losses = detector.losses(images, sizes, torch.zeros(1, 1, 4), torch.full((1, 1), -1), empty, semantic)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(loss == 0 for name, loss in losses.items() if name.endswith(("loss_mask", "loss_semantic")))
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in detector.parameters())


@pytest.mark.parametrize("arch", ["mask_rcnn", "cascade_mask_rcnn", "htc", "scnet"])
def test_dropping_padding_rows_changes_no_loss(arch, monkeypatch):
    detector = small_detector(arch).train()
    batch = training_batch()
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(detector.losses(*batch))
        monkeypatch.setattr("models.roi_training.used_capacity", lambda count, capacity: capacity)
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    from models.data import ShapesSettings, write_dataset

    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_dataset(folder, ShapesSettings(train=4, val=1, size=(96, 128)))
    return folder


@pytest.mark.parametrize("arch", ["faster_rcnn", "mask_rcnn", "cascade_mask_rcnn", "htc"])
def test_a_step_of_training_writes_weights_that_load(arch, shapes, tmp_path):
    """SCNet's own tests train it for longer."""
    from models.training import train

    small = recipes.small(arch)
    train(
        dataclasses.replace(
            small,
            data=shapes,
            output=tmp_path,
            batch_size=2,
            max_iterations=1,
            log_every=1,
            detector=dataclasses.replace(small.detector, num_samples=16, max_detections=5),
        )
    )
    detector, facts = models.load_detector(tmp_path / "weights.safetensors")
    assert detector.arch == arch
    assert detector.config.num_classes == len(facts["class_names"]) == 8
    first, *_, metrics = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["loss"] > 0
    assert ("mask_ap" in metrics) == (arch != "faster_rcnn")
    result = models.predict(detector, random_images((64, 96))[0])
    assert (result.masks is None) == (arch == "faster_rcnn")


def test_images_that_are_not_padded_are_refused():
    with pytest.raises(ValueError, match="images must be padded to multiples of 32 pixels"):
        small_detector("mask_rcnn")(torch.zeros(1, 3, 100, 128), torch.tensor([[100, 128]]))
