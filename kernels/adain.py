"""adain in two kernels an order; csrc/adain.h states the contract.

    u = clamp(gain * act(x + strength[c] * noise[n, pixel] + b[c]; alpha), -clamp, +clamp)
    y = (styles[n, c] + 1) * (u - mean[n, c]) * rstd[n, c] + styles[n, C + c]

The first kernel sums over the pixels of each sample and channel, the second applies the sums, and
both compute u. A program takes tiles of [PIXELS, CHANNELS] of a sample, which are planes or parts
of them of NCHW; where that makes too few programs, the pixels of a sample are shared by `parts`.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .activations import slope, value
from .epilogue import WAVE, activate, combine

# Fused with the subtraction of its mean, the last product of equal numbers would leave what the
# mean has lost by rounding, and a tiny eps makes much of it.
_OPTIONS = {"enable_fp_fusion": False}

_TILE = 2048  # elements: 16 for each thread of the default 4 warps
_MAX_PARTS = 32  # so that they are quick to merge


class _Walk(NamedTuple):
    """The last arguments of every kernel."""

    channels: int
    pixels: int
    channel_tiles: int
    parts: int
    steps: int  # tiles of a part
    PLANES: bool
    ALIGNED: bool
    WIDE: bool
    PIXELS: int
    CHANNELS: int


@functools.lru_cache(maxsize=4096)
def _walk(outer: int, channels: int, inner: int, pixels: int) -> tuple[tuple[int, int], _Walk]:
    """The grid, and how a program walks."""
    samples = outer * inner // pixels
    planes = inner > 1
    if planes:
        tile_pixels = min(triton.next_power_of_2(pixels), _TILE)
        tile_channels = min(_TILE // tile_pixels, triton.next_power_of_2(channels))
    else:
        tile_channels = min(triton.next_power_of_2(channels), 64)
        tile_pixels = min(_TILE // tile_channels, triton.next_power_of_2(pixels))
    channel_tiles = triton.cdiv(channels, tile_channels)
    programs, tiles = samples * channel_tiles, triton.cdiv(pixels, tile_pixels)
    steps = triton.cdiv(tiles, max(1, min(WAVE // programs, _MAX_PARTS)))
    parts = triton.cdiv(tiles, steps)
    wide = samples * channels * pixels >= 2**31 - _TILE
    aligned = (pixels if planes else channels) % 8 == 0
    walk = _Walk(
        channels, pixels, channel_tiles, parts, steps, planes, aligned, wide,
        tile_pixels, tile_channels,
    )  # fmt: skip
    return (programs, parts), walk


# The sizes differ from layer to layer; specialising on them would compile each layer anew.
_SIZES = ["all_channels", "channels", "pixels", "channel_tiles", "parts", "steps"]


@triton.jit
def _place(
    channels, pixels, channel_tiles, PLANES: tl.constexpr, ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The sizes, the sample of this program, its channels, and which there are."""
    if ALIGNED:  # tells the compiler that every row starts a pack
        if PLANES:
            pixels = pixels // 8 * 8
        else:
            channels = channels // 8 * 8
    program = tl.program_id(0).to(tl.int64 if WIDE else tl.int32)
    sample = program // channel_tiles
    channel = program % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    return channels, pixels, sample, channel, channel < channels


@triton.jit
def _operands(strength, b, channel, is_channel, STRENGTH_PER_CHANNEL: tl.constexpr):
    """Of the channels of a tile."""
    if strength is not None:
        if STRENGTH_PER_CHANNEL:
            strength = tl.load(strength + channel, is_channel, 0)
        else:
            strength = tl.load(strength)
    if b is not None:
        b = tl.load(b + channel, is_channel, 0)
    return strength, b


