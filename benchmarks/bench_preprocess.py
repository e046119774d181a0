"""preprocess against the same steps in PyTorch and in OpenCV with numpy: a batch of images as a decoder gives them."""

import numpy as np
import pytest
import torch

import cascadeops
from cascadeops.reference.preprocess import preprocess as reference
from cascadeops.reference.preprocess import resized_size

MEAN, STD, DIVISOR = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), 32
SIZES = [(480, 640), (427, 640), (480, 640), (375, 500)]


def padded_batch(images, device):
    """[3, h, w] each -> channels-last float32 [N, 3, H, W]."""
    height, width = (-(-max(image.shape[axis] for image in images) // DIVISOR) * DIVISOR for axis in (1, 2))
    batch = torch.zeros(len(images), 3, height, width, device=device).to(memory_format=torch.channels_last)
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return batch


def with_pytorch(images, resize):
    mean, std = (torch.tensor(values, device=images[0].device) for values in (MEAN, STD))
    scaled = []
    for image in images:
        pixels = image.permute(2, 0, 1)[None].float()
        if resize is not None:
            size = resized_size(*image.shape[:2], *resize)
            pixels = torch.nn.functional.interpolate(pixels, size, mode="bilinear", align_corners=False)
        scaled.append((pixels[0] - mean[:, None, None]) / std[:, None, None])
    return padded_batch(scaled, images[0].device)


def with_opencv(cv2, images, resize):
    scaled = []
    for image in images:
        pixels = image.numpy()
        if resize is not None:
            size = resized_size(*image.shape[:2], *resize)
            pixels = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_LINEAR)
        pixels = (pixels.astype(np.float32) - np.float32(MEAN)) / np.float32(STD)
        scaled.append(torch.from_numpy(pixels).permute(2, 0, 1))
    return padded_batch(scaled, "cpu")


@pytest.mark.parametrize("implementation", ["cascadeops", "cascadeops bfloat16", "pytorch", "opencv", "reference"])
@pytest.mark.parametrize("resize", [None, (800, 1333)])
def bench_preprocess(measure, device, resize, implementation):
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (*size, 3), dtype=torch.uint8, generator=generator).to(device) for size in SIZES]
    dtype = torch.bfloat16 if implementation == "cascadeops bfloat16" else torch.float32
    if implementation == "opencv":
        cv2 = pytest.importorskip("cv2")
        if device.type != "cpu":
            pytest.skip("runs on the CPU")
        function = lambda: with_opencv(cv2, images, resize)  # noqa: E731
    elif implementation == "pytorch":
        function = lambda: with_pytorch(images, resize)  # noqa: E731
    elif implementation == "reference":
        if device.type != "cpu":
            pytest.skip("runs on the CPU")
        function = lambda: reference(images, resize, MEAN, STD, DIVISOR)[0]  # noqa: E731
    else:
        function = lambda: cascadeops.preprocess(images, resize, MEAN, STD, DIVISOR, dtype)[0]  # noqa: E731
    expected, _ = reference([image.cpu() for image in images], resize, MEAN, STD, DIVISOR)

    def check(result):
        # OpenCV rounds to whole grey levels; PyTorch finds positions in float32.
        tolerance = {"opencv": 1 / min(STD), "pytorch": 1e-3, "cascadeops bfloat16": 1e-2}.get(implementation, 1e-5)
        assert (result.cpu().double() - expected).abs().max() <= tolerance

    moved = sum(image.nbytes for image in images) + expected.numel() * dtype.itemsize
    sides = "as they are" if resize is None else f"to {resize[0]} x {resize[1]}"
    measure(f"preprocess, {len(SIZES)} images {sides}", implementation, function, check, bytes_moved=moved)
