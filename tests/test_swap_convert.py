"""Conversion of live networks: layers written here, with the names, arguments and attributes of the
repositories' layers, out of unfused operators."""

import copy
import io
import math
import pickle
import re

import pytest
import torch
from torch import nn

from stylegan_fast import layers, ops, swap
from stylegan_fast.models import stylegan2
from stylegan_fast.testing import assert_matches

FILTER = ops.setup_filter([1, 3, 3, 1])


@pytest.fixture(autouse=True)
def undone():
    yield
    swap.uninstall()


class _Layer(nn.Module):
    def __init__(self, inputs, outputs, k):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, k, k))
        self.bias = nn.Parameter(torch.randn(outputs))
        self.conv_clamp = 1.5
        self.padding = k // 2
        self.weight_gain = 1 / math.sqrt(inputs * k * k)
        self.register_buffer("resample_filter", FILTER)


class SynthesisLayer(_Layer):
    def __init__(self, inputs, outputs, w_dim, resolution, up=1, use_noise=True):
        super().__init__(inputs, outputs, 3)
        self.affine = nn.Linear(w_dim, inputs)
        self.resolution = resolution
        self.up = up
        self.use_noise = use_noise
        self.activation = "lrelu"
        self.act_gain = math.sqrt(2)
        del self.weight_gain
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.noise_strength = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, w, noise_mode="random", fused_modconv=True, gain=1):
        noise = None
        if self.use_noise and noise_mode == "random":
            noise = torch.randn([len(x), 1, self.resolution, self.resolution]).to(x.dtype)
            noise = noise * self.noise_strength
        elif self.use_noise and noise_mode == "const":
            noise = self.noise_const * self.noise_strength
        y = ops.modulated_conv2d(
            x, self.weight, self.affine(w), noise, self.up, 1, self.padding, self.resample_filter,
            True, self.up == 1, fused_modconv,
        )  # fmt: skip
        clamp = self.conv_clamp * gain
        return ops.bias_act(y, self.bias, act="lrelu", gain=self.act_gain * gain, clamp=clamp)


class ToRGBLayer(_Layer):
    def __init__(self, inputs, outputs, w_dim):
        super().__init__(inputs, outputs, 1)
        self.affine = nn.Linear(w_dim, inputs)

    def forward(self, x, w, fused_modconv=True):
        styles = self.affine(w) * self.weight_gain
        y = ops.modulated_conv2d(x, self.weight, styles, demodulate=False)
        return ops.bias_act(y, self.bias, clamp=self.conv_clamp)


class Conv2dLayer(_Layer):
    def __init__(self, inputs, outputs, k, up=1, down=1):
        super().__init__(inputs, outputs, k)
        self.activation = "swish"
        self.act_gain = math.sqrt(2)
        self.up = up
        self.down = down

    def forward(self, x, gain=1):
        w = self.weight * self.weight_gain
        size = (self.up, self.down, self.padding)
        y = ops.conv2d_resample(x, w, self.resample_filter, *size, flip_weight=self.up == 1)
        clamp = self.conv_clamp * gain
        return ops.bias_act(y, self.bias, act="swish", gain=self.act_gain * gain, clamp=clamp)


class NoiseInjection(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3]))

    def forward(self, image, noise=None):
        if noise is None:
            samples, _, height, width = image.shape
            noise = image.new_empty(samples, 1, height, width).normal_()
        return image + self.weight * noise


class Blur(nn.Module):
    def __init__(self, pad, gain):
        super().__init__()
        self.register_buffer("kernel", FILTER * gain)
        self.pad = pad

    def forward(self, input):
        return ops.upfirdn2d(input, self.kernel, padding=self.pad * 2)


