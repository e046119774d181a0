"""mmdetection's weights as other projects would have written them: the way back of what models/weights reads.

Written from those projects' own definitions, name by name, without looking at the tables under test.
"""

import gzip
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

KEYS = Path(__file__).parent / "goldens" / "mmdetection_keys.json.gz"
State = dict[str, Tensor]


def mmdetection_state(config: str, width: int | None = 3) -> State:
    """Random weights with the names and shapes of a configuration of mmdetection 3.3.

    Args:
        width: all sizes but the rows of the last layers are cut to it, which makes the tensors small; None: whole.
    """
    shapes = json.loads(gzip.decompress(KEYS.read_bytes()))[config]["state_dict"]
    state = {}
    for key, shape in shapes.items():
        rows = shape[:1] if key.split(".")[-2] in ("fc_cls", "fc_reg", "conv_logits") else []
        size = shape if width is None else rows + [min(n, width) for n in shape[len(rows) :]]
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        state[key] = torch.zeros((), dtype=torch.int64) if not shape else torch.randn(size, generator=generator)
    return state


def background_first(state: State, multiples: dict[str, int]) -> State:
    """Adds a first row block for the background to the layers named, of so many rows a class."""
    result = {}
    for key, value in state.items():
        layer = key.split(".")[-2]
        if layer == "fc_cls":
            value = torch.cat([value[-1:], value[:-1]])
        elif layer in multiples and "semantic_head" not in key:
            noise = torch.full((multiples[layer], *value.shape[1:]), 7.5)
            value = torch.cat([noise, value])
        result[key] = value
    return result


def to_mmdetection_1(state: State) -> State:
    class_specific = any(key == "roi_head.bbox_head.fc_reg.weight" for key in state)
    multiples = {"conv_logits": 1} | ({"fc_reg": 4} if class_specific else {})
    return {
        key.replace("roi_head.", "").replace("conv2.conv_offset", "conv2_offset"): value
        for key, value in background_first(state, multiples).items()
    }


def without_counters(state: State) -> State:
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def to_maskrcnn_benchmark(state: State) -> State:
    def name(key: str) -> str:
        part, *rest = key.split(".")
        if part == "backbone":
            return ".".join(["backbone.body", *([] if rest[0].startswith("layer") else ["stem"]), *rest])
        if part == "neck":
            return f"backbone.fpn.fpn_{'inner' if rest[0][0] == 'l' else 'layer'}{int(rest[1]) + 1}.{rest[-1]}"
        if part == "rpn_head":
            return (
                f"rpn.head.{ {'rpn_conv': 'conv', 'rpn_cls': 'cls_logits', 'rpn_reg': 'bbox_pred'}[rest[0]] }.{rest[1]}"
            )
        if rest[1] == "shared_fcs":
            return f"roi_heads.box.feature_extractor.fc{6 + int(rest[2])}.{rest[3]}"
        if rest[1] == "convs":
            return f"roi_heads.mask.feature_extractor.mask_fcn{int(rest[2]) + 1}.{rest[4]}"
        where, layer = {
            "fc_cls": ("box", "cls_score"),
            "fc_reg": ("box", "bbox_pred"),
            "upsample": ("mask", "conv5_mask"),
            "conv_logits": ("mask", "mask_fcn_logits"),
        }[rest[1]]
        return f"roi_heads.{where}.predictor.{layer}.{rest[2]}"

    state = background_first(without_counters(state), {"fc_reg": 4, "conv_logits": 1})
    return {f"module.{name(key)}": value for key, value in state.items()}


