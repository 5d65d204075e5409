"""Other people's implementations, imported from a checkout and called by their public contract.

Families, told apart by the files present:

    torch_utils/ops/bias_act.py   bias_act(x, b, dim, act, alpha, gain, clamp, impl='ref' | 'cuda')
                    upfirdn2d.py  upfirdn2d(x, f, up, down, padding, flip_filter, gain, impl)
                    filtered_lrelu.py  filtered_lrelu(x, fu, fd, b, up, down, padding, gain, slope,
                                       clamp, flip_filter, impl), in the later release
    op/                           fused_leaky_relu(input, bias, negative_slope, scale)
                                  upfirdn2d(input, kernel, up, down, pad), of which pad is (before,
                                  after) on both axes

The first also has `training/networks.py` or `training/networks_stylegan2.py`, whose Generator and
Discriminator have the names of ours and take our weights.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ..backends.geometry import Fir
from .machine import git_commit

BiasAct = Callable[[Tensor, Tensor, float], Tensor]
Upfirdn2d = Callable[[Tensor, Tensor, Fir], Tensor]

_TOP_LEVEL = ("torch_utils", "dnnlib", "training", "op", "model", "models", "R3GAN")


@dataclass(frozen=True)
class Peer:
    name: str
    root: Path
    detail: str = ""
    """Its commit."""
    problem: str = ""
    """Why it cannot be timed, if it cannot."""
    bias_act: BiasAct | None = None
    """(x, b, clamp) -> clamp(√2 · lrelu(x + b))"""
    upfirdn2d: Upfirdn2d | None = None
    upfirdn2d_problem: str = ""
    filtered_lrelu: Callable[..., Tensor] | None = None
    filtered_lrelu_problem: str = "this checkout has no filtered_lrelu"
    networks: ModuleType | None = None
    networks_problem: str = "this family's networks differ from ours"
    networks3: ModuleType | None = None
    networks3_problem: str = "this checkout has no StyleGAN3"
    modules: dict[str, ModuleType] = field(default_factory=dict)

    @contextlib.contextmanager
    def imported(self) -> Iterator[None]:
        """Inside, its modules are found by their names again: networks pickle themselves."""
        others = _taken_out()
        sys.modules.update(self.modules)
        try:
            yield
        finally:
            _taken_out()
            sys.modules.update(others)


def load(path: str, device: torch.device) -> Peer:
    """Import a checkout. What goes wrong is in `problem` and the other problems."""
    root = Path(path).expanduser().resolve()
    name = f"peer:{root.name}"
    if not root.is_dir():
        return Peer(name, root, problem=f"--peer {path}: there is no such folder")
    commit, dirty = git_commit(root)
    detail = f"at {commit[:12]}{' with changes' if dirty else ''}" if commit else ""
    if (root / "torch_utils" / "ops" / "bias_act.py").is_file():
        bias_act_of, upfirdn2d_of = _torch_utils_bias_act, _torch_utils_upfirdn2d
    elif (root / "op").is_dir():
        bias_act_of, upfirdn2d_of = _op_bias_act, _op_upfirdn2d
    else:
        problem = f"--peer {path} has neither torch_utils/ops/bias_act.py nor op/"
        return Peer(name, root, detail, problem)
    with importing(root, device):
        try:
            bias_act = bias_act_of(device)
            # Extensions are compiled at the first call, and imports inside functions run then.
            bias_act(torch.ones(1, 2, 3, 3, device=device), torch.ones(2, device=device), 256.0)
        except Exception as error:
            return Peer(name, root, detail, f"import failed: {one_line(error)}")
        peer = Peer(name, root, detail, bias_act=bias_act)
        try:
            upfirdn2d = upfirdn2d_of(device)
            image, f = (torch.ones(shape, device=device) for shape in ((1, 2, 3, 3), (2, 2)))
            upfirdn2d(image, f, Fir(2, 2, 1, 1, 1, 0, 1, 0, False, 1.0))
            peer = replace(peer, upfirdn2d=upfirdn2d)
        except Exception as error:
            peer = replace(peer, upfirdn2d_problem=f"import failed: {one_line(error)}")
        if (root / "torch_utils" / "ops" / "filtered_lrelu.py").is_file():
            try:
                function = importlib.import_module("torch_utils.ops.filtered_lrelu").filtered_lrelu
                function = functools.partial(function, impl=_impl(device))
                function(torch.ones(1, 2, 3, 3, device=device))
                peer = replace(peer, filtered_lrelu=function, filtered_lrelu_problem="")
            except Exception as error:
                peer = replace(peer, filtered_lrelu_problem=f"import failed: {one_line(error)}")
        peer = replace(peer, **_networks_of(root, "networks", "networks_stylegan2", "networks"))
        peer = replace(peer, **_networks_of(root, "networks3", "networks_stylegan3"))
        return replace(peer, modules={name: sys.modules[name] for name in _names()})


def _networks_of(root: Path, kind: str, *modules: str) -> dict[str, Any]:
    """Of the first of these modules that the checkout has."""
    for module in modules:
        if (root / "training" / f"{module}.py").is_file():
            try:
                return {
                    kind: importlib.import_module(f"training.{module}"),
                    f"{kind}_problem": "",
                }
            except Exception as error:
                return {f"{kind}_problem": f"import failed: {one_line(error)}"}
    return {}


def peer_generator(module: Any, size: dict[str, Any], synthesis: dict[str, Any]) -> Any:
    """The earlier release of the originals takes the synthesis network's arguments as a dictionary,
    the later one takes them as they are."""
    try:
        return module.Generator(**size, **synthesis)
    except TypeError:
        return module.Generator(**size, synthesis_kwargs=synthesis)


def one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _impl(device: torch.device) -> str:
    return "cuda" if device.type == "cuda" else "ref"


def _torch_utils_bias_act(device: torch.device) -> BiasAct:
    function = importlib.import_module("torch_utils.ops.bias_act").bias_act
    impl = _impl(device)
    return lambda x, b, clamp: function(x, b, act="lrelu", clamp=clamp, impl=impl)


def _torch_utils_upfirdn2d(device: torch.device) -> Upfirdn2d:
    function = importlib.import_module("torch_utils.ops.upfirdn2d").upfirdn2d
    impl = _impl(device)

    def upfirdn2d(x: Tensor, f: Tensor, fir: Fir) -> Tensor:
        return function(x, f, *fir.arguments(), impl)

    return upfirdn2d


def _op_bias_act(device: torch.device) -> BiasAct:
    function = importlib.import_module("op").fused_leaky_relu
    return lambda x, b, clamp: function(x, b).clamp(-clamp, clamp)


def _op_upfirdn2d(device: torch.device) -> Upfirdn2d:
    function = importlib.import_module("op").upfirdn2d

    def upfirdn2d(x: Tensor, f: Tensor, fir: Fir) -> Tensor:
        if (fir.x0, fir.x1) != (fir.y0, fir.y1):
            raise ValueError(f"this family pads both axes alike, {fir} does not")
        kernel = f if f.ndim == 2 else f.outer(f)
        kernel = kernel.flip((0, 1)) if fir.flip_filter else kernel
        pad = (fir.x0, fir.x1)
        return function(x, kernel * fir.gain, up=fir.up_x, down=fir.down_x, pad=pad)

    return upfirdn2d


@contextlib.contextmanager
def importing(root: Path, device: torch.device, stand_ins: bool = True) -> Iterator[None]:
    """Inside, the checkout's packages are found, and only its own; after, none is left behind."""
    others = _taken_out()
    sys.path.insert(0, str(root))
    try:
        with _stand_ins(device) if stand_ins else contextlib.nullcontext():
            yield
    finally:
        sys.path.remove(str(root))
        _taken_out()
        sys.modules.update(others)


@contextlib.contextmanager
def _stand_ins(device: torch.device) -> Iterator[None]:
    """For `pkg_resources`, which newer versions of setuptools lack. Without a GPU the extensions
    that the op/ family compiles at import are left out: on the CPU it calls none."""
    missing = importlib.util.find_spec("pkg_resources") is None
    if missing:
        versions = ModuleType("pkg_resources")
        vars(versions)["parse_version"] = torch.torch_version.TorchVersion
        sys.modules["pkg_resources"] = versions
    without_extensions: Any = contextlib.nullcontext()
    if device.type != "cuda":
        extension = importlib.import_module("torch.utils.cpp_extension")
        without_extensions = mock.patch.object(extension, "load", return_value=None)
    try:
        with without_extensions:
            yield
    finally:
        if missing:
            del sys.modules["pkg_resources"]


def _taken_out() -> dict[str, ModuleType]:
    """Modules with a checkout's names, removed from sys.modules."""
    return {name: sys.modules.pop(name) for name in _names()}


def _names() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] in _TOP_LEVEL]
