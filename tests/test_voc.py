"""PASCAL VOC: boxes and masks as its files have them, its metric against a plain reference, what is refused."""

import json
import math
import os
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from models.config import MaskRCNNConfig
from models.data import VocDataset, open_dataset, training_loader
from models.data.voc import CLASSES
from models.data.voc_xml import MAX_BYTES, read_voc_file
from models.detections import Detections
from models.errors import DataError
from models.evaluate import evaluate_detector, score_table
from models.voc_evaluation import voc_average_precision

HEIGHT, WIDTH = 40, 60
OBJECTS = {
    "2007_000027": [("dog", (11, 6, 30, 25), 0), ("person", (31, 1, 60, 40), 1)],
    "2007_000032": [("aeroplane", (1, 1, 20, 10), 0)],
    "2007_000033": [],
}
"""(name, (xmin, ymin, xmax, ymax) as in the file, difficult)"""


def write_voc(root, year=2012, objects_of=OBJECTS):
    """A folder in VOC's layout: three images, all listed in each split."""
    folder = root / f"VOC{year}"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main", "ImageSets/Segmentation", "SegmentationObject"):
        (folder / name).mkdir(parents=True)
    for red, (name, objects) in enumerate(objects_of.items()):
        Image.new("RGB", (WIDTH, HEIGHT), (40 * red, 99, 199)).save(folder / f"JPEGImages/{name}.jpg")
        numbers = np.zeros((HEIGHT, WIDTH), np.uint8)
        for number, (_, (x1, y1, x2, y2), _) in enumerate(objects, 1):
            numbers[y1 - 1 : y2, x1 - 1 : x2] = 255  # the border
            numbers[y1 : y2 - 1, x1 : x2 - 1] = number
        map_ = Image.fromarray(numbers, "P")
        map_.putpalette(np.random.default_rng(0).integers(0, 255, 768, np.uint8).tobytes())
        map_.save(folder / f"SegmentationObject/{name}.png")
        (folder / f"Annotations/{name}.xml").write_text(xml(objects))
    for kind in ("Main", "Segmentation"):
        for split in ("train", "val", "trainval"):
            (folder / f"ImageSets/{kind}/{split}.txt").write_text("\n".join(objects_of) + "\n")
    return folder