def to_torchvision(state: State, old_names: bool = False) -> State:
    """`old_names`: as torchvision wrote before 0.13, and as its published files still are."""
    index, rpn_index = ("", "") if old_names else (".0", ".0.0")

    def name(key: str) -> str:
        part, *rest = key.split(".")
        if part == "backbone":
            return ".".join(["backbone.body", *rest])
        if part == "neck":
            return f"backbone.fpn.{'inner' if rest[0][0] == 'l' else 'layer'}_blocks.{rest[1]}{index}.{rest[-1]}"
        if part == "rpn_head":
            layer = {"rpn_conv": f"conv{rpn_index}", "rpn_cls": "cls_logits", "rpn_reg": "bbox_pred"}[rest[0]]
            return f"rpn.head.{layer}.{rest[1]}"
        if rest[1] == "shared_fcs":
            return f"roi_heads.box_head.fc{6 + int(rest[2])}.{rest[3]}"
        if rest[1] == "convs":
            old = f"mask_fcn{int(rest[2]) + 1}"
            return f"roi_heads.mask_head.{old if old_names else rest[2] + '.0'}.{rest[4]}"
        head = {
            "fc_cls": "box_predictor.cls_score",
            "fc_reg": "box_predictor.bbox_pred",
            "upsample": "mask_predictor.conv5_mask",
            "conv_logits": "mask_predictor.mask_fcn_logits",
        }[rest[1]]
        return f"roi_heads.{head}.{rest[2]}"

    state = background_first(without_counters(state), {"fc_reg": 4, "conv_logits": 1})
    return {name(key): value for key, value in state.items()}


def to_paddle(state: State, letters: Callable[[int], str] = lambda block: "abcdefghijklmnopqrstuvwxyz"[block]) -> State:
    """`letters`: the name of a block of a stage by its number."""
    norms = {"weight": "weight", "bias": "bias", "running_mean": "_mean", "running_var": "_variance"}

    def backbone(rest: list[str]) -> str:
        if not rest[0].startswith("layer"):
            return "conv1.conv1." + ("conv.weight" if rest[0] == "conv1" else f"norm.{norms[rest[1]]}")
        stage, block, layer = int(rest[0][5:]) + 1, letters(int(rest[1])), rest[2]
        if layer == "downsample":
            branch, is_norm = "short", rest[3] == "1"
        else:
            branch, is_norm = f"branch2{'abc'[int(layer[-1]) - 1]}", layer.startswith("bn")
        return f"res{stage}.res{stage}{block}.{branch}." + (f"norm.{norms[rest[-1]]}" if is_norm else "conv.weight")

    def name(key: str) -> str:
        part, *rest = key.split(".")
        if part == "backbone":
            return f"backbone.{backbone(rest)}"
        if part == "neck":
            return key
        if part == "rpn_head":
            layer = {"rpn_conv": "rpn_feat.rpn_conv", "rpn_cls": "rpn_rois_score", "rpn_reg": "rpn_rois_delta"}[rest[0]]
            return f"rpn_head.{layer}.{rest[1]}"
        head, *rest = rest
        if head == "semantic_head":
            if rest[0] == "conv_embedding":
                rest.remove("conv")
            return ".".join(["fused_semantic_head", *rest])
        stage, *rest = rest
        if head == "mask_head":
            return ".".join(["bbox_head.mask_head.head", stage, *rest])
        if rest[0] == "shared_fcs":
            return f"bbox_head.head.{stage}.fc{6 + int(rest[1])}.{rest[2]}"
        return f"bbox_head.bbox_{'score' if rest[0] == 'fc_cls' else 'delta'}_stage{stage}.{rest[1]}"

    return {
        name(key): value.T.contiguous() if value.dim() == 2 else value for key, value in without_counters(state).items()
    }


def to_authors(state: State) -> State:
    """The backbone as the Res2Net authors write it (their v1b is mmdetection's v1d)."""
    result = {"fc.weight": torch.randn(10, 3), "fc.bias": torch.randn(10)}
    for key, value in state.items():
        if key.startswith("backbone."):
            key = key.removeprefix("backbone.")
            key = f"bn1.{key[7:]}" if key.startswith("stem.7.") else key
            result[key.replace("stem.", "conv1.")] = value
    return result
