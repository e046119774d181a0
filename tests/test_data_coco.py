"""The reader of COCO-layout folders: the same masks as pycocotools, mmdetection's cleaning, and every error's text."""

import copy
import gc
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from models.data.coco import CocoDataset
from models.data.dataset import COCO_SEMANTIC_CLASSES
from models.data.segmentation import checked_run_lengths, pack_segmentations, run_lengths
from models.data.shapes import ShapesSettings, write_dataset
from models.errors import DataError

HEIGHT, WIDTH = 40, 60


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("coco") / "shapes"
    write_dataset(folder, ShapesSettings(train=20, val=6), workers=2, quiet=True)
    return folder


def _square(identity: int = 1, image_id: int = 1, category_id: int = 1, **changes) -> dict:
    annotation = {
        "id": identity,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [10, 10, 20, 20],
        "area": 400,
        "iscrowd": 0,
        "segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]],
    }
    return annotation | changes


def _content(annotations=None, images=1, categories=None) -> dict:
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(1, images + 1)],
        "annotations": [_square()] if annotations is None else annotations,
        "categories": categories or [{"id": 1, "name": "square"}],
    }


@pytest.fixture
def make(tmp_path):
    """Writes a small data set and opens it; `content` may be text, to be no JSON."""

    def make(content=None, **options) -> CocoDataset:
        content = _content() if content is None else content
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "train").mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "annotations" / "instances_train.json").write_text(text)
        for index in range(1, 4):
            Image.new("RGB", (WIDTH, HEIGHT), (9, 99, 199)).save(tmp_path / "train" / f"{index}.jpg")
        return CocoDataset(tmp_path, "train", **options)

    return make


def test_masks_equal_pycocotools_pixel_for_pixel(shapes):
    for split in ("train", "val"):
        dataset = CocoDataset(shapes, split)
        coco = COCO(dataset.annotation_file)
        count = 0
        for index in range(len(dataset)):
            first = dataset.annotations.object_offsets[index]
            for which in range(len(dataset.objects(index)[0])):
                annotation = coco.anns[int(dataset.annotations.annotation_ids[first + which])]
                assert annotation["image_id"] == dataset.image_info(index).image_id
                assert np.array_equal(dataset.mask(index, which), coco.annToMask(annotation))
                count += 1
        assert count == sum(not annotation["iscrowd"] for annotation in coco.anns.values()) > 20


def test_boxes_labels_names_and_ids_are_those_of_the_file(shapes):
    dataset = CocoDataset(shapes, "train")
    coco = COCO(dataset.annotation_file)
    assert dataset.class_names == tuple(category["name"] for category in coco.loadCats(sorted(coco.cats)))
    assert dataset.category_ids.tolist() == list(range(1, 9)) and dataset.num_classes == 8
    for index in range(len(dataset)):
        info = dataset.image_info(index)
        entry = coco.imgs[info.image_id]
        assert (info.file_name, info.height, info.width) == (entry["file_name"], entry["height"], entry["width"])
        annotations = [a for a in coco.loadAnns(coco.getAnnIds(info.image_id)) if not a["iscrowd"]]
        boxes, labels = dataset.objects(index)
        expected = np.array([a["bbox"] for a in annotations], np.float32)
        expected[:, 2:] += expected[:, :2]
        assert np.array_equal(boxes, expected) and boxes.dtype == np.float32
        assert [dataset.category_ids[label] for label in labels] == [a["category_id"] for a in annotations]
        assert np.array_equal(dataset.image(index), np.asarray(Image.open(dataset.image_folder / info.file_name)))


def test_category_ids_with_gaps_become_labels_by_ascending_id(make):
    categories = [{"id": 90, "name": "last"}, {"id": 3, "name": "first"}, {"id": 7, "name": "middle"}]
    dataset = make(_content([_square(1, category_id=90), _square(2, category_id=3)], categories=categories))
    assert dataset.class_names == ("first", "middle", "last")
    assert dataset.category_ids.tolist() == [3, 7, 90]
    assert dataset.objects(0)[1].tolist() == [2, 0]


