"""Which modules of other repositories this package stands in for: told by their dotted path and,
where that is as short as `op`, by the names of the files beside them. Nothing of theirs is read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

_FOLDER = os.path.dirname(os.path.abspath(__file__))


class Family(NamedTuple):
    """Modules `PARENT.NAME`, where the packages above them end with `parent`."""

    parent: str
    names: tuple[str, ...]
    folder: str
    """Of ours, where the files that replace them are."""
    siblings: frozenset[str] | None = None
    """The modules that must lie in their folder, and no others."""


_OP = frozenset({"fused_act", "upfirdn2d"})

FAMILIES = (
    Family(
        "torch_utils.ops",
        (
            "bias_act",
            "conv2d_gradfix",
            "conv2d_resample",
            "filtered_lrelu",
            "fma",
            "grid_sample_gradfix",
            "upfirdn2d",
        ),
        "torch_utils_ops",
    ),
    Family(
        "op",
        ("conv2d_gradfix", "fused_act", "upfirdn2d"),
        "rosinality_op",
        _OP | {"conv2d_gradfix"},
    ),
    Family("op", ("fused_act", "upfirdn2d"), "basicsr_ops", _OP),
    Family("basicsr.ops.fused_act", ("fused_act",), "basicsr_ops"),
    Family("basicsr.ops.upfirdn2d", ("upfirdn2d",), "basicsr_ops"),
    Family(
        "mmcv.ops",
        ("bias_act", "conv2d_gradfix", "filtered_lrelu", "fused_bias_leakyrelu", "upfirdn2d"),
        "mmcv_ops",
    ),
)

_NAMES = frozenset(name for family in FAMILIES for name in family.names)

SHIMS = {
    "dnnlib": "dnnlib",
    "dnnlib.util": "util",
    "torch_utils.misc": "misc",
    "torch_utils.persistence": "persistence",
}
"""Our files, by the names of the modules that network pickles import."""

SUPPLIED_PACKAGES = ("torch_utils", "torch_utils.ops")
"""Packages that are supplied, empty, where no repository has them."""


def families(module: str) -> list[Family]:
    """Those that have a module of this path."""
    parent, _, name = module.rpartition(".")
    if name not in _NAMES:
        return []
    return [
        family
        for family in FAMILIES
        if name in family.names and f".{parent}".endswith(f".{family.parent}")
    ]


class UnknownVariantError(Exception):
    """Why a module with the path of a known one is left alone."""


def replacement(module: str, folders: Sequence[str]) -> str | None:
    """Our file for this module, whose package lies in these folders; None where there is none."""
    candidates = families(module)
    if not candidates:
        return None
    beside = _modules_in(folders)
    for family in candidates:
        if family.siblings is None or family.siblings == beside:
            return os.path.join(_FOLDER, family.folder, module.rpartition(".")[2] + ".py")
    raise UnknownVariantError(f"its package has the modules {', '.join(sorted(beside)) or 'none'}")


def shim(module: str) -> str | None:
    """Our file for this module of the originals, for pickles."""
    return os.path.join(_FOLDER, "shims", f"{SHIMS[module]}.py") if module in SHIMS else None


def _modules_in(folders: Sequence[str]) -> set[str]:
    found = set()
    for folder in folders:
        try:
            files = os.listdir(folder)
        except OSError:
            continue
        stems = (os.path.splitext(name) for name in files)
        found |= {stem for stem, suffix in stems if suffix == ".py" and stem != "__init__"}
    return found
