"""The activation table: the one place where an activation is defined.

`value`, `slope` and `curvature` are f(v), f'(v) and f''(v) in a small language that is valid
Python and, with its numbers cast, valid C++: arithmetic, comparisons and the functions where,
exp, expm1, log1p, tanh, sigmoid, square. `tools/generate_activations.py` writes them out as
`csrc/activations.h` and `kernels/activations.py`.

A piecewise-linear activation has the slope 1 where v > 0 and `negative_slope` elsewhere, so a
backward pass needs one bit of v (two with a clamp) and neither input nor output.
Conventions at the kinks are those of PyTorch: relu, lrelu and selu at 0 take the negative branch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_SELU_SCALE = 1.0507009873554805
_SELU_SCALE_ALPHA = _SELU_SCALE * 1.6732632423543773


@dataclass(frozen=True)
class Activation:
    name: str
    code: int
    alpha: float
    """Default of the argument alpha; only lrelu reads it."""
    gain: float
    """Default of the argument gain."""
    value: str
    slope: str = ""
    curvature: str = ""

    @property
    def curved(self) -> bool:
        return bool(self.curvature)

    def negative_slope(self, alpha: float) -> float:
        """Derivative on the negative branch of a piecewise-linear activation."""
        return {"linear": 1.0, "relu": 0.0, "lrelu": alpha}[self.name]


_TABLE = (
    Activation("linear", 1, 0.0, 1.0, "v"),
    Activation("relu", 2, 0.0, math.sqrt(2), "where(v <= 0, 0, v)"),
    Activation("lrelu", 3, 0.2, math.sqrt(2), "where(v > 0, v, alpha * v)"),
    Activation(
        "tanh", 4, 0.0, 1.0,
        "tanh(v)",
        "1 - square(tanh(v))",
        "-2 * tanh(v) * (1 - square(tanh(v)))",
    ),
    Activation(
        "sigmoid", 5, 0.0, 1.0,
        "sigmoid(v)",
        "sigmoid(v) * sigmoid(-v)",
        "sigmoid(v) * sigmoid(-v) * (1 - 2 * sigmoid(v))",
    ),
    Activation(
        "elu", 6, 0.0, 1.0,
        "where(v > 0, v, expm1(v))",
        "where(v > 0, 1, exp(v))",
        "where(v < 0, exp(v), 0)",
    ),
    Activation(
        "selu", 7, 0.0, 1.0,
        f"where(v > 0, {_SELU_SCALE} * v, {_SELU_SCALE_ALPHA} * expm1(v))",
        f"where(v > 0, {_SELU_SCALE}, {_SELU_SCALE_ALPHA} * exp(v))",
        f"where(v < 0, {_SELU_SCALE_ALPHA} * exp(v), 0)",
    ),
    Activation(
        "softplus", 8, 0.0, 1.0,
        "where(v > 20, v, log1p(exp(v)))",
        "where(v > 20, 1, sigmoid(v))",
        "where(20 <= v, 0, sigmoid(v) * sigmoid(-v))",
    ),
    Activation(
        "swish", 9, 0.0, math.sqrt(2),
        "v * sigmoid(v)",
        "sigmoid(v) * (1 + v * sigmoid(-v))",
        "sigmoid(v) * sigmoid(-v) * (2 + v * (1 - 2 * sigmoid(v)))",
    ),
)  # fmt: skip

ACTIVATIONS: dict[str, Activation] = {activation.name: activation for activation in _TABLE}


def activation(name: str) -> Activation:
    """The table's row of `name`. KeyError names the known ones."""
    try:
        return ACTIVATIONS[name]
    except (KeyError, TypeError):
        raise KeyError(f"act={name!r} is unknown; choose one of {', '.join(ACTIVATIONS)}") from None
