"""Argument checks whose messages name the argument, show its value and say what is expected."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral

from torch import Tensor

from .._checks import check_number


def check_shape(name: str, tensor: Tensor | None, *sizes: int | str) -> Tensor:
    """The tensor; ValueError unless it has these sizes. A string names a size that is free."""
    if (
        tensor is None
        or tensor.ndim != len(sizes)
        or any(
            not isinstance(want, str) and got != want
            for got, want in zip(tensor.shape, sizes, strict=True)
        )
    ):
        expected = ", ".join(map(str, sizes))
        got = f"{name}=None" if tensor is None else f"{name}.shape={tuple(tensor.shape)}"
        raise ValueError(f"expected {name} of shape [{expected}], got {got}")
    return tensor


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """ValueError unless `value` is one of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")


def check_clamp(conv_clamp: float | None) -> float | None:
    """The value; TypeError or ValueError unless it is None or a number not below 0."""
    if conv_clamp is not None:
        check_number("conv_clamp", conv_clamp, minimum=0)
    return conv_clamp


def check_resolution(name: str, value: int, least: int = 4) -> None:
    """ValueError unless `value` is a power of two and at least `least`."""
    if not isinstance(value, Integral) or value < least or value & (value - 1):
        raise ValueError(f"{name}={value!r} must be a power of two and at least {least}")
