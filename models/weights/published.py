"""Weights files that projects published: where they are, what they are for, whose licence.

The addresses are those of the projects' documentation and have not been tried from here. A file's name ends with the
first 8 digits of its SHA-256, which is what a download is checked against.
"""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

from ..errors import UsageError

OPENMMLAB = "https://download.openmmlab.com/mmdetection/v2.0"
PRETRAIN = "https://download.openmmlab.com/pretrain/third_party"
PYTORCH = "https://download.pytorch.org/models"
RES2NET = "https://shanghuagao.oss-cn-beijing.aliyuncs.com/res2net"
SELF_CALIBRATED = "https://backseason.oss-cn-beijing.aliyuncs.com/scnet"
APACHE, BSD, MIT = "Apache-2.0", "BSD-3-Clause", "MIT"
NON_COMMERCIAL = "CC BY-NC-SA (not for commercial use)"


class Published(NamedTuple):
    name: str
    """What a person types."""
    url: str
    purpose: str
    licence: str
    """Of the project that published it; the data it was trained on has terms of its own."""

    @property
    def file_name(self) -> str:
        return self.url.rsplit("/", 1)[1]

    @property
    def sha256_prefix(self) -> str:
        """The first 8 hexadecimal digits."""
        return re.search(r"-([0-9a-f]{8})\.\w+$", self.url)[1]


def _detectors(family: str, *files: str) -> list[Published]:
    """mmdetection's: CONFIG[_DATE]-HASH, in a folder of the configuration's name."""
    found = []
    for file in files:
        config = re.sub(r"(_\d{8})?-[0-9a-f]{8}$", "", file)
        found.append(Published(config, f"{OPENMMLAB}/{family}/{config}/{file}.pth", "detector, COCO", APACHE))
    return found


def _backbones(host: str, licence: str, *files: str) -> list[Published]:
    stem = r"-[0-9a-f]{8}$"
    return [Published(re.sub(stem, "", file), f"{host}/{file}.pth", "backbone, ImageNet", licence) for file in files]


PUBLISHED = [
    *_detectors(
        "scnet",
        "scnet_r50_fpn_1x_coco-c3f09857",
        "scnet_r50_fpn_20e_coco-a569f645",
        "scnet_r101_fpn_20e_coco-294e312c",
        "scnet_x101_64x4d_fpn_20e_coco-fb09dec9",
    ),
    *_detectors(
        "htc",
        "htc_r50_fpn_1x_coco_20200317-7332cf16",
        "htc_r50_fpn_20e_coco_20200319-fe28c577",
        "htc_r101_fpn_20e_coco_20200317-9b41b48f",
        "htc_x101_32x4d_fpn_16x1_20e_coco_20200318-de97ae01",
        "htc_x101_64x4d_fpn_16x1_20e_coco_20200318-b181fd7a",
        "htc_x101_64x4d_fpn_dconv_c3-c5_mstrain_400_1400_16x1_20e_coco_20200312-946fd751",
    ),
    *_detectors(
        "res2net",
        "faster_rcnn_r2_101_fpn_2x_coco-175f1da6",
        "mask_rcnn_r2_101_fpn_2x_coco-17f061e8",
        "cascade_rcnn_r2_101_fpn_20e_coco-f4b7b7db",
        "cascade_mask_rcnn_r2_101_fpn_20e_coco-8a7b41e1",
        "htc_r2_101_fpn_20e_coco-3a8d2112",
    ),
    *_backbones(PYTORCH, BSD, "resnet50-0676ba61", "resnet101-63fe2227"),
    Published("resnet50_old", f"{PYTORCH}/resnet50-19c8e357.pth", "backbone, ImageNet", BSD),
    Published("resnet101_old", f"{PYTORCH}/resnet101-5d3b4d8f.pth", "backbone, ImageNet", BSD),
    *_backbones(PRETRAIN, APACHE, "resnext101_32x4d-a5af3160", "resnext101_64x4d-ee2c6f71"),
    *_backbones(PRETRAIN, NON_COMMERCIAL, "res2net101_v1d_26w_4s_mmdetv2-f0a600f9"),
    *_backbones(
        RES2NET,
        NON_COMMERCIAL,
        "res2net50_48w_2s-afed724a",
        "res2net50_26w_4s-06e79181",
        "res2net50_18w_6s-db17faaa",
        "res2net50_14w_8s-6527dddc",
        "res2net50_26w_6s-19041792",
        "res2net50_26w_8s-2c7c9f12",
        "res2net101_26w_4s-02a759a1",
        "res2net50_v1b_26w_4s-3cf99910",
        "res2net101_v1b_26w_4s-0812c246",
    ),
    *_backbones(SELF_CALIBRATED, MIT, "scnet50-dc6a7e87", "scnet50_v1d-4109d1e1", "scnet101-44c5b751"),
]


def find(name: str) -> Published:
    """The published file of this name. Raises UsageError, with the nearest names."""
    for file in PUBLISHED:
        if name in (file.name, file.file_name):
            return file
    near = difflib.get_close_matches(name, [file.name for file in PUBLISHED], n=3, cutoff=0.4)
    fix = f"did you mean {' or '.join(near)}?" if near else "python -m models.weights   lists them"
    raise UsageError(f"no published weights file is called {name!r}", fix=fix)
