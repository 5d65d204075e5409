"""Projection: the w whose image is nearest to a given one (Karras et al., Analyzing and Improving
the Image Quality of StyleGAN, 2020, appendix D; Abdal et al., Image2StyleGAN, 2019)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from ..layers.checks import check_choice, check_shape
from .networks import Generator

SPACES = ("w", "w+")
COARSEST = 8
"""Sides of the smallest images of a pyramid."""

NOISE_PENALTY = 1e5
INITIAL_W_NOISE = 0.05
W_NOISE_ENDS = 0.75
RAMP_UP, RAMP_DOWN = 0.05, 0.25
"""The paper's schedule, in parts of the steps and in standard deviations of w."""


class Projection(NamedTuple):
    """The nearest latents found."""

    ws: Tensor  # [1, num_ws, w_dim]
    noises: dict[str, Tensor]  # by their names in the synthesis, where they were optimised
    image: Tensor  # [1, C, H, W]
    losses: list[float]


def project(
    generator: Generator,
    target: Tensor,  # [1, C, H, W] in [-1, 1]
    *,
    space: str = "w+",
    steps: int = 500,
    lr: float = 0.1,
    c: Tensor | None = None,
    perceptual: Callable[[Tensor], Tensor] | None = None,
    perceptual_weight: float = 1.0,
    optimize_noise: bool = False,
    seed: int = 0,
    progress: Callable[[float, Tensor], None] = lambda loss, w: None,
) -> Projection:
    """Minimises pyramid_distance(image, target) + perceptual_weight · |perceptual(image) -
    perceptual(target)|² + the penalty of noise, by Adam from the mean of w on.

    space "w" finds one vector for all layers, "w+" one for each. perceptual: features of an image,
    such as `vgg16_features`. With `optimize_noise` the constant noise maps are found too, kept
    white by `noise_penalty`. `progress` gets the loss and w [1, num_ws or 1, w_dim] after each
    step. The generator is left as it is. ValueError where the loss does not stay finite.
    """
    check_choice("space", space, SPACES)
    size = generator.img_resolution
    check_shape("target", target, 1, generator.img_channels, size, size)
    if steps < 1:
        raise ValueError(f"{steps=} must be at least 1")
    random = torch.Generator().manual_seed(seed)
    w_avg, w_std = _statistics(generator, c, random)
    synthesis = copy.deepcopy(generator.synthesis).requires_grad_(False)
    target = target.to(w_avg)
    if perceptual is not None:
        features = perceptual(target).detach()

    rows = generator.num_ws if space == "w+" else 1
    w = w_avg.repeat(1, rows, 1).requires_grad_()
    noises = noise_maps(synthesis) if optimize_noise else {}
    for noise in noises.values():
        noise.requires_grad_()
    optimizer = torch.optim.Adam([w, *noises.values()], betas=(0.9, 0.999))
    losses = []
    for step in range(steps):
        time = (step + 0.5) / steps
        optimizer.param_groups[0]["lr"] = lr * _ramp(time)
        shake = w_std * INITIAL_W_NOISE * max(0, 1 - time / W_NOISE_ENDS) ** 2
        shaken = w + shake * torch.randn(w.shape, generator=random).to(w)
        image = synthesis(shaken.expand(-1, generator.num_ws, -1), noise_mode="const")
        loss = pyramid_distance(image, target)
        if perceptual is not None:
            loss = loss + perceptual_weight * (perceptual(image) - features).square().sum()
        if noises:
            loss = loss + NOISE_PENALTY * sum(map(noise_penalty, noises.values()))
        optimizer.zero_grad()
        if not loss.isfinite():
            raise ValueError(f"the loss is {loss.item()} after {step} steps; try less than {lr=:g}")
        loss.backward()
        optimizer.step()
        _normalize(noises)
        losses.append(loss.item())
        progress(losses[-1], w.detach())

    ws = w.detach().expand(-1, generator.num_ws, -1).contiguous()
    with torch.no_grad():
        image = synthesis(ws, noise_mode="const")
    return Projection(ws, {name: noise.detach() for name, noise in noises.items()}, image, losses)


