"""Which tensors rosinality's networks have, what they are called in `models.stylegan2` and by
BasicSR, and the constructor arguments that follow from their shapes.

rosinality's tensors have more axes of size 1. BasicSR's have the shapes of rosinality's, other
names, and no filters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..ops import setup_filter
from .contents import CheckpointError

State = dict[str, Tensor]

STANDARD_FILTER = (1, 3, 3, 1)
_MOST_BLOCKS = 12


class Pair(NamedTuple):
    """A tensor of `models.stylegan2` and rosinality's, which has `before` and `after` more axes."""

    ours: str
    theirs: str
    before: int = 0
    after: int = 0

    def to_theirs(self, tensor: Tensor) -> Tensor:
        return tensor.reshape((1,) * self.before + tensor.shape + (1,) * self.after)

    def to_ours(self, tensor: Tensor) -> Tensor:
        kept = tensor.shape[self.before : max(0, tensor.ndim - self.after)]
        if tensor.numel() != kept.numel():
            raise CheckpointError(f"{self.theirs} is {list(tensor.shape)}")
        return tensor.reshape(kept)


def _linear(ours: str, theirs: str) -> Iterator[Pair]:
    yield Pair(f"{ours}.weight", f"{theirs}.weight")
    yield Pair(f"{ours}.bias", f"{theirs}.bias")


def _modulated(ours: str, theirs: str) -> Iterator[Pair]:
    yield Pair(f"{ours}.weight", f"{theirs}.conv.weight", before=1)
    yield from _linear(f"{ours}.affine", f"{theirs}.conv.modulation")


def _styled(ours: str, theirs: str, noise: int) -> Iterator[Pair]:
    yield from _modulated(ours, theirs)
    yield Pair(f"{ours}.bias", f"{theirs}.activate.bias")
    yield Pair(f"{ours}.noise_strength", f"{theirs}.noise.weight", before=1)
    yield Pair(f"{ours}.noise_const", f"noises.noise_{noise}", before=2)


def _to_rgb(ours: str, theirs: str) -> Iterator[Pair]:
    yield from _modulated(ours, theirs)
    yield Pair(f"{ours}.bias", f"{theirs}.bias", before=1, after=2)


def basicsr_name(theirs: str) -> str:
    """BasicSR's name of rosinality's tensor."""
    for pattern, replacement in (
        (r"^(conv1|convs\.\d+)\.noise\.weight$", r"\1.weight"),
        (r"^(conv1|convs\.\d+|to_rgb1|to_rgbs\.\d+)\.conv\.", r"\1.modulated_conv."),
        (r"^(conv1|convs\.\d+)\.(weight|modulated_conv|activate)", r"style_\1.\2"),
        (r"^convs\.", "conv_body."),
        (r"^style\.", "style_mlp."),
        (r"^input\.input$", "constant_input.weight"),
        (r"^noises\.noise_", "noises.noise"),
    ):
        theirs = re.sub(pattern, replacement, theirs)
    return theirs


@dataclass(frozen=True)
class GeneratorPlan:
    """A generator of 4·2^blocks pixels."""

    blocks: int
    mapping_layers: int

    network = "Generator"
    kernel_gain = 4
    """What rosinality's filters are multiplied by."""

    @classmethod
    def of_names(cls, names: Iterable[str]) -> GeneratorPlan:
        """Of the generator with tensors of these names, rosinality's or BasicSR's."""
        blocks = _count(r"to_rgbs\.\d+\.bias", names)
        return cls(_checked(blocks), _count(r"style(_mlp)?\.\d+\.bias", names))

    @property
    def resolution(self) -> int:
        return 4 * 2**self.blocks

    def pairs(self) -> Iterator[Pair]:
        """The tensors without filters and w_avg."""
        for index in range(self.mapping_layers):
            yield from _linear(f"mapping.fc{index}", f"style.{index + 1}")
        yield Pair("synthesis.b4.const", "input.input", before=1)
        yield from _styled("synthesis.b4.conv1", "conv1", noise=0)
        yield from _to_rgb("synthesis.b4.torgb", "to_rgb1")
        for k in range(1, self.blocks + 1):
            block = f"synthesis.b{4 * 2**k}"
            yield from _styled(f"{block}.conv0", f"convs.{2 * k - 2}", noise=2 * k - 1)
            yield from _styled(f"{block}.conv1", f"convs.{2 * k - 1}", noise=2 * k)
            yield from _to_rgb(f"{block}.torgb", f"to_rgbs.{k - 1}")

    def kernels(self) -> list[str]:
        """rosinality's buffers with the resampling filter."""
        names = [(f"convs.{2 * k}.conv.blur", f"to_rgbs.{k}.upsample") for k in range(self.blocks)]
        return [f"{name}.kernel" for pair in names for name in pair]

    def filters(self, taps: Tensor) -> State:
        """The buffers of `models.stylegan2` with these taps, and those with taps it never uses."""
        unused = setup_filter(STANDARD_FILTER)
        filters = {}
        for resolution in (4 * 2**k for k in range(self.blocks + 1)):
            block = f"synthesis.b{resolution}"
            filters[f"{block}.resample_filter"] = taps
            filters[f"{block}.conv1.resample_filter"] = unused
            if resolution > 4:
                filters[f"{block}.conv0.resample_filter"] = taps
        return filters

    def arguments(self, state: State, resample_filter: Any) -> dict[str, Any]:
        """For models.stylegan2.Generator, from rosinality's tensors."""
        w_dim = size(state, "conv1.conv.modulation.weight", 1)
        return {
            "z_dim": w_dim,
            "c_dim": 0,
            "w_dim": w_dim,
            "img_resolution": self.resolution,
            "img_channels": size(state, "to_rgb1.conv.weight", 1),
            "mapping_kwargs": {"num_layers": self.mapping_layers},
            **_width_arguments(self._widths(state)),
            "resample_filter": resample_filter,
        }

    def their_arguments(self, state: State, blur_kernel: Any) -> dict[str, Any]:
        """For models.rosinality.Generator."""
        return {
            "size": self.resolution,
            "style_dim": size(state, "conv1.conv.modulation.weight", 1),
            "n_mlp": self.mapping_layers,
            "channel_multiplier": _multiplier(self._widths(state)),
            "blur_kernel": blur_kernel,
        }

    def _widths(self, state: State) -> dict[int, int]:
        names = {4: "conv1.conv.weight"}
        names |= {4 * 2**k: f"convs.{2 * k - 2}.conv.weight" for k in range(1, self.blocks + 1)}
        return {resolution: size(state, name, 1) for resolution, name in names.items()}


