"""Program: python -m models.train --arch scnet"""

from .command_line import run
from .recipes import PRESETS, TrainConfig

EXAMPLES = [
    "{program} --arch scnet                                  the embedded data set (2 CPU cores: about 12 minutes)",
    "{program} --arch scnet --data my-coco --output runs/mine   train on your own folder in COCO layout",
    "{program} --arch scnet --output runs/mine --resume      continue after an interruption",
    "{program} --preset coco --data coco --backbone-weights resnet50.pth   the published ResNet-50 recipe",
]


def main(config: TrainConfig) -> None:
    from .training import train

    train(config)


if __name__ == "__main__":
    run(TrainConfig, main, examples=EXAMPLES, presets=PRESETS)