class Upsample(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", FILTER * 4)
        self.factor = 2
        self.pad = (2, 1)

    def forward(self, input):
        return ops.upfirdn2d(input, self.kernel, up=2, padding=self.pad * 2)


class ModulatedConv2d(nn.Module):
    def __init__(self, inputs, outputs, k, style_dim, demodulate=True, resample=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, outputs, inputs, k, k))
        self.scale = 1 / math.sqrt(inputs * k * k)
        self.modulation = nn.Linear(style_dim, inputs)
        self.demodulate = demodulate
        self.upsample = resample == "up"
        self.downsample = resample == "down"
        if self.upsample:
            self.blur = Blur((1, 1), 4)
        if self.downsample:
            self.blur = Blur((2, 2), 1)

    def forward(self, input, style):
        ys = []
        for x, s in zip(input, self.modulation(style)):
            w = self.scale * self.weight[0] * s[:, None, None]
            if self.demodulate:
                w = w * (w.square().sum([1, 2, 3], keepdim=True) + 1e-8).rsqrt()
            if self.upsample:
                y = nn.functional.conv_transpose2d(x[None], w.transpose(0, 1), stride=2)
                y = self.blur(y)
            elif self.downsample:
                y = nn.functional.conv2d(self.blur(x[None]), w, stride=2)
            else:
                y = nn.functional.conv2d(x[None], w, padding=w.shape[-1] // 2)
            ys.append(y)
        return torch.cat(ys)


class StyledConv(nn.Module):
    def __init__(self, *arguments, **more):
        super().__init__()
        self.conv = ModulatedConv2d(*arguments, **more)
        self.noise = NoiseInjection()
        self.activate = layers.FusedLeakyReLU(self.conv.weight.shape[1], True, 0.1, 1.3)
        nn.init.normal_(self.activate.bias)

    def forward(self, input, style, noise=None):
        return self.activate(self.noise(self.conv(input, style), noise=noise))


class ToRGB(nn.Module):
    def __init__(self, inputs, style_dim, upsample=True):
        super().__init__()
        self.conv = ModulatedConv2d(inputs, 3, 1, style_dim, demodulate=False)
        self.bias = nn.Parameter(torch.randn(1, 3, 1, 1))
        if upsample:
            self.upsample = Upsample()

    def forward(self, input, style, skip=None):
        y = self.conv(input, style) + self.bias
        return y if skip is None else y + self.upsample(skip)


def basicsr():
    """The same layers under BasicSR's names."""

    class ModulatedConv2d(globals()["ModulatedConv2d"]):
        def __init__(self, *arguments, sample_mode=None, **more):
            super().__init__(*arguments, resample=sample_mode and sample_mode[:-6], **more)
            self.sample_mode = sample_mode
            self.eps = 1e-8
            if sample_mode:
                self.smooth = self.blur

        def forward(self, x, style):
            return super().forward(x, style)

    class StyleConv(nn.Module):
        def __init__(self, *arguments, **more):
            super().__init__()
            self.modulated_conv = ModulatedConv2d(*arguments, **more)
            self.weight = nn.Parameter(torch.tensor([0.3]))
            self.activate = layers.FusedLeakyReLU(self.modulated_conv.weight.shape[1])

        def forward(self, x, style, noise=None):
            y = self.modulated_conv(x, style)
            noise = y.new_empty(y.shape[0], 1, *y.shape[2:]).normal_() if noise is None else noise
            return self.activate(y + self.weight * noise)

    class ToRGB(nn.Module):
        def __init__(self, inputs, style_dim, upsample=True):
            super().__init__()
            self.modulated_conv = ModulatedConv2d(inputs, 3, 1, style_dim, demodulate=False)
            self.bias = nn.Parameter(torch.randn(1, 3, 1, 1))
            self.upsample = Upsample() if upsample else None

        def forward(self, x, style, skip=None):
            y = self.modulated_conv(x, style) + self.bias
            if skip is None:
                return y
            return y + (self.upsample(skip) if self.upsample else skip)

    return ModulatedConv2d, StyleConv, ToRGB


def clean():
    """And under GFPGAN's, which resample without a filter."""

    def resized(x, factor):
        return nn.functional.interpolate(x, scale_factor=factor, mode="bilinear")

    class ModulatedConv2d(nn.Module):
        def __init__(self, inputs, outputs, k, style_dim, demodulate=True, sample_mode=None):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, outputs, inputs, k, k) / math.sqrt(inputs))
            self.modulation = nn.Linear(style_dim, inputs)
            self.demodulate = demodulate
            self.sample_mode = sample_mode
            self.eps = 1e-8
            self.padding = k // 2

        def forward(self, x, style):
            w = self.weight * self.modulation(style)[:, None, :, None, None]
            if self.demodulate:
                w = w * (w.square().sum([2, 3, 4], keepdim=True) + self.eps).rsqrt()
            x = resized(x, {None: 1, "upsample": 2, "downsample": 0.5}[self.sample_mode])
            y = [nn.functional.conv2d(i[None], j, padding=self.padding) for i, j in zip(x, w)]
            return torch.cat(y)

    class StyleConv(nn.Module):
        def __init__(self, inputs, outputs, k, style_dim, sample_mode=None):
            super().__init__()
            self.modulated_conv = ModulatedConv2d(inputs, outputs, k, style_dim, True, sample_mode)
            self.weight = nn.Parameter(torch.tensor([0.3]))
            self.bias = nn.Parameter(torch.randn(1, outputs, 1, 1))
            self.activate = nn.LeakyReLU(0.2, inplace=True)

        def forward(self, x, style, noise=None):
            y = self.modulated_conv(x, style) * math.sqrt(2)
            noise = y.new_empty(y.shape[0], 1, *y.shape[2:]).normal_() if noise is None else noise
            return self.activate(y + self.weight * noise + self.bias)

    class ToRGB(nn.Module):
        def __init__(self, inputs, style_dim, upsample=True):
            super().__init__()
            self.modulated_conv = ModulatedConv2d(inputs, 3, 1, style_dim, demodulate=False)
            self.bias = nn.Parameter(torch.randn(1, 3, 1, 1))
            self.upsample = upsample

        def forward(self, x, style, skip=None):
            y = self.modulated_conv(x, style) + self.bias
            return y if skip is None else y + resized(skip, 2 if self.upsample else 1)

    return ModulatedConv2d, StyleConv, ToRGB


