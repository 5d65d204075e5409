"""Other people's implementations, imported from a checkout and called by their public contract.

Families, told apart by the files present:

    torch_utils/ops/bias_act.py   bias_act(x, b, dim, act, alpha, gain, clamp, impl='ref' | 'cuda')
    op/                           fused_leaky_relu(input, bias, negative_slope, scale)

The first also has `training/networks.py` or `training/networks_stylegan2.py`, whose Generator and
Discriminator have the names of ours and take our weights.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .machine import git_commit

BiasAct = Callable[[Tensor, Tensor, float], Tensor]

_TOP_LEVEL = ("torch_utils", "dnnlib", "training", "op", "model")


@dataclass(frozen=True)
class Peer:
    name: str
    detail: str = ""
    """Its commit."""
    problem: str = ""
    """Why it cannot be timed, if it cannot."""
    bias_act: BiasAct | None = None
    """(x, b, clamp) -> clamp(√2 · lrelu(x + b))"""
    networks: ModuleType | None = None
    networks_problem: str = "this family's networks differ from ours"


def load(path: str, device: torch.device) -> Peer:
    """Import a checkout. What goes wrong is in `problem` and `networks_problem`."""
    root = Path(path).expanduser().resolve()
    name = f"peer:{root.name}"
    if not root.is_dir():
        return Peer(name, problem=f"--peer {path}: there is no such folder")
    commit, dirty = git_commit(root)
    detail = f"at {commit[:12]}{' with changes' if dirty else ''}" if commit else ""
    if (root / "torch_utils" / "ops" / "bias_act.py").is_file():
        family = _torch_utils
    elif (root / "op").is_dir():
        family = _op
    else:
        problem = f"--peer {path} has neither torch_utils/ops/bias_act.py nor op/"
        return Peer(name, detail, problem)
    with _importing(root, device):
        try:
            bias_act = family(device)
            # Extensions are compiled at the first call, and imports inside functions run then.
            bias_act(torch.ones(1, 2, 3, 3, device=device), torch.ones(2, device=device), 256.0)
        except Exception as error:
            return Peer(name, detail, f"import failed: {one_line(error)}")
        for module in ("networks_stylegan2", "networks"):
            if (root / "training" / f"{module}.py").is_file():
                try:
                    networks = importlib.import_module(f"training.{module}")
                except Exception as error:
                    problem = f"import failed: {one_line(error)}"
                    return Peer(name, detail, "", bias_act, None, problem)
                return Peer(name, detail, "", bias_act, networks, "")
    return Peer(name, detail, "", bias_act)


def one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _torch_utils(device: torch.device) -> BiasAct:
    function = importlib.import_module("torch_utils.ops.bias_act").bias_act
    impl = "cuda" if device.type == "cuda" else "ref"
    return lambda x, b, clamp: function(x, b, act="lrelu", clamp=clamp, impl=impl)


def _op(device: torch.device) -> BiasAct:
    function = importlib.import_module("op").fused_leaky_relu
    return lambda x, b, clamp: function(x, b).clamp(-clamp, clamp)


@contextlib.contextmanager
def _importing(root: Path, device: torch.device) -> Iterator[None]:
    """Inside, the checkout's packages are found, and only its own; after, none is left behind.

    `pkg_resources`, which newer versions of setuptools lack, is stood in for. Without a GPU the
    extensions that the op/ family compiles at import are left out: on the CPU it calls none.
    """
    others = _taken_out()
    stand_in = importlib.util.find_spec("pkg_resources") is None
    if stand_in:
        versions = ModuleType("pkg_resources")
        vars(versions)["parse_version"] = torch.torch_version.TorchVersion
        sys.modules["pkg_resources"] = versions
    without_extensions: Any = contextlib.nullcontext()
    if device.type != "cuda":
        extension = importlib.import_module("torch.utils.cpp_extension")
        without_extensions = mock.patch.object(extension, "load", return_value=None)
    sys.path.insert(0, str(root))
    try:
        with without_extensions:
            yield
    finally:
        sys.path.remove(str(root))
        _taken_out()
        sys.modules.update(others)
        if stand_in:
            del sys.modules["pkg_resources"]


def _taken_out() -> dict[str, ModuleType]:
    """Modules with a checkout's names, removed from sys.modules."""
    names = [name for name in sys.modules if name.split(".")[0] in _TOP_LEVEL]
    return {name: sys.modules.pop(name) for name in names}
