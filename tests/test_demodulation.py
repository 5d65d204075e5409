"""The demodulation coefficients: values, every order, and their corners, on every backend."""

import pytest
import torch

from stylegan_fast import backends, no_weight_gradients
from stylegan_fast.backends import native
from stylegan_fast.ops.demodulation import demodulation, demodulation_op
from stylegan_fast.reference.modulated_conv2d import demodulation as reference
from stylegan_fast.testing import assert_matches
from stylegan_fast.weight_gradients import skippable

EPS = 1e-8
LAYOUTS = (torch.contiguous_format, torch.channels_last)

# Outputs, inputs, taps and samples: whole and broken vectors, rows and tiles; one of each.
SHAPES = (
    ((5, 7, 3, 3), 2),
    ((6, 33, 1, 1), 3),
    ((3, 4, 5, 5), 17),
    ((9, 20, 3, 1), 4),
    ((4, 12, 3, 3), 0),
    ((2, 1, 3, 3), 1),
    ((1, 3, 1, 1), 2),
)


@pytest.fixture
def kernels(backend) -> str:
    """Every backend with a kernel."""
    if backend == "reference":
        pytest.skip("the reference is the formula itself")
    return backend


def operands(shape, samples, dtype, device, layout=torch.contiguous_format):
    weight = torch.randn(shape, dtype=torch.float64, device=device).to(dtype)
    styles = torch.randn(samples, shape[1], dtype=torch.float64, device=device).to(dtype) + 1
    return weight.contiguous(memory_format=layout), styles


def skip_where_refused(backend, dtype):
    if dtype not in backends.BACKENDS[backend].dtypes():
        pytest.skip(f"{backend} has no kernel for {dtype}")


def assert_values(backend, weight, styles):
    d, energy = demodulation_op(weight, styles, EPS, backend)
    exact = weight.double()
    terms = weight[0].numel()
    assert d.dtype == energy.dtype == weight.dtype
    assert_matches(energy, torch.einsum("oiyx,oiyx->oi", exact, exact), reduction=terms)
    modulated = torch.einsum("oiyx,ni->noiyx", exact, styles.double())
    assert_matches(d, (modulated.square().sum([2, 3, 4]) + EPS) ** -0.5, reduction=terms)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape, samples", [*SHAPES, ((3, 512, 3, 3), 5)], ids=str)
def test_values(kernels, shape, samples, dtype, device):
    skip_where_refused(kernels, dtype)
    for layout in LAYOUTS:
        assert_values(kernels, *operands(shape, samples, dtype, device, layout))


@pytest.mark.parametrize("level", native.load()[0].simd_levels() if native.load()[0] else [])
def test_every_simd_level(level):
    module = native.load()[0]
    widest = module.simd_level()
    module.set_simd_level(level)
    try:
        for (shape, samples), layout in zip(SHAPES * 2, LAYOUTS * len(SHAPES)):
            for dtype in (torch.float64, torch.float32):
                assert_values("cpu", *operands(shape, samples, dtype, "cpu", layout))
    finally:
        module.set_simd_level(widest)


def test_strided_arguments(kernels, device):
    weight, styles = operands((6, 10, 3, 5), 4, torch.float32, device)
    for strided in (weight[::2, 3:], weight.transpose(2, 3), weight.transpose(0, 1)):
        few = styles[::3, : strided.shape[1]]
        assert_values(kernels, strided, few)
        assert_values(kernels, strided, few[:1].expand(3, -1))


def combined(tensors):
    """A number to which every element counts differently."""
    return sum(
        (t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=t.device).view_as(t)).sum()
        for t in tensors
    )


def derivatives(function, weight, styles):
    """d and all gradients of three orders, the plain and the recorded ones of the first."""
    leaves = [t.detach().clone().requires_grad_() for t in (weight, styles)]
    d = function(*leaves)
    results = [d, *torch.autograd.grad(combined([d]), leaves, retain_graph=True)]
    value = combined([d])
    for order in range(3):
        gradients = torch.autograd.grad(value, leaves, create_graph=order < 2)
        results += gradients
        value = combined(gradients)
    return results


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_order_matches_the_reference(kernels, dtype, device):
    skip_where_refused(kernels, dtype)
    for shape, samples in SHAPES:
        weight, styles = operands(shape, samples, dtype, device)
        actual = derivatives(lambda w, s: demodulation(w, s, backend=kernels), weight, styles)
        expected = derivatives(reference, weight.double(), styles.double())
        assert len(actual) == len(expected) == 9
        for value, wanted in zip(actual, expected):
            assert_matches(value, wanted, reduction=weight.numel() * max(samples, 1))


