"""paste_masks_rle: box-sized mask probabilities straight to COCO run-length encoding."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from cascadeops import paste_masks, paste_masks_rle
from cascadeops.reference.paste_masks_rle import paste_masks_rle as reference

ROOT = Path(__file__).parent.parent
NAN = float("nan")


def encoded(masks):
    return [coco.encode(np.asfortranarray(mask.cpu().numpy().view(np.uint8))) for mask in masks]


def random_boxes(masks, image_size, largest):
    """Centres inside the image and around it."""
    extent = torch.tensor([image_size[1], image_size[0]])
    centre = torch.rand(masks, 2) * extent * 1.6 - extent * 0.3
    size = torch.rand(masks, 2) * largest
    return torch.cat([centre - size / 2, centre + size / 2], 1)


@pytest.mark.parametrize("largest", [2.0, 40.0, 400.0])
@pytest.mark.parametrize("image_size", [(1, 1), (1, 50), (50, 1), (31, 97), (97, 31), (64, 64)])
@pytest.mark.parametrize(("h", "w"), [(28, 28), (1, 1), (5, 17), (3, 2)])
def test_is_pycocotools_of_the_pasted_masks(device, h, w, image_size, largest):
    probs = (torch.rand(12, h, w) * 4).round() / 4
    boxes = random_boxes(12, image_size, largest)
    boxes[0] = torch.tensor([0.0, 0.0, image_size[1], image_size[0]])
    boxes[1:3] = boxes[1:3].round()
    for threshold in (0.5, 0.2, 1.0):
        result = paste_masks_rle(probs.to(device), boxes.to(device), image_size, threshold)
        assert result == encoded(paste_masks(probs, boxes, image_size, threshold))


def test_equals_reference(device):
    probs, boxes = torch.rand(10, 7, 9), random_boxes(10, (37, 29), 40)
    assert paste_masks_rle(probs.to(device), boxes.to(device), (37, 29)) == reference(probs, boxes, (37, 29))


@pytest.mark.parametrize(
    ("box", "counts"),
    [
        # Columns of 3 pixels, 4 of them. Runs: the number of zeros, of ones, of zeros ...
        ([1.0, 1.0, 3.0, 2.0], [4, 1, 2, 1, 4]),  # row 1 of columns 1 and 2
        ([1.0, 0.0, 3.0, 3.0], [3, 6, 3]),  # columns 1 and 2 from top to bottom: one run
        ([0.0, 0.0, 4.0, 3.0], [0, 12]),  # the whole image
        ([0.0, 1.0, 2.0, 3.0], [1, 2, 1, 2, 6]),  # a run ends at the bottom, the next column starts with a zero
        ([2.0, 0.0, 4.0, 1.0], [6, 1, 2, 1, 2]),  # the last column
        ([9.0, 9.0, 12.0, 12.0], [12]),  # beside the image
        ([2.0, 1.0, 2.0, 2.0], [12]),  # no area
        ([3.0, 2.0, 1.0, 1.0], [12]),  # inverted
    ],
)
def test_by_hand(device, box, counts):
    # A number is written as five-bit groups plus 48, from the fourth run on as its difference from the run two before.
    # All numbers here fit one group: n -> chr(48 + n mod 32). Cells are finer than pixels, so the box's pixels are 1.
    stored = [run - counts[i - 2] if i > 2 else run for i, run in enumerate(counts)]
    expected = bytes(48 + number % 32 for number in stored)
    result = paste_masks_rle(torch.ones(1, 8, 8).to(device), torch.tensor([box]).to(device), (3, 4))
    assert result == [{"size": [3, 4], "counts": expected}]


def test_empty_mask_amid_others(device):
    probs = torch.ones(3, 20, 20)
    probs[1] = 0
    boxes = torch.tensor([5.0, 5.0, 20.0, 20.0]).repeat(3, 1)
    result = paste_masks_rle(probs.to(device), boxes.to(device), (30, 40))
    assert coco.area(result).tolist() == [225, 0, 225]


def test_no_masks(device):
    assert paste_masks_rle(torch.zeros(0, 28, 28).to(device), torch.zeros(0, 4).to(device), (5, 6)) == []


def test_more_masks_than_a_block_has_threads(device):
    probs, boxes = torch.rand(1100, 2, 2), random_boxes(1100, (9, 8), 9)
    result = paste_masks_rle(probs.to(device), boxes.to(device), (9, 8))
    assert result == encoded(paste_masks(probs, boxes, (9, 8)))


def test_a_thousand_masks_on_an_image_of_a_billion_pixels(device):
    # As masks these would be a terabyte. Ones over whole pixels, in cells finer than these, fill their box exactly.
    side, masks = 32_768, 1000
    first = torch.randint(0, side - 60, (masks, 2))
    size = torch.randint(1, 60, (masks, 2))
    boxes = torch.cat([first, first + size], 1).float()
    boxes[0] = torch.tensor([0.0, 0.0, side, side])
    probs = torch.ones(masks, 64, 64)
    probs[0] = torch.rand(64, 64)
    result = paste_masks_rle(probs.to(device), boxes.to(device), (side, side))
    bounds = np.array([coco.toBbox(rle) for rle in result[1:]])
    assert np.array_equal(bounds, torch.cat([first, size], 1)[1:].numpy())
    # One by one: pycocotools' area of 1,000 masks at once overflows.
    assert [int(coco.area(rle)) for rle in result[1:]] == size.prod(1)[1:].tolist()
    packed = paste_masks(probs[:1].to(device), boxes[:1].to(device), (side, side), packed=True).cpu().numpy()
    ones = np.array([bin(byte).count("1") for byte in range(256)])
    assert int(coco.area(result[0])) == sum(int(ones[rows].sum()) for rows in np.array_split(packed[0], 256))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_time_and_memory_of_a_thousand_masks_on_an_image_of_a_billion_pixels():
    # One mask of that image is a gigabyte. Large and small detections with soft edges, as of a real image.
    script = """
