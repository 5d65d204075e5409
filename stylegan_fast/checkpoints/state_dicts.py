"""The state_dicts of rosinality's stylegan2-pytorch (.pt with g_ema, g, d) and of BasicSR (params,
params_ema), in both directions.

They hold no constructor arguments, which follow from the shapes. One table pairs the tensors of
`models.stylegan2` with rosinality's, which have more axes of size 1; BasicSR's have the shapes of
rosinality's, other names, and no filters. Neither has w_avg: rosinality's tool that converts the
originals writes it beside the networks as latent_avg; otherwise it is estimated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from ..models import rosinality, stylegan2
from ..models._recorded import class_path
from ..ops import setup_filter
from .contents import CheckpointError, Contents, Stored, check_same_names, check_same_tensors
from .pickles import StoredTensor

FAMILIES = ("stylegan2", "rosinality")
LAYOUTS = {
    "rosinality": {"G_ema": "g_ema", "G": "g", "D": "d"},
    "basicsr": {"G_ema": "params_ema", "G": "params", "D": "params"},
}
"""What a file calls its networks. One of BasicSR holds a generator or a discriminator."""

State = dict[str, Tensor]

_TELLING = {
    "conv1.conv.weight": ("rosinality", "Generator"),
    "convs.0.0.weight": ("rosinality", "Discriminator"),
    "style_conv1.modulated_conv.weight": ("basicsr", "Generator"),
    "conv_body.0.0.weight": ("basicsr", "Discriminator"),
}
"""Tensors that tell whose state_dict it is, and of what."""

_STANDARD_FILTER = (1, 3, 3, 1)
_MOST_BLOCKS = 12
_MAPPED = 4096
"""Random w whose mean replaces a missing w_avg."""


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


def _generator_pairs(blocks: int, mapping_layers: int) -> Iterator[Pair]:
    """The tensors of a generator of 4·2^blocks pixels, without its filters and w_avg."""
    for index in range(mapping_layers):
        yield from _linear(f"mapping.fc{index}", f"style.{index + 1}")
    yield Pair("synthesis.b4.const", "input.input", before=1)
    yield from _styled("synthesis.b4.conv1", "conv1", noise=0)
    yield from _to_rgb("synthesis.b4.torgb", "to_rgb1")
    for k in range(1, blocks + 1):
        block = f"synthesis.b{4 * 2**k}"
        yield from _styled(f"{block}.conv0", f"convs.{2 * k - 2}", noise=2 * k - 1)
        yield from _styled(f"{block}.conv1", f"convs.{2 * k - 1}", noise=2 * k)
        yield from _to_rgb(f"{block}.torgb", f"to_rgbs.{k - 1}")


def _discriminator_pairs(blocks: int) -> Iterator[Pair]:
    """The tensors of a discriminator of 4·2^blocks pixels, without its filters."""
    yield Pair(f"b{4 * 2**blocks}.fromrgb.weight", "convs.0.0.weight")
    yield Pair(f"b{4 * 2**blocks}.fromrgb.bias", "convs.0.1.bias")
    for j in range(1, blocks + 1):
        block = f"b{4 * 2 ** (blocks + 1 - j)}"
        yield Pair(f"{block}.conv0.weight", f"convs.{j}.conv1.0.weight")
        yield Pair(f"{block}.conv0.bias", f"convs.{j}.conv1.1.bias")
        yield Pair(f"{block}.conv1.weight", f"convs.{j}.conv2.1.weight")
        yield Pair(f"{block}.conv1.bias", f"convs.{j}.conv2.2.bias")
        yield Pair(f"{block}.skip.weight", f"convs.{j}.skip.1.weight")
    yield Pair("b4.conv.weight", "final_conv.0.weight")
    yield Pair("b4.conv.bias", "final_conv.1.bias")
    yield from _linear("b4.fc", "final_linear.0")
    yield from _linear("b4.out", "final_linear.1")


def _basicsr_name(theirs: str) -> str:
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


class Plan(NamedTuple):
    """Which tensors a network of this class (Generator or Discriminator) and depth has."""

    network: str
    blocks: int
    mapping_layers: int = 0

    @classmethod
    def of(cls, network: str, names: Iterable[str]) -> Plan:
        """Of the network with tensors of these names, rosinality's or BasicSR's."""
        block, layer = r"to_rgbs\.\d+\.bias", r"style(_mlp)?\.\d+\.bias"
        if network == "Discriminator":
            block = r"(convs|conv_body)\.\d+\.skip\.1\.weight"
        blocks, layers = (
            sum(re.fullmatch(pattern, name) is not None for name in names)
            for pattern in (block, layer)
        )
        if blocks > _MOST_BLOCKS:
            raise CheckpointError(f"a {network} of {blocks} blocks")
        return cls(network, blocks, layers)

    @property
    def resolution(self) -> int:
        return 4 * 2**self.blocks

    def pairs(self) -> list[Pair]:
        if self.network == "Generator":
            return list(_generator_pairs(self.blocks, self.mapping_layers))
        return list(_discriminator_pairs(self.blocks))

    def kernels(self) -> list[str]:
        """rosinality's buffers with the resampling filter."""
        if self.network == "Generator":
            pairs = [(f"convs.{2 * k}.conv.blur", f"to_rgbs.{k}.upsample") for k in self._range]
        else:
            pairs = [(f"convs.{k + 1}.conv2.0", f"convs.{k + 1}.skip.0") for k in self._range]
        return [f"{name}.kernel" for pair in pairs for name in pair]

    @property
    def kernel_gain(self) -> int:
        return 4 if self.network == "Generator" else 1

    @property
    def _range(self) -> range:
        return range(self.blocks)

    def widths(self, state: State) -> dict[int, int]:
        """Channels by resolution, from rosinality's tensors."""
        if self.network == "Generator":
            tensors = {4: "conv1.conv.weight"}
            tensors |= {4 * 2 ** (k + 1): f"convs.{2 * k}.conv.weight" for k in self._range}
            return {resolution: _size(state, name, 1) for resolution, name in tensors.items()}
        tensors = {self.resolution: "convs.0.0.weight"}
        tensors |= {
            self.resolution // 2 ** (k + 1): f"convs.{k + 1}.conv2.1.weight" for k in self._range
        }
        return {resolution: _size(state, name, 0) for resolution, name in tensors.items()}

    def filters(self, taps: Tensor) -> State:
        """The filter buffers of `models.stylegan2`, where what resamples has these taps."""
        unused = setup_filter(_STANDARD_FILTER)
        filters = {}
        for resolution in (4 * 2**k for k in range(self.blocks + 1)):
            block = f"b{resolution}"
            if self.network == "Generator":
                block = f"synthesis.{block}"
                resampling, others = ["conv0."] if resolution > 4 else [], ["conv1."]
            elif resolution > 4:
                resampling, others = ["conv1.", "skip."], ["conv0."]
                others += ["fromrgb."] if resolution == self.resolution else []
            else:
                filters["b4.conv.resample_filter"] = unused
                continue
            filters |= {f"{block}.{layer}resample_filter": taps for layer in ["", *resampling]}
            filters |= {f"{block}.{layer}resample_filter": unused for layer in others}
        return filters


