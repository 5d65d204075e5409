"""Exponential moving average of a network's weights."""

from __future__ import annotations

import torch
from torch import nn


def ema_beta(batch: int, half_life: float, images_seen: int, ramp_up: float | None) -> float:
    """½^(batch / h), h = min(half_life, ramp_up · images_seen): an average's share after a batch.

    All counts are of images. While training is young the half-life is this fraction of its age, so
    that the first weights are soon forgotten; None: no ramp-up.
    """
    if ramp_up is not None:
        half_life = min(half_life, ramp_up * images_seen)
    return 0.5 ** (batch / half_life) if half_life > 0 else 0.0


@torch.no_grad()
def update_ema(average: nn.Module, network: nn.Module, beta: float) -> None:
    """average ← beta · average + (1 - beta) · network for parameters; buffers are copied."""
    for parameter, current in zip(average.parameters(), network.parameters(), strict=True):
        parameter.lerp_(current, 1 - beta)
    for buffer, source in zip(average.buffers(), network.buffers(), strict=True):
        buffer.copy_(source)
