"""The scaled convolution with its epilogue: gradients of both orders, what a backward pass keeps
and computes, and who runs the convolution."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from stylegan_fast import _store, backends, no_weight_gradients, use_backend
from stylegan_fast.activations import ACTIVATIONS
from stylegan_fast.backends import choice
from stylegan_fast.backends.choice import FORWARD, KERNEL, PYTORCH, ConvClass
from stylegan_fast.backends.geometry import Fir
from stylegan_fast.models.stylegan2 import Discriminator, Generator
from stylegan_fast.ops import conv as conv_ops
from stylegan_fast.ops import modulated_conv2d, setup_filter, upfirdn2d
from stylegan_fast.ops.conv2d_resample import conv2d_bias_act
from stylegan_fast.ops.modulated_conv2d import styled_conv2d
from stylegan_fast.reference.upfirdn2d import resampled_conv2d
from stylegan_fast.testing import assert_matches, relative_error

FIR = setup_filter([1, 3, 3, 1])
LINES = sorted(name for name, row in ACTIVATIONS.items() if not row.curved)


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch, tmp_path):
    """No choices but the cost model's."""
    monkeypatch.setenv("STYLEGAN_FAST_CACHE", str(tmp_path))
    choice.table.cache_clear()
    yield
    choice.table.cache_clear()


RUNNERS = pytest.mark.parametrize("runner", [KERNEL, PYTORCH])
RESAMPLINGS = {
    "same": dict(padding=1),
    "up": dict(up=2, padding=1, resample_filter=FIR, flip_weight=False),
    "down": dict(down=2, padding=1, resample_filter=FIR),
    "pointwise": dict(kernel=1),
    "pointwise up": dict(kernel=1, up=2, resample_filter=FIR),
    "crop": dict(padding=[-1, 2, 0, 1]),
}


def layer(samples, inputs, outputs, resampling, noise, dtype, device, size=(6, 7)):
    """(function, operands) of a layer with every part of the epilogue."""
    arguments = dict(RESAMPLINGS[resampling])
    kernel = arguments.pop("kernel", 3)
    if "resample_filter" in arguments:
        arguments["resample_filter"] = FIR.to(device)
    operands = [
        randn(samples, inputs, *size),
        randn(outputs, inputs, kernel, kernel, seed=1) / math.sqrt(inputs * kernel**2),
        randn(samples, inputs, seed=2) + 1,
        randn(outputs, seed=3),
        torch.tensor(0.7),
    ]
    operands = [t.to(device, dtype).requires_grad_() for t in operands]
    with torch.no_grad(), use_backend("reference"):
        image = modulated_conv2d(*operands[:3], **arguments).shape[2:]
    shape = (samples, 1, *image) if noise == "each" else tuple(image)
    noise = None if noise is None else randn(*shape, seed=4).to(device, dtype)
    arguments.update(act="lrelu", alpha=0.3, gain=1.2, clamp=2.0)

    def run(x, weight, styles, bias, strength, **more):
        return styled_conv2d(
            x,
            weight,
            styles,
            noise,
            noise_strength=None if noise is None else strength,
            bias=bias,
            **{**arguments, **more},
        )

    return run, operands if noise is not None else operands[:4]


def run_without_strength(run):
    return lambda *operands: run(*operands, *[None] * (5 - len(operands)))


