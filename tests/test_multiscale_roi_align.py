"""multiscale_roi_align against its reference, mmdetection's results, and answers that can be checked on paper."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import assert_close_to_reference

import cascadeops
from cascadeops.reference.multiscale_roi_align import choose_levels
from cascadeops.reference.multiscale_roi_align import multiscale_roi_align as reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

STRIDES = (4.0, 8.0, 16.0)
SIZES = ((37, 53), (19, 27), (10, 14))  # of the maps of a 148 x 212 image
FINEST_SIZE = 20.0  # so that random_rois use all three
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def random_pyramid(device, dtype=torch.float32, layout=torch.channels_last, images=2, channels=3, sizes=SIZES):
    return [
        torch.randn(images, channels, *size, device=device).to(dtype).contiguous(memory_format=layout) for size in sizes
    ]


def random_rois(device, count=24, images=2):
    """Boxes of all sizes and shapes, some of which hang over the image's edge or lie outside, and one padding row."""
    centre = torch.rand(count, 2) * torch.tensor([232.0, 168.0]) - 10
    size = torch.exp(torch.rand(count, 2) * 4.5 + 1)
    rois = torch.cat([torch.randint(images, (count, 1)), centre - size / 2, centre + size / 2], dim=1)
    rois[count // 2, 0] = -1
    return rois.to(device)


def exact(features, rois, *args, **kwargs):
    return reference([feature.double() for feature in features], rois, *args, **kwargs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 5, 83])
def test_equals_reference_in_every_dtype_and_layout(device, dtype, layout, channels):
    features, rois = random_pyramid(device, dtype, layout, channels=channels), random_rois(device)
    pooled = cascadeops.multiscale_roi_align(features, rois, (5, 3), STRIDES, finest_size=FINEST_SIZE)
    assert pooled.dtype == dtype
    assert_close_to_reference(pooled, exact(features, rois, (5, 3), STRIDES, finest_size=FINEST_SIZE))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("level_rule", ["mmdet", "torchvision"])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 3])
def test_equals_reference_in_every_option(device, layout, sampling_ratio, aligned, level_rule):
    features, rois = random_pyramid(device, layout=layout), random_rois(device)
    options = (7, STRIDES, sampling_ratio, aligned, FINEST_SIZE, level_rule)
    assert_close_to_reference(
        cascadeops.multiscale_roi_align(features, rois, *options), exact(features, rois, *options)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [2, 67])
def test_gradient_equals_reference(device, dtype, layout, channels):
    features, rois = random_pyramid(device, dtype, layout, channels=channels), random_rois(device, count=12)
    leaves = [feature.requires_grad_() for feature in features]
    grad = torch.randn(len(rois), channels, 4, 6).to(device, dtype)
    pooled = cascadeops.multiscale_roi_align(leaves, rois, (4, 6), STRIDES, finest_size=FINEST_SIZE)
    grads = torch.autograd.grad(pooled, leaves, grad)
    doubles = [feature.detach().double().requires_grad_() for feature in features]
    pooled = reference(doubles, rois, (4, 6), STRIDES, finest_size=FINEST_SIZE)
    expected = torch.autograd.grad(pooled, doubles, grad.double(), materialize_grads=True)
    for result, wanted, feature in zip(grads, expected, features, strict=True):
        assert result.dtype == dtype and result.stride() == feature.stride()
        assert_close_to_reference(result, wanted)


def additions(device, dtype=torch.float32, layout=torch.channels_last, channels=3, vector_shape=()):
    return {
        "extra": torch.randn(2, channels, 21, 30, device=device).to(dtype).contiguous(memory_format=layout),
        "extra_stride": 7.0,
        "extra_subdivision": 2,
        "image_vector": torch.randn(2, channels, *vector_shape, device=device).to(dtype),
    }


def doubles(arguments):
    return {name: value.double() if name in ("extra", "image_vector") else value for name, value in arguments.items()}


