"""What a CUDA kernel finds wrong in its data is raised at the next synchronisation, once; the CPU raises at once."""

import pytest
import torch

import cascadeops
from cascadeops import raise_device_faults

NAN = float("nan")
SQUARE = [[0.0, 0.0, 8.0, 8.0], [1.0, 1.0, 9.0, 9.0], [2.0, 2.0, 7.0, 7.0]]


def boxes_with(device, bad: float) -> torch.Tensor:
    """[3, 4], the last of which holds a coordinate that is not finite."""
    boxes = torch.tensor(SQUARE, device=device)
    boxes[2, 1] = bad
    return boxes


def paste_masks(device, bad):
    return cascadeops.paste_masks(torch.ones(3, 4, 4, device=device), boxes_with(device, bad), (16, 16))


def paste_packed_masks(device, bad):
    return cascadeops.paste_masks(torch.ones(3, 4, 4, device=device), boxes_with(device, bad), (16, 16), packed=True)


def mask_targets(device, bad):
    bitmaps = torch.ones(64, dtype=torch.uint8, device=device)
    offsets = torch.zeros(1, dtype=torch.int64, device=device)
    windows = torch.tensor([[0, 0, 8, 8]], dtype=torch.int32, device=device)
    index = torch.zeros(3, dtype=torch.int64, device=device)
    return cascadeops.mask_targets(bitmaps, offsets, windows, boxes_with(device, bad), index, 4)


def polygon_mask_targets(device, bad):
    vertices = torch.tensor([[0.0, 0.0], [8.0, 0.0], [8.0, 8.0]], device=device)
    offsets = torch.tensor([0, 3], device=device)
    objects, index = torch.tensor([0, 1], device=device), torch.zeros(3, dtype=torch.int64, device=device)
    return cascadeops.polygon_mask_targets(vertices, offsets, objects, boxes_with(device, bad), index, 4)


def match_boxes(device, bad):
    valid = torch.ones(1, 3, dtype=torch.bool, device=device)
    good = torch.tensor([SQUARE], device=device)
    return cascadeops.match_boxes(boxes_with(device, bad)[None], valid, good, valid, 0.5, 0.4)


def padded_nms(device, bad):
    return cascadeops.padded_nms(boxes_with(device, bad)[None], torch.ones(1, 3, device=device), None, 0.5, 3)


def multiclass_nms(device, bad):
    return cascadeops.multiclass_nms(boxes_with(device, bad)[None], torch.ones(1, 3, 2, device=device), 0.1, 0.5, 3)


def multiscale_roi_align(device, bad):
    rois = torch.cat([torch.zeros(3, 1, device=device), boxes_with(device, bad)], dim=1)
    return cascadeops.multiscale_roi_align([torch.ones(1, 2, 4, 4, device=device)], rois, 2, [4.0])


CALLS = [
    paste_masks,
    paste_packed_masks,
    mask_targets,
    polygon_mask_targets,
    match_boxes,
    padded_nms,
    multiclass_nms,
    multiscale_roi_align,
]


def name_of(call) -> str:
    return call.__name__.replace("packed_", "")


@pytest.mark.parametrize("bad", [NAN, float("inf")])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_fault_is_raised_once(device, kernels, raise_faults, call, bad):
    if kernels == "cpu":
        with pytest.raises(RuntimeError, match=f"^{name_of(call)}: .*must be finite"):
            call(device, bad)
        return
    raise_faults()
    call(device, bad)
    with pytest.raises(RuntimeError, match=rf"^{name_of(call)}: .*finite.*; see row 2 \(found by .* cuda:\d"):
        raise_faults()
    raise_faults()


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_good_data_notes_nothing(device, raise_faults, call):
    call(device, 0.5)
    raise_faults()


def test_fault_of_a_logit(device, raise_faults):
    level = torch.zeros(1, 5, device=device).index_fill(1, torch.tensor([4], device=device), NAN)
    deltas, anchors = torch.zeros(1, 5, 4, device=device), torch.tensor([SQUARE[0]] * 5, device=device)

    def propose():
        cascadeops.box_proposals([level], [deltas], [anchors], torch.tensor([[16.0, 16.0]], device=device), 3, 3, 0.5)
        raise_faults()

    with pytest.raises(RuntimeError, match=r"^box_proposals: logits must not be NaN; see "):
        propose()


def test_fault_reaches_the_operator_that_waits_next(device, kernels):
    if kernels == "cpu":
        pytest.skip("CPU kernels raise at once")
    paste_masks(device, NAN)
    boxes = torch.tensor(SQUARE, device=device)
    with pytest.raises(RuntimeError, match=r"^paste_masks: boxes must be finite; see row 2"):
        cascadeops.paste_masks_rle(torch.ones(3, 4, 4, device=device), boxes, (16, 16))


def test_nothing_to_raise_without_a_gpu():
    assert raise_device_faults("cpu") is None
    if not torch.cuda.is_available():
        assert raise_device_faults() is None
