"""conv2d_resample out of PyTorch's own convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .upfirdn2d import (
    centring,
    filter_size,
    memory_format_of,
    parse_padding,
    resampled_conv2d,
    upfirdn2d,
)


def total_padding(
    filter_size: tuple[int, int], up: int, down: int, padding: tuple[int, int, int, int]
) -> tuple[int, int, int, int]:
    """The user's padding and what keeps the resamplings centred, (x0, x1, y0, y1)."""
    total = list(padding)
    for factors in ({"up": up}, {"down": down}):
        if max(factors.values()) > 1:
            centres = [centring(taps, **factors) for taps in filter_size]
            total = [pad + centre for pad, centre in zip(total, sum(centres, ()))]
    return tuple(total)


def output_size(
    size: Sequence[int],  # (H, W)
    kernel_size: Sequence[int],  # (kh, kw)
    filter_size: tuple[int, int],  # (fw, fh)
    up: int,
    down: int,
    padding: tuple[int, int, int, int],
) -> tuple[int, int]:
    """(H, W) of conv2d_resample's result."""
    x0, x1, y0, y1 = total_padding(filter_size, up, down, padding)
    sizes = []
    for n, kernel, taps, pad in zip(size, kernel_size, filter_size[::-1], (y0 + y1, x0 + x1)):
        n = n * up + pad - (kernel - 1)
        for factor in (up, down):
            n -= (taps - 1) if factor > 1 else 0
        sizes.append((n - 1) // down + 1)
    return tuple(sizes)


def conv2d_resample(
    x: torch.Tensor,  # [N, I, H, W]
    w: torch.Tensor,  # [O, I / groups, kh, kw]
    f: torch.Tensor | None = None,  # [fh, fw] or [taps]
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
    flip_weight: bool = True,
    flip_filter: bool = False,
) -> torch.Tensor:
    """See `stylegan_fast.ops.conv2d_resample`. The convolution and the FIR passes commute, so each
    case takes the order that is cheapest."""
    px = total_padding(filter_size(f), up, down, parse_padding(padding))
    kh, kw = w.shape[2:]
    pointwise = kh == kw == 1
    conv = {"groups": groups, "flip": not flip_weight}

    if up > 1 and pointwise:
        y = resampled_conv2d(x, w, **conv)
        y = upfirdn2d(y, f, up, padding=px, flip_filter=flip_filter, gain=up**2)
    elif up > 1:
        full = (kw - 1, kw - up, kh - 1, kh - up)
        y = resampled_conv2d(x, w, (up, up), padding=full, **conv)
        rest = [total - used for total, used in zip(px, full)]
        y = upfirdn2d(y, f, padding=rest, flip_filter=flip_filter, gain=up**2)
    elif down > 1 and pointwise:
        y = upfirdn2d(x, f, down=down, padding=px, flip_filter=flip_filter)
        y = resampled_conv2d(y, w, **conv)
    elif down > 1:
        y = upfirdn2d(x, f, padding=px, flip_filter=flip_filter)
        y = resampled_conv2d(y, w, down=(down, down), **conv)
    else:
        y = resampled_conv2d(x, w, padding=px, **conv)

    if up > 1 and down > 1:
        y = upfirdn2d(y, f, down=down, flip_filter=flip_filter)
    return y.contiguous(memory_format=memory_format_of(x))
