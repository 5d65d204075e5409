"""filtered_lrelu: every backend against the reference; recorded values are in test_golden."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from stylegan_fast import backends
from stylegan_fast.backends.geometry import FilteredLrelu
from stylegan_fast.ops import bias_act, filtered_lrelu, setup_filter
from stylegan_fast.ops.filtered_lrelu import forward_op, masked_op
from stylegan_fast.reference.filtered_lrelu import filtered_lrelu as reference
from stylegan_fast.testing import assert_matches

FU = setup_filter([1, 3, 4, 3, 2], separable=True)
FD = setup_filter([[1, 2, 3], [4, 1, 2]])
TWELVE = setup_filter([1, -3, 2, 9, 21, 30, 28, 19, 12, 5, -2, 1], separable=True)
TWENTY_FOUR = TWELVE.repeat_interleave(2) / 2
SQUARE = torch.outer(TWELVE, TWELVE) + 0.01 * torch.eye(12)

USUAL = dict(fu=TWELVE, fd=TWELVE, up=2, down=2, padding=[9, 8, 7, 10])

CASES = {
    "up 2 down 2": dict(fu=FU, fd=FD, up=2, down=2, padding=[3, 2, 1, 4], clamp=0.3071),
    "up 3": dict(fu=FD, up=3, padding=1, slope=0.0, gain=0.71),
    "down 2, cropped": dict(fd=FU, down=2, padding=[-1, 2, 0, 3], slope=1.0, flip_filter=True),
    "no filters": dict(),
    "no filters, clamped": dict(slope=1.0, gain=1.0, clamp=0.7719, padding=[1, 0, -1, 2]),
    "StyleGAN3, same rate": dict(**USUAL, clamp=0.3071),
    "StyleGAN3, flipped": dict(**USUAL, flip_filter=True, slope=0.0),
    "StyleGAN3, double rate": USUAL | dict(fu=TWENTY_FOUR, up=4, padding=[-2, 18, 17, -3]),
    "StyleGAN3, half rate": USUAL | dict(fd=TWENTY_FOUR, down=4, padding=[19, 16, 17, 18]),
    "StyleGAN3, cropped": USUAL | dict(padding=[11, 9, -3, 17], clamp=256.0),
    "StyleGAN3-R": USUAL | dict(fd=SQUARE),
    "its backward": USUAL | dict(fu=SQUARE),
    "odd": dict(fu=FU, fd=TWELVE[:7], up=3, down=2, padding=[4, 3, 5, 6]),
    "long": dict(fu=TWENTY_FOUR, fd=TWENTY_FOUR, up=2, down=2, padding=[20, 24, 21, 22]),
}


def operands(dtype, device="cpu", shape=(2, 3, 7, 5)):
    x = torch.randn(shape, dtype=torch.float64, device=device).to(dtype)
    return x, torch.linspace(-0.4, 0.5, shape[1], dtype=torch.float64, device=device).to(dtype)


def on(device, arguments):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def refused(backend, dtype, arguments):
    """Whether there is no kernel, but its parts run."""
    filters = [arguments.get("fu"), arguments.get("fd")]
    factors = [arguments.get("up", 1), arguments.get("down", 1)]
    if backend == "reference":
        return True
    kernels = backends.BACKENDS[backend]
    return (
        kernels.filtered_lrelu_refusal(dtype, *filters, *factors) is not None
        or kernels.filtered_lrelu_refusal(dtype, *filters[::-1], *factors[::-1]) is not None
    )


def derivatives(function, x, b, dy, hx, hb):
    """y, the gradients, and those of their product with hx and hb."""
    x, b, dy = (t.detach().requires_grad_() for t in (x, b, dy))
    y = function(x, b)
    dx, db = torch.autograd.grad(y, (x, b), dy, create_graph=True)
    (ddy,) = torch.autograd.grad((dx * hx).sum() + (db * hb).sum(), dy)
    return y, dx, db, ddy


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", backends.reference.dtypes(), ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_backend_matches_the_reference(backend, case, dtype, layout, device):
    reason = backends.refusal(backend, "filtered_lrelu", device.type, dtype)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    arguments = on(device, CASES[case])
    interpreted = backend == "triton" and device.type == "cpu"
    if interpreted and (dtype != torch.float32 or refused(backend, dtype, arguments)):
        pytest.skip("interpreted: other types, and the parts, have tests of their own")
    memory_format = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}[layout]

    def random(*shape):
        t = torch.randn(shape, dtype=torch.float64, device=device).to(dtype)
        return t.contiguous(memory_format=memory_format) if t.ndim == 4 else t

    for shape in ((2, 3, 7, 5), (1, 17, 6, 11)):
        x, b = random(*shape), torch.linspace(-0.4, 0.5, shape[1], device=device).to(dtype)
        expected = reference(x.double(), b=b.double(), **arguments)
        if dtype.itemsize == 2 and refused(backend, dtype, arguments):
            # Each part rounds, and so decides the slope of what is near 0.
            y = filtered_lrelu(x, b=b, **arguments, backend=backend)
            assert_matches(y, expected, reduction=144, name=case)
        else:
            cotangents = random(*expected.shape), random(*shape), random(shape[1])
            actual = derivatives(
                lambda x, b: filtered_lrelu(x, b=b, **arguments, backend=backend), x, b, *cotangents
            )
            exact = derivatives(
                lambda x, b: reference(x, b=b, **arguments),
                *(t.double() for t in (x, b, *cotangents)),
            )
            names = ("y", "gradient of x", "gradient of b", "second gradient of dy")
            for name, a, e in zip(names, actual, exact):
                assert_matches(a, e, reduction=144 * (x.numel() if "b" in name else 1), name=name)
            y = actual[0]
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("case", CASES)
def test_derivatives(case, backend):
    x, b = (t.requires_grad_() for t in operands(torch.float64, shape=(1, 2, 6, 5)))

    def function(x, b):
        return filtered_lrelu(x, b=b, **CASES[case], backend=backend)

    assert gradcheck(function, (x, b))
    assert gradgradcheck(function, (x, b))


@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_third_order(backend, layout):
    """Twice the gradient's transpose is the forward pass again, on the same signs."""
    x, b = (t.requires_grad_() for t in operands(torch.float64, shape=(1, 3, 5, 4)))
    y = filtered_lrelu(x.contiguous(memory_format=layout), b=b, **USUAL, backend=backend)
    dy, hx, hy = (torch.randn_like(t).requires_grad_() for t in (y, x, y))
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    (ddy,) = torch.autograd.grad(dx, dy, hx, create_graph=True)
    (again,) = torch.autograd.grad(ddy, hx, hy)
    assert_matches(again, torch.autograd.grad(y, x, hy)[0], reduction=144)


