"""What a training run is: one dataclass, and presets named network-resolution."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..layers.checks import check_choice, check_resolution
from .losses import LOSSES

ALIAS_FREE = ("stylegan3-t", "stylegan3-r")
NETWORKS = ("stylegan", "stylegan2", *ALIAS_FREE)
PRECISIONS = ("float32", "bfloat16", "float16")
CHOICES = {
    "network": NETWORKS,
    "loss": tuple(LOSSES),
    "precision": PRECISIONS,
    "augment": ("none", "ada", "fixed"),
    "on_error": ("raise", "skip"),
}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides what a run computes, but for the machine it runs on.

    Two runs of one config end with the same weights, bit for bit on one machine's CPU; where
    `micro_batch` is given, also on any number of processes, to rounding. Lengths of time are in
    thousands of images shown to the discriminator (kimg). ValueError names the field and its value.
    """

    data: str = _option("", "folder or zip of images")
    labels: bool = _option(False, "train a conditional network on the data's labels")
    mirror: bool = _option(False, "show every image mirrored too")
    on_error: str = _option("raise", "what to do with an unreadable image")
    workers: int = _option(1, "processes that read images; 0: read them in this one")

    network: str = _option("stylegan2", "architecture")
    resolution: int = _option(32, "width and height of the images")
    z_dim: int = _option(512, "length of a latent z")
    w_dim: int = _option(512, "length of a style vector w")
    mapping_layers: int = _option(8, "layers of the mapping network")
    synthesis_layers: int = _option(14, "layers of the synthesis network (stylegan3)")
    channel_base: int = _option(16384, "channels of a layer, times its resolution")
    channel_max: int = _option(512, "most channels of a layer")
    mbstd_group: int = _option(4, "samples in a group of the minibatch standard deviation")
    progressive: bool = _option(False, "grow from 8×8, fading resolutions in (stylegan)")
    fade_kimg: float = _option(
        600, "progressive: thousands of images of a fade, and of the rest after it"
    )

    loss: str = _option("logistic", "adversarial loss")
    r1_gamma: float = _option(10, "weight of R1")
    d_reg_interval: int = _option(16, "steps from one R1 to the next; 1: in the main update")
    path_length_weight: float = _option(2, "weight of path length regularisation; 0: none")
    path_length_shrink: int = _option(2, "path lengths of every n-th sample of a batch only")
    g_reg_interval: int = _option(4, "steps from one path length to the next")
    style_mixing: float = _option(0.9, "share of samples made of two latents")
    w_avg_beta: float = _option(0.998, "decay of the mean of w, for truncation")

    augment: str = _option("none", "adaptive (ada) or fixed augmentation of what D sees")
    augment_p: float = _option(0.0, "probability of an augmentation; with ada, at the start")
    ada_target: float = _option(0.6, "ada: wanted mean sign of the real logits")
    ada_interval: int = _option(4, "ada: steps from one adjustment to the next")
    ada_kimg: float = _option(
        500, "ada: thousands of images in which the probability may change by 1"
    )
    blur_sigma: float = _option(
        0.0, "Gaussian blur of what D sees at the start, a standard deviation in pixels"
    )
    blur_kimg: float = _option(200, "thousands of images in which this blur fades")

    kimg: float = _option(25000, "length of the training, in thousands of images that D sees")
    batch: int = _option(32, "images of a step")
    micro_batch: int | None = _option(
        None, "images of one backward pass (default: the batch divided by the processes)"
    )
    g_lr: float = _option(0.0025, "learning rate of G")
    d_lr: float = _option(0.0025, "learning rate of D")
    beta1: float = _option(0.0, "Adam's first decay")
    beta2: float = _option(0.99, "Adam's second decay")
    ema_kimg: float = _option(10, "half-life of the weights' average, in thousands of images")
    ema_rampup: float | None = _option(0.05, "largest half-life as a part of the time so far")
    seed: int = _option(0, "of everything that is drawn")

    precision: str = _option("float32", "type of the activations at high resolutions")
    channels_last: bool = _option(False, "NHWC memory in 16-bit blocks (stylegan: in D)")

    tick_kimg: float = _option(4, "thousands of images from one line of the logs to the next")
    snapshot_ticks: int = _option(50, "ticks from one checkpoint and grid of samples to the next")
    keep: int = _option(0, "newest checkpoints to keep; 0: all")
    metrics: str = _option("", "of every checkpoint, separated by commas: fid, kid")
    metric_images: int = _option(50000, "generated images of a metric")

    def __post_init__(self) -> None:
        for name, (kind, optional) in field_types().items():
            _check_kind(name, getattr(self, name), kind, optional)
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        check_resolution("resolution", self.resolution, least=8)
        for name in POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be positive")
        for name in NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must not be negative")
        for name in PROBABILITIES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be between 0 and 1")
        for name in TIMES:
            if getattr(self, name) < 0.001:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 0.001, an image")
        for name, value in self.as_json().items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}={value!r} must be finite")
            most = LARGEST_SEED if name == "seed" else LARGEST
            if isinstance(value, (int, float)) and value > most:
                raise ValueError(f"{name}={value!r} must be at most {most}")
        if self.ema_rampup is not None and self.ema_rampup < 0:
            raise ValueError(f"ema_rampup={self.ema_rampup!r} must not be negative")
        if self.channel_base < self.resolution:
            raise ValueError(
                f"channel_base={self.channel_base} must be at least resolution={self.resolution}"
            )
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch={self.micro_batch!r} must be positive")
        if self.progressive and self.network != "stylegan":
            raise ValueError(f"progressive=True needs network='stylegan', not {self.network!r}")

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """What `as_json` was of; ValueError for other fields, or other types of values."""
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(f"unknown fields of a training configuration: {', '.join(unknown)}")
        return cls(**values)


