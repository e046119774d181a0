"""Program: python -m models.train --arch scnet"""

import sys

from .command_line import run
from .config_files import starting_points
from .published_rows import print_rows
from .recipes import TrainConfig

EXAMPLES = [
    "{program} --arch scnet                                  the embedded data set (2 CPU cores: about 12 minutes)",
    "{program} --arch scnet --data my-coco --output runs/mine   train on your own folder in COCO layout",
    "{program} --arch htc --detector.no-interleaved          another detector, with an option of its own",
    "{program} --output runs/mine --resume                   continue after an interruption",
    "{program} --preset runs/mine/config.json --output runs/again   another run with the settings of that one",
    "{program} --list                                        the published detectors, with their AP, memory and speed",
    "{program} --preset scnet_r50_fpn_20e_coco --data coco --backbone-weights resnet50.pth   one of those, by its name",
]


def main(config: TrainConfig) -> None:
    from .training import train

    train(config)


if __name__ == "__main__":
    given = sys.argv[1:]
    if given == ["--list"]:
        print_rows()
    else:
        run(
            TrainConfig,
            main,
            examples=EXAMPLES,
            presets=starting_points,
        )
