"""`python -m stylegan_fast check`: the correctness matrix, on the machine it runs on.

Every case runs an op on one backend and compares its value, gradients and second gradients with the
op's definition in float64 on the CPU. The operands are the same in every run, and none is so close
to a clamp that rounding could decide on which side it is.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

from . import backends, ops, use_backend
from .activations import ACTIVATIONS
from .models.stylegan2 import ARCHITECTURES, Discriminator, Generator
from .ops.upfirdn2d import upfirdn2d_epilogue
from .reference.bias_act import Epilogue
from .reference.bias_act import bias_act as reference_bias_act
from .testing import assert_matches, relative_error, tolerance

DTYPES = backends.reference.dtypes()
NETWORKS, COMPILE = "networks", "torch.compile"
SUBJECTS = ("setup_filter", *backends.OPS, NETWORKS, COMPILE)


@dataclass(frozen=True)
class Target:
    """A backend on a device."""

    backend: str
    device: str

    def __str__(self) -> str:
        plain = self.device in ("cpu", self.backend)
        return self.backend if plain else f"{self.backend} on {self.device}"

    def refusal(self, dtype: torch.dtype = torch.float32) -> str | None:
        """None, or why the kernels cannot run there."""
        kind = torch.device(self.device).type
        if kind == "mps" and dtype == torch.float64:
            return "MPS has no float64"
        return backends.refusal(self.backend, "bias_act", kind, dtype)


ORACLE = (Target("reference", "cpu"), torch.float64)
"""What computes the definitions that are not written out here."""


@dataclass(frozen=True)
class Case:
    subject: str
    target: Target
    dtype: torch.dtype
    arguments: str
    run: Callable[[], float]
    """Returns the largest error as a fraction of the tolerance; raises where it is above 1."""

    def __str__(self) -> str:
        return f"{self.subject}, {self.target}, {dtype_name(self.dtype)}: {self.arguments}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# What is called, and what it should compute

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
}


@dataclass(frozen=True)
class Call:
    """An op, its definition, and what both are called with."""

    op: str
    function: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    operands: dict[str, Tensor]
    """What to differentiate by, in float64."""
    arguments: dict[str, Any]
    layout: str = "contiguous"
    """Of the operand x."""
    terms: int = 1
    """How many products are summed into an element of the result."""
    rarity: int = 0
    """In how many respects this differs from the most common call."""
    threads: int = 1
    """On small tensors threads only wait for each other, long on a busy machine."""

    def __str__(self) -> str:
        shown = {**self.operands, **self.arguments, "layout": self.layout}
        return ", ".join(
            f"{name} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{name}={value!r}"
            for name, value in shown.items()
        )


def _draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# Long and short rows, whole and broken groups of 8 and 16, single channels, any rank and dim.
SHAPES = (
    ((2, 5, 7, 3), 1, "contiguous"),
    ((2, 5, 7, 3), 1, "channels_last"),
    ((2, 5, 7, 3), 1, "strided"),
    ((3, 24, 8, 4), 1, "contiguous"),
    ((3, 24, 8, 4), 1, "channels_last"),
    ((2, 3, 33, 35), 1, "contiguous"),
    ((3, 1, 5, 7), 1, "channels_last"),
    ((3, 37, 1, 1), 1, "contiguous"),
    ((5, 6, 11), 0, "contiguous"),
    ((2, 6, 5, 9), 3, "contiguous"),
    ((70, 37), 1, "contiguous"),
)
# Enough for every thread.
LARGE = (
    ((3, 32, 61, 63), 1, "contiguous"),
    ((3, 32, 61, 63), 1, "channels_last"),
)
ALTERED = {"alpha": 0.31, "gain": 0.8077, "clamp": 0.6131}


def _bias_act_calls() -> Iterator[Call]:
    usual = ("lrelu", "swish")
    every = itertools.product(ACTIVATIONS, SHAPES, (ALTERED, {}))
    large = itertools.product(usual, LARGE, (ALTERED,))
    for act, place, altered in itertools.chain(every, large):
        shape, dim, layout = place
        yield Call(
            "bias_act",
            ops.bias_act,
            reference_bias_act,
            {"x": _draw(*shape), "b": _draw(shape[dim], seed=1)},
            {"dim": dim, "act": act, **altered},
            layout,
            rarity=(act not in usual) + (not altered) + (place != SHAPES[0]) + (place in LARGE),
            threads=torch.get_num_threads() if place in LARGE else 1,
        )


def _setup_filter(f, normalize=True, flip_filter=False, gain=1, separable=None):
    taps = torch.tensor(f, dtype=torch.float64)
    if taps.ndim == 1 and not (len(taps) >= 8 if separable is None else separable):
        taps = taps.outer(taps)
    taps = taps / taps.sum() if normalize else taps
    taps = taps.flip(tuple(range(taps.ndim))) if flip_filter else taps
    return taps * gain ** (taps.ndim / 2)


def _setup_filter_calls() -> Iterator[Call]:
    long = [1, 2, 4, 7, 11, 12, 8, 5, 3, -1]
    for arguments in (
        {"f": [1, 3, 3, 1]},
        {"f": long},
        {"f": long, "separable": False, "gain": 4},
        {"f": [[1, 2, 3], [4, -5, 6]], "flip_filter": True, "gain": 2.25},
        {"f": [1, 2], "separable": True, "normalize": False, "gain": 2.25},
    ):
        yield Call("setup_filter", ops.setup_filter, _setup_filter, {}, arguments)


def _fir(x, f, up=(1, 1), down=(1, 1), padding=(0, 0, 0, 0), flip_filter=False, gain=1.0):
    """Stuff with zeros, pad or crop, sum over the taps, keep every down-th pixel."""
    n, c, h, w = x.shape
    z = x.new_zeros(n, c, h * up[1], w * up[0])
    z[:, :, :: up[1], :: up[0]] = x
    z = F.pad(z, padding)
    g = x.new_ones(1, 1) if f is None else f.to(x)
    g = g.outer(g) if g.ndim == 1 else g
    g = g if flip_filter else g.flip(0, 1)
    height, width = z.shape[2] - g.shape[0] + 1, z.shape[3] - g.shape[1] + 1
    y = x.new_zeros(n, c, height, width)
    for ky, kx in itertools.product(range(g.shape[0]), range(g.shape[1])):
        y = y + g[ky, kx] * z[:, :, ky : ky + height, kx : kx + width]
    return gain * y[:, :, :: down[1], :: down[0]]


def _centred_fir(x, f, up=1, down=1):
    """What filter2d, upsample2d and downsample2d say of padding and gain."""
    before, after = (len(f) + up - down) // 2, (len(f) - up - down + 1) // 2
    return _fir(x, f, (up, up), (down, down), (before, after, before, after), gain=up**2)


def _upfirdn2d_calls() -> Iterator[Call]:
    x = {"x": _draw(2, 3, 9, 7)}
    filters = (
        ops.setup_filter([1, 3, 3, 1]),
        ops.setup_filter([1, 3, 3, 1], separable=True),
        torch.tensor([[1.0, 2, 3], [4, -5, 6], [7, 8, 9], [1, 0, 2]]) / 16,
        None,
    )
    resampling: tuple[dict[str, Any], ...] = (
        {"padding": (1, 1, 2, 1)},
        {"up": (2, 3), "padding": (2, 1, 3, 1), "flip_filter": True},
        {"down": (3, 2), "padding": (0, 2, 1, 2), "gain": 1.5},
        {"up": (3, 2), "down": (2, 3), "padding": (-1, 4, 3, -2), "gain": -0.7},
    )
    for f, arguments, layout in itertools.product(
        filters, resampling, ("contiguous", "channels_last", "strided")
    ):
        rarity = (f is not filters[0]) + (arguments is not resampling[0]) + (layout != "contiguous")
        arguments = {"f": f, **arguments}
        yield Call("upfirdn2d", ops.upfirdn2d, _fir, x, arguments, layout, 16, rarity)

    yield Call("upfirdn2d", ops.filter2d, _centred_fir, x, {"f": filters[0]}, terms=16)
    for f, factor in itertools.product(filters[:2], (2, 3)):
        for function, name in ((ops.upsample2d, "up"), (ops.downsample2d, "down")):
            rarity = (f is not filters[0]) + (factor != 2)
            arguments = {"f": f, name: factor}
            yield Call("upfirdn2d", function, _centred_fir, x, arguments, terms=16, rarity=rarity)

    # Broken and whole groups of 8 in a row of the result, for the masks.
    shapes = ((2, 3, 4, 7), (2, 8, 3, 8))
    for act, shape, layout in itertools.product(
        ("lrelu", "tanh"), shapes, ("contiguous", "channels_last")
    ):
        yield Call(
            "upfirdn2d",
            _filtered,
            _defined_as_filtered,
            {
                "x": _draw(*shape),
                "scale": 1 + 0.3 * _draw(*shape[:2], seed=1),
                "noise": _draw(*shape[2:], seed=2),
                "b": _draw(shape[1], seed=3),
                "add": _draw(*shape, seed=4),
            },
            {"f": filters[0], "act": act, "clamp": 0.6131},
            layout,
            terms=16,
            rarity=(act != "lrelu") + (shape != shapes[0]) + (layout != "contiguous"),
        )


def _filtered(x, scale, noise, b, add, f, act, clamp):
    """What follows the transposed convolution of a layer."""
    end = Epilogue(scale, noise, b, act, clamp=clamp)
    return upfirdn2d_epilogue(x, f, padding=(2, 1, 1, 2), end=end, add=add)


def _defined_as_filtered(x, scale, noise, b, add, f, act, clamp):
    v = scale[:, :, None, None] * _fir(x, f, padding=(2, 1, 1, 2)) + noise
    return reference_bias_act(v, b, act=act, clamp=clamp) + add


def _conv(x, w, f=None, up=1, down=1, padding=0, groups=1, flip_weight=True, flip_filter=False):
    """Pad, upsample with the filter, convolve, downsample with the filter."""
    before = after = padding
    if up > 1:
        before, after = before + (len(f) + up - 1) // 2, after + (len(f) - up) // 2
    if down > 1:
        before, after = before + (len(f) - down + 1) // 2, after + (len(f) - down) // 2
    padding = (before, after, before, after)
    x = _fir(x, f if up > 1 else None, (up, up), (1, 1), padding, flip_filter, gain=up**2)
    x = F.conv2d(x, w if flip_weight else w.flip(2, 3), groups=groups)
    return _fir(x, f if down > 1 else None, down=(down, down), flip_filter=flip_filter)


def _conv2d_resample_calls() -> Iterator[Call]:
    f = torch.tensor([[1.0, 2, 3, 1], [4, 5, 6, 2], [7, 8, 9, 3], [1, 0, 2, 1]]) / 16
    for kernel, up, down, (groups, flips), layout in itertools.product(
        (1, 3), (1, 2), (1, 2), ((1, (True, False)), (2, (False, True))), LAYOUTS
    ):
        if layout != "contiguous" and groups == 2:
            continue
        yield Call(
            "conv2d_resample",
            ops.conv2d_resample,
            _conv,
            {"x": _draw(2, 4, 7, 6), "w": _draw(6, 4 // groups, kernel, kernel, seed=1) / 4},
            {
                "f": f,
                "up": up,
                "down": down,
                "padding": kernel // 2,
                "groups": groups,
                "flip_weight": flips[0],
                "flip_filter": flips[1],
            },
            layout,
            terms=4 * kernel**2 * (16 if up * down > 1 else 1),
        )


def _modulated_conv(
    x, weight, styles, noise, bias, demodulate=True, fused_modconv=True, resample_filter=None,
    up=1, padding=0, act="linear",
):  # fmt: skip
    """One sample after the other, each with a weight of its own."""
    samples = []
    for image, style in zip(x, styles):
        w = weight * style[:, None, None]
        if demodulate:
            w = w * (w.square().sum((1, 2, 3), keepdim=True) + 1e-8).rsqrt()
        samples.append(_conv(image[None], w, resample_filter, up, padding=padding))
    return reference_bias_act(torch.cat(samples) + noise, bias, act=act)


def _modulated_conv2d_calls() -> Iterator[Call]:
    resample_filter = ops.setup_filter([1, 3, 3, 1])
    for kernel, up, demodulate, fused in itertools.product(
        (1, 3), (1, 2), (True, False), (True, False)
    ):
        yield Call(
            "modulated_conv2d",
            ops.modulated_conv2d,
            _modulated_conv,
            {
                "x": _draw(2, 4, 5, 6),
                "weight": _draw(3, 4, kernel, kernel, seed=1) / (2 * kernel),
                "styles": 1 + 0.3 * _draw(2, 4, seed=2),
                "noise": 0.1 * _draw(2, 1, 5 * up, 6 * up, seed=3),
                "bias": _draw(3, seed=4),
            },
            {
                "up": up,
                "padding": kernel // 2,
                "resample_filter": resample_filter,
                "demodulate": demodulate,
                "fused_modconv": fused,
                # Smooth: of lrelu, rounding to 16 bits would decide the branch of a value near 0.
                "act": "linear" if fused else "tanh",
            },
            terms=4 * kernel**2 * (16 if up > 1 else 1),
        )


def _adain(x, styles, noise, noise_strength, b, eps, act):
    """One channel of a sample after the other."""
    v = x + noise_strength[:, None, None] * noise
    u = reference_bias_act(v, b, act=act)
    channels = x.shape[1]
    planes = []
    for image, style in zip(u, styles):
        for plane, scale, shift in zip(image, style[:channels] + 1, style[channels:]):
            deviation = torch.sqrt(plane.var(unbiased=False) + eps)
            planes.append(scale * (plane - plane.mean()) / deviation + shift)
    return torch.stack(planes).view(x.shape)


def _adain_calls() -> Iterator[Call]:
    # Whole and broken groups of 16 pixels and channels, and a channel in several parts.
    shapes = ((2, 5, 7, 3), (3, 16, 4, 8), (1, 2, 61, 67))
    for act, shape, layout in itertools.product(("lrelu", "tanh"), shapes, LAYOUTS):
        n, channels, *size = shape
        yield Call(
            "adain",
            ops.adain,
            _adain,
            {
                "x": _draw(*shape),
                "styles": _draw(n, 2 * channels, seed=1),
                "noise": _draw(n, 1, *size, seed=2),
                "noise_strength": _draw(channels, seed=3),
                "b": _draw(channels, seed=4),
            },
            {"eps": 0.01, "act": act},
            layout,
            terms=size[0] * size[1],
            rarity=(act != "lrelu") + (shape != shapes[0]) + (layout != "contiguous"),
        )


def _filtered_lrelu(x, b, fu, fd, up, down, padding, clamp=None, slope=0.2, flip_filter=False):
    """Zero-stuff, filter, bend, filter, decimate."""
    x = x + b[:, None, None]
    u = _fir(x, fu, (up, up), (1, 1), padding, flip_filter, up**2)
    v = reference_bias_act(u, act="lrelu", alpha=slope, clamp=clamp)
    return _fir(v, fd, (1, 1), (down, down), flip_filter=flip_filter)


def _filtered_lrelu_calls() -> Iterator[Call]:
    twelve = torch.tensor([1.0, -3, 2, 9, 21, 30, 28, 19, 12, 5, -2, 1]) / 64
    short = torch.tensor([1.0, 3, 4, -1, 2]) / 8
    full = torch.tensor([[1.0, 2, 3], [4, 5, 1]]) / 16
    usual = {"fu": twelve, "fd": twelve, "up": 2, "down": 2, "padding": (9, 8, 9, 8)}
    everything: tuple[dict[str, Any], ...] = (
        {**usual, "clamp": 0.6131},
        {**usual, "fu": twelve.repeat_interleave(2) / 2, "up": 4, "padding": (9, 7, 12, 10)},
        {**usual, "fd": twelve.repeat_interleave(2) / 2, "down": 4, "padding": (17, 15, 18, 16)},
        {"fu": short, "fd": None, "up": 3, "down": 1, "padding": (-1, 4, 3, -2), "clamp": 0.7719},
        {"fu": None, "fd": short, "up": 1, "down": 2, "padding": (1, 3, 2, 1), "flip_filter": True},
        {"fu": None, "fd": None, "up": 1, "down": 1, "padding": (0, 0, 0, 0), "clamp": 0.7719},
        # No bend: where no kernel takes a filter, rounding to 16 bits would decide the branch.
        {**usual, "fd": full, "padding": (6, 5, 5, 6), "slope": 1.0},
        {**usual, "fu": full, "padding": (6, 5, 5, 6), "slope": 1.0},
    )
    shapes = ((2, 3, 9, 7), (1, 17, 6, 11))
    for arguments, shape, layout in itertools.product(everything, shapes, LAYOUTS):
        factors = arguments["up"] * arguments["down"]
        yield Call(
            "filtered_lrelu",
            ops.filtered_lrelu,
            _filtered_lrelu,
            {"x": _draw(*shape), "b": _draw(shape[1], seed=1)},
            arguments,
            layout,
            terms=144 if factors > 1 else 1,
            rarity=(arguments is not everything[0])
            + (shape != shapes[0])
            + (layout != "contiguous"),
        )


CALLS: dict[str, Callable[[], Iterator[Call]]] = {
    "setup_filter": _setup_filter_calls,
    "bias_act": _bias_act_calls,
    "upfirdn2d": _upfirdn2d_calls,
    "conv2d_resample": _conv2d_resample_calls,
    "modulated_conv2d": _modulated_conv2d_calls,
    "filtered_lrelu": _filtered_lrelu_calls,
    "adain": _adain_calls,
}


# How the two are compared


def _direction(like: Tensor, dtype: torch.dtype) -> Tensor:
    """A fixed tensor of like's shape whose numbers dtype can represent."""
    wave = torch.cos(0.7 * torch.arange(like.numel(), dtype=torch.float64))
    return wave.to(dtype).view(like.shape).to(like)