def xml(objects) -> str:
    entries = "".join(
        f"<object><name>{name}</name><pose>Left</pose><difficult>{difficult}</difficult><bndbox>"
        f"<xmax>{x2}</xmax><xmin>{x1}</xmin><ymin>{y1}.0</ymin><ymax>{y2}</ymax></bndbox>"
        "<part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part></object>"
        for name, (x1, y1, x2, y2), difficult in objects
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    return f"<annotation>\n<filename>../../x.jpg</filename>{size}{entries}</annotation>"


@pytest.fixture
def voc(tmp_path):
    return write_voc(tmp_path / "VOCdevkit")


def test_boxes_labels_and_ids(voc):
    for dataset in (VocDataset(voc, "train", boxes_only=True), open_dataset(voc.parent, "train", boxes_only=True)):
        assert dataset.class_names == tuple(CLASSES) and dataset.num_classes == 20
        assert dataset.class_names == tuple(sorted(CLASSES)) and dataset.category_ids.tolist() == list(range(1, 21))
        assert [dataset.image_info(i).image_id for i in range(3)] == [2007000027, 2007000032, 2007000033]
        boxes, labels = dataset.objects(0)  # the difficult person is left out
        assert boxes.tolist() == [[10, 5, 29, 24]] and [dataset.class_names[i] for i in labels] == ["dog"]
        assert dataset.objects_left_out == {"a difficult object": 1}
        assert dataset.image(1).shape == (HEIGHT, WIDTH, 3) and dataset.voc == (False, True)


def test_training_leaves_out_images_without_objects_and_says_so(voc):
    dataset = VocDataset(voc, "train", training=True)
    assert len(dataset) == 2 and dataset.images_left_out == {"no annotation": 1}


def test_masks_are_the_pixels_of_each_number(voc):
    dataset = VocDataset(voc, "val")
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[6:24, 11:29] = 1
    assert np.array_equal(dataset.mask(0, 0), expected)
    truth = dataset.ground_truth()["annotations"]
    assert [a["area"] for a in truth] == [18 * 18, 28 * 38, 18 * 8]
    assert [a["ignore"] for a in truth] == [0, 1, 0]
    sample = dataset.sample(0, None)
    assert sample.bitmaps[0].sum() == 18 * 18


def test_one_mask_at_a_time_is_in_memory(voc):
    name, side, count = "2007_000027", 1000, 40
    numbers = np.repeat(np.arange(1, count + 1, dtype=np.uint8), side // count)[:, None].repeat(side, 1)
    Image.fromarray(numbers).save(voc / f"SegmentationObject/{name}.png")
    text = xml([("dog", (1, 1, 9, 9), 0)] * count).replace(f">{WIDTH}<", ">1000<").replace(f">{HEIGHT}<", ">1000<")
    (voc / f"Annotations/{name}.xml").write_text(text)
    tracemalloc.start()
    try:
        dataset = VocDataset(voc, "val")
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 10 * side**2, f"{most:,} bytes: all masks together have {count * side**2:,}"
    assert [int(dataset.mask(0, which).sum()) for which in range(count)] == [side**2 // count] * count


def test_a_map_of_noise_is_refused(voc):
    """Its file is small, and the run lengths of its objects would take more than its pixels."""
    name, side = "2007_000027", 2100
    path = voc / f"SegmentationObject/{name}.png"
    Image.fromarray((np.arange(side, dtype=np.uint8) % 2 + 1)[:, None].repeat(side, 1)).save(path)
    text = xml([("dog", (1, 1, 9, 9), 0)] * 2).replace(f">{WIDTH}<", f">{side}<").replace(f">{HEIGHT}<", f">{side}<")
    (voc / f"Annotations/{name}.xml").write_text(text)
    assert path.stat().st_size < 20_000
    with pytest.raises(DataError, match=rf"a map of objects is noise\n.*{name}.png\n.*4,407,900 times"):
        VocDataset(voc, "val")


def test_a_map_numbers_254_objects(voc):
    name = "2007_000027"
    path = voc / f"Annotations/{name}.xml"
    path.write_text(xml([("dog", (1, 1, 9, 9), 0)] * 254))
    assert len(VocDataset(voc, "val").ground_truth()["annotations"]) == 254 + len(OBJECTS["2007_000032"])
    path.write_text(xml([("dog", (1, 1, 9, 9), 0)] * 255))  # the number of the last would be that of the border
    with pytest.raises(DataError, match=rf"more objects than a map can number\n.*{name}.png\n.*lists 255 objects.*254"):
        VocDataset(voc, "val")
    assert len(VocDataset(voc, "val", boxes_only=True).objects(0)[0]) == 255


def test_a_coco_style_file_is_preferred_for_masks(voc):
    content = VocDataset(voc, "val").ground_truth()
    content["annotations"] = content["annotations"][:1]
    (voc / "Annotations/pascal_val2012.json").write_text(json.dumps(content))
    dataset = VocDataset(voc.parent, "voc_2012_val_cocostyle")
    assert dataset.annotation_file.name == "pascal_val2012.json" and dataset.voc == (False, False)
    assert len(dataset.annotations.labels) == 1 and dataset.ground_truth() == content
    assert dataset.mask(0, 0).sum() == 18 * 18 and dataset.image(0).shape == (HEIGHT, WIDTH, 3)
    assert VocDataset(voc, "val", boxes_only=True).annotation_file.name == "val.txt"
    (voc / "sbd.json").write_text(json.dumps(content))
    assert len(VocDataset(voc, "anything", annotation_file="sbd.json")) == 3


def test_boxes_alone_make_batches_without_masks(voc):
    batch = next(iter(training_loader(VocDataset(voc, "train", training=True, boxes_only=True), 2, seed=0)))
    assert batch.gt_masks.bitmaps.numel() == 0 and not batch.gt_masks.windows.any()
    assert sorted(batch.gt_labels.reshape(-1).tolist()) == [0, 11]


def test_years(voc, monkeypatch):
    folder = write_voc(voc.parent, 2007)
    assert VocDataset(folder, "val", boxes_only=True).voc.eleven_points
    monkeypatch.chdir(folder)
    assert VocDataset(".", "val", boxes_only=True).voc.eleven_points
    assert VocDataset(voc.parent, "voc_2007_val").root == folder
    with pytest.raises(DataError, match=r"several years[\s\S]*VOC2007, VOC2012"):
        VocDataset(voc.parent, "val")
    assert VocDataset(voc.parent, "val2007").root == folder
    with pytest.raises(DataError, match="lacks this year"):
        VocDataset(voc.parent, "voc_2010_val")
    with pytest.raises(DataError, match="is of another year"):
        VocDataset(folder, "val2012")


def test_own_classes(voc):
    path = voc / "Annotations/2007_000027.xml"
    path.write_text(xml([("cell", (1, 1, 9, 9), 0)]))
    with pytest.raises(DataError, match=r"of no known class[\s\S]*2007_000027.xml[\s\S]*'cell'"):
        VocDataset(voc, "val", boxes_only=True)
    (voc / "labels.txt").write_text("dog\naeroplane\ncell\n\n")
    dataset = VocDataset(voc, "val", boxes_only=True)
    assert dataset.class_names == ("dog", "aeroplane", "cell") and dataset.objects(0)[1].tolist() == [2]


BOMB = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bbbbbbbbbb"><!ENTITY c "&b;&b;&b;">]><annotation>&c;</annotation>'
FILE = '<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>'
BOX = "<xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax>"
SIZE = "<size><width>9</width><height>9</height></size>"


def one(box=BOX, name="<name>dog</name>"):
    return f"<annotation>{SIZE}<object>{name}<bndbox>{box}</bndbox></object></annotation>"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "declares a document type or an entity"),
        (FILE, "declares a document type or an entity"),
        ("", "is not XML.*\n.*line 1\n.*no element found"),
        (one()[:-5], "is not XML"),
        (one() + "<a/>", "is not XML"),
        ("<annotation>" + "<a>" * 100_000, "nested more than 16 deep"),
        ("<a>" + "x" * MAX_BYTES, "too large"),
        ("<html/>", "outermost element is <html>, not <annotation>"),
        ("<annotation/>", "has no <size/height>"),
        (one(name=""), "an object has no <name>"),
        (one(BOX.replace("5", "x")), r"<bndbox/xmax> must be a number, got 'x'"),
        (one(BOX.replace("5", "nan")), r"<bndbox/xmax> must be a number, got 'nan'"),
        (one(BOX.replace("5", "1e9")), r"<bndbox/xmax> must be a number"),
        (one("<xmin>1</xmin>"), r"it has no <bndbox/ymin>"),
        (one(BOX.replace("5", "0")), "its corners the wrong way round"),
        ('<?xml version="1.0" encoding="nonsense"?><annotation/>', "is not"),
    ],
    ids=lambda value: value[:24],
)
def test_xml_that_is_refused(tmp_path, text, message):
    path = tmp_path / "a.xml"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"[\s\S]*{message}") as error:
        read_voc_file(path)
    assert str(path) in error.value.where


