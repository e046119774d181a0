"""preprocess: uint8 images of several sizes to one normalised, padded batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import assert_close_to_reference

from cascadeops import preprocess
from cascadeops.reference.preprocess import preprocess as reference
from cascadeops.reference.preprocess import resize_image
from cascadeops.reference.preprocess import resized_size as reference_size
from models.data.transforms import resized_size

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SIZES = [(37, 53), (64, 20), (1, 7), (30, 30), (5, 1)]
IDENTITY = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def random_images(sizes, device="cpu"):
    return [torch.randint(256, (*size, 3), dtype=torch.uint8).to(device) for size in sizes]


# Enlarged, reduced, no image's size, one pixel, as it is; 800 x 1333 has several vectors and columns beyond a tile.
@pytest.mark.parametrize("resize", [None, (40, 70), (16, 1000), (1000, 9), (1, 1), (300, 500)])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_reference(device, resize, memory_format, dtype):
    images = random_images(SIZES, device)
    batch, sizes = preprocess(images, resize, divisor=8, dtype=dtype, memory_format=memory_format)
    expected, expected_sizes = reference([image.cpu() for image in images], resize, divisor=8)
    assert batch.dtype == dtype and batch.device == sizes.device == images[0].device
    assert batch.is_contiguous(memory_format=memory_format)
    assert_close_to_reference(batch.cpu(), expected)
    assert sizes.dtype == torch.int64 and sizes.tolist() == expected_sizes.tolist()


@pytest.mark.parametrize("divisor", [1, 7, 32])
def test_padding_is_zero_and_reaches_the_next_multiple(device, divisor):
    images = random_images([(10, 30), (29, 11)], device)
    batch, sizes = preprocess(images, divisor=divisor)
    assert batch.shape == (2, 3, -(-29 // divisor) * divisor, -(-30 // divisor) * divisor)
    assert sizes.tolist() == [[10, 30], [29, 11]]
    for image, (height, width) in zip(batch, sizes.tolist(), strict=True):
        assert not image[:, height:].any() and not image[:, :, width:].any()
        assert (image[:, :height, :width] != 0).all()  # no pixel of these is at the mean


def test_by_hand(device):
    # Two pixels, 10 and 30, to four: their centres lie at -1/4, 1/4, 3/4 and 5/4 of the two, clamped to 0 .. 1.
    image = torch.tensor([[[10, 0, 255], [30, 100, 255]]], dtype=torch.uint8, device=device)
    batch, sizes = preprocess([image], (2, 4), mean=(10, 0, 5), std=(10, 4, 250), divisor=1)
    assert sizes.tolist() == [[2, 4]]
    row = [[0, 0.5, 1.5, 2], [0, 6.25, 18.75, 25], [1, 1, 1, 1]]
    torch.testing.assert_close(batch[0].cpu(), torch.tensor(row)[:, None].expand(3, 2, 4), rtol=0, atol=1e-6)


def test_pixels_that_stay_are_exact(device):
    images = random_images([(50, 61)], device)
    batch, _ = preprocess(images, divisor=1, **IDENTITY)
    assert torch.equal(batch[0], images[0].permute(2, 0, 1).float())
    again, _ = preprocess(images, (50, 61), divisor=1, **IDENTITY)
    assert torch.equal(again, batch)


@pytest.mark.parametrize(("height", "width"), [(480, 640), (427, 640), (333, 500), (1, 9), (4000, 3000), (800, 1333)])
@pytest.mark.parametrize(("short", "long"), [(800, 1333), (400, 1600), (100.5, 133.25), (1, 1)])
def test_the_size_is_that_of_the_training_pipeline(height, width, short, long):
    assert reference_size(height, width, short, long) == resized_size(height, width, short, long)
    image = torch.zeros(1, 1, 3, dtype=torch.uint8).expand(height, width, 3)
    with torch._subclasses.FakeTensorMode() as mode:
        batch, _ = preprocess([mode.from_tensor(image)], (short, long), divisor=1)
    assert batch.shape[2:] == resized_size(height, width, short, long)


@pytest.mark.parametrize("size", [(90, 120), (20, 31), (45, 60), (64, 64)])
def test_at_most_one_grey_level_from_torch(device, size):
    image = torch.randint(256, (45, 60, 3), dtype=torch.uint8)
    # Fixed-point interpolation, as OpenCV's; torch rounds to whole numbers like it.
    theirs = torch.nn.functional.interpolate(image.permute(2, 0, 1)[None], size, mode="bilinear")[0]
    ours = resize_image(image.double(), size).permute(2, 0, 1)
    assert (ours - theirs).abs().max() <= 1
    resize = min(size), max(size)
    if reference_size(45, 60, *resize) == size:
        batch, _ = preprocess([image.to(device)], resize, divisor=1, **IDENTITY)
        assert (batch[0].cpu() - theirs).abs().max() <= 1


def test_at_most_one_grey_level_from_opencv(device):
    # Recorded: cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR) of OpenCV 5.0.0. With values in [0, 1] a
    # grey level is 1/255.
    goldens = np.load(Path(__file__).parent / "goldens" / "opencv.npz")
    image = torch.from_numpy(goldens["image"])
    results = {name: torch.from_numpy(goldens[name]) for name in goldens if name != "image"}
    assert len(results) == 5
    for result in results.values():
        size = result.shape[:2]
        assert (resize_image(image.double(), size) - result).abs().max() <= 1
        resize = min(size), max(size)
        if reference_size(*image.shape[:2], *resize) == size:
            batch, _ = preprocess([image.to(device)], resize, (0.0,) * 3, (255.0,) * 3, divisor=1)
            difference = (batch[0].permute(1, 2, 0).cpu() - result / 255).abs()
            assert difference.max() <= 1.0001 / 255 and difference.mean() < 0.3 / 255


def test_at_most_one_grey_level_from_the_opencv_that_is_installed():
    cv2 = pytest.importorskip("cv2")
    image = torch.randint(256, (45, 60, 3), dtype=torch.uint8)
    for size in [(90, 120), (20, 31), (45, 60), (64, 64)]:
        expected = cv2.resize(image.numpy(), size[::-1], interpolation=cv2.INTER_LINEAR)
        assert np.abs(resize_image(image.double(), size).numpy() - expected).max() <= 1


def test_images_of_any_strides(device):
    images = random_images([(33, 47), (20, 64)], device)
    expected, _ = preprocess(images, (40, 80))
    planar = [image.permute(2, 0, 1).contiguous().permute(1, 2, 0) for image in images]
    cropped = [torch.nn.functional.pad(image, (0, 0, 3, 4, 5, 6))[5:-6, 3:-4] for image in images]
    spread = [image.repeat_interleave(2, dim=2)[..., ::2] for image in images]
    for view in (planar, cropped, spread):
        assert not any(image.is_contiguous() for image in view)
        assert torch.equal(preprocess(view, (40, 80))[0], expected)
    grey = images[0][..., :1].expand(-1, -1, 3)  # stride 0
    assert torch.equal(preprocess([grey], (40, 80))[0], preprocess([grey.contiguous()], (40, 80))[0])


def test_more_images_than_one_launch_describes(device):
    images = random_images([(3 + i % 5, 4 + i % 3) for i in range(130)], device)
    batch, sizes = preprocess(images, (9, 12), divisor=4)
    expected, expected_sizes = reference([image.cpu() for image in images], (9, 12), divisor=4)
    assert_close_to_reference(batch.cpu(), expected)
    assert sizes.tolist() == expected_sizes.tolist()


def test_results_do_not_depend_on_the_number_of_threads():
    images, before, results = random_images([(60, 80), (33, 99)]), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(preprocess(images, (300, 400), dtype=torch.bfloat16)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cuda_equals_the_cpu_bit_for_bit(dtype):
    images = random_images(SIZES)
    expected, _ = preprocess(images, (40, 70), dtype=dtype)
    assert torch.equal(preprocess([image.cuda() for image in images], (40, 70), dtype=dtype)[0].cpu(), expected)


IMAGE = torch.zeros(4, 5, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("error", "images", "changes", "message"),
    [
        (ValueError, [], {}, "images must hold at least one image"),
        (ValueError, [IMAGE[0]], {}, r"images\[0\] must have shape \[H, W, 3\], got \[5, 3\]"),
        (ValueError, [IMAGE, IMAGE[:0]], {}, r"images\[1\] must have shape \[H, W, 3\], got \[0, 5, 3\]"),
        (RuntimeError, [IMAGE, IMAGE[..., :2]], {}, r"images\[1\] must have shape \[H, W, 3\], got \[4, 5, 2\]"),
        (RuntimeError, [IMAGE, IMAGE.float()], {}, r"images\[1\] must have dtype Byte, got Float"),
        (ValueError, [IMAGE], {"divisor": 0}, "divisor must be at least 1, got 0"),
        (ValueError, [IMAGE], {"resize": (0, 9)}, r"resize must be \(short, long\) above 0, got \(0, 9\)"),
        (ValueError, [IMAGE], {"resize": (float("nan"), 9)}, r"resize must be \(short, long\) above 0, got \(nan, 9\)"),
        (RuntimeError, [IMAGE], {"mean": (1.0, 2.0)}, "mean and std must hold 3 numbers each, got 2 and 3"),
        (RuntimeError, [IMAGE], {"mean": (0.0, float("nan"), 0.0)}, r"mean\[1\] must be finite, got nan"),
        (RuntimeError, [IMAGE], {"std": (1.0, 1.0, 0.0)}, r"std\[2\] must be above 0 and finite, got 0"),
        (RuntimeError, [IMAGE], {"dtype": torch.float64}, "dtype must be float32, float16 or bfloat16, got Double"),
        (RuntimeError, [IMAGE], {"dtype": torch.uint8}, "dtype must be float32, float16 or bfloat16, got Byte"),
        (ValueError, [IMAGE], {"memory_format": torch.preserve_format}, "got torch.preserve_format"),
        (RuntimeError, [IMAGE], {"resize": (1e8, 1e8)}, r"images, resized .* must have at most 2\*\*23 pixels a side"),
    ],
)
def test_errors(error, images, changes, message):
    with pytest.raises(error, match=f"preprocess: .*{message}"):
        preprocess(images, **changes)


def test_a_size_beyond_the_batch_is_an_error():
    arguments = [16, 8, [0.0] * 3, [1.0] * 3, torch.float32, True]
    for sizes, message in [([17, 8], r"got \(17, 8\)"), ([16, 0], r"got \(16, 0\)"), ([16], "2 numbers, got 1")]:
        with pytest.raises(RuntimeError, match=f"preprocess: .*{message}"):
            torch.ops.cascadeops.preprocess([IMAGE], sizes, *arguments)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "planar", "strided"])
def test_opcheck(device, channels_last, layout):
    images = random_images([(9, 12), (14, 7)], device)
    if layout == "transposed":
        images[1] = images[1].transpose(0, 1)
    elif layout == "planar":
        images = [image.permute(2, 0, 1).contiguous().permute(1, 2, 0) for image in images]
    elif layout == "strided":
        images = [image.repeat_interleave(2, dim=1)[:, ::2] for image in images]
    arguments = (images, [18, 24, 5, 7], 32, 24, [1.0] * 3, [2.0] * 3, torch.float16, channels_last)
    torch.library.opcheck(torch.ops.cascadeops.preprocess.default, arguments)


def test_autocast_changes_nothing(device):
    images = random_images([(9, 12), (14, 7)], device)
    expected, _ = preprocess(images, (20, 30))
    with torch.autocast(device.type, torch.bfloat16):
        batch, _ = preprocess(images, (20, 30))
    assert batch.dtype == torch.float32 and torch.equal(batch, expected)


def test_compiles_and_exports(device):
    images = random_images([(9, 12), (14, 7)], device)
    expected, expected_sizes = preprocess(images, (20, 30))
    compiled = torch.compile(preprocess, fullgraph=True, backend="aot_eager", dynamic=False)
    batch, sizes = compiled(images, (20, 30))
    assert torch.equal(batch, expected) and torch.equal(sizes, expected_sizes)

    class Module(torch.nn.Module):
        def forward(self, first, second):
            return preprocess([first, second], (20, 30))[0]

    assert torch.equal(torch.export.export(Module(), tuple(images)).module()(*images), expected)