class Conv2DMod(nn.Module):
    def __init__(self, inputs, outputs, k, demod=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, k, k))
        self.demod = demod
        self.stride = self.dilation = 1
        self.eps = 1e-8

    def forward(self, x, y):
        ws = self.weight * (y + 1)[:, None, :, None, None]
        if self.demod:
            ws = ws * (ws.square().sum([2, 3, 4], keepdim=True) + self.eps).rsqrt()
        padding = self.weight.shape[-1] // 2
        return torch.cat([nn.functional.conv2d(i[None], w, padding=padding) for i, w in zip(x, ws)])


def image(*shape):
    return torch.randn(shape, dtype=torch.float64)


W = image(2, 6)
X = image(2, 5, 8, 8)
NVLABS = {
    "synthesis": (lambda: SynthesisLayer(5, 4, 6, 8), (X, W), {}),
    "synthesis up": (lambda: SynthesisLayer(5, 4, 6, 16, up=2), (X, W), dict(gain=0.7)),
    "const": (lambda: SynthesisLayer(5, 4, 6, 8), (X, W, "const"), dict(fused_modconv=False)),
    "silent": (lambda: SynthesisLayer(5, 4, 6, 8, use_noise=False), (X, W), {}),
    "none": (lambda: SynthesisLayer(5, 4, 6, 8), (X, W), dict(noise_mode="none")),
    "to rgb": (lambda: ToRGBLayer(5, 3, 6), (X, W), {}),
    "conv": (lambda: Conv2dLayer(5, 4, 3), (X,), dict(gain=0.7)),
    "conv up": (lambda: Conv2dLayer(5, 4, 3, up=2), (X,), {}),
    "conv down": (lambda: Conv2dLayer(5, 4, 1, down=2), (X,), {}),
}
X2 = image(2, 5, 6, 4)
ROSINALITY = {
    "modulated": (lambda: ModulatedConv2d(5, 4, 3, 6), (X2, W), {}),
    "modulated down": (lambda: ModulatedConv2d(5, 4, 3, 6, resample="down"), (X2, W), {}),
    "styled": (lambda: StyledConv(5, 4, 3, 6), (X2, W), {}),
    "styled up": (lambda: StyledConv(5, 4, 3, 6, resample="up"), (X2, W), {}),
    "noise": (lambda: StyledConv(5, 4, 3, 6), (X2, W, image(1, 1, 6, 4)), {}),
    "first rgb": (lambda: ToRGB(5, 6, upsample=False), (X2, W), {}),
    "rgb": (lambda: ToRGB(5, 6), (X2, W), dict(skip=image(2, 3, 3, 2))),
}
SR_MODULATED, SR_STYLED, SR_RGB = basicsr()
BASICSR = {
    "sr modulated": (lambda: SR_MODULATED(5, 4, 3, 6), (X2, W), {}),
    "sr down": (lambda: SR_MODULATED(5, 4, 3, 6, sample_mode="downsample"), (X2, W), {}),
    "sr styled": (lambda: SR_STYLED(5, 4, 3, 6), (X2, W, image(2, 1, 6, 4)), {}),
    "sr up": (lambda: SR_STYLED(5, 4, 3, 6, sample_mode="upsample"), (X2, W), {}),
    "sr rgb": (lambda: SR_RGB(5, 6), (X2, W, image(2, 3, 3, 2)), {}),
    "sr same rgb": (lambda: SR_RGB(5, 6, upsample=False), (X2, W, image(2, 3, 6, 4)), {}),
}
CLEAN_MODULATED, CLEAN_STYLED, CLEAN_RGB = clean()
CLEAN = {
    "clean modulated": (lambda: CLEAN_MODULATED(5, 4, 3, 6), (X2, W), {}),
    "clean down": (lambda: CLEAN_MODULATED(5, 4, 3, 6, sample_mode="downsample"), (X2, W), {}),
    "clean styled": (lambda: CLEAN_STYLED(5, 4, 3, 6), (X2, W, image(2, 1, 6, 4)), {}),
    "clean up": (lambda: CLEAN_STYLED(5, 4, 3, 6, sample_mode="upsample"), (X2, W), {}),
    "clean rgb": (lambda: CLEAN_RGB(5, 6), (X2, W, image(2, 3, 3, 2)), {}),
    "clean same rgb": (lambda: CLEAN_RGB(5, 6, upsample=False), (X2, W, image(2, 3, 6, 4)), {}),
    "clean first rgb": (lambda: CLEAN_RGB(5, 6), (X2, W), {}),
}
LUCIDRAINS = {
    "demodulated": (lambda: Conv2DMod(5, 4, 3), (X2, image(2, 5)), {}),
    "pointwise": (lambda: Conv2DMod(5, 4, 1, demod=False), (X2, image(2, 5)), {}),
}
CASES = NVLABS | ROSINALITY | BASICSR | CLEAN | LUCIDRAINS


