"""StyleGAN2 on real photographs: one training step of each network with its regulariser."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .. import no_weight_gradients, use_backend
from ..backends import automatic
from ..models.stylegan2 import Discriminator, Generator
from . import stock
from .cases import Case
from .gate import Expected
from .machine import tf32
from .peers import Peer, one_line, peer_generator
from .photographs import crops, photographs, save
from .results import OK, Row
from .workload import Provider, Session, alternatives

IMAGE: dict[str, Any] = {"img_resolution": 64, "img_channels": 3, "c_dim": 0}
SIZE: dict[str, Any] = {"z_dim": 128, "w_dim": 128, **IMAGE}
WIDTHS: dict[str, dict[str, Any]] = {
    "128 channels": {"channel_base": 4096, "channel_max": 128, "conv_clamp": 256},
    "512 channels": {"channel_base": 16384, "channel_max": 512, "conv_clamp": 256},
}
"""Of both networks: one to try things with, and that of the published 256×256 configuration."""

R1_GAMMA = 1.0
PATH_LENGTH_WEIGHT = 2.0
PATH_LENGTH_DECAY = 0.01

LOSS_TOLERANCE = 1e-4
"""Relative to the loss of the float64 networks."""

GRADIENT_TOLERANCE = 1e-3
"""Relative to the gradient of a parameter's layer in the float64 networks. A few of the millions
of values before an lrelu are so close to 0 that rounding decides their branch, which moves a
gradient by up to 1e-4. Alone, the gradient of a noise strength can be a sum that nearly cancels."""


class Batch(NamedTuple):
    real: Tensor  # [N, 3, 64, 64] in [-1, 1]
    z: Tensor  # [N, z_dim]
    direction: Tensor  # [N // 2, 3, 64, 64]: the random image of the path-length regulariser


def discriminator_step(G: Any, D: Any, batch: Batch, r1: bool) -> tuple[Tensor, ...]:
    """softplus(D(G(z))) + softplus(-D(x)), with R1 + γ/2 ‖∇_x D(x)‖², averaged over the batch, and
    its gradient by D's parameters."""
    with torch.no_grad():
        fake = G.synthesis(_mapped(G, batch.z), noise_mode="const")
    real = batch.real.detach().requires_grad_(r1)
    labels = real.new_zeros(real.shape[0], 0)
    logits = D(real, labels)
    loss = (F.softplus(D(fake, labels)) + F.softplus(-logits)).mean()
    if r1:
        with no_weight_gradients():
            (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
        loss = loss + (R1_GAMMA / 2 * slope.square().sum([1, 2, 3])).mean()
    return loss, *torch.autograd.grad(loss, list(D.parameters()))


def generator_step(G: Any, D: Any, batch: Batch, path_length: bool) -> tuple[Tensor, ...]:
    """softplus(-D(G(z))) averaged over the batch, with path length plus 2 (‖Jᵀ_w y‖ - a)² averaged
    over half of it, and the gradient by G's parameters.

    Jᵀ_w y is the gradient of <G(w), y> by w for a random image y of variance 1 / (H W), and a the
    running mean of its length, here after the first step.
    """
    ws = _mapped(G, batch.z)
    image = G.synthesis(ws, noise_mode="const")
    loss = F.softplus(-D(image, image.new_zeros(image.shape[0], 0))).mean()
    if path_length:
        loss = loss + _path_length(G, batch)
    return loss, *torch.autograd.grad(loss, list(G.parameters()))


def _path_length(G: Any, batch: Batch) -> Tensor:
    half = _mapped(G, batch.z[: batch.direction.shape[0]])
    image = G.synthesis(half, noise_mode="const")
    product = (image * batch.direction).sum() / math.sqrt(image.shape[2] * image.shape[3])
    with no_weight_gradients():
        (slope,) = torch.autograd.grad(product, half, create_graph=True)
    length = slope.square().sum(2).mean(1).sqrt()
    mean = PATH_LENGTH_DECAY * length.detach().mean()
    return PATH_LENGTH_WEIGHT * (length - mean).square().mean()


def _mapped(G: Any, z: Tensor) -> Tensor:
    return G.mapping(z, z.new_zeros(z.shape[0], 0))


STEPS: dict[str, Callable[[Any, Any, Batch], tuple[Tensor, ...]]] = {
    "D": partial(discriminator_step, r1=False),
    "D + R1": partial(discriminator_step, r1=True),
    "G": partial(generator_step, path_length=False),
    "G + path length": partial(generator_step, path_length=True),
}

ITERATIONS = 16
CYCLE = {"D": 15, "D + R1": 1, "G": 12, "G + path length": 4}
"""How often each step comes in that many iterations with lazy regularisation: R1 every 16, path
length every 4."""

LAZY = "lazy iteration"


def lazy_iteration(rows: list[Row]) -> list[Row]:
    """The mean iteration of the cycle, one row a provider that was timed in all of its steps."""
    steps: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row.level == "training" and row.status == OK:
            steps.setdefault((row.variant, row.provider), {})[row.mode] = row
    iterations = {key: _mean(found) for key, found in steps.items() if found.keys() == CYCLE.keys()}
    for row in iterations.values():
        baseline = iterations.get((row.variant, row.baseline))
        if baseline is not None:
            row.speedup = baseline.median_us / row.median_us
    return list(iterations.values())


def _mean(steps: dict[str, Row]) -> Row:
    def mean(column: str) -> float:
        total = sum(count * getattr(steps[mode], column) for mode, count in CYCLE.items())
        return total / ITERATIONS

    row = replace(
        steps["D"],
        mode=LAZY,
        gate_error=max(step.gate_error for step in steps.values()),
        median_us=mean("median_us"),
        p20_us=mean("p20_us"),
        p80_us=mean("p80_us"),
        n=min(step.n for step in steps.values()),
        speedup=math.nan,
        flops=round(mean("flops")),
        roofline_us=mean("roofline_us"),
        peak_bytes=max(step.peak_bytes for step in steps.values()),
    )
    row.of_roofline = row.roofline_us / row.median_us
    row.matrix_gflop_s = row.flops / row.roofline_us / 1e3
    return row


class TrainingStep:
    """Losses and gradients, without the optimiser: that is the same whoever computes them."""

    baseline = "reference"
    bytes = 0
    arithmetic = torch.float32

    def __init__(self, case: Case, session: Session) -> None:
        self.case = case
        self.session = session
        self.step = STEPS[case.mode]
        self.width = WIDTHS[case.variant]
        count, device = case.shape[0], session.device
        real = crops(photographs(), count)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.G = Generator(**SIZE, **self.width).to(device)
            self.D = Discriminator(**IMAGE, **self.width).to(device)
            z, direction = torch.randn(count, SIZE["z_dim"]), torch.randn_like(real[: count // 2])
        self.batch = Batch(*(t.to(device) for t in (real, z, direction)))
        self.images = self._save_images()
        with FlopCounterMode(display=False) as counter, use_backend("reference"):
            self.step(self.G, _OnCopy(self.D), self.batch)
        self.flops = counter.get_total_flops()

    def copy(self) -> None:
        return None

    def copied_bytes(self) -> int:
        return 0

    def expected(self) -> list[Expected]:
        G, D = (copy.deepcopy(network).double() for network in (self.G, self.D))
        with use_backend("reference"):
            results = self.step(G, D, Batch(*(t.double() for t in self.batch)))
        network = D if self.case.mode.startswith("D") else G
        loss, *gradients = (result.detach() for result in results)
        named = {name: g for (name, _), g in zip(network.named_parameters(), gradients)}
        layers: dict[str, float] = {}
        for name, g in named.items():
            part = GRADIENT_TOLERANCE * g.norm().item()
            layers[_layer(name)] = math.hypot(layers.get(_layer(name), 0.0), part)
        return [
            Expected("loss", loss, allowed=LOSS_TOLERANCE * abs(loss.item())),
            *(
                Expected(f"gradient of {name}", g, allowed=layers[_layer(name)])
                for name, g in named.items()
            ),
        ]

    def providers(self) -> Iterator[Provider]:
        chosen = automatic("bias_act", self.session.device.type, torch.float32)
        stocks = stock.Generator(self.G), stock.Discriminator(self.D)
        yield Provider("stock", self._call("reference", *stocks))
        yield Provider("reference", self._call("reference", self.G, self.D))
        yield Provider("automatic", self._call(None, self.G, self.D), f"bias_act on {chosen}")
        for name in alternatives(self.session.device.type, torch.float32):
            yield Provider(name, self._call(name, self.G, self.D))
        for peer in self.session.peers:
            yield self._peer(peer)

    def _peer(self, peer: Peer) -> Provider:
        problem = peer.problem or peer.networks_problem
        if peer.networks is None:
            return Provider(peer.name, None, problem, ours=False)
        try:
            with peer.imported():
                G, D = peer_networks(peer.networks, self.G, self.D, self.width)
        except Exception as error:
            return Provider(peer.name, None, f"networks: {one_line(error)}", ours=False)
        return Provider(peer.name, self._call(None, G, D), peer.detail, ours=False)

    def _call(self, backend: str | None, G: Any, D: Any) -> Callable[[], Any]:
        def call() -> tuple[Tensor, ...]:
            with use_backend(backend), tf32(False):
                return self.step(G, D, self.batch)

        return call

    def _save_images(self) -> str:
        with torch.no_grad():
            fake = self.G.synthesis(_mapped(self.G, self.batch.z), noise_mode="const")
        named = {"real.png": self.batch.real, "generated-untrained.png": fake}
        for name, images in named.items():
            save(_grid(images), self.session.folder / name)
        return " ".join(named)


class _OnCopy:
    """A discriminator that sees a copy: FlopCounterMode cannot follow autograd.grad to a leaf that
    enters a module."""

    def __init__(self, D: nn.Module) -> None:
        self.parameters = D.parameters
        self._D = D

    def __call__(self, image: Tensor, labels: Tensor) -> Tensor:
        return self._D(image.clone(), labels)


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def peer_networks(
    module: Any, G: nn.Module, D: nn.Module, width: dict[str, Any]
) -> tuple[nn.Module, nn.Module]:
    """The module's networks with the weights of ours."""
    device = next(G.parameters()).device
    width = {**width, "num_fp16_res": 0}
    peer_g = peer_generator(module, SIZE, width)
    peer_d = module.Discriminator(**IMAGE, **width)
    for network, ours in ((peer_g, G), (peer_d, D)):
        network.load_state_dict(ours.state_dict())
        network.to(device)
    return peer_g, peer_d


def _grid(images: Tensor) -> Tensor:
    """[N, 3, H, W] -> one image, four a row (N fills the rows), enlarged twice."""
    grid = torch.cat([torch.cat(list(row), 2) for row in images.split(4)], 1)
    return grid.repeat_interleave(2, 1).repeat_interleave(2, 2)