def _derivatives(
    function: Callable[..., Tensor], operands: dict[str, Tensor], dtype: torch.dtype, orders: int
) -> dict[str, Tensor]:
    """y, its gradients g_* along a fixed dy, and gg_*, those of a combination of all g_*."""
    leaves = {name: t.detach().requires_grad_(orders > 0) for name, t in operands.items()}
    y = function(**leaves)
    results = {"y": y}
    if orders >= 1:
        dy = _direction(y, dtype).requires_grad_(orders > 1)
        first = grad(y, list(leaves.values()), dy, create_graph=orders > 1)
        results |= {f"g_{name}": g for name, g in zip(leaves, first)}
    if orders >= 2:
        leaves = {"dy": dy, **leaves}
        directions = [_direction(g, dtype) for g in first]
        second = grad(first, list(leaves.values()), directions, allow_unused=True)
        for (name, leaf), g in zip(leaves.items(), second):
            results[f"gg_{name}"] = torch.zeros_like(leaf) if g is None else g
    return results


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that an element which no kernel wrote shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _moved(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}


def _of_operands(
    function: Callable[..., Tensor], call: Call, device: str = "cpu"
) -> Callable[..., Tensor]:
    """`function` with the call's arguments, and with its layout of x."""
    arguments = _moved(call.arguments, device)

    def called(**operands: Tensor) -> Tensor:
        if "x" in operands:
            operands["x"] = LAYOUTS[call.layout](operands["x"])
        return function(**operands, **arguments)

    return called


