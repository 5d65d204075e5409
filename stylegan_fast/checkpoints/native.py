"""The library's own format: one safetensors file, tensors named NETWORK.STATE_DICT_KEY. The header
holds, as JSON under the key "stylegan_fast", how to make each network and the caller's metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import models  # noqa: F401 - fills NETWORKS
from ..models._recorded import NETWORKS, class_path
from .contents import CheckpointError, Contents, Stored, atomic_write

LAYOUT = "stylegan_fast"
VERSION = 1


def save_networks(
    path: str | os.PathLike[str],
    networks: Mapping[str, nn.Module],
    metadata: Mapping[str, Any] = {},
) -> None:
    """Writes the networks by name ("G", "D", "G_ema") and the metadata, as JSON, to one file.

    The file is replaced as a whole: `path` keeps its old content until the new one is on the disk.

    TypeError for a network that is not of a recorded class of stylegan_fast.models, or metadata
    that JSON cannot hold; ValueError for a name that is no identifier; CheckpointError where `path`
    cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    described = {}
    for name, network in networks.items():
        if not name.isidentifier():
            raise ValueError(f"a network's name must be an identifier, got {name!r}")
        network_path = class_path(type(network))
        if NETWORKS.get(network_path) is not type(network):
            raise TypeError(f"{name} is a {network_path}, not one of {', '.join(sorted(NETWORKS))}")
        described[name] = {"class": network_path, "init_kwargs": network.init_kwargs}
        for key, tensor in network.state_dict().items():
            tensors[f"{name}.{key}"] = tensor.detach().cpu().contiguous()
    header = {"format": VERSION, "networks": described, "metadata": dict(metadata)}
    content = _safetensors().torch.save(tensors, {LAYOUT: json.dumps(header)})
    with atomic_write(path) as file:
        file.write(content)


def read(path: Path) -> Contents:
    """The contents of a file of `save_networks`; CheckpointError if it is none, without the file's
    name."""
    module = _safetensors()
    try:
        with module.safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(LAYOUT)
            if header is None:
                raise CheckpointError("its header does not say which networks it holds")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except module.SafetensorError as error:
        raise CheckpointError(f"it is damaged or incomplete: {error}") from error
    return _contents(header, tensors)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata given to `save_networks`, without reading a tensor; CheckpointError for a file
    that is not its."""
    module = _safetensors()
    try:
        with module.safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(LAYOUT, "")
        return _contents(header, {}).metadata
    except (OSError, CheckpointError, module.SafetensorError) as error:
        raise CheckpointError(f"{path} holds no metadata of save_networks: {error}") from error


def _contents(header: str, tensors: Mapping[str, Tensor]) -> Contents:
    try:
        description = json.loads(header)
        version = description["format"]
        if version != VERSION:
            raise CheckpointError(f"its format has the version {version!r}; this one reads 1")
        states: dict[str, dict[str, Tensor]] = {name: {} for name in description["networks"]}
        for key, tensor in tensors.items():
            name, _, inside = key.partition(".")
            states[name][inside] = tensor
        networks = {}
        for name, network in description["networks"].items():
            if not name.isidentifier() or network["class"] not in NETWORKS:
                known = ", ".join(sorted(NETWORKS))
                raise CheckpointError(f"{name!r} is a {network['class']!r}, not one of {known}")
            networks[name] = Stored(network["class"], dict(network["init_kwargs"]), states[name])
        return Contents(LAYOUT, networks, dict(description["metadata"]))
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"its header cannot be understood: {error!r}") from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}; pip install 'stylegan_fast[train]' brings it", name=error.name
        ) from error
    return safetensors