@dataclass(frozen=True)
class DiscriminatorPlan:
    """A discriminator of 4·2^blocks pixels."""

    blocks: int

    network = "Discriminator"
    kernel_gain = 1

    @classmethod
    def of_names(cls, names: Iterable[str]) -> DiscriminatorPlan:
        return cls(_checked(_count(r"(convs|conv_body)\.\d+\.skip\.1\.weight", names)))

    @property
    def resolution(self) -> int:
        return 4 * 2**self.blocks

    def pairs(self) -> Iterator[Pair]:
        yield Pair(f"b{self.resolution}.fromrgb.weight", "convs.0.0.weight")
        yield Pair(f"b{self.resolution}.fromrgb.bias", "convs.0.1.bias")
        for j in range(1, self.blocks + 1):
            block = f"b{self.resolution // 2 ** (j - 1)}"
            yield Pair(f"{block}.conv0.weight", f"convs.{j}.conv1.0.weight")
            yield Pair(f"{block}.conv0.bias", f"convs.{j}.conv1.1.bias")
            yield Pair(f"{block}.conv1.weight", f"convs.{j}.conv2.1.weight")
            yield Pair(f"{block}.conv1.bias", f"convs.{j}.conv2.2.bias")
            yield Pair(f"{block}.skip.weight", f"convs.{j}.skip.1.weight")
        yield Pair("b4.conv.weight", "final_conv.0.weight")
        yield Pair("b4.conv.bias", "final_conv.1.bias")
        yield from _linear("b4.fc", "final_linear.0")
        yield from _linear("b4.out", "final_linear.1")

    def kernels(self) -> list[str]:
        names = [(f"convs.{j}.conv2.0", f"convs.{j}.skip.0") for j in range(1, self.blocks + 1)]
        return [f"{name}.kernel" for pair in names for name in pair]

    def filters(self, taps: Tensor) -> State:
        unused = setup_filter(STANDARD_FILTER)
        filters = {
            f"b{self.resolution}.fromrgb.resample_filter": unused,
            "b4.conv.resample_filter": unused,
        }
        for resolution in (4 * 2**k for k in range(1, self.blocks + 1)):
            filters[f"b{resolution}.resample_filter"] = taps
            filters[f"b{resolution}.conv0.resample_filter"] = unused
            filters[f"b{resolution}.conv1.resample_filter"] = taps
            filters[f"b{resolution}.skip.resample_filter"] = taps
        return filters

    def arguments(self, state: State, resample_filter: Any) -> dict[str, Any]:
        """For models.stylegan2.Discriminator, from rosinality's tensors."""
        return {
            "c_dim": 0,
            "img_resolution": self.resolution,
            "img_channels": size(state, "convs.0.0.weight", 1),
            **_width_arguments(self._widths(state)),
            "block_kwargs": {"resample_filter": resample_filter},
        }

    def their_arguments(self, state: State, blur_kernel: Any) -> dict[str, Any]:
        """For models.rosinality.Discriminator."""
        return {
            "size": self.resolution,
            "channel_multiplier": _multiplier(self._widths(state)),
            "blur_kernel": blur_kernel,
        }

    def _widths(self, state: State) -> dict[int, int]:
        names = {self.resolution: "convs.0.0.weight"}
        for j in range(1, self.blocks + 1):
            names[self.resolution // 2**j] = f"convs.{j}.conv2.1.weight"
        return {resolution: size(state, name, 0) for resolution, name in names.items()}


Plan = GeneratorPlan | DiscriminatorPlan


def size(state: State, name: str, axis: int) -> int:
    """The size of a tensor that need not have the axis; CheckpointError then."""
    if state[name].ndim <= axis:
        raise CheckpointError(f"{name} is {list(state[name].shape)}")
    return state[name].shape[axis]


def _count(pattern: str, names: Iterable[str]) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in names)


def _checked(blocks: int) -> int:
    if blocks > _MOST_BLOCKS:
        raise CheckpointError(f"a network of {blocks} blocks")
    return blocks


def _width_arguments(widths: dict[int, int]) -> dict[str, int]:
    """channel_base and channel_max of `models.stylegan2`."""
    most, highest = max(widths.values()), max(widths)
    base = widths[highest] * highest
    if any(min(base // resolution, most) != width for resolution, width in widths.items()):
        raise CheckpointError(f"its channels by resolution, {widths}, have no common rule")
    return {"channel_base": base, "channel_max": most}


def _multiplier(widths: dict[int, int]) -> int:
    """channel_multiplier of `models.rosinality`, which the widths up to 32² do not tell."""
    highest = max(widths)
    return widths[highest] * highest // 16384 if highest > 32 else 2
