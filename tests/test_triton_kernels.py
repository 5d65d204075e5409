"""kernels/ against plain PyTorch in float64, in Triton's interpreter or on a GPU.

conftest.py turns the interpreter on for tests on the CPU. Its bfloat16 stores truncate, so bfloat16
is tested on a GPU only, where in turn float64 would get its scalar arguments in float32.
"""

import importlib.util
import math
import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")
mpmath = pytest.importorskip("mpmath")

import triton.language as tl  # noqa: E402

from stylegan_fast.activations import ACTIVATIONS  # noqa: E402
from stylegan_fast.backends.geometry import Geometry  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a GPU", allow_module_level=True)

from stylegan_fast.kernels import epilogue  # noqa: E402
from stylegan_fast.kernels import math as kernel_math  # noqa: E402

# Both branches of tl.where are computed, by the interpreter with numpy's warnings.
pytestmark = [
    pytest.mark.device,
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
]

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (
    (torch.float64, torch.float32, torch.float16)
    if INTERPRETED
    else (torch.float32, torch.float16, torch.bfloat16)
)
EXACT = DTYPES[0]
# Of tl.exp and the compositions above it; a GPU's is an approximation.
ROUNDINGS = 16 if INTERPRETED else 64

TRUE_ACTIVATIONS = {
    "linear": lambda v, alpha: v,
    "relu": lambda v, alpha: F.relu(v),
    "lrelu": F.leaky_relu,
    "tanh": lambda v, alpha: torch.tanh(v),
    "sigmoid": lambda v, alpha: torch.sigmoid(v),
    "elu": lambda v, alpha: F.elu(v),
    "selu": lambda v, alpha: F.selu(v),
    "softplus": lambda v, alpha: F.softplus(v),
    "swish": lambda v, alpha: F.silu(v),
}
PIECEWISE_LINEAR = [name for name, row in ACTIVATIONS.items() if not row.curved]
CURVED = [name for name, row in ACTIVATIONS.items() if row.curved]

# Name of the walk, then whether it is of whole units, and a geometry that takes it.
WALKS = {
    "planes": (("planes", True), Geometry(2, 3, 40, 40)),
    "planes of several tiles": (("planes", True), Geometry(2, 3, 2056, 2056)),
    "odd planes": (("planes", False), Geometry(3, 5, 7, 7)),
    "odd planes of several tiles": (("planes", False), Geometry(2, 3, 2051, 2051)),
    "pixels": (("pixels", True), Geometry(48, 24, 1, 16)),
    "pixels, one sample a tile": (("pixels", True), Geometry(24, 512, 1, 8)),
    "pixels of several tiles": (("pixels", True), Geometry(6, 2072, 1, 2)),
    "folded pixels": (("pixels", True), Geometry(48, 3, 1, 16)),
    "folded pixels, one sample a tile": (("pixels", True), Geometry(1536, 3, 1, 512)),
    "odd pixels": (("pixels", False), Geometry(45, 5, 1, 15)),
    "one odd pixel": (("pixels", False), Geometry(1, 13, 1, 1)),
    "runs of CNHW": (("runs", True), Geometry(1, 3, 32, 8)),
    "runs of NHCW": (("runs", True), Geometry(6, 3, 8, 16)),
    "odd runs": (("runs", False), Geometry(3, 5, 4, 6)),
}
GEOMETRIES = {name: geometry for name, (_, geometry) in WALKS.items()}


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


class Operands(NamedTuple):
    scale: torch.Tensor | None
    noise: torch.Tensor | None
    strength: torch.Tensor | None
    b: torch.Tensor | None


NOTHING = Operands(None, None, None, None)


