"""A whole network without gradients: StyleGAN2's generator from z and its discriminator's logits,
StyleGAN3's generator."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .. import use_backend
from ..models import stylegan2, stylegan3
from ..testing import tolerance
from . import stock
from .cases import CHANNEL_BASE, DTYPES, Case, conv_layers
from .gate import Expected
from .machine import tf32
from .peers import Peer, one_line, peer_generator
from .workload import Provider, Session, alternatives

EVERYWHERE = 16
"""As num_fp16_res: all resolutions from 8 on."""

AS_SHIPPED = 4
"""num_fp16_res of the originals' presets."""

CONV_CLAMP = 256


class NetworkForward:
    """16-bit cases work in 16 bits at every resolution from 8 on. A peer is timed twice on a GPU:
    as it is shipped (float16 at the four highest resolutions, NCHW, no TF32) and tuned (float16
    everywhere, channels_last but for StyleGAN3's, TF32)."""

    baseline = "reference"
    bytes = 0
    images = ""

    def __init__(self, case: Case, session: Session) -> None:
        self.case = case
        self.session = session
        self.dtype = self.arithmetic = DTYPES[case.dtype]
        self.is_generator = case.variant.startswith("G")
        self.is_third = case.variant.startswith("G3")
        n, _, resolution, _ = case.shape
        self.size: dict[str, Any] = {"img_resolution": resolution, "img_channels": 3, "c_dim": 0}
        base = CHANNEL_BASE[resolution]
        self.width: dict[str, Any] = {"channel_base": base, "conv_clamp": CONV_CLAMP}
        self.half = case.dtype != "float32"

        nhwc = case.layout == "nhwc"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = self._network(nhwc)
            for name, parameter in self.network.named_parameters():
                if name.endswith("noise_strength"):
                    nn.init.constant_(parameter, 0.1)
                elif name == "b4.out.weight":  # a sum that does not cancel
                    nn.init.ones_(parameter)
            x = torch.randn((n, 512) if self.is_generator else case.shape)
        self.network = self.network.to(session.device).eval().requires_grad_(False)
        self.x = x.to(session.device)
        self.flops = n * self._convolution_flops(resolution)

    def _convolution_flops(self, resolution: int) -> int:
        """For one image."""
        if not self.is_third:
            letter = self.case.variant[0]
            layers = [layer for _, layer in conv_layers(resolution) if layer.kind[0] == letter]
            return sum(layer.flops for layer in layers)
        return sum(
            2 * layer.weight.numel() * (layer.in_size + layer.conv_kernel - 1) ** 2
            for layer in self.network.modules()
            if isinstance(layer, stylegan3.SynthesisLayer)
        )

    def _network(self, nhwc: bool) -> nn.Module:
        blocks: dict[str, Any] = {}
        if self.half:
            blocks = {"half_dtype": self.dtype, "fp16_channels_last": nhwc}
        width = {**self.width, "num_fp16_res": EVERYWHERE if self.half else 0}
        if self.is_third:
            return stylegan3.Generator(z_dim=512, w_dim=512, **self.size, **width, **blocks)
        if self.is_generator:
            return stylegan2.Generator(z_dim=512, w_dim=512, **self.size, **width, **blocks)
        return stylegan2.Discriminator(**self.size, **width, block_kwargs=blocks)

    def copy(self) -> None:
        return None

    def copied_bytes(self) -> int:
        return 0

    def expected(self) -> list[Expected]:
        exact = copy.deepcopy(self.network).double()
        with use_backend("reference"):
            value = self._run(exact, self.x.double(), force_fp32=True)
        name = "image" if self.is_generator else "logits"
        scale = max(1.0, value.norm().item())
        return [Expected(name, value, allowed=tolerance(self.dtype, 9 * 512, scale))]

    def providers(self) -> Iterator[Provider]:
        if not self.is_third:
            formulation: Any = stock.Generator if self.is_generator else stock.Discriminator
            yield Provider("stock", self._call(formulation(self.network), "reference"))
        yield Provider("reference", self._call(self.network, "reference"))
        yield Provider("automatic", self._call(self.network))
        for name in alternatives(self.session.device.type, self.dtype):
            yield Provider(name, self._call(self.network, name))
        for peer in self.session.peers:
            yield self._peer(peer, tuned=False)
            if self.session.device.type == "cuda" and self._module(peer) is not None:
                yield self._peer(peer, tuned=True)

    def _module(self, peer: Peer) -> ModuleType | None:
        return peer.networks3 if self.is_third else peer.networks

    def _of_module(self, module: ModuleType, width: dict[str, Any], blocks: dict[str, Any]) -> Any:
        if self.is_generator:
            options = {**self.size, "z_dim": 512, "w_dim": 512}
            return peer_generator(module, options, {**width, **blocks})
        return module.Discriminator(**self.size, **width, block_kwargs=blocks)

    def _peer(self, peer: Peer, tuned: bool) -> Provider:
        name = f"{peer.name} tuned" if tuned else peer.name
        networks = self._module(peer)
        problem = peer.networks3_problem if self.is_third else peer.networks_problem
        problem = peer.problem or problem
        if self.case.dtype == "bfloat16":
            problem = problem or "its 16-bit blocks are float16"
        if networks is None or problem:
            return Provider(name, None, problem, ours=False)
        half = (EVERYWHERE if tuned else AS_SHIPPED) if self.half else 0
        width = {**self.width, "num_fp16_res": half}
        blocks = {"fp16_channels_last": True} if tuned and not self.is_third else {}
        try:
            with peer.imported():
                network = self._of_module(networks, width, blocks)
            network.load_state_dict(self.network.state_dict())
        except Exception as error:
            return Provider(name, None, f"networks: {one_line(error)}", ours=False)
        network = network.to(self.session.device).eval().requires_grad_(False)
        layout = ", channels_last" if blocks else ""
        detail = f"{peer.detail} num_fp16_res={half}{layout}{', TF32' * tuned}".lstrip()
        return Provider(name, self._call(network, tf32_too=tuned), detail, ours=False)

    def _call(
        self, network: Any, backend: str | None = None, tf32_too: bool = False
    ) -> Callable[[], list[Tensor]]:
        # Elsewhere than on CUDA, 16-bit blocks work in 16 bits only where they are told to.
        told = {"force_fp32": False} if self.half and self.session.device.type != "cuda" else {}

        def call() -> list[Tensor]:
            with use_backend(backend), tf32(tf32_too):
                return [self._run(network, self.x, **told)]

        return call

    @torch.no_grad()
    def _run(self, network: Any, x: Tensor, **options: Any) -> Tensor:
        if self.is_generator:
            options["noise_mode"] = "const"
        return network(x, x.new_zeros(x.shape[0], 0), **options)
