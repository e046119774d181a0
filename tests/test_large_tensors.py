"""Elements beyond 2^31, where an index of 32 bits would wrap. The memory is virtual; next to nothing of it is touched.

These are the kernels themselves, and a wrapped index reads a forbidden page or zeros; tests/test_narrow_indices.py has
kernels in which an int has 16 bits.
"""

import pytest
import torch
from guarded_memory import guarded_empty
from operator_cases import OPERATORS, arguments_of, call, identical
from torch import Tensor

import cascadeops

FAR = 2**31 + 64
"""Elements between two rows."""


def far_apart(tensor: Tensor) -> Tensor:
    """The same values, FAR elements from one index of the first dimension to the next."""
    memory = guarded_empty((len(tensor) - 1) * FAR + tensor[0].numel(), tensor.dtype)
    strides = (FAR, *torch.empty(tensor.shape[1:], device="meta").stride())
    return memory.as_strided(tensor.shape, strides).copy_(tensor)


def places(operator: str) -> list[str]:
    return [name for name, value in arguments_of(operator).items() if isinstance(value, Tensor) and value.dim()]


@pytest.mark.parametrize(
    ("operator", "argument"), [(operator, argument) for operator in OPERATORS for argument in places(operator)]
)
def test_rows_may_lie_far_apart(operator, argument):
    arguments = arguments_of(operator)
    expected = call(operator, arguments | {argument: arguments[argument].contiguous()})
    assert identical(call(operator, arguments | {argument: far_apart(arguments[argument])}), expected)


@pytest.mark.parametrize("channels", [1, 64])
def test_multiscale_roi_align_reads_the_end_of_a_large_map(channels):
    side = {1: 46_400, 64: 5_800}[channels]
    map = guarded_empty(side * side * channels, torch.float32).view(1, side, side, channels).permute(0, 3, 1, 2)
    assert map.numel() > 2**31
    patch = torch.randn(1, channels, 6, 6)
    map[:, :, -6:, -6:] = patch
    near, far = (torch.tensor([[0.0, at + 1, at + 1, at + 5, at + 5]]) for at in (0, side - 6))
    expected = cascadeops.multiscale_roi_align([patch.to(memory_format=torch.channels_last)], near, 4, [1.0])
    torch.testing.assert_close(cascadeops.multiscale_roi_align([map], far, 4, [1.0]), expected, rtol=0, atol=0)


def test_mask_targets_reads_the_end_of_many_bitmaps():
    bitmaps = guarded_empty(2**31 + 100, torch.uint8)
    bitmaps[-100:] = 1
    windows = torch.tensor([[0, 0, 10, 10]], dtype=torch.int32)
    box, index = torch.tensor([[2.0, 2.0, 8.0, 8.0]]), torch.tensor([0])
    for offset, expected in ((2**31, 1), (2**31 - 100, 0)):
        target = cascadeops.mask_targets(bitmaps, torch.tensor([offset]), windows, box, index, 3)
        assert target.unique().tolist() == [expected]


def test_multiclass_nms_reads_the_box_of_the_last_class():
    rows, classes = 2**25 + 1, 16
    boxes = guarded_empty(rows * classes * 4, torch.float32).view(1, rows, classes * 4)
    assert boxes.numel() > 2**31
    scores = guarded_empty(rows * classes, torch.float32).view(1, rows, classes)
    boxes[0, -1, -4:] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    scores[0, -1, -1] = 0.9
    found, _, labels, index, count = cascadeops.multiclass_nms(boxes, scores, 0.5, 0.5, 2)
    assert (count.item(), labels[0, 0].item(), index[0, 0].item()) == (1, classes - 1, rows - 1)
    assert found[0, 0].tolist() == [1, 2, 3, 4]


def test_paste_masks_reads_the_last_of_many_masks():
    masks, side = 2**11 + 1, 2**10
    probs = guarded_empty(masks * side * side, torch.float32).view(masks, side, side)
    assert probs.numel() > 2**31
    probs[-1] = 1
    boxes = torch.zeros(masks, 4)
    boxes[-1] = torch.tensor([0.0, 0.0, 2.0, 3.0])
    pasted = cascadeops.paste_masks(probs, boxes, (3, 4))
    assert pasted[-1].int().tolist() == [[1, 1, 0, 0]] * 3 and not pasted[:-1].any()
    assert cascadeops.paste_masks_rle(probs, boxes, (3, 4))[-1] == {"size": [3, 4], "counts": b"066"}
