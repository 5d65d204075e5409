"""Zero-stuff, pad or crop, FIR filter, decimate, with the epilogue; contract: csrc/upfirdn2d.h.

    u[oy, ox] = gain * sum over ky, kx of g[ky, kx] * z[oy * down + ky - pad, ox * down + kx - pad]
    y = E(u) + add                forward
    dx = scale * u(d(v))          masked

z, the image with zeros between its pixels, is never made. A thread keeps 8 outputs of each of its
channels, a patch of [8 // COLS, COLS] pixels, and adds every sample it loads to all outputs of the
patch that it reaches. Output r of a patch meets sample s of the patch's window, along each axis, in

    tap k = UP * s + phase - DOWN * r

where phase is one number for all patches if UP divides DOWN * (size of the patch), for which COLS
is chosen. There are two ways down the image:

    ring    The program walks down a strip. A step reads DOWN rows, which finishes UP rows of the
            patch: they are stored, the others move up. All k are known to the compiler, which
            leaves out what meets no tap; nothing is read twice but the edges of strips. For
            filters whose outputs in flight fit in the patch: 4 taps with up or down of 1 or 2.
    patch   The program reads all rows that its patches reach, in a loop, and stores them once.
            For all other filters. Where the row is filtered first, along x, by few enough taps,
            at least their k are known.

A separable filter runs along x over each row that is read, and the results along y: one pass over
memory and no buffer.

A program has a tile of patches [LINES, UNITS, LANES]. A line is

    NCHW   a row of patches (or of rings) of one plane; units and lanes run along x. The LANES *
           COLS = 8 outputs in a row are one unit of the mask and one or two wide stores.
    NHWC   one patch, of TILE_X side by side; units and lanes run along the channels, and a lane is
           16 bytes, or one unit where a mask is written.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .epilogue import WAVE, activate, affine, differentiate, steps_of, words

_UNITS = 128  # of a tile: one for each thread
_WARPS = 4 if torch.version.hip is None else 2
_PATCH = 8


class _Plan(NamedTuple):
    """The last arguments of every kernel."""

    channels: int
    in_height: int
    in_width: int
    out_height: int
    out_width: int
    stride_n: int
    stride_h: int
    stride_w: int
    stride_c: int
    shift_y: int
    shift_x: int
    taps_y: int
    taps_x: int
    groups: int
    ahead: int
    back: int
    strips: int
    lines: int
    sites: int
    x_tiles: int
    channel_tiles: int
    NHWC: bool
    SEPARABLE: bool
    CORRELATE: bool
    UP_Y: int
    UP_X: int
    DOWN_Y: int
    DOWN_X: int
    PHASE_Y: int
    PHASE_X: int
    COLS: int
    TAPS_Y: int
    TAPS_X: int
    ALIGNED_IN: bool
    ALIGNED_OUT: bool
    WIDE: bool
    LINES: int
    UNITS: int
    LANES: int
    TILE_X: int

    @property
    def grid(self) -> tuple[int]:
        row_tiles = triton.cdiv(self.lines, self.LINES // self.TILE_X)
        return (row_tiles * self.x_tiles * self.channel_tiles,)


class _Ring(NamedTuple):
    """How a strip is walked, in steps that read `down` rows and finish `up` rows."""

    in_flight: int  # rows of outputs
    ahead: int  # steps before the first row of the strip is finished
    back: int  # rows from that of the first step, in part above the strip, to the strip's own
    shift: int  # the first step of strip 0 reads row -shift


def _ring(taps: int, up: int, down: int, pad: int) -> _Ring | None:
    """Sample 0 of a step meets the first row of the patch in tap `taps - down`, the last that
    leaves nothing of that row to the next step; the strips begin where pad makes it so."""
    if math.gcd(up, down) > 1:
        return None
    last = max(up - 1, up + (taps - down - up) // down)
    ahead = last // up
    above = next(rows for rows in range(up) if (taps - down - pad - rows * down) % up == 0)
    back = above + ahead * up
    return _Ring(last + 1, ahead, back, (pad + back * down - (taps - down)) // up)


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: tuple[int, int, int, int],
    strides: tuple[int, int, int, int],
    out_size: tuple[int, int],
    nhwc: bool,
    taps: tuple[int, ...],
    fir: tuple,
    vector: int,
) -> _Plan:
    samples, channels, in_height, in_width = shape
    stride_n, stride_c, stride_h, stride_w = strides
    out_height, out_width = out_size
    up_x, up_y, down_x, down_y, pad_x, _, pad_y, _, correlate, _ = fir
    taps_y, taps_x = taps[0], taps[-1]
    separable = len(taps) == 1
    phase_y, phase_x = pad_y % up_y, pad_x % up_x

    # Samples of a row that a patch meets, by the number of its columns.
    windows = {
        cols: (taps_x - 1 - phase_x + down_x * (cols - 1)) // up_x + 1
        for cols in (2, 1, 4, 8)
        if cols * down_x % up_x == 0
    }
    ring = _ring(taps_y, up_y, down_y, pad_y)
    rings = [
        cols
        for cols, window in windows.items()
        if ring is not None
        and max(ring.in_flight, up_y) * cols <= _PATCH
        and _PATCH % (up_y * cols) == 0
        and window * down_y <= (32 if nhwc else 16 * cols)  # what a step loads, for registers
    ]
    if rings:
        cols = rings[0]
    else:
        ring = None
        cols = next((cols for cols in windows if cols > 1), 2)
    known_x = ring is not None or (separable and windows.get(cols, 17) <= 16)

    sites = triton.cdiv(out_width, cols)
    outer = samples if nhwc else samples * channels
    lanes = min(vector, triton.next_power_of_2(channels)) if nhwc else _PATCH // cols
    across = triton.cdiv(channels if nhwc else sites, lanes)
    units = min(64 // lanes if nhwc else 32, triton.next_power_of_2(across))
    tile_lines = _UNITS // units
    tile_x = min(triton.next_power_of_2(sites), 16, tile_lines) if nhwc else 1
    x_tiles = triton.cdiv(sites, tile_x) if nhwc else triton.cdiv(across, units)
    channel_tiles = triton.cdiv(across, units) if nhwc else 1

    rows = _PATCH // cols
    if ring is None:
        ring = _Ring(rows, 0, 0, pad_y // up_y)
        groups, strips, read = 0, triton.cdiv(out_height, rows), rows * down_y + taps_y
    else:
        height = out_height + ring.back - ring.ahead * up_y
        for strip_height in (32, 16, 8):  # the lower, the more rows are read by two strips
            groups = min(strip_height // up_y, triton.cdiv(height, up_y))
            strips = triton.cdiv(height, groups * up_y)
            if outer * strips * tile_x // tile_lines * x_tiles * channel_tiles >= WAVE:
                break
        read = (groups + ring.ahead) * down_y
    shift_x = pad_x // up_x

    # Offsets run over the edges of the image by up to a tile and the filter.
    over_y = abs(ring.shift) + read + rows
    over_x = abs(shift_x) + taps_x + down_x * _PATCH * _UNITS
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides))
    reach += over_y * stride_h + over_x * stride_w
    out_reach = (samples * channels * out_height + over_y) * (out_width + _PATCH * _UNITS)
    aligned_in = (
        nhwc and stride_c == 1 and channels % 8 == stride_n % 8 == stride_h % 8 == stride_w % 8 == 0
    )
    return _Plan(
        channels=channels,
        in_height=in_height,
        in_width=in_width,
        out_height=out_height,
        out_width=out_width,
        stride_n=stride_n,
        stride_h=stride_h,
        stride_w=stride_w,
        stride_c=stride_c,
        shift_y=ring.shift,
        shift_x=shift_x,
        taps_y=taps_y,
        taps_x=taps_x,
        groups=groups,
        ahead=ring.ahead,
        back=ring.back,
        strips=strips,
        lines=outer * strips,
        sites=sites,
        x_tiles=x_tiles,
        channel_tiles=channel_tiles,
        NHWC=nhwc,
        SEPARABLE=separable,
        CORRELATE=correlate,
        UP_Y=up_y,
        UP_X=up_x,
        DOWN_Y=down_y,
        DOWN_X=down_x,
        PHASE_Y=phase_y,
        PHASE_X=phase_x,
        COLS=cols,
        TAPS_Y=taps_y if rings else 0,
        TAPS_X=taps_x if known_x else 0,
        ALIGNED_IN=aligned_in,
        ALIGNED_OUT=(channels if nhwc else out_width) % 8 == 0,
        WIDE=max(reach, out_reach) >= 2**31,
        LINES=tile_lines,
        UNITS=units,
        LANES=lanes,
        TILE_X=tile_x,
    )


# The sizes differ from layer to layer; specialising on them would compile each layer anew. Left
# to specialise are stride_w and stride_c, of which one is 1.
_SIZES = [name for name in _Plan._fields[:21] if name not in ("stride_w", "stride_c")]
_SIZES += ["sum_rows", "sum_cols", "parts", "part"]


@triton.jit
def _tap(
    total, v, INDEX: tl.constexpr, f, ky, kx, taps_y, taps_x, COLS: tl.constexpr,
    DOWN_Y: tl.constexpr, DOWN_X: tl.constexpr, CORRELATE: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    """total + g[...] * v, where there is such a tap: [ky, kx] is that of output 0 of the patch."""
    if KNOWN:
        y: tl.constexpr = ky - DOWN_Y * (INDEX // COLS)
        x: tl.constexpr = kx - DOWN_X * (INDEX % COLS)
        at: tl.constexpr = y * taps_x + x
        if (y >= 0) & (y < taps_y) & (x >= 0) & (x < taps_x):
            if f is None:
                total += v
            else:
                total += tl.load(f + (at if CORRELATE else taps_y * taps_x - 1 - at)) * v
    else:
        y = ky - DOWN_Y * (INDEX // COLS)
        x = kx - DOWN_X * (INDEX % COLS)
        at = y * taps_x + x
        if not CORRELATE:
            at = taps_y * taps_x - 1 - at
        # A weight of 0 would let NaN through.
        there = (y >= 0) & (y < taps_y) & (x >= 0) & (x < taps_x)
        if f is None:
            total = tl.where(there, total + v, total)
        else:
            # Not a masked load: Triton 3.9 interprets the comparison of scalars as an int32.
            total = tl.where(there, total + tl.load(f + tl.where(there, at, 0)) * v, total)
    return total


@triton.jit
def _taps(
    a0, a1, a2, a3, a4, a5, a6, a7, v0, v1, v2, v3, v4, v5, v6, v7, COUNT: tl.constexpr,
    f, ky, kx, taps_y, taps_x, COLS: tl.constexpr,
    DOWN_Y: tl.constexpr, DOWN_X: tl.constexpr, CORRELATE: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    """_tap for the first COUNT outputs of a patch."""
    a0 = _tap(a0, v0, 0, f, ky, kx, taps_y, taps_x, COLS, DOWN_Y, DOWN_X, CORRELATE, KNOWN)
    if COUNT > 1:
        a1 = _tap(a1, v1, 1, f, ky, kx, taps_y, taps_x, COLS, DOWN_Y, DOWN_X, CORRELATE, KNOWN)
    if COUNT > 2:
        a2 = _tap(a2, v2, 2, f, ky, kx, taps_y, taps_x, COLS, DOWN_Y, DOWN_X, CORRELATE, KNOWN)
        a3 = _tap(a3, v3, 3, f, ky, kx, taps_y, taps_x, COLS, DOWN_Y, DOWN_X, CORRELATE, KNOWN)
    if COUNT > 4:
        a4 = _tap(a4, v4, 4, f, ky, kx, taps_y, taps_x, COLS, DOWN_Y, DOWN_X, CORRELATE, KNOWN)
        a5 = _tap(a5, v5, 5, f, ky, kx, taps_y, taps_x, COLS, DOWN_Y, DOWN_X, CORRELATE, KNOWN)
        a6 = _tap(a6, v6, 6, f, ky, kx, taps_y, taps_x, COLS, DOWN_Y, DOWN_X, CORRELATE, KNOWN)
        a7 = _tap(a7, v7, 7, f, ky, kx, taps_y, taps_x, COLS, DOWN_Y, DOWN_X, CORRELATE, KNOWN)
    return a0, a1, a2, a3, a4, a5, a6, a7


@triton.jit
def _sample(
    x, mask, origin, lane, row_step, col_step, inside, above, below,
    DROPS_NEGATIVE: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """x, or d(v) of it, some steps from the origin; 0 outside of the image."""
    if mask is not None:
        at = origin + row_step + col_step
        if ALIGNED:  # all lanes lie in one word
            bits = tl.load(mask + at // 8, inside, 0).to(tl.int32) >> ((at % 8).to(tl.int32) + lane)
        else:
            at += lane
            bits = tl.load(mask + at // 8, inside, 0).to(tl.int32) >> (at % 8).to(tl.int32)
    v = tl.load(x + origin + lane + row_step + col_step, inside, 0).to(ACC)
    if mask is not None:
        v = differentiate(v, bits, above, below, DROPS_NEGATIVE)
    elif above is not None:
        v *= above
    return v


@triton.jit
def _row(
    a0, a1, a2, a3, a4, a5, a6, a7, x, mask, f, origin, lane, row_step, stride_w,
    row_inside, left, in_width, lane_inside, ky, phase_x, taps_y, taps_x, above, below,
    DROPS_NEGATIVE: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    SEPARABLE: tl.constexpr, CORRELATE: tl.constexpr,
    UP_X: tl.constexpr, DOWN_Y: tl.constexpr, DOWN_X: tl.constexpr, PHASE_X: tl.constexpr,
    COLS: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr,
):  # fmt: skip
    """Adds a row of samples to the patches; ky is the tap in which their output 0 meets it."""
    if SEPARABLE:
        h0 = tl.zeros_like(a0)
        h1, h2, h3, h4, h5, h6, h7 = h0, h0, h0, h0, h0, h0, h0
    if TAPS_X > 0:
        for t in tl.static_range((TAPS_X - 1 - PHASE_X + DOWN_X * (COLS - 1)) // UP_X + 1):
            inside = row_inside & ((left + t >= 0) & (left + t < in_width) & lane_inside)
            v = _sample(
                x, mask, origin, lane, row_step, t * stride_w, inside, above, below,
                DROPS_NEGATIVE, ALIGNED, ACC,
            )  # fmt: skip
            if SEPARABLE:
                h0, h1, h2, h3, h4, h5, h6, h7 = _taps(
                    h0, h1, h2, h3, h4, h5, h6, h7, v, v, v, v, v, v, v, v, COLS,
                    f, UP_X * t + PHASE_X, 0, TAPS_X, 1, 1, DOWN_X, 0, CORRELATE, True,
                )  # fmt: skip
            else:
                a0, a1, a2, a3, a4, a5, a6, a7 = _taps(
                    a0, a1, a2, a3, a4, a5, a6, a7, v, v, v, v, v, v, v, v, 8,
                    f, ky, UP_X * t + PHASE_X, TAPS_Y, TAPS_X,
                    COLS, DOWN_Y, DOWN_X, CORRELATE, True,
                )  # fmt: skip
    else:
        for t in range((taps_x - 1 + DOWN_X * (COLS - 1)) // UP_X + 1):
            inside = row_inside & ((left + t >= 0) & (left + t < in_width) & lane_inside)
            v = _sample(
                x, mask, origin, lane, row_step, t * stride_w, inside, above, below,
                DROPS_NEGATIVE, ALIGNED, ACC,
            )  # fmt: skip
            if SEPARABLE:
                h0, h1, h2, h3, h4, h5, h6, h7 = _taps(
                    h0, h1, h2, h3, h4, h5, h6, h7, v, v, v, v, v, v, v, v, COLS,
                    f, UP_X * t + phase_x, 0, taps_x, 1, 1, DOWN_X, 0, CORRELATE, False,
                )  # fmt: skip
            else:
                a0, a1, a2, a3, a4, a5, a6, a7 = _taps(
                    a0, a1, a2, a3, a4, a5, a6, a7, v, v, v, v, v, v, v, v, 8,
                    f, ky, UP_X * t + phase_x, taps_y, taps_x,
                    COLS, DOWN_Y, DOWN_X, CORRELATE, False,
                )  # fmt: skip
    if SEPARABLE:
        if COLS == 1:
            h1 = h0
        if COLS <= 2:
            h2, h3 = h0, h1
        if COLS <= 4:
            h4, h5, h6, h7 = h0, h1, h2, h3
        if TAPS_Y > 0:
            a0, a1, a2, a3, a4, a5, a6, a7 = _taps(
                a0, a1, a2, a3, a4, a5, a6, a7, h0, h1, h2, h3, h4, h5, h6, h7, 8,
                f, ky, 0, TAPS_Y, 1, COLS, DOWN_Y, 0, CORRELATE, True,
            )  # fmt: skip
        else:
            a0, a1, a2, a3, a4, a5, a6, a7 = _taps(
                a0, a1, a2, a3, a4, a5, a6, a7, h0, h1, h2, h3, h4, h5, h6, h7, 8,
                f, ky, 0, taps_y, 1, COLS, DOWN_Y, 0, CORRELATE, False,
            )  # fmt: skip
    return a0, a1, a2, a3, a4, a5, a6, a7


@triton.jit
def _first(patch, shift, SPAN: tl.constexpr, UP: tl.constexpr, PHASE: tl.constexpr):
    """Number of the first sample that output 0 of a patch meets, and in which tap."""
    if SPAN % UP == 0:
        number = patch * (SPAN // UP)
        tap = tl.full([], PHASE, tl.int32)
    else:
        stuffed = patch * SPAN - PHASE
        number = (stuffed + (UP - 1)) // UP
        tap = number * UP - stuffed
    return number - shift, tap


@triton.jit
def _finish(
    u, y, add, mask, scale, noise, strength, b, alpha, act_gain, clamp,
    row, unit, lane, cols, channel, scale_row, noise_row, line_inside,
    ACT: tl.constexpr, HAS_CLAMP: tl.constexpr, NHWC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """E(u) + add into y, a matrix [rows, cols]; outside, indices point at row 0 or column 0."""
    LANES: tl.constexpr = lane.shape[2]
    units = tl.cdiv(cols, LANES)
    row = tl.where(line_inside, row, 0)
    noise_row = tl.where(line_inside, noise_row, 0)
    unit_inside = line_inside & (unit < units)
    unit = tl.where(unit < units, unit, 0)
    word = row * units + unit
    col = unit * LANES + lane
    if ALIGNED:
        inside = unit_inside
        offset = word * LANES + lane
    else:
        inside = unit_inside & (col < cols)
        col = tl.where(col < cols, col, 0)
        offset = row * cols + col
    if NHWC:
        u = affine(u, scale, noise, strength, b, col, scale_row + col, noise_row)
    else:
        u = affine(u, scale, noise, strength, b, channel, scale_row, noise_row + col)
    if ACT != 0:
        u = activate(
            u, mask, word, lane, unit_inside, inside, alpha, act_gain, clamp, ACT, HAS_CLAMP
        )
    if add is not None:
        u += tl.load(add + offset, inside, 0).to(u.dtype)
    tl.store(y + offset, u.to(y.dtype.element_ty), inside)


@triton.jit
def _interleave(a, b):
    """a[0], b[0], a[1], b[1], ... along the lanes."""
    return tl.reshape(tl.join(a, b), [a.shape[0], a.shape[1], 2 * a.shape[2]])


@triton.jit
def _emit(
    a0, a1, a2, a3, a4, a5, a6, a7, top, inside,
    y, add, mask, scale, noise, strength, b, gain, alpha, act_gain, clamp,
    sample, plane, site, unit, lane, cols, channel, out_height, out_width,
    ROWS: tl.constexpr, ACT: tl.constexpr, HAS_CLAMP: tl.constexpr,
    NOISE_PER_SAMPLE: tl.constexpr, NHWC: tl.constexpr, COLS: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Finishes the first ROWS rows of the patches, `top` and those below it in the output."""
    if not NHWC:
        if COLS == 2:
            a0, a1 = _interleave(a0, a1), _interleave(a2, a3)
            a2, a3 = _interleave(a4, a5), _interleave(a6, a7)
        if COLS == 4:
            a0 = _interleave(_interleave(a0, a2), _interleave(a1, a3))
            a1 = _interleave(_interleave(a4, a6), _interleave(a5, a7))
        if COLS == 8:
            even = _interleave(_interleave(a0, a4), _interleave(a2, a6))
            odd = _interleave(_interleave(a1, a5), _interleave(a3, a7))
            a0 = _interleave(even, odd)
        lane = tl.arange(0, 8)[None, None, :]
    for i in tl.static_range(ROWS * COLS if NHWC else ROWS):
        if i == 0:
            u = a0
        elif i == 1:
            u = a1
        elif i == 2:
            u = a2
        elif i == 3:
            u = a3
        elif i == 4:
            u = a4
        elif i == 5:
            u = a5
        elif i == 6:
            u = a6
        else:
            u = a7
        if NHWC:
            oy = top + i // COLS
            ox = site * COLS + i % COLS
            out_inside = inside & (oy >= 0) & (oy < out_height) & (ox < out_width)
            pixel = oy * out_width + ox
            out_row = sample * (out_height * out_width) + pixel
            noise_row = out_row if NOISE_PER_SAMPLE else pixel
            scale_row = sample * cols
        else:
            oy = top + i
            out_inside = inside & (oy >= 0) & (oy < out_height)
            out_row = plane * out_height + oy
            noise_row = oy * out_width
            if NOISE_PER_SAMPLE:
                noise_row += sample * (out_height * out_width)
            scale_row = plane
        _finish(
            gain * u, y, add, mask, scale, noise, strength, b, alpha, act_gain, clamp,
            out_row, unit, lane, cols, channel, scale_row, noise_row, out_inside,
            ACT, HAS_CLAMP, NHWC, ALIGNED,
        )  # fmt: skip


