"""Order and augmentation as pure functions of the seed, the epoch and the image; resume; ranks; workers."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from test_voc import write_voc

from benchmarks import loader_speed
from models.data import Augmentation, CocoDataset, evaluation_loader, training_loader
from models.data.dataset import AnnotatedImages
from models.data.loader import epoch_batches
from models.data.shapes import ShapesSettings, write_dataset
from models.data.transforms import STD
from models.errors import DataError

VARIED = Augmentation(short_sides=range(128, 161), colour=0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("loader") / "shapes"
    write_dataset(path, ShapesSettings(train=22, val=7), workers=2, quiet=True)
    return path


@pytest.fixture(scope="module")
def dataset(folder) -> CocoDataset:
    return CocoDataset(folder, "train", training=True)


def _equal(one, other) -> bool:
    tensors = ("images", "image_sizes", "gt_boxes", "gt_labels", "semantic", "original_sizes", "scale_factors")
    masks = ("bitmaps", "offsets", "windows")
    return (
        one.image_ids == other.image_ids
        and all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors)
        and all(torch.equal(getattr(one.gt_masks, name), getattr(other.gt_masks, name)) for name in masks)
    )


@pytest.mark.parametrize(("images", "size"), [(22, 4), (7, 3), (5, 8), (1, 4), (64, 8)])
def test_an_epoch_has_every_image_and_only_full_batches(images, size):
    upright = np.random.default_rng(0).random(images) < 0.4
    batches = epoch_batches(upright, size, seed=3, epoch=1)
    assert batches.shape == (-(-images // size), size)
    counts = np.bincount(batches.reshape(-1), minlength=images)
    assert counts.min() >= 1 and counts.sum() - images < size  # the last batch is filled up by repeating


def test_batches_have_one_orientation_but_for_the_rest():
    upright = np.arange(200) % 3 == 0
    mixed = [batch for batch in upright[epoch_batches(upright, 8, 0, 0)] if batch.any() and not batch.all()]
    assert len(mixed) <= 2


@pytest.mark.parametrize("workers", [0, 1])
def test_the_semantic_padding_reaches_the_batches(dataset, workers):
    def counts(padding):
        loader = training_loader(dataset, 4, seed=0, workers=workers, semantic_padding=padding)
        return sum(torch.bincount(batch.semantic.flatten().long(), minlength=256) for batch in loader)

    ignored, class_0 = counts(255), counts(0)
    assert class_0[255] < ignored[255]
    assert class_0[0] - ignored[0] == ignored[255] - class_0[255] > 0


def test_order_is_a_function_of_seed_and_epoch():
    upright = np.arange(100) % 2 == 0
    same = epoch_batches(upright, 8, seed=5, epoch=2)
    assert np.array_equal(same, epoch_batches(upright, 8, seed=5, epoch=2))
    assert not np.array_equal(same, epoch_batches(upright, 8, seed=5, epoch=3))
    assert not np.array_equal(same, epoch_batches(upright, 8, seed=6, epoch=2))


def test_a_resumed_epoch_gives_the_batches_that_were_left(dataset):
    whole = list(training_loader(dataset, 4, seed=1, epoch=3, augmentation=VARIED))
    for start in (0, 1, 4, 6):
        loader = training_loader(dataset, 4, seed=1, epoch=3, start_batch=start, augmentation=VARIED)
        rest = list(loader)
        assert len(rest) == len(loader) == len(whole) - start
        assert all(_equal(one, other) for one, other in zip(rest, whole[start:], strict=True))
    with pytest.raises(ValueError, match=r"start_batch must be in 0\.\.6, got 7"):
        training_loader(dataset, 4, seed=1, epoch=3, start_batch=7)


def test_epochs_differ_and_an_iteration_can_be_repeated(dataset):
    loader = training_loader(dataset, 4, seed=1, epoch=0, augmentation=VARIED)
    first, again = list(loader), list(loader)
    assert all(_equal(one, other) for one, other in zip(first, again, strict=True))
    loader.set_epoch(1)
    assert not any(_equal(one, other) for one, other in zip(first, loader, strict=True))


def test_workers_change_nothing_and_live_through_epochs(dataset):
    here = training_loader(dataset, 4, seed=1, epoch=0, augmentation=VARIED)
    there = training_loader(dataset, 4, seed=1, epoch=0, augmentation=VARIED, workers=2)
    processes = []
    for epoch, start in ((0, 0), (1, 0), (2, 4)):
        here.set_epoch(epoch, start)
        there.set_epoch(epoch, start)
        assert len(there) == 6 - start
        assert all(_equal(one, other) for one, other in zip(here, there, strict=True))
        processes.append(there._workers.pids())
    assert processes[0] == processes[1] == processes[2]


def test_ranks_share_the_batches_of_one_process(dataset):
    one = [batch.image_ids for batch in training_loader(dataset, 4, seed=1)]
    ranks = [[batch.image_ids for batch in training_loader(dataset, 4, seed=1, rank=r, world=2)] for r in (0, 1)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == one
    parts = [batch.image_ids for batch in training_loader(dataset, 4, seed=1, parts=2)]
    assert [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)] == one
    with pytest.raises(ValueError, match="divisible by 3 ranks x 1 parts, got 4"):
        training_loader(dataset, 4, seed=1, rank=0, world=3)


def test_ranks_share_the_order_of_twenty_epochs(dataset, monkeypatch):
    """Of 1, 2 and 4 ranks; batches are what they are made of here, (epoch, image) each, and no image is read."""
    monkeypatch.setattr("models.data.loader._batch", lambda _, keys, **options: keys)

    def order(world: int) -> list[tuple[int, int]]:
        ranks = [training_loader(dataset, 4, seed=1, rank=r, world=world, pin_memory=False) for r in range(world)]
        keys = []
        for epoch in range(20):
            for rank in ranks:
                rank.set_epoch(epoch)
            keys += [key for step in zip(*ranks, strict=True) for batch in step for key in batch]
        return keys

    one = order(1)
    assert order(2) == one and order(4) == one
    assert len(one) == 20 * 24 and set(one) == {(epoch, image) for epoch in range(20) for image in range(22)}
    assert len({tuple(image for _, image in one[start : start + 24]) for start in range(0, 480, 24)}) == 20


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"rank": 2, "world": 2}, {"rank": -1}], ids=str)
def test_arguments_out_of_range_are_refused(dataset, wrong):
    arguments = {"batch_size": 2, "rank": 0, "world": 1} | wrong
    with pytest.raises(ValueError, match=r"loader: batch_size >= 1 and 0 <= rank < world"):
        training_loader(dataset, seed=0, **arguments)
    with pytest.raises(ValueError, match=r"loader: batch_size >= 1 and 0 <= rank < world"):
        evaluation_loader(dataset, **arguments)


def test_evaluation_sees_every_image_once_unflipped_and_padded_to_its_own_size(folder):
    dataset = CocoDataset(folder, "val")
    loader = evaluation_loader(dataset, 3, resize=(64, 96))
    batches = list(loader)
    row_of = {dataset.image_info(row).image_id: row for row in range(7)}
    assert sorted(i for batch in batches for i in batch.image_ids) == sorted(row_of)
    assert len(loader) == len(batches) and max(len(batch.image_ids) for batch in batches) == 3
    shapes = {tuple(batch.images.shape[2:]) for batch in batches}
    assert shapes == {(64, 96), (96, 64)}
    for batch in batches:
        lying = batch.images.shape[3] == 96
        assert (batch.image_sizes == torch.tensor([64, 77] if lying else [77, 64])).all()
        for i, image_id in enumerate(batch.image_ids):
            assert batch.original_sizes[i].tolist() == dataset.sizes[row_of[image_id]].tolist()
            boxes = torch.from_numpy(dataset.objects(row_of[image_id])[0]) * batch.scale_factors[i].repeat(2)
            torch.testing.assert_close(batch.gt_boxes[i, : len(boxes)], boxes, atol=1e-4, rtol=0)


def test_evaluation_of_the_first_images_and_by_several_ranks(folder):
    dataset = CocoDataset(folder, "val")
    ids = [dataset.image_info(row).image_id for row in range(7)]
    first = [i for batch in evaluation_loader(dataset, 2, max_images=5) for i in batch.image_ids]
    assert sorted(first) == sorted(ids[:5])
    shares = [[i for b in evaluation_loader(dataset, 2, rank=r, world=2) for i in b.image_ids] for r in (0, 1)]
    assert [sorted(share) for share in shares] == [ids[0::2], ids[1::2]]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_a_data_error_also_from_a_worker(tmp_path, workers):
    write_dataset(tmp_path / "set", ShapesSettings(train=3, val=1), workers=1, quiet=True)
    dataset = CocoDataset(tmp_path / "set", "train")
    path = dataset.image_folder / "000000000002.jpg"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match=r"where: .*000000000002.jpg"):
        list(training_loader(dataset, 1, seed=0, workers=workers))


def test_a_data_set_without_stuff_maps_has_no_semantic_targets(folder):
    dataset = CocoDataset(folder, "train", semantic="no")
    assert next(iter(training_loader(dataset, 2, seed=0))).semantic is None


@pytest.mark.parametrize("resize", [None, (100, 140)])
@pytest.mark.parametrize("workers", [0, 1])
def test_raw_batches_become_on_the_device_what_the_loader_makes(dataset, resize, workers):
    """Within a grey level: the loader rounds to whole ones after resizing."""
    options = {"seed": 1, "resize": resize, "augmentation": Augmentation(scale=(0.5, 1.2))}
    made = list(training_loader(dataset, 4, **options))
    raw = list(training_loader(dataset, 4, **options, workers=workers, raw=True))
    for one, other in zip(made, raw, strict=True):
        assert other.images.pixels.dtype == torch.uint8
        assert one.prepared() is one
        other = other.to("cpu").prepared()
        assert other.images.shape == one.images.shape
        assert other.images.is_contiguous(memory_format=torch.channels_last)
        assert (one.images - other.images).abs().max() < 1.01 / min(STD)
        assert (one.images - other.images).abs().mean() < 0.3 / min(STD)
        assert _equal(one, dataclasses.replace(other, images=one.images))


def test_raw_batches_of_images_as_they_are_differ_by_rounding_alone(dataset):
    one, other = (next(iter(training_loader(dataset, 4, seed=1, raw=raw))).prepared() for raw in (False, True))
    torch.testing.assert_close(one.images, other.images, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("images", [2, 9])
def test_each_row_of_the_benchmark_reads_the_same_images(tmp_path, monkeypatch, images):
    pytest.importorskip("simplejpeg")
    folder, read, image = write_voc(tmp_path), [], AnnotatedImages.image
    monkeypatch.setattr(AnnotatedImages, "image", lambda self, index: read.append(int(index)) or image(self, index))
    speeds = loader_speed.measure(folder, "val", images, rounds=1, resize=(20, 30))
    first = {2: [0, 1], 9: [0, 1, 2]}[images]
    assert len(speeds) == 7 and min(speeds.values()) > 0
    assert set(read) == set(first)
    assert len(read) == 2 * (len(first) + 2 * -(-len(first) // 2))  # by samples and by batches of 2, of both kinds
