"""kernels/conv2d.py against PyTorch's conv2d in float64, in Triton's interpreter or on a GPU.

As in test_triton_kernels.py, bfloat16 is tested on a GPU only and float64 in the interpreter only.
"""

import itertools
import math
import os

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")

from stylegan_fast.activations import ACTIVATIONS  # noqa: E402
from stylegan_fast.backends import triton as backend  # noqa: E402
from stylegan_fast.backends.choice import FORWARD, WEIGHT_GRADIENT, ConvClass  # noqa: E402
from stylegan_fast.backends.geometry import Fir, Geometry, Tail  # noqa: E402
from stylegan_fast.ops.fir import whole_units  # noqa: E402
from stylegan_fast.testing import assert_matches  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a GPU", allow_module_level=True)

from stylegan_fast.kernels import conv2d as kernels  # noqa: E402

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
TILE = kernels.Config(16, 16, 16, 4, 2)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that images of a few pixels and channels have several tiles, the last of them ragged."""
    for name in ("_forward_configs", "_weight_gradient_configs"):
        monkeypatch.setattr(kernels, name, lambda *arguments: [TILE])


@pytest.fixture
def parts(monkeypatch):
    """Makes the sums be split, as they are for few programs on a large GPU."""
    monkeypatch.setattr(kernels, "_processors", lambda device: 60)
    monkeypatch.setattr(kernels, "_LEAST_STEPS", 1)
    for plan in (kernels._forward_plan, kernels._weight_gradient_plan):
        plan.cache_clear()
    yield
    for plan in (kernels._forward_plan, kernels._weight_gradient_plan):
        plan.cache_clear()


# name: (shape of x, shape of w, up, down, padding, flip_filter)
CASES = {
    "3x3": ((2, 17, 4, 5), (18, 17, 3, 3), 1, 1, (1, 1, 1, 1), True),
    "3x3 rotated": ((2, 5, 7, 4), (3, 5, 3, 3), 1, 1, (1, 1, 1, 1), False),
    "1x1": ((2, 33, 3, 4), (18, 33, 1, 1), 1, 1, (0, 0, 0, 0), True),
    "valid 2x4": ((1, 3, 6, 9), (17, 3, 2, 4), 1, 1, (0, 0, 0, 0), True),
    "cropped": ((2, 4, 8, 7), (5, 4, 3, 3), 1, 1, (-1, -2, -3, 1), True),
    "padding beyond the image": ((1, 2, 2, 3), (3, 2, 3, 2), 1, 1, (3, 2, 1, 4), False),
    "down2": ((2, 17, 5, 6), (6, 17, 3, 3), 1, 2, (0, 1, 1, 0), True),
    "down2 rotated 4x6": ((1, 4, 6, 7), (5, 4, 4, 6), 1, 2, (2, 2, 1, 1), False),
    "up2": ((2, 18, 2, 3), (17, 18, 3, 3), 2, 1, (2, 1, 1, 2), True),
    "up2 6x6": ((1, 3, 4, 3), (5, 3, 6, 6), 2, 1, (3, 2, 3, 2), False),
    "up2 1x1": ((2, 3, 3, 4), (4, 3, 1, 1), 2, 1, (0, 0, 0, 1), True),
    "up2 cropped": ((1, 3, 5, 6), (4, 3, 3, 3), 2, 1, (-3, 0, -2, -1), True),
    "up2 down2": ((2, 3, 5, 4), (4, 3, 4, 3), 2, 2, (1, 0, 2, 1), True),
    "one pixel": ((2, 3, 1, 1), (3, 3, 3, 3), 1, 1, (1, 1, 1, 1), True),
    "one channel": ((2, 1, 5, 4), (1, 1, 3, 3), 1, 1, (1, 1, 1, 1), True),
}


def draw(seed, shape, dtype=EXACT):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def setup(name, dtype=EXACT, layout="nhwc"):
    """x, w, conv and pre of a case."""
    shape, w_shape, up, down, padding, flip = CASES[name]
    x = draw(1, shape, dtype).contiguous(memory_format=LAYOUTS[layout])
    pre = draw(3, shape[:2], accumulator(dtype))
    return x, draw(2, w_shape, dtype), Fir(up, up, down, down, *padding, flip, 1.0), pre


def truth(x, w, conv, pre=None):
    """C(pre * x; w) in float64, differentiable; each sample with its own w where they are five."""
    x, w = x.double(), w.double()
    if pre is not None:
        x = x * pre.double()[:, :, None, None]
    n, c, height, width = x.shape
    stuffed = x.new_zeros(n, c, height * conv.up_y, width * conv.up_x)
    stuffed[:, :, :: conv.up_y, :: conv.up_x] = x
    padded = F.pad(stuffed, (conv.x0, conv.x1, conv.y0, conv.y1))
    w = w if conv.flip_filter else w.flip(-1, -2)
    each = w if w.ndim == 5 else [w] * n
    return torch.cat([F.conv2d(padded[i : i + 1], each[i], stride=conv.down_y) for i in range(n)])


def terms(w):
    return w[..., 0, :, :, :].numel() // (len(w) if w.ndim == 5 else 1)


def poisoned(like, dtype=EXACT, layout="nhwc"):
    y = torch.full(like.shape, math.nan, dtype=dtype, device=DEVICE)
    return y.contiguous(memory_format=LAYOUTS[layout])


def geometry_of(y):
    n, c, h, w = y.shape
    return Geometry(n, c, h * w, h * w) if y.is_contiguous() else Geometry(n * h * w, c, 1, h * w)


def pack(negative, clamped, layout):
    """The mask of two bit images."""
    weights = 1 << torch.arange(8, device=DEVICE)
    units = [
        (bits.permute(0, 2, 3, 1) if layout == "nhwc" else bits).reshape(-1, 8) * weights
        for bits in (negative, clamped)
    ]
    return torch.stack([unit.sum(1) for unit in units], 1).flatten().to(torch.uint8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_every_geometry(name, layout):
    x, w, conv, pre = setup(name, layout=layout)
    expected = truth(x, w, conv, pre)
    y = poisoned(expected, layout=layout)
    assert tuple(y.shape[2:]) == conv.output_size(*x.shape[2:], tuple(w.shape[:1:-1]))
    kernels.conv2d_forward(x, w, conv, y, pre)
    assert_matches(y, expected, reduction=terms(w))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["3x3", "down2 rotated 4x6", "up2", "1x1"])
def test_weights_of_each_sample(name, layout):
    """In any order of dimensions."""
    x, w, conv, _ = setup(name, layout=layout)
    w = draw(4, (x.shape[0], w.shape[1], w.shape[0], *w.shape[2:])).transpose(1, 2)
    expected = truth(x, w, conv)
    y = poisoned(expected, layout=layout)
    kernels.conv2d_forward(x, w, conv, y)
    assert_matches(y, expected, reduction=terms(w))


WEIGHTS = {
    "contiguous": lambda w: w,
    "in channels last": lambda w: w.movedim(-3, -1).contiguous().movedim(-1, -3),
    "out channels last": lambda w: w.movedim(-4, -1).contiguous().movedim(-1, -4),
    "transposed kernel": lambda w: w.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda w: torch.stack([w, w], 2)[:, :, 1],
}


@pytest.mark.parametrize("order", WEIGHTS)
def test_weights_in_any_order(order):
    """Of channels in whole vectors."""
    x, w = draw(1, (2, 24, 3, 4)), draw(2, (16, 24, 3, 2))
    x = x.contiguous(memory_format=torch.channels_last)
    conv = Fir(1, 1, 1, 1, 1, 0, 1, 1, True, 1.0)
    expected = truth(x, w, conv)
    y = poisoned(expected)
    kernels.conv2d_forward(x, WEIGHTS[order](w), conv, y)
    assert_matches(y, expected, reduction=terms(w))


# name: (shape of x, rows of a tile, up, padding); rows of the image, several of them, all of it
BOXES = {
    "a row": ((2, 24, 2, 16), 16, 1, (1, 1, 1, 1)),
    "a part of a row": ((1, 8, 2, 32), 16, 1, (2, 0, 0, 2)),
    "two rows": ((2, 8, 6, 8), 16, 1, (1, 1, 1, 1)),
    "an image": ((3, 8, 4, 4), 16, 1, (1, 1, 1, 1)),
    "rows of a phase": ((1, 16, 3, 8), 16, 2, (1, 1, 2, 1)),
}


@pytest.mark.skipif(
    kernels.TensorDescriptor is None
    or not (INTERPRETED or kernels._has_boxes(torch.device(DEVICE))),
    reason="this Triton or this GPU has no boxes",
)
@pytest.mark.parametrize("order, each", [("in channels last", True), ("out channels last", False)])
@pytest.mark.parametrize("name", BOXES)
def test_boxes_load_the_same(name, order, each, monkeypatch):
    shape, rows, up, padding = BOXES[name]
    config = kernels.Config(rows, 16, 16, 4, 2, boxes=True)
    monkeypatch.setattr(kernels, "_forward_configs", lambda *arguments: [config])
    x = draw(1, shape).contiguous(memory_format=torch.channels_last)
    pre = draw(3, shape[:2])
    conv = Fir(up, up, 1, 1, *padding, False, 1.0)
    w = WEIGHTS[order](draw(2, (*shape[:each], 24, shape[1], 3, 3)))
    expected = truth(x, w, conv, pre)
    y = poisoned(expected)
    assert kernels._box(kernels._problem(x, y, conv, 3, 3), rows) is not None
    kernels.conv2d_forward(x, w, conv, y, pre)
    assert_matches(y, expected, reduction=terms(w))


STRIDED = {
    "expanded batch": lambda x: x[:1].expand(3, -1, -1, -1),
    "sliced": lambda x: x[:, ::2, 1::2, 2:],
    "CNHW": lambda x: x.transpose(0, 1),
    "sliced NHWC": lambda x: x.contiguous(memory_format=torch.channels_last)[:, 3:, :, 1:],
}


@pytest.mark.parametrize("name", STRIDED)
def test_any_strides_of_x(name):
    x = STRIDED[name](draw(5, (2, 11, 7, 8)))
    w, conv = draw(6, (5, x.shape[1], 3, 3)), Fir(1, 1, 2, 2, 1, 1, 1, 0, True, 1.0)
    expected = truth(x, w, conv)
    y, dw = poisoned(expected), poisoned(w, layout="nchw")
    kernels.conv2d_forward(x, w, conv, y)
    assert_matches(y, expected, reduction=terms(w))
    kernels.conv2d_weight_gradient(x, expected, conv, dw)
    assert_matches(dw, true_weight_gradient(x, w, conv, expected), reduction=60)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name, layout", [("3x3", "nchw"), ("down2", "nhwc"), ("up2", "nhwc")])
def test_every_dtype(name, layout, dtype):
    """With an added tensor."""
    x, w, conv, pre = setup(name, dtype, layout)
    expected = truth(x, w, conv, pre)
    y = poisoned(expected, dtype, layout)
    add = draw(7, expected.shape, dtype).contiguous(memory_format=LAYOUTS[layout])
    kernels.conv2d_forward(x, w, conv, y, pre, add)
    assert_matches(y, expected + add.double(), reduction=terms(w))


def test_16_bits_round_once():
    """1 + 2^-11 is a tie that rounds to 1; with 2^-20 of the added tensor it rounds up."""
    x = torch.ones(1, 2, 1, 8, dtype=torch.float16, device=DEVICE)
    w = torch.tensor([1, 2**-11], dtype=torch.float16, device=DEVICE).view(1, 2, 1, 1)
    conv = Fir(1, 1, 1, 1, 0, 0, 0, 0, True, 1.0)
    y = torch.empty_like(x[:, :1])
    kernels.conv2d_forward(x, w, conv, y)
    assert (y == 1).all()
    kernels.conv2d_forward(x, w, conv, y, None, torch.full_like(y, 2**-20))
    assert (y == 1 + 2**-10).all()


# Shapes whose output has whole units, in the layouts that a mask allows.
FUSED = {
    "same": ((3, 5, 2, 4), (24, 5, 3, 3), 1, 1, (1, 1, 1, 1), True),
    "many pixels": ((2, 4, 8, 17), (8, 4, 1, 1), 1, 1, (0, -1, 0, 0), True),
    "down2": ((2, 17, 4, 8), (8, 17, 3, 3), 1, 2, (0, 1, 1, 0), True),
    "up2": ((1, 5, 4, 3), (16, 5, 3, 3), 2, 1, (2, 1, 1, 2), False),
}
FUSED_LAYOUTS = [(name, layout) for name in FUSED for layout in LAYOUTS]
FUSED_LAYOUTS.remove(("up2", "nchw"))
CASES |= {f"fused {name}": case for name, case in FUSED.items()}
TRUE_ACTIVATIONS = {
    "linear": lambda v, alpha: v,
    "lrelu": F.leaky_relu,
    "swish": lambda v, alpha: F.silu(v),
}


def operands(y, dtype=EXACT, scale=True, noise="per sample", strength=True, b=True):
    n, c, h, w = y.shape
    wide = accumulator(dtype)
    pixels = {"per sample": (n, h * w), "shared": (h * w,)}
    return (
        draw(8, (n, c), wide) if scale else None,
        draw(9, pixels[noise], wide) if noise else None,
        draw(10, (1,), wide) if noise and strength else None,
        draw(11, (c,), dtype) if b else None,
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


def check_everything(name, layout):
    """E with all its parts, a mask and an added tensor; returns y and the mask."""
    x, w, conv, pre = setup(f"fused {name}", layout=layout)
    u = truth(x, w, conv, pre)
    tail = Tail(*operands(u), ACTIVATIONS["lrelu"].code, 0.3, 1.3, 2.1)
    v, unclamped = true_tail(u, tail, "lrelu")
    y = poisoned(u, layout=layout)
    add = draw(12, u.shape).contiguous(memory_format=LAYOUTS[layout])
    mask = torch.full((u.numel() // 4,), 0xAA, dtype=torch.uint8, device=DEVICE)
    kernels.conv2d_forward(x, w, conv, y, pre, add, mask, geometry_of(y), tail)
    assert_matches(y, unclamped.clamp(-2.1, 2.1) + add, reduction=terms(w))
    assert torch.equal(mask, pack(v <= 0, unclamped.abs() > 2.1, layout))
    return y, mask


@pytest.mark.parametrize("name, layout", FUSED_LAYOUTS)
def test_forward_with_everything(name, layout):
    check_everything(name, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "scale, noise, strength, b, name, clamp",
    [
        (True, None, False, False, "linear", math.inf),
        (False, "per sample", True, False, "swish", 1.2),
        (False, "shared", False, True, "swish", math.inf),
        (True, "shared", True, True, "lrelu", 1.2),
        (False, None, False, False, "lrelu", 0.5),
    ],
)
def test_any_operand_may_be_absent(scale, noise, strength, b, name, clamp, layout):
    """Of an image without whole units: no mask."""
    x, w, conv, _ = setup("up2 6x6", layout=layout)
    u = truth(x, w, conv)
    given = operands(u, EXACT, scale, noise, strength, b)
    tail = Tail(*given, ACTIVATIONS[name].code, 0.2, 0.7, clamp)
    y = poisoned(u, layout=layout)
    kernels.conv2d_forward(x, w, conv, y, None, None, None, geometry_of(y), tail)
    _, unclamped = true_tail(u, tail, name)
    assert_matches(y, unclamped.clamp(-clamp, clamp), reduction=terms(w))


@pytest.mark.parametrize("name, layout", [c for c in FUSED_LAYOUTS if c[0] != "many pixels"])
def test_sums_in_parts(name, layout, parts):
    """The same, and the same every time."""
    x, w, conv, _ = setup(f"fused {name}", layout=layout)
    problem = kernels._problem(x, truth(x, w, conv), conv, *w.shape[2:])
    assert kernels._forward_plan(problem, TILE, False, 60).parts > 1
    first, second = check_everything(name, layout), check_everything(name, layout)
    assert torch.equal(first[0], second[0])


def true_weight_gradient(x, w, conv, dy, pre=None, post=None):
    w = w.double().requires_grad_()
    dy = dy.double() if post is None else dy.double() * post.double()[:, :, None, None]
    return torch.autograd.grad(truth(x, w, conv, pre), w, dy)[0]


def check_weight_gradient(name, layout, dtype=EXACT, scaled=True):
    x, w, conv, pre = setup(name, dtype, layout)
    dy = draw(13, truth(x, w, conv).shape, dtype).contiguous(memory_format=LAYOUTS[layout])
    post = draw(14, dy.shape[:2], accumulator(dtype))
    pre, post = (pre, post) if scaled else (None, None)
    dw = poisoned(w, accumulator(dtype), layout)
    kernels.conv2d_weight_gradient(x, dy, conv, dw, pre, post)
    if dtype.itemsize == 2:  # what the tensor cores multiply
        x, dy = (
            t if s is None else (t.float() * s[:, :, None, None]).to(dtype)
            for t, s in ((x, pre), (dy, post))
        )
        pre = post = None
    expected = true_weight_gradient(x, w, conv, dy, pre, post)
    assert_matches(dw, expected, reduction=dy[:, 0].numel())
    return dw


@pytest.mark.parametrize(
    "name, layout",
    [(name, "nhwc") for name in CASES] + [(name, "nchw") for name in ("3x3", "down2", "up2")],
)
def test_weight_gradient(name, layout):
    check_weight_gradient(name, layout)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["up2"])
def test_weight_gradient_of_every_dtype(name, dtype, scaled):
    check_weight_gradient(name, "nhwc", dtype, scaled)


@pytest.mark.parametrize("name, layout", [("up2", "nhwc"), ("fused many pixels", "nchw")])
def test_weight_gradient_in_parts(name, layout, parts):
    """The same every time."""
    x, w, conv, _ = setup(name, layout=layout)
    problem = kernels._problem(x, truth(x, w, conv), conv, *w.shape[2:])
    assert kernels._weight_gradient_plan(problem, TILE, 60).parts > 1
    assert torch.equal(check_weight_gradient(name, layout), check_weight_gradient(name, layout))


@pytest.mark.parametrize("name", ["3x3", "up2", "down2"])
def test_nan_spreads_to_the_outputs_it_touches(name):
    """Through weights of value 0 too, and no further."""
    x, w, conv, pre = setup(name)
    x[0, 1, 1, 2] = math.nan
    w.view(-1)[0] = 0
    touched = truth(x.isnan(), torch.ones_like(w), conv) > 0.5
    y = poisoned(touched)
    kernels.conv2d_forward(x, w, conv, y, pre)
    assert touched.any() and not touched.all()
    assert torch.equal(y.isnan(), touched)


@pytest.mark.parametrize(
    "layout, message", [("nhwc", r"channels .* is 6"), ("nchw", r"pixels .* is 20")]
)
def test_a_mask_needs_whole_units(layout, message):
    x = draw(1, (1, 6, 4, 5)).contiguous(memory_format=LAYOUTS[layout])
    w, conv = draw(2, (6, 6, 1, 1)), Fir(1, 1, 1, 1, 0, 0, 0, 0, True, 1.0)
    mask = torch.zeros(30, dtype=torch.uint8, device=DEVICE)
    tail = Tail(None, None, None, None, ACTIVATIONS["lrelu"].code, 0.2, 1.0, math.inf)
    with pytest.raises(ValueError, match=f"whole units of 8.*{message}"):
        kernels.conv2d_forward(
            x, w, conv, torch.empty_like(x), None, None, mask, geometry_of(x), tail
        )


@pytest.mark.parametrize("name, layout", [("same", "nchw"), ("up2", "nhwc")])
@pytest.mark.parametrize("in_parts", [False, True])
def test_offsets_of_64_bits_give_the_same(name, layout, in_parts, monkeypatch, request):
    if in_parts:
        request.getfixturevalue("parts")
    narrow = *check_everything(name, layout), check_weight_gradient(f"fused {name}", layout)
    problem = kernels._problem
    monkeypatch.setattr(kernels, "_problem", lambda *a: problem(*a)._replace(WIDE=True))
    wide = *check_everything(name, layout), check_weight_gradient(f"fused {name}", layout)
    for a, b in zip(narrow, wide):
        assert torch.equal(a, b)


def problem_of(x_shape, out_channels, up=1, down=1):
    x = torch.empty(x_shape, device="meta").contiguous(memory_format=torch.channels_last)
    conv = Fir(up, up, down, down, 1, 1, 1, 1, True, 1.0)
    size = conv.output_size(*x_shape[2:], (3, 3))
    y = torch.empty((x_shape[0], out_channels, *size), device="meta")
    return kernels._problem(x, y.contiguous(memory_format=torch.channels_last), conv, 3, 3)


def test_64_bits_are_chosen_in_time():
    assert not problem_of((16, 64, 1024, 1024), 64).WIDE
    assert problem_of((32, 64, 1024, 1024), 32).WIDE  # 2^31
    assert problem_of((32, 32, 1024, 1024), 64).WIDE
    assert problem_of((8, 64, 1024, 1024), 64, up=2).WIDE


def test_tf32_where_pytorch_allows_it(monkeypatch):
    x = draw(1, (1, 3, 2, 4), torch.float32)
    conv = Fir(1, 1, 1, 1, 0, 0, 0, 0, True, 1.0)
    assert kernels._problem(x, x, conv, 1, 1).PRECISION == "ieee"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert kernels._problem(x, x, conv, 1, 1).PRECISION == "tf32"
    assert kernels._problem(x.half(), x.half(), conv, 1, 1).PRECISION == "ieee"


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="an older PyTorch")
def test_tf32_by_the_newer_setting():
    """Beside which the older one may not be read."""
    x = draw(1, (1, 3, 2, 4), torch.float32)
    conv = Fir(1, 1, 1, 1, 0, 0, 0, 0, True, 1.0)
    try:
        for precision in ("tf32", "ieee"):
            torch.backends.cudnn.conv.fp32_precision = precision
            found = kernels._problem(x, x, conv, 1, 1).PRECISION
            assert found == precision
    finally:
        torch.backends.cudnn.allow_tf32 = False


SIZES = [(8, 512, 512, 4), (32, 512, 512, 64), (8, 128, 64, 256), (8, 32, 3, 1024), (3, 33, 40, 17)]


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("samples, channels, out_channels, size", SIZES)
def test_configurations(samples, channels, out_channels, size, itemsize, monkeypatch):
    """Tiles no larger than the product, each once; boxes first, where a tile is a box of x."""
    monkeypatch.undo()
    problem = problem_of((samples, channels, size, size), out_channels)
    for may_use_boxes, writes_mask in itertools.product([False, True], repeat=2):
        configs = kernels._forward_configs(problem, itemsize, may_use_boxes, writes_mask)
        assert len(set(configs)) == len(configs) <= 5
        boxes = [config.boxes for config in configs]
        assert boxes == sorted(boxes, reverse=True) and not boxes[-1]
        assert boxes[0] == (may_use_boxes and size >= 64)
        for config in (*configs, *kernels._weight_gradient_configs(problem, itemsize)):
            assert all(n >= 16 and n & (n - 1) == 0 for n in config[:3])
            assert config.cols < 2 * max(channels, out_channels, 16)
            assert config.rows * config.cols <= 128 * 32 * config.warps
            assert not (config.boxes and kernels._box(problem, config.rows) is None)
            assert not (writes_mask and config.cols > 128)


def test_small_layers_fill_the_processors():
    """Tiles span images of 4x4 and 8x8 pixels; the sum is split until there are enough programs."""
    for resolution, samples in ((4, 1), (4, 8), (8, 4), (16, 2)):
        problem = problem_of((samples, 512, resolution, resolution), 512)
        plan = kernels._forward_plan(problem, kernels.Config(64, 64, 64, 4, 4), False, 132)
        assert plan.per_image == (resolution > 4 or samples == 0)
        assert 66 < plan.grid[0] * plan.grid[1] <= 132
    large = problem_of((8, 512, 64, 64), 512)
    plan = kernels._forward_plan(large, kernels.Config(128, 128, 64, 8, 3), False, 132)
    assert plan == ((8 * 32 * 4, 1), 1, True)


def a_class(direction=FORWARD, shape=(8, 64, 128, 128), kernel=3, out_channels=64, **changes):
    """float16 in NHWC unless the changes say otherwise."""
    n, channels, height, width = shape
    image = (n, channels, out_channels, height, width)
    call = ConvClass(direction, torch.float16, True, *image, kernel, kernel, 1, 1, 1, 1)
    return call._replace(**changes)


PREFERRED = {
    "a layer of 64 channels": {},
    "many channels, few pixels": dict(shape=(4, 512, 16, 16), out_channels=512),
    "many channels, up": dict(shape=(8, 512, 64, 64), out_channels=256, up=2),
    "few channels, up, with the filter": dict(kernel=6, out_channels=32, up=2),
    "to RGB": dict(kernel=1, out_channels=3),
    "from RGB": dict(shape=(8, 3, 128, 128), kernel=1),
    "gradient of the weight": dict(direction=WEIGHT_GRADIENT),
}
LEFT_TO_PYTORCH = {
    "float32": dict(dtype=torch.float32),
    "not channels_last": dict(channels_last=False),
    "not 8 channels": dict(out_channels=33),
    "arithmetic is all": dict(shape=(8, 512, 64, 64), out_channels=512),
    "many channels, up, with the filter": dict(kernel=6, out_channels=64, up=2),
}
REFUSED = {
    "no kernel for torch.int32": dict(dtype=torch.int32),
    "up and down of 1 or 2": dict(up=3),
    "for channels_last": dict(up=2, channels_last=False),
}


@pytest.mark.parametrize("name", PREFERRED)
def test_preferred(name):
    call = a_class(**PREFERRED[name])
    assert backend.conv2d_refusal(call) is None
    assert backend.conv2d_preferred(call)


@pytest.mark.parametrize("name", LEFT_TO_PYTORCH)
def test_left_to_pytorch(name):
    call = a_class(**LEFT_TO_PYTORCH[name])
    assert backend.conv2d_refusal(call) is None
    assert not backend.conv2d_preferred(call)


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason):
    assert reason in backend.conv2d_refusal(a_class(**REFUSED[reason]))


def test_what_the_kernels_refuse_for_its_mask_never_reaches_them():
    for shape, layout, up in itertools.product(
        [(1, 8, 3, 5), (1, 3, 2, 4), (1, 8, 4, 4), (1, 6, 3, 3)], LAYOUTS, (1, 2)
    ):
        x = torch.empty(shape, dtype=EXACT, device="meta")
        x = x.contiguous(memory_format=LAYOUTS[layout])
        conv = Fir(up, up, 1, 1, 0, up - 1, 0, up - 1, True, 1.0)
        y = torch.empty((*shape[:2], up * shape[2], up * shape[3]), dtype=EXACT, device="meta")
        y = y.contiguous(memory_format=LAYOUTS[layout])
        try:
            kernels._check_units(kernels._problem(x, y, conv, 1, 1))
            raised = False
        except ValueError:
            raised = True
        call = ConvClass.of(FORWARD, x, shape[1], (1, 1), conv)
        refused = backend.conv2d_refusal(call) is not None or not whole_units(y)
        assert refused or not raised, (shape, layout, up)
