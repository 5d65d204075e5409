"""modulated_conv2d out of PyTorch's own operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .._checks import autocast_enabled
from .bias_act import Epilogue, epilogue
from .conv2d_resample import conv2d_resample
from .upfirdn2d import memory_format_of, without_autocast


def convolution_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a convolution of x runs."""
    if x.dtype == torch.float64 or not autocast_enabled(x):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def _divided(t: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """t / size, but t where size is 0."""
    return t / torch.where(size > 0, size, 1)


def _divided_by_rms(t: torch.Tensor, dims: list[int]) -> torch.Tensor:
    mean_square = t.square().mean(dims, keepdim=True)
    return t * torch.where(mean_square > 0, mean_square, 1).rsqrt()


DEMODULATION_EPS = 1e-8

NO_WEIGHT = 1e-24
"""In place of that where it is relative to the weight: only one of less than 1e-11 meets it."""


def demodulation(
    weight: torch.Tensor, styles: torch.Tensor, eps: float = DEMODULATION_EPS
) -> torch.Tensor:
    """d[n,o] = (sum over i, ky, kx of (weight[o,i,ky,kx] * styles[n,i])^2 + eps)^-1/2"""
    energy = weight.square().sum([2, 3])
    return (styles.square() @ energy.t() + eps).rsqrt()


class Coefficients(NamedTuple):
    """What surrounds the convolution, after all normalisations: float32 at least."""

    weight: torch.Tensor  # [O, I, kh, kw]
    before: torch.Tensor  # [N, I], scales x
    after: torch.Tensor | None  # [N, O], scales y


def coefficients(
    x: torch.Tensor,
    weight: torch.Tensor,
    styles: torch.Tensor,
    demodulate: bool,
    input_gain: float | torch.Tensor | None,
    demodulation: Callable[..., torch.Tensor] = demodulation,
) -> Coefficients:
    """See `stylegan_fast.ops.modulated_conv2d`; x matters for its dtype only."""
    dtype = torch.promote_types(torch.promote_types(weight.dtype, styles.dtype), torch.float32)
    weight, before, after = weight.to(dtype), styles.to(dtype), None
    half = convolution_dtype(x) == torch.float16
    guarded = input_gain is None and half
    fan_in = weight.shape[1:].numel()
    if demodulate:
        with without_autocast(x):
            if input_gain is not None:
                before = _divided_by_rms(before, [0, 1])
                if half:
                    weight = _divided_by_rms(weight, [1, 2, 3])
            elif guarded:
                # Against overflow. These factors cancel in the result, so they are constants.
                largest = weight.detach().abs().amax([1, 2, 3], keepdim=True)
                weight = _divided(weight, largest * fan_in**0.5)
                before = _divided(before, before.detach().abs().amax(1, keepdim=True))
            if input_gain is None or half:
                after = demodulation(weight, before)
            else:
                # The weight divided by its root mean square would multiply d by that size, which
                # leaves d as it is but for its eps: relative to the mean square, a part of each
                # style.
                floored = (before.square() + DEMODULATION_EPS / fan_in).sqrt()
                after = demodulation(weight, floored, NO_WEIGHT)
                # A weight of zeros stays as it is.
                after = torch.where(after > 0.1 * NO_WEIGHT**-0.5, DEMODULATION_EPS**-0.5, after)
    elif guarded:
        largest = before.detach().abs().amax(1, keepdim=True)
        before = _divided(before, largest)
        after = torch.where(largest > 0, largest, 1).expand(-1, weight.shape[0])
    if isinstance(input_gain, torch.Tensor):
        input_gain = input_gain.to(dtype)
    if input_gain is not None:
        before = before * input_gain
    return Coefficients(weight, before, after)


def modulated_conv2d(
    x: torch.Tensor,  # [N, I, H, W]
    weight: torch.Tensor,  # [O, I, kh, kw]
    styles: torch.Tensor,  # [N, I]
    noise: torch.Tensor | None = None,  # broadcasts to the output [N, O, H', W']
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    resample_filter: torch.Tensor | None = None,  # [fh, fw] or [taps]
    demodulate: bool = True,
    flip_weight: bool = True,
    fused_modconv: bool = True,
    *,
    input_gain: float | torch.Tensor | None = None,  # [], [I] or [N, I]
    noise_strength: torch.Tensor | None = None,  # []
    bias: torch.Tensor | None = None,  # [O]
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> torch.Tensor:
    """See `stylegan_fast.ops.modulated_conv2d`."""
    weight, before, after = coefficients(x, weight, styles, demodulate, input_gain)
    if fused_modconv and x.shape[0] > 0:
        scale = before[:, None] if after is None else before[:, None] * after[:, :, None]
        kernels = (weight * scale[..., None, None]).to(x.dtype)  # [N, O, I, kh, kw]
        scaled, after = x, None
    else:
        kernels = weight.to(x.dtype)
        scaled = x * before.to(x.dtype)[:, :, None, None]
    y = conv2d_resample(scaled, kernels, resample_filter, up, down, padding, 1, flip_weight)
    end = Epilogue(after, noise, bias, act, alpha, gain, clamp, noise_strength)
    return epilogue(y, end).contiguous(memory_format=memory_format_of(x))
