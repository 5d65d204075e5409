"""The convolution of the StyleGAN2 and StyleGAN3 generators."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from .._checks import as_int, check_device, check_number, check_tensor
from ..activations import activation
from ..backends import select
from ..reference.bias_act import Epilogue
from ..reference.conv2d_resample import plan
from ..reference.modulated_conv2d import coefficients
from ..reference.modulated_conv2d import modulated_conv2d as reference_modulated_conv2d
from ..reference.upfirdn2d import filter_size
from ..weight_gradients import skippable
from .conv2d_resample import check_constants, check_operand, check_resampled_size, run_plan
from .demodulation import demodulation
from .upfirdn2d import _parse_padding, check_filter, check_image


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
    bias: torch.Tensor | None = None,  # [O]
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """y[n,o] = d[n,o] * sum over i of conv2d_resample(styles[n,i] * x[n,i], weight[o,i])
                 + noise

        d[n,o] = (sum over i, ky, kx of (weight[o,i,ky,kx] * styles[n,i])^2 + 1e-8)^-1/2

    with d = 1 where demodulate is False, followed by `bias_act(y, bias, act, alpha, gain, clamp)`.

    The StyleGAN3 form is chosen by an `input_gain` g: with demodulate, every weight[o] is divided
    by its root mean square and styles by theirs over the whole batch (one number), d follows from
    those, and then styles is multiplied by g. Without demodulate that leaves styles * g. The
    divisions cancel in y except for the relative size of the 1e-8: the forms differ by about
    1e-8 / sum (weight * styles)^2. `input_gain=1` is the StyleGAN3 form without a gain.

    Args:
        x: `[N, I, H, W]`, float64, float32, float16 or bfloat16; N may be 0.
        weight: `[O, I, kh, kw]`; styles: `[N, I]`. Their dtypes may be others than x's: d is
            computed in float32 at least, the convolution in x's dtype.
        noise: anything that broadcasts to y, such as `[N, 1, H', W']` or `[H', W']`, or None.
        up, down, padding, resample_filter, flip_weight: as in `conv2d_resample`.
        fused_modconv: False forbids the reference backend to make one weight per sample and to
            convolve them in one grouped convolution, which it does where the weights are smaller
            than the images; otherwise it scales x before and y after one shared convolution. The
            forms are equal up to rounding. The kernels need neither.
        input_gain: number, `[]`, `[I]` or `[N, I]`; see above.
        bias: `[O]` or None; act, alpha, gain, clamp: as in `bias_act`.
        backend: None chooses; else 'reference', 'cpu', 'triton' or 'cuda'. Convolutions that a
            backend has no faster kernel for are PyTorch's; scales, noise, bias and activation are
            one pass, for up > 1 the same as the FIR filter's.

    Returns:
        `[N, O, H', W']`, dtype and memory format (NCHW or channels_last) of x.

    float16 with demodulate: weight[o] is divided by sqrt(I kh kw) max|weight[o]| and styles[n] by
    max|styles[n]| before anything else, against overflow; both cancel. A row of zeros stays zero,
    in all forms and dtypes.

    Gradients: any order with respect to x, weight, styles, noise, bias and
    input_gain (second order where act is curved, as in `bias_act`); none with respect to
    resample_filter. `no_weight_gradients()` skips those of weight. The backward pass keeps x, y,
    weight, styles and two bits an element; a curved act keeps the convolution's result instead.

    Accuracy: in float32 on the cpu backend most 3x3 convolutions run by Winograd's algorithm, whose
    rounding errors are about ten times a direct sum's and reach over tiles of 4x4 pixels (8x8
    with up=2), so a pixel far larger than its neighbours, an infinity or NaN disturbs its tile.
    STYLEGAN_FAST_WINOGRAD=0 chooses the direct sum.

    Autocast: the convolution runs in, and y has, the autocast dtype, as `conv2d`'s; d stays
    float32.

    Raises:
        TypeError: x, weight, styles, noise or bias is not a floating-point tensor, or up, down or
            padding holds something else than ints.
        ValueError: wrong shape, factor or device, or an output without pixels.
        KeyError: unknown act. NotImplementedError: resample_filter requires a gradient.
        RuntimeError: the explicitly chosen backend cannot run this.

    The originals' `modulated_conv2d` of both families (Karras et al., "Analyzing and Improving the
    Image Quality of StyleGAN", 2020; "Alias-Free Generative Adversarial Networks", 2021).
    """
    return styled_conv2d(
        x,
        weight,
        styles,
        noise,
        up,
        down,
        padding,
        resample_filter,
        demodulate,
        flip_weight,
        fused_modconv,
        input_gain=input_gain,
        bias=bias,
        act=act,
        alpha=alpha,
        gain=gain,
        clamp=clamp,
        backend=backend,
    )


def styled_conv2d(
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
    backend: str | None = None,
) -> torch.Tensor:
    """`modulated_conv2d` with noise_strength * noise for noise: the one call of a layer. The
    strength has a gradient without one of the noise, pixel by pixel."""
    check_image("x", x)
    check_filter("resample_filter", resample_filter, x)
    up = as_int("up", up, minimum=1)
    down = as_int("down", down, minimum=1)
    padding = _parse_padding(padding)
    check_tensor("weight", weight, 4)
    check_operand("weight", weight, x, (weight.shape[0], x.shape[1], *weight.shape[2:]))
    check_operand("styles", styles, x, tuple(x.shape[:2]))
    if 0 in weight.shape:
        raise ValueError(f"weight must not be empty, got weight.shape={tuple(weight.shape)}")
    size = check_resampled_size(x, weight, resample_filter, up, down, padding)
    if noise is not None:
        _check_broadcastable("noise", noise, x, (x.shape[0], weight.shape[0], *size))
    if isinstance(input_gain, torch.Tensor):
        _check_broadcastable("input_gain", input_gain, x, tuple(x.shape[:2]))
    elif input_gain is not None:
        check_number("input_gain", input_gain)
    if noise_strength is not None:
        check_operand("noise_strength", noise_strength, x, ())
        if noise is None:
            raise ValueError("noise_strength needs noise, got noise=None")
    if bias is not None:
        check_operand("bias", bias, x, (weight.shape[0],))

    alpha, gain, clamp = check_constants(alpha, gain, clamp)
    act = activation(act).name
    name = select("modulated_conv2d", x, backend)
    weight = skippable(weight)
    if name == "reference":
        return reference_modulated_conv2d(
            x,
            weight,
            styles,
            noise,
            up,
            down,
            padding,
            resample_filter,
            demodulate,
            flip_weight,
            fused_modconv and _weights_are_smaller(weight, x),
            input_gain=input_gain,
            noise_strength=noise_strength,
            bias=bias,
            act=act,
            alpha=alpha,
            gain=gain,
            clamp=clamp,
        )
    weight, before, after = coefficients(
        x, weight, styles, demodulate, input_gain, partial(demodulation, backend=name)
    )
    end = Epilogue(after, noise, bias, act, alpha, gain, clamp, noise_strength)
    kernel_size = (weight.shape[3], weight.shape[2])
    steps = plan(kernel_size, filter_size(resample_filter), up, down, padding, flip_weight)
    return run_plan(x, weight, resample_filter, steps, end, name, pre=before)


def _weights_are_smaller(weight: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether one weight per sample is less to write than a scaled image."""
    return weight.numel() < x.shape[1:].numel()


def _check_broadcastable(
    name: str, t: torch.Tensor, x: torch.Tensor, shape: tuple[int, ...]
) -> None:
    """t is a floating-point tensor on x's device that broadcasts to this shape."""
    check_tensor(name, t)
    sizes = tuple(t.shape)
    if len(sizes) > len(shape) or any(
        a != 1 and a != b for a, b in zip(reversed(sizes), reversed(shape))
    ):
        raise ValueError(
            f"{name} must broadcast to {shape} for x.shape={tuple(x.shape)}, "
            f"got {name}.shape={sizes}"
        )
    check_device(name, t, x)
