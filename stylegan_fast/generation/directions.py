"""Directions in W along which images change most, found without labels.

SeFa (Shen and Zhou, Closed-Form Factorization of Latent Semantics in GANs, 2021): the eigenvectors
of AᵀA with the largest eigenvalues, A the weights of the style layers below one another.
GANSpace (Härkönen et al., GANSpace: Discovering Interpretable GAN Controls, 2020): the principal
components of w.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layers.checks import check_choice
from ..models import stylegan, stylegan2, stylegan3
from .networks import Generator, RosinalitySynthesis
from .styles import check_layers

METHODS = ("sefa", "pca")


class Directions(NamedTuple):
    """Unit vectors [K, w_dim], the most important first, and what counts as a strength of 1 along
    each [K]: w's standard deviation along it, for SeFa, which does not look at w, along any."""

    vectors: Tensor
    scales: Tensor


def find(
    generator: Generator,
    method: str = "sefa",
    count: int = 5,
    layers: Sequence[int] | None = None,
    *,
    c: Tensor | None = None,
    samples: int = 10000,
    seed: int = 0,
) -> Directions:
    """`count` directions. SeFa looks at the rows `layers` (None: all). The statistics are of
    `samples` latents w, all of the label c [1, c_dim]. ValueError for an unknown method or layer,
    no or more than w_dim directions, or less than two samples."""
    check_choice("method", method, METHODS)
    if not 1 <= count <= generator.w_dim:
        raise ValueError(f"{count=} must be between 1 and w_dim={generator.w_dim}")
    if samples < 2:
        raise ValueError(f"{samples=} must be at least 2")
    w = _centred(generator, c, samples, seed)
    covariance = w.T @ w / (samples - 1)
    if method == "sefa":
        rows = range(generator.num_ws) if layers is None else check_layers(generator, layers)
        a = torch.cat([weight for row, weight in style_weights(generator) if row in rows])
        _, vectors = torch.linalg.eigh((a.T @ a).double().cpu())
        variances = covariance.diagonal().mean().repeat(count)
    else:
        variances, vectors = torch.linalg.eigh(covariance)
        variances = variances.flip(0)[:count]
    vectors = vectors.flip(1)[:, :count].T
    largest = vectors.abs().argmax(dim=1, keepdim=True)
    vectors = vectors * vectors.gather(1, largest).sign()  # eigenvectors have no sign of their own
    scales = variances.clamp(min=0).sqrt()
    w_avg = generator.mapping.w_avg
    return Directions(vectors.to(w_avg), scales.to(w_avg))


def edit(ws: Tensor, direction: Tensor, strength: float | Tensor, layers: Sequence[int]) -> Tensor:
    """ws [N, num_ws, w_dim] with strength · direction added in the rows `layers`."""
    edited = ws.clone()
    edited[:, list(layers)] += strength * direction
    return edited


def style_weights(generator: Generator) -> list[tuple[int, Tensor]]:
    """(row of ws, weight [styles, w_dim]) of every affine layer that makes styles of w."""
    synthesis = generator.synthesis
    affines: list[tuple[int, Any]]
    if isinstance(synthesis, stylegan.SynthesisNetwork):
        affines = [
            (row, getattr(layer, "style", layer).affine)
            for row, layer in enumerate(synthesis.layers)
        ]
    elif isinstance(synthesis, stylegan2.SynthesisNetwork):
        affines = []
        row = 0
        for resolution in synthesis.block_resolutions:
            block = getattr(synthesis, f"b{resolution}")
            names = ["conv0", "conv1", "torgb"]
            layers = [getattr(block, name) for name in names if hasattr(block, name)]
            affines += [(row + index, layer.affine) for index, layer in enumerate(layers)]
            row += block.num_conv
    elif isinstance(synthesis, stylegan3.SynthesisNetwork):
        layers = [synthesis.input, *(getattr(synthesis, name) for name in synthesis.layer_names)]
        affines = [(row, layer.affine) for row, layer in enumerate(layers)]
    elif isinstance(synthesis, RosinalitySynthesis):
        network = synthesis.network
        convs = [network.conv1, *network.convs]
        to_rgbs = [network.to_rgb1, *network.to_rgbs]
        affines = [(row, layer.conv.modulation) for row, layer in enumerate(convs)]
        affines += [(2 * k + 1, layer.conv.modulation) for k, layer in enumerate(to_rgbs)]
    else:
        raise ValueError(f"the styles of a {type(synthesis).__name__} are not known")
    return [(row, affine.weight.detach() * affine.weight_gain) for row, affine in affines]


@torch.no_grad()
def _centred(generator: Generator, c: Tensor | None, samples: int, seed: int) -> Tensor:
    """w - mean(w) [samples, w_dim], in float64 on the CPU."""
    random = torch.Generator().manual_seed(seed)
    z = torch.randn(samples, generator.z_dim, generator=random).to(generator.mapping.w_avg)
    c = None if c is None else c.expand(samples, -1)
    w = generator.mapping(z, c)[:, 0].double().cpu()
    return w - w.mean(dim=0)
