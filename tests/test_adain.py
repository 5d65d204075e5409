"""adain: one body for every backend, dtype, layout and order; then its corners one by one."""

import itertools
import math

import pytest
import torch

from stylegan_fast import backends
from stylegan_fast.activations import ACTIVATIONS
from stylegan_fast.backends import native
from stylegan_fast.ops import adain
from stylegan_fast.ops import adain as adain_function
from stylegan_fast.ops.adain import backward_op, forward_op
from stylegan_fast.reference.adain import adain as reference
from stylegan_fast.testing import assert_matches, tolerance

PIECEWISE_LINEAR = [name for name, row in ACTIVATIONS.items() if not row.curved]
LAYOUTS = (torch.contiguous_format, torch.channels_last)

# Odd sizes, whole and broken groups of 16 pixels and channels, one channel.
SHAPES = ((2, 5, 7, 3), (3, 16, 4, 8), (2, 37, 6, 5), (3, 1, 5, 7))


def operands(shape, dtype, device, memory_format=torch.contiguous_format):
    """x, styles, noise of each sample, a strength of each channel, b: all of other sizes."""
    n, c, h, w = shape

    def draw(*size):
        return torch.randn(size, dtype=torch.float64, device=device).to(dtype)

    x = draw(*shape).contiguous(memory_format=memory_format)
    return [x, draw(n, 2 * c), draw(n, 1, h, w), draw(c), draw(c)]


def call(function, x, styles, noise=None, strength=None, b=None, **arguments):
    return function(x, styles, noise=noise, noise_strength=strength, b=b, **arguments)


def derivatives(function, leaves, dy, orders=2):
    """y, all gradients, and those of a combination of these with respect to dy and all leaves."""
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    dy = dy.detach().clone().requires_grad_()
    y = function(*leaves)
    results = {"y": y}
    plain = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    results |= {f"g{i}": g for i, g in enumerate(plain)}
    if orders > 1:
        first = torch.autograd.grad(y, leaves, dy, create_graph=True)
        results |= {f"recorded g{i}": g for i, g in enumerate(first)}
        combination = sum(
            (g * torch.linspace(-1, 1, g.numel(), dtype=g.dtype, device=g.device).view_as(g)).sum()
            for g in first
        )
        second = torch.autograd.grad(combination, [dy, *leaves], materialize_grads=True)
        results |= {f"gg{i}": g for i, g in enumerate(second)}
    return results


def assert_all_orders(backend, leaves, orders=2, **arguments):
    x = leaves[0]
    dy = torch.cos(torch.arange(x.numel(), dtype=torch.float64, device=x.device))
    dy = dy.view(x.shape).to(x.dtype)
    actual = derivatives(
        lambda *t: call(adain, *t, backend=backend, **arguments), leaves, dy, orders
    )
    expected = derivatives(
        lambda *t: call(reference, *t, **arguments),
        [t.double() for t in leaves],
        dy.double(),
        orders,
    )
    for name, value in actual.items():
        assert_matches(value, expected[name], reduction=x.numel(), name=name)
        assert value.dtype == x.dtype
    assert actual["y"].stride() == actual["g0"].stride() == x.stride()
    assert actual["y"].shape == x.shape


def skip_where_refused(backend, device, dtype):
    reason = backends.refusal(backend, "adain", device.type, dtype)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("dtype", backends.reference.dtypes(), ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_order_matches_the_reference(backend, act, dtype, device):
    skip_where_refused(backend, device, dtype)
    # Interpreted kernels take their time.
    shapes = SHAPES[:2] if backend == "triton" else SHAPES
    for shape, layout in itertools.product(shapes, LAYOUTS):
        leaves = operands(shape, dtype, device, layout)
        arguments = dict(act=act, alpha=0.31, gain=0.8077, clamp=0.6131, eps=0.0173)
        assert_all_orders(backend, leaves, orders=1 if dtype.itemsize == 2 else 2, **arguments)
