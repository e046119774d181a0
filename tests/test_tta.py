"""Test-time augmentation: against a slow, plain reading of its description, and properties that it must have."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from program_cases import CATEGORY_IDS, CLASS_NAMES, run_program, write_data
from small_detectors import exported_without_sync

import cascadeops
import models
from cascadeops.reference.preprocess import resize_image
from models import Views
from models.config import RPNConfig
from models.data.transforms import MEAN, STD
from models.errors import UsageError
from models.evaluate import Evaluate, main
from models.images import read_image
from models.inference import make_batch
from models.tta import SameSizeViews, chosen_views, detect_in_views, detect_in_views_of_image, mirror_boxes

VIEWS = Views(scales=((64, 96), (80, 160)))
"""Of an image of 70 x 101 pixels: 64 x 92 and 80 x 115, so that the factors of width and height differ."""
RPN = RPNConfig(anchor_scale=4.0, top_k=60, max_proposals=40)
HEADS = {"channels": 16, "box_channels": 32, "finest_size": 28.0, "max_detections": 20, "rpn": RPN}


def small_detector(arch, **fields):
    torch.manual_seed(3)
    head = {"mask_blocks": 1, "global_blocks": 1} if arch == "scnet" else {"mask_convs": 1}
    fields = HEADS | head | {"num_classes": 4, "num_semantic_classes": 9} | fields
    detector = models.build_detector(arch, backbone="resnet18_narrow", **fields)
    # Spreads scores, boxes and masks, so that views differ and a wrong step shows.
    with torch.no_grad():
        for head in detector.box_heads:
            head.class_logits.weight.mul_(40)
            head.deltas.weight.mul_(40)
        detector.rpn.objectness.weight.mul_(10)
        detector.rpn.deltas.weight.mul_(10)
    return detector


def random_image(height=70, width=101, seed=1):
    """Blobs rather than noise, of which nothing would be left in another size."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 7, 9, generator=generator)
    pixels = F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)[0] * 255
    return pixels.permute(1, 2, 0).to(torch.uint8).numpy()


def detect(detector, image, views):
    """Detections of one image without their padding rows."""
    with torch.inference_mode():
        found = detect_in_views(detector, *make_batch([image], None, "cpu"), views)
    count = found.count.item()
    return found._replace(**{name: getattr(found, name)[0, :count] for name in found._fields[:-1]})


# ---- the plain reading


