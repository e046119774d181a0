"""deform_conv2d against its reference, torchvision, and answers that can be checked on paper."""

import pytest
import torch
from tolerances import HALF_ROUNDINGS, assert_close_to_reference
from torch.nn.functional import conv2d

import cascadeops
from cascadeops.reference.deform_conv2d import deform_conv2d as reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
SHAPES = {  # images, channels, outputs, groups, offset groups, kernel, (height, width), stride, padding, dilation
    "plain": (2, 6, 5, 1, 1, (3, 3), (7, 9), 1, 1, 1),
    "odd sizes, every option": (2, 12, 10, 2, 3, (2, 3), (11, 6), (2, 1), (0, 2), (1, 2)),
    "offset groups cut weight groups": (1, 24, 6, 3, 4, (3, 3), (5, 8), 1, 1, 1),
    "groups narrower than a vector": (1, 40, 80, 20, 1, (3, 1), (6, 7), 1, (1, 0), 1),
    "more channels than a tile": (1, 700, 3, 1, 2, (1, 1), (4, 5), 1, 0, 1),
    "more taps than a tile": (1, 33, 18, 1, 1, (5, 5), (8, 6), 1, 2, 1),
    "several blocks of pixels": (2, 5, 4, 1, 1, (3, 3), (19, 23), 1, 1, 1),
    "batch beyond torchvision's step of 32": (33, 2, 3, 1, 1, (1, 2), (3, 4), 1, 0, 1),
    "depthwise": (1, 20, 20, 20, 20, (3, 3), (6, 5), 1, 1, 1),
}


def problem(name, device, dtype=torch.float64, layout=torch.contiguous_format, with_mask=True):
    """(input, offset, weight, bias, stride, padding, dilation, mask), with samples in and outside of the image."""
    images, channels, outputs, groups, offset_groups, kernel, size, *geometry = SHAPES[name]
    input = torch.randn(images, channels, *size).contiguous(memory_format=layout)
    weight = torch.randn(outputs, channels // groups, *kernel)
    out_size = conv2d(input, weight, None, *geometry, groups).shape[2:]
    taps = offset_groups * kernel[0] * kernel[1]
    tensors = (input, 2 * torch.randn(images, 2 * taps, *out_size), weight, torch.randn(outputs))
    mask = torch.rand(images, taps, *out_size).to(device, dtype) if with_mask else None
    return [*(tensor.to(device, dtype) for tensor in tensors), *geometry, mask]


def doubles(arguments):
    return [value.detach().double() if isinstance(value, torch.Tensor) else value for value in arguments]


def assert_close(result, exact, kernels):
    """As assert_close_to_reference, except that tensor cores cost half types a second rounding, that of the samples."""
    if not (kernels == "cuda" and result.dtype in (torch.float16, torch.bfloat16)):
        return assert_close_to_reference(result, exact)
    rounding = (exact.to(result.dtype).double() - exact).abs().max()
    assert result.isfinite().all() and (result.double() - exact).abs().max() <= 2 * HALF_ROUNDINGS * rounding


def with_gradients(function, arguments, grad):
    """The result and the gradients of all tensors among the arguments."""
    leaves = [value.detach().requires_grad_() if isinstance(value, torch.Tensor) else value for value in arguments]
    result = function(*leaves)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return [result.detach(), *torch.autograd.grad(result, tensors, grad.to(result.dtype))]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients_equal_the_reference(device, kernels, name, dtype, layout):
    arguments = problem(name, device, dtype, layout)
    grad = torch.randn(reference(*arguments).shape, device=device).to(dtype)
    results = with_gradients(cascadeops.deform_conv2d, arguments, grad)
    for result, exact in zip(results, with_gradients(reference, doubles(arguments), grad), strict=True):
        assert result.dtype == dtype
        assert_close(result, exact, kernels)
    assert results[0].is_contiguous(memory_format=layout)
    assert results[1].stride() == arguments[0].stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_offsets_and_mask_in_float32_beside_half_types(device, kernels, dtype):
    input, offset, weight, bias, *geometry, mask = problem("plain", device, torch.float32, torch.channels_last)
    arguments = [input.to(dtype), offset, weight.to(dtype), bias.to(dtype), *geometry, mask]
    grad = torch.randn(2, 5, 7, 9, device=device).to(dtype)
    results = with_gradients(cascadeops.deform_conv2d, arguments, grad)
    assert [result.dtype for result in results[1:]] == [dtype, torch.float32, dtype, dtype, torch.float32]
    for result, exact in zip(results, with_gradients(reference, doubles(arguments), grad), strict=True):
        assert_close(result, exact, kernels)


@pytest.mark.parametrize("name", ["plain", "odd sizes, every option"])
@pytest.mark.parametrize("with_mask", [False, True])
def test_equals_torchvision(device, name, with_mask):
    torchvision = pytest.importorskip("torchvision")
    arguments = problem(name, device, with_mask=with_mask)
    # Zero offsets put whole taps onto the cells and onto the rim one cell outside, where the samples have kinks.
    arguments[1][:, ::3] = 0
    grad = torch.randn_like(reference(*arguments))
    results = with_gradients(cascadeops.deform_conv2d, arguments, grad)
    for result, theirs in zip(results, with_gradients(torchvision.ops.deform_conv2d, arguments, grad), strict=True):
        assert_close_to_reference(result, theirs)


def test_without_offsets_it_is_a_convolution(device):
    input, offset, weight, bias, *geometry, _ = problem("odd sizes, every option", device)
    result = cascadeops.deform_conv2d(input, torch.zeros_like(offset), weight, bias, *geometry)
    assert_close_to_reference(result, conv2d(input, weight, bias, *geometry, groups=2))


def test_one_tap_on_paper(device):
    # Cells 1 2 / 3 4; the sample at (0.5, 0.25) is 1 * 0.375 + 2 * 0.125 + 3 * 0.375 + 4 * 0.125 = 2.25.
    cells = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], device=device, requires_grad=True)
    offset = torch.tensor([0.5, 0.25], device=device).reshape(1, 2, 1, 1).requires_grad_()
    mask = torch.full((1, 1, 1, 1), 0.5, device=device, requires_grad=True)
    weight = torch.full((1, 1, 1, 1), 10.0, device=device, requires_grad=True)
    bias = torch.ones(1, device=device, requires_grad=True)
    out = cascadeops.deform_conv2d(cells, offset, weight, bias, stride=2, mask=mask)
    assert out.item() == 2.25 * 0.5 * 10 + 1
    grads = torch.autograd.grad(out, [cells, offset, mask, weight, bias])
    assert grads[0].flatten().tolist() == [1.875, 0.625, 1.875, 0.625]  # 5 times the weights above
    assert grads[1].flatten().tolist() == [10.0, 5.0]  # 5 times the slopes: 2 a row, 1 a column
    assert grads[2].item() == 22.5 and grads[3].item() == 1.125 and grads[4].item() == 1


