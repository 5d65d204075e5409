"""`bench --tune`: measures which convolutions of StyleGAN2's layers a backend's own kernel runs
faster than PyTorch's, and writes it where the library looks it up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from ..backends import choice
from ..backends.choice import KERNEL, PYTORCH
from .cases import Case
from .layers import ConvolutionLayer
from .peers import one_line
from .terminal import Terminal, time_text
from .timing import interleaved, stopwatch
from .workload import Session, alternatives

WORTH = 1.03
"""A choice that gains less is left to the cost model."""


def tune(
    cases: list[Case], session: Session, seconds: float, terminal: Terminal, most_seconds: float
) -> int:
    """Exit status: 1 where a layer failed, 2 where the choices could not be kept."""
    seen: set[str] = set()
    count = status = 0
    deadline = time.monotonic() + most_seconds
    for case in cases:
        if time.monotonic() > deadline:
            terminal.say("the time is up; what is left stays with the cost model")
            break
        try:
            for key, kernel, pytorch in _measured(case, session, seconds, seen):
                faster = KERNEL if kernel < pytorch else PYTORCH
                terminal.say(
                    f"{key}: {faster} (layer {time_text(kernel)} by its kernel, "
                    f"{time_text(pytorch)} by PyTorch)"
                )
                if max(kernel, pytorch) <= WORTH * min(kernel, pytorch):
                    continue
                if not choice.remember(session.device, {key: faster}):
                    where = choice.path() or "STYLEGAN_FAST_CACHE=off"
                    terminal.say(f"{where}: the choices could not be written")
                    return 2
                count += 1
        except Exception as error:
            terminal.say(f"{case}: {one_line(error)}", "bold red")
            status = 1
    if not seen:
        terminal.say("nothing to choose: no backend here has a convolution of its own for these")
    else:
        terminal.say(f"{count} choices for {choice.machine(session.device)} in {choice.path()}")
    return status


def _measured(
    case: Case, session: Session, seconds: float, seen: set[str]
) -> Iterator[tuple[str, float, float]]:
    """(key, µs by the kernel, µs by PyTorch) of every convolution in the layer that is not in
    `seen` yet, on every backend that has kernels of its own."""
    work = ConvolutionLayer(case, session)
    wanted = ("automatic", *alternatives(session.device.type, work.dtype))
    for name, layer, *_ in work.providers():
        if name not in wanted or layer is None:
            continue
        with choice.asked() as keys:
            layer()
        for key in keys.keys() - seen:
            seen.add(key)
            calls = {runner: _forced(layer, runner, key) for runner in (KERNEL, PYTORCH)}
            for call in calls.values():
                call()  # what is compiled or chosen at a first call is not timed
            timings = interleaved(calls, stopwatch(session.device), seconds)
            yield key, timings[KERNEL].median_us, timings[PYTORCH].median_us


def _forced(layer: Callable[[], Any], runner: str, key: str) -> Callable[[], Any]:
    def call() -> Any:
        with choice.forced(runner, key):
            return layer()

    return call