@pytest.mark.parametrize("layouts", [LAYOUTS, LAYOUTS[1:] * 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extra_map_image_vector_and_count_equal_the_reference(device, dtype, layouts):
    features, rois = random_pyramid(device, dtype, layouts[0], channels=19), random_rois(device, count=10)
    added = additions(device, dtype, layouts[1], channels=19, vector_shape=(1, 1))
    added["count"] = torch.tensor([8], device=device)
    leaves = [tensor.requires_grad_() for tensor in (*features, added["extra"], added["image_vector"])]
    pooled = cascadeops.multiscale_roi_align(features, rois, (5, 3), STRIDES, finest_size=FINEST_SIZE, **added)
    grad = torch.randn(pooled.shape).to(device, dtype)
    grads = torch.autograd.grad(pooled, leaves, grad)

    *exact_maps, extra, vector = (tensor.detach().double().requires_grad_() for tensor in leaves)
    added |= {"extra": extra, "image_vector": vector}
    expected = reference(exact_maps, rois, (5, 3), STRIDES, finest_size=FINEST_SIZE, **added)
    assert_close_to_reference(pooled.detach(), expected.detach())
    assert pooled[7].any() and not pooled[8:].any()
    leaves = [*exact_maps, extra, vector]
    wanted_grads = torch.autograd.grad(expected, leaves, grad.double(), materialize_grads=True)
    for result, wanted in zip(grads, wanted_grads, strict=True):
        assert_close_to_reference(result, wanted)


def test_each_addition_alone(device):
    features, rois = random_pyramid(device), random_rois(device)
    plain = exact(features, rois, 3, STRIDES)
    added = additions(device)
    options = {name: added[name] for name in ("extra", "extra_stride", "extra_subdivision")}
    for some in (options, {"image_vector": added["image_vector"]}):
        expected = exact(features, rois, 3, STRIDES, **doubles(some))
        assert_close_to_reference(cascadeops.multiscale_roi_align(features, rois, 3, STRIDES, **some), expected)
        assert not torch.equal(expected, plain)


def test_subdivision_is_pooling_at_twice_the_size_and_averaging(device):
    features, rois = random_pyramid(device), random_rois(device)
    extra = torch.randn(2, 3, 30, 40, device=device)
    fused = cascadeops.multiscale_roi_align(
        features, rois, 4, STRIDES, extra=extra, extra_stride=5, extra_subdivision=2
    )
    finer = cascadeops.multiscale_roi_align([extra], rois, 8, [5.0])
    separate = cascadeops.multiscale_roi_align(features, rois, 4, STRIDES) + torch.nn.functional.avg_pool2d(finer, 2)
    torch.testing.assert_close(fused, separate, rtol=1e-5, atol=1e-5)


def test_the_vector_of_a_rois_image_is_added_to_its_bins(device):
    # On paper: a map of zeros, so what remains is the vector; none in the padding row.
    rois = torch.tensor([[1.0, 0, 0, 4, 4], [-1, 0, 0, 4, 4], [0, 0, 0, 4, 4]], device=device)
    vector = torch.tensor([[1.0, 2.0], [10.0, 20.0]], device=device, requires_grad=True)
    pooled = cascadeops.multiscale_roi_align(
        [torch.zeros(2, 2, 4, 4, device=device)], rois, (1, 2), [1.0], image_vector=vector
    )
    assert pooled.flatten(1).tolist() == [[10, 10, 20, 20], [0, 0, 0, 0], [1, 1, 2, 2]]
    weight = torch.full_like(pooled, torch.nan)
    weight[0], weight[2] = 3.0, 5.0
    assert torch.autograd.grad(pooled, vector, weight)[0].tolist() == [[10, 10], [6, 6]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_beyond_the_count_are_not_looked_at(device, layout):
    features = [feature.requires_grad_() for feature in random_pyramid(device, layout=layout)]
    rois = random_rois(device)
    expected = cascadeops.multiscale_roi_align(features, rois[:9], 7, STRIDES)
    rois = torch.cat([rois[:9], torch.full_like(rois[9:], torch.nan)])
    for count in (torch.tensor(9, device=device), torch.tensor([9], device=device)):
        pooled = cascadeops.multiscale_roi_align(features, rois, 7, STRIDES, count=count)
        assert torch.equal(pooled[:9], expected) and not pooled[9:].any()
    wanted = torch.autograd.grad(expected.square().sum(), features)
    for result, value in zip(torch.autograd.grad(pooled.square().sum(), features), wanted, strict=True):
        assert torch.equal(result, value)
    none = cascadeops.multiscale_roi_align(features, rois, 7, STRIDES, count=torch.tensor(0, device=device))
    assert not none.any() and not any(grad.any() for grad in torch.autograd.grad(none.sum(), features))


@pytest.mark.parametrize("bins", [(40, 1), (17, 33)])
def test_many_bins(device, bins):
    features = [feature.double().requires_grad_() for feature in random_pyramid(device)]
    rois = random_rois(device, count=6)
    pooled = cascadeops.multiscale_roi_align(features, rois, bins, STRIDES, finest_size=FINEST_SIZE)
    expected = reference(features, rois, bins, STRIDES, finest_size=FINEST_SIZE)
    assert_close_to_reference(pooled.detach(), expected.detach())
    weight = torch.randn_like(pooled)
    wanted_grads = torch.autograd.grad(expected, features, weight, materialize_grads=True)
    for result, wanted in zip(torch.autograd.grad(pooled, features, weight), wanted_grads, strict=True):
        assert_close_to_reference(result, wanted)


def test_a_box_on_the_cells_returns_the_cells(device):
    # Four bins of one cell each, one sample in the middle of each: the map itself.
    cells = torch.arange(16.0, device=device).reshape(1, 1, 4, 4)
    whole = torch.tensor([[0.0, 0, 0, 4, 4]], device=device)
    assert torch.equal(cascadeops.multiscale_roi_align([cells], whole, 4, [1.0]), cells)


def test_one_bin_over_four_cells_is_their_mean(device):
    # 2 x 2 samples at the centres of the cells 1, 2, 3, 4, and at stride 2 the same box has half the pixels.
    cells = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], device=device)
    box = torch.tensor([[0.0, 0, 0, 4, 4]], device=device)
    assert cascadeops.multiscale_roi_align([cells], box, 1, [2.0]).item() == 2.5


def test_samples_up_to_one_cell_outside_take_the_border_and_others_are_zero(device):
    # The samples lie at x = -2, -1, 0, 1 of a map of ones: the first is outside.
    cells = torch.ones(1, 1, 1, 8, device=device)
    box = torch.tensor([[0.0, -2.0, 0, 2.0, 1.0]], device=device)
    pooled = cascadeops.multiscale_roi_align([cells], box, (1, 1), [1.0], sampling_ratio=4)
    assert pooled.item() == 0.75


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_types_are_read_and_rounded_as_pytorch_does(device, dtype, layout):
    # Every finite value with a partner of similar size, as channels; the bin's two samples are the two cells.
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    values = values[values.isfinite()]
    partners = values * (1 + torch.rand(len(values), dtype=torch.float32)).to(dtype)
    partners = partners.where(partners.isfinite(), values)
    pairs = torch.stack([values, partners], dim=1).to(device)
    features = [pairs.reshape(1, -1, 1, 2).contiguous(memory_format=layout)]
    box = torch.tensor([[0.0, 0, 0, 2, 1]], device=device)
    assert torch.equal(cascadeops.multiscale_roi_align(features, box, (1, 2), [1.0]), features[0])
    means = cascadeops.multiscale_roi_align(features, box, 1, [1.0]).flatten()
    assert torch.equal(means, (pairs.float() * 0.5).sum(dim=1).to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_result_and_gradient_follow_the_layout_of_the_maps(device, layout):
    features, rois = random_pyramid(device, layout=layout), random_rois(device)
    assert cascadeops.multiscale_roi_align(features, rois, 7, STRIDES).is_contiguous(memory_format=layout)


def test_maps_of_any_strides_are_read_where_they_are(device):
    wide = torch.randn(2, 40, 54, 7, device=device)
    features = [
        wide[..., ::2].permute(0, 3, 1, 2)[:, :, 3:, 1:],  # channels two apart
        torch.randn(2, 6, 20, 28, device=device).contiguous(memory_format=torch.channels_last)[:, :4, 1:, 1:],
        torch.randn(2, 4, 14, 10, device=device).mT,  # columns apart
    ]
    rois = torch.cat([random_rois(device), random_rois(device)], dim=1)[:, 5:]
    leaves = [feature.detach().requires_grad_() for feature in features]
    pooled = cascadeops.multiscale_roi_align(leaves, rois, 3, STRIDES, finest_size=FINEST_SIZE)
    doubles = [feature.detach().double().requires_grad_() for feature in features]
    expected = reference(doubles, rois, 3, STRIDES, finest_size=FINEST_SIZE)
    assert_close_to_reference(pooled.detach(), expected.detach())
    # The gradient of a sum has stride 0 everywhere.
    grads = torch.autograd.grad(pooled.sum(), leaves)
    for result, wanted in zip(grads, torch.autograd.grad(expected.sum(), doubles), strict=True):
        assert_close_to_reference(result, wanted)


@pytest.mark.parametrize("level_rule", ["mmdet", "torchvision"])
def test_level_is_exact_at_the_powers_of_two(device, level_rule):
    # Each map holds its level's number, so the result is the level. Sides around 56 * 2^n, down to single ulps.
    features = [torch.full((1, 1, 1, 1), float(level), device=device) for level in range(5)]
    powers = (56.0 * 2.0 ** torch.arange(-2, 6)).float()
    steps = torch.tensor([1 - 1e-3, 1 - 2e-6, 1 - 3e-7, 1 - 6e-8, 1, 1 + 1.2e-7, 1 + 1e-3])
    sides = (powers[:, None] * steps).flatten()
    rois = torch.stack([torch.zeros_like(sides)] * 3 + [sides, sides], dim=1).to(device)
    levels = cascadeops.multiscale_roi_align(features, rois, 1, [1e4] * 5, level_rule=level_rule).flatten()
    assert torch.equal(levels.long(), choose_levels(rois, 5, 56.0, level_rule))
    on_power = levels.reshape(len(powers), len(steps))
    expected = torch.tensor([0.0, 0, 0, 1, 2, 3, 4, 4], device=device)
    assert torch.equal(on_power[:, 4], expected) and torch.equal(on_power[:, 6], expected)
    assert torch.equal(on_power[3:7, 0], expected[3:7] - 1)


def test_level_of_boxes_without_a_size(device):
    # No area, reversed on one axis (the root of a negative area), an area beyond float32.
    features = [torch.full((1, 1, 2, 2), float(level), device=device) for level in range(3)]
    boxes = [[0, 3, 3, 3, 3], [0, 9, 0, 1, 5], [0, -1e30, -1e30, 1e30, 1e30]]
    rois = torch.tensor(boxes, dtype=torch.float32, device=device)
    assert choose_levels(rois, 3, 56.0, "mmdet").tolist() == [0, 0, 2]
    pooled = cascadeops.multiscale_roi_align(features, rois, 1, [1.0] * 3, sampling_ratio=1)
    # The sample of the empty box lies outside its map, the reversed one has none, that of the huge box is its centre.
    assert pooled.flatten().tolist() == [0.0, 0.0, 2.0]


def test_reversed_boxes_are_zero(device):
    features = random_pyramid(device)
    rois = torch.tensor([[0.0, 90, 20, 30, 80], [1.0, 90, 80, 30, 20]], device=device)
    for sampling_ratio in (0, 2):
        assert not cascadeops.multiscale_roi_align(features, rois, 7, STRIDES, sampling_ratio).any()
        assert not reference(features, rois, 7, STRIDES, sampling_ratio).any()


def test_padding_rows_are_zero_and_add_no_gradient(device):
    features = [feature.requires_grad_() for feature in random_pyramid(device)]
    rois = random_rois(device, count=9)
    padding = torch.tensor([[-1.0, 5, 5, 90, 90], [-1.0, torch.nan, torch.inf, 0, 0]], device=device)
    padded = torch.cat([padding[:1], rois, padding[1:]])
    pooled = cascadeops.multiscale_roi_align(features, rois, 7, STRIDES)
    with_padding = cascadeops.multiscale_roi_align(features, padded, 7, STRIDES)
    assert torch.equal(with_padding[1:-1], pooled)
    assert not with_padding[0].any() and not with_padding[-1].any()
    only_padding = cascadeops.multiscale_roi_align(features, padding, 7, STRIDES)
    assert not any(grad.any() for grad in torch.autograd.grad(only_padding.sum(), features))


def test_box_of_a_million_pixels_costs_its_part_on_the_map(device):
    # The reference visits all of the 125000 samples per bin, so only one axis is long.
    feature = torch.randn(1, 2, 6, 9, dtype=torch.float64, device=device)
    rois = torch.tensor([[0.0, -499000, 3, 501000, 20]], device=device)
    assert_close_to_reference(
        cascadeops.multiscale_roi_align([feature], rois, (3, 2), [4.0]), reference([feature], rois, (3, 2), [4.0])
    )


@pytest.mark.parametrize("size", [1e9, 1e20, 3e38])
def test_absurd_boxes_end_soon_and_are_finite(device, size):
    features = random_pyramid(device)
    rois = torch.tensor([[0.0, -size, -size, size, size], [1.0, 0, 0, size, 5], [0.0, -size, 0, -size / 2, 9]])
    for sampling_ratio in (0, 2):
        pooled = cascadeops.multiscale_roi_align(features, rois.to(device), 7, STRIDES, sampling_ratio)
        assert torch.isfinite(pooled).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("count", "images", "channels"), [(0, 2, 3), (0, 0, 3), (4, 2, 0)])
def test_empty(device, layout, count, images, channels):
    features = random_pyramid(device, layout=layout, images=images, channels=channels)
    features = [feature.requires_grad_() for feature in features]
    rois = random_rois(device, count + 1)[:count]
    pooled = cascadeops.multiscale_roi_align(features, rois, 7, STRIDES)
    assert pooled.shape == (count, channels, 7, 7)
    for grad, feature in zip(torch.autograd.grad(pooled.sum(), features), features, strict=True):
        assert grad.shape == feature.shape and not grad.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_do_not_depend_on_the_number_of_threads(layout):
    features = [feature.requires_grad_() for feature in random_pyramid("cpu", layout=layout, channels=70)]
    rois = random_rois("cpu", count=60)

    def results(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            pooled = cascadeops.multiscale_roi_align(features, rois, 7, STRIDES)
            return pooled, *torch.autograd.grad(pooled.square().sum(), features)
        finally:
            torch.set_num_threads(before)

    for one, three in zip(results(1), results(3), strict=True):
        assert torch.equal(one, three)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_mmdetection(device, layout):
    goldens = np.load(Path(__file__).parent / "goldens" / "ops.npz")

    def golden(key):
        return torch.from_numpy(goldens[key]).to(device)

    feature, rois = golden("ra_feat").contiguous(memory_format=layout).requires_grad_(), golden("ra_rois")
    for size, sampling_ratio in ((7, 0), (14, 0), (7, 2)):
        pooled = cascadeops.multiscale_roi_align([feature], rois, size, [4.0], sampling_ratio)
        torch.testing.assert_close(pooled, golden(f"ra_out_{size}_sr{sampling_ratio}"), rtol=0, atol=2e-6)
    pooled = cascadeops.multiscale_roi_align([feature], rois, 7, [4.0])
    (grad,) = torch.autograd.grad(pooled.square().sum(), feature)
    torch.testing.assert_close(grad, golden("ra_grad_sumsq_7_sr0"), rtol=1e-5, atol=1e-5)

    sides = golden("lvl_side")
    squares = torch.stack([torch.zeros_like(sides)] * 3 + [sides, sides], dim=1)
    assert torch.equal(choose_levels(squares, 4, 56.0, "mmdet"), golden("lvl_out"))


def small_problem(device, layout):
    features = random_pyramid(device, torch.float64, layout, channels=2, sizes=((6, 7), (3, 4)))
    rois = torch.tensor([[0.0, 2, 1, 19, 14], [1.0, -3, 4, 27, 23], [-1.0, 0, 0, 9, 9]], device=device)
    return [feature.requires_grad_() for feature in features], rois


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_right_to_second_order(device, layout):
    features, rois = small_problem(device, layout)
    extra = torch.randn(2, 2, 4, 3, dtype=torch.float64, device=device, requires_grad=True)
    vector = torch.randn(2, 2, dtype=torch.float64, device=device, requires_grad=True)

    def pool(*maps):
        return cascadeops.multiscale_roi_align(maps, rois, (2, 3), (4.0, 8.0), finest_size=10.0)

    def pool_all(*inputs):
        *maps, extra, vector = inputs
        added = {"extra": extra, "extra_stride": 7.0, "extra_subdivision": 2, "image_vector": vector}
        return cascadeops.multiscale_roi_align(maps, rois, (2, 1), (4.0, 8.0), finest_size=10.0, **added)

    for function, inputs in ((pool, features), (pool_all, [*features, extra, vector])):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=function is pool_all)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(device, layout):
    features, rois = small_problem(device, layout)
    options = ([0.25, 0.125], 0, True, 10.0, True)
    vector = torch.randn(2, 2, dtype=torch.float64, device=device, requires_grad=True)
    count = torch.tensor(2, device=device)
    for subdivision, *optional in ((0, None, None), (2, vector, count)):
        arguments = features, rois, 2, 3, *options, subdivision, *optional
        torch.library.opcheck(torch.ops.cascadeops.multiscale_roi_align, arguments)
    grad = torch.randn(3, 2, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    detached = [feature.detach() for feature in features]
    for subdivision, limit in ((0, None), (2, count)):
        arguments = grad, detached, rois, *options, subdivision, limit
        torch.library.opcheck(torch.ops.cascadeops.multiscale_roi_align_backward, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_without_a_graph_break(device, layout):
    features, rois = (
        [feature.requires_grad_() for feature in random_pyramid(device, layout=layout)],
        random_rois(device),
    )

    def pool(features, rois):
        return cascadeops.multiscale_roi_align(features, rois, 7, STRIDES).square().sum()

    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(pool(features, rois), features)
    for result, wanted in zip(torch.autograd.grad(compiled(features, rois), features), expected, strict=True):
        torch.testing.assert_close(result, wanted)


def call(**changes):
    arguments = {
        "features": [torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 4, 4)],
        "rois": torch.tensor([[0.0, 1, 1, 5, 5]]),
        "output_size": 7,
        "strides": (4.0, 8.0),
    }
    return cascadeops.multiscale_roi_align(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": []}, "features must hold 1 to 8 maps, got 0"),
        ({"features": [torch.zeros(2, 3, 8, 8)] * 9}, "features must hold 1 to 8 maps, got 9"),
        ({"features": [torch.zeros(3, 8, 8)]}, r"features\[0\] must have shape \[N, C, H, W\].*got \[3, 8, 8\]"),
        ({"features": [torch.zeros(2, 3, 0, 8)]}, r"features\[0\] must have shape.*one cell, got \[2, 3, 0, 8\]"),
        (
            {"features": [torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 4, 4)]},
            r"features\[1\] must have the batch size and channels of features\[0\], \[2, 3, 8, 8\], got \[2, 4, 4, 4\]",
        ),
        (
            {"features": [torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 4, 4).half()]},
            r"features\[1\] must have dtype Float, got Half",
        ),
        (
            {"features": [torch.zeros(2, 3, 8, 8).int()] * 2},
            "dtype must be float32, float64, float16 or bfloat16, got Int",
        ),
        ({"rois": torch.zeros(4, 4)}, r"rois must have shape \[K, 5\], got \[4, 4\]"),
        ({"rois": torch.zeros(4, 5).double()}, "rois must have dtype Float, got Double"),
        ({"rois": torch.tensor([[2.0, 0, 0, 1, 1]])}, r"rois\[0, 0\] must be a batch index in \[-1, 2\), got 2"),
        ({"rois": torch.tensor([[0.5, 0, 0, 1, 1]])}, r"rois\[0, 0\] must be a batch index in \[-1, 2\), got 0.5"),
        ({"rois": torch.tensor([[-2.0, 0, 0, 1, 1]])}, r"rois\[0, 0\] must be a batch index in \[-1, 2\), got -2"),
        (
            {"rois": torch.tensor([[torch.nan, 0, 0, 1, 1]])},
            r"rois\[0, 0\] must be a batch index in \[-1, 2\), got nan",
        ),
        ({"rois": torch.tensor([[0.0, 0, torch.nan, 1, 1]])}, r"rois\[0, 2\] must be finite, got nan"),
        ({"rois": torch.tensor([[0.0, 0, 0, 1, torch.inf]])}, r"rois\[0, 4\] must be finite, got inf"),
        ({"output_size": (7, 0)}, r"output_size must be positive, got \(7, 0\)"),
        ({"output_size": 2**20}, r"output_size must give a RoI fewer than 2\*\*31 values"),
        ({"strides": (4.0,)}, "strides must have one entry per map, 2, got 1"),
        ({"strides": (4.0, -8.0)}, "strides must be positive, got -8"),
        ({"finest_size": 0.0}, "finest_size must be positive, got 0"),
        (
            {"extra": torch.zeros(2, 4, 8, 8)},
            r"extra must have the batch size and channels of features\[0\], \[2, 3, 8, 8\], got \[2, 4, 8, 8\]",
        ),
        ({"extra": torch.zeros(2, 3, 8, 8), "strides": (4.0,)}, "strides must have one entry per map, 2, got 1"),
        ({"extra": torch.zeros(2, 3, 8, 8), "extra_stride": -1.0}, "strides must be positive, got -1"),
        (
            {"extra": torch.zeros(2, 3, 8, 8), "extra_subdivision": 1025},
            r"extra_subdivision must be in \[1, 1024\], got 1025",
        ),
        ({"image_vector": torch.zeros(2, 4)}, r"image_vector must have shape \[N, C\] = \[2, 3\], got \[2, 4\]"),
        ({"image_vector": torch.zeros(2, 3).half()}, "image_vector must have dtype Float, got Half"),
        ({"count": torch.tensor(2)}, r"count must be in \[0, K\] = \[0, 1\], got 2"),
        ({"count": torch.tensor(-1)}, r"count must be in \[0, K\] = \[0, 1\], got -1"),
        ({"count": torch.tensor([0, 1])}, r"count must hold one number, got shape \[2\]"),
        ({"count": torch.tensor(1.0)}, "count must have dtype Long, got Float"),
    ],
)
def test_errors_say_what_is_wrong(changes, message):
    with pytest.raises(RuntimeError, match=f"multiscale_roi_align: {message}"):
        call(**changes)


