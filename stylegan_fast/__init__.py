"""Fused StyleGAN operators for PyTorch: modulated convolution, bias-activation, upfirdn2d.

Importing this package compiles nothing, prints nothing and touches no GPU.
"""

from . import layers, models, ops
from ._version import __version__
from .backends import use_backend
from .weight_gradients import no_weight_gradients

__all__ = ["__version__", "layers", "models", "no_weight_gradients", "ops", "use_backend"]
