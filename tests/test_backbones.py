"""Backbones: sizes as published, variants, deformable layers, norms, folding, graphs, small maps."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
from cascadeops.reference.deform_conv2d import deform_conv2d
from models.backbones import build_backbone
from models.build import backbone_config
from models.classifiers import Classifier
from models.config_backbones import BACKBONES, BackboneConfig, as_classifier, as_maskrcnn_benchmark, with_deformable
from models.deformable import DeformableConv2d
from models.errors import UsageError
from models.folding import folded
from models.names_backbones import from_mmdetection
from models.norms import make_norm
from models.published_rows import PUBLISHED_ROWS

SMALL = BackboneConfig(layers=(2, 1, 1, 1), width=16, frozen_stages=0)
RES2NET = replace(SMALL, block="res2net", base_width=26, scale=4)
SELF_CALIBRATED = replace(SMALL, block="self_calibrated", base_width=32)
FAMILIES = {
    "basic": replace(SMALL, block="basic"),
    "resnet": SMALL,
    "resnext": replace(SMALL, groups=4, base_width=16),
    "resnet_maskrcnn_benchmark": as_maskrcnn_benchmark(SMALL),
    "res2net": RES2NET,
    "res2net_v1d": replace(RES2NET, deep_stem=8, average_down=True, stage_pool=False),
    "res2net_maskrcnn_benchmark": as_maskrcnn_benchmark(RES2NET),
    "self_calibrated": SELF_CALIBRATED,
    "self_calibrated_v1d": replace(SELF_CALIBRATED, deep_stem=8, average_down=True, average_stride=True),
    "resnext_deformable": with_deformable(replace(SMALL, groups=4, base_width=16)),
    "res2net_deformable": with_deformable(RES2NET),
    "self_calibrated_deformable": with_deformable(SELF_CALIBRATED),
}
GRAPHS = ["basic", "resnet", "resnext_deformable", "res2net_v1d", "self_calibrated_v1d"]
"""One of every kind of block, stem and shortcut: compiling takes seconds each."""
PLAIN_FORMS = {"resnext": 3, "res2net": 9, "self_calibrated": 3}
"""Families with a deformable form: its number of deformable convolutions."""


def small_backbone(config: BackboneConfig) -> nn.Module:
    """With norms and offsets that are not those of a fresh network, so that every part of it matters."""
    torch.manual_seed(0)
    backbone = build_backbone(config)
    for module in backbone.modules():
        if hasattr(module, "running_var"):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
        if isinstance(module, DeformableConv2d):
            nn.init.normal_(module.offset.weight, std=0.1)
            nn.init.uniform_(module.offset.bias, -1, 1)
    return backbone.eval()


def image(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size).to(memory_format=torch.channels_last)


def assert_maps_close(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * y.abs().max().item())


# ---- sizes

# parameters in millions; 10**9 multiplications with additions, of convolutions and fc at 224 x 224; tensors
PUBLISHED = {
    "res2net50_48w2s": (25.287, 4.160, 320),
    "res2net50_26w4s": (25.699, 4.255, 512),
    "res2net50_18w6s": (25.159, 4.181, 704),
    "res2net50_14w8s": (25.060, 4.179, 896),
    "res2net50_26w6s": (37.051, 6.296, 704),
    "res2net50_26w8s": (48.404, 8.336, 896),
    "res2net101_26w4s": (45.207, 8.067, 1022),
    "res2net50_v1d_26w4s": (25.718, 4.495, 524),
    "res2net101_v1d_26w4s": (45.226, 8.307, 1034),
    "scnet50": (25.565, 3.925, 704),
    "scnet50_v1d": (25.584, 4.685, 716),
    "scnet101": (44.565, 7.169, 1418),
    "scnet101_v1d": (44.689, 9.044, 1430),
    # torchvision's parameters and tensors; He et al. 2016, table 1, has 1.8 and 3.6
    "resnet18": (11.690, 1.814, 122),
    "resnet34": (21.798, 3.664, 218),
}
WITHOUT_CLASSIFIER = {
    "resnet50": (23.508, 4.087, 318),
    "resnet101": (42.500, 7.799, 624),
    "resnext101_32x4d": (42.129, 7.968, 624),
    "resnext101_64x4d": (81.406, 15.458, 624),
}


def sizes(model: nn.Module) -> tuple[float, float, int]:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return round(parameters / 1e6, 3), round(counter.get_total_flops() / 2e9, 3), len(model.state_dict())


@pytest.mark.parametrize("name", BACKBONES)
def test_classifier_has_the_published_size(name):
    """Which is also that of docs/backbones.md."""
    with torch.device("meta"):
        model = Classifier(as_classifier(BACKBONES[name]), 1000).eval()
    found = sizes(model)
    page = (Path(__file__).parent.parent / "docs/backbones.md").read_text()
    assert "| `{}` | {:.3f} | {:.3f} | {} |".format(name, *found) in page
    if name in PUBLISHED:
        assert found == PUBLISHED[name]


@pytest.mark.parametrize("name", WITHOUT_CLASSIFIER)
def test_backbone_has_the_published_size(name):
    with torch.device("meta"):
        backbone = build_backbone(BACKBONES[name]).eval()
    assert sizes(backbone) == WITHOUT_CLASSIFIER[name]


def test_grouped_convolutions_have_the_published_shape():
    for groups in (32, 64):
        with torch.device("meta"):
            backbone = build_backbone(BACKBONES[f"resnext101_{groups}x4d"])
        widths = [getattr(backbone, f"layer{i}")[0].conv2.weight.shape[:2] for i in range(1, 5)]
        assert widths == [(groups * 4 * 2**i, 4 * 2**i) for i in range(4)]


def test_every_promised_name_is_there():
    promised = {"resnet18", "resnet34", "resnet50", "resnet101", "resnext101_32x4d", "resnext101_64x4d"}
    promised |= {f"res2net50_{widths}" for widths in ("48w2s", "26w4s", "18w6s", "14w8s", "26w6s", "26w8s")}
    promised |= {"res2net101_26w4s", "res2net50_v1d_26w4s", "res2net101_v1d_26w4s"}
    promised |= {"scnet50", "scnet101", "scnet50_v1d", "scnet101_v1d", "resnet18_narrow"}
    assert set(BACKBONES) == promised
    assert promised < set(models.__all__)


# ---- variants

OTHER_VARIANTS = {
    "stride_in_1x1": (SMALL, True),
    "stage_pool": (RES2NET, False),
    "average_down": (SMALL, True),
    "deep_stem": (SMALL, 8),
    "average_stride": (SELF_CALIBRATED, True),
}


@pytest.mark.parametrize("field", OTHER_VARIANTS)
def test_each_variant_computes_something_else(field):
    config, value = OTHER_VARIANTS[field]
    images = image(64, 64)
    with torch.inference_mode():
        one, other = (small_backbone(c)(images)[-1] for c in (config, replace(config, **{field: value})))
    assert one.shape == other.shape
    assert (one - other).abs().mean() > 0.05 * one.abs().mean()


def test_stride_in_the_1x1_as_maskrcnn_benchmark_has_it():
    block = small_backbone(replace(SMALL, stride_in_1x1=True)).layer2[0]
    x = torch.randn(1, 64, 10, 12)
    y = F.relu(block.bn1(F.conv2d(x, block.conv1.weight, stride=2)))
    y = F.relu(block.bn2(F.conv2d(y, block.conv2.weight, stride=1, padding=1)))
    y = block.bn3(F.conv2d(y, block.conv3.weight))
    shortcut = block.downsample[1](F.conv2d(x, block.downsample[0].weight, stride=2))
    torch.testing.assert_close(block(x), F.relu(y + shortcut))


@pytest.mark.parametrize(
    ("stage_pool", "stride_in_1x1", "layer", "expected"),
    [
        (True, False, "layer1", 1),  # the authors: a pool of stride 1
        (False, False, "layer1", None),  # mmdetection: none
        (True, False, "layer2", 2),
        (False, False, "layer2", 2),
        (True, True, "layer2", 1),  # maskrcnn-benchmark: behind a 1x1 convolution of stride 2
    ],
)
def test_the_pool_of_the_last_split(stage_pool, stride_in_1x1, layer, expected):
    config = replace(RES2NET, stage_pool=stage_pool, stride_in_1x1=stride_in_1x1)
    block = getattr(small_backbone(config), layer)[0]
    x = torch.randn(1, block.conv1.in_channels, 11, 10)
    splits = F.relu(block.bn1(block.conv1(x))).chunk(4, dim=1)
    parts = [F.relu(norm(conv(x))) for x, conv, norm in zip(splits, block.convs, block.bns, strict=False)]
    last = splits[3] if expected is None else F.avg_pool2d(splits[3], 3, expected, 1)
    y = block.bn3(block.conv3(torch.cat([*parts, last], 1))) + block.downsample(x)
    torch.testing.assert_close(block(x), F.relu(y))


def test_the_splits_of_a_later_block_are_a_chain():
    block = small_backbone(RES2NET).layer1[1]
    x = torch.randn(1, 64, 7, 6)
    splits = F.relu(block.bn1(block.conv1(x))).chunk(4, dim=1)
    a = F.relu(block.bns[0](block.convs[0](splits[0])))
    b = F.relu(block.bns[1](block.convs[1](a + splits[1])))
    c = F.relu(block.bns[2](block.convs[2](b + splits[2])))
    y = block.bn3(block.conv3(torch.cat([a, b, c, splits[3]], 1)))
    torch.testing.assert_close(block(x), F.relu(y + x))


def test_detectors_and_classifiers_take_the_stage_pool_of_their_weights():
    for name in ("res2net50_v1d_26w4s", "res2net101_v1d_26w4s"):
        assert not BACKBONES[name].stage_pool  # mmdetection's detectors
        assert as_classifier(BACKBONES[name]).stage_pool  # the authors' classifiers
    assert BACKBONES["res2net50_26w4s"].stage_pool
    assert as_maskrcnn_benchmark(BACKBONES["res2net50_26w4s"]).stage_pool


def test_maskrcnn_benchmark_norm_has_no_epsilon():
    config = as_maskrcnn_benchmark(SMALL)
    norm = make_norm(config, 2)
    norm.running_var[:] = torch.tensor([1e-6, 4.0])
    norm.running_mean[:] = torch.tensor([1e-3, 1.0])
    norm.weight.data[:] = torch.tensor([1.0, 3.0])
    norm.bias.data[:] = torch.tensor([0.5, -1.0])
    x = torch.tensor([[[[3e-3]], [[5.0]]]])  # (3e-3 - 1e-3) / 1e-3 + 0.5 and 3 (5 - 1) / 2 - 1
    torch.testing.assert_close(norm(x).flatten(), torch.tensor([2.5, 5.0]))
    with_epsilon = make_norm(replace(config, norm_eps=1e-5), 2)
    with_epsilon.load_state_dict(norm.state_dict())
    assert abs(with_epsilon(x)[0, 0].item() - 2.5) > 1


# ---- deformable layers


@pytest.mark.parametrize("family", PLAIN_FORMS)
def test_deformable_with_zero_offsets_is_the_plain_network(family):
    plain = small_backbone(FAMILIES[family])
    deformable = small_backbone(with_deformable(FAMILIES[family]))
    missing, unexpected = deformable.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert {key.split(".offset.")[1] for key in missing} == {"weight", "bias"}
    deformable_layers = {key.split(".")[0] for key in missing}
    assert deformable_layers == {"layer2", "layer3", "layer4"}
    images = image(64, 96)
    with torch.inference_mode():
        expected, moved = plain(images), deformable(images)
        for module in deformable.modules():
            if isinstance(module, DeformableConv2d):
                module.zero_offsets()
        assert_maps_close(deformable(images), expected)
    assert (moved[3] - expected[3]).abs().mean() > 0.01 * expected[3].abs().mean()


@pytest.mark.parametrize("family", PLAIN_FORMS)
def test_offsets_of_a_fresh_network_are_zero(family):
    backbone = build_backbone(with_deformable(FAMILIES[family]))
    layers = [module for module in backbone.modules() if isinstance(module, DeformableConv2d)]
    assert len(layers) == PLAIN_FORMS[family]
    for layer in layers:
        assert not layer.offset.weight.any() and not layer.offset.bias.any()
        assert layer.weight.std() > 0


@pytest.mark.parametrize("stride", [1, 2])
def test_deformable_convolution_equals_the_reference(stride):
    layer = DeformableConv2d(8, 8, stride, groups=4)
    nn.init.normal_(layer.offset.weight, std=0.3)
    nn.init.uniform_(layer.offset.bias, -2, 2)
    x = torch.randn(2, 8, 9, 7)
    offset = F.conv2d(x, layer.offset.weight, layer.offset.bias, stride, 1)
    expected = deform_conv2d(x, offset, layer.weight, None, [stride] * 2, [1, 1], [1, 1], None)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row", ["scnet_r101_fpn_20e_coco", "htc_x101_64x4d_fpn_16x1_20e_coco"])
def test_dcn_of_a_published_row_keeps_its_backbone(row):
    with torch.device("meta"):
        config = models.build_detector(row, dcn=True).config.backbone
    plain = PUBLISHED_ROWS[row].recipe.detector.backbone
    assert config == replace(plain, deformable_stages=(False, True, True, True))


def test_dcn_in_build_detector():
    with torch.device("meta"):
        detector = models.build_detector("scnet", backbone="resnext101_64x4d", dcn=True)
    assert detector.config.backbone == with_deformable(BACKBONES["resnext101_64x4d"])
    backbone = detector.backbone
    assert sum(isinstance(module, DeformableConv2d) for module in backbone.modules()) == 4 + 23 + 3
    assert backbone.layer2[0].conv2.stride == (2, 2)
    assert len(backbone.state_dict()) == 624 + 60
    # what deformable layers add to HTC X-101-64x4d, 143.300 M - 138.157 M
    added = sum(parameter.numel() for key, parameter in backbone.named_parameters() if ".offset." in key)
    assert round(added / 1e6, 3) == 5.143


# ---- names


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("backbone.stem.0.weight", "backbone.conv1.0.weight"),
        ("backbone.stem.4.running_var", "backbone.conv1.4.running_var"),
        ("stem.6.weight", "conv1.6.weight"),
        ("backbone.stem.7.bias", "backbone.bn1.bias"),
        ("backbone.layer2.0.conv2.conv_offset.bias", "backbone.layer2.0.conv2.offset.bias"),
        ("backbone.layer2.0.convs.1.conv_offset.weight", "backbone.layer2.0.convs.1.offset.weight"),
        ("layer3.5.conv2_offset.weight", "layer3.5.conv2.offset.weight"),
        ("backbone.layer1.0.conv1.weight", "backbone.layer1.0.conv1.weight"),
    ],
)
def test_names_of_mmdetection(theirs, ours):
    assert from_mmdetection(theirs) == ours


@pytest.mark.parametrize(
    ("name", "near"), [("res2net50", "res2net50_26w4s"), ("resnext101", "resnext101_"), ("scnet_50", "scnet50")]
)
def test_an_unknown_name_is_answered_with_the_nearest_ones(name, near):
    with pytest.raises(UsageError, match=f"unknown backbone '{name}'") as caught:
        backbone_config(name)
    assert near in caught.value.fix


def test_basic_blocks_have_no_deformable_form():
    with pytest.raises(UsageError, match="resnet18 has no deformable form"):
        models.build_detector("scnet", backbone="resnet18", dcn=True)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("block", "wide", "backbone.block must be one of basic, bottleneck"),
        ("norm", "layer", "backbone.norm must be one of frozen_batch, fixed_batch"),
        ("frozen_stages", 5, "backbone.frozen_stages must be 0..4, got 5"),
        ("norm_eps", 0.0, r"backbone.norm_eps must be above 0 \(fixed_batch: or 0\)"),
        ("scale", 4, "backbone.scale must be above 1 for res2net blocks and 1 for others, got 4"),
        ("average_stride", True, "backbone.average_stride is for self_calibrated blocks, not for bottleneck"),
    ],
)
def test_a_field_that_does_not_apply_is_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **{field: value})


# ---- norms


@pytest.mark.parametrize("norm", ["frozen_batch", "fixed_batch", "batch", "sync_batch", "group"])
@pytest.mark.parametrize("family", ["resnet", "res2net_v1d", "self_calibrated"])
def test_what_trains_under_each_norm(family, norm):
    backbone = small_backbone(replace(FAMILIES[family], norm=norm, frozen_stages=1))
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    images = image(64, 64)
    with torch.inference_mode():
        in_eval = backbone(images)
    backbone.train()
    features = backbone(images)
    sum(x.square().mean() for x in features).backward()
    changed = {key for key, value in backbone.state_dict().items() if not torch.equal(value, before[key])}
    layers_of_changed = {key.split(".")[0] for key in changed}
    assert layers_of_changed == ({"layer2", "layer3", "layer4"} if norm in ("batch", "sync_batch") else set())
    assert all("running" in key or "num_batches" in key for key in changed)
    for key, parameter in backbone.named_parameters():
        is_frozen = key.startswith(("conv1", "bn1", "layer1"))
        is_norm = parameter.dim() == 1
        assert (parameter.grad is None) == (is_frozen or (is_norm and norm == "fixed_batch")), key
    torch.testing.assert_close(features[0], in_eval[0])  # frozen layers compute as in eval
    same = torch.allclose(features[3], in_eval[3], rtol=1e-3, atol=1e-3)
    assert same == (norm not in ("batch", "sync_batch"))


def test_group_norm_takes_as_many_groups_as_divide():
    config = replace(SMALL, norm="group")
    assert [make_norm(config, channels).num_groups for channels in (64, 256, 48, 26)] == [32, 32, 16, 2]


@pytest.mark.parametrize("frozen_stages", range(5))
def test_frozen_stages(frozen_stages):
    backbone = build_backbone(replace(SMALL, frozen_stages=frozen_stages)).train()
    trains = {key.split(".")[0] for key, parameter in backbone.named_parameters() if parameter.requires_grad}
    order = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
    assert trains == set(order[frozen_stages + 2 :] if frozen_stages else order)
    assert backbone.training


# ---- the same results by other ways


@pytest.mark.parametrize("norm", ["frozen_batch", "fixed_batch", "sync_batch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_folded_norms_compute_the_same(family, norm):
    config = FAMILIES[family]
    backbone = small_backbone(replace(config, norm=norm, norm_eps=config.norm_eps or 1e-3 * (norm != "fixed_batch")))
    copy = folded(backbone)
    assert not any(isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) for module in copy.modules())
    images = image(64, 96)
    with torch.inference_mode():
        assert_maps_close(copy(images), backbone(images))


@pytest.mark.parametrize("family", GRAPHS)
def test_compiles_to_one_graph(family):
    backbone, images = small_backbone(FAMILIES[family]), image(64, 64)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(backbone, fullgraph=True, dynamic=False, backend="aot_eager")
        assert_maps_close(compiled(images), backbone(images))


@pytest.mark.parametrize("family", GRAPHS)
def test_exports(family):
    backbone, images = small_backbone(FAMILIES[family]), image(64, 64)
    with torch.no_grad():
        program = torch.export.export(backbone, (images,))
        assert_maps_close(program.module()(images), backbone(images))


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (97, 33)])
@pytest.mark.parametrize("family", ["self_calibrated", "self_calibrated_v1d"])
def test_maps_smaller_than_the_cells_of_a_self_calibrated_convolution(family, size):
    """The authors' code fails where a map is smaller than 4 x 4; here such a map is one cell."""
    backbone, images = small_backbone(replace(FAMILIES[family], norm="group")), image(*size)
    features = backbone(images)
    assert [tuple(x.shape[2:]) for x in features] == [
        tuple(-(-side // stride) for side in size) for stride in (4, 8, 16, 32)
    ]
    layer, z = backbone.layer4[0].scconv, torch.randn(1, 64, 3, 2)
    cell = layer.k2[2](F.conv2d(z.mean((2, 3), keepdim=True), layer.k2[1].weight, padding=1))
    torch.testing.assert_close(layer(z), layer.k4(layer.k3(z) * torch.sigmoid(z + cell)), rtol=1e-4, atol=1e-4)
    sum(x.square().mean() for x in features).backward()
    assert all(parameter.grad.isfinite().all() for parameter in backbone.parameters())