@RUNNERS
@pytest.mark.parametrize("noise", ["shared", "each", None])
@pytest.mark.parametrize("resampling", RESAMPLINGS)
def test_gradients_of_both_orders_equal_the_reference(resampling, noise, runner, backend, device):
    if backend == "triton" and noise != "each":
        pytest.skip("the interpreter takes a minute for each of these; one kind of noise is enough")
    run, operands = layer(3, 5, 4, resampling, noise, torch.float64, device)
    run = run_without_strength(run)
    results = []
    for name in ("reference", backend):
        if backends.refusal(name, "modulated_conv2d", device.type, torch.float64) is not None:
            pytest.skip(f"{name} has no float64")
        with use_backend(name), choice.forced(runner):
            y = run(*operands)
            dy = randn(*y.shape, seed=5).to(device)
            first = torch.autograd.grad(y, operands, dy, retain_graph=True)
            recorded = torch.autograd.grad(y, operands, dy, create_graph=True)
            product = sum((g * randn(*g.shape, seed=6).to(device)).sum() for g in recorded)
            second = torch.autograd.grad(product, operands[:3])
        results.append([y, *first, *recorded, *second])
    for expected, actual in zip(*results):
        assert_matches(actual.cpu(), expected.cpu(), reduction=1000)


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("up", [1, 2])
def test_gradcheck(up, demodulate, device):
    """By finite differences, on the automatic backend, away from the kinks of the activation."""
    x, weight, styles, bias = (
        t.to(device).requires_grad_()
        for t in (randn(2, 2, 3, 2), randn(3, 2, 3, 3, seed=1), randn(2, 2, seed=2) + 1, randn(3))
    )
    strength = torch.tensor(0.3, dtype=torch.float64, device=device, requires_grad=True)
    noise = randn(2, 1, 3 * up, 2 * up, seed=3).to(device)

    def run(x, weight, styles, bias, strength):
        return styled_conv2d(
            x, weight, styles, noise, up, padding=1, resample_filter=FIR.to(device),
            demodulate=demodulate, noise_strength=strength, bias=bias, act="lrelu", clamp=4.0,
        )  # fmt: skip

    operands = (x, weight, styles, bias, strength)
    assert gradcheck(run, operands)
    assert gradgradcheck(run, operands, fast_mode=True)


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("up", [1, 2])
def test_further_orders_equal_the_reference(up, demodulate):
    """From a cotangent that is one number expanded."""
    results = []
    for name in ("reference", None):
        operands = [randn(2, 5, 4, 3), randn(3, 5, 3, 3, seed=1), randn(2, 5, seed=2) + 1]
        operands = [t.requires_grad_() for t in operands]
        y = modulated_conv2d(
            *operands, up=up, padding=1, resample_filter=FIR, demodulate=demodulate, act="lrelu",
            clamp=3.0, backend=name,
        )  # fmt: skip
        orders = [torch.autograd.grad(y.sum(), operands, create_graph=True)]
        for _ in range(3):
            total = sum(g.sum() + g.square().sum() for g in orders[-1])
            orders.append(torch.autograd.grad(total, operands, create_graph=True))
        results.append([y, *itertools.chain(*orders)])
    for expected, actual in zip(*results):
        assert_matches(actual, expected, reduction=10000)


def test_noise_has_a_gradient_of_its_own(backend, device):
    noise = randn(2, 1, 6, 8, dtype=torch.float32).to(device).requires_grad_()
    x, weight, styles = randn(2, 8, 6, 8), randn(16, 8, 3, 3, seed=1), randn(2, 8, seed=2) + 1
    operands = [t.float().to(device).requires_grad_() for t in (x, weight, styles)]
    y = modulated_conv2d(*operands, noise, padding=1, act="lrelu", backend=backend)
    gradients = torch.autograd.grad(y.sum(), [noise, *operands])
    wide = [t.detach().double().requires_grad_() for t in (noise, *operands)]
    y = modulated_conv2d(*wide[1:], wide[0], padding=1, act="lrelu", backend="reference")
    for actual, expected in zip(gradients, torch.autograd.grad(y.sum(), wide)):
        assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("samples", [1, 2, 3, 17])
def test_styles_have_no_gradient_along_themselves(samples, device):
    """Demodulation cancels a style's magnitude."""
    x, weight = randn(samples, 5, 4, 6).to(device), randn(7, 5, 3, 3, seed=1).to(device)
    styles = (randn(samples, 5, seed=2) + 1).to(device).requires_grad_()
    y = modulated_conv2d(x, weight, styles, padding=1, act="lrelu")
    dy = randn(*y.shape, seed=3).to(device)
    (gradient,) = torch.autograd.grad(y, styles, dy)
    along = (gradient * styles).sum(1)
    assert gradient.abs().amax(1).min() > 0.1
    assert along.abs().max() < 1e-7  # the 1e-8 beside a sum of squares of order 1


