"""adain: one body for every backend, dtype, layout and order; then its corners one by one."""

import itertools
import math

import pytest
import torch

from stylegan_fast import backends
from stylegan_fast.activations import ACTIVATIONS
from stylegan_fast.backends import native
from stylegan_fast.ops import adain
from stylegan_fast.ops.adain import backward_op, forward_op
from stylegan_fast.reference.adain import adain as reference
from stylegan_fast.testing import assert_matches, tolerance

PIECEWISE_LINEAR = [name for name, row in ACTIVATIONS.items() if not row.curved]
LAYOUTS = (torch.contiguous_format, torch.channels_last)

# Odd sizes, whole and broken groups of 16 pixels and channels, one channel.
SHAPES = ((2, 5, 7, 3), (3, 16, 4, 8), (2, 37, 6, 5), (3, 1, 5, 7))


def operands(shape, dtype, device, memory_format=torch.contiguous_format):
    """x, styles, noise of each sample, a strength of each channel, b: all of other sizes."""
    n, c, h, w = shape

    def draw(*size):
        return torch.randn(size, dtype=torch.float64, device=device).to(dtype)

    x = draw(*shape).contiguous(memory_format=memory_format)
    return [x, draw(n, 2 * c), draw(n, 1, h, w), draw(c), draw(c)]


def call(function, x, styles, noise=None, strength=None, b=None, **arguments):
    return function(x, styles, noise=noise, noise_strength=strength, b=b, **arguments)


def derivatives(function, leaves, dy, orders=2):
    """y, all gradients, and those of a combination of these with respect to dy and all leaves."""
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    dy = dy.detach().clone().requires_grad_()
    y = function(*leaves)
    results = {"y": y}
    plain = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    results |= {f"g{i}": g for i, g in enumerate(plain)}
    if orders > 1:
        first = torch.autograd.grad(y, leaves, dy, create_graph=True)
        results |= {f"recorded g{i}": g for i, g in enumerate(first)}
        combination = sum(
            (g * torch.linspace(-1, 1, g.numel(), dtype=g.dtype, device=g.device).view_as(g)).sum()
            for g in first
        )
        second = torch.autograd.grad(combination, [dy, *leaves], materialize_grads=True)
        results |= {f"gg{i}": g for i, g in enumerate(second)}
    return results


def assert_all_orders(backend, leaves, orders=2, **arguments):
    x = leaves[0]
    dy = torch.cos(torch.arange(x.numel(), dtype=torch.float64, device=x.device))
    dy = dy.view(x.shape).to(x.dtype)
    actual = derivatives(
        lambda *t: call(adain, *t, backend=backend, **arguments), leaves, dy, orders
    )
    expected = derivatives(
        lambda *t: call(reference, *t, **arguments),
        [t.double() for t in leaves],
        dy.double(),
        orders,
    )
    for name, value in actual.items():
        assert_matches(value, expected[name], reduction=x.numel(), name=name)
        assert value.dtype == x.dtype
    assert actual["y"].stride() == x.stride()
    assert backend == "reference" or actual["g0"].stride() == x.stride()
    assert actual["y"].shape == x.shape


