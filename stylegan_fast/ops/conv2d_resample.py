"""Convolution with optional FIR up- and downsampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._checks import (
    as_int,
    autocast_enabled,
    check_device,
    check_number,
    check_same,
    check_tensor,
)
from ..activations import activation
from ..backends import select
from ..reference.bias_act import Epilogue
from ..reference.bias_act import epilogue as reference_epilogue
from ..reference.conv2d_resample import Plan, output_size, plan
from ..reference.conv2d_resample import conv2d_resample as reference_conv2d_resample
from ..reference.modulated_conv2d import convolution_dtype
from ..reference.upfirdn2d import Padding, filter_size, memory_format_of, resampled_conv2d
from ..weight_gradients import skippable
from . import fir as fir_ops
from .conv import conv2d, conv2d_epilogue
from .epilogue import apply_epilogue
from .upfirdn2d import (
    _get_filter_size,
    _parse_padding,
    check_filter,
    check_image,
    check_output_size,
)


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
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """y = down(f * (w ⋆ (up**2 f * up(pad(x)))))

    upsample x with the filter f (if up > 1), correlate it with w, downsample it with f (if
    down > 1). All padding happens once, before the first filter: the user's, and what keeps each
    resampling centred, so that with padding = k // 2 and odd k the output is `[N, O, H * up / down,
    W * up / down]`.

    Args:
        x: `[N, I, H, W]`, float64, float32, float16 or bfloat16; N may be 0.
        w: `[O, I / groups, kh, kw]`, dtype and device of x.
        f: filter `[fh, fw]`, `[taps]` or None, the identity, as in `upfirdn2d`. Not applied where
            up = down = 1.
        up, down: factors of both axes.
        padding: of the upsampled image: number, `[x, y]` or `[x0, x1, y0, y1]`; negative crops.
        groups: as in `torch.nn.functional.conv2d`.
        flip_weight: True correlates, as `conv2d` does; False rotates w by 180 degrees first.
        flip_filter: as in `upfirdn2d`.
        backend: None chooses; else 'reference', 'cpu', 'triton' or 'cuda'. Convolutions that a
            backend has no kernel for, grouped ones among them, are PyTorch's.

    Returns:
        `[N, O, H', W']`, dtype and memory format (NCHW or channels_last) of x.

    Gradients: any order with respect to x and w, none with respect to f;
    `no_weight_gradients()` skips those of w.

    Autocast: x and w may differ in dtype; the convolution runs in, and y has, the autocast dtype,
    as `conv2d`'s. The FIR filters compute in float32 all the same.

    Raises:
        TypeError: x, w or f is not a floating-point tensor, w has another dtype than x, or up,
            down, groups or padding holds something else than ints.
        ValueError: wrong rank, channels, factor or device, or an output without pixels.
        NotImplementedError: f requires a gradient.
        RuntimeError: the explicitly chosen backend cannot run this.

    The originals' `conv2d_resample`.
    """
    up, down, groups, sides = _checked(x, w, f, up, down, padding, groups)
    name = select("conv2d_resample", x, backend)
    w = skippable(w)
    if name == "reference":
        return reference_conv2d_resample(x, w, f, up, down, sides, groups, flip_weight, flip_filter)
    steps = plan(
        (w.shape[3], w.shape[2]), filter_size(f), up, down, sides, flip_weight, flip_filter
    )
    return run_plan(x, w, f, steps, Epilogue(), name, groups=groups)


def conv2d_bias_act(
    x: torch.Tensor,  # [N, I, H, W]
    w: torch.Tensor,  # [O, I, kh, kw]
    f: torch.Tensor | None = None,  # [fh, fw] or [taps]
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    flip_weight: bool = True,
    b: torch.Tensor | None = None,  # [O]
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """y = bias_act(conv2d_resample(x, w, ...), b, act, alpha, gain, clamp) as one op: a layer of D.

    b: `[O]` or None, of any floating dtype. Everything else, the errors too, as in
    `conv2d_resample` and `bias_act`; gradients of second order, of any order where act is linear on
    each side of 0.
    """
    up, down, _, sides = _checked(x, w, f, up, down, padding, 1)
    alpha, gain, clamp = check_constants(alpha, gain, clamp)
    if b is not None:
        check_operand("b", b, x, (w.shape[0],))
    end = Epilogue(b=b, act=activation(act).name, alpha=alpha, gain=gain, clamp=clamp)
    name = select("conv2d_resample", x, backend)
    w = skippable(w)
    if name == "reference":
        y = reference_conv2d_resample(x, w, f, up, down, sides, 1, flip_weight)
        return reference_epilogue(y, end)
    steps = plan((w.shape[3], w.shape[2]), filter_size(f), up, down, sides, flip_weight)
    return run_plan(x, w, f, steps, end, name)


def run_plan(
    x: torch.Tensor,  # [N, I, H, W]
    w: torch.Tensor,  # [O, I / groups, kh, kw]
    f: torch.Tensor | None,
    steps: Plan,
    end: Epilogue,
    backend: str,
    *,
    pre: torch.Tensor | None = None,  # [N, I]
    groups: int = 1,
) -> torch.Tensor:
    """E(conv2d_resample(pre ⊙ x)) on a kernel backend, in x's memory format. Autocast is the
    convolution's."""
    before, conv, after, last = steps
    memory_format = memory_format_of(x)
    if before is not None:
        x = fir_ops.linear(x, f, before, backend)
    dtype = convolution_dtype(x)
    x, w = x.to(dtype), w.to(dtype)
    if groups == 1 and last is None and not (after is not None and end.idle):
        return conv2d_epilogue(x, w, conv, end, backend, pre=pre, f=f, fir=after)

    if pre is not None:
        x = x * pre.to(x.dtype)[:, :, None, None]
    if groups == 1:
        x = conv2d(x, w, conv, backend)
    else:
        x = resampled_conv2d(x, w, conv, groups)
        x = x.contiguous(memory_format=memory_format)
    if after is not None and last is not None:
        x = fir_ops.linear(x, f, after, backend)
    return apply_epilogue(x, end, backend=backend, f=f, fir=last or after)


def _checked(x, w, f, up, down, padding, groups) -> tuple[int, int, int, Padding]:
    check_image("x", x)
    check_tensor("w", w, 4)
    check_filter("f", f, x)
    check_device("w", w, x)
    if not autocast_enabled(x):
        check_same("w", w, x)
    up = as_int("up", up, minimum=1)
    down = as_int("down", down, minimum=1)
    groups = as_int("groups", groups, minimum=1)
    padding = _parse_padding(padding)
    _check_channels(x, w, groups)
    check_resampled_size(x, w, f, up, down, padding)
    return up, down, groups, padding


def _check_channels(x: torch.Tensor, w: torch.Tensor, groups: int) -> None:
    outputs, inputs = w.shape[:2]
    if 0 in w.shape or inputs * groups != x.shape[1] or outputs % groups:
        raise ValueError(
            f"w must be [O, I / groups, kh, kw] with I = {x.shape[1]} channels of x, {groups=} and "
            f"O a multiple of groups, got w.shape={tuple(w.shape)}"
        )


def check_operand(name: str, t: torch.Tensor, x: torch.Tensor, shape: tuple[int, ...]) -> None:
    """t is a floating-point tensor of this shape on x's device."""
    check_tensor(name, t)
    if t.shape != shape:
        raise ValueError(
            f"{name} must have the shape {shape} for x.shape={tuple(x.shape)}, "
            f"got {name}.shape={tuple(t.shape)}"
        )
    check_device(name, t, x)


def check_constants(
    alpha: float | None, gain: float | None, clamp: float | None
) -> tuple[float | None, float | None, float | None]:
    """The numbers of an activation."""
    return (
        None if alpha is None else check_number("alpha", alpha),
        None if gain is None else check_number("gain", gain),
        None if clamp is None else check_number("clamp", clamp, minimum=0),
    )


def check_resampled_size(x, w, f, up, down, padding) -> tuple[int, int]:
    """(H, W) of the output; ValueError if it has no pixel."""
    (height, width), (kh, kw), taps = x.shape[2:], w.shape[2:], _get_filter_size(f)
    output = output_size((height, width), (kw, kh), taps, up, down, padding)
    check_output_size(
        output,
        image=(height, width),
        kernel=(kh, kw),
        filter=taps[::-1],
        up=up,
        down=down,
        padding=padding,
    )
    return output
