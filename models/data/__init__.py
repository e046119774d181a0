"""Data: the generated default data set, readers of COCO's and VOC's folders, and the way to batches.

Names are looked up on first use, because drawing a data set, and asking for help, need no torch.
"""

import importlib

_HOME = {
    "AnnotatedImages": "dataset",
    "Augmentation": "transforms",
    "Batch": "batch",
    "BatchLoader": "loader",
    "CocoDataset": "coco",
    "JoinedImages": "joined",
    "PackedMasks": "batch",
    "PythonDataset": "python",
    "SceneSettings": "scene",
    "ShapesSettings": "shapes",
    "VocDataset": "voc",
    "default_dataset": "shapes",
    "evaluation_loader": "loader",
    "open_dataset": "layout",
    "training_loader": "loader",
    "write_dataset": "shapes",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
