"""Adaptive augmentation of what the discriminator sees.

From appendix B of Karras et al., "Training Generative Adversarial Networks with Limited Data"
(2020). An image is transformed by, in this order: a geometric matrix [3, 3], a matrix of its
colours [4, 4], gains of four bands of frequencies, noise, and a rectangle that is cut out. All are
drawn on the CPU, the same for every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_number, check_tensor
from ..ops import downsample2d, setup_filter, upsample2d

SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
"""The low-pass filter of the symlet with six vanishing moments, orthonormal."""

DELAY = -sum(c * (k - 5.5) for k, c in enumerate(SYM6)) / math.sqrt(8)
"""Of an image that was upsampled by this filter, in its pixels."""

SYM2 = tuple(
    (a + b * math.sqrt(3)) / (4 * math.sqrt(2)) for a, b in ((1, 1), (3, 1), (3, -1), (1, -1))
)
POWER = (10 / 13, 1 / 13, 1 / 13, 1 / 13)
"""Of the bands of a photograph, which are kept in sum when one of them is amplified."""

STRENGTHS = {
    "xflip": 1.0, "rotate90": 1.0, "xint": 1.0,
    "scale": 1.0, "rotate": 1.0, "aniso": 1.0, "xfrac": 1.0,
    "brightness": 1.0, "contrast": 1.0, "lumaflip": 1.0, "hue": 1.0, "saturation": 1.0,
    "imgfilter": 0.0, "noise": 0.0, "cutout": 0.0,
}  # fmt: skip
"""Of every transformation, in the order of application, the default: the paper's "bgc"."""


class AugmentPipe(nn.Module):
    """images [N, C, H, W], C 1 or 3, in [-1, 1] -> images, some of them transformed.

    Each transformation is applied to an image with the probability `p` times its strength, given by
    name or as in STRENGTHS. The buffer `p` is 0 at first; at 0 the images come back as they are.

    Differentiable to every order in the images. float16 and bfloat16 are computed in float32.
    TypeError for an unknown strength, ValueError for a negative one and for images of other sizes.
    """

    p: Tensor
    wavelet: Tensor

    def __init__(self, **strengths: float):
        super().__init__()
        unknown = sorted(set(strengths) - set(STRENGTHS))
        if unknown:
            raise TypeError(f"unknown {', '.join(unknown)}; there are {', '.join(STRENGTHS)}")
        for name, value in strengths.items():
            check_number(name, value, 0)
        self.strengths = STRENGTHS | strengths
        self.register_buffer("p", torch.zeros([]))
        self.register_buffer("wavelet", setup_filter(SYM6), persistent=False)

    def forward(
        self,
        images: Tensor,
        *,
        generator: torch.Generator | None = None,
        debug_percentile: float | None = None,
    ) -> Tensor:
        """`generator` is one of the CPU. With debug_percentile every transformation is applied to
        every image, with its parameters at this quantile of their distributions."""
        check_tensor("images", images, 4)
        n, channels, h, w = images.shape
        if channels not in (1, 3):
            raise ValueError(
                f"images must have 1 or 3 channels, got images.shape={(*images.shape,)}"
            )
        if h != w and self.strengths["rotate90"]:
            raise ValueError(f"rotate90 needs square images, got {h}×{w}; set rotate90=0")
        draw = Draw(n, float(self.p), self.strengths, generator, debug_percentile)
        with torch.autocast(images.device.type, enabled=False):
            x = images.float() if images.element_size() < 4 else images
            x = transform(x, blit_matrix(draw, h, w), geometric_matrix(draw, h, w), self.wavelet)
            x = recolor(x, color_matrix(draw))
            x = amplify(x, band_gains(draw))
            x = add_noise(x, draw)
            x = cut_out(x, draw)
            return x.to(images.dtype)


