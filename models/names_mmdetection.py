"""Names of mmdetection's weights (2.x and 3.x) -> ours, for every detector."""

from __future__ import annotations

import re

from . import names_backbones

# Regular expression and replacement, tried from above: the first that matches renames. Where mmdetection has one head
# for each stage its names hold the stage's number, and ours are in the plural.
RULES = [
    (r"^neck\.lateral_convs\.(\d+)\.conv\.", r"fpn.lateral_convs.\1."),
    (r"^neck\.fpn_convs\.(\d+)\.conv\.", r"fpn.output_convs.\1."),
    (r"^rpn_head\.rpn_conv\.", "rpn.conv."),
    (r"^rpn_head\.rpn_cls\.", "rpn.objectness."),
    (r"^rpn_head\.rpn_reg\.", "rpn.deltas."),
    (r"^roi_head\.bbox_head\.(\d+)\.", r"box_heads.\1."),
    (r"^roi_head\.bbox_head\.", "box_head."),
    (r"^roi_head\.mask_head\.(\d+)\.", r"mask_heads.\1."),
    (r"^roi_head\.mask_head\.", "mask_head."),
    (r"^roi_head\.semantic_head\.", "semantic_head."),
    (r"^roi_head\.glbctx_head\.", "global_context_head."),
    (r"^roi_head\.feat_relay_head\.", "feature_relay."),
]

# Inside a head, whatever its name.
HEAD_RULES = [
    (r"^(box_heads?\b.*)\.shared_fcs\.0\.", r"\1.fc1."),
    (r"^(box_heads?\b.*)\.shared_fcs\.1\.", r"\1.fc2."),
    (r"^(box_heads?\b.*)\.fc_cls\.", r"\1.class_logits."),
    (r"^(box_heads?\b.*)\.fc_reg\.", r"\1.deltas."),
    # SCNet's blocks of two convolutions; HTC's semantic head has plain ones in their place.
    (r"^(mask|semantic|global_context)_head\.convs\.(\d+)\.(conv[12])\.", r"\1_head.blocks.\2.\3."),
    (r"^semantic_head\.convs\.(\d+)\.conv\.", r"semantic_head.blocks.\1."),
    (r"^semantic_head\.lateral_convs\.(\d+)\.conv\.", r"semantic_head.lateral_convs.\1."),
    (r"^semantic_head\.conv_embedding\.conv\.", "semantic_head.embedding."),
    (r"^(mask_heads?\b.*|mask_head)\.convs\.(\d+)\.conv\.", r"\1.convs.\2."),
    (r"^(mask_heads?\b.*)\.conv_res\.conv\.", r"\1.previous."),
    (r"^((?:mask_heads?|semantic_head)\b.*)\.conv_logits\.", r"\1.logits."),
]


def rename(key: str) -> str:
    """Our name of the tensor that mmdetection calls `key`; a name that no rule knows stays as it is."""
    if key.startswith("backbone."):
        return names_backbones.from_mmdetection(key)
    return _first(HEAD_RULES, _first(RULES, key))


def _first(rules: list[tuple[str, str]], key: str) -> str:
    for pattern, replacement in rules:
        renamed, changed = re.subn(pattern, replacement, key)
        if changed:
            return renamed
    return key
