"""Properties of the arithmetic in csrc/common, which CPU and CUDA kernels share.

The functions are bound to Python by tests/native, a module that only these tests build: pybind11 is no part of the
stable ABI, so it has no place in csrc/.
"""

import hashlib
import importlib.util
import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pybind11
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from cascadeops.reference.multiscale_roi_align import multiscale_roi_align as pool_reference

ROOT = Path(__file__).parent.parent
FLAGS = ["-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Werror"]
settings.register_profile("common", deadline=None, max_examples=300, derandomize=True)
settings.load_profile("common")


@pytest.fixture(scope="session")
def common():
    """The compiled module, kept in build/ under the hash of everything it is made of."""
    python_headers = sysconfig.get_path("include")
    if not Path(python_headers, "Python.h").exists():
        pytest.skip(f"no Python.h in {python_headers}: install python3-dev")
    sources = sorted((ROOT / "tests/native").glob("*.cpp"))
    made_of = [*sources, *sorted((ROOT / "csrc/common").glob("*.h")), *sorted((ROOT / "tests/native").glob("*.h"))]
    recipe = f"{FLAGS} {pybind11.__version__} {sysconfig.get_config_var('SOABI')}".encode()
    digest = hashlib.sha256(recipe + b"".join(path.read_bytes() for path in made_of)).hexdigest()[:16]
    target = ROOT / "build/tests-native" / digest / "common.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
        includes = [f"-I{ROOT}/csrc", f"-isystem{python_headers}", f"-isystem{pybind11.get_include()}"]
        objects = [str(target.with_name(f"{source.stem}.o")) for source in sources]
        commands = [
            [compiler, *FLAGS, *includes, "-c", str(source), "-o", out]
            for source, out in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda command: subprocess.run(command, check=True), commands))
        unfinished = target.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, "-shared", *objects, "-o", str(unfinished)], check=True)
        unfinished.replace(target)
    spec = importlib.util.spec_from_file_location("common", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def float32(smallest: float, largest: float):
    return st.floats(smallest, largest, width=32)


def next_float32(value: float, steps: int) -> float:
    """The float32 that lies `steps` representable numbers beyond `value` rounded to float32 (before it if negative)."""
    value = float(np.float32(value))
    for _ in range(abs(steps)):
        value = float(np.nextafter(np.float32(value), np.float32(np.inf if steps > 0 else -np.inf)))
    return value


# bilinear.h


@given(x=st.floats(2.0**-126, 2.0**127, width=32))
@example(x=1.0)
@example(x=float(np.nextafter(np.float32(8), np.float32(0))))
def test_floor_log2_is_the_exponent(common, x):
    assert common.floor_log2(x) == math.frexp(x)[1] - 1


@given(
    width=float32(0.0, 4096.0), height=float32(0.0, 4096.0), finest=st.sampled_from([14.0, 28.0, 56.0, 112.0]),
    levels=st.integers(1, 6), inside=st.booleans(),
)  # fmt: skip
def test_level_is_the_clamped_logarithm(common, width, height, finest, levels, inside):
    scale = math.sqrt(width * height) / finest
    logarithm = math.log2(scale + 1e-6) if inside else (math.log2(scale) + 1e-6 if scale else -math.inf)
    assume(math.isinf(logarithm) or abs(logarithm - round(logarithm)) > 1e-6)  # float32 rounds to either side there
    expected = 0 if logarithm < 0 else min(math.floor(logarithm), levels - 1)
    assert common.roi_level(width, height, finest, inside, levels) == expected


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    "side, level", [(56, 0), (111.99, 0), (112, 1), (223.99, 1), (224, 2), (448, 3), (9999, 3), (0, 0)]
)
def test_level_by_hand(common, inside, side, level):
    assert common.roi_level(side, side, 56.0, inside, 4) == level


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("side, level", [(112, 1), (224, 2)])
def test_a_rounding_error_below_a_power_of_two_is_forgiven(common, inside, side, level):
    """What the 1e-6 of both rules is for."""
    side = next_float32(side, -1)
    assert common.roi_level(side, side, 56.0, inside, 4) == level


def test_level_of_nan_is_the_finest(common):
    assert common.roi_level(math.nan, 5.0, 56.0, True, 4) == 0
    assert common.roi_level(-3.0, 5.0, 56.0, True, 4) == 0