def _size(state: State, name: str, axis: int) -> int:
    if state[name].ndim <= axis:
        raise CheckpointError(f"{name} is {list(state[name].shape)}")
    return state[name].shape[axis]


# Reading


def contents(value: Any, family: str) -> Contents | None:
    """The networks of a file, built from this module of stylegan_fast.models, or None if it has
    none of these."""
    if not isinstance(value, dict):
        return None
    candidates: list[tuple[str, Any]] = [("G", value), ("D", value)]
    candidates += [
        (name, value.get(key)) for keys in LAYOUTS.values() for name, key in keys.items()
    ]
    networks, layouts = {}, []
    for name, entries in candidates:
        layout, network = _kind(entries)
        if network != ("Discriminator" if name == "D" else "Generator"):
            continue
        state = {str(key): t.load() for key, t in entries.items() if isinstance(t, StoredTensor)}
        plan = Plan.of(network, state)
        state = _rosinality_state(plan, layout, state)
        if family == "rosinality":
            networks[name] = Stored(f"rosinality.{network}", _their_arguments(plan, state), state)
        else:
            networks[name] = _ours(plan, state, value.get("latent_avg"))
        layouts.append(layout)
    return Contents(f"state_dict of {layouts[0]}", networks) if networks else None


def _kind(entries: Any) -> tuple[str, str]:
    """Whose state_dict this is, and of what."""
    names = entries if isinstance(entries, dict) else ()
    return next((kind for name, kind in _TELLING.items() if name in names), ("", ""))