def skip_where_refused(backend, device, dtype):
    reason = backends.refusal(backend, "adain", device.type, dtype)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("dtype", backends.reference.dtypes(), ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_order_matches_the_reference(backend, act, dtype, device):
    skip_where_refused(backend, device, dtype)
    orders = 1 if dtype.itemsize == 2 else 2
    places = list(itertools.product(SHAPES, LAYOUTS))
    if backend == "triton" and device.type == "cpu":  # interpreted kernels take their time
        places = places[:2] if act == "lrelu" else places[:1]
        orders = orders if act == "lrelu" else 1
    for shape, layout in places:
        leaves = operands(shape, dtype, device, layout)
        arguments = dict(act=act, alpha=0.31, gain=0.8077, clamp=0.6131, eps=0.0173)
        assert_all_orders(backend, leaves, orders, **arguments)


@pytest.mark.parametrize("level", native.load()[0].simd_levels() if native.load()[0] else [])
@pytest.mark.parametrize("dtype", backends.cpu.dtypes(), ids=str)
def test_every_simd_level(level, dtype):
    module = native.load()[0]
    widest = module.simd_level()
    module.set_simd_level(level)
    try:
        # Planes of more pixels, and channels of more groups, than are summed up at once.
        for shape, layout in itertools.product((*SHAPES, (1, 2, 61, 67)), LAYOUTS):
            leaves = operands(shape, dtype, "cpu", layout)
            assert_all_orders("cpu", leaves, orders=1, act="lrelu", clamp=0.9131, eps=0.0173)
    finally:
        module.set_simd_level(widest)


def test_parts_of_planes(backend, device):
    """So many pixels that the GPU's kernels share those of a channel."""
    for layout in LAYOUTS:
        leaves = operands((1, 2, 61, 67), torch.float32, device, layout)
        assert_all_orders(backend, leaves, orders=1, act="swish", eps=0.0173)


NOISES = {
    "shared": ((7, 3), (5,)),
    "shared, four dimensions": ((1, 1, 7, 3), ()),
    "of each sample": ((2, 1, 7, 3), ()),
    "of each sample and channel": ((2, 5, 7, 3), (5,)),
    "of each row": ((7, 1), ()),
    "without a strength": ((2, 1, 7, 3), None),
}


@pytest.mark.parametrize("kind", NOISES)
def test_noise_of_any_shape(backend, kind, device):
    noise, strength = (
        None if size is None else torch.randn(size, device=device) for size in NOISES[kind]
    )
    x, styles, _, _, b = operands((2, 5, 7, 3), torch.float32, device, torch.channels_last)
    leaves = [t for t in (x, styles, noise, strength, b) if t is not None]

    def function(op):
        def run(x, styles, noise, *rest):
            given = rest[0] if len(rest) > 1 else None
            return call(op, x, styles, noise, given, rest[-1], act="lrelu", eps=0.01, **options)

        return run

    dy = torch.randn_like(x)
    options = {"backend": backend}
    actual = derivatives(function(adain), leaves, dy)
    options = {}
    expected = derivatives(function(reference), [t.double() for t in leaves], dy.double())
    for name, value in actual.items():
        assert_matches(value, expected[name], reduction=x.numel(), name=name)


def test_definition(backend, device):
    """Against torch.nn.functional's instance norm, in the published form."""
    x, styles, noise, strength, b = operands((2, 5, 7, 3), torch.float32, device)
    arguments = dict(act="lrelu", alpha=0.3, gain=1.5, clamp=2.0, eps=0.01)
    actual = call(adain, x, styles, noise, strength, b, backend=backend, **arguments)
    v = x.double() + strength[:, None, None].double() * noise.double() + b[:, None, None].double()
    u = (1.5 * torch.nn.functional.leaky_relu(v, 0.3)).clamp(-2, 2)
    normalised = torch.nn.functional.instance_norm(u, eps=0.01)
    scale, shift = styles.double().view(2, 2, 5, 1, 1).unbind(1)
    assert_matches(actual, normalised * (scale + 1) + shift, reduction=21)
    plain = adain(x, styles, backend=backend)
    normalised = torch.nn.functional.instance_norm(x.double(), eps=1e-8)
    assert_matches(plain, normalised * (scale + 1) + shift, reduction=21)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradcheck(backend, act, device):
    if backend == "triton":
        pytest.skip("hundreds of interpreted launches; test_every_order_matches_the_reference")
    skip_where_refused(backend, device, torch.float64)
    leaves = [t.requires_grad_() for t in operands((2, 3, 4, 3), torch.float64, device)]

    def function(*leaves):
        return call(
            adain, *leaves, act=act, alpha=0.3, gain=1.3, clamp=1.1, eps=0.01, backend=backend
        )

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_operands_that_depend_on_each_other(backend, device):
    """Styles and bias made from x: their paths count once, to second order."""
    x = torch.randn(2, 3, 5, 4, device=device, requires_grad=True)

    def second(backend):
        styles = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
        y = adain(x, styles, eps=0.01, b=x.mean((0, 2, 3)), act="lrelu", backend=backend)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return [g, *torch.autograd.grad(g.square().sum(), x)]

    for actual, expected in zip(second(backend), second("reference")):
        torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_small_variance_beside_a_large_mean(backend, layout, device):
    x = 1000 + torch.randn(2, 3, 40, 44, device=device).contiguous(memory_format=layout)
    styles = torch.randn(2, 6, device=device)
    expected = reference(x.double(), styles.double())
    torch.testing.assert_close(
        adain(x, styles, backend=backend).double(), expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_first_pixel_far_from_the_others(backend, layout, device):
    """Sums around that pixel would lose the variance."""
    x = torch.randn(2, 3, 40, 44, device=device).contiguous(memory_format=layout)
    x[:, :, 0, 0] = 3e4
    styles = torch.randn(2, 6, device=device)
    expected = reference(x.double(), styles.double())
    assert_matches(adain(x, styles, backend=backend), expected, reduction=40 * 44)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (40, 44)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_constant_channels_become_their_shift(backend, layout, size, device):
    x = torch.randn(2, 3, 1, 1, device=device).expand(2, 3, *size)
    x = x.contiguous(memory_format=layout).requires_grad_()
    styles = torch.randn(2, 6, device=device, requires_grad=True)
    y = adain(x, styles, act="lrelu", gain=1.3, backend=backend)
    assert torch.equal(y, styles[:, 3:, None, None].expand_as(y))
    for g in torch.autograd.grad(y, (x, styles), torch.randn_like(y)):
        assert g.isfinite().all()


@pytest.mark.parametrize("act", PIECEWISE_LINEAR)
def test_third_order_of_piecewise_linear_activations(backend, act, device):
    x = torch.linspace(-1, 1, 24, dtype=torch.float64, device=device).view(1, 2, 3, 4) ** 3
    if backends.refusal(backend, "adain", device.type, torch.float64) is not None:
        x = x.float()
    styles = torch.tensor([[0.5, -0.3, 0.1, 0.2]], dtype=x.dtype, device=device)

    def third(backend):
        leaf = x.clone().requires_grad_()
        y = adain(leaf, styles, eps=0.1, act=act, backend=backend)
        g = y.pow(4).sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(g.sum(), leaf, create_graph=True)
        return g

    torch.testing.assert_close(third(backend), third("reference"), rtol=1e-3, atol=1e-3)


def test_third_order_of_a_curved_activation_raises(backend, device):
    if backend == "reference":
        pytest.skip("the reference has every order")
    x = torch.randn(1, 2, 3, 4, device=device, requires_grad=True)
    g = adain(x, torch.zeros(1, 4, device=device), act="tanh", backend=backend).pow(4).sum()
    for _ in range(2):
        (g,) = torch.autograd.grad(g.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.autograd.grad(g.sum(), x)


def test_saved_memory_is_the_input(backend, device):
    if backend == "reference":
        pytest.skip("PyTorch's operators save what they save")
    x, styles, noise, strength, b = operands((2, 5, 16, 16), torch.float32, device)
    x.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(adain, x, styles, noise, strength, b, act="lrelu", backend=backend)
    small = sum(t.numel() for t in (styles, noise, strength, b)) + 2 * 2 * 5
    assert sum(t.numel() for t in saved) == x.numel() + small


def test_gradients_of_what_is_asked_for_only(backend, device):
    leaves = operands((2, 5, 7, 3), torch.float32, device)
    dy = torch.randn_like(leaves[0])
    for asked in range(len(leaves)):
        alone = [t.requires_grad_(i == asked) for i, t in enumerate(leaves)]
        (g,) = torch.autograd.grad(
            call(adain, *alone, act="lrelu", backend=backend), alone[asked], dy
        )
        doubles = [t.detach().double().requires_grad_() for t in leaves]
        expected = torch.autograd.grad(
            call(reference, *doubles, act="lrelu"), doubles[asked], dy.double()
        )
        assert_matches(g, expected[0], reduction=dy.numel())


def test_other_dtypes_of_the_operands(backend, device):
    skip_where_refused(backend, device, torch.float16)
    x, *rest = operands((2, 5, 7, 3), torch.float32, device)
    x = x.half().requires_grad_()
    rest = [t.requires_grad_() for t in rest]
    y = call(adain, x, *rest, act="lrelu", eps=0.01, backend=backend)
    doubles = [t.detach().double().requires_grad_() for t in (x, *rest)]
    expected = call(reference, *doubles, act="lrelu", eps=0.01)
    assert y.dtype == torch.float16
    assert_matches(y, expected, reduction=21)
    dy = torch.randn_like(y)
    for actual, wanted, leaf in zip(
        torch.autograd.grad(y, (x, *rest), dy),
        torch.autograd.grad(expected, doubles, dy.double()),
        (x, *rest),
    ):
        assert actual.dtype == leaf.dtype
        limit = tolerance(torch.float16, x.numel(), wanted.abs().max().item())
        assert (actual.double() - wanted).abs().max() <= limit


def test_strided_inputs_are_made_dense(backend, device):
    x, styles, noise, strength, b = operands((2, 5, 7, 3), torch.float32, device)
    for strided in (x.transpose(2, 3), x[:, 1:], x[:1].expand(2, 5, 7, 3), x.flip(3)):
        n, c, h, w = strided.shape
        image = noise.reshape(2, 1, h, w)
        arguments = (styles[:, : 2 * c], image, strength[:c], b[:c])
        y = call(adain, strided, *arguments, act="lrelu", backend=backend)
        expected = call(reference, *(t.double() for t in (strided, *arguments)), act="lrelu")
        assert_matches(y, expected, reduction=h * w)


def test_empty_batch(backend, device):
    leaves = [t.requires_grad_() for t in operands((0, 5, 7, 3), torch.float32, device)]
    y = call(adain, *leaves, act="tanh", backend=backend)
    assert y.shape == (0, 5, 7, 3)
    for g, leaf in zip(torch.autograd.grad(y.sum(), leaves), leaves):
        assert torch.equal(g, torch.zeros_like(leaf))


def test_nan_reaches_its_channel_only(backend, device):
    x = torch.randn(2, 3, 5, 7, device=device)
    styles = torch.randn(2, 6, device=device)
    x[1, 2, 3, 4] = math.nan
    y = adain(x, styles, backend=backend)
    assert y[1, 2].isnan().all()
    y[1, 2] = 0
    assert y.isfinite().all()


def test_threads_agree():
    if backends.unavailable("cpu") is not None:
        pytest.skip("the cpu backend is not built")
    before = torch.get_num_threads()
    try:
        for layout in LAYOUTS:
            leaves = operands((3, 21, 31, 29), torch.float32, "cpu", layout)
            leaves = [t.requires_grad_() for t in leaves]
            results = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                y = call(adain, *leaves, act="lrelu", backend="cpu")
                results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
            assert all(torch.equal(a, b) for a, b in zip(*results))
    finally:
        torch.set_num_threads(before)


def test_large_results_past_the_cache():
    """So large that results leave past the cache, which takes aligned rows; and a shifted one."""
    if backends.unavailable("cpu") is not None:
        pytest.skip("the cpu backend is not built")
    x = torch.randn(1, 16, 257, 256)
    styles = torch.randn(1, 32)
    expected = reference(x.double(), styles.double())
    for layout in LAYOUTS:
        y = adain(x.contiguous(memory_format=layout), styles, backend="cpu")
        assert_matches(y, expected, reduction=257 * 256)


def test_transforms_choose_the_reference(backend, device):
    x, styles, *_ = operands((2, 5, 7, 3), torch.float32, device)

    def function(x, backend=None):
        return adain(x, styles, act="tanh", backend=backend).square().sum()

    expected = torch.autograd.functional.vjp(lambda x: function(x, "reference"), x)[1]
    torch.testing.assert_close(torch.func.grad(function)(x), expected)
    if backend != "reference":
        with pytest.raises(NotImplementedError, match="backend='reference'"):
            torch.func.grad(lambda x: function(x, backend))(x)


def test_autocast_follows_x(backend, device):
    x, styles, noise, strength, b = operands((2, 5, 7, 3), torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = call(adain, x, styles.bfloat16(), noise, strength, b, act="lrelu", backend=backend)
    assert y.dtype == torch.float32
    leaves = (x, styles.bfloat16(), noise, strength, b)
    expected = call(reference, *(t.double() for t in leaves), act="lrelu")
    assert_matches(y, expected, reduction=21)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_torch_compile(backend, compiler, device):
    torch._dynamo.reset()

    def function(*leaves):
        return call(adain, *leaves, act="lrelu", clamp=0.7, eps=0.01, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for layout in LAYOUTS:
        leaves = operands((2, 5, 7, 3), torch.float32, device, layout)
        leaves = [t.requires_grad_() for t in leaves]
        y, expected = compiled(*leaves), function(*leaves)
        torch.testing.assert_close(y, expected)
        assert y.stride() == expected.stride()
        for actual, wanted in zip(
            torch.autograd.grad(y.square().sum(), leaves),
            torch.autograd.grad(expected.square().sum(), leaves),
        ):
            torch.testing.assert_close(actual, wanted)


def test_opcheck(backend, device):
    if backend == "reference":
        pytest.skip("the reference is no registered op")
    for layout in LAYOUTS:
        x, *rest = operands((2, 5, 7, 3), torch.float32, device, layout)
        constants = ("lrelu", 0.2, 1.4, 1.0)
        torch.library.opcheck(forward_op, (x, *rest, *constants, 1e-8, backend))
        _, statistics = forward_op(x, *rest, *constants, 1e-8, backend)
        torch.library.opcheck(backward_op, (x, x, statistics, *rest, *constants, backend))


@pytest.mark.parametrize(
    ("exception", "message", "arguments"),
    [
        (TypeError, "x must be a torch.Tensor", dict(x=[1.0])),
        (ValueError, r"x.shape=\(2, 3\)", dict(x=torch.ones(2, 3))),
        (ValueError, r"x.shape=\(2, 3, 0, 5\)", dict(x=torch.ones(2, 3, 0, 5))),
        (TypeError, "x.dtype=torch.int64", dict(x=torch.ones(2, 3, 4, 5, dtype=torch.int64))),
        (ValueError, r"styles.shape=\(2, 3\)", dict(styles=torch.ones(2, 3))),
        (ValueError, "styles.device=meta", dict(styles=torch.ones(2, 6, device="meta"))),
        (TypeError, "styles must be a torch.Tensor", dict(styles=None)),
        (ValueError, "eps=0", dict(eps=0)),
        (ValueError, "eps=-1", dict(eps=-1)),
        (TypeError, "eps='1'", dict(eps="1")),
        (ValueError, r"noise.shape=\(5, 4\)", dict(noise=torch.ones(5, 4))),
        (ValueError, "needs noise", dict(noise_strength=torch.ones(()))),
        (
            ValueError,
            r"noise_strength.shape=\(1, 3\)",
            dict(noise=torch.ones(4, 5), noise_strength=torch.ones(1, 3)),
        ),
        (ValueError, r"b.shape=\(6,\)", dict(b=torch.ones(6))),
        (ValueError, "clamp=-0.5", dict(clamp=-0.5)),
        (TypeError, "gain=", dict(gain=torch.ones(()))),
        (KeyError, "act='gelu'", dict(act="gelu")),
        (ValueError, "backend='fast'", dict(backend="fast")),
    ],
)
def test_bad_arguments(exception, message, arguments):
    with pytest.raises(exception, match=message):
        adain(**{"x": torch.randn(2, 3, 4, 5), "styles": torch.randn(2, 6), **arguments})
