"""kernels/filtered_lrelu.py against the reference in float64, in Triton's interpreter or on a GPU.

As in test_triton_kernels.py, bfloat16 is tested on a GPU only. The derivatives by way of the op are
in test_filtered_lrelu.py.
"""

import math
import os

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

from stylegan_fast.backends import triton as triton_backend  # noqa: E402
from stylegan_fast.backends.geometry import FilteredLrelu  # noqa: E402
from stylegan_fast.reference.filtered_lrelu import filtered_lrelu as reference  # noqa: E402
from stylegan_fast.reference.upfirdn2d import upfirdn2d  # noqa: E402
from stylegan_fast.testing import assert_matches  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a GPU", allow_module_level=True)

from stylegan_fast.kernels import filtered_lrelu as kernels  # noqa: E402

# Both branches of tl.where are computed, by the interpreter with numpy's warnings.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

# name: (shape of x, taps of fu, of fd, up, down, padding), all of x before y
CASES = {
    "2 and 2": ((1, 3, 11, 14), 12, 12, 2, 2, [9, 8, 7, 10]),
    "4 and 2": ((1, 2, 9, 12), 24, 12, 4, 2, [-3, 2, 1, -2]),
    "2 and 4": ((1, 3, 7, 6), 12, 24, 2, 4, [20, 21, 22, 19]),
    "no filters": ((2, 3, 5, 7), None, None, 1, 1, [0, 0, 0, 0]),
    "none before, cropped": ((1, 9, 8, 9), None, 5, 1, 2, [-1, 2, 0, -2]),
    "none after": ((1, 3, 6, 5), 6, None, 2, 1, [3, 2, 3, 2]),
    "stuffed": ((1, 2, 5, 4), None, None, 2, 4, [0, 1, 3, 0]),
    "same": ((1, 2, 8, 9), 5, 3, 1, 1, [3, 2, 2, 3]),
    "one tap": ((1, 2, 3, 5), 1, 1, 1, 1, [0, 0, 0, 0]),
}


