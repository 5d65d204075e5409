"""Comparisons whose tolerance follows from the dtype and the length of the reduction.

Used by `python -m stylegan_fast check`, by the benchmark suite's gates and by the tests.
"""

from __future__ import annotations

import math

import torch

_ROUNDINGS = 8
"""Roundings, each of at most eps/2, on the way to a result: operands, three to four operations, the
result, and a few units in the last place of exp or tanh."""


def tolerance(dtype: torch.dtype, reduction: int = 1, scale: float = 1.0) -> float:
    """Largest absolute error of a result of magnitude `scale` that sums `reduction` terms.

    16-bit types accumulate in float32: their own eps counts once per result and term rounded on the
    way in, float32's grows with the square root of the reduction, as independent errors do.
    """
    accumulation = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    eps = torch.finfo(dtype).eps
    return _ROUNDINGS * scale * (eps + accumulation * math.sqrt(reduction))


def assert_matches(
    actual: torch.Tensor, expected: torch.Tensor, *, reduction: int = 1, name: str = "result"
) -> float:
    """actual equals the float64 `expected` within `tolerance`; NaN and infinities coincide.

    Returns the largest error of a finite element as a fraction of the tolerance. AssertionError
    shows the first five elements that differ by more.
    """
    if actual.shape != expected.shape:
        raise AssertionError(
            f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        )
    if not actual.numel():
        return 0.0
    expected = expected.detach().to(torch.float64)
    values = actual.detach().to(torch.float64)
    finite = expected.isfinite()
    scale = expected[finite].abs().max().item() if finite.any() else 0.0
    limit = tolerance(actual.dtype, reduction, max(1.0, scale))
    errors = (values - expected).abs()
    same = (values == expected) | (values.isnan() & expected.isnan())
    wrong = ~torch.where(finite, errors <= limit, same)
    if wrong.any():
        lines = [
            f"  {tuple(index)}: {values[tuple(index)].item():.9g}, "
            f"expected {expected[tuple(index)].item():.9g}"
            for index in wrong.nonzero()[:5].tolist()
        ]
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are off by more than "
            f"{limit:.3g} ({actual.dtype}, reduction {reduction}):\n" + "\n".join(lines)
        )
    return errors[finite].max().item() / limit if finite.any() else 0.0


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected| in the Euclidean norm."""
    expected = expected.detach().to(torch.float64)
    difference = actual.detach().to(torch.float64) - expected
    return (difference.norm() / expected.norm().clamp(min=1e-300)).item()


def cosine(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Cosine of the angle between the two, as vectors."""
    a, b = (t.detach().to(torch.float64).flatten() for t in (actual, expected))
    return (a.dot(b) / (a.norm() * b.norm()).clamp(min=1e-300)).item()
