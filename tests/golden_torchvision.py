"""What torchvision's Mask R-CNN finds with mmdetection's golden weights: tests/goldens/torchvision_mask_rcnn.npz.

python tests/golden_torchvision.py     makes the file anew; needs torchvision (it was 0.26.0, with torch 2.11)
"""

from pathlib import Path

import numpy as np
import torch
from golden_cases import CASES, golden_state, load_golden
from weight_files import to_torchvision

CONFIG = "mask_rcnn_r50_fpn_1x"
FILE = Path(__file__).parent / "goldens" / "torchvision_mask_rcnn.npz"


def torchvision_state() -> dict[str, torch.Tensor]:
    """The golden weights as torchvision would have written them."""
    return to_torchvision(golden_state(CONFIG))


def golden_image() -> np.ndarray:
    case = next(case for case in CASES if case.config == CONFIG)
    return load_golden("infer", case)["image_rgb"]


def main() -> None:
    import torchvision
    from torchvision.ops import FrozenBatchNorm2d

    image = golden_image()
    detector = torchvision.models.detection.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=81, min_size=min(image.shape[:2])
    ).eval()
    norms = [(name, module) for name, module in detector.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for name, module in norms:  # as the published weights' detector has them
        detector.get_submodule(name.rpartition(".")[0])._modules[name.rpartition(".")[2]] = FrozenBatchNorm2d(
            module.num_features, eps=0.0
        )
    detector.load_state_dict(torchvision_state())
    with torch.inference_mode():
        (found,) = detector([torch.from_numpy(image).permute(2, 0, 1).float() / 255])
    masks = np.packbits(found["masks"][:, 0].numpy() > 0.5, axis=-1)
    arrays = {key: found[key].numpy() for key in ("boxes", "scores", "labels")}
    np.savez_compressed(FILE, masks=masks, **arrays)
    print(len(found["scores"]), "detections, scores", found["scores"][:3].tolist(), "...", found["scores"][-1].item())


if __name__ == "__main__":
    main()
