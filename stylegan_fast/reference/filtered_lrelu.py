"""filtered_lrelu out of PyTorch's own operators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .bias_act import bias_act
from .upfirdn2d import upfirdn2d


def filtered_lrelu(
    x: torch.Tensor,  # [N, C, H, W]
    fu: torch.Tensor | None = None,
    fd: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    gain: float = math.sqrt(2),
    slope: float = 0.2,
    clamp: float | None = None,
    flip_filter: bool = False,
) -> torch.Tensor:
    """See `stylegan_fast.ops.filtered_lrelu`."""
    x = bias_act(x, b)
    x = upfirdn2d(x, fu, up, 1, padding, flip_filter, up**2)
    x = bias_act(x, None, 1, "lrelu", slope, gain, clamp)
    return upfirdn2d(x, fd, 1, down, 0, flip_filter)
