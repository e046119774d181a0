"""padded_nms against torchvision's batched_nms, one image: the RPN's levels, a data set's classes."""

import pytest
import shapes

import cascadeops
from cascadeops.reference.padded_nms import padded_nms as reference

IOU = 0.5


@pytest.mark.parametrize("implementation", ["cascadeops", "torchvision", "reference"])
@pytest.mark.parametrize(("count", "groups"), [(1_000, 5), (10_000, 5), (10_000, 80), (100_000, 80)])
def bench_padded_nms(measure, device, count, groups, implementation):
    if implementation == "reference" and count > 1_000:
        pytest.skip("takes minutes")
    boxes, scores, group = shapes.crowded_boxes(count, groups, device)
    batch = (boxes[None], scores[None], group[None], IOU, count)
    if implementation == "torchvision":
        torchvision = pytest.importorskip("torchvision")
        function = lambda: torchvision.ops.batched_nms(boxes, scores, group, IOU)  # noqa: E731
    else:
        function = lambda: (cascadeops.padded_nms if implementation == "cascadeops" else reference)(*batch)  # noqa: E731

    def kept(result) -> set[int]:
        return set((result if implementation == "torchvision" else result[0][0, : result[1].item()]).tolist())

    index, kept_count = cascadeops.padded_nms(*batch)
    expected = set(index[0, : kept_count.item()].tolist())

    def check(result):
        # Pairs whose IoU is at the threshold to within rounding may be decided differently by torchvision's float32.
        assert len(kept(result) ^ expected) <= (1e-3 * len(expected) if implementation == "torchvision" else 0)

    measure(f"padded_nms, {count:,} boxes, {groups} groups", implementation, function, check, bytes_moved=28 * count)
