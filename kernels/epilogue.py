"""The epilogue of every fused op; csrc/epilogue.h states the contract of the four maps.

    v = scale[n, c] * x + strength * noise[n, pixel] + b[c]
    y = clamp(gain * act(v; alpha), -clamp, +clamp)

A buffer is walked as a matrix [rows, cols] in memory order, in tiles of [ROWS, UNITS, 8]: 8
elements are one unit of the mask and one or two wide memory accesses of a thread. A row is

    planes   NCHW: one plane, so bias and scale are one number a row.
    pixels   NHWC: FOLD pixels, so the bias is the same vector in every row. FOLD is 8 where one
             pixel is not whole units but 8 pixels never straddle a sample.
    runs     other memory orders with per-sample operands: the longest run in one plane and sample.
    flat     all there is, where the kernel writes a mask and rows would end inside a unit.

Arithmetic is in float32. float64 is for the interpreter, which keeps Python's floats; on a GPU
Triton passes alpha, gain and clamp as float32.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .activations import curvature, slope, value

_TILE = 2048  # elements: 16 for each thread of the default 4 warps
WAVE = 2048  # programs that fill the largest GPUs once


def steps_of(programs: int) -> int:
    """How many tiles to a partial sum, so that there are few of them and enough programs."""
    return next(count for count in (16, 4, 1) if count == 1 or programs >= count * WAVE)


class _Walk(NamedTuple):
    """The last arguments of every kernel."""

    rows: int
    cols: int
    col_tiles: int
    channels: int
    inner: int
    pixels: int
    LAYOUT: str
    FOLD: int
    ALIGNED: bool
    WIDE: bool
    ONE_SAMPLE: bool
    STEPS: int
    ROWS: int
    UNITS: int

    @property
    def row_groups(self) -> int:
        return triton.cdiv(self.rows, self.ROWS * self.STEPS)

    @property
    def grid(self) -> tuple[int]:
        return (self.row_groups * self.col_tiles,)


@functools.lru_cache(maxsize=4096)
def _walk(
    outer: int,
    channels: int,
    inner: int,
    pixels: int,
    per_sample: bool,
    writes_mask: bool = False,
    writes_sum: bool = False,
    samples: int = 1,
) -> _Walk:
    """For one of the samples that programs keep to, or for all that there are."""
    numel = outer * channels * inner
    if not per_sample:
        pixels = inner if inner > 1 else outer

    fold = 1
    if inner == 1:
        layout = "pixels"
        if channels % 8 and outer % 8 == 0 and pixels % 8 == 0:
            fold = 8
        cols = channels * fold
    else:
        layout = "planes" if pixels == inner else "runs"
        cols = math.gcd(inner, pixels)
    if writes_mask and cols % 8:
        layout, cols = "flat", numel
    rows = numel // cols

    # The tile that leaves the fewest units unused, of those the widest; a warp is wide enough.
    units = triton.cdiv(cols, 8)
    widths = [256, 128, 64, 32] if units > 16 else [triton.next_power_of_2(units)]
    tile_units = min(widths, key=lambda width: triton.cdiv(units, width) * width)
    col_tiles = triton.cdiv(units, tile_units)
    tile_rows = 1 if layout == "flat" else _TILE // (8 * tile_units)

    steps = 1
    if writes_sum and layout == "pixels":
        # A program leaves one partial sum per channel, so it should see many rows.
        steps = steps_of(triton.cdiv(rows, tile_rows) * col_tiles * samples)
    return _Walk(
        rows,
        cols,
        col_tiles,
        channels,
        inner,
        pixels,
        layout,
        fold,
        cols % 8 == 0,
        numel * samples >= 2**31 - _TILE,
        per_sample and layout == "pixels" and pixels % (tile_rows * fold) == 0,
        steps,
        tile_rows,
        tile_units,
    )


# The sizes differ from layer to layer; specialising on them would compile each layer anew.
_SIZES = ["rows", "cols", "col_tiles", "channels", "inner", "pixels"]


@triton.jit
def _tile(
    row_tile, col_tile, rows, cols,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Indices of a tile and what of it is inside; outside, they point at row 0 or column 0."""
    units = tl.cdiv(cols, 8)
    row = row_tile * ROWS + tl.arange(0, ROWS)[:, None, None]
    unit = col_tile * UNITS + tl.arange(0, UNITS)[None, :, None]
    lane = tl.arange(0, 8)[None, None, :]
    unit_inside = (row < rows) & (unit < units)
    row = tl.where(row < rows, row, 0)
    unit = tl.where(unit < units, unit, 0)
    word = row * units + unit
    col = unit * 8 + lane
    if ALIGNED:
        inside = unit_inside
        offset = word * 8 + lane
    else:
        inside = unit_inside & (col < cols)
        col = tl.where(col < cols, col, 0)
        offset = row * cols + col
    return row, col, lane, word, offset, unit_inside, inside


