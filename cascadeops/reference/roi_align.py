"""RoIAlign on one map, box by box."""

from torch import Tensor

from cascadeops.reference.multiscale_roi_align import average_samples, sample_positions


def roi_align(
    input: Tensor,  # [N, C, H, W]
    boxes: Tensor,  # [K, 5] (batch index, x1, y1, x2, y2)
    output_size: tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Defines :func:`cascadeops.roi_align` in the dtype of ``input``; padding rows (batch index -1) give 0."""
    height, width = output_size
    pooled = input.new_zeros(len(boxes), input.shape[1], height, width)
    for k, box in enumerate(boxes):
        if box[0] < 0:
            continue
        x1, y1, x2, y2 = box[1:].to(input.dtype) * spatial_scale - (0.5 if aligned else 0.0)
        ys = sample_positions(y1, y2, height, sampling_ratio, aligned)
        xs = sample_positions(x1, x2, width, sampling_ratio, aligned)
        pooled[k] = average_samples(input[int(box[0])], ys, xs)
    return pooled
