"""One picture of the generated data set: which things stand where, what hides what, and the drawing of it.

The scene is decided before it is painted: a thing of which too little would be seen is taken out, so that nothing
is visible without being annotated.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from . import figures
from .materials import MATERIALS, paint_material, paint_skin, smooth_noise

FIGURES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "ball": figures.disc,
    "buoy": figures.disc,
    "star": figures.star,
    "starfish": figures.star,
    "ring": figures.ring,
    "frame": figures.frame,
    "cross": figures.cross,
    "crescent": figures.crescent,
}
CLASSES = tuple(FIGURES)
GROUND_OF = {"ball": "grass", "buoy": "water", "star": "tiles", "starfish": "sand"}
"""Pairs of one and the same figure, which only the material around them tells apart."""

UNLABELLED = 255


@dataclass(frozen=True)
class SceneSettings:
    """What a scene is drawn from. Lengths are in pixels of a picture of 160 x 192 and grow with the picture."""

    things: tuple[int, int] = (3, 8)
    """How many things are placed, at least and at most; those that others hide are taken out afterwards."""
    radius: tuple[float, float] = (12.0, 50.0)
    """Smallest and largest radius of a thing, uniform in the logarithm."""
    min_visible_share: float = 0.35
    """A thing is taken out when less than this share of it is seen (the picture's border hides, too)."""
    min_visible_area: int = 40
    """... or fewer pixels than this."""
    sticks: int = 2
    """At most so many thin sticks, which are no class, cross the picture and cut masks into parts."""
    crowd_share: float = 0.04
    """Share of pictures with a group of small things that is annotated as a crowd."""
    noise: float = 6.0
    """Standard deviation of the camera noise, in grey levels."""

    def __post_init__(self) -> None:
        if not 1 <= self.things[0] <= self.things[1]:
            raise ValueError(f"scene: things must be (least, most) with 1 <= least <= most, got {self.things}")
        if not 2 <= self.radius[0] <= self.radius[1]:
            raise ValueError(f"scene: radius must be (least, most) with 2 <= least <= most, got {self.radius}")


@dataclass(frozen=True)
class Annotated:
    """A thing, or a crowd of them, with the mask of what is seen of it."""

    label: int
    mask: np.ndarray  # bool [H, W]
    crowd: bool = False


@dataclass(frozen=True)
class Scene:
    image: np.ndarray  # uint8 [H, W, 3] RGB
    semantic: np.ndarray  # uint8 [H, W]: label of the thing, len(CLASSES) + index of the material, or UNLABELLED
    things: list[Annotated]


@dataclass
class _Body:
    """Something solid: where it is, and its distance field over the window of pixels that it may cover."""

    label: int | None  # None: a stick
    top: int  # row and column of the window's first pixel; the window lies inside the picture
    left: int
    distance: np.ndarray  # [h, w] pixels, negative inside
    u: np.ndarray  # [h, w] the body's own coordinates, pixels
    v: np.ndarray
    area: int  # pixels of the whole body, the part beyond the picture's border included
    crowd: bool = False
    visible: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # bool [h, w]

    def window(self) -> tuple[slice, slice]:
        height, width = self.distance.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


def draw_scene(random: np.random.Generator, height: int, width: int, settings: SceneSettings) -> Scene:
    """A random scene. The same state of `random`, size and settings give the same scene."""
    unit = np.sqrt(height * width / (160 * 192))
    ground, names = _ground(random, height, width)
    bodies = _place(random, ground, names, settings, unit)
    bodies = _without_hidden(bodies, height, width, settings)

    image, semantic = _paint_ground(random, ground, names)
    for body in bodies:
        _paint_body(random, image, semantic, body)
    image += smooth_noise(random, height, width, 0.6 * max(height, width))[..., None] * 14  # uneven light
    image += settings.noise * random.standard_normal(image.shape, np.float32)

    things, crowd = [], np.zeros((height, width), bool)
    crowd_label = next((body.label for body in bodies if body.crowd), None)
    for body in bodies:
        if body.label is None:
            continue
        mask = np.zeros((height, width), bool)
        mask[body.window()] = body.visible
        if body.crowd:
            crowd |= mask
        else:
            things.append(Annotated(body.label, mask))
    if crowd_label is not None:
        things.append(Annotated(crowd_label, crowd, crowd=True))
    return Scene(np.clip(image + 0.5, 0, 255).astype(np.uint8), semantic, things)


def _ground(random: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, list[str]]:
    """Regions of two or three materials with winding borders: region index uint8 [H, W], and each region's material."""
    count = int(random.integers(2, 4))
    names = [str(name) for name in random.choice(MATERIALS, count, replace=False)]
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    bend = 0.12 * max(height, width)
    cost = []
    for _ in names:
        seed_y, seed_x = random.uniform(0.1, 0.9, 2) * (height, width)
        cost.append(
            np.hypot(y - seed_y, x - seed_x) + bend * smooth_noise(random, height, width, 0.25 * max(height, width))
        )
    return np.argmin(cost, axis=0).astype(np.uint8), names


def _paint_ground(random: np.random.Generator, ground: np.ndarray, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    image = np.zeros((*ground.shape, 3), np.float32)
    semantic = np.zeros(ground.shape, np.uint8)
    for region, name in enumerate(names):
        inside = ground == region
        image[inside] = paint_material(name, random, *ground.shape)[inside]
        semantic[inside] = len(CLASSES) + MATERIALS.index(name)
    return image, semantic


def _place(
    random: np.random.Generator, ground: np.ndarray, names: list[str], settings: SceneSettings, unit: float
) -> list[_Body]:
    """Bodies from back to front."""
    bodies = []
    wanted = int(random.integers(settings.things[0], settings.things[1] + 1))
    weights = np.array([1.0 if GROUND_OF.get(name, names[0]) in names else 0.0 for name in CLASSES])
    weights *= [1.8 if name in GROUND_OF else 1.0 for name in CLASSES]  # their material is often missing
    for label in random.choice(len(CLASSES), wanted, p=weights / weights.sum()):
        radius = unit * np.exp(random.uniform(*np.log(settings.radius)))
        body = _try_place(random, int(label), radius, ground, names)
        if body is not None:
            bodies.append(body)
    if random.random() < settings.crowd_share:
        bodies += _crowd(random, ground, names, unit)
    for _ in range(int(random.integers(0, settings.sticks + 1))):
        bodies.insert(int(random.integers(0, len(bodies) + 1)), _stick(random, *ground.shape, unit))
    return bodies


def _try_place(
    random: np.random.Generator, label: int, radius: float, ground: np.ndarray, names: list[str]
) -> _Body | None:
    """A thing at a random place; None when no try found the ground that its class needs."""
    height, width = ground.shape
    needed = GROUND_OF.get(CLASSES[label])
    for _ in range(25):
        y, x = random.uniform(0, height), random.uniform(0, width)
        if needed is None:
            return _thing(random, label, y, x, radius, height, width)
        rows = slice(max(int(y - 1.4 * radius), 0), int(y + 1.4 * radius) + 1)
        columns = slice(max(int(x - 1.4 * radius), 0), int(x + 1.4 * radius) + 1)
        if needed in names and (ground[rows, columns] == names.index(needed)).mean() > 0.85:
            return _thing(random, label, y, x, radius, height, width)
        radius = max(0.93 * radius, 10)  # a smaller one finds a place sooner
    return None


def _thing(
    random: np.random.Generator, label: int, y: float, x: float, radius: float, height: int, width: int
) -> _Body:
    angle, stretch = random.uniform(0, 2 * np.pi), random.uniform(0.85, 1.0)
    reach = int(np.ceil(radius)) + 2
    rows = np.arange(int(y) - reach, int(y) + reach + 1)
    columns = np.arange(int(x) - reach, int(x) + reach + 1)
    dy, dx = (rows + 0.5 - y)[:, None], (columns + 0.5 - x)[None]
    u = np.cos(angle) * dx + np.sin(angle) * dy
    v = np.cos(angle) * dy - np.sin(angle) * dx
    distance = FIGURES[CLASSES[label]](u / radius, v / (radius * stretch)) * (radius * stretch)
    area = int(np.count_nonzero(distance < 0))
    inside = np.ix_((rows >= 0) & (rows < height), (columns >= 0) & (columns < width))
    top, left = max(int(rows[0]), 0), max(int(columns[0]), 0)
    return _Body(label, top, left, distance[inside], u[inside], v[inside], area)


def _crowd(random: np.random.Generator, ground: np.ndarray, names: list[str], unit: float) -> list[_Body]:
    """Many small things of one class, close together."""
    height, width = ground.shape
    label = int(random.integers(len(GROUND_OF), len(CLASSES)))
    y, x = random.uniform(0.2, 0.8, 2) * (height, width)
    spread = 22 * unit
    bodies = []
    for _ in range(int(random.integers(9, 16))):
        cy, cx = np.clip(random.normal((y, x), spread), 4, (height - 4, width - 4))
        bodies.append(_thing(random, label, cy, cx, unit * random.uniform(6, 9), height, width))
        bodies[-1].crowd = True
    return bodies


def _stick(random: np.random.Generator, height: int, width: int, unit: float) -> _Body:
    """A thin straight stick across part of the picture."""
    y, x = random.uniform(0.1, 0.9, 2) * (height, width)
    angle, half_length = random.uniform(0, np.pi), random.uniform(30, 75) * unit
    half_width = random.uniform(1.2, 2.5) * unit
    dy, dx = (np.arange(height) + 0.5 - y)[:, None], np.arange(width) + 0.5 - x
    u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
    distance = np.maximum(np.abs(u) - half_length, np.abs(v) - half_width)
    return _Body(None, 0, 0, distance, u, v, int(np.count_nonzero(distance < 0)))


def _without_hidden(bodies: list[_Body], height: int, width: int, settings: SceneSettings) -> list[_Body]:
    """The bodies of which enough is seen. Taking one out uncovers others, so this repeats until none has to go."""
    while True:
        owner = np.full((height, width), -1, np.int16)
        for index, body in enumerate(bodies):
            owner[body.window()][body.distance < 0] = index
        kept = []
        for index, body in enumerate(bodies):
            body.visible = owner[body.window()] == index
            seen = np.count_nonzero(body.visible)
            enough = seen >= max(settings.min_visible_area, settings.min_visible_share * body.area)
            if body.label is None or body.crowd or enough:
                kept.append(body)
        if len(kept) == len(bodies):
            return bodies
        bodies = kept


def _paint_body(random: np.random.Generator, image: np.ndarray, semantic: np.ndarray, body: _Body) -> None:
    if not body.distance.size:
        return
    window = body.window()
    near = body.distance < 1
    if not near.any():
        return
    behind = image[window][near].mean(0)
    skin = paint_skin(random, body.u, body.v, behind)
    rim = np.clip(1.6 + body.distance, 0, 1)[..., None] * 0.45  # the last pixel and a half inside is darker
    cover = np.clip(0.5 - body.distance, 0, 1).astype(np.float32)[..., None]  # share of the pixel: a smooth edge
    image[window] += cover * (skin * (1 - rim) - image[window])
    semantic[window][body.distance < 0] = UNLABELLED if body.label is None else body.label
