"""Deformable convolution: faults of torchvision, mmcv, detectron2 and the first implementations."""

import math

import torch
from peer_faults import Fault, gives, raises, tested

from cascadeops import deform_conv2d

TORCHVISION = "torchvision 0.26"
DIES = "ends the process"
REGRESSIONS = "tests/test_deform_conv2d_regressions.py"


def conv(shift=0.0, **changes):
    arguments = {
        "input": torch.ones(2, 3, 8, 8),
        "offset": torch.full((2, 18, 8, 8), shift),
        "weight": torch.ones(4, 3, 3, 3),
        "padding": 1,
    }
    return deform_conv2d(**(arguments | changes))


def gradients(offset: float) -> list[torch.Tensor]:
    leaves = [torch.ones(2, 3, 8, 8), torch.full((2, 18, 8, 8), offset), torch.ones(4, 3, 3, 3)]
    for leaf in leaves:
        leaf.requires_grad_()
    return list(torch.autograd.grad(deform_conv2d(*leaves, padding=1).sum(), leaves))


def large_map_is_a_convolution() -> bool:
    # 512 channels at 128 x 128, the layer of the reports: 75 million columns.
    input, weight = torch.ones(1, 512, 128, 128), torch.ones(1, 512, 3, 3)
    out = deform_conv2d(input, torch.zeros(1, 18, 128, 128), weight, padding=1)
    inside = out[..., 1:-1, 1:-1]
    return bool((inside == 512 * 9).all()) and out[0, 0, 0, 0] == 512 * 4


def batch_equals_its_images(images: int) -> bool:
    input, offset = torch.rand(images, 3, 8, 8), torch.randn(images, 18, 8, 8)
    weight = torch.rand(4, 3, 3, 3)
    alone = [deform_conv2d(input[i : i + 1], offset[i : i + 1], weight, padding=1) for i in range(images)]
    return torch.equal(deform_conv2d(input, offset, weight, padding=1), torch.cat(alone))


