"""filtered_lrelu: every backend against the reference; recorded values are in test_golden."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from stylegan_fast import backends
from stylegan_fast.ops import filtered_lrelu, setup_filter
from stylegan_fast.reference.filtered_lrelu import filtered_lrelu as reference
from stylegan_fast.testing import assert_matches

FU = setup_filter([1, 3, 4, 3, 2], separable=True)
FD = setup_filter([[1, 2, 3], [4, 1, 2]])

CASES = {
    "up 2 down 2": dict(fu=FU, fd=FD, up=2, down=2, padding=[3, 2, 1, 4], clamp=0.3071),
    "up 3": dict(fu=FD, up=3, padding=1, slope=0.0, gain=0.71),
    "down 2, cropped": dict(fd=FU, down=2, padding=[-1, 2, 0, 3], slope=1.0, flip_filter=True),
    "no filters": dict(),
}


def operands(dtype, device="cpu", shape=(2, 3, 7, 5)):
    x = torch.randn(shape, dtype=torch.float64, device=device).to(dtype)
    return x, torch.linspace(-0.4, 0.5, shape[1], dtype=torch.float64, device=device).to(dtype)


def on(device, arguments):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


@pytest.mark.parametrize("dtype", backends.reference.dtypes(), ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_backend_matches_the_reference(backend, case, dtype, device):
    reason = backends.refusal(backend, "upfirdn2d", device.type, dtype)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    if backend == "triton" and device.type == "cpu" and dtype != torch.float32:
        pytest.skip("interpreted; its parts are tested in every dtype")
    arguments = on(device, CASES[case])
    for layout in (torch.contiguous_format, torch.channels_last):
        x, b = operands(dtype, device)
        x = x.contiguous(memory_format=layout)
        y = filtered_lrelu(x, b=b, **arguments, backend=backend)
        expected = reference(x.double(), b=b.double(), **arguments)
        assert_matches(y, expected, reduction=36, name=case)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("case", CASES)
def test_derivatives(case, backend):
    x, b = (t.requires_grad_() for t in operands(torch.float64, shape=(1, 2, 4, 5)))

    def function(x, b):
        return filtered_lrelu(x, b=b, **CASES[case], backend=backend)

    assert gradcheck(function, (x, b))
    assert gradgradcheck(function, (x, b))


def test_by_hand(device):
    x = torch.tensor([[[[1.0, -2.0]]]], device=device)
    b = torch.tensor([0.5], device=device)
    f = torch.tensor([[1.0, 1.0]], device=device)
    # x + b, stuffed: 1.5 0 -1.5 0; times 4, two neighbours: 6 -6 -6; lrelu: 6 -3 -3; times 2, cut
    # off at 5: 5 -5 -5.
    y = filtered_lrelu(x, f, f, b, up=2, padding=[0, 0, 0, -1], gain=2, slope=0.5, clamp=5)
    assert y.tolist() == [[[[0.0, -10.0]]]]
    y = filtered_lrelu(x, f, f, b, up=2, padding=[0, 0, 0, -1], gain=2, slope=0.5)
    assert y.tolist() == [[[[6.0, -12.0]]]]


def test_the_values_of_the_specification():
    def ramp(*shape):
        i = torch.arange(math.prod(shape), dtype=torch.float64)
        return torch.sin(0.9 * i + 0.3).reshape(shape)

    y = filtered_lrelu(
        ramp(1, 2, 4, 4),
        torch.tensor([0.1, 0.2, 0.3, 0.4]),
        torch.tensor([0.4, 0.3, 0.2, 0.1, 0.05, 0.05]),
        torch.tensor([0.1, -0.2], dtype=torch.float64),
        up=2,
        down=2,
        padding=[3, 2, 1, 4],
        clamp=0.3,
    )
    assert y.shape == (1, 2, 3, 3)
    expected = [0.229397, 0.211925, 0.105937, 0.032484, 0.210260, 0.240417, 1.582818, 0.328017]
    actual = [*y.flatten()[:6].tolist(), y.sum().item(), y.square().sum().item()]
    assert actual == pytest.approx(expected, abs=1e-6)


def test_no_samples(backend, device):
    x = torch.empty(0, 3, 7, 5, device=device)
    y = filtered_lrelu(x, fd=FD.to(device), down=2, padding=2, backend=backend)
    assert y.shape == (0, 3, 5, 4)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(x=torch.zeros(3, 7, 5)), ValueError, "x must have 4 dimensions"),
        (dict(fu=torch.zeros(2, 0)), ValueError, "fu must have a tap"),
        (dict(fd=[1, 2]), TypeError, "fd must be a torch.Tensor"),
        (dict(fd=torch.ones(2).requires_grad_()), NotImplementedError, "fd.requires_grad"),
        (dict(b=torch.zeros(4)), ValueError, "b must have the shape"),
        (dict(b=torch.zeros(3).double()), TypeError, "b.dtype=torch.float64"),
        (dict(up=[2, 2]), TypeError, "up takes integers"),
        (dict(down=0), ValueError, "down must be at least 1"),
        (dict(padding=[1, 2, 3]), ValueError, "padding"),
        (dict(padding=-4), ValueError, "increase padding"),
        (dict(fd=torch.ones(9, 9)), ValueError, "increase padding"),
        (dict(gain=0), ValueError, "gain must be greater than 0"),
        (dict(slope=-0.1), ValueError, "slope must be at least 0"),
        (dict(clamp=-1.0), ValueError, "clamp must be at least 0"),
        (dict(backend="tritn"), ValueError, "'tritn'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        filtered_lrelu(**{"x": torch.zeros(2, 3, 7, 5), **arguments})