def test_gradcheck(kernels, device):
    if kernels == "triton":
        pytest.skip("hundreds of interpreted launches; test_every_order_matches_the_reference")
    skip_where_refused(kernels, torch.float64)
    leaves = operands((3, 4, 2, 1), 2, torch.float64, device)
    leaves = [t.requires_grad_() for t in leaves]

    def function(weight, styles):
        return demodulation(weight, styles, backend=kernels)

    def first(weight, styles):
        return torch.autograd.grad(
            combined([function(weight, styles)]), (weight, styles), create_graph=True
        )

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(first, leaves, fast_mode=True)  # of third order


@pytest.mark.parametrize("asked", [(0,), (1,), (0, 1)])
def test_gradients_of_what_is_asked_for_only(kernels, asked, device):
    leaves = operands((5, 7, 3, 3), 2, torch.float32, device)
    leaves = [t.requires_grad_(i in asked) for i, t in enumerate(leaves)]
    wanted = [leaves[i] for i in asked]
    actual = torch.autograd.grad(demodulation(*leaves, backend=kernels).sum(), wanted)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    expected = torch.autograd.grad(reference(*doubles).sum(), [doubles[i] for i in asked])
    for g, want in zip(actual, expected):
        assert_matches(g, want, reduction=63)


def test_the_weight_s_gradient_is_skipped(kernels, device):
    """Inside no_weight_gradients; what is recorded there reaches the weight in full."""
    weight, styles = operands((5, 7, 3, 3), 2, torch.float32, device)
    weight.requires_grad_()
    styles.requires_grad_()

    def slope(function):
        d = function(skippable(weight), styles)
        return torch.autograd.grad(d.sum(), styles, create_graph=True)[0].square().sum()

    with no_weight_gradients():
        value = slope(lambda w, s: demodulation(w, s, backend=kernels))
        value.backward(retain_graph=True)
        assert weight.grad is None and styles.grad.abs().max() > 0
    (actual,) = torch.autograd.grad(value, weight)
    assert_matches(actual, torch.autograd.grad(slope(reference), weight)[0], reduction=126)


def test_no_more_is_kept_than_arguments_and_results(kernels, device):
    weight, styles = operands((5, 7, 3, 3), 2, torch.float32, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        demodulation(weight.requires_grad_(), styles, backend=kernels)
    assert sorted(t.numel() for t in saved) == sorted((5 * 7 * 9, 2 * 7, 2 * 5, 5 * 7))


def test_what_has_no_energy(kernels, device):
    weight, styles = operands((5, 7, 3, 3), 3, torch.float32, device)
    weight[1] = 0
    styles[0] = 0
    leaves = [weight.requires_grad_(), styles.requires_grad_()]
    d = demodulation(*leaves, backend=kernels)
    assert_matches(d[0], torch.full_like(d[0], 1e4))
    assert_matches(d[:, 1], torch.full_like(d[:, 1], 1e4))
    d_weight, d_styles = torch.autograd.grad(d.sum(), leaves)
    assert not d_weight[1].any() and d_weight[0].all()
    assert not d_styles[0].any() and d_styles[1:].all()


def test_what_overflows(kernels, device):
    weight, styles = operands((5, 7, 3, 3), 3, torch.float32, device)
    styles[1] = 1e20
    d = demodulation(weight, styles.requires_grad_(), backend=kernels)
    assert torch.equal(d[1], torch.zeros_like(d[1]))
    (d_styles,) = torch.autograd.grad(d.sum(), styles)
    assert not d_styles[1].any()
    assert d_styles.isfinite().all() and d_styles[::2].all()


def test_a_dtype_without_a_kernel(kernels, device, monkeypatch):
    """float64 weights of float32 images."""
    leaves = operands((5, 7, 3, 3), 2, torch.float64, device)
    monkeypatch.setattr(backends.BACKENDS[kernels], "dtypes", lambda: (torch.float32,))
    assert torch.equal(demodulation(*leaves, backend=kernels), reference(*leaves))


def test_threads_agree():
    if backends.unavailable("cpu") is not None:
        pytest.skip("the cpu backend is not built")
    before = torch.get_num_threads()
    try:
        for layout in LAYOUTS:
            leaves = operands((131, 97, 3, 3), 5, torch.float32, "cpu", layout)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(demodulation_op(*leaves, EPS, "cpu"))
            assert all(torch.equal(a, b) for a, *others in zip(*results) for b in others)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_torch_compile(kernels, compiler, device):
    torch._dynamo.reset()

    def function(weight, styles):
        return demodulation(weight, styles, backend=kernels)

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    leaves = [t.requires_grad_() for t in operands((5, 7, 3, 3), 2, torch.float32, device)]
    d, expected = compiled(*leaves), function(*leaves)
    torch.testing.assert_close(d, expected)
    for actual, wanted in zip(
        torch.autograd.grad(d.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
    ):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_opcheck(kernels, layout, device):
    leaves = operands((5, 7, 3, 3), 2, torch.float32, device, layout)
    torch.library.opcheck(demodulation_op, (*leaves, EPS, kernels))
