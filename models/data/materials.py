"""Textures of the generated data set: background materials (the "stuff" classes) and the skin of objects.

A material is told by its texture: its colour is drawn from wide, overlapping ranges. All images are float32
[height, width, 3], RGB in 0..255.
"""

import colorsys

import numpy as np

MATERIALS = ("water", "grass", "sand", "tiles")


def _colour(
    random: np.random.Generator, hue: tuple[float, float], saturation: tuple[float, float], value: tuple[float, float]
):
    rgb = colorsys.hsv_to_rgb(random.uniform(*hue) % 1, random.uniform(*saturation), random.uniform(*value))
    return np.array(rgb, np.float32) * 255


def smooth_noise(random: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    """Value noise [height, width] in about -1..1 that changes over `cell` pixels (bilinear between random corners)."""
    rows, columns = int(height / cell) + 2, int(width / cell) + 2
    corners = random.uniform(-1, 1, (rows, columns)).astype(np.float32)
    y, x = np.arange(height, dtype=np.float32) / cell, np.arange(width, dtype=np.float32) / cell
    y0, x0 = y.astype(int), x.astype(int)
    fy, fx = y - y0, x - x0
    fy, fx = (fy * fy * (3 - 2 * fy))[:, None], (fx * fx * (3 - 2 * fx))[None]
    down = corners[y0] * (1 - fy) + corners[y0 + 1] * fy
    return down[:, x0] * (1 - fx) + down[:, x0 + 1] * fx


def _rotated(height: int, width: int, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates in a frame turned by `angle` (radians)."""
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return c * x + s * y, c * y - s * x


def water(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Long waves: soft wavy stripes, near horizontal."""
    along, across = _rotated(height, width, random.normal(0, 0.15))
    period = random.uniform(9, 15)
    phase = 1.6 * np.sin(along * (2 * np.pi / random.uniform(45, 80))) + 1.2 * smooth_noise(random, height, width, 30)
    wave = np.sin(across * (2 * np.pi / period) + phase)
    base = _colour(random, (0.3, 0.75), (0.2, 0.6), (0.45, 0.85))
    return base + (random.uniform(14, 26) * wave)[..., None]


def grass(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Fine upright streaks."""
    noise = random.standard_normal((height + 5, width), np.float32)
    streaks = sum(noise[i : i + height] for i in range(6)) / np.sqrt(6, dtype=np.float32)
    base = _colour(random, (0.05, 0.5), (0.2, 0.6), (0.4, 0.8))
    return base + (random.uniform(14, 22) * streaks)[..., None]


def sand(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Broad soft dunes with fine grain."""
    dunes = smooth_noise(random, height, width, random.uniform(28, 50))
    grain = random.standard_normal((height, width), np.float32)
    base = _colour(random, (-0.1, 0.3), (0.1, 0.5), (0.5, 0.9))
    return base + (random.uniform(16, 26) * dunes + random.uniform(3, 6) * grain)[..., None]


def tiles(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A turned checker with joints."""
    u, v = _rotated(height, width, random.uniform(0, np.pi))
    side = random.uniform(11, 18)
    u, v = u / side + 100, v / side + 100  # positive: floor and remainder below need no care
    dark = ((np.floor(u) + np.floor(v)) % 2) * 2 - 1
    joint = (np.minimum(u % 1, v % 1) * side < 1.3).astype(np.float32)
    base = _colour(random, (0, 1), (0.02, 0.3), (0.45, 0.85))
    return base + (random.uniform(9, 17) * dark - 32 * joint)[..., None]


_PAINTERS = {"water": water, "grass": grass, "sand": sand, "tiles": tiles}


def paint_material(name: str, random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A field of the material `name` (one of MATERIALS)."""
    return _PAINTERS[name](random, height, width)


def paint_skin(random: np.random.Generator, u: np.ndarray, v: np.ndarray, behind: np.ndarray) -> np.ndarray:
    """Colours [h, w, 3] of an object's surface, of random kind and colours that stand out against what is behind it.

    Args:
        u, v: [h, w] pixel coordinates in the object's own, turned frame, origin at its centre.
        behind: [3] mean colour of the background there.
    """
    first = _standing_out(random, behind)
    second = np.clip(first + random.choice([-1, 1]) * random.uniform(35, 80) + random.normal(0, 18, 3), 0, 255)
    second = second.astype(np.float32)
    kind = random.choice(["plain", "stripes", "dots", "shaded"], p=[0.3, 0.25, 0.2, 0.25])
    if kind == "plain":
        return np.broadcast_to(first, (*u.shape, 3))
    if kind == "stripes":
        share = np.clip(0.5 + 2 * np.sin(u * (2 * np.pi / random.uniform(5, 11)) + random.uniform(0, 6)), 0, 1)
    elif kind == "dots":
        period = random.uniform(6, 11)
        share = np.clip(2 * np.cos(u * (2 * np.pi / period)) * np.cos(v * (2 * np.pi / period)), 0, 1)
    else:
        extent = max(float(np.abs(u).max()), 1.0)
        share = np.clip(0.5 + 0.6 * u / extent, 0, 1)
    return first + share[..., None] * (second - first)


def _standing_out(random: np.random.Generator, behind: np.ndarray) -> np.ndarray:
    for _ in range(20):
        colour = _colour(random, (0, 1), (0.15, 0.9), (0.2, 1.0))
        if np.abs(colour - behind).mean() > 45:
            break
    return colour
