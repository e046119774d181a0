"""How other libraries paste masks, for the benchmarks of paste_masks and paste_masks_rle."""

import torch
from torch import Tensor

CHUNK_BYTES = 2**30


def sampled(probs: Tensor, boxes: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """probs [n, h, w] at the pixels x, y of the image: float32 [n, len(y), len(x)]."""
    grid_x = (x + 0.5 - boxes[:, :1]) / (boxes[:, 2:3] - boxes[:, :1]) * 2 - 1
    grid_y = (y + 0.5 - boxes[:, 1:2]) / (boxes[:, 3:] - boxes[:, 1:2]) * 2 - 1
    size = len(probs), len(y), len(x)
    grid = torch.stack([grid_x[:, None, :].expand(size), grid_y[:, :, None].expand(size)], dim=3)
    return torch.nn.functional.grid_sample(probs[:, None], grid, align_corners=False)[:, 0]


def grid_sample_paste(probs: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """As detectron2 does it: on the CPU one mask at a time and only around its box; on CUDA as many whole images at a
    time as a gigabyte of float32 holds."""
    height, width = image_size
    masks = torch.zeros(len(probs), height, width, dtype=torch.bool, device=probs.device)
    if probs.device.type == "cpu":
        low = boxes[:, :2].floor().long() - 1
        high = boxes[:, 2:].ceil().long() + 1
        for mask, prob, box, (x0, y0), (x1, y1) in zip(masks, probs, boxes, low.tolist(), high.tolist(), strict=True):
            x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
            x, y = torch.arange(x0, x1), torch.arange(y0, y1)
            mask[y0:y1, x0:x1] = sampled(prob[None], box[None], x, y)[0] >= 0.5
        return masks
    x, y = torch.arange(width, device=probs.device), torch.arange(height, device=probs.device)
    chunks = -(-len(probs) * height * width * 4 // CHUNK_BYTES)
    for mask, prob, box in zip(masks.chunk(chunks), probs.chunk(chunks), boxes.chunk(chunks), strict=True):
        mask.copy_(sampled(prob, box, x, y) >= 0.5)
    return masks
