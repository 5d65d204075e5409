"""bias_act: one body for every backend, dtype, layout and order; then its corners one by one."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stylegan_fast import backends, use_backend
from stylegan_fast.activations import ACTIVATIONS
from stylegan_fast.backends import native
from stylegan_fast.ops import bias_act
from stylegan_fast.ops import epilogue as epilogue_module
from stylegan_fast.ops.epilogue import epilogue
from stylegan_fast.reference.bias_act import bias_act as reference
from stylegan_fast.testing import assert_matches

CURVED = [name for name, row in ACTIVATIONS.items() if row.curved]
PIECEWISE_LINEAR = [name for name, row in ACTIVATIONS.items() if not row.curved]

# Rank, dim, short and long runs, odd sizes, single channels, whole and broken groups of 8 and 16.
SHAPES = {
    "nchw": ((2, 5, 7, 3), 1),
    "nchw_whole_groups": ((3, 24, 8, 4), 1),
    "nchw_long_planes": ((2, 3, 33, 35), 1),
    "one_channel": ((3, 1, 5, 7), 1),
    "one_pixel": ((3, 37, 1, 1), 1),
    "first_dim": ((5, 6, 11), 0),
    "last_dim": ((2, 6, 5, 9), 3),
    "matrix": ((70, 37), 1),
    "vector": ((19,), 0),
    "video": ((2, 3, 4, 5, 6), 1),
}


def operands(shape, dim, dtype, device, memory_format=torch.contiguous_format):
    x = torch.randn(shape, dtype=torch.float64, device=device)
    b = torch.randn(shape[dim], dtype=torch.float64, device=device)
    return x.to(dtype).contiguous(memory_format=memory_format), b.to(dtype)


def derivatives(function, x, b, dy):
    """y, both gradients, and the gradients of a combination of those with respect to dy, x, b."""
    x, b, dy = (t.detach().clone().requires_grad_() for t in (x, b, dy))
    y = function(x, b)
    gx, gb = torch.autograd.grad(y, (x, b), dy, create_graph=True)
    vx = torch.linspace(-1, 1, x.numel(), dtype=torch.float64, device=x.device)
    vb = torch.linspace(1, -1, b.numel(), dtype=torch.float64, device=x.device)
    combination = (gx * vx.to(x.dtype).view_as(x)).sum() + (gb * vb.to(x.dtype)).sum()
    gg = torch.autograd.grad(combination, (dy, x, b), allow_unused=True)
    gg = [torch.zeros_like(t) if g is None else g for g, t in zip(gg, (dy, x, b))]
    return dict(zip(("y", "g_x", "g_b", "gg_dy", "gg_x", "gg_b"), (y, gx, gb, *gg)))


def assert_all_orders(backend, x, b, dim, **arguments):
    dy = torch.cos(torch.arange(x.numel(), dtype=torch.float64, device=x.device))
    dy = dy.view(x.shape).to(x.dtype)
    actual = derivatives(lambda x, b: bias_act(x, b, dim, backend=backend, **arguments), x, b, dy)
    expected = derivatives(
        lambda x, b: reference(x, b, dim, **arguments), x.double(), b.double(), dy.double()
    )
    summed = x.numel() // b.numel()
    for name, value in actual.items():
        reduction = summed if name.endswith("_b") else 1
        assert_matches(value, expected[name], reduction=reduction, name=name)
    assert actual["y"].dtype == actual["g_x"].dtype == actual["g_b"].dtype == x.dtype
    assert actual["y"].stride() == x.stride()


@pytest.mark.parametrize("dtype", backends.reference.dtypes(), ids=str)
@pytest.mark.parametrize(
    "arguments", [{}, dict(alpha=0.31, gain=0.8077, clamp=0.6131)], ids=["defaults", "all"]
)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_order_matches_the_reference(backend, act, arguments, dtype, device):
    reason = backends.refusal(backend, "bias_act", device.type, dtype)
    if reason is not None:
        with pytest.raises(RuntimeError, match=str(dtype).removeprefix("torch.")):
            bias_act(*operands((2, 3), 1, dtype, device), act=act, backend=backend)
        return
    if backend == "reference" and dtype not in (torch.float64, torch.float32):
        assert_reference_in_16_bits(act, arguments, dtype, device)
        return
    for shape, dim in SHAPES.values():
        assert_all_orders(backend, *operands(shape, dim, dtype, device), dim, act=act, **arguments)
    for shape, dim in (SHAPES["nchw"], SHAPES["nchw_whole_groups"], SHAPES["one_channel"]):
        x, b = operands(shape, dim, dtype, device, torch.channels_last)
        assert_all_orders(backend, x, b, dim, act=act, **arguments)


def assert_reference_in_16_bits(act, arguments, dtype, device):
    """The stock formulation rounds after each of its four operators; only its value is compared."""
    x, b = operands((2, 5, 7, 3), 1, dtype, device)
    expected = reference(x.double(), b.double(), 1, act, **arguments)
    error = (bias_act(x, b, act=act, backend="reference", **arguments).double() - expected).abs()
    assert error.max() <= 4 * torch.finfo(dtype).eps * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("level", native.load()[0].simd_levels() if native.load()[0] else [])
@pytest.mark.parametrize("dtype", backends.cpu.dtypes(), ids=str)
def test_every_simd_level(level, dtype):
    module = native.load()[0]
    widest = module.simd_level()
    module.set_simd_level(level)
    try:
        for act, (shape, dim) in itertools.product(ACTIVATIONS, SHAPES.values()):
            x, b = operands(shape, dim, dtype, "cpu")
            assert_all_orders("cpu", x, b, dim, act=act, gain=0.8077, clamp=0.6131)
    finally:
        module.set_simd_level(widest)


@pytest.mark.parametrize("level", native.load()[0].simd_levels() if native.load()[0] else [])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_values_survive_unchanged(level, dtype):
    """All 65536 bit patterns, among them subnormals, infinities and NaN, through act='linear'."""
    module = native.load()[0]
    widest = module.simd_level()
    module.set_simd_level(level)
    try:
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        y = bias_act(x.view(256, 256), torch.zeros(256, dtype=dtype), backend="cpu").view(-1)
    finally:
        module.set_simd_level(widest)
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y[~x.isnan()], x[~x.isnan()])


@pytest.mark.parametrize("level", native.load()[0].simd_levels() if native.load()[0] else [])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_results_round_to_nearest_even(level, dtype):
    module = native.load()[0]
    widest = module.simd_level()
    module.set_simd_level(level)
    try:
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = x[x.isfinite()].view(1, -1)
        b = torch.ones(1, dtype=dtype)
        y = bias_act(x, b, dim=0, gain=0.7071, backend="cpu")
    finally:
        module.set_simd_level(widest)
    gain = torch.tensor(0.7071, dtype=torch.float32)
    assert torch.equal(y, ((x.float() + 1) * gain).to(dtype))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradcheck(backend, act, device):
    if backends.refusal(backend, "bias_act", device.type, torch.float64) is not None:
        pytest.skip(f"{backend} has no float64 kernels")
    # An interpreted launch takes milliseconds, and gradgradcheck makes hundreds of them.
    shape = (1, 2, 3) if backend == "triton" else (2, 3, 4, 3)
    x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    b = torch.randn(shape[1], dtype=torch.float64, device=device, requires_grad=True)

    def function(x, b):
        return bias_act(x, b, act=act, alpha=0.3, gain=1.3, clamp=1.1, backend=backend)

    assert torch.autograd.gradcheck(function, (x, b))
    assert torch.autograd.gradgradcheck(function, (x, b))


def test_peer_values(backend, device):
    """Numbers recorded from an independent implementation (value, first and second derivative)."""
    recorded = {
        "lrelu": """-.494975 -.070711 1.060660 3.181981
                     .282843  .282843 1.414214 1.414214   0 0 0 0""",
        "tanh": """-.941376 -.244919 .635149  .978026
                    .113812  .940015 .596586  .043465
                    .214280  .460454 -.757842 -.085020""",
        "selu": """-1.452587 -.388890 .788026 2.364077
                     .305512 1.369209 1.050701 1.050701
                     .305512 1.369209 0 0""",
        "softplus": """.160224 .575939 1.136871 2.350207
                       .148047 .437823  .679179  .904651
                       .126129 .246134  .217895  .086258""",
        "swish": """-.366398 -.154794 .720378 2.878580
                    -.102784  .532154 1.191616 1.553840
                     .137020  .685351 .533479  .021845""",
    }
    b = torch.tensor([0.25], device=device)
    for act, numbers in recorded.items():
        x = torch.tensor([[[-2.0, -0.5, 0.5, 2.0]]], device=device, requires_grad=True)
        y = bias_act(x, b, act=act, backend=backend)
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (gg,) = torch.autograd.grad(g.sum(), x, allow_unused=True) if g.requires_grad else (None,)
        gg = torch.zeros_like(x) if gg is None else gg
        expected = torch.tensor([float(n) for n in numbers.split()], device=device)
        actual = torch.cat([t.detach().flatten() for t in (y, g, gg)])
        torch.testing.assert_close(actual, expected, atol=2e-6, rtol=0)


def test_ties_and_kinks_follow_torch(backend, device):
    x = torch.tensor([[-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]], device=device, requires_grad=True)
    for act in ("linear", "relu", "lrelu"):
        y = bias_act(x, act=act, alpha=0.25, gain=1.0, clamp=0.5, backend=backend)
        expected = reference(x, None, 1, act, 0.25, 1.0, 0.5)
        assert torch.equal(y, expected)
        (g,) = torch.autograd.grad(y.sum(), x)
        (g_expected,) = torch.autograd.grad(expected.sum(), x)
        assert torch.equal(g, g_expected)
    (g,) = torch.autograd.grad(bias_act(x, clamp=1.0, backend=backend).sum(), x)
    assert g.tolist() == [[0, 1, 1, 1, 1, 1, 0]]


def test_mask_is_taken_before_rounding(backend, device):
    """181.019 is stored as 181 in float16: a clamped 200 has no gradient, a true 181 keeps it."""
    x = torch.tensor([[181.0, 200.0, -200.0, 180.0]], dtype=torch.float16, device=device)
    x.requires_grad_()
    y = bias_act(x, clamp=256 * math.sqrt(0.5), backend=backend)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert y.tolist() == [[181.0, 181.0, -181.0, 180.0]]
    assert g.tolist() == [[1.0, 0.0, 0.0, 1.0]]


def test_negative_alpha_and_gain(backend, device):
    x, b = operands((2, 5, 7, 3), 1, torch.float32, device)
    assert_all_orders(backend, x, b, 1, act="lrelu", alpha=-0.5, gain=-1.25, clamp=0.9131)


def test_gain_zero(backend, device):
    x = torch.tensor([[1.0, -1.0, math.inf]], device=device, requires_grad=True)
    y = bias_act(x[:, :2], act="lrelu", gain=0.0, backend=backend)
    assert y.tolist() == [[0, 0]]
    (g,) = torch.autograd.grad(y.sum(), x)
    assert g.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_nan_and_infinity(backend, act, device):
    x = torch.tensor([[math.nan, math.inf, -math.inf, 100.0, -100.0, 1.0]], device=device)
    actual = bias_act(x, act=act, clamp=2.0, backend=backend)
    torch.testing.assert_close(actual, reference(x, None, 1, act, clamp=2.0), equal_nan=True)


@pytest.mark.parametrize("clamp", [None, 2.0])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradients_do_not_hide_nan(backend, act, clamp, device):
    """Where PyTorch's gradients at NaN are not zero, ours are not zero either (they may be NaN)."""

    def gradients(function):
        x = torch.tensor([[math.nan, 0.5]], device=device, requires_grad=True)
        y = function(x)
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return [g, *torch.autograd.grad(g.sum(), x)] if act in CURVED else [g]

    ours = gradients(lambda x: bias_act(x, act=act, clamp=clamp, backend=backend))
    theirs = gradients(lambda x: reference(x, None, 1, act, clamp=clamp))
    for actual, expected in zip(ours, theirs):
        assert not ((actual == 0) & (expected != 0)).any()


