"""The import hook.

A replaced module is a file of ours, executed under the name that was asked for: with its own
globals, flags and signatures, and with none of the repository's file. Packages above it come from
the repository. Where a repository's module was imported earlier, its functions are replaced in
place, and wherever another module holds them.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import inspect
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import FunctionType, ModuleType

from . import known, patching, spawning, state
from .report import Report


class _Loader(SourceFileLoader):
    """Executes a file of ours under the name of another's, and notes what is missed there."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        from . import bygone  # not before: it imports PyTorch

        bygone.supply()

        def missing(name: str) -> None:
            if not name.startswith("__"):
                state.report.left[f"{module.__name__}.{name}"] = "unknown here, but asked for"
            raise AttributeError(f"stylegan_fast.swap has no {name!r} for {module.__name__}")

        module.__getattr__ = missing  # type: ignore[method-assign]


class _EmptyLoader(importlib.abc.Loader):
    def exec_module(self, module: ModuleType) -> None:
        pass


class _Replacements(importlib.abc.MetaPathFinder):
    """First of the finders."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in spawning.STARTERS:
            importlib.import_module(spawning.PREPARATION)
            spawning.follow()
            return None
        try:
            file = known.replacement(name, path or ())
        except known.UnknownVariantError as why:
            state.report.left[name] = str(why)
            return None
        if file is None:
            return None
        state.report.routed[name] = "instead of the repository's module"
        return _spec(name, file)


class _Packages(importlib.abc.MetaPathFinder):
    """Last of the finders: where nobody has them, the packages above the replaced modules, and what
    pickles need."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        shim = known.shim(name) if state.pickles else None
        if shim is not None:
            state.report.routed[name] = "for pickles, as there is none here"
            spec = _spec(name, shim)
            spec.submodule_search_locations = [] if name == "dnnlib" else None
            return spec
        if name not in known.SUPPLIED_PACKAGES:
            return None
        state.report.routed[name] = "an empty package, as there is none here"
        return ModuleSpec(name, _EmptyLoader(), is_package=True)


_FINDERS = (_Replacements(), _Packages())


def install(*, pickles: bool = False, device: str | None = None) -> Report:
    """Route other StyleGAN repositories' ops through this library, from here on.

    Their modules that are imported later are supplied by this library instead; of those imported
    earlier, the functions are replaced in place. A module that looks like a known one but differs
    is left alone. Installing twice is installing once.

    pickles: also supply what NVlabs' network pickles import, where their repository is absent. To
    load such a file is to execute the code it contains; `checkpoints.load_networks` does not.

    device: 'cpu' answers this thread's requests for a CUDA device by the CPU, for scripts that know
    no other device. None leaves devices alone.

    Returns the report, which grows with what is imported. ValueError for another device.
    """
    if device not in (None, "cpu"):
        raise ValueError(f"device={device!r} must be 'cpu' or None")
    state.pickles = state.pickles or pickles
    if not state.installed:
        state.installed = True
        state.report = Report()
        sys.meta_path.insert(0, _FINDERS[0])
        sys.meta_path.append(_FINDERS[1])
        try:
            for name, module in list(sys.modules.items()):
                if known.families(name) and isinstance(module, ModuleType):
                    _replace_in_place(name, module)
            if any(name in sys.modules for name in spawning.STARTERS):
                spawning.follow()
        except BaseException:
            uninstall()
            raise
    if device == "cpu":
        from . import device as devices

        state.device = device
        devices.enter()
    return state.report


def uninstall() -> Report:
    """Undo `install` and `convert`.

    What was replaced in place is put back; supplied modules are removed, so that the next import
    finds the repository's. Returns a report whose `left` names the supplied modules that others
    have already taken something from and go on using.
    """
    report = Report()
    patching.restore()
    if "stylegan_fast.swap.device" in sys.modules:
        sys.modules["stylegan_fast.swap.device"].leave()
    if not state.installed:
        return report
    state.installed = state.pickles = False
    state.device = None
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in _FINDERS]
    supplied = {name: module for name, module in list(sys.modules.items()) if _supplied(module)}
    for name in supplied:
        _remove(name)
    for name, users in _users(supplied).items():
        if users:
            who = ", ".join(sorted(users))
            report.left[name] = f"{who} will use stylegan_fast until imported again"
        else:
            report.routed[name] = "removed"
    return report


def _users(supplied: dict[str, ModuleType]) -> dict[str, set[str]]:
    """The names of the modules that hold these modules, or something of theirs."""
    origins: dict[int, tuple[str, object]] = {}
    for name, module in supplied.items():
        exported = [getattr(module, attribute) for attribute in getattr(module, "__all__", ())]
        origins |= {id(value): (name, value) for value in (module, *exported)}
    users: dict[str, set[str]] = {name: set() for name in supplied}
    for value, user, _ in patching.holders(value for _, value in origins.values()):
        if user.partition(".")[0] != "stylegan_fast":
            users[origins[id(value)][0]].add(user)
    return users


def _supplied(module: object) -> bool:
    loader = getattr(getattr(module, "__spec__", None), "loader", None)
    return isinstance(loader, (_Loader, _EmptyLoader))


def _remove(name: str) -> None:
    module = sys.modules.pop(name)
    parent, _, attribute = name.rpartition(".")
    if getattr(sys.modules.get(parent), attribute, None) is module:
        delattr(sys.modules[parent], attribute)


def _spec(name: str, file: str) -> ModuleSpec:
    spec = importlib.util.spec_from_file_location(name, file, loader=_Loader(name, file))
    assert spec is not None
    return spec


def _replace_in_place(name: str, module: ModuleType) -> None:
    file = getattr(module, "__file__", None)
    try:
        replacement = known.replacement(name, [os.path.dirname(file)] if file else [])
        assert replacement is not None
        ours = importlib.util.module_from_spec(_spec(name, replacement))
        ours.__spec__.loader.exec_module(ours)  # type: ignore[union-attr]
        pairs = list(_same_functions(module, ours))
    except known.UnknownVariantError as why:
        state.report.left[name] = str(why)
        return
    also = ", ".join(sorted(patching.rebind(pairs) - {name}))
    state.report.routed[name] = "its functions, in place" + (f", and in {also}" if also else "")


def _same_functions(module: ModuleType, ours: ModuleType):
    """(original, new) of every function. UnknownVariantError unless all are there and take the
    same."""
    for name in ours.__all__:
        new = getattr(ours, name)
        if not isinstance(new, FunctionType):
            continue
        original = getattr(module, name, None)
        if not isinstance(original, FunctionType):
            raise known.UnknownVariantError(f"it has no function {name}")
        if not _takes_the_same(original, new):
            raise known.UnknownVariantError(f"{name}{inspect.signature(original)} is unknown")
        yield original, new


def _takes_the_same(original: FunctionType, new: FunctionType) -> bool:
    """Whether the arguments of the original are the first of ours, or hidden by a decorator."""
    theirs = inspect.signature(original).parameters.values()
    anything = [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]
    hidden = [parameter.kind for parameter in theirs] == anything
    names = [parameter.name for parameter in theirs]
    return hidden or names == list(inspect.signature(new).parameters)[: len(names)]
