"""Masks: faults of pycocotools and its descendants, of detectron2's and mmdetection's pasting, and of data readers.

Of COCO's run lengths the operators write some, `paste_masks_rle`; those of annotation files are checked by
models/data before pycocotools sees them.
"""

import math

import torch
from peer_faults import Fault, gives, raises, tested

from cascadeops import paste_masks_rle, polygon_mask_targets
from models.data.segmentation import checked_run_lengths, usable_polygons

PYCOCOTOOLS = "pycocotools 2.0.11"
FASTER = "faster-coco-eval 1.8"
DIES = "ends the process"
RLE = "tests/test_paste_masks_rle.py"
READER = "tests/test_data_coco.py::test_faults_of_an_annotation_file_say_what_where_why_and_the_mend"


def encode(height: int, width: int):
    return paste_masks_rle(torch.ones(1, 4, 4), torch.tensor([[0.0, 0, 2, 2]]), (height, width))


def read(counts, height: int = 4, width: int = 4, size=None):
    """What the reader of annotation files makes of run lengths of an image [height, width]."""
    return checked_run_lengths({"size": size or [height, width], "counts": counts}, height, width)


def draw(far: float) -> torch.Tensor:
    """A polygon from (0, 0) to (far, 8), in a box of 8 x 8."""
    corners = torch.tensor([[0, 0], [far, 0], [far, 8], [0, 8]])
    offsets, objects = torch.tensor([0, 4]), torch.tensor([0, 1])
    return polygon_mask_targets(corners, offsets, objects, torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([0]), 8)


def cover(pixels: int, of: int = 16) -> str:
    return f"the run lengths cover {pixels} pixels, the image has {of}"


REPORT_589 = (
    r"\UbU74QU70OO02N00001O002NN3O02NN30N3N11MO211NN201OO21OM1120NO100002N01M22N1ON40NN22MO220N0O12N00O11O02N0"
    r"010O00N22L22N001O011L21M3ON3O11NO2O02NN22N02NN20O30MO220NN21O1N30M10N22N02NN22N01N12NN11O21OO0OO22N10M31"
    r"N000O12L21M22N01OO1002ON10000002NN22NN30O2OM11O3OO001M22N10M130MO3N12L21M22N02NN22NN30M22N000002N00N31N1"
    r"0M1101O1O01O000O12N02MO3O02NO110O01O00N22NO1002ON11O02NN20O12OO0O111NN2002OM21M40L22NN22N02NO12OO1OO12N0"
    r"0N201O01O0020N0N22L22M12OO02NN2002NN2020ON12NN040N0N130OO1OO120L20N40M110N12N000000001OO21N00O12N02L03O0"
    r"10O1O002NN20002ON21M12NN20020M11gi[Zb0"
)
NO_TEXT = "the run lengths are not COCO's compressed text"

