"""From a detector's output to COCO results files, and from those to average precision: time and peak memory.

100 detections an image of 800 x 1333. The usual path pastes every mask into an image-sized bitmap and encodes that with
pycocotools; it is timed on 10 images, ours on 10 and on 5,000, the size of val2017.
"""

import json
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import shapes
from pasting import grid_sample_paste
from pycocotools import coco, cocoeval
from pycocotools import mask as mask_api

import cascadeops
from models import coco_evaluation

IMAGE_SIZE = (800, 1333)
CATEGORY_IDS = list(range(1, 81))
KINDS = "bbox", "segm"


def usual_encoding(probs, boxes) -> list[dict]:
    masks = grid_sample_paste(probs, boxes, IMAGE_SIZE).cpu().numpy().view(np.uint8)
    return [mask_api.encode(np.asfortranarray(mask)) for mask in masks]


def cascadeops_encoding(probs, boxes) -> list[dict]:
    return cascadeops.paste_masks_rle(probs, boxes, IMAGE_SIZE)


ENCODINGS = {"cascadeops": cascadeops_encoding, "grid_sample + pycocotools": usual_encoding}


def entries_of(images: int, device, encode) -> dict[str, list[dict]]:
    """COCO results of the same 100 detections in every image."""
    probs, boxes = shapes.detections(100, device, IMAGE_SIZE)
    scores, labels = np.linspace(1, 0.01, 100), np.arange(100) % 80
    entries: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for image_id in range(images):
        masks = encode(probs, boxes)
        new = coco_evaluation.result_entries(image_id, boxes.cpu().numpy(), scores, labels, masks, CATEGORY_IDS)
        for kind in KINDS:
            entries[kind] += new[kind]
    return entries


def reset_peak() -> int | None:
    """Bytes of this process that are in memory; from now on `peak` counts anew. None where the system has no such."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return memory("VmRSS")


def memory(which: str) -> int:
    return int(re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.parametrize("implementation", ENCODINGS)
@pytest.mark.parametrize("images", [10, 5000])
def bench_coco_results(measure, benchmark, device, images, implementation, tmp_path):
    if images > 10 and (implementation != "cascadeops" or benchmark.disabled):
        pytest.skip("20 minutes" if implementation != "cascadeops" else "checked with fewer images")
    images = 2 if benchmark.disabled else images

    def function():
        return coco_evaluation.write_results(tmp_path, entries_of(images, device, ENCODINGS[implementation]))

    def check(paths):
        if before is not None:
            benchmark.extra_info.update(memory=memory("VmHWM") - before)
        boxes, masks = (json.loads(path.read_text()) for path in paths)
        assert len(boxes) == len(masks) == images * 100
        areas = [mask_api.area(coco_evaluation.bytes_rle(entry["segmentation"])) for entry in masks[:100]]
        expected = mask_api.area(cascadeops_encoding(*shapes.detections(100, device, IMAGE_SIZE)))
        # grid_sample's sums may be rounded in another order.
        assert abs(np.array(areas, np.int64) - expected.astype(np.int64)).sum() <= 1e-5 * expected.sum()
        benchmark.extra_info.update(json_bytes=sum(path.stat().st_size for path in paths))

    before = reset_peak()
    measure(f"coco_results, {images:,} images x 100 detections", implementation, function, check)


EVALUATORS = {"pycocotools": "pycocotools", "faster-coco-eval": "faster_coco_eval"}


@pytest.mark.parametrize("implementation", EVALUATORS)
def bench_coco_evaluation(measure, benchmark, device, implementation):
    """Mask AP of 100 detections in each of 100 images; every second of the best 20 is an object."""
    if device.type == "cuda":
        pytest.skip("the evaluators run on the CPU")
    images = 5 if benchmark.disabled else 100
    entries = entries_of(images, device, cascadeops_encoding)["segm"]
    truth = {
        "images": [{"id": i, "height": IMAGE_SIZE[0], "width": IMAGE_SIZE[1]} for i in range(images)],
        "categories": [{"id": i, "name": str(i)} for i in CATEGORY_IDS],
        "annotations": [
            {key: entry[key] for key in ("image_id", "category_id", "segmentation")} | {"id": i, "bbox": [0, 0, 1, 1]}
            for i, entry in enumerate(entries)
            if i % 100 < 20 and i % 2
        ],
    }
    with mock.patch.multiple(coco_evaluation, COCO=coco.COCO, COCOeval=cocoeval.COCOeval):
        expected = coco_evaluation.average_precision(truth, entries, "segm")
    evaluator = coco.COCO, cocoeval.COCOeval
    if implementation == "faster-coco-eval":
        faster = pytest.importorskip("faster_coco_eval")
        evaluator = faster.COCO, faster.COCOeval_faster

    def function():
        with mock.patch.multiple(coco_evaluation, COCO=evaluator[0], COCOeval=evaluator[1]):
            return coco_evaluation.average_precision(truth, entries, "segm")

    def check(found):
        assert found == expected

    measure(f"coco_evaluation, {images} images x 100 detections", implementation, function, check)