@triton.jit
def _tile(
    step, sample, channel, is_channel, channels, pixels, parts, steps,
    PLANES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """The pixels of a tile, where its elements are, and which there are."""
    pixel = (tl.program_id(1) * steps + step) * PIXELS + tl.arange(0, PIXELS)[:, None]
    if PLANES:
        offset = (sample * channels + channel) * pixels + pixel
    else:
        offset = (sample * pixels + pixel) * channels + channel
    return pixel, offset, (pixel < pixels) & is_channel


@triton.jit
def _preactivation(
    x, offset, inside, noise, strength, b, sample, pixel, pixels, ACC: tl.constexpr,
    NOISE_PER_SAMPLE: tl.constexpr,
):  # fmt: skip
    """v, and the noise in it."""
    v = tl.load(x + offset, inside, 0).to(ACC)
    z = None
    if noise is not None:
        place = pixel + sample * pixels if NOISE_PER_SAMPLE else pixel
        z = tl.load(noise + place, pixel < pixels, 0)
    v = combine(v, None, z if strength is None or z is None else z * strength, None, b)
    return v, z


@triton.jit
def _value(v, alpha, gain, clamp, ACT: tl.constexpr, HAS_CLAMP: tl.constexpr):
    return activate(v, None, None, None, None, None, alpha, gain, clamp, ACT, HAS_CLAMP)


@triton.jit
def _slope(v, alpha, gain, clamp, ACT: tl.constexpr, HAS_CLAMP: tl.constexpr):
    if ACT <= 3:
        negative = -value(tl.full([], -1.0, v.dtype), alpha, ACT)
        result = gain * tl.where(v <= 0, negative, 1.0)
    else:
        result = gain * slope(v, alpha, ACT)
    if HAS_CLAMP:
        result = tl.where(tl.abs(gain * value(v, alpha, ACT)) > clamp, 0, result)
    return result


@triton.jit
def _merge(count, mean, squares, other_count, other_mean, other_squares):
    """Mean and squared deviations of two sets together."""
    total = count + other_count
    difference = other_mean - mean
    mean += difference * (other_count / total)
    squares += other_squares + difference * difference * (count * (other_count / total))
    return total, mean, squares


@triton.jit(do_not_specialize=_SIZES[1:])
def adain_statistics_kernel(
    x, workspace, noise, strength, b, alpha, gain, clamp,
    ACT: tl.constexpr, HAS_CLAMP: tl.constexpr, NOISE_PER_SAMPLE: tl.constexpr,
    STRENGTH_PER_CHANNEL: tl.constexpr, channels, pixels, channel_tiles, parts, steps,
    PLANES: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Into the workspace [samples, channels, parts, 4] go, of each part, the number of pixels, the
    mean of u, less what the first pixel of the channel has, the squared deviations from the mean,
    and u of the first pixel: the mean of equal numbers would be rounded, that of zeros is not."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    channels, pixels, sample, channel, is_channel = _place(
        channels, pixels, channel_tiles, PLANES, ALIGNED, WIDE, CHANNELS
    )
    strength, b = _operands(strength, b, channel, is_channel, STRENGTH_PER_CHANNEL)
    if PLANES:
        first = (sample * channels + channel) * pixels
    else:
        first = sample * pixels * channels + channel
    pivot, first_z = _preactivation(
        x, first, is_channel, noise, strength, b, sample, tl.zeros([1, 1], tl.int32), pixels, ACC,
        NOISE_PER_SAMPLE,
    )  # fmt: skip
    pivot = _value(pivot, alpha, gain, clamp, ACT, HAS_CLAMP)
    count = tl.zeros([1, 1], ACC)
    mean = tl.zeros([1, CHANNELS], ACC)
    squares = tl.zeros([1, CHANNELS], ACC)
    for step in range(steps):
        pixel, offset, inside = _tile(
            step, sample, channel, is_channel, channels, pixels, parts, steps, PLANES, PIXELS
        )
        v, z = _preactivation(
            x, offset, inside, noise, strength, b, sample, pixel, pixels, ACC, NOISE_PER_SAMPLE
        )
        u = _value(v, alpha, gain, clamp, ACT, HAS_CLAMP)
        is_pixel = pixel < pixels
        here = tl.sum(tl.where(is_pixel, 1.0, 0.0).to(ACC), 0, keep_dims=True)
        d = tl.where(is_pixel, u - pivot, 0)
        mean_here = tl.sum(d, 0, keep_dims=True) / tl.maximum(here, 1)
        d = tl.where(is_pixel, d - mean_here, 0)
        count, mean, squares = _merge(
            count, mean, squares, here, mean_here, tl.sum(d * d, 0, keep_dims=True)
        )
    to = ((sample * channels + channel) * parts + tl.program_id(1)) * 4
    tl.store(workspace + to, tl.broadcast_to(count, mean.shape), is_channel)
    tl.store(workspace + to + 1, mean, is_channel)
    tl.store(workspace + to + 2, squares, is_channel)
    tl.store(workspace + to + 3, pivot, is_channel)


@triton.jit(do_not_specialize=_SIZES)
def adain_forward_kernel(
    x, y, statistics, workspace, styles, noise, strength, b, alpha, gain, clamp, eps, all_channels,
    ACT: tl.constexpr, HAS_CLAMP: tl.constexpr, NOISE_PER_SAMPLE: tl.constexpr,
    STRENGTH_PER_CHANNEL: tl.constexpr, channels, pixels, channel_tiles, parts, steps,
    PLANES: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    channels, pixels, sample, channel, is_channel = _place(
        channels, pixels, channel_tiles, PLANES, ALIGNED, WIDE, CHANNELS
    )
    at = sample * channels + channel
    count = tl.zeros([1, CHANNELS], ACC)
    mean = tl.zeros([1, CHANNELS], ACC)
    squares = tl.zeros([1, CHANNELS], ACC)
    for part in range(parts):
        place = workspace + (at * parts + part) * 4
        count, mean, squares = _merge(
            count, mean, squares, tl.load(place, is_channel, 1),
            tl.load(place + 1, is_channel, 0), tl.load(place + 2, is_channel, 0),
        )  # fmt: skip
    mean += tl.load(workspace + at * parts * 4 + 3, is_channel, 0)
    rstd = 1 / tl.sqrt(squares / pixels + eps)
    if tl.program_id(1) == 0:
        tl.store(statistics + at, mean, is_channel)
        tl.store(statistics + all_channels + at, rstd, is_channel)

    styles += sample * channels + at
    factor = (tl.load(styles, is_channel, 0) + 1) * rstd
    shift = tl.load(styles + channels, is_channel, 0)
    strength, b = _operands(strength, b, channel, is_channel, STRENGTH_PER_CHANNEL)
    for step in range(steps):
        pixel, offset, inside = _tile(
            step, sample, channel, is_channel, channels, pixels, parts, steps, PLANES, PIXELS
        )
        v, z = _preactivation(
            x, offset, inside, noise, strength, b, sample, pixel, pixels, ACC, NOISE_PER_SAMPLE
        )
        u = _value(v, alpha, gain, clamp, ACT, HAS_CLAMP)
        tl.store(y + offset, ((u - mean) * factor + shift).to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=_SIZES[1:])
def adain_sums_kernel(
    dy, x, statistics, workspace, noise, strength, b, alpha, gain, clamp,
    ACT: tl.constexpr, HAS_CLAMP: tl.constexpr, NOISE_PER_SAMPLE: tl.constexpr,
    STRENGTH_PER_CHANNEL: tl.constexpr, channels, pixels, channel_tiles, parts, steps,
    PLANES: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Into the workspace [samples, channels, parts, 2] go the sums of dy * (u - mean) and of dy."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    channels, pixels, sample, channel, is_channel = _place(
        channels, pixels, channel_tiles, PLANES, ALIGNED, WIDE, CHANNELS
    )
    at = sample * channels + channel
    mean = tl.load(statistics + at, is_channel, 0)
    strength, b = _operands(strength, b, channel, is_channel, STRENGTH_PER_CHANNEL)
    products = tl.zeros([PIXELS, CHANNELS], ACC)
    gradients = tl.zeros([PIXELS, CHANNELS], ACC)
    for step in range(steps):
        pixel, offset, inside = _tile(
            step, sample, channel, is_channel, channels, pixels, parts, steps, PLANES, PIXELS
        )
        v, z = _preactivation(
            x, offset, inside, noise, strength, b, sample, pixel, pixels, ACC, NOISE_PER_SAMPLE
        )
        u = _value(v, alpha, gain, clamp, ACT, HAS_CLAMP)
        d = tl.load(dy + offset, inside, 0).to(ACC)
        products += d * (u - mean)
        gradients += d
    to = (at * parts + tl.program_id(1)) * 2
    tl.store(workspace + to, tl.sum(products, 0, keep_dims=True), is_channel)
    tl.store(workspace + to + 1, tl.sum(gradients, 0, keep_dims=True), is_channel)


@triton.jit(do_not_specialize=_SIZES)
def adain_backward_kernel(
    dy, x, statistics, workspace, styles, dx, d_styles, sums,
    noise, strength, b, alpha, gain, clamp, all_channels,
    ACT: tl.constexpr, HAS_CLAMP: tl.constexpr, NOISE_PER_SAMPLE: tl.constexpr,
    STRENGTH_PER_CHANNEL: tl.constexpr, channels, pixels, channel_tiles, parts, steps,
    PLANES: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Into sums [2, samples, channels, parts] go the sums of dx, and of dx * noise."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    channels, pixels, sample, channel, is_channel = _place(
        channels, pixels, channel_tiles, PLANES, ALIGNED, WIDE, CHANNELS
    )
    at = sample * channels + channel
    mean = tl.load(statistics + at, is_channel, 0)
    rstd = tl.load(statistics + all_channels + at, is_channel, 0)
    along = tl.zeros([1, CHANNELS], ACC)
    total = tl.zeros([1, CHANNELS], ACC)
    for part in range(parts):
        place = workspace + (at * parts + part) * 2
        along += tl.load(place, is_channel, 0)
        total += tl.load(place + 1, is_channel, 0)
    along *= rstd
    style_at = sample * channels + at
    if tl.program_id(1) == 0:
        tl.store(d_styles + style_at, along, is_channel)
        tl.store(d_styles + style_at + channels, total, is_channel)
    factor = (tl.load(styles + style_at, is_channel, 0) + 1) * rstd
    along *= rstd / pixels
    total /= pixels

    strength, b = _operands(strength, b, channel, is_channel, STRENGTH_PER_CHANNEL)
    dv_sums = tl.zeros([PIXELS, CHANNELS], ACC)
    noise_sums = tl.zeros([PIXELS, CHANNELS], ACC)
    for step in range(steps):
        pixel, offset, inside = _tile(
            step, sample, channel, is_channel, channels, pixels, parts, steps, PLANES, PIXELS
        )
        v, z = _preactivation(
            x, offset, inside, noise, strength, b, sample, pixel, pixels, ACC, NOISE_PER_SAMPLE
        )
        u = _value(v, alpha, gain, clamp, ACT, HAS_CLAMP)
        d = tl.load(dy + offset, inside, 0).to(ACC)
        derivative = _slope(v, alpha, gain, clamp, ACT, HAS_CLAMP)
        # A slope of zero gives zero, also for an infinite dy.
        dv = derivative * (factor * (d - total - (u - mean) * along))
        dv = tl.where(inside & (derivative != 0), dv, 0)
        tl.store(dx + offset, dv.to(dx.dtype.element_ty), inside)
        dv_sums += dv
        if z is not None:
            noise_sums += dv * z
    to = sums + at * parts + tl.program_id(1)
    tl.store(to, tl.sum(dv_sums, 0, keep_dims=True), is_channel)
    tl.store(to + all_channels * parts, tl.sum(noise_sums, 0, keep_dims=True), is_channel)


def _constants(tail: tuple) -> tuple[tuple, tuple]:
    """The operands of the activation with its numbers, and what the kernels are compiled for."""
    _, noise, strength, b, act, alpha, gain, clamp = tail
    per_channel = strength is not None and strength.numel() > 1
    constants = (act, clamp != math.inf, noise is not None and noise.ndim == 2, per_channel)
    return (noise, strength, b, alpha, gain, clamp), constants


def adain_forward(
    x: torch.Tensor,
    y: torch.Tensor,
    statistics: torch.Tensor,
    styles: torch.Tensor,
    geometry: tuple[int, int, int, int],
    tail: tuple,
    eps: float,
) -> None:
    """y, and the mean and rstd of u."""
    grid, walk = _walk(*geometry)
    operands, constants = _constants(tail)
    workspace = statistics.new_empty((*statistics.shape[1:], walk.parts, 4))
    adain_statistics_kernel[grid](x, workspace, *operands, *constants, *walk, **_OPTIONS)
    adain_forward_kernel[grid](
        x, y, statistics, workspace, styles, *operands, eps, statistics[0].numel(),
        *constants, *walk, **_OPTIONS,
    )  # fmt: skip


def adain_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    styles: torch.Tensor,
    dx: torch.Tensor,
    d_styles: torch.Tensor,
    sums: torch.Tensor,
    geometry: tuple[int, int, int, int],
    tail: tuple,
) -> None:
    """dx, d_styles, and the sums of dx and of dx * noise."""
    grid, walk = _walk(*geometry)
    operands, constants = _constants(tail)
    workspace = statistics.new_empty((*statistics.shape[1:], walk.parts, 2))
    all_channels = statistics[0].numel()
    adain_sums_kernel[grid](dy, x, statistics, workspace, *operands, *constants, *walk, **_OPTIONS)
    partial = statistics.new_empty((*statistics.shape, walk.parts))
    adain_backward_kernel[grid](
        dy, x, statistics, workspace, styles, dx, d_styles, partial, *operands, all_channels,
        *constants, *walk, **_OPTIONS,
    )  # fmt: skip
    torch.sum(partial, -1, out=sums)