def draw(seed, geometry, dtype, *, scale=True, noise="per sample", b=True):
    """x, dy and h [outer, channels, inner], and operands."""
    generator = torch.Generator().manual_seed(seed)

    def randn(shape, dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    wide = accumulator(dtype)
    samples = geometry.outer * geometry.inner // geometry.pixels
    pixels = {"per sample": (samples, geometry.pixels), "shared": (geometry.pixels,)}
    operands = Operands(
        randn((samples, geometry.channels), wide) if scale else None,
        randn(pixels[noise], wide) if noise else None,
        randn((1,), wide) if noise else None,
        randn((geometry.channels,), dtype) if b else None,
    )
    return *(2 * randn(geometry[:3], dtype) for _ in range(3)), operands


class Truth:
    """The three maps in float64 by autograd, and how large the terms were that rounding sees."""

    def __init__(self, x, operands, geometry, name, alpha, gain, clamp):
        index = torch.arange(geometry.outer * geometry.inner, device=x.device)
        index = index.view(geometry.outer, 1, geometry.inner)
        channel = torch.arange(geometry.channels, device=x.device)[None, :, None]
        sample, pixel = index // geometry.pixels, index % geometry.pixels

        zero = torch.zeros((), dtype=torch.float64, device=x.device)
        self.scale = zero + 1
        if operands.scale is not None:
            self.scale = operands.scale.double()[sample, channel]
        noise = zero
        if operands.noise is not None:
            shared = operands.noise.ndim == 1
            noise = (operands.noise[pixel] if shared else operands.noise[sample, pixel]).double()
            if operands.strength is not None:
                noise = noise * operands.strength.double()
        bias = zero if operands.b is None else operands.b.double()[channel]

        scaled = self.scale * x.double()
        self.size = scaled.abs() + noise.abs() + bias.abs()
        self.v = (scaled + noise + bias).requires_grad_()
        self.u = gain * TRUE_ACTIVATIONS[name](self.v, alpha)
        self.y = self.u if math.isinf(clamp) else self.u.clamp(-clamp, clamp)
        self.negative = (self.v <= 0).detach()
        self.clamped = (~(self.u.abs() <= clamp) & math.isfinite(clamp)).detach()

    def slope(self, dy):
        """d(v) for dy, differentiable."""
        return torch.autograd.grad(self.y, self.v, dy.double(), create_graph=True)[0]

    def curvature(self, dy, h):
        return torch.autograd.grad(self.slope(dy), self.v, h.double())[0]


def ends(mask, numel):
    """The two bits of each element, and those of elements past the end."""
    units = mask.cpu().view(-1, 2, 1) >> torch.arange(8, dtype=torch.uint8) & 1
    negative, clamped = units[:, 0].reshape(-1).bool(), units[:, 1].reshape(-1).bool()
    return negative[:numel], clamped[:numel], (negative | clamped)[numel:]


def empty_mask(geometry):
    return torch.full((2 * triton.cdiv(geometry.numel, 8),), 0xFF, dtype=torch.uint8, device=DEVICE)


def run_forward(x, operands, geometry, name, alpha, gain, clamp, with_mask=True):
    y = torch.full_like(x, math.nan)
    mask = empty_mask(geometry) if with_mask else None
    code = ACTIVATIONS[name].code
    epilogue.epilogue_forward(x, y, mask, geometry, (*operands, code, alpha, gain, clamp))
    return y, mask


def empty_total(geometry, dtype):
    return torch.full((geometry.channels,), math.nan, dtype=accumulator(dtype), device=DEVICE)


def run_masked(dy, mask, scale, geometry, slope, gain, with_total=True):
    dx = torch.full_like(dy, math.nan)
    total = empty_total(geometry, dy.dtype) if with_total else None
    epilogue.epilogue_masked(dy, mask, dx, total, scale, geometry, slope, gain)
    return dx, total


def run_curved(order, x, dy, h, operands, geometry, name, alpha, gain, clamp, with_total=True):
    dx = torch.full_like(dy, math.nan)
    total = empty_total(geometry, dy.dtype) if with_total else None
    code = ACTIVATIONS[name].code
    epilogue.epilogue_curved(
        order, x, dy, h if order == 2 else None, dx, total, geometry,
        (*operands, code, alpha, gain, clamp),
    )  # fmt: skip
    return dx, total


def assert_close(actual, truth, size):
    """Within one rounding to the dtype of `actual`, and the accumulation's on terms of `size`."""
    wide = torch.finfo(accumulator(actual.dtype))
    stored = torch.finfo(actual.dtype)
    bound = stored.eps * truth.abs() + ROUNDINGS * wide.eps * size + stored.smallest_normal
    error = (actual.double() - truth).abs()
    assert torch.isfinite(actual).all()
    assert (error <= bound).all(), f"{(error / bound).max().item():.2f} times the bound"


def assert_sums(total, dv, size):
    """Sums of terms known to within the accumulation's rounding of `size`."""
    terms = dv[:, 0].numel()
    eps = torch.finfo(total.dtype).eps
    bound = eps * ((ROUNDINGS * size) + (math.log2(terms) + 4) * dv.abs()).sum((0, 2))
    error = (total.double() - dv.sum((0, 2))).abs()
    assert (error <= bound + 1e-300).all(), f"{(error / bound).max().item():.2f} times the bound"


def test_the_directory_is_no_package_of_its_own():
    path = Path(__file__).parent.parent / "kernels" / "__init__.py"
    spec = importlib.util.spec_from_file_location("kernels", path)
    with pytest.raises(ImportError, match=r"package stylegan_fast\.kernels"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize("name", WALKS)
def test_walks_are_those_meant(name):
    (layout, aligned), geometry = WALKS[name]
    walk = epilogue._walk(*geometry, per_sample=True)
    actual = walk.LAYOUT, walk.ALIGNED, walk.FOLD, walk.ONE_SAMPLE, walk.col_tiles > 1
    fold = 8 if "folded" in name else 1
    assert actual == (layout, aligned, fold, "one sample" in name, "several tiles" in name)
    with_mask = epilogue._walk(*geometry, per_sample=True, writes_mask=True)
    assert (with_mask.LAYOUT == "flat") is not aligned


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("noise", ["per sample", "shared", None])
def test_every_walk(geometry, noise):
    """All three maps with all operands, in the widest type."""
    x, dy, h, operands = draw(1, geometry, EXACT, scale=noise != "shared", noise=noise)
    gain, clamp = 1.3, 2.1
    truth = Truth(x, operands, geometry, "lrelu", 0.3, gain, clamp)

    y, mask = run_forward(x, operands, geometry, "lrelu", 0.3, gain, clamp)
    assert_close(y, truth.y, truth.size)
    negative, clamped, past_the_end = ends(mask, geometry.numel)
    assert torch.equal(negative, truth.negative.cpu().flatten())
    assert torch.equal(clamped, truth.clamped.cpu().flatten())
    assert not past_the_end.any()
    assert torch.equal(y, run_forward(x, operands, geometry, "lrelu", 0.3, gain, clamp, False)[0])

    dv = truth.slope(dy).detach()
    dx, total = run_masked(dy, mask, operands.scale, geometry, 0.3, gain)
    assert_close(dx, truth.scale * dv, (truth.scale * dv).abs())
    assert_sums(total, dv, dv.abs())
    assert torch.equal(dx, run_masked(dy, mask, operands.scale, geometry, 0.3, gain, False)[0])

    truth = Truth(x, operands, geometry, "swish", 0, gain, clamp)
    slope = gain * dy.double().abs() * (1 + truth.size)
    for order, dv, size in (
        (1, truth.slope(dy).detach(), slope),
        (2, truth.curvature(dy, h), slope * h.abs()),
    ):
        arguments = (order, x, dy, h, operands, geometry, "swish", 0.0, gain, clamp)
        dx, total = run_curved(*arguments)
        assert_close(dx, truth.scale * dv, truth.scale.abs() * size)
        assert_sums(total, dv, size)
        assert torch.equal(dx, run_curved(*arguments, False)[0])


@pytest.mark.parametrize("geometry", [Geometry(2, 3, 40, 40), Geometry(30, 5, 1, 15)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clamp", [1.7, math.inf])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_and_dtype(name, clamp, dtype, geometry):
    """bias_act: only a bias. float16 keeps the dtype's rounding and float32's arithmetic."""
    x, dy, h, operands = draw(2, geometry, dtype, scale=False, noise=None)
    x = 3 * x
    alpha, gain = 0.15, 0.9
    truth = Truth(x, operands, geometry, name, alpha, gain, clamp)
    y, mask = run_forward(x, operands, geometry, name, alpha, gain, clamp)
    assert_close(y, truth.y, gain * truth.size)
    negative, clamped, _ = ends(mask, geometry.numel)
    assert torch.equal(negative, truth.negative.cpu().flatten())
    assert torch.equal(clamped, truth.clamped.cpu().flatten())

    dv = truth.slope(dy).detach()
    if name in PIECEWISE_LINEAR:
        slope = ACTIVATIONS[name].negative_slope(alpha)
        dx, total = run_masked(dy, mask, None, geometry, slope, gain)
        assert_close(dx, dv, dv.abs())
        assert_sums(total, dv, dv.abs())
        return
    dx, total = run_curved(1, x, dy, h, operands, geometry, name, alpha, gain, clamp)
    size = gain * dy.double().abs() * (1 + truth.size)
    assert_close(dx, dv, size)
    assert_sums(total, dv, size)
    d2v = truth.curvature(dy, h)
    dx, total = run_curved(2, x, dy, h, operands, geometry, name, alpha, gain, clamp)
    assert_close(dx, d2v, size * h.abs())
    assert_sums(total, d2v, size * h.abs())


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("noise", [None, "per sample", "shared"])
@pytest.mark.parametrize("b", [False, True])
def test_any_operand_may_be_absent(scale, noise, b):
    geometry = Geometry(3, 5, 9, 9)
    x, dy, _, operands = draw(3, geometry, EXACT, scale=scale, noise=noise, b=b)
    operands = operands._replace(strength=None)
    truth = Truth(x, operands, geometry, "tanh", 0, 1.0, math.inf)
    y, _ = run_forward(x, operands, geometry, "tanh", 0.0, 1.0, math.inf, with_mask=False)
    assert_close(y, truth.y, truth.size)
    dx, total = run_curved(1, x, dy, None, operands, geometry, "tanh", 0.0, 1.0, math.inf)
    dv = truth.slope(dy).detach()
    assert_close(dx, truth.scale * dv, truth.scale.abs() * dy.abs() * (1 + truth.size))
    assert_sums(total, dv, dy.abs() * (1 + truth.size))


def test_absent_mask_is_slope_one():
    geometry = Geometry(3, 5, 9, 9)
    _, dy, _, operands = draw(4, geometry, EXACT)
    dx, total = run_masked(dy, None, operands.scale, geometry, 0.2, 1.5)
    dv = 1.5 * dy.double()
    scaled = operands.scale.double()[:, :, None] * dv
    assert_close(dx, scaled, scaled.abs())
    assert_sums(total, dv, dv.abs())


@pytest.mark.parametrize("geometry", [Geometry(520, 24, 1, 40), Geometry(2568, 3, 1, 856)], ids=str)
def test_sums_over_several_tiles_of_a_program(geometry, monkeypatch):
    """With a wave of one program the last programs have fewer tiles than STEPS."""
    monkeypatch.setattr(epilogue, "WAVE", 1)
    epilogue._walk.cache_clear()
    walk = epilogue._walk(*geometry, per_sample=True, writes_sum=True)
    epilogue._walk.cache_clear()
    tiles = triton.cdiv(walk.rows, walk.ROWS)
    assert walk.STEPS == 4 and (tiles % 4 or walk.rows % walk.ROWS)
    x, dy, h, operands = draw(5, geometry, EXACT)
    truth = Truth(x, operands, geometry, "sigmoid", 0, 1.0, math.inf)
    dv = truth.slope(dy).detach()
    dx, total = run_curved(1, x, dy, h, operands, geometry, "sigmoid", 0.0, 1.0, math.inf)
    epilogue._walk.cache_clear()
    assert_close(dx, truth.scale * dv, truth.scale.abs() * dy.abs() * (1 + truth.size))
    assert_sums(total, dv, dy.abs() * (1 + truth.size))


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_offsets_of_64_bits_give_the_same(geometry, monkeypatch):
    x, dy, _, operands = draw(6, geometry, EXACT)
    arguments = (x, operands, geometry, "lrelu", 0.2, 1.4, 1.0)
    y, mask = run_forward(*arguments)
    dx, total = run_masked(dy, mask, operands.scale, geometry, 0.2, 1.4)
    narrow = epilogue._walk
    monkeypatch.setattr(epilogue, "_walk", lambda *a, **k: narrow(*a, **k)._replace(WIDE=True))
    wide_y, wide_mask = run_forward(*arguments)
    wide_dx, wide_total = run_masked(dy, mask, operands.scale, geometry, 0.2, 1.4)
    for a, b in ((y, wide_y), (mask, wide_mask), (dx, wide_dx), (total, wide_total)):
        assert torch.equal(a, b)


def test_64_bits_are_chosen_in_time():
    below, above = (epilogue._walk(n, 1, 1, 1, per_sample=False).WIDE for n in (2**30, 2**31))
    assert (below, above) == (False, True)
    plane = epilogue._walk(1, 1, 2**31 + 8, 2**31 + 8, per_sample=False)
    assert plane.WIDE and plane.grid[0] * plane.ROWS * plane.UNITS * 8 >= 2**31 + 8


def test_ties_keep_their_gradient():
    """|u| == clamp is not clamped, v == 0 is the negative branch; both before rounding."""
    geometry = Geometry(1, 1, 8, 8)
    x = torch.tensor([2, -2, -0.0, 0, -4, 1, 5, -0.5], dtype=torch.float16, device=DEVICE)
    x = x.view(1, 1, 8)
    y, mask = run_forward(x, NOTHING, geometry, "linear", 0.0, 1.0, 2.0)
    assert y.flatten().tolist() == [2, -2, 0, 0, -2, 1, 2, -0.5]
    negative, clamped, _ = ends(mask, 8)
    assert negative.tolist() == [False, True, True, True, True, False, False, True]
    assert clamped.tolist() == [False, False, False, False, True, False, True, False]

    # 2 * 1.0002 rounds to 2 in float16.
    y, mask = run_forward(x, NOTHING, geometry, "linear", 0.0, 1.0002, 2.0)
    assert y.flatten().tolist() == [2, -2, 0, 0, -2, 1, 2, -0.5]
    assert ends(mask, 8)[1].tolist() == [True, True, False, False, True, False, True, False]

    dy = torch.arange(1, 9, dtype=torch.float16, device=DEVICE).view(1, 1, 8)
    _, mask = run_forward(x, NOTHING, geometry, "lrelu", 0.5, 1.0, 2.0)
    dx, _ = run_masked(dy, mask, None, geometry, 0.5, 1.0)
    assert dx.flatten().tolist() == [1, 1, 1.5, 2, 2.5, 6, 0, 4]


@pytest.mark.parametrize("geometry", [Geometry(1, 1, 8, 8), Geometry(1, 2, 4, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity(dtype, geometry):
    inf, nan = math.inf, math.nan
    x = torch.tensor([nan, inf, -inf, 1.0, -1.0, nan, 3.0, -3.0], dtype=dtype, device=DEVICE)
    x = x.view(geometry[:3])

    def forward(name, alpha, gain, clamp):
        y, mask = run_forward(x, NOTHING, geometry, name, alpha, gain, clamp)
        return y.flatten(), ends(mask, 8)[1].tolist(), mask

    def same(actual, expected):
        expected = torch.tensor(expected, dtype=dtype, device=DEVICE)
        torch.testing.assert_close(actual.flatten(), expected, rtol=0, atol=0, equal_nan=True)

    y, clamped, mask = forward("lrelu", 0.5, 1.0, 2.0)
    same(y, [nan, 2, -2, 1, -0.5, nan, 2, -1.5])
    assert clamped == [True, True, True, False, False, True, True, False]
    y, clamped, unclamped_mask = forward("relu", 0.0, 1.0, inf)
    same(y, [nan, inf, 0, 1, 0, nan, 3, 0])
    assert clamped == [False] * 8  # without a clamp NaN is not clamped either

    # Where the factor is 0 the result is 0, whatever dy is.
    dy = torch.tensor([nan, inf, nan, nan, inf, inf, nan, 1.0], dtype=dtype, device=DEVICE)
    dy = dy.view(geometry[:3])
    dx, _ = run_masked(dy, mask, None, geometry, 0.5, 1.0)
    same(dx, [0, 0, 0, nan, inf, 0, 0, 0.5])
    dx, _ = run_masked(dy, unclamped_mask, None, geometry, 0.0, 1.0)
    same(dx, [nan, inf, 0, nan, 0, inf, nan, 0])

    dx, total = run_masked(dy, mask, None, geometry, 0.5, 0.0)
    same(dx, [0] * 8)
    assert not total.any()

    dy = torch.tensor([nan, inf, 7, 1, 1, inf, nan, 1], dtype=dtype, device=DEVICE).view_as(x)
    h = torch.ones_like(dy)
    for order in (1, 2):
        dx, _ = run_curved(order, x, dy, h, NOTHING, geometry, "elu", 0.0, 1.0, 2.0)
        expected = [0, 0, 0, order % 2, math.exp(-1), 0, 0, math.exp(-3)]
        expected = torch.tensor(expected, dtype=torch.float64, device=DEVICE).view_as(dx)
        assert torch.equal(dx.isnan(), x.isnan())
        assert_close(dx.nan_to_num(), expected, expected.abs())


def test_total_is_of_unrounded_terms():
    """The bias gradient adds float32 terms, also where dx is float16 and has been scaled."""
    geometry = Geometry(2, 3, 40, 40)
    _, dy, _, operands = draw(7, geometry, torch.float16)
    dx, total = run_masked(dy, None, operands.scale, geometry, 1.0, 1.1)
    dv = float(torch.tensor(1.1, dtype=torch.float32)) * dy.double()
    assert_sums(total, dv, 0 * dv)
    of_rounded = (dx.double() / operands.scale.double()[:, :, None]).sum((0, 2))
    assert not torch.allclose(of_rounded, total.double(), rtol=1e-6, atol=1e-6)


def test_total_is_the_same_every_time():
    geometry = Geometry(2, 3, 2056, 2056)
    _, dy, _, _ = draw(8, geometry, torch.float32)
    totals = [run_masked(dy, None, None, geometry, 1.0, 1.1)[1] for _ in range(3)]
    assert torch.equal(totals[0], totals[1]) and torch.equal(totals[0], totals[2])


@triton.jit
def _apply(x, y, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + index)
    if FUNCTION == "expm1":
        result = kernel_math.expm1(v)
    elif FUNCTION == "log1p":
        result = kernel_math.log1p(v)
    elif FUNCTION == "tanh":
        result = kernel_math.tanh(v)
    else:
        result = kernel_math.sigmoid(v)
    tl.store(y + index, result)


def apply(function, x):
    """A function of kernels/math.py on a vector, in programs of 512."""
    padded = F.pad(x.to(DEVICE), (0, -x.numel() % 512))
    y = torch.full_like(padded, math.nan)
    _apply[(padded.numel() // 512,)](padded, y, function, 512)
    return y[: x.numel()].cpu()


def sigmoid(x):
    return 1 / (1 + mpmath.exp(-x))


# The true function, the range of arguments, and the part of it where a series is used.
MATH = {
    "expm1": (mpmath.expm1, (-100, 20), (-0.5, 0.5)),
    "log1p": (mpmath.log1p, (-0.9999, 1e6), (-0.5, 1)),
    "tanh": (mpmath.tanh, (-30, 30), (-0.25, 0.25)),
    "sigmoid": (sigmoid, (-80, 80), (0, 0)),
}


@pytest.mark.skipif(not INTERPRETED, reason="tl.exp of a GPU is an approximation")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("function", MATH)
def test_math_is_accurate_in_relative_terms(function, dtype):
    """Within 2 eps by series; elsewhere numpy's exp and log, of up to 3 eps, are part of it."""
    true_function, (low, high), (series_low, series_high) = MATH[function]
    generator = torch.Generator().manual_seed(9)
    exponents = torch.linspace(-30, math.log10(max(-low, high)), 600, dtype=torch.float64)
    uniform = low + (high - low) * torch.rand(600, generator=generator, dtype=torch.float64)
    near = torch.linspace(-1.2, 1.2, 1201, dtype=torch.float64)
    x = torch.cat([10**exponents, -(10**exponents), near, uniform]).to(dtype)
    x = x[(x >= low) & (x <= high) & (x != 0)]
    by_series = (x > series_low) & (x < series_high)
    with mpmath.workdps(40):
        truth = [true_function(mpmath.mpf(value)) for value in x.tolist()]
        actual = [mpmath.mpf(value) for value in apply(function, x).tolist()]
        errors = torch.tensor([float(abs((a - t) / t)) for a, t in zip(actual, truth)])
    errors /= torch.finfo(dtype).eps
    assert errors.max() <= 5
    assert errors[by_series].numel() == 0 or errors[by_series].max() <= 2


@pytest.mark.parametrize("dtype", DTYPES[:2] if INTERPRETED else DTYPES[:1], ids=str)
@pytest.mark.parametrize(
    "function, expected",
    [
        ("expm1", [math.nan, math.inf, -1, 0]),
        ("log1p", [math.nan, math.inf, math.nan, 0]),
        ("tanh", [math.nan, 1, -1, 0]),
        ("sigmoid", [math.nan, 1, 0, 0.5]),
    ],
)
def test_math_at_the_ends(function, expected, dtype):
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0], dtype=dtype)
    actual = apply(function, x)
    expected = torch.tensor(expected, dtype=dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_log1p_at_its_pole():
    assert apply("log1p", torch.tensor([-1.0])).item() == -math.inf
