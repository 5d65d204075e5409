"""Other people's implementations, imported from a checkout and called by their public contract.

Families, told apart by the files present:

    torch_utils/ops/bias_act.py   bias_act(x, b, dim, act, alpha, gain, clamp, impl='ref' | 'cuda')
    op/                           fused_leaky_relu(input, bias, negative_slope, scale)

The first also has `training/networks.py` or `training/networks_stylegan2.py`, whose Generator and
Discriminator take our weights.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

from .machine import git_commit

_TOP_LEVEL = ("torch_utils", "dnnlib", "training", "op", "model")


@dataclass(frozen=True)
class Peer:
    name: str
    detail: str
    """Its commit."""
    problem: str = ""
    """Why it cannot be timed, if it cannot."""
    bias_act: Callable[[Tensor, Tensor, float], Tensor] | None = None
    """(x, b, clamp) -> clamp(√2 · lrelu(x + b))"""
    networks: ModuleType | None = None
    networks_problem: str = ""


def load(path: str, device: torch.device) -> Peer:
    """Import a checkout's ops, and its networks if they are of the family that has ours' names."""
    root = Path(path).expanduser().resolve()
    name = f"peer:{root.name}"
    if not root.is_dir():
        return Peer(name, "", f"--peer {path}: there is no such folder")
    commit, dirty = git_commit(root)
    detail = f"at {commit[:12]}{' with changes' if dirty else ''}" if commit else ""
    family = _family(root)
    if family is None:
        wanted = "torch_utils/ops/bias_act.py or op/"
        return Peer(name, detail, f"--peer {path}: no known layout, it has neither {wanted}")
    try:
        with _importing(root, device):
            bias_act = family(device)
            # Extensions are compiled at the first call, and imports inside functions run then.
            bias_act(torch.ones(1, 2, 3, 3, device=device), torch.ones(2, device=device), 256.0)
    except Exception as error:
        return Peer(name, detail, f"import failed: {_line(error)}")
    try:
        with _importing(root, device):
            networks, problem = _networks(root), ""
    except Exception as error:
        networks, problem = None, f"import failed: {_line(error)}"
    return Peer(name, detail, "", bias_act, networks, problem)


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def _family(root: Path) -> Callable | None:
    if (root / "torch_utils" / "ops" / "bias_act.py").is_file():
        return _torch_utils
    if (root / "op").is_dir():
        return _op
    return None


def _torch_utils(device: torch.device) -> Callable:
    module = importlib.import_module("torch_utils.ops.bias_act")
    impl = "cuda" if device.type == "cuda" else "ref"
    return lambda x, b, clamp: module.bias_act(x, b, act="lrelu", clamp=clamp, impl=impl)


def _op(device: torch.device) -> Callable:
    function = importlib.import_module("op").fused_leaky_relu
    return lambda x, b, clamp: function(x, b).clamp(-clamp, clamp)


def _networks(root: Path) -> ModuleType | None:
    for name in ("networks_stylegan2", "networks"):
        if (root / "training" / f"{name}.py").is_file():
            return importlib.import_module(f"training.{name}")
    return None


@contextlib.contextmanager
def _importing(root: Path, device: torch.device) -> Iterator[None]:
    """Inside, the checkout's packages are found, and only its own; after, none is left behind.

    `pkg_resources`, which newer versions of setuptools lack, is stood in for. Without a GPU the
    extensions that the op/ family compiles at import are left out: on the CPU it does not call them.
    """
    modules = {name: module for name, module in sys.modules.items() if _conflicts(name)}
    for name in modules:
        del sys.modules[name]
    sys.path.insert(0, str(root))
    with contextlib.ExitStack() as stack:
        if importlib.util.find_spec("pkg_resources") is None:
            stand_in = ModuleType("pkg_resources")
            stand_in.parse_version = torch.torch_version.TorchVersion
            stack.enter_context(mock.patch.dict(sys.modules, {"pkg_resources": stand_in}))
        if device.type != "cuda":
            extension = importlib.import_module("torch.utils.cpp_extension")
            left_out = mock.patch.object(extension, "load", lambda *a, **k: SimpleNamespace())
            stack.enter_context(left_out)
        try:
            yield
        finally:
            sys.path.remove(str(root))
            for name in [name for name in sys.modules if _conflicts(name)]:
                del sys.modules[name]
            sys.modules.update(modules)


def _conflicts(name: str) -> bool:
    return name.split(".")[0] in _TOP_LEVEL