def test_samples_at_one_cell_outside_are_zero(device):
    # A row of ones, read at x = -1, -0.75, 7.75 and 8.
    cells = torch.ones(1, 1, 1, 8, device=device)
    offset = torch.zeros(1, 2, 1, 8, device=device)
    offset[0, 1, 0, [0, 1, 6, 7]] = torch.tensor([-1.0, -1.75, 1.75, 1.0], device=device)
    out = cascadeops.deform_conv2d(cells, offset, torch.ones(1, 1, 1, 1, device=device))
    assert out.flatten().tolist() == [0.0, 0.25, 1.0, 1.0, 1.0, 1.0, 0.25, 0.0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30, -3e9, 2.0**31])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_that_are_nowhere_count_as_zero(device, kernels, value, dtype):
    # torchvision dies of NaN offsets, and gives non-finite gradients for infinite ones.
    arguments = problem("plain", device, dtype)
    arguments[1][:, 3], arguments[1][1, 4] = value, value
    far = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
    far[1][:, 3], far[1][1, 4] = 1000, 1000
    grad = torch.randn(2, 5, 7, 9, device=device)
    results = with_gradients(cascadeops.deform_conv2d, arguments, grad)
    for result, wanted in zip(results, with_gradients(cascadeops.deform_conv2d, far, grad), strict=True):
        assert torch.equal(result, wanted)
        assert torch.isfinite(result).all()
    assert not results[2][:, 3].any()
    assert_close(results[0], reference(*doubles(arguments)), kernels)


def test_cells_that_are_not_finite_spoil_only_what_reads_them(device):
    arguments = problem("plain", device, torch.float32)
    arguments[0][0, 2, 3, 4] = torch.nan
    spoilt = cascadeops.deform_conv2d(*arguments).isnan()
    assert torch.equal(spoilt, reference(*doubles(arguments)).isnan())
    assert spoilt.any() and not spoilt.all() and not spoilt[1].any()


@pytest.mark.parametrize(("images", "height"), [(0, 7), (2, 7)])
def test_empty_batch(device, images, height):
    input = torch.zeros(images, 4, height, 5, device=device, requires_grad=True)
    offset = torch.zeros(images, 18, height, 5, device=device, requires_grad=True)
    weight = torch.ones(3, 4, 3, 3, device=device, requires_grad=True)
    out = cascadeops.deform_conv2d(input, offset, weight, padding=1)
    assert out.shape == (images, 3, height, 5)
    for grad, leaf in zip(
        torch.autograd.grad(out.sum(), [input, offset, weight]), [input, offset, weight], strict=True
    ):
        assert grad.shape == leaf.shape and torch.isfinite(grad).all()
        assert images > 0 or not grad.any()


