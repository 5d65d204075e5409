"""Loading whatever a file turns out to be."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from . import native
from .contents import CheckpointError, Contents


def read(path: str | os.PathLike[str]) -> Contents:
    """What the file holds, found out by its first bytes; CheckpointError naming it otherwise."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(16)
        return _reader(start)(path)
    except (OSError, CheckpointError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(f"{path} cannot be loaded: {reason}") from error


def load_networks(
    path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> dict[str, nn.Module]:
    """The networks of a file by name ("G", "D", "G_ema"), as their constructors leave them but for
    their tensors: in training mode and trainable.

    Files of `save_networks`.

    CheckpointError, naming the file and what is wrong, for any other.
    """
    networks = {}
    for name, stored in read(path).networks.items():
        try:
            networks[name] = stored.build(device)
        except CheckpointError as error:
            raise CheckpointError(f"{path} cannot be loaded: {name}: {error}") from error
    return networks


def load_generator(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> nn.Module:
    """The generator to make images with, G_ema or else G, in evaluation mode and not trainable."""
    contents = read(path)
    for name in ("G_ema", "G"):
        if name in contents.networks:
            try:
                return contents.networks[name].build(device).eval().requires_grad_(False)
            except CheckpointError as error:
                raise CheckpointError(f"{path} cannot be loaded: {name}: {error}") from error
    names = ", ".join(contents.networks) or "nothing"
    raise CheckpointError(f"{path} holds {names}, but no generator G_ema or G")


def _reader(start: bytes) -> Callable[[Path], Contents]:
    """The reader of the format that begins so."""
    if not start:
        raise CheckpointError("it is empty")
    if start[8:9] == b"{":  # after the length of the header
        return native.read
    raise CheckpointError("it is no checkpoint")
