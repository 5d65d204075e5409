"""Whole networks, one module per paper or family of checkpoints."""

from . import rosinality, stylegan, stylegan2, stylegan3

__all__ = ["rosinality", "stylegan", "stylegan2", "stylegan3"]
