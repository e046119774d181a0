"""Program: python -m models.train --arch scnet"""

import sys

from .command_line import given_value, run
from .config import DETECTOR_CONFIGS
from .recipes import TrainConfig, presets

EXAMPLES = [
    "{program} --arch scnet                                  the embedded data set (2 CPU cores: about 12 minutes)",
    "{program} --arch scnet --data my-coco --output runs/mine   train on your own folder in COCO layout",
    "{program} --arch htc --detector.no-interleaved          another detector, with an option of its own",
    "{program} --arch scnet --output runs/mine --resume      continue after an interruption",
    "{program} --preset coco --data coco --backbone-weights resnet50.pth   the published ResNet-50 recipe",
]


def main(config: TrainConfig) -> None:
    from .training import train

    train(config)


if __name__ == "__main__":
    arch = given_value("arch", sys.argv[1:])
    run(TrainConfig, main, examples=EXAMPLES, presets=presets(arch if arch in DETECTOR_CONFIGS else TrainConfig.arch))
