"""box_proposals against the same steps with PyTorch's operators and a library's NMS: inference and training."""

import pytest
import shapes
import torch
from nms_peers import PEERS, batched_nms_of

import cascadeops
from cascadeops.reference.box_proposals import decode_boxes
from models.anchors import grid_anchors

IOU, STDS = 0.7, (1.0, 1.0, 1.0, 1.0)
STRIDES = [*shapes.STRIDES, 64]


def rpn_outputs(batch: int, device):
    """Logits [N, A_l], deltas [N, A_l, 4], anchors [A_l, 4] of P2 to P6, 268,569 anchors; neighbours score alike."""
    generator = torch.Generator().manual_seed(4)
    sizes = [tuple(-(-side // stride) for side in shapes.IMAGE_SIZE) for stride in STRIDES]
    anchors = grid_anchors(sizes, STRIDES, 8.0, (0.5, 1.0, 2.0), torch.device(device))
    logits, deltas = [], []
    for (height, width), level in zip(sizes, anchors, strict=True):
        hills = torch.randn(batch, 1, height // 8 + 2, width // 8 + 2, generator=generator)
        hills = torch.nn.functional.interpolate(hills, (height, width), mode="bilinear")[:, 0, ..., None]
        logits.append(3 * hills.expand(-1, -1, -1, 3).flatten(1) + torch.randn(batch, len(level), generator=generator))
        deltas.append(torch.randn(batch, len(level), 4, generator=generator) * 0.2)
    image_sizes = torch.tensor([[800, 1333]] * batch, device=device)
    return [x.to(device) for x in logits], [x.to(device) for x in deltas], anchors, image_sizes


def step_by_step(logits, deltas, anchors, image_sizes, top_k, max_proposals, batched_nms):
    """As torchvision's RegionProposalNetwork.filter_proposals: batched top-k and decoding, then image by image."""
    boxes, scores, levels = [], [], []
    for level, (level_logits, level_deltas, level_anchors) in enumerate(zip(logits, deltas, anchors, strict=True)):
        top, index = level_logits.topk(min(top_k, level_logits.shape[1]), dim=1)
        chosen = level_deltas.gather(1, index[..., None].expand(-1, -1, 4))
        boxes.append(decode_boxes(level_anchors[index], chosen, STDS, image_sizes))
        scores.append(top.sigmoid())
        levels.append(torch.full_like(index, level))
    results = []
    for image_boxes, image_scores, image_levels in zip(
        torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(levels, 1), strict=True
    ):
        big = ((image_boxes[:, 2:] - image_boxes[:, :2]) > 0).all(1).nonzero()[:, 0]
        image_boxes, image_scores, image_levels = image_boxes[big], image_scores[big], image_levels[big]
        kept = batched_nms(image_boxes, image_scores, image_levels, IOU)[:max_proposals]
        results.append((image_boxes[kept], image_scores[kept]))
    return results


@pytest.mark.parametrize("implementation", ["cascadeops", *PEERS])
@pytest.mark.parametrize(("batch", "top_k"), [(1, 1000), (2, 2000)])
def bench_box_proposals(measure, device, batch, top_k, implementation):
    outputs = rpn_outputs(batch, device)
    expected, _, count = cascadeops.box_proposals(*outputs, top_k, top_k, IOU)
    if implementation in PEERS:
        batched_nms = batched_nms_of(implementation)
        function = lambda: step_by_step(*outputs, top_k, top_k, batched_nms)  # noqa: E731
    else:
        function = lambda: cascadeops.box_proposals(*outputs, top_k, top_k, IOU)  # noqa: E731

    def check(result):
        if implementation == "cascadeops":
            assert torch.equal(result[0], expected)
            return
        # Where its float32 IoU or exponential rounds otherwise at a threshold, another box may follow.
        for (boxes, _), ours, found in zip(result, expected, count.tolist(), strict=True):
            assert len(boxes) == found
            assert ((boxes - ours[:found]).abs().amax(1) < 1e-2).float().mean() > 0.95

    anchors = sum(level.shape[1] for level in outputs[0])
    chosen = sum(min(top_k, level.shape[1]) for level in outputs[0])
    name = f"box_proposals, {batch} x {anchors:,} anchors, top {top_k:,}"
    measure(name, implementation, function, check, bytes_moved=batch * (4 * anchors + 32 * chosen + 20 * top_k))
