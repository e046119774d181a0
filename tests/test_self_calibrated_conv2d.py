"""The self-calibrated convolution: function, module and checkpoint names, against plain layers."""

import importlib

import pytest
import torch
from tolerances import assert_close_to_reference
from torch import nn

import cascadeops
from cascadeops.reference.self_calibrated_conv2d import self_calibrated_conv2d as reference

module_of_operator = importlib.import_module("cascadeops.self_calibrated_conv2d")  # the function has its name

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


class PlainLayers(nn.Module):
    """The definition in layers, each pass by itself."""

    def __init__(self, channels, stride, dilation, groups, pooling):
        super().__init__()

        def conv(stride):
            return nn.Conv2d(channels, channels, 3, stride, dilation, dilation, groups, bias=False)

        self.k2 = nn.Sequential(nn.AvgPool2d(pooling), conv(1), nn.BatchNorm2d(channels))
        self.k3 = nn.Sequential(conv(1), nn.BatchNorm2d(channels))
        self.k4 = nn.Sequential(conv(stride), nn.BatchNorm2d(channels))

    def forward(self, x):
        k2 = nn.functional.interpolate(self.k2(x), x.shape[2:])
        return self.k4(self.k3(x) * torch.sigmoid(x + k2))


def random_statistics(module: nn.Module) -> nn.Module:
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return module


def pair(*settings) -> tuple[cascadeops.SelfCalibratedConv2d, PlainLayers]:
    """The module and the plain layers with the same parameters, in float64."""
    ours, plain = cascadeops.SelfCalibratedConv2d(*settings), random_statistics(PlainLayers(*settings))
    ours.load_state_dict(plain.state_dict(), strict=True)
    return ours.double(), plain.double()


def random_arguments(device, dtype, layout, channels=8, size=(13, 18)):
    x = torch.randn(2, channels, *size, device=device)
    weights = [torch.randn(channels, channels, 3, 3, device=device) / (9 * channels) ** 0.5 for _ in range(3)]
    biases = [torch.randn(channels, device=device) for _ in range(3)]
    return [tensor.to(dtype) for tensor in (x.contiguous(memory_format=layout), *weights, *biases)]


SETTINGS = [
    (8, 1, 1, 1, 4),
    (8, 2, 1, 1, 4),
    (8, 1, 2, 1, 4),
    (8, 2, 1, 4, 3),
]  # channels, stride, dilation, groups ...


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("size", [(12, 16), (7, 9)])
def test_module_equals_plain_layers(device, settings, size):
    """In training, running statistics and gradients included, and in eval mode."""
    ours, plain = (module.to(device) for module in pair(*settings))
    for training in (True, False):
        x = torch.randn(2, settings[0], *size, dtype=torch.float64, device=device, requires_grad=True)
        results = [module.train(training)(x) for module in (ours, plain)]
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
        grad = torch.randn_like(results[0])
        gradients = [
            torch.autograd.grad(result, [x, *module.parameters()], grad)
            for result, module in zip(results, (ours, plain), strict=True)
        ]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        for one, other in zip(ours.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_parameters_have_the_names_of_published_checkpoints():
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {f"{conv}.weight" for conv in ("k2.1", "k3.0", "k4.0")}
    expected |= {f"{bn}.{name}" for bn in ("k2.2", "k3.1", "k4.1") for name in norm}
    assert set(cascadeops.SelfCalibratedConv2d(8).state_dict()) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_function_equals_reference_in_every_dtype_and_layout(device, dtype, layout):
    arguments = random_arguments(device, dtype, layout)
    out = cascadeops.self_calibrated_conv2d(*arguments, stride=2)
    exact = reference(*(tensor.double() for tensor in arguments), stride=2)
    assert out.dtype == dtype and out.shape == (2, 8, 7, 9)
    if dtype in (torch.float32, torch.float64):
        return assert_close_to_reference(out, exact)
    # The convolutions round between each other, as the framework's do: its composition is the measure.
    eager = reference(*arguments, stride=2)
    assert (out.double() - exact).abs().mean() <= 1.1 * (eager.double() - exact).abs().mean()


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 9), (9, 2)])
def test_a_map_smaller_than_the_pooling_is_one_cell(device, size):
    x, *weights, b2, b3, b4 = random_arguments(device, torch.float64, torch.channels_last, size=size)
    out = cascadeops.self_calibrated_conv2d(x, *weights, b2, b3, b4)
    conv = nn.functional.conv2d
    pooled = nn.functional.avg_pool2d(x, (min(4, size[0]), min(4, size[1])))
    k2 = nn.functional.interpolate(conv(pooled, weights[0], b2, padding=1), size)
    gated = conv(x, weights[1], b3, padding=1) * torch.sigmoid(x + k2)
    torch.testing.assert_close(out, conv(gated, weights[2], b4, padding=1))
    module = cascadeops.SelfCalibratedConv2d(8).double().to(device)
    assert module.eval()(x).shape == module.train()(x).shape == x.shape


