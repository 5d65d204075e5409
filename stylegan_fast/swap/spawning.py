"""The hook in processes that are spawned: installing it travels with what `multiprocessing` sends
each of them before it imports anything of the script."""

from __future__ import annotations

import sys
from functools import wraps
from typing import Any

from . import patching, state

PREPARATION = "multiprocessing.spawn"
STARTERS = (
    "multiprocessing.popen_forkserver",
    "multiprocessing.popen_spawn_posix",
    "multiprocessing.popen_spawn_win32",
)
"""Modules that are first imported when a process is spawned."""


def follow() -> None:
    """Install the hook in the processes that this one will spawn."""
    spawn: Any = sys.modules[PREPARATION]
    original = spawn.get_preparation_data
    if getattr(original, "_stylegan_fast", False):
        return

    @wraps(original)
    def get_preparation_data(name):
        state.report.routed["processes spawned"] = "have the swap installed, too"
        return {**original(name), "stylegan_fast.swap": _Installation()}

    get_preparation_data._stylegan_fast = True  # type: ignore[attr-defined]
    patching.set_global(vars(spawn), "get_preparation_data", get_preparation_data)


class _Installation:
    """Installs the hook where it is unpickled."""

    def __reduce__(self):
        return _install, (state.pickles, state.device)


def _install(pickles: bool, device: str | None) -> None:
    from . import hook

    hook.install(pickles=pickles, device=device)
