"""Convolution of scaled channels, with the epilogue; contract: csrc/conv2d.h.

    y = E(C(pre * x; w)) + add                         conv2d_forward
    dw = sum over pixels of (post * dy) * (pre * x)    conv2d_weight_gradient

Both are matrix products whose larger operand is never made (implicit GEMM). Along each axis the
outputs fall into PHASES, whose taps meet samples of x and not the zeros between them: output
PHASES * q + phase meets sample STEP * q + shift + j in tap first + UP * j. A phase is a plain
convolution with stride STEP and a part of the taps.

    forward           [pixels of a phase, out channels] = sum over in channels and taps of x * w.
    weight gradient   [out channels, in channels] of a tap = sum over pixels of dy * x.

Where that leaves too few programs to fill a GPU, each has a part of the sum; the parts are added in
the same order every time, for the forward map by a second kernel, which has the epilogue.

The pixels of a forward tile run on from image to image, where images are small, or are of one image
(PER_IMAGE), so that scales are vectors, and each sample may have weights of its own.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import tuning
from .epilogue import activate, combine, words

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton 3.3
    TensorDescriptor = None


class Config(NamedTuple):
    """A tile of the result, the depth of a step, and how the compiler is to run it."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    boxes: bool = False
    """Load boxes of x and w, by the hardware of sm_90 and later, in place of element by element."""


class _Problem(NamedTuple):
    """The last arguments of the kernels but the tile."""

    samples: int
    in_channels: int
    in_height: int
    in_width: int
    out_channels: int
    out_height: int
    out_width: int
    taps_y: int
    taps_x: int
    pad_y: int
    pad_x: int
    x_n: int
    x_c: int
    x_h: int
    x_w: int
    CORRELATE: bool
    UP: int
    DOWN: int
    IN_ALIGNED: bool
    OUT_NHWC: bool
    OUT_ALIGNED: bool
    WIDE: bool
    PRECISION: str

    @property
    def phases(self) -> int:
        return self.UP // math.gcd(self.UP, self.DOWN)

    @property
    def phase_size(self) -> tuple[int, int]:
        """(H, W) of the outputs of phase 0; the others may be smaller by one."""
        return triton.cdiv(self.out_height, self.phases), triton.cdiv(self.out_width, self.phases)


# The sizes differ from layer to layer; specialising on them would compile each layer anew. Left
# to specialise are the strides of which one is 1.
_SIZES = [name for name in _Problem._fields[:15] if name not in ("x_c", "x_w")]


@triton.jit
def _first(phase, pad, taps, UP: tl.constexpr, DOWN: tl.constexpr):
    """Of a phase: the first tap, the sample that output 0 of the phase meets in it, how many."""
    start = phase * DOWN - pad
    tap = start & (UP - 1)  # UP is 1 or 2
    return tap, (start + tap) // UP, (taps - tap + (UP - 1)) // UP


@triton.jit
def _scales(factors, sample, inside, column, column_inside, channels, PER_IMAGE: tl.constexpr):
    """factors[sample, column] of a tile, as a row where all of it is one sample."""
    if PER_IMAGE:
        found = tl.load(factors + sample * channels + column, column_inside, 0)[None, :]
    else:
        at = (sample * channels)[:, None] + column[None, :]
        found = tl.load(factors + at, inside[:, None] & column_inside[None, :], 0)
    return found


