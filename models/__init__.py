"""Lean instance-segmentation detectors on CascadeOps' operators.

    detector = models.build_detector("scnet", backbone="resnet50", num_classes=80, semantic=True)
    models.load_weights(detector, path_or_state_dict)
    result = models.predict(detector, image)
    classifier = models.scnet50(weights=path)     # so for every name in models.config_backbones.BACKBONES

    predictor = models.Predictor("weights.safetensors")   # the same with names, from files, folders and videos

Names are resolved on first use (PEP 562), so that `python -m models.train --help` answers without importing torch.
"""

import sys
from importlib import import_module
from types import ModuleType

from .config_backbones import BACKBONES

_HOME = {
    "build_classifier": ".classifiers",
    "build_detector": ".build",
    "load_detector": ".checkpoint",
    "load_weights": ".checkpoint",
    "save_weights": ".checkpoint",
    "predict": ".inference",
    "Predictor": ".predictor",
    "Result": ".results",
    "TrainConfig": ".recipes",
    "presets": ".recipes",
    "train": ".training",
    "Views": ".tta",
}
__all__ = sorted([*_HOME, *BACKBONES])


class _Package(ModuleType):
    """`models.train` and `models.predict` stay the functions when the programs of these names are imported, which
    Python would put in their place; `from models.train import main` is the way to those."""

    def __setattr__(self, name: str, value) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str):
    if name in BACKBONES:
        return import_module(".classifiers", __name__).classifier_function(name)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
