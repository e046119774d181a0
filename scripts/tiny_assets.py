"""Makes the files that ship in models/assets from a finished run of the preset:

    python -m models.train --preset tiny
    python scripts/tiny_assets.py runs/scnet-tiny/weights.safetensors

tiny.safetensors is the run's weights file in float16; sample.png is a drawn picture of a seed that no data set uses.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

SEED = 20267
"""Of sample.png; data sets are drawn from [seed, split, index]."""
LARGEST = 4_000_000
"""Bytes that the weights file may have."""


def main(weights: Path) -> None:
    import models
    from models.data.scene import SceneSettings, draw_scene

    folder = ROOT / "models" / "assets"
    folder.mkdir(exist_ok=True)
    detector, facts = models.load_detector(weights)
    path = folder / "tiny.safetensors"
    models.save_weights(path, detector, facts["class_names"], facts["category_ids"], facts["extra"], half=True)
    scene = draw_scene(np.random.default_rng(SEED), 160, 192, SceneSettings())
    Image.fromarray(scene.image).save(folder / "sample.png", optimize=True)
    for file in (path, folder / "sample.png"):
        print(f"{file}: {file.stat().st_size:,} bytes")
    if path.stat().st_size > LARGEST:
        sys.exit(f"{path} is larger than {LARGEST:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