def test_names_do_not_leave_the_folder(voc, tmp_path):
    (tmp_path / "a.xml").write_text(xml([]))
    list_ = voc / "ImageSets/Main/val.txt"
    for name in ("../../../a", str(tmp_path / "a")):
        list_.write_text(name)
        with pytest.raises(DataError, match="lies outside its folder"):
            VocDataset(voc, "val", boxes_only=True)
    (voc / "Annotations/link.xml").symlink_to(tmp_path / "a.xml")
    list_.write_text("link")
    with pytest.raises(DataError, match="lies outside its folder"):
        VocDataset(voc, "val", boxes_only=True)


def test_what_is_missing_is_named(voc):
    with pytest.raises(DataError, match=r"has no split 'test'[\s\S]*there are train, trainval, val"):
        VocDataset(voc, "test", boxes_only=True)
    with pytest.raises(DataError, match=r"no masks for the split 'test'[\s\S]*faster_rcnn"):
        VocDataset(voc, "test")
    Image.fromarray(np.full((HEIGHT, WIDTH), 7, np.uint8)).save(voc / "SegmentationObject/2007_000027.png")
    with pytest.raises(DataError, match=r"has more objects than the XML file[\s\S]*object 7.*lists 2"):
        VocDataset(voc, "val")
    Image.new("L", (3, 3)).save(voc / "SegmentationObject/2007_000027.png")
    with pytest.raises(DataError, match="another size than its image"):
        VocDataset(voc, "val")
    os.remove(voc / "Annotations/2007_000033.xml")
    with pytest.raises(DataError, match=r"cannot be read\n  where: .*000033.xml"):
        VocDataset(voc, "train", boxes_only=True)


# The metric


def plain_voc(truth, found, eleven_points, inclusive):
    """AP of one class as the development kit's VOCevaldet.m writes it, with loops. Objects: (image, box, difficult)."""
    extra = 1 if inclusive else 0
    detected = set()
    tp, fp = [], []
    for image, box, _ in sorted(found, key=lambda entry: -entry[2]):
        best, which = -math.inf, None
        for number, (other_image, other, _) in enumerate(truth):
            if other_image != image:
                continue
            w = min(box[2], other[2]) - max(box[0], other[0]) + extra
            h = min(box[3], other[3]) - max(box[1], other[1]) + extra
            if w > 0 and h > 0:
                area = (box[2] - box[0] + extra) * (box[3] - box[1] + extra)
                area += (other[2] - other[0] + extra) * (other[3] - other[1] + extra)
                if w * h / (area - w * h) > best:
                    best, which = w * h / (area - w * h), number
        if best >= 0.5:
            if not truth[which][2]:
                tp.append(which not in detected)
                fp.append(which in detected)
                detected.add(which)
        else:
            tp.append(False)
            fp.append(True)
    count = sum(not difficult for _, _, difficult in truth)
    if count == 0:
        return math.nan
    points = []
    for i in range(len(tp)):
        right, wrong = sum(tp[: i + 1]), sum(fp[: i + 1])
        points.append((right, right / (right + wrong)))
    if eleven_points:
        best = [max((p for right, p in points if 10 * right >= t * count), default=0) for t in range(11)]
        return sum(best) / 11
    area, before = 0.0, 0
    for i, (right, _) in enumerate(points):
        area += (right - before) / count * max(p for _, p in points[i:])
        before = right
    return area


