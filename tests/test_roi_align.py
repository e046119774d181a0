"""roi_align, RoIAlign and MultiScaleRoIAlign: torchvision's interfaces, results, and the inputs that it dies of."""

import inspect
import math
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import assert_close_to_reference

import cascadeops
from cascadeops.reference.roi_align import roi_align as reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LAYOUTS = (torch.contiguous_format, torch.channels_last)
OPTIONS = [(ratio, aligned) for ratio in (-1, 2) for aligned in (False, True)]


@pytest.fixture(scope="module")
def golden():
    """Inputs and results of torchvision 0.26.0 with torch 2.11.0 on the CPU, float32."""
    arrays = np.load(Path(__file__).parent / "goldens" / "torchvision_roi_align.npz")
    return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("ratio", "aligned"), OPTIONS)
def test_results_and_gradients_are_torchvisions(device, golden, ratio, aligned, layout):
    input = golden["input"].to(device).contiguous(memory_format=layout).requires_grad_()
    pooled = cascadeops.roi_align(input, golden["rois"].to(device), (5, 4), 0.5, ratio, aligned)
    (grad,) = torch.autograd.grad(pooled.square().sum(), input)
    torch.testing.assert_close(pooled.cpu(), golden[f"out_{ratio}_{aligned}"], rtol=0, atol=5e-6)
    torch.testing.assert_close(grad.cpu(), golden[f"grad_{ratio}_{aligned}"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_equals_reference_in_every_dtype_and_layout(device, golden, dtype, layout):
    input = golden["input"].to(device, dtype).contiguous(memory_format=layout)
    rois = golden["rois"].to(device)
    pooled = cascadeops.roi_align(input, rois, (3, 7), 0.5, aligned=True)
    assert pooled.dtype == dtype and pooled.is_contiguous(memory_format=layout)
    assert_close_to_reference(pooled, reference(input.double(), rois, (3, 7), 0.5, aligned=True))


def test_signatures_are_torchvisions():
    ops = pytest.importorskip("torchvision").ops
    for name in ("roi_align", "RoIAlign", "MultiScaleRoIAlign"):
        ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (cascadeops, ops))
        assert [(p.name, p.kind, p.default) for p in ours.values()] == [
            (p.name, p.kind, p.default) for p in theirs.values()
        ]
    for module, ours in ((ops.RoIAlign, cascadeops.RoIAlign), (ops.MultiScaleRoIAlign, cascadeops.MultiScaleRoIAlign)):
        arguments = (7, 0.25, 2, True) if module is ops.RoIAlign else (["a", "b"], 7, 2)
        assert repr(ours(*arguments)) == repr(module(*arguments))


def test_the_default_is_torchvisions_legacy_mode(device):
    # Scale 1, no shift: one sample at (1, 1) of the box [0, 2] x [0, 2] cut into one bin has 2 x 2 samples at 0.5, 1.5.
    input = torch.arange(9.0, device=device).reshape(1, 1, 3, 3)
    box = torch.tensor([[0.0, 0, 0, 2, 2]], device=device)
    assert cascadeops.roi_align(input, box, 1).item() == 4.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_list_of_boxes_is_the_same_as_rois(device, golden, dtype):
    input, rois = golden["input"].to(device), golden["rois"].to(device)
    rois = rois[rois[:, 0].argsort(stable=True)].to(dtype)
    per_image = [rois[rois[:, 0] == image, 1:] for image in range(2)]
    expected = cascadeops.roi_align(input, rois.float(), 3, 0.5)
    assert torch.equal(cascadeops.roi_align(input, per_image, 3, 0.5), expected)
    assert torch.equal(cascadeops.RoIAlign(3, 0.5, -1)(input, rois), expected)
    nothing = cascadeops.roi_align(input, [per_image[0][:0], per_image[1][:0]], (3, 3), 0.5)
    assert nothing.shape == (0, 3, 3, 3)


@pytest.mark.parametrize("ratio", [0, 2])
def test_multiscale_results_are_torchvisions(device, golden, ratio):
    maps = OrderedDict((name, golden[f"map_{name}"].to(device)) for name in "012")
    boxes = golden["boxes"].to(device)
    pool = cascadeops.MultiScaleRoIAlign(["0", "1", "2"], 3, ratio, canonical_scale=112)
    pooled = pool(maps | {"pool": maps["2"][:, :, ::2, ::2]}, [boxes[:10], boxes[10:]], [(160, 224), (150, 200)])
    torch.testing.assert_close(pooled.cpu(), golden[f"multi_{ratio}"], rtol=0, atol=1e-5)
    assert not pool.state_dict()


def test_multiscale_infers_its_scales_in_every_call(device):
    # A map that holds its row number: the value of a bin is where it lies, in cells.
    def rows(size):
        return torch.arange(float(size), device=device).reshape(1, 1, size, 1).expand(1, 1, size, size)

    pool = cascadeops.MultiScaleRoIAlign(["a"], 1, 1)
    box = [torch.tensor([[0.0, 8, 16, 24]], device=device)]
    assert pool({"a": rows(16)}, box, [(64, 64)]).item() == 4.0  # stride 4: the middle, 16 pixels, is cell 4
    assert pool({"a": rows(32)}, box, [(64, 64)]).item() == 8.0
    assert pool({"a": rows(16)}, box, [(64, 64), (30, 128)][:1]).item() == 4.0
    # A map of 17 rows for 64 pixels has the nearest power of two as its stride: 4.
    assert pool({"a": rows(17)}, box, [(64, 64)]).item() == 4.0


def test_multiscale_with_a_missing_level_takes_the_coarsest_map(device):
    # Strides 8 and 32. torchvision counts levels as if 16 was there, and leaves the largest box at 0.
    maps = {"a": torch.full((1, 1, 64, 64), 1.0, device=device), "b": torch.full((1, 1, 16, 16), 2.0, device=device)}
    sizes = torch.tensor([100.0, 223, 224, 447, 448, 500], device=device)
    boxes = torch.stack([sizes * 0, sizes * 0, sizes, sizes], dim=1)
    pooled = cascadeops.MultiScaleRoIAlign(["a", "b"], 1, 2)(maps, [boxes], [(512, 512)])
    assert pooled.flatten().tolist() == [1, 1, 2, 2, 2, 2]


def test_second_derivative_compile_export_and_autocast(device, golden):
    boxes = golden["rois"][:3].to(device)
    input = golden["input"].to(device)
    small = input[:, :1, :5, :6].double().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cascadeops.roi_align(x, boxes, 2, 0.5), small)
    assert torch.autograd.gradgradcheck(lambda x: cascadeops.roi_align(x, boxes, 2, 0.5), small)

    class Pool(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.many = cascadeops.RoIAlign(3, 0.5, 2), cascadeops.MultiScaleRoIAlign(["a", "b"], 2, 0)

        def forward(self, x, boxes):
            maps = {"a": x, "b": x[:, :, ::2, ::2]}
            return self.one(x, boxes), self.many(maps, [boxes[:2, 1:], boxes[2:, 1:]], [(34, 46)])

    expected = Pool()(input, boxes)
    compiled = torch.compile(Pool(), fullgraph=True, backend="aot_eager")(input, boxes)
    exported = torch.export.export(Pool(), (input, boxes)).module()(input, boxes)
    for result in (compiled, exported):
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    with torch.autocast(device.type, torch.bfloat16):
        half = cascadeops.roi_align(input.bfloat16(), boxes, 3, 0.5)
    # Coordinates stay float32 under autocast: the result is that of the rounded map.
    assert half.dtype == torch.bfloat16
    assert_close_to_reference(half, reference(input.bfloat16().double(), boxes, (3, 3), 0.5))


INPUT = torch.ones(2, 3, 32, 32)
BOX = (2.0, 3.0, 20.0, 25.0)


def bad_box(index=0.0, box=BOX):
    return torch.tensor([[index, *box], [0.0, *BOX]])


@pytest.mark.parametrize("index", [1e3, 1e6, 1e9, 2.0, -2.0, -1e6, 0.5, math.nan, math.inf, -math.inf, 2.0**31, 3e38])
def test_torchvision_2b_batch_index_out_of_range(index):
    with pytest.raises(RuntimeError, match=r"roi_align: boxes\[0, 0\] must be a batch index in \[-1, 2\), got"):
        cascadeops.roi_align(INPUT, bad_box(index), 7)
    with pytest.raises(RuntimeError, match=r"rois\[0, 0\] must be a batch index in \[-1, 2\), got"):
        torch.ops.cascadeops.multiscale_roi_align_backward(
            torch.ones(2, 3, 7, 7), [INPUT], bad_box(index), [1.0], 0, False, 1.0, True, 0, None
        )


@pytest.mark.parametrize("ratio", [-1, 2])
@pytest.mark.parametrize("box", [(math.nan, 3, 20, 25), (math.nan,) * 4, (2, 3, math.inf, 25), (-math.inf, 3, 20, 25)])
def test_torchvision_2b_and_issue_9273_box_that_is_not_finite(box, ratio):
    with pytest.raises(RuntimeError, match=r"roi_align: boxes\[0, \d\] must be finite, got (nan|inf|-inf)"):
        cascadeops.roi_align(INPUT, bad_box(box=box), 7, sampling_ratio=ratio)


def test_torchvision_2b_padding_row_is_zero(device):
    # torchvision returns what lies before the tensor.
    pooled = cascadeops.roi_align(INPUT.to(device), bad_box(-1.0).to(device), 7)
    assert not pooled[0].any() and pooled[1].all()


def test_torchvision_issue_4828_random_rois(device, kernels):
    rois = torch.rand(100, 5) * 100
    if kernels == "cpu":
        with pytest.raises(RuntimeError, match="must be a batch index"):
            cascadeops.roi_align(INPUT, rois, 7)
    else:
        assert not cascadeops.roi_align(INPUT.to(device), rois.to(device), 7)[rois[:, 0] >= 2].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": INPUT[0]}, r"roi_align: input must have shape \[N, C, H, W\].*got \[3, 32, 32\]"),
        ({"input": INPUT[:, :, :0, :0]}, r"roi_align: input must have .* one cell, got \[2, 3, 0, 0\]"),
        ({"input": INPUT[:0]}, r"roi_align: boxes\[0, 0\] must be a batch index in \[-1, 0\), got 0"),
        ({"input": INPUT.int()}, "input must have dtype float32, float64, float16 or bfloat16, got torch.int32"),
        ({"spatial_scale": math.inf}, "roi_align: spatial_scale must be positive and finite, got inf"),
        ({"spatial_scale": math.nan}, "roi_align: spatial_scale must be positive and finite, got nan"),
        ({"spatial_scale": 0.0}, "roi_align: spatial_scale must be positive and finite, got 0.0"),
        ({"output_size": 0}, r"output_size must be positive, got \(0, 0\)"),
        ({"output_size": (7, -1)}, r"output_size must be positive, got \(7, -1\)"),
        ({"boxes": torch.zeros(3, 4)}, r"roi_align: boxes must have shape \[K, 5\], got \[3, 4\]"),
        ({"boxes": torch.zeros(5)}, r"roi_align: boxes must have shape \[K, 5\], got \[5\]"),
        ({"boxes": torch.zeros(3, 5).long()}, "roi_align: boxes must have a floating dtype, got torch.int64"),
        ({"boxes": [torch.zeros(3, 4), torch.zeros(3, 5)]}, r"boxes\[1\] must have shape \[L, 4\], got \[3, 5\]"),
        ({"boxes": [torch.zeros(3, 4)] * 3}, "roi_align: boxes must hold one tensor for each of 2 images, got 3"),
        ({"boxes": bad_box().to("meta")}, "roi_align: boxes must be on the device of input, cpu, got meta"),
    ],
)
def test_errors_say_what_is_wrong(changes, message):
    arguments = {"input": INPUT, "boxes": bad_box(), "output_size": 7}
    with pytest.raises(RuntimeError, match=message):
        cascadeops.roi_align(**(arguments | changes))


