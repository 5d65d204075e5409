"""`torch_utils.ops.bias_act`."""

from types import SimpleNamespace

import torch

from stylegan_fast import ops
from stylegan_fast.activations import ACTIVATIONS
from stylegan_fast.reference.bias_act import bias_act as _reference
from stylegan_fast.swap.impl import backend_of

__all__ = ["bias_act"]


def _activation(row):
    def func(x, alpha=row.alpha, **_):
        return _reference(x, act=row.name, alpha=alpha, gain=1)

    return SimpleNamespace(
        func=func,
        def_alpha=row.alpha,
        def_gain=row.gain,
        cuda_idx=row.code,
        ref={"linear": "", "swish": "x"}.get(row.name, "y"),
        has_2nd_grad=row.curved,
    )


activation_funcs = {name: _activation(row) for name, row in ACTIVATIONS.items()}


def bias_act(x, b=None, dim=1, act="linear", alpha=None, gain=None, clamp=None, impl="cuda"):
    """`ops.bias_act`, where a bias of a wider dtype than x's widens the result."""
    backend = backend_of(impl)
    if b is not None and b.dtype != x.dtype:
        dtype = torch.promote_types(x.dtype, b.dtype)
        x, b = x.to(dtype), b.to(dtype)
    return ops.bias_act(x, b, dim, act, alpha, gain, clamp, backend=backend)
