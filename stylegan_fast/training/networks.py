"""The networks of a configuration, and what differs between them in training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from ..checkpoints import CheckpointError
from ..checkpoints.contents import check_same_tensors
from ..models import stylegan, stylegan2, stylegan3
from ..models._recorded import class_path
from ..ops import filter2d
from .config import TrainingConfig

Generator = stylegan.Generator | stylegan2.Generator | stylegan3.Generator
Discriminator = stylegan.Discriminator | stylegan2.Discriminator

HALF_RESOLUTIONS = 4
CONV_CLAMP = 256
"""Of the originals: the four highest resolutions work in 16 bits, clamped."""
MAGNITUDE_HALF_LIFE = 20_000
"""Images in which half of a magnitude is forgotten, as in the original."""


def build(config: TrainingConfig, img_channels: int, c_dim: int) -> tuple[Generator, Discriminator]:
    """(G, D), drawn from torch's generator of random numbers."""
    widths: dict[str, Any] = {
        "channel_base": config.channel_base,
        "channel_max": config.channel_max,
    }
    mapping = {"num_layers": config.mapping_layers, "w_avg_beta": config.w_avg_beta}
    epilogue = {"mbstd_group_size": config.mbstd_group}
    if config.network == "stylegan":
        g: Generator = stylegan.Generator(
            config.w_dim,
            config.resolution,
            z_dim=config.z_dim,
            c_dim=c_dim,
            img_channels=img_channels,
            mapping_kwargs=mapping,
            **widths,
        )
        d: Discriminator = stylegan.Discriminator(
            config.resolution,
            c_dim=c_dim,
            img_channels=img_channels,
            epilogue_kwargs=epilogue,
            **widths,
        )
        return g, d

    half: dict[str, Any] = {"num_fp16_res": 0}
    block: dict[str, Any] = {}
    if config.precision != "float32":
        half = {"num_fp16_res": HALF_RESOLUTIONS, "conv_clamp": CONV_CLAMP}
        block["half_dtype"] = getattr(torch, config.precision)
        block["fp16_channels_last"] = config.channels_last
    size = config.resolution
    dims: dict[str, Any] = {
        "z_dim": config.z_dim,
        "c_dim": c_dim,
        "w_dim": config.w_dim,
        "img_resolution": size,
        "img_channels": img_channels,
        "mapping_kwargs": mapping,
    }
    if config.network == "stylegan2":
        g = stylegan2.Generator(**dims, **widths, **half, **block)
    else:
        layers: dict[str, Any] = {
            "num_layers": config.synthesis_layers,
            "magnitude_ema_beta": 0.5 ** (config.batch / MAGNITUDE_HALF_LIFE),
            **widths,
        }
        if config.network == "stylegan3-r":
            layers.update({name: 2 * width for name, width in widths.items()})
            layers.update(conv_kernel=1, use_radial_filters=True)
        g = stylegan3.Generator(**dims, **layers, **half, **block)
    d = stylegan2.Discriminator(
        c_dim,
        size,
        img_channels,
        **widths,
        **half,
        block_kwargs=block,
        epilogue_kwargs=epilogue,
    )
    return g, d


def magnitudes(g: Generator) -> list[Tensor]:
    """The averages that StyleGAN3's layers keep of the magnitude of their inputs."""
    return [buffer for name, buffer in g.named_buffers() if name.endswith("magnitude_ema")]


