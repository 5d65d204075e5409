"""Bias, activation, gain and clamp in one pass."""

from __future__ import annotations

import torch

from .._checks import as_int, autocast_enabled, check_number, check_same, check_tensor
from ..activations import activation
from ..backends import select
from ..reference.bias_act import bias_act as reference_bias_act
from .epilogue import epilogue


def bias_act(
    x: torch.Tensor,  # any shape
    b: torch.Tensor | None = None,  # [x.shape[dim]]
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """y = min(max(gain * act(x + b; alpha), -clamp), clamp)

    | act      | act(z; alpha)                | default alpha | default gain |
    |----------|------------------------------|---------------|--------------|
    | linear   | z                            |               | 1            |
    | relu     | max(z, 0)                    |               | sqrt(2)      |
    | lrelu    | z if z > 0 else alpha * z    | 0.2           | sqrt(2)      |
    | tanh     | tanh(z)                      |               | 1            |
    | sigmoid  | 1 / (1 + exp(-z))            |               | 1            |
    | elu      | z if z > 0 else exp(z) - 1   |               | 1            |
    | selu     | torch.nn.functional.selu(z)  |               | 1            |
    | softplus | log(1 + exp(z))              |               | 1            |
    | swish    | z / (1 + exp(-z))            |               | sqrt(2)      |

    Args:
        x: any shape, float64, float32, float16 or bfloat16. 16-bit types compute in float32.
        b: bias `[x.shape[dim]]` of x's dtype and device, or None.
        dim: the dimension of x that b runs along, 0 <= dim < x.ndim; ignored where b is None.
        alpha, gain: None takes the table's default.
        clamp: None or >= 0.
        backend: None chooses; else 'reference', 'cpu', 'triton' or 'cuda'.

    Returns:
        Shape, dtype and memory format of x (a tensor with gaps or overlaps is made dense once).

    Gradients: first and second order with respect to x and b, any order for linear, relu and lrelu;
    the third derivative of another activation raises NotImplementedError (backend='reference' has
    every order). Under torch.func transforms and in forward mode the reference is chosen; another
    backend raises NotImplementedError. Clamped elements get zero gradient, as decided before
    rounding; a tie with the clamp keeps it; relu and lrelu at 0 take the negative branch. NaN stays
    NaN.

    Autocast: computes and returns in x's dtype; under autocast b is cast to it.

    Raises:
        TypeError: x is not a floating-point tensor, b has another dtype, or alpha, gain or clamp is
            not a number. ValueError: wrong shape, dim, device, or clamp < 0. KeyError: unknown act.
        RuntimeError: the explicitly chosen backend cannot run this.

    The originals' `bias_act` and, with act='lrelu', their `fused_leaky_relu`.
    """
    check_tensor("x", x)
    row = activation(act)
    if b is not None:
        dim = as_int("dim", dim)
        b = check_bias(b, x, dim)
    else:
        dim = min(1, x.ndim - 1)
    alpha = row.alpha if alpha is None else check_number("alpha", alpha)
    gain = row.gain if gain is None else check_number("gain", gain)
    if clamp is not None:
        clamp = check_number("clamp", clamp, minimum=0)

    name = select("bias_act", x, backend)
    if name == "reference":
        return reference_bias_act(x, b, dim, act, alpha, gain, clamp)
    if b is None and clamp is None and gain == 1 and act == "linear":
        return x
    return epilogue(x, None, None, None, b, dim, act, alpha, gain, clamp, name)


def check_bias(b: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
    if not 0 <= dim < x.ndim:
        raise ValueError(f"dim must be in [0, {x.ndim}) for x.shape={tuple(x.shape)}, got {dim=}")
    check_tensor("b", b)
    if b.ndim != 1 or b.shape[0] != x.shape[dim]:
        raise ValueError(
            f"b must have the shape [{x.shape[dim]}] of dim {dim} of x.shape={tuple(x.shape)}, "
            f"got b.shape={tuple(b.shape)}"
        )
    if b.dtype != x.dtype and autocast_enabled(x):
        b = b.to(x.dtype)
    check_same("b", b, x)
    return b
