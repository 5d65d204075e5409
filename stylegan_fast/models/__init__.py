"""Whole networks, one module per paper."""

from . import stylegan2

__all__ = ["stylegan2"]
