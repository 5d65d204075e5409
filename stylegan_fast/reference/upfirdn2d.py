"""upfirdn2d out of PyTorch's own convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F

from .._checks import as_int, autocast_enabled
from ..backends.geometry import Fir

LARGEST_FACTOR = 2**20

Pair = tuple[int, int]  # (x, y)
Padding = tuple[int, int, int, int]  # (x0, x1, y0, y1) = left, right, top, bottom


def parse_scaling(scaling: int | Sequence[int], name: str = "scaling") -> Pair:
    """(x, y) of a factor or a pair [x, y]."""
    pair = tuple(scaling) if isinstance(scaling, (list, tuple)) else (scaling, scaling)
    if len(pair) != 2:
        raise ValueError(f"{name} must be a factor or [x, y], got {name}={scaling!r}")
    x, y = (as_int(name, factor, minimum=1, maximum=LARGEST_FACTOR) for factor in pair)
    return x, y


def parse_padding(padding: int | Sequence[int]) -> Padding:
    """(x0, x1, y0, y1) of a number, a pair [x, y] or all four."""
    sides = tuple(padding) if isinstance(padding, (list, tuple)) else (padding, padding)
    if len(sides) == 2:
        x, y = sides
        sides = (x, x, y, y)
    if len(sides) != 4:
        raise ValueError(f"padding must be a number, [x, y] or [x0, x1, y0, y1], got {padding=}")
    x0, x1, y0, y1 = (as_int("padding", side) for side in sides)
    return x0, x1, y0, y1


def filter_size(f: torch.Tensor | None) -> Pair:
    """(fw, fh) of a filter; None is the identity, a 1-D filter runs along both axes."""
    return (1, 1) if f is None else (f.shape[-1], f.shape[0])


def centring(taps: int, up: int = 1, down: int = 1) -> tuple[int, int]:
    """The padding (before, after) of one axis that keeps a resampled image centred."""
    return (taps - down + up) // 2, (taps - down - up + 1) // 2


def output_size(
    size: tuple[int, int],  # (H, W)
    filter_size: Pair,
    up: Pair = (1, 1),
    down: Pair = (1, 1),
    padding: Padding = (0, 0, 0, 0),
) -> tuple[int, int]:
    """(H, W) of upfirdn2d's result; every other pair is (x, y)."""
    return Fir.of(up, down, padding, False, 1).output_size(*size, filter_size)


def memory_format_of(x: torch.Tensor) -> torch.memory_format:
    """The format PyTorch gives to the result of an operator on x (its suggest_memory_format)."""
    if x.stride(1) == 0:
        return torch.contiguous_format
    least = 0
    for dim in (1, 3, 2, 0):
        size, stride = x.shape[dim], x.stride(dim)
        if size == 0 or stride < least or (dim == 0 and least == x.stride(1)):
            return torch.contiguous_format
        least = stride * size
    return torch.channels_last


def without_autocast(x: torch.Tensor) -> AbstractContextManager:
    """Inside, operators on x's device compute in the dtypes they are given."""
    return torch.autocast(x.device.type, enabled=False) if autocast_enabled(x) else nullcontext()


def pad_or_crop(x: torch.Tensor, left: int, right: int, top: int, bottom: int) -> torch.Tensor:
    # Zeros first: a crop may reach beyond the image into the padding of the other side.
    if max(left, right, top, bottom) > 0:
        x = F.pad(x, [max(left, 0), max(right, 0), max(top, 0), max(bottom, 0)])
    h, w = x.shape[2:]
    if min(top, bottom) < 0:
        x = x.narrow(2, max(-top, 0), h + min(top, 0) + min(bottom, 0))
    if min(left, right) < 0:
        x = x.narrow(3, max(-left, 0), w + min(left, 0) + min(right, 0))
    return x


def _decimate(x: torch.Tensor, down: Pair) -> torch.Tensor:
    dx, dy = down
    return x if down == (1, 1) else x[:, :, ::dy, ::dx]


