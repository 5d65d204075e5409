"""Minibatch standard deviation (Karras et al., Progressive Growing of GANs, 2018)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import check_shape


class MinibatchStdLayer(nn.Module):
    """y = cat(x, t), t[n, f, h, w] = mean over channels of part f and pixels of √(var(x) + 1e-8).

    var is the biased variance within the group of sample n. The batch is split into N/G groups of
    G = min(group_size, N) samples (all N where group_size is None), sample n belonging to group
    n mod N/G; the channels are split into F = num_channels parts of consecutive channels.

    x [N, C, H, W] -> y [N, C + F, H, W]. Differentiable to any order. ValueError where N is not
    divisible by G or C not by F.
    """

    def __init__(self, group_size: int | None, num_channels: int = 1) -> None:
        super().__init__()
        if group_size is not None and group_size < 1:
            raise ValueError(f"group_size={group_size!r} must be None or at least 1")
        if num_channels < 1:
            raise ValueError(f"num_channels={num_channels!r} must be at least 1")
        self.group_size = group_size
        self.num_channels = num_channels

    def forward(self, x: Tensor) -> Tensor:
        check_shape("x", x, "N", "C", "H", "W")
        samples, channels, height, width = x.shape
        parts = self.num_channels
        group = samples if self.group_size is None else min(self.group_size, samples)
        group = max(group, 1)
        if samples % group:
            raise ValueError(
                f"a batch of {samples} is not divisible by group_size={group}; "
                "choose another batch size or group_size"
            )
        if channels % parts:
            raise ValueError(
                f"{channels} channels are not divisible by num_channels={parts}; "
                f"got x.shape={tuple(x.shape)}"
            )
        grouped = x.reshape(group, samples // group, parts, channels // parts, height, width)
        variance = (grouped - grouped.mean(dim=0)).square().mean(dim=0)
        std = (variance + 1e-8).sqrt()
        statistic = std.mean(dim=[2, 3, 4]).repeat(group, 1)
        return torch.cat([x, statistic[:, :, None, None].expand(-1, -1, height, width)], dim=1)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, num_channels={self.num_channels}"