def adjust(signs_mean: float, target: float, batch: int, interval: int, kimg: float) -> float:
    """What to add to p, between 0 and 1, after `interval` batches whose mean of sign(D(real)) was
    signs_mean: towards more augmentation above the target, and by 1 within kimg·1000 images."""
    direction = (signs_mean > target) - (signs_mean < target)
    return direction * batch * interval / (1000 * kimg)


class Draw:
    """Parameters of n images, float64 on the CPU; 0, which changes nothing, where spared."""

    def __init__(
        self,
        n: int,
        p: float,
        strengths: dict[str, float],
        generator: torch.Generator | None = None,
        percentile: float | None = None,
    ):
        self.n = n
        self.generator = generator
        self._p = p
        self._strengths = strengths
        self._percentile = percentile

    def __call__(
        self,
        name: str,
        quantile: Callable[[Tensor], Tensor],
        count: int = 1,
        chance: Callable[[float], float] = lambda p: p,
    ) -> Tensor:
        """`count` parameters [count, n] at once, or one [n], from the inverse of a distribution."""
        strength = self._strengths[name]
        applied = self.uniform(1)[0] < chance(min(self._p * strength, 1))
        u = self.uniform(count)
        if self._percentile is not None:
            applied = torch.full_like(applied, strength > 0)
            u = torch.full_like(u, self._percentile)
        values = quantile(u.clamp(2**-53, 1 - 2**-53)) * applied
        return values if count > 1 else values[0]

    def uniform(self, count: int) -> Tensor:
        return torch.rand(count, self.n, generator=self.generator, dtype=torch.float64)


def uniform(maximum: float) -> Callable[[Tensor], Tensor]:
    return lambda u: (2 * u - 1) * maximum


def normal(std: float) -> Callable[[Tensor], Tensor]:
    return lambda u: math.sqrt(2) * std * torch.erfinv(2 * u - 1)


def one_of(count: int) -> Callable[[Tensor], Tensor]:
    return lambda u: (u * count).floor()


# Geometry. Matrices take positions relative to the centre, x to the right and y down, to new ones.


def blit_matrix(draw: Draw, h: int, w: int) -> Tensor:
    """[n, 3, 3] of what moves pixels without touching them."""
    flipped = draw("xflip", one_of(2))
    quarters = draw("rotate90", one_of(4))
    shift = draw("xint", uniform(0.125), 2)
    return (
        _translation((shift[0] * w).round(), (shift[1] * h).round())
        @ _rotation(quarters * (math.pi / 2)).round()
        @ _scaling(1 - 2 * flipped, torch.ones_like(flipped))
    )


def geometric_matrix(draw: Draw, h: int, w: int) -> Tensor:
    """[n, 3, 3] of scaling, rotation before and after scaling differently in x and y, and shift."""
    factor = draw("scale", normal(0.2)).exp2()
    # Two rotations, of which at least one happens with the probability of rotation.
    before, after = (
        draw("rotate", uniform(math.pi), chance=lambda p: 1 - math.sqrt(1 - p)) for _ in range(2)
    )
    stretch = draw("aniso", normal(0.2)).exp2()
    shift = draw("xfrac", normal(0.125), 2)
    return (
        _translation(shift[0] * w, shift[1] * h)
        @ _rotation(after)
        @ _scaling(stretch, 1 / stretch)
        @ _rotation(before)
        @ _scaling(factor, factor)
    )


def transform(images: Tensor, blit: Tensor, geometric: Tensor, wavelet: Tensor) -> Tensor:
    """Moves the pixels of the images, [n, 3, 3] each. Pixels are resampled only where they must."""
    warped = _changed(geometric)
    moved = _changed(blit) & ~warped
    images = _where(moved, images, lambda x: move(x, blit[moved]))
    return _where(warped, images, lambda x: warp(x, (geometric @ blit)[warped], wavelet))


