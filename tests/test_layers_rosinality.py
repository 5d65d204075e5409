"""rosinality's layers against the formulae of that code, written out here with stock PyTorch."""

import inspect
import math

import pytest
import torch
from torch.nn import functional

import stylegan_fast
from stylegan_fast import layers, ops
from stylegan_fast.layers import (
    Blur,
    ConstantInput,
    ConvLayer,
    Downsample,
    EqualConv2d,
    EqualLinear,
    FusedLeakyReLU,
    ModulatedConv2d,
    NoiseInjection,
    PixelNorm,
    ResBlock,
    StyledConv,
    ToRGB,
    Upsample,
    fused_leaky_relu,
)
from stylegan_fast.testing import assert_matches, relative_error

SIGNATURES = {
    "EqualLinear": "(in_dim, out_dim, bias=True, bias_init=0, lr_mul=1, activation=None)",
    "EqualConv2d": "(in_channel, out_channel, kernel_size, stride=1, padding=0, bias=True)",
    "ModulatedConv2d": "(in_channel, out_channel, kernel_size, style_dim, demodulate=True, "
    "upsample=False, downsample=False, blur_kernel=(1, 3, 3, 1), fused=True)",
    "StyledConv": "(in_channel, out_channel, kernel_size, style_dim, upsample=False, "
    "blur_kernel=(1, 3, 3, 1), demodulate=True)",
    "ToRGB": "(in_channel, style_dim, upsample=True, blur_kernel=(1, 3, 3, 1))",
    "ConvLayer": "(in_channel, out_channel, kernel_size, downsample=False, "
    "blur_kernel=(1, 3, 3, 1), bias=True, activate=True)",
    "ResBlock": "(in_channel, out_channel, blur_kernel=(1, 3, 3, 1))",
    "FusedLeakyReLU": f"(channel, bias=True, negative_slope=0.2, scale={2**0.5})",
    "fused_leaky_relu": f"(input, bias=None, negative_slope=0.2, scale={2**0.5})",
    "NoiseInjection": "()",
    "Blur": "(kernel, pad, upsample_factor=1)",
    "Upsample": "(kernel, factor=2)",
    "Downsample": "(kernel, factor=2)",
}

# (1, 2, 4) is neither even nor symmetric: a wrong side of a padding or a rotation shows.
KERNELS = [(1, 3, 3, 1), (1, 2, 4)]
kernels = pytest.mark.parametrize("kernel", KERNELS, ids=["1331", "124"])


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def double(layer):
    """The layer in float64 with every parameter moved off its initial value."""
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return layer


def make_kernel(taps, gain=1):
    taps = torch.tensor(taps, dtype=torch.float64)
    taps = taps.outer(taps)
    return gain * taps / taps.sum()


def upfirdn2d(x, kernel, up=1, down=1, pad=(0, 0)):
    """Zero-stuff, pad or crop both axes by (before, after), convolve, keep every down-th."""
    n, c, h, w = x.shape
    stuffed = x.new_zeros(n, c, h * up, w * up)
    stuffed[:, :, ::up, ::up] = x
    padded = functional.pad(stuffed, [*pad, *pad])
    weight = kernel.flip([0, 1]).expand(c, 1, *kernel.shape)
    return functional.conv2d(padded, weight, groups=c)[:, :, ::down, ::down]


