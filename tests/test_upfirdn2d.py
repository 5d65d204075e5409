"""upfirdn2d and its wrappers: one body for every backend, dtype, layout and order; scipy as the
oracle nobody here wrote; then the corners one by one."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import scipy.signal
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck, gradgradcheck

from stylegan_fast import backends, use_backend
from stylegan_fast.ops import fir as fir_ops
from stylegan_fast.ops import upfirdn2d as exported
from stylegan_fast.ops.upfirdn2d import (
    _get_filter_size,
    _parse_padding,
    _parse_scaling,
    downsample2d,
    filter2d,
    setup_filter,
    upfirdn2d,
    upsample2d,
)
from stylegan_fast.reference.upfirdn2d import memory_format_of, output_size
from stylegan_fast.reference.upfirdn2d import upfirdn2d as reference
from stylegan_fast.testing import assert_matches

# Triton's interpreter multiplies by NaN and infinity with numpy's warnings.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")


def definition(x, f, up, down, padding, flip_filter, gain):
    """The formula, output pixel by output pixel, in float64."""
    (ux, uy), (dx, dy), (x0, x1, y0, y1) = up, down, padding
    x = x.double().numpy()
    g = np.ones((1, 1)) if f is None else f.double().numpy()
    g = np.outer(g, g) if g.ndim == 1 else g
    g = g if flip_filter else g[::-1, ::-1]
    n, c, h, w = x.shape
    fh, fw = g.shape
    edge = 100  # Z is zero outside, too
    z = np.zeros((n, c, h * uy + 2 * edge, w * ux + 2 * edge))
    z[:, :, edge : edge + h * uy : uy, edge : edge + w * ux : ux] = x
    out_h = math.floor((h * uy + y0 + y1 - fh) / dy) + 1
    out_w = math.floor((w * ux + x0 + x1 - fw) / dx) + 1
    y = np.zeros((n, c, out_h, out_w))
    for oy, ox in itertools.product(range(out_h), range(out_w)):
        top, left = oy * dy - y0 + edge, ox * dx - x0 + edge
        y[:, :, oy, ox] = (g * z[:, :, top : top + fh, left : left + fw]).sum((2, 3))
    return torch.from_numpy(gain * y)


class Matrix:
    """The operator on images of one size as the matrix its definition makes of it, in float64."""

    def __init__(self, size, *arguments):
        pixels = math.prod(size)
        images = torch.eye(pixels, dtype=torch.float64).view(pixels, 1, *size)
        rows = definition(images, *arguments)
        self.size, self.out_size = size, tuple(rows.shape[2:])
        self.rows = rows.flatten(1)

    def __call__(self, x):
        y = x.detach().cpu().double().flatten(2) @ self.rows
        return y.view(*x.shape[:2], *self.out_size)

    def transposed(self, dy):
        dx = dy.detach().cpu().double().flatten(2) @ self.rows.T
        return dx.view(*dy.shape[:2], *self.size)


def image(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def on(device, f):
    return None if f is None else f.to(device)


def terms(f):
    """Products in a sum."""
    return math.prod(_get_filter_size(f))


def takes(backend, dtype, device):
    return backends.refusal(backend, "upfirdn2d", device.type, dtype) is None


def widest(backend, device):
    return torch.float64 if takes(backend, torch.float64, device) else torch.float32


def interpreted(backend, device):
    """Where an element costs milliseconds."""
    return backend == "triton" and device.type == "cpu"


def skip_long(backend, device, taps):
    if interpreted(backend, device) and taps > 17:
        pytest.skip(f"{taps} taps take Triton's interpreter minutes")


X = image(2, 3, 5, 7)
F23 = image(2, 3, dtype=torch.float32, seed=1)
F5 = image(5, dtype=torch.float32, seed=2)
FIR = setup_filter([1, 3, 3, 1])
NCHW, NHWC = torch.contiguous_format, torch.channels_last

CASES = {
    "2-D valid": (F23, (1, 1), (1, 1), (0, 0, 0, 0)),
    "2-D padded": (F23, (1, 1), (1, 1), (2, 2, 1, 1)),
    "2-D cropped": (F23, (1, 1), (1, 1), (3, -1, -2, 4)),
    "2-D up": (F23, (2, 3), (1, 1), (1, 2, 0, 3)),
    "2-D up x, down y": (F23, (3, 1), (1, 2), (4, 0, 1, 2)),
    "2-D down": (F23, (1, 1), (3, 2), (0, 1, 2, 0)),
    "2-D up and down": (F23, (2, 3), (3, 2), (-1, 2, 3, -2)),
    "2-D padded beyond the image": (F23, (2, 2), (1, 1), (-20, 25, 30, -25)),
    "4x4 same": (FIR, (1, 1), (1, 1), (2, 1, 1, 2)),
    "4x4 up 2": (FIR, (2, 2), (1, 1), (2, 1, 2, 1)),
    "4x4 down 2": (FIR, (1, 1), (2, 2), (1, 1, 1, 1)),
    "1-D same": (F5, (1, 1), (1, 1), (2, 2, 2, 2)),
    "1-D up x, down y": (F5, (2, 1), (1, 3), (3, 1, 0, 5)),
    "1-D up y, down x": (F5, (1, 4), (2, 1), (-2, 4, 1, -3)),
    "row": (image(1, 6, dtype=torch.float32), (1, 1), (1, 1), (4, 0, 2, -1)),
    "column": (image(7, 1, dtype=torch.float32), (1, 2), (1, 1), (-2, 1, 0, 6)),
    "larger than the image": (image(9, 11, dtype=torch.float32), (1, 1), (1, 1), (5, 4, 3, 4)),
    "None cropped": (None, (1, 1), (1, 1), (-1, 2, 3, -2)),
    "None resampled": (None, (2, 3), (3, 1), (1, 0, -4, 2)),
    "None padded beyond the image": (None, (1, 1), (1, 1), (-9, 12, 0, 0)),
}
FEW = ("2-D up and down", "1-D up x, down y", "None resampled")


@pytest.mark.parametrize("dtype", backends.reference.dtypes(), ids=str)
@pytest.mark.parametrize(
    "memory_format, flip_filter",
    [(NCHW, False), (NHWC, True)],
    ids=["NCHW", "channels_last"],
)
@pytest.mark.parametrize("case", CASES)
def test_every_order_matches_the_definition(
    backend, case, memory_format, flip_filter, dtype, device
):
    """y = A x, dx = A' dy, and from dx to dy A again, whose next derivative is A' once more."""
    if not takes(backend, dtype, device):
        with pytest.raises(RuntimeError, match=str(dtype).removeprefix("torch.")):
            upfirdn2d(X.to(device, dtype), None, backend=backend)
        return
    rarity = (dtype != torch.float32) + flip_filter
    if interpreted(backend, device) and rarity > (case in FEW):
        pytest.skip("one thing at a time in Triton's interpreter")
    f, up, down, padding = CASES[case]
    a = Matrix((5, 7), f, up, down, padding, flip_filter, -1.7)
    assert a.out_size == output_size((5, 7), _get_filter_size(f), up, down, padding)

    def leaf(t):
        return t.to(device, dtype).contiguous(memory_format=memory_format).detach().requires_grad_()

    x, dy, v = leaf(X), leaf(image(2, 3, *a.out_size, seed=3)), leaf(image(2, 3, 5, 7, seed=4))
    y = upfirdn2d(x, on(device, f), up, down, padding, flip_filter, gain=-1.7, backend=backend)
    (dx,) = grad(y, x, dy, create_graph=True)
    (ddy,) = grad(dx, dy, v, create_graph=True)
    (dv,) = grad(ddy, v, dy)
    expected = {"y": a(x), "dx": a.transposed(dy), "ddy": a(v), "dv": a.transposed(dy)}
    for (name, wanted), actual in zip(expected.items(), (y, dx, ddy, dv)):
        assert_matches(actual.cpu(), wanted, reduction=terms(f), name=name)
        assert actual.dtype == dtype
        if name == "y" or backend != "reference":
            assert actual.is_contiguous(memory_format=memory_format), name


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(backend, case, device):
    if not takes(backend, torch.float64, device):
        pytest.skip(f"{backend} has no float64 kernels")
    if interpreted(backend, device):
        pytest.skip("gradgradcheck makes hundreds of launches")
    f, up, down, padding = CASES[case]
    x = image(1, 2, 2, 3).to(device).detach().requires_grad_()
    if min(output_size((2, 3), _get_filter_size(f), up, down, padding)) < 1:
        padding = [p + 3 for p in padding]

    def run(x):
        return upfirdn2d(x, on(device, f), up, down, padding, gain=0.6, backend=backend)

    assert gradcheck(run, x)
    assert gradgradcheck(run, x)


@pytest.mark.parametrize("case", CASES)
def test_the_adjoint_is_an_upfirdn2d(backend, case, device):
    """<A x, y> = <x, A' y>, with A' called by hand."""
    if interpreted(backend, device) and case not in FEW:
        pytest.skip("one thing at a time in Triton's interpreter")
    f, up, down, padding = CASES[case]
    x = X.to(device, widest(backend, device))
    y = upfirdn2d(x, on(device, f), up, down, padding, gain=1.5, backend=backend)
    dy = image(*y.shape, seed=4).to(y)
    (fw, fh), (h, w), (out_h, out_w) = _get_filter_size(f), x.shape[2:], y.shape[2:]
    transposed = [
        fw - padding[0] - 1,
        w * up[0] - out_w * down[0] + padding[0] - up[0] + 1,
        fh - padding[2] - 1,
        h * up[1] - out_h * down[1] + padding[2] - up[1] + 1,
    ]
    dx = upfirdn2d(dy, on(device, f), down, up, transposed, True, gain=1.5, backend=backend)
    difference = (y.double() * dy.double()).sum() - (x.double() * dx.double()).sum()
    magnitude = (y.double() * dy.double()).abs().sum() + (x.double() * dx.double()).abs().sum()
    assert difference.abs() <= 8 * torch.finfo(x.dtype).eps * magnitude


def test_the_third_derivative_of_a_cube_passes_through(backend, device):
    a = Matrix((3, 4), F23, (2, 2), (1, 1), (2, 2, 2, 2), False, 1)
    x = image(1, 2, 3, 4).to(device, widest(backend, device)).detach().requires_grad_()
    y = upfirdn2d(x, on(device, F23), up=2, padding=2, backend=backend)
    g = (y**3).sum()
    for _ in range(3):
        (g,) = grad(g.sum(), x, create_graph=True)
    sums = a(torch.ones_like(x))
    assert_matches(g.cpu(), a.transposed(6 * sums**2), reduction=50)


# An oracle that nobody here wrote


def scipy_resampled(x, taps, up, down):
    """The full convolution along both axes, in float64."""
    y = x.detach().cpu().double().numpy()
    for axis in (2, 3):
        y = scipy.signal.upfirdn(taps.double().cpu().numpy(), y, up, down, axis=axis)
    return torch.from_numpy(y)


def full_padding(taps, up):
    return [taps - 1, taps - up] * 2


@pytest.mark.parametrize("up, down, taps", [
    (1, 1, 1), (1, 1, 6), (2, 1, 12), (1, 2, 12), (3, 2, 7), (1, 4, 5), (5, 3, 2), (1, 1, 17),
    (1, 1, 61), (2, 1, 61), (1, 2, 61), (4, 1, 47), (1, 4, 48), (1, 1, 127),
])  # fmt: skip
def test_separable_equals_scipy(backend, up, down, taps, device):
    skip_long(backend, device, taps)
    f = image(taps, dtype=torch.float32, seed=3)
    x = X.to(device, widest(backend, device))
    for f_given in (f, f.outer(f)) if taps < 8 else (f,):
        y = upfirdn2d(
            x, on(device, f_given), up, down, padding=full_padding(taps, up), backend=backend
        )
        expected = scipy_resampled(x, f, up, down)
        exact = torch.finfo(torch.float32).eps * 8 if f_given.ndim == 2 else 0
        if exact:  # the outer product is rounded to float32
            torch.testing.assert_close(
                y.cpu().double(), expected, rtol=exact, atol=exact * expected.abs().max().item()
            )
        else:
            assert_matches(y.cpu(), expected, reduction=taps**2)


def photograph(name, device, dtype):
    data = pytest.importorskip("skimage.data", reason="photographs are scikit-image's")
    pixels = torch.from_numpy(np.atleast_3d(getattr(data, name)()))
    return (pixels.movedim(2, 0)[None] / 127.5 - 1).to(device, dtype)


LOWPASS = torch.from_numpy(scipy.signal.firwin(12, 0.5)).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["astronaut", "camera"])
@pytest.mark.parametrize("up, down", [(1, 1), (2, 1), (1, 2)])
def test_photographs_are_resampled_as_scipy_does(backend, up, down, name, dtype, device):
    if interpreted(backend, device) and (name == "camera" or (dtype == torch.float16) != (up == 2)):
        pytest.skip("one thing at a time in Triton's interpreter")
    x = photograph(name, device, dtype)
    x = x[..., 96:115, 208:231] if interpreted(backend, device) else x[..., 37:421, 101:400]
    for memory_format in (NCHW, NHWC):
        y = upfirdn2d(
            x.contiguous(memory_format=memory_format),
            on(device, LOWPASS),
            up,
            down,
            full_padding(12, up),
            gain=up**2,
            backend=backend,
        )
        expected = up**2 * scipy_resampled(x, LOWPASS, up, down)
        assert_matches(y.cpu(), expected, reduction=144)
        if interpreted(backend, device):
            break


# What the networks call

F12 = image(12, dtype=torch.float32, seed=5)
WORKLOADS = {
    "images up": ((2, 3, 7, 9), 4, lambda x, run: run(x, FIR, 2, 1, [2, 1, 2, 1], False, 4)),
    "after a transposed convolution": (
        (2, 16, 9, 7), 4, lambda x, run: run(x, FIR, 1, 1, [1, 1, 1, 1], False, 4)),
    "before a convolution of stride 2": (
        (2, 16, 6, 8), 4, lambda x, run: run(x, FIR, 1, 1, [2, 2, 2, 2], False, 1)),
    "skip of the discriminator": (
        (2, 16, 6, 8), 4, lambda x, run: run(x, FIR, 1, 2, [1, 1, 1, 1], False, 1)),
    "augmentation up": ((2, 3, 6, 5), 12, lambda x, run: run(x, F12, 2, 1, [6, 5, 6, 5], False, 4)),
    "augmentation down": (
        (1, 3, 19, 20), 12, lambda x, run: run(x, F12, 1, 2, [-1, -1, -1, -1], True, 1)),
    "two-step of the dual discriminator": (
        (2, 3, 6, 7),
        4,
        lambda x, run: run(run(x, FIR, 2, 1, [2, 1, 2, 1], False, 4), FIR, 1, 2, [0] * 4, True, 1),
    ),
    "row, asymmetric": ((1, 3, 6, 9), 13, lambda x, run: run(
        x, torch.linspace(-1, 2, 13)[None], 1, 1, [9, 3, 2, -1], False, 1)),
    "column, asymmetric": ((1, 3, 6, 9), 13, lambda x, run: run(
        x, torch.linspace(-1, 2, 13)[:, None], 1, 1, [-2, 1, 3, 8], False, 1)),
    "warm-up blur": ((1, 3, 20, 17), 61, lambda x, run: run(
        x, torch.linspace(0, 1, 61), 1, 1, [30, 30, 30, 30], False, 1)),
    "longest blur": ((1, 2, 20, 17), 127, lambda x, run: run(
        x, torch.linspace(0, 1, 127), 1, 1, [63, 63, 63, 63], False, 1)),
    "viewer": ((1, 3, 9, 7), 47, lambda x, run: run(
        x, image(47, 47, dtype=torch.float32), 4, 1, [23, 23, 23, 23], False, 16)),
    "equivariance metric": ((1, 3, 9, 7), 127, lambda x, run: run(
        x, image(127, 127, dtype=torch.float32), 4, 1, [64, 63, 64, 63], False, 16)),
    "long row": ((1, 2, 6, 40), 61, lambda x, run: run(
        x, image(1, 61, dtype=torch.float32), 1, 1, [25, 40, 0, 1], True, 1)),
    "long column": ((1, 2, 40, 6), 61, lambda x, run: run(
        x, image(61, 1, dtype=torch.float32), 1, 1, [0, 1, 41, 23], True, 1)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_workloads(backend, workload, dtype, device):
    shape, taps, calls = WORKLOADS[workload]
    skip_long(backend, device, taps)
    if not takes(backend, dtype, device):
        pytest.skip(f"{backend} has no {dtype} kernels")
    if interpreted(backend, device) and dtype != torch.float32:
        pytest.skip("one thing at a time in Triton's interpreter")

    def kernel(x, f, *arguments):
        return upfirdn2d(x, on(device, f), *arguments, backend=backend)

    def exact(x, f, *arguments):
        return reference(x, f.double(), *arguments)

    for memory_format in (NCHW,) if interpreted(backend, device) else (NCHW, NHWC):
        x = image(*shape).to(device, dtype).contiguous(memory_format=memory_format)
        wide = x.cpu().double().detach().requires_grad_()
        x.requires_grad_()
        y, expected = calls(x, kernel), calls(wide, exact)
        dy = image(*y.shape, seed=1).to(y)
        (dx,) = grad(y, x, dy)
        (dx_expected,) = grad(expected, wide, dy.cpu().double())
        assert_matches(y.cpu(), expected, reduction=taps**2)
        assert_matches(dx.cpu(), dx_expected, reduction=taps**2)
        assert y.is_contiguous(memory_format=memory_format)


FILTERS = {
    "sums to zero": torch.tensor([[1.0, -2, 1], [0, 3, -3]]),
    "negative": -FIR,
    "zeros at its edges": F.pad(FIR, [2, 0, 0, 3]),
    "zero in its middle": torch.tensor([[1.0, 0, 2], [0, 0, 0], [3, 0, 4]]),
    "all zeros": torch.zeros(3, 2),
    "1-D all zeros": torch.zeros(3),
    "1-D zeros in its middle": torch.tensor([1.0, 0, 0, -2, 0]),
    "one tap": torch.tensor([[-0.3]]),
    "1-D one tap": torch.tensor([-0.3]),
    "sharp": torch.tensor([[0.0, -1, 0], [-1, 5, -1], [0, -1, 0]]),
    "large and small taps": torch.tensor([[1e6, 1e-6], [-1e-6, -1e6]]),
}


@pytest.mark.parametrize("f", FILTERS)
def test_unusual_filters(backend, f, device):
    f = FILTERS[f]
    x = X.to(device, widest(backend, device))
    for up, down in ((2, 1),) if interpreted(backend, device) else ((1, 1), (2, 1), (1, 2)):
        y = upfirdn2d(x, on(device, f), up, down, padding=[3, 2, 1, 4], backend=backend)
        expected = definition(x.cpu(), f, (up,) * 2, (down,) * 2, (3, 2, 1, 4), False, 1)
        assert_matches(y.cpu(), expected, reduction=terms(f))


@pytest.mark.parametrize("change", [0, 1e-1, 1e-3, 1e-5, 1e-7, 1e-9])
@pytest.mark.parametrize("tap", [(0, 0), (1, 2), (3, 3)], ids=str)
def test_a_filter_of_almost_rank_one_keeps_every_tap(backend, tap, change, device):
    """A backend may take a 2-D filter for separable only where that changes no digit."""
    if interpreted(backend, device) and tap != (1, 2):
        pytest.skip("one thing at a time in Triton's interpreter")
    dtype = widest(backend, device)
    taps = torch.tensor([1, 3, 3, 1], dtype=dtype)
    f = taps.outer(taps) / 64
    f[tap] += change
    x = X.to(device, dtype)
    for padding in ((1, 2, 2, 1), (3, 3, 3, 3)):
        y = upfirdn2d(x, on(device, f), padding=padding, backend=backend)
        assert_matches(
            y.cpu(), definition(x.cpu(), f, (1, 1), (1, 1), padding, False, 1), reduction=16
        )


# Precision


@pytest.mark.parametrize("f", [F23, F5, F12, None], ids=["2-D", "1-D", "12 taps", "None"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_round_once(backend, dtype, f, device):
    """The error is that of one rounding, and of sums in float32."""
    if not takes(backend, dtype, device):
        pytest.skip(f"{backend} has no {dtype} kernels")
    x = X.to(device, dtype)
    arguments = (2, [1, 3], 6)
    y = upfirdn2d(x, on(device, f), *arguments, gain=1.3, backend=backend).cpu().double()
    wide, absolute = x.cpu().double(), None if f is None else f.abs()
    expected = reference(wide, f, *arguments, gain=1.3)
    summed = reference(wide.abs(), absolute, *arguments, gain=1.3)
    bound = torch.finfo(dtype).eps / 2 * expected.abs()
    bound += torch.finfo(torch.float32).eps * (terms(f) + 2) * summed
    bound += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # of subnormals
    assert ((y - expected).abs() <= bound).all()


@pytest.mark.parametrize("f", [F23, F12], ids=["2-D", "1-D"])
def test_float32_is_exact_to_its_taps(backend, f, device):
    """Also where terms cancel."""
    x = X.float().to(device)
    y = upfirdn2d(x, on(device, f), up=2, padding=6, backend=backend).cpu()
    expected = reference(x.cpu().double(), f, up=2, padding=6)
    bound = reference(x.cpu().double().abs(), f.abs(), up=2, padding=6)
    length = sum(_get_filter_size(f)) if f.ndim == 1 else terms(f)
    assert ((y - expected).abs() <= (length + 1) * torch.finfo(torch.float32).eps * bound).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_filters_of_any_dtype(backend, dtype, device):
    x, f = X.float().to(device), FIR.to(device)
    y = upfirdn2d(x, f.to(dtype), up=2, padding=2, backend=backend)  # exact in each
    assert y.dtype == torch.float32
    assert torch.equal(y, upfirdn2d(x, f, up=2, padding=2, backend=backend))


def test_float64_keeps_a_float64_filter(backend, device):
    if not takes(backend, torch.float64, device):
        pytest.skip(f"{backend} has no float64 kernels")
    for f in (image(2, 3, seed=5), image(4, seed=5)):
        y = upfirdn2d(X.to(device), f.to(device), padding=2, backend=backend)
        assert_matches(y.cpu(), definition(X, f, (1, 1), (1, 1), (2, 2, 2, 2), False, 1))


@pytest.mark.parametrize("f", [F23, F5, None], ids=["2-D", "1-D", "None"])
def test_gain_is_a_factor_whatever_its_sign(backend, f, device):
    x, f = X.float().to(device), on(device, f)
    y = upfirdn2d(x, f, padding=4, backend=backend)
    torch.testing.assert_close(upfirdn2d(x, f, padding=4, gain=-9, backend=backend), -9 * y)
    assert not upfirdn2d(x, f, padding=4, gain=0, backend=backend).any()


def test_overflow_is_infinity_of_its_sign(backend, device):
    x = torch.full((1, 1, 4, 8), 60000.0, dtype=torch.float16, device=device)
    y = upfirdn2d(x, torch.tensor([[1.0, -3.0]], device=device), backend=backend)
    assert y.eq(-math.inf).all() or y.eq(math.inf).all()
    y = upfirdn2d(x, torch.tensor([[1.0, -1.0]], device=device), backend=backend)
    assert not y.any()  # as the sum itself does not overflow


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("memory_format", [NCHW, NHWC], ids=str)
@pytest.mark.parametrize("f, up, down, reach", [
    (FIR, 1, 1, 4), (FIR, 2, 1, 4), (FIR, 1, 2, 2), (setup_filter(F12 - F12.mean() + 1), 1, 1, 12),
    (None, 1, 1, 1),
])  # fmt: skip
def test_nan_and_infinity_stay_within_the_reach_of_the_filter(
    backend, f, up, down, reach, memory_format, value, device
):
    if interpreted(backend, device) and (value == math.inf) == (memory_format == NCHW):
        pytest.skip("one thing at a time in Triton's interpreter")
    x = torch.zeros(2, 3, 9, 15, device=device).contiguous(memory_format=memory_format)
    x[1, 2, 4, 6] = value
    taps = 1 if f is None else f.shape[0]
    y = upfirdn2d(x, on(device, f), up, down, padding=taps, backend=backend)
    assert (~y.isfinite()).sum() == reach**2
    assert (~y[1, 2].isfinite()).sum() == reach**2
    support = None if f is None else f.abs().to(device)
    touched = reference((~x.isfinite()).double(), support, up, down, taps) > 0
    assert torch.equal(~y.isfinite(), touched)


# Layouts

LAYOUTS = {
    "NCHW": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=NHWC),
    "cropped channels_last": lambda x: F.pad(x, [1, 2, 1, 1]).contiguous(memory_format=NHWC)[
        :, :, 1:-1, 1:-2
    ],
    "cropped NCHW": lambda x: F.pad(x, [1, 2, 1, 1])[:, :, 1:-1, 1:-2],
    "some channels of channels_last": lambda x: torch.cat([x, x, x], 1).contiguous(
        memory_format=NHWC
    )[:, x.shape[1] : 2 * x.shape[1]],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "every second": lambda x: torch.stack([x, x], -1).flatten(3)[..., ::2],
    "every second sample": lambda x: torch.stack([x, x], 1).flatten(0, 1)[::2],
}
SHAPES = [(2, 3, 5, 7), (1, 8, 4, 3), (2, 1, 5, 7), (3, 5, 1, 1), (1, 1, 1, 1), (1, 16, 1, 9)]


def laid_out_as(y, x):
    return y.is_contiguous(memory_format=memory_format_of(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout, device):
    shapes = SHAPES[:2] if interpreted(backend, device) else SHAPES
    cases = ("2-D up and down", "1-D same") if interpreted(backend, device) else CASES
    for shape, case in itertools.product(shapes, cases):
        f, up, down, padding = CASES[case]
        if min(output_size(shape[2:], _get_filter_size(f), up, down, padding)) < 1:
            padding = [p + 12 for p in padding]
        x = LAYOUTS[layout](image(*shape, dtype=torch.float32).to(device))
        assert torch.equal(x.cpu(), image(*shape, dtype=torch.float32))
        before = x.clone()
        y = upfirdn2d(x, on(device, f), up, down, padding, backend=backend)
        expected = reference(x.cpu().double(), f, up, down, padding)
        assert_matches(y.cpu(), expected, reduction=terms(f), name=f"{shape}, {case}")
        assert laid_out_as(y, x), (shape, case)
        assert torch.equal(x, before)


@pytest.mark.parametrize("base, shape", [
    ((1, 1, 5, 7), (2, 3, 5, 7)), ((2, 3, 1, 7), (2, 3, 6, 7)), ((2, 3, 5, 1), (2, 3, 5, 9)),
    ((1, 1, 1, 1), (2, 8, 6, 8)), ((2, 1, 5, 7), (2, 4, 5, 7)),
])  # fmt: skip
def test_expanded(backend, base, shape, device):
    """Strides of 0, forward and as the incoming gradient."""
    x = image(*base, dtype=torch.float32).to(device).expand(shape).detach().requires_grad_()
    y = upfirdn2d(x, on(device, F23), 2, padding=2, backend=backend)
    dense = x.detach().cpu().double().contiguous().detach().requires_grad_()
    expected = reference(dense, F23, 2, padding=2)
    assert_matches(y.cpu(), expected, reduction=6)
    assert laid_out_as(y, x)
    (dx,) = grad(y.sum(), x)
    (dx_expected,) = grad(expected.sum(), dense)
    assert_matches(dx.cpu(), dx_expected, reduction=6)


def test_strided_cotangents_and_filters(backend, device):
    x = X.float().to(device).detach().requires_grad_()
    wide = image(5, 9, dtype=torch.float32, seed=8).to(device)
    for f in (wide[1:4, ::2], wide.t()[::3, :4], wide[2, 1::2], wide[0, :1].expand(3, 2)):
        y = upfirdn2d(x, f, padding=4, backend=backend)
        dense = x.detach().cpu().double().detach().requires_grad_()
        expected = reference(dense, f.cpu(), padding=4)
        assert_matches(y.cpu(), expected, reduction=terms(f))
        dy = image(*reversed(y.shape), dtype=torch.float32, seed=9).to(device).permute(3, 2, 1, 0)
        (dx,) = grad(y, x, dy)
        (dx_expected,) = grad(expected, dense, dy.cpu().double())
        assert_matches(dx.cpu(), dx_expected, reduction=terms(f))


@pytest.mark.parametrize("shape", [
    (2, 3, 5, 7), (1, 3, 5, 7), (2, 1, 5, 7), (2, 3, 1, 7),
    (2, 3, 5, 1), (2, 3, 1, 1), (1, 1, 1, 1), (0, 3, 5, 7),
])  # fmt: skip
def test_memory_format_is_the_one_pytorch_suggests(shape):
    for permutation in itertools.permutations(range(4)):
        inverse = [permutation.index(axis) for axis in range(4)]
        x = torch.randn([shape[axis] for axis in permutation]).permute(inverse)
        assert x.shape == shape
        expected = torch.empty(shape, memory_format=memory_format_of(x))
        assert F.avg_pool2d(x, 1).stride() == expected.stride()


@pytest.mark.parametrize("case", CASES)
def test_empty_batch(backend, case, device):
    f, up, down, padding = CASES[case]
    x = torch.empty(0, 3, 5, 7, requires_grad=True, device=device)
    y = upfirdn2d(x, on(device, f), up, down, padding, backend=backend)
    assert y.shape == (0, 3, *output_size((5, 7), _get_filter_size(f), up, down, padding))
    (dx,) = grad(y.sum(), x, create_graph=True)
    assert dx.shape == x.shape


def test_inputs_are_left_alone(backend, device):
    x, f = X.float().to(device), on(device, F23)
    before = x.clone(), f.clone()
    y = upfirdn2d(x, f, up=2, padding=3, gain=2, backend=backend)
    y.zero_()
    assert torch.equal(x, before[0]) and torch.equal(f, before[1])
    identity = upfirdn2d(x, None, backend=backend)
    assert identity.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("nhwc", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("f, up, down", [
    (FIR, 1, 1), (FIR, 2, 1), (FIR, 1, 2), (F12, 2, 1), (F12, 1, 2), (F5, 3, 2),
])  # fmt: skip
def test_threads_agree(f, up, down, nhwc):
    """Large enough to be shared, with sizes that no block divides."""
    if backends.unavailable("cpu") is not None:
        pytest.skip("the cpu backend is not built")
    x = image(3, 19, 61, 67, dtype=torch.float32)
    x = x.contiguous(memory_format=NHWC) if nhwc else x
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(upfirdn2d(x, f, up, down, padding=5, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert_matches(results[0], reference(x.double(), f, up, down, 5), reduction=terms(f))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# Sizes beyond 32 bits


@pytest.mark.parametrize("axis", range(4))
def test_samples_far_apart(backend, axis, device):
    """Elements of x lie 2^31 elements apart, along one axis, in memory nobody else touches."""
    if device.type != "cpu":
        pytest.skip("a GPU's memory is not lent page by page")
    torch.utils.deterministic.fill_uninitialized_memory = False
    shape = [2, 2, 2, 2]
    strides = [24, 12, 4, 1]
    strides[axis] = 2**31 + 16
    try:
        storage = torch.empty(2**31 + 128, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("the system lends no 4 GiB of address space")
    x = storage.as_strided(shape, strides)
    x.copy_(image(*shape))
    y = upfirdn2d(x, F23, up=2, padding=2, backend=backend)
    assert_matches(y, reference(x.double(), F23, 2, padding=2), reduction=6)


@pytest.mark.slow
@pytest.mark.parametrize("nhwc", [False, True], ids=["NCHW", "channels_last"])
def test_more_than_two_to_the_31_bytes(nhwc):
    """The output; the input is one sample, expanded. In a GPU's memory: more than 2^31 elements."""
    if backends.unavailable("cpu") is not None:
        pytest.skip("the cpu backend is not built")
    torch.utils.deterministic.fill_uninitialized_memory = False
    sample = image(1, 8, 256, 260).half()
    sample = sample.contiguous(memory_format=NHWC) if nhwc else sample
    x = sample.expand(2**31 // (2 * 8 * 512 * 520) + 2, -1, -1, -1)
    y = upfirdn2d(x, FIR, up=2, padding=[2, 1, 2, 1], backend="cpu")
    assert y.numel() * y.element_size() > 2**31
    expected = reference(sample.double(), FIR, 2, padding=[2, 1, 2, 1])
    for n in (0, len(x) // 2, len(x) - 1):
        assert_matches(y[n : n + 1], expected, reduction=4)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements_on_a_gpu(backend, device):
    if device.type != "cuda" or backend == "reference":
        pytest.skip("for the kernels on a GPU")
    for memory_format in (NCHW, NHWC):
        sample = image(1, 8, 512, 520).half().to(device).contiguous(memory_format=memory_format)
        x = sample.expand(2**31 // (8 * 1024 * 1040) + 2, -1, -1, -1)
        y = upfirdn2d(x, on(device, FIR), up=2, padding=[2, 1, 2, 1], backend=backend)
        assert y.numel() > 2**31
        expected = reference(sample.double(), on(device, FIR), 2, padding=[2, 1, 2, 1])
        for n in (0, len(x) // 2, len(x) - 1):
            assert_matches(y[n : n + 1], expected, reduction=4)
        del y


# torch.compile, torch.export, torch.func, autocast


def test_opcheck(backend, device):
    if backend == "reference":
        pytest.skip("the reference is no registered op")
    tests = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    check = partial(torch.library.opcheck, test_utils=tests)
    f = on(device, F23)
    resampling = ([2, 1], [1, 3], [1, 2, -1, 3], True)
    for memory_format in (NHWC,) if interpreted(backend, device) else (NCHW, NHWC):
        x = image(2, 8, 5, 7, dtype=torch.float32).to(device)
        x = x.contiguous(memory_format=memory_format)
        check(fir_ops.linear_op, (x, f, *resampling, 1.5, backend))
        y = fir_ops.linear_op(x, f, *resampling, 1.5, backend)
        operands = (
            torch.rand(2, 8, device=device),
            torch.randn(2, 1, *y.shape[2:], device=device),
            torch.ones((), device=device),
            torch.randn(8, device=device),
            torch.randn_like(y),
        )
        end = (3, 0.2, 1.4, 1.0)
        for save_mask in (False, True):
            arguments = (x, f, *resampling, 1.5, *operands, *end, save_mask, backend)
            check(fir_ops.epilogue_op, arguments)
        y, mask = fir_ops.epilogue_op(*arguments)
        adjoint = fir_ops.Fir.of(*resampling, 1.5).adjoint(5, 7, (3, 2))
        masked = (mask, operands[0], list(y.stride()), 0.2, 1.4, True, backend)
        check(fir_ops.masked_op, (y, f, *adjoint.arguments(), *masked))


COMPILED = {
    "upfirdn2d": lambda x: upfirdn2d(x, F23.to(x.device), [2, 1], [1, 2], [1, -1, 2, 0], gain=2.5),
    "upsample2d": lambda x: upsample2d(x, FIR.to(x.device)),
    "downsample2d": lambda x: downsample2d(x, F5.to(x.device), padding=1),
    "filter2d": lambda x: filter2d(x, None),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_to_one_graph_of_any_batch_size(backend, name, device):
    run = COMPILED[name]
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with use_backend(backend):
        for size in (2, 4):
            x = X.repeat(size, 1, 1, 1).float().to(device).detach().requires_grad_()
            torch._dynamo.mark_dynamic(x, 0)
            y, expected = compiled(x), run(x)
            torch.testing.assert_close(y, expected)
            assert y.stride() == expected.stride()
            dx, dx_expected = (grad(t.square().sum(), x)[0] for t in (y, expected))
            torch.testing.assert_close(dx, dx_expected)


def test_compiles_for_any_image_size(backend, device):
    torch._dynamo.reset()
    f = on(device, FIR)
    compiled = torch.compile(upsample2d, fullgraph=True, backend="aot_eager", dynamic=True)
    # Dynamo takes its time with the reference's many operators.
    formats = (NCHW,) if backend == "reference" else (NCHW, NHWC)
    for height, width in ((5, 7), (9, 4)):
        for memory_format in formats:
            x = image(2, 3, height, width, dtype=torch.float32).to(device)
            x = x.contiguous(memory_format=memory_format)
            y = compiled(x, f, backend=backend)
            expected = upsample2d(x, f, backend=backend)
            torch.testing.assert_close(y, expected)
            assert y.stride() == expected.stride()


def test_export(backend, device):
    class Blur(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("taps", FIR.to(device))

        def forward(self, x):
            return upfirdn2d(x, self.taps, [2, 1], 1, [2, 1, 1, 2], backend=backend)

    x = X.float().to(device)
    exported = torch.export.export(Blur(), (x,))
    assert torch.equal(exported.module()(x), Blur()(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(backend, dtype, device):
    if not takes(backend, dtype, device):
        pytest.skip(f"{backend} has no {dtype} kernels")
    x, f = X.to(device, dtype), on(device, F5)

    def run():
        return upfirdn2d(x, f, 2, padding=3, backend=backend), filter2d(x, None, backend=backend)

    expected = run()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = run()
    for y, y_expected in zip(actual, expected):
        assert y.dtype == dtype
        assert torch.equal(y, y_expected)


def test_meta_tensors_have_the_same_shape_and_strides():
    for layout in LAYOUTS.values():
        x = layout(X)
        y = upfirdn2d(x.to("meta"), F23.to("meta"), [2, 3], [3, 1], [1, 2, -1, 0])
        expected = upfirdn2d(x, F23, [2, 3], [3, 1], [1, 2, -1, 0])
        assert y.shape == expected.shape
        assert y.device.type == "meta"


def test_inference_mode(backend, device):
    x, f = X.float().to(device).detach().requires_grad_(), on(device, F23)
    expected = upfirdn2d(x, f, padding=1, backend=backend)
    with torch.inference_mode():
        y = upfirdn2d(x, f, padding=1, backend=backend)
        again = upfirdn2d(y, f.clone(), padding=1, backend=backend)
    assert torch.equal(y, expected)
    assert y.is_inference() and not y.requires_grad
    assert torch.equal(again, upfirdn2d(expected, f, padding=1, backend=backend))
    with torch.no_grad():
        assert not upfirdn2d(x, f, padding=1, backend=backend).requires_grad


@pytest.mark.parametrize("in_dim", [0, 1, 4, -2])
def test_vmap(backend, in_dim, device):
    f = on(device, F23)
    samples = image(3, 2, 3, 4, 5, dtype=torch.float32).to(device)

    def run(x):
        return upfirdn2d(x, f, [2, 1], 1, [1, 2, 0, 1], backend=backend)

    expected = torch.stack([run(x) for x in samples])
    y = torch.func.vmap(run, in_dims=in_dim)(samples.movedim(0, in_dim))
    torch.testing.assert_close(y, expected)
    if backend == "reference":
        return
    with pytest.raises(NotImplementedError, match="vmap over the filter f"):
        torch.func.vmap(lambda f: upfirdn2d(samples[0], f, backend=backend))(f.expand(3, 2, 3))


def test_transforms(backend, device):
    """grad, jvp, vmap of grad, jacrev, jacfwd and hessian, against the matrix."""
    f = on(device, F23)
    a = Matrix((2, 3), F23, (2, 1), (1, 1), (1, 2, 1, 1), False, 1)
    x = image(1, 1, 2, 3).to(device, widest(backend, device))
    v = image(1, 1, 2, 3, seed=1).to(x)

    def run(x):
        return upfirdn2d(x, f, [2, 1], 1, [1, 2, 1, 1], backend=backend)

    def matches(actual, expected):
        assert_matches(actual.cpu().reshape(expected.shape), expected, reduction=36)

    y, y_tangent = torch.func.jvp(run, (x,), (v,))
    matches(y, a(x))
    matches(y_tangent, a(v))
    matches(torch.func.grad(lambda x: run(x).sum())(x), a.transposed(torch.ones_like(a(x))))
    matches(torch.func.jacrev(run)(x), a.rows.T)
    matches(torch.func.jacfwd(run)(x), a.rows.T)
    many = torch.stack([x, v])
    gradients = torch.func.vmap(torch.func.grad(lambda x: run(x).square().sum()))(many)
    matches(gradients, torch.stack([a.transposed(2 * a(t)) for t in (x, v)]))
    hessian = torch.func.hessian(lambda x: run(x).pow(3).sum())(x)
    matches(hessian, a.rows @ (6 * a(x).flatten()[:, None] * a.rows.T))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        matches(torch.autograd.forward_ad.unpack_dual(run(dual)).tangent, a(v))


@pytest.mark.gpu
def test_cuda_graph(backend, device):
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    x, f = X.float().to(device), on(device, FIR)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            upsample2d(x, f, backend=backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = upsample2d(x, f, backend=backend)
    x.copy_(2 * x)
    graph.replay()
    torch.testing.assert_close(y, upsample2d(x, f, backend=backend))


# Wrappers


@pytest.mark.parametrize("f", [None, F5, F23, FIR, image(3, 8, dtype=torch.float32)])
@pytest.mark.parametrize("factor", [1, 2, 3, [2, 1], (1, 4)])
def test_wrappers_keep_the_image_size(f, factor):
    factor_x, factor_y = _parse_scaling(factor)
    x = image(2, 3, 12, 24)
    assert filter2d(x, f).shape == x.shape
    assert upsample2d(x, f, factor).shape == (2, 3, 12 * factor_y, 24 * factor_x)
    assert downsample2d(x, f, factor).shape == (2, 3, 12 // factor_y, 24 // factor_x)
    larger = upsample2d(x, f, factor, padding=[1, 2, 3, 4])
    assert larger.shape == (2, 3, 12 * factor_y + 7, 24 * factor_x + 3)


def test_wrapper_paddings(backend, device):
    if interpreted(backend, device):
        pytest.skip("what the wrappers pass on is the same for all backends")
    x = X.float().to(device)
    fir, f23, taps = (on(device, f) for f in (FIR, F23, F12))
    even = image(1, 2, 9, 8, dtype=torch.float32).to(device)
    with use_backend(backend):
        for actual, expected in (
            (upsample2d(x, fir, gain=3), upfirdn2d(x, fir, 2, 1, [2, 1, 2, 1], gain=12)),
            (
                downsample2d(x, fir, padding=[0, 1, 2, 3]),
                upfirdn2d(x, fir, down=2, padding=[1, 2, 3, 4]),
            ),
            (
                filter2d(x, f23, padding=2, flip_filter=True),
                upfirdn2d(x, f23, padding=[3, 3, 3, 2], flip_filter=True),
            ),
            (upsample2d(x, taps), upfirdn2d(x, taps, up=2, padding=[6, 5, 6, 5], gain=4)),
            (downsample2d(even, taps), upfirdn2d(even, taps, down=2, padding=5)),
            (
                downsample2d(upsample2d(x, taps), taps, padding=-4, flip_filter=True),
                upfirdn2d(upsample2d(x, taps), taps, down=2, padding=1, flip_filter=True),
            ),
        ):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("wrapper", [filter2d, upsample2d, downsample2d])
def test_wrappers_are_differentiable(backend, wrapper, device):
    x = X.to(device, widest(backend, device)).detach().requires_grad_()
    wide = X.to(x.dtype).double().detach().requires_grad_()
    y, expected = (
        wrapper(t, f, flip_filter=True, gain=0.7, backend=name)
        for t, f, name in ((x, on(device, F23), backend), (wide, F23, "reference"))
    )
    assert_matches(y.cpu(), expected, reduction=6)
    for _ in range(2):
        (g,) = grad(y.pow(3).sum(), x, create_graph=True)
        (g_expected,) = grad(expected.pow(3).sum(), wide, create_graph=True)
        y, expected = g, g_expected
        assert_matches(g.cpu(), g_expected, reduction=100)


def test_upsampling_keeps_the_magnitude(backend, device):
    y = upsample2d(torch.full((1, 1, 8, 8), 3.0, device=device), on(device, FIR), backend=backend)
    torch.testing.assert_close(y[..., 2:-2, 2:-2].cpu(), torch.full((1, 1, 12, 12), 3.0))


# Arguments


def test_argument_forms(backend, device):
    assert _parse_scaling(3) == (3, 3)
    assert _parse_scaling((2, np.int64(4))) == (2, 4)
    assert _parse_padding(np.int32(-2)) == (-2, -2, -2, -2)
    assert _parse_padding([1, 2]) == (1, 1, 2, 2)
    assert _parse_padding((1, 2, 3, 4)) == (1, 2, 3, 4)
    assert _get_filter_size(None) == (1, 1)
    assert _get_filter_size(F23) == (3, 2)
    assert _get_filter_size(F5) == (5, 5)
    x, f = X.float().to(device), on(device, F23)
    expected = upfirdn2d(x, f, [2, 3], [1, 2], [1, 1, 2, 2], True, 2.0, backend=backend)
    many = (
        (np.int64(2), 3),
        (1, np.uint8(2)),
        (np.int16(1), np.int32(2)),
        np.bool_(1),
        np.float32(2),
    )
    assert torch.equal(upfirdn2d(x, f, *many, backend=backend), expected)


def test_exported_function_and_backends(backend, device):
    assert exported is upfirdn2d
    x, f = X.float().to(device), on(device, F23)
    expected = upfirdn2d(x, f, padding=1, backend=backend)
    with use_backend(backend):
        assert torch.equal(upfirdn2d(x, f, padding=1), expected)
    with pytest.raises(ValueError, match="backend='fast' is unknown"):
        upfirdn2d(x, f, padding=1, backend="fast")


def test_use_backend_reaches_the_kernels(backend, device, monkeypatch):
    """One launch forward and one for each derivative."""
    if backend == "reference":
        pytest.skip("it has no kernels")
    module, launches = backends.BACKENDS[backend], []
    launch = module.upfirdn2d_forward
    monkeypatch.setattr(
        module, "upfirdn2d_forward", lambda *args: (launches.append(args[0].shape), launch(*args))
    )
    x = X.float().to(device).detach().requires_grad_()
    y = upsample2d(x, on(device, FIR), backend=backend)
    assert launches == [x.shape]
    (dx,) = grad(y.square().sum(), x, create_graph=True)
    assert launches == [x.shape, y.shape]
    grad(dx.sum(), x)
    assert launches == [x.shape, y.shape, x.shape, y.shape]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it can run")
def test_a_backend_that_cannot_run_says_so():
    with pytest.raises(RuntimeError, match="'cuda' cannot run upfirdn2d"):
        upfirdn2d(X, F23, padding=1, backend="cuda")


@pytest.mark.parametrize("arguments, error, message", [
    (dict(x=np.zeros((1, 1, 4, 4))), TypeError, "x must be a torch.Tensor, got ndarray"),
    (dict(x=X.long()), TypeError, r"x.dtype=torch.int64 is not supported"),
    (dict(x=X.to(torch.complex64)), TypeError, r"x.dtype=torch.complex64"),
    (dict(x=X[0]), ValueError, r"x must have 4 dimensions, got x.shape=\(3, 5, 7\)"),
    (dict(x=X[:, :0]), ValueError, r"x must have channels and pixels, got x.shape=\(2, 0, 5, 7\)"),
    (dict(x=X[..., :0]), ValueError, r"only the batch may be empty"),
    (dict(f=[1, 3, 3, 1]), TypeError, r"f must be a torch.Tensor or None, got \[1, 3, 3, 1\]; use"),
    (dict(f=F23.long()), TypeError, "f.dtype=torch.int64"),
    (dict(f=F23[None]), ValueError, r"f must have 1 or 2 dimensions, got f.shape=\(1, 2, 3\)"),
    (dict(f=torch.ones(())), ValueError, r"f must have 1 or 2 dimensions"),
    (dict(f=torch.ones(0)), ValueError, r"f must have a tap, got f.shape=\(0,\)"),
    (dict(f=torch.ones(3, 0)), ValueError, r"f must have a tap, got f.shape=\(3, 0\)"),
    (dict(f=torch.tensor([1, math.nan])), ValueError,
        r"f must be finite in float32, got f=\[1.0, nan\]"),
    (dict(f=torch.tensor([[1, -math.inf]])), ValueError,
        r"f must be finite in float32, got f=\[\[1.0, -inf"),
    (dict(f=torch.ones(6, 2)), ValueError, r"0 x 6 pixels with image=\(5, 7\), filter=\(6, 2\)"),
    (dict(f=torch.ones(2, 10), padding=[1, 0]), ValueError, r"padding=\(1, 1, 0, 0\); the padded"),
    (dict(f=torch.ones(10), up=2, padding=-1), ValueError, r"padding=\(-1, -1, -1, -1"),
    (dict(f=F23.to("meta")), ValueError, r"f.device=meta but x.device=cpu; use f.to\(x.device\)"),
    (dict(f=F23.clone().requires_grad_()), NotImplementedError, r"pass f.detach\(\)"),
    (dict(up=0), ValueError, "up must be at least 1, got 0"),
    (dict(up=2**63), ValueError, "up must not exceed 1048576, got 9223372036854775808"),
    (dict(down=2**30), ValueError, "down must not exceed 1048576, got 1073741824"),
    (dict(padding=-(2**70)), ValueError, "padding must not exceed 1099511627776, got -11805"),
    (dict(up=[2, -1]), ValueError, "up must be at least 1, got -1"),
    (dict(up=1.0), TypeError, "up takes integers, got 1.0"),
    (dict(up=True), TypeError, "up takes integers, got True"),
    (dict(up=np.float32(2)), TypeError, r"up takes integers, got (np.float32\()?2.0"),
    (dict(up=np.array([2, 2])), TypeError, r"up takes integers, got array\(\[2, 2\]\)"),
    (dict(up=torch.tensor(2)), TypeError, r"up takes integers, got tensor\(2\)"),
    (dict(up=[1, 2, 1]), ValueError, r"up must be a factor or \[x, y\], got up=\[1, 2, 1\]"),
    (dict(up=[2]), ValueError, r"got up=\[2\]"),
    (dict(up=None), TypeError, "up takes integers, got None"),
    (dict(down=0), ValueError, "down must be at least 1, got 0"),
    (dict(down=[2, -3]), ValueError, "down must be at least 1, got -3"),
    (dict(down="2"), TypeError, "down takes integers, got '2'"),
    (dict(padding=0.5), TypeError, "padding takes integers, got 0.5"),
    (dict(padding=[1, False]), TypeError, "padding takes integers, got False"),
    (dict(padding=[1, 2, 3]), ValueError, r"got padding=\[1, 2, 3\]"),
    (dict(padding=[]), ValueError, r"got padding=\[\]"),
    (dict(padding=np.array([1, 1])), TypeError, "padding takes integers, got array"),
    (dict(padding=-3), ValueError, r"output would have -2 x 1 pixels .* increase padding"),
    (dict(gain="2"), TypeError, "gain must be a number, got gain='2'"),
    (dict(gain=None), TypeError, "gain must be a number, got gain=None"),
    (dict(gain=torch.ones(())), TypeError, "gain must be a number"),
    (dict(gain=math.nan), ValueError, "gain must be finite, got gain=nan"),
    (dict(gain=-math.inf), ValueError, "gain must be finite, got gain=-inf"),
])  # fmt: skip
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        upfirdn2d(**{"x": X, "f": F23[:, :1].repeat(1, 1), **arguments})


@pytest.mark.parametrize("op", [upfirdn2d, filter2d, upsample2d, downsample2d])
def test_every_op_and_backend_checks_its_arguments(backend, op, device):
    x, f = X.float().to(device), on(device, FIR)
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor"):
        op([[1.0]], f, backend=backend)
    with pytest.raises(TypeError, match=r"f must be a torch\.Tensor or None"):
        op(x, [1, 3, 3, 1], backend=backend)
    with pytest.raises(ValueError, match="f must be finite"):
        op(x, f * math.nan, backend=backend)
    with pytest.raises(NotImplementedError, match=r"pass f\.detach\(\)"):
        op(x, f.clone().requires_grad_(), backend=backend)
    with pytest.raises(ValueError, match=r"f\.device=meta"):
        op(x, f.to("meta"), backend=backend)
    with pytest.raises(TypeError, match="gain must be a number"):
        op(x, f, gain="1", backend=backend)
    with pytest.raises(TypeError, match=r"padding takes integers, got 1\.5"):
        op(x, f, padding=1.5, backend=backend)
    with pytest.raises(ValueError, match=r"padding=\[1, 2, 3\]"):
        op(x, f, padding=[1, 2, 3], backend=backend)
    with pytest.raises(ValueError, match="increase padding"):
        op(x, f, padding=-9, backend=backend)
    with pytest.raises(ValueError, match="backend='fast' is unknown"):
        op(x, f, backend="fast")


def test_a_filter_changed_in_place_is_checked_again():
    f = FIR.clone()
    upfirdn2d(X, f, padding=1)
    f[0, 0] = math.nan
    with pytest.raises(ValueError, match="f must be finite"):
        upfirdn2d(X, f, padding=1)


# Any arguments

FACTORS = st.integers(1, 3)
good_or_bad_factor = st.one_of(
    FACTORS,
    st.lists(FACTORS, min_size=2, max_size=2),
    st.tuples(FACTORS, FACTORS),
    FACTORS.map(np.int64),
    st.sampled_from([0, -1, 1.5, True, None, "2", [1], [1, 2, 3], [2, 0], (1.0, 2)]),
)
PADS = st.integers(-5, 6)
good_or_bad_padding = st.one_of(
    PADS,
    PADS.map(np.int32),
    st.lists(PADS, min_size=2, max_size=2),
    st.tuples(PADS, PADS, PADS, PADS),
    st.sampled_from([0.0, False, None, [], [1], [1, 2, 3], [1, 2, 3, 4, 5], [0, 1.0], "1"]),
)
good_or_bad_filter = st.one_of(
    st.none(),
    st.integers(1, 13).map(lambda taps: image(taps, dtype=torch.float32, seed=taps)),
    st.tuples(st.integers(1, 6), st.integers(1, 6)).map(
        lambda shape: image(*shape, dtype=torch.float32, seed=9)
    ),
    st.sampled_from([torch.ones(0), torch.ones(1, 1, 1), torch.tensor([math.inf]), [1, 3, 3, 1]]),
)


def expanded(value, lengths):
    """What the documentation says the argument means; None if it says that it is an error."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * lengths[0]
    if len(values) not in lengths:
        return None
    if any(type(v) not in (int, np.int64, np.int32) for v in values):
        return None
    if len(values) < max(lengths):
        values = [values[0], values[0], values[1], values[1]]
    return tuple(int(v) for v in values)


def meaning(shape, f, up, down, padding):
    """up, down and padding in full; None where the documentation says that the call is an error."""
    if isinstance(f, list) or (f is not None and not (0 < f.ndim < 3 and f.numel())):
        return None
    full = expanded(up, [2]), expanded(down, [2]), expanded(padding, [2, 4])
    if None in full or min(full[0] + full[1]) < 1 or (f is not None and not f.isfinite().all()):
        return None
    up_xy, _, (x0, x1, y0, y1) = full
    fw, fh = _get_filter_size(f)
    fits = shape[2] * up_xy[1] + y0 + y1 >= fh and shape[3] * up_xy[0] + x0 + x1 >= fw
    return full if fits else None


def test_any_arguments(backend, device):
    """The reference's result, or the documented exception: from every backend."""
    dtypes = [dtype for dtype in backends.reference.dtypes() if takes(backend, dtype, device)]
    # On a GPU, Triton compiles a kernel for nearly each of them.
    draws = {"triton": 40, "reference": 400}.get(backend, 2000)

    @settings(max_examples=draws, deadline=None, derandomize=True, database=None)
    @given(
        shape=st.tuples(
            st.integers(0, 2), st.integers(1, 9), st.integers(1, 6), st.integers(1, 17)
        ),
        f=good_or_bad_filter,
        up=good_or_bad_factor,
        down=good_or_bad_factor,
        padding=good_or_bad_padding,
        flip_filter=st.booleans(),
        gain=st.floats(-4, 4, allow_subnormal=False),
        layout=st.sampled_from(sorted(LAYOUTS)),
        dtype=st.sampled_from(dtypes),
    )
    def agrees_or_raises(shape, f, up, down, padding, flip_filter, gain, layout, dtype):
        x = LAYOUTS[layout](image(*shape).to(device, dtype)).detach().requires_grad_()
        full = meaning(shape, f, up, down, padding)
        f = f.to(device) if isinstance(f, torch.Tensor) else f
        arguments = (up, down, padding, flip_filter, gain)
        if full is None:
            with pytest.raises((TypeError, ValueError), match=r"\bf\b|up|down|padding"):
                upfirdn2d(x, f, *arguments, backend=backend)
            return
        y = upfirdn2d(x, f, *arguments, backend=backend)
        wide = x.detach().double().detach().requires_grad_()
        expected = reference(wide, f, *full, flip_filter, gain)
        assert_matches(y, expected, reduction=terms(f))
        assert y.dtype == dtype and laid_out_as(y, x)
        if not interpreted(backend, device):
            dy = torch.cos(torch.arange(y.numel(), dtype=torch.float64, device=device))
            dy = dy.to(dtype).view(y.shape)
            (dx,), (dx_expected,) = grad(y, x, dy), grad(expected, wide, dy.double())
            assert_matches(dx, dx_expected, reduction=terms(f))

    agrees_or_raises()


# setup_filter


def test_setup_filter_forms():
    assert torch.equal(setup_filter(None), torch.ones(1, 1))
    assert torch.equal(setup_filter(3, normalize=False), torch.full((1, 1), 9.0))
    assert setup_filter([1, 3, 3, 1]).shape == (4, 4)
    assert setup_filter(range(1, 8)).shape == (7, 7)
    assert setup_filter(range(1, 9)).shape == (8,)
    assert setup_filter(np.arange(1, 9), separable=False).shape == (8, 8)
    assert setup_filter((1, 2, 1), separable=True).shape == (3,)
    assert setup_filter(5, separable=True).tolist() == [1]
    outer = torch.tensor([[1.0, 2, 1]]) * torch.tensor([[1.0], [2], [1]])
    assert torch.equal(setup_filter([1, 2, 1]), outer / 16)


def test_setup_filter_gain_and_flip():
    two_d, one_d = torch.tensor([[1.0, 2], [3, 4]]), torch.arange(1.0, 10)
    assert torch.equal(setup_filter(two_d, flip_filter=True, gain=-3), two_d.flip([0, 1]) / 10 * -3)
    torch.testing.assert_close(setup_filter(one_d, gain=4), one_d / 45 * 2)
    x = image(1, 1, 9, 9).float()
    torch.testing.assert_close(
        filter2d(x, setup_filter(one_d, gain=4)), filter2d(x, setup_filter(one_d), gain=4)
    )


@pytest.mark.parametrize("f", [
    torch.arange(1.0, 10), torch.ones(2, 3), np.arange(1, 10, dtype=np.float32)[::-1],
    np.ones((3, 2), np.float32), torch.arange(1, 10), np.arange(1, 10), torch.ones(2, 2).half(),
], ids=lambda f: f"{type(f).__name__} {f.dtype} {tuple(f.shape)}")  # fmt: skip
@pytest.mark.parametrize("normalize", [False, True])
def test_setup_filter_never_touches_the_callers_data(f, normalize):
    before = f.clone() if isinstance(f, torch.Tensor) else f.copy()
    taps = setup_filter(f, normalize=normalize, flip_filter=True, gain=2)
    taps.zero_()
    assert (f == before).all()
    assert taps.dtype == torch.float32


def test_setup_filter_result_is_a_constant():
    assert not setup_filter(torch.ones(2, 2, requires_grad=True)).requires_grad


@pytest.mark.parametrize("f, arguments, error, message", [
    ([], {}, ValueError, r"f must be \[taps\] or \[fh, fw\], got the shape \(0,\)"),
    (torch.ones(2, 0), {}, ValueError, r"got the shape \(2, 0\)"),
    (torch.ones(2, 2, 2), {}, ValueError, r"got the shape \(2, 2, 2\)"),
    ([1, math.nan], {}, ValueError, r"f must be finite, got \[1, nan\]"),
    ([1, math.inf], {}, ValueError, "f must be finite"),
    ([1, -1], {}, ValueError, "f sums to zero and cannot be normalized"),
    ([0.1, 0.2, -0.3], {}, ValueError, "f sums to zero"),
    (0, {}, ValueError, "f sums to zero"),
    ([[1, 2], [3, 4]], dict(separable=True), ValueError, r"2-D; separable=True needs a 1-D f"),
    (list(range(1, 9)), dict(gain=-1), ValueError, "gain=-1 of a separable filter"),
    ([1, 1], dict(gain=math.inf), ValueError, "gain must be finite"),
    ([1, 1], dict(gain="4"), TypeError, "gain must be a number, got gain='4'"),
    ("1331", {}, TypeError, "f must hold real numbers, got '1331'"),
    ([[1, 2], [3]], {}, TypeError, "f must hold real numbers"),
    ([1, None], {}, TypeError, "f must hold real numbers"),
    ([1j], {}, TypeError, "f must hold real numbers"),
])  # fmt: skip
def test_setup_filter_errors(f, arguments, error, message):
    with pytest.raises(error, match=message):
        setup_filter(f, **arguments)


def test_setup_filter_of_zero_sum_without_normalization():
    assert setup_filter([1, -1], normalize=False).tolist() == [[1, -1], [-1, 1]]


@pytest.mark.parametrize("f", [
    torch.nn.Parameter(torch.tensor([[math.nan]]), requires_grad=False),
    torch.full((2, 2), 1e300, dtype=torch.float64),
], ids=["parameter", "too large for float32"])  # fmt: skip
def test_filters_that_are_not_finite(f):
    with pytest.raises(ValueError, match="f must be finite in float32"):
        upfirdn2d(image(1, 2, 5, 7, dtype=torch.float32), f)