def test_what_is_not_finite_stays_where_it_is_seen(backend, device):
    x = torch.randn(1, 2, 14, 13, device=device)
    x[0, 0, 6, 5] = math.nan
    x[0, 1, 2, 9] = math.inf
    arguments = on(device, USUAL)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = filtered_lrelu(
            x.contiguous(memory_format=layout), **arguments, clamp=1.0, backend=backend
        )
        expected = reference(x.double(), **arguments, clamp=1.0)
        assert expected.isnan().any()
        assert not expected.isnan().all()
        assert_matches(y, expected, reduction=144)


def test_the_backward_pass_keeps_two_bits_a_sample():
    x = torch.randn(2, 3, 20, 20, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        filtered_lrelu(x, **USUAL, backend="cpu")
    inner = (2 * 20 + 17 - 11) ** 2
    filters = 2 * TWELVE.numel() * 4
    assert sum(t.numel() * t.element_size() for t in kept) <= 6 * 1.2 * inner / 4 + filters


def test_by_hand(device):
    x = torch.tensor([[[[1.0, -2.0]]]], device=device)
    b = torch.tensor([0.5], device=device)
    f = torch.tensor([[1.0, 1.0]], device=device)
    # x + b, stuffed: 1.5 0 -1.5 0; times 4, two neighbours: 6 -6 -6; lrelu: 6 -3 -3; times 2, cut
    # off at 5: 5 -5 -5.
    y = filtered_lrelu(x, f, f, b, up=2, padding=[0, 0, 0, -1], gain=2, slope=0.5, clamp=5)
    assert y.tolist() == [[[[0.0, -10.0]]]]
    y = filtered_lrelu(x, f, f, b, up=2, padding=[0, 0, 0, -1], gain=2, slope=0.5)
    assert y.tolist() == [[[[6.0, -12.0]]]]


def test_the_values_of_the_specification():
    def ramp(*shape):
        i = torch.arange(math.prod(shape), dtype=torch.float64)
        return torch.sin(0.9 * i + 0.3).reshape(shape)

    y = filtered_lrelu(
        ramp(1, 2, 4, 4),
        torch.tensor([0.1, 0.2, 0.3, 0.4]),
        torch.tensor([0.4, 0.3, 0.2, 0.1, 0.05, 0.05]),
        torch.tensor([0.1, -0.2], dtype=torch.float64),
        up=2,
        down=2,
        padding=[3, 2, 1, 4],
        clamp=0.3,
    )
    assert y.shape == (1, 2, 3, 3)
    expected = [0.229397, 0.211925, 0.105937, 0.032484, 0.210260, 0.240417, 1.582818, 0.328017]
    actual = [*y.flatten()[:6].tolist(), y.sum().item(), y.square().sum().item()]
    assert actual == pytest.approx(expected, abs=1e-6)


def test_without_filters_it_is_bias_act(backend, device):
    x, b = operands(torch.float16, device)
    if backends.refusal(backend, "filtered_lrelu", device.type, torch.float16) is not None:
        x, b = x.float(), b.float()
    y = filtered_lrelu(x, b=b, gain=1.0, slope=1.0, clamp=0.7719, backend=backend)
    assert torch.equal(y, bias_act(x, b, act="linear", clamp=0.7719, backend="reference"))


def test_no_samples(backend, device):
    x = torch.empty(0, 3, 7, 5, device=device)
    y = filtered_lrelu(x, fd=FD.to(device), down=2, padding=2, backend=backend)
    assert y.shape == (0, 3, 5, 4)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(x=torch.zeros(3, 7, 5)), ValueError, "x must have 4 dimensions"),
        (dict(fu=torch.zeros(2, 0)), ValueError, "fu must have a tap"),
        (dict(fd=[1, 2]), TypeError, "fd must be a torch.Tensor"),
        (dict(fd=torch.ones(2).requires_grad_()), NotImplementedError, "fd.requires_grad"),
        (dict(b=torch.zeros(4)), ValueError, "b must have the shape"),
        (dict(b=torch.zeros(3).double()), TypeError, "b.dtype=torch.float64"),
        (dict(up=[2, 2]), TypeError, "up takes integers"),
        (dict(down=0), ValueError, "down must be at least 1"),
        (dict(down=2**31), ValueError, "down must not exceed"),
        (dict(padding=[1, 2, 3]), ValueError, "padding"),
        (dict(padding=-4), ValueError, "increase padding"),
        (dict(fd=torch.ones(9, 9)), ValueError, "increase padding"),
        (dict(gain=0), ValueError, "gain must be greater than 0"),
        (dict(slope=-0.1), ValueError, "slope must be at least 0"),
        (dict(clamp=-1.0), ValueError, "clamp must be at least 0"),
        (dict(backend="tritn"), ValueError, "'tritn'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        filtered_lrelu(**{"x": torch.zeros(2, 3, 7, 5), **arguments})


@pytest.mark.parametrize("channels_last", [False, True])
def test_operators(channels_last):
    """Schemas, fakes and strides."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, b = operands(torch.float32, shape=(2, 3, 9, 7))
    problem = FilteredLrelu(2, 2, 9, 7, False, 5.6, 0.2, 0.3, 24, 20)
    constants = (*problem, [7, 5], channels_last)
    x = x.contiguous(memory_format=layout)
    for save_signs in (False, True):
        torch.library.opcheck(forward_op, (x, b, TWELVE, TWELVE, *constants, save_signs, "cpu"))
    y, signs = forward_op(x, b, TWELVE, TWELVE, *constants, True, "cpu")
    problem = problem.transposed((12, 12), (12, 12))
    constants = (*problem, [9, 7], channels_last, "cpu")
    torch.library.opcheck(masked_op, (y, signs, TWELVE, TWELVE, *constants))


@pytest.mark.parametrize("rules, dynamic", [("cpu", False), ("cuda", True), ("triton", True)])
def test_compiled(rules, dynamic, monkeypatch):
    """What a backend refuses is traced too, so each one's rules, on the kernels that run here."""
    chosen = backends.BACKENDS[rules].filtered_lrelu_refusal
    monkeypatch.setattr(backends.cpu, "filtered_lrelu_refusal", chosen)

    def call(x, b, f=None):
        arguments = USUAL if f is None else USUAL | dict(fu=f, fd=f)
        return filtered_lrelu(x, b=b, **arguments, clamp=0.3)

    def gradient(x, b):
        y = call(x, b)
        return y, *torch.autograd.grad(y.square().sum(), (x, b))

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for f in (TWELVE[:8], SQUARE, TWENTY_FOUR[:18].repeat(2)):
        x, b = operands(torch.float32, shape=(1, 2, 30, 27))
        assert torch.equal(compiled(x, b, f), call(x, b, f))
    for shape in ((2, 3, 9, 7), (1, 4, 8, 11)):
        x, b = (t.requires_grad_() for t in operands(torch.float32, shape=shape))
        y = compiled(x, b)
        actual = y, *torch.autograd.grad(y.square().sum(), (x, b))
        for a, e in zip(actual, gradient(x, b)):
            assert torch.equal(a, e)
