"""NMS of 1,000 to 1,000,000 boxes and 1 to 1,203 classes: every decision as in float64, memory of O(N), early exit."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import Tensor

from cascadeops import batched_nms, multiclass_nms, nms, padded_nms
from cascadeops.reference.nms import batched_nms as reference

THRESHOLD = 0.5
BYTES_PER_BOX = 64


def pairs_above(boxes: np.ndarray, groups: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of rows of one group whose float64 IoU exceeds the threshold, by a sweep along x.

    Rows are sorted by group and left edge; a row is compared with its next neighbour, all rows at once, then with the
    one after that, until no neighbour begins left of its right edge any more.
    """
    order = np.lexsort((boxes[:, 0], groups))
    x1, y1, x2, y2 = boxes[order].T.astype(np.float64).copy()
    area, groups = (x2 - x1) * (y2 - y1), groups[order]
    firsts, seconds = [], []
    rows, step = np.flatnonzero((x2 > x1) & (y2 > y1)), 0
    while len(rows):
        step += 1
        rows = rows[rows + step < len(order)]
        others = rows + step
        inside = (groups[rows] == groups[others]) & (x1[others] < x2[rows])
        rows, others = rows[inside], others[inside]
        width = np.minimum(x2[rows], x2[others]) - x1[others]
        height = np.minimum(y2[rows], y2[others]) - np.maximum(y1[rows], y1[others])
        overlap = (width > 0) & (height > 0)
        inter, first, second = (width * height)[overlap], rows[overlap], others[overlap]
        above = inter / (area[first] + area[second] - inter) > threshold
        firsts.append(order[first[above]])
        seconds.append(order[second[above]])
    return np.concatenate(firsts), np.concatenate(seconds)


