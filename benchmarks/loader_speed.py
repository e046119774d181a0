"""How many images a second one core reads and prepares for training: python -m benchmarks.loader_speed [--data DIR]

Each row is one part of the work, on the same images, in rounds that take turns; the loaders do all of it. Counted are
seconds of the processor and not of the clock, so that other programs on the machine matter little.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from models.data import Augmentation, ShapesSettings, open_dataset, training_loader, write_dataset
from models.data.dataset import AnnotatedImages
from models.images import read_image


class First:
    """The first images of a data set."""

    def __init__(self, dataset: AnnotatedImages, count: int) -> None:
        self._dataset, self.sizes = dataset, dataset.sizes[:count]

    def __len__(self) -> int:
        return len(self.sizes)

    def __getattr__(self, name: str):
        return getattr(self._dataset, name)


def measure(folder: Path, split: str, images: int, rounds: int, resize: tuple[int, int] | None) -> dict[str, float]:
    """Images for a second of one core, by the part of the work: the median of the rounds."""
    dataset = First(open_dataset(folder, split, semantic="no"), images)
    indices = range(len(dataset))
    paths = [dataset.image_folder / dataset.image_info(index).file_name for index in indices]
    files = [path.read_bytes() for path in paths]
    augmentation = Augmentation()

    def sample(index, resize_image_too=True):
        return dataset.sample(index, resize, augmentation, np.random.default_rng(index), resize_image_too)

    def loader(raw):
        return training_loader(dataset, 2, seed=0, resize=resize, augmentation=augmentation, raw=raw)

    parts = {
        "decode, simplejpeg alone": lambda: [_decode(data) for data in files],
        "read_image": lambda: [read_image(path, upright=False) for path in paths],
        "masks at the image's size": lambda: [
            dataset.mask(index, which) for index in indices for which in range(len(dataset.objects(index)[0]))
        ],
        "sample: image, masks, resize, flip": lambda: [sample(index) for index in indices],
        "training_loader (for a CPU)": lambda: [None for _ in loader(raw=False)],
        "sample, raw: image, masks, flip": lambda: [sample(index, False) for index in indices],
        "training_loader, raw (for a GPU)": lambda: [None for _ in loader(raw=True)],
    }
    loaded = 2 * -(-len(dataset) // 2)  # the last batch is filled up with images from the start
    counts = {name: loaded if "loader" in name else len(indices) for name in parts}
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        for name, work in parts.items():
            start = time.process_time()
            work()
            times[name].append(time.process_time() - start)
    return {name: counts[name] / statistics.median(seconds) for name, seconds in times.items()}


def _decode(data: bytes) -> None:
    import simplejpeg

    simplejpeg.decode_jpeg(data, "RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="COCO or VOC folder; default: 40 generated pictures of 480 x 640")
    parser.add_argument("--split", default="train")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--resize", type=int, nargs=2, default=(800, 1333), metavar=("SHORT", "LONG"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.data or Path(temporary) / "shapes"
        if options.data is None:
            write_dataset(folder, ShapesSettings(train=40, val=1, size=(480, 640)), workers=1, quiet=True)
        speeds = measure(folder, options.split, options.images, options.rounds, tuple(options.resize))
    for name, speed in speeds.items():
        print(f"{name:<36} {speed:8.0f} images/s   {1000 / speed:6.2f} ms")


if __name__ == "__main__":
    main()