def test_clamped_elements_stop_infinite_gradients(backend, device):
    x = torch.tensor([[3.0, -1.0, 1.0]], device=device, requires_grad=True)
    dy = torch.tensor([[math.inf, math.nan, 1.0]], device=device)
    y = bias_act(x, act="relu", gain=1.0, clamp=2.0, backend=backend)
    (g,) = torch.autograd.grad(y, x, dy)
    assert g.tolist() == [[0.0, 0.0, 1.0]]


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (0,), (3, 0)], ids=str)
def test_empty(backend, shape, device):
    x = torch.empty(shape, device=device, requires_grad=True)
    dim = min(1, len(shape) - 1)
    b = torch.ones(shape[dim], device=device, requires_grad=True)
    for act in ("lrelu", "tanh"):
        y = bias_act(x, b, dim, act, clamp=1.0, backend=backend)
        gx, gb = torch.autograd.grad(y.sum(), (x, b))
        assert y.shape == gx.shape == x.shape
        assert gb.tolist() == [0.0] * shape[dim]


def test_scalar(backend, device):
    x = torch.tensor(-2.0, device=device, requires_grad=True)
    y = bias_act(x, act="lrelu", gain=1.0, backend=backend)
    assert y.shape == () and y.item() == pytest.approx(-0.4)
    assert torch.autograd.grad(y, x)[0].item() == pytest.approx(0.2)


