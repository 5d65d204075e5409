"""The state_dicts of rosinality's stylegan2-pytorch (.pt with g_ema, g, d) and of BasicSR (params,
params_ema), in both directions.

They hold no constructor arguments, which follow from the shapes. Neither has w_avg: rosinality's
tool that converts the originals writes it beside the networks as latent_avg; otherwise it is
estimated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ..models import rosinality, stylegan2
from ..models._recorded import class_path
from ..ops import setup_filter
from .contents import CheckpointError, Contents, Stored, check_same_names, check_same_tensors
from .pickles import StoredTensor
from .plans import STANDARD_FILTER, DiscriminatorPlan, GeneratorPlan, Plan, State, basicsr_name

FAMILIES = ("stylegan2", "rosinality")
LAYOUTS = {
    "rosinality": {"G_ema": "g_ema", "G": "g", "D": "d"},
    "basicsr": {"G_ema": "params_ema", "G": "params", "D": "params"},
}
"""What a file calls its networks. One of BasicSR holds a generator or a discriminator."""

_TELLING: dict[str, tuple[str, type[GeneratorPlan] | type[DiscriminatorPlan]]] = {
    "conv1.conv.weight": ("rosinality", GeneratorPlan),
    "convs.0.0.weight": ("rosinality", DiscriminatorPlan),
    "style_conv1.modulated_conv.weight": ("basicsr", GeneratorPlan),
    "conv_body.0.0.weight": ("basicsr", DiscriminatorPlan),
}
"""Tensors that tell whose state_dict it is, and of what."""

_MAPPED = 4096
"""Random w whose mean replaces a missing w_avg."""


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
        layout, kind = _told(entries)
        if kind is not (DiscriminatorPlan if name == "D" else GeneratorPlan):
            continue
        state = {str(key): t.load() for key, t in entries.items() if isinstance(t, StoredTensor)}
        plan = kind.of_names(state)
        state = _rosinality_state(plan, layout, state)
        if family == "rosinality":
            arguments = plan.their_arguments(state, _taps(plan, state)[1])
            networks[name] = Stored(f"rosinality.{plan.network}", arguments, state)
        else:
            networks[name] = _ours(plan, state, value.get("latent_avg"))
        layouts.append(layout)
    return Contents(f"state_dict of {layouts[0]}", networks) if networks else None


def _told(entries: Any) -> tuple[str, Any]:
    """Whose state_dict this is, and the class of its plan."""
    names = entries if isinstance(entries, dict) else ()
    return next((told for name, told in _TELLING.items() if name in names), ("", None))


def _rosinality_state(plan: Plan, layout: str, state: State) -> State:
    """The state under rosinality's names, with its filters; CheckpointError for other tensors."""
    theirs = [pair.theirs for pair in plan.pairs()]
    if layout == "rosinality":
        check_same_names(state, [*theirs, *plan.kernels()])
        return state
    names = {basicsr_name(name): name for name in theirs}
    check_same_names(state, names)
    kernel = setup_filter(STANDARD_FILTER, gain=plan.kernel_gain)
    return {name: state[key] for key, name in names.items()} | dict.fromkeys(plan.kernels(), kernel)


def _taps(plan: Plan, state: State) -> tuple[Tensor, Any]:
    """The resampling filter, and as an argument of a constructor."""
    standard = setup_filter(STANDARD_FILTER)
    kernels = [state[name].float() / plan.kernel_gain for name in plan.kernels()] or [standard]
    first = kernels[0]
    if any(not torch.equal(kernel, first) for kernel in kernels):
        raise CheckpointError("its layers have different filters")
    if first.shape == standard.shape and torch.allclose(first, standard, rtol=1e-5):
        return first, list(STANDARD_FILTER)
    return first, first.tolist()


def _ours(plan: Plan, state: State, latent_avg: Any) -> Stored:
    """The network of `models.stylegan2` with rosinality's tensors."""
    taps, resample_filter = _taps(plan, state)
    ours = {pair.ours: pair.to_ours(state[pair.theirs]) for pair in plan.pairs()}
    ours |= plan.filters(taps)
    arguments = plan.arguments(state, resample_filter)
    stored = Stored(f"stylegan2.{plan.network}", arguments, ours)
    if plan.network == "Generator":
        average = latent_avg.load() if isinstance(latent_avg, StoredTensor) else torch.empty(0)
        if average.numel() == arguments["w_dim"]:
            ours["mapping.w_avg"] = average.flatten()
        else:
            ours["mapping.w_avg"] = torch.zeros(arguments["w_dim"])
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
        plan = _told(state)[1].of_names(state)
    else:
        raise CheckpointError(f"it is a {family}.{kind}")
    if layout == "rosinality":
        return state, left_out
    if _taps(plan, state)[1] != list(STANDARD_FILTER):
        left_out.append("the resampling filter")
    return {basicsr_name(pair.theirs): state[pair.theirs] for pair in plan.pairs()}, left_out


def _from_ours(kind: str, network: Any, ours: State) -> tuple[Plan, State]:
    """rosinality's tensors of a network of `models.stylegan2`."""
    for name, value in _all_arguments(network.init_kwargs):
        if name in _FIXED and value != _FIXED[name]:
            raise CheckpointError(f"{name}={value!r} instead of {_FIXED[name]!r}")
    blocks = int(network.img_resolution).bit_length() - 3
    plan: Plan
    if kind == "Generator":
        plan = GeneratorPlan(blocks, network.mapping.num_layers)
        taps = network.synthesis.b4.resample_filter.cpu()
    else:
        plan = DiscriminatorPlan(blocks)
        taps = network.b8.resample_filter.cpu()
    taps = taps if taps.ndim == 2 else taps.outer(taps)
    no_place = [name for name in ("mapping.w_avg",) if name in ours]
    check_same_names(ours, [*(pair.ours for pair in plan.pairs()), *plan.filters(taps), *no_place])
    theirs = {pair.theirs: pair.to_theirs(ours[pair.ours]) for pair in plan.pairs()}
    theirs |= {name: taps.mul(plan.kernel_gain) for name in plan.kernels()}
    with torch.device("meta"):
        arguments = plan.their_arguments(theirs, _taps(plan, theirs)[1])
        skeleton = getattr(rosinality, kind)(**arguments)
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
