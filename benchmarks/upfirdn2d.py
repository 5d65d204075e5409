"""upfirdn2d as networks and metrics call it, alone and in one pass with what follows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..activations import ACTIVATIONS
from ..backends.geometry import Fir, Geometry, Tail
from ..ops.upfirdn2d import setup_filter, upfirdn2d, upfirdn2d_epilogue
from ..reference.bias_act import Epilogue
from ..reference.bias_act import epilogue as reference_epilogue
from ..reference.upfirdn2d import centring
from ..reference.upfirdn2d import upfirdn2d as reference_upfirdn2d
from .cases import DTYPES, LAYOUTS, Case
from .gate import Expected
from .peers import Peer
from .workload import Function, Provider, Results, Session, candidates, compiled, differentiate

CLAMP = 256.0
ROW = ACTIVATIONS["lrelu"]

BINOMIAL = (1, 3, 3, 1)
SYMLET = (0.0154041, 0.0034907, -0.1179901, -0.0483117, 0.4910559, 0.7876411,
          0.3379294, -0.0726375, -0.0210603, 0.0447249, 0.0017677, -0.0078007)  # fmt: skip
"""The low-pass filter of the wavelet that ADA resamples with."""


def _gaussian(taps: int) -> list[float]:
    return [2 ** -((6 * i / taps - 3) ** 2) for i in range(taps)]


def _cone(size: int) -> list[list[float]]:
    """Round, so not separable."""
    radius = (size - 1) / 2
    distances = [[math.hypot(x - radius, y - radius) for x in range(size)] for y in range(size)]
    return [[max(0.0, 1 - distance / size) for distance in row] for row in distances]


class Variant(NamedTuple):
    f: Tensor  # as setup_filter makes it
    fir: Fir

    @property
    def taps(self) -> tuple[int, int]:
        return self.f.shape[-1], self.f.shape[0]

    @property
    def terms(self) -> int:
        """How many products an element of the result sums."""
        return math.ceil(self.taps[0] / self.fir.up_x) * math.ceil(self.taps[1] / self.fir.up_y)

    def run(self, function: Callable[..., Tensor], x: Tensor, f: Tensor, **more: Any) -> Tensor:
        """function(x, f, …), which has the signature of ours."""
        return function(x, f, *self.fir.arguments(), **more)


def _variant(
    taps: Sequence,
    up: int = 1,
    down: int = 1,
    padding: Sequence[int] = (),
    extra: int = 0,
    gain: int = 1,
    flip_filter: bool = False,
) -> Variant:
    """Without `padding`, what upsample2d, downsample2d or filter2d makes of padding=`extra`."""
    f = setup_filter(taps)
    centres = centring(f.shape[-1], up, down) + centring(f.shape[0], up, down)
    sides = padding or [centre + extra for centre in centres]
    return Variant(f, Fir.of((up, up), (down, down), sides, flip_filter, gain * up**2))


VARIANTS = {
    "same": _variant(BINOMIAL),
    "up2": _variant(BINOMIAL, up=2),
    "down2": _variant(BINOMIAL, down=2),
    "up2 12-tap": _variant(SYMLET, up=2),
    "down2 12-tap": _variant(SYMLET, down=2),
    "after conv": _variant(BINOMIAL, padding=[1] * 4, gain=4),
    "before conv": _variant(BINOMIAL, padding=[2] * 4),
    "down2 12-tap crop": _variant(SYMLET, down=2, extra=-6, flip_filter=True),
    "down2 crop": _variant(BINOMIAL, down=2, extra=-1, flip_filter=True),
    "blur 61-tap": _variant(_gaussian(61)),
    "blur 1x61": _variant([_gaussian(61)], padding=[40, 20, 0, 0]),
    "up4 47x47": _variant(_cone(47), up=4, padding=[23] * 4),
    "up4 127x127": _variant(_cone(127), up=4),
}
"""What the originals' networks, their augmentation, metrics and viewer call."""


def split(variant: str) -> tuple[Variant, str]:
    """The resampling and what follows it: "", "epilogue" or "add"."""
    name, _, tail = variant.partition(" + ")
    return VARIANTS[name], tail


