"""RoIAlign: faults of torchvision, mmcv, mmdetection, detectron2 and others."""

import math

import torch
from guarded_memory import guarded_empty
from peer_faults import Fault, gives, raises, tested

from cascadeops import multiscale_roi_align, roi_align

TORCHVISION = "torchvision 0.26"
DIES = "ends the process"
INPUT = torch.ones(2, 3, 32, 32)
BOX = (2.0, 3.0, 20.0, 25.0)
OF_BACKWARD = "multiscale_roi_align: rois"  # what its gradient, called by itself, names


def rois(index=0.0, box=BOX):
    return torch.tensor([[index, *box]], dtype=torch.float32)


def pool(index=0.0, box=BOX, input=INPUT, output_size=7, **options):
    return roi_align(input, rois(index, box), output_size, **options)


def backward(index=0.0, box=BOX, grad=None):
    """The gradient of `pool` in the input, from a gradient of ones."""
    grad = torch.ones(1, 3, 7, 7) if grad is None else grad
    operator = torch.ops.cascadeops.multiscale_roi_align_backward
    return operator(grad, [INPUT], rois(index, box), [1.0], 0, False, 1.0, True, 0, None)[0]


def is_batch_index(got: str, batch: int = 2, argument: str = "roi_align: boxes") -> str:
    return f"{argument}[0, 0] must be a batch index in [-1, {batch}), got {got}"


def is_finite(column: int, got: str, argument: str = "roi_align: boxes") -> str:
    return f"{argument}[0, {column}] must be finite, got {got}"


def gradient_of_smaller_bins() -> bool:
    leaf = INPUT.clone().requires_grad_()
    pool(input=leaf, output_size=3).sum().backward()
    return torch.equal(backward(grad=torch.ones(1, 3, 3, 3)), leaf.grad)


def element_at(place: int) -> bool:
    """A map of two images, the second of which is the element at `place`; before it and behind it is no memory."""
    input = guarded_empty(place + 1, torch.float16).as_strided((2, 1, 1, 1), (place, 1, 1, 1))
    input[1] = 5
    return roi_align(input, rois(1, (0, 0, 1, 1)), 1).item() == 5


def levels_of_half_maps() -> bool:
    maps = [torch.full((1, 1, 16, 16), float(level)).half() for level in range(4)]
    sides = torch.arange(225.0, 447)
    corner = torch.zeros_like(sides)
    boxes = torch.stack([corner, corner, corner, sides, sides], 1)
    return bool((multiscale_roi_align(maps, boxes, 1, [1e3] * 4, 1) == 2).all())


def coordinates_of_half_maps() -> bool:
    # Cell 301 holds 1, the others 0: a sample at 300.9 reads 0.9. The nearest half types are 300.75 and 301.
    input = torch.zeros(1, 1, 1, 336, dtype=torch.float16)
    input[..., 301] = 1
    sample = pool(0, (300.4, 0, 301.4, 1), input, 1, sampling_ratio=1).float()
    return abs(sample.item() - 0.9) < 1e-3


def strided_and_plain_agree() -> bool:
    input = torch.rand(2, 32, 32, 6)[..., ::2].permute(0, 3, 1, 2)
    boxes = torch.rand(5, 10)[:, ::2].contiguous() * 9
    boxes[:, 0] = 1
    spread = torch.stack([boxes, boxes], 2)[..., 0]
    return torch.equal(roi_align(input, spread, 3), roi_align(input.contiguous(), boxes, 3))