def resampled_conv2d(
    x: torch.Tensor,  # [N, I, H, W]
    w: torch.Tensor,  # [O, I / groups, kh, kw], or [N, O, I, kh, kw]: a weight for each sample
    conv: Fir,
    groups: int = 1,
) -> torch.Tensor:
    """Zero-stuff x, pad or crop, correlate with w (rotated unless conv.flip_filter), keep every
    down-th. conv.gain does not count."""
    if w.ndim == 5:
        n, i, height, width = x.shape
        x = x.reshape(1, n * i, height, width)
        y = resampled_conv2d(x, w.flatten(0, 1), conv, n)
        return y.reshape(n, -1, *y.shape[2:])
    ux, uy, dx, dy, x0, x1, y0, y1, correlate, _ = conv
    o, i, kh, kw = w.shape
    if ux == uy == 1:
        symmetric = x0 == x1 >= 0 and y0 == y1 >= 0
        rotated = not correlate and dx == dy == groups == 1 and symmetric
        if rotated and x0 < kw and y0 < kh and w.transpose(0, 1).is_contiguous():
            # The adjoint of a layer's convolution reads the layer's own weight, without a copy.
            return F.conv_transpose2d(x, w.transpose(0, 1), padding=(kh - 1 - y0, kw - 1 - x0))
        w = w if correlate else w.flip((2, 3))
        if symmetric:
            return F.conv2d(x, w, stride=(dy, dx), padding=(y0, x0), groups=groups)
        return F.conv2d(pad_or_crop(x, x0, x1, y0, y1), w, stride=(dy, dx), groups=groups)

    # A transposed convolution skips the stuffed zeros. It gives the full convolution, the
    # (W - 1) ux + kw samples from kw - 1 before the image on; padding says which are wanted.
    w = w.flip((2, 3)) if correlate else w
    w = w.reshape(groups, o // groups, i, kh, kw).transpose(1, 2).reshape(-1, o // groups, kh, kw)
    left, right, top, bottom = x0 - kw + 1, x1 - kw + ux, y0 - kh + 1, y1 - kh + uy
    crop_x, crop_y = max(0, min(-left, -right)), max(0, min(-top, -bottom))
    y = F.conv_transpose2d(x, w, stride=(uy, ux), padding=(crop_y, crop_x), groups=groups)
    y = pad_or_crop(y, left + crop_x, right + crop_x, top + crop_y, bottom + crop_y)
    return _decimate(y, (dx, dy))


def upfirdn2d(
    x: torch.Tensor,  # [N, C, H, W]
    f: torch.Tensor | None,  # [fh, fw] or [taps]
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> torch.Tensor:
    """See `stylegan_fast.ops.upfirdn2d`. 16-bit types compute in float32 and round once."""
    ux, uy = parse_scaling(up, "up")
    dx, dy = parse_scaling(down, "down")
    x0, x1, y0, y1 = parse_padding(padding)

    if f is None:
        n, c, h, w = x.shape
        y = F.pad(x.reshape(n, c, h, 1, w, 1), [0, ux - 1, 0, 0, 0, uy - 1])
        y = pad_or_crop(y.reshape(n, c, h * uy, w * ux), x0, x1, y0, y1)
        y = _decimate(y, (dx, dy)) * gain
    else:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        y, f = x.to(dtype), f.to(dtype)
        with without_autocast(x):
            if f.ndim == 2:
                y = _filter(y, f * gain, flip_filter, (ux, uy), (dx, dy), (x0, x1, y0, y1))
            else:
                along_x, along_y = f[None, :] * gain, f[:, None]
                y = _filter(y, along_x, flip_filter, (ux, 1), (dx, 1), (x0, x1, 0, 0))
                y = _filter(y, along_y, flip_filter, (1, uy), (1, dy), (0, 0, y0, y1))
    return y.to(x.dtype).contiguous(memory_format=memory_format_of(x))


def _filter(
    x: torch.Tensor, taps: torch.Tensor, flip_filter: bool, up: Pair, down: Pair, padding: Padding
) -> torch.Tensor:
    channels = x.shape[1]
    w = taps.expand(channels, 1, *taps.shape)
    return resampled_conv2d(x, w, Fir.of(up, down, padding, flip_filter, 1.0), channels)