class PlainView:
    """One view of one image, and what is computed from it with a detector's own layers."""

    def __init__(self, detector, image, scale, flipped):
        height, width = image.shape[:2]
        factor = min(scale[0] / min(height, width), scale[1] / max(height, width))
        self.height, self.width = int(height * factor + 0.5), int(width * factor + 0.5)
        self.x, self.y, self.flipped, self.detector = self.width / width, self.height / height, flipped, detector
        pixels = resize_image(torch.from_numpy(image).double(), (self.height, self.width))
        pixels = ((pixels - torch.tensor(MEAN).double()) / torch.tensor(STD).double()).numpy()
        if flipped:
            pixels = pixels[:, ::-1]
        padded = np.zeros((1, 3, math.ceil(self.height / 32) * 32, math.ceil(self.width / 32) * 32), np.float32)
        padded[0, :, : self.height, : self.width] = pixels.transpose(2, 0, 1)
        self.features = detector.fpn(detector.backbone(torch.from_numpy(padded)))
        self.semantic = self.image_vector = None
        if detector.semantic_head is not None:
            self.semantic = detector.semantic_head(self.features)[1]
        if detector.arch == "scnet":
            self.image_vector = detector.global_context_head(self.features)[1]

    def proposals(self):
        sizes = torch.tensor([[self.height, self.width]])
        boxes, scores, count = self.detector.rpn.proposals(*self.detector.rpn(self.features), sizes)
        return [self.to_image(box) for box in boxes[0, : count.item()].tolist()], scores[0, : count.item()].tolist()

    def to_image(self, box):
        x1, y1, x2, y2 = box
        if self.flipped:
            x1, x2 = self.width - x2, self.width - x1
        return [x1 / self.x, y1 / self.y, x2 / self.x, y2 / self.y]

    def to_view(self, box):
        x1, y1, x2, y2 = box[0] * self.x, box[1] * self.y, box[2] * self.x, box[3] * self.y
        return [self.width - x2, y1, self.width - x1, y2] if self.flipped else [x1, y1, x2, y2]

    def pooled(self, boxes, size):
        """RoI features [R, C, size, size] of boxes in pixels of the view."""
        rois = torch.tensor([[0.0, *box] for box in boxes])
        finest = self.detector.config.finest_size
        pooled = cascadeops.multiscale_roi_align(self.features[:4], rois, size, (4, 8, 16, 32), finest_size=finest)
        if self.semantic is not None:
            semantic = cascadeops.multiscale_roi_align([self.semantic], rois, 14, (8,))
            pooled = pooled + (F.avg_pool2d(semantic, 2) if size == 7 else semantic)
        return pooled if self.image_vector is None else pooled + self.image_vector

    def box_stages(self, proposals):
        """For each proposal (in pixels of the image) its final box there, and its probabilities [K]."""
        boxes, logits = [self.to_view(box) for box in proposals], []
        for head, stds in zip(self.detector.box_heads, self.detector.config.stage_stds, strict=True):
            class_logits, deltas, _ = head(self.pooled(boxes, 7))
            logits.append(class_logits)
            boxes = [self.moved(box, delta, stds) for box, delta in zip(boxes, deltas.tolist(), strict=True)]
        probs = (sum(logits) / 3).softmax(dim=1)[:, :-1]
        return [self.to_image(box) for box in boxes], probs.double().numpy()

    def moved(self, box, delta, stds):
        dx, dy, dw, dh = (value * std for value, std in zip(delta, stds, strict=True))
        width, height = box[2] - box[0], box[3] - box[1]
        x, y = (box[0] + box[2]) / 2 + width * dx, (box[1] + box[3]) / 2 + height * dy
        limit = math.log(1000 / 16)
        width, height = (s * math.exp(max(-limit, min(limit, d))) for s, d in ((width, dw), (height, dh)))
        xs = [min(max(value, 0), self.width) for value in (x - width / 2, x + width / 2)]
        ys = [min(max(value, 0), self.height) for value in (y - height / 2, y + height / 2)]
        return [xs[0], ys[0], xs[1], ys[1]]

    def masks(self, boxes, labels):
        """A list of mask probabilities [D, 28, 28], one of each mask head, un-mirrored."""
        boxes, labels = [self.to_view(box) for box in boxes], torch.tensor(labels)
        x = self.pooled(boxes, 14)
        logits = []
        if self.detector.arch == "scnet":
            shared = self.detector.box_heads[2].shared_features(self.pooled(boxes, 7))
            logits.append(self.detector.mask_head(x + self.detector.feature_relay(shared), labels))
        else:
            flow = None
            for head in self.detector.mask_heads:
                logits.append(head(x, labels, flow))
                flow = head.features(x, flow)
        own = [maps.sigmoid().numpy() for maps in logits]
        return [maps[:, :, ::-1] if self.flipped else maps for maps in own]


def plain_nms(boxes, scores, threshold):
    """Rows that stay, best first."""
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(iou(boxes[i], boxes[k]) <= threshold for k in kept):
            kept.append(i)
    return kept


def iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared) if shared else 0.0


