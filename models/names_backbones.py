"""Names of backbones in other projects' weights -> ours.

Ours are torchvision's and those of the authors of Res2Net and the self-calibrated networks; mmdetection's differ in the
deep stem and in the offset convolutions.
"""

from __future__ import annotations

import re

MMDETECTION = [
    (r"(^|\.)stem\.([01346])\.", r"\1conv1.\2."),
    (r"(^|\.)stem\.7\.", r"\1bn1."),
    (r"\.conv_offset\.", ".offset."),
    (r"\.conv2_offset\.", ".conv2.offset."),  # mmdetection 1.x
]
"""(regular expression, replacement); the first that matches counts."""


def from_mmdetection(key: str) -> str:
    """A name in a backbone of mmdetection 1.x to 3.x, with or without `backbone.` in front."""
    for pattern, replacement in MMDETECTION:
        renamed, changed = re.subn(pattern, replacement, key)
        if changed:
            return renamed
    return key