@RUNNERS
@pytest.mark.parametrize("samples, inputs, outputs", [
    (1, 1, 3), (2, 3, 1), (3, 33, 16), (17, 16, 33), (2, 512, 16),
])  # fmt: skip
def test_float32_layers(samples, inputs, outputs, runner, device):
    for resampling, nhwc in itertools.product(("same", "up"), (False, True)):
        run, operands = layer(
            samples, inputs, outputs, resampling, "each", torch.float32, device, size=(9, 8)
        )
        memory_format = torch.channels_last if nhwc else torch.contiguous_format
        wide = [t.detach().double().requires_grad_() for t in operands]
        operands[0] = operands[0].detach().contiguous(memory_format=memory_format).requires_grad_()
        results = []
        for leaves, backend in ((operands, None), (wide, "reference")):
            with choice.forced(runner):
                y = run(*leaves, clamp=None, backend=backend)
                dy = randn(*y.shape, seed=5).to(y)
                results.append([y, *torch.autograd.grad(y, leaves, dy)])
        assert inputs == 1 or results[0][0].is_contiguous(memory_format=memory_format)
        largest = max(t.norm() for t in results[1])
        for actual, expected in zip(*results):
            # Rounding decides the branch of a value near 0; that changes one in thousands.
            assert (actual - expected).norm() < 2e-3 * expected.norm() + 1e-6 * largest
        assert relative_error(results[0][0], results[1][0]) < 1e-5


class Saved:
    """Shapes of what the forward passes inside keep for the backward pass."""

    def __enter__(self):
        self.tensors = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exception):
        self.hooks.__exit__(*exception)

    def pack(self, t):
        self.tensors[t.untyped_storage().data_ptr()] = t
        return t


@pytest.mark.parametrize("up", [1, 2])
def test_backward_keeps_input_output_and_two_bits(up, device):
    x, weight, styles = randn(3, 8, 10, 12), randn(16, 8, 3, 3, seed=1), randn(3, 8, seed=2)
    x, weight, styles = (t.float().to(device).requires_grad_() for t in (x, weight, styles))
    if backends.automatic("modulated_conv2d", device.type, torch.float32) == "reference":
        pytest.skip("the reference keeps what PyTorch's operators keep")
    with Saved() as saved:
        y = modulated_conv2d(
            x, weight, styles, up=up, padding=1, resample_filter=FIR.to(device), act="lrelu",
            clamp=1.0,
        )  # fmt: skip
    kept = list(saved.tensors.values())
    images = [t for t in kept if t.ndim == 4 and t.shape[0] == 3]
    assert {t.data_ptr() for t in images} == {x.data_ptr(), y.data_ptr()}
    assert all(t.ndim < 5 for t in kept)  # no weight for each sample
    masks = [t for t in kept if t.dtype == torch.uint8]
    assert [t.numel() for t in masks] == [y.numel() // 4]
    rest = sum(t.numel() for t in kept) - x.numel() - y.numel() - y.numel() // 4
    assert rest <= 4 * weight.numel()


class WeightGradients(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.stylegan_fast.conv2d_weight_gradient.default
        return func(*args, **(kwargs or {}))


def small_networks(device):
    G = Generator(8, 0, 8, 16, 3, synthesis_kwargs=dict(channel_base=256, channel_max=16))
    D = Discriminator(0, 16, 3, channel_base=256, channel_max=16)
    return G.to(device), D.to(device)


def test_a_generator_step_computes_no_weight_gradient_of_the_discriminator(device):
    if backends.automatic("modulated_conv2d", device.type, torch.float32) == "reference":
        pytest.skip("PyTorch's own operators prune by themselves")
    G, D = small_networks(device)
    z = randn(4, 8, dtype=torch.float32).to(device)
    convolutions = sum(name.endswith("weight") and p.ndim == 4 for name, p in G.named_parameters())
    with WeightGradients() as counted:
        torch.autograd.grad(D(G(z), None).sum(), list(G.parameters()), allow_unused=True)
    assert counted.count == convolutions
    with WeightGradients() as counted:
        D(G(z), None).sum().backward(inputs=list(G.parameters()))
    assert counted.count == convolutions


def regularised(G, D, z, real, direction, skip):
    """Gradients of R1 by D's parameters and of the path length by G's."""
    real = real.clone().requires_grad_()
    with no_weight_gradients(skip):
        (slope,) = torch.autograd.grad(D(real, None).sum(), real, create_graph=True)
    r1 = torch.autograd.grad(slope.square().sum(), list(D.parameters()), allow_unused=True)
    ws = G.mapping(z, None)
    image = G.synthesis(ws, noise_mode="const")
    with no_weight_gradients(skip):
        (slope,) = torch.autograd.grad((image * direction).sum(), ws, create_graph=True)
    length = slope.square().sum(2).mean(1).sqrt()
    path = torch.autograd.grad(length.square().sum(), list(G.parameters()), allow_unused=True)
    parameters = (*D.parameters(), *G.parameters())
    # A bias behind which all is linear is in no graph, or has zeros.
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, (*r1, *path))]