@torch.inference_mode()
def plain_reading(detector, image, views):
    """Boxes [D, 4], scores [D], labels [D], mask probabilities [D, 28, 28]."""
    config = detector.config
    flips = (False, True) if views.flip else (False,)
    all_views = [PlainView(detector, image, scale, flipped) for scale in views.scales for flipped in flips]
    boxes, scores = [], []
    for view in all_views:  # 1
        more_boxes, more_scores = view.proposals()
        boxes, scores = boxes + more_boxes, scores + more_scores
    proposals = [boxes[i] for i in plain_nms(boxes, scores, config.rpn.nms_iou)[: config.rpn.max_proposals]]
    refined, probs = zip(*[view.box_stages(proposals) for view in all_views], strict=True)  # 2
    boxes, probs = np.mean(refined, axis=0), np.mean(probs, axis=0)
    found = []
    for label in range(config.num_classes):  # 3
        rows = [i for i in range(len(boxes)) if probs[i, label] > config.score_threshold]
        kept = plain_nms([boxes[i] for i in rows], [probs[i, label] for i in rows], config.nms_iou)
        found += [(probs[rows[k], label], rows[k], label) for k in kept]
    found = sorted(found, key=lambda entry: -entry[0])[: config.max_detections]
    scores, rows, labels = map(list, zip(*found, strict=True))
    boxes = boxes[rows]
    masks = np.mean([maps for view in all_views for maps in view.masks(boxes.tolist(), labels)], axis=0)  # 4
    return boxes, scores, labels, masks


@pytest.mark.parametrize("arch", ["scnet", "htc"])
@pytest.mark.parametrize("semantic", [True, False])
@pytest.mark.parametrize("flip", [True, False])
def test_equals_a_plain_reading_of_the_description(arch, semantic, flip):
    detector, image = small_detector(arch, semantic=semantic), random_image()
    views = Views(VIEWS.scales, flip)
    ours = detect(detector, image, views)
    boxes, scores, labels, masks = plain_reading(detector, image, views)
    assert len(scores) >= 5
    assert ours.labels.tolist() == labels
    np.testing.assert_allclose(ours.boxes, boxes, atol=1e-3)
    np.testing.assert_allclose(ours.scores, scores, atol=1e-5)
    np.testing.assert_allclose(ours.mask_probs, masks, atol=1e-4)


# ---- properties


def equal(ours, theirs, exact=True):
    assert len(ours.scores) == len(theirs.scores) > 0
    assert torch.equal(ours.labels, theirs.labels)
    tolerance = {"atol": 0, "rtol": 0} if exact else {"atol": 1e-3, "rtol": 1e-4}
    for name in ("boxes", "scores", "mask_probs"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), **tolerance)


@pytest.mark.parametrize("arch", ["scnet", "htc"])
def test_one_plain_view_of_the_image_s_own_size_is_no_augmentation(arch):
    """Not even an NMS over the levels of the pyramid, which at this threshold would drop proposals."""
    detector, image = small_detector(arch, rpn=dataclasses.replace(RPN, nms_iou=0.2)), random_image()
    ours = models.predict(detector, image, tta=Views(((70, 101),), flip=False))
    plain = models.predict(detector, image)
    assert len(plain) > 0
    for name in ("boxes", "scores", "labels"):
        assert torch.equal(getattr(ours, name), getattr(plain, name))
    assert ours.masks == plain.masks


@pytest.mark.parametrize("arch", ["scnet", "htc"])
def test_a_mirrored_image_has_mirrored_detections(arch):
    detector, image = small_detector(arch), random_image()
    found = detect(detector, image, VIEWS)
    mirrored = detect(detector, np.ascontiguousarray(image[:, ::-1]), VIEWS)
    expected = found._replace(boxes=mirror_boxes(found.boxes, 101), mask_probs=found.mask_probs.flip(-1))
    equal(mirrored, expected, exact=False)


def test_the_way_of_a_box_into_the_views_and_back():
    """An image of 100 x 40, seen as 25 x 20: a box of it is 4 times smaller in y and 2 times in x."""
    group = SameSizeViews(None, torch.zeros(2, 7, 4), torch.zeros(2, 7), size=(25, 20), image_size=(100, 40))
    seen = group.from_image(torch.tensor([[[4.0, 8.0, 10.0, 40.0]]]))
    assert seen.tolist() == [[[2.0, 2.0, 5.0, 10.0]], [[15.0, 2.0, 18.0, 10.0]]]
    assert group.to_image(seen).tolist() == [[[4.0, 8.0, 10.0, 40.0]]] * 2
    assert group.sizes.tolist() == [[25, 20]] * 2