def results(layer, inputs, arguments):
    """The output, and the gradient of every parameter and input."""
    torch.manual_seed(3)
    inputs = [t.clone().requires_grad_() if torch.is_tensor(t) else t for t in inputs]
    y = layer(*inputs, **arguments)
    leaves = [t for t in (*layer.parameters(), *inputs) if torch.is_tensor(t)]
    dy = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    gradients = torch.autograd.grad(y, leaves, dy, allow_unused=True, materialize_grads=True)
    return [y.detach(), *gradients]


@pytest.mark.parametrize("case", CASES)
def test_a_converted_layer_computes_the_same(case, monkeypatch):
    make, inputs, arguments = CASES[case]
    layer = make().double()
    expected = results(layer, inputs, arguments)
    state, original = copy.deepcopy(layer.state_dict()), type(layer).forward
    report = swap.convert(layer)
    assert type(layer).forward is not original
    assert type(layer).__name__ in " ".join(report.routed)
    assert report.left == {}
    for actual, wanted in zip(results(layer, inputs, arguments), expected, strict=True):
        assert_matches(actual, wanted, reduction=16 * 45 * 8, name=case)
    assert list(layer.state_dict()) == list(state)
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in state.items())
    swap.uninstall()
    assert type(layer).forward is original


def test_half_precision_hooks_and_modes_stay():
    layer = SynthesisLayer(5, 4, 6, 8).eval()
    seen = []
    layer.register_forward_hook(lambda module, args, y: seen.append(y.dtype))
    x = X.half().contiguous(memory_format=torch.channels_last)
    swap.convert(layer)
    y = layer(x, W.float(), fused_modconv=False, noise_mode="const")
    assert seen == [torch.float16]
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert layer(x, W.float()).is_contiguous()
    assert not layer.training
    with pytest.raises(ValueError, match=r"x of shape \[N, 5, 8, 8\]"):
        layer(X[:, :, 1:].float(), W.float())
    with pytest.raises(ValueError, match="noise_mode='loud'"):
        layer(X.float(), W.float(), noise_mode="loud")


def test_copies_and_pickles_of_a_converted_layer():
    layer = ToRGBLayer(5, 3, 6).double()
    expected = layer(X, W)
    swap.convert(layer)
    assert "forward" not in vars(layer)
    assert_matches(copy.deepcopy(layer)(X, W), expected, reduction=5)
    stored = io.BytesIO(pickle.dumps(layer))
    assert b"conversion" not in stored.getvalue()


