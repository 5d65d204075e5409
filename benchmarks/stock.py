"""StyleGAN2's layers and networks as one writes them without this package, on the weights of ours.

    y = clamp(gain · act(conv(d ⊙ s ⊙ weight, x) + noise + bias))

in PyTorch's own operators: a weight for each sample in one grouped convolution, a zero-stuffing and
a depthwise convolution for each FIR filter, and a pass of its own for whatever else there is. (The
originals do so in inference; in training they scale x and y around one shared convolution.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.geometry import Fir
from ..layers import Conv2dLayer, SynthesisLayer, ToRGBLayer
from ..models import stylegan2
from .upfirdn2d import stock as upfirdn2d


def _fir(x: Tensor, f: Tensor, padding: list[int], up: int = 1, down: int = 1, gain: int = 1):
    return upfirdn2d(x, f, Fir.of((up, up), (down, down), padding, False, gain))


def _bias_act(
    y: Tensor, layer: SynthesisLayer | ToRGBLayer | Conv2dLayer, gain: float = 1
) -> Tensor:
    if layer.bias is not None:
        y = y + layer.bias.to(y.dtype)[:, None, None]
    if getattr(layer, "activation", "linear") == "lrelu":
        y = F.leaky_relu(y, 0.2)
    gain_of_act = getattr(layer, "act_gain", 1) * gain
    if gain_of_act != 1:
        y = y * gain_of_act
    if layer.conv_clamp is not None:
        y = y.clamp(-layer.conv_clamp * gain, layer.conv_clamp * gain)
    return y


def modulated_conv2d(
    x: Tensor,  # [N, I, H, W]
    weight: Tensor,  # [O, I, k, k]
    styles: Tensor,  # [N, I]
    f: Tensor | None = None,  # [4, 4]
    demodulate: bool = True,
) -> Tensor:
    """With a filter, to twice the resolution."""
    n, _, height, width = x.shape
    o, i, k, _ = weight.shape
    if demodulate and x.dtype == torch.float16:
        weight = weight / (math.sqrt(i * k * k) * weight.abs().amax([1, 2, 3], keepdim=True))
        styles = styles / styles.abs().amax(1, keepdim=True)
    kernels = weight * styles[:, None, :, None, None]  # [N, O, I, k, k]
    if demodulate:
        kernels = kernels * (kernels.square().sum([2, 3, 4], keepdim=True) + 1e-8).rsqrt()
    kernels = kernels.to(x.dtype)
    x = x.reshape(1, n * i, height, width)
    if f is None:
        y = F.conv2d(x, kernels.flatten(0, 1), padding=k // 2, groups=n)
        return y.reshape(n, o, height, width)
    kernels = kernels.transpose(1, 2).flatten(0, 1)
    y = F.conv_transpose2d(x, kernels, stride=2, groups=n)
    y = y.reshape(n, o, 2 * height + 1, 2 * width + 1)
    return _fir(y, f, [1, 1, 1, 1], gain=4)


def synthesis_layer(layer: SynthesisLayer, x: Tensor, w: Tensor) -> Tensor:
    f = layer.resample_filter if layer.up == 2 else None
    y = modulated_conv2d(x, layer.weight, layer.affine(w), f)
    y = y + (layer.noise_const * layer.noise_strength).to(y.dtype)
    return _bias_act(y, layer)


def torgb(layer: ToRGBLayer, x: Tensor, w: Tensor) -> Tensor:
    styles = layer.affine(w) * layer.weight_gain
    return _bias_act(modulated_conv2d(x, layer.weight, styles, demodulate=False), layer)


def conv2d(layer: Conv2dLayer, x: Tensor, gain: float = 1) -> Tensor:
    weight, f = (layer.weight * layer.weight_gain).to(x.dtype), layer.resample_filter
    if layer.down == 1:
        y = F.conv2d(x, weight, padding=layer.padding)
    elif layer.kernel_size == 1:
        y = F.conv2d(_fir(x, f, [1, 1, 1, 1], down=2), weight)
    else:
        y = F.conv2d(_fir(x, f, [2, 2, 2, 2]), weight, stride=2)
    return _bias_act(y, layer, gain)


class Generator:
    """The weights of a generator, architecture "skip", in this formulation; noise is constant."""

    def __init__(self, G: stylegan2.Generator) -> None:
        self.G = G
        self.mapping = G.mapping
        self.parameters = G.parameters

    def __call__(self, z: Tensor, c: Tensor, **options: Any) -> Tensor:
        return self.synthesis(self.mapping(z, c), **options)

    def synthesis(
        self, ws: Tensor, noise_mode: str = "const", force_fp32: bool | None = None
    ) -> Tensor:
        assert noise_mode == "const"
        network: Any = self.G.synthesis
        x = network.b4.const.repeat(ws.shape[0], 1, 1, 1)
        img: Tensor | None = None
        row = 0
        for resolution in network.block_resolutions:
            block = getattr(network, f"b{resolution}")
            dtype, memory_format = block.working_format(block.torgb.weight, force_fp32)
            x = x.to(dtype=dtype, memory_format=memory_format)
            for name in ("conv0", "conv1")[-block.num_conv :]:
                x = synthesis_layer(getattr(block, name), x, ws[:, row])
                row += 1
            rgb = torgb(block.torgb, x, ws[:, row]).to(block.torgb.weight.dtype)
            if img is None:
                img = rgb
            else:
                img = _fir(img, block.resample_filter, [2, 1, 2, 1], up=2, gain=4) + rgb
        assert img is not None
        return img


class Discriminator:
    """The weights of a discriminator, architecture "resnet", in this formulation."""

    def __init__(self, D: stylegan2.Discriminator) -> None:
        self.D = D
        self.parameters = D.parameters

    def __call__(self, x: Tensor, c: Tensor, force_fp32: bool | None = None) -> Tensor:
        for resolution in self.D.block_resolutions:
            block = getattr(self.D, f"b{resolution}")
            dtype, memory_format = block.working_format(block.conv1.weight, force_fp32)
            x = x.to(dtype=dtype, memory_format=memory_format)
            if block.in_channels == 0:
                x = conv2d(block.fromrgb, x)
            shortcut = conv2d(block.skip, x, math.sqrt(0.5))
            x = shortcut + conv2d(block.conv1, conv2d(block.conv0, x), math.sqrt(0.5))
        end: Any = self.D.b4
        x = end.mbstd(x.to(dtype=end.out.weight.dtype, memory_format=torch.contiguous_format))
        return end.out(end.fc(conv2d(end.conv, x).flatten(1)))