POSITIVE = (
    "z_dim", "w_dim", "mapping_layers", "synthesis_layers", "channel_base", "channel_max",
    "mbstd_group", "fade_kimg", "blur_kimg", "d_reg_interval", "path_length_shrink",
    "g_reg_interval", "ada_interval", "ada_kimg", "kimg", "metric_images", "batch", "g_lr", "d_lr",
    "tick_kimg", "snapshot_ticks",
)  # fmt: skip
NOT_NEGATIVE = (
    "workers", "blur_sigma", "r1_gamma", "path_length_weight", "ema_kimg", "seed", "keep",
)  # fmt: skip
PROBABILITIES = ("style_mixing", "augment_p", "w_avg_beta", "beta1", "beta2")
TIMES = ("tick_kimg", "fade_kimg", "blur_kimg", "ada_kimg")
LARGEST = 2**31 - 1
LARGEST_SEED = 2**63 - 1


def _check_kind(name: str, value: Any, kind: type, optional: bool) -> None:
    """ValueError unless the value of a field, maybe of a file, is of this type."""
    kinds = (int, float) if kind is float else (kind,)
    if value is None and optional:
        return
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name}={value!r} must be of type {kind.__name__}")


def field_types() -> dict[str, tuple[type, bool]]:
    """The type of every field, and whether it may be None."""
    found = {}
    for name, hint in typing.get_type_hints(TrainingConfig).items():
        optional = isinstance(hint, types.UnionType)
        found[name] = (typing.get_args(hint)[0] if optional else hint, optional)
    return found


def preset(name: str, **overrides: Any) -> TrainingConfig:
    """The configuration `name` = network-resolution, such as "stylegan2-256", with other values
    for the fields in `overrides`. Any power of two from 8 to 1024.

    From 128 on widths, batch, learning rates and the weight of R1 are those published or what the
    originals derive from resolution and batch. Up to 64 the networks are small and their averages
    quick: two thousand images are a matter of minutes on a laptop's CPU. ValueError names what is
    wrong.
    """
    network, separator, resolution = name.rpartition("-")
    if network not in NETWORKS or not separator or not resolution.isdecimal():
        known = ", ".join(f"{network}-RESOLUTION" for network in NETWORKS)
        raise ValueError(f"config={name!r} must be one of {known}")
    size = int(resolution)
    check_resolution("resolution", size, least=8)
    if size > 1024:
        raise ValueError(f"resolution={size!r} must be at most 1024")
    values: dict[str, Any] = {"network": network, "resolution": size}
    values["batch"] = 64 if 128 <= size <= 512 else 32
    if network == "stylegan":
        rates = {128: 0.0015, 256: 0.002, 512: 0.003, 1024: 0.003}
        values["g_lr"] = values["d_lr"] = rates.get(size, 0.001)
        values.update(r1_gamma=10, d_reg_interval=1, path_length_weight=0, w_avg_beta=0.995)
    else:
        if size >= 512:
            values["channel_base"] = 32768
        values["g_lr"] = values["d_lr"] = 0.002 if size == 1024 else 0.0025
    if size <= 64:
        values.update(z_dim=128, w_dim=128, mapping_layers=4, channel_base=32 * size, r1_gamma=1)
        values.update(g_lr=0.0025, d_lr=0.0025, batch=8, ema_kimg=5)
        values.update(tick_kimg=0.25, snapshot_ticks=4)
    if network in ALIAS_FREE:
        values.update(mapping_layers=2, path_length_weight=0, style_mixing=0)
        if size <= 64:
            values.update(synthesis_layers=6, channel_base=16 * size)
        else:
            values.update(batch=32, g_lr=0.0025, d_lr=0.002)
            values["blur_sigma"] = 10 if network == "stylegan3-r" else 0
    merged = {**values, **overrides}
    if "r1_gamma" not in merged:
        strength = 0.001 if network in ALIAS_FREE else 0.0002
        merged["r1_gamma"] = strength * size**2 / merged["batch"]
    return TrainingConfig.from_json(merged)


def defaults() -> dict[str, Any]:
    """The values that all presets share, by the names of the fields."""
    sizes = [2**k for k in range(3, 11)]
    presets = [preset(f"{network}-{size}").as_json() for network in NETWORKS for size in sizes]
    first, *others = presets
    return {k: v for k, v in first.items() if all(other[k] == v for other in others)}


def micro_batch(config: TrainingConfig, processes: int) -> int:
    """Images of one backward pass; ValueError where they do not make whole groups and steps."""
    size = config.micro_batch
    if size is None:
        size = math.ceil(config.batch / processes)
    if config.batch % (size * processes):
        raise ValueError(
            f"batch={config.batch} must be a multiple of micro_batch={size} "
            f"on each of {processes} processes"
        )
    if size % min(config.mbstd_group, size):
        raise ValueError(
            f"micro_batch={size} must be a multiple of mbstd_group={config.mbstd_group}"
        )
    return size