def test_tensors_of_any_strides(device):
    arguments = problem("odd sizes, every option", device, torch.float32)
    grad = torch.randn_like(reference(*arguments))
    expected = with_gradients(reference, doubles(arguments), grad)

    def scatter(tensor):
        """The same values, every other element of a larger tensor whose dimensions are reversed."""
        wide = torch.full((*tensor.shape[::-1], 2), torch.nan, device=device)
        wide[..., 0] = tensor.permute(*range(tensor.dim())[::-1])
        return wide[..., 0].permute(*range(tensor.dim())[::-1])

    strided = [scatter(value) if isinstance(value, torch.Tensor) else value for value in arguments]
    for result, exact in zip(with_gradients(cascadeops.deform_conv2d, strided, scatter(grad)), expected, strict=True):
        assert_close_to_reference(result, exact)
    leaves = [value.detach().requires_grad_() for value in arguments[:4]]
    out = cascadeops.deform_conv2d(*leaves, *arguments[4:])
    ones = with_gradients(reference, doubles(arguments), torch.ones_like(grad))
    for result, exact in zip(torch.autograd.grad(out.sum(), leaves), ones[1:5], strict=True):  # a gradient of stride 0
        assert_close_to_reference(result, exact)


def test_unneeded_gradients_are_not_computed(device):
    input, offset, weight, bias, *geometry, mask = problem("plain", device)
    weight.requires_grad_()
    cascadeops.deform_conv2d(input, offset, weight, bias, *geometry, mask).sum().backward()
    assert weight.grad is not None and input.grad is None and mask.grad is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_do_not_depend_on_the_number_of_threads(layout):
    images, channels, size = 2, 70, (13, 17)
    input = torch.randn(images, channels, *size).contiguous(memory_format=layout)
    offset, mask = 2 * torch.randn(images, 36, *size), torch.rand(images, 18, *size)
    arguments = [input, offset, torch.randn(130, channels, 3, 3), torch.randn(130), 1, 1, 1, mask]
    grad = torch.randn(images, 130, *size)

    def results(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return with_gradients(cascadeops.deform_conv2d, arguments, grad)
        finally:
            torch.set_num_threads(before)

    one = results(1)
    for threads in (2, 3, 7):
        assert all(torch.equal(a, b) for a, b in zip(one, results(threads), strict=True))


@pytest.mark.parametrize("repeats", [3])
def test_deterministic_when_asked(device, repeats):
    arguments = problem("several blocks of pixels", device, torch.float32)
    grad = torch.randn_like(reference(*arguments))
    torch.use_deterministic_algorithms(True)
    first = with_gradients(cascadeops.deform_conv2d, arguments, grad)
    for _ in range(repeats):
        again = with_gradients(cascadeops.deform_conv2d, arguments, grad)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("scale", [1e-20, 1, 1e20])
def test_deterministic_gradients_may_be_small_and_large(device, scale):
    arguments = problem("plain", device, torch.float32)
    grad = scale * torch.randn_like(reference(*arguments))
    expected = with_gradients(reference, doubles(arguments), grad)
    torch.use_deterministic_algorithms(True)  # on CUDA: fixed point, whose unit must follow the numbers
    for result, exact in zip(with_gradients(cascadeops.deform_conv2d, arguments, grad), expected, strict=True):
        assert_close_to_reference(result, exact)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_fixed_point_cannot_hold():
    arguments = problem("plain", "cuda", torch.float32)
    grad = torch.randn_like(reference(*arguments))
    grad[1, 2, 3, 4] = torch.inf
    torch.use_deterministic_algorithms(True)
    assert with_gradients(cascadeops.deform_conv2d, arguments, grad)[1].isnan().all()
    with pytest.raises(RuntimeError, match="deform_conv2d: on CUDA the gradient of a float64 input"):
        with_gradients(cascadeops.deform_conv2d, doubles(arguments), grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["offset groups cut weight groups", "odd sizes, every option"])
@pytest.mark.parametrize("with_mask", [False, True])
def test_gradcheck(device, name, layout, with_mask):
    input, offset, weight, bias, *geometry, mask = problem(name, device, layout=layout, with_mask=with_mask)
    # The samples have kinks at whole positions: keep away from them.
    offset = offset.floor() + 0.1 + 0.8 * torch.rand_like(offset)
    leaves = [tensor.requires_grad_() for tensor in (input, offset, weight, bias, mask) if tensor is not None]

    def convolve(input, offset, weight, bias, mask=None):
        return cascadeops.deform_conv2d(input, offset, weight, bias, *geometry, mask)

    assert torch.autograd.gradcheck(convolve, leaves, fast_mode=True, nondet_tol=1e-12 if device.type == "cuda" else 0)


def test_second_derivative_says_that_there_is_none(device):
    arguments = problem("plain", device)
    arguments[0].requires_grad_()
    (grad,) = torch.autograd.grad(cascadeops.deform_conv2d(*arguments).square().sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="deform_conv2d: a second derivative is not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["plain", "odd sizes, every option"])
@pytest.mark.parametrize("case", ["contiguous", "channels_last", "permuted", "no mask", "empty"])
def test_opcheck(device, name, case):
    layout = torch.channels_last if case == "channels_last" else torch.contiguous_format
    input, offset, weight, bias, *geometry, mask = problem(name, device, layout=layout, with_mask=case != "no mask")
    if case == "permuted":
        input, offset = input.mT.contiguous().mT, offset.mT.contiguous().mT
    if case == "empty":
        input, offset, mask = input[:0], offset[:0], mask[:0]
    pairs = [[value, value] if isinstance(value, int) else list(value) for value in geometry]
    leaves = [t if t is None else t.detach().requires_grad_() for t in (input, offset, mask, weight, bias)]
    ops = torch.ops.cascadeops
    torch.library.opcheck(ops.deform_conv2d, (*leaves, *pairs))
    grad = torch.randn_like(ops.deform_conv2d(input, offset, mask, weight, bias, *pairs))
    torch.library.opcheck(ops.deform_conv2d_backward_data, (grad, input, offset, mask, weight, *pairs, False))
    torch.library.opcheck(ops.deform_conv2d_backward_weight, (grad, input, offset, mask, weight, *pairs))


class Block(torch.nn.Module):
    """A deformable convolution as networks use it: offsets and mask from a convolution."""

    def __init__(self):
        super().__init__()
        self.displace = torch.nn.Conv2d(6, 27, 3, padding=1)
        self.convolve = cascadeops.DeformConv2d(6, 8, 3, padding=1)

    def forward(self, x):
        offset, mask = self.displace(x).split([18, 9], dim=1)
        return self.convolve(x, offset, mask.sigmoid())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_without_a_graph_break(device, layout):
    block = Block().to(device, memory_format=layout)
    x = torch.randn(2, 6, 9, 7, device=device).contiguous(memory_format=layout)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    leaves = list(block.parameters())
    expected = torch.autograd.grad(block(x).square().sum(), leaves)
    for result, wanted in zip(torch.autograd.grad(compiled(x).square().sum(), leaves), expected, strict=True):
        torch.testing.assert_close(result, wanted)


def test_export_with_dynamic_batch_and_size(device):
    block = Block().to(device).eval()
    batch, height, width = torch.export.Dim("batch"), torch.export.Dim("height"), torch.export.Dim("width")
    shapes = ({0: batch, 2: height, 3: width},)
    program = torch.export.export(block, (torch.randn(2, 6, 9, 7, device=device),), dynamic_shapes=shapes)
    x = torch.randn(3, 6, 12, 10, device=device)
    torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_the_dtype_of_the_input(device, dtype):
    block = Block().to(device)
    x = torch.randn(2, 6, 9, 7, device=device)
    with torch.autocast(device.type, dtype=dtype):
        first = block.convolve(x, torch.zeros(2, 18, 9, 7, device=device, dtype=dtype))
        out = block(x.to(dtype))
        mixed = block.convolve(x.to(dtype), torch.zeros(2, 18, 9, 7, device=device, dtype=torch.float64))
    assert (first.dtype, out.dtype, mixed.dtype) == (torch.float32, dtype, dtype)
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in block.parameters())
    torch.testing.assert_close(out.float(), block(x), rtol=0.1, atol=0.1)


def test_module_is_that_of_torchvision():
    torchvision = pytest.importorskip("torchvision")
    for options in ({}, {"groups": 2, "bias": False, "padding": (1, 2), "dilation": 2, "stride": (1, 2)}):
        torch.manual_seed(0)
        ours = cascadeops.DeformConv2d(4, 6, (3, 2), **options)
        torch.manual_seed(0)
        theirs = torchvision.ops.DeformConv2d(4, 6, (3, 2), **options)
        assert repr(ours) == repr(theirs)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        ours.load_state_dict(torchvision.ops.DeformConv2d(4, 6, (3, 2), **options).state_dict())


def test_module_describes_itself_and_checks_its_groups():
    module = cascadeops.DeformConv2d(4, 6, 3, padding=1, groups=2, bias=False)
    assert repr(module) == "DeformConv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=2, bias=False)"
    assert list(module.state_dict()) == ["weight"] and module.weight.shape == (6, 2, 3, 3)
    with pytest.raises(ValueError, match="in_channels must be divisible by groups, got 5 and 2"):
        cascadeops.DeformConv2d(5, 6, 3, groups=2)
