"""What the torch.library operators share: registration, and the layout of tensors for kernels."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import torch

from ..backends.geometry import Geometry, Tail

NAMESPACE = "stylegan_fast"
_library = torch.library.Library(NAMESPACE, "DEF")


def define(name: str, schema: str, implementation: Any, fake: Any) -> Any:
    """The operator stylegan_fast::name."""
    _library.define(f"{name}{schema}")
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def mask_size(numel: int) -> int:
    """Two bytes for every 8 elements: v <= 0, and clamped."""
    return (numel + 7) // 8 * 2


def laid_out(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """t with the strides of `like`, which is dense; a copy only where they differ."""
    return t if t.stride() == like.stride() else torch.empty_like(like).copy_(t)


def geometry(y: torch.Tensor, dim: int, per_sample: bool) -> Geometry:
    """Any order of dimensions will do: what counts is the stride of the channels."""
    channels = y.shape[dim] if y.ndim else 1
    pixels = math.prod(y.shape[2:]) if per_sample else y.numel() // channels
    # One channel has no stride of its own; a plane never holds more than a sample.
    inner = y.stride(dim) if channels > 1 else pixels
    return Geometry(y.numel() // (channels * inner), channels, inner, pixels)


def channel_total(x: torch.Tensor, dim: int, wanted: bool) -> torch.Tensor:
    """Room for the sum over all but the channels; empty where it is not wanted."""
    size = (x.shape[dim] if x.ndim else 1) if wanted else 0
    return torch.empty(size, dtype=accumulation_dtype(x.dtype), device=x.device)


def operand(t: torch.Tensor | None, x: torch.Tensor, *shape: int) -> torch.Tensor | None:
    """An operand in the accumulation type, dense."""
    if t is None:
        return None
    return t.detach().to(accumulation_dtype(x.dtype)).reshape(shape).contiguous()


def scale_operand(scale: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    return None if scale is None else operand(scale, x, x.shape[0], x.shape[1])


def noise_operand(noise: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """[pixels] or [N, pixels] from [H, W], [1, 1, H, W] or [N, 1, H, W]."""
    if noise is None:
        return None
    pixels = noise.shape[-2] * noise.shape[-1]
    shared = noise.ndim < 4 or noise.shape[0] == 1
    return operand(noise, x, pixels) if shared else operand(noise, x, noise.shape[0], pixels)


def tail(x, scale, noise, strength, b, act, alpha, gain, clamp) -> Tail:
    """An epilogue for an image of x's type, as the kernels take it; noise is as large as theirs."""
    return Tail(
        scale_operand(scale, x),
        noise_operand(noise, x),
        operand(strength, x, 1),
        None if b is None else b.contiguous(),
        act,
        alpha,
        gain,
        clamp,
    )


def tensor_positions(*arguments: Any) -> list[int]:
    """Which arguments of a Function are tensors: those have an edge in its graph."""
    return [i for i, argument in enumerate(arguments) if isinstance(argument, torch.Tensor)]


def needed_gradients(ctx: Any, positions: list[int]) -> list[bool]:
    """ctx.needs_input_grad, less what leads to none of the tensors this backward pass is for: a
    Function in Python is told of every input that requires a gradient."""
    needs = list(ctx.needs_input_grad)
    runs = getattr(torch._C, "_will_engine_execute_node", None)
    if runs is None or torch.compiler.is_compiling():
        return needs
    for i, (node, _) in zip(positions, ctx.next_functions):
        if needs[i] and node is not None:
            with suppress(RuntimeError):  # torch.autograd.grad does not tell of leaves
                needs[i] = runs(node)
    return needs