STRIDED = {
    "transposed": lambda x: x.transpose(1, 3),
    "permuted": lambda x: x.permute(2, 0, 3, 1),
    "sliced": lambda x: x[:, :, 1:, ::2],
    "offset": lambda x: x[1:],
    "flipped_channels_last": lambda x: x.contiguous(memory_format=torch.channels_last)[:, 1:],
    "expanded": lambda x: x[:, :1].expand(-1, 3, -1, -1),
}


@pytest.mark.parametrize("view", STRIDED)
@pytest.mark.parametrize("act", ["lrelu", "swish"])
def test_any_strides(backend, view, act, device):
    base = torch.randn(3, 6, 5, 8, device=device)
    x = STRIDED[view](base)
    for dim in range(4):
        b = torch.randn(x.shape[dim], device=device)
        dense = x.clone(memory_format=torch.contiguous_format)
        inputs = x.detach().requires_grad_()
        y = bias_act(inputs, b, dim, act, clamp=0.9, backend=backend)
        expected = bias_act(dense, b, dim, act, clamp=0.9, backend=backend)
        torch.testing.assert_close(y, expected)
        assert y.stride() == torch.empty_like(x).stride()
        dy = torch.randn_like(dense)
        (g,) = torch.autograd.grad(y, inputs, dy)
        dense.requires_grad_()
        y = bias_act(dense, b, dim, act, clamp=0.9, backend=backend)
        torch.testing.assert_close(g, torch.autograd.grad(y, dense, dy)[0])


