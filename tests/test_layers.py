"""Layers against their formulae, written out here with stock PyTorch."""

import math

import pytest
import torch
from torch.nn import functional

from stylegan_fast.layers import (
    Conv2dLayer,
    FullyConnectedLayer,
    MinibatchStdLayer,
    SynthesisLayer,
    ToRGBLayer,
)

FIR = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8


def double(layer):
    """The layer in float64 with every parameter moved off its initial value."""
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return layer


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def fir(x, gain=1):
    kernel = gain * FIR.outer(FIR).expand(x.shape[1], 1, 4, 4)
    return functional.conv2d(x, kernel, groups=x.shape[1])


def resampled_conv(x, weight, up=1, down=1):
    """All padding comes first: the FIR reaches over the border and the convolution is valid."""
    n, c, h, w = x.shape
    p = weight.shape[-1] // 2
    if up == 2:
        stuffed = x.new_zeros(n, c, 2 * h, 2 * w)
        stuffed[:, :, ::2, ::2] = x
        return functional.conv2d(
            fir(functional.pad(stuffed, [2 + p, 1 + p] * 2), gain=4), weight.flip([2, 3])
        )
    if down == 2:
        return functional.conv2d(fir(functional.pad(x, [1 + p] * 4)), weight, stride=2)
    return functional.conv2d(x, weight, padding=p)


@pytest.mark.parametrize("activation", ["linear", "lrelu", "swish"])
@pytest.mark.parametrize("bias", [True, False])
def test_fully_connected(activation, bias):
    layer = double(FullyConnectedLayer(7, 5, bias, activation, lr_multiplier=0.1, bias_init=2))
    x = randn(3, 7)
    out = x @ (layer.weight * 0.1 / math.sqrt(7)).T
    if bias:
        out = out + layer.bias * 0.1
    ref = {
        "linear": out,
        "lrelu": functional.leaky_relu(out, 0.2) * math.sqrt(2),
        "swish": functional.silu(out) * math.sqrt(2),
    }[activation]
    torch.testing.assert_close(layer(x), ref)


def test_fully_connected_acts_on_the_last_axis():
    layer = double(FullyConnectedLayer(7, 5, activation="lrelu"))
    x = randn(2, 5, 3, 7)
    torch.testing.assert_close(layer(x), layer(x.reshape(-1, 7)).reshape(2, 5, 3, 5))


def test_fully_connected_initialisation():
    layer = FullyConnectedLayer(300, 200, lr_multiplier=0.01, bias_init=3)
    assert layer.weight.std().item() == pytest.approx(100, rel=0.02)
    assert layer.bias.tolist() == [3.0] * 200


