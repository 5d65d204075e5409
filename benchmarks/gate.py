"""No timing without agreement with the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Elements:
    """Each element within 4 units of rounding of its dtype: a formulation out of PyTorch's
    operators rounds four times.

    A sum of `terms` numbers with the 2-norm `norm` errs by a rounding of each of them, and by one
    of a partial sum, which grows to `norm`, at each addition in the accumulation type.
    """

    name: str
    value: Tensor  # float64
    dtype: torch.dtype
    norm: Tensor | None = None
    terms: int = 0

    def excess(self, output: Tensor | None) -> float:
        """The largest error as a multiple of the tolerance. None stands for zeros."""
        if output is None:
            return 0.0 if not self.value.any() else math.inf
        if output.shape != self.value.shape:
            return math.inf
        precision = torch.finfo(self.dtype)
        tolerance = self.value.abs().mul_(4 * precision.eps).add_(precision.tiny)
        if self.norm is not None:
            accumulation = torch.promote_types(self.dtype, torch.float32)
            per_norm = precision.eps + math.sqrt(self.terms) * torch.finfo(accumulation).eps
            tolerance += 4 * per_norm * self.norm
        error = (output.double() - self.value).abs_().div_(tolerance)
        return _largest(error)


@dataclass
class Vector:
    """‖output - value‖ <= relative * max(‖value‖, floor), for what a whole network computes."""

    name: str
    value: Tensor  # float64
    relative: float
    floor: float

    def excess(self, output: Tensor | None) -> float:
        output = torch.zeros_like(self.value) if output is None else output.double()
        if output.shape != self.value.shape:
            return math.inf
        scale = max(self.value.norm().item(), self.floor)
        return _largest((output - self.value).norm() / (self.relative * scale))


def _largest(error: Tensor) -> float:
    """The maximum; a NaN is as wrong as can be."""
    worst = error.max().item() if error.numel() else 0.0
    return math.inf if math.isnan(worst) else worst


@torch.no_grad()
def check(
    outputs: Sequence[Tensor | None], expected: Sequence[Elements | Vector]
) -> tuple[float, str]:
    """The largest error as a multiple of its tolerance, and what is wrong if that is above 1."""
    if len(outputs) != len(expected):
        return math.inf, f"{len(outputs)} results, expected {len(expected)}"
    errors = {wanted.name: wanted.excess(output) for output, wanted in zip(outputs, expected)}
    worst = max(errors, key=errors.__getitem__)
    wrong = [f"{name}: error {error:.3g} x tolerance" for name, error in errors.items() if error > 1]
    return errors[worst], "; ".join(wrong[:3]) + (" …" if len(wrong) > 3 else "")
