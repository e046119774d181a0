"""paste_masks: box-sized mask probabilities at image size."""

import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from cascadeops import paste_masks
from cascadeops.reference.paste_masks import paste_masks as reference
from cascadeops.reference.paste_masks import paste_probs

ROOT = Path(__file__).parent.parent
GOLDENS = np.load(Path(__file__).with_name("goldens") / "ops.npz")
INFINITY, NAN = float("inf"), float("nan")

# Inside, across each border, covering the image and more, beside it, smaller than a pixel, without area, inverted.
BOXES = torch.tensor(
    [
        [10.3, 5.2, 40.7, 30.1],
        [-7.5, 3.0, 9.0, 20.0],
        [3.0, -9.5, 20.0, 9.0],
        [45.0, 30.0, 70.0, 60.0],
        [0.0, 0.0, 53.0, 41.0],
        [-60.0, -50.0, 110.0, 90.0],
        [60.0, 2.0, 80.0, 20.0],
        [2.0, -30.0, 20.0, -5.0],
        [20.4, 11.4, 20.6, 11.6],
        [20.0, 11.0, 20.0, 30.0],
        [20.0, 11.0, 40.0, 11.0],
        [30.0, 30.0, 10.0, 10.0],
        [5.0, 5.0, 5.4, 40.0],
    ]
)
IMAGE = (41, 53)


def random_probs(masks, h, w):
    """Quarters: many pixels then meet a threshold of 0.25 or 0.5 exactly."""
    return (torch.rand(masks, h, w) * 4).round() / 4


@pytest.mark.parametrize("threshold", [0.5, 0.25, 0.9, -1.0])
@pytest.mark.parametrize(("h", "w"), [(28, 28), (1, 1), (7, 19), (112, 5)])
def test_equals_reference_byte_for_byte(device, poisoned_memory, h, w, threshold):
    probs = random_probs(len(BOXES), h, w)
    result = paste_masks(probs.to(device), BOXES.to(device), IMAGE, threshold)
    expected = reference(probs, BOXES, IMAGE, threshold)
    assert result.dtype == expected.dtype == (torch.bool if threshold > 0 else torch.uint8)
    assert torch.equal(result.cpu(), expected)


@pytest.mark.parametrize("image_size", [(1, 1), (1, 64), (64, 1), (33, 300), (300, 33)])
def test_equals_reference_on_any_image(device, image_size):
    height, width = image_size
    corner = torch.rand(20, 2) * torch.tensor([width, height]) * 1.4 - 0.2 * torch.tensor([width, height])
    boxes = torch.cat([corner, corner + torch.rand(20, 2) * torch.tensor([2.0, 200.0])], 1)
    probs = torch.rand(20, 14, 14)
    for threshold in (0.5, -1.0):
        result = paste_masks(probs.to(device), boxes.to(device), image_size, threshold)
        assert torch.equal(result.cpu(), reference(probs, boxes, image_size, threshold))


