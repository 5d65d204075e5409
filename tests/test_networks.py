"""The StyleGAN2 networks: recordings of the originals, derivatives, switches, bad input."""

import copy
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import grad

import stylegan_fast
from stylegan_fast import backends
from stylegan_fast.models.stylegan2 import (
    Discriminator,
    DiscriminatorBlock,
    Generator,
    MappingNetwork,
    SynthesisBlock,
    SynthesisNetwork,
)
from stylegan_fast.testing import relative_error

GOLDEN = Path(__file__).parent / "golden"
ARCHITECTURES = ("skip", "resnet", "orig")
TINY = {"channel_base": 64, "channel_max": 8}

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


def tiny_generator(img_resolution=16, c_dim=0, architecture="skip", w_avg_beta=0.998, **kwargs):
    mapping_kwargs = {"num_layers": 2, "w_avg_beta": w_avg_beta}
    kwargs = dict(TINY, architecture=architecture, **kwargs)
    return Generator(6, c_dim, 5, img_resolution, 3, mapping_kwargs, **kwargs)


def tiny_discriminator(img_resolution=16, c_dim=0, architecture="resnet", **kwargs):
    return Discriminator(c_dim, img_resolution, 3, architecture, **TINY, **kwargs)


def perturbed(network):
    """The network with no parameter left at 0 or 1, so that each one matters."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network


# Against the originals


@pytest.fixture(scope="module", params=ARCHITECTURES)
def golden(request):
    with np.load(GOLDEN / f"network_sg2_{request.param}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    config = json.loads(str(arrays.pop("config")))
    tensors = {key: torch.from_numpy(value) for key, value in arrays.items()}
    generator = Generator(**config["G"]).eval()
    discriminator = Discriminator(**config["D"]).eval()
    for prefix, network in (("G/", generator), ("D/", discriminator)):
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        network.load_state_dict(state, strict=True)
    return config, tensors, generator, discriminator


def on(device, recorded):
    return {key: value.to(device) for key, value in recorded.items()}


def assert_equals_recording(name, out, ref):
    """max |out - ref| ≤ 1e-5 · max |ref|: relative to the largest element of the tensor, since a
    single element may be the difference of much larger ones."""
    assert (out.shape, out.dtype) == (ref.shape, ref.dtype), name
    error = (out - ref).abs().max().item() / ref.abs().max().item()
    assert error <= 1e-5, f"{name}: relative error {error:.1e}"


# Whole networks are slow in Triton's interpreter: on a CPU most of them wait for make test-all.
ON_CPU = os.environ.get("STYLEGAN_FAST_TEST_DEVICE", "cpu") == "cpu"
TRITON = pytest.param("triton", marks=pytest.mark.exhaustive if ON_CPU else ())
BACKENDS = [name for name in backends.BACKENDS if name != "triton"]


@pytest.mark.parametrize("fused_modconv", [True, False])
@pytest.mark.parametrize("backend", [*BACKENDS, TRITON], indirect=True)
def test_generator_equals_the_original(golden, backend, device, fused_modconv):
    config, recorded, generator, _ = golden
    recorded, generator = on(device, recorded), generator.to(device)
    latents = {"z": recorded["z"], "c": recorded.get("c")}
    latents["truncation_psi"] = config["truncation_psi"]
    drawing = {"noise_mode": "const", "fused_modconv": fused_modconv}
    with stylegan_fast.use_backend(backend), torch.no_grad():
        ws = generator.mapping(**latents)
        img = generator.synthesis(recorded["ws"], **drawing)
        whole = generator(**latents, **drawing)
    assert_equals_recording("ws", ws, recorded["ws"])
    assert_equals_recording("img", img, recorded["img"])
    assert_equals_recording("img from z", whole, recorded["img"])


def r1_gradients(discriminator, img, c):
    """logits, their gradient, R1 and the gradient of its mean by every parameter it depends on."""
    img = img.clone().requires_grad_()
    parameters = dict(discriminator.named_parameters())
    logits = discriminator(img, c)
    (d_img,) = grad(logits.sum(), img, create_graph=True)
    r1 = d_img.square().sum(dim=[1, 2, 3])
    gradients = grad(r1.mean(), list(parameters.values()), allow_unused=True)
    out = {
        f"r1_grad/{name}": g for name, g in zip(parameters, gradients, strict=True) if g is not None
    }
    return dict(out, logits=logits, d_logits_d_img=d_img, r1=r1)


@pytest.fixture(scope="module")
def r1_tolerances(golden):
    """1e-5 of the largest element, or what float32 rounding leaves of a gradient.

    The minibatch standard deviation curves as sharply as 1 / √1e-8 where two samples nearly agree,
    so float32 determines some of R1's parameter gradients to a few digits only; the recording,
    itself float32, is up to 5e-3 from its float64 value. What rounding can do is measured here: how
    far the float64 gradient moves when input and parameters move by 2^-20, sixteen times the
    rounding error of one operation. The gradient of b8.conv1.bias, of which the statistic is
    independent, is a sum of terms that cancel; hence the floor at the epsilon of the largest.
    """
    _, recorded, _, discriminator = golden
    discriminator = copy.deepcopy(discriminator).double().cpu()
    img, c = recorded["img"].double(), recorded.get("c")
    generator = torch.Generator().manual_seed(0)

    def moved(x):
        noise = 2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1
        return x * (1 + 2**-20 * noise)

    with stylegan_fast.use_backend("reference"):
        exact = r1_gradients(discriminator, img, c)
        change = dict.fromkeys(exact, 0.0)
        for _ in range(4):
            other = copy.deepcopy(discriminator)
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.copy_(moved(parameter))
            for key, value in r1_gradients(other, moved(img), c).items():
                change[key] = max(change[key], (value - exact[key]).abs().max().item())
    largest = max(v.abs().max().item() for k, v in exact.items() if "r1_grad" in k)
    floor = torch.finfo(torch.float32).eps * largest
    return {
        key: max(1e-5 * value.abs().max().item(), 3 * change[key], floor)
        if "r1_grad" in key
        else 1e-5 * value.abs().max().item()
        for key, value in exact.items()
    }


@pytest.mark.parametrize("backend", [*BACKENDS, TRITON], indirect=True)
def test_discriminator_and_r1_equal_the_original(golden, r1_tolerances, backend, device):
    _, recorded, _, discriminator = golden
    recorded, discriminator = on(device, recorded), discriminator.to(device)
    with stylegan_fast.use_backend(backend):
        out = r1_gradients(discriminator, recorded["img"], recorded.get("c"))
    names = {"logits", "d_logits_d_img", "r1"} | {key for key in recorded if "r1_grad/" in key}
    for name in names | set(out):
        if name in out and name in recorded:
            assert out[name].shape == recorded[name].shape, name
            error = (out[name] - recorded[name]).abs().max().item()
            assert error <= r1_tolerances[name], f"{name}: error {error:.1e}"
        else:
            assert not out.get(name, recorded.get(name)).any(), name


# state_dict


def synthesis_schema(resolution, channels, w_dim, architecture):
    """key -> (shape, is a parameter), typed from the originals' schema, not from our code."""
    schema = {"b4.const": ((channels[4], 4, 4), True)}
    r = 4
    while r <= resolution:
        schema[f"b{r}.resample_filter"] = ((4, 4), False)
        layers = {"conv1": channels[r]} if r == 4 else {
            "conv0": channels[r // 2],
            "conv1": channels[r],
        }  # fmt: skip
        for layer, in_channels in layers.items():
            key = f"b{r}.{layer}"
            schema[f"{key}.weight"] = ((channels[r], in_channels, 3, 3), True)
            schema[f"{key}.bias"] = ((channels[r],), True)
            schema[f"{key}.noise_strength"] = ((), True)
            schema[f"{key}.noise_const"] = ((r, r), False)
            schema[f"{key}.resample_filter"] = ((4, 4), False)
            schema[f"{key}.affine.weight"] = ((in_channels, w_dim), True)
            schema[f"{key}.affine.bias"] = ((in_channels,), True)
        if architecture == "skip" or r == resolution:
            schema[f"b{r}.torgb.weight"] = ((3, channels[r], 1, 1), True)
            schema[f"b{r}.torgb.bias"] = ((3,), True)
            schema[f"b{r}.torgb.affine.weight"] = ((channels[r], w_dim), True)
            schema[f"b{r}.torgb.affine.bias"] = ((channels[r],), True)
        if architecture == "resnet" and r > 4:
            schema[f"b{r}.skip.weight"] = ((channels[r], channels[r // 2], 1, 1), True)
            schema[f"b{r}.skip.resample_filter"] = ((4, 4), False)
        r *= 2
    return schema


def discriminator_schema(resolution, channels, cmap_dim, architecture):
    schema = {}

    def conv(key, out_channels, in_channels, size, bias=True):
        schema[f"{key}.weight"] = ((out_channels, in_channels, size, size), True)
        schema[f"{key}.resample_filter"] = ((4, 4), False)
        if bias:
            schema[f"{key}.bias"] = ((out_channels,), True)

    r = resolution
    while r > 4:
        schema[f"b{r}.resample_filter"] = ((4, 4), False)
        if r == resolution or architecture == "skip":
            conv(f"b{r}.fromrgb", channels[r], 3, 1)
        conv(f"b{r}.conv0", channels[r], channels[r], 3)
        conv(f"b{r}.conv1", channels[r // 2], channels[r], 3)
        if architecture == "resnet":
            conv(f"b{r}.skip", channels[r // 2], channels[r], 1, bias=False)
        r //= 2
    if architecture == "skip":
        conv("b4.fromrgb", channels[4], 3, 1)
    conv("b4.conv", channels[4], channels[4] + 1, 3)
    schema["b4.fc.weight"] = ((channels[4], channels[4] * 16), True)
    schema["b4.fc.bias"] = ((channels[4],), True)
    schema["b4.out.weight"] = ((cmap_dim or 1, channels[4]), True)
    schema["b4.out.bias"] = ((cmap_dim or 1,), True)
    return schema


def mapping_schema(in_features, c_dim, w_dim, num_layers, embed_features):
    schema = {}
    if c_dim:
        schema["embed.weight"] = ((embed_features, c_dim), True)
        schema["embed.bias"] = ((embed_features,), True)
        in_features += embed_features
    for index in range(num_layers):
        schema[f"fc{index}.weight"] = ((w_dim, w_dim if index else in_features), True)
        schema[f"fc{index}.bias"] = ((w_dim,), True)
    return schema


def prefixed(prefix, schema):
    return {f"{prefix}.{key}": value for key, value in schema.items()}


def schema_of(network):
    parameters = dict(network.named_parameters())
    return {k: (tuple(v.shape), k in parameters) for k, v in network.state_dict().items()}


@architectures
@pytest.mark.parametrize("c_dim", [0, 4])
def test_state_dict_schema(architecture, c_dim):
    channels = {4: 8, 8: 8, 16: 4}
    expected = prefixed("synthesis", synthesis_schema(16, channels, 5, architecture))
    expected |= prefixed("mapping", mapping_schema(6, c_dim, 5, 2, 5))
    expected["mapping.w_avg"] = ((5,), False)
    assert schema_of(tiny_generator(16, c_dim, architecture)) == expected

    cmap_dim = 8 if c_dim else 0
    expected = discriminator_schema(16, channels, cmap_dim, architecture)
    if c_dim:
        expected |= prefixed("mapping", mapping_schema(0, c_dim, 8, 8, 8))
    assert schema_of(tiny_discriminator(16, c_dim, architecture)) == expected


def test_blocks_filter_reaches_only_the_resampling_layers():
    block = SynthesisBlock(
        4, 3, 5, 8, 3, is_last=True, architecture="resnet", resample_filter=[1, 2, 1]
    )
    default = block.conv1.resample_filter
    assert default.shape == (4, 4)
    for owner in (block, block.conv0, block.skip):
        assert owner.resample_filter.shape == (3, 3)
    block = DiscriminatorBlock(0, 4, 3, 8, 3, 0, resample_filter=[1, 2, 1])
    for owner in (block, block.conv1, block.skip):
        assert owner.resample_filter.shape == (3, 3)
    for owner in (block.fromrgb, block.conv0):
        torch.testing.assert_close(owner.resample_filter, default)


def test_default_widths_of_a_large_generator():
    with torch.device("meta"):
        synthesis = SynthesisNetwork(512, 1024, 3)
    assert synthesis.num_ws == 18
    widths = [getattr(synthesis, f"b{r}").conv1.out_channels for r in synthesis.block_resolutions]
    assert widths == [512] * 5 + [256, 128, 64, 32]


def test_sixteen_bit_resolutions():
    def half(network):
        return [r for r in network.block_resolutions if getattr(network, f"b{r}").use_fp16]

    assert half(tiny_generator(32, num_fp16_res=2).synthesis) == [16, 32]
    assert half(tiny_generator(32, num_fp16_res=9).synthesis) == [8, 16, 32]
    assert half(tiny_generator(32).synthesis) == []
    assert half(tiny_discriminator(32, num_fp16_res=2)) == [32, 16]


def test_frozen_layers():
    discriminator = tiny_discriminator(16, block_kwargs={"freeze_layers": 5})
    trainable = {name.rsplit(".", 1)[0] for name, _ in discriminator.named_parameters()}
    assert trainable == {"b8.conv1", "b8.skip", "b4.conv", "b4.fc", "b4.out"}
    discriminator.load_state_dict(tiny_discriminator(16).state_dict(), strict=True)


# Derivatives


def path_length_penalty(synthesis, ws, noise, create_graph=True):
    img = synthesis(ws, noise_mode="const")
    loss = (img * noise).sum() / math.sqrt(img.shape[2] * img.shape[3])
    (gradient,) = grad(loss, ws, create_graph=create_graph)
    return gradient.square().sum(dim=2).mean(dim=1).sqrt().square().mean()


def directional_derivatives(loss, parameters, step=1e-6):
    """(⟨∂loss, v⟩ by autograd, the same by a central difference) for a random direction v."""
    direction = [torch.randn_like(p) for p in parameters]
    gradients = grad(loss(), parameters, allow_unused=True)
    pairs = zip(gradients, direction, strict=True)
    exact = sum((g * v).sum() for g, v in pairs if g is not None).item()
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, v in zip(parameters, direction, strict=True):
                parameter += sign * step * v
        values.append(loss().item())
    return exact, (values[0] - values[1]) / (2 * step)


@architectures
@pytest.mark.parametrize("training", [True, False])
def test_path_length_gradient_equals_a_finite_difference(architecture, training):
    synthesis = perturbed(tiny_generator(8, architecture=architecture).synthesis).double()
    synthesis.train(training)
    ws = torch.randn(2, synthesis.num_ws, 5, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    exact, numeric = directional_derivatives(
        lambda: path_length_penalty(synthesis, ws, noise), [ws, *synthesis.parameters()]
    )
    assert abs(exact) > 1e-3
    assert exact == pytest.approx(numeric, rel=1e-6)


@architectures
def test_r1_gradient_equals_a_finite_difference(architecture):
    discriminator = perturbed(tiny_discriminator(8, 4, architecture)).double()
    img = torch.randn(4, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    c = torch.randn(4, 4, dtype=torch.float64)

    def penalty():
        (gradient,) = grad(discriminator(img, c).sum(), img, create_graph=True)
        return gradient.square().sum(dim=[1, 2, 3]).mean()

    exact, numeric = directional_derivatives(penalty, [img, *discriminator.parameters()])
    assert abs(exact) > 1e-3
    assert exact == pytest.approx(numeric, rel=1e-6)


def test_penalties_are_the_same_without_weight_gradients():
    """Inside `no_weight_gradients` only the first-order weight gradients are skipped."""
    synthesis = perturbed(tiny_generator(8).synthesis)
    ws = torch.randn(2, synthesis.num_ws, 5, requires_grad=True)
    noise = torch.randn(2, 3, 8, 8)
    parameters = list(synthesis.parameters())
    full = grad(path_length_penalty(synthesis, ws, noise), parameters, allow_unused=True)
    with stylegan_fast.no_weight_gradients():
        penalty = path_length_penalty(synthesis, ws, noise)
    gradients = grad(penalty, parameters, allow_unused=True)
    for gradient, reference in zip(gradients, full, strict=True):
        assert (gradient is None) == (reference is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, reference)


@architectures
def test_every_parameter_gets_a_gradient(architecture, backend, device):
    generator = perturbed(tiny_generator(8, 4, architecture)).to(device)
    discriminator = perturbed(tiny_discriminator(8, 4, architecture)).to(device)
    z, c = torch.randn(4, 6, device=device), torch.randn(4, 4, device=device)
    with stylegan_fast.use_backend(backend):
        discriminator(generator(z, c), c).sum().backward()
    for network in (generator, discriminator):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


# Mapping


def mapping(num_ws=4, **kwargs):
    return perturbed(MappingNetwork(6, 4, 5, num_ws, num_layers=2, **kwargs).double())


def latents(n=3):
    return torch.randn(n, 6, dtype=torch.float64), torch.randn(n, 4, dtype=torch.float64)


def test_mapping_formula():
    network = mapping(embed_features=7, layer_features=8, lr_multiplier=0.1).eval()
    z, c = latents()

    def norm(v):
        return v / (v.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()

    def dense(x, layer, lr):
        return x @ layer.weight.T * (lr / math.sqrt(layer.in_features)) + layer.bias * lr

    x = torch.cat([norm(z), norm(dense(c, network.embed, 1))], dim=1)
    for layer in (network.fc0, network.fc1):
        x = torch.nn.functional.leaky_relu(dense(x, layer, 0.1), 0.2) * math.sqrt(2)
    assert network.fc0.weight.shape == (8, 13)
    torch.testing.assert_close(network(z, c), x[:, None].expand(3, 4, 5))


def test_mapping_without_rows():
    network = mapping(num_ws=None)
    assert "w_avg" not in network.state_dict()
    assert network(*latents()).shape == (3, 5)


def test_truncation():
    network = mapping().eval()
    network.w_avg.normal_()
    z, c = latents()
    w = network(z, c)
    truncated = network.w_avg + 0.3 * (w - network.w_avg)
    torch.testing.assert_close(network(z, c, truncation_psi=0.3), truncated)
    expected = torch.cat([truncated[:, :3], w[:, 3:]], dim=1)
    out = network(z, c, truncation_psi=0.3, truncation_cutoff=3)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(network(z, c, truncation_psi=0.3, truncation_cutoff=0), w)
    torch.testing.assert_close(
        network(z, c, truncation_psi=0, truncation_cutoff=9), 0 * w + network.w_avg
    )


@pytest.mark.parametrize(
    ("training", "switches", "updates"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"skip_w_avg_update": True}, False),
        (True, {"update_emas": False}, False),
        (False, {"update_emas": True}, True),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_w_avg_update(training, switches, updates, whole):
    generator = tiny_generator(4, w_avg_beta=0.9).train(training)
    generator.mapping.w_avg.normal_()
    before = generator.mapping.w_avg.clone()
    z = torch.randn(3, 6)
    out = (generator if whole else generator.mapping)(z, **switches)
    assert out.requires_grad
    assert not generator.mapping.w_avg.requires_grad
    mean = generator.mapping(z, update_emas=False)[:, 0].mean(dim=0)
    expected = 0.9 * before + 0.1 * mean if updates else before
    torch.testing.assert_close(generator.mapping.w_avg, expected)


# Networks


@architectures
@pytest.mark.parametrize("c_dim", [0, 4])
@pytest.mark.parametrize("resolution", [4, 8, 32])
def test_generator_shapes(architecture, c_dim, resolution):
    generator = tiny_generator(resolution, c_dim, architecture)
    assert generator.num_ws == generator.synthesis.num_ws == 2 * math.log2(resolution) - 2
    c = torch.randn(3, 4) if c_dim else None
    img = generator(torch.randn(3, 6), c)
    assert img.shape == (3, 3, resolution, resolution)
    assert img.dtype == torch.float32
    assert generator(torch.randn(0, 6), c[:0] if c_dim else None).shape == (0, *img.shape[1:])
    assert generator.mapping.w_avg.isfinite().all()


@architectures
@pytest.mark.parametrize("c_dim", [0, 4])
@pytest.mark.parametrize("resolution", [8, 32])
def test_discriminator_shapes(architecture, c_dim, resolution):
    discriminator = tiny_discriminator(resolution, c_dim, architecture)
    c = torch.randn(3, 4) if c_dim else None
    logits = discriminator(torch.randn(3, 3, resolution, resolution), c)
    assert logits.shape == (3, 1)
    assert logits.dtype == torch.float32


def test_attributes():
    generator = tiny_generator(16, 4)
    names = ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels", "num_ws")
    assert [getattr(generator, name) for name in names] == [6, 4, 5, 16, 3, 6]
    discriminator = tiny_discriminator(16, 4)
    assert [getattr(discriminator, name) for name in names[1:5:2]] == [4, 16]
    assert discriminator.img_channels == 3


def test_synthesis_kwargs_as_a_dictionary():
    nested = Generator(6, 0, 5, 16, 3, {}, synthesis_kwargs=dict(architecture="orig", **TINY))
    flat = Generator(6, 0, 5, 16, 3, {}, architecture="orig", **TINY)
    assert schema_of(nested) == schema_of(flat)


def test_unconditional_networks_ignore_the_label():
    generator, discriminator = tiny_generator(8).eval(), tiny_discriminator(8)
    z, label = torch.randn(4, 6), torch.zeros(4, 0)
    img = generator(z, label, noise_mode="const")
    torch.testing.assert_close(img, generator(z, noise_mode="const"))
    torch.testing.assert_close(discriminator(img, label), discriminator(img))


def test_labels_matter():
    generator, discriminator = tiny_generator(8, 4).eval(), tiny_discriminator(8, 4)
    z, c = torch.randn(4, 6), torch.randn(4, 4)
    img = generator(z, c, noise_mode="const")
    assert not torch.allclose(img, generator(z, c.flip(0), noise_mode="const"))
    assert not torch.allclose(discriminator(img, c), discriminator(img, c.flip(0)))


def test_noise_is_reproducible():
    generator = perturbed(tiny_generator(8)).eval()
    z = torch.randn(2, 6)

    def image(seed, noise_mode="random"):
        torch.manual_seed(seed)
        return generator(z, noise_mode=noise_mode)

    assert torch.equal(image(1), image(1))
    assert not torch.allclose(image(1), image(2))
    assert torch.equal(image(1, "const"), image(2, "const"))
    assert not torch.allclose(image(1, "const"), image(1, "none"))


def test_fused_modconv_defaults():
    """In inference, where the working dtype is 32-bit or the batch is 1."""
    seen = []

    def used(samples, training=False, default=None, **kwargs):
        block = SynthesisBlock(
            0,
            4,
            5,
            4,
            3,
            is_last=True,
            use_fp16=True,
            half_dtype=torch.bfloat16,
            fused_modconv_default=default,
        ).train(training)
        block.conv1.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["fused_modconv"]), with_kwargs=True
        )
        block(None, None, torch.randn(samples, 2, 5), **kwargs)
        return seen.pop()

    assert used(2)
    assert not used(2, training=True)
    assert not used(2, force_fp32=False)
    assert used(1, force_fp32=False)
    assert used(2, training=True, default=True)
    assert not used(2, default=False)
    assert used(2, default="inference_only", force_fp32=False)
    assert not used(2, training=True, default="inference_only")
    assert used(2, training=True, fused_modconv=True)


@architectures
@pytest.mark.parametrize("channels_last", [True, False])
def test_sixteen_bit_blocks(architecture, channels_last):
    """bfloat16 blocks run on the CPU when asked to, and stay within their rounding of float32."""
    half = {"half_dtype": torch.bfloat16, "fp16_channels_last": channels_last}
    generator = perturbed(
        tiny_generator(16, architecture=architecture, num_fp16_res=1, **half)
    ).eval()
    discriminator = perturbed(
        tiny_discriminator(16, architecture=architecture, num_fp16_res=2, block_kwargs=half)
    ).eval()
    formats = {}

    def record(name):
        def hook(module, args, out):
            memory_format = torch.channels_last if channels_last else torch.contiguous_format
            formats[name] = (out.dtype, out.is_contiguous(memory_format=memory_format))

        return hook

    for name, network in (("G", generator.synthesis), ("D", discriminator)):
        network.b16.conv1.register_forward_hook(record(name))
    z = torch.randn(4, 6)
    full = generator(z, noise_mode="const")
    scores = discriminator(full)
    assert formats == {
        "G": (torch.float32, not channels_last),
        "D": (torch.float32, not channels_last),
    }

    img = generator(z, noise_mode="const", force_fp32=False)
    half_scores = discriminator(full, force_fp32=False)
    assert formats == {"G": (torch.bfloat16, True), "D": (torch.bfloat16, True)}
    assert img.dtype == half_scores.dtype == torch.float32
    assert img.is_contiguous()
    eps = torch.finfo(torch.bfloat16).eps
    for out, ref in ((img, full), (half_scores, scores)):
        assert 0 < relative_error(out, ref) < 4 * eps
    assert torch.equal(generator(z, noise_mode="const", force_fp32=True), full)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@architectures
@pytest.mark.parametrize("half_dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_blocks_are_automatic_on_a_gpu(architecture, half_dtype):
    half = {"half_dtype": half_dtype, "fp16_channels_last": True}
    common = {"architecture": architecture, "num_fp16_res": 1, "conv_clamp": 256}
    generator = perturbed(tiny_generator(16, **common, **half)).cuda().eval()
    discriminator = perturbed(tiny_discriminator(16, **common, block_kwargs=half)).cuda()
    z = torch.randn(4, 6, device="cuda")
    full = generator(z, noise_mode="const", force_fp32=True)
    img = generator(z, noise_mode="const")
    logits = discriminator(full)
    assert img.dtype == logits.dtype == torch.float32
    eps = torch.finfo(half_dtype).eps
    for out, ref in ((img, full), (logits, discriminator(full, force_fp32=True))):
        assert 0 < relative_error(out, ref) < 4 * eps


@architectures
def test_autocast(architecture):
    """The layers run in bfloat16; images, latents and averages stay float32."""
    generator = perturbed(tiny_generator(16, 4, architecture))
    discriminator = perturbed(tiny_discriminator(16, 4, architecture))
    z, c = torch.randn(4, 6), torch.randn(4, 4)
    full = generator(z, c, noise_mode="const", update_emas=False)
    with torch.autocast("cpu", torch.bfloat16):
        img = generator(z, c, noise_mode="const", update_emas=True)
        ws = generator.mapping(z, c, truncation_psi=0.5)
        logits = discriminator(img, c)
    assert img.dtype == ws.dtype == generator.mapping.w_avg.dtype == torch.float32
    assert generator.mapping.w_avg.any()
    assert 0 < relative_error(img, full) < 8 * torch.finfo(torch.bfloat16).eps
    logits.sum().backward()
    for parameter in (*generator.parameters(), *discriminator.parameters()):
        assert parameter.grad.isfinite().all()


def test_a_double_network_is_a_double_network():
    generator, discriminator = tiny_generator(16).double(), tiny_discriminator(16).double()
    img = generator(torch.randn(4, 6), noise_mode="const")
    assert img.dtype == torch.float64
    assert discriminator(img).dtype == torch.float64


def test_conv_clamp_bounds_every_activation():
    generator = tiny_generator(8, conv_clamp=0.5).eval()
    discriminator = tiny_discriminator(8, conv_clamp=0.5).eval()
    largest = {}
    for network in (generator, discriminator):
        for name, module in network.named_modules():
            if hasattr(module, "conv_clamp"):
                module.register_forward_hook(
                    lambda m, a, out, name=name: largest.update({name: out.abs().max().item()})
                )
    discriminator(generator(torch.randn(4, 6)))
    clamped = {n: v for n, v in largest.items() if not n.endswith("skip")}
    assert len(clamped) == 9
    assert all(v <= 0.5 for v in clamped.values())
    assert sum(v == 0.5 for v in clamped.values()) > 4
    assert discriminator.b8.skip.conv_clamp is None


def test_use_noise_and_activation_reach_the_layers():
    generator = tiny_generator(8, use_noise=False, activation="swish")
    assert not [key for key in generator.state_dict() if "noise" in key]
    assert generator.synthesis.b8.conv0.activation == "swish"
    generator(torch.randn(2, 6))


def test_deepcopy_and_state_dict_round_trip():
    generator = perturbed(tiny_generator(8)).eval()
    twin = tiny_generator(8).eval()
    twin.load_state_dict(generator.state_dict(), strict=True)
    z = torch.randn(2, 6)
    expected = generator(z, noise_mode="const")
    for other in (copy.deepcopy(generator), twin):
        assert torch.equal(other(z, noise_mode="const"), expected)


def test_the_originals_callers_are_served():
    """Their training loops pass `update_emas` to every network."""
    generator, discriminator = tiny_generator(8), tiny_discriminator(8)
    ws = generator.mapping(torch.randn(4, 6), None, update_emas=True)
    img = generator.synthesis(ws, update_emas=True)
    assert discriminator(img, None, update_emas=True).shape == (4, 1)


# Compilers


def check_compiled(synthesis, discriminator, batches):
    torch._dynamo.reset()

    def score(ws, synthesis, discriminator):
        return discriminator(synthesis(ws, noise_mode="const"))

    compiled = [
        torch.compile(network, fullgraph=True, backend="aot_eager")
        for network in (synthesis, discriminator)
    ]
    for samples in batches:
        ws = torch.randn(samples, synthesis.num_ws, 5, requires_grad=True)
        eager, fast = score(ws, synthesis, discriminator), score(ws, *compiled)
        torch.testing.assert_close(fast, eager)
        torch.testing.assert_close(grad(fast.sum(), ws), grad(eager.sum(), ws))


@architectures
def test_compile_without_graph_breaks(architecture):
    synthesis = perturbed(tiny_generator(16, architecture=architecture).synthesis)
    discriminator = perturbed(tiny_discriminator(16, architecture=architecture))
    check_compiled(synthesis, discriminator, [4])


def test_compile_with_another_batch():
    check_compiled(perturbed(tiny_generator(8).synthesis), perturbed(tiny_discriminator(8)), [4, 8])


@architectures
def test_export(architecture):
    generator = tiny_generator(8, architecture=architecture, use_noise=False)
    synthesis = perturbed(generator.synthesis).eval()
    batch = {0: torch.export.Dim("batch", min=2)}
    ws = torch.randn(3, synthesis.num_ws, 5)
    program = torch.export.export(synthesis, (ws,), dynamic_shapes=(batch,))
    other = torch.randn(7, synthesis.num_ws, 5)
    torch.testing.assert_close(program.module()(other), synthesis(other))


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tiny_generator(12), "img_resolution=12 must be a power of two and at least 4"),
        (lambda: tiny_generator(2), "img_resolution=2 "),
        (lambda: tiny_generator(16.0), "img_resolution=16.0 "),
        (lambda: tiny_discriminator(4), "img_resolution=4 must be .* at least 8"),
        (lambda: tiny_generator(architecture="unet"), "architecture='unet' must be one of 'orig'"),
        (lambda: tiny_discriminator(architecture="unet"), "architecture='unet' "),
        (lambda: tiny_generator(half_dtype=torch.float64), "half_dtype=torch.float64 "),
        (lambda: tiny_generator(fused_modconv_default="yes"), "fused_modconv_default='yes' "),
        (lambda: tiny_discriminator(c_dim=4, cmap_dim=0), "cmap_dim=0 "),
        (lambda: MappingNetwork(0, 0, 5, 4), "z_dim=0 and c_dim=0"),
        (lambda: MappingNetwork(6, 0, 5, 4, num_layers=0), "num_layers=0 "),
        (lambda: tiny_generator()(torch.zeros(2, 5)), r"z of shape \[N, 6\], got z.shape=\(2, 5\)"),
        (lambda: tiny_generator()(None), r"z of shape \[N, 6\], got z=None"),
        (lambda: tiny_generator(c_dim=4)(torch.zeros(2, 6)), r"c=None: .* shape \[N, 4\]"),
        (
            lambda: tiny_generator(c_dim=4)(torch.zeros(2, 6), torch.zeros(3, 4)),
            r"c of shape \[2, 4\], got c.shape=\(3, 4\)",
        ),
        (lambda: tiny_generator()(torch.zeros(2, 6), noise_mode="loud"), "noise_mode='loud'"),
        (
            lambda: tiny_generator().synthesis(torch.zeros(2, 5, 5)),
            r"ws of shape \[N, 6, 5\], got ws.shape=\(2, 5, 5\)",
        ),
        (
            lambda: MappingNetwork(6, 0, 5, None)(torch.zeros(2, 6), truncation_psi=0.5),
            "truncation_psi=0.5 needs the buffer w_avg",
        ),
        (
            lambda: tiny_discriminator()(torch.zeros(4, 3, 8, 8)),
            r"img of shape \[N, 3, 16, 16\], got img.shape=\(4, 3, 8, 8\)",
        ),
        (lambda: tiny_discriminator()(torch.zeros(6, 3, 16, 16)), "batch of 6 .* group_size=4"),
        (lambda: tiny_discriminator(c_dim=4)(torch.zeros(4, 3, 16, 16)), "c=None"),
        (
            lambda: tiny_discriminator(c_dim=4)(torch.zeros(4, 3, 16, 16), torch.zeros(2, 4)),
            r"cmap of shape \[4, 8\]",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