def test_errors_of_the_multiscale_module():
    pool = cascadeops.MultiScaleRoIAlign(["a"], 7, 2)
    boxes = [torch.tensor([BOX]), torch.tensor([BOX])]
    with pytest.raises(ValueError, match=r"x must hold a map of \['a'\], got \['b'\]"):
        pool({"b": INPUT}, boxes, [(32, 32)] * 2)
    with pytest.raises(ValueError, match="image_shapes must hold the size of at least one image, got none"):
        pool({"a": INPUT}, boxes, [])
    with pytest.raises(RuntimeError, match=r"MultiScaleRoIAlign: boxes\[0\] must have shape \[L, 4\], got \[2, 5\]"):
        pool({"a": INPUT}, [bad_box()], [(32, 32)] * 2)
    # What the kernel finds in a row of the joined boxes is told in terms of the list: past an empty image, too.
    wrong = torch.tensor([BOX, (2.0, math.nan, 20, 25)])
    with pytest.raises(RuntimeError, match=r"^MultiScaleRoIAlign: boxes\[1\]\[1, 1\] must be finite, got nan"):
        pool({"a": INPUT}, [torch.empty(0, 4), wrong], [(32, 32)] * 2)
    with pytest.raises(RuntimeError, match=r"^roi_align: boxes\[0\]\[1, 1\] must be finite, got nan"):
        cascadeops.roi_align(INPUT, [wrong, torch.tensor([BOX])], 7)


