"""Draws the figures of docs/operators: python -m docs.figures. Results in them are computed by the operators."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

import cascadeops

FOLDER = Path(__file__).parent / "operators"
BLUE, ORANGE, GREY, LIGHT, INK = "#0072B2", "#E69F00", "#888888", "#dddddd", "#333333"


class Drawing:
    """An SVG on white paper (so that it can be read on a dark page, too), in units of its own."""

    def __init__(self, width: float, height: float, scale: float = 1):
        self.size, self.scale, self.parts = (width, height), scale, []

    def add(self, kind: str, content: str = "", **attributes) -> None:
        text = "".join(f' {name.replace("_", "-")}="{_short(value)}"' for name, value in attributes.items())
        self.parts.append(f"<{kind}{text}>{content}</{kind}>" if content else f"<{kind}{text}/>")

    def box(self, x1: float, y1: float, x2: float, y2: float, colour: str = INK, fill: str = "none", width=1.5, **more):
        """A rectangle by its corners."""
        scale = self.scale
        place = {"x": x1 * scale, "y": y1 * scale, "width": (x2 - x1) * scale, "height": (y2 - y1) * scale}
        self.add("rect", **place, stroke=colour, fill=fill, stroke_width=width, **more)

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str = LIGHT, width: float = 1, **more) -> None:
        scale = self.scale
        place = {"x1": x1 * scale, "y1": y1 * scale, "x2": x2 * scale, "y2": y2 * scale}
        self.add("line", **place, stroke=colour, stroke_width=width, **more)

    def dot(self, x: float, y: float, colour: str = INK, radius: float = 3) -> None:
        self.add("circle", cx=x * self.scale, cy=y * self.scale, r=radius, fill=colour)

    def text(self, x: float, y: float, words: str, colour: str = INK, size: int = 13, anchor: str = "middle") -> None:
        place = {"x": x * self.scale, "y": y * self.scale, "text_anchor": anchor}
        self.add("text", words, **place, fill=colour, font_size=size, font_family="sans-serif")

    def grid(self, x: float, y: float, columns: int, rows: int, cell: float = 1) -> None:
        for column in range(columns + 1):
            self.line(x + column * cell, y, x + column * cell, y + rows * cell)
        for row in range(rows + 1):
            self.line(x, y + row * cell, x + columns * cell, y + row * cell)

    def cells(self, x: float, y: float, values: Tensor, cell: float = 1, colour: str = BLUE) -> None:
        """values [rows, columns] in [0, 1] as opacities."""
        for row, column in product(*map(range, values.shape)):
            if values[row, column] > 0:
                left, top = x + column * cell, y + row * cell
                opacity = round(values[row, column].item(), 2)
                self.box(left, top, left + cell, top + cell, "none", colour, fill_opacity=opacity)
        self.grid(x, y, values.shape[1], values.shape[0], cell)

    def svg(self) -> str:
        width, height = (_short(side * self.scale) for side in self.size)
        paper = f'<rect width="{width}" height="{height}" fill="white"/>'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">'
        return "\n".join([head, paper, *self.parts, "</svg>"]) + "\n"


def _short(value) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def padded_nms() -> Drawing:
    boxes = torch.tensor(
        [[1.0, 1, 7, 6], [1.6, 1.5, 7.6, 6.5], [0.4, 1.8, 6.4, 6.8], [8.5, 3, 13, 8], [8.9, 3.4, 13.4, 8.4]]
    )
    boxes = torch.cat([boxes, boxes[3:4] + 0.25])
    scores, groups = torch.tensor([0.9, 0.8, 0.6, 0.7, 0.5, 0.6]), torch.tensor([0, 0, 0, 0, 0, 1])
    index, count = cascadeops.padded_nms(boxes[None], scores[None], groups[None], 0.5, 6)
    kept = set(index[0, : count.item()].tolist())
    drawing = Drawing(30, 10, 22)
    for shift, words in ((0, "candidates: two groups, by colour"), (15, "kept, with their scores")):
        for row, box in enumerate(boxes.tolist()):
            colour = (BLUE, ORANGE)[groups[row].item()]
            x1, y1, x2, y2 = box[0] + shift, box[1], box[2] + shift, box[3]
            if row in kept or not shift:
                drawing.box(x1, y1, x2, y2, colour, width=2.5 if shift else 1.5)
            else:
                drawing.box(x1, y1, x2, y2, LIGHT, stroke_dasharray="4 4")
            if shift and row in kept:
                words_at = (x1 + 0.3, y1 - 0.25) if groups[row] == 0 else (x2 - 1.5, y2 + 0.8)
                drawing.text(*words_at, f"{scores[row].item():.1f}", colour, anchor="start")
        drawing.text(shift + 7, 9.6, words)
    return drawing


def multiscale_roi_align() -> Drawing:
    drawing = Drawing(14, 9, 40)
    x1, y1, x2, y2, bins, samples = 2.55, 1.75, 11.55, 7.15, 3, 2
    drawing.grid(0.5, 0.5, 13, 8)
    wide, high = (x2 - x1) / bins, (y2 - y1) / bins
    for row, column in product(range(bins), repeat=2):
        left, top = x1 + column * wide, y1 + row * high
        drawing.box(left, top, left + wide, top + high, BLUE, width=2)
        for i, j in product(range(samples), repeat=2):
            drawing.dot(left + (j + 0.5) * wide / samples, top + (i + 0.5) * high / samples, BLUE)
    drawing.box(x1, y1, x2, y2, BLUE, width=4)
    sample_x, sample_y = x1 + wide / 4, y1 + high / 4
    for x, y in product((int(sample_x), int(sample_x) + 1), (int(sample_y), int(sample_y) + 1)):
        drawing.line(sample_x, sample_y, x, y, ORANGE, 2)  # cells' centres have whole coordinates here
        drawing.dot(x, y)
    drawing.dot(sample_x, sample_y, ORANGE, 5)
    return drawing


def paste_masks() -> Drawing:
    probs = _disc(7)
    box = torch.tensor([[3.3, 1.6, 19.8, 13.1]])
    mask = cascadeops.paste_masks(probs[None], box, (15, 23))[0]
    drawing = Drawing(36, 17, 20)
    drawing.cells(0.5, 4.5, probs, 1)
    drawing.text(4, 13, "probs")
    drawing.line(8.2, 8, 10.6, 8, GREY, 2)
    drawing.text(9.4, 7.5, "paste", GREY)
    drawing.cells(12, 0.5, mask.float())
    x1, y1, x2, y2 = box[0].tolist()
    drawing.box(12 + x1, 0.5 + y1, 12 + x2, 0.5 + y2, ORANGE, width=3)
    drawing.text(23.5, 16.6, "image, with the box")
    return drawing


def paste_masks_rle() -> Drawing:
    from pycocotools import mask as mask_api

    height, width = 6, 9
    box = torch.tensor([[1.2, 0.4, 7.9, 5.8]])
    (encoded,) = cascadeops.paste_masks_rle(_disc(7)[None], box, (height, width))
    mask = torch.from_numpy(mask_api.decode(encoded))
    runs = torch.unique_consecutive(torch.cat([torch.tensor([0]), mask.T.flatten()]), return_counts=True)[1].tolist()
    runs[0] -= 1  # the leading zero above makes sure that the first run counts pixels outside
    drawing = Drawing(21, 8.4, 34)
    drawing.cells(0.5, 0.8, mask.float())
    for column in range(width):
        drawing.line(1 + column, 1.0, 1 + column, 6.5, GREY, 1.2)
        drawing.add("path", d=_arrow(drawing.scale, 1 + column, 6.5), fill=GREY)
    drawing.text(5, 7.8, "down every column in turn")
    left = 10.6
    for place, run in enumerate(runs):
        end = left + 0.11 * run + 0.27
        drawing.box(left, 3, end, 4, INK, BLUE if place % 2 else "white", 1)
        drawing.text((left + end) / 2, 2.7, str(run), BLUE if place % 2 else INK, 12)
        left = end
    drawing.text(15.6, 5, "runs: pixels outside, inside, outside ...")
    return drawing


def mask_targets() -> Drawing:
    height, width, size = 14, 20, 7
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    image = (((rows - 7) / 5.2) ** 2 + ((columns - 9) / 7.3) ** 2 <= 1).to(torch.uint8)
    windows, box = torch.tensor([[0, 0, width, height]], dtype=torch.int32), torch.tensor([[7.0, 3, 19, 13]])
    target = cascadeops.mask_targets(image.flatten(), torch.tensor([0]), windows, box, torch.tensor([0]), size)[0]
    drawing = Drawing(34, 16.5, 20)
    drawing.cells(0.5, 0.5, image.float())
    x1, y1, x2, y2 = (box[0] + 0.5).tolist()
    drawing.box(x1, y1, x2, y2, ORANGE, width=3)
    drawing.text(10.5, 15.8, "object, and the region's box")
    drawing.cells(24, 3.5, target.float())
    drawing.text(27.5, 12, "target")
    return drawing


def deform_conv2d() -> Drawing:
    drawing = Drawing(22, 9.4, 36)
    moved = (
        (-0.9, -0.7),
        (-0.5, -0.3),
        (-1, 0.6),
        (0.3, -0.9),
        (0.2, 0.2),
        (-0.3, 1),
        (1.2, -0.6),
        (0.7, 0.3),
        (1, 1.3),
    )
    for shift, words in (
        (0, "convolution: nine taps of one output pixel"),
        (11, "deformable: each moved by its offset"),
    ):
        drawing.grid(0.5 + shift, 0.5, 10, 8)
        for (y, x), (down, right) in zip(product((3, 4, 5), (5, 6, 7)), moved, strict=True):
            x += shift
            if shift:
                drawing.line(x, y, x + right, y + down, GREY, 1.5)
                drawing.dot(x, y, GREY)
                drawing.dot(x + right, y + down, ORANGE, 6)
            else:
                drawing.dot(x, y, BLUE, 6)
        drawing.text(5.5 + shift, 9.1, words)
    return drawing


def box_proposals() -> Drawing:
    anchors = [
        torch.tensor([[1.0, 1, 4, 4], [2, 2, 5, 5], [7, 4.5, 10, 7.5], [0.5, 5.5, 3.5, 8.5], [8.5, 1, 11.5, 4]]),
        torch.tensor([[0.0, 0, 6, 6], [4.5, 1.5, 10.5, 7.5], [6, 3, 12, 9]]),
    ]
    logits = [torch.tensor([[2.0, 1.5, 1.8, -2.5, 0.6]]), torch.tensor([[-1.0, 1.6, 1.2]])]
    deltas = [
        torch.tensor([[[0.2, 0.1, 0.1, 0.1], [-0.05, -0.1, 0.2, 0.1], [0.1, 0, 0, 0.2], [0] * 4, [0.3, 0, 0.2, 0.1]]]),
        torch.tensor([[[0.0] * 4, [0.15, 0.05, 0, 0.1], [0.05, -0.05, 0.1, 0]]]),
    ]
    height, width = 9, 12

    def proposals(iou_threshold: float) -> list[list[float]]:
        result = cascadeops.box_proposals(logits, deltas, anchors, torch.tensor([[height, width]]), 4, 8, iou_threshold)
        return result[0][0, : result[2].item()].tolist()

    chosen = [level[rows[0] > -1.5] for level, rows in zip(anchors, logits, strict=True)]
    everything, kept = proposals(1.0), proposals(0.5)
    drawing = Drawing(43, 11.5, 20)
    for column, words in enumerate(
        ("top-k anchors of each level", "moved, scaled, clipped", "NMS in each level, the best")
    ):
        left = 1 + 14 * column
        drawing.box(left, 0.8, left + width, 0.8 + height, LIGHT, width=3)
        drawing.text(left + width / 2, 11, words)
        boxes = [box for level in chosen for box in level.tolist()] if column == 0 else everything
        for box in sorted(boxes, key=lambda box: box in kept):
            colour = BLUE if box[2] - box[0] < 4.4 else ORANGE
            style = {"colour": colour, "width": 2.5}
            if column == 2 and box not in kept:
                style = {"colour": LIGHT, "stroke_dasharray": "4 4"}
            drawing.box(left + box[0], 0.8 + box[1], left + box[2], 0.8 + box[3], **style)
    return drawing


def match_boxes() -> Drawing:
    gt_boxes = torch.tensor([[3.0, 2, 9, 8], [14.0, 3, 19, 6]])
    anchors = torch.tensor(
        [
            [3.3, 1.6, 9.3, 7.6],
            [1.6, 2.8, 7.6, 8.8],
            [6.5, 5, 12.5, 11],
            [13, 1.5, 18, 6.5],
            [20, 1, 25, 6],
            [0.5, 7, 4, 11],
        ]
    )
    result = cascadeops.match_boxes(
        anchors[None],
        torch.ones(1, 6, dtype=torch.bool),
        gt_boxes[None],
        torch.ones(1, 2, dtype=torch.bool),
        0.7,
        0.3,
        0.3,
    )[0].tolist()
    drawing = Drawing(27, 13.2, 26)
    for box in gt_boxes.tolist():
        drawing.box(*box, "none", LIGHT)
    for box, match in zip(anchors.tolist(), result, strict=True):
        colour, dashes = {-1: (GREY, "2 4"), -2: (ORANGE, "7 4")}.get(match, (BLUE, "none"))
        drawing.box(*box, colour, width=2.5, stroke_dasharray=dashes)
    legend = (("ground truth", LIGHT, "none"), ("positive", BLUE, "none"), ("ignored", ORANGE, "7 4"))
    for place, (words, colour, dashes) in enumerate((*legend, ("negative", GREY, "2 4"))):
        left = 1 + 6.2 * place
        drawing.box(left, 12, left + 1, 12.7, colour, LIGHT if place == 0 else "none", 2.5, stroke_dasharray=dashes)
        drawing.text(left + 1.4, 12.6, words, anchor="start")
    return drawing


def self_calibrated_gate() -> Drawing:
    drawing = Drawing(32, 9.6, 26)
    drawing.box(11.6, 0.7, 26.2, 9.2, ORANGE, "#fdf6e8", 2, stroke_dasharray="7 4")
    drawing.text(22.2, 8.8, "self_calibrated_gate", ORANGE)
    places = {
        "x": (1.6, 5),
        "k3: convolution": (7, 1.9),
        "k2: pool, convolution": (6.6, 7.5),
        "nearest upsample": (14.6, 7.5),
        "+": (18.6, 5),
        "sigmoid": (21.3, 5),
        "*": (24.6, 1.9),
        "k4: convolution": (29.2, 1.9),
    }
    flows = (
        "x>k3: convolution",
        "x>k2: pool, convolution",
        "k2: pool, convolution>nearest upsample",
        "nearest upsample>+",
    )
    for flow in (*flows, "x>+", "+>sigmoid", "sigmoid>*", "k3: convolution>*", "*>k4: convolution"):
        (x1, y1), (x2, y2) = (places[name] for name in flow.split(">"))
        drawing.line(x1, y1, x2, y2, GREY, 2)
    for name, (x, y) in places.items():
        half = 0.4 + 0.13 * len(name)
        drawing.box(x - half, y - 0.65, x + half, y + 0.65, INK, "white", rx=5)
        drawing.text(x, y + 0.2, name)
    return drawing


def preprocess() -> Drawing:
    images = [torch.full((6, 9, 3), 255, dtype=torch.uint8), torch.full((8, 5, 3), 255, dtype=torch.uint8)]
    batch, sizes = cascadeops.preprocess(images, resize=(8, 10), mean=(0, 0, 0), std=(255, 255, 255), divisor=4)
    drawing = Drawing(42, 15.5, 18)
    for left, image, colour in zip((0.5, 11), images, (BLUE, ORANGE), strict=True):
        drawing.cells(left, 2.5, image[..., 0].float() / 255, 1, colour)
    drawing.text(8.5, 14.8, "uint8 images")
    drawing.line(17, 6, 19.5, 6, GREY, 2)
    for left, image, size, colour in zip((20.5, 31.5), batch, sizes.tolist(), (BLUE, ORANGE), strict=True):
        drawing.cells(left, 0.5, image[0], 0.8, colour)
        drawing.text(left + 4.5, 13.2, f"{size[0]} x {size[1]}", colour)
    drawing.text(30.5, 14.8, "one batch, padded with 0, and the sizes")
    return drawing


def polygon_mask_targets() -> Drawing:
    polygon = torch.tensor([[2.0, 2], [9, 1], [17.5, 5], [13.5, 7.5], [16, 12], [8, 10], [3, 12.5]])
    box, whole = torch.tensor([[7.0, 3, 19, 13]]), torch.tensor([0])
    offsets = torch.tensor([0, len(polygon)]), torch.tensor([0, 1])
    target = cascadeops.polygon_mask_targets(polygon, *offsets, box, whole, 7)[0]
    drawing = Drawing(34, 16.5, 20)
    outline = " ".join(f"{(x + 0.5) * 20:g},{(y + 0.5) * 20:g}" for x, y in polygon.tolist())
    drawing.add("polygon", points=outline, fill=BLUE, fill_opacity=0.35, stroke=BLUE, stroke_width=2)
    for x, y in polygon.tolist():
        drawing.dot(x + 0.5, y + 0.5, BLUE, 4)
    x1, y1, x2, y2 = (box[0] + 0.5).tolist()
    drawing.box(x1, y1, x2, y2, ORANGE, width=3)
    drawing.text(10.5, 15.8, "polygon, and the region's box")
    drawing.cells(24, 3.5, target.float())
    drawing.text(27.5, 12, "target")
    return drawing


def _disc(side: int) -> Tensor:
    """Probabilities [side, side] that fall off from the middle."""
    place = torch.arange(side) - (side - 1) / 2
    distance = (place[:, None] ** 2 + place**2).sqrt()
    return torch.sigmoid((side / 2.4 - distance) * 2.5)


def _arrow(scale: float, x: float, y: float) -> str:
    """A small head that points down."""
    x, y = x * scale, y * scale
    return f"M{x - 4:.1f} {y - 4:.1f} L{x + 4:.1f} {y - 4:.1f} L{x:.1f} {y + 4:.1f} Z"


FIGURES: list[Callable[[], Drawing]] = [
    box_proposals,
    deform_conv2d,
    mask_targets,
    match_boxes,
    multiscale_roi_align,
    padded_nms,
    paste_masks,
    paste_masks_rle,
    polygon_mask_targets,
    preprocess,
    self_calibrated_gate,
]

if __name__ == "__main__":
    for figure in FIGURES:
        (FOLDER / f"{figure.__name__}.svg").write_text(figure().svg())
