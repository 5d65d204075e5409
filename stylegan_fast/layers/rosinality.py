"""Layers of the other family of StyleGAN2 code, rosinality's stylegan2-pytorch and what follows it
(pixel2style2pixel, encoder4editing, BasicSR), with its names, arguments and state_dict keys.

What differs from the layers beside this module:

* A weight is scaled by 1/√(I·k²) in every convolution, before demodulation too, so there the 1e-8
  is added to the energy of the scaled weight.
* A FIR filter is the buffer `kernel` [taps, taps], which includes the gain of an upsampling.
* pad = (before, after) of both axes.
* Weights are [1, O, I, k, k] in the generator, noise strengths [1], ToRGB's bias [1, 3, 1, 1].

A layer that holds other layers (StyledConv, ToRGB, ConvLayer) takes their parameters and makes one
fused call of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..ops import bias_act, setup_filter, upfirdn2d
from ..ops.conv2d_resample import conv2d_bias_act
from ..ops.modulated_conv2d import styled_conv2d
from ..ops.upfirdn2d import upfirdn2d_epilogue
from ..reference.bias_act import Epilogue
from ..weight_gradients import skippable
from .checks import check_shape
from .linear import FullyConnectedLayer, normalize_2nd_moment

Filter = Sequence[float] | Sequence[Sequence[float]] | Tensor


def fused_leaky_relu(
    input: Tensor, bias: Tensor | None = None, negative_slope: float = 0.2, scale: float = 2**0.5
) -> Tensor:
    """y = scale · leaky_relu(input + bias), `bias_act` with the bias [C] along dimension 1."""
    if bias is not None:
        bias = bias.to(input.dtype)
    return bias_act(input, bias, act="lrelu", alpha=negative_slope, gain=scale)


class FusedLeakyReLU(nn.Module):
    """y = scale · leaky_relu(input + bias), with the parameter bias [channel] = 0.

    input [N, channel, ...] -> y, in the shape, dtype and memory format of input. Differentiable to
    any order.
    """

    def __init__(
        self, channel: int, bias: bool = True, negative_slope: float = 0.2, scale: float = 2**0.5
    ) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channel)) if bias else None
        self.negative_slope = negative_slope
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        return fused_leaky_relu(input, self.bias, self.negative_slope, self.scale)

    def extra_repr(self) -> str:
        return (
            f"bias={self.bias is not None}, negative_slope={self.negative_slope}, "
            f"scale={self.scale:g}"
        )


class PixelNorm(nn.Module):
    """y = input / √(mean(input², dim=1) + 1e-8)."""

    def forward(self, input: Tensor) -> Tensor:
        return normalize_2nd_moment(input)


class EqualLinear(FullyConnectedLayer):
    """y = input (weight · lr_mul / √in_dim)ᵀ + bias · lr_mul, through √2 · leaky_relu(y, 0.2) where
    `activation` is true: `FullyConnectedLayer` under the other family's names.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        bias: bool = True,
        bias_init: float = 0,
        lr_mul: float = 1,
        activation: str | None = None,
    ) -> None:
        super().__init__(
            in_dim, out_dim, bias, "lrelu" if activation else "linear", lr_mul, bias_init
        )


class EqualConv2d(nn.Module):
    """y = conv(input, weight / √(I·k²)) + bias.

    Parameters weight [O, I, k, k] ~ N(0, 1) and bias [O] = 0. input [N, I, H, W] -> y, as
    `torch.nn.functional.conv2d` with this stride and padding, in the dtype of input. Differentiable
    to any order. ValueError for another shape of input.
    """

    def __init__(
        self,
        in_channel: int,
        out_channel: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.in_channel = in_channel
        self.out_channel = out_channel
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.scale = 1 / math.sqrt(in_channel * kernel_size**2)
        self.weight = nn.Parameter(torch.randn(out_channel, in_channel, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channel)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        check_shape("input", input, "N", self.in_channel, "H", "W")
        weight = (skippable(self.weight) * self.scale).to(input.dtype)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return functional.conv2d(input, weight, bias, self.stride, self.padding)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channel}, {self.out_channel}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, bias={self.bias is not None}"
        )