def greedy(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> list[int]:
    """Rows kept by greedy NMS, best first: for each pair above the threshold, in order, a kept row drops the other."""
    order = np.argsort(-scores.numpy(), kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    first, second = (rank[rows] for rows in pairs_above(boxes.numpy(), groups.numpy(), threshold))
    better, worse = np.minimum(first, second), np.maximum(first, second)
    by_better = np.argsort(better, kind="stable")
    kept = bytearray(b"\1" * len(order))
    for winner, loser in zip(better[by_better].tolist(), worse[by_better].tolist(), strict=True):
        if kept[winner]:
            kept[loser] = 0
    return order[np.frombuffer(kept, dtype=bool)].tolist()


def clusters(rows: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clusters of eight on a grid of half pixels, with few scores: ties, and IoUs of exactly 1/2, are common."""
    count = max(rows // 8, 1)
    extent = torch.tensor([3.0 * max(rows // groups, 100), 300.0])
    cluster = torch.randint(count, (rows,))
    corner = (torch.rand(count, 2) * extent)[cluster] + torch.randn(rows, 2) * 2
    size = (torch.rand(count, 2) * 16 + 4)[cluster] + torch.randn(rows, 2)
    boxes = torch.cat([corner, corner + size.clamp(min=0)], 1)
    scores = torch.randint(max(rows // 4, 20), (rows,)) / max(rows // 4, 20)
    labels = torch.randint(groups, (count,))[cluster]
    stray = torch.rand(rows) < 0.2
    return (boxes * 2).round() / 2, scores, torch.where(stray, torch.randint(groups, (rows,)), labels)


def test_the_oracle_is_the_reference():
    for groups in (1, 3):
        boxes, scores, labels = clusters(400, groups)
        for threshold in (0.0, 0.3, THRESHOLD):
            expected = reference(boxes, scores, labels, threshold).tolist()
            assert greedy(boxes, scores, labels, threshold) == expected
        assert len(expected) < 350


SIZES = [(1_000, 1), (1_000, 1203), (10_000, 80), (100_000, 1), (100_000, 5), (1_000_000, 1203), (1_000_000, 1)]


@pytest.mark.parametrize(("rows", "groups"), SIZES)
def test_every_row_is_decided_as_in_float64(device, rows, groups):
    if device.type == "cuda" and rows > 100_000 * groups:
        pytest.skip("a block works on a group alone: minutes")
    boxes, scores, labels = clusters(rows, groups)
    expected = greedy(boxes, scores, labels, THRESHOLD)
    assert len(expected) < 0.97 * rows
    moved = [tensor.to(device) for tensor in (boxes, scores, labels)]
    assert batched_nms(*moved, THRESHOLD).tolist() == expected
    if groups == 1:
        assert nms(*moved[:2], THRESHOLD).tolist() == expected
    for capacity in (100, rows // 3, rows):
        index, count = padded_nms(*(tensor[None] for tensor in moved), THRESHOLD, capacity)
        found = min(len(expected), capacity)
        assert count.item() == found
        assert index[0, :found].tolist() == expected[:found]
        assert (index[0, found:] == -1).all()


@pytest.mark.parametrize(
    ("rows", "classes", "score_threshold"),
    [(1_000, 1, 0.0), (500, 1203, 0.0), (500, 1203, 0.9), (12_500, 80, 0.7), (1_000_000, 1, 0.9)],
)
def test_every_pair_of_box_and_class_is_decided_as_in_float64(device, rows, classes, score_threshold):
    boxes, scores, _ = clusters(rows, 1)
    scores = (scores[:, None] * 0.7 + torch.rand(rows, classes) * 0.3).mul(2**12).round() / 2**12
    row, label = (scores > score_threshold).nonzero(as_tuple=True)
    kept = torch.tensor(greedy(boxes[row], scores[row, label], label, THRESHOLD)[:5000])
    row, label = row[kept], label[kept]
    found, best, labels, index, count = (
        tensor[0].cpu()
        for tensor in multiclass_nms(boxes[None].to(device), scores[None].to(device), score_threshold, THRESHOLD, 5000)
    )
    assert count.item() == len(kept)
    for ours, expected in ((index, row), (labels, label), (best, scores[row, label]), (found, boxes[row])):
        assert torch.equal(ours[: len(kept)], expected)


def test_stops_when_the_capacity_is_full():
    boxes, scores, labels = (tensor[None] for tensor in clusters(300_000, 5))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = {capacity: [] for capacity in (100, 300_000)}
        for _ in range(3):
            for capacity, times in seconds.items():
                start = time.thread_time()
                padded_nms(boxes, scores, labels, THRESHOLD, capacity)
                times.append(time.thread_time() - start)
    finally:
        torch.set_num_threads(before)
    assert min(seconds[100]) < 0.5 * min(seconds[300_000])  # what remains is reading and sorting


PEAK = """
import torch, cascadeops

def memory(field):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))

def bytes_per_box(call):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = memory("VmRSS")
    call()
    return (memory("VmHWM") - before) / rows

rows = 500_000
corner = torch.rand(rows, 2) * 70_000
boxes, scores = torch.cat([corner, corner + 40], 1), torch.rand(rows)
cascadeops.nms(boxes[:9], scores[:9], 0.5)  # loads what is loaded once
for groups in (1, 80):
    idxs = torch.arange(rows) * 7919 % groups
    print(bytes_per_box(lambda: cascadeops.nms(boxes, scores, 0.5)))
    print(bytes_per_box(lambda: cascadeops.batched_nms(boxes, scores, idxs, 0.5)))
    print(bytes_per_box(lambda: cascadeops.padded_nms(boxes[None], scores[None], idxs[None], 0.5, rows)))
    print(bytes_per_box(lambda: cascadeops.multiclass_nms(boxes[None], scores[None, :, None], 0.0, 0.5, 100)))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")
def test_memory_is_at_most_64_bytes_a_box():
    """Nearly all boxes are kept, the worst case; results included. A matrix of bits would take 62,500 bytes a box."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # or memory freed before would hide some
    result = subprocess.run([sys.executable, "-c", PEAK], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = [float(line) for line in result.stdout.split()]
    assert len(found) == 8 and all(16 < bytes_per_box <= BYTES_PER_BOX for bytes_per_box in found), found
