"""What a checkpoint file holds, in whatever format, and the networks made from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ..models._recorded import NETWORKS

_LONGEST_ARGUMENT = 256
_SHOWN = 4
"""Names of tensors an error message lists."""


class CheckpointError(ValueError):
    """A file that cannot be loaded or written; the message names it and says why."""


@dataclass
class Stored:
    """A network in a file: its class, of NETWORKS, the constructor's arguments, its state_dict."""

    path: str
    init_kwargs: dict[str, Any]
    state: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    finish: Callable[[Any], None] | None = None
    """Called with the network that holds the state."""

    def build(self, device: torch.device | str = "cpu") -> nn.Module:
        """The network, as its constructor leaves it but for its tensors and their dtype.

        CheckpointError unless the arguments make a network with exactly these tensors, found out
        before memory is taken for it.
        """
        network_class = NETWORKS[self.path]
        try:
            _check_extent("init_kwargs", self.init_kwargs, len(self.state))
            with torch.device("meta"):
                skeleton = network_class(**self.init_kwargs)
        except Exception as error:
            raise CheckpointError(f"cannot be made from its arguments: {error}") from error
        check_same_tensors(self.state, skeleton.state_dict())
        with torch.random.fork_rng(devices=[]):
            network = network_class(**self.init_kwargs)
        network.to(_widest_floating_dtype(self.state))
        network.load_state_dict(self.state, strict=True)
        if self.finish is not None:
            self.finish(network)
        return network.to(device)


@dataclass
class Contents:
    """The networks of a file by name (G, D, G_ema where the format has names), and what the file
    says about itself."""

    layout: str
    networks: dict[str, Stored]
    metadata: dict[str, Any] = field(default_factory=dict)


def _check_extent(name: str, value: Any, tensors: int) -> None:
    """No network has more layers than the file has tensors, or long lists as arguments."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_extent(key, item, tensors)
    elif isinstance(value, (list, tuple)):
        if len(value) > _LONGEST_ARGUMENT:
            raise ValueError(f"{name} has {len(value)} elements")
        for item in value:
            _check_extent(name, item, tensors)
    elif name in ("num_layers", "n_mlp") and isinstance(value, int) and value > tensors:
        raise ValueError(f"{name}={value} with {tensors} tensors")


def check_same_tensors(stored: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """CheckpointError unless both have the same names, and the same shapes by name."""
    check_same_names(stored, expected)
    reshaped = [
        f"{name} is {list(tensor.shape)} instead of {list(expected[name].shape)}"
        for name, tensor in stored.items()
        if tensor.shape != expected[name].shape
    ]
    if reshaped:
        raise CheckpointError(f"not the tensors of this network: {_enumerated(reshaped)}")


def check_same_names(stored: Iterable[str], expected: Iterable[str]) -> None:
    """CheckpointError unless both are the same names."""
    stored, expected = dict.fromkeys(stored), dict.fromkeys(expected)
    missing = [name for name in expected if name not in stored]
    unexpected = [name for name in stored if name not in expected]
    differences = {"without": missing, "with": unexpected}
    wrong = [f"{what} {_enumerated(names)}" for what, names in differences.items() if names]
    if wrong:
        raise CheckpointError(f"not the tensors of this network: {'; '.join(wrong)}")


def _enumerated(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _widest_floating_dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    widest = None
    for tensor in state.values():
        if tensor.is_floating_point():
            widest = torch.promote_types(widest or tensor.dtype, tensor.dtype)
    return widest or torch.get_default_dtype()


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file open for writing, which takes the place of `path` when the block ends well.

    `path` has its old content or the new one at every moment, also if the process or the machine
    stops. CheckpointError where it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
