"""Whole detectors: speed, training speed and training memory, with the published column beside each.

    pytest benchmarks/bench_models.py --benchmark-only                on a GPU every published row; on the CPU three
    pytest benchmarks/bench_models.py --benchmark-only --all-rows     every row on the CPU, too: half an hour

One image is 800 x 1333. "detect" ends with masks as bitmaps of the image's size on the device, which is what
mmdetection 3.x times (network and post-processing, no data loading, batch 1); "detect to RLE" ends with run lengths on
the host, which is what a results file needs. The weights are random: every image gives 100 detections, the most there
may be, whose masks are noise (the longest run lengths), from proposals that are smaller than a trained RPN's.
"""

import pytest
import torch

import cascadeops
from benchmarks.detector_cases import IMAGE_SIZE, random_images, row_detector, training_batch, training_step
from benchmarks.detector_peers import PEERS, definitions
from benchmarks.memory_prediction import DTYPES, predict
from models.folding import folded
from models.inference import unpack_detections
from models.optimization import make_optimizer
from models.published_rows import PUBLISHED_ROWS

MASK_RCNN = "mask_rcnn_r50_fpn_2x_coco"
CPU_ROWS = "scnet_r50_fpn_1x_coco", "htc_r50_fpn_1x_coco", MASK_RCNN
SMALL = (128, 192)
"""Image size where results are checked and nothing is timed (--benchmark-disable)."""

_first: dict = {}
for _name, _row in PUBLISHED_ROWS.items():
    _first.setdefault((_row.recipe.arch, _row.recipe.detector), _name)
ROWS = tuple(_first.values())
"""Without those that differ from one before in their schedule alone."""


def pytest_generate_tests(metafunc):
    if "row" in metafunc.fixturenames:
        everything = torch.cuda.is_available() or metafunc.config.getoption("--all-rows")
        metafunc.parametrize("row", ROWS if everything else CPU_ROWS)


@pytest.fixture
def image_size(benchmark, request) -> tuple[int, int]:
    """(height, width). Where nothing is timed a small one, and bfloat16 of one row is enough."""
    given = request.node.callspec.params
    if benchmark.disabled and given.get("dtype") == "bfloat16" and given.get("row") != MASK_RCNN:
        pytest.skip("checked with another row")
    return SMALL if benchmark.disabled else IMAGE_SIZE


def ours(dtype: str) -> str:
    return "cascadeops" if dtype == "float32" else f"cascadeops {dtype}"


def inference(row: str, device: torch.device, dtype: str, batch_size: int, image_size: tuple[int, int]):
    """A function without arguments that gives the row's `Detections`, and the image sizes as a CPU tensor."""
    detector = folded(row_detector(row)).to(device)
    images, sizes = random_images(batch_size, image_size)
    on_device = images.to(device), sizes.to(device)

    @torch.inference_mode()
    def detect():
        with torch.autocast(device.type, dtype=DTYPES[dtype], enabled=dtype != "float32"):
            return detector(*on_device)

    return detect, sizes


def check_results(results, image_size: tuple[int, int]) -> None:
    """100 detections an image: finite boxes inside it, best first, masks that are not larger than their boxes."""
    coco = pytest.importorskip("pycocotools.mask")
    limit = torch.tensor(image_size[::-1]).repeat(2)
    for result in results:
        assert len(result) == 100
        assert (result.boxes >= 0).all() and (result.boxes <= limit).all()
        assert (result.scores.diff() <= 0).all() and result.scores[0] <= 1 and result.scores[-1] > 0
        if result.masks is not None:
            width, height = (result.boxes[:, 2:] - result.boxes[:, :2] + 2).T  # a pixel at each side is rounded
            areas = torch.tensor(coco.area(result.masks).astype(int))
            assert (areas <= width * height).all() and areas.sum() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def bench_detect(measure, benchmark, device, row, dtype, image_size):
    if device.type == "cpu" and not (benchmark.disabled and row == MASK_RCNN):
        pytest.skip("on the CPU the bitmaps are a thousandth of the time: bench_detect_to_rle is enough")
    detect, sizes = inference(row, device, dtype, 1, image_size)

    def function():
        found = detect()
        if found.mask_probs is None:
            return found, None
        return found, cascadeops.paste_masks(found.mask_probs[0], found.boxes[0], image_size)

    def check(result):
        found, bitmaps = result
        check_results(unpack_detections(found, sizes, [image_size]), image_size)
        assert bitmaps is None or (bitmaps.shape == (100, *image_size) and bitmaps.any())

    benchmark.extra_info.update(row=row, images=1, published_images_per_second=PUBLISHED_ROWS[row].images_per_second)
    measure(f"detect, {row}", ours(dtype), function, check)