@pytest.mark.parametrize("skip", [True, False])
def test_regularisers_of_whole_networks_agree(skip, backend, device):
    if backend == "triton" and device.type == "cpu":
        pytest.skip("too slow in the interpreter")
    G, D = small_networks(device)
    for module in (G, D):
        for name, parameter in module.named_parameters():
            if name.endswith("noise_strength"):
                parameter.data.fill_(0.2)
    operands = (randn(4, 8), randn(4, 3, 16, 16, seed=1), randn(4, 3, 16, 16, seed=2))
    operands = [t.float().to(device) for t in operands]
    with use_backend(backend):
        actual = regularised(G, D, *operands, skip)
    with use_backend("reference"):
        expected = regularised(G.double(), D.double(), *(t.double() for t in operands), False)
    assert len(actual) == len(expected) > 30
    largest = max(g.norm() for g in expected)
    for a, e in zip(actual, expected):
        assert (a.double() - e).norm() < 1e-3 * e.norm() + 1e-5 * largest


@pytest.mark.parametrize("up, down", [(1, 1), (2, 1), (1, 2)])
def test_opcheck(up, down, backend, device):
    if backend == "reference":
        pytest.skip("PyTorch's own operators")
    x, w = randn(2, 3, 6, 5).float().to(device), randn(8, 3, 3, 3, seed=1).float().to(device)
    geometry = (up, down, [1, 1, 1, 1], True)
    pre = randn(2, 3, seed=2).float().to(device)
    scale, b = randn(2, 8, seed=3).float().to(device), randn(8, seed=4).float().to(device)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(conv_ops.linear_op, (x, w, pre, *geometry, backend), test_utils=tests)
    y = conv_ops.linear_op(x, w, pre, *geometry, backend)
    torch.library.opcheck(
        conv_ops.weight_gradient_op,
        (x, torch.randn_like(y), pre, [3, 3], *geometry, backend),
        test_utils=tests,
    )
    for fir in ((None, [1, 1], None), (FIR.to(device), [1, 1], [2, 1, 2, 1])):
        arguments = (
            x, w, pre, *geometry, *fir, False, 4.0, scale, None, None, b, 3, 0.2, 1.4, 2.0, True,
            backend,
        )  # fmt: skip
        torch.library.opcheck(conv_ops.epilogue_op, arguments, test_utils=tests)


