"""The names and signatures that other people's code imports."""

from __future__ import annotations

import inspect
from math import sqrt  # noqa: F401  (a default in a signature below)

import pytest
import torch

import stylegan_fast
from stylegan_fast import layers, ops
from stylegan_fast.models import stylegan2

OPS = {
    "bias_act": "(x, b=None, dim=1, act='linear', alpha=None, gain=None, clamp=None, *, "
    "backend=None)",
    "setup_filter": "(f, device='cpu', normalize=True, flip_filter=False, gain=1, separable=None)",
    "upfirdn2d": "(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1, *, backend=None)",
    "filter2d": "(x, f, padding=0, flip_filter=False, gain=1, *, backend=None)",
    "upsample2d": "(x, f, up=2, padding=0, flip_filter=False, gain=1, *, backend=None)",
    "downsample2d": "(x, f, down=2, padding=0, flip_filter=False, gain=1, *, backend=None)",
    "conv2d_resample": "(x, w, f=None, up=1, down=1, padding=0, groups=1, flip_weight=True, "
    "flip_filter=False, *, backend=None)",
    "modulated_conv2d": "(x, weight, styles, noise=None, up=1, down=1, padding=0, "
    "resample_filter=None, demodulate=True, flip_weight=True, fused_modconv=True, *, "
    "input_gain=None, bias=None, act='linear', alpha=None, gain=None, clamp=None, backend=None)",
}