def test_mirroring_twice_is_the_identity():
    boxes = torch.tensor([[3.0, 1.0, 7.5, 4.0], [0.0, 0.0, 20.0, 9.0]])
    assert mirror_boxes(boxes, 20).tolist() == [[12.5, 1.0, 17.0, 4.0], [0.0, 0.0, 20.0, 9.0]]
    assert torch.equal(mirror_boxes(mirror_boxes(boxes, 20), 20), boxes)


def test_a_batch_gives_what_its_images_give_alone():
    detector = small_detector("scnet")
    images = [random_image(), random_image(90, 64, seed=2), random_image(seed=3)]
    for image, together in zip(images, models.predict(detector, images, tta=VIEWS), strict=True):
        alone = models.predict(detector, image, tta=VIEWS)
        assert len(alone) > 0
        assert torch.equal(alone.boxes, together.boxes) and torch.equal(alone.scores, together.scores)
        assert alone.masks == together.masks and alone.masks[0]["size"] == list(image.shape[:2])


@pytest.mark.parametrize("arch", ["scnet", "htc"])
@pytest.mark.parametrize("nothing", ["proposals", "scores"])
def test_nothing_found(arch, nothing):
    detector = small_detector(arch, score_threshold=1.0 if nothing == "scores" else 0.01)
    if nothing == "proposals":  # all boxes are moved far to the right, where the image's border leaves no width
        detector.rpn.deltas.bias.data.view(-1, 4)[:, 0] = 1e4
    result = models.predict(detector, random_image(), tta=VIEWS)
    assert result.boxes.shape == (0, 4) and result.masks == [] and len(result) == 0
    assert models.predict(detector, [], tta=VIEWS) == []