def _rosinality_state(plan: Plan, layout: str, state: State) -> State:
    """The state under rosinality's names, with its filters; CheckpointError for other tensors."""
    theirs = [pair.theirs for pair in plan.pairs()]
    if layout == "rosinality":
        check_same_names(state, [*theirs, *plan.kernels()])
        return state
    names = {_basicsr_name(name): name for name in theirs}
    check_same_names(state, names)
    kernel = setup_filter(_STANDARD_FILTER, gain=plan.kernel_gain)
    return {name: state[key] for key, name in names.items()} | dict.fromkeys(plan.kernels(), kernel)


def _taps(plan: Plan, state: State) -> tuple[Tensor, Any]:
    """The resampling filter, and as an argument of a constructor."""
    standard = setup_filter(_STANDARD_FILTER)
    kernels = [state[name].float() / plan.kernel_gain for name in plan.kernels()] or [standard]
    first = kernels[0]
    if any(not torch.equal(kernel, first) for kernel in kernels):
        raise CheckpointError("its layers have different filters")
    if first.shape == standard.shape and torch.allclose(first, standard, rtol=1e-5):
        return first, list(_STANDARD_FILTER)
    return first, first.tolist()


def _ours(plan: Plan, state: State, latent_avg: Any) -> Stored:
    """The network of `models.stylegan2` with rosinality's tensors."""
    taps, filter_argument = _taps(plan, state)
    ours = {pair.ours: pair.to_ours(state[pair.theirs]) for pair in plan.pairs()}
    ours |= plan.filters(taps)
    widths = _width_arguments(plan.widths(state))
    if plan.network == "Discriminator":
        arguments = {
            "c_dim": 0,
            "img_resolution": plan.resolution,
            "img_channels": _size(state, "convs.0.0.weight", 1),
            **widths,
            "block_kwargs": {"resample_filter": filter_argument},
        }
        return Stored("stylegan2.Discriminator", arguments, ours)
    w_dim = _size(state, "conv1.conv.modulation.weight", 1)
    arguments = {
        "z_dim": w_dim,
        "c_dim": 0,
        "w_dim": w_dim,
        "img_resolution": plan.resolution,
        "img_channels": _size(state, "to_rgb1.conv.weight", 1),
        "mapping_kwargs": {"num_layers": plan.mapping_layers},
        **widths,
        "resample_filter": filter_argument,
    }
    stored = Stored("stylegan2.Generator", arguments, ours)
    average = latent_avg.load() if isinstance(latent_avg, StoredTensor) else torch.empty(0)
    if average.numel() == w_dim:
        ours["mapping.w_avg"] = average.flatten()
    else:
        ours["mapping.w_avg"] = torch.zeros(w_dim)
        stored.finish = _estimate_w_avg
        stored.notes.append(f"w_avg is the mean of {_MAPPED} random w; the file has none")
    return stored


def _estimate_w_avg(generator: stylegan2.Generator) -> None:
    mapping = generator.mapping
    random = torch.Generator().manual_seed(0)
    z = torch.randn(_MAPPED, mapping.z_dim, generator=random)
    with torch.no_grad():
        means = [mapping(part, skip_w_avg_update=True)[:, 0].mean(0) for part in z.split(256)]
        mapping.w_avg.copy_(torch.stack(means).mean(0))


