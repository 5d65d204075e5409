"""What the repositories' scripts use of PyTorch that it has given up since they were written."""

from __future__ import annotations

from functools import wraps

import torch
from torch.optim import Adam
from torch.utils.data import Sampler

from . import patching, state


def supply() -> None:
    """Give it back. To try whether Adam needs it would cost seconds where it does not: one that is
    made imports the compiler."""
    if Sampler.__init__ is object.__init__:
        patching.set_attribute(Sampler, "__init__", _with_data_source)
    if not hasattr(Adam.__init__, "__wrapped__"):
        patching.set_attribute(Adam, "__init__", _with_float_betas(Adam.__init__))


def _with_data_source(self, data_source=None) -> None:
    if data_source is not None:
        state.report.routed["torch.utils.data.Sampler"] = "takes an argument, as it used to"


def _with_float_betas(original):
    @wraps(original)
    def initialize(self, params, lr=1e-3, betas=(0.9, 0.999), *args, **kwargs):
        if any(isinstance(beta, int) for beta in betas):
            state.report.routed["torch.optim.Adam"] = f"takes betas={betas}, as it used to"
            betas = tuple(beta if torch.is_tensor(beta) else float(beta) for beta in betas)
        original(self, params, lr, betas, *args, **kwargs)

    return initialize
