"""Leaky ReLU at a higher resolution, between two FIR filters; contract: csrc/filtered_lrelu.h.

A filter along an axis is the product with a banded matrix of its taps, so that tensor cores run it.
The image between the filters, u, is never in memory. A program walks down a strip of some planes,
MID_ROWS rows of u at a time. A step of it is

    x [IN_COLS, planes, IN_ROWS]
      -> [MID_ROWS, planes, IN_COLS]     up along y
      -> u [MID_ROWS, planes, MID_COLS]  up along x; activation
      -> [OUT_COLS, planes, MID_ROWS]    down along x
      -> [OUT_COLS, planes, OUT_ROWS]    down along y: added to the outputs in flight

of which COLS columns of outputs are whole. The outputs in flight go round: row r of them holds the
one output row = r modulo OUT_ROWS that the step may reach. Of those a step finishes `MID_ROWS //
DOWN`, LAG steps after the first that reached them.

Products with the zeros beside the band spread what is not finite. A strip in which something comes
out so is done again, slowly, by the taps alone.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import _env
from .epilogue import words

_MID_ROWS = 16  # the least that a product takes
_WAVE = 1024  # programs that fill the largest GPUs a few times


class _Plan(NamedTuple):
    """The last arguments of the kernel."""

    channels: int  # all planes of NCHW
    in_height: int
    in_width: int
    out_height: int
    out_width: int
    sign_height: int
    sign_width: int
    sign_y: int
    sign_x: int
    shift_y: int
    shift_x: int
    phase_y: int
    phase_x: int
    taps_up: int
    taps_down: int
    steps: int  # of a strip, which finish outputs
    strips: int
    col_tiles: int
    plane_tiles: int
    NHWC: bool
    ALIGNED: bool
    WIDE: bool
    CORRELATE: bool
    UPS: bool
    DOWNS: bool
    UP: int
    DOWN: int
    COLS: int
    LAG: int
    IN_ROWS: int
    IN_COLS: int
    MID_ROWS: int
    MID_COLS: int
    OUT_ROWS: int
    OUT_COLS: int
    PLANES: int


# The sizes differ from layer to layer; specialising on them would compile each layer anew.
_SIZES = [*_Plan._fields[: _Plan._fields.index("NHWC")], "bias_channels"]


def _inputs(outputs: int, taps: int, up: int) -> int:
    """Samples that so many neighbouring outputs of an upsampling filter reach."""
    return (outputs + taps - 2) // up + 1


def _side(samples: int) -> int:
    """Of the tile that holds them."""
    return max(16, triton.next_power_of_2(samples))


class _Tile(NamedTuple):
    COLS: int
    LAG: int
    IN_ROWS: int
    IN_COLS: int
    MID_ROWS: int
    MID_COLS: int
    OUT_ROWS: int
    OUT_COLS: int


@functools.lru_cache(maxsize=4096)
def _tile_of(
    taps_up: int, taps_down: int, ups: bool, downs: bool, up: int, down: int, narrow: bool
) -> _Tile | None:
    """The one that costs least by column of outputs, None where the filters are too long for
    any that registers hold. Whole units of signs belong to a tile. `narrow` is for float32."""
    lag = triton.cdiv(max(0, taps_down - down), _MID_ROWS)
    in_rows = _side(_inputs(_MID_ROWS, taps_up, up))
    out_rows = _side((lag + 1) * (_MID_ROWS // down))
    best, least = None, math.inf
    for mid_cols in (32, 64):
        for cols in range(8 // down, mid_cols + 1, 8 // down):
            reached = (cols - 1) * down + taps_down
            in_cols = _side(_inputs(reached, taps_up, up)) if ups else mid_cols
            out_cols = _side(cols)
            if reached > mid_cols or (not downs and cols < mid_cols):
                continue
            if max(in_rows * in_cols, out_rows * out_cols) > 1024:
                continue
            cost = mid_cols * (64 + in_cols * ups + out_cols * downs)
            cost += in_rows * in_cols + out_rows * out_cols
            if narrow and mid_cols == 64:
                cost *= 2  # runs out of registers
            if cost / cols < least:
                best = _Tile(cols, lag, in_rows, in_cols, _MID_ROWS, mid_cols, out_rows, out_cols)
                least = cost / cols
    return best


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: tuple[int, int, int, int],
    out_size: tuple[int, int],
    nhwc: bool,
    problem: tuple,
    taps_up: int,
    taps_down: int,
    ups: bool,
    downs: bool,
    tile: _Tile,
) -> tuple[tuple[int], _Plan]:
    """The grid, and how a program walks."""
    up, down, pad_x, pad_y, correlate, _, _, _, sign_height, sign_width, sign_x, sign_y = problem
    samples, channels, in_height, in_width = shape
    out_height, out_width = out_size

    finished = _MID_ROWS // down  # rows a step
    planes = samples * channels
    outer, inner = (samples, channels) if nhwc else (1, planes)
    tile_planes = 8 if nhwc else 4  # a unit of the signs of NHWC
    plane_tiles = triton.cdiv(inner, tile_planes)
    col_tiles = triton.cdiv(out_width, tile.COLS)
    all_steps = triton.cdiv(out_height, finished)
    programs = outer * plane_tiles * col_tiles
    # The lower the strips, the more rows are filtered by two of them.
    strips = min(triton.cdiv(_WAVE, programs), triton.cdiv(all_steps, 4))
    steps = triton.cdiv(all_steps, strips)
    strips = triton.cdiv(all_steps, steps)
    row, rows = (channels, sign_width) if nhwc else (sign_width, channels)
    units = triton.cdiv(row, 8) * 8 * rows
    largest = max(
        planes * in_height * in_width,
        planes * out_height * out_width,
        samples * sign_height * units // 8,
    )
    plan = _Plan(
        channels=inner,
        in_height=in_height,
        in_width=in_width,
        out_height=out_height,
        out_width=out_width,
        sign_height=sign_height,
        sign_width=sign_width,
        sign_y=sign_y,
        sign_x=sign_x,
        shift_y=pad_y // up,
        shift_x=pad_x // up,
        phase_y=pad_y % up,
        phase_x=pad_x % up,
        taps_up=taps_up,
        taps_down=taps_down,
        steps=steps,
        strips=strips,
        col_tiles=col_tiles,
        plane_tiles=plane_tiles,
        NHWC=nhwc,
        ALIGNED=nhwc and channels % 8 == 0,
        WIDE=largest >= 2**31,
        CORRELATE=correlate,
        UPS=ups,
        DOWNS=downs,
        UP=up,
        DOWN=down,
        PLANES=tile_planes,
        **tile._asdict(),
    )
    return (programs * strips,), plan


@triton.jit
def _g(f, tap, taps, factor, absent, CORRELATE: tl.constexpr):
    """factor * g[tap], `absent` where there is no such tap."""
    there = (tap >= 0) & (tap < taps)
    if f is None:
        g = tl.full(tap.shape, 1.0, tl.float32)
    else:
        g = tl.load(f + (tap if CORRELATE else taps - 1 - tap), there, 0)
    return tl.where(there, factor * g, absent)


@triton.jit
def _band(
    f, first, taps, factor, STEP: tl.constexpr, CORRELATE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The matrix that holds factor * g[first[n] + STEP * k] in column n of row k."""
    k = tl.arange(0, ROWS)[:, None]
    return _g(f, first + STEP * k, taps, factor, 0.0, CORRELATE)


