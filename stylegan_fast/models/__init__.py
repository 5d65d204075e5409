"""Whole networks, one module per paper or family of checkpoints."""

from . import rosinality, stylegan, stylegan2

__all__ = ["rosinality", "stylegan", "stylegan2"]
