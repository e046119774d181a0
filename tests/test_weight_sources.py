"""Weights of every project: the tensors that mmdetection has, bit by bit, whoever wrote the file."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from weight_files import (
    mmdetection_state,
    to_authors,
    to_maskrcnn_benchmark,
    to_mmdetection_1,
    to_paddle,
    to_torchvision,
    without_counters,
)

import models
from models.errors import DataError
from models.weights.architecture import find_architecture, find_backbone, find_config
from models.weights.contents import read_contents
from models.weights.translation import translate

MASK, HTC, SCNET = "mask_rcnn_r50_fpn_1x", "htc_r50_fpn_1x", "scnet_r50_fpn_1x"
DEFORMABLE, RES2NET = "htc_x101_64x4d_dconv_c3-c5_ms400-1400_20e", "mask_rcnn_res2net101_26w_4s_fpn_2x"


def letters_101(block: int) -> str:
    """PaddleDetection's names of ResNet-101's blocks: a, b1, b2 ..."""
    return "a" if block == 0 else f"b{block}"


SOURCES = {
    "1.x mask": (MASK, to_mmdetection_1, "mmdetection 1.x"),
    "1.x htc": (HTC, to_mmdetection_1, "mmdetection 1.x"),
    "1.x deformable": (DEFORMABLE, to_mmdetection_1, "mmdetection 1.x"),
    "maskrcnn-benchmark": (MASK, to_maskrcnn_benchmark, "maskrcnn-benchmark"),
    "maskrcnn-benchmark faster": ("faster_rcnn_r50_fpn_1x", to_maskrcnn_benchmark, "maskrcnn-benchmark"),
    "torchvision": (MASK, to_torchvision, "torchvision detector"),
    "torchvision before 0.13": (MASK, lambda state: to_torchvision(state, old_names=True), "torchvision detector"),
    "torchvision faster": ("faster_rcnn_r50_fpn_1x", to_torchvision, "torchvision detector"),
    "paddle": (HTC, to_paddle, "Paddle"),
    "paddle 101": ("htc_r101_fpn_20e", lambda state: to_paddle(state, letters_101), "Paddle"),
    "paddle 101 letters": ("htc_r101_fpn_20e", to_paddle, "Paddle"),
}


def same(ours: dict, others: dict) -> None:
    assert list(sorted(ours)) == list(sorted(others))
    for key, value in ours.items():
        assert value.dtype == others[key].dtype
        assert torch.equal(value, others[key]), key


@pytest.mark.parametrize("source", SOURCES)
def test_every_tensor_arrives_bit_by_bit(source):
    config, write, name = SOURCES[source]
    state = mmdetection_state(config)
    translation = translate(write(state), "file")
    assert (translation.source, translation.whole) == (name, True)
    assert {step.new for step in translation.steps} == translation.state.keys()
    counters = source.startswith("1.x")
    same(translation.state, translate(state if counters else without_counters(state), "file").state)


def test_rows_are_reordered_and_nothing_else_is_touched():
    """On paper: three classes behind the background, one weight each."""
    state = {
        "rpn_head.rpn_conv.weight": torch.tensor([[9.0]]),
        "bbox_head.shared_fcs.0.weight": torch.tensor([[8.0]]),
        "bbox_head.fc_cls.bias": torch.tensor([0.0, 1.0, 2.0, 3.0]),
        "bbox_head.fc_reg.bias": torch.arange(16.0),
        "mask_head.conv_logits.bias": torch.tensor([0.0, 1.0, 2.0, 3.0]),
        "semantic_head.conv_logits.bias": torch.tensor([0.0, 1.0]),
    }
    found = translate(state, "file").state
    assert found["box_head.class_logits.bias"].tolist() == [1, 2, 3, 0]
    assert found["box_head.deltas.bias"].tolist() == list(range(4, 16))
    assert found["mask_head.logits.bias"].tolist() == [1, 2, 3]
    assert found["semantic_head.logits.bias"].tolist() == [0, 1]
    assert found["rpn.conv.weight"].tolist() == [[9.0]]


def test_class_agnostic_boxes_of_mmdetection_1_keep_their_rows():
    state = mmdetection_state(HTC)
    found = translate(to_mmdetection_1(state), "file").state
    assert torch.equal(found["box_heads.2.deltas.weight"], state["roi_head.bbox_head.2.fc_reg.weight"])
    assert len(found["box_heads.2.deltas.weight"]) == 4


@pytest.mark.parametrize(("config", "source"), [(RES2NET, "Res2Net, its authors"), (MASK, "torchvision ResNet")])
def test_classifiers_become_backbones(config, source):
    state = mmdetection_state(config)
    translation = translate(to_authors(state), "file")
    assert (translation.source, translation.whole) == (source, False)
    whole = translate(state, "file").state
    expected = {key.removeprefix("backbone."): value for key, value in whole.items() if key.startswith("backbone.")}
    same({key: value for key, value in translation.state.items() if not key.startswith("fc.")}, expected)


def test_mmdetections_pretrained_backbone_has_the_authors_names_here():
    state = {key[9:]: value for key, value in mmdetection_state(RES2NET).items() if key.startswith("backbone.")}
    assert "stem.7.weight" in state
    translation = translate(state, "file")
    assert translation.source == "mmdetection's ImageNet backbones"
    assert torch.equal(translation.state["bn1.weight"], state["stem.7.weight"])
    assert torch.equal(translation.state["conv1.6.weight"], state["stem.6.weight"])


NEEDS = {
    "maskrcnn-benchmark": {
        "arithmetic": "maskrcnn_benchmark",
        "backbone.norm": "fixed_batch",
        "backbone.norm_eps": 0.0,
        "backbone.stride_in_1x1": True,
        "backbone.stage_pool": True,
    },
    "torchvision": {"arithmetic": "torchvision", "backbone.norm": "fixed_batch", "backbone.norm_eps": 0.0},
    "paddle": {
        "arithmetic": "mmdetection",
        "stage_stds": ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (1 / 30, 1 / 30, 1 / 15, 1 / 15)),
        "match_low_quality": False,
    },
    "1.x htc": {"arithmetic": "mmdetection_1"},
}


@pytest.mark.parametrize("source", NEEDS)
def test_each_project_asks_for_its_arithmetic(source):
    config, write, _ = SOURCES[source]
    assert translate(write(mmdetection_state(config)), "file").fields == NEEDS[source]


def test_the_pool_of_res2net_is_each_familys_own():
    assert translate(mmdetection_state(RES2NET), "file").fields == {
        "arithmetic": "mmdetection",
        "backbone.stage_pool": False,
    }
    original_stem = {key: value for key, value in mmdetection_state(RES2NET).items() if ".stem." not in key}
    original_stem["backbone.conv1.weight"] = torch.zeros(3, 3)
    benchmark = translate(to_maskrcnn_benchmark(original_stem), "file")
    assert benchmark.fields["backbone.stage_pool"] is True


def test_torchvisions_own_batch_norm_keeps_its_epsilon():
    state = to_torchvision(mmdetection_state(MASK))
    state["backbone.body.bn1.num_batches_tracked"] = torch.tensor(5)
    assert translate(state, "file").fields == {"arithmetic": "torchvision"}


ARCHITECTURES = {
    MASK: ("mask_rcnn", "resnet50", False),
    "faster_rcnn_r50_fpn_1x": ("faster_rcnn", "resnet50", False),
    "cascade_mask_rcnn_r50_fpn_1x": ("cascade_mask_rcnn", "resnet50", False),
    "cascade_rcnn_res2net101_26w_4s_fpn_20e": ("cascade_mask_rcnn", "res2net101_v1d_26w4s", False),
    HTC: ("htc", "resnet50", False),
    "htc_without_semantic_r50_fpn_1x": ("htc", "resnet50", False),
    DEFORMABLE: ("htc", "resnext101_64x4d", True),
    SCNET: ("scnet", "resnet50", False),
}


@pytest.mark.parametrize("config", ARCHITECTURES)
def test_the_detector_is_found_from_names_and_shapes(config):
    with torch.device("meta"):
        state = {key: torch.empty_like(value) for key, value in whole_shapes(config).items()}
    translation = translate(state, "file")
    arch, backbone, deformable = ARCHITECTURES[config]
    assert find_architecture(translation.state) == arch
    assert find_backbone(translation.state) == (backbone, deformable)
    found = find_config(arch, models.config_backbones.BACKBONES[backbone], translation.state, translation.fields)
    assert (found.num_classes, found.channels, found.box_channels) == (80, 256, 1024)
    if arch in ("htc", "scnet"):
        assert found.semantic == ("without_semantic" not in config)


def whole_shapes(config: str) -> dict:
    import gzip

    from weight_files import KEYS

    shapes = json.loads(gzip.decompress(KEYS.read_bytes()))[config]["state_dict"]
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def tiny(arch: str = "mask_rcnn", **fields) -> torch.nn.Module:
    fields = {"backbone": "resnet18_narrow", "num_classes": 2, "channels": 8, "box_channels": 8} | fields
    return models.build_detector(arch, **fields)


def to_mmdetection(state: dict) -> dict:
    """The narrow Mask R-CNN's state with mmdetection's names."""
    names = {
        "fpn.lateral_convs.": "neck.lateral_convs.",
        "fpn.output_convs.": "neck.fpn_convs.",
        "rpn.conv.": "rpn_head.rpn_conv.",
        "rpn.objectness.": "rpn_head.rpn_cls.",
        "rpn.deltas.": "rpn_head.rpn_reg.",
        "box_head.fc1.": "roi_head.bbox_head.shared_fcs.0.",
        "box_head.fc2.": "roi_head.bbox_head.shared_fcs.1.",
        "box_head.class_logits.": "roi_head.bbox_head.fc_cls.",
        "box_head.deltas.": "roi_head.bbox_head.fc_reg.",
        "mask_head.upsample.": "roi_head.mask_head.upsample.",
        "mask_head.logits.": "roi_head.mask_head.conv_logits.",
        "mask_head.convs.": "roi_head.mask_head.convs.",
    }
    result = {}
    for key, value in state.items():
        for ours, others in names.items():
            if key.startswith(ours):
                key = others + key[len(ours) :]
                if "convs." in ours:
                    head, number, tail = key.rsplit(".", 2)
                    key = f"{head}.{number}.conv.{tail}"
                break
        result[key] = value.clone()
    return result


def unchanged(detector: torch.nn.Module, before: dict) -> None:
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())


def refused(detector: torch.nn.Module, state: dict, *texts: str) -> None:
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    with pytest.raises(DataError) as caught:
        models.load_weights(detector, state)
    for text in texts:
        assert text in str(caught.value), str(caught.value)
    unchanged(detector, before)


def test_missing_left_over_and_misshaped_tensors_are_named_and_nothing_is_loaded():
    state = to_mmdetection(tiny().state_dict())
    del state["roi_head.bbox_head.fc_reg.bias"]
    state["roi_head.bbox_head.fc_iou.bias"] = torch.zeros(3)
    state["rpn_head.rpn_cls.weight"] = torch.zeros(5, 8, 1, 1)
    refused(
        tiny(),
        state,
        "box_head.deltas.bias: box head; the file lacks it",
        "roi_head.bbox_head.fc_iou.bias: box head; the detector has no such tensor",
        "rpn_head.rpn_cls.weight [5, 8, 1, 1]: region proposal network, [3, 8, 1, 1] here",
        "recognised as mmdetection 2.x or 3.x",
    )


def test_a_part_that_is_missing_or_left_over_is_named_once_with_its_meaning():
    state = to_mmdetection(tiny().state_dict())
    refused(
        tiny("faster_rcnn"),
        state,
        "roi_head.mask_head.* (12 tensors): mask head; the detector has none",
    )
    state = {key: value for key, value in state.items() if "mask_head" not in key}
    refused(tiny(), state, "mask_head.* (12 tensors): mask head; the file has none")


def test_many_tensors_of_a_part_are_named_in_few_lines():
    state = to_mmdetection(tiny().state_dict())
    for level in range(4):
        del state[f"neck.fpn_convs.{level}.conv.bias"]
        state |= {f"neck.fpn_convs.{level}.norm.{name}": torch.zeros(8) for name in ("weight", "bias")}
        state |= {f"roi_head.bbox_head.fcs.{level}.{name}": torch.zeros(8) for name in ("weight", "bias")}
    refused(
        tiny(),
        state,
        "fpn.output_convs.{0,1,2,3}.bias: feature pyramid; the file lacks it",
        "neck.fpn_convs.* (8 tensors): feature pyramid; the detector has none",
        "roi_head.bbox_head.fcs.{0,1,2,3}.{weight,bias}: box head; the detector has no such tensor",
    )


def test_another_number_of_classes_is_told_in_classes():
    state = to_mmdetection(tiny(num_classes=4).state_dict())
    refused(
        tiny(), state, "roi_head.bbox_head.fc_cls.weight [5, 8]: box head, [3, 8] here (4 classes in the file, 2 here)"
    )


def test_weights_of_nobody_are_refused():
    refused(tiny(), {"encoder.0.weight": torch.zeros(2)}, "of no project that is known here", "encoder.0.weight")
    refused(tiny(), {"backbone.bottom_up.stem.conv1.weight": torch.zeros(2)}, "detectron2's")


def test_two_names_of_one_tensor_are_refused():
    state = to_mmdetection(tiny().state_dict())
    state |= {"rpn.conv.weight": state["rpn_head.rpn_conv.weight"]}
    refused(tiny(), state, "two tensors of this file have one meaning", "rpn.conv.weight")


def test_a_name_with_and_without_a_prefix_is_refused():
    state = to_mmdetection(tiny().state_dict())
    state |= {"module.rpn_head.rpn_cls.bias": state["rpn_head.rpn_cls.bias"] + 1}
    refused(tiny(), state, "two tensors of this file have one name")


def test_a_classifier_is_no_detector():
    detector = tiny()
    state = {key[9:]: value for key, value in detector.state_dict().items() if key.startswith("backbone.")}
    refused(detector, state, "these weights are of a backbone, not of a detector", "--backbone-weights")


def test_a_backbone_takes_its_part_of_a_detectors_weights():
    state = to_mmdetection(tiny().state_dict())
    backbone = tiny().backbone
    models.load_weights(backbone, state)
    assert torch.equal(backbone.layer1[0].conv1.weight, state["backbone.layer1.0.conv1.weight"])


@pytest.mark.parametrize(
    ("write", "arithmetic"),
    [(to_mmdetection_1, "mmdetection_1"), (to_maskrcnn_benchmark, "maskrcnn_benchmark"), (dict, "mmdetection")],
)
def test_weights_only_load_into_their_own_arithmetic(write, arithmetic):
    fields = {"num_classes": 2, "channels": 8, "box_channels": 8}
    other = "torchvision" if arithmetic == "mmdetection" else "mmdetection"
    detector = models.build_detector("mask_rcnn", backbone="resnet18", arithmetic=other, **fields)
    state = write(to_mmdetection(detector.state_dict()))
    refused(detector, state, f"config.arithmetic must be {arithmetic!r}")
    if arithmetic != "maskrcnn_benchmark":  # whose backbone differs, too
        own = models.build_detector("mask_rcnn", backbone="resnet18", arithmetic=arithmetic, **fields)
        models.load_weights(own, state)
        assert torch.equal(own.rpn.conv.weight, detector.rpn.conv.weight)


def test_a_needed_field_is_never_passed_over():
    detector = tiny()
    old = to_torchvision(to_mmdetection(detector.state_dict()))
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    with pytest.raises(DataError, match=r"config.backbone.norm_eps must be 0.0"):
        models.load_weights(detector, old)
    unchanged(detector, before)


def paddle_file(path, state: dict, protocol: int, pairs: bool, split: str | None = None):
    content = {key: (key, value.numpy()) if pairs else value.numpy() for key, value in state.items()}
    content["StructuredToParameterName@@"] = {key: f"conv2d_{i}.w_0" for i, key in enumerate(state)}
    if split is not None:
        flat = state[split].flatten().numpy()
        del content[split]
        content |= {f"{split}@@.0": flat[:5], f"{split}@@.1": flat[5:]}
        slices = [f"{split}@@.0", f"{split}@@.1"]
        content["UnpackBigParamInfor@@"] = {split: {"OriginShape": tuple(state[split].shape), "slices": slices}}
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("pairs", [False, True])
def test_a_paddle_file_arrives_bit_by_bit(tmp_path, protocol, pairs):
    state = mmdetection_state(HTC)
    split = "bbox_head.head.1.fc6.weight"
    path = paddle_file(tmp_path / "htc.pdparams", to_paddle(state), protocol, pairs, split)
    contents = read_contents(path)
    assert list(contents.left_out) == ["StructuredToParameterName@@"]
    same(translate(contents.state, "file").state, translate(without_counters(state), "file").state)


def test_safetensors_whose_header_length_looks_like_a_pickle(tmp_path):
    """The file begins with that length, and a pickle with 0x80."""
    path = tmp_path / "a.safetensors"
    for length in range(0, 256, 8):
        save_file({"a": torch.arange(3.0)}, path, {"text": "x" * length})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert read_contents(path).state["a"].tolist() == [0, 1, 2]


def test_a_paddle_file_that_numpy_wrote_in_fortran_order(tmp_path):
    array = np.asfortranarray(np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    (tmp_path / "a.pdparams").write_bytes(pickle.dumps({"a": array}, 2))
    assert np.array_equal(read_contents(tmp_path / "a.pdparams").state["a"].numpy(), array)
    scalar = pickle.dumps({"a": np.array(3, np.float32)}, 2)
    order = pickle.BUILD + pickle.NEWFALSE  # "not in Fortran order", behind the type; a file may say that it is
    assert scalar.count(order) == 1
    (tmp_path / "b.pdparams").write_bytes(scalar.replace(order, pickle.BUILD + pickle.NEWTRUE))
    assert read_contents(tmp_path / "b.pdparams").state["a"].item() == 3
