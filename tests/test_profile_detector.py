"""The profile of a detector: shares that sum to one, and a picture and a page that show them."""

import xml.etree.ElementTree
from pathlib import Path

import pytest
from small_detectors import small_detector

from benchmarks import profile_detector
from benchmarks.detector_cases import random_images
from benchmarks.profile_detector import COLOURS, MATRIX, MODULE, OURS, REST, Span

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def profile() -> Span:
    return profile_detector.profiled(small_detector("scnet"), *random_images(1, (64, 96)), runs=1)


def test_every_part_of_the_detector_is_in_the_profile(profile):
    parts, kinds = profile_detector.parts(profile), profile_detector.kinds(profile)
    assert sum(parts.values()) == pytest.approx(1) and sum(kinds.values()) == pytest.approx(1)
    assert all(share > 0 for share in kinds.values())
    assert parts.keys() == {
        "backbone", "fpn", "rpn", "semantic_head", "global_context_head", "box_heads", "feature_relay", "mask_head",
        "results", "cascadeops::multiscale_roi_align", "cascadeops::box_proposals", "cascadeops::multiclass_nms",
        "between them",
    }  # fmt: skip
    hooks = [module._forward_hooks for module in small_detector("scnet").modules()]
    assert not any(hooks)


def test_shares_on_paper():
    """100 us: a module of 60 us with a convolution of 40 and a copy of 10, and one of our operators of 30."""
    conv, copy = Span("aten::conv2d", 5, 45, MATRIX), Span("aten::copy_", 45, 55, REST)
    root = Span("detector", 0, 100, MODULE)
    root.children = [Span("backbone", 0, 60, MODULE, [conv, copy]), Span("cascadeops::nms", 60, 90, OURS)]
    assert profile_detector.kinds(root) == {MATRIX: 0.4, OURS: 0.3, REST: 0.3}
    assert profile_detector.parts(root) == {"backbone": 0.6, "cascadeops::nms": 0.3, "between them": 0.1}


def test_picture_and_page(profile):
    picture = profile_detector.flame(profile, "SCNet & others").svg()
    texts = [element.text for element in xml.etree.ElementTree.fromstring(picture).iter() if element.text]
    assert {"detector", "SCNet & others", *COLOURS} <= set(texts)
    assert all(f'fill="{colour}"' in picture for colour in COLOURS.values())
    assert "busy" not in profile_detector.tables("a", profile, load=0.2)
    content = profile_detector.tables("a", profile, load=7.0)
    assert content.startswith("`a`, one image of 800 x 1333") and "The machine was busy** (load average 7.0)" in content
    page = "before\n<!-- profile: a -->\nold\n<!-- /profile -->\nafter\n"
    text = profile_detector.rewritten(page, "a", "new")
    assert text == "before\n<!-- profile: a -->\n\nnew\n\n<!-- /profile -->\nafter\n"
    with pytest.raises(ValueError, match="no section between <!-- profile: b -->"):
        profile_detector.rewritten(page, "b", "new")
