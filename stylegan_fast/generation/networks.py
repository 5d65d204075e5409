"""One view of every family of generators, that of `models.stylegan2.Generator`: z_dim, c_dim,
w_dim, num_ws, img_resolution, img_channels, mapping(z, c) with w_avg, synthesis(ws, noise_mode)."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints import CheckpointError, load_generator
from ..layers.checks import check_shape
from ..models import rosinality, stylegan, stylegan2, stylegan3


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Generator:
    """The generator of a checkpoint of any known format, or of the last one of a training run's
    folder, in evaluation mode and not trainable."""
    if os.path.isdir(path):
        from ..training import snapshots  # needs safetensors, which other formats do not

        path = snapshots.find(os.fspath(path), Path(path)) / snapshots.NETWORKS
    network = load_generator(path, device)
    if isinstance(network, rosinality.Generator):
        network = Rosinality(network).eval().requires_grad_(False)
    if not isinstance(network, Generator):
        raise CheckpointError(f"{path} holds a {type(network).__name__}, which has no w")
    if not hasattr(network.mapping, "w_avg"):
        raise CheckpointError(f"{path} holds a generator without w_avg, the mean of its latents")
    return network


class Rosinality(nn.Module):
    """The other family's generator in the view of this package. The mean of its latents is that of
    4096, always the same."""

    def __init__(self, network: rosinality.Generator) -> None:
        super().__init__()
        self.z_dim = self.w_dim = network.style_dim
        self.c_dim = 0
        self.num_ws = network.n_latent
        self.img_resolution = network.size
        self.img_channels = 3
        self.mapping = RosinalityMapping(network)
        self.synthesis = RosinalitySynthesis(network)


class RosinalityMapping(nn.Module):
    w_avg: Tensor

    def __init__(self, network: rosinality.Generator) -> None:
        super().__init__()
        self.style = network.style
        self.num_ws = network.n_latent
        const = network.input.input
        z = torch.randn(4096, network.style_dim, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            w_avg = self.style(z.to(const)).mean(dim=0)
        self.register_buffer("w_avg", w_avg)

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        return self.style(z)[:, None].repeat(1, self.num_ws, 1)


class RosinalitySynthesis(nn.Module):
    def __init__(self, network: rosinality.Generator) -> None:
        super().__init__()
        self.network = network

    def forward(self, ws: Tensor, noise_mode: str = "random") -> Tensor:
        check_shape("ws", ws, "N", self.network.n_latent, self.network.style_dim)
        noises = list(self.network.noises.buffers())
        noise = {"const": noises, "none": [torch.zeros_like(noise) for noise in noises]}
        img, _ = self.network([ws], input_is_latent=True, noise=noise.get(noise_mode))
        return img


Generator = stylegan.Generator | stylegan2.Generator | stylegan3.Generator | Rosinality
