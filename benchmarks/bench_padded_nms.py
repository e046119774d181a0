"""padded_nms against others' batched_nms, which do not know the capacity: the RPN's levels, a data set's classes."""

import pytest
import shapes
from nms_peers import PEERS, batched_nms_of

import cascadeops
from cascadeops.reference.padded_nms import padded_nms as reference

IOU = 0.5


@pytest.mark.parametrize("implementation", ["cascadeops", *PEERS, "reference"])
@pytest.mark.parametrize(
    ("count", "groups", "capacity"), [(1_000, 5, 1_000), (10_000, 5, 1_000), (10_000, 80, 10_000), (100_000, 80, 100)]
)
def bench_padded_nms(measure, device, count, groups, capacity, implementation):
    if implementation == "reference" and count > 1_000:
        pytest.skip("takes minutes")
    boxes, scores, group = shapes.crowded_boxes(count, groups, device)
    batch = (boxes[None], scores[None], group[None], IOU, capacity)
    if implementation in PEERS:
        batched_nms = batched_nms_of(implementation)
        function = lambda: batched_nms(boxes, scores, group, IOU)[:capacity]  # noqa: E731
    else:
        function = lambda: (cascadeops.padded_nms if implementation == "cascadeops" else reference)(*batch)  # noqa: E731

    def kept(result) -> set[int]:
        return set((result if implementation in PEERS else result[0][0, : result[1].item()]).tolist())

    index, kept_count = cascadeops.padded_nms(*batch)
    expected = set(index[0, : kept_count.item()].tolist())

    def check(result):
        # Pairs whose IoU is at the threshold to within rounding may be decided differently by a peer's float32, and
        # each may move one row across the capacity.
        assert len(kept(result) ^ expected) <= (max(2, 1e-3 * len(expected)) if implementation in PEERS else 0)

    workload = f"padded_nms, {count:,} boxes, {groups} groups, best {capacity:,}"
    measure(workload, implementation, function, check, bytes_moved=28 * count)
