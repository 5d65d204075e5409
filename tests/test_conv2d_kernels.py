"""The CPU's Winograd convolution against PyTorch's in float64, for every SIMD level and layout."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from stylegan_fast import backends
from stylegan_fast.activations import ACTIVATIONS
from stylegan_fast.backends import cpu, native
from stylegan_fast.backends.choice import FORWARD, WEIGHT_GRADIENT, ConvClass
from stylegan_fast.backends.geometry import Fir, Geometry, Tail
from stylegan_fast.testing import tolerance

pytestmark = pytest.mark.skipif(
    backends.unavailable("cpu") is not None, reason="the cpu backend is not built"
)

NCHW, NHWC = torch.contiguous_format, torch.channels_last
LAYOUTS = list(itertools.product([NCHW, NHWC], repeat=2))
EPS = torch.finfo(torch.float32).eps

AMPLIFICATION = 31.6
"""What rounding errors of the products grow by on the way to the output, on the root mean square.

Along one axis the output y_k = sum over j of A[k,j] (G w)_j (B x)_j has the variance
sum over j of A[k,j]² |G[j]|² |B[j]|² for independent weights and pixels of variance 1. For the
points 0, 1, -1, 1/2, -2 and infinity that is 31.3 for k = 0 and 3, of which 28 cancel for a direct
sum of 3 terms; with a stride, for two taps and 0, 1, -1, 2 and infinity, 31.6 for k = 3. Two axes
square it: a standard deviation of 31.6 for each channel."""


def limit(x, w):
    """Largest error of the convolution of I channels, for operands of these magnitudes.

    A rounding to nearest has a standard deviation of 0.29 eps. Those of the partial sums over the
    channels, which grow as their square root, add up to 0.2 I eps, the about 25 of the transforms
    to 1.5 sqrt(I) eps; among a million outputs the largest is five times that.
    """
    rms = x.double().square().mean().sqrt() * w.double().square().mean().sqrt()
    channels = x.shape[1]
    return (channels + 8 * math.sqrt(channels)) * AMPLIFICATION * EPS * rms.item()


@pytest.fixture(params=native.load()[0].simd_levels() if native.load()[0] else [])
def level(request):
    module = native.module()
    widest = module.simd_level()
    module.set_simd_level(request.param)
    yield request.param
    module.set_simd_level(widest)


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def reference(x, w, conv):
    n, c, height, width = x.shape
    up = conv.up_x
    z = x.new_zeros(n, c, height, up, width, up)
    z[:, :, :, 0, :, 0] = x
    z = F.pad(z.reshape(n, c, height * up, width * up), (conv.x0, conv.x1, conv.y0, conv.y1))
    return F.conv2d(z, w if conv.flip_filter else w.flip(2, 3), stride=conv.down_x)


def geometry(y):
    n, c, height, width = y.shape
    if y.is_contiguous():
        return Geometry(n, c, height * width, height * width)
    return Geometry(n * height * width, c, 1, height * width)


# I, O and image; kernel, up, down and padding (left, right, top, bottom).
IMAGES = {
    "one channel": (2, 1, 3, 5, 9),
    "many tiles": (1, 3, 16, 33, 71),
    "tiles of two samples in a vector": (3, 16, 33, 8, 11),
    "blocks of channels": (2, 33, 48, 7, 18),
    "weights of their own": (1, 48, 70, 4, 6),
}
KERNELS = {
    "same": ((3, 3), 1, 1, (1, 1, 1, 1)),
    "valid": ((3, 3), 1, 1, (0, 0, 0, 0)),
    "one tap": ((1, 1), 1, 1, (0, 0, 0, 0)),
    "uneven": ((2, 3), 1, 1, (2, 1, 0, 2)),
    "cropped": ((3, 3), 1, 1, (-1, 2, 1, -1)),
    "up": ((3, 3), 2, 1, (2, 1, 2, 1)),
    "up, even": ((3, 3), 2, 1, (2, 0, 2, 0)),
    "up, cropped": ((3, 3), 2, 1, (-2, 3, 4, 0)),
    "up, uneven": ((2, 3), 2, 1, (0, 3, 2, 1)),
    "down": ((3, 3), 1, 2, (0, 0, 0, 0)),
    "down, cropped": ((3, 3), 1, 2, (-1, 2, 1, 2)),
    "down, uneven": ((3, 2), 1, 2, (1, 0, 0, 1)),
}


def operands(image, kernel, layouts, correlate=True):
    n, i, o, height, width = IMAGES[image]
    size, up, down, padding = KERNELS[kernel]
    conv = Fir(up, up, down, down, *padding, correlate, 1.0)
    x = torch.randn(n, i, height, width).contiguous(memory_format=layouts[0])
    y = torch.empty(n, o, *conv.output_size(height, width, size[::-1]))
    return conv, x, torch.randn(o, i, *size), y.contiguous(memory_format=layouts[1])


@pytest.mark.parametrize("layouts", LAYOUTS, ids=["c-c", "c-l", "l-c", "l-l"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("image", IMAGES)
def test_the_convolution(image, kernel, layouts, level):
    conv, x, w, y = operands(image, kernel, layouts, correlate=layouts[0] == NCHW)
    cpu.conv2d_forward(x, w, conv, y)
    expected = reference(x.double(), w.double(), conv)
    assert (y - expected).abs().max() <= limit(x, w)


@pytest.mark.parametrize("kernel", ["same", "up", "down"])
@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["NCHW", "NHWC"])
def test_scaled_channels_and_the_epilogue(kernel, layout, level, threads):
    image = "tiles of two samples in a vector"
    conv, x, w, y = operands(image, kernel, (layout, layout))
    n, o, height, width = y.shape
    pre, scale = torch.rand(n, x.shape[1]), 1 + torch.rand(n, o)
    noise, strength, b = torch.randn(n, height * width), torch.tensor([0.7]), torch.randn(o)
    lrelu = ACTIVATIONS["lrelu"]
    gain, clamp = 1.3, 20.0
    add = torch.randn_like(y)
    tail = Tail(scale, noise, strength, b, lrelu.code, 0.2, gain, clamp)
    cpu.conv2d_forward(x, w, conv, y, pre=pre, add=add, geometry=geometry(y), tail=tail)

    doubles = [t.double() for t in (x, w, pre, scale, noise, strength, b, add)]
    x64, w64, pre64, scale64, noise64, strength64, b64, add64 = doubles
    u = reference(x64 * pre64[:, :, None, None], w64, conv)
    v = scale64[:, :, None, None] * u + (strength64 * noise64).reshape(n, 1, height, width)
    v = v + b64[:, None, None]
    expected = (gain * F.leaky_relu(v, 0.2)).clamp(-clamp, clamp) + add64
    assert (expected - add64).abs().max() == clamp
    allowed = 2 * gain * limit(x, w) + tolerance(torch.float32, 1, clamp)
    assert (y - expected).abs().max() <= allowed


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize(
    ("kernel", "image"), [("same", (6, 24)), ("up, even", (6, 24)), ("down", (7, 49))]
)
def test_the_mask(kernel, image, layout, level):
    size, up, down, padding = KERNELS[kernel]
    conv = Fir(up, up, down, down, *padding, True, 1.0)
    x = torch.randn(2, 5, *image).contiguous(memory_format=layout)
    w, b = torch.randn(40, 5, *size), torch.randn(40)
    y = torch.empty(2, 40, *conv.output_size(*image, size)).contiguous(memory_format=layout)
    mask = torch.full((y.numel() // 4,), 255, dtype=torch.uint8)
    clamp = 5.0
    tail = Tail(None, None, None, b, ACTIVATIONS["relu"].code, 0.0, 1.0, clamp)
    cpu.conv2d_forward(x, w, conv, y, mask=mask, geometry=geometry(y), tail=tail)

    v = reference(x.double(), w.double(), conv) + b.double()[:, None, None]
    v = (v if layout == NCHW else v.permute(0, 2, 3, 1)).flatten()
    bits = (mask.reshape(-1, 2, 1) >> torch.arange(8, dtype=torch.uint8)) & 1
    near = limit(x, w)
    for bit, positive in ((bits[:, 0], -v), (bits[:, 1], v - clamp)):
        sure = positive.abs() > near
        assert sure.float().mean() > 0.99
        assert torch.equal(bit.flatten()[sure] == 1, positive[sure] > 0)


@pytest.mark.parametrize("layouts", LAYOUTS, ids=["c-c", "c-l", "l-c", "l-l"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("image", IMAGES)
def test_the_gradient_of_the_weight(image, kernel, layouts, level):
    """Its sum is over tiles, its transforms are the forward's transposed: errors grow by as much,
    16 pixels to a tile."""
    conv, x, w, dy = operands(image, kernel, layouts, correlate=layouts[0] == NCHW)
    dy.normal_()
    pre, post = torch.rand(x.shape[:2]), torch.rand(dy.shape[:2])
    dw = torch.empty_like(w)
    cpu.conv2d_weight_gradient(x, dy, conv, dw, pre=pre, post=post)
    z, dz = (t.double() * s.double()[:, :, None, None] for t, s in ((x, pre), (dy, post)))
    w64 = w.double().requires_grad_()
    (expected,) = torch.autograd.grad(reference(z, w64, conv), w64, dz)
    assert cpu.conv2d_refusal(call(x, w, conv)._replace(direction=WEIGHT_GRADIENT)) is None
    pixels = math.prod(dy.shape[2:]) * len(dy)
    rms = x.double().square().mean().sqrt() * dy.double().square().mean().sqrt()
    allowed = (pixels / 16 + 8 * math.sqrt(pixels / 16 + 1)) * 4 * AMPLIFICATION * EPS * rms
    assert (dw - expected).abs().max() <= allowed


def test_weights_and_images_of_any_strides(level):
    """The input gradient's weight is a transposed view; its geometry the adjoint one."""
    conv, x, w, y = operands("blocks of channels", "same", (NCHW, NCHW))
    seen = torch.randn(w.shape[1], 3, w.shape[0], 3).permute(2, 0, 1, 3)
    cpu.conv2d_forward(x, seen, conv, y)
    expected = reference(x.double(), seen.double(), conv)
    assert (y - expected).abs().max() <= limit(x, seen)


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("channels", [64, 320])
def test_enough_work_for_threads(channels, layout, threads):
    """Both ways to share it: tiles, and where there are many channels those of the output."""
    side = 40 if channels == 64 else 17
    conv = Fir(1, 1, 1, 1, 1, 1, 1, 1, True, 1.0)
    x = torch.randn(2, channels, side, side).contiguous(memory_format=layout)
    w, y = torch.randn(channels, channels, 3, 3), torch.empty_like(x)
    cpu.conv2d_forward(x, w, conv, y)
    assert (y - reference(x.double(), w.double(), conv)).abs().max() <= limit(x, w)