@triton.jit
def _d_of_v(
    dy, mask, row, unit, lane, cols, row_inside, end, above, below,
    DROPS_NEGATIVE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """d(v) of some rows of [rows, cols], in front of column `end`."""
    if mask is None:
        col = unit * 8 + lane
        dv = above * tl.load(dy + (row * cols + col), row_inside & (col < end), 0).to(ACC)
    else:
        word = row * (cols // 8) + unit
        inside = row_inside & (unit * 8 < end)
        bits = tl.load(mask + word, inside, 0).to(tl.int32) >> lane
        offset = word * 8 + lane
        dv = tl.load(dy + offset, inside, 0).to(ACC)
        dv = differentiate(dv, bits, above, below, DROPS_NEGATIVE)
    return dv


@triton.jit
def _add_share(
    dy, mask, workspace, share, shares, above, below, rows, cols, parts, part,
    NHWC: tl.constexpr, DROPS_NEGATIVE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A share of the sums of d(v), of the matrix [rows, cols] of pixels and channels or of planes
    and pixels: the former by rows, the latter by parts of a row. It is taken from about where the
    program's patches are, so that it comes out of the cache."""
    lane = tl.arange(0, 8)[None, None, :]
    if NHWC:
        row = tl.arange(0, 16)[:, None, None]
        unit = tl.arange(0, 8)[None, :, None]
        each = tl.cdiv(rows, shares)
        end = tl.minimum(share * each + each, rows)
        for first in range(0, tl.cdiv(cols, 8), 8):
            sums = tl.zeros([16, 8, 8], ACC)
            for start in range(share * each, end, 16):
                sums += _d_of_v(
                    dy, mask, start + row, first + unit, lane, cols, start + row < end, cols,
                    above, below, DROPS_NEGATIVE, ACC,
                )  # fmt: skip
            col = first * 8 + tl.arange(0, 64)
            by_col = tl.reshape(tl.sum(sums, axis=0), [64])
            tl.store(workspace + share * cols + col, by_col, col < cols)
    else:
        unit = tl.arange(0, 128)[None, :, None]
        for index in range(share, rows * parts, shares):
            begin = index % parts * part
            end = tl.minimum(begin + part, cols)
            sums = tl.zeros([1, 128, 8], ACC)
            for start in range(begin, end, 1024):
                sums += _d_of_v(
                    dy, mask, index // parts, start // 8 + unit, lane, cols, index >= 0, end,
                    above, below, DROPS_NEGATIVE, ACC,
                )  # fmt: skip
            tl.store(workspace + index, tl.sum(tl.reshape(sums, [1024]), axis=0))


@triton.jit(do_not_specialize=_SIZES)
def upfirdn2d_kernel(
    x, in_mask, y, add, mask, f, scale, noise, strength, b, workspace,
    gain, above, below, alpha, act_gain, clamp, sum_rows, sum_cols, parts, part,
    EVERY: tl.constexpr, SUM_NHWC: tl.constexpr, DROPS_NEGATIVE: tl.constexpr,
    ACT: tl.constexpr, HAS_CLAMP: tl.constexpr, NOISE_PER_SAMPLE: tl.constexpr,
    channels, in_height, in_width, out_height, out_width, stride_n, stride_h, stride_w, stride_c,
    shift_y, shift_x, taps_y, taps_x, groups, ahead, back, strips, lines, sites, x_tiles,
    channel_tiles,
    NHWC: tl.constexpr, SEPARABLE: tl.constexpr, CORRELATE: tl.constexpr,
    UP_Y: tl.constexpr, UP_X: tl.constexpr, DOWN_Y: tl.constexpr, DOWN_X: tl.constexpr,
    PHASE_Y: tl.constexpr, PHASE_X: tl.constexpr, COLS: tl.constexpr,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, ALIGNED_IN: tl.constexpr,
    ALIGNED_OUT: tl.constexpr, WIDE: tl.constexpr,
    LINES: tl.constexpr, UNITS: tl.constexpr, LANES: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    ROWS: tl.constexpr = 8 // COLS
    program = tl.program_id(0).to(tl.int64 if WIDE else tl.int32)
    if ALIGNED_IN:  # tells the compiler that every pixel starts a vector
        stride_n = stride_n // 8 * 8
        stride_h = stride_h // 8 * 8
        stride_w = stride_w // 8 * 8
    if WIDE:
        stride_h = stride_h.to(tl.int64)
    if above is not None:
        above = tl.full([], above, ACC)
        below = tl.full([], below, ACC)

    line = tl.arange(0, LINES)[:, None, None]
    unit = tl.arange(0, UNITS)[None, :, None]
    lane = tl.arange(0, LANES)[None, None, :]
    col_tile = program // channel_tiles % x_tiles
    row_tile = program // channel_tiles // x_tiles
    row = row_tile * (LINES // TILE_X) + line // TILE_X
    line_inside = row < lines
    row = tl.where(line_inside, row, 0)
    strip = row % strips
    plane = row // strips
    if NHWC:
        sample = plane
        site = col_tile * TILE_X + line % TILE_X
        unit += program % channel_tiles * UNITS
        channel = unit * LANES
        cols = channels
        if ALIGNED_IN:
            lane_inside = channel < channels
        else:
            lane_inside = channel + lane < channels
    else:
        sample = plane // channels
        unit += col_tile * UNITS
        site = unit * LANES + lane
        channel = plane % channels
        lane_inside = site < sites
        cols = out_width
    if ALIGNED_OUT:
        cols = cols // 8 * 8

    if TAPS_Y > 0:
        top = strip * (groups * DOWN_Y) - shift_y
    else:
        top, phase_y = _first(strip, shift_y, ROWS * DOWN_Y, UP_Y, PHASE_Y)
    left, phase_x = _first(site, shift_x, COLS * DOWN_X, UP_X, PHASE_X)
    origin = sample * stride_n + channel * stride_c + top * stride_h + left * stride_w
    in_lane = lane * stride_c if NHWC else 0

    a0 = tl.zeros([LINES, UNITS, LANES], ACC)
    a1, a2, a3, a4, a5, a6, a7 = a0, a0, a0, a0, a0, a0, a0
    if TAPS_Y > 0:
        for step in range(ahead + groups):
            for s in tl.static_range(DOWN_Y):
                row = top + step * DOWN_Y + s
                a0, a1, a2, a3, a4, a5, a6, a7 = _row(
                    a0, a1, a2, a3, a4, a5, a6, a7, x, in_mask, f, origin, in_lane,
                    (step * DOWN_Y + s) * stride_h, stride_w,
                    line_inside & (row >= 0) & (row < in_height), left, in_width,
                    lane_inside, UP_Y * s + (TAPS_Y - DOWN_Y), phase_x, taps_y, taps_x,
                    above, below, DROPS_NEGATIVE, ALIGNED_IN, ACC, SEPARABLE, CORRELATE,
                    UP_X, DOWN_Y, DOWN_X, PHASE_X, COLS, TAPS_Y, TAPS_X,
                )  # fmt: skip
            first_top = strip * (groups * UP_Y) - back
            out_top = first_top + step * UP_Y
            _emit(
                a0, a1, a2, a3, a4, a5, a6, a7, out_top,
                # Not step >= ahead: Triton 3.9 interprets a comparison of scalars as an int32.
                line_inside & (out_top >= first_top + ahead * UP_Y),
                y, add, mask, scale, noise, strength, b, gain, alpha, act_gain, clamp,
                sample, plane, site, unit, lane, cols, channel, out_height, out_width,
                UP_Y, ACT, HAS_CLAMP, NOISE_PER_SAMPLE, NHWC, COLS, ALIGNED_OUT,
            )  # fmt: skip
            zero = tl.zeros_like(a0)
            if UP_Y * COLS == 1:
                a0, a1, a2, a3, a4, a5, a6, a7 = a1, a2, a3, a4, a5, a6, a7, zero
            elif UP_Y * COLS == 2:
                a0, a1, a2, a3, a4, a5, a6, a7 = a2, a3, a4, a5, a6, a7, zero, zero
            elif UP_Y * COLS == 4:
                a0, a1, a2, a3, a4, a5, a6, a7 = a4, a5, a6, a7, zero, zero, zero, zero
            else:
                a0, a1, a2, a3, a4, a5, a6, a7 = zero, zero, zero, zero, zero, zero, zero, zero
    else:
        for s in range((taps_y - 1 + DOWN_Y * (ROWS - 1)) // UP_Y + 1):
            a0, a1, a2, a3, a4, a5, a6, a7 = _row(
                a0, a1, a2, a3, a4, a5, a6, a7, x, in_mask, f, origin, in_lane, s * stride_h,
                stride_w, line_inside & (top + s >= 0) & (top + s < in_height), left, in_width,
                lane_inside, UP_Y * s + phase_y, phase_x, taps_y, taps_x, above, below,
                DROPS_NEGATIVE, ALIGNED_IN, ACC, SEPARABLE, CORRELATE,
                UP_X, DOWN_Y, DOWN_X, PHASE_X, COLS, TAPS_Y, TAPS_X,
            )  # fmt: skip
        _emit(
            a0, a1, a2, a3, a4, a5, a6, a7, strip * ROWS, line_inside,
            y, add, mask, scale, noise, strength, b, gain, alpha, act_gain, clamp,
            sample, plane, site, unit, lane, cols, channel, out_height, out_width,
            ROWS, ACT, HAS_CLAMP, NOISE_PER_SAMPLE, NHWC, COLS, ALIGNED_OUT,
        )  # fmt: skip

    if workspace is not None:  # noqa: SIM102, this one is decided by the compiler
        if program % EVERY == 0:
            _add_share(
                x, in_mask, workspace, program // EVERY, tl.cdiv(tl.num_programs(0), EVERY),
                above, below, sum_rows, sum_cols, parts, part, SUM_NHWC, DROPS_NEGATIVE, ACC,
            )  # fmt: skip


def upfirdn2d_forward(
    x: torch.Tensor,
    f: torch.Tensor | None,
    fir: tuple,
    y: torch.Tensor,
    add: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    geometry: tuple[int, int, int, int] | None = None,
    tail: tuple | None = None,
) -> None:
    """y = E(u(x)) + add, and the mask where there is one; without a tail y = u(x) + add."""
    scale = noise = strength = b = None
    act, alpha, gain, clamp = 0, 0.0, 1.0, math.inf
    if tail is not None:
        scale, noise, strength, b, act, alpha, gain, clamp = tail
    plan = _plan_of(x, f, y, fir, mask is not None)
    if mask is not None:
        _check_units(y.shape[1] if plan.NHWC else y.shape[3], plan.NHWC)
    upfirdn2d_kernel[plan.grid](
        x, None, y, add, words(mask), f, scale, noise, strength, b, None,
        float(fir[-1]), None, None, alpha, gain, clamp, 0, 0, 0, 0,
        1, False, False, act, clamp != math.inf, noise is not None and noise.ndim == 2, *plan,
        num_warps=_WARPS,
    )  # fmt: skip


def upfirdn2d_masked(
    dy: torch.Tensor,
    mask: torch.Tensor | None,
    dx: torch.Tensor,
    total: torch.Tensor | None,
    scale: torch.Tensor | None,
    f: torch.Tensor | None,
    fir: tuple,
    geometry: tuple[int, int, int, int],
    negative_slope: float,
    gain: float,
) -> None:
    """dx = scale * u(d(v)), d(v) = dy * gain * (1 or negative_slope, 0 where clamped)."""
    if gain == 0:
        dx.zero_()
        if total is not None:
            total.zero_()
        return
    outer, channels, inner, _ = geometry
    by_pixel = inner == 1
    if mask is not None:
        _check_units(channels if by_pixel else dy.shape[3], by_pixel)
    plan = _plan_of(dy, f, dx, fir, False)
    workspace, rows, cols, parts, part, every = None, 0, 0, 0, 0, 1
    if total is not None:
        programs = plan.grid[0]
        every = steps_of(programs)
        shares = triton.cdiv(programs, every)
        rows, cols = (outer, channels) if by_pixel else (outer * channels, inner)
        if not by_pixel:
            part = triton.cdiv(triton.cdiv(cols, max(1, shares // rows)), 1024) * 1024
            parts = triton.cdiv(cols, part)
        workspace = total.new_empty(shares * cols if by_pixel else rows * parts)
    upfirdn2d_kernel[plan.grid](
        dy, words(mask), dx, None, None, f, scale, None, None, None, workspace,
        float(fir[-1]), gain, gain * negative_slope, 0.0, 1.0, math.inf, rows, cols, parts, part,
        every, by_pixel, negative_slope == 0, 0, False, False, *plan,
        num_warps=_WARPS,
    )  # fmt: skip
    if total is not None:
        shape = (shares, channels, 1) if by_pixel else (outer, channels, parts)
        torch.sum(workspace.view(shape), dim=(0, 2), out=total)


def _plan_of(
    x: torch.Tensor, f: torch.Tensor | None, y: torch.Tensor, fir: tuple, writes_mask: bool
) -> _Plan:
    nhwc = not y.is_contiguous() or y.shape[2] == y.shape[3] == 1
    taps = (1, 1) if f is None else tuple(f.shape)
    # 16 bytes, but a unit of the mask where one is written.
    vector = 8 if writes_mask or y.itemsize == 2 else 4
    return _plan(tuple(x.shape), x.stride(), tuple(y.shape[2:]), nhwc, taps, tuple(fir), vector)


def _check_units(size: int, nhwc: bool) -> None:
    if size % 8:
        name = "channels of an NHWC" if nhwc else "width of an NCHW"
        raise ValueError(f"a mask needs whole units of 8: the {name} image is {size}")