def _require(condition: bool, message: str) -> None:
    if not condition:  # not an assert statement, which python -O leaves out
        raise AssertionError(message)


def _compare(call: Call, target: Target, dtype: torch.dtype, orders: int) -> float:
    rounded = {name: t.to(dtype) for name, t in call.operands.items()}
    function = _of_operands(call.function, call, target.device)
    definition = _of_operands(call.definition, call)
    with use_backend(target.backend), _poisoned_memory(), _threads(call.threads):
        actual = _derivatives(function, _moved(rounded, target.device), dtype, orders)
    exact = {name: t.double() for name, t in rounded.items()}
    expected = _derivatives(definition, exact, dtype, orders)
    y = actual["y"]
    if call.operands:
        wanted = torch.channels_last if call.layout == "channels_last" else torch.contiguous_format
        _require(y.dtype == dtype, f"y has the dtype {y.dtype}")
        _require(y.is_contiguous(memory_format=wanted), f"y has the strides {y.stride()}")
    products = call.terms * y.numel()
    return max(
        assert_matches(
            value.cpu(),
            expected[name],
            reduction=max(call.terms, products // value.numel()),
            name=name,
        )
        for name, value in actual.items()
    )


def _check_gradients(call: Call, target: Target) -> float:
    """Both orders against finite differences in a random direction."""
    function = _of_operands(call.function, call, target.device)
    operands = [t.detach().to(target.device).requires_grad_() for t in call.operands.values()]

    def positional(*tensors: Tensor) -> Tensor:
        return function(**dict(zip(call.operands, tensors)))

    with use_backend(target.backend):
        gradcheck(positional, operands, fast_mode=True)
        gradgradcheck(positional, operands, fast_mode=True)
    return 0.0


def _op_cases(op: str, target: Target) -> Iterator[Case]:
    if target.backend != "reference" and op not in backends.OPS:
        return  # the same function again
    for call in CALLS[op]():
        dtypes = [dtype for dtype in DTYPES if target.refusal(dtype) is None]
        for dtype in dtypes if call.operands else [torch.float32]:
            # Triton compiles, or interprets, each kind of kernel: there, one rarity at a time.
            if target.backend == "triton" and call.rarity + (dtype != torch.float32) > 1:
                continue
            if call.definition is reference_bias_act and (target, dtype) == ORACLE:
                continue
            # PyTorch's operators round after each step, and a derivative takes many.
            rounds_once = target.backend != "reference" or dtype.itemsize > 2
            orders = 2 if call.operands and rounds_once else 0
            run = partial(_compare, call, target, dtype, orders)
            yield Case(op, target, dtype, str(call), run)
        rare = call.rarity > (target.backend != "triton")
        if call.operands and not rare and torch.float64 in dtypes:
            arguments = f"finite differences, {call}"
            run = partial(_check_gradients, call, target)
            yield Case(op, target, torch.float64, arguments, run)


def _tiny_networks(architecture: str) -> tuple[Generator, Discriminator]:
    """Networks of 16 x 16 pixels in which every parameter matters."""
    torch.manual_seed(0)
    kwargs: dict[str, Any] = dict(architecture=architecture, channel_base=64, channel_max=8)
    generator = Generator(6, 0, 5, 16, 3, {"num_layers": 2}, **kwargs).eval()
    discriminator = Discriminator(0, 16, 3, **kwargs)
    for parameter in itertools.chain(generator.parameters(), discriminator.parameters()):
        parameter.data += 0.1 * torch.randn_like(parameter)
    return generator, discriminator


def _flat_gradient(loss: Tensor, network: torch.nn.Module) -> Tensor:
    parameters = list(network.parameters())
    gradients = grad(loss, parameters, allow_unused=True)
    pairs = zip(gradients, parameters)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def _regularisers(architecture: str, target: Target, dtype: torch.dtype) -> dict[str, Tensor]:
    """Images, logits, and the gradients of R1 and of the path length."""
    generator, discriminator = _tiny_networks(architecture)
    generator.to(target.device, dtype)
    discriminator.to(target.device, dtype)
    z, images, noise = (
        t.to(torch.float32).to(target.device, dtype)
        for t in (_draw(3, 6), _draw(3, 3, 16, 16, seed=1), _draw(3, 3, 16, 16, seed=2))
    )
    with use_backend(target.backend):
        ws = generator.mapping(z)
        fakes = generator.synthesis(ws, noise_mode="const")
        (path,) = grad((fakes * noise).sum(), ws, create_graph=True)
        by_generator = _flat_gradient(path.square().sum(), generator)
        images.requires_grad_()
        logits = discriminator(images)
        (slopes,) = grad(logits.sum(), images, create_graph=True)
        by_discriminator = _flat_gradient(slopes.square().sum([1, 2, 3]).mean(), discriminator)
    return {
        "G(z)": fakes,
        "path length's gradient": by_generator,
        "D(images)": logits,
        "dD/dimages": slopes,
        "R1's gradient": by_discriminator,
    }


def _compare_networks(architecture: str, target: Target, dtype: torch.dtype) -> float:
    actual = _regularisers(architecture, target, dtype)
    expected = _regularisers(architecture, *ORACLE)
    limit = tolerance(dtype, reduction=128)  # the longest sum in a layer
    errors = {name: relative_error(t.cpu(), expected[name]) for name, t in actual.items()}
    for name, error in errors.items():
        _require(error <= limit, f"{name}: relative error {error:.3g}, more than {limit:.3g}")
    return max(errors.values()) / limit


def _network_cases(target: Target) -> Iterator[Case]:
    for architecture, dtype in itertools.product(ARCHITECTURES, (torch.float64, torch.float32)):
        if target.refusal(dtype) is None and (target, dtype) != ORACLE:
            run = partial(_compare_networks, architecture, target, dtype)
            arguments = f"architecture={architecture!r}, 16 x 16 pixels"
            yield Case(NETWORKS, target, dtype, arguments, run)


class _CannotRunHereError(Exception):
    pass


def _compare_compiled(call: Call, target: Target) -> float:
    try:
        compiled = torch.compile(call.function, fullgraph=True, backend="aot_eager")
    except RuntimeError as error:
        raise _CannotRunHereError(str(error)) from None
    return _compare(replace(call, function=compiled), target, torch.float32, orders=1)


def _compile_cases(target: Target) -> Iterator[Case]:
    """A convolution that calls all ops, with its backward pass, in one graph."""
    call = next(call for call in _modulated_conv2d_calls() if call.arguments["up"] == 2)
    run = partial(_compare_compiled, call, target)
    yield Case(COMPILE, target, torch.float32, f"modulated_conv2d, {call}", run)


# The command


def _targets(backend: str | None, device: str | None) -> list[Target]:
    """What can run here of what is asked for; RuntimeError if that is nothing."""
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (AssertionError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise RuntimeError(f"device {device!r} cannot be used here: {reason}") from None
    names = list(backends.BACKENDS) if backend is None else [backend]
    everywhere = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    targets = [Target(n, d) for d in ([device] if device else everywhere) for n in names]
    usable = [target for target in targets if target.refusal() is None]
    if not usable:
        raise RuntimeError(f"backend {backend!r} cannot run here: {targets[-1].refusal()}")
    return usable


def _cases(subjects: Iterable[str], targets: Sequence[Target]) -> Iterator[Case]:
    for subject, target in itertools.product(subjects, targets):
        if subject == NETWORKS:
            yield from _network_cases(target)
        elif subject == COMPILE:
            yield from _compile_cases(target)
        else:
            yield from _op_cases(subject, target)


@dataclass
class _Cell:
    """What became of the cases of one subject, target and dtype."""

    cases: int = 0
    failures: int = 0
    largest_error: float = 0.0

    def __str__(self) -> str:
        if self.failures:
            return f"FAILED ({self.failures} of {self.cases})"
        return f"{self.largest_error:.2f} ({self.cases})" if self.cases else "-"


def check(
    backend: str | None = None, device: str | None = None, subjects: Sequence[str] = SUBJECTS
) -> bool:
    """Run the cases and print what became of them; True if there were some and all passed.

    RuntimeError if the backend or the device cannot be used here, or leaves nothing to check.
    """
    started = time.perf_counter()
    targets = _targets(backend, device)
    cases = list(_cases(subjects, targets))
    if not cases:
        raise RuntimeError(
            f"backend {backend!r} has no kernels of its own for {', '.join(subjects)}: it calls "
            "PyTorch's operators, which --backend reference checks"
        )
    reached = {target.backend for target in targets}
    skipped = {
        name: Target(name, targets[-1].device).refusal()
        for name in backends.BACKENDS
        if backend is None and name not in reached
    }
    cells: dict[tuple[str, Target], dict[torch.dtype, _Cell]] = {}
    failures: list[tuple[Case, Exception]] = []
    with ExitStack() as stack:
        stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(_threads(1))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for case in _with_progress(cases):
            row = cells.setdefault((case.subject, case.target), {d: _Cell() for d in DTYPES})
            cell = row[case.dtype]
            torch.manual_seed(0)  # of gradgradcheck's cotangents
            try:
                cell.largest_error = max(cell.largest_error, case.run())
            except _CannotRunHereError as error:
                skipped[case.subject] = str(error)
                continue
            except Exception as error:
                cell.failures += 1
                failures.append((case, error))
            cell.cases += 1

    print_table(
        ["Largest error, 1 = tolerance (checks)", "", *map(dtype_name, DTYPES)],
        [
            [subject, str(target), *map(str, row.values())]
            for (subject, target), row in cells.items()
        ],
    )
    print()
    if failures:
        _print_failure(*failures[0])
    count = sum(cell.cases for row in cells.values() for cell in row.values())
    seconds = time.perf_counter() - started
    on = f"{', '.join(map(str, targets))} ({seconds:.0f} s)"
    if failures:
        print_bold(f"{len(failures):,} of {count:,} checks FAILED on {on}.")
    elif not count:
        print_bold("Nothing was checked.")
    else:
        print_bold(f"All {count:,} checks passed on {on}.")
    if skipped:
        reasons = (f"{name} ({reason})" for name, reason in skipped.items())
        print(f"Not checked here: {', '.join(reasons)}.")
    return count > 0 and not failures


def _print_failure(case: Case, error: Exception) -> None:
    print_bold(f"The first failure: {case}")
    if isinstance(error, AssertionError):
        print(error)
    else:
        print("".join(traceback.format_exception(error, limit=-4)).rstrip())
    print(
        "\nPlease report these lines together with what `python -m stylegan_fast info` prints. "
        "Repeat with\n"
        f"    python -m stylegan_fast check --backend {case.target.backend} "
        f"--device {case.target.device} --op {case.subject}\n"
    )


def _with_progress(cases: Sequence[Case]) -> Iterable[Case]:
    """The cases, with a progress bar where there is a terminal."""
    if not sys.stdout.isatty():
        return cases
    try:
        from rich.progress import track
    except ImportError:
        return cases
    return track(cases, description="Checking", transient=True)


def print_bold(text: str) -> None:
    """Bold at a terminal, plain elsewhere."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
        except ImportError:
            pass
        else:
            Console(highlight=False, soft_wrap=True).print(text, style="bold", markup=False)
            return
    print(text)


def print_table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    lines = [heading, *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for index, line in enumerate(lines):
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
        (print if index else print_bold)(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", choices=list(backends.BACKENDS), help="check this one only (default: all)"
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: cpu, and cuda if any)")
    parser.add_argument(
        "--op",
        nargs="+",
        choices=SUBJECTS,
        default=SUBJECTS,
        metavar="OP",
        help=f"check these only (default: all), of {', '.join(SUBJECTS)}",
    )


def run(arguments: argparse.Namespace) -> int:
    """Exit status: 1 where a check failed, 2 for a request that cannot be served."""
    try:
        passed = check(arguments.backend, arguments.device, arguments.op)
    except RuntimeError as error:
        print(f"stylegan_fast check: {error}", file=sys.stderr)
        return 2
    return 0 if passed else 1
