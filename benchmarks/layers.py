"""A convolution layer of StyleGAN2, as its networks call it: ours, the stock formulation's, a
peer's, all with the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import no_weight_gradients, use_backend
from ..layers import Conv2dLayer, SynthesisLayer, ToRGBLayer
from ..testing import tolerance
from . import stock
from .cases import DTYPES, KINDS, LAYOUTS, Case, ConvLayer
from .gate import Expected
from .machine import tf32
from .peers import Peer, one_line
from .workload import Provider, Results, Session, alternatives, compiled

W_DIM = 512
CLAMP = 2.0
"""So low that some of the values reach it."""

# Tensors of the size of x, of y and of the weight that have to be read or written, and convolutions
# of this size.
_MOVED = {"forward": (1, 1, 1), "forward+backward": (3, 3, 3), "double backward": (6, 6, 4)}
_CONVOLUTIONS = {"forward": 1, "forward+backward": 3, "double backward": 4}


def build(layer: ConvLayer, module: Any) -> nn.Module:
    """The layer out of a module that has StyleGAN2's classes, ours or a peer's."""
    kind, (name, i, o) = KINDS[layer.kind], layer[:3]
    if name == "G.torgb":
        return module.ToRGBLayer(i, o, w_dim=W_DIM, conv_clamp=CLAMP)
    if name.startswith("G."):
        return module.SynthesisLayer(
            i, o, w_dim=W_DIM, resolution=layer.out_size, up=kind.up, conv_clamp=CLAMP
        )
    if name == "D.skip":
        return module.Conv2dLayer(i, o, kind.kernel_size, bias=False, down=kind.down)
    return module.Conv2dLayer(
        i, o, kind.kernel_size, activation="lrelu", down=kind.down, conv_clamp=CLAMP
    )


class _Ours:
    Conv2dLayer, SynthesisLayer, ToRGBLayer = Conv2dLayer, SynthesisLayer, ToRGBLayer


def _stock(module: nn.Module) -> Callable[..., Tensor]:
    formulation: Any = {
        SynthesisLayer: stock.synthesis_layer,
        ToRGBLayer: stock.torgb,
        Conv2dLayer: stock.conv2d,
    }[type(module)]
    return lambda *inputs: formulation(module, *inputs)


class ConvolutionLayer:
    """forward+backward: the gradients by x, by w and by every parameter. double backward: those by
    x and w, and of their product with h those by x, w, the parameters and dy, which is what a
    gradient penalty or path-length regularisation asks of a layer.

    A peer's layer gets the case's dtype and layout: float32 and float16 in NCHW are what it ships
    with, float16 in NHWC is what one tunes it to."""

    baseline = "stock"
    images = ""

    def __init__(self, case: Case, session: Session) -> None:
        self.case = case
        self.session = session
        self.layer = layer = ConvLayer.of(case)
        self.dtype = self.arithmetic = DTYPES[case.dtype]
        n, i = case.shape[:2]
        out_shape = (n, layer.out_channels, layer.out_size, layer.out_size)
        x_part, y_part, weights = _MOVED[case.mode]
        items = x_part * n * i * layer.size**2 + y_part * n * layer.out_channels * out_shape[2] ** 2
        self.bytes = (items + weights * layer.weights) * self.dtype.itemsize
        self.flops = _CONVOLUTIONS[case.mode] * n * layer.flops

        device, differentiated = session.device, case.mode != "forward"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.module = build(layer, _Ours)
            for name, parameter in self.module.named_parameters():
                if name in ("bias", "noise_strength"):
                    nn.init.normal_(parameter, std=0.5)
        self.module = self.module.to(device).requires_grad_(differentiated)
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device).to(dtype)
            if len(shape) < 4:
                return values
            return values.contiguous(memory_format=LAYOUTS[case.layout])

        of_g = layer.kind.startswith("G.")
        styles = ((n, W_DIM),) if of_g else ()
        self.inputs: tuple[Tensor, ...] = (
            draw(*case.shape),
            *(draw(*shape, dtype=torch.float32) for shape in styles),
        )
        self.h = tuple(draw(*t.shape, dtype=t.dtype) for t in self.inputs)
        self.dy = draw(*out_shape)
        self.counted: Tensor | None = None
        if differentiated:
            # Where rounding would decide the branch, a gradient may be that of either side.
            y = self._exactly("forward")[0].abs()
            distance = torch.minimum(y, (y - CLAMP).abs())
            self.counted = distance > tolerance(self.dtype, self._terms("y"))
            self.dy.mul_(self.counted)
            for t in self.inputs:
                t.requires_grad_()
            self.dy.requires_grad_(case.mode == "double backward")

        # As the originals' networks choose it.
        fused = not differentiated and (case.dtype == "float32" or n == 1)
        self.options: dict[str, Any] = {}
        if of_g:
            self.options["fused_modconv"] = fused
        if layer.kind.startswith("G.conv"):
            self.options["noise_mode"] = "const"

    def copy(self) -> Callable[[], object]:
        source = self.inputs[0].new_zeros((self.inputs[0].numel() + self.dy.numel()) // 2)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def copied_bytes(self) -> int:
        return 2 * ((self.inputs[0].numel() + self.dy.numel()) // 2) * self.dtype.itemsize

    def expected(self) -> list[Expected]:
        expected = []
        for name, value in zip(self._names(), self._exactly(self.case.mode)):
            terms = self._terms(name)
            scale = max(1.0, value.norm().item())
            if name.endswith(("of bias", "of noise_strength")):
                # Sums over pixels that cancel, some of them to 0.
                scale = max(scale, terms**0.5)
            counted = self.counted if name == "gradient of dy" else None
            allowed = tolerance(self.dtype, terms, scale)
            expected.append(Expected(name, value, allowed=allowed, counted=counted))
        return expected

    def _exactly(self, mode: str) -> list[Tensor]:
        """The results in float64, sample by sample: together they could take too much memory."""
        module = copy.deepcopy(self.module).double()
        options = {"noise_mode": "const"} if isinstance(module, SynthesisLayer) else {}
        parameters = list(module.parameters())
        samples = []
        for n in range(self.case.shape[0]):
            *inputs, dy = (
                t.detach()[n : n + 1].double().requires_grad_(mode != "forward")
                for t in (*self.inputs, self.dy)
            )
            h = [t[n : n + 1].double() for t in self.h]
            with use_backend("reference"):
                results = _differentiated(
                    lambda *inputs: module(*inputs, **options), mode, inputs, parameters, dy, h
                )
            of = (dy, *inputs, *(inputs if mode == "double backward" else ()), *parameters, dy)
            samples.append(
                [torch.zeros_like(t) if r is None else r.detach() for r, t in zip(results, of)]
            )
        values = zip(*samples)
        parameter_names = {f"gradient of {name}" for name, _ in module.named_parameters()}
        return [
            sum(parts[1:], parts[0]) if name in parameter_names else torch.cat(parts)
            for name, parts in zip(self._names(mode), values)
        ]

    def _names(self, mode: str | None = None) -> list[str]:
        """The names of what a call returns."""
        mode = self.case.mode if mode is None else mode
        inputs = ("x", "w")[: len(self.inputs)]
        parameters = [f"gradient of {name}" for name, _ in self.module.named_parameters()]
        first = [f"gradient of {name}" for name in inputs]
        if mode == "forward":
            return ["y"]
        if mode == "forward+backward":
            return ["y", *first, *parameters]
        second = [f"second gradient of {name}" for name in inputs]
        return ["y", *first, *second, *parameters, "gradient of dy"]

    def _terms(self, name: str) -> int:
        """How many products an element sums, at most."""
        taps, layer = KINDS[self.layer.kind].kernel_size ** 2, self.layer
        if name == "y" or name.endswith((" x", " dy")):
            return max(layer.in_channels, layer.out_channels) * taps
        return self.case.shape[0] * max(layer.size, layer.out_size) ** 2 * layer.out_channels

    def providers(self) -> Iterator[Provider]:
        yield Provider("stock", self._call(_stock(self.module), backend="reference"))
        yield Provider("reference", self._call(self._layer(self.module), backend="reference"))
        yield Provider("automatic", self._call(self._layer(self.module)))
        for name in alternatives(self.session.device.type, self.dtype):
            yield Provider(name, self._call(self._layer(self.module), backend=name))
        for peer in self.session.peers:
            yield self._peer(peer)

        def call(function: Callable[..., Tensor]) -> Callable[[], Results]:
            return self._call(function, backend="reference")

        layer = self._layer(self.module)
        yield from compiled(layer, self.case.mode, self.session, call)

    def _peer(self, peer: Peer) -> Provider:
        problem = peer.problem or peer.networks_problem
        if peer.networks is None:
            return Provider(peer.name, None, problem, ours=False)
        try:
            with peer.imported():
                module = build(self.layer, peer.networks).to(self.session.device)
            module.load_state_dict(self.module.state_dict())
        except Exception as error:
            return Provider(peer.name, None, f"layers: {one_line(error)}", ours=False)
        module.requires_grad_(self.case.mode != "forward")
        call = self._call(self._layer(module), module)
        return Provider(peer.name, call, peer.detail, ours=False)

    def _layer(self, module: nn.Module) -> Callable[..., Tensor]:
        return lambda *inputs: module(*inputs, **self.options)

    def _call(
        self,
        function: Callable[..., Tensor],
        module: nn.Module | None = None,
        backend: str | None = None,
    ) -> Callable[[], Results]:
        parameters = list((self.module if module is None else module).parameters())

        def call() -> Results:
            with use_backend(backend), tf32(False):
                return _differentiated(
                    function, self.case.mode, self.inputs, parameters, self.dy, self.h
                )

        return call


def _differentiated(
    function: Callable[..., Tensor],
    mode: str,
    inputs: Any,
    parameters: list[nn.Parameter],
    dy: Tensor,
    h: Any,
) -> Results:
    y = function(*inputs)
    if mode == "forward":
        return (y,)
    if mode == "forward+backward":
        return y, *torch.autograd.grad(y, (*inputs, *parameters), dy)
    with no_weight_gradients():
        first = torch.autograd.grad(y, inputs, dy, create_graph=True)
    wanted = (*inputs, *parameters, dy)
    return y, *first, *torch.autograd.grad(first, wanted, h, allow_unused=True)