def test_strided_bias_and_cotangent(backend, device):
    x = torch.randn(2, 5, 7, 3, device=device, requires_grad=True)
    b = torch.randn(10, device=device)[::2]
    dy = torch.ones((), device=device).expand(2, 5, 7, 3)
    y = bias_act(x, b, act="lrelu", backend=backend)
    assert_matches(y, reference(x.double(), b.double(), 1, "lrelu"))
    (g,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    assert torch.equal(g, torch.autograd.grad(y, x, torch.ones_like(y))[0])


def test_inputs_are_left_alone(backend, device):
    x, b = operands((2, 5, 7, 3), 1, torch.float32, device)
    x_before, b_before = x.clone(), b.clone()
    bias_act(x, b, act="lrelu", clamp=0.1, backend=backend)
    assert torch.equal(x, x_before) and torch.equal(b, b_before)


@pytest.mark.parametrize("act", CURVED)
def test_third_order_of_curved_activations_raises(backend, act, device):
    if backend == "reference":
        pytest.skip("the reference has every order")
    x = torch.randn(2, 3, device=device, requires_grad=True)
    (g,) = torch.autograd.grad(
        bias_act(x, act=act, backend=backend).square().sum(), x, create_graph=True
    )
    (gg,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.autograd.grad(gg.sum(), x)


@pytest.mark.parametrize("act", PIECEWISE_LINEAR)
def test_third_order_of_piecewise_linear_activations(backend, act, device):
    def third(backend):
        x = torch.linspace(-1, 1, 12, device=device).view(3, 4).requires_grad_()
        g = bias_act(x, act=act, gain=1.1, clamp=0.9, backend=backend).pow(4).sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(g.sum(), x, create_graph=True)
        return g

    torch.testing.assert_close(third(backend), third("reference"))


def test_saved_memory_is_two_bits_an_element(backend, device):
    """Piecewise-linear activations keep neither input nor output for the backward pass."""
    if backend == "reference":
        pytest.skip("PyTorch's operators save what they save")
    x = torch.randn(2, 8, 16, 16, device=device, requires_grad=True)
    b = torch.randn(8, device=device, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bias_act(x, b, act="lrelu", clamp=0.5, backend=backend)
    assert sum(t.numel() * t.element_size() for t in saved) == x.numel() // 4


def test_bias_gradient_is_reproducible(backend, device):
    x = torch.randn(4, 16, 32, 36, device=device)
    b = torch.randn(16, device=device, requires_grad=True)
    dy = torch.randn_like(x)
    runs = [
        torch.autograd.grad(bias_act(x, b, act="lrelu", backend=backend), b, dy)[0]
        for _ in range(3)
    ]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_threads_agree():
    """Large enough for two threads to share the buffer, in both layouts."""
    if backends.unavailable("cpu") is not None:
        pytest.skip("the cpu backend is not built")
    before = torch.get_num_threads()
    try:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x, b = operands((3, 32, 61, 63), 1, torch.float32, "cpu", memory_format)
            torch.set_num_threads(1)
            alone = bias_act(x, b, act="swish", backend="cpu")
            torch.set_num_threads(2)
            assert torch.equal(bias_act(x, b, act="swish", backend="cpu"), alone)
            assert_all_orders("cpu", x, b, 1, act="lrelu", clamp=0.9131)
            assert_all_orders("cpu", x, b, 1, act="tanh", clamp=0.9131)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    if backends.unavailable("cpu") is not None:
        pytest.skip("the cpu backend is not built")
    size = 2**31 + 40
    x = torch.zeros(1, 2, size // 2, dtype=torch.float16)
    x[0, 1, -1] = 3.0
    x[0, 1, -40] = -3.0
    b = torch.tensor([1.0, 2.0], dtype=torch.float16)
    y = bias_act(x, b, act="lrelu", gain=1.0, backend="cpu")
    assert y[0, 0, :8].tolist() == [1.0] * 8
    assert y[0, 0, -1].item() == 1.0 and y[0, 1, 0].item() == 2.0
    assert y[0, 1, -1].item() == 5.0
    assert y[0, 1, -40].item() == pytest.approx(-0.2, abs=1e-3)
    assert y.view(-1)[2**31 + 1 : -1].eq(2.0).all()


def test_transforms_choose_the_reference(backend, device):
    """Forward mode and torch.func: right where the choice is automatic, else an error."""
    x = torch.randn(2, 3, 4, device=device)
    b = torch.randn(3, device=device)
    tangent = torch.randn_like(x)

    def function(x, backend=None):
        return bias_act(x, b, act="tanh", backend=backend).sum()

    expected = torch.autograd.functional.jvp(lambda x: function(x, "reference"), x, tangent)[1]
    torch.testing.assert_close(torch.func.jvp(function, (x,), (tangent,))[1], expected)
    torch.testing.assert_close((torch.func.grad(function)(x) * tangent).sum(), expected)
    torch.testing.assert_close(
        torch.func.vmap(lambda x: bias_act(x, b, 0, "tanh"))(x), bias_act(x, b, 1, "tanh")
    )
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        y = torch.autograd.forward_ad.unpack_dual(function(dual))
        torch.testing.assert_close(y.tangent, expected)
    if backend != "reference":
        with pytest.raises(NotImplementedError, match="backend='reference'"):
            torch.func.jvp(lambda x: function(x, backend), (x,), (tangent,))


def test_linear_without_work_returns_its_input(backend, device):
    x = torch.randn(2, 3, device=device)
    assert bias_act(x, backend=backend) is x


@pytest.mark.parametrize(
    ("exception", "message", "arguments"),
    [
        (TypeError, "x must be a torch.Tensor", dict(x=[1.0])),
        (TypeError, "x.dtype=torch.int64", dict(x=torch.ones(2, 3, dtype=torch.int64))),
        (TypeError, "x.dtype=torch.complex64", dict(x=torch.ones(2, 3, dtype=torch.complex64))),
        (TypeError, "b.dtype=torch.float16", dict(b=torch.ones(3, dtype=torch.float16))),
        (TypeError, "b must be a torch.Tensor", dict(b=[1.0, 2.0, 3.0])),
        (ValueError, r"b.shape=\(4,\)", dict(b=torch.ones(4))),
        (ValueError, r"b.shape=\(1, 3\)", dict(b=torch.ones(1, 3))),
        (ValueError, "b.device=meta", dict(b=torch.ones(3, device="meta"))),
        (ValueError, "dim=2", dict(b=torch.ones(3), dim=2)),
        (ValueError, "dim=-1", dict(b=torch.ones(3), dim=-1)),
        (TypeError, "dim takes integers, got 1.0", dict(b=torch.ones(3), dim=1.0)),
        (ValueError, "gain is too large", dict(gain=10**400)),
        (TypeError, "sparse", dict(x=torch.ones(2, 3).to_sparse())),
        (ValueError, "clamp=-0.5", dict(clamp=-0.5)),
        (ValueError, "clamp=nan", dict(clamp=math.nan)),
        (TypeError, "clamp='1'", dict(clamp="1")),
        (TypeError, "gain=", dict(gain=torch.ones(()))),
        (ValueError, "gain=inf", dict(gain=math.inf)),
        (TypeError, "alpha=True", dict(alpha=True)),
        (KeyError, "act='gelu'", dict(act="gelu")),
        (KeyError, "act=None", dict(act=None)),
        (KeyError, "lrelu", dict(act=["lrelu"])),
        (ValueError, "backend='fast'", dict(backend="fast")),
    ],
)
def test_bad_arguments(exception, message, arguments):
    with pytest.raises(exception, match=message):
        bias_act(**{"x": torch.randn(2, 3), **arguments})


def test_rank_zero_with_a_bias_is_refused():
    with pytest.raises(ValueError, match="dim"):
        bias_act(torch.tensor(1.0), torch.ones(1))


def test_autocast_follows_x(backend, device):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float32, device=device)
    b = torch.randn(3, dtype=torch.float16, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = bias_act(x, b, act="lrelu", backend=backend)
    assert y.dtype == torch.float32
    assert_matches(y, reference(x.double(), b.double(), 1, "lrelu"))


@pytest.mark.parametrize("act", ["linear", "lrelu", "tanh"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_torch_compile(backend, act, compiler, device):
    torch._dynamo.reset()

    def function(x, b):
        return bias_act(x, b, act=act, clamp=0.7, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x, b = operands((2, 5, 7, 3), 1, torch.float32, device, memory_format)
        x.requires_grad_()
        b.requires_grad_()
        y, expected = compiled(x, b), function(x, b)
        torch.testing.assert_close(y, expected)
        assert y.stride() == expected.stride()
        for actual, wanted in zip(
            torch.autograd.grad(y.square().sum(), (x, b)),
            torch.autograd.grad(expected.square().sum(), (x, b)),
        ):
            torch.testing.assert_close(actual, wanted)


def test_torch_compile_with_dynamic_shapes(backend, device):
    torch._dynamo.reset()

    def function(x, b):
        return bias_act(x, b, act="lrelu", clamp=0.7, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for height in (3, 5, 8):
        x, b = operands((2, 5, height, 4), 1, torch.float32, device)
        torch.testing.assert_close(compiled(x, b), function(x, b))


def test_export(backend, device):
    class Layer(torch.nn.Module):
        def forward(self, x, b):
            return bias_act(x, b, act="lrelu", clamp=0.7, backend=backend)

    x, b = operands((2, 5, 7, 3), 1, torch.float32, device)
    exported = torch.export.export(Layer(), (x, b))
    assert torch.equal(exported.module()(x, b), Layer()(x, b))


def test_opcheck(backend, device):
    if backend == "reference":
        pytest.skip("the reference is no registered op")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x, b = operands((2, 5, 7, 3), 1, torch.float32, device, memory_format)
        scale = torch.rand(2, 5, device=device)
        noise, strength = torch.randn(2, 1, 7, 3, device=device), torch.ones((), device=device)
        forward = (x, scale, noise, strength, b, 1, 3, 0.2, 1.4, 1.0, True, backend)
        torch.library.opcheck(epilogue_module.forward_op, forward)
        _, mask = epilogue_module.forward_op(*forward)
        masked = (x, mask, scale, 1, list(x.stride()), 0.2, 1.4, True, backend)
        torch.library.opcheck(epilogue_module.masked_op, masked)
        for order, h in ((1, None), (2, x)):
            curved = (order, x, x, h, scale, noise, strength, b, 1, 4, 0.2, 1.4, 1.0, True, backend)
            torch.library.opcheck(epilogue_module.curved_op, curved)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("act", ["linear", "relu", "lrelu", "tanh", "swish"])
@pytest.mark.parametrize("noise_shape", [(2, 1), (1, 1), (), None], ids=str)
def test_epilogue_with_scale_and_noise(backend, act, noise_shape, memory_format, device):
    """The whole epilogue: values, gradients and second gradients with respect to every operand."""
    if backend == "reference":
        pytest.skip("the kernels are compared with PyTorch's operators")
    refused = backends.refusal(backend, "bias_act", device.type, torch.float64) is not None
    dtype = torch.float32 if refused else torch.float64
    x = torch.randn(2, 3, 4, 5, dtype=dtype, device=device).contiguous(memory_format=memory_format)
    scale = torch.rand(2, 3, dtype=dtype, device=device)
    b = torch.randn(3, dtype=dtype, device=device)
    leaves = [x, scale, b]
    if noise_shape is not None:
        leaves.append(torch.randn(*noise_shape, 4, 5, dtype=dtype, device=device))
        leaves.append(torch.tensor(0.7, dtype=dtype, device=device))
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def fused(x, scale, b, noise=None, strength=None):
        return epilogue(x, scale, noise, strength, b, 1, act, 0.2, 1.3, 0.9, backend)

    def composed(x, scale, b, noise=None, strength=None):
        v = x * scale[:, :, None, None]
        v = v if noise is None else v + noise * strength
        return reference(v, b, 1, act, 0.2, 1.3, 0.9)

    assert fused(*leaves).stride() == x.stride()
    dy = torch.randn_like(x, requires_grad=True)
    directions = [torch.randn_like(leaf) for leaf in leaves]

    def all_orders(function):
        y = function(*leaves)
        first = torch.autograd.grad(y, leaves, dy, create_graph=True)
        combination = sum((g * v).sum() for g, v in zip(first, directions))
        second = torch.autograd.grad(combination, [dy, *leaves], materialize_grads=True)
        return [y, *first, *second]

    for actual, expected in zip(all_orders(fused), all_orders(composed)):
        torch.testing.assert_close(actual, expected)
    # With constant scale and noise the whole backward pass is one kernel.
    constants = [leaf if leaf is x or leaf is b else leaf.detach() for leaf in leaves]
    actual = torch.autograd.grad(fused(*constants), [x, b], dy)
    torch.testing.assert_close(actual, torch.autograd.grad(composed(*constants), [x, b], dy))
    if backend == "cpu":
        assert torch.autograd.gradcheck(fused, leaves)
        assert torch.autograd.gradgradcheck(fused, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_epilogue_in_low_precision(backend, dtype, device):
    if backend == "reference" or backends.refusal(backend, "bias_act", device.type, dtype):
        pytest.skip(f"{backend} has no {dtype} kernels here")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x, b = operands((2, 24, 9, 5), 1, dtype, device, memory_format)
        scale = torch.rand(2, 24, device=device)
        noise = torch.randn(2, 1, 9, 5, device=device)
        strength = torch.tensor(0.7, device=device)
        x.requires_grad_()
        y = epilogue(x, scale, noise, strength, b, 1, "lrelu", 0.2, 1.3, 0.9131, backend)
        xd = x.detach().double().requires_grad_()
        v = xd * scale.double()[:, :, None, None] + noise.double() * 0.7
        expected = reference(v, b.double(), 1, "lrelu", 0.2, 1.3, 0.9131)
        assert_matches(y, expected)
        dy = torch.randn_like(y)
        (g,) = torch.autograd.grad(y, x, dy)
        (g_expected,) = torch.autograd.grad(expected, xd, dy.double())
        assert_matches(g, g_expected)


@st.composite
def calls(draw):
    rank = draw(st.integers(1, 5))
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=rank, max_size=rank)))
    dim = draw(st.integers(-1, rank))
    length = shape[dim] if 0 <= dim < rank else 1
    return dict(
        shape=shape,
        dim=dim,
        bias=draw(st.sampled_from([None, length, length, length, length + 1])),
        act=draw(st.sampled_from([*ACTIVATIONS, "gelu"])),
        alpha=draw(st.none() | st.floats(-2, 2)),
        gain=draw(st.none() | st.floats(-2, 2)),
        clamp=draw(st.none() | st.floats(-0.5, 3)),
        permutation=draw(st.permutations(range(rank))),
        step=draw(st.sampled_from([1, 1, 2])),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(call=calls())
def test_any_call_agrees_or_raises_clearly(call, device):
    """On the automatic backend: the reference's result, or the exception that names the culprit."""
    generator = torch.Generator().manual_seed(call["seed"])
    base = torch.randn(call["shape"], generator=generator).to(device)
    order = call["permutation"]
    x = base.permute(order).contiguous().permute([order.index(i) for i in range(len(order))])
    x = x[:: call["step"]]
    b = call["bias"]
    if b is not None:
        b = torch.randn(b, generator=generator).to(device)
    dim, act, clamp = call["dim"], call["act"], call["clamp"]
    arguments = (x, b, dim, act, call["alpha"], call["gain"], clamp)

    if act == "gelu":
        with pytest.raises(KeyError, match="gelu"):
            bias_act(*arguments)
        return
    if b is not None and not (0 <= dim < x.ndim and b.shape[0] == x.shape[dim]):
        with pytest.raises(ValueError, match=r"dim|b must"):
            bias_act(*arguments)
        return
    if clamp is not None and clamp < 0:
        with pytest.raises(ValueError, match="clamp"):
            bias_act(*arguments)
        return
    y = bias_act(*arguments)
    expected = reference(x.double(), None if b is None else b.double(), *arguments[2:])
    assert_matches(y, expected)
    assert y.dtype == x.dtype and y.device == x.device


def test_use_backend_reaches_the_op(monkeypatch):
    seen = []
    original = backends.BACKENDS["cpu"].epilogue_forward
    monkeypatch.setattr(
        backends.BACKENDS["cpu"], "epilogue_forward", lambda *a: seen.append(1) or original(*a)
    )
    x = torch.randn(2, 3)
    with use_backend("reference"):
        bias_act(x, act="lrelu")
    assert not seen
    with use_backend("cpu"):
        bias_act(x, act="lrelu")
    assert seen == [1]
