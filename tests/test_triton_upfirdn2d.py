"""kernels/upfirdn2d.py against the reference in float64, in Triton's interpreter or on a GPU.

As in test_triton_kernels.py, bfloat16 is tested on a GPU only and float64 in the interpreter only.
"""

import math
import os

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")

from stylegan_fast.activations import ACTIVATIONS  # noqa: E402
from stylegan_fast.backends.geometry import Fir, Geometry, Tail  # noqa: E402
from stylegan_fast.reference.upfirdn2d import upfirdn2d as reference  # noqa: E402
from stylegan_fast.testing import assert_matches  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a GPU", allow_module_level=True)

from stylegan_fast.kernels import epilogue  # noqa: E402
from stylegan_fast.kernels import upfirdn2d as kernels  # noqa: E402

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
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

# name: (shape of x, shape of f, up, down, padding, flip_filter, gain), all of x before y
CASES = {
    "same 4x4": ((2, 3, 7, 9), (4, 4), (1, 1), (1, 1), (2, 1, 1, 2), False, 1.0),
    "same 4x4, several strips": ((1, 2, 21, 5), (4, 4), (1, 1), (1, 1), (1, 1, 1, 1), True, 4.0),
    "up2 4x4": ((2, 3, 5, 7), (4, 4), (2, 2), (1, 1), (2, 1, 2, 1), False, 4.0),
    "up2 4x4, other phase": ((2, 3, 6, 5), (4, 4), (2, 2), (1, 1), (1, 2, 3, 0), True, -4.0),
    "down2 4x4": ((2, 3, 9, 8), (4, 4), (1, 1), (2, 2), (1, 1, 1, 1), False, 1.0),
    "up2 12": ((1, 3, 5, 6), (12,), (2, 2), (1, 1), (6, 5, 6, 5), False, 4.0),
    "up2 12, cropped": ((1, 3, 9, 8), (12,), (2, 2), (1, 1), (1, -2, -1, 3), True, 4.0),
    "down2 12": ((1, 3, 9, 12), (12,), (1, 1), (2, 2), (5, 5, 5, 5), False, 1.0),
    "down2 12, cropped": ((1, 2, 17, 19), (12,), (1, 1), (2, 2), (-1, -3, -2, 1), True, 1.0),
    "separable 4": ((1, 3, 5, 8), (4,), (1, 2), (2, 1), (2, 1, 3, 1), False, -1.5),
    "same 8": ((1, 2, 6, 9), (8,), (1, 1), (1, 1), (4, 3, 3, 4), True, 1.0),
    "long blur": ((1, 2, 4, 6), (17,), (1, 1), (1, 1), (8, 8, 6, 7), False, 1.0),
    "up4 11x13": ((1, 2, 4, 3), (11, 13), (4, 4), (1, 1), (7, 5, 6, 5), False, 16.0),
    "up4 4x4": ((1, 2, 3, 4), (4, 4), (4, 4), (1, 1), (2, 3, 3, 2), False, 16.0),
    "up8x": ((1, 3, 4, 3), (1, 9), (8, 1), (1, 1), (4, 4, 0, 0), False, 8.0),
    "down4x": ((1, 2, 4, 19), (5, 1), (1, 1), (4, 1), (0, 0, 2, 2), False, 1.0),
    "up and down": ((2, 3, 7, 5), (5, 6), (3, 4), (2, 3), (7, -2, 4, 3), False, 1.0),
    "up 5 down 3": ((1, 2, 6, 7), (3,), (5, 3), (3, 5), (3, 2, -4, 6), True, 1.0),
    "identity": ((2, 3, 5, 6), None, (1, 1), (1, 1), (0, 0, 0, 0), False, 0.0),
    "identity, up and down": ((1, 3, 5, 4), None, (4, 3), (1, 2), (2, -2, -1, 3), False, 2.0),
    "padding beyond the image": ((1, 2, 2, 3), (3, 2), (1, 1), (1, 1), (9, 4, 3, 8), True, 1.0),
    "crop to one pixel": ((1, 2, 9, 8), (3, 3), (1, 1), (1, 1), (-3, -2, -4, -2), False, 1.0),
    "filter beyond the image": ((1, 3, 1, 1), (6, 5), (2, 1), (1, 1), (4, 3, 5, 5), False, 1.0),
    "one pixel": ((2, 1, 1, 1), (1,), (1, 1), (1, 1), (0, 0, 0, 0), False, 3.0),
}