def test_an_answer_on_paper(device):
    # Only the middle taps count: k2 = 0 * pooled + log 3, k3 = 2 x, k4 = identity. x = 0 but for one pixel.
    def middle(value):
        weight = torch.zeros(1, 1, 3, 3, device=device)
        weight[0, 0, 1, 1] = value
        return weight

    x = torch.zeros(1, 1, 4, 4, device=device)
    x[0, 0, 2, 1] = 8.0
    bias = torch.tensor([3.0], device=device).log()
    out = cascadeops.self_calibrated_conv2d(x, middle(0.0), middle(2.0), middle(1.0), k2_bias=bias)
    expected = torch.zeros(4, 4, device=device)
    expected[2, 1] = 16 / (1 + torch.tensor(-8.0).exp().item() / 3)
    torch.testing.assert_close(out[0, 0], expected)
    # With k3 constant the gate alone is seen: sigmoid(log 3) = 3/4 everywhere else.
    one = torch.ones(1, device=device)
    out = cascadeops.self_calibrated_conv2d(x, middle(0.0), middle(0.0), middle(1.0), k2_bias=bias, k3_bias=one)
    assert out[0, 0, 0, 0].item() == pytest.approx(0.75)


def test_folding_works_without_scale_and_after_folding_elsewhere(device):
    ours, plain = (module.to(device).eval() for module in pair(*SETTINGS[0]))
    x = torch.randn(1, 8, 9, 11, dtype=torch.float64, device=device)
    for module in (ours, plain):
        module.k3[1] = nn.BatchNorm2d(8, affine=False).double().to(device).eval()
        module.k3[1].running_mean.fill_(0.3)
    torch.testing.assert_close(ours(x), plain(x))
    expected = plain(x)
    for branch in (ours.k2, ours.k3, ours.k4):  # as a model's own folding leaves it
        branch[-2] = nn.utils.fusion.fuse_conv_bn_eval(branch[-2], branch[-1])
        branch[-1] = nn.Identity()
    torch.testing.assert_close(ours(x), expected)
    torch.testing.assert_close(ours.train()(x), expected)


def test_gradcheck(device):
    arguments = random_arguments(device, torch.float64, torch.channels_last, channels=2, size=(5, 6))
    arguments[0] = arguments[0][:1]
    assert torch.autograd.gradcheck(
        cascadeops.self_calibrated_conv2d, [tensor.requires_grad_() for tensor in arguments]
    )


@pytest.mark.parametrize("training", [True, False])
def test_compiles_and_exports(device, training):
    ours, plain = pair(*SETTINGS[1])
    module, plain = ours.float().to(device).train(training), plain.float().to(device).train(training)
    x = torch.randn(2, 8, 13, 18, device=device).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain(x))
    if not training:
        exported = torch.export.export(module, (x,))
        torch.testing.assert_close(exported.module()(x), plain(x))


