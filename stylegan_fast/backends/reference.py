"""Plain PyTorch: runs wherever PyTorch does, to any order of differentiation."""

from __future__ import annotations

import torch


def unavailable() -> None:
    return None


def device_types() -> tuple[str, ...]:
    return ("cpu", "cuda", "mps", "xpu", "hpu", "xla", "mtia", "privateuseone", "meta")


def dtypes() -> tuple[torch.dtype, ...]:
    return (torch.float64, torch.float32, torch.float16, torch.bfloat16)