@given(position=st.floats(-3, 12), size=st.integers(1, 9))
@example(position=-1.0, size=4)
@example(position=4.0, size=4)
@example(position=3.0, size=4)
def test_taps_are_a_partition_of_one_inside_and_nothing_outside(common, position, size):
    low, high, low_weight, high_weight, inside = common.taps(position, size)
    assert inside == (-1 <= position <= size)
    if inside:
        assert 0 <= low <= high <= size - 1 and high - low <= 1
        assert low_weight >= 0 and high_weight >= 0 and low_weight + high_weight == pytest.approx(1, abs=1e-15)
    else:
        assert low_weight == high_weight == 0


def test_taps_of_nan_are_outside(common):
    assert not common.taps(math.nan, 5)[4]


@given(
    y=st.floats(-1, 7), x=st.floats(-1, 9), slope_y=st.floats(-5, 5), slope_x=st.floats(-5, 5), offset=st.floats(-5, 5)
)
def test_sampling_a_plane_gives_the_plane(common, y, x, slope_y, slope_x, offset):
    """Bilinear interpolation is exact on planes; beyond the border the border's value stays."""
    rows, columns = np.mgrid[0:7, 0:9]
    plane = offset + slope_y * rows + slope_x * columns
    expected = offset + slope_y * min(max(y, 0), 6) + slope_x * min(max(x, 0), 8)
    assert common.sample(plane, y, x) == pytest.approx(expected, abs=1e-12)


@given(values=st.lists(st.floats(-100, 100), min_size=12, max_size=12), y=st.floats(-1, 3), x=st.floats(-1, 4))
def test_a_sample_stays_between_the_values(common, values, y, x):
    grid = np.array(values).reshape(3, 4)
    assert grid.min() - 1e-12 <= common.sample(grid, y, x) <= grid.max() + 1e-12


@given(
    low=st.floats(-200, 200), size=st.floats(0, 300), scale=st.sampled_from([1.0, 0.25, 1 / 32]),
    bins=st.integers(1, 14), ratio=st.integers(0, 4), aligned=st.booleans(),
)  # fmt: skip
def test_samples_are_evenly_spread_over_the_box(common, low, size, scale, bins, ratio, aligned):
    axis = common.RoiAxis(low, low + size, scale, bins, ratio, aligned)
    cells = (low + size) * scale - low * scale if aligned else max((low + size) * scale - low * scale, 1.0)
    assert axis.bin * bins == pytest.approx(cells, abs=1e-9)
    assert axis.samples == (ratio if ratio > 0 else math.ceil(axis.bin))
    if axis.samples > 0:
        positions = [axis.position(b, i) for b in range(bins) for i in range(axis.samples)]
        start = low * scale - (0.5 if aligned else 0.0)
        count = bins * axis.samples
        assert positions == pytest.approx([start + (i + 0.5) * cells / count for i in range(count)], abs=1e-9)


@given(low=st.floats(-200, 200), size=st.floats(0, 300), ratio=st.integers(0, 4), bound=st.floats(-10, 100))
def test_first_sample_from_is_what_a_search_finds(common, low, size, ratio, bound):
    axis = common.RoiAxis(low, low + size, 0.25, 7, ratio, True)
    for bin_index in range(7):
        beyond = [i for i in range(axis.samples) if axis.position(bin_index, i) >= bound]
        assert axis.first_sample_from(bin_index, bound) == (beyond[0] if beyond else axis.samples)


# roi_tile.h