DROPPED = {
    "crowd": (
        {"iscrowd": 1, "segmentation": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}},
        "a crowd",
    ),
    "ignore flag": ({"ignore": 1}, 'marked "ignore"'),
    "difficult": ({"ignore": 1, "difficult": 1}, "a difficult object"),
    "box left of the image": ({"bbox": [-30, 10, 20, 20]}, "a box outside its image"),
    "box below the image": ({"bbox": [10, HEIGHT, 20, 20]}, "a box outside its image"),
    "area 0": ({"area": 0}, "no area"),
    "width below 1": ({"bbox": [10, 10, 0.9, 20]}, "a box under 1 pixel"),
    "height below 1": ({"bbox": [10, 10, 20, 0.5]}, "a box under 1 pixel"),
    "polygon of two points": ({"segmentation": [[10, 10, 30, 30]]}, "no polygon of 3 points or more"),
    "polygon of odd length": ({"segmentation": [[10, 10, 30, 10, 30, 30, 10]]}, "no polygon of 3 points or more"),
    "no polygon at all": ({"segmentation": []}, "no polygon of 3 points or more"),
}


@pytest.mark.parametrize("case", DROPPED)
def test_unusable_annotations_are_left_out_and_the_others_stay(make, case):
    dataset = make(_content([_square(1), _square(2, **DROPPED[case][0]), _square(3)]))
    assert dataset.annotations.annotation_ids.tolist() == [1, 3]
    assert dataset.objects_left_out == {DROPPED[case][1]: 1}


@pytest.mark.parametrize(
    "segmentation",
    [{"size": [HEIGHT, WIDTH], "counts": [5, 5]}, [[1, 2, 3, 4, 1e9, 6]], [[1, 2, 1e9, 4]]],
)
def test_malformed_masks_are_refused_in_annotations_that_are_left_out_too(make, segmentation):
    """The evaluation gives crowds and tiny objects to pycocotools, which such masks end."""
    for change in ({"iscrowd": 1}, {"ignore": 1}, {"area": 0}, {"bbox": [10, 10, 0.9, 20]}):
        with pytest.raises(DataError, match="annotation 2"):
            make(_content([_square(1), _square(2, segmentation=segmentation, **change)]))


def test_short_polygons_are_dropped_beside_good_ones(make):
    dataset = make(_content([_square(segmentation=[[1, 1, 2, 2], [10, 10, 30, 10, 30, 30, 10, 30]])]))
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[10:30, 10:30] = 1
    assert np.array_equal(dataset.mask(0, 0), expected)


def test_a_square_as_polygon_and_as_both_kinds_of_run_lengths_is_one_mask(make):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[10:30, 10:30] = 1
    # by hand, down the columns: 10 empty columns and 10 rows; then 20 times 20 set and 20 not; the rest
    counts = [10 * HEIGHT + 10, *[20, 20] * 19, 20, HEIGHT - 30 + (WIDTH - 30) * HEIGHT]
    text = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    size = [HEIGHT, WIDTH]
    dataset = make(
        _content(
            [
                _square(1),
                _square(2, segmentation={"size": size, "counts": counts}),
                _square(3, segmentation={"size": size, "counts": text}),
            ]
        )
    )
    for which in range(3):
        assert np.array_equal(dataset.mask(0, which), mask)


def test_run_lengths_decode_as_pycocotools_encodes():
    random = np.random.default_rng(0)
    for _ in range(60):
        height, width = random.integers(1, 80, 2)
        mask = (random.random((height, width)) < random.random()).astype(np.uint8)
        text = coco_mask.encode(np.asfortranarray(mask))["counts"]
        runs = run_lengths(text)
        values = np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T
        assert np.array_equal(values, mask)
        assert checked_run_lengths({"size": [height, width], "counts": text.decode()}, height, width) == text


def test_training_leaves_out_images_without_annotations_and_tiny_ones(make):
    content = _content([_square(1, image_id=2), _square(2, image_id=3, iscrowd=1, area=0)], images=3)
    assert len(make(content)) == 3
    dataset = make(content, training=True)
    # an image with a crowd only counts as annotated, as in mmdetection
    assert [dataset.image_info(i).image_id for i in range(len(dataset))] == [2, 3]
    assert dataset.objects(0)[0].tolist() == [[10, 10, 30, 30]] and len(dataset.objects(1)[0]) == 0
    assert len(make(content, training=True, min_side=HEIGHT)) == 2
    with pytest.raises(DataError, match=r"there is nothing to train on[\s\S]*a side below 41 pixels"):
        make(content, training=True, min_side=HEIGHT + 1)


