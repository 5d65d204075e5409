"""What the runner asks of an op: its providers, its expected results, and what it has to move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .. import backends
from .gate import Expected
from .peers import Peer

Function = Callable[..., Tensor]
Results = tuple[Tensor | None, ...]


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
        """`copy_` between existing tensors, of as many bytes as the op's input and output have: the
        ceiling of what moves data."""

    def copied_bytes(self) -> int: ...

    def expected(self) -> list[Expected]: ...

    def providers(self) -> Iterator[Provider]: ...


def differentiate(
    function: Function,
    mode: str,
    inputs: tuple[Tensor, ...],
    dy: Tensor,
    h: tuple[Tensor, ...],
) -> Results:
    """All that a mode computes: y, the gradients by the inputs, and then those by the inputs and by
    dy of the product of the first ones with h, which is what a gradient penalty sends back."""
    y = function(*inputs)
    if mode == "forward":
        return (y,)
    twice = mode == "double backward"
    first = torch.autograd.grad(y, inputs, dy, create_graph=twice)
    if not twice:
        return y, *first
    return y, *first, *torch.autograd.grad(first, (*inputs, dy), h, allow_unused=True)


def candidates(op: str, device_type: str, dtype: torch.dtype) -> list[str]:
    """The reference and the backends that have kernels of the op for such tensors."""
    return ["reference"] + [
        name
        for name in backends.BACKENDS
        if name != "reference"
        # Triton on a CPU is its interpreter, a tool for tests.
        and (name, device_type) != ("triton", "cpu")
        and backends.refusal(name, op, device_type, dtype) is None
    ]


def alternatives(device_type: str, dtype: torch.dtype) -> list[str]:
    """The kernel backends that whole layers and networks can run on besides the automatic one."""
    op = "modulated_conv2d"
    known = ("reference", backends.automatic(op, device_type, dtype))
    return [name for name in candidates(op, device_type, dtype) if name not in known]


def compiled(
    reference: Function,
    mode: str,
    session: Session,
    call: Callable[[Function], Callable[[], Results]],
) -> Iterator[Provider]:
    """torch.compile of the reference, where it is wanted."""
    if not session.compiles:
        return
    if mode == "double backward":
        reason = "torch.compile does not differentiate twice (pytorch#91469)"
        yield Provider("torch.compile", None, reason, ours=False)
        return
    torch.compiler.reset()  # each case is one shape: no limit of recompilations
    function = torch.compile(reference, fullgraph=True, dynamic=False)
    yield Provider("torch.compile", call(function), ours=False)
