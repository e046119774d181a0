"""Faults that were reported of other libraries, or were found in them, do not happen here: each is a test by its name.

docs/peer_faults.md is the same list to be read; `PYTHONPATH=. python tests/test_peer_faults.py` writes it anew.
"""

import ast
import re
from functools import cache
from pathlib import Path

import peer_faults_deform_conv2d
import peer_faults_masks
import peer_faults_nms
import peer_faults_roi_align
import pytest
from peer_faults import Fault

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs/peer_faults.md"
SECTIONS = {
    "RoIAlign": peer_faults_roi_align.FAULTS,
    "NMS": peer_faults_nms.FAULTS,
    "Deformable convolution": peer_faults_deform_conv2d.FAULTS,
    "Masks and data": peer_faults_masks.FAULTS,
}
FAULTS: dict[str, Fault] = {name: fault for faults in SECTIONS.values() for name, fault in faults.items()}
NOT_OURS = {
    "facebookresearch/detectron2#4216": ("rotated boxes: an illegal memory access", "no operator takes rotated boxes"),
    "open-mmlab/mmcv#1663": ("rotated NMS is wrong in float16", "no operator takes rotated boxes"),
    "torchvision 0.26, roi_pool": ("batch index 1e6 ends the process", "RoIAlign only"),
    "torchvision 0.26, ps_roi_align": ("batch index 1e6, or NaN, ends the process", "RoIAlign only"),
    "torchvision 0.26, ps_roi_pool": ("batch index 1e6 ends the process", "RoIAlign only"),
    "facebookresearch/detectron2#1545": (
        "a loss that is NaN is an exception (the good behaviour)",
        "training, not an operator; models/training.py ends a run the same way",
    ),
    "facebookresearch/maskrcnn-benchmark#319": ("an illegal memory access", "its input could not be found out"),
    "chengdazhi/Deformable-Convolution-V2-PyTorch#19": ("as #13", "its input could not be found out"),
}
"""Reports that no operator here can repeat: what they say, and why not."""
RAISED = (RuntimeError, ValueError, TypeError)


def test_no_name_is_used_twice():
    assert len(FAULTS) == sum(map(len, SECTIONS.values())) > 130


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.call])
def test_peer_fault(name):
    fault = FAULTS[name]
    if not fault.is_error:
        assert fault.call()
        return
    with pytest.raises(RAISED) as caught:
        fault.call()
    assert fault.ours in str(caught.value)


@cache
def functions_of(file: str) -> set[str]:
    return {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.tests])
def test_tests_of_a_peer_fault_exist(name):
    for test in FAULTS[name].tests:
        file, _, function = test.partition("::")
        assert function.startswith("test_") and function in functions_of(file), test


def test_reports_that_other_tests_cite_are_in_the_list():
    """Such as pytorch/vision#2598 or mmcv#1169 in a comment: the number after #, whatever stands before it."""
    known = " ".join([*(fault.peer for fault in FAULTS.values()), *NOT_OURS])
    cited = {
        (path.name, word)
        for path in (ROOT / "tests").glob("test_*.py")
        if path.name != Path(__file__).name
        for word in re.findall(r"(?:vision|torchvision|mmcv|mmdetection|detectron2|cocoapi|benchmark) ?#(\d+)",
                               path.read_text())
    }  # fmt: skip
    assert len(cited) > 10
    assert [(file, number) for file, number in sorted(cited) if not re.search(rf"#{number}\b", known)] == []


def linked(peer: str) -> str:
    """Reports as links; GitHub leads from issues/N to pull requests."""
    return re.sub(r"([\w.-]+/[\w.-]+)#(\d+)", r"[\1#\2](https://github.com/\1/issues/\2)", peer)


def document() -> str:
    text = [INTRODUCTION]
    for title, faults in SECTIONS.items():
        text += [f"\n## {title}\n", "| case | peer | input | there | here |", "| --- |" + " --- |" * 4]
        for name, fault in faults.items():
            ours = f"error: `{fault.ours}`" if fault.is_error else fault.ours
            tests = "".join(f"<br>{test}" for test in fault.tests)
            text.append(f"| {name} | {linked(fault.peer)} | {fault.input} | {fault.theirs} | {ours}{tests} |")
    text += ["\n## What cannot happen here\n", "| peer | what | why not |", "| --- | --- | --- |"]
    text += [f"| {linked(peer)} | {what} | {why} |" for peer, (what, why) in NOT_OURS.items()]
    return "\n".join(text) + "\n"


INTRODUCTION = """# Faults of others

What went wrong in other libraries, and what the same input does here. Each row is a test: where no file is named,
`pytest tests/test_peer_faults.py -k NAME`. Versions are those in which a fault was seen: torchvision 0.26.0,
pycocotools 2.0.11 and faster-coco-eval 1.8.0 were run on a CPU, each call in a process of its own; of mmcv 2,
mmdetection 3.3 and detectron2 0.6 the source was read; the rest is as reported, and may be mended since. "As it seems"
marks a cause that a report does not prove. What is right there is listed where a careless rewrite might get it wrong.

Errors are those of the CPU. On CUDA, where a look at the values would stall the device, such a row is left out and
noted for `raise_device_faults` ([what bad input does](bad_input.md)). The CUDA kernels have been emulated, and not yet
run on a GPU."""


def test_the_document_is_the_list():
    assert DOCUMENT.read_text() == document(), "write it anew: PYTHONPATH=. python tests/test_peer_faults.py"


if __name__ == "__main__":
    DOCUMENT.write_text(document())
