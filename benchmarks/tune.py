"""`bench --tune`: measures which convolutions of StyleGAN2's layers a backend's own kernel runs
faster than PyTorch's, and writes it where the library looks it up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..backends import choice
from ..backends.choice import KERNEL, PYTORCH
from .cases import Case
from .layers import ConvolutionLayer
from .terminal import Terminal, time_text
from .timing import interleaved, stopwatch
from .workload import Session

WORTH = 1.03
"""A choice that gains less is left to the cost model."""


def tune(cases: list[Case], session: Session, seconds: float, terminal: Terminal) -> int:
    """Exit status: 2 where the choices could not be kept."""
    watch = stopwatch(session.device)
    seen: set[str] = set()
    measured: dict[str, str] = {}
    for case in cases:
        work = ConvolutionLayer(case, session)
        layer: Callable[[], Any] = next(
            provider.call for provider in work.providers() if provider.name == "automatic"
        )
        with choice.asked() as keys:
            layer()
        for key in keys.keys() - seen:
            seen.add(key)
            timings = interleaved(
                {runner: _forced(layer, runner, key) for runner in (KERNEL, PYTORCH)},
                watch,
                seconds,
            )
            kernel, pytorch = (timings[runner].median_us for runner in (KERNEL, PYTORCH))
            faster = KERNEL if kernel < pytorch else PYTORCH
            if max(kernel, pytorch) > WORTH * min(kernel, pytorch):
                measured[key] = faster
            terminal.say(
                f"{key}: {faster} (layer {time_text(kernel)} by its kernel, "
                f"{time_text(pytorch)} by PyTorch)"
            )
    if not measured:
        terminal.say("nothing to choose: no backend here has a convolution of its own for these")
        return 0
    path = choice.path()
    if not choice.remember(session.device, measured):
        terminal.say(f"{path or 'STYLEGAN_FAST_CACHE=off'}: the choices could not be written")
        return 2
    terminal.say(f"{len(measured)} choices for {choice.machine(session.device)} in {path}")
    return 0


def _forced(layer: Callable[[], Any], runner: str, key: str) -> Callable[[], Any]:
    def call() -> Any:
        with choice.forced(runner, key):
            return layer()

    return call
