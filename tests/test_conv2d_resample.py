"""conv2d_resample against its four steps, and what no_weight_gradients promises."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from stylegan_fast import no_weight_gradients
from stylegan_fast.ops import conv2d_resample, setup_filter, upfirdn2d
from stylegan_fast.reference.conv2d_resample import output_size
from stylegan_fast.testing import assert_matches, relative_error

FIR = setup_filter([1, 3, 3, 1])
TAPS5 = setup_filter([1, 4, 3, 2, 1], separable=True)
SKEW = torch.tensor([[1.0, 2, 0.5], [3, -1, 2]]) / 7  # 3 wide, 2 high
FILTERS = {"4x4": FIR, "5": TAPS5, "2x3": SKEW, "None": None}


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def on(device, f):
    return None if f is None else f.to(device)


def step_by_step(x, w, f, up, down, padding, groups, flip_weight, flip_filter):
    """Pad all at once and upsample, correlate, downsample."""
    x0, x1, y0, y1 = padding
    fw, fh = (1, 1) if f is None else (f.shape[-1], f.shape[0])
    if up > 1:
        x0, x1 = x0 + (fw + up - 1) // 2, x1 + (fw - up) // 2
        y0, y1 = y0 + (fh + up - 1) // 2, y1 + (fh - up) // 2
    if down > 1:
        x0, x1 = x0 + (fw - down + 1) // 2, x1 + (fw - down) // 2
        y0, y1 = y0 + (fh - down + 1) // 2, y1 + (fh - down) // 2
    t = upfirdn2d(
        x, f if up > 1 else None, up, 1, [x0, x1, y0, y1], flip_filter=flip_filter, gain=up**2
    )
    t = F.conv2d(t, w if flip_weight else w.flip([2, 3]), groups=groups)
    return upfirdn2d(t, f, down=down, flip_filter=flip_filter) if down > 1 else t


@pytest.mark.parametrize("flip_weight, flip_filter", [(True, False), (False, True)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)], ids=str)
@pytest.mark.parametrize("f", FILTERS)
@pytest.mark.parametrize("up, down", [(1, 1), (2, 1), (3, 1), (1, 2), (1, 4), (2, 3)])
def test_equals_its_steps(up, down, f, kernel, flip_weight, flip_filter, device):
    for groups, padding in itertools.product((1, 2), ([5, 5, 5, 5], [2, 7, 6, 3], [8, -1, -2, 9])):
        x = randn(2, 4, 5, 7).to(device)
        w = randn(6, 4 // groups, *kernel, seed=1).to(device)
        arguments = (up, down, padding, groups, flip_weight, flip_filter)
        y = conv2d_resample(x, w, on(device, FILTERS[f]), *arguments)
        expected = step_by_step(x, w, on(device, FILTERS[f]), *arguments)
        assert_matches(y, expected)
        taps = (1, 1) if FILTERS[f] is None else (FILTERS[f].shape[-1], FILTERS[f].shape[0])
        assert y.shape[2:] == output_size((5, 7), kernel[::-1], taps, up, down, tuple(padding))


@pytest.mark.parametrize("up, down", [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_padding_of_half_the_kernel_keeps_the_size(up, down, k):
    x, w = randn(1, 2, 8, 12), randn(3, 2, k, k)
    y = conv2d_resample(x, w, FIR, up, down, padding=k // 2)
    assert y.shape == (1, 3, 8 * up // down, 12 * up // down)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 2)], ids=str)
@pytest.mark.parametrize("up, down", [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_gradients(up, down, kernel, device):
    x = randn(1, 2, 2, 3).to(device).requires_grad_()
    w = randn(2, 1, *kernel, seed=1).to(device).requires_grad_()
    f = SKEW.to(device)

    def run(x, w):
        return conv2d_resample(x, w, f, up, down, [1, 1, 0, 2], groups=2, flip_weight=False)

    gradients = torch.autograd.grad(run(x, w).square().sum(), [x, w], create_graph=True)
    assert all(g.requires_grad for g in gradients)  # gradgradcheck leaves out those that do not
    assert gradcheck(run, (x, w))
    assert gradgradcheck(run, (x, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("up, down", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_dtypes(dtype, up, down, device):
    x, w = randn(2, 8, 6, 7).to(device, dtype), (randn(5, 8, 3, 3) / 9).to(device, dtype)
    y = conv2d_resample(x, w, FIR.to(device), up, down, padding=1)
    expected = conv2d_resample(x.double(), w.double(), FIR.to(device), up, down, padding=1)
    assert y.dtype == dtype
    assert_matches(y, expected, reduction=8 * 9 * 16)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("up, down", [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("image_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_layouts(image_format, weight_format, up, down, kernel, device):
    x, w = randn(2, 3, 5, 7).to(device), randn(4, 3, kernel, kernel).to(device)
    expected = conv2d_resample(x, w, FIR.to(device), up, down, padding=kernel // 2)
    x, w = x.contiguous(memory_format=image_format), w.contiguous(memory_format=weight_format)
    y = conv2d_resample(x, w, FIR.to(device), up, down, padding=kernel // 2)
    assert y.is_contiguous(memory_format=image_format)
    assert_matches(y, expected)
    cropped = F.pad(x, [1, 2, 3, 1])[:, :, 3:-1, 1:-2]
    assert_matches(conv2d_resample(cropped, w, FIR.to(device), up, down, kernel // 2), expected)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("up, down", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_empty_batch(up, down, kernel, device):
    x = torch.empty(0, 3, 5, 7, device=device, requires_grad=True)
    w = torch.ones(4, 3, kernel, kernel, device=device, requires_grad=True)
    y = conv2d_resample(x, w, FIR.to(device), up, down, padding=kernel // 2)
    whole = conv2d_resample(randn(1, 3, 5, 7), w.double().cpu(), FIR, up, down, kernel // 2)
    assert y.shape == (0, *whole.shape[1:])
    dx, dw = torch.autograd.grad(y.sum(), [x, w])
    assert dx.shape == x.shape
    assert torch.equal(dw, torch.zeros_like(w))


@pytest.mark.parametrize("up, down", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_autocast_runs_as_conv2d_does(up, down):
    x, w = randn(2, 4, 5, 7).float(), randn(3, 4, 3, 3).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv2d_resample(x, w, FIR, up, down, padding=1)
        mixed = conv2d_resample(x.bfloat16(), w, FIR, up, down, padding=1)
        assert F.conv2d(x, w).dtype == y.dtype == mixed.dtype == torch.bfloat16
        assert conv2d_resample(x.double(), w.double(), FIR, up, down, 1).dtype == torch.float64
    (dw,) = torch.autograd.grad(y.sum(), w)
    assert dw.dtype == torch.float32
    expected = conv2d_resample(x.double(), w.double(), FIR, up, down, padding=1)
    for result in (y, mixed):
        assert relative_error(result, expected) < 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    "up, down, kernel", [(1, 1, 3), (2, 1, 3), (1, 2, 3), (2, 1, 1), (1, 2, 1)]
)
def test_compiles_to_one_graph(up, down, kernel):
    def run(x, w):
        return conv2d_resample(x, w, FIR, up, down, kernel // 2, flip_weight=up == 1)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = randn(2, 3, 5, 7).requires_grad_()
    w = randn(4, 3, kernel, kernel).requires_grad_()
    y, expected = compiled(x, w), run(x, w)
    assert_matches(y, expected)
    assert y.stride() == expected.stride()
    for actual, wanted in zip(
        torch.autograd.grad(y.square().sum(), [x, w]),
        torch.autograd.grad(expected.square().sum(), [x, w]),
    ):
        assert_matches(actual, wanted)


X, W = randn(2, 4, 5, 7), randn(6, 2, 3, 3)


@pytest.mark.parametrize("arguments, error, message", [
    (dict(x=[[0.0]]), TypeError, r"x must be a torch\.Tensor, got list"),
    (dict(x=X[0]), ValueError, r"x must have 4 dimensions, got x\.shape=\(4, 5, 7\)"),
    (dict(x=X[:, :, :0]), ValueError, r"only the batch may be empty"),
    (dict(x=X.int()), TypeError, r"x\.dtype=torch\.int32"),
    (dict(w=None), TypeError, r"w must be a torch\.Tensor, got NoneType"),
    (dict(w=W[0]), ValueError, r"w must have 4 dimensions, got w\.shape=\(2, 3, 3\)"),
    (dict(w=W.float()), TypeError, r"w\.dtype=torch\.float32 but x\.dtype=torch\.float64; use w"),
    (dict(w=W.to("meta")), ValueError, r"w\.device=meta but x\.device=cpu"),
    (dict(w=W[:, :1]), ValueError, r"I = 4 channels of x, groups=2 .* w\.shape=\(6, 1, 3, 3\)"),
    (dict(w=W[:5]), ValueError, r"O a multiple of groups, got w\.shape=\(5, 2, 3, 3\)"),
    (dict(w=W[..., :0]), ValueError, r"got w\.shape=\(6, 2, 3, 0\)"),
    (dict(f=[1, 1]), TypeError, r"f must be a torch\.Tensor or None, got \[1, 1\]; use setup_f"),
    (dict(f=FIR.clone().requires_grad_()), NotImplementedError, r"pass f\.detach\(\)"),
    (dict(f=FIR.to("meta")), ValueError, r"f\.device=meta"),
    (dict(up=0), ValueError, "up must be at least 1, got 0"),
    (dict(up=[2, 2]), TypeError, r"up takes integers, got \[2, 2\]"),
    (dict(down=1.5), TypeError, "down takes integers, got 1.5"),
    (dict(down=-2), ValueError, "down must be at least 1, got -2"),
    (dict(groups=True), TypeError, "groups takes integers, got True"),
    (dict(groups=3), ValueError, r"groups=3"),
    (dict(padding=[1, 2, 3]), ValueError, r"got padding=\[1, 2, 3\]"),
    (dict(padding=1.0), TypeError, "padding takes integers, got 1.0"),
    (dict(padding=-2), ValueError, "output would have -1 x 1 pixels .* increase padding"),
    (dict(backend="fast"), ValueError, "backend='fast' is unknown"),
    (dict(backend="cuda"), RuntimeError, "'cuda' cannot run conv2d_resample"),
])  # fmt: skip
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        conv2d_resample(**{"x": X, "w": W, "f": FIR, "groups": 2, **arguments})


def test_numpy_integers():
    one, two = np.int64(1), np.int32(2)
    y = conv2d_resample(X, W, FIR, two, one, padding=[one, two], groups=two)
    assert torch.equal(y, conv2d_resample(X, W, FIR, 2, 1, padding=[1, 2], groups=2))


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(1, 5), st.integers(1, 6)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    f=st.sampled_from(sorted(FILTERS)),
    up=st.integers(0, 3),
    down=st.integers(0, 3),
    padding=st.tuples(*[st.integers(-4, 6)] * 4),
    groups=st.integers(0, 3),
    flips=st.tuples(st.booleans(), st.booleans()),
)
def test_any_arguments(size, kernel, f, up, down, padding, groups, flips):
    inputs = 4 // groups if groups in (1, 2) else 2
    x, w, f = randn(2, 4, *size), randn(4, inputs, *kernel, seed=1), FILTERS[f]
    taps = (1, 1) if f is None else (f.shape[-1], f.shape[0])
    good = groups in (1, 2) and up > 0 and down > 0
    good = good and min(output_size(size, kernel[::-1], taps, up, down, padding)) > 0
    if good:
        y = conv2d_resample(x, w, f, up, down, padding, groups, *flips)
        assert_matches(y, step_by_step(x, w, f, up, down, padding, groups, *flips))
    else:
        with pytest.raises(ValueError, match=r"^(up|down|groups|w must be|the output would)"):
            conv2d_resample(x, w, f, up, down, padding, groups, *flips)


class WeightGradientCount(TorchDispatchMode):
    """How many convolutions computed the gradient of their weight."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            output_mask = args[-1]
            self.count += output_mask[1]
        self.count += func is torch.ops.stylegan_fast.conv2d_weight_gradient.default
        return func(*args, **(kwargs or {}))


