"""No timing without agreement with the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..testing import assert_matches


@dataclass
class Expected:
    """A result's float64 value, and how far from it one may be.

    Each element within the tolerance of its dtype and of the `terms` it sums; or, for what a whole
    network computes, ‖result - value‖ <= allowed.
    """

    name: str
    value: Tensor
    terms: int = 1
    allowed: float | None = None
    counted: Tensor | None = None
    """Which elements are compared, where not all are."""

    def error(self, result: Tensor | None) -> float:
        """As a fraction of what is allowed. AssertionError above 1. None stands for zeros."""
        result = torch.zeros_like(self.value) if result is None else result
        if self.allowed is None:
            return assert_matches(result, self.value, reduction=self.terms, name=self.name)
        difference = result.double() - self.value
        if self.counted is not None:
            difference = difference[self.counted]
        difference = difference.norm().item()
        assert difference <= self.allowed, f"{self.name}: off by {difference:.2g}"
        return difference / self.allowed


@torch.no_grad()
def check(results: Sequence[Tensor | None], expected: Sequence[Expected]) -> tuple[float, str]:
    """The largest error as a fraction of what is allowed, and what is wrong, if anything is."""
    if len(results) != len(expected):
        return math.inf, f"{len(results)} results, expected {len(expected)}"
    worst, wrong = 0.0, []
    for result, wanted in zip(results, expected):
        try:
            worst = max(worst, wanted.error(result))
        except AssertionError as failure:
            worst = math.inf
            wrong.append(str(failure).splitlines()[0].rstrip(":"))
    return worst, "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
