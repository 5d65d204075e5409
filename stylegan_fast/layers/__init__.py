"""Layers of the StyleGAN2 networks, with the originals' names, arguments and state_dict keys; those
in `rosinality` belong to the other family of code, those in `style` to StyleGAN.

Each layer makes one fused call, so it gains from every faster kernel without changing.
"""

from .conv import Conv2dLayer
from .linear import FullyConnectedLayer
from .minibatch_std import MinibatchStdLayer
from .rosinality import (
    Blur,
    ConstantInput,
    ConvLayer,
    Downsample,
    EqualConv2d,
    EqualLinear,
    FusedLeakyReLU,
    ModulatedConv2d,
    NoiseInjection,
    PixelNorm,
    ResBlock,
    StyledConv,
    ToRGB,
    Upsample,
    fused_leaky_relu,
)
from .style import StyleBlock, StyleLayer
from .synthesis import SynthesisLayer, ToRGBLayer

__all__ = [
    "Blur",
    "ConstantInput",
    "Conv2dLayer",
    "ConvLayer",
    "Downsample",
    "EqualConv2d",
    "EqualLinear",
    "FullyConnectedLayer",
    "FusedLeakyReLU",
    "MinibatchStdLayer",
    "ModulatedConv2d",
    "NoiseInjection",
    "PixelNorm",
    "ResBlock",
    "StyleBlock",
    "StyleLayer",
    "StyledConv",
    "SynthesisLayer",
    "ToRGB",
    "ToRGBLayer",
    "Upsample",
    "fused_leaky_relu",
]