def discriminator(x, w1, w2):
    x = F.leaky_relu(conv2d_resample(x, w1, FIR, padding=1), 0.2) ** 2
    return conv2d_resample(x, w2, FIR, down=2, padding=1).square().sum([1, 2, 3])


def r1_gradients(x, weights, skip):
    """Gradients by the weights of R1 plus the logits themselves, as one training step would."""
    logits = discriminator(x, *weights)
    with no_weight_gradients(skip), WeightGradientCount() as inside:
        (g,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    loss = g.square().sum() + logits.mean()
    with WeightGradientCount() as outside:
        gradients = torch.autograd.grad(loss, weights)
    return gradients, inside.count, outside.count


def test_r1_is_the_same_without_weight_gradients():
    x = randn(2, 3, 6, 8).requires_grad_()
    weights = [randn(4, 3, 3, 3).requires_grad_(), randn(2, 4, 3, 3).requires_grad_()]
    plain, _, outside_plain = r1_gradients(x, weights, skip=False)
    skipped, inside, outside = r1_gradients(x, weights, skip=True)
    assert inside == 0
    assert outside == outside_plain > 0
    for actual, expected in zip(skipped, plain):
        assert expected.abs().max() > 1
        assert torch.equal(actual, expected)


def test_r1_gradients_are_right():
    weights = [randn(2, 1, 3, 3).requires_grad_(), randn(1, 2, 3, 3).requires_grad_()]
    x = randn(1, 1, 4, 6).requires_grad_()

    def penalty(*weights):
        with no_weight_gradients():
            logits = discriminator(x, *weights)
            (g,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return g.square().sum()

    assert gradcheck(penalty, weights)


def test_backward_inside_leaves_the_weights_alone():
    x, b = randn(2, 4, 5, 7).requires_grad_(), randn(6).requires_grad_()
    w = W.clone().requires_grad_()
    with no_weight_gradients():
        loss = (conv2d_resample(x, w, FIR, padding=1, groups=2) * b[:, None, None]).square().sum()
        loss.backward(retain_graph=True)
        assert w.grad is None
        with pytest.raises(RuntimeError, match="not have been used"):
            torch.autograd.grad(loss, w, retain_graph=True)
    assert x.grad.any()
    assert b.grad.any()
    loss.backward()
    (expected,) = torch.autograd.grad(
        (conv2d_resample(x, w, FIR, padding=1, groups=2) * b[:, None, None]).square().sum(), w
    )
    torch.testing.assert_close(w.grad, expected)


def test_blocks_nest_and_end_with_an_exception():
    w = W.clone().requires_grad_()

    def reaches_the_weight():
        y = conv2d_resample(X, w, padding=1, groups=2)
        (g,) = torch.autograd.grad(y.sum(), w, allow_unused=True)
        return g is not None

    with no_weight_gradients():
        with no_weight_gradients(disable=False):
            assert not reaches_the_weight()
        with no_weight_gradients():
            assert not reaches_the_weight()
        assert not reaches_the_weight()
    with no_weight_gradients(disable=False):
        assert reaches_the_weight()
    with pytest.raises(KeyError), no_weight_gradients():
        raise KeyError
    assert reaches_the_weight()


def test_torch_func_passes_through_the_weight():
    def run(w):
        return conv2d_resample(X, w, FIR, down=2, padding=1, groups=2)

    def cubes(w):
        return (run(w) ** 3).sum()

    y = run(W)
    batch = torch.func.vmap(run)(torch.stack([W, 2 * W]))
    torch.testing.assert_close(batch, torch.stack([y, 2 * y]))
    gradient = torch.func.grad(cubes)(W)
    torch.testing.assert_close((gradient * W).sum(), 3 * cubes(W))  # Euler: of degree 3
    _, curvature = torch.func.jvp(torch.func.grad(cubes), (W,), (W,))
    torch.testing.assert_close(curvature, 2 * gradient)  # the gradient: of degree 2