@pytest.mark.parametrize("suffix", ["", "2017"])
def test_both_layouts_are_found(shapes, tmp_path, suffix):
    (tmp_path / "annotations").mkdir()
    shutil.copy(shapes / "annotations" / "instances_val.json", tmp_path / "annotations" / f"instances_val{suffix}.json")
    shutil.copytree(shapes / "val", tmp_path / f"val{suffix}")
    shutil.copytree(shapes / "stuffthingmaps" / "val", tmp_path / "stuffthingmaps" / f"val{suffix}")
    dataset = CocoDataset(tmp_path, "val")
    assert dataset.has_semantic and dataset.semantic_map(0).shape == dataset.image(0).shape[:2]
    assert dataset.annotation_file.name == f"instances_val{suffix}.json"


def test_files_and_folders_of_any_name(shapes, tmp_path):
    shutil.copy(shapes / "annotations" / "instances_val.json", tmp_path / "mine.json")
    shutil.copytree(shapes / "val", tmp_path / "pictures")
    dataset = CocoDataset(tmp_path, "test", annotation_file="mine.json", image_folder="pictures")
    assert len(dataset) == 6 and not dataset.has_semantic and dataset.semantic_map(0) is None
    absolute = CocoDataset(tmp_path, "test", annotation_file=tmp_path / "mine.json", image_folder=shapes / "val")
    assert np.array_equal(absolute.image(0), dataset.image(0))


def test_semantic_yes_no_auto(shapes, make):
    assert CocoDataset(shapes, "val").has_semantic
    assert not CocoDataset(shapes, "val", semantic="no").has_semantic
    assert CocoDataset(shapes, "val", semantic="no").num_semantic_classes == 0
    assert not make().has_semantic
    with pytest.raises(
        DataError, match=r"the data set has no stuff maps[\s\S]*stuffthingmaps/train[\s\S]*--semantic no"
    ):
        make(semantic="yes")
    with pytest.raises(ValueError, match="semantic must be auto, yes or no, got 'maybe'"):
        make(semantic="maybe")


def test_number_of_semantic_classes(shapes, make, tmp_path):
    assert CocoDataset(shapes, "train").num_semantic_classes == 12  # 8 things and 4 materials
    make()
    maps = tmp_path / "stuffthingmaps" / "train"
    maps.mkdir(parents=True)
    ids = np.full((HEIGHT, WIDTH), 255, np.uint8)
    ids[3, 4] = 77
    Image.fromarray(ids).save(maps / "1.png")
    assert make().num_semantic_classes == 78
    coco = [{"id": i, "name": str(i)} for i in [*range(1, 80), 90]]
    assert make(_content(categories=coco)).num_semantic_classes == COCO_SEMANTIC_CLASSES


def test_an_id_beyond_the_semantic_classes_is_an_error_and_no_crash_of_the_loss(make, tmp_path):
    maps = tmp_path / "stuffthingmaps" / "train"
    maps.mkdir(parents=True)
    path = maps / "1.png"
    Image.new("L", (WIDTH, HEIGHT), 5).save(path)
    dataset = make()
    assert dataset.num_semantic_classes == 6
    assert dataset.sample(0, resize=None).semantic.max() == 5
    Image.new("L", (WIDTH, HEIGHT), 6).save(path)
    with pytest.raises(DataError, match=r"an id that is no class[\s\S]*map of 1.jpg\n[\s\S]*below 6, got 6\n"):
        dataset.sample(0, resize=None)


def _annotation(**changes):
    return lambda content: content["annotations"][0].update(changes)


def _image(**changes):
    return lambda content: content["images"][0].update(changes)


def _twice(section):
    return lambda content: content[section].append(copy.deepcopy(content[section][0]))


def _without(section, key=None):
    return lambda content: content.pop(section) if key is None else content[section][0].pop(key)


