"""self_calibrated_gate against its reference, PyTorch's nearest rule, and answers that can be checked on paper."""

import pytest
import torch
from tolerances import assert_close_to_reference
from torch.nn.functional import interpolate

import cascadeops
from cascadeops.reference.self_calibrated_gate import nearest_upsample
from cascadeops.reference.self_calibrated_gate import self_calibrated_gate as reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
# Pixels and cells: divisible by the pooling; 7 x 9 pooled by 4; res5 of an 800 x 1344 image; where the float32 rounding
# decides (pixel 37 of 74); fewer pixels than cells; one cell.
SIZES = (
    ((8, 12), (2, 3)),
    ((7, 9), (1, 2)),
    ((25, 42), (6, 10)),
    ((74, 5), (6, 5)),
    ((3, 6), (5, 9)),
    ((4, 19), (1, 1)),
)


def random_maps(device, dtype=torch.float32, layout=torch.channels_last, channels=3, sizes=SIZES[2], images=2):
    """x, k3, k2"""
    size, cells = sizes
    maps = (2 * torch.randn(images, channels, *shape, device=device) for shape in (size, size, cells))
    return [map.to(dtype).contiguous(memory_format=layout) for map in maps]


def gradients(function, maps, grad):
    leaves = [map.detach().requires_grad_() for map in maps]
    return torch.autograd.grad(function(*leaves), leaves, grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 5, 16, 83])
