"""What whole detectors are measured on: published rows with random weights, and images of 800 x 1333 with objects."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.build import build_from_config
from models.data.batch import Batch, PackedMasks
from models.data.transforms import padded_size
from models.heads import BoxHead
from models.published_rows import PUBLISHED_ROWS

IMAGE_SIZE = (800, 1333)
NUM_OBJECTS = 8
"""Of an image; val2017 has 7.3 on average. Only bitmaps grow with them, one byte a pixel."""


CONFIDENCE = 40.0
"""Factor of the class logits' random weights, without which every class would have a probability of 1/81, and the
post-processing nothing to do or everything."""


def row_detector(row: str) -> nn.Module:
    """The detector of a published row, in eval mode. Its random weights are the same in every process."""
    recipe = PUBLISHED_ROWS[row].recipe
    torch.manual_seed(0)
    detector = build_from_config(recipe.arch, recipe.detector)
    for module in detector.modules():
        if isinstance(module, BoxHead):
            module.class_logits.weight.data.mul_(CONFIDENCE)
    start_as_identity(detector)
    return detector


def start_as_identity(model: nn.Module) -> None:
    """Zeroes the last scale of every residual block, which not every network has at 0 when it is made: or the features
    of one that was never trained grow a hundredfold, and nothing is detected. Also for other projects' models."""
    for name, tensor in model.state_dict().items():
        if name.endswith(("bn3.weight", "conv3.norm.weight")):
            tensor.zero_()


def random_images(batch_size: int, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Noise, normalised and padded: channels-last [N, 3, H, W], and [N, 2] (height, width) before padding."""
    height, width = padded_size(*image_size)
    images = torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(4))
    return images.contiguous(memory_format=torch.channels_last), torch.tensor([image_size] * batch_size)


def training_batch(batch_size: int, image_size: tuple[int, int] = IMAGE_SIZE) -> Batch:
    """Noise with square objects that are spread over the image."""
    images, image_sizes = random_images(batch_size, image_size)
    generator = torch.Generator().manual_seed(5)
    side = min(image_size) // 4
    place = torch.rand(batch_size, NUM_OBJECTS, 2, generator=generator)
    corner = (place * (torch.tensor(image_size[::-1]) - side)).floor()
    windows = torch.cat([corner, torch.full_like(corner, side)], dim=-1).int()
    count = batch_size * NUM_OBJECTS
    return Batch(
        images=images,
        image_sizes=image_sizes,
        gt_boxes=torch.cat([corner, corner + side], dim=-1),
        gt_labels=torch.randint(0, 5, (batch_size, NUM_OBJECTS), generator=generator),
        gt_masks=PackedMasks(
            torch.ones(count * side * side, dtype=torch.uint8),
            torch.arange(0, count * side * side, side * side).view(batch_size, NUM_OBJECTS),
            windows,
        ),
        semantic=torch.randint(
            0, 5, (batch_size, *(side // 8 for side in images.shape[2:])), dtype=torch.uint8, generator=generator
        ),
        image_ids=list(range(batch_size)),
    )


def training_step(detector: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, dtype: torch.dtype) -> Tensor:
    """One step as `models.train` takes it: losses, backward, SGD. Returns the loss.

    Args:
        dtype: float32, or the dtype of automatic mixed precision.
    """
    device = batch.images.device.type
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device, dtype=dtype, enabled=dtype is not torch.float32):
        losses = detector.losses(
            batch.images, batch.image_sizes, batch.gt_boxes, batch.gt_labels, batch.gt_masks, batch.semantic
        )
        loss = sum(losses.values())
    loss.backward()
    optimizer.step()
    return loss.detach()