def move(images: Tensor, matrix: Tensor) -> Tensor:
    """Takes pixels to pixels; the image is reflected at its borders."""
    n, channels, h, w = images.shape
    y, x = torch.meshgrid(_centred(h), _centred(w), indexing="ij")
    positions = torch.stack([x, y, torch.ones_like(x)]).flatten(1)
    x, y, _ = (torch.linalg.inv(matrix) @ positions).unbind(1)
    column = _reflected((x + (w - 1) / 2).round().long(), w)
    row = _reflected((y + (h - 1) / 2).round().long(), h)
    index = (row * w + column).to(images.device)[:, None].expand(-1, channels, -1)
    return images.flatten(2).gather(2, index).reshape(images.shape)


def warp(images: Tensor, matrix: Tensor, wavelet: Tensor) -> Tensor:
    """Resamples: up by 2 with the wavelet's filter, bilinearly, and down by 2 with its adjoint.

    Without a transformation the filters cancel and the image comes back, because the wavelet is
    orthonormal. It is reflected at its borders, as far as one reflection reaches. A filter that is
    not symmetric delays; that is made good, so that a turn keeps the centre.
    """
    h, w = images.shape[2:]
    delay = torch.tensor([[1, 0, DELAY], [0, 1, DELAY], [0, 0, 1]], dtype=torch.float64)
    inverse = delay.inverse() @ torch.linalg.inv(matrix) @ delay
    # What the filter for downsampling reads beyond the borders, then that for upsampling (and 1/2
    # for the bilinear lookup).
    outer = len(wavelet) // 4
    extent = torch.tensor([(w - 1) / 2 + outer, (h - 1) / 2 + outer, 1], dtype=torch.float64)
    corners = (torch.tensor([[-1, -1, 1], [-1, 1, 1], [1, -1, 1], [1, 1, 1]]) * extent).T
    reach = (inverse @ corners).abs().amax((0, 2)) + len(wavelet) / 4 + 0.5
    mx, my = (
        min(max(math.ceil(reach[i] - (size - 1) / 2), 0), size - 1) for i, size in enumerate((w, h))
    )
    x = upsample2d(F.pad(images, [mx, mx, my, my], mode="reflect"), wavelet)
    size = [*images.shape[:2], 2 * (h + 2 * outer), 2 * (w + 2 * outer)]
    # grid_sample's positions are 1 at the borders.
    to_pixels = torch.tensor([w / 2 + outer, h / 2 + outer, 1], dtype=torch.float64).diag()
    from_pixels = torch.tensor([2 / (w + 2 * mx), 2 / (h + 2 * my), 1], dtype=torch.float64).diag()
    theta = (from_pixels @ inverse @ to_pixels)[:, :2].to(x)
    x = GridSample.apply(x, F.affine_grid(theta, size, align_corners=False))
    return downsample2d(x, wavelet, padding=-2 * outer, flip_filter=True)


class GridSample(torch.autograd.Function):
    """Bilinear lookup in x [n, c, h, w] at grid [n, h', w', 2], 0 outside, for any order in x.

    It is linear in x, so its derivative is its transpose and that of the transpose is itself again.
    """

    @staticmethod
    def forward(ctx, x, grid):
        ctx.save_for_backward(grid)
        ctx.shape = x.shape
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    @staticmethod
    def backward(ctx, dy):
        (grid,) = ctx.saved_tensors
        return _TransposedGridSample.apply(dy, grid, ctx.shape), None


class _TransposedGridSample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, grid, shape):
        ctx.save_for_backward(grid)
        x = dy.new_zeros(()).expand(shape)  # the gradient of the grid alone would depend on it
        dx, _ = torch.ops.aten.grid_sampler_2d_backward(dy, x, grid, 0, 0, False, [True, False])
        return dx

    @staticmethod
    def backward(ctx, ddx):
        (grid,) = ctx.saved_tensors
        return GridSample.apply(ddx, grid), None, None


# Colours: (red, green, blue, 1) to new ones.