def test_reference_is_grid_sample():
    boxes, probs = BOXES[:9].double(), torch.rand(9, 11, 17, dtype=torch.float64)
    x, y = torch.arange(53) + 0.5, torch.arange(41) + 0.5
    grid_x = (x - boxes[:, :1]) / (boxes[:, 2:3] - boxes[:, :1]) * 2 - 1
    grid_y = (y - boxes[:, 1:2]) / (boxes[:, 3:] - boxes[:, 1:2]) * 2 - 1
    grid = torch.stack([grid_x[:, None, :].expand(9, 41, 53), grid_y[:, :, None].expand(9, 41, 53)], -1)
    expected = torch.nn.functional.grid_sample(probs[:, None], grid, align_corners=False)[:, 0]
    torch.testing.assert_close(paste_probs(probs, boxes, IMAGE), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("key", ["paste_prob", "paste_prob_full"])
def test_equals_mmdetection(device, key):
    """Which pastes within the boxes, and over the whole image."""
    probs, boxes, expected = (torch.from_numpy(GOLDENS[name]) for name in ("paste_prob_in", "paste_boxes", key))
    torch.testing.assert_close(paste_probs(probs[:, 0], boxes, (75, 90)), expected, rtol=0, atol=1e-6)
    result = paste_masks(probs[:, 0].to(device), boxes.to(device), (75, 90))
    assert torch.equal(result.cpu(), expected >= 0.5)


def test_equals_the_numbers_of_a_public_check():
    # A hash's values in [0, 1) as the mask, and what mmdetection's pasting makes of them.
    h = (np.arange(1, 785, dtype=np.uint64) * 2654435761 + zlib.crc32(b"mask")) % 2**32
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        h = (h ^ h >> np.uint64(shift)) * np.uint64(factor) % 2**32
    probs = torch.from_numpy(h / 2**32).float().view(1, 28, 28)
    boxes = torch.tensor([[3.2, 4.7, 40.1, 30.9]])
    soft = paste_probs(probs, boxes, (48, 64))
    assert abs(soft.sum().item() - 492.9503) < 1e-3 and abs(soft[0, 10, 10].item() - 0.7120686) < 1e-6
    assert paste_masks(probs, boxes, (48, 64)).sum() == 509


def test_by_hand(device):
    # One cell of probability 1 over [1, 3) x [1, 2): bilinear, so the value falls from 1 at the centre (2, 1.5) by a
    # half for each half width. Pixel centres in x: 0.5, 1.5, 2.5, 3.5 -> 1/4, 3/4, 3/4, 1/4; in y: -> 0, 1, 0.
    probs, boxes = torch.ones(1, 1, 1).to(device), torch.tensor([[1.0, 1.0, 3.0, 2.0]]).to(device)
    assert paste_masks(probs, boxes, (3, 4), -1).tolist() == [[[0] * 4, [63, 191, 191, 63], [0] * 4]]
    assert paste_masks(probs, boxes, (3, 4), 0.75).tolist() == [[[False] * 4, [False, True, True, False], [False] * 4]]


def test_soft_values_are_clipped(device):
    probs = torch.tensor([-0.5, 2.0, NAN, 0.5])[:, None, None]
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(4, 4)
    assert paste_masks(probs.to(device), boxes.to(device), (1, 1), -1).flatten().tolist() == [0, 255, 0, 127]


@pytest.mark.parametrize("width", [1, 7, 8, 9, 31, 64, 53])
def test_packed_is_numpy_packbits(device, poisoned_memory, width):
    probs = random_probs(len(BOXES), 14, 14)
    packed = paste_masks(probs.to(device), BOXES.to(device), (41, width), packed=True)
    masks = reference(probs, BOXES, (41, width))
    assert packed.dtype == torch.uint8 and packed.shape == (len(BOXES), 41, -(-width // 8))
    assert np.array_equal(packed.cpu().numpy(), np.packbits(masks.numpy(), axis=-1, bitorder="little"))


def test_packed_by_hand(device):
    # Columns 1 to 8 of 10: bits 1 to 7 of the first byte, bit 0 of the second.
    packed = paste_masks(
        torch.ones(1, 16, 16).to(device), torch.tensor([[1.0, 0, 9, 1]]).to(device), (2, 10), 0.5, True
    )
    assert packed.tolist() == [[[0b11111110, 0b00000001], [0, 0]]]


@pytest.mark.parametrize("threshold", [0.5, 0.3, 1e-6, 2.0])
def test_cells_next_to_the_threshold_and_infinite_ones(device, threshold):
    # Between cells that are all on one side of the threshold the kernel does not look at pixels: rounding must not
    # matter there. An infinite cell with a weight of 0 is NaN, which is not >= threshold.
    at = torch.tensor(threshold)
    below, above = (torch.nextafter(at, torch.tensor(limit)) for limit in (-INFINITY, INFINITY))
    values = torch.stack([below, at, above, at * (1 - 2**-19), at * (1 + 2**-19), *torch.tensor([0.0, 3e38])])
    special = torch.cat([values, torch.tensor([-3e38, INFINITY, -INFINITY, NAN])])
    boxes = torch.cat([BOXES, BOXES.round() * 2])
    for choice in (values[:5], values, special):
        probs = choice[torch.randint(len(choice), (len(boxes), 6, 5))]
        result = paste_masks(probs.to(device), boxes.to(device), IMAGE, threshold)
        assert torch.equal(result.cpu(), reference(probs, boxes, IMAGE, threshold))


def test_smooth_masks_equal_reference(device):
    y, x = torch.meshgrid(torch.linspace(-1, 1, 28), torch.linspace(-1, 1, 28), indexing="ij")
    radius = (torch.arange(len(BOXES)) / len(BOXES))[:, None, None]
    probs = torch.sigmoid(20 * (radius - (x * x + y * y).sqrt()))
    for boxes in (BOXES, BOXES * 3 - 20):
        result = paste_masks(probs.to(device), boxes.to(device), (120, 150))
        assert torch.equal(result.cpu(), reference(probs, boxes, (120, 150)))


def test_a_mask_of_more_pixels_than_detectron2_can_paste(device):
    # "Default GPU_MEM_LIMIT in mask_ops.py is too small": its assertion fails beyond 2**28 pixels in one mask.
    height, width = 16_400, 16_400
    boxes = torch.tensor([[100.0, 16_390, 116, 16_420]])
    packed = paste_masks(torch.ones(1, 28, 28).to(device), boxes.to(device), (height, width), packed=True)
    assert packed.shape == (1, height, 2050)
    assert not packed[0, : height - 10].any()
    assert (packed[0, height - 10 :, 12] == 0b11110000).all() and (packed[0, height - 10 :, 13] == 255).all()
    assert (packed[0, height - 10 :, 14] == 0b00001111).all()


def free_gigabytes(device):
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0] / 2**30
    found = re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text()) if sys.platform == "linux" else None
    return int(found[1]) / 2**20 if found else 0.0


def test_a_result_of_more_than_2_to_the_31_elements(device):
    side = 26_760  # three masks: 2**31 is passed inside the last
    if free_gigabytes(device) < 4:
        pytest.skip("needs 4 GB")
    boxes = torch.tensor([[0.0, 0, 9, 5], [side - 7, 100, side, 104], [side - 6, side - 3, side, side]])
    masks = paste_masks(torch.ones(3, 28, 28).to(device), boxes.to(device), (side, side))
    assert masks.numel() > 2**31 and masks[:2].numel() < 2**31
    expected = [(0, 5, 0, 9), (100, 104, side - 7, side), (side - 3, side, side - 6, side)]
    for mask, (top, bottom, left, right) in zip(masks, expected, strict=True):
        assert mask[top:bottom, left:right].all()
        mask[top:bottom, left:right] = False
    assert masks.view(torch.int64).count_nonzero() == 0  # eight pixels at a time


def test_more_masks_than_a_grid_has_rows(device):
    # mmdetection#356, #416: beyond 65,535 blocks the launch failed, and the run went on.
    count = 70_000
    boxes = torch.tensor([[0.0, 0, 1, 1], [1, 0, 2, 1], [2, 0, 3, 1]]).repeat(count, 1)[:count]
    masks = paste_masks(torch.ones(count, 1, 1).to(device), boxes.to(device), (1, 3))
    assert torch.equal(masks[:, 0].cpu(), torch.eye(3, dtype=torch.bool).repeat(count, 1)[:count])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_the_result():
    # mmdetection#8232: 8000 x 4000 pixels ran out of memory; a grid of float32 coordinates for 20 such masks is 5 GB.
    script = """
import re, torch, cascadeops
kilobytes = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
probs, boxes = torch.rand(20, 28, 28), torch.tensor([0.0, 0, 8000, 4000]).repeat(20, 1)
cascadeops.paste_masks(probs, boxes, (40, 80), packed=True)
before = kilobytes()
result = cascadeops.paste_masks(probs, boxes, (4000, 8000), packed=True)
print(kilobytes() - before, result.numel() // 1024)
"""
    output = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    grown, result = map(int, output.split())
    assert 0.9 * result < grown < result + 8 * 1024


def test_no_masks(device):
    result = paste_masks(torch.zeros(0, 28, 28).to(device), torch.zeros(0, 4).to(device), (5, 6))
    assert result.shape == (0, 5, 6) and result.dtype == torch.bool


def test_non_contiguous_and_unaligned_input(device):
    probs = torch.rand(len(BOXES), 9, 13)
    expected = reference(probs, BOXES, IMAGE)
    transposed = probs.transpose(1, 2).contiguous().transpose(1, 2)
    shifted = torch.cat([torch.zeros(1), BOXES.flatten()])[1:].view_as(BOXES)  # starts at the second float
    assert torch.equal(paste_masks(transposed.to(device), shifted.to(device), IMAGE).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_dtypes_are_read_as_float32(device, dtype):
    probs, boxes = torch.rand(len(BOXES), 14, 14).to(dtype), BOXES.to(dtype)
    expected = reference(probs.float(), boxes.float(), IMAGE)
    assert torch.equal(paste_masks(probs.to(device), boxes.to(device), IMAGE).cpu(), expected)


def test_same_result_for_any_number_of_threads():
    probs, before, results = torch.rand(len(BOXES), 28, 28), torch.get_num_threads(), []
    boxes = BOXES * 20  # large enough to be shared out
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(paste_masks(probs, boxes, (820, 1060)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_box_that_is_not_finite_is_an_error_on_the_cpu_and_empty_on_cuda(device, kernels, value):
    probs, boxes = torch.ones(3, 4, 4), torch.tensor([0.0, 0.0, 9.0, 9.0]).repeat(3, 1)
    boxes[1, 2] = value
    if kernels == "cpu":
        with pytest.raises(RuntimeError, match="paste_masks: boxes must be finite; see row 1"):
            paste_masks(probs, boxes, (9, 9))
    else:
        assert paste_masks(probs.to(device), boxes.to(device), (9, 9)).flatten(1).any(1).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probs": torch.zeros(2, 1, 28, 28)}, r"paste_masks: probs must have shape \[N, h, w\], got \[2, 1, 28, 28\]"),
        ({"probs": torch.zeros(2, 0, 28)}, r"probs must have at least one cell each, got shape \[2, 0, 28\]"),
        ({"boxes": torch.zeros(3, 4)}, r"boxes must have shape \[N, 4\] = \[2, 4\], got \[3, 4\]"),
        ({"image_size": (0, 5)}, r"image_size \(height, width\) must be in \[1, 2\*\*23\], got \(0, 5\)"),
        ({"image_size": (5, -1)}, r"got \(5, -1\)"),
        ({"image_size": (5, 2**23 + 1)}, r"got \(5, 8388609\)"),
        ({"probs": torch.zeros(2, 28, 28, dtype=torch.int32)}, "probs must have a floating dtype, got int32"),
        ({"probs": torch.zeros(2, 28, 28, dtype=torch.bool)}, "probs must have a floating dtype, got bool"),
        ({"threshold": -1.0, "packed": True}, "packed masks need a positive threshold, got -1"),
        ({"threshold": 0.0}, "threshold must be positive, or negative for uint8 probabilities, got 0"),
        ({"threshold": NAN}, "threshold must be positive, or negative for uint8 probabilities, got nan"),
    ],
)
def test_errors(device, changes, message):
    arguments = {"probs": torch.zeros(2, 28, 28), "boxes": torch.zeros(2, 4), "image_size": (5, 5), "threshold": 0.5}
    arguments |= changes
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    with pytest.raises(RuntimeError, match=message):
        paste_masks(**moved)


@pytest.mark.parametrize(("threshold", "packed"), [(0.5, False), (-1.0, False), (0.5, True)])
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "strided", "empty"])
def test_opcheck(device, threshold, packed, layout):
    probs, boxes = torch.rand(len(BOXES), 7, 9, device=device), BOXES.to(device)
    if layout == "permuted":
        probs, boxes = probs.permute(2, 0, 1).contiguous().permute(1, 2, 0), boxes.T.contiguous().T
    elif layout == "strided":
        probs, boxes = probs[:, ::2, 1::3], boxes[:, [0, 0, 1, 1, 2, 2, 3, 3]][:, ::2]
    elif layout == "empty":
        probs, boxes = probs[:0], boxes[:0]
    torch.library.opcheck(torch.ops.cascadeops.paste_masks.default, (probs, boxes, *IMAGE, threshold, packed))


def test_autocast_changes_nothing(device):
    probs, boxes = torch.rand(len(BOXES), 7, 9).to(device), BOXES.to(device)
    expected = paste_masks(probs, boxes, IMAGE, -1.0)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(paste_masks(probs, boxes, IMAGE, -1.0), expected)


def test_compiles_without_a_graph_break(device):
    probs, boxes = torch.rand(len(BOXES), 7, 9).to(device), BOXES.to(device)
    compiled = torch.compile(paste_masks, fullgraph=True, backend="aot_eager")
    for packed in (False, True):
        expected = paste_masks(probs, boxes, IMAGE, packed=packed)
        assert torch.equal(compiled(probs, boxes, IMAGE, packed=packed), expected)


def test_exports(device):
    class Module(torch.nn.Module):
        def forward(self, probs, boxes):
            return paste_masks(probs, boxes, IMAGE)

    arguments = torch.rand(len(BOXES), 7, 9).to(device), BOXES.to(device)
    assert torch.equal(torch.export.export(Module(), arguments).module()(*arguments), Module()(*arguments))
