"""Deformable convolution as its definition: every sample of every output pixel, then an ordinary matrix product."""

import torch
from torch import Tensor


def deform_conv2d(
    input: Tensor,  # [N, C, H, W]
    offset: Tensor,  # [N, offset_groups * taps * 2 (y, x), h, w]
    weight: Tensor,  # [out_channels, C / groups, kernel_height, kernel_width]
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    mask: Tensor | None = None,  # [N, offset_groups * taps, h, w]
) -> Tensor:
    """Defines :func:`cascadeops.deform_conv2d`; half types are computed in float32 and rounded at the end."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    out_channels, group_channels, kernel_height, kernel_width = weight.shape
    images, channels, _, _ = input.shape
    taps, (out_height, out_width) = kernel_height * kernel_width, offset.shape[2:]
    offset_groups, groups = offset.shape[1] // (2 * taps), channels // group_channels
    (stride_y, stride_x), (padding_y, padding_x), (dilation_y, dilation_x) = map(pair, (stride, padding, dilation))

    def starts(out_size, kernel_size, stride, padding, dilation):
        pixels = torch.arange(out_size, device=input.device) * stride - padding
        return torch.arange(kernel_size, device=input.device)[:, None] * dilation + pixels  # [kernel, out]

    rows = starts(out_height, kernel_height, stride_y, padding_y, dilation_y).to(dtype)
    columns = starts(out_width, kernel_width, stride_x, padding_x, dilation_x).to(dtype)
    split = (images, offset_groups, kernel_height, kernel_width, out_height, out_width)
    y, x = offset.to(dtype).reshape(*split[:4], 2, *split[4:]).unbind(4)
    y = y + rows[:, None, :, None]
    x = x + columns[None, :, None, :]
    modulation = torch.ones_like(y) if mask is None else mask.to(dtype).reshape(split)

    grouped = input.to(dtype).reshape(images, offset_groups, input.shape[1] // offset_groups, *input.shape[2:])
    samples = bilinear(grouped, y, x) * modulation[:, :, None]  # [N, offset_groups, C / offset_groups, kh, kw, h, w]
    samples = samples.reshape(images, groups, group_channels, taps, out_height, out_width)
    kernels = weight.to(dtype).reshape(groups, out_channels // groups, group_channels, taps)
    out = torch.einsum("gock,ngckhw->ngohw", kernels, samples).reshape(images, out_channels, out_height, out_width)
    if bias is not None:
        out = out + bias.to(dtype)[:, None, None]
    return out.to(input.dtype)


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def bilinear(images: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Samples images [N, G, C, H, W] at positions y, x [N, G, ...] -> [N, G, C, ...].

    Cells outside of an image are 0. A position at or beyond one cell outside gives 0, as does one that is not finite.
    """
    height, width = images.shape[3:]
    inside = (y >= -1) & (y < height) & (x >= -1) & (x < width)
    y, x = torch.where(inside, y, 0), torch.where(inside, x, 0)
    top, left = y.detach().floor(), x.detach().floor()
    total = images.new_zeros(())
    for row, row_weight in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, column_weight in ((left, 1 - (x - left)), (left + 1, x - left)):
            on_map = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long()
            index = index.flatten(2)[:, :, None].expand(-1, -1, images.shape[2], -1)
            values = images.flatten(3).gather(3, index).unflatten(3, y.shape[2:])
            total = total + (row_weight * column_weight)[:, :, None] * torch.where(on_map[:, :, None], values, 0)
    return total