RUNS = {"size": [HEIGHT, WIDTH], "counts": [5, 5]}
FAULTS = {
    "unknown image": (_annotation(image_id=9), "names an unknown image", "annotation 1", "image 9"),
    "unknown category": (_annotation(category_id=9), "names an unknown category", "annotation 1", "the file lists 1"),
    "image id twice": (_twice("images"), "an id is used twice", "instances_train.json", "images: id 1"),
    "category id twice": (_twice("categories"), "an id is used twice", "instances_train.json", "categories: id 1"),
    "annotation id twice": (_twice("annotations"), "an id is used twice", "instances_train.json", "annotations: id 1"),
    "id is a text": (_image(id="1"), "an id is not a whole number", "instances_train.json", "images: got '1'"),
    "no images": (_without("images"), "is not COCO", "instances_train.json", 'it has no list "images"'),
    "no annotations": (_without("annotations"), "is not COCO", "train.json", 'it has no list "annotations"'),
    "no categories": (_without("categories"), "is not COCO", "instances_train.json", 'it has no list "categories"'),
    "no bbox": (_without("annotations", "bbox"), "is not COCO", "json", "entry 0 of 'annotations' lacks 'bbox'"),
    "no height": (_without("images", "height"), "is not COCO", "json", "entry 0 of 'images' lacks 'height'"),
    "empty": (lambda content: content["images"].clear(), "is empty", "json", "no images or no categories"),
    "bbox of three": (_annotation(bbox=[1, 2, 3]), "is malformed", "annotation 1", "bbox must be four numbers"),
    "bbox of text": (_annotation(bbox=["1", 2, 3, 4]), "is malformed", "annotation 1", "bbox must be four numbers"),
    "infinite bbox": (_annotation(bbox=[1e999, 2, 3, 4]), "usable JSON", "json", "contains Infinity"),
    "NaN bbox": (_annotation(bbox=[float("nan"), 2, 3, 4]), "usable JSON", "json", "contains NaN"),
    "no segmentation": (_without("annotations", "segmentation"), "malformed", "annotation 1", "it has no segmentation"),
    "nested polygon": (
        _annotation(segmentation=[[[1, 2], [3, 4]]]),
        "malformed",
        "annotation 1",
        "flat list of numbers",
    ),
    "huge polygon": (_annotation(segmentation=[[1, 2, 3, 4, 1e9, 6]]), "malformed", "annotation 1", "beyond 100000"),
    "other size": (
        _annotation(segmentation=RUNS | {"size": [9, 9]}),
        "malformed",
        "annotation 1",
        r"the image is \[40, 60\]",
    ),
    "too few runs": (
        _annotation(segmentation=RUNS),
        "malformed",
        "annotation 1",
        "cover 10 pixels, the image has 2400",
    ),
    "negative run": (_annotation(segmentation=RUNS | {"counts": [-1, 2401]}), "malformed", "annotation 1", "0 or more"),
    "text of noise": (
        _annotation(segmentation=RUNS | {"counts": "!!"}),
        "malformed",
        "annotation 1",
        "compressed text",
    ),
    "text cut short": (
        _annotation(segmentation=RUNS | {"counts": "o"}),
        "malformed",
        "annotation 1",
        "compressed text",
    ),
    "endless number": (
        _annotation(segmentation=RUNS | {"counts": "o" * 9 + "1"}),
        "malformed",
        "annotation 1",
        "too long",
    ),
    "no counts": (_annotation(segmentation={"size": [HEIGHT, WIDTH]}), "malformed", "annotation 1", "got NoneType"),
    "leaves the folder": (_image(file_name="../1.jpg"), "outside its folder", "image 1", "got '../1.jpg'"),
    "absolute name": (_image(file_name="/etc/passwd"), "outside its folder", "image 1", "got '/etc/passwd'"),
    "no size": (_image(height=0), "has no usable size", "image 1", "got 0 and 60"),
    "huge size": (_image(height=10**12), "has no usable size", "image 1", "got 1000000000000 and 60"),
    "many pixels": (_image(height=10**5, width=10**5), "has no usable size", "image 1", "at most 89,478,485 pixels"),
    "huge id": (_annotation(id=2**70), "an id is not a whole number", "json", "annotations: got"),
    "listed category": (_annotation(category_id=[1]), "names an unknown category", "annotation 1", r"category \[1\]"),
    "area of text": (_annotation(area="big"), "is malformed", "annotation 1", "area must be a number, got 'big'"),
    "huge bbox": (_annotation(bbox=[10**400, 2, 3, 4]), "is malformed", "annotation 1", "bbox must be four numbers"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_of_an_annotation_file_say_what_where_why_and_the_mend(make, case):
    change, what, where, why = FAULTS[case]
    content = _content()
    change(content)
    with pytest.raises(
        DataError, match=rf"{what}.*\n  where: .*{where}.*\n  why:   .*{why}[\s\S]*\n  fix:   ."
    ) as caught:
        make(content)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [', r"is not JSON\n  where: .*line 1, column 13"),
        ("", r"is not JSON\n  where: .*line 1, column 1"),
        ("[1]", "the top of the file must be an object .*, got a list"),
        ("[" * 200000, "is not usable JSON"),
    ],
    ids=["cut short", "empty", "a list", "too deep"],
)
def test_what_is_no_coco_json(make, text, message):
    with pytest.raises(DataError, match=message):
        make(text)


def test_no_such_folder_and_no_such_split(make, tmp_path):
    with pytest.raises(
        DataError, match=r"no such data set folder\n  where: .*/nowhere[\s\S]*python -m models.data --out"
    ):
        CocoDataset(tmp_path / "nowhere")
    dataset = make()
    with pytest.raises(
        DataError,
        match=r"no annotation file for the split 'val'[\s\S]*instances_val2017.json and .*val.json and .*val2014.json",
    ):
        CocoDataset(tmp_path, "val")
    shutil.rmtree(dataset.image_folder)
    with pytest.raises(
        DataError, match=r"no image folder for the split 'train'[\s\S]*/train2017 and .*/train and .*/train2014\n"
    ):
        CocoDataset(tmp_path, "train")


def test_faults_of_image_files(make):
    dataset = make()
    path = dataset.image_folder / "1.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"truncated or corrupt\n  where: .*train/1.jpg"):
        dataset.image(0)
    path.write_text("this is no image")
    with pytest.raises(DataError, match=r"not an image[\s\S]*train/1.jpg"):
        dataset.image(0)
    Image.new("RGB", (WIDTH - 1, HEIGHT)).save(path)
    with pytest.raises(
        DataError, match=r"the image has another size than the annotations say[\s\S]*\(40, 59\).*\(40, 60\)"
    ):
        dataset.image(0)
    path.unlink()
    with pytest.raises(DataError, match=r"no such image file\n  where: .*train/1.jpg"):
        dataset.image(0)


def test_faults_of_stuff_maps(make, tmp_path):
    make()
    maps = tmp_path / "stuffthingmaps" / "train"
    maps.mkdir(parents=True)
    dataset = make()
    with pytest.raises(DataError, match=r"no such image file\n  where: .*stuffthingmaps/train/1.png"):
        dataset.semantic_map(0)
    Image.new("L", (WIDTH, HEIGHT + 1)).save(maps / "1.png")
    with pytest.raises(DataError, match=r"the stuff map has another size[\s\S]*\(41, 60\).*\(40, 60\)"):
        dataset.semantic_map(0)
    Image.new("RGB", (WIDTH, HEIGHT)).save(maps / "1.png")
    with pytest.raises(DataError, match="one channel of 8 bits"):
        dataset.semantic_map(0)


def test_exif_orientation_matters_only_where_it_makes_the_annotated_size(make):
    dataset = make()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter to see it upright
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(pixels).save(dataset.image_folder / "1.jpg", exif=exif, quality=100)
    stored = dataset.image(0)
    assert np.array_equal(stored, np.asarray(Image.open(dataset.image_folder / "1.jpg")))
    turned = _content()
    turned["images"][0].update(height=WIDTH, width=HEIGHT)
    (dataset.root / "annotations" / "instances_train.json").write_text(json.dumps(turned))
    assert np.array_equal(CocoDataset(dataset.root).image(0), np.rot90(stored, -1))


def test_errors_survive_the_border_of_a_process():
    error = DataError("what", where="where", why="why", fix="fix")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is DataError and str(again) == str(error)


def test_annotations_are_arrays_only_and_small(make):
    """What a forked worker touches must hold no Python object for each annotation: its counts would be written to."""
    annotations = [_square(i, image_id=1 + i % 3) for i in range(1, 3001)]
    dataset = make(_content(annotations, images=3))
    parts = {**vars(dataset.annotations), **vars(dataset.annotations.segmentations)}
    parts.pop("segmentations")
    for name, value in parts.items():
        assert isinstance(value, np.ndarray | int | None) or name in ("class_names", "left_out"), name
        assert not isinstance(value, np.ndarray) or not value.dtype.hasobject, name
    assert dataset.annotations.nbytes() < 3000 * 140
    assert isinstance(dataset._kept, np.ndarray)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/smaps_rollup")
def test_a_forked_worker_shares_the_annotations_memory(make):
    """Private memory that grows in a child which reads every object is far below the annotations' size."""
    polygon = np.linspace(0, 30, 600).tolist()
    content = _content([_square(i, segmentation=[polygon]) for i in range(1, 4001)])
    dataset = make(content)
    size = dataset.annotations.nbytes()
    assert size > 15e6
    read, write = os.pipe()
    if os.fork() == 0:  # the child does what a loader's worker does, without the pictures
        gc.disable()  # a collection would touch, and so copy, every object of this whole test session
        before = _private_bytes()
        for which in range(4000):
            dataset.mask(0, which)
        os.write(write, str(_private_bytes() - before).encode())
        os._exit(0)
    os.wait()
    assert int(os.read(read, 100)) < 0.3 * size


def _private_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def test_polygons_of_two_decimals_take_half_the_memory_and_are_the_same():
    random = np.random.default_rng(0)
    for decimals, dtype in ((2, np.int32), (3, np.float64)):
        polygons = [np.round(random.uniform(0, 60, 14), decimals).tolist() for _ in range(200)]
        packed = pack_segmentations([[polygon] for polygon in polygons])
        assert packed.coordinates.dtype == dtype
        for index, polygon in enumerate(polygons):
            expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([polygon], 60, 60)))
            assert np.array_equal(packed.decode(index, 60, 60), expected)


