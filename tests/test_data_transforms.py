"""Resizing, flipping, windows of masks, semantic targets, normalisation and padding, against their definitions."""

import numpy as np
import pytest
import torch
from PIL import Image

from models.data.batch import PackedMasks, collate
from models.data.coco import CocoDataset
from models.data.shapes import ShapesSettings, write_dataset
from models.data.transforms import (
    DIVISOR,
    MEAN,
    STD,
    Augmentation,
    box_windows,
    jitter_colours,
    nearest_index,
    resize_image,
    resized_size,
    transform,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> CocoDataset:
    folder = tmp_path_factory.mktemp("transforms") / "shapes"
    write_dataset(folder, ShapesSettings(train=12, val=1), workers=2, quiet=True)
    return CocoDataset(folder, "train")


class _Fixed:
    """Draws what the test says: a source of randomness for `transform`."""

    def __init__(self, flip: bool, factor: float = 1.0) -> None:
        self._flip, self._factor = flip, factor

    def random(self) -> float:
        return 0.0 if self._flip else 0.999

    def uniform(self, *_interval) -> float:
        return self._factor

    def integers(self, count: int) -> int:
        return count - 1


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((640, 480), (1067, 800)),
        ((480, 640), (800, 1067)),
        ((500, 375), (1067, 800)),
        ((640, 427), (1199, 800)),
        ((1024, 300), (1333, 391)),
    ],
)
def test_sizes_of_mmdetection(before, after):
    """(width, height) as the specification lists them."""
    assert resized_size(before[1], before[0], 800, 1333) == (after[1], after[0])


@pytest.mark.parametrize(
    "sizes", [((48, 64), (80, 107)), ((61, 47), (20, 15)), ((37, 53), (53, 37)), ((5, 4), (64, 80))]
)
def test_images_are_resized_as_opencv_linear_does(sizes):
    (height, width), size = sizes
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)

    def taps(source, target):  # centres at halves, the border repeated
        position = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
        low = np.floor(position).astype(int)
        return low, np.minimum(low + 1, source - 1), position - low

    (y0, y1, fy), (x0, x1, fx) = taps(height, size[0]), taps(width, size[1])
    fx, fy, pixels = fx[None, :, None], fy[:, None, None], image.astype(np.float64)
    rows = [pixels[y][:, x0] * (1 - fx) + pixels[y][:, x1] * fx for y in (y0, y1)]
    expected = rows[0] * (1 - fy) + rows[1] * fy
    result = resize_image(image, size)
    assert result.dtype == np.uint8 and result.shape == (*size, 3)
    difference = result - expected
    assert np.abs(difference).max() <= 1.01 and abs(difference.mean()) < 0.03


def test_nearest_takes_the_pixel_that_opencv_takes():
    assert nearest_index(4, 8).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert nearest_index(8, 4).tolist() == [0, 2, 4, 6]
    assert nearest_index(3, 7).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert nearest_index(5, 5).tolist() == [0, 1, 2, 3, 4]


def test_windows_by_hand():
    boxes = np.array([[10, 10, 20, 20], [0, 0, 5.5, 3.2], [50.2, 30.9, 60, 40], [0, 0, 60, 40]], np.float32)
    windows = box_windows(boxes, 40, 60)
    assert windows.tolist() == [[9, 9, 12, 12], [0, 0, 7, 5], [49, 29, 11, 11], [0, 0, 60, 40]]
    assert windows.dtype == np.int32


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("resize", [None, (120, 200), (300, 340)])
def test_packed_masks_are_the_resized_flipped_full_masks(dataset, resize, flip):
    for index in range(len(dataset)):
        info = dataset.image_info(index)
        sample = dataset.sample(index, resize, Augmentation(), _Fixed(flip))
        height, width = sample.image.shape[:2]
        assert (height, width) == ((info.height, info.width) if resize is None else resized_size(*info[2:], *resize))
        rows, columns = nearest_index(info.height, height), nearest_index(info.width, width)
        for which, (x, y, w, h) in enumerate(sample.windows.tolist()):
            full = dataset.mask(index, which)[np.ix_(rows, columns)]
            full = full[:, ::-1] if flip else full
            pasted = np.zeros_like(full)
            pasted[y : y + h, x : x + w] = sample.bitmaps[which].reshape(h, w)
            assert np.array_equal(pasted, full), "nothing of the mask lies outside of its window"
            x1, y1, x2, y2 = sample.boxes[which]
            assert x == max(np.floor(x1) - 1, 0) and x + w == min(np.ceil(x2) + 1, width)
            assert y == max(np.floor(y1) - 1, 0) and y + h == min(np.ceil(y2) + 1, height)