class Resample(nn.Module):
    """y = upfirdn2d(input, kernel, up, down, pad), plus `add` [N, C, H', W'] in the same pass.

    Buffer kernel [taps, taps] = gain · k / sum(k), where a 1-D k is multiplied with itself.
    pad = (before, after) of both axes, or (left, right, top, bottom).

    input [N, C, H, W] -> y [N, C, (H · up + pads - taps) // down + 1, ...], in the dtype and memory
    format of input. Differentiable to any order. ValueError for another rank of input or an output
    without pixels.
    """

    kernel: Tensor

    def __init__(
        self, kernel: Filter, pad: Sequence[int], up: int = 1, down: int = 1, gain: float = 1
    ) -> None:
        super().__init__()
        self.register_buffer("kernel", setup_filter(kernel, gain=gain, separable=False))
        self.pad = tuple(pad)
        self.up = up
        self.down = down

    def forward(self, input: Tensor, add: Tensor | None = None) -> Tensor:
        padding = self.pad * 2 if len(self.pad) == 2 else self.pad
        arguments = (input, self.kernel, self.up, self.down, padding)
        if add is None:
            return upfirdn2d(*arguments)
        return upfirdn2d_epilogue(*arguments, end=Epilogue(), add=add)

    def extra_repr(self) -> str:
        taps = " x ".join(map(str, self.kernel.shape))
        return f"kernel of {taps}, pad={self.pad}, up={self.up}, down={self.down}"


