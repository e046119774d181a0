"""The figures of the generated data set, as implicit functions: negative inside, positive outside.

Every function takes coordinates in the figure's own frame, in which its largest radius is 1, and returns about the
distance to its outline in the same unit. "About" suffices: near the outline the distance is right, which is all
that an anti-aliased edge needs, and the sign is right everywhere, which is all that a mask needs.
"""

import numpy as np


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def disc(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 1


def ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Annulus between the radii 0.56 and 1."""
    return np.abs(np.hypot(x, y) - 0.78) - 0.22


def frame(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Square with a square hole."""
    return np.maximum(_box(x, y, 0.76, 0.76), -_box(x, y, 0.42, 0.42))


def cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(_box(x, y, 0.95, 0.3), _box(x, y, 0.3, 0.95))


def star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five points at radius 1, five inner corners at radius 0.45."""
    sector = 2 * np.pi / 5
    angle = np.abs((np.arctan2(y, x) + sector / 2) % sector - sector / 2)  # fold into half a point: 0 .. pi/5
    radius = np.hypot(x, y)
    inner_x, inner_y = 0.45 * np.cos(sector / 2), 0.45 * np.sin(sector / 2)
    edge_x, edge_y = inner_x - 1, inner_y  # from the tip (1, 0) to the inner corner
    return (edge_y * (radius * np.cos(angle) - 1) - edge_x * (radius * np.sin(angle))) / np.hypot(edge_x, edge_y)


def crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Unit disc less a disc of radius 0.8 whose centre is 0.45 to the right."""
    return np.maximum(np.hypot(x, y) - 1, 0.8 - np.hypot(x - 0.45, y))