@triton.jit
def _of_units(v):
    """One of each eight numbers of a vector that are the same, as [1, units, 1]."""
    return tl.max(tl.reshape(v, [1, v.shape[0] // 8, 8]), axis=2, keep_dims=True)


@triton.jit
def _finish(
    u, y, add, mask, scale, noise, strength, b, alpha, gain, clamp,
    sample, pixel, row_inside, column, channels, pixels,
    ACT: tl.constexpr, HAS_CLAMP: tl.constexpr, NOISE_PER_SAMPLE: tl.constexpr,
    NHWC: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, PER_IMAGE: tl.constexpr,
):  # fmt: skip
    """E(u) + add of a tile [pixels, channels] into y."""
    if ALIGNED:
        channels = channels // 8 * 8
    column_inside = column < channels
    if scale is not None:
        scale = _scales(scale, sample, row_inside, column, column_inside, channels, PER_IMAGE)
    if WIDE:
        sample = sample.to(tl.int64)
        column = column.to(tl.int64)
    row = sample * pixels + pixel
    if noise is not None:
        noise = tl.load(noise + (row if NOISE_PER_SAMPLE else pixel), row_inside, 0)[:, None]
    if b is not None:
        b = tl.load(b + column, column_inside, 0)[None, :]
    v = combine(u, scale, noise, strength, b)

    if NHWC:
        outer, outer_inside = row * channels, row_inside
        inner, inner_inside = column, column_inside
    else:
        v = tl.trans(v)
        outer, outer_inside = column * pixels, column_inside
        inner, inner_inside = sample * channels * pixels + pixel, row_inside
    offset = outer[:, None] + inner[None, :]
    inside = outer_inside[:, None] & inner_inside[None, :]
    if mask is not None:
        UNITS: tl.constexpr = v.shape[1] // 8
        word = (outer // 8)[:, None, None] + _of_units(inner // 8)
        unit_inside = outer_inside[:, None, None] & (_of_units(inner_inside.to(tl.int32)) > 0)
        lane = tl.arange(0, 8)[None, None, :]
        v = activate(
            tl.reshape(v, [v.shape[0], UNITS, 8]), mask, word, lane, unit_inside,
            tl.reshape(inside, [v.shape[0], UNITS, 8]), alpha, gain, clamp, ACT, HAS_CLAMP,
        )  # fmt: skip
        v = tl.reshape(v, inside.shape)
    elif ACT != 0:
        v = activate(v, None, None, None, None, None, alpha, gain, clamp, ACT, HAS_CLAMP)
    if add is not None:
        v += tl.load(add + offset, inside, 0).to(v.dtype)
    tl.store(y + offset, v.to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=[*_SIZES, "parts", "w_n", "w_y", "w_x"])
def conv2d_forward_kernel(
    x, w, x_box, w_box, y, workspace, add, mask, pre, scale, noise, strength, b, alpha, gain, clamp,
    parts, w_n, w_o, w_i, w_y, w_x,
    ACT: tl.constexpr, HAS_CLAMP: tl.constexpr, NOISE_PER_SAMPLE: tl.constexpr,
    W_ALIGNED: tl.constexpr, W_PER_SAMPLE: tl.constexpr,
    samples, in_channels, in_height, in_width, out_channels, out_height, out_width,
    taps_y, taps_x, pad_y, pad_x, x_n, x_c, x_h, x_w,
    CORRELATE: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr,
    IN_ALIGNED: tl.constexpr, OUT_NHWC: tl.constexpr, OUT_ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    PHASES: tl.constexpr, PER_IMAGE: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    STEP: tl.constexpr = PHASES * DOWN // UP
    if IN_ALIGNED:  # tells the compiler that every pixel is whole vectors
        in_channels = in_channels // 8 * 8
        x_n = x_n // 8 * 8
        x_h = x_h // 8 * 8
        x_w = x_w // 8 * 8
    if W_ALIGNED == "in":
        in_channels = in_channels // 8 * 8
        w_o = w_o // 8 * 8
    if OUT_ALIGNED or W_ALIGNED == "out":
        out_channels = out_channels // 8 * 8
    if W_ALIGNED == "out":
        w_i = w_i // 8 * 8
    if W_ALIGNED != "":
        w_n = w_n // 8 * 8
        w_y = w_y // 8 * 8
        w_x = w_x // 8 * 8

    program = tl.program_id(0)
    column_tiles = tl.cdiv(out_channels, COLS)
    first_column = program % column_tiles * COLS
    column = first_column + tl.arange(0, COLS)
    program = program // column_tiles
    phase_x = program % PHASES
    phase_y = program // PHASES % PHASES
    tile = program // (PHASES * PHASES)

    width = tl.cdiv(out_width, PHASES)
    pixels = tl.cdiv(out_height, PHASES) * width
    if PER_IMAGE:
        tiles = tl.cdiv(pixels, ROWS)
        sample = tile // tiles
        q = tile % tiles * ROWS + tl.arange(0, ROWS)
        row_inside = q < pixels
    else:
        q = tile * ROWS + tl.arange(0, ROWS)
        row_inside = q < samples * pixels
        sample = q // pixels
        q = q % pixels
    oy = q // width * PHASES + phase_y
    ox = q % width * PHASES + phase_x
    row_inside &= (oy < out_height) & (ox < out_width)

    first_y, shift_y, count_y = _first(phase_y, pad_y, taps_y, UP, DOWN)
    first_x, shift_x, count_x = _first(phase_x, pad_x, taps_x, UP, DOWN)
    top = q // width * STEP + shift_y
    left = q % width * STEP + shift_x
    lane = tl.arange(0, DEPTH)
    if x_box is not None:
        box_top = tile % tiles * ROWS // width + shift_y
        box_left = tile % tiles * ROWS % width + shift_x
    if WIDE:
        origin = sample.to(tl.int64) * x_n + top.to(tl.int64) * x_h + left * x_w
        x_c = tl.cast(x_c, tl.int64)
    else:
        origin = sample * x_n + top * x_h + left * x_w
    if W_PER_SAMPLE:
        w += sample.to(tl.int64) * w_n
    column_inside = column < out_channels
    in_column = (column * w_o)[None, :]

    # A step is one tap of DEPTH channels; taps run fastest, so that x is read again soon.
    taps = count_y * count_x
    steps = taps * tl.cdiv(in_channels, DEPTH)
    each = tl.cdiv(steps, parts)
    begin = tl.program_id(1) * each
    end = tl.minimum(begin + each, steps)
    start = begin // tl.maximum(taps, 1) * DEPTH
    jy = begin % tl.maximum(taps, 1) // tl.maximum(count_x, 1)
    jx = begin % tl.maximum(taps, 1) % tl.maximum(count_x, 1)
    acc = tl.zeros([ROWS, COLS], ACC)
    for _ in range(begin, end):
        channel = start + lane
        inside = row_inside & (top + jy >= 0) & (top + jy < in_height)
        inside &= (left + jx >= 0) & (left + jx < in_width)
        ky = first_y + UP * jy
        kx = first_x + UP * jx
        if not CORRELATE:
            ky = taps_y - 1 - ky
            kx = taps_x - 1 - kx
        at = (origin + (jy * x_h + jx * x_w))[:, None] + (channel * x_c)[None, :]
        w_at = (channel * w_i)[:, None] + (in_column + (ky * w_y + kx * w_x))
        if x_box is not None:
            a = tl.reshape(x_box.load([sample, box_top + jy, box_left + jx, start]), [ROWS, DEPTH])
            w_sample = sample if W_PER_SAMPLE else 0
            if W_ALIGNED == "in":
                m = w_box.load([w_sample, first_column, ky, kx, start])
                m = tl.trans(tl.reshape(m, [COLS, DEPTH]))
            else:
                m = w_box.load([w_sample, start, ky, kx, first_column])
                m = tl.reshape(m, [DEPTH, COLS])
        elif WHOLE:
            a = tl.load(x + at, inside[:, None], 0)
            m = tl.load(w + w_at, column_inside[None, :], 0)
        else:
            channel_inside = channel < in_channels
            a = tl.load(x + at, inside[:, None] & channel_inside[None, :], 0)
            m = tl.load(w + w_at, channel_inside[:, None] & column_inside[None, :], 0)
        if pre is not None:
            factor = _scales(
                pre, sample, row_inside, channel, channel < in_channels, in_channels, PER_IMAGE
            )
            a = (a.to(ACC) * factor).to(x.dtype.element_ty)
        acc = tl.dot(a, m, acc, input_precision=PRECISION, out_dtype=ACC)
        # Arithmetic with comparisons: Triton 3.9 interprets those of scalars as an int32.
        jx += 1
        carry = (jx == count_x).to(tl.int32)
        jx -= carry * count_x
        jy += carry
        carry = (jy == count_y).to(tl.int32)
        jy -= carry * count_y
        start += carry * DEPTH

    pixel = oy * out_width + ox
    pixels = out_height * out_width
    if workspace is None:
        _finish(
            acc, y, add, mask, scale, noise, strength, b, alpha, gain, clamp,
            sample, pixel, row_inside, column, out_channels, pixels,
            ACT, HAS_CLAMP, NOISE_PER_SAMPLE, OUT_NHWC, OUT_ALIGNED, WIDE, PER_IMAGE,
        )  # fmt: skip
    else:
        row = (tl.program_id(1) * samples + sample).to(tl.int64) * pixels + pixel
        offset = (row * out_channels)[:, None] + column[None, :]
        tl.store(workspace + offset, acc, row_inside[:, None] & column_inside[None, :])


@triton.jit(do_not_specialize=["parts", "samples", "channels", "pixels"])
def conv2d_sum_kernel(
    workspace, y, add, mask, scale, noise, strength, b, alpha, gain, clamp,
    parts, samples, channels, pixels,
    ACT: tl.constexpr, HAS_CLAMP: tl.constexpr, NOISE_PER_SAMPLE: tl.constexpr,
    OUT_NHWC: tl.constexpr, OUT_ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """E(sum of the parts) + add."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    row_inside = row < samples * pixels
    if OUT_ALIGNED:
        channels = channels // 8 * 8
    inside = row_inside[:, None] & (column < channels)[None, :]
    at = workspace + ((row.to(tl.int64) * channels)[:, None] + column[None, :])
    u = tl.zeros([ROWS, COLS], workspace.dtype.element_ty)
    for _ in range(parts):
        u += tl.load(at, inside, 0)
        at += samples.to(tl.int64) * pixels * channels
    _finish(
        u, y, add, mask, scale, noise, strength, b, alpha, gain, clamp,
        row // pixels, row % pixels, row_inside, column, channels, pixels,
        ACT, HAS_CLAMP, NOISE_PER_SAMPLE, OUT_NHWC, OUT_ALIGNED, WIDE, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*_SIZES, "parts", "d_part", "d_y", "d_x", "d_o"])
def conv2d_weight_gradient_kernel(
    x, dy, dw, pre, post, parts, d_part, d_o, d_i, d_y, d_x,
    samples, in_channels, in_height, in_width, out_channels, out_height, out_width,
    taps_y, taps_x, pad_y, pad_x, x_n, x_c, x_h, x_w,
    CORRELATE: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr,
    IN_ALIGNED: tl.constexpr, OUT_NHWC: tl.constexpr, OUT_ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    PHASES: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    STEP: tl.constexpr = PHASES * DOWN // UP
    if IN_ALIGNED:  # as above
        in_channels = in_channels // 8 * 8
        x_n = x_n // 8 * 8
        x_h = x_h // 8 * 8
        x_w = x_w // 8 * 8
    if OUT_ALIGNED:
        out_channels = out_channels // 8 * 8

    program = tl.program_id(0)
    row_tiles = tl.cdiv(out_channels, ROWS)
    column_tiles = tl.cdiv(in_channels, COLS)
    out_channel = program % row_tiles * ROWS + tl.arange(0, ROWS)
    program = program // row_tiles
    in_channel = program % column_tiles * COLS + tl.arange(0, COLS)
    kx = program // column_tiles % taps_x
    ky = program // column_tiles // taps_x

    # The one phase that has this tap, if any.
    phase_y = (pad_y - ky) & (PHASES - 1)
    phase_x = (pad_x - kx) & (PHASES - 1)
    reach_y = phase_y * DOWN + ky - pad_y
    reach_x = phase_x * DOWN + kx - pad_x
    there = ((reach_y | reach_x) & (UP - 1)) == 0
    height = (out_height - phase_y + (PHASES - 1)) // PHASES
    width = (out_width - phase_x + (PHASES - 1)) // PHASES
    pixels = height * width * there.to(tl.int32)
    width = tl.maximum(width, 1)
    # A step is DEPTH pixels of one image, so that scales are vectors.
    in_image = tl.cdiv(pixels, DEPTH)
    steps = samples * in_image
    each = tl.cdiv(steps, parts)
    begin = tl.program_id(1) * each
    acc = tl.zeros([ROWS, COLS], ACC)
    out_inside = out_channel < out_channels
    in_inside = in_channel < in_channels
    for step in range(begin, tl.minimum(begin + each, steps)):
        sample = step // in_image
        q = step % in_image * DEPTH + tl.arange(0, DEPTH)
        inside = q < pixels
        qy = q // width
        qx = q % width
        iy = qy * STEP + reach_y // UP
        ix = qx * STEP + reach_x // UP
        pixel = (qy * PHASES + phase_y) * out_width + (qx * PHASES + phase_x)
        image = sample.to(tl.int64) if WIDE else sample
        if WIDE:
            pixel = pixel.to(tl.int64)
            iy = iy.to(tl.int64)
        if OUT_NHWC:
            at = ((image * (out_height * out_width) + pixel) * out_channels)[:, None]
            at += out_channel[None, :]
        else:
            plane = image * out_channels * (out_height * out_width)
            at = (plane + pixel)[:, None] + (out_channel * (out_height * out_width))[None, :]
        in_at = (image * x_n + iy * x_h + ix * x_w)[:, None] + (in_channel * x_c)[None, :]
        hit = inside & (iy >= 0) & (iy < in_height) & (ix >= 0) & (ix < in_width)
        d = tl.load(dy + at, inside[:, None] & out_inside[None, :], 0)
        a = tl.load(x + in_at, hit[:, None] & in_inside[None, :], 0)
        if post is not None:
            factor = tl.load(post + sample * out_channels + out_channel, out_inside, 0)
            d = (d.to(ACC) * factor[None, :]).to(dy.dtype.element_ty)
        if pre is not None:
            factor = tl.load(pre + sample * in_channels + in_channel, in_inside, 0)
            a = (a.to(ACC) * factor[None, :]).to(x.dtype.element_ty)
        acc = tl.dot(tl.trans(d), a, acc, input_precision=PRECISION, out_dtype=ACC)

    if not CORRELATE:
        ky = taps_y - 1 - ky
        kx = taps_x - 1 - kx
    dw += tl.program_id(1).to(tl.int64) * d_part + (ky * d_y + kx * d_x)
    offset = (out_channel * d_o)[:, None] + (in_channel * d_i)[None, :]
    tl.store(dw + offset, acc, out_inside[:, None] & in_inside[None, :])


def conv2d_forward(
    x: torch.Tensor,  # [N, I, H, W], any strides
    w: torch.Tensor,  # [O, I, kh, kw], or [N, O, I, kh, kw]
    conv: tuple,
    y: torch.Tensor,  # [N, O, H', W'], dense NCHW or NHWC
    pre: torch.Tensor | None = None,  # [N, I]
    add: torch.Tensor | None = None,  # as y
    mask: torch.Tensor | None = None,
    geometry: tuple[int, int, int, int] | None = None,
    tail: tuple | None = None,
) -> None:
    """y = E(C(pre * x; w)) + add, and the mask where there is one; without a tail E(u) = u."""
    scale = noise = strength = b = None
    act, alpha, gain, clamp = 0, 0.0, 1.0, math.inf
    if tail is not None:
        scale, noise, strength, b, act, alpha, gain, clamp = tail
    operands = (scale, noise, strength, b, alpha, gain, clamp)
    constants = (act, clamp != math.inf, noise is not None and noise.ndim == 2)
    w = _packed(w)
    weights = (0, *w.stride()) if w.ndim == 4 else w.stride()
    along = _along(w)
    problem = _problem(x, y, conv, *w.shape[-2:])
    if mask is not None:
        _check_units(problem)

    def launch(config: Config, y: torch.Tensor, mask: torch.Tensor | None) -> None:
        plan = _forward_plan(problem, config, w.ndim == 5, _processors(x.device))
        workspace = None
        if plan.parts > 1:
            total = problem.samples * problem.out_height * problem.out_width
            workspace = x.new_empty(
                (plan.parts, total, problem.out_channels), dtype=_accumulator(x.dtype)
            )
        conv2d_forward_kernel[plan.grid](
            x, w, *_boxes(x, w, along, problem, config), y, workspace, add, words(mask), pre,
            *operands, plan.parts, *weights, *constants, along, w.ndim == 5, *problem,
            problem.phases, plan.per_image, problem.in_channels % config.depth == 0,
            *config[:3], num_warps=config.warps, num_stages=min(config.stages, _MOST_STAGES),
        )  # fmt: skip
        if workspace is not None:
            rows, cols = _SUM_TILE
            grid = (triton.cdiv(total, rows), triton.cdiv(problem.out_channels, cols))
            conv2d_sum_kernel[grid](
                workspace, y, add, words(mask), *operands, plan.parts,
                problem.samples, problem.out_channels, problem.out_height * problem.out_width,
                *constants, problem.OUT_NHWC, problem.OUT_ALIGNED, problem.WIDE, rows, cols,
            )  # fmt: skip

    def trial(config: Config) -> None:  # y may be x or add
        launch(config, torch.empty_like(y), None if mask is None else torch.empty_like(mask))

    boxes = along != "" and _has_boxes(x.device) and x.data_ptr() % 16 == w.data_ptr() % 16 == 0
    key = _key("forward", x, problem, w.ndim, pre is not None, mask is not None, along, boxes)
    configs = _forward_configs(problem, x.itemsize, boxes, mask is not None)
    launch(tuning.choose(key, configs, trial, x.device), y, mask)


def conv2d_weight_gradient(
    x: torch.Tensor,  # [N, I, H, W], any strides
    dy: torch.Tensor,  # [N, O, H', W'], dense NCHW or NHWC
    conv: tuple,
    dw: torch.Tensor,  # [O, I, kh, kw], accumulation type, any strides
    pre: torch.Tensor | None = None,  # [N, I]
    post: torch.Tensor | None = None,  # [N, O]
) -> None:
    """dw[o, i, ky, kx] = sum over pixels of post * dy[o] * pre * x[i]."""
    problem = _problem(x, dy, conv, *dw.shape[2:])

    def launch(config: Config, dw: torch.Tensor) -> None:
        plan = _weight_gradient_plan(problem, config, _processors(x.device))
        out, strides = dw, (0, *dw.stride())
        if plan.parts > 1:
            out = dw.new_empty((plan.parts, *dw.permute(0, 2, 3, 1).shape)).permute(0, 1, 4, 2, 3)
            strides = out.stride()
        conv2d_weight_gradient_kernel[plan.grid](
            x, dy, out, pre, post, plan.parts, *strides, *problem,
            problem.phases, *config[:3],
            num_warps=config.warps, num_stages=min(config.stages, _MOST_STAGES),
        )  # fmt: skip
        if plan.parts > 1:
            dw.copy_(out.sum(0))

    key = _key("weight gradient", x, problem, pre is not None, post is not None)
    configs = _weight_gradient_configs(problem, x.itemsize)
    launch(tuning.choose(key, configs, lambda c: launch(c, torch.empty_like(dw)), x.device), dw)


class _Plan(NamedTuple):
    grid: tuple[int, int]
    parts: int
    per_image: bool


_MOST_STAGES = 8 if torch.version.hip is None else 2
_SUM_TILE = (16, 64)
_LEAST_STEPS = 4  # of a part: a program fills its pipeline first


def _per_image(pixels: int, tile: int) -> bool:
    """Whether tiles of one image each waste little."""
    return pixels % tile == 0 or pixels >= 8 * tile


@functools.lru_cache(maxsize=4096)
def _forward_plan(problem: _Problem, config: Config, per_sample: bool, processors: int) -> _Plan:
    height, width = problem.phase_size
    pixels = height * width
    per_image = per_sample or config.boxes or _per_image(pixels, config.rows)
    tiles = (
        problem.samples * triton.cdiv(pixels, config.rows)
        if per_image
        else triton.cdiv(problem.samples * pixels, config.rows)
    )
    programs = tiles * problem.phases**2 * triton.cdiv(problem.out_channels, config.cols)
    taps = triton.cdiv(problem.taps_y, problem.UP) * triton.cdiv(problem.taps_x, problem.UP)
    steps = taps * triton.cdiv(problem.in_channels, config.depth)
    parts = max(1, min(processors // programs, steps // _LEAST_STEPS))
    return _Plan((programs, parts), parts, per_image)


@functools.lru_cache(maxsize=4096)
def _weight_gradient_plan(problem: _Problem, config: Config, processors: int) -> _Plan:
    height, width = problem.phase_size
    programs = (
        triton.cdiv(problem.out_channels, config.rows)
        * triton.cdiv(problem.in_channels, config.cols)
        * problem.taps_y
        * problem.taps_x
    )
    steps = problem.samples * triton.cdiv(height * width, config.depth)
    # Several times as many as processors, for the last ones leave some of them idle.
    parts = max(1, min(triton.cdiv(4 * processors, programs), steps // _LEAST_STEPS))
    return _Plan((programs, parts), parts, True)


_TILES = (
    Config(128, 128, 64, 8, 3),
    Config(64, 128, 64, 8, 3),
    Config(64, 64, 64, 4, 4),
)
if torch.version.hip is not None:
    _TILES = _TILES[1:]  # the first leaves no registers to scale x in
_NARROW_TILES = (
    Config(128, 64, 64, 4, 3),
    Config(256, 64, 64, 8, 3),
    Config(128, 64, 32, 4, 4),
)
_FLOAT32_TILES = (Config(64, 64, 16, 4, 2), Config(32, 64, 16, 4, 2))
# Its sums leave no registers for offsets or a mask.
_WIDEST_TILE = Config(128, 256, 64, 8, 3, boxes=True)


def _configs(problem: _Problem, itemsize: int, rows: int, cols: int, depth: int) -> list[Config]:
    """What is worth trying for a product of this size; the first is used where nothing is tried."""
    tiles = _NARROW_TILES if min(rows, cols) <= 64 else _TILES
    if itemsize > 2:
        tf32 = problem.PRECISION == "tf32"
        tiles = [c._replace(depth=32) for c in tiles] if tf32 else _FLOAT32_TILES

    def fitted(size: int, most: int) -> int:
        return min(most, max(16, triton.next_power_of_2(size)))

    fit = (
        c._replace(
            rows=fitted(rows, c.rows), cols=fitted(cols, c.cols), depth=fitted(depth, c.depth)
        )
        for c in tiles
    )
    return list(dict.fromkeys(fit))


def _forward_configs(
    problem: _Problem, itemsize: int, may_use_boxes: bool, writes_mask: bool
) -> list[Config]:
    height, width = problem.phase_size
    rows, cols, depth = problem.samples * height * width, problem.out_channels, problem.in_channels
    if not _per_image(height * width, 64):
        depth = min(depth, 32)  # styles are then as many as samples of x, and of 32 bits
    configs = _configs(problem, itemsize, rows, cols, depth)
    if not may_use_boxes:
        return configs
    boxes = [c._replace(boxes=True) for c in configs]
    if itemsize == 2 and cols > 128 and not writes_mask:
        boxes.append(_WIDEST_TILE)
    boxes = [c for c in boxes if _box(problem, c.rows) is not None]
    return [*boxes, configs[0]] if boxes else configs


def _weight_gradient_configs(problem: _Problem, itemsize: int) -> list[Config]:
    height, width = problem.phase_size
    return _configs(problem, itemsize, problem.out_channels, problem.in_channels, height * width)


def _box(problem: _Problem, rows: int) -> tuple[int, int] | None:
    """(H, W) of the box of pixels that a tile of so many rows reads for one tap, if it is one."""
    height, width = problem.phase_size
    if not problem.IN_ALIGNED or problem.DOWN > problem.UP:
        return None
    if width % rows == 0:
        return 1, rows
    if rows % width == 0 and _per_image(height * width, rows):
        return rows // width, width
    return None


@functools.cache
def _has_boxes(device: torch.device) -> bool:
    return (
        TensorDescriptor is not None
        and device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


def _boxes(
    x: torch.Tensor, w: torch.Tensor, along: str, problem: _Problem, config: Config
) -> tuple:
    """Descriptors of x as [N, H, W, I] and of w as [N, O, kh, kw, I] or [N, I, kh, kw, O]."""
    if not config.boxes:
        return None, None

    def descriptor(t: torch.Tensor, block: list[int]) -> object:
        # The stride of a single element is no stride, but has to be aligned all the same.
        strides = [s if n > 1 else 8 for n, s in zip(t.shape[:-1], t.stride())]
        return TensorDescriptor(t, list(t.shape), [*strides, 1], block)

    w = w if w.ndim == 5 else w[None]
    if along == "in":
        w, sizes = w.permute(0, 1, 3, 4, 2), (config.cols, config.depth)
    else:
        w, sizes = w.permute(0, 2, 3, 4, 1), (config.depth, config.cols)
    height_width = _box(problem, config.rows)
    return (
        descriptor(x.permute(0, 2, 3, 1), [1, *height_width, config.depth]),
        descriptor(w, [1, sizes[0], 1, 1, sizes[1]]),
    )


def _key(kind: str, x: torch.Tensor, problem: _Problem, *details: object) -> tuple:
    """Names the class of a call: all that is compiled in, and the sizes, but of the batch only
    roughly."""
    sizes = (problem.samples.bit_length(), *problem[1:9])
    return (kind, x.dtype, *sizes, *details, *problem[15:])


def _packed(w: torch.Tensor) -> torch.Tensor:
    """w, or a copy of it, whose in or out channels are contiguous."""
    if 1 in w.stride()[-4:-2]:
        return w
    return w.movedim(-3, -1).contiguous().movedim(-1, -3)


def _aligned(shape: tuple[int, ...], strides: tuple[int, ...], along: int) -> bool:
    """Whether whole vectors of 8 lie along this dimension."""
    others = (
        stride
        for dim, (size, stride) in enumerate(zip(shape, strides))
        if dim != along % len(shape) and size > 1
    )
    return strides[along] == 1 and all(size % 8 == 0 for size in (shape[along], *others))


def _along(w: torch.Tensor) -> str:
    """The channels along which weights are loaded as vectors, if any."""
    for name, dim in (("in", -3), ("out", -4)):
        if _aligned(tuple(w.shape), w.stride(), dim):
            return name
    return ""


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check_units(problem: _Problem) -> None:
    """The mask's units of 8 may not end in another pixel (NHWC), plane or phase (NCHW)."""
    size = problem.out_channels if problem.OUT_NHWC else problem.out_height * problem.out_width
    if size % 8 or not (problem.OUT_NHWC or problem.phases == 1):
        name = "channels of an NHWC" if problem.OUT_NHWC else "pixels of an NCHW"
        raise ValueError(f"a mask needs whole units of 8: the {name} image is {size}")


def _problem(x: torch.Tensor, y: torch.Tensor, conv: tuple, taps_y: int, taps_x: int) -> _Problem:
    nhwc = not y.is_contiguous() or y.shape[2] == y.shape[3] == 1
    return _problem_of(
        tuple(x.shape), x.stride(), tuple(y.shape), nhwc, (taps_y, taps_x), tuple(conv),
        "tf32" if x.dtype == torch.float32 and _tf32_allowed() else "ieee",
    )  # fmt: skip


def _tf32_allowed() -> bool:
    """As PyTorch's convolutions have it. Where there is the newer setting, the older one cannot be
    read any more once somebody has set the newer."""
    newer = getattr(torch.backends.cudnn, "conv", None)
    return torch.backends.cudnn.allow_tf32 if newer is None else newer.fp32_precision == "tf32"


@functools.lru_cache(maxsize=4096)
def _problem_of(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    out_shape: tuple[int, ...],
    nhwc: bool,
    taps: tuple[int, int],
    conv: tuple,
    precision: str,
) -> _Problem:
    samples, in_channels, in_height, in_width = shape
    _, out_channels, out_height, out_width = out_shape
    up, _, down, _, pad_x, _, pad_y, _, correlate, _ = conv
    # Offsets run over the edges of the images by up to a tile and the kernel.
    beyond = max(abs(pad_y), abs(pad_x)) + max(taps) + 2 * 256
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides))
    reach += beyond * (strides[2] + strides[3])
    out_reach = math.prod(out_shape) + 256 * (out_channels + out_height * out_width)
    return _Problem(
        samples,
        in_channels,
        in_height,
        in_width,
        out_channels,
        out_height,
        out_width,
        *taps,
        pad_y,
        pad_x,
        *strides,
        CORRELATE=correlate,
        UP=up,
        DOWN=down,
        IN_ALIGNED=_aligned(shape, strides, 1),
        OUT_NHWC=nhwc,
        OUT_ALIGNED=nhwc and out_channels % 8 == 0,
        WIDE=max(reach, out_reach) >= 2**31,
        PRECISION=precision,
    )
