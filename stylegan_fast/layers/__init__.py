"""Layers of the StyleGAN2 networks, with the originals' names, arguments and state_dict keys.

Each layer makes one fused call, so it gains from every faster kernel without changing.
"""

from .conv import Conv2dLayer
from .linear import FullyConnectedLayer
from .minibatch_std import MinibatchStdLayer
from .synthesis import SynthesisLayer, ToRGBLayer

__all__ = [
    "Conv2dLayer",
    "FullyConnectedLayer",
    "MinibatchStdLayer",
    "SynthesisLayer",
    "ToRGBLayer",
]
