"""filtered_lrelu as StyleGAN3's layers call it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..backends.geometry import FilteredLrelu as Problem
from ..backends.geometry import Fir
from ..ops.filtered_lrelu import filtered_lrelu, signs_size
from ..reference.filtered_lrelu import filtered_lrelu as reference
from ..testing import tolerance
from .cases import DTYPES, LAYOUTS, Case
from .gate import Expected
from .peers import Peer
from .upfirdn2d import stock as upfirdn2d
from .workload import Function, Provider, Results, Session, candidates, compiled, differentiate

CLAMP = 256.0
GAIN, SLOPE = math.sqrt(2), 0.2

_PASSES = {"forward": 1, "backward": 1, "forward+backward": 2, "double backward": 3}


def _low_pass(taps: int, factor: int) -> Tensor:
    """A windowed sinc that keeps half of what `factor` times the resolution can hold less."""
    position = torch.arange(taps) - (taps - 1) / 2
    f = torch.sinc(position / factor) * torch.hann_window(taps + 1, periodic=False)[1:]
    return f / f.sum()


def _round(taps: int) -> Tensor:
    """A filter that is not separable."""
    position = torch.arange(taps) - (taps - 1) / 2
    f = (1.2 - torch.hypot(position[:, None], position) / taps).square()
    return f / f.sum()


class Variant(NamedTuple):
    fu: Tensor
    fd: Tensor
    up: int
    down: int
    padding: tuple[int, int, int, int]

    @property
    def taps(self) -> tuple[int, int]:
        return len(self.fu), len(self.fd)

    def between(self, size: int) -> int:
        return size * self.up + sum(self.padding[:2]) - len(self.fu) + 1

    def out_size(self, size: int) -> int:
        return (self.between(size) - len(self.fd)) // self.down + 1


VARIANTS = {
    "up2 down2": Variant(_low_pass(12, 2), _low_pass(12, 2), 2, 2, (9, 8, 9, 8)),
    "up4 down2": Variant(_low_pass(24, 4), _low_pass(12, 2), 4, 2, (-6, -9, -6, -9)),
    "up2 down2 radial": Variant(_low_pass(12, 2), _round(12), 2, 2, (11, 10, 11, 10)),
}
"""Of StyleGAN3-T, at layers that keep the sampling rate and that double it, and of StyleGAN3-R."""


def stock(x: Tensor, b: Tensor, v: Variant) -> Tensor:
    """What one writes without this package."""
    x = x + b[:, None, None]
    x = upfirdn2d(x, v.fu, Fir.of((v.up,) * 2, (1, 1), v.padding, False, v.up**2))
    x = (F.leaky_relu(x, SLOPE) * GAIN).clamp(-CLAMP, CLAMP)
    return upfirdn2d(x, v.fd, Fir.of((1, 1), (v.down,) * 2, (0, 0, 0, 0), False, 1))


class FilteredLrelu:
    baseline = "stock"
    images = ""

    def __init__(self, case: Case, session: Session) -> None:
        self.case = case
        self.session = session
        self.dtype = DTYPES[case.dtype]
        self.arithmetic = torch.promote_types(self.dtype, torch.float32)
        chosen = VARIANTS[case.variant]
        self.variant = chosen._replace(
            fu=chosen.fu.to(session.device), fd=chosen.fd.to(session.device)
        )
        n, c, size, _ = case.shape
        self.between, self.out_size = chosen.between(size), chosen.out_size(size)

        generator = torch.Generator(session.device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator, device=session.device)
            return values.to(self.dtype)

        def image(*shape: int) -> Tensor:
            return draw(*shape).contiguous(memory_format=LAYOUTS[case.layout])

        self.inputs = (image(*case.shape), draw(c))
        self.dy = image(n, c, self.out_size, self.out_size)
        self.h = (image(*case.shape), draw(c))
        if case.level == "user" and case.mode != "forward":
            for t in self.inputs:
                t.requires_grad_()
            self.dy.requires_grad_(case.mode == "double backward")
        self.bytes, self.flops = self._cost()

    def _cost(self) -> tuple[int, int]:
        """The signs are written once and read by every other pass."""
        passes = _PASSES[self.case.mode]
        n, c, size, _ = self.case.shape
        planes, between, out = n * c, self.between, self.out_size
        x, y = (t.numel() * t.element_size() for t in (self.inputs[0], self.dy))
        signs = 0 if self.case.mode == "forward" else planes * between**2 // 4
        along_u, along_d = self.variant.taps[0] / self.variant.up, self.variant.taps[1]
        products = between * (size + between) * along_u
        if self.variant.fd.ndim == 1:
            products += out * (between + out) * along_d
        else:
            products += out**2 * along_d**2
        return passes * (x + y + signs), round(passes * planes * 2 * products)

    def copy(self) -> Callable[[], object]:
        source = self.dy.detach().new_zeros(self._half())
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def _half(self) -> int:
        return (self.inputs[0].numel() + self.dy.numel()) // 2

    def copied_bytes(self) -> int:
        return 2 * self._half() * self.dtype.itemsize

    def expected(self) -> list[Expected]:
        """Rounding decides the slope of what is near 0: of a few samples between the filters, whose
        share is about the tolerance. So gradients are compared as a whole."""
        mode = "forward+backward" if self.case.mode == "backward" else self.case.mode
        inputs = tuple(t.detach().double().requires_grad_() for t in self.inputs)
        dy = self.dy.detach().double().requires_grad_()
        h = tuple(t.double() for t in self.h)
        results = differentiate(self._reference, mode, inputs, dy, h)
        terms = max(self.variant.taps) ** 2
        expected = [Expected("y", results[0].detach(), terms)]
        names = ["gradient of x", "gradient of b"]
        names += [f"second {name}" for name in names] + ["gradient of dy"]
        share = math.sqrt(2 * tolerance(self.dtype, terms))
        for name, result, like in zip(names, results[1:], (*inputs, *inputs, dy)):
            value = torch.zeros_like(like) if result is None else result.detach()
            expected.append(Expected(name, value, allowed=share * max(1.0, value.norm().item())))
        return expected[1:2] if self.case.mode == "backward" else expected

    def providers(self) -> Iterator[Provider]:
        names = candidates("filtered_lrelu", self.session.device.type, self.dtype)
        if self.case.level == "kernel":
            for name in names:
                if name != "reference":  # it has no kernels
                    yield self._kernel_of(name)
            return
        yield Provider("stock", self._call(lambda x, b: stock(x, b, self.variant)), ours=False)
        for name in names:
            yield Provider(name, self._call(self._called(filtered_lrelu, backend=name)))
        for peer in self.session.peers:
            yield self._of_peer(peer)
        yield from compiled(self._reference, self.case.mode, self.session, self._call)

    def _of_peer(self, peer: Peer) -> Provider:
        problem = peer.problem or peer.filtered_lrelu_problem
        if problem:
            return Provider(peer.name, None, problem, ours=False)
        function = self._called(peer.filtered_lrelu)
        return Provider(peer.name, self._call(function), peer.detail, ours=False)

    def _reference(self, x: Tensor, b: Tensor) -> Tensor:
        return self._called(reference)(x, b)

    def _called(self, function: Any, **options: str) -> Function:
        v = self.variant

        def call(x: Tensor, b: Tensor) -> Tensor:
            return function(
                x, v.fu, v.fd, b, v.up, v.down, list(v.padding), GAIN, SLOPE, CLAMP, **options
            )

        return call

    def _call(self, function: Function) -> Callable[[], Results]:
        return lambda: differentiate(function, self.case.mode, self.inputs, self.dy, self.h)

    def _kernel_of(self, name: str) -> Provider:
        v, backend = self.variant, backends.BACKENDS[name]
        backward = self.case.mode == "backward"
        filters = (v.fd, v.fu, v.down, v.up) if backward else (v.fu, v.fd, v.up, v.down)
        refusal = backend.filtered_lrelu_refusal(self.dtype, *filters)
        if refusal is not None:
            return Provider(name, None, refusal)
        return Provider(name, self._kernel(backend))

    def _kernel(self, backend: ModuleType) -> Callable[[], Results]:
        """The backend's kernel of this mode, writing into tensors that exist."""
        v, nhwc = self.variant, self.case.layout == "nhwc"
        problem = Problem(
            v.up, v.down, v.padding[0], v.padding[2], False, GAIN * v.up**2, SLOPE, CLAMP,
            self.between, self.between,
        )  # fmt: skip
        fu, fd = (f.to(self.arithmetic) for f in (v.fu, v.fd))
        x, b = self.inputs
        y, dx = torch.full_like(self.dy, math.nan), torch.full_like(x, math.nan)

        def forward(signs: Tensor | None = None) -> Results:
            backend.filtered_lrelu_forward(x, b, fu, fd, y, signs, problem, nhwc)
            return (y,)

        if self.case.mode == "forward":
            return forward
        size = signs_size(x, self.between, self.between, nhwc)
        signs = torch.empty(size, dtype=torch.uint8, device=x.device)
        forward(signs)
        transposed = problem.transposed((len(fu),) * 2, (len(fd),) * 2)

        def backward() -> Results:
            backend.filtered_lrelu_masked(self.dy, signs, fd, fu, dx, transposed, nhwc)
            return (dx,)

        return backward