def _width_arguments(widths: dict[int, int]) -> dict[str, int]:
    """channel_base and channel_max of `models.stylegan2`."""
    most, highest = max(widths.values()), max(widths)
    base = widths[highest] * highest
    if any(min(base // resolution, most) != width for resolution, width in widths.items()):
        raise CheckpointError(f"its channels by resolution, {widths}, have no common rule")
    return {"channel_base": base, "channel_max": most}


def _their_arguments(plan: Plan, state: State) -> dict[str, Any]:
    """The constructor arguments of `models.rosinality`."""
    size = plan.resolution
    arguments: dict[str, Any] = {"size": size, "blur_kernel": _taps(plan, state)[1]}
    if size > 32:  # lower resolutions have the same channels with every multiplier
        arguments["channel_multiplier"] = plan.widths(state)[size] * size // 16384
    if plan.network == "Generator":
        arguments["style_dim"] = _size(state, "conv1.conv.modulation.weight", 1)
        arguments["n_mlp"] = plan.mapping_layers
    return arguments


# Writing


def save(file: BinaryIO, layout: str, networks: Mapping[str, nn.Module]) -> list[str]:
    """Writes the networks, and returns what this layout cannot hold of them.

    CheckpointError for a network that is not one of rosinality's but for the names.
    """
    notes: list[str] = []
    payload: dict[str, Any] = {}
    for name, network in sorted(networks.items(), key=lambda item: item[0] != "G_ema"):
        key = LAYOUTS[layout].get(name)
        if key is None or key in payload:
            names = ", ".join(LAYOUTS[layout])
            raise CheckpointError(f"{name}: a file of {layout} holds one each of {names} at most")
        try:
            payload[key], left_out = _their_state(layout, network)
        except CheckpointError as error:
            raise CheckpointError(f"{name} has no form in {layout}: {error}") from error
        w_avg = network.state_dict().get("mapping.w_avg")
        if w_avg is not None and layout == "rosinality" and "latent_avg" not in payload:
            payload["latent_avg"] = w_avg.cpu()
        elif w_avg is not None:
            left_out.append("w_avg")
        notes += [f"{name}: {what} is left out" for what in left_out]
    torch.save(payload, file)
    return notes


def _their_state(layout: str, network: Any) -> tuple[State, list[str]]:
    """(the network's tensors in this layout, what it cannot hold)"""
    family, _, kind = class_path(type(network)).partition(".")
    state = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    left_out = []
    if family == "stylegan2":
        plan, state = _from_ours(kind, network, state)
        clamps = {value for name, value in _all_arguments(network.init_kwargs) if name == _CLAMP}
        left_out += [f"{_CLAMP}={value}" for value in clamps if value is not None]
    elif family == "rosinality":
        plan = Plan.of(kind, state)
    else:
        raise CheckpointError(f"it is a {family}.{kind}")
    if layout == "rosinality":
        return state, left_out
    if _taps(plan, state)[1] != list(_STANDARD_FILTER):
        left_out.append("the resampling filter")
    return {_basicsr_name(pair.theirs): state[pair.theirs] for pair in plan.pairs()}, left_out


def _from_ours(kind: str, network: Any, ours: State) -> tuple[Plan, State]:
    """rosinality's tensors of a network of `models.stylegan2`."""
    for name, value in _all_arguments(network.init_kwargs):
        if name in _FIXED and value != _FIXED[name]:
            raise CheckpointError(f"{name}={value!r} instead of {_FIXED[name]!r}")
    layers = network.mapping.num_layers if kind == "Generator" else 0
    plan = Plan(kind, int(network.img_resolution).bit_length() - 3, layers)
    taps = ours[f"{'synthesis.' if layers else ''}b{plan.resolution}.resample_filter"]
    taps = taps if taps.ndim == 2 else taps.outer(taps)
    no_place = [name for name in ("mapping.w_avg",) if name in ours]
    check_same_names(ours, [*(p.ours for p in plan.pairs()), *plan.filters(taps), *no_place])
    theirs = {pair.theirs: pair.to_theirs(ours[pair.ours]) for pair in plan.pairs()}
    theirs |= {name: taps.mul(plan.kernel_gain) for name in plan.kernels()}
    with torch.device("meta"):
        skeleton = getattr(rosinality, kind)(**_their_arguments(plan, theirs))
    check_same_tensors(theirs, skeleton.state_dict())
    return plan, theirs


_CLAMP = "conv_clamp"
_FIXED = {"activation": "lrelu", "lr_multiplier": 0.01, "mbstd_group_size": 4}
"""Arguments of `models.stylegan2` that rosinality's networks do not have."""


def _all_arguments(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            yield from _all_arguments(value)
        else:
            yield name, value
