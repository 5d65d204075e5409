"""The StyleGAN3 generator (Karras et al., Alias-Free Generative Adversarial Networks, 2021).

Names, arguments, defaults, parameters and buffers are those of the original, so its weights load
with `load_state_dict(strict=True)`. StyleGAN3-T is the default; StyleGAN3-R has conv_kernel=1,
use_radial_filters=True and twice the channels. The discriminator is StyleGAN2's.

Every network works in the dtype of its parameters, apart from its 16-bit layers, which are
`stylegan2.MixedPrecisionBlock`s; `.double()` gives a float64 network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._checks import autocast_enabled
from ..layers import FullyConnectedLayer
from ..layers.checks import check_clamp, check_resolution, check_shape
from ..ops import filtered_lrelu, modulated_conv2d
from . import stylegan2
from ._recorded import recorded


class MappingNetwork(stylegan2.MappingNetwork):
    """`stylegan2.MappingNetwork` of two layers, whose w_avg moves where `update_emas` is True."""

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        num_ws: int,
        num_layers: int = 2,
        lr_multiplier: float = 0.01,
        w_avg_beta: float = 0.998,
    ) -> None:
        super().__init__(
            z_dim,
            c_dim,
            w_dim,
            num_ws,
            num_layers=num_layers,
            lr_multiplier=lr_multiplier,
            w_avg_beta=w_avg_beta,
        )

    def forward(  # type: ignore[override]
        self,
        z: Tensor | None,
        c: Tensor | None = None,
        truncation_psi: float = 1,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
    ) -> Tensor:
        return super().forward(z, c, truncation_psi, truncation_cutoff, update_emas=update_emas)


class SynthesisInput(nn.Module):
    """Sine waves, turned and moved by w, and mixed by weight.

        y[n] = Σ_c weight[:,c] / √C · amplitude[n,c] · sin(2π (freqs'[n,c] · p + phases'[n,c]))

    at the centres p of the pixels, in units in which the image is 1 wide, 0 in its middle. With
    (r0, r1, x, y) = affine(w) / √(r0² + r1²), the waves are those of freqs and phases seen from
    R(T(transform(p))), where R turns by (r0, r1), T moves by (-x, -y), and the buffer transform
    [3, 3], the identity, is the user's: its inverse moves the image. Waves above the bandwidth fade
    out towards half the sampling_rate.

    `size` is that of both sides, or [width, height]. w [N, w_dim] -> y [N, channels, height, width]
    in the dtype of the parameters. ValueError unless 0 < bandwidth < sampling_rate / 2.
    """

    freqs: Tensor
    phases: Tensor
    transform: Tensor

    def __init__(
        self,
        w_dim: int,
        channels: int,
        size: int | Sequence[int],
        sampling_rate: float,
        bandwidth: float,
    ) -> None:
        super().__init__()
        if not 0 < bandwidth < sampling_rate / 2:
            raise ValueError(
                f"bandwidth={bandwidth:g} must be positive and less than half the "
                f"sampling_rate={sampling_rate:g}"
            )
        self.w_dim = w_dim
        self.channels = channels
        self.width, self.height = size if isinstance(size, Sequence) else (size, size)
        self.sampling_rate = sampling_rate
        self.bandwidth = bandwidth

        freqs = torch.randn(channels, 2)
        radii = freqs.norm(dim=1, keepdim=True)
        freqs = freqs / (radii * (radii.square() / 4).exp()) * bandwidth
        self.weight = nn.Parameter(torch.randn(channels, channels))
        self.affine = FullyConnectedLayer(w_dim, 4)
        still = {"weight": torch.zeros(4, w_dim), "bias": torch.tensor([1.0, 0, 0, 0])}
        self.affine.load_state_dict(still)
        self.register_buffer("transform", torch.eye(3))
        self.register_buffer("freqs", freqs)
        self.register_buffer("phases", torch.rand(channels) - 0.5)

    def forward(self, w: Tensor) -> Tensor:
        check_shape("w", w, "N", self.w_dim)
        if autocast_enabled(w):  # the phases of many periods need their precision
            with torch.autocast(w.device.type, enabled=False):
                return self.forward(w)
        t = self.affine(w.to(self.weight.dtype))
        t = t / t[:, :2].norm(dim=1, keepdim=True)
        r0, r1, *_ = t.unbind(dim=1)
        rotation = torch.stack([r0, -r1, r1, r0], dim=1).reshape(-1, 2, 2)
        freqs = self.freqs @ rotation
        shifts = freqs @ -t[:, 2:, None]
        waves = torch.cat([freqs, shifts], dim=2) @ self.transform
        freqs, phases = waves[:, :, :2], waves[:, :, 2] + self.phases  # [N, C, 2], [N, C]

        beyond = freqs.norm(dim=2) - self.bandwidth
        amplitudes = (1 - beyond / (self.sampling_rate / 2 - self.bandwidth)).clamp(0, 1)
        x, y = self._centres(self.width), self._centres(self.height)
        turns = freqs[:, :, :1, None] * x + freqs[:, :, 1:, None] * y[:, None]
        turns = turns + phases[:, :, None, None]
        waves = amplitudes[:, :, None, None] * (2 * math.pi * turns).sin()
        mixed = self.weight / math.sqrt(self.channels) @ waves.flatten(2)
        return mixed.unflatten(2, (self.height, self.width))

    def _centres(self, size: int) -> Tensor:
        pixels = torch.arange(size, dtype=self.freqs.dtype, device=self.freqs.device)
        return (pixels + (1 - size) / 2) / self.sampling_rate

    def extra_repr(self) -> str:
        return (
            f"w_dim={self.w_dim}, channels={self.channels}, size=[{self.width}, {self.height}], "
            f"sampling_rate={self.sampling_rate:g}, bandwidth={self.bandwidth:g}"
        )


class SynthesisLayer(stylegan2.MixedPrecisionBlock):
    """y = filtered_lrelu(d ⊙ conv(s ⊙ g · x, weight) + bias), one call each of `modulated_conv2d`
    and `filtered_lrelu`; the bias belongs to the first, whose gradient of it costs no pass.

    s = affine(w) [N, I] are the styles, d [N, O] their demodulation coefficients, and
    g = 1 / √magnitude_ema keeps the magnitude of x: where `update_emas`, magnitude_ema first
    becomes magnitude_ema_beta · magnitude_ema + (1 - magnitude_ema_beta) · mean(x²). The activation
    works at lrelu_upsampling times the higher of the two sampling rates, between low-pass filters
    of filter_size taps a factor. The layer is_torgb has neither demodulation, filters nor slope;
    its styles are divided by √(I·k²).

    x [N, I, in_size, in_size], w [N, w_dim] -> y [N, O, out_size, out_size] in the working format
    (see `stylegan2.MixedPrecisionBlock`). `noise_mode` is accepted and ignored: the network has no
    noise. Differentiable to any order. ValueError for another shape of x or w, or sampling rates
    that are no multiples of one another.
    """

    magnitude_ema: Tensor
    up_filter: Tensor | None
    down_filter: Tensor | None

    def __init__(
        self,
        w_dim: int,
        is_torgb: bool,
        is_critically_sampled: bool,
        use_fp16: bool,
        in_channels: int,
        out_channels: int,
        in_size: int,
        out_size: int,
        in_sampling_rate: float,
        out_sampling_rate: float,
        in_cutoff: float,
        out_cutoff: float,
        in_half_width: float,
        out_half_width: float,
        conv_kernel: int = 3,
        filter_size: int = 6,
        lrelu_upsampling: int = 2,
        use_radial_filters: bool = False,
        conv_clamp: float | None = 256,
        magnitude_ema_beta: float = 0.999,
        fp16_channels_last: bool = False,
        half_dtype: torch.dtype | str = torch.float16,
    ) -> None:
        super().__init__(use_fp16, fp16_channels_last, half_dtype)
        self.w_dim = w_dim
        self.is_torgb = is_torgb
        self.is_critically_sampled = is_critically_sampled
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.in_size = in_size
        self.out_size = out_size
        self.in_sampling_rate = in_sampling_rate
        self.out_sampling_rate = out_sampling_rate
        self.conv_kernel = 1 if is_torgb else conv_kernel
        self.conv_clamp = check_clamp(conv_clamp)
        self.magnitude_ema_beta = magnitude_ema_beta

        rate = max(in_sampling_rate, out_sampling_rate) * (1 if is_torgb else lrelu_upsampling)
        self.up_factor = _factor("in_sampling_rate", in_sampling_rate, rate)
        self.down_factor = _factor("out_sampling_rate", out_sampling_rate, rate)
        up_taps, down_taps = (
            1 if is_torgb or factor == 1 else filter_size * factor
            for factor in (self.up_factor, self.down_factor)
        )
        self.padding = self._padding(up_taps, down_taps)

        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        weight = torch.randn(out_channels, in_channels, self.conv_kernel, self.conv_kernel)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("magnitude_ema", torch.ones([]))
        self.register_buffer(
            "up_filter", self.design_lowpass_filter(up_taps, in_cutoff, 2 * in_half_width, rate)
        )
        self.register_buffer(
            "down_filter",
            self.design_lowpass_filter(
                down_taps,
                out_cutoff,
                2 * out_half_width,
                rate,
                radial=use_radial_filters and not is_critically_sampled,
            ),
        )

    def _padding(self, up_taps: int, down_taps: int) -> list[int]:
        """What makes in_size out_size, on both axes; half of it, or one more, before the image."""
        up, down = self.up_factor, self.down_factor
        convolved = self.in_size + self.conv_kernel - 1
        total = (self.out_size - 1) * down + 1 - convolved * up + up_taps + down_taps - 2
        before = (total + up) // 2
        return [before, total - before] * 2

    def forward(
        self,
        x: Tensor,
        w: Tensor,
        noise_mode: str = "random",
        force_fp32: bool | None = None,
        update_emas: bool = False,
    ) -> Tensor:
        check_shape("x", x, "N", self.in_channels, self.in_size, self.in_size)
        check_shape("w", w, x.shape[0], self.w_dim)
        if update_emas and x.shape[0] > 0:
            with torch.no_grad():
                magnitude = x.to(self.magnitude_ema.dtype).square().mean()
                self.magnitude_ema.copy_(
                    magnitude.lerp(self.magnitude_ema, self.magnitude_ema_beta)
                )

        styles = self.affine(w)
        if self.is_torgb:
            styles = styles / math.sqrt(self.in_channels * self.conv_kernel**2)
        dtype, memory_format = self.working_format(self.weight, force_fp32)
        x = modulated_conv2d(
            x.to(dtype=dtype, memory_format=memory_format),
            self.weight,
            styles,
            padding=self.conv_kernel - 1,
            demodulate=not self.is_torgb,
            input_gain=self.magnitude_ema.rsqrt(),
            bias=self.bias,
        )
        return filtered_lrelu(
            x,
            self.up_filter,
            self.down_filter,
            up=self.up_factor,
            down=self.down_factor,
            padding=self.padding,
            gain=1 if self.is_torgb else math.sqrt(2),
            slope=1 if self.is_torgb else 0.2,
            clamp=self.conv_clamp,
        )

    @staticmethod
    def design_lowpass_filter(
        numtaps: int, cutoff: float, width: float, fs: float, radial: bool = False
    ) -> Tensor | None:
        """Low-pass filter of a Kaiser window, of sum 1: [numtaps], or where `radial` [numtaps,
        numtaps] with the same response in every direction; None for one tap.

        `cutoff` is half way down, `width` that of the transition, both in units in which `fs` is
        the sampling rate.
        """
        if numtaps == 1:
            return None
        attenuation = 2.285 * (numtaps - 1) * math.pi * (width / (fs / 2)) + 7.95
        window = torch.kaiser_window(
            numtaps, periodic=False, beta=_kaiser_beta(attenuation), dtype=torch.float64
        )
        x = (torch.arange(numtaps, dtype=torch.float64) - (numtaps - 1) / 2) / fs
        if radial:
            radii = torch.hypot(x, x[:, None])
            jinc = torch.special.bessel_j1(2 * math.pi * cutoff * radii) / (math.pi * radii)
            taps = torch.where(radii > 0, jinc, cutoff) * window * window[:, None]
        else:
            taps = torch.sinc(2 * cutoff * x) * window
        return (taps / taps.sum()).float()

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, w_dim={self.w_dim}, in_size={self.in_size}, "
            f"out_size={self.out_size}, conv_kernel={self.conv_kernel}, up={self.up_factor}, "
            f"down={self.down_factor}, is_torgb={self.is_torgb}, use_fp16={self.use_fp16}"
        )


def _factor(name: str, rate: float, between: float) -> int:
    factor = between / rate
    if factor < 1 or factor != int(factor):
        raise ValueError(f"{name}={rate:g} must divide the rate between the filters, {between:g}")
    return int(factor)


def _kaiser_beta(attenuation: float) -> float:
    """The shape of a Kaiser window with this attenuation in decibels (Kaiser, 1974)."""
    if attenuation > 50:
        return 0.1102 * (attenuation - 8.7)
    if attenuation > 21:
        return 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21)
    return 0.0


class Signal(NamedTuple):
    """What the images between two layers are made for."""

    cutoff: float
    sampling_rate: int
    half_width: float
    size: int
    channels: int


class SynthesisNetwork(nn.Module):
    """img = output_scale · L_num_layers(… L_0(input(ws_0), ws_1) …, ws_{num_layers+1}).

    The cutoff frequency of the layers grows geometrically from first_cutoff to half the resolution,
    which the last num_critical layers before ToRGB have; their stop band from first_stopband to
    last_stopband_rel times that. A layer's sampling rate is the least power of two that holds its
    stop band, at most the resolution; its image is margin_size wider on every side but in the last
    two layers; it has channel_base / 2 / cutoff channels, at most channel_max. Layer i is called
    L{i}_{size}_{channels}. Those of the num_fp16_res highest sampling rates work in 16 bits.
    num_ws = num_layers + 2.

    ws [N, num_ws, w_dim] -> img [N, img_channels, img_resolution, img_resolution] in the
    parameters' dtype. Keyword arguments go to the layers (force_fp32, update_emas, noise_mode).
    ValueError for a resolution that is no power of two, or too few layers.
    """

    def __init__(
        self,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        channel_base: int = 32768,
        channel_max: int = 512,
        num_layers: int = 14,
        num_critical: int = 2,
        first_cutoff: float = 2,
        first_stopband: float = 2**2.1,
        last_stopband_rel: float = 2**0.3,
        margin_size: int = 10,
        output_scale: float = 0.25,
        num_fp16_res: int = 4,
        **layer_kwargs: Any,
    ) -> None:
        super().__init__()
        check_resolution("img_resolution", img_resolution)
        if not 0 <= num_critical < num_layers:
            raise ValueError(
                f"num_layers={num_layers!r} must be more than num_critical={num_critical!r}, which "
                "must not be negative"
            )
        self.w_dim = w_dim
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.num_ws = num_layers + 2
        self.output_scale = output_scale
        self.num_fp16_res = num_fp16_res

        def signal(index: int) -> Signal:
            growth = min(index / (num_layers - num_critical), 1)
            last_cutoff = img_resolution / 2
            last_stopband = last_cutoff * last_stopband_rel
            cutoff = first_cutoff * (last_cutoff / first_cutoff) ** growth
            stopband = first_stopband * (last_stopband / first_stopband) ** growth
            rate = 2 ** math.ceil(math.log2(min(2 * stopband, img_resolution)))
            size = rate + 2 * margin_size if index < num_layers - 1 else img_resolution
            channels = round(min(channel_base / 2 / cutoff, channel_max))
            if index == num_layers:
                channels = img_channels
            return Signal(cutoff, rate, max(stopband, rate / 2) - cutoff, size, channels)

        signals = [signal(index) for index in range(num_layers + 1)]
        if min(s.channels for s in signals) < 1:
            raise ValueError(
                f"channel_base={channel_base!r} and channel_max={channel_max!r} leave a layer "
                f"without channels at img_resolution={img_resolution}"
            )
        first = signals[0]
        self.input = SynthesisInput(
            w_dim, first.channels, first.size, first.sampling_rate, first.cutoff
        )
        self.layer_names = []
        for index, (before, after) in enumerate(pairwise([first, *signals])):
            layer = SynthesisLayer(
                w_dim,
                is_torgb=index == num_layers,
                is_critically_sampled=index >= num_layers - num_critical,
                # In logarithms: 2**num_fp16_res of a hostile file would not end.
                use_fp16=math.log2(after.sampling_rate) + num_fp16_res > math.log2(img_resolution),
                in_channels=before.channels,
                out_channels=after.channels,
                in_size=before.size,
                out_size=after.size,
                in_sampling_rate=before.sampling_rate,
                out_sampling_rate=after.sampling_rate,
                in_cutoff=before.cutoff,
                out_cutoff=after.cutoff,
                in_half_width=before.half_width,
                out_half_width=after.half_width,
                **layer_kwargs,
            )
            name = f"L{index}_{after.size}_{after.channels}"
            self.add_module(name, layer)
            self.layer_names.append(name)

    def forward(self, ws: Tensor, **layer_kwargs: Any) -> Tensor:
        check_shape("ws", ws, "N", self.num_ws, self.w_dim)
        dtype = self.input.weight.dtype
        first, *rows = ws.to(dtype).unbind(dim=1)
        x = self.input(first)
        for name, w in zip(self.layer_names, rows):
            x = getattr(self, name)(x, w, **layer_kwargs)
        return x.to(dtype=dtype, memory_format=torch.contiguous_format) * self.output_scale

    def extra_repr(self) -> str:
        return (
            f"w_dim={self.w_dim}, img_resolution={self.img_resolution}, "
            f"img_channels={self.img_channels}, num_ws={self.num_ws}, "
            f"num_fp16_res={self.num_fp16_res}"
        )


@recorded
class Generator(nn.Module):
    """img = synthesis(mapping(z, c)).

    Keyword arguments go to `SynthesisNetwork` (channel_base, num_layers, num_fp16_res, …) and
    through it to its layers (conv_kernel, use_radial_filters, magnitude_ema_beta, half_dtype, …).

    z [N, z_dim], c [N, c_dim] (ignored where c_dim = 0) -> img [N, img_channels, res, res]. Further
    keyword arguments of `forward` go to the synthesis (force_fp32; noise_mode, which is ignored).
    Averages, w_avg and every layer's magnitude_ema, move where `update_emas` is True only.
    Differentiable to any order with respect to ws, twice with respect to z, c and the parameters.
    """

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        mapping_kwargs: Mapping[str, Any] = {},
        **synthesis_kwargs: Any,
    ) -> None:
        super().__init__()
        self.z_dim = z_dim
        self.c_dim = c_dim
        self.w_dim = w_dim
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.synthesis = SynthesisNetwork(w_dim, img_resolution, img_channels, **synthesis_kwargs)
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(z_dim, c_dim, w_dim, self.num_ws, **mapping_kwargs)

    def forward(
        self,
        z: Tensor,
        c: Tensor | None = None,
        truncation_psi: float = 1,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
        **synthesis_kwargs: Any,
    ) -> Tensor:
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff, update_emas=update_emas)
        return self.synthesis(ws, update_emas=update_emas, **synthesis_kwargs)
