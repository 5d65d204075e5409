"""Other repositories' networks as they are shipped, with the swap installed, and converted."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import swap, use_backend
from .cases import Case
from .end_to_end import GRADIENT_TOLERANCE, IMAGE, LOSS_TOLERANCE, SIZE, WIDTHS
from .gate import Expected
from .machine import tf32
from .peers import importing, one_line, peer_generator
from .workload import Provider, Session

IMAGE_TOLERANCE = 1e-4
"""Relative to the images."""

LEAST = 1e-6
"""Of all the gradients of a network: what one that is 0 but for rounding may be off by."""

R1_GAMMA = 1.0


class Networks(NamedTuple):
    G: nn.Module
    D: nn.Module
    image: Callable[[Tensor], Tensor]  # z [N, 128] -> [N, 3, H, W], noise is constant
    logits: Callable[[Tensor], Tensor]


class Repository(NamedTuple):
    networks: str
    files: tuple[str, ...]
    """By which a checkout is known to have them."""
    resolution: int
    make: Callable[[], Networks]

    def is_in(self, root: Path) -> bool:
        return all((root / file).is_file() for file in self.files)


def _nvlabs(G: Any, D: Any, **options: Any) -> Networks:
    def labels(x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], 0)

    return Networks(G, D, lambda z: G(z, labels(z), **options), lambda x: D(x, labels(x)))


_FLOAT32: dict[str, Any] = {**WIDTHS["128 channels"], "num_fp16_res": 0}


def _stylegan2(module: str) -> Networks:
    networks: Any = importlib.import_module(module)
    G = peer_generator(networks, SIZE, _FLOAT32)
    return _nvlabs(G, networks.Discriminator(**IMAGE, **_FLOAT32), noise_mode="const")


def _stylegan3() -> Networks:
    networks: Any = importlib.import_module("training.networks_stylegan3")
    discriminators: Any = importlib.import_module("training.networks_stylegan2")
    G = networks.Generator(**SIZE, **_FLOAT32)
    return _nvlabs(G, discriminators.Discriminator(**IMAGE, **_FLOAT32))


def _rosinality(module: str) -> Networks:
    model: Any = importlib.import_module(module)
    G = model.Generator(32, SIZE["w_dim"], 8, channel_multiplier=1)
    D = model.Discriminator(32, channel_multiplier=1)
    return Networks(G, D, lambda z: G([z], randomize_noise=False)[0], D)


def _r3gan() -> Networks:
    networks: Any = importlib.import_module("R3GAN.Networks")
    stages = [64] * 5, [16] * 5, [2] * 5, 2
    G, D = networks.Generator(SIZE["z_dim"], *stages), networks.Discriminator(*stages)
    return Networks(G, D, G, D)


REPOSITORIES = (
    Repository("R3GAN", ("R3GAN/Networks.py",), 64, _r3gan),
    Repository(
        "StyleGAN2",
        ("training/networks_stylegan2.py",),
        64,
        partial(_stylegan2, "training.networks_stylegan2"),
    ),
    Repository("StyleGAN3-T", ("training/networks_stylegan3.py",), 64, _stylegan3),
    Repository(
        "StyleGAN2", ("training/networks.py",), 64, partial(_stylegan2, "training.networks")
    ),
    Repository("StyleGAN2", ("model.py", "op/fused_act.py"), 32, partial(_rosinality, "model")),
    Repository(
        "StyleGAN2",
        ("models/stylegan2/model.py", "models/stylegan2/op/fused_act.py"),
        32,
        partial(_rosinality, "models.stylegan2.model"),
    ),
)


def _found(root: Path) -> dict[str, Repository]:
    """The networks of a checkout. R3GAN's `training.networks` are the same R3GAN once more."""
    found = {
        repository.networks: repository for repository in REPOSITORIES if repository.is_in(root)
    }
    return {"R3GAN": found["R3GAN"]} if "R3GAN" in found else found


def cases(path: str) -> list[Case]:
    """Of every kind of network that a checkout has."""
    root = Path(path).expanduser().resolve()
    return [
        Case("swap", "", shape, "float32", "nchw", "repository", mode, f"{root.name} {networks}")
        for networks, repository in _found(root).items()
        for mode, n in (("G forward", 1), ("training step", 2))
        for shape in ((n, 3, repository.resolution, repository.resolution),)
    ]