def draw(seed, shape, dtype):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def setup(case, dtype, layout):
    """x, f and fir of a case."""
    shape, taps, up, down, padding, flip, gain = case
    x = draw(1, shape, dtype).contiguous(memory_format=LAYOUTS[layout])
    f = None if taps is None else draw(2, taps, accumulator(dtype))
    return x, f, Fir(*up, *down, *padding, flip, gain)


def truth(x, f, fir):
    """u(x) in float64, differentiable."""
    f = None if f is None else f.double()
    return reference(x.double(), f, fir[0:2], fir[2:4], fir[4:8], fir.flip_filter, fir.gain)


def reduction(f):
    return 1 if f is None else f.numel() if f.ndim == 2 else f.numel() ** 2


def poisoned(like, dtype, layout):
    y = torch.full(like.shape, math.nan, dtype=dtype, device=DEVICE)
    return y.contiguous(memory_format=LAYOUTS[layout])


def geometry_of(y):
    n, c, h, w = y.shape
    return Geometry(n, c, h * w, h * w) if y.is_contiguous() else Geometry(n * h * w, c, 1, h * w)


def in_memory_order(t, layout):
    return (t.permute(0, 2, 3, 1) if layout == "nhwc" else t).reshape(-1)


def pack(negative, clamped, layout):
    """The mask of two bit images."""
    weights = 1 << torch.arange(8, device=DEVICE)
    units = [
        (in_memory_order(bits, layout).view(-1, 8) * weights).sum(1) for bits in (negative, clamped)
    ]
    return torch.stack(units, 1).flatten().to(torch.uint8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_every_geometry(name, layout):
    x, f, fir = setup(CASES[name], EXACT, layout)
    expected = truth(x, f, fir)
    y = poisoned(expected, EXACT, layout)
    kernels.upfirdn2d_forward(x, f, fir, y)
    assert_matches(y, expected, reduction=reduction(f))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["same 4x4", "up2 12", "down2 12", "up and down"])
def test_every_dtype(name, dtype, layout):
    """With an added tensor; rounded once."""
    x, f, fir = setup(CASES[name], dtype, layout)
    u = truth(x, f, fir)
    y = poisoned(u, dtype, layout)
    add = draw(3, u.shape, dtype).contiguous(memory_format=LAYOUTS[layout])
    kernels.upfirdn2d_forward(x, f, fir, y, add)
    assert_matches(y, u + add.double(), reduction=reduction(f))


def test_16_bits_round_once():
    """1 + 2^-11 is a tie that rounds to 1; with 2^-20 of the added tensor it rounds up."""
    x = torch.ones(1, 1, 1, 8, dtype=torch.float16, device=DEVICE)
    f = torch.tensor([[1 + 2**-11]], device=DEVICE)
    fir = Fir(1, 1, 1, 1, 0, 0, 0, 0, False, 1.0)
    y = torch.empty_like(x)
    kernels.upfirdn2d_forward(x, f, fir, y)
    assert (y == 1).all()
    kernels.upfirdn2d_forward(x, f, fir, y, torch.full_like(x, 2**-20))
    assert (y == 1 + 2**-10).all()


