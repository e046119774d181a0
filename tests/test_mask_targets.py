"""mask_targets, which sees crops only, against RoIAlign of the bitmaps at image size, and mmdetection's results."""

from pathlib import Path

import numpy as np
import pytest
import torch

import cascadeops
from cascadeops.reference.mask_targets import mask_coverage
from cascadeops.reference.mask_targets import mask_targets as reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def crops(bitmaps, device):
    """bitmaps, offsets, windows of full-size bitmaps [G, H, W]; a window is one pixel larger where there is room."""
    height, width = bitmaps.shape[1:]
    pieces, offsets, windows = [torch.zeros(3, dtype=torch.uint8)], [], []  # crops need not begin at 0
    for bitmap in bitmaps:
        ys, xs = bitmap.nonzero(as_tuple=True)
        window = [0, 0, 0, 0]
        if len(ys):
            x0, y0 = max(int(xs.min()) - 1, 0), max(int(ys.min()) - 1, 0)
            window = [x0, y0, min(int(xs.max()) + 2, width) - x0, min(int(ys.max()) + 2, height) - y0]
        offsets.append(sum(len(piece) for piece in pieces))
        windows.append(window)
        pieces.append(bitmap[window[1] : window[1] + window[3], window[0] : window[0] + window[2]].flatten())
    return (
        torch.cat(pieces).to(device),
        torch.tensor(offsets, device=device),
        torch.tensor(windows, dtype=torch.int32, device=device),
    )


def random_objects(count, height, width):
    """Noise inside boxes of all sizes, some of them at the image's edges, the last one empty."""
    bitmaps = torch.zeros(count, height, width, dtype=torch.uint8)
    for bitmap in bitmaps[:-1]:
        (y0, y1), (x0, x1) = (torch.randint(-5, size + 6, (2,)).clamp(0, size).sort().values for size in bitmap.shape)
        bitmap[y0 : y1 + 1, x0 : x1 + 1] = torch.rand(bitmap[y0 : y1 + 1, x0 : x1 + 1].shape) < 0.6
    return bitmaps


def random_boxes(count, height, width):
    corners = torch.rand(count, 2, 2) * torch.tensor([width * 1.2, height * 1.2]) - torch.tensor([width, height]) * 0.1
    return torch.cat([corners.amin(1), corners.amax(1)], dim=1)


@pytest.mark.parametrize("output_size", [1, 7, 28])
def test_equals_the_bitmap_at_image_size(device, output_size):
    image_size = (61, 83)
    objects = crops(random_objects(9, *image_size), device)
    boxes, index = random_boxes(300, *image_size).to(device), torch.randint(-1, 9, (300,), device=device)
    targets = cascadeops.mask_targets(*objects, boxes, index, output_size)
    coverage = mask_coverage(*objects, boxes, index, output_size, image_size)
    assert targets.shape == (300, output_size, output_size) and targets.dtype == torch.uint8
    # Within the rounding of sums in another order a half is a tie.
    clear = (coverage - 0.5).abs() > 1e-6
    assert clear.float().mean() > 0.99
    assert torch.equal(targets[clear], (coverage >= 0.5).to(torch.uint8)[clear])


def test_boxes_on_whole_pixels_are_exact_in_ties(device):
    # Boxes on a grid of four pixels: weights are exact, and coverage of just a half, which is common here, is 1.
    image_size = (40, 48)
    objects = crops(random_objects(6, *image_size), device)
    corners = torch.randint(0, 8, (200, 2, 2)) * 4
    boxes = torch.cat([corners.amin(1), corners.amax(1) + 8], dim=1).float().to(device)
    index = torch.randint(0, 6, (200,), device=device)
    coverage = mask_coverage(*objects, boxes, index, 8, image_size)
    assert (coverage == 0.5).sum() > 100
    targets = cascadeops.mask_targets(*objects, boxes, index, 8)
    # Three samples per bin have weights that are not exact.
    sizes = (boxes[:, 2:] - boxes[:, :2]) / 8
    exact = (sizes.log2() == sizes.log2().round()).all(1)
    assert exact.sum() > 20
    assert torch.equal(targets[exact], (coverage >= 0.5).to(torch.uint8)[exact])