def color_matrix(draw: Draw) -> Tensor:
    """[n, 4, 4]"""
    identity = torch.eye(4, dtype=torch.float64)
    colors = torch.tensor([1, 1, 1, 0], dtype=torch.float64).diag()
    on_luma = colors @ torch.ones(4, 4, dtype=torch.float64) @ colors / 3

    shift = draw("brightness", normal(0.2))
    factor = draw("contrast", normal(0.5)).exp2()
    flipped = draw("lumaflip", one_of(2))
    angle = draw("hue", uniform(math.pi))
    strength = draw("saturation", normal(1)).exp2()

    zero, one = torch.zeros_like(shift), torch.ones_like(shift)
    brightness = _matrix(
        [[one, zero, zero, shift], [zero, one, zero, shift], [zero, zero, one, shift]]
    )
    contrast = torch.stack([factor, factor, factor, one], 1).diag_embed()
    flip = identity - 2 * on_luma * _each(flipped)
    # Rodrigues' formula: cross @ v is the vector product of the axis of luma and v.
    cross = torch.zeros(4, 4, dtype=torch.float64)
    cross[[1, 2, 0], [0, 1, 2]] = 1 / math.sqrt(3)
    cross[[0, 1, 2], [1, 2, 0]] = -1 / math.sqrt(3)
    hue = identity + _each(angle.sin()) * cross + _each(1 - angle.cos()) * (cross @ cross)
    saturation = identity + (colors - on_luma) * _each(strength - 1)
    return saturation @ hue @ flip @ contrast @ brightness


def recolor(images: Tensor, matrix: Tensor) -> Tensor:
    """Applies [n, 4, 4] to three channels; a gray image is the mean of what becomes of its gray."""
    changed = _changed(matrix)
    matrix = matrix[changed].to(images)
    weight, offset = matrix[:, :3, :3], matrix[:, :3, 3:]
    if images.shape[1] == 1:
        weight, offset = weight.sum(2).mean(1)[:, None, None], offset.mean(1, keepdim=True)

    def recolored(x: Tensor) -> Tensor:
        y = offset[..., None]
        for channel in range(x.shape[1]):  # no matrix product, which may be in TF32
            y = torch.addcmul(y, weight[:, :, channel, None, None], x[:, channel : channel + 1])
        return y

    return _where(changed, images, recolored)


# Filters, noise, cutout


def band_gains(draw: Draw) -> Tensor:
    """[n, 4], from low to high frequencies; each amplification keeps the expected power."""
    power = torch.tensor(POWER, dtype=torch.float64)
    gains = torch.ones(draw.n, 4, dtype=torch.float64)
    for band in range(4):
        logarithm = draw("imgfilter", normal(1))
        amplified = torch.ones_like(gains)
        amplified[:, band] = logarithm.exp2()
        amplified /= (power * amplified.square()).sum(1, keepdim=True).sqrt()
        gains = torch.where(logarithm[:, None] == 0, gains, gains * amplified)
    return gains


def _bands() -> Tensor:
    """Zero-phase filters [4, taps] of four bands, each twice as wide as that before; they sum to 1.

    P(z) = H(z) H(1/z) / 2 of an orthonormal H keeps low frequencies, and P(z) + P(-z) = 1. So the
    lowest band of 3 is P(z) P(z²) P(z⁴), and one with P(-z) in the last place is that above it.
    """
    h = torch.tensor(SYM2, dtype=torch.float64)
    low = F.conv1d(h[None, None], h[None, None], padding=len(h) - 1)[0, 0] / 2
    high = low * (-1.0) ** (torch.arange(len(low)) - len(h) + 1)
    bands = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(3):
        spread = torch.zeros(len(bands), 2 * bands.shape[1] - 1, dtype=torch.float64)
        spread[:, ::2] = bands
        bands = F.conv1d(spread[:, None], low[None, None], padding=len(low) - 1)[:, 0]
        margin = (bands.shape[1] - len(high)) // 2
        bands = torch.cat([bands, F.pad(high, [margin, margin])[None]])
    return bands


BANDS = _bands()


