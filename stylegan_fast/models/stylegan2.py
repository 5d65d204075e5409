"""The StyleGAN2 generator and discriminator (Karras et al., Analyzing and Improving the Image
Quality of StyleGAN, 2020; Training GANs with Limited Data, 2020).

Names, arguments, parameters and buffers are those of the originals, so their weights load with
`load_state_dict(strict=True)`. Where the originals' releases differ, the defaults here are:

* num_fp16_res = 0 and conv_clamp = None: everything in float32, the right thing off the GPU. The
  presets of the originals train with num_fp16_res = 4 and conv_clamp = 256.
* w_avg_beta = 0.998, the later release's; the earlier one has 0.995.
* fused_modconv is on in inference where the working dtype is 32-bit or the batch is 1, the earlier
  release's rule; fused_modconv_default selects the later one's.

Every network works in the dtype of its parameters, apart from its 16-bit blocks; `.double()` gives
a float64 network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import (
    Conv2dLayer,
    FullyConnectedLayer,
    MinibatchStdLayer,
    SynthesisLayer,
    ToRGBLayer,
)
from ..layers.checks import check_choice, check_resolution, check_shape
from ..layers.linear import normalize_2nd_moment
from ..ops import downsample2d, setup_filter, upsample2d
from ..ops.upfirdn2d import upsample2d_add
from ._recorded import recorded

ARCHITECTURES = ("orig", "skip", "resnet")
HALF_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
Filter = Sequence[float] | Tensor | None


class MappingNetwork(nn.Module):
    """w = fc_{L-1}(… fc_0(cat(norm(z), norm(embed(c))))), norm(v) = v / √(mean(v²) + 1e-8).

    z [N, z_dim], c [N, c_dim] -> ws [N, num_ws, w_dim], or [N, w_dim] where num_ws is None. z is
    ignored where z_dim = 0, c where c_dim = 0.

    Truncation: w becomes w_avg + truncation_psi · (w - w_avg) in the first truncation_cutoff rows
    (None: in all). The buffer w_avg exists where num_ws and w_avg_beta are not None. It becomes
    w_avg_beta · w_avg + (1 - w_avg_beta) · mean_n(w) where `update_emas` is True or, `update_emas`
    being None, in training mode unless `skip_w_avg_update`: the switches of the later and of the
    earlier release.

    ValueError for another shape of z or c, a missing label, or truncation without w_avg.
    """

    fc0: FullyConnectedLayer
    w_avg: Tensor

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        num_ws: int | None,
        num_layers: int = 8,
        embed_features: int | None = None,
        layer_features: int | None = None,
        activation: str = "lrelu",
        lr_multiplier: float = 0.01,
        w_avg_beta: float | None = 0.998,
    ) -> None:
        super().__init__()
        if z_dim + c_dim < 1:
            raise ValueError(f"z_dim={z_dim} and c_dim={c_dim}: a mapping network needs an input")
        if num_layers < 1:
            raise ValueError(f"num_layers={num_layers!r} must be at least 1")
        self.z_dim = z_dim
        self.c_dim = c_dim
        self.w_dim = w_dim
        self.num_ws = num_ws
        self.num_layers = num_layers
        self.w_avg_beta = w_avg_beta

        embed_features = w_dim if embed_features is None else embed_features
        layer_features = w_dim if layer_features is None else layer_features
        if c_dim > 0:
            self.embed = FullyConnectedLayer(c_dim, embed_features)
        widths = [
            z_dim + (embed_features if c_dim > 0 else 0),
            *[layer_features] * (num_layers - 1),
            w_dim,
        ]
        for index, (in_features, out_features) in enumerate(pairwise(widths)):
            layer = FullyConnectedLayer(
                in_features, out_features, activation=activation, lr_multiplier=lr_multiplier
            )
            self.add_module(f"fc{index}", layer)
        if num_ws is not None and w_avg_beta is not None:
            self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(
        self,
        z: Tensor | None,
        c: Tensor | None = None,
        truncation_psi: float = 1,
        truncation_cutoff: int | None = None,
        *,
        skip_w_avg_update: bool = False,
        update_emas: bool | None = None,
    ) -> Tensor:
        w = self._input(z, c)
        for index in range(self.num_layers):
            w = getattr(self, f"fc{index}")(w)
        w = w.to(self.fc0.weight.dtype)  # the average and the styles stay precise under autocast

        num_ws, beta = self.num_ws, self.w_avg_beta
        if update_emas is None:
            update_emas = self.training and not skip_w_avg_update
        if update_emas and num_ws is not None and beta is not None and w.shape[0] > 0:
            with torch.no_grad():
                self.w_avg.copy_(w.mean(dim=0).lerp(self.w_avg, beta))

        if truncation_psi == 1:
            return w if num_ws is None else w[:, None].repeat(1, num_ws, 1)
        if num_ws is None or beta is None:
            raise ValueError(
                f"truncation_psi={truncation_psi!r} needs the buffer w_avg; "
                "build the network with num_ws and w_avg_beta, or pass truncation_psi=1"
            )
        cutoff = num_ws if truncation_cutoff is None else truncation_cutoff
        ws = w[:, None].expand(-1, num_ws, -1)
        truncated = self.w_avg.lerp(w, truncation_psi)[:, None].expand(-1, num_ws, -1)
        return torch.cat([truncated[:, :cutoff], ws[:, cutoff:]], dim=1)

    def _input(self, z: Tensor | None, c: Tensor | None) -> Tensor:
        dtype = self.fc0.weight.dtype
        parts = []
        if self.z_dim > 0:
            z = check_shape("z", z, "N", self.z_dim)
            parts.append(normalize_2nd_moment(z.to(dtype)))
        if self.c_dim > 0:
            if c is None:
                raise ValueError(
                    f"c=None: this network is conditional; pass labels c of shape [N, {self.c_dim}]"
                )
            check_shape("c", c, parts[0].shape[0] if parts else "N", self.c_dim)
            parts.append(normalize_2nd_moment(self.embed(c.to(dtype))))
        return torch.cat(parts, dim=1)

    def extra_repr(self) -> str:
        return (
            f"z_dim={self.z_dim}, c_dim={self.c_dim}, w_dim={self.w_dim}, num_ws={self.num_ws}, "
            f"w_avg_beta={self.w_avg_beta}"
        )


class MixedPrecisionBlock(nn.Module):
    """A block that works in 16 bits where it is asked to.

    With use_fp16 the block works in half_dtype, torch.float16 or torch.bfloat16 or the name of one
    of them, in channels_last memory where fp16_channels_last.
    force_fp32 = None means 16 bits on CUDA only, as in the later release of the originals; True
    means never, False on every device.
    """

    conv1: SynthesisLayer | Conv2dLayer
    resample_filter: Tensor

    def __init__(
        self,
        use_fp16: bool,
        fp16_channels_last: bool,
        half_dtype: torch.dtype | str = torch.float16,
    ) -> None:
        super().__init__()
        check_choice("half_dtype", half_dtype, (*HALF_DTYPES.values(), *HALF_DTYPES))
        self.use_fp16 = use_fp16
        self.half_dtype = HALF_DTYPES[half_dtype] if isinstance(half_dtype, str) else half_dtype
        self.channels_last = use_fp16 and fp16_channels_last

    def working_format(
        self, weight: Tensor, force_fp32: bool | None
    ) -> tuple[torch.dtype, torch.memory_format]:
        """The dtype and the memory format of the activations of a block with this weight."""
        if force_fp32 is None:
            force_fp32 = weight.device.type != "cuda"
        if not self.use_fp16 or force_fp32:
            return weight.dtype, torch.contiguous_format
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        return self.half_dtype, memory_format


def _channels(resolution: int, channel_base: int, channel_max: int) -> int:
    return min(channel_base // resolution, channel_max)


def _lowest_half_resolution(img_resolution: int, num_fp16_res: int) -> int:
    return max((2 * img_resolution) >> num_fp16_res, 8)


class SynthesisBlock(MixedPrecisionBlock):
    """The layers of one resolution of the generator.

        skip    x = conv1(conv0(x)),                            img = up(img) + torgb(x)
        orig    x = conv1(conv0(x)),                            img = torgb(x) in the last block
        resnet  x = √½·conv1(conv0(x)) + √½·skip(x),            img = torgb(x) in the last block

    The first block (in_channels = 0) starts from the parameter const [C, res, res] and has conv1
    only. conv0 doubles the resolution.

    x [N, in_channels, res/2, res/2] (None for the first block), img [N, img_channels, res/2, res/2]
    or None, ws [N, num_conv + num_torgb, w_dim] -> x [N, out_channels, res, res] in the working
    format, img [N, img_channels, res, res] in the parameters' dtype, or None.

    `fused_modconv_default` is True, False, "inference_only" (not in training) or None: in inference
    where the working dtype is 32-bit or N = 1. `update_emas` is accepted for the originals'
    callers; a block has no averages. Further arguments go to every SynthesisLayer: kernel_size,
    use_noise and activation to its constructor, noise_mode to its `forward`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        img_channels: int,
        is_last: bool,
        architecture: str = "skip",
        resample_filter: Filter = (1, 3, 3, 1),
        conv_clamp: float | None = None,
        use_fp16: bool = False,
        fp16_channels_last: bool = False,
        fused_modconv_default: bool | str | None = None,
        half_dtype: torch.dtype | str = torch.float16,
        **layer_kwargs: Any,
    ) -> None:
        super().__init__(use_fp16, fp16_channels_last, half_dtype)
        check_choice("architecture", architecture, ARCHITECTURES)
        check_choice(
            "fused_modconv_default", fused_modconv_default, (None, True, False, "inference_only")
        )
        self.in_channels = in_channels
        self.w_dim = w_dim
        self.resolution = resolution
        self.img_channels = img_channels
        self.is_last = is_last
        self.architecture = architecture
        self.fused_modconv_default = fused_modconv_default
        self.register_buffer("resample_filter", setup_filter(resample_filter))
        shared: dict[str, Any] = {"conv_clamp": conv_clamp, "channels_last": self.channels_last}

        if in_channels == 0:
            self.const = nn.Parameter(torch.randn(out_channels, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer(
                in_channels,
                out_channels,
                w_dim,
                resolution,
                up=2,
                resample_filter=resample_filter,
                **shared,
                **layer_kwargs,
            )
        self.conv1 = SynthesisLayer(
            out_channels, out_channels, w_dim, resolution, **shared, **layer_kwargs
        )
        self.num_conv = 1 if in_channels == 0 else 2
        self.num_torgb = 1 if is_last or architecture == "skip" else 0
        if self.num_torgb:
            self.torgb = ToRGBLayer(out_channels, img_channels, w_dim, **shared)
        if in_channels != 0 and architecture == "resnet":
            self.skip = Conv2dLayer(
                in_channels,
                out_channels,
                1,
                bias=False,
                up=2,
                resample_filter=resample_filter,
                channels_last=self.channels_last,
            )

    def forward(
        self,
        x: Tensor | None,
        img: Tensor | None,
        ws: Tensor,
        force_fp32: bool | None = None,
        fused_modconv: bool | None = None,
        update_emas: bool | None = None,
        **layer_kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        check_shape("ws", ws, "N", self.num_conv + self.num_torgb, self.w_dim)
        samples = ws.shape[0]
        styles = iter(ws.unbind(dim=1))
        dtype, memory_format = self.working_format(self.conv1.weight, force_fp32)
        if fused_modconv is None:
            fused_modconv = self._fused_modconv(dtype, samples)
        layer_kwargs = {**layer_kwargs, "fused_modconv": fused_modconv}

        if self.in_channels == 0:
            x = self.const.to(dtype).repeat(samples, 1, 1, 1)
            x = x.contiguous(memory_format=memory_format)
            x = self.conv1(x, next(styles), **layer_kwargs)
        else:
            x = check_shape("x", x, samples, self.in_channels, *[self.resolution // 2] * 2)
            x = x.to(dtype=dtype, memory_format=memory_format)
            if self.architecture == "resnet":
                half_power = math.sqrt(0.5)
                shortcut = self.skip(x, gain=half_power)
                x = self.conv0(x, next(styles), **layer_kwargs)
                x = self.conv1(x, next(styles), gain=half_power, **layer_kwargs)
                x = shortcut + x
            else:
                x = self.conv0(x, next(styles), **layer_kwargs)
                x = self.conv1(x, next(styles), **layer_kwargs)

        if img is not None:
            check_shape("img", img, samples, self.img_channels, *[self.resolution // 2] * 2)
        if self.num_torgb:
            rgb = self.torgb(x, next(styles), fused_modconv=fused_modconv)
            rgb = rgb.to(dtype=self.torgb.weight.dtype, memory_format=torch.contiguous_format)
            img = rgb if img is None else upsample2d_add(img, self.resample_filter, rgb)
        elif img is not None:
            img = upsample2d(img, self.resample_filter)
        return x, img

    def _fused_modconv(self, dtype: torch.dtype, samples: int) -> bool:
        if self.fused_modconv_default is None:
            return not self.training and (dtype.itemsize > 2 or samples == 1)
        if self.fused_modconv_default == "inference_only":
            return not self.training
        return bool(self.fused_modconv_default)

    def extra_repr(self) -> str:
        return f"resolution={self.resolution}, architecture={self.architecture!r}"


class SynthesisNetwork(nn.Module):
    """img = b_res(… b_8(b_4(ws))): one `SynthesisBlock` per resolution 4, 8, …, img_resolution.

    A block at resolution r has min(channel_base // r, channel_max) channels; the num_fp16_res
    highest resolutions (from 8 on) work in 16 bits. num_ws = 2·log2(img_resolution) - 2: rows 0 and
    1 feed conv1 and torgb of b4; rows 2k-1, 2k and 2k+1 feed conv0, conv1 and torgb of b_r with
    r = 4·2ᵏ. So a block's torgb shares its row with the next block's conv0.

    ws [N, num_ws, w_dim] -> img [N, img_channels, img_resolution, img_resolution] in the
    parameters' dtype. Keyword arguments go to the blocks (force_fp32, fused_modconv, noise_mode).
    """

    b4: SynthesisBlock

    def __init__(
        self,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        channel_base: int = 32768,
        channel_max: int = 512,
        num_fp16_res: int = 0,
        **block_kwargs: Any,
    ) -> None:
        super().__init__()
        check_resolution("img_resolution", img_resolution)
        self.w_dim = w_dim
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.num_fp16_res = num_fp16_res
        self.block_resolutions = [2**log for log in range(2, int(img_resolution).bit_length())]
        self.num_ws = 2 * len(self.block_resolutions)

        in_channels = 0
        for resolution in self.block_resolutions:
            out_channels = _channels(resolution, channel_base, channel_max)
            block = SynthesisBlock(
                in_channels,
                out_channels,
                w_dim=w_dim,
                resolution=resolution,
                img_channels=img_channels,
                is_last=resolution == img_resolution,
                use_fp16=resolution >= _lowest_half_resolution(img_resolution, num_fp16_res),
                **block_kwargs,
            )
            self.add_module(f"b{resolution}", block)
            in_channels = out_channels

    def forward(self, ws: Tensor, **block_kwargs: Any) -> Tensor:
        check_shape("ws", ws, "N", self.num_ws, self.w_dim)
        ws = ws.to(self.b4.conv1.weight.dtype)
        x: Tensor | None = None
        img: Tensor | None = None
        row = 0
        for resolution in self.block_resolutions:
            block = getattr(self, f"b{resolution}")
            block_ws = ws.narrow(1, row, block.num_conv + block.num_torgb)
            x, img = block(x, img, block_ws, **block_kwargs)
            row += block.num_conv
        assert img is not None  # the last block has torgb in every architecture
        return img

    def extra_repr(self) -> str:
        return (
            f"w_dim={self.w_dim}, img_resolution={self.img_resolution}, "
            f"img_channels={self.img_channels}, num_ws={self.num_ws}, "
            f"num_fp16_res={self.num_fp16_res}"
        )


@recorded
class Generator(nn.Module):
    """img = synthesis(mapping(z, c)).

    Keyword arguments go to `SynthesisNetwork` (channel_base, channel_max, num_fp16_res) and through
    it to its blocks (architecture "skip", "resnet" or "orig", conv_clamp, half_dtype, …); a
    dictionary `synthesis_kwargs`, as in the earlier release of the originals, is accepted too.

    z [N, z_dim], c [N, c_dim] (ignored where c_dim = 0) -> img [N, img_channels, res, res]. Further
    keyword arguments of `forward` go to the synthesis (noise_mode, force_fp32, fused_modconv).
    Differentiable twice with respect to z, c, ws and the parameters.
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
        synthesis_kwargs = {**synthesis_kwargs.pop("synthesis_kwargs", {}), **synthesis_kwargs}
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
        *,
        skip_w_avg_update: bool = False,
        update_emas: bool | None = None,
        **synthesis_kwargs: Any,
    ) -> Tensor:
        ws = self.mapping(
            z,
            c,
            truncation_psi=truncation_psi,
            truncation_cutoff=truncation_cutoff,
            skip_w_avg_update=skip_w_avg_update,
            update_emas=update_emas,
        )
        return self.synthesis(ws, **synthesis_kwargs)


class DiscriminatorBlock(MixedPrecisionBlock):
    """The layers of one resolution of the discriminator.

        orig    x = conv1(conv0(x))
        skip    x = conv1(conv0(x + fromrgb(img))),             img = down(img)
        resnet  x = √½·conv1(conv0(x)) + √½·skip(x)

    The first block (in_channels = 0) starts from x = fromrgb(img). conv1 halves the resolution.
    Layers are numbered in the order fromrgb, conv0, conv1, skip from first_layer_idx on, and those
    numbered below freeze_layers are not trainable.

    x [N, in_channels, res, res] (None for the first block), img [N, img_channels, res, res] (None
    where it is not used) -> x [N, out_channels, res/2, res/2] in the working format, img [N,
    img_channels, res/2, res/2] for "skip", else None.
    """

    def __init__(
        self,
        in_channels: int,
        tmp_channels: int,
        out_channels: int,
        resolution: int,
        img_channels: int,
        first_layer_idx: int,
        architecture: str = "resnet",
        activation: str = "lrelu",
        resample_filter: Filter = (1, 3, 3, 1),
        conv_clamp: float | None = None,
        use_fp16: bool = False,
        fp16_channels_last: bool = False,
        freeze_layers: int = 0,
        half_dtype: torch.dtype | str = torch.float16,
    ) -> None:
        super().__init__(use_fp16, fp16_channels_last, half_dtype)
        check_choice("architecture", architecture, ARCHITECTURES)
        check_choice("in_channels", in_channels, (0, tmp_channels))
        self.in_channels = in_channels
        self.resolution = resolution
        self.img_channels = img_channels
        self.first_layer_idx = first_layer_idx
        self.architecture = architecture
        self.register_buffer("resample_filter", setup_filter(resample_filter))
        self.num_layers = 0

        def layer(
            in_channels: int, out_channels: int, kernel_size: int, **kwargs: Any
        ) -> Conv2dLayer:
            trainable = first_layer_idx + self.num_layers >= freeze_layers
            self.num_layers += 1
            return Conv2dLayer(
                in_channels,
                out_channels,
                kernel_size,
                channels_last=self.channels_last,
                trainable=trainable,
                **kwargs,
            )

        acts = {"activation": activation, "conv_clamp": conv_clamp}
        halves = {"down": 2, "resample_filter": resample_filter}
        if in_channels == 0 or architecture == "skip":
            self.fromrgb = layer(img_channels, tmp_channels, 1, **acts)
        self.conv0 = layer(tmp_channels, tmp_channels, 3, **acts)
        self.conv1 = layer(tmp_channels, out_channels, 3, **acts, **halves)
        if architecture == "resnet":
            self.skip = layer(tmp_channels, out_channels, 1, bias=False, **halves)

    def forward(
        self, x: Tensor | None, img: Tensor | None, force_fp32: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        dtype, memory_format = self.working_format(self.conv1.weight, force_fp32)
        size = (self.resolution, self.resolution)
        if self.in_channels != 0:
            x = check_shape("x", x, "N", self.in_channels, *size)
            x = x.to(dtype=dtype, memory_format=memory_format)

        if self.in_channels == 0 or self.architecture == "skip":
            img = check_shape("img", img, "N", self.img_channels, *size)
            img = img.to(dtype=dtype, memory_format=memory_format)
            features = self.fromrgb(img)
            x = features if x is None else x + features
            img = downsample2d(img, self.resample_filter) if self.architecture == "skip" else None

        if self.architecture == "resnet":
            half_power = math.sqrt(0.5)
            shortcut = self.skip(x, gain=half_power)
            x = self.conv1(self.conv0(x), gain=half_power)
            return shortcut + x, img
        return self.conv1(self.conv0(x)), img

    def extra_repr(self) -> str:
        return f"resolution={self.resolution}, architecture={self.architecture!r}"


class DiscriminatorEpilogue(nn.Module):
    """out(fc(conv(cat(x, std)))), and with labels Σ_k out_k · cmap_k / √cmap_dim.

    std is `MinibatchStdLayer` (none where mbstd_num_channels = 0); "skip" first adds fromrgb(img).
    Works in the parameters' dtype, contiguous.

    x [N, in_channels, res, res], img [N, img_channels, res, res] ("skip" only), cmap [N, cmap_dim]
    (where cmap_dim > 0) -> [N, 1].
    """

    def __init__(
        self,
        in_channels: int,
        cmap_dim: int,
        resolution: int,
        img_channels: int,
        architecture: str = "resnet",
        mbstd_group_size: int | None = 4,
        mbstd_num_channels: int = 1,
        activation: str = "lrelu",
        conv_clamp: float | None = None,
    ) -> None:
        super().__init__()
        check_choice("architecture", architecture, ARCHITECTURES)
        self.in_channels = in_channels
        self.cmap_dim = cmap_dim
        self.resolution = resolution
        self.img_channels = img_channels
        self.architecture = architecture
        if architecture == "skip":
            self.fromrgb = Conv2dLayer(img_channels, in_channels, 1, activation=activation)
        self.mbstd = (
            MinibatchStdLayer(mbstd_group_size, mbstd_num_channels)
            if mbstd_num_channels > 0
            else None
        )
        self.conv = Conv2dLayer(
            in_channels + mbstd_num_channels,
            in_channels,
            3,
            activation=activation,
            conv_clamp=conv_clamp,
        )
        self.fc = FullyConnectedLayer(
            in_channels * resolution**2, in_channels, activation=activation
        )
        self.out = FullyConnectedLayer(in_channels, cmap_dim if cmap_dim > 0 else 1)

    def forward(self, x: Tensor, img: Tensor | None, cmap: Tensor | None) -> Tensor:
        size = (self.resolution, self.resolution)
        check_shape("x", x, "N", self.in_channels, *size)
        dtype = self.out.weight.dtype
        x = x.to(dtype=dtype, memory_format=torch.contiguous_format)
        if self.architecture == "skip":
            img = check_shape("img", img, x.shape[0], self.img_channels, *size)
            x = x + self.fromrgb(img.to(dtype=dtype, memory_format=torch.contiguous_format))
        if self.mbstd is not None:
            x = self.mbstd(x)
        x = self.out(self.fc(self.conv(x).flatten(1)))
        if self.cmap_dim > 0:
            cmap = check_shape("cmap", cmap, x.shape[0], self.cmap_dim)
            x = (x * cmap).sum(dim=1, keepdim=True) / math.sqrt(self.cmap_dim)
        return x

    def extra_repr(self) -> str:
        return f"resolution={self.resolution}, architecture={self.architecture!r}"


@recorded
class Discriminator(nn.Module):
    """logits = b4(b_8(… b_res(img))): one `DiscriminatorBlock` per resolution from img_resolution
    down to 8, then the `DiscriminatorEpilogue` b4; with labels, projected on mapping(c).

    Channels and 16-bit resolutions follow `SynthesisNetwork`. block_kwargs go to the blocks
    (activation, resample_filter, fp16_channels_last, freeze_layers, half_dtype), mapping_kwargs to
    the label's `MappingNetwork`, epilogue_kwargs to the epilogue (mbstd_group_size, …).

    img [N, img_channels, res, res], c [N, c_dim] (ignored where c_dim = 0) -> logits [N, 1].
    Differentiable twice with respect to img, c and the parameters. `update_emas` is accepted for
    the originals' callers; a discriminator has no averages. ValueError for another shape of img or
    c, a missing label, or a batch the minibatch standard deviation cannot group.
    """

    def __init__(
        self,
        c_dim: int,
        img_resolution: int,
        img_channels: int,
        architecture: str = "resnet",
        channel_base: int = 32768,
        channel_max: int = 512,
        num_fp16_res: int = 0,
        conv_clamp: float | None = None,
        cmap_dim: int | None = None,
        block_kwargs: Mapping[str, Any] = {},
        mapping_kwargs: Mapping[str, Any] = {},
        epilogue_kwargs: Mapping[str, Any] = {},
    ) -> None:
        super().__init__()
        check_resolution("img_resolution", img_resolution, least=8)
        check_choice("architecture", architecture, ARCHITECTURES)
        self.c_dim = c_dim
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.architecture = architecture
        log2 = int(img_resolution).bit_length() - 1
        self.block_resolutions = [2**log for log in range(log2, 2, -1)]
        shared: dict[str, Any] = {
            "img_channels": img_channels,
            "architecture": architecture,
            "conv_clamp": conv_clamp,
        }

        in_channels = first_layer_idx = 0
        for resolution in self.block_resolutions:
            out_channels = _channels(resolution // 2, channel_base, channel_max)
            block = DiscriminatorBlock(
                in_channels,
                _channels(resolution, channel_base, channel_max),
                out_channels,
                resolution=resolution,
                first_layer_idx=first_layer_idx,
                use_fp16=resolution >= _lowest_half_resolution(img_resolution, num_fp16_res),
                **shared,
                **block_kwargs,
            )
            self.add_module(f"b{resolution}", block)
            first_layer_idx += block.num_layers
            in_channels = out_channels

        cmap_dim = in_channels if cmap_dim is None else cmap_dim
        if c_dim == 0:
            cmap_dim = 0
        elif cmap_dim < 1:
            raise ValueError(f"cmap_dim={cmap_dim!r} must be at least 1 where c_dim={c_dim} > 0")
        else:
            self.mapping = MappingNetwork(
                0, c_dim, cmap_dim, num_ws=None, w_avg_beta=None, **mapping_kwargs
            )
        self.b4 = DiscriminatorEpilogue(
            in_channels, cmap_dim, resolution=4, **shared, **epilogue_kwargs
        )

    def forward(
        self,
        img: Tensor,
        c: Tensor | None = None,
        update_emas: bool | None = None,
        force_fp32: bool | None = None,
    ) -> Tensor:
        check_shape("img", img, "N", self.img_channels, *[self.img_resolution] * 2)
        cmap = self.mapping(None, c) if self.c_dim > 0 else None
        x = None
        for resolution in self.block_resolutions:
            x, img = getattr(self, f"b{resolution}")(x, img, force_fp32=force_fp32)
        return self.b4(x, img, cmap)

    def extra_repr(self) -> str:
        return (
            f"c_dim={self.c_dim}, img_resolution={self.img_resolution}, "
            f"img_channels={self.img_channels}, architecture={self.architecture!r}"
        )