def test_what_is_not_finite_spreads_to_its_tiles_only():
    """Winograd's differences turn an infinity into NaN in all of the 4x4 pixels that see a part of
    it; PyTorch's sum has infinities in 3x3 pixels."""
    conv = Fir(1, 1, 1, 1, 1, 1, 1, 1, True, 1.0)
    x, w = torch.randn(1, 2, 16, 16), torch.randn(3, 2, 3, 3)
    x[0, 1, 5, 6] = float("inf")
    y = torch.empty(1, 3, 16, 16)
    cpu.conv2d_forward(x, w, conv, y)
    tiles = (~y.isfinite()).unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).flatten(2, 3)
    assert tiles[:, :, 5].all()
    assert tiles.sum() == 3 * 16


def call(x, w, conv):
    return ConvClass.of(FORWARD, x, w.shape[0], (w.shape[3], w.shape[2]), conv)


@pytest.mark.parametrize(
    ("dtype", "size", "up", "down", "padding", "reason"),
    [
        (torch.float64, 3, 1, 1, 1, "float32"),
        (torch.float32, 3, 1, 3, 1, "down=2"),
        (torch.float32, 3, 3, 1, 1, "up=1 or 2"),
        (torch.float32, 3, 2, 2, 2, "up=1 or 2"),
        (torch.float32, 4, 1, 1, 1, "3x3"),
        (torch.float32, 3, 2, 1, 1, "even padding"),
    ],
)
def test_refusals(dtype, size, up, down, padding, reason):
    conv = Fir(up, up, down, down, padding, padding, padding, padding, True, 1.0)
    x, w = torch.zeros(1, 16, 16, 16, dtype=dtype), torch.zeros(16, 16, size, size, dtype=dtype)
    assert reason in cpu.conv2d_refusal(call(x, w, conv))
    with pytest.raises(ValueError, match=f"{size}x{size} with up={up} and down={down}"):
        cpu.conv2d_forward(x, w, conv, torch.empty(1, 16, *conv.output_size(16, 16, (size, size))))


def test_the_environment_refuses(monkeypatch):
    conv = Fir(1, 1, 1, 1, 1, 1, 1, 1, True, 1.0)
    problem = call(torch.zeros(1, 16, 16, 16), torch.zeros(16, 16, 3, 3), conv)
    assert cpu.conv2d_refusal(problem) is None
    monkeypatch.setenv("STYLEGAN_FAST_WINOGRAD", "0")
    assert "STYLEGAN_FAST_WINOGRAD=0" in cpu.conv2d_refusal(problem)
    monkeypatch.setenv("STYLEGAN_FAST_WINOGRAD", "no")
    with pytest.raises(ValueError, match="'no' is not one of 0, 1"):
        cpu.conv2d_refusal(problem)