@pytest.mark.parametrize("outputs", [2, 90])  # channels, fewer and more than pixels
@pytest.mark.parametrize("correlate", [True, False])
@pytest.mark.parametrize(
    "kernel, up, down, padding",
    [
        ((3, 3), 1, 1, (1, 1, 1, 1)), ((5, 3), 1, 1, (1, 1, 2, 2)), ((1, 1), 1, 1, (0, 0, 0, 0)),
        ((3, 2), 1, 1, (2, 0, 1, -1)), ((3, 3), 1, 1, (3, 3, 4, 4)),
        ((3, 3), 2, 1, (2, 2, 2, 2)), ((3, 5), 1, 2, (1, 1, 0, 0)), ((3, 3), 1, 2, (0, 1, -1, 0)),
    ],
)  # fmt: skip
def test_pytorch_runs_a_convolution_and_its_gradients(
    kernel, up, down, padding, correlate, outputs
):
    (kw, kh), (n, i, height, width) = kernel, (2, 3, 5, 6)
    conv = Fir.of((up, up), (down, down), padding, correlate, 1.0)
    x, w = randn(n, i, height, width), randn(outputs, i, kh, kw, seed=1)
    x.requires_grad_(), w.requires_grad_()
    stuffed = x.new_zeros(n, i, height * up, width * up)
    stuffed[:, :, ::up, ::up] = x
    taps = w if correlate else w.flip((2, 3))
    y = F.conv2d(F.pad(stuffed, padding), taps)[:, :, ::down, ::down]
    dy = randn(*y.shape, seed=2)
    dx, dw = torch.autograd.grad(y, (x, w), dy)

    run = conv_ops._by_pytorch
    assert_matches(run(x.detach(), w.detach(), conv, None), y.detach(), reduction=i * kw * kh)
    adjoint = conv.adjoint(height, width, kernel)
    got = run(dy, w.detach().transpose(0, 1), adjoint, None)
    assert_matches(got, dx, reduction=outputs * kw * kh)
    got = conv_ops._weight_gradient_by_pytorch(x.detach(), dy, kernel, conv)
    assert_matches(got, dw, reduction=dy.numel() // outputs)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("outputs, inputs", [(3, 33), (33, 3), (1, 1)])
@pytest.mark.parametrize("samples", [1, 3])
def test_convolutions_to_and_from_images_are_products(samples, outputs, inputs, layout):
    conv = Fir.of((1, 1), (1, 1), (0, 0, 0, 0), True, 1.0)
    x = randn(samples, inputs, 5, 6).contiguous(memory_format=layout)
    w, pre = randn(outputs, inputs, 1, 1, seed=1), randn(samples, inputs, seed=2)
    dy = randn(samples, outputs, 5, 6, seed=3).contiguous(memory_format=layout)
    scaled = x * pre[:, :, None, None]
    w.requires_grad_()
    y = F.conv2d(scaled, w)
    (dw,) = torch.autograd.grad(y, w, dy)
    w = w.detach()

    assert conv_ops._is_product(x, w.shape, conv)
    got = conv_ops._product(x, w, pre)
    assert got.is_contiguous(memory_format=layout)
    assert_matches(got, y.detach(), reduction=inputs)
    assert_matches(conv_ops._by_pytorch(x, w, conv, pre), y.detach(), reduction=inputs)
    assert_matches(conv_ops._by_pytorch(x, w, conv, None), F.conv2d(x, w), reduction=inputs)
    arguments = ([1, 1], *conv_ops._arguments(conv), "cpu")
    got = conv_ops.weight_gradient_op(x, dy, pre, *arguments)
    assert_matches(got, dw, reduction=30 * samples)
    for other in (conv._replace(x0=1), conv._replace(down_x=2, down_y=2)):
        assert not conv_ops._is_product(x, w.shape, other)
    assert not conv_ops._is_product(x, torch.Size([9, 9, 1, 1]), conv)
    assert not conv_ops._is_product(x, torch.Size([3, 9, 1, 3]), conv)


@pytest.mark.parametrize("flips", list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("taps", [(4,), (3, 2), None])
def test_a_filter_after_a_convolution_is_one_convolution(taps, flips):
    f = None if taps is None else randn(*taps, seed=2)
    x, w = randn(2, 3, 5, 6), randn(4, 3, 3, 2, seed=1)
    conv = Fir.of((2, 2), (1, 1), (1, 0, 2, 1), flips[0], 1.0)
    fir = Fir.of((1, 1), (1, 1), (1, 2, 2, 1), flips[1], -1.5)
    expected = upfirdn2d(
        resampled_conv2d(x, w, conv), f, padding=(1, 2, 2, 1), flip_filter=flips[1], gain=-1.5,
        backend="reference",
    )  # fmt: skip
    whole, size = conv_ops._composed_geometry(conv, (2, 3), f, fir)
    composed = conv_ops._composed_weight(w, conv, f, fir)
    assert composed.shape[2:] == size[::-1]
    assert conv_ops._is_one_convolution(conv, (2, 3), fir)
    assert_matches(resampled_conv2d(x, composed, whole), expected, reduction=100)
    for cropped in (conv._replace(x0=0), conv._replace(x1=-1), conv._replace(y1=0)):
        assert not conv_ops._is_one_convolution(cropped, (2, 3), fir)


def a_class(**changes):
    values = dict(zip(ConvClass._fields, [FORWARD, torch.float32, False, 1, 64, 64, 32, 32, 3, 3]))
    return ConvClass(**{**values, "up": 1, "down": 1, "pad_x": 1, "pad_y": 1, **changes})


class Backend:
    """Prefers its kernel where there are more than 16 channels, and has none for float64."""

    @staticmethod
    def conv2d_refusal(call):
        return "no float64" if call.dtype == torch.float64 else None

    @staticmethod
    def conv2d_preferred(call):
        return call.in_channels > 16


def test_a_measured_table_overrides_the_cost_model(tmp_path):
    cpu = torch.device("cpu")
    wide, narrow = a_class(), a_class(in_channels=8)
    assert choice.own_kernel("mine", Backend, wide, cpu)
    assert not choice.own_kernel("mine", Backend, narrow, cpu)
    measured = {wide.key("mine"): PYTORCH, narrow.key("mine"): KERNEL}
    assert choice.remember(cpu, measured)
    choice.table.cache_clear()  # as in the next process
    assert not choice.own_kernel("mine", Backend, wide, cpu)
    assert choice.own_kernel("mine", Backend, narrow, cpu)
    assert choice.own_kernel("another", Backend, wide, cpu)
    assert not choice.own_kernel("mine", Backend, narrow._replace(dtype=torch.float64), cpu)
    with choice.forced(KERNEL):
        assert choice.own_kernel("mine", Backend, wide, cpu)
    stored = json.loads((tmp_path / choice.FILE).read_text())
    assert stored == {choice.machine(cpu): measured}


def test_one_class_can_be_forced_alone():
    cpu = torch.device("cpu")
    wide, narrow = a_class(), a_class(in_channels=8)
    with choice.forced(PYTORCH, wide.key("mine")), choice.asked() as keys:
        assert not choice.own_kernel("mine", Backend, wide, cpu)
        assert not choice.own_kernel("mine", Backend, narrow, cpu)
        assert choice.own_kernel("mine", Backend, a_class(height=33), cpu)
    assert set(keys) == {c.key("mine") for c in (wide, narrow, a_class(height=33))}
    assert choice.own_kernel("mine", Backend, wide, cpu)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}', '{"%s": []}', "\0\1"])
def test_a_broken_table_is_as_good_as_none(content, tmp_path):
    cpu = torch.device("cpu")
    machine = choice.machine(cpu)
    (tmp_path / choice.FILE).write_text(content.replace("%s", machine))
    assert choice.own_kernel("mine", Backend, a_class(), cpu)
    assert choice.remember(cpu, {"a": KERNEL})
    assert _store.read(choice.FILE, machine) == {"a": KERNEL}


def test_a_cache_that_cannot_be_written_costs_only_the_memory(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    (tmp_path / "file").write_text("")
    for value in (str(tmp_path / "file"), "off"):
        monkeypatch.setenv("STYLEGAN_FAST_CACHE", value)
        choice.table.cache_clear()
        assert not choice.remember(cpu, {a_class().key("mine"): PYTORCH})
        assert not choice.own_kernel("mine", Backend, a_class(), cpu)


def test_biased_convolution_is_one_op(backend, device):
    x, w, b = randn(2, 16, 9, 11), randn(8, 16, 3, 3, seed=1) / 12, randn(8, seed=2)
    x, w, b = (t.float().to(device) for t in (x, w, b))
    y = conv2d_bias_act(x, w, padding=1, b=b, act="lrelu", alpha=0.1, clamp=1.0, backend=backend)
    wide = (t.double() for t in (x, w))
    expected = torch.nn.functional.conv2d(*wide, padding=1) + b.double()[:, None, None]
    expected = torch.nn.functional.leaky_relu(expected, 0.1) * math.sqrt(2)
    assert_matches(y, expected.clamp(-1, 1), reduction=16 * 9)


def test_huge_styles_stay_finite_in_float16(backend, device):
    x, weight = randn(2, 32, 6, 8).half().to(device), randn(16, 32, 3, 3, seed=1).float()
    styles = (1e4 * randn(2, 32, seed=2)).float()
    weight, styles = weight.to(device).requires_grad_(), styles.to(device).requires_grad_()
    x = x.requires_grad_()
    y = modulated_conv2d(x, weight, styles, padding=1, act="lrelu", backend=backend)
    gradients = torch.autograd.grad(y.float().square().sum() / 100, [x, weight, styles])
    assert all(t.isfinite().all() for t in (y, *gradients))
    wide = modulated_conv2d(
        *(t.detach().double() for t in (x, weight, styles)), padding=1, act="lrelu"
    )
    assert relative_error(y, wide) < 2e-3


@pytest.mark.parametrize("up", [1, 2])
def test_zero_styles_have_a_finite_recorded_gradient_in_float16(up, device):
    """d is then 1e4, and products of 16 bits with it have to be summed in 32."""
    x = (10 * randn(2, 32, 16, 16)).half().to(device)
    weight, styles = randn(17, 32, 3, 3, seed=1).float().to(device), torch.zeros(2, 32).to(device)
    styles.requires_grad_()
    y = modulated_conv2d(
        x, weight, styles, up=up, padding=1, resample_filter=FIR.to(device), act="lrelu"
    )
    (plain,) = torch.autograd.grad(y.float().sum(), styles, retain_graph=True)
    (recorded,) = torch.autograd.grad(y.float().sum(), styles, create_graph=True)
    assert plain.isfinite().all() and plain.abs().max() > 1e3
    assert relative_error(recorded, plain) < 0.01


def test_huge_styles_without_demodulation_in_float16(backend, device):
    x, weight = torch.full((2, 32, 8, 8), 10.0).half(), torch.full((3, 32, 1, 1), 1e-4)
    styles = torch.full((2, 32), 1e4, device=device, requires_grad=True)
    x, weight = x.to(device), weight.to(device)
    for form in (True, False):
        y = modulated_conv2d(
            x, weight, styles, demodulate=False, fused_modconv=form, backend=backend
        )
        assert relative_error(y, torch.full_like(y, 320).double()) < 2e-3
        (gradient,) = torch.autograd.grad(y.float().sum() / 64, styles)
        assert relative_error(gradient, torch.full_like(gradient, 3e-3).double()) < 5e-3


def test_an_energy_that_overflows_has_no_gradient(backend, device):
    x, weight = randn(2, 8, 5, 6).float().to(device), randn(4, 8, 3, 3, seed=1).float().to(device)
    styles = torch.full((2, 8), 1e20, device=device, requires_grad=True)
    y = modulated_conv2d(x, weight.requires_grad_(), styles, padding=1, backend=backend)
    assert y.isfinite().all()
    (gradient,) = torch.autograd.grad(y.sum(), styles)
    assert gradient.isfinite().all()


def test_a_cotangent_of_a_weight_is_no_weight(device):
    """The product of a weight's gradient with a vector is linear in that vector, in a block too."""
    x, w = randn(2, 3, 5, 6).to(device), randn(4, 3, 3, 3, seed=1).to(device).requires_grad_()
    v = randn(4, 3, 3, 3, seed=2).to(device).requires_grad_()
    y = conv2d_bias_act(x, w, padding=1)
    dy = torch.ones_like(y, requires_grad=True)
    (gradient,) = torch.autograd.grad(y, w, dy, create_graph=True)
    (along,) = torch.autograd.grad(gradient, dy, v, create_graph=True)
    with no_weight_gradients():
        (actual,) = torch.autograd.grad(along.sum(), v)
    assert_matches(actual, gradient.detach(), reduction=60)


@pytest.mark.parametrize("arguments, error, message", [
    (dict(b=torch.ones(1)), ValueError, r"b must have the shape \(4,\) .* got b\.shape=\(1,\)"),
    (dict(b=torch.ones(4, device="meta")), ValueError, r"b\.device=meta but x\.device=cpu"),
    (dict(b=torch.ones(4).long()), TypeError, r"b\.dtype=torch\.int64"),
    (dict(clamp=-1), ValueError, "clamp must be at least 0, got clamp=-1"),
    (dict(gain="a"), TypeError, "gain must be a number, got gain='a'"),
    (dict(alpha=math.nan), ValueError, "alpha must be finite"),
    (dict(act="gelu"), KeyError, "act='gelu' is unknown"),
])  # fmt: skip
def test_errors_of_a_biased_convolution(arguments, error, message):
    x, w = torch.ones(2, 3, 5, 6), torch.ones(4, 3, 3, 3)
    with pytest.raises(error, match=message):
        conv2d_bias_act(x, w, padding=1, **arguments)
