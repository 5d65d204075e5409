"""conv2d_resample out of PyTorch's own convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

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


def total_padding(filter_size: tuple[int, int], up: int, down: int, padding: Padding) -> Padding:
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
    size: tuple[int, int],  # (H, W)
    kernel_size: tuple[int, int],  # (kw, kh)
    filter_size: tuple[int, int],  # (fw, fh)
    up: int,
    down: int,
    padding: Padding,
) -> tuple[int, int]:
    """(H, W) of conv2d_resample's result."""
    total = total_padding(filter_size, up, down, padding)
    size = fir_output_size(size, filter_size if up > 1 else (1, 1), up=(up, up), padding=total)
    size = fir_output_size(size, kernel_size)
    return fir_output_size(size, filter_size if down > 1 else (1, 1), down=(down, down))


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
    *,
    upfirdn2d: Callable[..., torch.Tensor] = upfirdn2d,
    last_upfirdn2d: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """See `stylegan_fast.ops.conv2d_resample`. The convolution and the FIR passes commute, so each
    case takes the order that is cheapest: with up > 1, a FIR pass comes last.

    upfirdn2d runs the FIR passes; last_upfirdn2d, if given, the last one with up > 1.
    """
    total = total_padding(filter_size(f), up, down, parse_padding(padding))
    conv = partial(resampled_conv2d, w=w, groups=groups, flip=not flip_weight)
    kh, kw = w.shape[-2:]
    pointwise = kh == kw == 1
    fir = partial(upfirdn2d, flip_filter=flip_filter)
    last = partial(last_upfirdn2d or upfirdn2d, flip_filter=flip_filter)
    after_up = last if down == 1 else fir

    if up > 1 and pointwise:
        y = after_up(conv(x), f, up, padding=total, gain=up**2)
    elif up > 1:
        full = (kw - 1, kw - up, kh - 1, kh - up)
        y = conv(x, up=(up, up), padding=full)
        rest = [needed - used for needed, used in zip(total, full)]
        y = after_up(y, f, padding=rest, gain=up**2)
    elif down > 1 and pointwise:
        y = conv(fir(x, f, down=down, padding=total))
    elif down > 1:
        y = conv(fir(x, f, padding=total), down=(down, down))
    else:
        y = conv(x, padding=total)

    if up > 1 and down > 1:
        y = last(y, f, down=down)
    return y.contiguous(memory_format=memory_format_of(x))