@pytest.mark.parametrize("dtype", DTYPES)
def bench_detect_to_rle(measure, benchmark, device, row, dtype, image_size):
    detect, sizes = inference(row, device, dtype, 1, image_size)
    benchmark.extra_info.update(row=row, images=1, published_images_per_second=PUBLISHED_ROWS[row].images_per_second)
    measure(
        f"detect to RLE, {row}",
        ours(dtype),
        lambda: unpack_detections(detect(), sizes, [image_size]),
        lambda results: check_results(results, image_size),
        least_rounds=3,
    )


@pytest.mark.parametrize("peer", PEERS)
def bench_detect_to_rle_elsewhere(measure, benchmark, device, peer, image_size):
    """Mask R-CNN R-50 of other projects, in the group of ours."""
    benchmark.extra_info.update(row=MASK_RCNN, images=1, published_images_per_second=None)

    def check(rles):
        assert len(rles) == 100 and all(rle["size"] == [*image_size] for rle in rles)

    measure(f"detect to RLE, {MASK_RCNN}", peer, PEERS[peer](device, image_size), check, least_rounds=3)


@pytest.mark.parametrize("some_row", CPU_ROWS)
def bench_detect_to_rle_reference(measure, benchmark, device, request, some_row, image_size):
    """The same detectors on the operators' definitions in plain PyTorch, in the group of ours."""
    if not (benchmark.disabled or request.config.getoption("--all-rows")):
        pytest.skip("a minute an image: RoIs one by one, masks pixel by pixel; --all-rows")
    detect, sizes = inference(some_row, device, "float32", 1, image_size)
    (ours,) = unpack_detections(detect(), sizes, [image_size])
    benchmark.extra_info.update(row=some_row, images=1, published_images_per_second=None)

    def function():
        with definitions():
            return unpack_detections(detect(), sizes, [image_size])

    def check(results):
        check_results(results, image_size)
        torch.testing.assert_close(results[0].scores, ours.scores, rtol=1e-3, atol=1e-4)

    measure(f"detect to RLE, {some_row}", "reference", function, check)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_size", [8, 32])
@pytest.mark.parametrize("some_row", CPU_ROWS)
def bench_detect_in_batches(measure, benchmark, device, some_row, batch_size, dtype, image_size):
    if device.type == "cpu":
        pytest.skip("on the CPU a batch is as fast as its images one by one")
    detect, sizes = inference(some_row, device, dtype, batch_size, image_size)
    benchmark.extra_info.update(row=some_row, images=batch_size)
    measure(
        f"detect to RLE, {some_row} x {batch_size}",
        ours(dtype),
        lambda: unpack_detections(detect(), sizes, [image_size] * batch_size),
        lambda results: check_results(results, image_size),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def bench_train(measure, benchmark, device, row, dtype, image_size):
    """A training step of two images. On a GPU with the peak of its memory, and with the prediction of it."""
    if device.type == "cpu" and not (benchmark.disabled and (row, dtype) == (MASK_RCNN, "float32")):
        pytest.skip("a step takes a minute; memory_prediction says what it takes of a GPU")
    published = PUBLISHED_ROWS[row]
    detector = row_detector(row).train()
    predicted = predict(detector, published.recipe, DTYPES[dtype], 2, image_size)
    detector.to(device)
    optimizer = make_optimizer(published.recipe, detector)
    batch = training_batch(2, image_size).to(device)

    def check(loss):
        assert loss.isfinite()

    if device.type == "cuda":
        training_step(detector, optimizer, batch, DTYPES[dtype])  # makes the momentum
        torch.cuda.reset_peak_memory_stats()
        training_step(detector, optimizer, batch, DTYPES[dtype])
        benchmark.extra_info.update(memory=torch.cuda.max_memory_allocated())
    benchmark.extra_info.update(
        row=row, images=2, predicted_memory=predicted.peak, published_memory_gib=published.memory_gb
    )
    measure(f"train, {row}", ours(dtype), lambda: training_step(detector, optimizer, batch, DTYPES[dtype]), check)
