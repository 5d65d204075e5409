"""Fused StyleGAN operators for PyTorch: modulated convolution, bias-activation, upfirdn2d.

Importing this package compiles nothing, prints nothing and touches no GPU.
"""

from . import ops
from ._version import __version__
from .backends import use_backend

__all__ = ["__version__", "ops", "use_backend"]
