"""The 80 object classes of COCO (Lin et al. 2014) by their ids, of which ten between 1 and 90 have no class."""

_LINES = """
1 person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant
13 stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe
27 backpack, umbrella
31 handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,\
 surfboard, tennis racket, bottle
46 wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut,\
 cake, chair, couch, potted plant, bed
67 dining table
70 toilet
72 tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator
84 book, clock, vase, scissors, teddy bear, hair drier, toothbrush
"""

COCO_CLASSES: dict[int, str] = {}
"""{category id: name}"""
for _line in _LINES.strip().splitlines():
    _first, _names = _line.split(" ", 1)
    COCO_CLASSES |= {int(_first) + i: name for i, name in enumerate(_names.split(", "))}