def amplify(images: Tensor, gains: Tensor) -> Tensor:
    """Filters each image by the sum of the bands times its gains [n, 4], in x and in y."""
    changed = (gains != 1).any(1)

    def filtered(x: Tensor) -> Tensor:
        n, channels, h, w = x.shape
        f = (gains[changed] @ BANDS).to(x).repeat_interleave(channels, 0)
        reach = f.shape[1] // 2
        rows, columns = (
            _reflected(torch.arange(-reach, size + reach), size).to(x.device) for size in (h, w)
        )
        x = (
            x.index_select(2, rows)
            .index_select(3, columns)
            .reshape(1, n * channels, *(size + 2 * reach for size in (h, w)))
        )
        x = F.conv2d(x, f[:, None, None, :], groups=n * channels)
        x = F.conv2d(x, f[:, None, :, None], groups=n * channels)
        return x.reshape(n, channels, h, w)

    return _where(changed, images, filtered)


def add_noise(images: Tensor, draw: Draw) -> Tensor:
    sigma = draw("noise", lambda u: math.sqrt(2) * 0.1 * torch.erfinv(u))
    # Drawn where it is used, from a seed of the CPU's generator.
    seed = torch.randint(2**62, [], generator=draw.generator).item()
    noisy = sigma != 0
    if not noisy.any():
        return images
    random = torch.Generator(images.device).manual_seed(int(seed))
    noise = torch.randn(int(noisy.sum()), *images.shape[1:], generator=random, device=images.device)
    return _where(noisy, images, lambda x: x + _image(sigma[noisy], x) * noise)


def cut_out(images: Tensor, draw: Draw) -> Tensor:
    """Zero in a rectangle of half the width and height around a random centre."""
    size = draw("cutout", lambda u: torch.full_like(u, 0.5))
    centre = draw.uniform(2)[:, :, None]
    h, w = images.shape[2:]
    cut = size > 0

    def distance(length: int, centre: Tensor) -> Tensor:
        return ((torch.arange(length) + 0.5) / length - centre).abs()

    inside_x, inside_y = (
        distance(length, c) < size[:, None] / 2 for length, c in zip((w, h), centre)
    )
    kept = ~(inside_y[:, None, :, None] & inside_x[:, None, None, :])
    return _where(cut, images, lambda x: x * kept[cut].to(x))


# Shared


def _where(chosen: Tensor, images: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function of the chosen images, which are a mask on the CPU; the others as they are."""
    if chosen.all():
        return function(images)
    if not chosen.any():
        return images
    index = chosen.nonzero()[:, 0].to(images.device)
    return images.index_copy(0, index, function(images.index_select(0, index)))


def _changed(matrix: Tensor) -> Tensor:
    return (matrix != torch.eye(matrix.shape[1], dtype=matrix.dtype)).any(2).any(1)


def _reflected(index: Tensor, size: int) -> Tensor:
    """Inside of an image of this size, mirrored at the centres of its border pixels."""
    index = index.remainder(max(2 * (size - 1), 1))
    return torch.minimum(index, 2 * (size - 1) - index)


def _centred(size: int) -> Tensor:
    return torch.arange(size, dtype=torch.float64) - (size - 1) / 2


def _each(values: Tensor) -> Tensor:
    return values[:, None, None]


def _image(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x)[:, None, None, None]


def _matrix(rows: list[list[Tensor]]) -> Tensor:
    """[n, k, k] of rows of [n], to which the last one, (0 ... 0 1), is added."""
    matrix = torch.stack([torch.stack(row, 1) for row in rows], 1)
    last = torch.eye(len(rows) + 1, dtype=matrix.dtype)[-1]
    return torch.cat([matrix, last.expand(len(matrix), 1, -1)], 1)


def _translation(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrix([[one, zero, x], [zero, one, y]])


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    zero = torch.zeros_like(x)
    return _matrix([[x, zero, zero], [zero, y, zero]])


def _rotation(angle: Tensor) -> Tensor:
    zero, sine, cosine = torch.zeros_like(angle), angle.sin(), angle.cos()
    return _matrix([[cosine, -sine, zero], [sine, cosine, zero]])