def draw(seed, shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def setup(case, dtype, layout, clamp=0.3, slope=0.2, flip=False):
    """x, b, the filters, the problem and the arguments of the reference."""
    shape, taps_up, taps_down, up, down, padding = case
    x = draw(1, shape, dtype).contiguous(memory_format=LAYOUTS[layout])
    b = draw(2, shape[1], dtype)
    fu = None if taps_up is None else draw(3, taps_up) / taps_up**0.5
    fd = None if taps_down is None else draw(4, taps_down) / taps_down**0.5
    size = [
        n * up + sum(pads) - (taps_up or 1) + 1
        for n, pads in ((shape[2], padding[2:]), (shape[3], padding[:2]))
    ]
    limit = math.inf if clamp is None else clamp
    problem = FilteredLrelu(
        up, down, padding[0], padding[2], flip, 1.3 * up**2, slope, limit, *size
    )
    return x, b, fu, fd, problem, (up, down, padding, 1.3, slope, clamp, flip)


def forward(x, b, fu, fd, problem, with_signs=False):
    nhwc = not x.is_contiguous()
    n, c = x.shape[:2]
    taps = 1 if fd is None else fd.numel()
    size = [(s - taps) // problem.down + 1 for s in (problem.sign_height, problem.sign_width)]
    y = poisoned((n, c, *size), x.dtype, nhwc)
    signs = None
    if with_signs:
        inner = problem.sign_height, problem.sign_width
        lines, line = (n * inner[0] * inner[1], c) if nhwc else (n * c * inner[0], inner[1])
        signs = torch.full((lines * -(-line // 8) * 2,), 0xAA, dtype=torch.uint8, device=DEVICE)
    kernels.filtered_lrelu_forward(x, b, fu, fd, y, signs, problem, nhwc)
    return y, signs


def poisoned(shape, dtype, nhwc):
    y = torch.full(shape, math.nan, dtype=dtype, device=DEVICE)
    return y.contiguous(memory_format=LAYOUTS["nhwc" if nhwc else "nchw"])


def between(x, b, fu, problem, padding):
    """u in float64."""
    x = x.double() + b.double()[:, None, None]
    fu = None if fu is None else fu.double()
    return upfirdn2d(x, fu, problem.up, 1, padding, problem.flip_filter, problem.gain)


def unpack(signs, shape, nhwc):
    """The two images of bits."""
    n, c, h, w = shape
    lines = (n, h, w, c) if nhwc else (n, c, h, w)
    units = signs.view(*lines[:3], -1, 2, 1) >> torch.arange(8, device=DEVICE)
    bits = (units & 1).bool().movedim(-2, 0).flatten(-2)[..., : lines[3]]
    return bits.permute(0, 1, 4, 2, 3) if nhwc else bits


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_every_geometry(name, layout):
    """The signs too, of every u that an output sees; a u next to a bound may be on either side."""
    x, b, fu, fd, problem, arguments = setup(CASES[name], torch.float32, layout)
    y, signs = forward(x, b, fu, fd, problem, with_signs=True)
    expected = reference(
        x.double(), *(None if f is None else f.double() for f in (fu, fd)), b.double(), *arguments
    )
    assert_matches(y, expected, reduction=144)
    u = between(x, b, fu, problem, arguments[2])
    v = torch.where(u <= 0, problem.slope * u, u)
    seen = [(n - 1) * problem.down + (1 if fd is None else fd.numel()) for n in expected.shape[2:]]
    below, clamped = unpack(signs, u.shape, layout == "nhwc")[..., : seen[0], : seen[1]]
    u, v = u[..., : seen[0], : seen[1]], v[..., : seen[0], : seen[1]]
    stuffing = fu is None  # whose u is 0
    assert ((below == (u <= 0)) | (u.abs() < (0 if stuffing else 1e-5))).all()
    assert ((clamped == (v.abs() > problem.clamp)) | ((v.abs() - problem.clamp).abs() < 1e-5)).all()
    assert below.any() and clamped.any() and not clamped.all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_16_bits(layout):
    """Of several strips and tiles; correlated."""
    case = ((1, 5, 44, 29), 12, 12, 2, 2, [9, 8, 9, 8])
    for dtype in DTYPES:
        x, b, fu, fd, problem, arguments = setup(case, dtype, layout, None, 0.0, True)
        y, _ = forward(x, b, fu, fd, problem)
        expected = reference(x.double(), fu.double(), fd.double(), b.double(), *arguments)
        assert_matches(y, expected, reduction=144)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU does so of itself")
def test_products_of_halves(monkeypatch):
    """As a GPU computes them, where the interpreter takes bits for numbers: to less than the
    rounding of float16, although the interpreter truncates."""

    def create_dot(self, a, b, d, *options):
        values = [
            (t.data.astype(np.uint32) << 16).view(np.float32)
            if t.data.dtype == np.uint16
            else t.data
            for t in (a, b)
        ]
        return triton.runtime.interpreter.TensorHandle(np.matmul(*values) + d.data, d.dtype.scalar)

    monkeypatch.setattr(triton.runtime.interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(kernels, "_precision", lambda dtype: "bf16x3")
    x, b, fu, fd, problem, arguments = setup(CASES["2 and 2"], torch.float32, "nchw")
    y, _ = forward(x, b, fu, fd, problem)
    expected = reference(x.double(), fu.double(), fd.double(), b.double(), *arguments)
    error = (y - expected).abs().max() / expected.abs().max()
    assert error < 2**-13


MASKED = {
    name: CASES[name] for name in ("2 and 2", "4 and 2", "no filters", "none before, cropped")
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slope", [0.0, 0.3])
@pytest.mark.parametrize("name", MASKED)
def test_masked(name, slope, layout):
    """With signs that begin elsewhere and end early. Where the factor is 0 the result is, whatever
    u is."""
    x, _, fu, fd, problem, arguments = setup(MASKED[name], torch.float32, layout, slope=slope)
    n, c = x.shape[:2]
    u = between(x, torch.zeros(c, device=DEVICE), fu, problem, arguments[2])
    height, width = u.shape[2] + 2, u.shape[3] + 1
    sign_y, sign_x = 3, -2
    below, clamped = (draw(seed, (n, c, height, width)) > 0.4 for seed in (5, 6))
    lines = [t.permute(0, 2, 3, 1) if layout == "nhwc" else t for t in (below, clamped)]
    fill = -lines[0].shape[-1] % 8
    units = [
        torch.nn.functional.pad(t.int(), (0, fill), value=1).unflatten(-1, (-1, 8)) for t in lines
    ]
    signs = (torch.stack(units, -2) << torch.arange(8, device=DEVICE)).sum(-1).to(torch.uint8)

    factor = torch.where(below, slope, 1.0).masked_fill(clamped, 0).double()
    factor = torch.nn.functional.pad(
        factor, (-sign_x, u.shape[3] + sign_x - width, -sign_y, u.shape[2] + sign_y - height)
    )
    down = None if fd is None else fd.double()
    expected = upfirdn2d(u * factor, down, 1, problem.down, 0, problem.flip_filter)
    if name == "no filters":
        x = torch.where(factor == 0, math.inf, x).contiguous(memory_format=LAYOUTS[layout])
    y = poisoned(expected.shape, x.dtype, layout == "nhwc")
    moved = problem._replace(
        sign_height=height, sign_width=width, sign_y=sign_y, sign_x=sign_x, clamp=0.1
    )
    kernels.filtered_lrelu_masked(x, signs.flatten(), fu, fd, y, moved, layout == "nhwc")
    assert_matches(y, expected, reduction=144)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("clamp", [None, 0.9])
def test_what_is_not_finite_goes_where_taps_see_it(value, clamp, layout):
    """Through taps of value 0 too, as NaN, and no further; the signs beside it stay."""
    case = ((1, 2, 6, 21), 4, 3, 2, 2, [2, 1, 1, 2])
    x, b, fu, fd, problem, arguments = setup(case, torch.float32, layout, clamp)
    fd[1] = 0
    x[0, 1, 4, 2] = value
    y, signs = forward(x, b, fu, fd, problem, with_signs=True)
    expected = reference(x.double(), fu.double(), fd.double(), b.double(), *arguments)
    assert_matches(y, expected, reduction=12)
    assert 0 < (~y.isfinite()).sum() < 20 or value != value or clamp is not None
    u = between(x, b, fu, problem, arguments[2])
    below = unpack(signs, u.shape, layout == "nhwc")[0]
    assert torch.equal(below, u <= 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_offsets_of_64_bits_give_the_same(layout, monkeypatch):
    x, b, fu, fd, problem, _ = setup(CASES["2 and 2"], torch.float32, layout)
    narrow, plan = forward(x, b, fu, fd, problem, with_signs=True), kernels._plan

    def wide(*arguments):
        grid, found = plan(*arguments)
        return grid, found._replace(WIDE=True)

    monkeypatch.setattr(kernels, "_plan", wide)
    for found, same in zip(forward(x, b, fu, fd, problem, with_signs=True), narrow):
        assert torch.equal(found, same)


def plan_of(shape, out_size, up=2, down=2, nhwc=False):
    between = (up * size for size in shape[2:])
    problem = FilteredLrelu(up, down, 9, 9, False, 1.0, 0.2, math.inf, *between)
    walk = kernels._walk(12, 12, up, down, torch.float16)
    return kernels._plan(shape, out_size, nhwc, tuple(problem), *walk)


def test_64_bits_are_chosen_in_time():
    assert not plan_of((31, 64, 1024, 1024), (1024, 1024))[1].WIDE
    assert plan_of((32, 64, 1024, 1024), (1024, 1024))[1].WIDE  # 2^31
    assert plan_of((8, 64, 512, 512), (2048, 2048), 4, 1)[1].WIDE  # the output is
    # The signs of a pixel are whole units, also those of few channels.
    assert plan_of((1, 3, 11600, 11600), (23200, 23200), 4, 2, nhwc=True)[1].WIDE
    assert not plan_of((1, 8, 4000, 4000), (8000, 8000), 4, 2, nhwc=True)[1].WIDE


def test_small_layers_fill_the_gpu():
    """By lower strips; the large ones keep to few of them."""
    (programs,), plan = plan_of((1, 512, 36, 36), (36, 36))
    assert (programs, plan.strips) == (512, 2)
    (programs,), plan = plan_of((4, 64, 1024, 1024), (1024, 1024))
    assert (programs, plan.strips) == (64 * 52, 1)


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(), None),
        (dict(fu=None, up=1), None),
        (dict(dtype=torch.float64), "not for float64"),
        (dict(up=3), "factors of 1, 2 and 4"),
        (dict(fd=torch.ones(12, 12)), "separable"),
        (dict(fu=torch.ones(65)), "too long"),
        (dict(fd=None, down=1), None),
        (dict(fu=None, up=1, down=1), "too long"),  # for the derivative
    ],
)
def test_refusals(options, reason):
    f = torch.ones(12)
    arguments = dict(dtype=torch.float16, fu=f, fd=f, up=2, down=2) | options
    found = triton_backend.filtered_lrelu_refusal(**arguments)
    assert found is None if reason is None else reason in found
