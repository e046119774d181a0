"""Every backbone against the results of its authors' code, or mmdetection's, on weights and an image made from names.

The five numbers of each map were taken from those programs; the generator of the weights is below. A mean, a deviation
and three elements of the last map move with any change of structure before it.
"""

import zlib

import numpy as np
import pytest
import torch

from models.backbones import build_backbone
from models.config_backbones import BACKBONES, as_classifier
from models.names_backbones import from_mmdetection

FINGERPRINTS = {
    ("scnet50", "C2"): (6.794712e-01, 7.385688e-01, 6.286739e-01, 3.034408e-01, 4.847397e-01),
    ("scnet50", "C5"): (7.399434e-01, 9.037184e-01, 2.505589e-02, 3.594819e-02, 1.084502e00),
    ("scnet50_v1d", "C2"): (3.300811e-01, 3.364054e-01, 0.000000e00, 4.749792e-01, 2.142623e-01),
    ("scnet50_v1d", "C5"): (3.647344e-01, 4.297513e-01, 1.562388e-01, 1.014560e00, 2.256309e-01),
    ("scnet101", "C2"): (6.794712e-01, 7.385688e-01, 6.286739e-01, 3.034408e-01, 4.847397e-01),
    ("scnet101", "C5"): (3.444729e00, 4.309349e00, 0.000000e00, 0.000000e00, 2.728755e00),
    ("res2net50_26w4s", "C2"): (9.150552e-01, 9.695084e-01, 9.361236e-01, 3.496443e-01, 6.660445e-01),
    ("res2net50_26w4s", "C5"): (3.233175e00, 3.877807e00, 2.374759e00, 3.761078e00, 8.284171e00),
    ("res2net50_18w6s", "C2"): (8.977845e-01, 1.069784e00, 7.533972e-01, 0.000000e00, 1.802787e00),
    ("res2net50_18w6s", "C5"): (3.776194e00, 4.485118e00, 0.000000e00, 1.884481e00, 0.000000e00),
    ("res2net50_14w8s", "C2"): (9.744832e-01, 1.208672e00, 4.707375e-01, 1.428604e-01, 1.060792e00),
    ("res2net50_14w8s", "C5"): (5.730135e00, 6.766044e00, 1.616657e01, 0.000000e00, 7.655085e00),
    ("res2net50_48w2s", "C2"): (8.928305e-01, 1.008477e00, 8.274432e-01, 5.948308e-01, 1.172254e00),
    ("res2net50_48w2s", "C5"): (2.527087e00, 3.008734e00, 1.698908e00, 5.229023e-01, 0.000000e00),
    ("res2net50_v1d_26w4s", "C2"): (4.287861e-01, 4.894328e-01, 1.517847e-01, 1.192848e-01, 2.677863e-01),
    ("res2net50_v1d_26w4s", "C5"): (1.396621e00, 1.614857e00, 2.109446e00, 2.014797e00, 4.316068e00),
    ("resnet50", "C2"): (6.728945e-01, 8.090878e-01, 7.640916e-02, 2.728364e-01, 6.368693e-01),
    ("resnet50", "C5"): (1.103636e00, 1.341786e00, 1.458887e00, 0.000000e00, 2.210468e00),
    ("resnext101_32x4d", "C2"): (6.683950e-01, 8.006596e-01, 1.457968e00, 3.237313e-01, 1.209327e00),
    ("resnext101_32x4d", "C5"): (8.132046e00, 9.812720e00, 3.454211e00, 2.354779e-01, 2.003938e01),
    ("resnext101_64x4d", "C2"): (5.987616e-01, 7.157049e-01, 9.708999e-01, 2.674842e-01, 7.072641e-01),
    ("resnext101_64x4d", "C5"): (7.060807e00, 8.519883e00, 9.413576e-02, 1.320297e01, 0.000000e00),
    ("res2net101_v1d_26w4s", "C2"): (4.494234e-01, 4.968393e-01, 2.728247e-01, 1.966269e-01, 4.258301e-01),
    ("res2net101_v1d_26w4s", "C5"): (5.190118e01, 6.091474e01, 1.042376e02, 1.285572e02, 2.175533e02),
}
"""(backbone, map): mean, population standard deviation, first, middle and last element."""

SHAPES = {"C2": (1, 256, 32, 40), "C5": (1, 2048, 4, 5)}


def uniform(key: str, count: int) -> np.ndarray:
    """`count` numbers in [-0.5, 0.5), float64, by integer arithmetic alone."""
    seed = np.uint64(zlib.crc32(key.encode()))
    wrap = np.uint64(0xFFFFFFFF)
    h = (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(2654435761) + seed) & wrap
    h ^= h >> np.uint64(16)
    h = (h * np.uint64(0x85EBCA6B)) & wrap
    h ^= h >> np.uint64(13)
    h = (h * np.uint64(0xC2B2AE35)) & wrap
    h ^= h >> np.uint64(16)
    return h / 2**32 - 0.5


def weight(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    a = uniform(key, int(np.prod(shape)))
    if len(shape) >= 2:
        a = 2 * a * np.sqrt(3 / np.prod(shape[1:]))
    elif key.endswith("running_var"):
        a = 1 + a
    elif key.endswith(".weight"):
        a = 1 + 0.4 * a
    else:
        a = 0.2 * a
    return torch.from_numpy(a.reshape(shape).astype(np.float32))


def upstream_name(key: str, of_mmdetection: bool) -> str:
    """The name that the weights were made from: mmdetection's deep stem is called otherwise than ours."""
    if not of_mmdetection or not key.startswith(("conv1.", "bn1.")):
        return key
    theirs = key.replace("conv1.", "stem.") if key.startswith("conv1.") else key.replace("bn1.", "stem.7.")
    assert from_mmdetection(theirs) == key
    return theirs


def test_the_generator_gives_the_published_numbers():
    assert zlib.crc32(b"input") == 3626513111
    np.testing.assert_allclose(uniform("input", 3), [-0.39372377, -0.42936975, 0.19462207], atol=1e-8)


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in FINGERPRINTS))
def test_fingerprint(name):
    of_mmdetection = name == "res2net101_v1d_26w4s"
    config = BACKBONES[name] if of_mmdetection else as_classifier(BACKBONES[name])
    with torch.device("meta"):
        backbone = build_backbone(config).eval()
    state = {
        key: weight(upstream_name(key, of_mmdetection), tuple(value.shape))
        for key, value in backbone.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    backbone.load_state_dict(state, strict=False, assign=True)
    image = torch.from_numpy((2 * uniform("input", 3 * 128 * 160)).astype(np.float32)).view(1, 3, 128, 160)
    with torch.inference_mode():
        features = backbone(image)
    for map_name, x in (("C2", features[0]), ("C5", features[3])):
        mean, std, *elements = FINGERPRINTS[name, map_name]
        assert tuple(x.shape) == SHAPES[map_name]
        x = x.double().flatten()
        found = [x.mean(), x.std(correction=0), x[0], x[len(x) // 2], x[-1]]
        np.testing.assert_allclose(found, [mean, std, *elements], rtol=0, atol=1e-4 * std)