def modulated(layer, x, style, kernel=KERNELS[0]):
    """One convolution per sample; the scale is part of the weight that is demodulated."""
    styles = style @ layer.modulation.weight.T / math.sqrt(style.shape[1]) + layer.modulation.bias
    k = layer.weight.shape[-1]
    samples = []
    for sample, s in zip(x, styles, strict=True):
        w = layer.weight[0] / math.sqrt(layer.weight[0, 0].numel()) * s[:, None, None]
        if layer.demodulate:
            w = w * (w.square().sum([1, 2, 3], keepdim=True) + 1e-8).rsqrt()
        sample = sample[None]
        if layer.upsample:
            p = len(kernel) - 2 - (k - 1)
            y = functional.conv_transpose2d(sample, w.transpose(0, 1), stride=2)
            y = upfirdn2d(y, make_kernel(kernel, 4), pad=((p + 1) // 2 + 1, p // 2 + 1))
        elif layer.downsample:
            p = len(kernel) - 2 + k - 1
            y = upfirdn2d(sample, make_kernel(kernel), pad=((p + 1) // 2, p // 2))
            y = functional.conv2d(y, w, stride=2)
        else:
            y = functional.conv2d(sample, w, padding=k // 2)
        samples.append(y)
    return torch.cat(samples)


def leaky(x, slope=0.2, gain=2**0.5):
    return torch.where(x > 0, x, slope * x) * gain


def upsampled(x, kernel=KERNELS[0], factor=2):
    p = len(kernel) - factor
    pad = ((p + 1) // 2 + factor - 1, p // 2)
    return upfirdn2d(x, make_kernel(kernel, factor**2), up=factor, pad=pad)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    assert name in layers.__all__
    signature = inspect.signature(getattr(layers, name))
    empty = inspect.Parameter.empty
    bare = [p.replace(annotation=empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


def schema(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


MODULATED = {"weight": (1, 4, 5, 3, 3), "modulation.weight": (5, 7), "modulation.bias": (5,)}
STYLED = {f"conv.{name}": shape for name, shape in MODULATED.items()} | {
    "noise.weight": (1,),
    "activate.bias": (4,),
}
TO_RGB = {
    "bias": (1, 3, 1, 1),
    "conv.weight": (1, 3, 5, 1, 1),
    "conv.modulation.weight": (5, 7),
    "conv.modulation.bias": (5,),
}
WEIGHT, BIAS, KERNEL = {"weight": (4, 5, 3, 3)}, {"bias": (4,)}, {"kernel": (4, 4)}


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (EqualLinear(7, 5), {"weight": (5, 7), "bias": (5,)}),
        (EqualLinear(7, 5, bias=False), {"weight": (5, 7)}),
        (EqualConv2d(5, 4, 3), WEIGHT | BIAS),
        (EqualConv2d(5, 4, 3, bias=False), WEIGHT),
        (FusedLeakyReLU(4), BIAS),
        (FusedLeakyReLU(4, bias=False), {}),
        (Blur([1, 3, 3, 1], (2, 1)), KERNEL),
        (Upsample([1, 3, 3, 1]), KERNEL),
        (Downsample([1, 3, 3, 1]), KERNEL),
        (ModulatedConv2d(5, 4, 3, 7), MODULATED),
        (ModulatedConv2d(5, 4, 3, 7, upsample=True), MODULATED | {"blur.kernel": (4, 4)}),
        (ModulatedConv2d(5, 4, 3, 7, downsample=True), MODULATED | {"blur.kernel": (4, 4)}),
        (StyledConv(5, 4, 3, 7), STYLED),
        (StyledConv(5, 4, 3, 7, upsample=True), STYLED | {"conv.blur.kernel": (4, 4)}),
        (ToRGB(5, 7, upsample=False), TO_RGB),
        (ToRGB(5, 7), TO_RGB | {"upsample.kernel": (4, 4)}),
        (ConvLayer(5, 4, 3), {"0.weight": (4, 5, 3, 3), "1.bias": (4,)}),
        (ConvLayer(5, 4, 3, activate=False), {"0.weight": (4, 5, 3, 3), "0.bias": (4,)}),
        (ConvLayer(5, 4, 3, bias=False), {"0.weight": (4, 5, 3, 3)}),
        (
            ConvLayer(5, 4, 3, downsample=True),
            {"0.kernel": (4, 4), "1.weight": (4, 5, 3, 3), "2.bias": (4,)},
        ),
        (
            ResBlock(5, 4),
            {
                "conv1.0.weight": (5, 5, 3, 3),
                "conv1.1.bias": (5,),
                "conv2.0.kernel": (4, 4),
                "conv2.1.weight": (4, 5, 3, 3),
                "conv2.2.bias": (4,),
                "skip.0.kernel": (4, 4),
                "skip.1.weight": (4, 5, 1, 1),
            },
        ),
        (ConstantInput(5), {"input": (1, 5, 4, 4)}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)
def test_state_dict(layer, expected):
    assert schema(layer) == expected


def test_initial_values():
    styled = StyledConv(5, 4, 3, 7)
    assert styled.noise.weight.tolist() == [0.0]
    assert styled.activate.bias.tolist() == [0.0] * 4
    assert styled.conv.modulation.bias.tolist() == [1.0] * 5
    assert ToRGB(5, 7).bias.flatten().tolist() == [0.0] * 3
    linear = EqualLinear(300, 200, bias_init=3, lr_mul=0.01)
    assert linear.weight.std().item() == pytest.approx(100, rel=0.02)
    assert linear.bias.tolist() == [3.0] * 200
    assert ModulatedConv2d(64, 32, 3, 7).weight.std().item() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 2), (3, 5, 2, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_fused_leaky_relu(shape, bias):
    layer = double(FusedLeakyReLU(5, bias, negative_slope=0.1, scale=1.5))
    x = randn(*shape)
    shifted = x + layer.bias.reshape([5] + [1] * (len(shape) - 2)) if bias else x
    torch.testing.assert_close(layer(x), leaky(shifted, 0.1, 1.5))
    torch.testing.assert_close(fused_leaky_relu(x, layer.bias), leaky(shifted))


@pytest.mark.parametrize("activation", [None, "fused_lrelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_equal_linear(activation, bias):
    layer = double(EqualLinear(7, 5, bias, bias_init=2, lr_mul=0.1, activation=activation))
    x = randn(3, 7)
    out = x @ (layer.weight * 0.1 / math.sqrt(7)).T
    if bias:
        out = out + layer.bias * 0.1
    torch.testing.assert_close(layer(x), leaky(out) if activation else out)


@pytest.mark.parametrize(("kernel_size", "stride", "padding"), [(1, 1, 0), (3, 2, 1), (4, 3, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_equal_conv2d(kernel_size, stride, padding, bias):
    layer = double(EqualConv2d(5, 4, kernel_size, stride, padding, bias))
    x = randn(2, 5, 6, 9)
    weight = layer.weight / math.sqrt(5 * kernel_size**2)
    ref = functional.conv2d(x, weight, stride=stride, padding=padding)
    if bias:
        ref = ref + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x), ref)


def test_equal_conv2d_obeys_no_weight_gradients():
    layer = EqualConv2d(5, 4, 3)
    y = layer(torch.randn(2, 5, 6, 7)).sum()
    with stylegan_fast.no_weight_gradients():
        skipped, bias = torch.autograd.grad(
            y, [layer.weight, layer.bias], allow_unused=True, retain_graph=True
        )
    assert skipped is None
    assert bias.tolist() == [2 * 4 * 5] * 4
    (computed,) = torch.autograd.grad(y, layer.weight)
    assert computed.shape == layer.weight.shape


@kernels
@pytest.mark.parametrize("factor", [2, 3])
def test_upsample_and_downsample(kernel, factor):
    x = randn(2, 3, 6, 9)
    up, down = Upsample(kernel, factor).double(), Downsample(kernel, factor).double()
    torch.testing.assert_close(up(x), upsampled(x, kernel, factor))
    assert up(x).shape == (2, 3, 6 * factor, 9 * factor)
    p = len(kernel) - factor
    ref = upfirdn2d(x, make_kernel(kernel), down=factor, pad=((p + 1) // 2, p // 2))
    torch.testing.assert_close(down(x), ref)
    assert down(x).shape == (2, 3, 6 // factor, 9 // factor)


def test_resampling_equals_the_ops():
    x, f = torch.randn(2, 3, 6, 10), ops.setup_filter([1, 3, 3, 1])
    torch.testing.assert_close(Upsample([1, 3, 3, 1])(x), ops.upsample2d(x, f))
    torch.testing.assert_close(Downsample([1, 3, 3, 1])(x), ops.downsample2d(x, f))


@kernels
@pytest.mark.parametrize("upsample_factor", [1, 2])
@pytest.mark.parametrize("pad", [(2, 1), (0, 3), (-1, 2)])
def test_blur(kernel, pad, upsample_factor):
    x = randn(2, 3, 6, 9)
    blur = Blur(kernel, pad, upsample_factor).double()
    torch.testing.assert_close(
        blur(x), upfirdn2d(x, make_kernel(kernel, upsample_factor**2), pad=pad)
    )


def test_blur_with_four_pads_and_a_2d_kernel():
    x, taps = randn(2, 3, 6, 9), [[1.0, 2.0], [3.0, 5.0]]
    padded = functional.pad(x, [2, 0, 1, 3])
    ref = upfirdn2d(padded, torch.tensor(taps, dtype=torch.float64) / 11)
    torch.testing.assert_close(Blur(taps, (2, 0, 1, 3)).double()(x), ref)


def test_pixel_norm():
    x = randn(3, 7)
    ref = x / (x.square().sum(1, keepdim=True) / 7 + 1e-8).sqrt()
    torch.testing.assert_close(PixelNorm()(x), ref)


def test_constant_input():
    layer = ConstantInput(5, size=3)
    y = layer(torch.zeros(2, 7))
    assert y.shape == (2, 5, 3, 3)
    assert torch.equal(y[1], layer.input[0])


MODES = [{}, {"upsample": True}, {"downsample": True}]
modes = pytest.mark.parametrize("mode", MODES, ids=["same", "up", "down"])


@kernels
@modes
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_modulated_conv2d(mode, kernel, kernel_size, demodulate, fused, batch):
    layer = double(
        ModulatedConv2d(5, 4, kernel_size, 7, demodulate, **mode, blur_kernel=kernel, fused=fused)
    )
    x, style = randn(batch, 5, 6, 10), randn(batch, 7)
    torch.testing.assert_close(layer(x, style), modulated(layer, x, style, kernel))


def test_demodulation_adds_its_epsilon_to_the_scaled_weight():
    layer = double(ModulatedConv2d(5, 4, 3, 7))
    with torch.no_grad():
        layer.weight *= 1e-4
    x, style = randn(3, 5, 6, 8), randn(3, 7)
    ref = modulated(layer, x, style)
    torch.testing.assert_close(layer(x, style), ref)
    unscaled = ops.modulated_conv2d(x, layer.weight[0], layer.modulation(style), padding=1)
    assert relative_error(unscaled, ref) > 0.1


@kernels
@pytest.mark.parametrize("upsample", [True, False])
@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_styled_conv(upsample, kernel, demodulate, batch):
    layer = double(StyledConv(5, 4, 3, 7, upsample, kernel, demodulate))
    layer.activate.negative_slope, layer.activate.scale = 0.1, 1.5
    x, style = randn(batch, 5, 6, 10), randn(batch, 7)
    out = modulated(layer.conv, x, style, kernel)
    for noise in (torch.randn_like(out[:, :1]), torch.randn_like(out[:1, :1])):
        ref = out + layer.noise.weight * noise + layer.activate.bias[:, None, None]
        torch.testing.assert_close(layer(x, style, noise), leaky(ref, 0.1, 1.5))


def test_styled_conv_equals_its_parts():
    layer = double(StyledConv(5, 4, 3, 7, upsample=True))
    x, style, noise = randn(3, 5, 6, 10), randn(3, 7), randn(3, 1, 12, 20)
    parts = layer.activate(layer.noise(layer.conv(x, style), noise))
    torch.testing.assert_close(layer(x, style, noise), parts)
    torch.manual_seed(1)
    drawn = layer(x, style)
    torch.manual_seed(1)
    torch.testing.assert_close(drawn, layer.activate(layer.noise(layer.conv(x, style))))


def test_noise_injection():
    layer = double(NoiseInjection())
    image, noise = randn(3, 5, 4, 7), randn(3, 1, 4, 7)
    torch.testing.assert_close(layer(image, noise), image + layer.weight * noise)
    torch.manual_seed(1)
    random_image = layer(image)
    torch.manual_seed(1)
    torch.testing.assert_close(random_image, image + layer.weight * randn(3, 1, 4, 7))


@kernels
@pytest.mark.parametrize("batch", [1, 3])
def test_to_rgb(kernel, batch):
    layer = double(ToRGB(5, 7, blur_kernel=kernel))
    x, style, skip = randn(batch, 5, 6, 10), randn(batch, 7), randn(batch, 3, 3, 5)
    out = modulated(layer.conv, x, style) + layer.bias
    torch.testing.assert_close(layer(x, style), out)
    torch.testing.assert_close(layer(x, style, skip), out + upsampled(skip, kernel))


def conv_layer(layer, x, kernel_size, downsample, kernel=KERNELS[0]):
    """The layer's children one after the other, without activation and with the originals' pads."""
    conv = layer[1] if downsample else layer[0]
    weight = conv.weight / math.sqrt(conv.weight[0].numel())
    if not downsample:
        return functional.conv2d(x, weight, conv.bias, padding=kernel_size // 2)
    p = len(kernel) - 2 + kernel_size - 1
    y = upfirdn2d(x, make_kernel(kernel), pad=((p + 1) // 2, p // 2))
    return functional.conv2d(y, weight, conv.bias, stride=2)


@kernels
@pytest.mark.parametrize("downsample", [True, False])
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activate", [True, False])
def test_conv_layer(kernel, downsample, kernel_size, bias, activate):
    layer = double(ConvLayer(5, 4, kernel_size, downsample, kernel, bias, activate))
    x = randn(2, 5, 7, 10)
    ref = conv_layer(layer, x, kernel_size, downsample, kernel)
    if activate:
        ref = leaky(ref + layer[-1].bias[:, None, None] if bias else ref)
    torch.testing.assert_close(layer(x), ref)
    torch.testing.assert_close(layer(x), torch.nn.Sequential.forward(layer, x))
    torch.testing.assert_close(layer(x, gain=0.7), 0.7 * ref)


@kernels
def test_res_block(kernel):
    layer = double(ResBlock(5, 4, kernel))
    x = randn(2, 5, 6, 10)
    y = leaky(conv_layer(layer.conv1, x, 3, False) + layer.conv1[1].bias[:, None, None])
    y = conv_layer(layer.conv2, y, 3, True, kernel) + layer.conv2[2].bias[:, None, None]
    skip = conv_layer(layer.skip, x, 1, True, kernel)
    torch.testing.assert_close(layer(x), (leaky(y) + skip) / math.sqrt(2))


@kernels
def test_a_loaded_filter_is_used(kernel):
    layer = StyledConv(5, 4, 3, 7, upsample=True, blur_kernel=(1,) * len(kernel)).double()
    source = double(StyledConv(5, 4, 3, 7, upsample=True, blur_kernel=kernel))
    layer.load_state_dict(source.state_dict(), strict=True)
    x, style, noise = randn(3, 5, 6, 10), randn(3, 7), randn(3, 1, 12, 20)
    torch.testing.assert_close(layer(x, style, noise), source(x, style, noise))


def test_a_styled_conv_is_one_op(monkeypatch):
    calls = []
    module = stylegan_fast.layers.rosinality
    for name in ("styled_conv2d", "bias_act", "upfirdn2d", "upfirdn2d_epilogue"):
        run = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, _run=run, _name=name, **k: calls.append(_name) or _run(*a, **k)
        )
    x, style = torch.randn(2, 5, 6, 8), torch.randn(2, 7)
    StyledConv(5, 4, 3, 7, upsample=True)(x, style)
    assert calls == ["styled_conv2d"]
    ToRGB(5, 7)(x, style, torch.randn(2, 3, 3, 4))
    assert calls[1:] == ["styled_conv2d", "upfirdn2d_epilogue"]


@pytest.mark.parametrize("upsample", [True, False])
def test_backends_agree(upsample, backend, device):
    layer = double(StyledConv(5, 4, 3, 7, upsample)).to(device)
    rgb = double(ToRGB(4, 7)).to(device)
    size = (12, 20) if upsample else (6, 10)
    x, style, noise, skip = (
        randn(*shape).to(device)
        for shape in [(2, 5, 6, 10), (2, 7), (2, 1, *size), (2, 3, size[0] // 2, size[1] // 2)]
    )
    expected = rgb(layer(x, style, noise), style, skip)
    layer, rgb = layer.float(), rgb.float()
    x, style, noise, skip = (t.float() for t in (x, style, noise, skip))
    with stylegan_fast.use_backend(backend):
        out = rgb(layer(x, style, noise), style, skip)
    assert_matches(out, expected, reduction=5 * 9 * 4)


@pytest.mark.parametrize(
    "build",
    [
        lambda: StyledConv(5, 4, 3, 7, upsample=True),
        lambda: StyledConv(5, 4, 3, 7),
        lambda: ToRGB(5, 7),
        lambda: ModulatedConv2d(5, 4, 3, 7, downsample=True),
    ],
)
def test_modulated_layers_keep_format_and_dtype(build):
    layer = build()
    x, style = torch.randn(3, 5, 6, 10), torch.randn(3, 7)
    torch.manual_seed(1)
    y = layer(x, style)
    torch.manual_seed(1)
    last = layer(x.contiguous(memory_format=torch.channels_last), style)
    assert y.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, y)
    assert layer(x.bfloat16(), style).dtype == torch.bfloat16
    assert layer(x[:0], style[:0]).shape == (0, *y.shape[1:])


@pytest.mark.parametrize("build", [lambda: ConvLayer(5, 4, 3, True), lambda: ResBlock(5, 4)])
def test_convolution_layers_keep_format_and_dtype(build):
    layer = build()
    x = torch.randn(3, 5, 6, 10)
    last = layer(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, layer(x))
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def check_second_order(layer, *inputs):
    """gradcheck and gradgradcheck with respect to the inputs and every parameter."""
    names, parameters = zip(*layer.named_parameters(), strict=True)
    leaves = [t.detach().requires_grad_() for t in (*inputs, *parameters)]

    def run(*tensors):
        weights = dict(zip(names, tensors[len(inputs) :], strict=True))
        return torch.func.functional_call(layer, weights, tensors[: len(inputs)])

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@modes
@pytest.mark.parametrize("fused", [True, False])
def test_modulated_conv2d_second_order(mode, fused):
    layer = double(ModulatedConv2d(3, 2, 3, 5, **mode, fused=fused))
    check_second_order(layer, randn(2, 3, 4, 6), randn(2, 5))


@pytest.mark.parametrize("upsample", [True, False])
def test_styled_conv_second_order(upsample):
    layer = double(StyledConv(3, 2, 3, 5, upsample))
    size = (8, 12) if upsample else (4, 6)
    check_second_order(layer, randn(2, 3, 4, 6), randn(2, 5), randn(2, 1, *size))


def test_to_rgb_second_order():
    check_second_order(double(ToRGB(3, 5)), randn(2, 3, 4, 6), randn(2, 5), randn(2, 3, 2, 3))


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: EqualLinear(5, 3, lr_mul=0.1, activation="fused_lrelu"), (2, 5)),
        (lambda: EqualConv2d(3, 2, 3, stride=2, padding=1), (2, 3, 4, 6)),
        (lambda: ConvLayer(3, 2, 3), (2, 3, 4, 6)),
        (lambda: ResBlock(3, 2), (2, 3, 4, 6)),
    ],
)
def test_other_layers_second_order(build, shape):
    check_second_order(double(build()), randn(*shape))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: EqualConv2d(5, 4, 3)(torch.zeros(2, 4, 6, 6)),
            r"input of shape \[N, 5, H, W\], got input.shape=\(2, 4, 6, 6\)",
        ),
        (
            lambda: ConvLayer(5, 4, 3, downsample=True)(torch.zeros(5, 6, 6)),
            r"input of shape \[N, 5, H, W\], got input.shape=\(5, 6, 6\)",
        ),
        (
            lambda: ModulatedConv2d(5, 4, 3, 7)(torch.zeros(2, 5, 6, 6), torch.zeros(3, 7)),
            r"style of shape \[2, 7\], got style.shape=\(3, 7\)",
        ),
        (
            lambda: StyledConv(5, 4, 3, 7)(torch.zeros(2, 4, 6, 6), torch.zeros(2, 7)),
            r"input of shape \[N, 5, H, W\], got input.shape=\(2, 4, 6, 6\)",
        ),
        (
            lambda: StyledConv(5, 4, 3, 7, upsample=True)(
                torch.zeros(2, 5, 6, 8), torch.zeros(2, 7), torch.zeros(2, 1, 6, 8)
            ),
            r"noise must broadcast to \(2, 4, 12, 16\)",
        ),
        (
            lambda: ToRGB(5, 7)(
                torch.zeros(2, 5, 6, 8), torch.zeros(2, 7), torch.zeros(2, 3, 6, 8)
            ),
            r"skip of shape \[2, 3, 3, 4\], got skip.shape=\(2, 3, 6, 8\)",
        ),
        (
            lambda: ToRGB(5, 7, upsample=False)(
                torch.zeros(2, 5, 6, 8), torch.zeros(2, 7), torch.zeros(2, 3, 3, 4)
            ),
            r"skip.shape=\(2, 3, 3, 4\).*upsample=False",
        ),
        (lambda: ModulatedConv2d(5, 4, 2, 7), "kernel_size=2 must be odd"),
        (lambda: ConvLayer(5, 4, 4), "kernel_size=4 must be odd"),
        (
            lambda: ModulatedConv2d(5, 4, 3, 7, upsample=True, downsample=True),
            "upsample=True and downsample=True",
        ),
        (lambda: FusedLeakyReLU(5)(torch.zeros(2, 4, 6)), r"b must have the shape \[4\]"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
