"""adain with noise, bias and lrelu, as every layer of StyleGAN ends with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..activations import ACTIVATIONS
from ..backends.geometry import Geometry, Tail
from ..ops import adain
from ..reference.adain import adain as reference
from .cases import DTYPES, LAYOUTS, Case
from .gate import Expected
from .workload import Provider, Results, Session, candidates, compiled, differentiate

EPS = 1e-8
ROW = ACTIVATIONS["lrelu"]

Function = Callable[..., Tensor]

# Per mode: tensors of x's size that have to be read or written, if those of a sample and channel
# stay in a cache between the two times they are needed; floating-point operations per element.
_TENSORS = {"forward": 2, "backward": 3, "forward+backward": 5, "double backward": 8}
_FLOPS = {"forward": 17, "backward": 35, "forward+backward": 52, "double backward": 130}

_OPERANDS = ("x", "styles", "noise_strength", "b")


def stock(x: Tensor, styles: Tensor, strength: Tensor, b: Tensor, noise: Tensor) -> Tensor:
    """What one writes without this package."""
    v = x + strength.to(x.dtype)[:, None, None] * noise.to(x.dtype) + b[:, None, None]
    u = F.leaky_relu(v, 0.2) * math.sqrt(2)
    scale, shift = styles.to(x.dtype)[:, :, None, None].chunk(2, 1)
    return F.instance_norm(u, eps=EPS) * (scale + 1) + shift


def _called(function: Function, **options: str) -> Function:
    def call(x: Tensor, styles: Tensor, strength: Tensor, b: Tensor, noise: Tensor) -> Tensor:
        return function(
            x, styles, EPS, noise=noise, noise_strength=strength, b=b, act="lrelu", **options
        )

    return call


class Adain:
    baseline = "stock"
    images = ""

    def __init__(self, case: Case, session: Session) -> None:
        self.case = case
        self.session = session
        self.dtype = DTYPES[case.dtype]
        self.arithmetic = torch.promote_types(self.dtype, torch.float32)
        n, channels, height, width = case.shape
        numel = math.prod(case.shape)
        self.bytes = _TENSORS[case.mode] * numel * self.dtype.itemsize
        self.flops = _FLOPS[case.mode] * numel

        generator = torch.Generator(session.device).manual_seed(0)

        def draw(*shape: int, dtype: torch.dtype = self.arithmetic) -> Tensor:
            values = torch.randn(shape, generator=generator, device=session.device)
            return values.to(dtype)

        def image() -> Tensor:
            values = draw(*case.shape, dtype=self.dtype)
            return values.contiguous(memory_format=LAYOUTS[case.layout])

        self.noise = draw(n, 1, height, width)
        self.inputs = (
            image(),
            draw(n, 2 * channels),
            draw(channels),
            draw(channels).to(self.dtype),
        )
        self.dy = image()
        self.h = tuple(torch.ones_like(t) for t in self.inputs)
        self.y = torch.empty_like(self.dy)
        if case.level == "user" and case.mode != "forward":
            for t in self.inputs:
                t.requires_grad_()
            self.dy.requires_grad_(case.mode == "double backward")

    def copy(self) -> Callable[[], object]:
        source = self.inputs[0].detach()
        return lambda: self.y.copy_(source)

    def copied_bytes(self) -> int:
        return 2 * self.y.numel() * self.dtype.itemsize

    def expected(self) -> list[Expected]:
        mode = "forward+backward" if self.case.mode == "backward" else self.case.mode
        inputs = tuple(t.detach().double().requires_grad_() for t in self.inputs)
        dy = self.dy.detach().double().requires_grad_()
        h = tuple(t.double() for t in self.h)
        results = differentiate(self._with_noise(_called(reference)), mode, inputs, dy, h)
        names = ["y", *(f"gradient of {name}" for name in _OPERANDS)]
        names += [f"second gradient of {name}" for name in (*_OPERANDS, "dy")]
        leaves = (self.y, *inputs, *inputs, dy)
        numel = self.y.numel()
        expected = [
            Expected(name, torch.zeros_like(t) if r is None else r.detach(), numel)
            for name, r, t in zip(names, results, leaves)
        ]
        return expected[1:] if self.case.mode == "backward" else expected

    def providers(self) -> Iterator[Provider]:
        names = candidates("adain", self.session.device.type, self.dtype)
        if self.case.level == "kernel":
            for name in names:
                if name != "reference":  # it has no kernels
                    yield Provider(name, self._kernel(backends.BACKENDS[name]))
            return
        yield Provider("stock", self._call(stock))
        for name in names:
            yield Provider(name, self._call(_called(adain, backend=name)))
        function = self._with_noise(_called(reference))
        yield from compiled(function, self.case.mode, self.session, self._call_with_noise)

    def _kernel(self, backend: ModuleType) -> Callable[[], Results]:
        """The backend's kernels of this mode, writing into tensors that exist."""
        x, styles, strength, b = self.inputs
        n, c, h, w = self.case.shape
        nhwc = self.case.layout == "nhwc"
        geometry = Geometry(n * h * w, c, 1, h * w) if nhwc else Geometry(n, c, h * w, h * w)
        noise = self.noise.view(n, h * w)
        tail = Tail(
            None, noise, strength, b.to(self.arithmetic), ROW.code, ROW.alpha, ROW.gain, math.inf
        )
        statistics = styles.new_full((2, n, c), math.nan)
        self.y.fill_(math.nan)

        def forward() -> Results:
            backend.adain_forward(x, self.y, statistics, styles, geometry, tail, EPS)
            return (self.y,)

        if self.case.mode == "forward":
            return forward
        forward()
        dx = self.y.fill_(math.nan)
        d_styles, sums = torch.full_like(styles, math.nan), torch.full_like(statistics, math.nan)

        def backward() -> Results:
            backend.adain_backward(
                self.dy, x, statistics, styles, dx, d_styles, sums, geometry, tail
            )
            return dx, d_styles, sums[1].sum(0), sums[0].sum(0)

        return backward

    def _with_noise(self, function: Function) -> Function:
        return lambda *inputs: function(*inputs, self.noise.to(inputs[1].dtype))

    def _call(self, function: Function) -> Callable[[], Results]:
        return self._call_with_noise(self._with_noise(function))

    def _call_with_noise(self, function: Function) -> Callable[[], Results]:
        return lambda: differentiate(function, self.case.mode, self.inputs, self.dy, self.h)