@triton.jit
def _place(
    row_tile, row, col, rows, cols, channels, inner, pixels, NOISE_PER_SAMPLE: tl.constexpr,
    LAYOUT: tl.constexpr, FOLD: tl.constexpr, ALIGNED: tl.constexpr, ONE_SAMPLE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Indices into bias, scale and noise, each in the smallest shape that holds them all."""
    if ALIGNED:
        cols = cols // 8 * 8  # tells the compiler that every row starts a unit
    if LAYOUT == "planes":
        channel = row % channels
        scale_at = row
        position = row // channels * cols + col
        pixel = col
    elif LAYOUT == "pixels":
        position = row * FOLD
        if ONE_SAMPLE:
            sample = tl.minimum(row_tile * ROWS, rows - 1) * FOLD // pixels
        else:
            sample = position // pixels
        if FOLD == 1:
            channel = col
            scale_at = sample * cols + col
        else:
            channel = col % channels
            scale_at = sample * channels + channel
            position += col // channels
        pixel = position - sample * pixels
    else:
        start = col if LAYOUT == "flat" else row * cols
        plane = start // inner
        channel = plane % channels
        position = plane // channels * inner + start % inner
        sample = position // pixels
        scale_at = sample * channels + channel
        if LAYOUT == "runs":
            position += col
        pixel = position - sample * pixels
    return channel, scale_at, position if NOISE_PER_SAMPLE else pixel


@triton.jit
def _lookup(pointer, index, tile):
    """pointer[index] in the layout of the tile: left to itself, a load of fewer elements spreads
    them over the threads in its own way, and repeats the load of a single one."""
    if index.shape[1] * index.shape[2] == 1:
        numbers = tl.load(pointer + tl.reshape(index, [index.shape[0]]))[:, None, None]
    else:
        numbers = tl.load(pointer + tl.broadcast_to(index, tile.shape))
    return numbers


@triton.jit
def combine(v, scale, z, strength, b):
    """scale * v + strength * z + b of numbers that broadcast to v; strength is a pointer."""
    if scale is not None:
        v *= scale
    if z is not None:
        if strength is not None:
            z *= tl.load(strength)
        v += z
    if b is not None:
        v += b.to(v.dtype)
    return v


@triton.jit
def affine(v, scale, noise, strength, b, channel, scale_at, noise_at):
    if scale is not None:
        scale = _lookup(scale, scale_at, v)
    if noise is not None:
        noise = _lookup(noise, noise_at, v)
    if b is not None:
        b = _lookup(b, channel, v)
    return combine(v, scale, noise, strength, b)


@triton.jit
def activate(
    v, mask, word, lane, unit_inside, inside, alpha, gain, clamp,
    ACT: tl.constexpr, HAS_CLAMP: tl.constexpr,
):  # fmt: skip
    """clamp(gain * act(v)), and the bits of v in its words of the mask, where there is one."""
    u = gain * value(v, alpha, ACT)
    if mask is not None:
        bits = tl.where(v <= 0, 1 << lane, 0)
        if HAS_CLAMP:
            # 16 bits apart, so that LLVM does not do this in 16-bit arithmetic, which is slower.
            bits += tl.where(tl.abs(u) <= clamp, 0, 1 << (lane + 16))
        bits = tl.sum(tl.where(inside, bits, 0), axis=2, keep_dims=True)
        tl.store(mask + word, (bits | (bits >> 8)).to(tl.int16), unit_inside)
    if HAS_CLAMP:
        limit = tl.full([], clamp, v.dtype)
        u = tl.maximum(u, -limit, propagate_nan=tl.PropagateNan.ALL)
        u = tl.minimum(u, limit, propagate_nan=tl.PropagateNan.ALL)
    return u


@triton.jit
def _bits(mask, word, lane, offset, inside, ALIGNED: tl.constexpr):
    """Of each element: bit 0 says v <= 0 and bit 8 clamped."""
    if not ALIGNED:
        word = offset // 8
        lane = offset % 8
    return tl.load(mask + word, inside, 0).to(tl.int32) >> lane


@triton.jit
def differentiate(dy, bits, above, below, DROPS_NEGATIVE: tl.constexpr):
    """d(v) of dy: `above` and `below` 0 are the factors, bit 0 says below and bit 8 clamped."""
    if DROPS_NEGATIVE:
        dv = tl.where(bits & 0x101 != 0, 0, above * dy)
    else:
        dv = dy * tl.where(bits & 1 != 0, below, above)
        dv = tl.where(bits & 0x100 != 0, 0, dv)
    return dv


@triton.jit
def _store_sums(
    workspace, sums, row_group, col_tile, rows, cols, col_tiles,
    LAYOUT: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """One number a column and program (pixels), or a row and program."""
    if LAYOUT == "pixels":
        col = col_tile * (UNITS * 8) + tl.arange(0, UNITS * 8)
        by_col = tl.reshape(tl.sum(sums, axis=0), [UNITS * 8])
        tl.store(workspace + (row_group * cols + col), by_col, col < cols)
    else:
        row = row_group * ROWS + tl.arange(0, ROWS)
        by_row = tl.sum(tl.sum(sums, axis=2), axis=1)
        tl.store(workspace + (row * col_tiles + col_tile), by_row, row < rows)


@triton.jit(do_not_specialize=_SIZES)
def epilogue_forward_kernel(
    x, y, mask, scale, noise, strength, b, alpha, gain, clamp,
    ACT: tl.constexpr, HAS_CLAMP: tl.constexpr, NOISE_PER_SAMPLE: tl.constexpr,
    rows, cols, col_tiles, channels, inner, pixels,
    LAYOUT: tl.constexpr, FOLD: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    ONE_SAMPLE: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0).to(tl.int64 if WIDE else tl.int32)
    row_tile = program // col_tiles
    col_tile = program % col_tiles
    row, col, lane, word, offset, unit_inside, inside = _tile(
        row_tile, col_tile, rows, cols, ALIGNED, ROWS, UNITS
    )
    channel, scale_at, noise_at = _place(
        row_tile, row, col, rows, cols, channels, inner, pixels,
        NOISE_PER_SAMPLE, LAYOUT, FOLD, ALIGNED, ONE_SAMPLE, ROWS,
    )  # fmt: skip
    v = tl.load(x + offset, inside).to(ACC)
    v = affine(v, scale, noise, strength, b, channel, scale_at, noise_at)
    u = activate(
        v, mask, word, lane, unit_inside, inside, alpha, gain, clamp, ACT, HAS_CLAMP
    )  # fmt: skip
    tl.store(y + offset, u.to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=_SIZES)
def epilogue_masked_kernel(
    dy, mask, dx, workspace, scale, negative_slope, gain, DROPS_NEGATIVE: tl.constexpr,
    rows, cols, col_tiles, channels, inner, pixels,
    LAYOUT: tl.constexpr, FOLD: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    ONE_SAMPLE: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if dy.dtype.element_ty == tl.float64 else tl.float32
    above = tl.full([], gain, ACC)
    below = above * negative_slope
    program = tl.program_id(0).to(tl.int64 if WIDE else tl.int32)
    row_group = program // col_tiles
    col_tile = program % col_tiles
    sums = tl.zeros([ROWS, UNITS, 8], ACC)
    for step in range(STEPS):
        row_tile = row_group * STEPS + step
        row, col, lane, word, offset, unit_inside, inside = _tile(
            row_tile, col_tile, rows, cols, ALIGNED, ROWS, UNITS
        )
        if mask is None:
            dv = above * tl.load(dy + offset, inside, 0).to(ACC)
        else:
            # Before dy: the other way round Triton repeats the arithmetic in a second layout.
            bits = _bits(mask, word, lane, offset, inside, ALIGNED)
            dv = tl.load(dy + offset, inside, 0).to(ACC)
            dv = differentiate(dv, bits, above, below, DROPS_NEGATIVE)
        if workspace is not None:
            sums += dv
        if scale is not None:
            channel, scale_at, noise_at = _place(
                row_tile, row, col, rows, cols, channels, inner, pixels,
                False, LAYOUT, FOLD, ALIGNED, ONE_SAMPLE, ROWS,
            )  # fmt: skip
            dv *= _lookup(scale, scale_at, dv)
        tl.store(dx + offset, dv.to(dx.dtype.element_ty), inside)
    if workspace is not None:
        _store_sums(
            workspace, sums, row_group, col_tile, rows, cols, col_tiles, LAYOUT, ROWS, UNITS
        )


@triton.jit(do_not_specialize=["programs", "parts", "all_parts", *_SIZES])
def epilogue_backward_kernel(
    dy, y, mask, noise, scale, dx, workspace, negative_slope, gain,
    DROPS_NEGATIVE: tl.constexpr, NOISE_PER_SAMPLE: tl.constexpr, programs, parts, all_parts,
    rows, cols, col_tiles, channels, inner, pixels,
    LAYOUT: tl.constexpr, FOLD: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    ONE_SAMPLE: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if dy.dtype.element_ty == tl.float64 else tl.float32
    DROPPED: tl.constexpr = 0x101 if DROPS_NEGATIVE else 0x100
    above = tl.full([], gain, ACC)
    below = above * negative_slope
    program = tl.program_id(0).to(tl.int64 if WIDE else tl.int32)
    if ALIGNED:
        cols = cols // 8 * 8  # tells the compiler that every row starts a unit
    if LAYOUT == "pixels":
        sample = program // programs
        program = program % programs
        if noise is not None and NOISE_PER_SAMPLE:
            noise += sample * pixels
        if scale is not None:
            scale += sample * (cols // FOLD)
        if workspace is not None:
            workspace += sample * parts
    row_group = program // col_tiles
    col_tile = program % col_tiles
    dv_sums = tl.zeros([ROWS, UNITS, 8], ACC)
    y_sums = tl.zeros([ROWS, UNITS, 8], ACC)
    noise_sums = tl.zeros([ROWS, UNITS, 8], ACC)
    for step in range(STEPS):
        row_tile = row_group * STEPS + step
        row, col, lane, word, offset, unit_inside, inside = _tile(
            row_tile, col_tile, rows, cols, ALIGNED, ROWS, UNITS
        )
        channel, scale_at, noise_at = _place(
            row_tile, row, col, rows, cols, channels, inner, pixels,
            NOISE_PER_SAMPLE, LAYOUT, FOLD, ALIGNED, ONE_SAMPLE, ROWS,
        )  # fmt: skip
        if LAYOUT == "pixels":
            word += sample * rows * (cols // 8)
            offset += sample * rows * cols
        if mask is None:
            d = tl.load(dy + offset, inside, 0).to(ACC)
            dv = above * d
        else:
            bits = _bits(mask, word, lane, offset, inside, ALIGNED)
            d = tl.load(dy + offset, inside, 0).to(ACC)
            dv = differentiate(d, bits, above, below, DROPS_NEGATIVE)
        if workspace is not None:
            dv_sums += dv
            if y is not None:
                dy_y = d * tl.load(y + offset, inside, 0).to(ACC)
                if mask is not None:
                    dy_y = tl.where(bits & DROPPED != 0, 0, dy_y)
                y_sums += dy_y
            if noise is not None:
                noise_sums += tl.where(inside, dv * _lookup(noise, noise_at, dv), 0)
        if dx is not None:
            if scale is not None:
                dv *= _lookup(scale, scale_at, dv)
            tl.store(dx + offset, dv.to(dx.dtype.element_ty), inside)
    if workspace is not None:
        _store_sums(
            workspace, dv_sums, row_group, col_tile, rows, cols, col_tiles, LAYOUT, ROWS, UNITS
        )
        if y is not None:
            workspace += all_parts
            _store_sums(
                workspace, y_sums, row_group, col_tile, rows, cols, col_tiles, LAYOUT, ROWS, UNITS
            )
        if noise is not None:
            workspace += all_parts
            _store_sums(
                workspace, noise_sums, row_group, col_tile, rows, cols, col_tiles,
                LAYOUT, ROWS, UNITS,
            )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def epilogue_curved_kernel(
    x, dy, h, dx, workspace, scale, noise, strength, b, alpha, gain, clamp,
    ORDER: tl.constexpr, ACT: tl.constexpr, NOISE_PER_SAMPLE: tl.constexpr,
    rows, cols, col_tiles, channels, inner, pixels,
    LAYOUT: tl.constexpr, FOLD: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    ONE_SAMPLE: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0).to(tl.int64 if WIDE else tl.int32)
    row_group = program // col_tiles
    col_tile = program % col_tiles
    sums = tl.zeros([ROWS, UNITS, 8], ACC)
    for step in range(STEPS):
        row_tile = row_group * STEPS + step
        row, col, lane, word, offset, unit_inside, inside = _tile(
            row_tile, col_tile, rows, cols, ALIGNED, ROWS, UNITS
        )
        channel, scale_at, noise_at = _place(
            row_tile, row, col, rows, cols, channels, inner, pixels,
            NOISE_PER_SAMPLE, LAYOUT, FOLD, ALIGNED, ONE_SAMPLE, ROWS,
        )  # fmt: skip
        v = tl.load(x + offset, inside, 0).to(ACC)
        v = affine(v, scale, noise, strength, b, channel, scale_at, noise_at)
        dv = tl.load(dy + offset, inside, 0).to(ACC)
        if ORDER == 1:
            dv *= gain * slope(v, alpha, ACT)
        else:
            dv *= tl.load(h + offset, inside, 0).to(ACC) * (gain * curvature(v, alpha, ACT))
        dv = tl.where(tl.abs(gain * value(v, alpha, ACT)) > clamp, 0, dv)
        if workspace is not None:
            sums += dv
        if scale is not None:
            dv *= _lookup(scale, scale_at, dv)
        tl.store(dx + offset, dv.to(dx.dtype.element_ty), inside)
    if workspace is not None:
        _store_sums(
            workspace, sums, row_group, col_tile, rows, cols, col_tiles, LAYOUT, ROWS, UNITS
        )


def _workspace(walk: _Walk, total: torch.Tensor) -> torch.Tensor:
    parts = walk.row_groups * walk.cols if walk.LAYOUT == "pixels" else walk.rows * walk.col_tiles
    return total.new_empty(parts)


def _add_up(workspace: torch.Tensor, walk: _Walk, total: torch.Tensor) -> None:
    tiles = 1 if walk.LAYOUT == "pixels" else walk.inner // walk.cols * walk.col_tiles
    torch.sum(workspace.view(-1, walk.channels, tiles), dim=(0, 2), out=total)


def words(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask.view(torch.int16)


def epilogue_forward(
    x: torch.Tensor,
    y: torch.Tensor,
    mask: torch.Tensor | None,
    geometry: tuple[int, int, int, int],
    tail: tuple,
) -> None:
    """y = clamp(gain * act(v; alpha), -clamp, +clamp), and the mask where there is one."""
    scale, noise, strength, b, act, alpha, gain, clamp = tail
    per_sample = scale is not None or noise is not None
    walk = _walk(*geometry, per_sample, writes_mask=mask is not None)
    epilogue_forward_kernel[walk.grid](
        x, y, words(mask), scale, noise, strength, b, alpha, gain, clamp,
        act, clamp != math.inf, noise is not None and noise.ndim == 2, *walk,
    )  # fmt: skip


def epilogue_masked(
    dy: torch.Tensor,
    mask: torch.Tensor | None,
    dx: torch.Tensor,
    total: torch.Tensor | None,
    scale: torch.Tensor | None,
    geometry: tuple[int, int, int, int],
    negative_slope: float,
    gain: float,
) -> None:
    """d(v) = dy * gain * (1 or negative_slope, 0 where clamped); dx = scale * d(v)."""
    if gain == 0:
        dx.zero_()
        if total is not None:
            total.zero_()
        return
    walk = _walk(*geometry, scale is not None, writes_sum=total is not None)
    workspace = None if total is None else _workspace(walk, total)
    epilogue_masked_kernel[walk.grid](
        dy, words(mask), dx, workspace, scale, negative_slope, gain, negative_slope == 0, *walk
    )
    if total is not None:
        _add_up(workspace, walk, total)


def epilogue_backward(
    dy: torch.Tensor,
    y: torch.Tensor | None,
    mask: torch.Tensor | None,
    noise: torch.Tensor | None,
    scale: torch.Tensor | None,
    dx: torch.Tensor | None,
    moments: torch.Tensor | None,
    geometry: tuple[int, int, int, int],
    negative_slope: float,
    gain: float,
) -> None:
    """`epilogue_masked` with the sums of d(v), dy * y and d(v) * noise over a sample's pixels."""
    outer, channels, inner, pixels = geometry
    written = None
    if moments is not None:
        written = moments[: 2 if noise is None else 3]
        if y is None:
            written = written[::2]
    if gain == 0:
        for result in (dx, written):
            if result is not None:
                result.zero_()
        return

    samples = outer // pixels if inner == 1 else 1
    walk = _walk(
        outer // samples, channels, inner, pixels, True,
        writes_sum=moments is not None, samples=samples,
    )  # fmt: skip
    by_column = walk.LAYOUT == "pixels"
    walk = walk._replace(ONE_SAMPLE=by_column)
    rows, tiles = (walk.row_groups * walk.FOLD, 1) if by_column else (1, walk.col_tiles)
    workspace = written
    in_stages = written is not None and (rows * tiles > 1 or not written.is_contiguous())
    if in_stages:
        workspace = written.new_empty((*written.shape[:2], rows, channels, tiles))
    (programs,) = walk.grid
    all_parts = 0 if workspace is None else workspace.numel() // len(workspace)
    epilogue_backward_kernel[(programs * samples,)](
        dy, y, words(mask), noise, scale, dx, workspace, negative_slope, gain,
        negative_slope == 0, noise is not None and noise.ndim == 2,
        programs, all_parts // samples, all_parts, *walk,
    )  # fmt: skip
    if in_stages:
        torch.sum(workspace, dim=(2, 4), out=written)


def epilogue_curved(
    order: int,
    x: torch.Tensor,
    dy: torch.Tensor,
    h: torch.Tensor | None,
    dx: torch.Tensor,
    total: torch.Tensor | None,
    geometry: tuple[int, int, int, int],
    tail: tuple,
) -> None:
    """d(v) = dy * gain * act'(v), for order 2 dy * h * gain * act''(v); dx = scale * d(v)."""
    scale, noise, strength, b, act, alpha, gain, clamp = tail
    per_sample = scale is not None or noise is not None
    walk = _walk(*geometry, per_sample, writes_sum=total is not None)
    workspace = None if total is None else _workspace(walk, total)
    epilogue_curved_kernel[walk.grid](
        x, dy, h, dx, workspace, scale, noise, strength, b, alpha, gain, clamp,
        order, act, noise is not None and noise.ndim == 2, *walk,
    )  # fmt: skip
    if total is not None:
        _add_up(workspace, walk, total)