def test_a_box_on_its_object_is_filled(device):
    bitmap = torch.zeros(1, 20, 30, dtype=torch.uint8)
    bitmap[0, 4:12, 10:18] = 1
    objects = crops(bitmap, device)
    assert objects[2].tolist() == [[9, 3, 10, 10]]
    boxes = torch.tensor([[10.0, 4, 18, 12], [14, 4, 22, 12], [18, 12, 26, 20]], device=device)
    targets = cascadeops.mask_targets(*objects, boxes, torch.zeros(3, dtype=torch.int64, device=device), 4)
    assert targets[0].all()
    # Two pixels to a cell: the right half of the second box is off the object.
    assert targets[1].tolist() == [[1, 1, 0, 0]] * 4
    assert not targets[2].any()


def test_objects_at_the_edge_of_the_image_go_on_outside_of_it(device):
    # As RoIAlign of the whole image: the border's value counts up to one pixel outside.
    bitmap = torch.ones(1, 6, 6, dtype=torch.uint8)
    objects = crops(bitmap, device)
    boxes = torch.tensor([[-1.0, 0, 7, 6], [-4, 0, 8, 6]], device=device)
    index = torch.zeros(2, dtype=torch.int64, device=device)
    targets = cascadeops.mask_targets(*objects, boxes, index, 4)
    assert torch.equal(targets, reference(*objects, boxes, index, 4, (6, 6)))
    assert targets[0].all() and targets[1].any() and not targets[1].all()


def test_equals_mmdetection(device):
    goldens = np.load(Path(__file__).parent / "goldens" / "ops.npz")
    bitmaps, boxes, index, expected = (
        torch.from_numpy(goldens[f"mt_{key}"]) for key in ("masks", "props", "gt", "out")
    )
    targets = cascadeops.mask_targets(*crops(bitmaps, device), boxes.to(device), index.to(device))
    assert torch.equal(targets.cpu(), expected.to(torch.uint8))


def test_padding_empty_objects_and_no_boxes_at_all(device):
    objects = crops(random_objects(2, 16, 16), device)
    boxes = torch.tensor([[torch.nan, 0, 5, 5], [0, 0, 16, 16], [3, 3, 3, 3]], device=device)
    # Padding, the empty object, and a box without a size.
    index = torch.tensor([-1, 1, 0], device=device)
    assert not cascadeops.mask_targets(*objects, boxes, index).any()
    assert cascadeops.mask_targets(*objects, boxes[:0], index[:0], 14).shape == (0, 14, 14)


def test_a_box_of_a_billion_pixels_ends_soon(device):
    objects = crops(random_objects(2, 16, 16), device)
    boxes = torch.tensor([[-1e9, -1e9, 1e9, 1e9], [-1e38, 0, 1e38, 9]], device=device)
    assert not cascadeops.mask_targets(*objects, boxes, torch.zeros(2, dtype=torch.int64, device=device)).any()


def test_arguments_of_any_strides(device):
    bitmaps, offsets, windows = crops(random_objects(5, 30, 30), device)
    boxes, index = random_boxes(20, 30, 30).to(device), torch.randint(0, 5, (20,), device=device)

    strided = [spread(argument) for argument in (bitmaps, offsets, windows, boxes, index)]
    assert not any(argument.is_contiguous() for argument in strided)
    expected = cascadeops.mask_targets(bitmaps, offsets, windows, boxes, index)
    assert torch.equal(cascadeops.mask_targets(*strided), expected)


def test_results_do_not_depend_on_the_number_of_threads():
    objects = crops(random_objects(5, 50, 50), "cpu")
    boxes, index = random_boxes(100, 50, 50), torch.randint(0, 5, (100,))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = cascadeops.mask_targets(*objects, boxes, index)
        torch.set_num_threads(3)
        assert torch.equal(cascadeops.mask_targets(*objects, boxes, index), expected)
    finally:
        torch.set_num_threads(before)