class Upsample(Resample):
    """y [N, C, H · factor, W · factor] = input upsampled with the filter, `ops.upsample2d`."""

    def __init__(self, kernel: Filter, factor: int = 2) -> None:
        p = len(kernel) - factor
        pad = ((p + 1) // 2 + factor - 1, p // 2)
        super().__init__(kernel, pad, up=factor, gain=factor**2)
        self.factor = factor


class Downsample(Resample):
    """y [N, C, H / factor, W / factor] = input downsampled with the filter, `ops.downsample2d`."""

    def __init__(self, kernel: Filter, factor: int = 2) -> None:
        p = len(kernel) - factor
        super().__init__(kernel, ((p + 1) // 2, p // 2), down=factor)
        self.factor = factor


class Blur(Resample):
    """y = input, padded and filtered, times upsample_factor².

    Buffer resample_filter is the kernel without that gain, which the ops give to a filter
    themselves. It follows the kernel through `load_state_dict` and is not in the state_dict.
    """

    resample_filter: Tensor

    def __init__(self, kernel: Filter, pad: Sequence[int], upsample_factor: int = 1) -> None:
        super().__init__(kernel, pad, gain=upsample_factor**2)
        self.upsample_factor = upsample_factor
        self.register_buffer("resample_filter", None, persistent=False)
        _update_resample_filter(self)
        self.register_load_state_dict_post_hook(_update_resample_filter)


def _update_resample_filter(blur: Blur, incompatible_keys: object = None) -> None:
    blur.resample_filter = blur.kernel / blur.upsample_factor**2


def blur_before_strided_conv(kernel: Filter, kernel_size: int) -> Blur:
    """The filter before a convolution with stride 2, which does not pad."""
    p = len(kernel) - 2 + kernel_size - 1
    return Blur(kernel, ((p + 1) // 2, p // 2))


def blur_after_transposed_conv(kernel: Filter, kernel_size: int) -> Blur:
    """The filter after a transposed convolution with stride 2, which crops to twice the size."""
    p = len(kernel) - 2 - (kernel_size - 1)
    return Blur(kernel, ((p + 1) // 2 + 1, p // 2 + 1), upsample_factor=2)


def same_padding(kernel_size: int) -> int:
    """The padding with which a convolution, resampling or not, keeps the image centred."""
    if kernel_size % 2 != 1:
        raise ValueError(f"kernel_size={kernel_size!r} must be odd")
    return kernel_size // 2


class ConvLayer(nn.Sequential):
    """y = gain · √2 · leaky_relu(conv(input, weight / √(I·k²)) + bias, 0.2), or without `activate`
    y = gain · (conv(input, weight / √(I·k²)) + bias): one call of `conv2d_bias_act`.

    With `downsample` the filter precedes the convolution, whose stride is 2. The children, in this
    order and with these keys, are Blur (if downsample: 0.kernel), EqualConv2d (weight) and
    FusedLeakyReLU (if activate: bias); without activate the bias is EqualConv2d's.

    input [N, I, H, W] -> y [N, O, H, W], or [N, O, H/2, W/2] with `downsample`, in the dtype and
    memory format of input. Differentiable to any order. ValueError for another shape of input or an
    even kernel_size.
    """

    def __init__(
        self,
        in_channel: int,
        out_channel: int,
        kernel_size: int,
        downsample: bool = False,
        blur_kernel: Filter = (1, 3, 3, 1),
        bias: bool = True,
        activate: bool = True,
    ) -> None:
        padding = same_padding(kernel_size)
        stride, padding_of_conv = (2, 0) if downsample else (1, padding)
        layers: list[nn.Module] = [
            EqualConv2d(
                in_channel,
                out_channel,
                kernel_size,
                stride,
                padding_of_conv,
                bias=bias and not activate,
            )
        ]
        if downsample:
            layers.insert(0, blur_before_strided_conv(blur_kernel, kernel_size))
        if activate:
            layers.append(FusedLeakyReLU(out_channel, bias=bias))
        super().__init__(*layers)
        self.downsample = downsample
        self.activate = activate
        self.padding = padding

    def forward(self, input: Tensor, gain: float = 1) -> Tensor:
        blur: Any = self[0] if self.downsample else None
        conv: Any = self[1 if self.downsample else 0]
        last: Any = self[-1]
        check_shape("input", input, "N", conv.in_channel, "H", "W")
        return conv2d_bias_act(
            input,
            (conv.weight * conv.scale).to(input.dtype),
            blur.kernel if self.downsample else None,
            down=conv.stride,
            padding=self.padding,
            b=last.bias,
            act="lrelu" if self.activate else "linear",
            alpha=last.negative_slope if self.activate else None,
            gain=last.scale * gain if self.activate else gain,
        )


class ResBlock(nn.Module):
    """y = √½ · conv2(conv1(input)) + √½ · skip(input), with conv1 3×3, conv2 3×3 and downsampling,
    skip 1×1, downsampling and linear.

    input [N, in_channel, H, W] -> y [N, out_channel, H/2, W/2]. Differentiable to any order.
    """

    def __init__(
        self, in_channel: int, out_channel: int, blur_kernel: Filter = (1, 3, 3, 1)
    ) -> None:
        super().__init__()
        self.conv1 = ConvLayer(in_channel, in_channel, 3)
        self.conv2 = ConvLayer(in_channel, out_channel, 3, True, blur_kernel)
        self.skip = ConvLayer(
            in_channel, out_channel, 1, True, blur_kernel, bias=False, activate=False
        )

    def forward(self, input: Tensor) -> Tensor:
        half_power = math.sqrt(0.5)
        return self.conv2(self.conv1(input), half_power) + self.skip(input, half_power)


class ConstantInput(nn.Module):
    """y [N, channel, size, size]: the parameter input [1, channel, size, size] ~ N(0, 1), once for
    each of the N samples of `input`."""

    def __init__(self, channel: int, size: int = 4) -> None:
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channel, size, size))

    def forward(self, input: Tensor) -> Tensor:
        return self.input.repeat(input.shape[0], 1, 1, 1)


class ModulatedConv2d(nn.Module):
    """y = gain · act(d ⊙ conv(s ⊙ input, weight) + noise_strength · noise + bias), one call of
    `modulated_conv2d`.

    s = modulation(style) / √(I·k²) [N, I] are the styles and d [N, O] their demodulation
    coefficients (1 where `demodulate` is false). With `upsample`, conv is a transposed convolution
    with stride 2 followed by the filter; with `downsample`, the filter followed by a convolution
    with stride 2. Parameter weight [1, O, I, k, k] ~ N(0, 1), `modulation` an EqualLinear whose
    bias starts at 1, and where it resamples a Blur `blur`.

    input [N, I, H, W], style [N, style_dim], noise that broadcasts to y, bias [O] -> y [N, O, H',
    W'], in the dtype and memory format of input. act and alpha are those of `bias_act`, `fused` is
    fused_modconv of `modulated_conv2d`. Differentiable twice, to any order where act is piecewise
    linear. ValueError for another shape, an even kernel_size, or both `upsample` and `downsample`.
    """

    blur: Blur | None

    def __init__(
        self,
        in_channel: int,
        out_channel: int,
        kernel_size: int,
        style_dim: int,
        demodulate: bool = True,
        upsample: bool = False,
        downsample: bool = False,
        blur_kernel: Filter = (1, 3, 3, 1),
        fused: bool = True,
    ) -> None:
        super().__init__()
        if upsample and downsample:
            raise ValueError(f"{upsample=} and {downsample=}: choose one")
        self.in_channel = in_channel
        self.out_channel = out_channel
        self.kernel_size = kernel_size
        self.style_dim = style_dim
        self.demodulate = demodulate
        self.upsample = upsample
        self.downsample = downsample
        self.fused = fused
        self.padding = same_padding(kernel_size)
        self.scale = 1 / math.sqrt(in_channel * kernel_size**2)
        self.weight = nn.Parameter(
            torch.randn(1, out_channel, in_channel, kernel_size, kernel_size)
        )
        self.modulation = EqualLinear(style_dim, in_channel, bias_init=1)
        if upsample:
            self.blur = blur_after_transposed_conv(blur_kernel, kernel_size)
        elif downsample:
            self.blur = blur_before_strided_conv(blur_kernel, kernel_size)
        else:
            self.blur = None

    def forward(
        self,
        input: Tensor,
        style: Tensor,
        noise: Tensor | None = None,
        noise_strength: Tensor | None = None,
        bias: Tensor | None = None,
        act: str = "linear",
        alpha: float | None = None,
        gain: float = 1,
    ) -> Tensor:
        check_shape("input", input, "N", self.in_channel, "H", "W")
        check_shape("style", style, input.shape[0], self.style_dim)
        return styled_conv2d(
            input,
            self.weight.squeeze(0),
            self.modulation(style) * self.scale,
            noise=noise,
            noise_strength=noise_strength,
            up=2 if self.upsample else 1,
            down=2 if self.downsample else 1,
            padding=self.padding,
            resample_filter=None if self.blur is None else self.blur.resample_filter,
            demodulate=self.demodulate,
            flip_weight=not self.upsample,
            fused_modconv=self.fused,
            bias=None if bias is None else bias.to(input.dtype),
            act=act,
            alpha=alpha,
            gain=gain,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channel}, {self.out_channel}, kernel_size={self.kernel_size}, "
            f"style_dim={self.style_dim}, demodulate={self.demodulate}, upsample={self.upsample}, "
            f"downsample={self.downsample}, fused={self.fused}"
        )


class NoiseInjection(nn.Module):
    """y = image + weight · noise, with the parameter weight [1] = 0.

    image [N, C, H, W], noise that broadcasts to it or None: N(0, 1) of shape [N, 1, H, W].
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        if noise is None:
            samples, _, height, width = image.shape
            noise = self.draw(samples, height, width)
        return image + (self.weight * noise).to(image.dtype)

    def draw(self, samples: int, height: int, width: int) -> Tensor:
        """N(0, 1) of shape [samples, 1, height, width]."""
        shape = (samples, 1, height, width)
        return torch.randn(shape, device=self.weight.device, dtype=self.weight.dtype)


class StyledConv(nn.Module):
    """y = √2 · leaky_relu(conv(input, style) + noise.weight · noise + activate.bias, 0.2), one call
    of `modulated_conv2d`.

    input [N, I, H, W], style [N, style_dim], noise that broadcasts to y or None: drawn anew -> y
    [N, O, H, W], with `upsample` [N, O, 2H, 2W], in the dtype and memory format of input.
    Differentiable to any order. ValueError for another shape or an even kernel_size.
    """

    def __init__(
        self,
        in_channel: int,
        out_channel: int,
        kernel_size: int,
        style_dim: int,
        upsample: bool = False,
        blur_kernel: Filter = (1, 3, 3, 1),
        demodulate: bool = True,
    ) -> None:
        super().__init__()
        self.conv = ModulatedConv2d(
            in_channel,
            out_channel,
            kernel_size,
            style_dim,
            demodulate,
            upsample,
            blur_kernel=blur_kernel,
        )
        self.noise = NoiseInjection()
        self.activate = FusedLeakyReLU(out_channel)

    def forward(self, input: Tensor, style: Tensor, noise: Tensor | None = None) -> Tensor:
        check_shape("input", input, "N", self.conv.in_channel, "H", "W")
        if noise is None:
            up = 2 if self.conv.upsample else 1
            samples, _, height, width = input.shape
            noise = self.noise.draw(samples, height * up, width * up)
        return self.conv(
            input,
            style,
            noise=noise,
            noise_strength=self.noise.weight.squeeze(0),
            bias=self.activate.bias,
            act="lrelu",
            alpha=self.activate.negative_slope,
            gain=self.activate.scale,
        )


class ToRGB(nn.Module):
    """y = conv(input, style) + bias + upsample(skip), conv 1×1 and not demodulated; the upsampling
    and the sum are one pass.

    input [N, I, H, W], style [N, style_dim], skip [N, 3, H/2, W/2] or None -> y [N, 3, H, W], in
    the dtype and memory format of input, of skip if given. Parameter bias [1, 3, 1, 1] = 0.
    Differentiable to any order. ValueError for another shape, or a skip without `upsample`.
    """

    def __init__(
        self,
        in_channel: int,
        style_dim: int,
        upsample: bool = True,
        blur_kernel: Filter = (1, 3, 3, 1),
    ) -> None:
        super().__init__()
        self.upsample = Upsample(blur_kernel) if upsample else None
        self.conv = ModulatedConv2d(in_channel, 3, 1, style_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))

    def forward(self, input: Tensor, style: Tensor, skip: Tensor | None = None) -> Tensor:
        y = self.conv(input, style, bias=self.bias.flatten())
        if skip is None:
            return y
        if self.upsample is None:
            raise ValueError(
                f"skip.shape={tuple(skip.shape)}, but this layer has upsample=False; pass skip=None"
            )
        samples, _, height, width = y.shape
        check_shape("skip", skip, samples, 3, height // 2, width // 2)
        return self.upsample(skip, add=y)
