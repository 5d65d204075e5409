"""Latents: from seeds to z and w, truncation, mixed styles, ways between key points.

W+ is ws [N, num_ws, w_dim], a row for each layer; in W all rows of a sample are equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from .._checks import check_number
from ..layers.checks import check_choice
from ..models import stylegan3
from .networks import Generator

PATHS = ("linear", "spherical", "spline")
LARGEST_SEED = 2**32 - 1


def z_of_seeds(generator: Generator, seeds: Sequence[int]) -> Tensor:
    """z [len(seeds), z_dim] ~ N(0, 1); a seed gives the latent it gives in the originals.
    ValueError for one that is not between 0 and LARGEST_SEED."""
    for seed in seeds:
        if not 0 <= seed <= LARGEST_SEED:
            raise ValueError(f"seed {seed} must be between 0 and {LARGEST_SEED}")
    rows = [np.random.RandomState(seed).randn(generator.z_dim) for seed in seeds]
    z = torch.tensor(np.array(rows).reshape(len(rows), generator.z_dim))
    return z.to(generator.mapping.w_avg)


def labels(generator: Generator, samples: int, label: int | None) -> Tensor | None:
    """One-hot c [samples, c_dim] of a class, None for an unconditional generator; ValueError where
    the generator has no such class, or needs one."""
    if generator.c_dim == 0:
        if label is not None:
            raise ValueError(f"class {label}: this network has no classes")
        return None
    if label is None:
        raise ValueError(
            f"this network has {generator.c_dim} classes: choose one (--class 0 to "
            f"{generator.c_dim - 1})"
        )
    if not 0 <= label < generator.c_dim:
        raise ValueError(f"class {label}: this network has the classes 0 to {generator.c_dim - 1}")
    c = torch.zeros(samples, generator.c_dim).to(generator.mapping.w_avg)
    c[:, label] = 1
    return c


def truncate(generator: Generator, ws: Tensor, psi: float, cutoff: int | None = None) -> Tensor:
    """w_avg + psi · (ws - w_avg) in the first `cutoff` rows (None: in all); ValueError unless psi
    is finite and there are so many rows."""
    psi = check_number("psi", psi)
    if cutoff is None:
        cutoff = generator.num_ws
    elif not 0 <= cutoff <= generator.num_ws:
        raise ValueError(f"{cutoff=} must be between 0 and the {generator.num_ws} layers")
    return torch.cat([generator.mapping.w_avg.lerp(ws[:, :cutoff], psi), ws[:, cutoff:]], dim=1)


def check_layers(generator: Generator, layers: Sequence[int]) -> list[int]:
    """The layers; ValueError for one the generator lacks, or none."""
    if not layers:
        raise ValueError("layers must name at least one")
    for layer in layers:
        if not 0 <= layer < generator.num_ws:
            raise ValueError(f"layer {layer}: this network has 0 to {generator.num_ws - 1}")
    return list(layers)


def mix(generator: Generator, ws: Tensor, other: Tensor, layers: Sequence[int]) -> Tensor:
    """ws with the rows `layers` of `other`, both [N, num_ws, w_dim]: the first layers, the coarse
    ones, bring pose and shape, the last colour and texture. ValueError for a layer that is none."""
    mixed = ws.clone()
    rows = check_layers(generator, layers)
    mixed[:, rows] = other[:, rows]
    return mixed


def move(generator: Generator, translate: Sequence[float] = (0, 0), rotate: float = 0) -> None:
    """From now on a StyleGAN3 generator turns its images `rotate` degrees counter-clockwise about
    their centre, then moves them by `translate`: right and down, 1 being their width. ValueError
    for another generator, or numbers that are not two, or not finite."""
    if not isinstance(generator, stylegan3.Generator):
        raise ValueError("only the images of a StyleGAN3 generator can be moved and turned")
    if not isinstance(translate, Sequence) or len(translate) != 2:
        raise ValueError(f"translate must be two numbers, right and down, got {translate!r}")
    x, y = (check_number("translate", value) for value in translate)
    angle = math.radians(check_number("rotate", rotate))
    cosine, sine = math.cos(angle), math.sin(angle)
    moved = torch.tensor([[cosine, sine, x], [-sine, cosine, y], [0, 0, 1]], dtype=torch.float64)
    generator.synthesis.input.transform.copy_(moved.inverse())


def interpolate(keys: Tensor, frames: int, path: str = "linear", loop: bool = True) -> Tensor:
    """A way through the key points.

    linear     straight, at constant speed between two keys
    spherical  on the great circle of the two directions, the length changing linearly
    spline     Catmull-Rom: smooth in direction and speed, through every key

    keys [K, ..., D] -> [frames · S, ..., D] over the S = K segments of a loop, otherwise
    [frames · S + 1, ..., D] with S = K - 1. The last dimension is the one of the vectors.
    ValueError for an unknown path, less than two keys or no frames.
    """
    check_choice("path", path, PATHS)
    count = keys.shape[0]
    if count < 2 or frames < 1:
        raise ValueError(f"a way needs two keys and a frame, got {count} keys and {frames=}")
    segments = count if loop else count - 1
    t = torch.arange(frames * segments + (not loop), device=keys.device) / frames
    start = t.floor().long().clamp(max=segments - 1)
    t = (t - start).to(keys.dtype).reshape(-1, *[1] * (keys.ndim - 1))

    def key(offset: int) -> Tensor:
        index = start + offset
        return keys[index % count if loop else index.clamp(0, count - 1)]

    if path == "linear":
        return key(0).lerp(key(1), t)
    if path == "spherical":
        return _slerp(key(0), key(1), t)
    before, a, b, after = key(-1), key(0), key(1), key(2)
    slope_a, slope_b = (b - before) / 2, (after - a) / 2
    return (
        a
        + slope_a * t
        + (3 * (b - a) - 2 * slope_a - slope_b) * t**2
        + (2 * (a - b) + slope_a + slope_b) * t**3
    )


def _slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    length_a, length_b = (v.norm(dim=-1, keepdim=True) for v in (a, b))
    unit_a, unit_b = (normalize(v, dim=-1) for v in (a, b))
    cosine = (unit_a * unit_b).sum(dim=-1, keepdim=True).clamp(-1, 1)
    angle = cosine.acos()
    # No one great circle leads through the same or opposite directions, or through 0.
    straight = (cosine.abs() > 1 - 1e-6) | (torch.minimum(length_a, length_b) == 0)
    sine = torch.where(straight, 1, angle.sin())
    direction = ((1 - t) * angle).sin() / sine * unit_a + (t * angle).sin() / sine * unit_b
    return torch.where(straight, a.lerp(b, t), direction * length_a.lerp(length_b, t))
