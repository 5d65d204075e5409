"""Stopwatches, and the one way everything is timed: interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch

Call = Callable[[], Any]

LONG = 50_000_000
"""Nanoseconds, beside which what the previous provider left behind does not count."""


class Timing(NamedTuple):
    median_us: float
    p20_us: float
    p80_us: float
    n: int


class Stopwatch(Protocol):
    def time(self, call: Call) -> Any: ...

    def read(self, ticket: Any) -> float: ...

    def synchronize(self) -> None: ...


class HostStopwatch:
    """The clock of the processor."""

    def time(self, call: Call) -> int:
        first = self._elapsed(call)
        if first > LONG:
            return first
        # The first call has paid for what the previous provider left in caches and allocator.
        return self._elapsed(call)

    def _elapsed(self, call: Call) -> int:
        start = time.perf_counter_ns()
        call()
        return time.perf_counter_ns() - start

    def read(self, ticket: int) -> float:
        return ticket / 1e3

    def synchronize(self) -> None:
        pass


class CudaStopwatch:
    """The clock of the GPU, with the L2 cache overwritten before each call."""

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        l2 = getattr(properties, "L2_cache_size", 0) or 2**26
        self._device = device
        self._scratch = torch.empty(2 * l2, dtype=torch.uint8, device=device)

    def time(self, call: Call) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self._device):
            self._scratch.zero_()
            start.record()
            call()
            end.record()
        return start, end

    def read(self, ticket: tuple[torch.cuda.Event, torch.cuda.Event]) -> float:
        start, end = ticket
        return start.elapsed_time(end) * 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)


def stopwatch(device: torch.device) -> Stopwatch:
    return CudaStopwatch(device) if device.type == "cuda" else HostStopwatch()


def interleaved(
    calls: Mapping[str, Call],
    watch: Stopwatch,
    seconds: float,
    least: int = 5,
    most: int = 1000,
) -> dict[str, Timing]:
    """Time A B C A B C … for `seconds`, so that a drift of the machine meets all alike."""
    tickets: dict[str, list[Any]] = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds
    for done in range(most):
        if done >= least and time.perf_counter() > deadline:
            break
        for name, call in calls.items():
            tickets[name].append(watch.time(call))
        watch.synchronize()
    return {name: summary([watch.read(t) for t in taken]) for name, taken in tickets.items()}


def summary(samples: list[float]) -> Timing:
    p20, median, p80 = (
        torch.tensor(samples, dtype=torch.float64)
        .quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
        .tolist()
    )
    return Timing(median, p20, p80, len(samples))


def graphed(call: Call, device: torch.device) -> Call:
    """The call captured in a CUDA graph: its kernels without the time to launch them."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        call()
    return graph.replay
