"""upfirdn2d and its wrappers against their definition, scipy and themselves."""

import itertools
import math

import numpy as np
import pytest
import scipy.signal
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

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
from stylegan_fast.testing import assert_matches


def definition(x, f, up, down, padding, flip_filter, gain):
    """The formula, output pixel by output pixel, in float64."""
    (ux, uy), (dx, dy), (x0, x1, y0, y1) = up, down, padding
    x = x.double().numpy()
    g = np.ones((1, 1)) if f is None else f.double().numpy()
    g = np.outer(g, g) if g.ndim == 1 else g
    g = g if flip_filter else g[::-1, ::-1]
    n, c, h, w = x.shape
    fh, fw = g.shape
    edge = 1000  # Z is zero outside, too
    z = np.zeros((n, c, h * uy + 2 * edge, w * ux + 2 * edge))
    z[:, :, edge : edge + h * uy : uy, edge : edge + w * ux : ux] = x
    out_h = math.floor((h * uy + y0 + y1 - fh) / dy) + 1
    out_w = math.floor((w * ux + x0 + x1 - fw) / dx) + 1
    y = np.zeros((n, c, out_h, out_w))
    for oy, ox in itertools.product(range(out_h), range(out_w)):
        top, left = oy * dy - y0 + edge, ox * dx - x0 + edge
        y[:, :, oy, ox] = (g * z[:, :, top : top + fh, left : left + fw]).sum((2, 3))
    return torch.from_numpy(gain * y)