@triton.jit
def _halves(a):
    """a as a sum, to about 16 bits."""
    high = (a.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), (a - high).to(tl.bfloat16)


@triton.jit
def _times(
    a, band, f, first, taps, factor, STEP: tl.constexpr, CORRELATE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """a [m, k] times the band [k, n]."""
    if PRECISION == "taps":
        product = tl.zeros([a.shape[0], first.shape[1]], tl.float32)
        for k in range(a.shape[1]):
            column = tl.sum(tl.where(tl.arange(0, a.shape[1])[None, :] == k, a, 0.0), 1)[:, None]
            g = _g(f, first + STEP * k, taps, factor, float("nan"), CORRELATE)
            product = tl.where(g == g, product + column * g, product)
    elif PRECISION == "bf16x3":
        a_high, a_low = _halves(a)
        high, low = _halves(band)
        product = tl.dot(a_low, high)
        product = tl.dot(a_high, low, product)
        product = tl.dot(a_high, high, product)
    else:
        product = tl.dot(a, band, input_precision=PRECISION)
    return product


@triton.jit
def _samples(
    x, bias, sample, channel, top, left, channels, in_height, in_width,
    NHWC: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """x + b [cols, planes, rows], 0 outside of the image."""
    row = top + tl.arange(0, ROWS)[None, None, :]
    col = left + tl.arange(0, COLS)[:, None, None]
    plane = channel[None, :, None]
    inside = (row >= 0) & (row < in_height) & (col >= 0) & (col < in_width) & (plane < channels)
    if WIDE:
        row = row.to(tl.int64)
    if NHWC:
        at = ((sample * in_height + row) * in_width + col) * channels + plane
    else:
        at = (plane * in_height + row) * in_width + col
    v = tl.load(x + at, inside, 0).to(tl.float32)
    if bias is not None:
        v = tl.where(inside, v + bias[None, :, None], 0)
    return v


@triton.jit
def _store_signs(
    signs, u, v, clamp, sample, channel, tile, top, left, end_y, end_x,
    channels, sign_height, sign_width,
    HAS_CLAMP: tl.constexpr, NHWC: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """Of u [rows * planes, cols], in front of end_y and end_x."""
    ROWS: tl.constexpr = u.shape[0] // PLANES
    COLS: tl.constexpr = u.shape[1]
    if NHWC:
        lane = (tl.arange(0, ROWS * PLANES) % PLANES)[:, None]
    else:
        lane = (tl.arange(0, COLS) % 8)[None, :]
    bits = tl.where(u <= 0, 1 << lane, 0)
    if HAS_CLAMP:
        bits += tl.where(tl.abs(v) <= clamp, 0, 1 << (lane + 16))
    if NHWC:
        bits = tl.sum(tl.reshape(bits, [ROWS, PLANES, COLS]), 1)
        row = top + tl.arange(0, ROWS)[:, None]
        col = left + tl.arange(0, COLS)[None, :]
        at = ((sample * sign_height + row) * sign_width + col) * tl.cdiv(channels, 8) + tile
        inside = (row < end_y) & (col < end_x)
    else:
        bits = tl.sum(tl.reshape(bits, [ROWS * PLANES, COLS // 8, 8]), 2)
        bits = tl.reshape(bits, [ROWS, PLANES, COLS // 8])
        row = top + tl.arange(0, ROWS)[:, None, None]
        col = left // 8 + tl.arange(0, COLS // 8)[None, None, :]
        plane = channel[None, :, None]
        at = (plane * sign_height + row) * tl.cdiv(sign_width, 8) + col
        inside = (row < end_y) & (col * 8 < end_x) & (plane < channels)
    tl.store(signs + at, (bits | (bits >> 8)).to(tl.int16), inside)


@triton.jit
def _unit_of_signs(signs, at, row_inside, unit, units, sign_width, slope):
    """A unit: its first 8 bits say below 0, its second 8 that nothing comes through."""
    word = tl.load(signs + at, row_inside & (unit >= 0) & (unit < units), -256).to(tl.int32)
    beyond = 0xFF00 << tl.minimum(tl.maximum(sign_width - unit * 8, 0), 8)
    return (word | beyond | tl.where(slope == 0, word << 8, 0)) & 0xFFFF


@triton.jit
def _load_signs(
    signs, slope, sample, channel, tile, top, left, channels, sign_height, sign_width,
    NHWC: tl.constexpr, ROWS: tl.constexpr, PLANES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Of u [rows * planes, cols]: bit 0 says below 0, bit 8 that nothing comes through."""
    row = top + tl.arange(0, ROWS)[:, None, None]
    row_inside = (row >= 0) & (row < sign_height)
    if NHWC:
        col = left + tl.arange(0, COLS)[None, None, :]
        inside = row_inside & (col >= 0) & (col < sign_width)
        at = ((sample * sign_height + row) * sign_width + col) * tl.cdiv(channels, 8) + tile
        word = tl.load(signs + at, inside, -256).to(tl.int32)
        word |= tl.where(slope == 0, word << 8, 0)
        bits = word >> tl.arange(0, PLANES)[None, :, None]
    else:
        units = tl.cdiv(sign_width, 8)
        plane = channel[None, :, None]
        unit = (left >> 3) + tl.arange(0, COLS // 8)[None, None, :]
        inside = row_inside & (plane < channels)
        at = (plane * sign_height + row) * units + unit
        word = _unit_of_signs(signs, at, inside, unit, units, sign_width, slope)
        after = _unit_of_signs(signs, at + 1, inside, unit + 1, units, sign_width, slope)
        shift = left & 7
        below = ((word & 0xFF) | ((after & 0xFF) << 8)) >> shift
        dropped = ((word >> 8) | (after & 0xFF00)) >> shift
        word = (below & 0xFF) | ((dropped & 0xFF) << 8)
        word = tl.reshape(word, [ROWS * PLANES, COLS // 8])
        bits = word[:, :, None] >> tl.arange(0, 8)[None, None, :]
    return tl.reshape(bits, [ROWS * PLANES, COLS])


@triton.jit
def _turn(v, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """[a * b, c] or [a, b, c] to [c * b, a]."""
    return tl.reshape(tl.permute(tl.reshape(v, [A, B, C]), (2, 1, 0)), [C * B, A])


@triton.jit
def _strip(
    x, y, signs, bias, fu, fd, gain, slope, clamp, sample, channel, tile, strip, col_tile,
    MASKED: tl.constexpr, HAS_CLAMP: tl.constexpr, PRECISION: tl.constexpr,
    channels, in_height, in_width, out_height, out_width, sign_height, sign_width, sign_y, sign_x,
    shift_y, shift_x, phase_y, phase_x, taps_up, taps_down, steps, strips, col_tiles,
    NHWC: tl.constexpr, WIDE: tl.constexpr, CORRELATE: tl.constexpr,
    UPS: tl.constexpr, DOWNS: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr,
    COLS: tl.constexpr, LAG: tl.constexpr, IN_ROWS: tl.constexpr, IN_COLS: tl.constexpr,
    MID_ROWS: tl.constexpr, MID_COLS: tl.constexpr, OUT_ROWS: tl.constexpr,
    OUT_COLS: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """Computes and stores all of it. Returns a number that is finite if everything was."""
    FINISHED: tl.constexpr = MID_ROWS // DOWN
    left = col_tile * (COLS * DOWN)
    end_x = tl.where(col_tile == col_tiles - 1, sign_width, left + COLS * DOWN)
    end_y = tl.where(strip == strips - 1, sign_height, (strip + 1) * steps * MID_ROWS)

    up_y_first = phase_y - tl.arange(0, MID_ROWS)[None, :]
    up_x_first = phase_x - tl.arange(0, MID_COLS)[None, :]
    down_x_first = -DOWN * tl.arange(0, OUT_COLS)[None, :]
    up_y = None
    up_x = None
    down_x = None
    if UPS:
        up_y = _band(fu, up_y_first, taps_up, gain, UP, CORRELATE, IN_ROWS)
        up_x = _band(fu, up_x_first, taps_up, 1.0, UP, CORRELATE, IN_COLS)
    if DOWNS:
        down_x = _band(fd, down_x_first, taps_down, 1.0, 1, CORRELATE, MID_COLS)

    in_flight = tl.zeros([OUT_COLS * PLANES, OUT_ROWS], tl.float32)
    for step in range(steps + LAG):
        top = (strip * steps + step) * MID_ROWS
        v = _samples(
            x, bias, sample, channel, top // UP - shift_y, left // UP - shift_x,
            channels, in_height, in_width, NHWC, WIDE, IN_ROWS, IN_COLS,
        )  # fmt: skip
        if UPS:
            v = _times(
                tl.reshape(v, [IN_COLS * PLANES, IN_ROWS]), up_y, fu, up_y_first, taps_up, gain,
                UP, CORRELATE, PRECISION,
            )  # fmt: skip
            u = _times(
                _turn(v, IN_COLS, PLANES, MID_ROWS), up_x, fu, up_x_first, taps_up, 1.0,
                UP, CORRELATE, PRECISION,
            )  # fmt: skip
        else:
            u = gain * _turn(v, MID_COLS, PLANES, MID_ROWS)

        if MASKED:
            bits = _load_signs(
                signs, slope, sample, channel, tile, top + sign_y, left + sign_x,
                channels, sign_height, sign_width, NHWC, MID_ROWS, PLANES, MID_COLS,
            )  # fmt: skip
            v = tl.where(bits & 0x100 != 0, 0, u * tl.where(bits & 1 != 0, slope, 1.0))
        else:
            v = tl.where(u <= 0, slope * u, u)
            if signs is not None:
                _store_signs(
                    signs, u, v, clamp, sample, channel, tile, top, left, end_y, end_x,
                    channels, sign_height, sign_width, HAS_CLAMP, NHWC, PLANES,
                )  # fmt: skip
            if HAS_CLAMP:
                v = tl.maximum(v, -clamp, propagate_nan=tl.PropagateNan.ALL)
                v = tl.minimum(v, clamp, propagate_nan=tl.PropagateNan.ALL)

        first = (step - LAG) * FINISHED  # of the rows of outputs that the step reaches
        row = first + ((tl.arange(0, OUT_ROWS) - first) & (OUT_ROWS - 1))
        if DOWNS:
            v = _times(
                v, down_x, fd, down_x_first, taps_down, 1.0, 1, CORRELATE, PRECISION
            )  # fmt: skip
        v = _turn(v, MID_ROWS, PLANES, OUT_COLS)
        if DOWNS:
            down_y_first = (step * MID_ROWS - DOWN * row)[None, :]
            down_y = _band(fd, down_y_first, taps_down, 1.0, 1, CORRELATE, MID_ROWS)
            v = _times(v, down_y, fd, down_y_first, taps_down, 1.0, 1, CORRELATE, PRECISION)
        in_flight += v

        out_row = (strip * (steps * FINISHED) + row)[None, None, :]
        out_col = col_tile * COLS + tl.arange(0, OUT_COLS)[:, None, None]
        plane = channel[None, :, None]
        inside = ((row >= 0) & (row < first + FINISHED))[None, None, :] & (out_row < out_height)
        inside &= (tl.arange(0, OUT_COLS)[:, None, None] < COLS) & (out_col < out_width)
        if WIDE:
            out_row = out_row.to(tl.int64)
        if NHWC:
            at = ((sample * out_height + out_row) * out_width + out_col) * channels + plane
        else:
            at = (plane * out_height + out_row) * out_width + out_col
        finished = tl.reshape(in_flight, [OUT_COLS, PLANES, OUT_ROWS]).to(y.dtype.element_ty)
        tl.store(y + at, finished, inside & (plane < channels))
        # A product, which keeps what is not finite for the check.
        in_flight *= tl.where(row < first + FINISHED, 0.0, 1.0)[None, :]
    return tl.sum(tl.sum(in_flight, 1), 0)


@triton.jit(do_not_specialize=_SIZES)
def filtered_lrelu_kernel(
    x, y, signs, b, fu, fd, gain, slope, clamp, bias_channels,
    MASKED: tl.constexpr, HAS_CLAMP: tl.constexpr, PRECISION: tl.constexpr,
    channels, in_height, in_width, out_height, out_width, sign_height, sign_width, sign_y, sign_x,
    shift_y, shift_x, phase_y, phase_x, taps_up, taps_down, steps, strips, col_tiles, plane_tiles,
    NHWC: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, CORRELATE: tl.constexpr,
    UPS: tl.constexpr, DOWNS: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr,
    COLS: tl.constexpr, LAG: tl.constexpr, IN_ROWS: tl.constexpr, IN_COLS: tl.constexpr,
    MID_ROWS: tl.constexpr, MID_COLS: tl.constexpr, OUT_ROWS: tl.constexpr,
    OUT_COLS: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    if ALIGNED:  # tells the compiler that every pixel starts a vector
        channels = channels // 8 * 8
    program = tl.program_id(0)
    if NHWC:  # neighbours share sectors
        tile = program % plane_tiles
        program = program // plane_tiles
    col_tile = program % col_tiles
    strip = program // col_tiles % strips
    if NHWC:
        sample = program // col_tiles // strips
    else:
        sample = 0
        tile = program // col_tiles // strips
    channel = tile * PLANES + tl.arange(0, PLANES)
    bias = None
    if b is not None:
        bias = tl.load(b + channel % bias_channels).to(tl.float32)
    if WIDE:
        channel = channel.to(tl.int64)
        if NHWC:
            sample = sample.to(tl.int64)
    check = _strip(
        x, y, signs, bias, fu, fd, gain, slope, clamp, sample, channel, tile, strip, col_tile,
        MASKED, HAS_CLAMP, PRECISION,
        channels, in_height, in_width, out_height, out_width, sign_height, sign_width,
        sign_y, sign_x, shift_y, shift_x, phase_y, phase_x, taps_up, taps_down,
        steps, strips, col_tiles, NHWC, WIDE, CORRELATE, UPS, DOWNS, UP, DOWN, COLS, LAG,
        IN_ROWS, IN_COLS, MID_ROWS, MID_COLS, OUT_ROWS, OUT_COLS, PLANES,
    )  # fmt: skip
    if UPS or DOWNS:  # noqa: SIM102, this one is decided by the compiler
        if check - check != 0:
            _strip(
                x, y, signs, bias, fu, fd, gain, slope, clamp, sample, channel, tile, strip,
                col_tile, MASKED, HAS_CLAMP, "taps",
                channels, in_height, in_width, out_height, out_width, sign_height, sign_width,
                sign_y, sign_x, shift_y, shift_x, phase_y, phase_x, taps_up, taps_down,
                steps, strips, col_tiles, NHWC, WIDE, CORRELATE, UPS, DOWNS, UP, DOWN, COLS, LAG,
                IN_ROWS, IN_COLS, MID_ROWS, MID_COLS, OUT_ROWS, OUT_COLS, PLANES,
            )  # fmt: skip


def _walk(taps_up, taps_down, up, down, dtype):
    """taps_up, taps_down, ups, downs, and the tile: None where none will do."""
    filters = [max(1, taps_up), max(1, taps_down)]
    filters += [taps_up > 0 or up > 1, taps_down > 0 or down > 1]
    return *filters, _tile_of(*filters, up, down, dtype == torch.float32)


def refusal(dtype: torch.dtype, taps: tuple[int, int], up: int, down: int) -> str | None:
    """None, or why there is no kernel for separable filters of so many taps, 0 for no filter."""
    if dtype == torch.float64:
        return "its kernel is not for float64"
    if dtype == torch.float32 and triton.__version__.startswith("3.2."):
        return "Triton 3.2 does not compile its products of float32"
    if not {up, down} <= {1, 2, 4}:
        return "its kernel takes factors of 1, 2 and 4"
    # The derivative takes them in turn.
    walks = _walk(*taps, up, down, dtype), _walk(*taps[::-1], down, up, dtype)
    if any(walk[-1] is None for walk in walks):
        return "the filters are too long for its kernel"
    return None


def _launch(x, y, signs, b, fu, fd, problem, channels_last, masked):
    taps = (0 if f is None else f.numel() for f in (fu, fd))
    walk = _walk(*taps, problem.up, problem.down, x.dtype)
    grid, plan = _plan(tuple(x.shape), tuple(y.shape[2:]), channels_last, tuple(problem), *walk)
    has_clamp = not masked and problem.clamp != math.inf
    filtered_lrelu_kernel[grid](
        x, y, words(signs), b, fu, fd, problem.gain, problem.slope, problem.clamp,
        x.shape[1], masked, has_clamp, _precision(x.dtype), *plan,
        num_warps=plan.PLANES, num_stages=1,
    )  # fmt: skip


def _precision(dtype: torch.dtype) -> str:
    """Of the products: about that of float32, or of 16 bits twice."""
    if _env.flag("TRITON_INTERPRET"):
        return "ieee"
    if dtype == torch.float32:
        return "ieee" if torch.version.hip else "tf32x3"
    return "bf16x3"


def filtered_lrelu_forward(
    x: torch.Tensor,
    b: torch.Tensor | None,
    fu: torch.Tensor | None,
    fd: torch.Tensor | None,
    y: torch.Tensor,
    signs: torch.Tensor | None,
    problem: tuple,
    channels_last: bool,
) -> None:
    _launch(x, y, signs, b, fu, fd, problem, channels_last, False)


def filtered_lrelu_masked(
    dy: torch.Tensor,
    signs: torch.Tensor,
    fu: torch.Tensor | None,
    fd: torch.Tensor | None,
    dx: torch.Tensor,
    problem: tuple,
    channels_last: bool,
) -> None:
    _launch(dy, dx, signs, None, fu, fd, problem, channels_last, True)