def spread(tensor):
    """The same values, every second element of a larger tensor."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "strided", "empty"])
def test_opcheck(device, layout):
    arguments = [*crops(random_objects(3, 20, 20), device), random_boxes(6, 20, 20).to(device)]
    arguments.append(torch.randint(0, 3, (6,), device=device))
    if layout == "permuted":
        arguments[2:4] = [argument.T.contiguous().T for argument in arguments[2:4]]
    elif layout == "strided":
        arguments = [spread(argument) for argument in arguments]
    elif layout == "empty":
        arguments[3:] = [argument[:0] for argument in arguments[3:]]
    torch.library.opcheck(torch.ops.cascadeops.mask_targets, (*arguments, 7))


def test_compiles_exports_and_ignores_autocast(device):
    objects = crops(random_objects(3, 20, 20), device)
    arguments = *objects, random_boxes(6, 20, 20).to(device), torch.randint(0, 3, (6,), device=device)
    expected = cascadeops.mask_targets(*arguments)
    compiled = torch.compile(cascadeops.mask_targets, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), expected)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(cascadeops.mask_targets(*arguments), expected)

    class Module(torch.nn.Module):
        def forward(self, *arguments):
            return cascadeops.mask_targets(*arguments)

    assert torch.equal(torch.export.export(Module(), arguments).module()(*arguments), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bitmaps": torch.zeros(2, 8, dtype=torch.uint8)}, r"bitmaps must have shape \[total\], got \[2, 8\]"),
        ({"bitmaps": torch.zeros(16)}, "bitmaps must have dtype Byte, got Float"),
        ({"offsets": torch.tensor([0, 0])}, r"windows must have shape \[G, 4\] = \[2, 4\], got \[1, 4\]"),
        ({"offsets": torch.tensor([0], dtype=torch.int32)}, "offsets must have dtype Long, got Int"),
        ({"windows": torch.tensor([[0, 0, 4, 4]])}, "windows must have dtype Int, got Long"),
        ({"boxes": torch.zeros(1, 5)}, r"boxes must have shape \[K, 4\], got \[1, 5\]"),
        ({"boxes": torch.zeros(1, 4).double()}, "boxes must have dtype Float, got Double"),
        ({"boxes": torch.tensor([[0.0, 0, torch.inf, 1]])}, r"boxes\[0, 2\] must be finite, got inf"),
        ({"index": torch.tensor([0, 0])}, r"index must have shape \[K\] = \[1\], got \[2\]"),
        ({"index": torch.tensor([0.0])}, "index must have dtype Long, got Float"),
        ({"index": torch.tensor([1])}, r"index\[0\] must be in \[-1, 1\), got 1"),
        ({"index": torch.tensor([-2])}, r"index\[0\] must be in \[-1, 1\), got -2"),
        ({"output_size": 0}, r"output_size must be in \[1, 2\*\*15\], got 0"),
        ({"output_size": 2**32}, r"output_size must be in \[1, 2\*\*15\], got 4294967296"),
        (
            {"windows": torch.tensor([[0, 0, -1, 4]], dtype=torch.int32)},
            r"windows\[0\] must have a width and height of at least 0, got \(-1, 4\)",
        ),
        (
            {"windows": torch.tensor([[0, 0, 2**31 - 1, 2**31 - 1]], dtype=torch.int32)},
            r"windows\[0\] of 2147483647 x 2147483647 at offsets\[0\] = 0 must lie in bitmaps, which hold 16",
        ),
        (
            {"offsets": torch.tensor([1])},
            r"windows\[0\] of 4 x 4 at offsets\[0\] = 1 must lie in bitmaps, which hold 16",
        ),
        ({"offsets": torch.tensor([-1])}, r"windows\[0\] of 4 x 4 at offsets\[0\] = -1 must lie in bitmaps"),
    ],
)
def test_errors_say_what_is_wrong(changes, message):
    arguments = {
        "bitmaps": torch.ones(16, dtype=torch.uint8),
        "offsets": torch.tensor([0]),
        "windows": torch.tensor([[0, 0, 4, 4]], dtype=torch.int32),
        "boxes": torch.tensor([[0.0, 0, 4, 4]]),
        "index": torch.tensor([0]),
    }
    with pytest.raises(RuntimeError, match=f"mask_targets: {message}"):
        cascadeops.mask_targets(**(arguments | changes))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_skips_bad_rows_and_equals_the_cpu_bit_for_bit():
    objects = crops(random_objects(9, 61, 83), "cpu")
    boxes, index = random_boxes(300, 61, 83), torch.randint(-1, 9, (300,))
    expected = cascadeops.mask_targets(*objects, boxes, index)
    on_cuda = [argument.cuda() for argument in (*objects, boxes, index)]
    assert torch.equal(cascadeops.mask_targets(*on_cuda).cpu(), expected)
    on_cuda[4] = on_cuda[4] + 100
    assert not cascadeops.mask_targets(*on_cuda).any()