@pytest.mark.parametrize("arch", ["scnet", "htc"])
def test_shapes_do_not_depend_on_what_is_found(arch, monkeypatch):
    """The whole capacity, as on a GPU: the same detections, in the same places, and padding that says so."""
    detector = small_detector(arch, score_threshold=0.27, rpn=dataclasses.replace(RPN, max_proposals=200))
    image, _ = make_batch([random_image(64, 96)], None, "cpu")
    with torch.inference_mode():
        trimmed = detect_in_views_of_image(detector, image, VIEWS)
        for module in ("tta", arch):
            monkeypatch.setattr(f"models.{module}.used_capacity", lambda count, capacity: capacity)
        whole = detect_in_views_of_image(detector, image, VIEWS)
    assert 0 < whole.count.item() < 20
    assert whole.boxes.shape == (1, 20, 4) and whole.mask_probs.shape == (1, 20, 28, 28)
    assert (whole.labels[0, whole.count.item() :] == -1).all()
    for ours, theirs in zip(trimmed, whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_one_graph():
    detector = small_detector("htc")
    image, _ = make_batch([random_image(64, 96)], None, "cpu")
    views = Views(((64, 96),))
    compiled = torch.compile(detect_in_views_of_image, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        eager, graph = (function(detector, image, views) for function in (detect_in_views_of_image, compiled))
    for ours, theirs in zip(eager, graph, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


class DetectInViews(torch.nn.Module):
    def __init__(self, detector, views):
        super().__init__()
        self.detector, self.views = detector, views

    def forward(self, image):
        return detect_in_views_of_image(self.detector, image, self.views)


def test_nothing_is_read_on_the_host():
    module = DetectInViews(small_detector("htc"), Views(((64, 96),)))
    image, _ = make_batch([random_image(64, 96)], None, "cpu")
    with torch.no_grad():
        for ours, theirs in zip(module(image), exported_without_sync(module, image)(image), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# ---- what it is asked for


def test_the_published_views():
    assert len(Views()) == 10
    assert str(Views(((600, 900),))) == (
        "2 views of an image: 600 x 900 (short x long side at most), each plain and mirrored"
    )
    assert str(Views(((600, 900), (8, 9)), flip=False)) == (
        "2 views of an image: 600 x 900, 8 x 9 (short x long side at most)"
    )


@pytest.mark.parametrize("scales", [(), ((900, 600),), ((0, 5),), ((600, 900), (800,))])
def test_scales_that_are_none(scales):
    with pytest.raises(UsageError, match=r"needs scales SHORT LONG with 1 <= SHORT <= LONG\n  why: .*\n  fix: "):
        Views(scales)


def test_detectors_and_sizes_that_do_not_go_with_it():
    image = random_image()
    with pytest.raises(UsageError, match=r"not made for mask_rcnn\n.*the detectors that have it are htc and scnet"):
        models.predict(models.build_detector("mask_rcnn", "resnet18_narrow", 4, **HEADS), image, tta=VIEWS)
    with pytest.raises(UsageError, match="resize and tta both set the size"):
        models.predict(small_detector("scnet"), image, resize=(70, 101), tta=VIEWS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    models.save_weights(path, small_detector("htc", num_classes=3), CLASS_NAMES, CATEGORY_IDS, {"resize": [50, 60]})
    return path


SAYS = "4 views of an image: 64 x 96, 80 x 160 (short x long side at most), each plain and mirrored"


def written(folder, image_id):
    """Objects (category, run lengths) and scores of an image in the results of a program."""
    entries = json.loads((folder / "detections.segm.json").read_text())
    found = [entry for entry in entries if entry["image_id"] == image_id]
    return [(entry["category_id"], entry["segmentation"]["counts"]) for entry in found], [e["score"] for e in found]


def predicted(weights, image):
    detector, _ = models.load_detector(weights)
    result = models.predict(detector, read_image(image), tta=VIEWS)
    masks = [mask["counts"].decode() for mask in result.masks]
    return list(zip([CATEGORY_IDS[label] for label in result.labels], masks, strict=True)), result.scores.tolist()


def check_written(folder, first_id, data, weights):
    for number in range(3):
        objects, scores = written(folder, first_id + number)
        expected_objects, expected_scores = predicted(weights, data / "val" / f"{11 + number}.png")
        assert objects == expected_objects
        np.testing.assert_allclose(scores, expected_scores, atol=2e-5)


def test_predict(data, weights, tmp_path):
    options = ["--tta", "--tta-scales", "64", "96", "80", "160"]
    done = run_program("predict", data / "val", "--weights", weights, "--output", tmp_path, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == SAYS
    check_written(tmp_path, 1, data, weights)


def test_evaluate(data, weights, tmp_path, capsys):
    main(Evaluate(weights=weights, data=data, output=tmp_path, tta=True, tta_scales=VIEWS.scales, pictures=1))
    assert capsys.readouterr().out.splitlines()[0] == SAYS
    check_written(tmp_path, 11, data, weights)
    assert (tmp_path / "comparison.png").exists()


def test_a_detector_that_does_not_have_it_is_told_before_the_data_is_read(tmp_path):
    detector = models.build_detector("mask_rcnn", "resnet18_narrow", 3, **HEADS)
    models.save_weights(tmp_path / "w.safetensors", detector, CLASS_NAMES, CATEGORY_IDS, {"resize": None})
    with pytest.raises(UsageError, match="not made for mask_rcnn"):
        main(Evaluate(weights=tmp_path / "w.safetensors", data=tmp_path / "nowhere", output=tmp_path, tta=True))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ((False, ((64, 96),), True, None), "--tta-scales and --no-tta-flip are for --tta"),
        ((False, (), False, None), "--tta-scales and --no-tta-flip are for --tta"),
        ((True, (), True, (64, 96)), "--resize and --tta both set the size"),
        ((True, ((96, 64),), True, None), "needs scales SHORT LONG"),
    ],
)
def test_options_that_do_not_go_together(options, text):
    with pytest.raises(UsageError, match=text):
        chosen_views(*options)


def test_options():
    assert chosen_views(False, (), True, (64, 96)) is None
    assert chosen_views(True, (), True, None) == Views()
    assert chosen_views(True, VIEWS.scales, False, None) == Views(VIEWS.scales, flip=False)