def test_equals_reference_in_every_dtype_and_layout(device, dtype, layout, channels):
    maps = random_maps(device, dtype, layout, channels)
    out = cascadeops.self_calibrated_gate(*maps)
    assert out.dtype == dtype and out.is_contiguous(memory_format=layout)
    exact = [map.double() for map in maps]
    assert_close_to_reference(out, reference(*exact))
    grad = torch.randn_like(maps[0])
    for ours, expected in zip(
        gradients(cascadeops.self_calibrated_gate, maps, grad), gradients(reference, exact, grad.double()), strict=True
    ):
        assert ours.dtype == dtype and ours.is_contiguous(memory_format=layout)
        assert_close_to_reference(ours, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_framework_at_every_size(device, sizes, layout):
    maps = random_maps(device, layout=layout, sizes=sizes)
    eager = maps[1] * torch.sigmoid(maps[0] + interpolate(maps[2], maps[0].shape[2:]))
    assert_close_to_reference(cascadeops.self_calibrated_gate(*maps), eager.double())
    exact, grad = [map.double() for map in maps], torch.randn_like(maps[0])
    for ours, expected in zip(
        gradients(cascadeops.self_calibrated_gate, maps, grad), gradients(reference, exact, grad.double()), strict=True
    ):
        assert_close_to_reference(ours, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pixels_take_their_cells_by_the_rule_of_the_framework(device, layout):
    """Exactly, at 1 to 130 cells over 1 to 130 pixels: k2 tells which cell a pixel took."""
    for pixels in [*range(1, 131, 3), 74, 96, 128]:
        for cells in range(1, 131, 2):
            k2 = torch.arange(2.0 * cells, device=device).reshape(1, 2, 1, cells) / 64
            k2 = k2.contiguous(memory_format=layout)
            ones = torch.ones(1, 2, 1, pixels, device=device).contiguous(memory_format=layout)
            out = cascadeops.self_calibrated_gate(0 * ones, ones, k2)
            table = cascadeops.self_calibrated_gate(0 * k2, torch.ones_like(k2), k2)
            assert torch.equal(out, interpolate(table, (1, pixels))), (pixels, cells)
            assert torch.equal(nearest_upsample(table, (1, pixels)), interpolate(table, (1, pixels)))


def test_an_answer_on_paper(device):
    # sigmoid(0) = 1/2, and sigmoid(log 3) = 3/4; cells of 2 x 2 pixels.
    log3 = torch.tensor(3.0).log().item()
    x = torch.zeros(1, 1, 4, 4, device=device)
    k3 = torch.full((1, 1, 4, 4), 8.0, device=device)
    k2 = torch.tensor([[[[0.0, log3], [-log3, 0.0]]]], device=device)
    expected = torch.tensor([[4.0, 4, 6, 6], [4, 4, 6, 6], [2, 2, 4, 4], [2, 2, 4, 4]], device=device)
    torch.testing.assert_close(cascadeops.self_calibrated_gate(x, k3, k2)[0, 0], expected)
    # The derivative of the sigmoid is 1/4 and 3/16: times 8, and for k2 times the 4 pixels of a cell.
    grad_x, grad_k3, grad_k2 = gradients(cascadeops.self_calibrated_gate, (x, k3, k2), torch.ones_like(x))
    torch.testing.assert_close(grad_k3[0, 0], expected / 8)
    torch.testing.assert_close(grad_k2[0, 0], torch.tensor([[8.0, 6.0], [6.0, 8.0]], device=device))
    torch.testing.assert_close(grad_x[0, 0, 0], torch.tensor([2.0, 2.0, 1.5, 1.5], device=device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sigmoid_is_accurate_and_saturates(device, layout):
    """Relative to the value itself, over all of float32's exponents; its derivative, too."""
    t = torch.cat([torch.linspace(-86, 86, 5001), torch.logspace(-30, 1, 1000), -torch.logspace(-30, 1, 1000)])
    t = t.reshape(1, 1, 1, -1).expand(1, 2, 1, -1).contiguous(memory_format=layout).to(device)
    zero, ones = torch.zeros(1, 2, 1, 1, device=device), torch.ones_like(t)
    value = cascadeops.self_calibrated_gate(t, ones, zero)
    exact = torch.sigmoid(t.double())
    assert ((value - exact).abs() <= 5e-6 * exact).all()
    slope, grad_k3, _ = gradients(cascadeops.self_calibrated_gate, (t, ones, zero), ones)
    assert ((grad_k3 - exact).abs() <= 5e-6 * exact).all()
    exact = exact * torch.sigmoid(-t.double())
    assert ((slope - exact).abs() <= 1e-5 * exact).all()

    ends = torch.tensor([-torch.inf, -3e38, -200, -89, 89, 200, 3e38, torch.inf, torch.nan], device=device)
    ends = ends.reshape(1, 1, 1, 9).expand(1, 2, 1, 9).contiguous(memory_format=layout)
    value = cascadeops.self_calibrated_gate(ends, torch.ones_like(ends), zero)[0, 0, 0]
    expected = torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1, torch.nan], device=device)
    tiny = 2.0**-125  # stands for 0
    torch.testing.assert_close(value, expected, rtol=0, atol=tiny, equal_nan=True)
    slope, _, _ = gradients(cascadeops.self_calibrated_gate, (ends, torch.ones_like(ends), zero), torch.ones_like(ends))
    torch.testing.assert_close(slope[0, 0, 0], 0 * expected, rtol=0, atol=tiny, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_a_half_type_is_read_and_rounded_as_by_pytorch(device, dtype):
    # A gate of 1 gives k3 back; gates of 1/2 and nearly 1 round: ties, subnormal numbers, infinity, NaN.
    k3 = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(1, 64, 32, 32).to(device)
    k3 = k3.contiguous(memory_format=torch.channels_last)
    zero = torch.zeros(1, 64, 1, 1, dtype=dtype, device=device)
    for level in (80.0, 0.0, 5.0):
        x = torch.full_like(k3, level)
        expected = (k3.float() * torch.sigmoid(x.float())).to(dtype)
        result = cascadeops.self_calibrated_gate(x, k3, zero)
        if level == 5.0:  # the sigmoid itself is rounded elsewhere
            torch.testing.assert_close(result, expected, equal_nan=True, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
        else:
            torch.testing.assert_close(result, expected, equal_nan=True, rtol=0, atol=0)
        gradient = torch.ops.cascadeops.self_calibrated_gate_backward(k3, x, torch.ones_like(k3), zero)
        torch.testing.assert_close(gradient[1], result, equal_nan=True, rtol=0, atol=0)


def test_maps_of_any_strides_are_read_where_they_are(device):
    wide = torch.randn(2, 26, 43, 40, device=device)
    x = wide[:, 1:, 1:, ::2].permute(0, 3, 1, 2)  # channels two apart
    k3 = torch.randn(2, 20, 42, 25, device=device).mT
    k2 = torch.randn(1, 20, 1, 10, device=device).expand(2, 20, 6, 10)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    for maps in ((x, k3, k2), (channels_last, k3, k2), (channels_last[:, 2:, 3:, 1:], k3[:, 2:, 3:, 1:], k2[:, 2:])):
        exact = [map.double() for map in maps]
        assert_close_to_reference(cascadeops.self_calibrated_gate(*maps), reference(*exact))
        grad = torch.ones(1, device=device).expand_as(maps[0])  # the gradient of a sum: stride 0
        for ours, expected in zip(
            gradients(cascadeops.self_calibrated_gate, maps, grad),
            gradients(reference, exact, grad.double()),
            strict=True,
        ):
            assert_close_to_reference(ours, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8), (2, 3, 0, 8), (2, 3, 8, 0)])
def test_empty(device, shape, layout):
    x = torch.zeros(shape, device=device).contiguous(memory_format=layout).requires_grad_()
    k2 = torch.zeros(*shape[:2], 2, 2, device=device, requires_grad=True)
    out = cascadeops.self_calibrated_gate(x, x, k2)
    assert out.shape == shape
    grad_x, grad_k2 = torch.autograd.grad(out.sum(), (x, k2))
    assert grad_x.shape == shape and grad_k2.shape == k2.shape and not grad_k2.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_do_not_depend_on_the_number_of_threads(layout):
    maps = random_maps("cpu", layout=layout, channels=40, sizes=((50, 84), (12, 21)))
    grad = torch.randn_like(maps[0])

    def results(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            gate = cascadeops.self_calibrated_gate(*maps)
            return gate, *gradients(cascadeops.self_calibrated_gate, maps, grad)
        finally:
            torch.set_num_threads(before)

    for one, three in zip(results(1), results(3), strict=True):
        assert torch.equal(one, three)


def test_backward_saves_nothing_but_the_arguments(device):
    maps = [map.requires_grad_() for map in random_maps(device)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda map: saved.append(map.data_ptr()) or map, lambda map: map):
        cascadeops.self_calibrated_gate(*maps)
    assert sorted(saved) == sorted(map.data_ptr() for map in maps)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [((5, 6), (1, 2)), ((2, 3), (3, 5))])
def test_gradients_are_right_to_second_order(device, layout, sizes):
    maps = [map.requires_grad_() for map in random_maps(device, torch.float64, layout, 2, sizes, images=1)]
    assert torch.autograd.gradcheck(cascadeops.self_calibrated_gate, maps)  # which also wants the same bits again
    assert torch.autograd.gradgradcheck(cascadeops.self_calibrated_gate, maps)


@pytest.mark.parametrize("case", ["contiguous", "channels_last", "permuted", "empty"])
def test_opcheck(device, case):
    layout = torch.channels_last if case == "channels_last" else torch.contiguous_format
    maps = random_maps(device, layout=layout, sizes=((6, 9), (1, 2)), images=0 if case == "empty" else 2)
    if case == "permuted":
        maps = [map.transpose(2, 3) for map in maps]
    grad = torch.randn_like(maps[0])
    maps = [map.requires_grad_() for map in maps]
    torch.library.opcheck(torch.ops.cascadeops.self_calibrated_gate, maps)
    torch.library.opcheck(torch.ops.cascadeops.self_calibrated_gate_backward, (grad, *maps))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_and_exports(device, layout):
    maps = [map.requires_grad_() for map in random_maps(device, layout=layout)]

    def gate(x, k3, k2):
        return cascadeops.self_calibrated_gate(x, k3, k2).square()

    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    for result, wanted in zip(
        torch.autograd.grad(compiled(*maps).sum(), maps), torch.autograd.grad(gate(*maps).sum(), maps), strict=True
    ):
        torch.testing.assert_close(result, wanted)

    class Gate(torch.nn.Module):
        forward = staticmethod(gate)

    detached = tuple(map.detach() for map in maps)
    exported = torch.export.export(Gate(), detached)
    assert torch.equal(exported.module()(*detached), gate(*detached))


def test_autocast_brings_the_maps_to_one_dtype(device):
    x, k3, k2 = random_maps(device)
    with torch.autocast(device.type, torch.bfloat16):
        out = cascadeops.self_calibrated_gate(x, k3.bfloat16(), k2)
    assert torch.equal(out, cascadeops.self_calibrated_gate(x.bfloat16(), k3.bfloat16(), k2.bfloat16()))
    with torch.autocast(device.type, torch.bfloat16):
        doubles = [map.double() for map in (x, k3, k2)]
        assert cascadeops.self_calibrated_gate(*doubles).dtype == torch.float64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 8, 8)}, r"x must have shape \[N, C, H, W\], got \[3, 8, 8\]"),
        ({"k3": torch.zeros(2, 3, 8, 9)}, r"k3 must have the shape of x, \[2, 3, 8, 8\], got \[2, 3, 8, 9\]"),
        ({"k2": torch.zeros(2, 4, 2, 2)}, r"k2 must have shape \[N, C, h, w\] = \[2, 3, h, w\], got \[2, 4, 2, 2\]"),
        ({"k2": torch.zeros(2, 3, 0, 2)}, r"k2 must have at least one cell, got \[2, 3, 0, 2\]"),
        ({"k3": torch.zeros(2, 3, 8, 8).half()}, "k3 must have dtype Float, got Half"),
        ({"k2": torch.zeros(2, 3, 2, 2).double()}, "k2 must have dtype Float, got Double"),
        (
            {name: torch.zeros(2, 3, 8, 8).int() for name in ("x", "k3", "k2")},
            "dtype must be float32, float64, float16 or bfloat16, got Int",
        ),
        (
            {name: torch.zeros(1, 1, 1, 1).expand(1, 1, 1, 2**24 + 1) for name in ("x", "k3")}
            | {"k2": torch.zeros(1, 1, 1, 1)},
            r"x, k3 and k2 must have at most 2\*\*24 rows and columns",
        ),
    ],
)
def test_errors_say_what_is_wrong(changes, message):
    maps = {"x": torch.zeros(2, 3, 8, 8), "k3": torch.zeros(2, 3, 8, 8), "k2": torch.zeros(2, 3, 2, 2)}
    with pytest.raises(RuntimeError, match=f"self_calibrated_gate: {message}"):
        cascadeops.self_calibrated_gate(**(maps | changes))


def test_error_of_a_gradient_of_another_shape():
    maps = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 2, 2)
    with pytest.raises(RuntimeError, match=r"grad must have the shape of x, \[2, 3, 8, 8\], got \[2, 3, 8, 7\]"):
        torch.ops.cascadeops.self_calibrated_gate_backward(torch.zeros(2, 3, 8, 7), *maps)
