"""Argument checks shared by the public ops. Messages name argument, value and way out."""

from __future__ import annotations

import math
import numbers

import torch

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensor(name: str, x: object, *ranks: int) -> None:
    """x is a floating-point tensor, of one of `ranks` if any is given."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else x.layout
        raise TypeError(f"{name} must be a dense tensor, got the layout {layout}; convert {name}")
    if x.dtype not in _DTYPES:
        raise TypeError(
            f"{name}.dtype={x.dtype} is not supported; "
            f"convert {name} to float32, float16, bfloat16 or float64"
        )
    if ranks and x.ndim not in ranks:
        raise ValueError(
            f"{name} must have {' or '.join(map(str, ranks))} dimensions, "
            f"got {name}.shape={tuple(x.shape)}"
        )


def check_device(name: str, t: torch.Tensor, x: torch.Tensor) -> None:
    """t lives where x lives."""
    if t.device != x.device:
        raise ValueError(
            f"{name}.device={t.device} but x.device={x.device}; use {name}.to(x.device)"
        )


def check_same(name: str, t: torch.Tensor, x: torch.Tensor) -> None:
    """t has the device and the dtype of x."""
    check_device(name, t, x)
    if t.dtype != x.dtype:
        raise TypeError(f"{name}.dtype={t.dtype} but x.dtype={x.dtype}; use {name}.to(x.dtype)")


def as_int(name: str, value: object, minimum: int | None = None, maximum: int = 2**40) -> int:
    """value, a Python or NumPy integer from `minimum` to `maximum`, as an int."""
    if not isinstance(value, (int, numbers.Integral)) or isinstance(value, bool):
        raise TypeError(f"{name} takes integers, got {value!r}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")
    number = int(value)
    if abs(number) > maximum:
        raise ValueError(f"{name} must not exceed {maximum}, got {value!r}")
    return number


def check_number(name: str, value: object, minimum: float | None = None) -> float:
    """value, a finite Python or NumPy real number not below `minimum`, as a float."""
    if not isinstance(value, (int, float, numbers.Real)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {name}={value!r}")
    if not isinstance(value, float):
        try:
            value = float(value)
        except OverflowError:
            raise ValueError(f"{name} is too large for a float, got {name}={value!r}") from None
    if abs(value) == math.inf or value != value:
        raise ValueError(f"{name} must be finite, got {name}={value!r}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {name}={value!r}")
    return value


def autocast_enabled(x: torch.Tensor) -> bool:
    """Whether operators on x's device choose their own dtype here."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)
