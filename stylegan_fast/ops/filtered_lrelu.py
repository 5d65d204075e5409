"""The activation of StyleGAN3: leaky ReLU at a higher resolution, between two FIR filters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .._checks import as_int, check_number
from ..reference.bias_act import Epilogue
from .bias_act import bias_act
from .upfirdn2d import check_filter, check_image, upfirdn2d, upfirdn2d_epilogue


def filtered_lrelu(
    x: torch.Tensor,  # [N, C, H, W]
    fu: torch.Tensor | None = None,  # [fh, fw] or [taps]
    fd: torch.Tensor | None = None,  # [fh, fw] or [taps]
    b: torch.Tensor | None = None,  # [C]
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    gain: float = math.sqrt(2),
    slope: float = 0.2,
    clamp: float | None = None,
    flip_filter: bool = False,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """y = down(fd * clamp(gain * lrelu(up**2 fu * up(pad(x + b)); slope), -clamp, clamp))

    Args:
        x: `[N, C, H, W]`, float64, float32, float16 or bfloat16; N may be 0.
        fu, fd: filters before and after the activation, as f in `upfirdn2d`.
        b: bias `[C]` of x's dtype and device, or None. What is padded has no bias.
        up, down: factors of both axes.
        padding: of the zero-stuffed image: number, `[x, y]` or `[x0, x1, y0, y1]`; negative crops.
        gain: > 0. slope: >= 0, of the negative branch. clamp: None or >= 0.
        flip_filter: of both filters, as in `upfirdn2d`.
        backend: None chooses; else 'reference', 'cpu', 'triton' or 'cuda'. There is no kernel of
            its own: it runs as `bias_act` and twice `upfirdn2d`, the first ending with the
            activation, and rounds 16-bit types after each.

    Returns:
        `[N, C, (H' - fdh) // down + 1, (W' - fdw) // down + 1]`, the image between the filters
        having H' = H * up + y0 + y1 - fuh + 1 rows and as many columns; dtype and memory format of
        x.

    Gradients: any order with respect to x and b, none with respect to fu and fd.

    Autocast: computes and returns in x's dtype.

    Raises:
        TypeError: x, fu, fd or b is not a floating-point tensor, b has another dtype, up, down or
            padding holds something else than ints, or gain, slope or clamp is not a number.
        ValueError: wrong rank, length, factor or device, a filter is not finite, gain <= 0,
            slope < 0, clamp < 0, or an output without pixels.
        NotImplementedError: fu or fd requires a gradient.
        RuntimeError: the explicitly chosen backend cannot run this.

    The originals' `filtered_lrelu` (Karras et al., "Alias-Free Generative Adversarial Networks",
    2021).
    """
    check_image("x", x)
    check_filter("fu", fu, x)
    check_filter("fd", fd, x)
    up = as_int("up", up, minimum=1)
    down = as_int("down", down, minimum=1)
    gain = check_number("gain", gain, minimum=0)
    if gain == 0:
        raise ValueError(f"gain must be greater than 0, got {gain=}")
    slope = check_number("slope", slope, minimum=0)
    if clamp is not None:
        clamp = check_number("clamp", clamp, minimum=0)
    if b is not None:
        x = bias_act(x, b, backend=backend)
    activation = Epilogue(act="lrelu", alpha=slope, gain=gain, clamp=clamp)
    x = upfirdn2d_epilogue(
        x, fu, up, 1, padding, flip_filter, up**2, end=activation, backend=backend
    )
    return upfirdn2d(x, fd, 1, down, 0, flip_filter, backend=backend)
