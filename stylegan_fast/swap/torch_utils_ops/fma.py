"""`torch_utils.ops.fma`."""

import torch

__all__ = ["fma"]


def fma(a, b, c):
    """a * b + c in one pass."""
    return torch.addcmul(c, a, b)
