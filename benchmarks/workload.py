"""What the runner asks of an op: its providers, its expected results, and what it has to move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .gate import Expected
from .peers import Peer


class Provider(NamedTuple):
    name: str
    call: Callable[[], Sequence[Tensor | None]] | None
    """One measurement; its results go through the gate. None: `detail` says why there is none."""
    detail: str = ""
    ours: bool = True
    """Whether a call that raises is a failure of this project, or a provider left out."""


@dataclass(frozen=True)
class Session:
    """What is the same for all cases of a run."""

    device: torch.device
    folder: Path
    peers: tuple[Peer, ...] = ()
    compiles: bool = True
    """Whether torch.compile is among the providers."""


class Workload(Protocol):
    baseline: str
    """The provider that speedups are against."""
    bytes: int
    """Read and written at least; 0 where that was not counted."""
    flops: int
    arithmetic: torch.dtype
    """The dtype it computes in."""
    images: str
    """PNG files it has written."""

    def copy(self) -> Callable[[], object] | None:
        """`copy_` between existing tensors of the case's shape, the ceiling of what moves data."""

    def copied_bytes(self) -> int: ...

    def expected(self) -> list[Expected]: ...

    def providers(self) -> Iterator[Provider]: ...