@pytest.mark.parametrize("width", [1e6, 1e9, 1e30])
def test_torchvision_2b_wide_boxes_end_soon(device, width):
    # torchvision: "cannot create std::vector larger than max_size()", MemoryError.
    box = bad_box(box=(0.0, 0.0, width, width)).to(device)
    pooled = cascadeops.roi_align(INPUT.to(device), box, 7)
    assert torch.isfinite(pooled).all() and pooled[0, 0, 0, 0] <= 1


def test_torchvision_2b_sampling_ratio_of_100000(device):
    # torchvision takes half a minute and dies. On a map of ones every sample is 1.
    input = INPUT[:, :1].double().to(device)
    pooled = cascadeops.roi_align(input, bad_box().to(device), 2, sampling_ratio=100_000)
    torch.testing.assert_close(pooled, torch.ones_like(pooled))


def test_torchvision_issue_8206_a_large_batch(device):
    # Many RoIs of one bin each, all of which must be written.
    input = torch.ones(1, 1, 4, 4, device=device)
    boxes = torch.tensor([[0.0, 0, 0, 2, 2]], device=device).expand(300_000, 5)
    assert bool((cascadeops.roi_align(input, boxes, 1, sampling_ratio=1) == 1).all())


def test_torchvision_issue_8168_deterministic_mode_needs_no_extra_memory(device):
    # The fixture has switched deterministic algorithms on: no error, no other path, and the same bits.
    assert torch.are_deterministic_algorithms_enabled()
    input = INPUT.to(device).requires_grad_()
    first, second = (
        torch.autograd.grad(cascadeops.roi_align(input, bad_box().to(device), 7).sum(), input)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


def test_addresses_beyond_2_31_elements():
    # Memory that is only reserved: the last image begins 2^31 elements and more after the first.
    gap = 2**30 + 2**20
    values = torch.from_numpy(np.zeros(2 * gap + 64, dtype=np.float16))
    input = values.as_strided((3, 1, 8, 8), (gap, 64, 8, 1))
    input[2] = torch.arange(64.0).reshape(8, 8)
    box = torch.tensor([[2.0, 0, 0, 8, 8]])
    assert torch.equal(cascadeops.roi_align(input, box, 8, aligned=True)[0], input[2])
    # The same for the gradient's RoIs.
    rois = torch.tensor([[0.0, 0, 0, 8, 8], [-1, 0, 0, 0, 0], [0.0, 0, 0, 8, 8]])
    (grad,) = torch.ops.cascadeops.multiscale_roi_align_backward(
        input, [torch.zeros(1, 1, 8, 8).half()], rois, [1.0], 0, True, 1.0, True, 0, None
    )
    assert torch.equal(grad[0], input[2])
