"""The names and signatures that other people's code imports."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

import stylegan_fast
from stylegan_fast import checkpoints, layers, ops, swap
from stylegan_fast.models import stylegan2, stylegan3

OPS = {
    "adain": "(x, styles, eps=1e-08, *, noise=None, noise_strength=None, b=None, act='linear', "
    "alpha=None, gain=None, clamp=None, backend=None)",
    "bias_act": "(x, b=None, dim=1, act='linear', alpha=None, gain=None, clamp=None, *, "
    "backend=None)",
    "setup_filter": "(f, device='cpu', normalize=True, flip_filter=False, gain=1, separable=None)",
    "upfirdn2d": "(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1, *, backend=None)",
    "filter2d": "(x, f, padding=0, flip_filter=False, gain=1, *, backend=None)",
    "upsample2d": "(x, f, up=2, padding=0, flip_filter=False, gain=1, *, backend=None)",
    "downsample2d": "(x, f, down=2, padding=0, flip_filter=False, gain=1, *, backend=None)",
    "conv2d_resample": "(x, w, f=None, up=1, down=1, padding=0, groups=1, flip_weight=True, "
    "flip_filter=False, *, backend=None)",
    "filtered_lrelu": "(x, fu=None, fd=None, b=None, up=1, down=1, padding=0, "
    f"gain={math.sqrt(2)}, slope=0.2, clamp=None, flip_filter=False, *, backend=None)",
    "modulated_conv2d": "(x, weight, styles, noise=None, up=1, down=1, padding=0, "
    "resample_filter=None, demodulate=True, flip_weight=True, fused_modconv=True, *, "
    "input_gain=None, bias=None, act='linear', alpha=None, gain=None, clamp=None, backend=None)",
}

LAYERS = {
    "Conv2dLayer": ["in_channels", "out_channels", "kernel_size"],
    "FullyConnectedLayer": ["in_features", "out_features"],
    "MinibatchStdLayer": ["group_size", "num_channels"],
    "SynthesisLayer": ["in_channels", "out_channels", "w_dim", "resolution"],
    "ToRGBLayer": ["in_channels", "out_channels", "w_dim"],
}

NETWORKS = {
    "Generator": "(z_dim, c_dim, w_dim, img_resolution, img_channels, mapping_kwargs={}, "
    "**synthesis_kwargs)",
    "Discriminator": "(c_dim, img_resolution, img_channels, architecture='resnet', "
    "channel_base=32768, channel_max=512, num_fp16_res=0, conv_clamp=None, cmap_dim=None, "
    "block_kwargs={}, mapping_kwargs={}, epilogue_kwargs={})",
}


def bare_signature(function) -> str:
    """The signature without annotations."""
    signature = inspect.signature(function)
    empty = inspect.Parameter.empty
    parameters = [p.replace(annotation=empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=empty))


def test_ops_are_exactly_these():
    assert sorted(ops.__all__) == sorted(OPS)


@pytest.mark.parametrize("name", OPS)
def test_op_signature(name):
    assert bare_signature(getattr(ops, name)) == OPS[name]


@pytest.mark.parametrize("name", LAYERS)
def test_layer_arguments(name):
    assert name in layers.__all__
    arguments = list(inspect.signature(getattr(layers, name)).parameters)
    assert arguments[: len(LAYERS[name])] == LAYERS[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_network_signature(name):
    assert bare_signature(getattr(stylegan2, name)) == NETWORKS[name]


def test_stylegan3s_signatures():
    assert bare_signature(stylegan3.Generator) == NETWORKS["Generator"]
    design = stylegan3.SynthesisLayer.design_lowpass_filter
    assert bare_signature(design) == "(numtaps, cutoff, width, fs, radial=False)"


@pytest.mark.parametrize("module", [stylegan_fast, ops, layers, checkpoints, swap])
def test_exported_names_exist_and_are_documented(module):
    for name in module.__all__:
        value = getattr(module, name)
        assert name == "__version__" or value.__doc__, name


def test_package_exports():
    assert {"__version__", "no_weight_gradients", "ops", "use_backend"} <= set(
        stylegan_fast.__all__
    )


def test_use_backend_is_a_context_manager_and_a_setter():
    x = torch.linspace(-1, 1, 6).reshape(1, 2, 3)
    expected = torch.tensor([-0.2, -0.12, -0.04, 0.2, 0.6, 1.0]).reshape(1, 2, 3)

    def run():
        return ops.bias_act(x, act="lrelu", gain=1)

    with stylegan_fast.use_backend("reference"):
        torch.testing.assert_close(run(), expected)
    stylegan_fast.use_backend("reference")
    torch.testing.assert_close(run(), expected)
    stylegan_fast.use_backend(None)
    torch.testing.assert_close(run(), expected)


def test_use_backend_rejects_unknown_names():
    with pytest.raises(ValueError, match=r"'tritn'.*reference, cpu, triton, cuda"):
        stylegan_fast.use_backend("tritn")


def test_no_weight_gradients_is_a_context_manager():
    x = torch.ones(1, 2, 4, 5)
    w = torch.ones(3, 2, 1, 1, requires_grad=True)
    y = ops.conv2d_resample(x, w)
    with stylegan_fast.no_weight_gradients():
        (skipped,) = torch.autograd.grad(y.sum(), w, allow_unused=True, retain_graph=True)
    (computed,) = torch.autograd.grad(y.sum(), w)
    assert skipped is None
    torch.testing.assert_close(computed, torch.full_like(w, 20))