import re, time, torch, cascadeops
from cascadeops import paste_masks_rle
kilobytes = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
torch.manual_seed(0)
side, masks = 32_768, 1000
centre, size = torch.rand(masks, 2) * side, 8 * (2000 / 8) ** torch.rand(masks, 2)
boxes = torch.cat([centre - size / 2, centre + size / 2], 1)
y, x = torch.meshgrid(torch.linspace(-1, 1, 28), torch.linspace(-1, 1, 28), indexing="ij")
probs = torch.sigmoid(8 * (0.4 + 0.5 * torch.rand(masks, 1, 1) - (x * x + y * y).sqrt()))
paste_masks_rle(probs[:1], boxes[:1], (9, 9))
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before, start = kilobytes(), time.process_time()
result = paste_masks_rle(probs, boxes, (side, side))
print(time.process_time() - start, kilobytes() - before, sum(len(rle["counts"]) for rle in result) // 1024)
"""
    output = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    seconds, grown, result = map(float, output.split())  # seconds of the processor; kilobytes
    assert result > 300  # masks were drawn
    assert grown < 16 * result + 8 * 1024 and seconds < 20, output


@pytest.mark.parametrize("image_size", [(32_768, 150), (150, 32_768), (3000, 4000)])
def test_large_masks_are_pycocotools_of_the_pasted_ones(device, image_size):
    height, width = image_size
    y, x = torch.meshgrid(torch.linspace(-1, 1, 28), torch.linspace(-1, 1, 28), indexing="ij")
    probs = torch.sigmoid(8 * (0.7 - (x * x + y * y).sqrt()) + torch.randn(4, 28, 28))
    boxes = torch.tensor([[-0.1, -0.1, 1.1, 1.1], [0, 0, 1, 1], [0.3, 0.2, 0.6, 0.9], [0.5, -0.5, 3, 1.5]])
    boxes = boxes * torch.tensor([width, height, width, height])
    result = paste_masks_rle(probs.to(device), boxes.to(device), image_size)
    assert result == encoded(paste_masks(probs, boxes, image_size))


def runs_of(counts):
    """Run lengths of the compressed form, from its description (csrc/common/rle.h)."""
    runs, value, shift = [], 0, 0
    for byte in counts:
        assert 48 <= byte < 112  # printable: no NUL can end the string early
        group = byte - 48
        value |= (group & 31) << shift
        shift += 5
        if not group & 32:
            value -= (group >> 4 & 1) << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    assert shift == 0  # the last number ends: pycocotools reads beyond the string otherwise
    return runs


def test_runs_of_more_than_2_to_the_31_pixels(device):
    # Seven bytes a number, where pycocotools' encoder allots six and a NUL: heap overflow.
    height, width = 65_535, 65_536
    boxes = torch.tensor([[width - 2.0, height - 3, width, height], [0, 0, 1, 2], [0, 0, width, height]])
    probs = torch.ones(3, 64, 64)
    probs[2] = 0
    result = paste_masks_rle(probs.to(device), boxes.to(device), (height, width))
    total = height * width
    first = (width - 2) * height + height - 3
    assert runs_of(result[0]["counts"]) == [first, 3, height - 3, 3]
    assert runs_of(result[1]["counts"]) == [0, 2, total - 2]
    assert runs_of(result[2]["counts"]) == [total]
    assert len(result[2]["counts"]) == 7


def test_runs_that_end_pycocotools_process_are_never_written(device):
    # Its decoder, toBbox and merge trust the counts: they must add up to the image, and none but the first be 0
    # (cocodataset PR 477: the box of repeated zeros is wrong). No mask has no counts: merging empty ones is a crash.
    probs = torch.cat([torch.rand(20, 5, 7), torch.zeros(1, 5, 7), torch.ones(1, 5, 7)])
    for height, width in ((1, 1), (1, 40), (40, 1), (23, 31)):
        boxes = random_boxes(22, (height, width), 40)
        boxes[-1] = torch.tensor([-9.0, -9, width + 9, height + 9])
        for rle in paste_masks_rle(probs.to(device), boxes.to(device), (height, width)):
            runs = runs_of(rle["counts"])
            assert sum(runs) == height * width and runs and all(runs[1:]) and rle["size"] == [height, width]


def test_every_second_pixel(device):
    # The most runs an image can have (NVIDIA/cocoapi PR 11: pasting outran a buffer of fixed size).
    height, width = 60, 70
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    boxes = torch.tensor([[0.0, 0, width, height]]).repeat(2, 1)  # a cell is a pixel
    probs = torch.stack([(x + y) % 2, (y + 1) % 2]).float()
    result = paste_masks_rle(probs.to(device), boxes.to(device), (height, width), 0.75)
    assert result == encoded(probs.byte())
    assert len(runs_of(result[1]["counts"])) == height * width + 1


def test_more_masks_than_a_grid_has_rows(device):
    boxes = torch.tensor([[0.0, 0, 1, 1], [1, 0, 2, 1], [2, 0, 3, 1]]).repeat(70_000, 1)[:70_000]
    result = paste_masks_rle(torch.ones(70_000, 1, 1).to(device), boxes.to(device), (1, 3))
    due = [runs_of(rle["counts"]) for rle in result[:3]]
    assert due == [[0, 1, 2], [1, 1, 1], [2, 1]]
    assert all(rle["counts"] == result[i % 3]["counts"] for i, rle in enumerate(result))


def test_smooth_masks(device):
    # Most of their pixels lie between cells on one side of the threshold, where the CPU kernel does not evaluate them.
    y, x = torch.meshgrid(torch.linspace(-1, 1, 28), torch.linspace(-1, 1, 28), indexing="ij")
    probs = torch.sigmoid(20 * (torch.linspace(0, 1.5, 12)[:, None, None] - (x * x + y * y).sqrt()))
    for image_size in ((211, 180), (40, 300)):
        boxes = random_boxes(12, image_size, 300)
        result = paste_masks_rle(probs.to(device), boxes.to(device), image_size)
        assert result == encoded(paste_masks(probs, boxes, image_size))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_dtypes_are_read_as_float32(device, dtype):
    probs, boxes = torch.rand(5, 7, 9).to(dtype), random_boxes(5, (37, 29), 40).to(dtype)
    result = paste_masks_rle(probs.to(device), boxes.to(device), (37, 29))
    assert result == reference(probs.float(), boxes.float(), (37, 29))


def test_non_contiguous_input(device):
    probs, boxes = torch.rand(5, 7, 9), random_boxes(5, (37, 29), 40)
    result = paste_masks_rle(
        probs.permute(2, 0, 1).contiguous().permute(1, 2, 0).to(device), boxes.T.contiguous().T.to(device), (37, 29)
    )
    assert result == reference(probs, boxes, (37, 29))


def test_same_result_for_any_number_of_threads():
    probs, boxes, before, results = torch.rand(9, 28, 28), random_boxes(9, (80, 90), 90), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(paste_masks_rle(probs, boxes, (80, 90)))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1]


def test_box_that_is_not_finite_is_an_error(device):
    probs, boxes = torch.ones(3, 4, 4, device=device), torch.tensor([0.0, 0.0, 9.0, 9.0], device=device).repeat(3, 1)
    boxes[1, 3] = NAN
    with pytest.raises(RuntimeError, match="paste_masks_rle: boxes must be finite; see row 1"):
        paste_masks_rle(probs, boxes, (9, 9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probs": torch.zeros(28, 28)}, r"paste_masks_rle: probs must have shape \[N, h, w\], got \[28, 28\]"),
        ({"boxes": torch.zeros(2, 5)}, r"boxes must have shape \[N, 4\] = \[2, 4\], got \[2, 5\]"),
        ({"image_size": (5, 0)}, r"image_size \(height, width\) must be in \[1, 2\*\*23\], got \(5, 0\)"),
        ({"image_size": (2**16, 2**16)}, r"image_size must hold fewer than 2\*\*32 pixels, got \(65536, 65536\)"),
        ({"probs": torch.zeros(2, 28, 28, dtype=torch.int64)}, "probs must have a floating dtype, got int64"),
        ({"image_size": (2**20, 2**20)}, "image_size must hold fewer than"),  # pycocotools' decoder of such: a crash
        ({"image_size": (0, 5)}, r"must be in \[1, 2\*\*23\], got \(0, 5\)"),  # its toBbox: division by 0
        ({"threshold": -1.0}, "threshold must be positive, got -1"),
    ],
)
def test_errors(device, changes, message):
    arguments = {"probs": torch.zeros(2, 28, 28), "boxes": torch.zeros(2, 4), "image_size": (5, 5)} | changes
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    with pytest.raises(RuntimeError, match=message):
        paste_masks_rle(**moved)


@pytest.mark.parametrize("image_size", [(5.0, 5.0), (5, None), 5.5, "55"])
def test_a_size_that_is_no_integer_is_an_error(image_size):  # pycocotools returns uninitialised memory for floats
    with pytest.raises(TypeError, match=r"paste_masks_rle: image_size must be two integers \(height, width\), got"):
        paste_masks_rle(torch.zeros(1, 2, 2), torch.zeros(1, 4), image_size)


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "empty"])
def test_opcheck(device, layout):
    probs, boxes = torch.rand(5, 7, 9).to(device), random_boxes(5, (37, 29), 40).to(device)
    if layout == "permuted":
        probs, boxes = probs.permute(2, 0, 1).contiguous().permute(1, 2, 0), boxes.T.contiguous().T
    elif layout == "empty":
        probs, boxes = probs[:0], boxes[:0]
    torch.library.opcheck(torch.ops.cascadeops.paste_masks_rle.default, (probs, boxes, 37, 29, 0.5))


def test_operator_exports(device):
    class Module(torch.nn.Module):
        def forward(self, probs, boxes):
            return torch.ops.cascadeops.paste_masks_rle(probs, boxes, 37, 29, 0.5)

    arguments = torch.rand(5, 7, 9).to(device), random_boxes(5, (37, 29), 40).to(device)
    exported = torch.export.export(Module(), arguments).module()
    for got, want in zip(exported(*arguments), Module()(*arguments), strict=True):
        assert torch.equal(got, want)


def test_operator_compiles_without_a_graph_break(device):
    probs, boxes = torch.rand(5, 7, 9).to(device), random_boxes(5, (37, 29), 40).to(device)
    operator = torch.ops.cascadeops.paste_masks_rle
    compiled = torch.compile(lambda p, b: operator(p, b, 37, 29, 0.5), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(probs, boxes), operator(probs, boxes, 37, 29, 0.5), strict=True):
        assert torch.equal(got, want)