def fir_flops(variant: Variant, shape: tuple[int, ...]) -> int:
    """Multiplications and additions with the samples that are not stuffed zeros: of all taps, or,
    where the filter is a product of a row and a column, of these, in the cheaper order."""
    n, c, height, width = shape
    fir, (fw, fh) = variant.fir, variant.taps
    out_height, out_width = fir.output_size(height, width, variant.taps)
    if variant.f.ndim == 2 and torch.linalg.matrix_rank(variant.f) > 1:
        products = out_height * out_width * fw * fh / (fir.up_x * fir.up_y)
    else:
        # A single tap joins those of the other axis.
        along_x, along_y = (
            0 if taps == 1 else taps / up for taps, up in ((fw, fir.up_x), (fh, fir.up_y))
        )
        x_first = height * out_width * along_x + out_height * out_width * along_y
        y_first = out_height * width * along_y + out_height * out_width * along_x
        products = min(x_first, y_first)
    return round(2 * n * c * products)


def stock(x: Tensor, f: Tensor, fir: Fir) -> Tensor:
    """What one writes without this package: zero-stuff, pad, depthwise convolution."""
    n, c, h, w = x.shape
    z = F.pad(x.reshape(n, c, h, 1, w, 1), [0, fir.up_x - 1, 0, 0, 0, fir.up_y - 1])
    z = z.reshape(n, c, h * fir.up_y, w * fir.up_x)
    z = F.pad(z, [fir.x0, fir.x1, fir.y0, fir.y1])
    g = f if fir.flip_filter else f.flip(tuple(range(f.ndim)))
    g = g.to(x.dtype)
    if g.ndim == 2:
        g = (g * fir.gain).expand(c, 1, *g.shape)
        return F.conv2d(z, g, stride=(fir.down_y, fir.down_x), groups=c)
    row, column = (g * fir.gain).expand(c, 1, 1, -1), g[:, None].expand(c, 1, -1, 1)
    z = F.conv2d(z, row, stride=(1, fir.down_x), groups=c)
    return F.conv2d(z, column, stride=(fir.down_y, 1), groups=c)


# Additions, multiplications and comparisons of the epilogue per element of y and of x. The gradient
# of scale is the product of x with that of the unscaled x.
_EPILOGUE_FLOPS = {"forward": (8, 0), "backward": (3, 1), "forward+backward": (11, 3)}
_PASSES = {"forward": 1, "backward": 1, "forward+backward": 2, "double backward": 3}