STRIDED = {
    "expanded batch": lambda x: x[:1].expand(3, -1, -1, -1),
    "expanded pixels": lambda x: x[:, :, :1, :1].expand(-1, -1, 5, 4),
    "sliced": lambda x: x[:, ::2, 1::2, 2:],
    "transposed": lambda x: x.transpose(2, 3),
    "CNHW": lambda x: x.transpose(0, 1),
    "sliced NHWC": lambda x: x.contiguous(memory_format=torch.channels_last)[:, 3:, :, 1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", STRIDED)
def test_any_strides(name, layout):
    x = STRIDED[name](draw(4, (2, 11, 7, 8), EXACT))
    f = draw(5, (4, 4), EXACT)
    fir = Fir(2, 1, 1, 1, 2, 1, 1, 2, False, 1.0)
    expected = truth(x, f, fir)
    y = poisoned(expected, EXACT, layout)
    kernels.upfirdn2d_forward(x, f, fir, y)
    assert_matches(y, expected, reduction=16)


@pytest.mark.parametrize(
    "layout, shape",
    [("nhwc", (1, 72, 1, 33)), ("nchw", (3, 1, 2, 261)), ("nchw", (131, 1, 2, 2))],
    ids=str,
)
@pytest.mark.parametrize("taps", [(2, 2), (10,)], ids=str)
def test_several_tiles(layout, shape, taps):
    case = (shape, taps, (1, 1), (1, 1), (5, 4, 5, 5), False, 1.0)
    x, f, fir = setup(case, EXACT, layout)
    expected = truth(x, f, fir)
    y = poisoned(expected, EXACT, layout)
    kernels.upfirdn2d_forward(x, f, fir, y)
    assert_matches(y, expected, reduction=reduction(f))


# Shapes whose output has whole units in both layouts, by a ring, by dynamic rows, with every
# phase of up along x, and where the phase differs from patch to patch.
FUSED = {
    "same": ((2, 8, 5, 9), (4, 4), (1, 1), (1, 1), (1, 1, 2, 1), False, 1.5),
    "up2": ((2, 8, 5, 4), (4, 4), (2, 2), (1, 1), (1, 2, 2, 1), False, 4.0),
    "down2": ((1, 8, 9, 16), (4, 4), (1, 1), (2, 2), (1, 1, 1, 1), True, 1.0),
    "up2 12": ((1, 16, 4, 4), (12,), (2, 2), (1, 1), (6, 5, 7, 5), False, 4.0),
    "up3": ((1, 8, 3, 5), (5, 3), (3, 3), (1, 2), (2, 1, 3, 1), False, 9.0),
    "up4": ((1, 8, 3, 2), (5, 6), (4, 4), (1, 1), (3, 2, 2, 2), False, 9.0),
}
TRUE_ACTIVATIONS = {
    "linear": lambda v, alpha: v,
    "lrelu": F.leaky_relu,
    "swish": lambda v, alpha: F.silu(v),
}


def operands(y, dtype, scale=True, noise="per sample", strength=True, b=True):
    n, c, h, w = y.shape
    wide = accumulator(dtype)
    pixels = {"per sample": (n, h * w), "shared": (h * w,)}
    return (
        draw(6, (n, c), wide) if scale else None,
        draw(7, pixels[noise], wide) if noise else None,
        draw(8, (1,), wide) if noise and strength else None,
        draw(9, (c,), dtype) if b else None,
    )


def true_tail(u, tail, name):
    """v and gain * act(v) in float64."""
    n, c, h, w = u.shape
    v = u
    if tail.scale is not None:
        v = v * tail.scale.double().view(n, c, 1, 1)
    if tail.noise is not None:
        strength = 1 if tail.strength is None else tail.strength.double()
        v = v + strength * tail.noise.double().view(-1, 1, h, w)
    if tail.b is not None:
        v = v + tail.b.double().view(c, 1, 1)
    return v, tail.gain * TRUE_ACTIVATIONS[name](v, tail.alpha)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FUSED)
def test_forward_with_everything(name, layout):
    x, f, fir = setup(FUSED[name], EXACT, layout)
    u = truth(x, f, fir)
    tail = Tail(*operands(u, EXACT), ACTIVATIONS["lrelu"].code, 0.3, 1.3, 2.1)
    v, unclamped = true_tail(u, tail, "lrelu")
    y = poisoned(u, EXACT, layout)
    add = draw(10, u.shape, EXACT).contiguous(memory_format=LAYOUTS[layout])
    mask = torch.full((u.numel() // 4,), 0xAA, dtype=torch.uint8, device=DEVICE)
    kernels.upfirdn2d_forward(x, f, fir, y, add, mask, geometry_of(y), tail)
    assert_matches(y, unclamped.clamp(-2.1, 2.1) + add, reduction=reduction(f))
    assert torch.equal(mask, pack(v <= 0, unclamped.abs() > 2.1, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "scale, noise, strength, b, name, clamp",
    [
        (True, None, False, False, "linear", math.inf),
        (False, "per sample", True, False, "swish", 1.2),
        (False, "shared", False, True, "swish", math.inf),
        (True, "shared", True, True, "lrelu", 1.2),
        (False, None, False, False, "lrelu", 0.5),
        (True, "per sample", False, False, "linear", 2.0),
    ],
)
def test_any_operand_may_be_absent(scale, noise, strength, b, name, clamp, layout):
    """Of an image without whole units: no mask."""
    case = ((3, 5, 4, 3), (4, 4), (2, 2), (1, 1), (2, 2, 2, 1), False, 4.0)
    x, f, fir = setup(case, EXACT, layout)
    u = truth(x, f, fir)
    given = operands(u, EXACT, scale, noise, strength, b)
    tail = Tail(*given, ACTIVATIONS[name].code, 0.2, 0.7, clamp)
    y = poisoned(u, EXACT, layout)
    kernels.upfirdn2d_forward(x, f, fir, y, None, None, geometry_of(y), tail)
    _, unclamped = true_tail(u, tail, name)
    assert_matches(y, unclamped.clamp(-clamp, clamp), reduction=16)


def true_slope(dy, negative, clamped, slope):
    dy = dy.double()
    return torch.where(negative, slope * dy, dy).masked_fill(clamped, 0)


# The adjoints of upsampling, of downsampling and of neither; with crops, that read not every pixel.
MASKED = {
    "same": ((2, 8, 5, 8), (4, 4), (1, 1), (1, 1), (2, 1, 1, 2), True, 1.5),
    "down2": ((2, 8, 9, 8), (4, 4), (1, 1), (2, 2), (1, 1, 1, 2), True, 4.0),
    "up2": ((1, 8, 5, 8), (4, 4), (2, 2), (1, 1), (2, 2, 1, 2), False, 1.0),
    "down2 12": ((1, 16, 9, 8), (12,), (1, 1), (2, 2), (5, 5, 4, 5), False, 1.0),
    "cropped": ((2, 8, 9, 16), (3, 3), (1, 1), (1, 1), (-4, -3, -2, -3), False, 1.0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name, slope", [("same", 0.0), *((name, 0.3) for name in MASKED)])
def test_masked(name, slope, layout):
    dy, f, fir = setup(MASKED[name], EXACT, layout)
    n, c = dy.shape[:2]
    negative, clamped = (draw(seed, dy.shape, EXACT) > 0.3 for seed in (11, 12))
    gain, scale = -1.3, draw(13, (n, c), EXACT)
    dv = true_slope(gain * dy, negative, clamped, slope)
    expected = scale.double().view(n, c, 1, 1) * truth(dv, f, fir)
    dx = poisoned(expected, EXACT, layout)
    total = torch.full((c,), math.nan, dtype=accumulator(EXACT), device=DEVICE)
    # Where the factor is 0 the result is 0, whatever dy is.
    dropped = clamped | (negative & (slope == 0))
    dirty = dy.masked_fill(dropped, math.nan).contiguous(memory_format=LAYOUTS[layout])
    mask = pack(negative, clamped, layout)
    geometry = geometry_of(dy)
    kernels.upfirdn2d_masked(dirty, mask, dx, total, scale, f, fir, geometry, slope, gain)
    assert_matches(dx, expected, reduction=reduction(f))
    assert_matches(total, dv.sum((0, 2, 3)), reduction=dv[:, 0].numel())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_absent_mask_is_slope_one(layout):
    case = ((2, 3, 5, 7), (4, 4), (2, 2), (1, 1), (2, 1, 2, 1), False, 4.0)
    dy, f, fir = setup(case, EXACT, layout)
    expected = 0.7 * truth(dy, f, fir)
    dx = poisoned(expected, EXACT, layout)
    total = torch.full((3,), math.nan, dtype=accumulator(EXACT), device=DEVICE)
    geometry = geometry_of(dy)
    kernels.upfirdn2d_masked(dy, None, dx, total, None, f, fir, geometry, 0.2, 0.7)
    assert_matches(dx, expected, reduction=16)
    assert_matches(total, 0.7 * dy.double().sum((0, 2, 3)), reduction=70)
    kernels.upfirdn2d_masked(dy, None, dx, None, None, f, fir, geometry, 0.2, 0.7)
    assert_matches(dx, expected, reduction=16)


def test_gain_0_is_0_also_of_nan():
    dy = torch.full((1, 8, 2, 8), math.nan, dtype=EXACT, device=DEVICE)
    f, fir = draw(1, (3, 3), EXACT), Fir(1, 1, 1, 1, 1, 1, 1, 1, False, 1.0)
    dx, total = torch.full_like(dy, math.nan), torch.full((8,), math.nan, device=DEVICE)
    mask = torch.zeros(dy.numel() // 4, dtype=torch.uint8, device=DEVICE)
    kernels.upfirdn2d_masked(dy, mask, dx, total, None, f, fir, geometry_of(dy), 0.2, 0.0)
    assert not dx.any()
    assert not total.any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wave", [1, 3])
def test_sums_of_several_programs(layout, wave, monkeypatch):
    """With a small wave a program in 4 or 16 takes the sums of the others too."""
    monkeypatch.setattr(kernels, "WAVE", 10**9)
    monkeypatch.setattr(epilogue, "WAVE", wave)
    kernels._plan.cache_clear()
    case = ((5, 24, 2, 168), (2, 2), (1, 1), (1, 1), (1, 0, 0, 1), False, 1.0)
    dy, f, fir = setup(case, EXACT, layout)
    dx = poisoned(dy, EXACT, layout)
    total = torch.full((24,), math.nan, dtype=accumulator(EXACT), device=DEVICE)
    negative, clamped = (draw(seed, dy.shape, EXACT) > 0.3 for seed in (11, 12))
    dv = true_slope(dy, negative, clamped, 0.2)
    mask = pack(negative, clamped, layout)
    kernels.upfirdn2d_masked(dy, mask, dx, total, None, f, fir, geometry_of(dy), 0.2, 1.0)
    kernels._plan.cache_clear()
    assert_matches(dx, truth(dv, f, fir), reduction=4)
    assert_matches(total, dv.sum((0, 2, 3)), reduction=dv[:, 0].numel())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["same 4x4", "up2 4x4", "down2 12", "up and down", "long blur"])
def test_nan_spreads_to_the_outputs_it_touches(name, layout):
    """Through taps of value 0 too, and no further."""
    x, f, fir = setup(CASES[name], EXACT, layout)
    x[0, 1, 3, 2] = math.nan
    f = f.clone()
    f.view(-1)[1] = 0
    touched = truth(x.isnan(), torch.ones_like(f), fir._replace(gain=1.0)) > 0.5
    y = poisoned(touched, EXACT, layout)
    kernels.upfirdn2d_forward(x, f, fir, y)
    assert touched.any()
    assert torch.equal(y.isnan(), touched)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mask_needs_whole_units(layout):
    x = draw(1, (1, 6, 4, 6), EXACT).contiguous(memory_format=LAYOUTS[layout])
    fir = Fir(1, 1, 1, 1, 0, 0, 0, 0, False, 1.0)
    mask = torch.zeros(36, dtype=torch.uint8, device=DEVICE)
    tail = Tail(None, None, None, None, ACTIVATIONS["lrelu"].code, 0.2, 1.0, math.inf)
    geometry = geometry_of(x)
    with pytest.raises(ValueError, match=r"whole units of 8.* is 6"):
        kernels.upfirdn2d_forward(x, None, fir, torch.empty_like(x), None, mask, geometry, tail)
    with pytest.raises(ValueError, match=r"whole units of 8.* is 6"):
        kernels.upfirdn2d_masked(
            x, mask, torch.empty_like(x), None, None, None, fir, geometry, 0.2, 1.0
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["same", "up2 12"])
def test_offsets_of_64_bits_give_the_same(name, layout, monkeypatch):
    x, f, fir = setup(FUSED[name], EXACT, layout)
    u = truth(x, f, fir)
    tail = Tail(*operands(u, EXACT), ACTIVATIONS["lrelu"].code, 0.2, 1.4, 1.0)
    head = Tail(None, None, None, None, ACTIVATIONS["lrelu"].code, 0.2, 1.4, 1.0)

    def run():
        y, dx = poisoned(u, EXACT, layout), poisoned(u, EXACT, layout)
        mask = torch.zeros(u.numel() // 4, dtype=torch.uint8, device=DEVICE)
        kernels.upfirdn2d_forward(x, f, fir, y, None, mask, geometry_of(y), tail)
        total = torch.zeros(x.shape[1], dtype=accumulator(EXACT), device=DEVICE)
        kernels.upfirdn2d_masked(
            x, None, dx, total, None, f, fir, geometry_of(x), head.alpha, head.gain
        )
        return y, mask, dx, total

    narrow, plan = run(), kernels._plan
    monkeypatch.setattr(kernels, "_plan", lambda *a: plan(*a)._replace(WIDE=True))
    for a, b in zip(narrow, run()):
        assert torch.equal(a, b)


def plan_of(shape, strides=None, taps=(4, 4), up=1, down=1, pad=(1, 1, 1, 1), nhwc=False):
    fir = Fir(up, up, down, down, *pad, False, 1.0)
    strides = torch.empty(shape, device="meta").stride() if strides is None else strides
    out_size = fir.output_size(*shape[2:], (taps[-1], taps[0]))
    return kernels._plan(shape, strides, out_size, nhwc, taps, fir, 8)


def test_64_bits_are_chosen_in_time():
    assert not plan_of((2, 64, 1024, 1024)).WIDE
    assert plan_of((32, 64, 1024, 1024)).WIDE  # 2^31
    assert plan_of((8, 64, 1024, 1024), up=2, pad=(2, 1, 2, 1)).WIDE  # the output is
    assert not plan_of((2**4, 2**5, 2**10, 2**10), (0, 0, 0, 1), taps=(1025, 1)).WIDE
    assert plan_of((2, 2, 2, 8), (2**30, 2**29, 2**31, 1)).WIDE


def test_hot_filters_are_unrolled():
    shape = (32, 64, 256, 256)
    for nhwc in (False, True):
        for options in (
            dict(),
            dict(up=2, pad=(2, 1, 2, 1)),
            dict(up=2, pad=(1, 2, 1, 2)),
            dict(down=2),
        ):
            plan = plan_of(shape, nhwc=nhwc, **options)
            assert (plan.TAPS_Y, plan.TAPS_X, plan.COLS) == (4, 4, 2)
        plan = plan_of(shape, taps=(12,), up=2, pad=(6, 5, 6, 5), nhwc=nhwc)
        assert plan.TAPS_X == 12