def test_flip_mirrors_image_boxes_and_map(dataset):
    plain = dataset.sample(0, None, Augmentation(), _Fixed(flip=False))
    flipped = dataset.sample(0, None, Augmentation(), _Fixed(flip=True))
    assert np.array_equal(flipped.image, plain.image[:, ::-1])
    assert np.array_equal(flipped.boxes[:, [1, 3]], plain.boxes[:, [1, 3]])
    assert np.array_equal(flipped.boxes[:, [0, 2]], plain.image.shape[1] - plain.boxes[:, [2, 0]])
    ids = dataset.semantic_map(0)
    assert np.array_equal(plain.semantic, ids[::8, ::8])
    assert np.array_equal(flipped.semantic, ids[:, ::-1][::8, ::8])


def test_boxes_are_scaled_then_clipped():
    image = np.zeros((50, 100, 3), np.uint8)
    boxes = np.array([[-4, 10, 30, 55]], np.float32)
    masks = [np.ones((50, 100), np.uint8)]
    sample = transform(image, boxes, np.array([3]), masks.__getitem__, None, image_id=7, resize=(75, 1000))
    assert sample.scale_factors == (1.5, 1.5) and sample.original_size == (50, 100) and sample.image_id == 7
    assert sample.boxes.tolist() == [[0, 15, 45, 75]]
    assert sample.windows.tolist() == [[0, 14, 46, 61]] and sample.bitmaps[0].all()


def test_multi_scale_draws_every_short_side_and_keeps_the_long_limit():
    image = np.zeros((30, 60, 3), np.uint8)
    seen = set()
    for seed in range(60):
        sample = transform(
            image,
            np.zeros((0, 4), np.float32),
            np.zeros(0, np.int64),
            None,
            None,
            image_id=0,
            resize=(30, 76),
            augmentation=Augmentation(short_sides=range(36, 41)),
            random=np.random.default_rng(seed),
        )
        seen.add(sample.image.shape[:2])
    assert seen == {(36, 72), (37, 74), (38, 76)}  # 39 and 40 meet the limit of the long side, 76


def test_random_scale_multiplies_the_size():
    image = np.zeros((40, 60, 3), np.uint8)
    none = (np.zeros((0, 4), np.float32), np.zeros(0, np.int64), None, None)
    settings = Augmentation(scale=(0.5, 1.5))
    for factor, size in ((0.5, (20, 30)), (1.5, (60, 90))):
        sample = transform(image, *none, image_id=0, resize=None, augmentation=settings, random=_Fixed(False, factor))
        assert sample.image.shape[:2] == size


def test_colour_jitter_changes_colours_within_its_strength():
    random = np.random.default_rng(0)
    image = random.integers(60, 180, (20, 30, 3), np.uint8)
    results = [jitter_colours(image, random, 0.2) for _ in range(40)]
    ratios = np.array([result.mean() / image.mean() for result in results])
    assert all(result.dtype == np.uint8 and result.shape == image.shape for result in results)
    # saturation keeps the weighted grey value, so the plain mean moves a little further than the brightness
    assert 0.79 <= ratios.min() < 0.87 and 1.13 < ratios.max() <= 1.21
    assert np.array_equal(jitter_colours(image, random, 0.0), image)


@pytest.mark.parametrize(
    "wrong", [{"flip": 1.5}, {"colour": -1}, {"short_sides": (0,)}, {"scale": (2, 1)}], ids=lambda wrong: str(wrong)
)
def test_augmentation_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=r"^augmentation: "):
        Augmentation(**wrong)