FAULTS: dict[str, Fault] = {
    # Reports.
    "cocoapi-589": raises("cocodataset/cocoapi#589", "runs of 28,738,027 pixels for an image of 4176 x 6443", DIES,
        cover(28_738_027, 26_905_968), lambda: read(REPORT_589, 4176, 6443)),
    "cocoapi-362": raises("cocodataset/cocoapi#362", "run lengths with backslashes written more than once", DIES,
        "a run length is too long a number", lambda: read(r"Wfj86c==F6M3N1O111O10\\\\OZCIj<1\\\\CK\\\\lP2", 450, 800)),
    "cocoapi-106": tested("cocodataset/cocoapi#106", "decoding in a training run", "malloc(): memory corruption",
        "run lengths are checked when the file is read", READER),
    "cocoapi-477": tested("cocodataset/cocoapi#477", "run lengths with zeros in a row", "a wrong box, silently",
        "no run but the first is ever 0", f"{RLE}::test_runs_that_end_pycocotools_process_are_never_written"),
    "cocoapi-502": raises("cocodataset/cocoapi#502, isarandi/rlemasklib#7", "an invalid mask: runs beyond the image",
        DIES, cover(20), lambda: read([10, 10])),
    "ppwwyyxx-12": raises("ppwwyyxx/cocoapi#12", "the same as compressed text", "a write beyond the mask, until 2.0.5",
        cover(20), lambda: read("::")),
    "insightface-2889": raises("deepinsight/insightface#2889", "runs beyond the image, in a copy of old pycocotools",
        "writes beyond the mask, in 2026", cover(17), lambda: read([16, 1])),
    "faster-coco-eval-88": raises("MiXaiLL76/faster_coco_eval#88", "runs beyond one mask, but not beyond all of them",
        "writes into the next mask, until mended", cover(31), lambda: read([15, 16])),
    "nvidia-cocoapi-11": tested("NVIDIA/cocoapi#11", "a pasted mask of more runs than the crop has pixels",
        "memory corruption", "memory for as many runs as there are", f"{RLE}::test_every_second_pixel"),
    "mmdetection-8232": tested("open-mmlab/mmdetection#8232", "masks on 8000 x 4000 pixels", "out of memory",
        "memory of the result alone", "tests/test_paste_masks.py::test_memory_is_that_of_the_result"),
    "detectron2-paste-268-mpx": tested("detectron2 0.6, mmdetection 3.3", "an image of more than 268 million pixels",
        '"Default GPU_MEM_LIMIT is too small"', "the mask",
        "tests/test_paste_masks.py::test_a_mask_of_more_pixels_than_detectron2_can_paste",
        f"{RLE}::test_a_thousand_masks_on_an_image_of_a_billion_pixels"),
    # pycocotools 2.0.11: ended the process, or never came back.
    "pycocotools-tobbox-height-0": raises(PYCOCOTOOLS, "toBbox of an image of height 0", f"{DIES} (SIGFPE)",
        "paste_masks_rle: image_size (height, width) must be in [1, 2**23], got (0, 5)", lambda: encode(0, 5)),
    "pycocotools-decode-2-to-the-20": raises(PYCOCOTOOLS, "decode of 2^20 x 2^20", DIES,
        "paste_masks_rle: image_size must hold fewer than 2**32 pixels, got (1048576, 1048576)",
        lambda: encode(2**20, 2**20)),
    "pycocotools-decode-2-to-the-20-in-a-file": tested(PYCOCOTOOLS, "the same in an annotation file", DIES,
        "an error that names the image and its size", READER),
    "pycocotools-merge-empty": raises(PYCOCOTOOLS, "merge of empty counts", DIES, cover(0), lambda: read([])),
    "pycocotools-merge-too-long": raises(PYCOCOTOOLS, "merge of runs beyond the image", DIES, cover(116),
        lambda: read([16, 100])),
    "pycocotools-merge-2-to-the-31": raises(PYCOCOTOOLS, "merge of runs of 2^31 pixels", "no answer within 25 s",
        cover(2**32), lambda: read([2**31, 2**31])),
    "pycocotools-polygon-1e8": gives(PYCOCOTOOLS, "a polygon that reaches to 1e8", DIES, "the part inside the box",
        lambda: draw(1e8).all()),
    "pycocotools-polygon-1e9": gives(PYCOCOTOOLS, "a polygon that reaches to 1e9", DIES, "the part inside the box",
        lambda: draw(1e9).all()),
    "pycocotools-polygon-minus-1e9": gives(PYCOCOTOOLS, "a polygon that reaches to -1e9", DIES,
        "the part inside the box, none", lambda: not draw(-1e9).any()),
    "pycocotools-polygon-in-a-file": raises(PYCOCOTOOLS, "the same in an annotation file", DIES,
        "a polygon has a coordinate beyond 100000 pixels", lambda: usable_polygons([[0, 0, 1e9, 0, 1e9, 8]])),
    "pycocotools-two-points-in-a-file": raises(PYCOCOTOOLS, "the same with a polygon of two points beside a longer one",
        DIES, "a polygon has a coordinate beyond 100000 pixels",
        lambda: usable_polygons([[1, 2, 3, 4, 5, 6], [0, 0, 1e9, 8]])),
    "pycocotools-crowd-in-a-file": tested(PYCOCOTOOLS, "the same in a crowd, which only the evaluation reads", DIES,
        "an error that names the annotation",
        "tests/test_data_coco.py::test_malformed_masks_are_refused_in_annotations_that_are_left_out_too"),
    # pycocotools 2.0.11: fresh memory as a result.
    "pycocotools-decode-short": raises(PYCOCOTOOLS, "decode of runs that end early", "fresh memory", cover(10),
        lambda: read([5, 5])),
    "pycocotools-decode-empty": raises(PYCOCOTOOLS, "decode of empty counts", "fresh memory", cover(0),
        lambda: read("")),
    "pycocotools-decode-nul": raises(PYCOCOTOOLS, "decode of counts with a NUL", "fresh memory", NO_TEXT,
        lambda: read("4\0004")),
    "pycocotools-float-size": tested(PYCOCOTOOLS, "a size of floats", "fresh memory",
        "an error: two integers (height, width)", f"{RLE}::test_a_size_that_is_no_integer_is_an_error"),
    "pycocotools-decode-nothing": gives(PYCOCOTOOLS, "decode of no masks", "reads an element that is not there",
        "no masks", lambda: paste_masks_rle(torch.ones(0, 4, 4), torch.ones(0, 4), (5, 5)) == []),
    # maskApi.c under sanitizers.
    "maskapi-rlefrstring": raises("pycocotools, rleFrString", "a text whose last byte announces another",
        "reads beyond the text", NO_TEXT, lambda: read("o")),
    "maskapi-rletostring": tested("pycocotools, rleToString", "runs of 2^29 pixels and more, of 7 bytes each",
        "writes beyond 6 bytes a run", "memory for every byte", f"{RLE}::test_runs_of_more_than_2_to_the_31_pixels"),
    "maskapi-rletostring-in-a-file": tested("pycocotools, rleToString", "such runs in an annotation file",
        "writes beyond 6 bytes a run", "an error: no image may have so many pixels", READER),
    "maskapi-rlemerge": raises("pycocotools, rleMerge", "more runs than pixels", "writes beyond one run a pixel",
        cover(32), lambda: read([1] * 32)),
    "maskapi-shift": raises("pycocotools, rleFrString", "a number of more than 6 bytes", "undefined shifts",
        "a run length is too long a number", lambda: read("o" * 6 + "1")),
    "maskapi-negative": raises("pycocotools, rleFrString", "a negative run", "undefined shifts",
        "the run lengths cover", lambda: read("O")),
    # faster-coco-eval 1.8, which never died.
    "faster-coco-eval-message": raises(FASTER, "counts of another type", "a cast error that names no argument",
        "counts must be a list or a text, got int", lambda: read(5)),
    "faster-coco-eval-polygon-1e8": gives(FASTER, "a polygon that reaches to 1e8", "std::bad_alloc",
        "the part inside the box", lambda: draw(1e8).all()),
    "faster-coco-eval-nan-polygon": raises(FASTER, "a NaN vertex", "an empty mask, silently",
        "polygon_mask_targets: vertices[1, 0] must be finite, got nan", lambda: draw(math.nan)),
    "faster-coco-eval-empty": raises(FASTER, "empty counts", "are taken", cover(0), lambda: read([])),
    # Files.
    "detectron2-143": tested(
        "facebookresearch/detectron2#143, facebookresearch/detectron2#764," " facebookresearch/detectron2#1885",
        "a damaged image file", "ends the run", "an error that names the file; there is no operator that reads files",
        "tests/test_data_coco.py::test_faults_of_image_files",
        "tests/test_images.py::test_every_truncation_gives_an_error_and_never_a_picture_or_a_crash"),
    "detectron2-5516": tested("facebookresearch/detectron2#5516", "weights and configurations from elsewhere",
        "may run code", "tensors only; a pickle is refused",
        "tests/test_predict_program.py::test_weights_that_are_a_pickle_are_refused_and_never_run"),
}  # fmt: skip