def test_fully_connected_works_in_the_dtype_of_x():
    layer = FullyConnectedLayer(7, 5, activation="lrelu")
    assert layer(torch.randn(3, 7, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
def test_conv2d_layer(kernel_size, up, down):
    layer = double(
        Conv2dLayer(5, 4, kernel_size, activation="lrelu", up=up, down=down, conv_clamp=0.5)
    )
    x = randn(2, 5, 6, 8)
    weight = layer.weight / math.sqrt(5 * kernel_size**2)
    out = resampled_conv(x, weight, up, down) + layer.bias[:, None, None]
    ref = (functional.leaky_relu(out, 0.2) * math.sqrt(2) * 0.7).clamp(-0.5 * 0.7, 0.5 * 0.7)
    assert 0 < (ref.abs() == 0.5 * 0.7).double().mean() < 1
    torch.testing.assert_close(layer(x, gain=0.7), ref)


def test_conv2d_layer_without_bias_is_linear():
    layer = double(Conv2dLayer(5, 4, 3, bias=False))
    assert layer.bias is None
    assert "bias" not in layer.state_dict()
    x = randn(2, 5, 6, 7)
    torch.testing.assert_close(
        layer(x), functional.conv2d(x, layer.weight / math.sqrt(45), padding=1)
    )


def test_frozen_conv2d_layer_keeps_its_state_dict():
    free, frozen = Conv2dLayer(5, 4, 3), Conv2dLayer(5, 4, 3, trainable=False)
    assert list(frozen.parameters()) == []
    frozen.load_state_dict(free.state_dict(), strict=True)
    x = torch.randn(2, 5, 6, 7)
    torch.testing.assert_close(frozen(x), free(x))


def test_conv2d_layer_keeps_channels_last():
    layer = Conv2dLayer(5, 4, 3, activation="lrelu", channels_last=True)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 5, 6, 7)
    out = layer(x.contiguous(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, layer(x))


def modulated(x, weight, styles, up=1, demodulate=True):
    """One convolution per sample with its own weight."""
    samples = []
    for sample, style in zip(x, styles, strict=True):
        w = weight * style[None, :, None, None]
        if demodulate:
            w = w / (w.square().sum(dim=[1, 2, 3], keepdim=True) + 1e-8).sqrt()
        samples.append(resampled_conv(sample[None], w, up))
    return torch.cat(samples)


@pytest.mark.parametrize("fused_modconv", [True, False])
@pytest.mark.parametrize("up", [1, 2])
def test_synthesis_layer(up, fused_modconv):
    layer = double(SynthesisLayer(5, 4, w_dim=7, resolution=8, up=up, conv_clamp=1.5))
    x, w = randn(3, 5, 8 // up, 8 // up), randn(3, 7)
    out = modulated(x, layer.weight, layer.affine(w), up)
    out = out + layer.noise_const * layer.noise_strength + layer.bias[:, None, None]
    ref = (functional.leaky_relu(out, 0.2) * math.sqrt(2) * 0.7).clamp(-1.5 * 0.7, 1.5 * 0.7)
    assert 0 < (ref.abs() == 1.5 * 0.7).double().mean() < 1
    y = layer(x, w, noise_mode="const", fused_modconv=fused_modconv, gain=0.7)
    torch.testing.assert_close(y, ref)


def test_noise_modes():
    layer = double(SynthesisLayer(5, 4, w_dim=7, resolution=6, activation="linear"))
    x, w = randn(3, 5, 6, 6), randn(3, 7)
    quiet = layer(x, w, noise_mode="none")
    const = layer(x, w, noise_mode="const") - quiet
    expected = (layer.noise_const * layer.noise_strength).expand(3, 4, 6, 6)
    torch.testing.assert_close(const, expected)

    torch.manual_seed(1)
    random = layer(x, w) - quiet
    torch.manual_seed(1)
    noise = torch.randn(3, 1, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(random, (noise * layer.noise_strength).expand(3, 4, 6, 6))


def test_synthesis_layer_without_noise():
    layer = SynthesisLayer(5, 4, w_dim=7, resolution=6, use_noise=False)
    assert not {"noise_const", "noise_strength"} & set(layer.state_dict())
    x, w = torch.randn(3, 5, 6, 6), torch.randn(3, 7)
    torch.testing.assert_close(layer(x, w, noise_mode="random"), layer(x, w, noise_mode="none"))


def test_synthesis_layer_initialisation():
    layer = SynthesisLayer(5, 4, w_dim=7, resolution=6)
    assert layer.noise_strength.shape == ()
    assert layer.noise_strength.item() == 0
    assert layer.bias.tolist() == [0.0] * 4
    assert layer.affine.bias.tolist() == [1.0] * 5


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("fused_modconv", [True, False])
def test_to_rgb_layer(kernel_size, fused_modconv):
    layer = double(ToRGBLayer(5, 3, w_dim=7, kernel_size=kernel_size, conv_clamp=0.9))
    x, w = randn(2, 5, 6, 8), randn(2, 7)
    styles = layer.affine(w) / math.sqrt(5 * kernel_size**2)
    out = modulated(x, layer.weight, styles, demodulate=False)
    border = kernel_size // 2  # the layer does not pad
    out = out[:, :, border : 6 - border, border : 8 - border]
    ref = (out + layer.bias[:, None, None]).clamp(-0.9, 0.9)
    assert 0 < (ref.abs() == 0.9).double().mean() < 1
    torch.testing.assert_close(layer(x, w, fused_modconv=fused_modconv), ref)


def check_second_order(layer, *inputs, **kwargs):
    """gradcheck and gradgradcheck with respect to the inputs and every parameter."""
    names, parameters = zip(*layer.named_parameters(), strict=True)
    leaves = [t.detach().requires_grad_() for t in (*inputs, *parameters)]

    def run(*tensors):
        weights = dict(zip(names, tensors[len(inputs) :], strict=True))
        return torch.func.functional_call(layer, weights, tensors[: len(inputs)], kwargs)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("fused_modconv", [True, False])
def test_synthesis_layer_second_order(up, fused_modconv):
    layer = double(SynthesisLayer(3, 2, w_dim=4, resolution=4, up=up, conv_clamp=3))
    x, w = randn(2, 3, 4 // up, 4 // up), randn(2, 4)
    check_second_order(layer, x, w, noise_mode="const", fused_modconv=fused_modconv)


def test_to_rgb_layer_second_order():
    check_second_order(double(ToRGBLayer(3, 2, w_dim=4)), randn(2, 3, 4, 5), randn(2, 4))


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
def test_conv2d_layer_second_order(up, down):
    layer = double(Conv2dLayer(3, 2, 3, activation="lrelu", up=up, down=down, conv_clamp=3))
    check_second_order(layer, randn(2, 3, 4, 6))


def naive_minibatch_std(x, group_size, parts):
    n, c, h, w = x.shape
    groups = n // group_size
    out = torch.zeros(n, parts, h, w, dtype=x.dtype)
    for first in range(groups):
        members = range(first, n, groups)
        for part in range(parts):
            deviations = []
            for channel in range(part * c // parts, (part + 1) * c // parts):
                values = torch.stack([x[member, channel] for member in members])
                variance = (values - values.mean(0)).square().mean(0)
                deviations.append((variance + 1e-8).sqrt().mean())
            for member in members:
                out[member, part] = sum(deviations) / len(deviations)
    return torch.cat([x, out], dim=1)


@pytest.mark.parametrize(
    ("batch", "group_size", "parts"),
    [(6, 3, 1), (6, 2, 2), (8, 4, 4), (3, 8, 2), (5, None, 1), (4, 1, 2)],
)
def test_minibatch_std(batch, group_size, parts):
    x = randn(batch, 4, 3, 5)
    effective = batch if group_size is None else min(group_size, batch)
    out = MinibatchStdLayer(group_size, parts)(x)
    torch.testing.assert_close(out, naive_minibatch_std(x, effective, parts))


def test_minibatch_std_second_order():
    x = randn(4, 2, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(MinibatchStdLayer(2), x)
    assert torch.autograd.gradgradcheck(MinibatchStdLayer(2), x)


def test_minibatch_std_of_an_empty_batch():
    assert MinibatchStdLayer(4)(torch.zeros(0, 4, 3, 5)).shape == (0, 5, 3, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MinibatchStdLayer(0), "group_size=0"),
        (lambda: MinibatchStdLayer(4, 0), "num_channels=0"),
        (lambda: MinibatchStdLayer(4)(torch.zeros(6, 4, 3, 5)), "batch of 6 .* group_size=4"),
        (lambda: MinibatchStdLayer(2, 3)(torch.zeros(2, 4, 3, 5)), "4 channels .* num_channels=3"),
        (lambda: MinibatchStdLayer(2)(torch.zeros(2, 4)), r"\[N, C, H, W\], got x.shape=\(2, 4\)"),
        (
            lambda: SynthesisLayer(5, 4, 7, 6)(torch.zeros(2, 5, 6, 6), torch.zeros(2, 7), "loud"),
            "noise_mode='loud' must be one of 'random', 'const', 'none'",
        ),
        (
            lambda: SynthesisLayer(5, 4, 7, 6, up=2)(torch.zeros(2, 5, 6, 6), torch.zeros(2, 7)),
            r"x of shape \[N, 5, 3, 3\], got x.shape=\(2, 5, 6, 6\)",
        ),
        (
            lambda: SynthesisLayer(5, 4, 7, 6)(torch.zeros(2, 5, 6, 6), torch.zeros(3, 7)),
            r"w of shape \[2, 7\], got w.shape=\(3, 7\)",
        ),
        (
            lambda: ToRGBLayer(5, 3, 7)(torch.zeros(2, 4, 6, 6), torch.zeros(2, 7)),
            r"x of shape \[N, 5, H, W\], got x.shape=\(2, 4, 6, 6\)",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "build",
    [
        lambda act: FullyConnectedLayer(3, 2, activation=act),
        lambda act: Conv2dLayer(3, 2, 3, activation=act),
        lambda act: SynthesisLayer(3, 2, 4, 8, activation=act),
    ],
)
def test_unknown_activation(build):
    with pytest.raises(KeyError, match="mish"):
        build("mish")


def test_representation_names_what_was_configured():
    layer = SynthesisLayer(5, 4, 7, 8, up=2, conv_clamp=256)
    assert "5, 4, w_dim=7, resolution=8, kernel_size=3, up=2" in repr(layer)
    assert "conv_clamp=256" in repr(layer)