def test_a_batch_is_normalised_padded_and_stacked(dataset):
    samples = [dataset.sample(index, None) for index in (0, 1, 2)]  # 160 x 192, 192 x 160, 160 x 192
    batch = collate(samples)
    assert batch.images.shape == (3, 3, 192, 192) and batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.image_sizes.tolist() == [[160, 192], [192, 160], [160, 192]]
    assert batch.image_ids == [1, 2, 3] and batch.scale_factors.tolist() == [[1, 1]] * 3
    for index, sample in enumerate(samples):
        height, width = sample.image.shape[:2]
        expected = (sample.image.astype(np.float64) - MEAN) / STD
        assert np.abs(batch.images[index, :, :height, :width].permute(1, 2, 0).numpy() - expected).max() < 1e-5
        assert (batch.images[index, :, height:] == 0).all() and (batch.images[index, :, :, width:] == 0).all()
        padded = np.full((192, 192), 255, np.uint8)
        padded[:height, :width] = dataset.semantic_map(index)
        assert np.array_equal(batch.semantic[index].numpy(), padded[::8, ::8])
        count = len(sample.labels)
        assert torch.equal(batch.gt_boxes[index, :count], torch.from_numpy(sample.boxes))
        assert batch.gt_labels[index].tolist() == sample.labels.tolist() + [-1] * (batch.gt_labels.shape[1] - count)
        assert (batch.gt_masks.windows[index, count:] == 0).all()
        for which in range(count):
            x, y, w, h = batch.gt_masks.windows[index, which].tolist()
            start = int(batch.gt_masks.offsets[index, which])
            bitmap = batch.gt_masks.bitmaps[start : start + w * h].view(h, w).numpy()
            assert np.array_equal(bitmap, dataset.mask(index, which)[y : y + h, x : x + w])
    assert batch.gt_masks.bitmaps.dtype == torch.uint8 and batch.gt_masks.offsets.dtype == torch.int64


def test_semantic_maps_beyond_an_image_are_ignored_or_class_0(dataset):
    samples = [dataset.sample(index, None) for index in (0, 1)]  # 160 x 192, 192 x 160
    ignored, class_0 = collate(samples).semantic, collate(samples, semantic_padding=0).semantic
    assert (ignored[0, 20:] == 255).all() and (class_0[0, 20:] == 0).all() and (class_0[1, :, 20:] == 0).all()
    assert torch.equal(ignored[0, :20], class_0[0, :20]) and torch.equal(ignored[1, :, :20], class_0[1, :, :20])


def test_batches_are_padded_to_the_divisor():
    image = np.full((33, 70, 3), 200, np.uint8)
    sample = transform(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), None, None, image_id=0, resize=None)
    batch = collate([sample])
    assert DIVISOR == 32 and batch.images.shape == (1, 3, 64, 96) and batch.semantic is None
    # no object: one padding row, so that no tensor is without rows
    assert batch.gt_labels.tolist() == [[-1]] and batch.gt_masks.windows.tolist() == [[[0, 0, 0, 0]]]
    assert batch.gt_masks.bitmaps.numel() == 0


def test_batches_move_as_one(dataset):
    batch = collate([dataset.sample(0, None)])
    moved = batch.to("meta")
    assert moved.images.device.type == "meta" and moved.gt_masks.bitmaps.device.type == "meta"
    assert isinstance(moved.gt_masks, PackedMasks) and moved.image_ids == batch.image_ids
    nothing = collate([CocoDataset(dataset.root, "train", semantic="no").sample(0, None)])
    assert nothing.to("meta").semantic is None


def test_a_grey_image_has_three_equal_channels(dataset, tmp_path):
    path = dataset.image_folder / dataset.image_info(5).file_name
    grey = Image.open(path).convert("L")
    before = path.read_bytes()
    try:
        grey.save(path, quality=95)
        image = dataset.image(5)
    finally:
        path.write_bytes(before)
    assert (
        image.shape[2] == 3
        and np.array_equal(image[..., 0], image[..., 1])
        and np.array_equal(image[..., 0], image[..., 2])
    )
