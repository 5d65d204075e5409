"""`mmcv.ops.fused_bias_leakyrelu`."""

from stylegan_fast import layers

__all__ = ["FusedBiasLeakyReLU", "fused_bias_leakyrelu"]


def fused_bias_leakyrelu(input, bias, negative_slope=0.2, scale=2**0.5):
    return layers.fused_leaky_relu(input, bias, negative_slope, scale)


class FusedBiasLeakyReLU(layers.FusedLeakyReLU):
    def __init__(self, num_channels, negative_slope=0.2, scale=2**0.5):
        super().__init__(num_channels, True, negative_slope, scale)
