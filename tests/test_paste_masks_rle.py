"""paste_masks_rle: box-sized mask probabilities straight to COCO run-length encoding."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from cascadeops import paste_masks, paste_masks_rle
from cascadeops.reference.paste_masks_rle import paste_masks_rle as reference

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


def test_box_that_is_not_finite_is_an_error_on_the_cpu_and_empty_on_cuda(device):
    probs, boxes = torch.ones(3, 4, 4), torch.tensor([0.0, 0.0, 9.0, 9.0]).repeat(3, 1)
    boxes[1, 3] = NAN
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match="paste_masks_rle: boxes must be finite; see row 1"):
            paste_masks_rle(probs, boxes, (9, 9))
    else:
        assert coco.area(paste_masks_rle(probs.to(device), boxes.to(device), (9, 9))).tolist() == [81, 0, 81]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probs": torch.zeros(28, 28)}, r"paste_masks_rle: probs must have shape \[N, h, w\], got \[28, 28\]"),
        ({"boxes": torch.zeros(2, 5)}, r"boxes must have shape \[N, 4\] = \[2, 4\], got \[2, 5\]"),
        ({"image_size": (5, 0)}, r"image_size \(height, width\) must be in \[1, 2\*\*23\], got \(5, 0\)"),
        ({"image_size": (2**16, 2**16)}, r"image_size must hold fewer than 2\*\*32 pixels, got \(65536, 65536\)"),
        ({"probs": torch.zeros(2, 28, 28, dtype=torch.int64)}, "probs must have a floating dtype, got int64"),
        ({"threshold": -1.0}, "threshold must be positive, got -1"),
    ],
)
def test_errors(device, changes, message):
    arguments = {"probs": torch.zeros(2, 28, 28), "boxes": torch.zeros(2, 4), "image_size": (5, 5)} | changes
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    with pytest.raises(RuntimeError, match=message):
        paste_masks_rle(**moved)


def test_opcheck(device):
    probs, boxes = torch.rand(5, 7, 9).to(device), random_boxes(5, (37, 29), 40).to(device)
    torch.library.opcheck(torch.ops.cascadeops.paste_masks_rle.default, (probs, boxes, 37, 29, 0.5))


def test_operator_compiles_without_a_graph_break(device):
    probs, boxes = torch.rand(5, 7, 9).to(device), random_boxes(5, (37, 29), 40).to(device)
    operator = torch.ops.cascadeops.paste_masks_rle
    compiled = torch.compile(lambda p, b: operator(p, b, 37, 29, 0.5), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(probs, boxes), operator(probs, boxes, 37, 29, 0.5), strict=True):
        assert torch.equal(got, want)