def test_packing_nothing():
    packed = pack_segmentations([])
    assert packed.spans.shape == (0, 2) and packed.part_offsets.tolist() == [0]


def test_a_name_that_is_a_link_out_of_the_folder_is_refused(make, tmp_path):
    dataset = make()
    path = dataset.image_folder / "1.jpg"
    path.rename(tmp_path / "elsewhere.jpg")
    path.symlink_to(tmp_path / "elsewhere.jpg")
    with pytest.raises(DataError, match=r"lies outside its folder\n  where: .*train/1.jpg\n  why: .*elsewhere.jpg"):
        dataset.image(0)
    path.unlink()
    path.symlink_to("2.jpg")  # within the folder a link is a name like another
    assert dataset.image(0).shape == (HEIGHT, WIDTH, 3)
    dataset.image_folder.rename(tmp_path / "pictures")  # and a person may link the folder itself
    dataset.image_folder.symlink_to("pictures")
    assert dataset.image(0).shape == (HEIGHT, WIDTH, 3)


def test_cocos_2014_splits_and_minival(make, tmp_path):
    source = make(_content(images=2)).annotation_file
    for split, folder in (("minival2014", "val2014"), ("valminusminival2014", "val2014"), ("train2014", "train2014")):
        shutil.copy(source, tmp_path / "annotations" / f"instances_{split}.json")
        shutil.copytree(tmp_path / "train", tmp_path / folder, dirs_exist_ok=True)
        assert CocoDataset(tmp_path, split).image_folder.name == folder
    assert CocoDataset(tmp_path, "coco_2014_minival").annotation_file.name == "instances_minival2014.json"
    for folder in ("train", "train2017"):  # of the files of several years, the images are those of the same year
        (tmp_path / folder).mkdir(exist_ok=True)
    source.unlink()
    dataset = CocoDataset(tmp_path, "train")
    assert (dataset.annotation_file.name, dataset.image_folder.name) == ("instances_train2014.json", "train2014")