class Adapter:
    """One way to call all architectures: `synthesis(G, ws)` and `logits(D, images, c)`.

    StyleGAN works under autocast where it is to work in 16 bits, and knows the resolution and the
    fade of the moment; StyleGAN2 and StyleGAN3 have 16-bit blocks of their own.
    """

    def __init__(self, config: TrainingConfig, device: torch.device) -> None:
        self._autocast: AbstractContextManager = nullcontext()
        self._kwargs: dict[str, Any] = {}
        if config.network != "stylegan":
            self._kwargs["force_fp32"] = False
        elif config.precision != "float32":
            self._autocast = torch.autocast(device.type, getattr(torch, config.precision))
        self._config = config
        nhwc = config.channels_last and config.network == "stylegan"
        self._memory_format = torch.channels_last if nhwc else torch.contiguous_format
        self._resolution = config.resolution
        self._fade: dict[str, Any] = {}
        self._blur_sigma = 0.0

    def grow(self, images_seen: int) -> None:
        """Set the blur, resolution and fade of a run that has seen so many images.

        8×8 rests for fade_kimg; every further resolution fades in and rests as long.
        """
        config = self._config
        self._blur_sigma = config.blur_sigma * max(0, 1 - images_seen / (1000 * config.blur_kimg))
        if not config.progressive:
            return
        phase, part = divmod(images_seen / (1000 * config.fade_kimg) + 1, 2)
        self._resolution = min(8 << int(phase), config.resolution)
        fading = self._resolution == 8 << int(phase) and phase > 0
        self._fade = {"alpha": min(part, 1.0) if fading else 1.0}

    @property
    def grown(self) -> bool:
        """Whether the networks make and see whole images."""
        return self._resolution == self._config.resolution and self._fade.get("alpha", 1) == 1

    def synthesis(self, g: Generator, ws: Tensor, **kwargs: Any) -> Tensor:
        if self._fade:
            kwargs.update(self._fade, resolution=self._resolution)
        with self._autocast:
            return g.synthesis(ws, **self._kwargs, **kwargs).float()

    def blurred(self, images: Tensor) -> Tensor:
        """Images as D sees them at the moment: through a Gaussian, up to three deviations."""
        radius = math.floor(3 * self._blur_sigma)
        if radius < 1:
            return images
        x = torch.arange(-radius, radius + 1, device=images.device) / self._blur_sigma
        taps = (-x.square() / 2).exp()
        return filter2d(images, taps / taps.sum())

    def logits(self, d: Discriminator, images: Tensor, c: Tensor) -> Tensor:
        images = images.contiguous(memory_format=self._memory_format)
        with self._autocast:
            return d(images, c, **self._kwargs, **self._fade).float()

    def real(self, images: Tensor) -> Tensor:
        """Images of full size as they are to be seen now: halved to the resolution of the moment,
        and as sharp as a fading generator's."""
        images = avg_pool2d(images, images.shape[2] // self._resolution)
        alpha = self._fade.get("alpha", 1.0)
        if alpha < 1:
            coarse = avg_pool2d(images, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
            images = coarse.lerp(images, alpha)
        return images

    def full_size(self, images: Tensor) -> Tensor:
        """Images of the resolution of the moment, repeated to full size."""
        factor = self._config.resolution // images.shape[2]
        return images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def load_weights(network: Generator | Discriminator, stored: nn.Module, source: Path) -> None:
    """Copy the weights of `stored`, a network of the file `source`. ValueError, naming what differs
    between the arguments the two were made with, unless they have the same tensors."""
    state = stored.state_dict()
    try:
        check_same_tensors(state, network.state_dict())
    except CheckpointError as error:
        differences = _differences(stored, network) or error  # a file may leave out defaults
        raise CheckpointError(
            f"{source} holds other networks than this run's: {differences}"
        ) from None
    network.load_state_dict(state)


def _differences(stored: Any, network: Any) -> str:
    if class_path(type(stored)) != class_path(type(network)):
        return f"{class_path(type(stored))} instead of {class_path(type(network))}"
    theirs, ours = (_flat(net.init_kwargs) for net in (stored, network))
    return ", ".join(
        f"{name}={theirs[name]!r} instead of {value!r}"
        for name, value in ours.items()
        if name in theirs and theirs[name] != value
    )


def _flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        flat.update(_flat(value) if isinstance(value, Mapping) else {name: value})
    return flat
