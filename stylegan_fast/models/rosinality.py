"""The StyleGAN2 networks of rosinality's stylegan2-pytorch, with its names, arguments, parameters
and buffers, so its checkpoints load with `load_state_dict(strict=True)`.

They compute what `models.stylegan2` does with architecture "skip" for the generator and "resnet"
for the discriminator, without labels, clamps and 16-bit blocks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..layers import (
    ConstantInput,
    ConvLayer,
    EqualLinear,
    MinibatchStdLayer,
    PixelNorm,
    ResBlock,
    StyledConv,
    ToRGB,
)
from ..layers.checks import check_resolution, check_shape
from ..layers.rosinality import Filter
from ._recorded import recorded


def _resolutions(size: int) -> list[int]:
    """4, 8, …, size."""
    check_resolution("size", size)
    return [2**log for log in range(2, int(size).bit_length())]


def _channels(resolution: int, multiplier: int) -> int:
    return 512 if resolution <= 32 else 16384 * multiplier // resolution


@recorded
class Generator(nn.Module):
    """image = to_rgbs(… to_rgb1(conv1(input, w), w) …, w), w = style(z).

    Of the n_latent = 2·log2(size) - 2 rows of w, rows 0 and 1 feed conv1 and to_rgb1, rows 2k-1, 2k
    and 2k+1 the two convolutions and to_rgb of resolution 4·2ᵏ. `size` is a power of two, at least
    4; a resolution above 32 has 16384 · channel_multiplier / resolution channels, the others 512.
    """

    def __init__(
        self,
        size: int,
        style_dim: int,
        n_mlp: int,
        channel_multiplier: int = 2,
        blur_kernel: Filter = (1, 3, 3, 1),
        lr_mlp: float = 0.01,
    ) -> None:
        super().__init__()
        first, *others = resolutions = _resolutions(size)
        self.size = size
        self.style_dim = style_dim
        self.n_latent = 2 * len(resolutions)
        self.num_layers = self.n_latent - 1

        self.style = nn.Sequential(
            PixelNorm(),
            *[
                EqualLinear(style_dim, style_dim, lr_mul=lr_mlp, activation="fused_lrelu")
                for _ in range(n_mlp)
            ],
        )
        channel = _channels(first, channel_multiplier)
        self.input = ConstantInput(channel)
        self.conv1 = StyledConv(channel, channel, 3, style_dim)
        self.to_rgb1 = ToRGB(channel, style_dim, upsample=False)
        self.convs = nn.ModuleList()
        self.to_rgbs = nn.ModuleList()
        self.noises = nn.Module()
        self.noises.register_buffer("noise_0", torch.randn(1, 1, first, first))
        for resolution in others:
            out = _channels(resolution, channel_multiplier)
            self.convs += [
                StyledConv(channel, out, 3, style_dim, upsample=True, blur_kernel=blur_kernel),
                StyledConv(out, out, 3, style_dim),
            ]
            self.to_rgbs.append(ToRGB(out, style_dim, blur_kernel=blur_kernel))
            for layer in (len(self.convs) - 1, len(self.convs)):
                noise = torch.randn(1, 1, resolution, resolution)
                self.noises.register_buffer(f"noise_{layer}", noise)
            channel = out

    def forward(
        self,
        styles: Sequence[Tensor],
        return_latents: bool = False,
        inject_index: int | None = None,
        truncation: float = 1,
        truncation_latent: Tensor | None = None,
        input_is_latent: bool = False,
        noise: Sequence[Tensor | None] | None = None,
        randomize_noise: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """(image [N, 3, size, size], the latents [N, n_latent, style_dim] or None).

        styles: one or two z [N, style_dim], or w where `input_is_latent`; a single w may be
        [N, n_latent, style_dim]. Of two, the second feeds the rows from `inject_index` on (None: a
        random one). A truncation other than 1 makes w truncation_latent + truncation ·
        (w - truncation_latent).
        noise: num_layers tensors, of which None is drawn anew; by default all are, or without
        `randomize_noise` are the buffers noises.noise_0, ….

        ValueError for another number or shape of these, or truncation without truncation_latent.
        """
        latents = list(styles) if input_is_latent else [self.style(z) for z in styles]
        if truncation != 1:
            if truncation_latent is None:
                raise ValueError(f"truncation_latent=None, which truncation={truncation!r} needs")
            latents = [truncation_latent.lerp(w, truncation) for w in latents]
        latent = self._rows(latents, inject_index)
        if noise is None:
            noise = [None] * self.num_layers if randomize_noise else list(self.noises.buffers())
        elif len(noise) != self.num_layers:
            raise ValueError(f"noise must hold {self.num_layers} tensors, got {len(noise)}")

        x = self.conv1(self.input(latent), latent[:, 0], noise[0])
        image = self.to_rgb1(x, latent[:, 1])
        for block, to_rgb in enumerate(self.to_rgbs):
            row = 2 * block + 1
            x = self.convs[row - 1](x, latent[:, row], noise[row])
            x = self.convs[row](x, latent[:, row + 1], noise[row + 1])
            image = to_rgb(x, latent[:, row + 2], image)
        return image, latent if return_latents else None

    def _rows(self, latents: list[Tensor], inject_index: int | None) -> Tensor:
        """The latents [N, n_latent, style_dim] of all layers."""
        rows = self.n_latent
        if len(latents) == 1:
            (w,) = latents
            if w.ndim == 3:
                return check_shape("styles[0]", w, "N", rows, self.style_dim)
            check_shape("styles[0]", w, "N", self.style_dim)
            return w[:, None].expand(-1, rows, -1)
        if len(latents) != 2:
            raise ValueError(f"styles must hold one or two tensors, got {len(latents)}")
        first, second = latents
        check_shape("styles[0]", first, "N", self.style_dim)
        check_shape("styles[1]", second, first.shape[0], self.style_dim)
        if inject_index is None:
            inject_index = random.randint(1, rows - 1)
        index = torch.arange(rows, device=first.device)[:, None]
        return torch.where(index < inject_index, first[:, None], second[:, None])

    def make_noise(self) -> list[Tensor]:
        """N(0, 1) in the shapes of the buffers noises.noise_0, …."""
        return [torch.randn_like(noise) for noise in self.noises.buffers()]

    def mean_latent(self, n_latent: int) -> Tensor:
        """The mean [1, style_dim] of `n_latent` random w."""
        const = self.input.input
        z = torch.randn(n_latent, self.style_dim, device=const.device, dtype=const.dtype)
        return self.style(z).mean(0, keepdim=True)

    def get_latent(self, input: Tensor) -> Tensor:
        """style(input)."""
        return self.style(input)


@recorded
class Discriminator(nn.Module):
    """logits = final_linear(final_conv(minibatch_std(convs(input)))): a 1×1 ConvLayer, then one
    ResBlock per resolution from `size` down to 8. Channels as in `Generator`.

    input [N, 3, size, size] -> logits [N, 1]. Differentiable to any order. ValueError for another
    shape of input, or a batch above 4 that 4 does not divide.
    """

    def __init__(
        self, size: int, channel_multiplier: int = 2, blur_kernel: Filter = (1, 3, 3, 1)
    ) -> None:
        super().__init__()
        self.size = size
        channels = [_channels(r, channel_multiplier) for r in reversed(_resolutions(size))]
        self.convs = nn.Sequential(
            ConvLayer(3, channels[0], 1),
            *[
                ResBlock(in_channel, out_channel, blur_kernel)
                for in_channel, out_channel in pairwise(channels)
            ],
        )
        last = channels[-1]
        self.minibatch_std = MinibatchStdLayer(group_size=4)
        self.final_conv = ConvLayer(last + 1, last, 3)
        self.final_linear = nn.Sequential(
            EqualLinear(last * 4 * 4, last, activation="fused_lrelu"), EqualLinear(last, 1)
        )

    def forward(self, input: Tensor) -> Tensor:
        check_shape("input", input, "N", 3, self.size, self.size)
        x = self.minibatch_std(self.convs(input))
        return self.final_linear(self.final_conv(x).flatten(1))