def pyramid_distance(image: Tensor, target: Tensor) -> Tensor:
    """Mean over the scales 1, 1/2, 1/4, … (down to 8²) of the mean squared difference of pixels:
    fine scales alone see nothing of a shape that is a little out of place."""
    difference = image - target
    distances = [difference.square().mean()]
    while difference.shape[2] > COARSEST:
        difference = avg_pool2d(difference, 2)
        distances.append(difference.square().mean())
    return torch.stack(distances).mean()


def noise_penalty(noise: Tensor) -> Tensor:
    """Σ over the scales, down to 8², of mean(n · n shifted by a pixel)², along x and y: about 0 for
    white noise, whose variance halving keeps."""
    noise = noise.reshape(1, 1, *noise.shape[-2:])
    penalty = noise.new_zeros(())
    while noise.shape[2] >= COARSEST:
        for axis in (2, 3):
            penalty = penalty + (noise * noise.roll(1, axis)).mean().square()
        noise = avg_pool2d(noise, 2) * 2
    return penalty


def vgg16_features(weights: str | Path | None = None) -> nn.Module:
    """The perceptual features [N, F] of images in [-1, 1]: what torchvision's VGG16 gives after the
    last layer of each of its five scales, each normalised over the channels and by its size.

    weights: the file of VGG16's weights; None: where torchvision keeps them. Nothing is downloaded:
    ValueError where torchvision or the file is missing.
    """
    name = "vgg16-397923af.pth"
    path = Path(torch.hub.get_dir(), "checkpoints", name) if weights is None else Path(weights)
    try:
        from torchvision.models import vgg16
    except ModuleNotFoundError as error:
        raise ValueError(f"a perceptual loss needs torchvision: {error}") from error
    if not path.is_file():
        raise ValueError(f"{path}: no such file; put torchvision's {name} there, or name another")
    network = vgg16()
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises whatever it stumbles over
        raise ValueError(f"{path}: it does not hold the weights of VGG16") from error
    return PerceptualFeatures(network.features)


class PerceptualFeatures(nn.Module):
    """Features [N, F] of images [N, C, H, W] in [-1, 1]: of a sequence of layers, those before each
    pooling, as long as a scale has pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2] > 256:  # what the network was trained for
            images = interpolate(images, size=(256, 256), mode="area")
        x = ((images + 1) / 2).expand(-1, 3, -1, -1).sub(self.mean).div(self.std)
        features = []
        for layer in self.layers:
            if isinstance(layer, nn.MaxPool2d):
                unit = x * (x.square().sum(dim=1, keepdim=True) + 1e-10).rsqrt()
                features.append(unit.flatten(1) / math.sqrt(x.shape[2] * x.shape[3]))
                if min(x.shape[2:]) < 2:
                    break
            x = layer(x)
        return torch.cat(features, dim=1)


@torch.no_grad()
def _statistics(
    generator: Generator, c: Tensor | None, random: torch.Generator, samples: int = 10000
) -> tuple[Tensor, Tensor]:
    """The mean [w_dim] of a label's w, and the root of the mean squared distance from it."""
    like = generator.mapping.w_avg
    z = torch.randn(samples, generator.z_dim, generator=random).to(like)
    w = generator.mapping(z, None if c is None else c.expand(samples, -1))[:, 0]
    mean = w.mean(dim=0)
    return mean, (w - mean).square().sum(dim=1).mean().sqrt()


def noise_maps(synthesis: nn.Module) -> dict[str, Tensor]:
    """The buffers of constant noise, by name; ValueError where there are none."""
    noises = {
        name: buffer
        for name, buffer in synthesis.named_buffers()
        if name.rpartition(".")[2].startswith("noise_")
    }
    if not noises:
        raise ValueError("this network has no noise maps to optimise")
    return noises


@torch.no_grad()
def _normalize(noises: dict[str, Tensor]) -> None:
    for noise in noises.values():
        noise -= noise.mean()
        noise *= noise.square().mean().rsqrt()


def _ramp(time: float) -> float:
    """The learning rate's factor: up linearly, at the end down along a cosine."""
    down = min(1, (1 - time) / RAMP_DOWN)
    return min(1, time / RAMP_UP) * (0.5 - 0.5 * math.cos(down * math.pi))
