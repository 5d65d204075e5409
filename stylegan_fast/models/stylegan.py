"""The StyleGAN generator and discriminator (Karras et al., A Style-Based Generator Architecture for
Generative Adversarial Networks, 2019), with progressive growing (Karras et al., 2018).

As published: a mapping network of 8 layers, a constant input, two style blocks a resolution with
noise and AdaIN, blurred up- and downsampling, minibatch standard deviation, equalised learning
rate. What is the same function in other units, as in `models.stylegan2`, or the same but for the
border:

* √2 of the leaky ReLU's initialisation follows the activation instead of standing in the weight.
* The blur is part of the filter that doubles or halves the image (see `layers.StyleBlock`).
* Labels are embedded, normalised and projected as in `models.stylegan2`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Conv2dLayer, StyleBlock, StyleLayer
from ..layers.checks import check_choice, check_resolution, check_shape
from ..ops import downsample2d, setup_filter, upsample2d
from ._recorded import recorded
from .stylegan2 import DiscriminatorEpilogue, MappingNetwork, _channels

__all__ = ["Discriminator", "Generator", "StyleBlock", "SynthesisNetwork"]

Filter = Sequence[float] | Tensor | None


def _resolutions(resolution: int) -> list[int]:
    """4, 8, …, resolution."""
    check_resolution("resolution", resolution, least=8)
    if resolution > 1024:
        raise ValueError(f"resolution={resolution!r} must be at most 1024")
    return [2**log for log in range(2, int(resolution).bit_length())]


def _check_fade(alpha: float, resolution: int) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha!r} must be between 0 and 1")
    if alpha < 1 and resolution == 4:
        raise ValueError(f"{alpha=} fades from half the resolution, but resolution=4 is the least")


class SynthesisNetwork(nn.Module):
    """img = to_rgbs[K-1](layers[2K-1](… layers[0](const, ws[0]) …, ws[2K-1])).

    layers[0] is a `StyleLayer`, the others are `StyleBlock`s, of which layers[2], layers[4], …
    double the resolution: row i of ws is the style of layers[i], and resolution 4·2ᵏ has
    layers[2k], layers[2k + 1] and to_rgbs[k], a 1×1 convolution. It has min(channel_base //
    resolution, channel_max) channels.

    ws [N, num_ws, w_dim] -> img [N, img_channels, r, r] in the parameters' dtype, r the argument
    `resolution` (None: img_resolution). While the network grows, `alpha` < 1 fades r in: img =
    alpha · img_r + (1 - alpha) · img_{r/2}, the latter doubled by repetition. The later rows of ws
    and layers are then unused.
    """

    repeat_filter: Tensor

    def __init__(
        self,
        w_dim: int,
        img_resolution: int,
        img_channels: int = 3,
        channel_base: int = 16384,
        channel_max: int = 512,
        activation: str = "lrelu",
        resample_filter: Filter = (1, 3, 3, 1),
    ) -> None:
        super().__init__()
        self.block_resolutions = _resolutions(img_resolution)
        self.w_dim = w_dim
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.num_ws = 2 * len(self.block_resolutions)
        self.register_buffer("repeat_filter", setup_filter([1, 1]), persistent=False)

        widths = [_channels(r, channel_base, channel_max) for r in self.block_resolutions]
        self.const = nn.Parameter(torch.ones(widths[0], 4, 4))
        self.layers = nn.ModuleList()
        self.to_rgbs = nn.ModuleList()
        for k, (resolution, channels) in enumerate(zip(self.block_resolutions, widths)):
            shared: dict[str, Any] = {"activation": activation, "resolution": resolution}
            self.layers += [
                StyleBlock(
                    widths[k - 1], channels, w_dim, resample_filter=resample_filter, **shared
                )
                if k > 0
                else StyleLayer(channels, w_dim, **shared),
                StyleBlock(channels, channels, w_dim, upsample=False, **shared),
            ]
            self.to_rgbs.append(Conv2dLayer(channels, img_channels, 1))

    def forward(
        self,
        ws: Tensor,
        noise_mode: str = "random",
        *,
        resolution: int | None = None,
        alpha: float = 1,
    ) -> Tensor:
        check_shape("ws", ws, "N", self.num_ws, self.w_dim)
        if resolution is None:
            resolution = self.img_resolution
        check_choice("resolution", resolution, self.block_resolutions)
        _check_fade(alpha, resolution)
        top = self.block_resolutions.index(resolution)

        styles = ws.to(self.const.dtype).unbind(dim=1)
        x = self.const.repeat(ws.shape[0], 1, 1, 1)
        faded = None
        for k in range(top + 1):
            x = self.layers[2 * k](x, styles[2 * k], noise_mode)
            x = self.layers[2 * k + 1](x, styles[2 * k + 1], noise_mode)
            if k == top - 1 and alpha < 1:
                faded = upsample2d(self.to_rgbs[k](x), self.repeat_filter)
        img = self.to_rgbs[top](x)
        return (img if faded is None else faded.lerp(img, alpha)).to(self.const.dtype)

    def extra_repr(self) -> str:
        return (
            f"w_dim={self.w_dim}, img_resolution={self.img_resolution}, "
            f"img_channels={self.img_channels}, num_ws={self.num_ws}"
        )


@recorded
class Generator(nn.Module):
    """img = synthesis(styles).

    styles: W `[N, style_dim]`, the style of all layers, or W+ `[N, num_layers, style_dim]`, one for
    each of the num_layers = 2·log2(resolution) - 2 layers -> img [N, img_channels, resolution,
    resolution], about in [-1, 1] once trained. mapping(z, c) gives W+ of latents z [N, z_dim] ~
    N(0, 1) (z_dim = style_dim unless given) and labels c [N, c_dim], and does the truncation.

    `resolution` is a power of two from 8 to 1024. mapping_kwargs go to `MappingNetwork`,
    synthesis_kwargs to `SynthesisNetwork` (img_channels, channel_base, …); keyword arguments of
    `forward` to its `forward` (noise_mode, resolution, alpha). Differentiable twice with respect to
    styles, z, c and the parameters. ValueError for another shape of styles.
    """

    def __init__(
        self,
        style_dim: int,
        resolution: int = 128,
        *,
        z_dim: int | None = None,
        c_dim: int = 0,
        mapping_kwargs: Mapping[str, Any] = {},
        **synthesis_kwargs: Any,
    ) -> None:
        super().__init__()
        self.synthesis = SynthesisNetwork(style_dim, resolution, **synthesis_kwargs)
        self.z_dim = style_dim if z_dim is None else z_dim
        self.c_dim = c_dim
        self.w_dim = self.style_dim = style_dim
        self.num_ws = self.num_layers = self.synthesis.num_ws
        self.img_resolution = resolution
        self.img_channels = self.synthesis.img_channels
        self.mapping = MappingNetwork(
            self.z_dim, c_dim, style_dim, self.num_ws, **{"w_avg_beta": 0.995, **mapping_kwargs}
        )

    def forward(self, styles: Tensor, **synthesis_kwargs: Any) -> Tensor:
        if styles.ndim == 2:
            check_shape("styles", styles, "N", self.style_dim)
            styles = styles[:, None].repeat(1, self.num_layers, 1)
        check_shape("styles", styles, "N", self.num_layers, self.style_dim)
        return self.synthesis(styles, **synthesis_kwargs)


@recorded
class Discriminator(nn.Module):
    """logits = epilogue(blocks[0](… blocks[K-1](from_rgbs[K](img)))).

    Index k counts the resolutions 4·2ᵏ: from_rgbs[k] is a 1×1 convolution, blocks[k] leads from
    4·2ᵏ⁺¹ to 4·2ᵏ with two 3×3 convolutions, the second of which halves. Channels follow
    `SynthesisNetwork`. epilogue_kwargs go to the `DiscriminatorEpilogue` (mbstd_group_size, …),
    mapping_kwargs to the label's `MappingNetwork`.

    img [N, img_channels, r, r], c [N, c_dim] (ignored where c_dim = 0) -> logits [N, 1], for any
    power of two r from 4 to `resolution`. `alpha` < 1 fades r in: the features of blocks are mixed,
    alpha · blocks[k-1](from_rgbs[k](img)) + (1 - alpha) · from_rgbs[k-1](img halved by averaging).
    Differentiable twice with respect to img, c and the parameters. ValueError for another shape of
    img or c, a missing label, or a batch the minibatch standard deviation cannot group.
    """

    mean_filter: Tensor

    def __init__(
        self,
        resolution: int = 128,
        *,
        c_dim: int = 0,
        img_channels: int = 3,
        channel_base: int = 16384,
        channel_max: int = 512,
        activation: str = "lrelu",
        resample_filter: Filter = (1, 3, 3, 1),
        mapping_kwargs: Mapping[str, Any] = {},
        epilogue_kwargs: Mapping[str, Any] = {},
    ) -> None:
        super().__init__()
        self.block_resolutions = _resolutions(resolution)
        self.c_dim = c_dim
        self.img_resolution = resolution
        self.img_channels = img_channels
        self.register_buffer("mean_filter", setup_filter([1, 1]), persistent=False)

        widths = [_channels(r, channel_base, channel_max) for r in self.block_resolutions]
        acts: dict[str, Any] = {"activation": activation}
        self.from_rgbs = nn.ModuleList(
            Conv2dLayer(img_channels, channels, 1, **acts) for channels in widths
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(
                Conv2dLayer(channels, channels, 3, **acts),
                Conv2dLayer(channels, lower, 3, down=2, resample_filter=resample_filter, **acts),
            )
            for lower, channels in pairwise(widths)
        )
        cmap_dim = widths[0] if c_dim > 0 else 0
        if c_dim > 0:
            self.mapping = MappingNetwork(
                0, c_dim, cmap_dim, num_ws=None, w_avg_beta=None, **mapping_kwargs
            )
        self.epilogue = DiscriminatorEpilogue(
            widths[0], cmap_dim, 4, img_channels, "orig", **{**acts, **epilogue_kwargs}
        )

    def forward(self, img: Tensor, c: Tensor | None = None, *, alpha: float = 1) -> Tensor:
        check_shape("img", img, "N", self.img_channels, "r", "r")
        resolution = img.shape[2]
        check_choice("img.shape[2]", resolution, self.block_resolutions)
        check_shape("img", img, "N", self.img_channels, resolution, resolution)
        _check_fade(alpha, resolution)
        cmap = self.mapping(None, c) if self.c_dim > 0 else None

        top = self.block_resolutions.index(resolution)
        x = self.from_rgbs[top](img)
        for k in reversed(range(top)):
            x = self.blocks[k](x)
            if k == top - 1 and alpha < 1:
                x = self.from_rgbs[k](downsample2d(img, self.mean_filter)).lerp(x, alpha)
        return self.epilogue(x, None, cmap)

    def extra_repr(self) -> str:
        return (
            f"c_dim={self.c_dim}, img_resolution={self.img_resolution}, "
            f"img_channels={self.img_channels}"
        )