class Upfirdn2d:
    baseline = "stock"
    images = ""

    def __init__(self, case: Case, session: Session) -> None:
        self.case = case
        self.session = session
        self.variant, self.tail = split(case.variant)
        self.dtype = DTYPES[case.dtype]
        self.arithmetic = torch.promote_types(self.dtype, torch.float32)
        n, c, h, w = case.shape
        self.out_shape = (n, c, *self.variant.fir.output_size(h, w, self.variant.taps))
        self.adjoint = self.variant.fir.adjoint(h, w, self.variant.taps)

        generator = torch.Generator(session.device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator, device=session.device)
            return values.clamp(-3, 3).to(self.dtype)

        def image(values: Tensor) -> Tensor:
            return values.contiguous(memory_format=LAYOUTS[case.layout])

        self.f = self.variant.f.to(session.device)
        self.x = image(draw(*case.shape))
        self.dy = image(draw(*self.out_shape))
        self.noise = torch.empty(0, device=session.device)
        operands: tuple[Tensor, ...] = ()
        if self.tail == "epilogue":
            # |scale * u + b| is below 50: the noise decides the branches, pixel by pixel, and
            # keeps v from 0 and from the clamp, where rounding would decide.
            values = torch.tensor([-400.0, -100.0, 100.0, 400.0], device=session.device)
            chosen = torch.randint(
                4, (n, 1, *self.out_shape[2:]), generator=generator, device=session.device
            )
            self.noise = values[chosen]
            operands = (1 + draw(n, c) / 6, draw(c))  # scale, b
        elif self.tail == "add":
            operands = (image(draw(*self.out_shape)),)
        self.inputs = (self.x, *operands)
        directions = (draw(*t.shape) for t in self.inputs)
        self.h = tuple(image(t) if t.ndim == 4 else t for t in directions)
        if case.level == "user" and case.mode != "forward":
            for t in self.inputs:
                t.requires_grad_()
            self.dy.requires_grad_(case.mode == "double backward")
        self.bytes, self.flops = self._cost()

    def _cost(self) -> tuple[int, int]:
        """Bytes and FLOPs. A mask has two bits an element; the gradient of scale reads x again,
        that of the added tensor is dy itself."""
        mode, passes = self.case.mode, _PASSES[self.case.mode]
        numel = math.prod(self.out_shape)
        fir = fir_flops(self.variant, self.case.shape)
        x, y = self.x.numel() * self.dtype.itemsize, numel * self.dtype.itemsize
        f = self.f.numel() * self.f.itemsize
        if self.tail == "epilogue":
            scale, b = (t.numel() * self.dtype.itemsize for t in self.inputs[1:])
            noise, mask = self.noise.numel() * self.noise.itemsize, numel // 4
            forward = x + f + y + noise + scale + b
            backward = y + f + x + mask + scale + b
            moved = {
                "forward": forward,
                "backward": backward,
                "forward+backward": forward + mask + backward + x + scale,
            }
            of_y, of_x = _EPILOGUE_FLOPS[mode]
            return moved[mode], passes * fir + of_y * numel + of_x * self.x.numel()
        added = self.tail == "add"
        return passes * (x + f + y) + added * y, passes * fir + added * numel

    def copy(self) -> Callable[[], object]:
        source = self.x.new_empty(self._half()).zero_()
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def _half(self) -> int:
        """Elements to copy, so that as many are read and written as there are in x and y."""
        return (self.x.numel() + math.prod(self.out_shape)) // 2

    def copied_bytes(self) -> int:
        return 2 * self._half() * self.dtype.itemsize

    def expected(self) -> list[Expected]:
        mode = "forward+backward" if self.case.mode == "backward" else self.case.mode
        slices = []
        channels = self.x.shape[1]
        for start in range(0, channels, 16):  # all at once, float64 would take too much memory
            part = slice(start, start + 16)
            inputs = tuple(self._channels(t, part).requires_grad_() for t in self.inputs)
            h = tuple(self._channels(t, part) for t in self.h)
            dy = self._channels(self.dy, part).requires_grad_()
            results = differentiate(self._reference, mode, inputs, dy, h)
            # The operator is linear: autograd leaves its second gradients out.
            shapes = (dy, *inputs, *inputs, dy)
            whole = [torch.zeros_like(t) if r is None else r for r, t in zip(results, shapes)]
            slices.append([r.detach() for r in whole])
        expected = [
            Expected(name, torch.cat(parts, 0 if parts[0].ndim == 1 else 1), terms)
            for (name, terms), parts in zip(self._results(), zip(*slices))
        ]
        if self.case.mode != "backward":
            return expected
        return [e for e in expected if e.name in ("gradient of x", "gradient of b")]

    def _channels(self, t: Tensor, part: slice) -> Tensor:
        return t.detach()[part if t.ndim == 1 else (slice(None), part)].double()

    def _results(self) -> list[tuple[str, int]]:
        """The names of what a call returns, and how many terms each element sums."""
        forward = self.variant.terms
        backward = self.variant._replace(fir=self.adjoint).terms
        pixels = self.out_shape[2] * self.out_shape[3]
        names = {"": ("x",), "epilogue": ("x", "scale", "b"), "add": ("x", "add")}[self.tail]
        terms = {
            "x": backward,
            "scale": pixels * forward,
            "b": self.out_shape[0] * pixels,
            "add": 1,
        }
        first = [(f"gradient of {name}", terms[name]) for name in names]
        second = [(f"second gradient of {name}", terms[name]) for name in names]
        return [("y", forward), *first, *second, ("gradient of dy", forward)]

    # What a call computes

    def _reference(self, *inputs: Tensor) -> Tensor:
        x, *operands = inputs
        u = self.variant.run(reference_upfirdn2d, x, self.f)
        if self.tail == "epilogue":
            return reference_epilogue(u, self._end(*operands))
        return u + operands[0] if self.tail else u

    def _end(self, scale: Tensor, b: Tensor) -> Epilogue:
        return Epilogue(scale, self.noise, b, "lrelu", clamp=CLAMP)

    def _stock(self, *inputs: Tensor) -> Tensor:
        x, *operands = inputs
        y = stock(x, self.f, self.variant.fir)
        if self.tail == "epilogue":
            scale, b = operands
            y = F.leaky_relu(self._scaled(y, scale) + b[:, None, None], ROW.alpha)
            return (y * ROW.gain).clamp(-CLAMP, CLAMP)
        return y + operands[0] if self.tail else y

    def _scaled(self, u: Tensor, scale: Tensor) -> Tensor:
        return u * scale[:, :, None, None] + self.noise.to(u.dtype)

    def _peer(self, peer: Peer) -> Function:
        def function(x: Tensor, *operands: Tensor) -> Tensor:
            assert peer.upfirdn2d is not None and peer.bias_act is not None
            u = peer.upfirdn2d(x, self.f, self.variant.fir)
            if self.tail == "epilogue":
                scale, b = operands
                return peer.bias_act(self._scaled(u, scale), b, CLAMP)
            return u + operands[0] if self.tail else u

        return function

    def _ours(self, backend: str) -> Function:
        def function(x: Tensor, *operands: Tensor) -> Tensor:
            if not self.tail:
                return self.variant.run(upfirdn2d, x, self.f, backend=backend)
            epilogue = self.tail == "epilogue"
            end, add = (self._end(*operands), None) if epilogue else (Epilogue(), operands[0])
            fused = upfirdn2d_epilogue
            return self.variant.run(fused, x, self.f, end=end, add=add, backend=backend)

        return function

    # Who computes it

    def providers(self) -> Iterator[Provider]:
        names = candidates("upfirdn2d", self.session.device.type, self.dtype)
        if self.case.level == "user":
            yield from self._functions(names)
            return
        for name in names:
            if name != "reference":  # it has no kernels
                yield Provider(name, self._kernel(backends.BACKENDS[name]))

    def _functions(self, names: list[str]) -> Iterator[Provider]:
        # conv2d has types and sizes for which it lays out more than the memory there is.
        yield Provider("stock", self._call(self._stock), ours=False)
        for name in names:
            yield Provider(name, self._call(self._ours(name)))
        for peer in self.session.peers:
            problem = peer.problem or peer.upfirdn2d_problem
            if problem:
                yield Provider(peer.name, None, problem, ours=False)
            else:
                yield Provider(peer.name, self._call(self._peer(peer)), peer.detail, ours=False)
        yield from compiled(self._reference, self.case.mode, self.session, self._call)

    def _call(self, function: Function) -> Callable[[], Results]:
        return lambda: differentiate(function, self.case.mode, self.inputs, self.dy, self.h)

    def _kernel(self, backend: ModuleType) -> Callable[[], Results]:
        """The backend's kernel of this mode, writing into tensors that exist."""
        fir, f = self.variant.fir, self.f.to(self.arithmetic)
        x, operands = self.x, self.inputs[1:]
        y = torch.full_like(self.dy, math.nan)
        dx = torch.full_like(x, math.nan)
        if self.tail == "epilogue":
            return self._fused_kernel(backend, f, y, dx)

        def forward() -> Results:
            backend.upfirdn2d_forward(x, f, fir, y, *operands)
            return (y,)

        def backward() -> Results:
            backend.upfirdn2d_forward(self.dy, f, self.adjoint, dx)
            return (dx,)

        return forward if self.case.mode == "forward" else backward

    def _fused_kernel(
        self, backend: ModuleType, f: Tensor, y: Tensor, dx: Tensor
    ) -> Callable[[], Results]:
        n, c, h, w = y.shape
        nhwc = self.case.layout == "nhwc"
        geometry = Geometry(n * h * w, c, 1, h * w) if nhwc else Geometry(n, c, h * w, h * w)
        scale, b = self.inputs[1:]
        scale, noise = (t.to(self.arithmetic) for t in (scale, self.noise.reshape(n, h * w)))
        tail = Tail(scale, noise, None, b, ROW.code, ROW.alpha, ROW.gain, CLAMP)

        def forward(mask: Tensor | None = None) -> Results:
            backend.upfirdn2d_forward(
                self.x, f, self.variant.fir, y, mask=mask, geometry=geometry, tail=tail
            )
            return (y,)

        if self.case.mode == "forward":
            return forward
        mask = self.x.new_empty((y.numel() + 7) // 8 * 2, dtype=torch.uint8)
        forward(mask)
        db = torch.full_like(b, math.nan, dtype=self.arithmetic)
        slope = ROW.negative_slope(ROW.alpha)

        def backward() -> Results:
            backend.upfirdn2d_masked(
                self.dy, mask, dx, db, scale, f, self.adjoint, geometry, slope, ROW.gain
            )
            return dx, db

        return backward