def test_errors_of_options():
    with pytest.raises(ValueError, match="multiscale_roi_align: extra_subdivision must be positive, got 0"):
        call(extra=torch.zeros(2, 3, 8, 8), extra_subdivision=0)
    with pytest.raises(
        ValueError, match='multiscale_roi_align: level_rule must be "mmdet" or "torchvision", got \'fpn\''
    ):
        call(level_rule="fpn")


def test_error_of_a_gradient_of_another_shape():
    features, rois = [torch.zeros(2, 3, 8, 8)], torch.tensor([[0.0, 1, 1, 5, 5]])
    with pytest.raises(RuntimeError, match=r"grad must have shape \[K, C, h, w\] = \[1, 3, h, w\], got \[2, 3, 7, 7\]"):
        torch.ops.cascadeops.multiscale_roi_align_backward(
            torch.zeros(2, 3, 7, 7), features, rois, [0.25], 0, True, 56.0, True, 0, None
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_skips_bad_rows_and_its_gradient_is_the_same_in_every_run():
    features = [feature.requires_grad_() for feature in random_pyramid("cuda", channels=64)]
    rois = torch.cat([torch.tensor([[7.0, 0, 0, 9, 9], [0.0, torch.nan, 0, 9, 9]]), random_rois("cpu", 300)]).cuda()
    pooled = cascadeops.multiscale_roi_align(features, rois, 7, STRIDES, finest_size=FINEST_SIZE)
    assert not pooled[:2].any() and pooled[2].any()
    weight = torch.randn_like(pooled)
    first, *others = (torch.autograd.grad(pooled, features, weight, retain_graph=True) for _ in range(20))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
