"""Writes an annotation file of COCO train2017's size, to measure its reading: python scripts/coco_sized.py OUT.json

118,287 images, 860,000 annotations of 80 classes: 1% crowds as run lengths, the others 1 to 3 polygons of 4 to 43
points with two decimals, as in COCO. The same every time; 490 MB. The images themselves are not written.
"""

import argparse
import json
from pathlib import Path

import numpy as np

COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


def write(path: Path, images: int = 118_287, annotations: int = 860_000, classes: int = 80) -> None:
    """Writes the file piece by piece, so that the writer itself needs little memory."""
    random = np.random.default_rng(0)
    category_ids = COCO_IDS if classes == 80 else list(range(1, classes + 1))
    sizes = np.where(random.random(images)[:, None] < 0.6, (480, 640), (640, 427))
    image_of = np.sort(random.integers(0, images * 99 // 100, annotations))  # 1% of the images have no object
    random.shuffle(image_of)  # as in COCO, an image's annotations do not stand together
    with path.open("w") as file:
        entries = (
            {"id": i + 1, "file_name": f"{i + 1:012d}.jpg", "height": int(h), "width": int(w), "license": 1}
            for i, (h, w) in enumerate(sizes.tolist())
        )
        file.write('{"info": {}, "images": [' + ", ".join(map(json.dumps, entries)) + '], "annotations": [')
        for number in range(annotations):
            image = int(image_of[number])
            category = category_ids[int(random.integers(len(category_ids)))]
            entry = _annotation(random, number + 1, image + 1, category, *sizes[image].tolist())
            file.write((", " if number else "") + json.dumps(entry))
        categories = [{"id": key, "name": f"class {key}", "supercategory": "thing"} for key in category_ids]
        file.write('], "categories": ' + json.dumps(categories) + "}")


def _annotation(random: np.random.Generator, identity: int, image_id: int, category: int, height: int, width: int):
    x, y = random.random(2) * (width * 0.7, height * 0.7)
    w, h = 4 + random.random(2) ** 2 * (width - x - 4, height - y - 4)
    entry = {"iscrowd": 0, "image_id": image_id, "category_id": category, "id": identity, "area": round(w * h * 0.7, 4)}
    entry["bbox"] = np.round((x, y, w, h), 2).tolist()
    if random.random() < 0.01:
        left, columns, top, rows = int(x), int(w), int(y), int(h)
        counts = [left * height + top, *[rows, height - rows] * (columns - 1), rows]
        counts.append(height * width - sum(counts))
        return entry | {"iscrowd": 1, "segmentation": {"counts": counts, "size": [height, width]}}
    polygons = []
    for _ in range(1 + int(random.random() < 0.08) + int(random.random() < 0.02)):
        angle = np.sort(random.random(int(random.integers(4, 44)))) * 2 * np.pi
        radius = 0.5 + 0.5 * random.random(angle.size)
        points = np.stack([x + w / 2 * (1 + radius * np.cos(angle)), y + h / 2 * (1 + radius * np.sin(angle))], 1)
        polygons.append(np.round(points.reshape(-1), 2).tolist())
    return entry | {"segmentation": polygons}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--annotations", type=int, default=860_000)
    parser.add_argument("--classes", type=int, default=80)
    options = parser.parse_args()
    write(options.out, options.images, options.annotations, options.classes)
