"""The workloads: what a ResNet-50 detector meets at 800 x 1333 pixels, padded to 800 x 1344."""

import torch
from torch import Tensor

IMAGE_SIZE = (800, 1344)
STRIDES = (4, 8, 16, 32)
CHANNELS = 256


def pyramid(batch: int, device, dtype=torch.float32, channels: int = CHANNELS, channels_last: bool = True):
    """P2..P5: [N, C, 200, 336], [N, C, 100, 168], [N, C, 50, 84], [N, C, 25, 42]; 22.9 M elements an image."""
    generator = torch.Generator().manual_seed(0)
    maps = []
    for stride in STRIDES:
        size = (batch, channels, IMAGE_SIZE[0] // stride, IMAGE_SIZE[1] // stride)
        x = torch.rand(size, generator=generator).to(device, dtype)
        maps.append(x.contiguous(memory_format=torch.channels_last) if channels_last else x)
    return maps


def boxes(count: int, device, smallest: float = 16.0, largest: float = 640.0, seed: int = 1) -> Tensor:
    """[count, 4] inside the image; sizes uniform in the logarithm, sides up to 2:1, as proposals are."""
    generator = torch.Generator().manual_seed(seed)
    height, width = IMAGE_SIZE
    size = smallest * (largest / smallest) ** torch.rand(count, generator=generator)
    ratio = 2 ** (torch.rand(count, generator=generator) - 0.5)
    w, h = (size * ratio).clamp(max=width - 1), (size / ratio).clamp(max=height - 1)
    x = torch.rand(count, generator=generator) * (width - w)
    y = torch.rand(count, generator=generator) * (height - h)
    return torch.stack([x, y, x + w, y + h], dim=1).to(device)


def rois(count: int, batch: int, device) -> Tensor:
    """[count, 5], shared evenly by the images."""
    image = torch.arange(count, device=device) * batch // max(count, 1)
    return torch.cat([image[:, None].float(), boxes(count, device)], dim=1)


def crowded_boxes(count: int, groups: int, device, seed: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes in clusters of 20, as a detector's candidates lie: [count, 4], scores [count] in (0, 1), groups [count]."""
    generator = torch.Generator().manual_seed(seed)
    centres = boxes(max(count // 20, 1), "cpu", smallest=24, largest=400, seed=seed)
    near = centres[torch.randint(len(centres), (count,), generator=generator)]
    size = (near[:, 2:] - near[:, :2]).repeat(1, 2)
    shaken = near + 0.15 * size * torch.randn(count, 4, generator=generator)
    low, high = torch.minimum(shaken[:, :2], shaken[:, 2:]), torch.maximum(shaken[:, :2], shaken[:, 2:])
    scores = torch.rand(count, generator=generator)
    group = torch.randint(groups, (count,), generator=generator)
    return torch.cat([low, high], 1).to(device), scores.to(device), group.to(device)


STAGES = {"res2": (32, 4), "res3": (64, 8), "res4": (128, 16), "res5": (256, 32)}
"""Stage of a self-calibrated ResNet-50 -> (channels of its self-calibrated convolutions, stride)."""


def self_calibrated(stage: str, device, batch: int = 2, dtype=torch.float32) -> list[Tensor]:
    """Channels-last x and k3, [N, C, H, W], and k2, [N, C, H // 4, W // 4]."""
    generator = torch.Generator().manual_seed(3)
    channels, stride = STAGES[stage]
    height, width = (side // stride for side in IMAGE_SIZE)
    sizes = (height, width), (height, width), (height // 4, width // 4)
    maps = (torch.randn(batch, channels, *size, generator=generator) for size in sizes)
    return [map.to(device, dtype).contiguous(memory_format=torch.channels_last) for map in maps]


def detections(count: int, device, image_size: tuple[int, int] = (800, 1333)) -> tuple[Tensor, Tensor]:
    """Mask probabilities [count, 28, 28], a blob with a wavy outline each, and their boxes [count, 4] in the image."""
    generator = torch.Generator().manual_seed(3)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 28), torch.linspace(-1, 1, 28), indexing="ij")
    waves, phase, depth = torch.rand(3, count, 1, 1, generator=generator)
    outline = 0.9 - 0.3 * depth * (1 + torch.sin((2 + 5 * waves) * torch.atan2(y, x) + 6.28 * phase))
    probs = torch.sigmoid(10 * (outline - (x * x + y * y).sqrt()))
    scale = torch.tensor([image_size[1] / IMAGE_SIZE[1], image_size[0] / IMAGE_SIZE[0]])
    return probs.to(device), (boxes(count, "cpu") * scale.repeat(2)).to(device)