class Swapped:
    """G forward: images without gradients. Training step: the logistic losses of both networks and
    R1, with the gradients by their parameters.

    The repository is imported three times, and all three are timed in turns. What they compute is
    compared with the swapped networks on the `reference` backend.
    """

    baseline = "shipped"
    bytes = 0
    flops = 0
    arithmetic = torch.float32
    images = ""

    def __init__(self, case: Case, session: Session) -> None:
        self.case = case
        self.device = session.device
        folder, _, networks = case.variant.rpartition(" ")
        self.peer = next(peer for peer in session.peers if peer.root.name == folder)
        self.repository = _found(self.peer.root)[networks]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.z = torch.randn(case.shape[0], SIZE["z_dim"]).to(self.device)
            self.real = torch.randn(case.shape).to(self.device)
        self.shipped = self._made(stand_ins=True)
        swap.install()
        self.swapped, self.converted = self._made(), self._made()
        self.layers: set[str] = set()
        if isinstance(self.converted, Networks):
            timed = (self.converted.G, self.converted.D)
            for network in timed[: 1 if case.mode == "G forward" else 2]:
                routed = swap.convert(network).routed
                self.layers |= {name.rpartition(".")[2] for name in routed}

    def _made(self, stand_ins: bool = False) -> Networks | Exception:
        try:
            return self._networks(stand_ins)
        except Exception as error:
            return error

    def _networks(self, stand_ins: bool) -> Networks:
        with importing(self.peer.root, self.device, stand_ins), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = self.repository.make()
            for network in (made.G, made.D):
                for name, parameter in network.named_parameters():
                    if parameter.ndim < 2 and "affine" not in name and "modulation" not in name:
                        nn.init.normal_(parameter, std=0.3)
                network.to(self.device)
            with torch.no_grad():  # what is compiled or imported at the first call
                made.logits(made.image(self.z))
        return made

    def copy(self) -> None:
        return None

    def copied_bytes(self) -> int:
        return 0

    def expected(self) -> list[Expected]:
        networks = self.swapped if isinstance(self.swapped, Networks) else self.shipped
        if not isinstance(networks, Networks):
            return []
        with use_backend("reference"), tf32(False):
            results = self._run(networks)
        if self.case.mode == "G forward":
            (image,) = results
            return [
                Expected("image", image.double(), allowed=IMAGE_TOLERANCE * image.norm().item())
            ]
        found = []
        for letter in "GD":
            network = getattr(networks, letter)
            loss, results = results[0], results[1:]
            found.append(
                Expected(
                    f"loss of {letter}", loss.double(), allowed=LOSS_TOLERANCE * abs(loss.item())
                )
            )
            names = [name for name, _ in network.named_parameters()]
            least = LEAST * math.hypot(*(g.norm().item() for g in results[: len(names)]))
            layers: dict[str, float] = {}
            for name, gradient in zip(names, results):
                part = GRADIENT_TOLERANCE * gradient.norm().item()
                layer = name.rpartition(".")[0]
                layers[layer] = math.hypot(layers.get(layer, least), part)
            found += [
                Expected(
                    f"gradient of {letter}.{name}",
                    gradient.double(),
                    allowed=layers[name.rpartition(".")[0]],
                )
                for name, gradient in zip(names, results)
            ]
            results = results[len(names) :]
        return found

    def providers(self) -> Iterator[Provider]:
        detail, runs = self.peer.detail, isinstance(self.shipped, Networks)
        if isinstance(self.shipped, Networks):
            yield Provider("shipped", self._call(self.shipped), detail, ours=False)
        else:
            reason = f"does not run as shipped: {one_line(self.shipped)}"
            yield Provider("shipped", None, reason, ours=False)
        yield Provider("swap", self._call(self.swapped), detail, ours=runs)
        if self.layers:
            detail = "; ".join(
                filter(None, [detail, f"converted: {', '.join(sorted(self.layers))}"])
            )
            yield Provider("swap + convert", self._call(self.converted), detail)
        else:
            yield Provider("swap + convert", None, "convert knows none of its layers")

    def _call(self, networks: Networks | Exception) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            if isinstance(networks, Exception):
                raise networks
            with tf32(False):
                return self._run(networks)

        return call

    def _run(self, networks: Networks) -> tuple[Tensor, ...]:
        if self.case.mode == "G forward":
            with torch.no_grad():
                return (networks.image(self.z),)
        return training_step(networks, self.z, self.real)


def training_step(networks: Networks, z: Tensor, real: Tensor) -> tuple[Tensor, ...]:
    """softplus(-D(G(z))) and its gradient by G; softplus(D(G(z))) + softplus(-D(x)) + γ/2 ‖∇_x D‖²
    and its gradient by D; averaged over the batch."""
    fake = networks.image(z)
    loss_g = F.softplus(-networks.logits(fake)).mean()
    gradients_g = _gradients(loss_g, networks.G)
    real = real.detach().requires_grad_()
    logits = networks.logits(real)
    (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    loss_d = (F.softplus(networks.logits(fake.detach())) + F.softplus(-logits)).mean()
    loss_d = loss_d + (R1_GAMMA / 2 * slope.square().sum([1, 2, 3])).mean()
    return loss_g, *gradients_g, loss_d, *_gradients(loss_d, networks.D)


def _gradients(loss: Tensor, network: nn.Module) -> tuple[Tensor, ...]:
    parameters = list(network.parameters())
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
