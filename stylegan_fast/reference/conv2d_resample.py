"""conv2d_resample out of PyTorch's own convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..backends.geometry import Fir
from .upfirdn2d import (
    Padding,
    centring,
    filter_size,
    memory_format_of,
    parse_padding,
    resampled_conv2d,
    upfirdn2d,
)
from .upfirdn2d import output_size as fir_output_size

Size = tuple[int, int]


class Plan(NamedTuple):
    """conv2d_resample as FIR filter, convolution, and up to two FIR filters more."""

    before: Fir | None
    conv: Fir
    after: Fir | None
    last: Fir | None


def total_padding(filter_size: Size, up: int, down: int, padding: Padding) -> Padding:
    """The user's padding plus what keeps each resampling centred, (x0, x1, y0, y1)."""
    x0, x1, y0, y1 = padding
    fw, fh = filter_size
    for u, d in ((up, 1), (1, down)):
        if u > 1 or d > 1:
            left, right = centring(fw, u, d)
            top, bottom = centring(fh, u, d)
            x0, x1, y0, y1 = x0 + left, x1 + right, y0 + top, y1 + bottom
    return x0, x1, y0, y1


def output_size(
    size: Size,  # (H, W)
    kernel_size: Size,  # (kw, kh)
    filter_size: Size,  # (fw, fh)
    up: int,
    down: int,
    padding: Padding,
) -> Size:
    """(H, W) of conv2d_resample's result."""
    total = total_padding(filter_size, up, down, padding)
    size = fir_output_size(size, filter_size if up > 1 else (1, 1), up=(up, up), padding=total)
    size = fir_output_size(size, kernel_size)
    return fir_output_size(size, filter_size if down > 1 else (1, 1), down=(down, down))


def plan(
    kernel_size: Size,  # (kw, kh)
    filter_size: Size,  # (fw, fh)
    up: int = 1,
    down: int = 1,
    padding: Padding = (0, 0, 0, 0),
    flip_weight: bool = True,
    flip_filter: bool = False,
) -> Plan:
    """The convolution and the FIR filters commute, so each case takes the order that is cheapest:
    with up > 1, a FIR filter comes last."""
    nothing = (0, 0, 0, 0)
    total = total_padding(filter_size, up, down, padding)

    def fir(up: int = 1, down: int = 1, padding: Padding = nothing, gain: float = 1.0) -> Fir:
        return Fir.of((up, up), (down, down), padding, flip_filter, gain)

    def conv(up: int = 1, down: int = 1, padding: Padding = nothing) -> Fir:
        return Fir.of((up, up), (down, down), padding, flip_weight, 1.0)

    kw, kh = kernel_size
    pointwise = kw == kh == 1
    last = fir(down=down) if up > 1 and down > 1 else None
    gain = float(up**2)
    if up > 1 and pointwise:
        return Plan(None, conv(), fir(up=up, padding=total, gain=gain), last)
    if up > 1:
        x0, x1, y0, y1 = total
        rest = (x0 - kw + 1, x1 - kw + up, y0 - kh + 1, y1 - kh + up)
        full = (kw - 1, kw - up, kh - 1, kh - up)
        return Plan(None, conv(up=up, padding=full), fir(padding=rest, gain=gain), last)
    if down > 1 and pointwise:
        return Plan(fir(down=down, padding=total), conv(), None, None)
    if down > 1:
        return Plan(fir(padding=total), conv(down=down), None, None)
    return Plan(None, conv(padding=total), None, None)


def conv2d_resample(
    x: torch.Tensor,  # [N, I, H, W]
    w: torch.Tensor,  # [O, I / groups, kh, kw], or [N, O, I, kh, kw]: a weight for each sample
    f: torch.Tensor | None = None,  # [fh, fw] or [taps]
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
    flip_weight: bool = True,
    flip_filter: bool = False,
) -> torch.Tensor:
    """See `stylegan_fast.ops.conv2d_resample`."""
    before, conv, after, last = plan(
        (w.shape[-1], w.shape[-2]),
        filter_size(f),
        up,
        down,
        parse_padding(padding),
        flip_weight,
        flip_filter,
    )
    y = x if before is None else upfirdn2d(x, f, *before.arguments())
    y = resampled_conv2d(y, w, conv, groups)
    for fir in (after, last):
        if fir is not None:
            y = upfirdn2d(y, f, *fir.arguments())
    return y.contiguous(memory_format=memory_format_of(x))
