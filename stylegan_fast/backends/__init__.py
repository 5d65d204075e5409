"""What can run here, and why not.

A choice is one ordered list per device type; every backend answers a request with None or with
the reason it cannot serve it. An automatic choice takes the first that can. An explicit one
(`backend=`, `use_backend`, `STYLEGAN_FAST_BACKEND`) is served or raises RuntimeError with the
reason.
"""

from __future__ import annotations

from types import ModuleType, NoneType

import torch
from torch.autograd import forward_ad

from .. import _env
from . import cpu, cuda, reference, triton

BACKENDS: dict[str, ModuleType] = {
    "reference": reference,
    "cpu": cpu,
    "triton": triton,
    "cuda": cuda,
}

AUTOMATIC = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

KERNEL_ORDERS = {
    "bias_act": "2nd order, any for linear, relu, lrelu",
    "upfirdn2d": "any order",
    "conv2d_resample": "any order",
    "modulated_conv2d": "2nd order, any for linear, relu, lrelu",
    "filtered_lrelu": "any order",
    "adain": "2nd order, any for linear, relu, lrelu",
}
"""Ops with kernels of their own on every compiled backend, and the derivatives these support."""

OPS = tuple(KERNEL_ORDERS)

TRANSFORMABLE_OPS = ("upfirdn2d",)
"""Ops whose kernels run inside torch.func transforms and forward mode, too."""

_requested: str | None = _env.choice("STYLEGAN_FAST_BACKEND", tuple(BACKENDS))
_selected: dict[tuple, str] = {}


class use_backend:
    """Run every op on the named backend, until the block ends; None chooses automatically again.

        with stylegan_fast.use_backend("reference"):
            ...
        stylegan_fast.use_backend("triton")     # without `with`: until changed

    The choice is process-wide. ValueError for an unknown name, RuntimeError with the reason if this
    machine cannot run the backend at all.
    """

    def __init__(self, name: str | None) -> None:
        global _requested
        if name is not None:
            reason = unavailable(name)
            if reason is not None:
                raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
        self._previous = _requested
        _requested = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        global _requested
        _requested = self._previous


def requested_backend() -> str | None:
    """The explicit choice in force, or None."""
    return _requested


def _backend(name: str) -> ModuleType:
    try:
        return BACKENDS[name]
    except (KeyError, TypeError):
        raise ValueError(
            f"backend={name!r} is unknown; choose one of {', '.join(BACKENDS)} or None"
        ) from None


def unavailable(name: str) -> str | None:
    """None, or why this machine cannot run the backend at all."""
    return _backend(name).unavailable()


def usable(device_type: str = "cpu", dtype: torch.dtype = torch.float32) -> list[str]:
    """Names of the backends that can run bias_act on this kind of tensor here."""
    return [name for name in BACKENDS if refusal(name, "bias_act", device_type, dtype) is None]


def refusal(name: str, op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """None, or why the backend cannot run the op on such a tensor."""
    backend = _backend(name)
    reason = backend.unavailable()
    if reason is None and device_type not in backend.device_types():
        reason = f"it runs on {' or '.join(backend.device_types())} tensors, x is on {device_type}"
    if reason is None and dtype not in backend.dtypes():
        names = ", ".join(str(known).removeprefix("torch.") for known in backend.dtypes())
        reason = f"it has kernels for {names}, x is {str(dtype).removeprefix('torch.')}"
    return reason


def select(op: str, x: torch.Tensor, backend: str | None = None) -> str:
    """The name of the backend that serves this call."""
    explicit = _requested if backend is None else backend
    if not isinstance(explicit, (str, NoneType)):
        _backend(explicit)
    if op not in TRANSFORMABLE_OPS and inside_transform():
        if explicit in (None, "reference"):
            return "reference"
        raise NotImplementedError(
            f"backend {explicit!r} cannot run {op} inside torch.func transforms or forward-mode "
            "differentiation; use backend='reference' there, which None chooses by itself"
        )
    return _select(op, x.device.type, x.dtype, explicit)


def inside_transform() -> bool:
    """Whether torch.func or forward mode differentiates this call: most kernels would lose that."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _select(op: str, device_type: str, dtype: torch.dtype, explicit: str | None) -> str:
    key = (op, device_type, dtype, explicit)
    name = _selected.get(key)
    if name is None:
        name = _selected[key] = _choose(*key)
    return name


# torch.compile then takes the result and traces nothing of how it is found. The mark is all that
# torch.compiler.assume_constant_result sets, but that imports Dynamo, and with it Triton.
_select._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _choose(op: str, device_type: str, dtype: torch.dtype, explicit: str | None) -> str:
    if explicit is not None:
        reason = refusal(explicit, op, device_type, dtype)
        if reason is not None:
            raise RuntimeError(
                f"backend {explicit!r} cannot run {op}: {reason}. "
                "`python -m stylegan_fast info` lists what can run here; backend=None chooses."
            )
        return explicit
    return automatic(op, device_type, dtype)


def automatic(op: str, device_type: str, dtype: torch.dtype) -> str:
    """The name of the backend that serves such a tensor where none is asked for."""
    for name in AUTOMATIC.get(device_type, ()):
        if refusal(name, op, device_type, dtype) is None:
            return name
    return "reference"