FAULTS: dict[str, Fault] = {
    # Reports.
    "torchvision-9273": raises("pytorch/vision#9273, pytorch/vision#9272", "a NaN coordinate", DIES,
        is_finite(1, "nan"), lambda: pool(box=(math.nan, 3, 20, 25))),
    "torchvision-4828": tested("pytorch/vision#4828, pytorch/pytorch#67671", "rois of random numbers", DIES,
        "an error that names the batch index; on CUDA such rows are 0",
        "tests/test_roi_align.py::test_torchvision_issue_4828_random_rois"),
    "torchvision-8206": tested("pytorch/vision#8206", "a large batch", "a bus error on the CPU, nothing found on a GPU",
        "every RoI is pooled", "tests/test_roi_align.py::test_torchvision_issue_8206_a_large_batch",
        "tests/test_roi_align.py::test_addresses_beyond_2_31_elements"),
    "torchvision-8168": tested("pytorch/vision#8168, pytorch/pytorch#115726", "deterministic mode, or torch.compile",
        "another code path, out of memory", "the same kernel and bits, no more memory",
        "tests/test_roi_align.py::test_torchvision_issue_8168_deterministic_mode_needs_no_extra_memory",
        "tests/test_roi_align.py::test_second_derivative_compile_export_and_autocast"),
    "mmcv-604": raises("open-mmlab/mmcv#604", "boxes without a batch index in front, as it seems",
        "an illegal memory access", is_batch_index("11"), lambda: pool(11, (40, 52, 90, 0.7))),
    "longcw-10": raises("longcw/RoIAlign.pytorch#10", "boxes on another device than the map",
        "an illegal memory access", "roi_align: boxes must be on the device of input, cpu, got meta",
        lambda: roi_align(INPUT, rois().to("meta"), 7)),
    "redet-86": raises("csuhan/ReDet#86", "the backward pass of boxes from bad annotations, as it seems",
        "an illegal memory access", is_finite(3, "nan", OF_BACKWARD), lambda: backward(box=(2, 3, math.nan, 25))),
    "maskrcnn-benchmark-45": raises("facebookresearch/maskrcnn-benchmark#45, facebookresearch/detectron2#1439",
        "a training that has diverged, as it seems", "an illegal memory access, somewhere later", is_finite(1, "inf"),
        lambda: pool(box=(math.inf,) * 4)),
    "mmdetection-levels-in-half": gives("mmdetection 3.3, SingleRoIExtractor",
        "RoIs of 260 to 440 pixels under float16 autocast", "their area overflows: level P5 instead of P4",
        "RoIs are float32: P4", levels_of_half_maps),
    "mmdetection-rois-in-half": raises("mmdetection 3.3, SingleRoIExtractor", "RoIs converted to float16",
        "coordinates above 1024 become whole pixels", "multiscale_roi_align: rois must have dtype Float, got Half",
        lambda: multiscale_roi_align([INPUT.half()], rois().half(), 7, [4.0])),
    "mmcv-coordinates-in-half": gives("mmcv 2, RoIAlign", "float16 maps wider than 256 cells",
        "coordinates and weights in steps of a quarter cell", "coordinates and weights in float32",
        coordinates_of_half_maps),
    # torchvision 0.26 on the CPU: ended the process.
    "torchvision-roi-align-index-1000": raises(TORCHVISION, "batch index 1000 of 2", DIES, is_batch_index("1000"),
        lambda: pool(1e3)),
    "torchvision-roi-align-index-1e6": raises(TORCHVISION, "batch index 1e6", DIES, is_batch_index("1e+06"),
        lambda: pool(1e6)),
    "torchvision-roi-align-index-1e9": raises(TORCHVISION, "batch index 1e9", DIES, is_batch_index("1e+09"),
        lambda: pool(1e9)),
    "torchvision-roi-align-index-minus-1e6": raises(TORCHVISION, "batch index -1e6", DIES, is_batch_index("-1e+06"),
        lambda: pool(-1e6)),
    "torchvision-roi-align-nan-coordinate-sampling-2": raises(TORCHVISION, "one NaN coordinate, sampling_ratio=2", DIES,
        is_finite(1, "nan"), lambda: pool(box=(math.nan, 3, 20, 25), sampling_ratio=2)),
    "torchvision-roi-align-nan-box-sampling-2": raises(TORCHVISION, "NaN in all coordinates, sampling_ratio=2", DIES,
        is_finite(1, "nan"), lambda: pool(box=(math.nan,) * 4, sampling_ratio=2)),
    "torchvision-roi-align-inf-box-sampling-2": raises(TORCHVISION, "+inf coordinate, sampling_ratio=2", DIES,
        is_finite(3, "inf"), lambda: pool(box=(2, 3, math.inf, 25), sampling_ratio=2)),
    "torchvision-roi-align-minus-inf-box-sampling-2": raises(TORCHVISION, "-inf coordinate, sampling_ratio=2", DIES,
        is_finite(1, "-inf"), lambda: pool(box=(-math.inf, 3, 20, 25), sampling_ratio=2)),
    "torchvision-roi-align-scale-inf": raises(TORCHVISION, "spatial_scale=inf", DIES,
        "roi_align: spatial_scale must be positive and finite, got inf", lambda: pool(spatial_scale=math.inf)),
    "torchvision-roi-align-empty-batch": raises(TORCHVISION, "a batch of 0 images and one RoI", DIES,
        is_batch_index("0", 0), lambda: pool(input=INPUT[:0])),
    "torchvision-roi-align-empty-map": raises(TORCHVISION, "a map of 0 x 0 cells", DIES,
        "roi_align: input must have shape [N, C, H, W] with at least one cell, got [2, 3, 0, 0]",
        lambda: pool(input=INPUT[:, :, :0, :0])),
    "torchvision-roi-align-sampling-100000": gives(TORCHVISION, "sampling_ratio=100000", f"{DIES} after half a minute",
        "the mean of the samples, at once",
        lambda: torch.allclose(pool(sampling_ratio=100_000, output_size=2), torch.ones(1), atol=1e-3)),
    "torchvision-roi-align-backward-index-1e6": raises(TORCHVISION, "the backward pass, batch index 1e6", DIES,
        is_batch_index("1e+06", argument=OF_BACKWARD), lambda: backward(1e6)),
    # torchvision 0.26 on the CPU: silently wrong.
    "torchvision-roi-align-index-n": raises(TORCHVISION, "batch index N", "memory behind the tensor",
        is_batch_index("2"), lambda: pool(2)),
    "torchvision-roi-align-index-minus-1": gives(TORCHVISION, "batch index -1", "memory before the tensor, up to 1e14",
        "0: -1 marks a padding row", lambda: not pool(-1).any()),
    "torchvision-roi-align-index-nan": raises(TORCHVISION, "batch index NaN", "the features of image 0",
        is_batch_index("nan"), lambda: pool(math.nan)),
    "torchvision-roi-align-index-inf": raises(TORCHVISION, "batch index inf", "the features of image 0",
        is_batch_index("inf"), lambda: pool(math.inf)),
    "torchvision-roi-align-index-fraction": raises(TORCHVISION, "batch index 1.5", "the features of image 1",
        is_batch_index("1.5"), lambda: pool(1.5)),
    "torchvision-roi-align-meta-rois": raises(TORCHVISION, "rois on the meta device, the map on the CPU",
        "numbers of 2e33", "roi_align: boxes must be on the device of input, cpu, got meta",
        lambda: roi_align(INPUT, rois().to("meta"), 7)),
    "torchvision-roi-align-backward-index-n": raises(TORCHVISION, "the backward pass, batch index N",
        "a gradient of 0, written elsewhere", is_batch_index("2", argument=OF_BACKWARD), lambda: backward(2)),
    "torchvision-roi-align-backward-small-grad": gives(TORCHVISION, "a gradient of fewer bins than were pooled",
        "reads behind the gradient", "the gradient of a pooling with so many bins: there is no second number of bins",
        gradient_of_smaller_bins),
    "torchvision-roi-align-nan-box": raises(TORCHVISION, "NaN in all coordinates, sampling_ratio=-1", "0",
        is_finite(1, "nan"), lambda: pool(box=(math.nan,) * 4)),
    # torchvision 0.26 on the CPU: an error of the wrong kind.
    "torchvision-roi-align-box-1e6": gives(TORCHVISION, "a box of 1e6 pixels",
        '"cannot create std::vector larger than max_size()"', "finite numbers, at once",
        lambda: pool(box=(0, 0, 1e6, 1e6)).isfinite().all()),
    "torchvision-roi-align-box-1e9": gives(TORCHVISION, "a box of 1e9 pixels", "MemoryError", "finite numbers, at once",
        lambda: pool(box=(0, 0, 1e9, 1e9)).isfinite().all()),
    "torchvision-roi-align-3d": raises(TORCHVISION, "a map of 3 dimensions", 'IndexError "Dimension out of range"',
        "roi_align: input must have shape [N, C, H, W] with at least one cell, got [3, 32, 32]",
        lambda: pool(input=INPUT[0])),
    "torchvision-roi-align-bfloat16": gives(TORCHVISION, "bfloat16 on the CPU", '"not implemented"',
        "the result in bfloat16", lambda: torch.equal(pool(input=INPUT.bfloat16()), torch.ones(1, 3, 7, 7).bfloat16())),
    # torchvision 0.26 on the CPU: right, and so here.
    "torchvision-roi-align-dtypes": gives(TORCHVISION, "a float32 map and boxes of another dtype", "an error (right)",
        "boxes of any floating dtype are read as float32",
        lambda: torch.equal(roi_align(INPUT, rois().double(), 7), pool())),
    "torchvision-roi-align-columns": raises(TORCHVISION, "boxes of 4 columns", "an error (right)",
        "roi_align: boxes must have shape [K, 5], got [1, 4]", lambda: roi_align(INPUT, rois()[:, 1:], 7)),
    "torchvision-roi-align-no-rois": gives(TORCHVISION, "no RoIs", "an empty result (right)", "an empty result",
        lambda: roi_align(INPUT, rois()[:0], 7).shape == (0, 3, 7, 7)),
    "torchvision-roi-align-no-channels": gives(TORCHVISION, "no channels", "an empty result (right)", "an empty result",
        lambda: pool(input=INPUT[:, :0]).shape == (1, 0, 7, 7)),
    "torchvision-roi-align-strides": gives(TORCHVISION, "maps and boxes that are not contiguous",
        "the result of a copy (right)", "the bits of a copy", strided_and_plain_agree),
    # Elements beyond 32 bits.
    "xpu-4146-at-2-31-minus-1": gives("intel/torch-xpu-ops#4146", "an element at 2^31 - 1",
        "one count too many for 32 bits: silently nothing is done", "is read", lambda: element_at(2**31 - 1)),
    "xpu-4146-at-2-31": gives("intel/torch-xpu-ops#4146", "an element at 2^31", "as above", "is read",
        lambda: element_at(2**31)),
    "xpu-4146-at-2-31-plus-1": gives("intel/torch-xpu-ops#4146", "an element at 2^31 + 1", "as above", "is read",
        lambda: element_at(2**31 + 1)),
    "pytorch-24818": tested("pytorch/pytorch#24818, pytorch/pytorch#44472, pytorch/pytorch#68682",
        "more elements than 32 bits number", "loop counters and numbers of blocks wrap",
        "64-bit addresses: every tensor argument of every operator, with rows 2^31 elements apart",
        "tests/test_large_tensors.py::test_rows_may_lie_far_apart",
        "tests/test_large_tensors.py::test_multiscale_roi_align_reads_the_end_of_a_large_map"),
}  # fmt: skip
