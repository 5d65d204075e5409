"""`basicsr.ops.fused_act.fused_act`."""

from stylegan_fast import layers

__all__ = ["FusedLeakyReLU", "fused_leaky_relu"]


def fused_leaky_relu(input, bias, negative_slope=0.2, scale=2**0.5):
    return layers.fused_leaky_relu(input, bias, negative_slope, scale)


class FusedLeakyReLU(layers.FusedLeakyReLU):
    def __init__(self, channel, negative_slope=0.2, scale=2**0.5):
        super().__init__(channel, True, negative_slope, scale)
