"""bias_act with lrelu and clamp 256, as every convolution of StyleGAN2 ends with it."""

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
from ..ops import bias_act
from ..reference.bias_act import bias_act as reference
from .cases import DTYPES, LAYOUTS, Case
from .gate import Expected
from .workload import Provider, Results, Session, candidates, compiled, differentiate

CLAMP = 256.0
ROW = ACTIVATIONS["lrelu"]

Function = Callable[[Tensor, Tensor], Tensor]

# Per mode: tensors of x's size, saved masks (2 bits an element) and vectors of b's size that have
# to be read or written; additions, multiplications and comparisons per element.
_TENSORS = {"forward": 2, "backward": 2, "forward+backward": 4, "double backward": 6}
_MASKS = {"forward": 0, "backward": 1, "forward+backward": 2, "double backward": 3}
_VECTORS = {"forward": 1, "backward": 1, "forward+backward": 2, "double backward": 3}
_FLOPS = {"forward": 5, "backward": 3, "forward+backward": 8, "double backward": 11}

_RESULTS = ("y", "dx", "db", "second gradient of x", "second gradient of b", "gradient of dy")


def stock(x: Tensor, b: Tensor) -> Tensor:
    """What one writes without this package."""
    y = x + b[None, :, None, None]
    y = F.leaky_relu(y, 0.2)
    y = y * math.sqrt(2)
    return y.clamp(-CLAMP, CLAMP)


def _reference(x: Tensor, b: Tensor) -> Tensor:
    return reference(x, b, 1, "lrelu", clamp=CLAMP)


class BiasAct:
    baseline = "stock"
    images = ""

    def __init__(self, case: Case, session: Session) -> None:
        self.case = case
        self.session = session
        self.dtype = DTYPES[case.dtype]
        self.arithmetic = torch.promote_types(self.dtype, torch.float32)
        numel, channels = math.prod(case.shape), case.shape[1]
        items = _TENSORS[case.mode] * numel + _VECTORS[case.mode] * channels
        self.bytes = items * self.dtype.itemsize + _MASKS[case.mode] * numel // 4
        self.flops = _FLOPS[case.mode] * numel

        generator = torch.Generator(session.device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator, device=session.device)
            return values.to(self.dtype)

        def image(values: Tensor) -> Tensor:
            return values.contiguous(memory_format=LAYOUTS[case.layout])

        self.b = draw(channels)
        self.x = image(_away_from_kinks(100 * draw(*case.shape), self.b, self.arithmetic))
        self.dy = image(draw(*case.shape))
        self.h = image(draw(*case.shape)), draw(channels)
        self.y = torch.empty_like(self.x)
        if case.level == "user" and case.mode != "forward":
            self.x.requires_grad_()
            self.b.requires_grad_()
            self.dy.requires_grad_(case.mode == "double backward")

    def copy(self) -> Callable[[], object]:
        source = self.x.detach()
        return lambda: self.y.copy_(source)

    def copied_bytes(self) -> int:
        return 2 * self.x.numel() * self.dtype.itemsize

    def expected(self) -> list[Expected]:
        mode = "forward+backward" if self.case.mode == "backward" else self.case.mode
        slices = []
        channels = self.x.shape[1]
        for start in range(0, channels, 16):  # all at once, float64 would take too much memory
            part = slice(start, start + 16)
            x, dy, h = (t.detach()[:, part].double() for t in (self.x, self.dy, self.h[0]))
            b, h_b = (t.detach()[part].double() for t in (self.b, self.h[1]))
            for t in (x, b, dy):
                t.requires_grad_()
            results = differentiate(_reference, mode, (x, b), dy, (h, h_b))
            # lrelu has no curvature: autograd may leave its second gradients out.
            shapes = (x, x, b, x, b, dy)
            whole = [torch.zeros_like(t) if r is None else r for r, t in zip(results, shapes)]
            slices.append([r.detach() for r in whole])
        expected = []
        for name, parts in zip(_RESULTS, zip(*slices)):
            of_b = parts[0].ndim == 1
            value = torch.cat(parts, 0 if of_b else 1)
            expected.append(Expected(name, value, self.x.numel() // channels if of_b else 1))
        return expected[1:] if self.case.mode == "backward" else expected

    def providers(self) -> Iterator[Provider]:
        if self.case.level == "user":
            yield from self._functions()
            return
        for name in self._candidates():
            if name != "reference":  # it has no kernels
                yield Provider(name, self._kernel(backends.BACKENDS[name]))

    def _kernel(self, backend: ModuleType) -> Callable[[], Results]:
        """The backend's kernel of this mode, writing into tensors that exist."""
        n, c, h, w = self.x.shape
        pixels = n * h * w
        nhwc = self.case.layout == "nhwc"
        geometry = Geometry(pixels, c, 1, pixels) if nhwc else Geometry(n, c, h * w, pixels)
        tail = Tail(None, None, None, self.b, ROW.code, ROW.alpha, ROW.gain, CLAMP)

        def forward(mask: Tensor | None = None) -> Results:
            backend.epilogue_forward(self.x, self.y, mask, geometry, tail)
            return (self.y,)

        self.y.fill_(math.nan)
        if self.case.mode == "forward":
            return forward
        mask = self.x.new_empty((self.x.numel() + 7) // 8 * 2, dtype=torch.uint8)
        forward(mask)
        dx = self.y.fill_(math.nan)
        db = torch.full_like(self.b, math.nan, dtype=self.arithmetic)
        slope = ROW.negative_slope(ROW.alpha)

        def backward() -> Results:
            backend.epilogue_masked(self.dy, mask, dx, db, None, geometry, slope, ROW.gain)
            return dx, db

        return backward

    def _functions(self) -> Iterator[Provider]:
        yield Provider("stock", self._call(stock))
        for name in self._candidates():
            yield Provider(name, self._call(_ours(name)))
        for peer in self.session.peers:
            if peer.bias_act is None:
                yield Provider(peer.name, None, peer.problem, ours=False)
            else:
                function = _clamped(peer.bias_act)
                yield Provider(peer.name, self._call(function), peer.detail, ours=False)
        yield from compiled(_reference, self.case.mode, self.session, self._call)

    def _candidates(self) -> list[str]:
        return candidates("bias_act", self.session.device.type, self.dtype)

    def _call(self, function: Function) -> Callable[[], Results]:
        operands = ((self.x, self.b), self.dy, self.h)
        return lambda: differentiate(function, self.case.mode, *operands)


def _ours(backend: str) -> Function:
    return lambda x, b: bias_act(x, b, act="lrelu", clamp=CLAMP, backend=backend)


def _clamped(function: Callable[[Tensor, Tensor, float], Tensor]) -> Function:
    return lambda x, b: function(x, b, CLAMP)


def _away_from_kinks(x: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """x, but 50 wherever x + b is so close to 0 or to the clamp that rounding decides the branch:
    there a gradient may be that of either side, and the tests look at ties."""
    v = x.to(dtype) + b.to(dtype)[:, None, None]
    edge = CLAMP / ROW.gain
    return torch.where((v.abs() < 1) | ((v - edge).abs() < 4), 50, x)