def test_1203_classes_in_lviss_own_form(tmp_path, make):
    image = make().image_folder / "1.jpg"
    (tmp_path / "val2017").mkdir()
    shutil.copy(image, tmp_path / "val2017" / "7.jpg")
    content = _content([_square(category_id=1203)], categories=[{"id": i, "name": f"n{i}"} for i in range(1, 1204)])
    del content["images"][0]["file_name"]
    content["images"][0]["coco_url"] = "http://images.cocodataset.org/val2017/7.jpg"
    (tmp_path / "annotations" / "lvis_v1_val.json").write_text(json.dumps(content))
    dataset = CocoDataset(tmp_path, "val")
    assert dataset.num_classes == 1203 and dataset.objects(0)[1].tolist() == [1202]
    assert dataset.image_info(0).file_name == "val2017/7.jpg" and dataset.image(0).shape == (HEIGHT, WIDTH, 3)


def test_boxes_alone_for_detectors_without_masks(make):
    content = _content([_square(1, segmentation=None), _square(2, iscrowd=1)])
    dataset = make(content, boxes_only=True)
    assert dataset.objects(0)[0].tolist() == [[10, 10, 30, 30]] and dataset.annotations.nbytes() > 0
    sample = dataset.sample(0, None)
    assert sample.boxes.shape == (1, 4) and not sample.windows.any() and sample.bitmaps == []
    assert dataset.objects_left_out == {"a crowd": 1}
