"""The gated branch of a self-calibrated convolution as one Triton kernel: a 3x3 convolution whose epilogue is the gate.

    out[n, d, y, x] = (bias[d] + sum over c, i, j of weight[d, c, i, j] * x[n, c, y + (i - 1) s, x + (j - 1) s])
                      * sigmoid(x[n, d, y, x] + k2[n, d, cell(y), cell(x)]),    s: dilation, x is 0 outside of the map

An implicit GEMM of pixels (M) by output channels (N) by taps x input channels (K): a program owns a tile of pixels and
channels, gathers the x of one tap and a block of channels at a time, and accumulates in float32. Its epilogue reads
x and k2 and writes the result, so that the convolution's own result never reaches memory. Every tensor is addressed by
its strides, whatever its layout; the weight is best channels-last (taps, then c), where a block of K is adjacent.

Against cuDNN and the gate this saves one write and one read of the map: of bfloat16 at 32 x 200 x 336 (res2 of an
800 x 1344 image) 8.6 of 17.5 MB, which is 2.9 us at an H100's 3.0 TB/s; the convolution itself is 1.2 GFLOP there. No
GPU has run it yet; it is tested with Triton's interpreter and compiled for sm_80 and sm_90.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def gated_conv2d_kernel(
    x, weight, bias, k2, out,
    images, height, width, cell_rows, cell_columns,
    x_image, x_channel, x_row, x_column,  # strides, in elements, as all below
    weight_out, weight_in, weight_row, weight_column,
    k2_image, k2_channel, k2_row, k2_column,
    out_image, out_channel, out_row, out_column,
    CHANNELS: tl.constexpr,
    DILATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    d = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_pixel, is_out = pixel < images.to(tl.int64) * height * width, d < CHANNELS
    column, row, image = pixel % width, pixel // width % height, pixel // width // height

    steps: tl.constexpr = (CHANNELS + BLOCK_IN - 1) // BLOCK_IN
    total = tl.zeros((BLOCK_PIXELS, BLOCK_OUT), dtype=tl.float32)
    for step in range(9 * steps):
        i, j = step // steps // 3, step // steps % 3
        c = step % steps * BLOCK_IN + tl.arange(0, BLOCK_IN)
        from_row, from_column = row + (i - 1) * DILATION, column + (j - 1) * DILATION
        inside = is_pixel & (from_row >= 0) & (from_row < height) & (from_column >= 0) & (from_column < width)
        cells = tl.load(
            x + (image * x_image + from_row * x_row + from_column * x_column)[:, None] + c[None, :] * x_channel,
            mask=inside[:, None] & (c < CHANNELS)[None, :],
            other=0.0,
        )
        taps = tl.load(
            weight + (c * weight_in + i * weight_row + j * weight_column)[:, None] + (d * weight_out)[None, :],
            mask=(c < CHANNELS)[:, None] & is_out[None, :],
            other=0.0,
        )
        total = tl.dot(cells, taps, total, input_precision=PRECISION)

    if HAS_BIAS:
        total += tl.load(bias + d, mask=is_out, other=0.0).to(tl.float32)[None, :]
    # PyTorch's nearest rule: quotient and product rounded to float32 (csrc/common/nearest.h).
    rows_scale = tl.div_rn(tl.cast(cell_rows, tl.float32), tl.cast(height, tl.float32))
    columns_scale = tl.div_rn(tl.cast(cell_columns, tl.float32), tl.cast(width, tl.float32))
    cell_row = tl.minimum((row.to(tl.float32) * rows_scale).to(tl.int64), cell_rows - 1)
    cell_column = tl.minimum((column.to(tl.float32) * columns_scale).to(tl.int64), cell_columns - 1)
    mask = is_pixel[:, None] & is_out[None, :]
    at_x = (image * x_image + row * x_row + column * x_column)[:, None] + (d * x_channel)[None, :]
    at_k2 = (image * k2_image + cell_row * k2_row + cell_column * k2_column)[:, None] + (d * k2_channel)[None, :]
    gate = tl.load(x + at_x, mask=mask, other=0.0).to(tl.float32)
    gate = tl.sigmoid(gate + tl.load(k2 + at_k2, mask=mask, other=0.0).to(tl.float32))
    at_out = (image * out_image + row * out_row + column * out_column)[:, None] + (d * out_channel)[None, :]
    tl.store(out + at_out, (total * gate).to(out.dtype.element_ty), mask=mask)


# Tiles from wide, for the many pixels of the early stages, to narrow, so that 25 x 42 pixels still fill a GPU.
CONFIGS = [
    triton.Config({"BLOCK_PIXELS": pixels, "BLOCK_OUT": out, "BLOCK_IN": inner}, num_warps=warps, num_stages=stages)
    for pixels, out, inner, warps, stages in [
        (256, 32, 32, 8, 3),
        (128, 32, 32, 4, 4),
        (128, 64, 32, 4, 4),
        (128, 64, 64, 4, 3),
        (128, 128, 32, 8, 3),
        (128, 128, 64, 8, 3),
        (64, 64, 64, 4, 4),
        (64, 128, 64, 4, 4),
        (32, 64, 64, 4, 4),
    ]
]
_tuned_kernel = triton.autotune(CONFIGS, key=["images", "height", "width", "CHANNELS", "DILATION"])(gated_conv2d_kernel)


def gated_conv2d(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [C, C, 3, 3]
    bias: Tensor | None,  # [C]
    k2: Tensor,  # [N, C, h, w]
    dilation: int = 1,
    config: triton.Config | None = None,
) -> Tensor:
    """``conv2d(x, weight, bias, padding=dilation, dilation=dilation) * sigmoid(x + interpolate(k2, (H, W)))``.

    Args:
        x, weight, bias, k2: one dtype of float32, float16, bfloat16, any strides. Float32 is multiplied in TF32 where
            ``torch.backends.cudnn.allow_tf32`` lets cuDNN do so.
        config: None: the fastest of CONFIGS, found at the first call for each shape.

    Returns:
        ``[N, C, H, W]``, channels-last if the channels of ``x`` are adjacent.

    Raises:
        ValueError: dtypes that differ, or are none of the three; wrong shapes.
    """
    tensors = {"x": x, "weight": weight, "bias": bias, "k2": k2}
    dtypes = [tensor.dtype for tensor in tensors.values() if tensor is not None]
    if dtypes[0] not in _DTYPES or len(set(dtypes)) != 1:
        raise ValueError(f"gated_conv2d: x, weight, bias and k2 must share one dtype of {_DTYPES}, got {dtypes}")
    images, channels, height, width = x.shape
    shapes = {"weight": (channels, channels, 3, 3), "bias": (channels,), "k2": (images, channels, *k2.shape[2:])}
    for name, shape in shapes.items():
        if tensors[name] is not None and tensors[name].shape != shape:
            raise ValueError(f"gated_conv2d: {name} must have shape {list(shape)}, got {list(tensors[name].shape)}")

    channels_adjacent = channels > 1 and x.stride(1) == 1 and not x.is_contiguous()
    out = torch.empty_like(x, memory_format=torch.channels_last if channels_adjacent else torch.contiguous_format)
    if out.numel() == 0:
        return out

    def grid(meta):
        return triton.cdiv(images * height * width, meta["BLOCK_PIXELS"]), triton.cdiv(channels, meta["BLOCK_OUT"])

    arguments = (
        *(x, weight, x if bias is None else bias.contiguous(), k2, out),
        *(images, height, width, *k2.shape[2:]),
        *(*x.stride(), *weight.stride(), *k2.stride(), *out.stride()),
    )
    constants = {
        "CHANNELS": channels,
        "DILATION": dilation,
        "HAS_BIAS": bias is not None,
        "PRECISION": "tf32" if torch.backends.cudnn.allow_tf32 else "ieee",
    }
    if config is None:
        _tuned_kernel[grid](*arguments, **constants)
    else:
        gated_conv2d_kernel[grid](*arguments, **constants, **config.all_kwargs())
    return out