@pytest.mark.parametrize("eleven_points", [True, False])
@pytest.mark.parametrize("inclusive", [True, False])
def test_the_metric_is_the_plain_reference(eleven_points, inclusive):
    random = np.random.default_rng(1)
    seen = []
    for _ in range(60):
        truth, found, annotations, entries = {1: [], 2: []}, {1: [], 2: []}, [], []
        for image in range(3):
            for _ in range(random.integers(0, 5)):
                key, (x, y), (w, h) = int(random.integers(1, 3)), random.integers(0, 30, 2), random.integers(4, 20, 2)
                hard = bool(random.random() < 0.2)
                truth[key].append((image, (x, y, x + w, y + h), hard))
                annotations.append(
                    {"image_id": image, "category_id": key, "bbox": [x, y, w, h], "ignore": int(hard), "iscrowd": 0}
                )
                for _ in range(random.integers(0, 3)):
                    a, b, c, d = np.maximum(np.array([x, y, w, h]) + random.integers(-3, 4, 4), 1).tolist()
                    score = round(float(random.random()), 6)
                    found[key].append((image, (a, b, a + c, b + d), score))
                    entries.append({"image_id": image, "category_id": key, "bbox": [a, b, c, d], "score": score})
        categories = [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}]
        content = {"images": [{"id": i} for i in range(3)], "annotations": annotations, "categories": categories}
        result = voc_average_precision(content, entries, eleven_points, inclusive)
        expected = [plain_voc(truth[key], found[key], eleven_points, inclusive) for key in (1, 2)]
        assert list(result.per_class.values()) == pytest.approx(expected, abs=1e-12, nan_ok=True)
        defined = [value for value in expected if not math.isnan(value)]
        assert result.mean == pytest.approx(np.mean(defined) if defined else math.nan, abs=1e-12, nan_ok=True)
        seen += defined
    assert len({round(value, 6) for value in seen}) > 20


def test_the_metric_on_paper():
    """Two of three objects found, the first and the third guess: precision 1 to recall 1/3, then 2/3 to recall 2/3."""
    boxes = [[10.0 * i, 0.0, 8.0, 8.0] for i in range(3)]
    truth = {
        "images": [{"id": 1}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": box} for box in boxes],
        "categories": [{"id": 1, "name": "dog"}],
    }
    guesses = [(boxes[0], 0.9), ([100.0, 0.0, 8.0, 8.0], 0.8), (boxes[1], 0.7)]
    entries = [{"image_id": 1, "category_id": 1, "bbox": box, "score": score} for box, score in guesses]
    area = voc_average_precision(truth, entries, eleven_points=False)
    assert area.mean == pytest.approx(1 / 3 + 2 / 9) and area.per_class == {"dog": area.mean}
    # recalls 0 .. 0.3 have precision 1, those to 0.6 have 2/3, the others 0
    assert voc_average_precision(truth, entries, True).mean == pytest.approx((4 * 1 + 3 * 2 / 3) / 11)
    # an object found twice is right once; of other images than those asked for nothing counts
    assert voc_average_precision(truth, entries[:1] * 2, False).mean == pytest.approx(1 / 3)
    assert math.isnan(voc_average_precision(truth, entries, False, image_ids=[2]).mean)


class FindsTheDog(torch.nn.Module):
    """One right detection in the first image."""

    def __init__(self):
        super().__init__()
        self.config, self.unused = MaskRCNNConfig(), torch.nn.Parameter(torch.zeros(1))

    def forward(self, images, image_sizes):
        count = len(images)
        boxes, labels = torch.zeros(count, 2, 4), torch.full((count, 2), -1)
        scores, counts = torch.full((count, 2), -torch.inf), torch.zeros(count, dtype=torch.long)
        boxes[0, 0], labels[0, 0], scores[0, 0], counts[0] = torch.tensor([10.0, 5, 29, 24]), 11, 0.9, 1
        return Detections(boxes, scores, labels, torch.ones(count, 2, 28, 28), counts)


def test_an_evaluation_of_voc_has_its_metric(voc):
    metrics = evaluate_detector(FindsTheDog(), VocDataset(voc, "val"), batch_size=3)
    assert metrics.voc.per_class["dog"] == 1 and metrics.voc.per_class["aeroplane"] == 0
    assert metrics.flat()["voc_map"] == 0.5 and "voc_ap/person" not in metrics.flat()
    assert score_table(metrics).row_count == 3
