"""The gate of a self-calibrated convolution, in the framework's operators; its autograd gives the gradients."""

import torch
from torch import Tensor


def self_calibrated_gate(x: Tensor, k3: Tensor, k2: Tensor) -> Tensor:
    return k3 * torch.sigmoid(x + nearest_upsample(k2, x.shape[2:]))


def nearest_upsample(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """``interpolate(cells, size, mode="nearest")`` with the pixels' cells found in float32 whatever the dtype.

    PyTorch does so, too, except for contiguous float64 maps on the CPU, where some sizes round otherwise.
    """
    rows, columns = (
        _cells_of(pixels, count, cells.device) for pixels, count in zip(size, cells.shape[2:], strict=True)
    )
    return cells[:, :, rows][:, :, :, columns]


def _cells_of(pixels: int, cells: int, device: torch.device) -> Tensor:
    scale = torch.full((), cells, dtype=torch.float32, device=device) / pixels
    return (torch.arange(pixels, dtype=torch.float32, device=device) * scale).long().clamp(max=cells - 1)
