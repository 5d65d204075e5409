"""Distances between the features of generated and of real images: FID (Heusel et al., GANs Trained
by a Two Time-Scale Update Rule, 2017) and KID (Bińkowski et al., Demystifying MMD GANs, 2018).

The formulas are here, in float64; the features are those of the Inception network that every
published figure uses, from torch-fidelity. ValueError for fewer than two images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import as_int
from .data import ImageDataset
from .pictures import quantized

Features = Callable[[Tensor], Tensor]
"""uint8 [N, 3, H, W] -> [N, d]"""

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
SOURCE = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"


class MetricsUnavailableError(RuntimeError):
    """What is missing for the metrics, and where it comes from."""


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """|mean x - mean y|² + tr(A + B - 2 (A B)^½), A and B the covariances of [n, d] and [m, d]."""
    x, y = _checked("x", x), _checked("y", y)
    a, b = x.T.cov(), y.T.cov()
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # A B has the eigenvalues of the symmetric A^½ B A^½.
    product = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    means = (x.mean(0) - y.mean(0)).square().sum()
    return (means + a.trace() + b.trace() - 2 * product).item()


def polynomial_mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy of [n, d] and [m, d]:

    mean k(x, x') + mean k(y, y') - 2 mean k(x, y) with k(a, b) = (a·b / d + 1)³, x ≠ x', y ≠ y'.
    """
    x, y = _checked("x", x), _checked("y", y)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def among(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.trace()) / (len(a) * (len(a) - 1))

    return (among(x) + among(y) - 2 * kernel(x, y).mean()).item()


def kernel_distance(
    x: Tensor, y: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0
) -> float:
    """The mean of polynomial_mmd over random subsets of at most `size` of [n, d] and [m, d]."""
    random = torch.Generator().manual_seed(seed)
    size = min(size, len(x), len(y))

    def subset(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=random)[:size]]

    return sum(polynomial_mmd(subset(x), subset(y)) for _ in range(subsets)) / subsets


DISTANCES = {"fid": frechet_distance, "kid": kernel_distance}


class Evaluation:
    """Metrics of generators against all images of one dataset, whose features are taken once.

    ValueError for a name that is not in DISTANCES; MetricsUnavailableError says what is missing.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        names: Sequence[str],
        device: torch.device | str = "cpu",
        *,
        features: Features | None = None,
        batch: int = 32,
    ):
        unknown = [name for name in names if name not in DISTANCES]
        if unknown:
            raise ValueError(f"unknown metric {unknown[0]!r}; there are {', '.join(DISTANCES)}")
        self.dataset = dataset
        self.names = list(names)
        self.device = torch.device(device)
        self.batch = as_int("batch", batch, 1)
        self._extract = inception(self.device) if features is None else features
        self._real: Tensor | None = None

    @torch.no_grad()
    def __call__(self, generator: Any, num: int = 50_000, seed: int = 0) -> dict[str, float]:
        """The metrics of `num` generated images, with labels as often as they are in the data."""
        as_int("num", num, 2)
        if self._real is None:
            reals = (self.dataset[i][0][None] for i in range(len(self.dataset)))
            self._real = self._features(reals)
        fake = self._features(self._generated(generator, num, seed))
        return {name: DISTANCES[name](self._real, fake) for name in self.names}

    def _generated(self, generator: Any, num: int, seed: int) -> Iterable[Tensor]:
        random = torch.Generator().manual_seed(seed)
        for start in range(0, num, self.batch):
            n = min(self.batch, num - start)
            z = torch.randn(n, generator.z_dim, generator=random)
            chosen = torch.randint(len(self.dataset), [n], generator=random).tolist()
            c = torch.stack([self.dataset.label(i) for i in chosen])
            ws = generator.mapping(z.to(self.device), c.to(self.device))
            images = generator.synthesis(ws, noise_mode="const")
            yield quantized(images)

    def _features(self, images: Iterable[Tensor]) -> Tensor:
        """Of uint8 images in any number at a time, taken in batches."""
        features: list[Tensor] = []
        waiting: list[Tensor] = []

        def take() -> None:
            x = torch.cat(waiting)
            waiting.clear()
            x = x.expand(-1, 3, -1, -1)
            features.append(self._extract(x.to(self.device)).cpu())

        for some in images:
            waiting.append(some)
            if sum(map(len, waiting)) >= self.batch:
                take()
        if waiting:
            take()
        return torch.cat(features)


def inception(device: torch.device | str = "cpu") -> Features:
    """Features [N, 2048] of the Inception network. Nothing is downloaded."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise MetricsUnavailableError(
            f"fid and kid take their features from torch-fidelity, and {error}; "
            "pip install 'stylegan_fast[metrics]'"
        ) from None
    weights = Path(torch.hub.get_dir(), "checkpoints", WEIGHTS)
    if not weights.is_file():
        raise MetricsUnavailableError(
            f"fid and kid need the weights of Inception: download {SOURCE} to {weights}"
        )
    try:
        network = FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=str(weights)
        )
    except Exception as error:  # torch.load raises whatever it stumbles over
        raise MetricsUnavailableError(
            f"{weights} does not hold the weights of Inception: download it again from {SOURCE}"
        ) from error
    network.to(device)
    return lambda images: network(images)[0]


def _checked(name: str, x: Tensor) -> Tensor:
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"{name} must be at least two rows, got {name}.shape={tuple(x.shape)}")
    return x.double()