@settings(max_examples=50)
@given(
    boxes=st.lists(
        st.tuples(float32(-30, 90), float32(-30, 90), float32(0, 120) | st.just(3e9), float32(-2, 90)),
        min_size=1,
        max_size=3,
    ),
    size=st.tuples(st.integers(1, 27), st.integers(1, 27)),
    bins=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    scale=st.sampled_from([1.0, 0.5, 0.3]),
    ratio=st.integers(0, 3),
    aligned=st.booleans(),
    subdivision=st.integers(1, 3),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_gathered_tiles_are_the_gradient_of_the_reference(
    common, boxes, size, bins, scale, ratio, aligned, subdivision, dtype
):
    corners = np.array([(x, y, x + w, y + h) for x, y, w, h in boxes], dtype=np.float32).reshape(-1, 4)
    # The reference visits every sample, also those far away.
    assume(ratio > 0 or np.abs(corners).max() < 1e6)
    grad = np.random.default_rng(0).standard_normal((len(boxes), 2, *bins)).astype(dtype)
    gathered = getattr(common, f"gathered_gradient_{dtype}")(grad, corners, *size, scale, ratio, aligned, subdivision)
    map = torch.zeros(1, 2, *size, dtype=torch.float64, requires_grad=True)
    level = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    rois = torch.cat([torch.zeros(len(boxes), 1), torch.from_numpy(corners)], dim=1)
    options = {"extra": map, "extra_stride": 1 / scale, "extra_subdivision": subdivision}
    pooled = pool_reference([level], rois, bins, [1.0], ratio, aligned, **options)
    (expected,) = torch.autograd.grad(pooled, map, torch.from_numpy(grad).double(), allow_unused=True)
    expected = torch.zeros_like(map) if expected is None else expected
    tolerance = 1e-4 if dtype == "float32" else 1e-10
    np.testing.assert_allclose(gathered, expected[0].numpy(), rtol=0, atol=tolerance)


# boxes.h


def iou_above_in_float64(a, b, threshold):
    """The definition, in Python's own floats."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if not (width > 0 and height > 0):
        return False
    intersection = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return intersection / union > threshold


@st.composite
def boxes(draw, largest=1000.0):
    x, y = draw(float32(-largest, largest)), draw(float32(-largest, largest))
    width, height = draw(float32(0.0, largest)), draw(float32(0.0, largest))
    return tuple(float(np.float32(v)) for v in (x, y, x + width, y + height))


@st.composite
def pairs_at_the_threshold(draw):
    """Two boxes and a threshold that is their IoU, within a few units of the last place on either side."""
    a = (0.0, 0.0, draw(float32(1.0, 1000.0)), draw(float32(1.0, 1000.0)))
    share = draw(st.floats(0.05, 0.95))
    b = (0.0, 0.0, next_float32(a[2] * share, draw(st.integers(-3, 3))), a[3])
    threshold = (b[2] * b[3]) / (a[2] * a[3])
    for _ in range(draw(st.integers(0, 3))):
        threshold = math.nextafter(threshold, draw(st.sampled_from([0.0, 1.0])))
    return a, b, threshold


@given(a=boxes(), b=boxes(), threshold=st.sampled_from([0.0, 1e-9, 0.3, 0.5, 0.7, 1.0]))
def test_iou_decision_is_that_of_float64(common, a, b, threshold):
    assert common.iou_above(a, b, threshold) == iou_above_in_float64(a, b, threshold)


@given(pair=pairs_at_the_threshold())
def test_iou_decision_is_that_of_float64_at_the_threshold(common, pair):
    a, b, threshold = pair
    assert common.is_in_doubt(a, b, threshold)  # the case is as hard as it is meant to be
    assert common.iou_above(a, b, threshold) == iou_above_in_float64(a, b, threshold)


@given(a=boxes(largest=2.0**100), b=boxes(largest=2.0**100), threshold=st.sampled_from([0.3, 0.5]))
def test_iou_decision_is_that_of_float64_where_float32_overflows(common, a, b, threshold):
    assert common.iou_above(a, b, threshold) == iou_above_in_float64(a, b, threshold)


@given(a=boxes(), b=boxes(), threshold=st.floats(0, 1))
def test_iou_decision_is_symmetric(common, a, b, threshold):
    assert common.iou_above(a, b, threshold) == common.iou_above(b, a, threshold)


def test_iou_by_hand(common):
    a, b = (0.0, 0.0, 2.0, 1.0), (1.0, 0.0, 3.0, 1.0)  # intersection 1, union 3
    assert common.iou_above(a, b, 0.333) and not common.iou_above(a, b, 0.334)
    assert not common.iou_above(a, a, 1.0)  # strictly greater
    assert not common.iou_above((0.0, 0.0, 0.0, 5.0), (0.0, 0.0, 0.0, 5.0), 0.0)  # no area


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", range(4))
def test_is_finite_looks_at_each_coordinate(common, value, place):
    box = [1.0, 2.0, 3.0, 4.0]
    assert common.is_finite(tuple(box))
    box[place] = value
    assert not common.is_finite(tuple(box))


# paste.h


@given(first=float32(-500.0, 500.0), size=float32(0.125, 800.0), cells=st.integers(1, 56), pixels=st.integers(1, 300))
def test_paste_position_is_grid_samples_and_rises(common, first, size, cells, pixels):
    last = float(np.float32(first + size))
    assume(last > first)
    axis = common.PasteAxis(first, last, cells)
    got = [axis.position(pixel) for pixel in range(pixels)]
    centre = np.arange(pixels, dtype=np.float32) + np.float32(0.5)
    normalised = (centre - np.float32(first)) / (np.float32(last) - np.float32(first)) * np.float32(2) - np.float32(1)
    expected = ((normalised + np.float32(1)) * np.float32(cells) - np.float32(1)) / np.float32(2)
    np.testing.assert_array_equal(np.float32(got), expected)
    assert all(a <= b for a, b in itertools.pairwise(got))


@given(first=float32(-500.0, 500.0), size=float32(-10.0, 800.0), cells=st.integers(1, 56), pixels=st.integers(1, 300))
def test_reached_pixels_are_those_whose_taps_touch_the_mask(common, first, size, cells, pixels):
    last = float(np.float32(first + size))
    axis = common.PasteAxis(first, last, cells)
    touching = [p for p in range(pixels) if first < last and -1 < axis.position(p) < cells]
    begin, end = axis.reached(pixels)
    assert list(range(begin, end)) == touching


@given(value=st.one_of(float32(-2.0, 2.0), st.sampled_from([math.nan, math.inf, -math.inf])))
@example(value=1.0)
def test_probability_byte_rounds_down_and_clips(common, value):
    expected = 0 if math.isnan(value) or value < 0 else 255 if value > 1 else int(np.float32(value) * np.float32(255))
    assert common.probability_byte(value) == expected


# rle.h


def decode(text: bytes) -> list[int]:
    """Run lengths out of COCO's compressed counts, from the format's description."""
    runs, position = [], 0
    while position < len(text):
        value = shift = 0
        more = True
        while more:
            group = text[position] - 48
            value |= (group & 31) << shift
            more = bool(group & 32)
            shift, position = shift + 5, position + 1
        if group & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs


@given(runs=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
@example(runs=[0, 1])
@example(runs=[15, 16, 17, 1, 1, 1023, 1024])
def test_runs_survive_encoding(common, runs):
    assert decode(common.encode_runs(runs)) == runs


@given(rows=st.integers(1, 13), columns=st.integers(1, 13), bits=st.integers(0, 2**169 - 1))
def test_encoding_is_pycocotools(common, rows, columns, bits):
    mask = np.array([bits >> i & 1 for i in range(rows * columns)], dtype=np.uint8).reshape(rows, columns, order="F")
    column_major = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(np.concatenate([[0], column_major]))).tolist()
    edges = [0, *changes, rows * columns]
    runs = [b - a for a, b in itertools.pairwise(edges)]
    assert common.encode_runs(runs) == coco.encode(np.asfortranarray(mask))["counts"]


@given(value=st.integers(-(2**40), 2**40))
def test_length_of_a_number_is_the_fewest_groups_that_hold_it(common, value):
    groups = common.encoded_length(value)
    assert -(2 ** (5 * groups - 1)) <= value < 2 ** (5 * groups - 1)
    assert groups == 1 or not -(2 ** (5 * groups - 6)) <= value < 2 ** (5 * groups - 6)


# tests/native/narrow_index.h


@pytest.mark.parametrize(
    ("call", "result"),
    [
        ("sum(32766, 1)", 32767),
        ("sum_with_int(-32767, -1)", -32768),
        ("sum_with_int64(32767, 2**40)", 32767 + 2**40),
        ("product(181, 181)", 32761),
        ("product_with_float(32767, 4.0)", 131068),
        ("shift(1, 14)", 16384),
        ("cast(32767)", 32767),
        ("cast_of_float(-32768.0)", -32768),
        ("add(32767, -65535)", -32768),
    ],
)
def test_a_narrow_index_is_a_number(common, call, result):
    assert eval(f"common.narrow_{call}") == result


@pytest.mark.parametrize(
    ("call", "value"),
    [
        ("sum(32767, 1)", 32768),
        ("sum_with_int(-32768, -1)", -32769),
        ("product(182, 181)", 32942),
        ("shift(1, 15)", 32768),
        ("cast(32768)", 32768),
        ("cast_of_float(float('nan'))", "nan"),
        ("negative(-32768)", 32768),
        ("next(32767)", 32768),
        ("add(32767, 2**40)", 32767 + 2**40),
    ],
)
def test_a_narrow_index_that_would_wrap_ends_the_program(common, call, value):
    program = (
        f"import sys; sys.path.insert(0, {str(Path(common.__file__).parent)!r}); import common; common.narrow_{call}"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGABRT
    assert f"makes {value}, which does not fit in 16 bits" in ended.stderr