def image(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def on(device, f):
    return None if f is None else f.to(device)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


X = image(2, 3, 5, 7)
F23 = image(2, 3, dtype=torch.float32, seed=1)
F5 = image(5, dtype=torch.float32, seed=2)
FIR = setup_filter([1, 3, 3, 1])

CASES = [
    (F23, (1, 1), (1, 1), (0, 0, 0, 0)),
    (F23, (1, 1), (1, 1), (2, 2, 1, 1)),
    (F23, (1, 1), (1, 1), (3, -1, -2, 4)),
    (F23, (2, 3), (1, 1), (1, 2, 0, 3)),
    (F23, (3, 1), (1, 2), (4, 0, 1, 2)),
    (F23, (1, 1), (3, 2), (0, 1, 2, 0)),
    (F23, (2, 3), (3, 2), (-1, 2, 3, -2)),
    (F23, (2, 2), (1, 1), (-20, 25, 30, -25)),
    (F5, (1, 1), (1, 1), (2, 2, 2, 2)),
    (F5, (2, 1), (1, 3), (3, 1, 0, 5)),
    (F5, (1, 4), (2, 1), (-2, 4, 1, -3)),
    (None, (1, 1), (1, 1), (-1, 2, 3, -2)),
    (None, (2, 3), (3, 1), (1, 0, -4, 2)),
    (None, (1, 1), (1, 1), (-9, 12, 0, 0)),
]


@pytest.mark.parametrize("flip_filter", [False, True])
@pytest.mark.parametrize("f, up, down, padding", CASES)
def test_equals_the_definition(f, up, down, padding, flip_filter, device):
    x, taps = X.to(device), on(device, f)
    y = upfirdn2d(x, taps, up, down, padding, flip_filter, gain=-1.7)
    assert_matches(y.cpu(), definition(X, f, up, down, padding, flip_filter, -1.7))
    assert y.shape[2:] == output_size((5, 7), _get_filter_size(f), up, down, padding)


@pytest.mark.parametrize("up, down, taps", [(1, 1, 6), (2, 1, 12), (3, 2, 7), (1, 4, 5), (5, 3, 2)])
def test_separable_equals_scipy(up, down, taps):
    f = image(taps, seed=3)
    y = upfirdn2d(X, f, up, down, padding=[taps - 1, taps - up] * 2)
    expected = X.numpy()
    for axis in (2, 3):
        expected = scipy.signal.upfirdn(f.numpy(), expected, up, down, axis=axis)
    torch.testing.assert_close(y, torch.from_numpy(expected), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("f, up, down, padding", CASES)
def test_gradients(f, up, down, padding, device):
    f, x = on(device, f), image(1, 2, 2, 3).to(device).requires_grad_()
    if min(output_size((2, 3), _get_filter_size(f), up, down, padding)) < 1:
        padding = [p + 3 for p in padding]

    def run(x):
        return upfirdn2d(x, f, up, down, padding, gain=0.6)

    (dx,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
    assert dx.requires_grad  # else gradgradcheck would have nothing to check
    assert gradcheck(run, x)
    assert gradgradcheck(run, x)


@pytest.mark.parametrize("flip_filter", [False, True])
@pytest.mark.parametrize("f, up, down, padding", [case for case in CASES if case[0] is not None])
def test_the_adjoint_is_an_upfirdn2d(f, up, down, padding, flip_filter):
    x = X.clone().requires_grad_()
    y = upfirdn2d(x, f, up, down, padding, flip_filter, gain=1.5)
    dy = image(*y.shape, seed=4)
    (dx,) = torch.autograd.grad(y, x, dy)
    (fw, fh), (h, w), (out_h, out_w) = _get_filter_size(f), X.shape[2:], y.shape[2:]
    transposed = [
        fw - padding[0] - 1,
        w * up[0] - out_w * down[0] + padding[0] - up[0] + 1,
        fh - padding[2] - 1,
        h * up[1] - out_h * down[1] + padding[2] - up[1] + 1,
    ]
    expected = upfirdn2d(dy, f, down, up, transposed, not flip_filter, gain=1.5)
    torch.testing.assert_close(dx, expected, rtol=1e-12, atol=1e-12)


def test_the_third_derivative_of_a_cube_passes_through():
    x = image(1, 2, 3, 4).requires_grad_()
    y = upfirdn2d(x, F23, up=2, padding=2)
    (first,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), x)
    column_sums = upfirdn2d(torch.ones_like(x), F23, up=2, padding=2)
    y = upfirdn2d(x, F23, up=2, padding=2)
    (expected,) = torch.autograd.grad((6 * column_sums**2 * y).sum(), x)
    torch.testing.assert_close(third, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("f", [F23, F5, None], ids=["2-D", "1-D", "None"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_round_once(dtype, f, device):
    f, x = on(device, f), X.to(device, dtype)
    y = upfirdn2d(x, f, up=2, down=[1, 3], padding=4, gain=1.3)
    expected = upfirdn2d(x.float(), f, up=2, down=[1, 3], padding=4, gain=1.3).to(dtype)
    assert y.dtype == dtype
    assert torch.equal(y, expected)


def test_float32_is_exact_to_its_taps(device):
    x, f = X.float().to(device), on(device, F23)
    y = upfirdn2d(x, f, up=2, padding=2)
    expected = upfirdn2d(x.double(), f, up=2, padding=2)
    bound = upfirdn2d(x.double().abs(), f.abs(), up=2, padding=2)
    assert ((y - expected).abs() <= 7 * torch.finfo(torch.float32).eps * bound).all()  # 6 products


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_filters_of_any_dtype(dtype):
    f = FIR.to(dtype)  # exact in each
    y = upfirdn2d(X.float(), f, up=2, padding=2)
    assert y.dtype == torch.float32
    assert torch.equal(y, upfirdn2d(X.float(), FIR, up=2, padding=2))


def test_float64_keeps_a_float64_filter():
    f = image(2, 3, seed=5)
    expected = definition(X, f, (1, 1), (1, 1), (1, 1, 1, 1), False, 1)
    torch.testing.assert_close(upfirdn2d(X, f, padding=1), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("f", [F23, F5, None], ids=["2-D", "1-D", "None"])
def test_gain_is_a_factor_whatever_its_sign(f):
    y = upfirdn2d(X, f, padding=4)
    torch.testing.assert_close(upfirdn2d(X, f, padding=4, gain=-9), -9 * y)
    assert not upfirdn2d(X, f, padding=4, gain=0).any()


LAYOUTS = {
    "NCHW": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "cropped channels_last": lambda x: F.pad(x, [1, 2, 1, 1]).contiguous(
        memory_format=torch.channels_last
    )[:, :, 1:-1, 1:-2],
    "cropped NCHW": lambda x: F.pad(x, [1, 2, 1, 1])[:, :, 1:-1, 1:-2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("f, up, down, padding", CASES)
def test_layouts(layout, f, up, down, padding, device):
    f, x = on(device, f), LAYOUTS[layout](X.to(device))
    assert torch.equal(x.cpu(), X)
    y = upfirdn2d(x, f, up, down, padding)
    assert_matches(y, upfirdn2d(X.to(device), f, up, down, padding))
    nhwc = "channels_last" in layout
    assert y.is_contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)


def test_stride_zero():
    x = X[:1, :1].expand(2, 3, 5, 7)
    torch.testing.assert_close(
        upfirdn2d(x, F23, 2, padding=2), upfirdn2d(x.clone(), F23, 2, padding=2)
    )


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


@pytest.mark.parametrize("f, up, down, padding", CASES)
def test_empty_batch(f, up, down, padding, device):
    x = torch.empty(0, 3, 5, 7, requires_grad=True, device=device)
    y = upfirdn2d(x, on(device, f), up, down, padding)
    assert y.shape == (0, *upfirdn2d(X, f, up, down, padding).shape[1:])
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.shape == x.shape


def test_nan_and_inf_stay_within_the_reach_of_the_filter():
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 4, 4] = math.nan
    y = upfirdn2d(x, FIR, padding=[1, 2, 1, 2])
    assert y.isnan().sum() == 16
    assert y[0, 0, 2:6, 2:6].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    x = X.to(dtype)
    expected = upfirdn2d(x, F5, 2, padding=3), filter2d(x, None, gain=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = upfirdn2d(x, F5, 2, padding=3), filter2d(x, None, gain=2)
    for y, y_expected in zip(actual, expected):
        assert y.dtype == dtype
        assert torch.equal(y, y_expected)


@pytest.mark.parametrize("run", [
    lambda x: upfirdn2d(x, F23, [2, 1], [1, 2], [1, -1, 2, 0], gain=2.5),
    lambda x: upsample2d(x, FIR),
    lambda x: downsample2d(x, F5, padding=1),
    lambda x: filter2d(x, None),
])  # fmt: skip
def test_compiles_to_one_graph_of_any_batch_size(run):
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for size in (2, 4):
        x = X.repeat(size, 1, 1, 1).float().requires_grad_()
        torch._dynamo.mark_dynamic(x, 0)
        y, expected = compiled(x), run(x)
        torch.testing.assert_close(y, expected)
        assert y.stride() == expected.stride()
        (dx,), (dx_expected,) = (torch.autograd.grad(t.square().sum(), x) for t in (y, expected))
        torch.testing.assert_close(dx, dx_expected)


def test_compiles_for_any_image_size():
    torch._dynamo.reset()
    compiled = torch.compile(upsample2d, fullgraph=True, backend="aot_eager", dynamic=True)
    for height, width in ((5, 7), (9, 4)):
        x = image(2, 3, height, width)
        torch.testing.assert_close(compiled(x, FIR), upsample2d(x, FIR))


def test_meta_tensors_have_the_same_shape():
    y = upfirdn2d(X.to("meta"), F23.to("meta"), [2, 3], [3, 1], [1, 2, -1, 0])
    assert y.shape == upfirdn2d(X, F23, [2, 3], [3, 1], [1, 2, -1, 0]).shape


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


def test_wrapper_paddings():
    torch.testing.assert_close(
        upsample2d(X, FIR, gain=3), upfirdn2d(X, FIR, up=2, padding=[2, 1, 2, 1], gain=12)
    )
    torch.testing.assert_close(
        downsample2d(X, FIR, padding=[0, 1, 2, 3]),
        upfirdn2d(X, FIR, down=2, padding=[1, 2, 3, 4]),
    )
    torch.testing.assert_close(
        filter2d(X, F23, padding=2, flip_filter=True),
        upfirdn2d(X, F23, padding=[3, 3, 3, 2], flip_filter=True),
    )
    taps = image(12, dtype=torch.float32)
    torch.testing.assert_close(
        upsample2d(X, taps), upfirdn2d(X, taps, up=2, padding=[6, 5, 6, 5], gain=4)
    )
    torch.testing.assert_close(
        downsample2d(image(1, 2, 9, 8), taps), upfirdn2d(image(1, 2, 9, 8), taps, down=2, padding=5)
    )


def test_upsampling_keeps_the_magnitude():
    y = upsample2d(torch.full((1, 1, 8, 8), 3.0), FIR)
    torch.testing.assert_close(y[..., 2:-2, 2:-2], torch.full((1, 1, 12, 12), 3.0))


def test_argument_forms():
    assert _parse_scaling(3) == (3, 3)
    assert _parse_scaling((2, np.int64(4))) == (2, 4)
    assert _parse_padding(np.int32(-2)) == (-2, -2, -2, -2)
    assert _parse_padding([1, 2]) == (1, 1, 2, 2)
    assert _parse_padding((1, 2, 3, 4)) == (1, 2, 3, 4)
    assert _get_filter_size(None) == (1, 1)
    assert _get_filter_size(F23) == (3, 2)
    assert _get_filter_size(F5) == (5, 5)


def test_exported_function_and_backends():
    assert exported is upfirdn2d
    expected = upfirdn2d(X, F23, padding=1)
    assert torch.equal(upfirdn2d(X, F23, padding=1, backend="reference"), expected)
    with pytest.raises(ValueError, match="backend='fast' is unknown"):
        upfirdn2d(X, F23, padding=1, backend="fast")
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
    (dict(f=F23.to("meta")), ValueError, r"f.device=meta but x.device=cpu; use f.to\(x.device\)"),
    (dict(f=F23.clone().requires_grad_()), NotImplementedError, r"pass f.detach\(\)"),
    (dict(up=0), ValueError, "up must be at least 1, got 0"),
    (dict(up=[2, -1]), ValueError, "up must be at least 1, got -1"),
    (dict(up=1.0), TypeError, "up takes integers, got 1.0"),
    (dict(up=True), TypeError, "up takes integers, got True"),
    (dict(up=[1, 2, 1]), ValueError, r"up must be a factor or \[x, y\], got up=\[1, 2, 1\]"),
    (dict(up=[2]), ValueError, r"got up=\[2\]"),
    (dict(up=None), TypeError, "up takes integers, got None"),
    (dict(down=0), ValueError, "down must be at least 1, got 0"),
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


@pytest.mark.parametrize("op", [filter2d, upsample2d, downsample2d])
def test_wrappers_check_their_arguments(op):
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor"):
        op([[1.0]], FIR)
    with pytest.raises(TypeError, match=r"f must be a torch\.Tensor or None"):
        op(X, [1, 3, 3, 1])
    with pytest.raises(TypeError, match="gain must be a number"):
        op(X, FIR, gain="1")
    with pytest.raises(TypeError, match="padding takes integers"):
        op(X, FIR, padding=1.5)
    with pytest.raises(ValueError, match="backend='fast' is unknown"):
        op(X, FIR, backend="fast")


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
filters = st.one_of(
    st.none(),
    st.integers(1, 6).map(lambda taps: image(taps, dtype=torch.float32, seed=taps)),
    st.tuples(st.integers(1, 5), st.integers(1, 5)).map(
        lambda shape: image(*shape, dtype=torch.float32, seed=9)
    ),
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


@settings(max_examples=300, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(1, 6), st.integers(1, 7)),
    f=filters,
    up=good_or_bad_factor,
    down=good_or_bad_factor,
    padding=good_or_bad_padding,
    flip_filter=st.booleans(),
    gain=st.floats(-4, 4, allow_subnormal=False),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
def test_any_arguments(shape, f, up, down, padding, flip_filter, gain, layout):
    x = LAYOUTS[layout](image(*shape))
    meanings = expanded(up, [2]), expanded(down, [2]), expanded(padding, [2, 4])
    valid = None not in meanings and min(meanings[0] + meanings[1]) >= 1
    if valid:
        up_xy, _, (x0, x1, y0, y1) = meanings
        fh, fw = (1, 1) if f is None else (f.shape[0], f.shape[-1])
        valid = shape[2] * up_xy[1] + y0 + y1 >= fh and shape[3] * up_xy[0] + x0 + x1 >= fw
    if valid:
        y = upfirdn2d(x, f, up, down, padding, flip_filter, gain)
        expected = definition(x, f, *meanings, flip_filter, gain)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    else:
        with pytest.raises((TypeError, ValueError), match=r"up|down|padding"):
            upfirdn2d(x, f, up, down, padding, flip_filter, gain)


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
