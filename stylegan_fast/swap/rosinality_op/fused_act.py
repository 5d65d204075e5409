"""`op.fused_act`."""

from stylegan_fast.layers import FusedLeakyReLU, fused_leaky_relu

__all__ = ["FusedLeakyReLU", "fused_leaky_relu"]