def test_a_network_of_blocks():
    block = nn.ModuleDict({"a": Conv2dLayer(5, 4, 3), "b": Conv2dLayer(4, 4, 3), "c": nn.ReLU()})
    report = swap.convert(block)
    (how,) = report.routed.values()
    assert how.startswith("2 layers")
    assert swap.convert(block).routed == report.routed


def test_meta_layers_are_converted_without_values():
    with torch.device("meta"):
        layer = ModulatedConv2d(5, 4, 3, 6)
    assert swap.convert(layer).left == {}


def conv2d_layer():
    return Conv2dLayer(5, 4, 3)


def changed(make, name, value):
    def made():
        layer = make()
        setattr(layer, name, value)
        return layer

    return made


class WithAnotherForward(Conv2dLayer):
    def forward(self, x, gain=1, mask=None):
        return x


WithAnotherForward.__name__ = "Conv2dLayer"


@pytest.mark.parametrize(
    "make, reason",
    [
        (changed(conv2d_layer, "padding", 0), "padding is 0"),
        (changed(conv2d_layer, "act_gain", 1.0), "act_gain is 1.0"),
        (changed(conv2d_layer, "weight_gain", 1.0), "weight_gain is 1.0"),
        (changed(conv2d_layer, "activation", "gelu"), "activation is 'gelu'"),
        (changed(conv2d_layer, "forward", lambda x: x), "a forward of its own"),
        (changed(conv2d_layer, "weight", nn.Parameter(torch.ones(4, 5, 3))), r"shape \(4, 5, 3\)"),
        (changed(conv2d_layer, "norm", nn.GroupNorm(2, 4)), "also has norm"),
        (
            changed(lambda: SynthesisLayer(5, 4, 6, 8), "gamma", nn.Parameter(torch.ones(4))),
            "also has gamma",
        ),
        (changed(lambda: SR_MODULATED(5, 4, 3, 6), "norm", nn.Identity()), "also has norm"),
        (changed(lambda: CLEAN_STYLED(5, 4, 3, 6), "activate", nn.ELU()), "activate is a ELU"),
        (changed(lambda: CLEAN_MODULATED(5, 4, 3, 6), "sample_mode", "flip"), "is 'flip'"),
        (changed(lambda: CLEAN_RGB(5, 6), "upsample", 2), "its upsample is 2"),
        (lambda: WithAnotherForward(5, 4, 3), r"forward\(self, x, gain=1, mask=None\) is unknown"),
    ],
)
def test_a_layer_that_only_looks_like_a_known_one(make, reason):
    layer = make()
    original = type(layer).forward
    report = swap.convert(layer)
    assert type(layer).forward is original
    why = report.left[f"{type(layer).__module__}.{type(layer).__name__}"]
    assert re.search(reason, why)


def test_a_convolution_with_a_stride_is_left_alone():
    layer = Conv2DMod(5, 4, 3)
    layer.stride = 2
    assert list(swap.convert(layer).left.values()) == ["its stride is 2"]


def test_an_unlike_layer_made_later_keeps_its_own_forward():
    swap.convert(Conv2dLayer(5, 4, 3))
    layer = Conv2dLayer(5, 4, 3)
    layer.padding = 0
    assert layer(X.float()).shape == (2, 4, 6, 6)


def test_a_missing_attribute():
    layer = ModulatedConv2d(5, 4, 3, 6, resample="up")
    layer.blur.pad = (2, 2)
    assert "pad=(2, 2), not (1, 1)" in next(iter(swap.convert(layer).left.values()))
    del layer.scale
    assert "it has no scale" in next(iter(swap.convert(layer).left.values()))


def test_scripted_and_compiled_models_and_this_library_s_own_are_left_alone():
    scripted = torch.jit.script(nn.Linear(2, 3))
    compiled = torch.compile(Conv2dLayer(5, 4, 3), backend="eager")
    own = stylegan2.Discriminator(0, 8, 3, channel_base=32)
    report = swap.convert(nn.ModuleDict({"s": scripted, "c": compiled, "o": own}))
    assert report.routed == {}
    assert "before torch.jit.script" in report.left["s"]
    assert "before torch.compile" in report.left["c"]
    assert report.left["stylegan_fast.layers.conv.Conv2dLayer"] == "it is this library's own"
    with pytest.raises(TypeError, match=r"torch.nn.Module, got dict"):
        swap.convert({})
