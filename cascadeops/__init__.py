"""Detection and segmentation operators for PyTorch: RoIAlign, NMS, mask pasting, as CPU and CUDA kernels."""

import torch  # noqa: F401  (first: libc10 must be loaded before a binary of ours)

from cascadeops._binary import load as _load

_load()

__version__ = "0.1.0"
