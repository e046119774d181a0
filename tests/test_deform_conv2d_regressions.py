"""Faults of other deformable convolutions that deform_conv2d must not repeat, named by their reports; and its memory.

NaN and infinite offsets, stride 0 and tensors on the meta device: test_deform_conv2d.py, test_deform_conv2d_errors.py.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from guarded_memory import guarded_empty
from test_deform_conv2d import assert_close, doubles, problem, with_gradients
from tolerances import assert_close_to_reference

import cascadeops
from cascadeops.reference.deform_conv2d import deform_conv2d as reference

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("images", [33, 40])
def test_batches_beyond_an_im2col_step(device, images):
    # mmcv#1169 and detectron2#5513: more than 32 images, or no multiple of the step, and the gradients were wrong.
    arguments = problem("plain", device)
    for i in (0, 1, -1):
        arguments[i] = arguments[i].repeat(images // 2 + 1, 1, 1, 1)[:images] + torch.rand(
            images, 1, 1, 1, device=device
        )
    grad = torch.randn(images, 5, 7, 9, device=device, dtype=torch.float64)
    results = with_gradients(cascadeops.deform_conv2d, arguments, grad)
    for result, exact in zip(results, with_gradients(reference, arguments, grad), strict=True):
        assert_close_to_reference(result, exact)


def test_odd_sizes_one_call_after_the_other(device, kernels):
    # pytorch/vision#2598: the second call on maps of odd sizes read illegal memory on CUDA.
    for size in ((37, 51), (19, 25), (37, 51), (1, 3), (5, 1)):
        tensors = [torch.randn(shape, device=device) for shape in ((2, 3, *size), (2, 18, *size), (4, 3, 3, 3))]
        result = cascadeops.deform_conv2d(*tensors, padding=1)
        assert_close(result, reference(*doubles(tensors), padding=1), kernels)


def test_without_a_mask_as_with_a_mask_of_ones(device, kernels):
    # pytorch/vision#7632: without a mask the kernel read a null pointer. Here both give the same bits.
    arguments = problem("odd sizes, every option", device, torch.float32)
    grad = torch.randn_like(reference(*arguments))
    arguments[-1] = torch.ones_like(arguments[-1])
    with_ones = with_gradients(cascadeops.deform_conv2d, arguments, grad)
    for result, expected in zip(
        with_gradients(cascadeops.deform_conv2d, [*arguments[:-1], None], grad), with_ones, strict=False
    ):
        torch.testing.assert_close(result, expected, rtol=0 if kernels == "cpu" else 1e-5, atol=0)


def test_gradients_of_a_gradient_in_another_layout(device):
    # pytorch/vision#2560: "view size is not compatible" in the backward pass.
    arguments = problem("plain", device)
    grad = torch.randn_like(reference(*arguments))
    expected = with_gradients(cascadeops.deform_conv2d, arguments, grad)
    for layout in (grad.contiguous(memory_format=torch.channels_last), grad.mT.contiguous().mT):
        for result, exact in zip(with_gradients(cascadeops.deform_conv2d, arguments, layout), expected, strict=True):
            assert_close_to_reference(result, exact)


def test_sums_of_half_types_do_not_overflow_on_the_way(device):
    # pytorch/vision#2833, #3371: float16 sums pass 65504. Here 600 channels of 200 cancel 600 of -200 but one.
    input = torch.full((1, 1200, 2, 2), 200.0, device=device, dtype=torch.float16)
    input[:, 600:] = -200
    input[:, -1] = 0
    weight = torch.ones(1, 1200, 1, 1, device=device, dtype=torch.float16)
    out = cascadeops.deform_conv2d(input, torch.zeros(1, 2, 2, 2, device=device, dtype=torch.float16), weight)
    assert (out == 200).all()


@pytest.mark.parametrize("name", ["offset", "weight", "bias", "mask"])
def test_tensors_of_several_devices_are_refused(name):
    # longcw/RoIAlign.pytorch#10, and torchvision 0.26, which returned numbers of 2e31 for an offset on the meta device.
    input, offset, weight, bias, *geometry, mask = problem("plain", "cpu", torch.float32)
    tensors = {"offset": offset, "weight": weight, "bias": bias, "mask": mask}
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(RuntimeError, match=f"deform_conv2d: {name} must be on the device of input"):
        cascadeops.deform_conv2d(input, stride=geometry[0], padding=geometry[1], dilation=geometry[2], **tensors)


def test_elements_beyond_the_32nd_bit(request):
    # pytorch/vision#4269, SparseDrive#133: indices in 32 bits. The last row of a map of 2**31 + 2**17 elements; pages
    # that nobody touches take no memory.
    if request.config.getoption("--guarded"):
        pytest.skip("would copy 4 GiB")
    height, width, channels = 2**14 + 1, 2**15, 4
    flat = guarded_empty(height * width * channels, torch.bfloat16)
    assert flat.numel() > 2**31
    flat[-width * channels :] = torch.arange(channels, dtype=torch.bfloat16).repeat(width)
    flat[: width * channels] = 100
    input = flat.view(1, height, width, channels).permute(0, 3, 1, 2)
    offset = torch.tensor([height - 1.0, width - 2.5]).reshape(1, 2, 1, 1)
    weight = torch.tensor([[1.0, 10, 100, 1000]], dtype=torch.bfloat16).reshape(1, 4, 1, 1).requires_grad_()
    out = cascadeops.deform_conv2d(input, offset, weight, stride=width)
    out.sum().backward()
    assert out.item() == torch.tensor(3210.0).bfloat16() and weight.grad.flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_holds_no_im2col_buffer():
    # 4uiiurz1/pytorch-deform-conv-v2#24. The buffer, 9 x 256 numbers for each of 2 x 64 x 64 pixels, would be 72 MiB.
    script = """
import re, torch, cascadeops
torch.set_num_threads(2)
def kilobytes(): return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
def measure(size):
    input = torch.randn(2, size, size, 256).permute(0, 3, 1, 2)
    tensors = input, torch.randn(2, 18, size, size), torch.randn(64, 256, 3, 3), torch.rand(2, 9, size, size)
    *leaves, mask = [tensor.requires_grad_() for tensor in tensors]
    start = kilobytes()
    out = cascadeops.deform_conv2d(*leaves, padding=1, mask=mask)
    forward = kilobytes() - start
    grads = torch.autograd.grad(out, [*leaves, mask], torch.ones_like(out))
    print(forward, out.nbytes // 1024, kilobytes() - start - forward, sum(grad.nbytes for grad in grads) // 1024)
measure(8)  # loads what is loaded late
measure(64)
"""
    output = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    forward, out, backward, gradients = map(int, output.splitlines()[1].split())
    buffer = 9 * 256 * 2 * 64 * 64 * 4 // 1024
    assert 0.5 * out < forward < out + buffer / 16, output
    assert 0.5 * gradients < backward < gradients + buffer / 4, output
