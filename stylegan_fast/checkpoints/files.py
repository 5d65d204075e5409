"""Loading whatever a file turns out to be."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._commands import printable
from . import native, originals, pickles, state_dicts
from .contents import CheckpointError, Contents, atomic_write

LAYOUTS = ("ours", *state_dicts.LAYOUTS)

_LONGEST_REASON = 400

_OTHERS = {
    b"\xff\xd8\xff": "it is a JPEG image",
    b"\x89PNG": "it is a PNG image",
    b"GIF8": "it is a GIF image",
    b"\x89HDF": "it is an HDF5 file",
    b"<": "it is a page of HTML or XML, maybe of a download that failed",
    b"version https://git-lfs": "it is a pointer of Git LFS, not the file itself",
}
"""What is often taken for a checkpoint, by its first bytes."""


def read(path: str | os.PathLike[str], family: str = "stylegan2") -> Contents:
    """What a file holds; CheckpointError naming it, as `load_networks`."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(32)
            if start[8:9] == b"{":  # safetensors: after the length of the header
                return native.read(path)
            file.seek(0)
            value = _unpickled(start, file.read())
        contents = originals.contents(value) or state_dicts.contents(value, family)
        if contents is None:
            raise CheckpointError(f"it holds no network of StyleGAN, but {_summary(value)}")
        return contents
    except (OSError, MemoryError, CheckpointError) as error:
        raise _failure(path, error) from error


def _unpickled(start: bytes, data: bytes) -> Any:
    if not start:
        raise CheckpointError("it is empty")
    if start.startswith(b"PK"):
        return pickles.read_torch_zip(data)
    if start.startswith(pickles.LEGACY_MAGIC):
        return pickles.read_torch_legacy(data)
    if start.startswith(b"\x80"):
        return pickles.read_pickle(data)
    known = (what for magic, what in _OTHERS.items() if start.startswith(magic))
    raise CheckpointError(next(known, "it has none of the formats of checkpoints"))


def _summary(value: Any) -> str:
    if isinstance(value, dict):
        return f"a dictionary of {', '.join(map(str, list(value)[:8])) or 'nothing'}"
    return f"a {value.name if isinstance(value, pickles.Record) else type(value).__name__}"


def _failure(path: str | os.PathLike[str], error: Exception) -> CheckpointError:
    """One printable line, whatever names the file brings into it."""
    reason = (isinstance(error, OSError) and error.strerror) or str(error) or "out of memory"
    return CheckpointError(f"{path} cannot be loaded: {printable(reason[:_LONGEST_REASON])}")


def build(
    path: str | os.PathLike[str], contents: Contents, device: torch.device | str = "cpu"
) -> dict[str, nn.Module]:
    """The networks of the contents read from `path`."""
    networks = {}
    for name, stored in contents.networks.items():
        try:
            networks[name] = stored.build(device)
        except CheckpointError as error:
            raise _failure(path, CheckpointError(f"{name}: {error}")) from error
    return networks


def load_networks(
    path: str | os.PathLike[str], device: torch.device | str = "cpu", *, family: str = "stylegan2"
) -> dict[str, nn.Module]:
    """The networks of a file by name ("G", "D", "G_ema"), as their constructors leave them but for
    their tensors: in training mode and trainable.

    Files of `save_networks`; network pickles of the originals' PyTorch releases, StyleGAN2's and
    StyleGAN3's; .pt files of rosinality's stylegan2-pytorch and .pth files of BasicSR's StyleGAN2,
    whose networks come from this module of stylegan_fast.models: "stylegan2", which training and
    generation use, or "rosinality". Nothing in the file is executed.

    CheckpointError, naming the file and what is wrong, for any other, damaged or malicious file.
    """
    if family not in state_dicts.FAMILIES:
        raise ValueError(f"{family=} must be one of {', '.join(state_dicts.FAMILIES)}")
    return build(path, read(path, family), device)


def load_generator(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> nn.Module:
    """The generator to make images with, G_ema or else G, in evaluation mode and not trainable.
    CheckpointError as `load_networks`, or where the file holds none."""
    contents = read(path)
    names = [name for name in ("G_ema", "G") if name in contents.networks]
    if not names:
        held = ", ".join(contents.networks) or "nothing"
        raise CheckpointError(f"{path} holds {held}, but no generator G_ema or G")
    contents.networks = {names[0]: contents.networks[names[0]]}
    return build(path, contents, device)[names[0]].eval().requires_grad_(False)


def save_as(
    path: str | os.PathLike[str],
    layout: str,
    networks: Mapping[str, nn.Module],
    metadata: Mapping[str, Any] = {},
) -> list[str]:
    """Writes the networks as `save_networks` ("ours"), or for "rosinality" or "basicsr" as the
    state_dicts of these, without metadata. Returns what the layout cannot hold.

    CheckpointError, and no file, for networks that have no form in this layout.
    """
    if layout == "ours":
        native.save_networks(path, networks, metadata)
        return []
    with atomic_write(path) as file:
        return state_dicts.save(file, layout, networks)