def test_autocast(device):
    module = random_statistics(cascadeops.SelfCalibratedConv2d(8)).to(device)
    x = torch.randn(2, 8, 13, 18, device=device)
    for training in (True, False):
        module.train(training)
        with torch.autocast(device.type, torch.bfloat16):
            out = module(x)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), module(x), rtol=0.05, atol=0.05)
        out.float().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(8, 9, 9)}, r"x must have shape \[N, C, H, W\] with at least one pixel, got \[8, 9, 9\]"),
        ({"x": torch.zeros(2, 8, 0, 9)}, r"x must have shape .* at least one pixel, got \[2, 8, 0, 9\]"),
        ({"k2_weight": torch.zeros(8, 8, 1, 1)}, r"k2_weight must have shape \[8, 8, 3, 3\], got \[8, 8, 1, 1\]"),
        ({"k3_weight": torch.zeros(4, 8, 3, 3)}, r"k3_weight must have shape \[8, 8, 3, 3\], got \[4, 8, 3, 3\]"),
        ({"k4_weight": torch.zeros(4, 4, 3, 3)}, r"k4_weight must have shape \[D, 8, 3, 3\], got \[4, 4, 3, 3\]"),
        ({"k4_weight": torch.zeros(())}, r"k4_weight must have shape \[D, 8, 3, 3\], got \[\]"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"dilation": -1}, "dilation must be at least 1, got -1"),
        ({"pooling": 0}, "pooling must be at least 1, got 0"),
        ({"groups": 3}, "groups must divide the 8 channels of x, got 3"),
        (
            {"implementation": "cudnn"},
            r"implementation must be one of \('convolutions', 'triton', 'measured'\), got 'cudnn'",
        ),
        ({"implementation": "triton"}, 'implementation="triton" needs CUDA tensors, got cpu'),
    ],
)
def test_errors_say_what_is_wrong(changes, message):
    arguments = {"x": torch.zeros(2, 8, 9, 9)}
    arguments |= {f"{branch}_weight": torch.zeros(8, 8, 3, 3) for branch in ("k2", "k3", "k4")}
    with pytest.raises(ValueError, match=f"self_calibrated_conv2d: {message}"):
        cascadeops.self_calibrated_conv2d(**(arguments | changes))


def test_measured_never_measures_where_the_kernel_cannot_serve(monkeypatch):
    monkeypatch.setattr(module_of_operator, "_milliseconds", lambda function: pytest.fail("timed"))
    arguments = random_arguments("cpu", torch.float32, torch.channels_last)
    result = cascadeops.self_calibrated_conv2d(*arguments, implementation="measured")
    assert torch.equal(result, cascadeops.self_calibrated_conv2d(*arguments))
    compiled = torch.compile(cascadeops.self_calibrated_conv2d, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments, implementation="measured"), result)


@pytest.mark.parametrize(("of_convolutions", "of_triton"), [(2.0, 1.0), (1.0, 2.0), (1.0, 1.0)])
def test_measured_takes_triton_only_where_it_was_faster(monkeypatch, of_convolutions, of_triton):
    """The choice itself, with a clock and a kernel of the test's own: each shape is timed once."""
    timed, served = [], []

    def triton_kernel(*arguments):
        served.append("triton")
        return module_of_operator._gated_conv2d(*arguments)

    def clock(function):
        calls = len(served)
        function()
        timed.append("triton" if len(served) > calls else "convolutions")
        del served[calls:]
        return of_triton if timed[-1] == "triton" else of_convolutions

    monkeypatch.setattr(module_of_operator, "_choices", {})
    monkeypatch.setattr(module_of_operator, "_problem_of_triton", lambda *arguments: None)
    monkeypatch.setattr(module_of_operator, "find_spec", lambda name: name)
    monkeypatch.setattr(module_of_operator, "_triton_gated_conv2d", triton_kernel)
    monkeypatch.setattr(module_of_operator, "_milliseconds", clock)
    for size in ((13, 18), (13, 18), (9, 9)):
        arguments = random_arguments("cpu", torch.float32, torch.channels_last, size=size)
        result = cascadeops.self_calibrated_conv2d(*arguments, implementation="measured")
        torch.testing.assert_close(result, reference(*arguments))
    assert timed == ["convolutions", "triton"] * 2
    assert len(served) == (3 if of_triton < of_convolutions else 0)
    module_of_operator._choices.clear()
    doubles = random_arguments("cpu", torch.float64, torch.channels_last)
    cascadeops.self_calibrated_conv2d(*doubles, implementation="measured")
    assert len(timed) == 4  # the kernel has no float64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_triton_equals_the_convolutions_on_cuda(dtype, layout, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    arguments = random_arguments("cuda", dtype, layout, channels=48, size=(25, 42))
    with torch.no_grad():
        ours = cascadeops.self_calibrated_conv2d(*arguments, implementation="triton")
        other = cascadeops.self_calibrated_conv2d(*arguments)
    exact = reference(*(tensor.double() for tensor in arguments))
    allowed = 1.2 * (other.double() - exact).abs().max() + 1e-5 * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= allowed
    with pytest.raises(ValueError, match='implementation="triton" has no gradient'):
        cascadeops.self_calibrated_conv2d(arguments[0].requires_grad_(), *arguments[1:], implementation="triton")