FAULTS: dict[str, Fault] = {
    # Reports.
    "torchvision-2598": tested("pytorch/vision#2598", "a second call, on a map of 1000 x 110",
        "an illegal memory access on CUDA", "maps of any size, one after the other",
        f"{REGRESSIONS}::test_odd_sizes_one_call_after_the_other"),
    "torchvision-4269": tested("pytorch/vision#4269, pytorch/vision#4351", "more than 2^31 elements",
        "indices of 32 bits wrap (mended, without a test)", "64-bit addresses",
        f"{REGRESSIONS}::test_elements_beyond_the_32nd_bit"),
    "torchvision-7632": tested("pytorch/vision#7632", "mask=None", "reads a null pointer", "the bits of a mask of ones",
        f"{REGRESSIONS}::test_without_a_mask_as_with_a_mask_of_ones"),
    "torchvision-2560": tested("pytorch/vision#2560", "a gradient in another layout", '"view size is not compatible"',
        "strides are read", f"{REGRESSIONS}::test_gradients_of_a_gradient_in_another_layout"),
    "torchvision-2833": tested("pytorch/vision#2833", "float16 with many channels", "sums overflow", "sums in float32",
        f"{REGRESSIONS}::test_sums_of_half_types_do_not_overflow_on_the_way"),
    "mmcv-1169": tested("open-mmlab/mmcv#1169, open-mmlab/mmcv#1459", "the backward pass of more than 32 images",
        "wrong gradients, or an error", "the batch is never cut", f"{REGRESSIONS}::test_batches_beyond_an_im2col_step"),
    "mmcv-818": gives("open-mmlab/mmcv#818", "64 images", "a shape error", "the bits of 64 calls with an image each",
        lambda: batch_equals_its_images(64)),
    "detectron2-5513": gives("facebookresearch/detectron2#5513, pytorch/pytorch#34540", "more images than im2col_step",
        '"shape [1, 1, 288] is invalid"', "the bits of 33 calls with an image each",
        lambda: batch_equals_its_images(33)),
    "mmdetection-356": gives("open-mmlab/mmdetection#356, open-mmlab/mmdetection#416", "512 channels at 128 x 128",
        '"invalid argument", printed; the run goes on', "the result", large_map_is_a_convolution),
    "dcnv2-13": tested("chengdazhi/Deformable-Convolution-V2-PyTorch#13", "the same, or more rows than a grid has",
        "as above", "a launch that fails is an exception, and grids have no such limit",
        "tests/test_paste_masks.py::test_more_masks_than_a_grid_has_rows",
        "tests/test_emulated_cuda.py::test_faulty_launch_is_an_error_and_the_next_one_runs"),
    "dcnv2-24": tested("4uiiurz1/pytorch-deform-conv-v2#24", "everyday sizes", "out of memory: nine copies of the map",
        "no im2col buffer", f"{REGRESSIONS}::test_memory_holds_no_im2col_buffer"),
    "sparsedrive-133": tested("swc-17/SparseDrive#133", "more threads than 2^31",
        '"invalid configuration argument", reported later elsewhere', "64-bit counts; every launch is checked",
        f"{REGRESSIONS}::test_elements_beyond_the_32nd_bit",
        "tests/test_large_tensors.py::test_rows_may_lie_far_apart"),
    # torchvision 0.26 on the CPU: ended the process.
    "torchvision-deform-nan-offset": gives(TORCHVISION, "NaN offsets", DIES, "such samples count as 0",
        lambda: not conv(math.nan).any()),
    "torchvision-deform-nan-offset-backward": gives(TORCHVISION, "the backward pass of NaN offsets", DIES,
        "such samples pass no gradient on", lambda: not any(grad.any() for grad in gradients(math.nan))),
    "torchvision-deform-stride-0": raises(TORCHVISION, "stride=0", f"{DIES} (SIGFPE)",
        "deform_conv2d: stride must be in [1, 2**31), got 0", lambda: conv(stride=0)),
    # torchvision 0.26 on the CPU: silently wrong.
    "torchvision-deform-meta-offset": raises(TORCHVISION, "an offset on the meta device", "numbers of 2e31",
        "deform_conv2d: offset must be on the device of input",
        lambda: conv(offset=torch.zeros(2, 18, 8, 8, device="meta"))),
    "torchvision-deform-inf-offset": gives(TORCHVISION, "infinite offsets", "offset gradients that are not finite",
        "such samples count as 0, their gradients are 0",
        lambda: not conv(math.inf).any() and not any(grad.any() for grad in gradients(math.inf))),
    # torchvision 0.26 on the CPU: an error of the wrong kind.
    "torchvision-deform-bias": raises(TORCHVISION, "a bias of another size", "an error about a view",
        "deform_conv2d: bias must have shape [out_channels] = [4], got [5]", lambda: conv(bias=torch.zeros(5))),
    # torchvision 0.26 on the CPU: right, and so here.
    "torchvision-deform-offset-shape": raises(TORCHVISION, "an offset of another shape", "an error (right)",
        "deform_conv2d: offset must have shape", lambda: conv(offset=torch.zeros(2, 17, 8, 8))),
    "torchvision-deform-mask-shape": raises(TORCHVISION, "a mask of another shape", "an error (right)",
        "deform_conv2d: mask must have shape", lambda: conv(mask=torch.ones(2, 9, 8, 7))),
    "torchvision-deform-dilation-0": raises(TORCHVISION, "dilation=0", "an error (right)",
        "deform_conv2d: dilation must be in [1, 2**31), got 0", lambda: conv(dilation=0)),
    "torchvision-deform-padding": raises(TORCHVISION, "padding=-1", "an error (right)",
        "deform_conv2d: padding must be in [0, 2**31), got -1", lambda: conv(padding=-1)),
    "torchvision-deform-dtypes": raises(TORCHVISION, "a weight of another dtype", "an error (right)",
        "deform_conv2d: weight must have dtype Float, got Half", lambda: conv(weight=torch.ones(4, 3, 3, 3).half())),
    "torchvision-deform-empty-batch": gives(TORCHVISION, "no images", "an empty result (right)", "an empty result",
        lambda: conv(input=torch.ones(0, 3, 8, 8), offset=torch.zeros(0, 18, 8, 8)).shape == (0, 4, 8, 8)),
}  # fmt: skip
