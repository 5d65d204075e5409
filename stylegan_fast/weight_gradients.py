"""Regularisers differentiate a network by its input; they need no gradient of its weights yet."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_open_blocks = 0


@contextmanager
def no_weight_gradients(disable: bool = True) -> Iterator[None]:
    """Inside the block no backward pass reaches the weight of a convolution.

        with stylegan_fast.no_weight_gradients():
            (g,) = torch.autograd.grad(D(image).sum(), image, create_graph=True)
        (gamma / 2 * g.square().sum([1, 2, 3]).mean()).backward()

    What is skipped is all that would flow, in a backward pass that runs inside the block, into the
    argument `w` of `conv2d_resample` or `weight` of `modulated_conv2d` (through the convolution and
    through the demodulation alike): those weights' `.grad` stays untouched, and asking
    `torch.autograd.grad` for them raises, or gives None with `allow_unused=True`. The gradients of
    everything else, the styles included, are unchanged, and so is the graph that
    `create_graph=True` records: the second derivative, taken outside the block, reaches the weights
    in full. Where the forward pass runs does not matter.

    `torch.autograd.grad(..., inputs)` prunes what leads to no input, so the weight gradient is not
    even computed; `.backward()` computes and drops it.

    Blocks nest; `disable=False` makes one a no-op. The state belongs to the process, not to the
    thread, because autograd runs the nodes of a GPU on threads of its own. A compiled graph
    (`torch.compile`) contains its backward pass and ignores the block.

    The originals' `conv2d_gradfix.no_weight_gradients`, except that theirs skips the convolution's
    own weight gradient only, which with a fused modulation silently drops the styles' gradient.
    """
    _count_blocks(int(bool(disable)))
    try:
        yield
    finally:
        _count_blocks(-int(bool(disable)))


def _count_blocks(change: int) -> None:
    global _open_blocks
    with _lock:
        _open_blocks += change


def weight_gradients_skipped() -> bool:
    return _open_blocks > 0


class _Skippable(torch.autograd.Function):
    """The identity, whose gradient is absent inside `no_weight_gradients`."""

    @staticmethod
    def forward(ctx, weight):
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        return None if weight_gradients_skipped() else grad

    @staticmethod
    def jvp(ctx, tangent):
        return tangent.view_as(tangent)


class _TransformableSkippable(_Skippable):
    """The same for torch.func, which costs more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight):  # type: ignore[override]
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


def skippable(weight: torch.Tensor) -> torch.Tensor:
    """weight, connected to its gradient except inside `no_weight_gradients`."""
    if weight.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        transformed = torch._C._are_functorch_transforms_active()
        identity = _TransformableSkippable if transformed else _Skippable
        return identity.apply(weight)
    return weight
