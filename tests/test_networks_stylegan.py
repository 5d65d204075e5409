"""The StyleGAN networks: the published formulas and counts, growing, derivatives, bad input."""

import inspect
import json
import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad, gradgradcheck

import stylegan_fast
from stylegan_fast import backends
from stylegan_fast.layers import StyleLayer
from stylegan_fast.models.stylegan import Discriminator, Generator, StyleBlock
from stylegan_fast.testing import assert_matches, relative_error

# Whole networks are slow in Triton's interpreter: on a CPU they wait for make test-all.
ON_CPU = os.environ.get("STYLEGAN_FAST_TEST_DEVICE", "cpu") == "cpu"
TRITON = pytest.param("triton", marks=pytest.mark.exhaustive if ON_CPU else ())
BACKENDS = [name for name in backends.BACKENDS if name != "triton"]

TINY = {"channel_base": 64, "channel_max": 8}


def tiny_generator(resolution=16, **kwargs):
    return Generator(5, resolution, z_dim=6, mapping_kwargs={"num_layers": 2}, **TINY, **kwargs)


def tiny_discriminator(resolution=16, **kwargs):
    return Discriminator(resolution, **TINY, **kwargs)


def perturbed(network):
    """The network with no parameter left at 0 or 1, so that each one matters."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network


@pytest.fixture
def backend(backend, device):
    reason = backends.refusal(backend, "adain", device.type, torch.float32)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    return backend


# As published


def test_published_parameter_counts():
    """The totals of the paper's 1024² configuration, 26.2 and 23.1 million."""
    with torch.device("meta"):
        networks = Generator(512, 1024), Discriminator(1024)
    assert [sum(p.numel() for p in n.parameters()) for n in networks] == [26219627, 23087249]


def test_published_initial_values():
    generator = tiny_generator()
    assert (generator.synthesis.const == 1).all()
    assert generator.mapping.w_avg_beta == 0.995
    assert generator.mapping.fc0.bias_gain == 0.01
    for layer in generator.synthesis.layers:
        style = getattr(layer, "style", layer)
        assert not style.noise_strength.any()
        assert not style.bias.any()
        assert not style.affine.bias.any()


def test_style_layer_formula(backend, device):
    layer = perturbed(StyleLayer(7, 5)).to(device)
    x, style = torch.randn(2, 7, 3, 6, device=device), torch.randn(2, 5, device=device)

    def expected(noise):
        x64, parameters = x.double(), {k: v.double() for k, v in layer.state_dict().items()}
        strength, bias = (parameters[k][:, None, None] for k in ("noise_strength", "bias"))
        u = math.sqrt(2) * F.leaky_relu(x64 + strength * noise.double() + bias, 0.2)
        affine = style.double() @ parameters["affine.weight"].T / math.sqrt(5)
        scale, shift = (affine + parameters["affine.bias"])[:, :, None, None].chunk(2, dim=1)
        return (scale + 1) * F.instance_norm(u, eps=1e-8) + shift

    with stylegan_fast.use_backend(backend):
        silent = layer(x, style, "none")
        torch.manual_seed(1)
        noisy = layer(x, style)
    torch.manual_seed(1)
    noise = torch.randn(2, 1, 3, 6, device=device)
    assert_matches(silent, expected(torch.zeros_like(noise)), reduction=18)
    assert_matches(noisy, expected(noise), reduction=18)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_style_block_convolves_a_blurred_image_of_twice_the_size(layout, backend, device):
    """The paper's sequence, on a plane that goes on beyond the image: doubling, convolution,
    blur."""
    block = StyleBlock(5, 4, 6).to(device)
    x = torch.randn(2, 5, 3, 7, device=device).to(memory_format=layout)
    weight = block.conv.weight.double().flip(2, 3) / math.sqrt(5 * 9)
    y = F.interpolate(F.pad(x.double(), [2, 2, 2, 2]), scale_factor=2, mode="nearest")
    y = F.conv2d(y, weight, padding=1)
    binomial = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64, device=device) / 4
    y = F.conv2d(y, binomial.outer(binomial).expand(4, 1, 3, 3), padding=1, groups=4)
    with stylegan_fast.use_backend(backend):
        actual = block.conv(x)
    assert actual.is_contiguous(memory_format=layout)
    assert_matches(actual, y[:, :, 4:-4, 4:-4], reduction=5 * 16)


def test_discriminator_layers_halve_a_blurred_image():
    """Blur, convolution, average of 2×2, on a plane that goes on beyond the image."""
    halving = tiny_discriminator().blocks[1][1]
    x = torch.randn(2, 4, 10, 6)
    binomial = torch.tensor([1.0, 2.0, 1.0]) / 4
    y = F.pad(x, [4, 4, 4, 4])
    y = F.conv2d(y, binomial.outer(binomial).expand(4, 1, 3, 3), padding=1, groups=4)
    y = F.avg_pool2d(F.conv2d(y, halving.weight / 6, padding=1), 2)[:, :, 2:-2, 2:-2]
    expected = math.sqrt(2) * F.leaky_relu(y, 0.2)
    torch.testing.assert_close(halving(x), expected)


# The introductory interface


def test_introductory_example():
    styles = torch.randn(1, 24)
    image = Generator(24, channel_base=512)(styles)
    assert image.shape == (1, 3, 128, 128)
    assert image.clamp(-1, 1).std() > 0.1


def test_introductory_signatures():
    def positional(function):
        return [
            str(p.replace(annotation=p.empty))
            for p in inspect.signature(function).parameters.values()
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]

    assert positional(StyleBlock)[:4] == [
        "in_channels",
        "out_channels",
        "style_dim",
        "upsample=True",
    ]
    assert positional(StyleBlock.forward) == ["self", "x", "style", "noise_mode='random'"]
    assert positional(Generator) == ["style_dim", "resolution=128"]
    assert positional(Generator.forward) == ["self", "styles"]
    assert positional(Discriminator) == ["resolution=128"]
    assert positional(Discriminator.forward) == ["self", "img", "c=None"]


def test_style_block_shapes():
    x, style = torch.randn(2, 3, 5, 7), torch.randn(2, 6)
    assert StyleBlock(3, 4, 6)(x, style).shape == (2, 4, 10, 14)
    assert StyleBlock(3, 4, 6, upsample=False)(x, style).shape == (2, 4, 5, 7)


@pytest.mark.parametrize("resolution", [8, 32])
@pytest.mark.parametrize("c_dim", [0, 4])
def test_shapes(resolution, c_dim):
    generator = tiny_generator(resolution, c_dim=c_dim, img_channels=2)
    discriminator = tiny_discriminator(resolution, c_dim=c_dim, img_channels=2)
    c = torch.randn(3, 4) if c_dim else None
    ws = generator.mapping(torch.randn(3, 6), c)
    assert ws.shape == (3, 2 * math.log2(resolution) - 2, 5)
    assert generator.num_layers == generator.num_ws == ws.shape[1]
    img = generator.synthesis(ws)
    assert img.shape == (3, 2, resolution, resolution)
    assert discriminator(img, c).shape == (3, 1)
    assert generator(ws[:0]).shape == (0, *img.shape[1:])


def test_widths_of_every_resolution():
    with torch.device("meta"):
        synthesis = Generator(512, 1024).synthesis
        discriminator = Discriminator(1024)
    widths = [512] * 4 + [256, 128, 64, 32, 16]
    assert [to_rgb.in_channels for to_rgb in synthesis.to_rgbs] == widths
    assert [from_rgb.out_channels for from_rgb in discriminator.from_rgbs] == widths


def test_w_is_w_plus_with_equal_rows():
    generator = perturbed(tiny_generator())
    w = torch.randn(3, 5)
    rows = w[:, None].repeat(1, generator.num_layers, 1)
    assert torch.equal(generator(w, noise_mode="const"), generator(rows, noise_mode="const"))
    assert torch.equal(
        generator(w, noise_mode="const"), generator.synthesis(rows, noise_mode="const")
    )


def test_a_style_changes_its_layer_and_the_later_ones():
    synthesis = perturbed(tiny_generator()).synthesis
    seen = []
    for layer in synthesis.layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(out))
    ws, other = torch.randn(2, 2, synthesis.num_ws, 5)

    def outputs(ws):
        seen.clear()
        synthesis(ws, noise_mode="const")
        return list(seen)

    base = outputs(ws)
    for row in range(synthesis.num_ws):
        mixed = ws.clone()
        mixed[:, row] = other[:, row]
        same = [torch.equal(a, b) for a, b in zip(base, outputs(mixed))]
        assert same == [index < row for index in range(synthesis.num_ws)]


def test_labels_matter():
    generator, discriminator = tiny_generator(8, c_dim=4), tiny_discriminator(8, c_dim=4)
    z, c, img = torch.randn(4, 6), torch.randn(4, 4), torch.randn(4, 3, 8, 8)
    assert not torch.allclose(generator.mapping(z, c), generator.mapping(z, c.flip(0)))
    assert not torch.allclose(discriminator(img, c), discriminator(img, c.flip(0)))


# Growing


def test_generator_fades_a_resolution_in():
    generator = perturbed(tiny_generator())
    w = torch.randn(2, 5)

    def image(resolution, alpha):
        return generator(w, noise_mode="const", resolution=resolution, alpha=alpha)

    for resolution in (8, 16):
        new = image(resolution, 1)
        doubled = F.interpolate(image(resolution // 2, 1), scale_factor=2, mode="nearest")
        torch.testing.assert_close(image(resolution, 0), doubled)
        torch.testing.assert_close(image(resolution, 0.25), 0.25 * new + 0.75 * doubled)
    assert torch.equal(image(16, 1), generator(w, noise_mode="const"))


def test_discriminator_fades_a_resolution_in():
    discriminator = perturbed(tiny_discriminator())
    img = torch.randn(4, 3, 16, 16)
    halved = F.avg_pool2d(img, 2)
    torch.testing.assert_close(discriminator(img, alpha=0), discriminator(halved))
    assert not torch.allclose(discriminator(img, alpha=0.5), discriminator(img))

    features = []
    discriminator.blocks[0].register_forward_pre_hook(lambda m, args: features.append(args[0]))
    for alpha in (0, 1, 0.25):
        discriminator(img, alpha=alpha)
    old, new, mixed = features
    torch.testing.assert_close(mixed, 0.25 * new + 0.75 * old)


# Noise


def test_noise_modes():
    generator = perturbed(tiny_generator(8))
    w = torch.randn(2, 5)

    def image(seed, noise_mode):
        torch.manual_seed(seed)
        return generator(w, noise_mode=noise_mode)

    assert torch.equal(image(1, "random"), image(1, "random"))
    assert not torch.allclose(image(1, "random"), image(2, "random"))
    for noise_mode in ("const", "none"):
        assert torch.equal(image(1, noise_mode), image(2, noise_mode))
    assert not torch.allclose(image(1, "const"), image(1, "none"))


def test_noise_is_scaled_a_channel():
    layer = StyleLayer(3, 5, resolution=8)
    x, style = torch.randn(2, 3, 8, 8), torch.randn(2, 5)
    with torch.no_grad():
        layer.noise_strength[1] = 2
    changed = (layer(x, style, "const") != layer(x, style, "none")).flatten(2).any(dim=2)
    assert changed.tolist() == [[False, True, False]] * 2


# Derivatives


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


def test_path_length_gradient_equals_a_finite_difference():
    synthesis = perturbed(tiny_generator(8).synthesis).double()
    ws = torch.randn(2, synthesis.num_ws, 5, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    def penalty():
        img = synthesis(ws, noise_mode="const", alpha=0.75)
        (gradient,) = grad((img * noise).sum() / 8, ws, create_graph=True)
        return gradient.square().sum(dim=2).mean(dim=1).mean()

    exact, numeric = directional_derivatives(penalty, [ws, *synthesis.parameters()])
    assert abs(exact) > 1e-3
    assert exact == pytest.approx(numeric, rel=1e-6)


def test_r1_gradient_equals_a_finite_difference():
    discriminator = perturbed(tiny_discriminator(8, c_dim=4)).double()
    img = torch.randn(4, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    c = torch.randn(4, 4, dtype=torch.float64)

    def penalty():
        logits = discriminator(img, c, alpha=0.75)
        (gradient,) = grad(logits.sum(), img, create_graph=True)
        return gradient.square().sum(dim=[1, 2, 3]).mean()

    exact, numeric = directional_derivatives(penalty, [img, *discriminator.parameters()])
    assert abs(exact) > 1e-3
    assert exact == pytest.approx(numeric, rel=1e-6)


def test_style_block_to_second_order():
    block = perturbed(StyleBlock(2, 3, 4)).double()
    x = torch.randn(2, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    style = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda x, style: block(x, style, "none"), (x, style), fast_mode=True)


def test_every_parameter_gets_a_gradient():
    """A fade between two resolutions reaches the to_rgb and from_rgb of both."""
    generator, discriminator = (
        perturbed(network(8, c_dim=4)) for network in (tiny_generator, tiny_discriminator)
    )
    z, c = torch.randn(4, 6), torch.randn(4, 4)
    img = generator.synthesis(generator.mapping(z, c), alpha=0.5)
    discriminator(img, c, alpha=0.5).sum().backward()
    for network in (generator, discriminator):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


@pytest.mark.parametrize("backend", [*BACKENDS, TRITON], indirect=True)
def test_backends_agree(backend, device):
    generator = perturbed(tiny_generator()).to(device)
    discriminator = perturbed(tiny_discriminator()).to(device)
    w = torch.randn(4, 5, device=device, requires_grad=True)

    def run(name):
        with stylegan_fast.use_backend(name):
            img = generator(w, noise_mode="const")
            logits = discriminator(img)
            return img, logits, *grad(logits.sum(), w)

    for actual, expected in zip(run(backend), run("reference")):
        assert relative_error(actual, expected) < 1e-5


# State, types, compilers


def test_state_dict_round_trip():
    generator, twin = perturbed(tiny_generator(8)), tiny_generator(8)
    twin.load_state_dict(generator.state_dict(), strict=True)
    w = torch.randn(2, 5)
    assert torch.equal(twin(w, noise_mode="const"), generator(w, noise_mode="const"))
    assert "synthesis.repeat_filter" not in generator.state_dict()


def test_networks_can_be_made_again():
    generator = tiny_generator(8, c_dim=4, img_channels=1, resample_filter=[1, 2, 1])
    discriminator = tiny_discriminator(8, c_dim=4, epilogue_kwargs={"mbstd_group_size": 2})
    for network in (generator, discriminator):
        assert json.loads(json.dumps(network.init_kwargs)) == network.init_kwargs
        twin = type(network)(**network.init_kwargs)
        twin.load_state_dict(network.state_dict(), strict=True)
        assert repr(twin) == repr(network)


def test_autocast():
    """The layers run in bfloat16, the image and the latents stay float32."""
    generator, discriminator = perturbed(tiny_generator()), perturbed(tiny_discriminator())
    w = torch.randn(4, 5)
    full = generator(w, noise_mode="const")
    with torch.autocast("cpu", torch.bfloat16):
        img = generator(w, noise_mode="const")
        logits = discriminator(img)
    assert img.dtype == torch.float32
    assert 0 < relative_error(img, full) < 8 * torch.finfo(torch.bfloat16).eps
    logits.sum().backward()
    for parameter in discriminator.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


def test_compile_without_graph_breaks():
    torch._dynamo.reset()
    generator = perturbed(tiny_generator(8))
    compiled = torch.compile(generator, fullgraph=True, backend="aot_eager")
    w = torch.randn(4, 5, requires_grad=True)
    eager, fast = (network(w, noise_mode="const", alpha=0.5) for network in (generator, compiled))
    torch.testing.assert_close(fast, eager)
    torch.testing.assert_close(grad(fast.sum(), w), grad(eager.sum(), w))


# Bad input


@pytest.mark.parametrize("network", [lambda resolution: Generator(5, resolution), Discriminator])
@pytest.mark.parametrize("resolution", [4, 12, 100, 2048, 16.0, "16"])
def test_bad_resolution(network, resolution):
    with pytest.raises(ValueError, match=f"resolution={resolution!r} must be "):
        network(resolution)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: tiny_generator()(torch.zeros(2, 6)),
            r"styles of shape \[N, 5\], got styles.shape=\(2, 6\)",
        ),
        (
            lambda: tiny_generator()(torch.zeros(2, 5, 5)),
            r"styles of shape \[N, 6, 5\], got styles.shape=\(2, 5, 5\)",
        ),
        (lambda: tiny_generator()(torch.zeros(2, 5), noise_mode="loud"), "noise_mode='loud'"),
        (lambda: tiny_generator()(torch.zeros(2, 5), resolution=32), "resolution=32 must be one"),
        (lambda: tiny_generator()(torch.zeros(2, 5), alpha=1.5), "alpha=1.5 must be between 0"),
        (lambda: tiny_generator()(torch.zeros(2, 5), resolution=4, alpha=0.5), "alpha=0.5 fades"),
        (
            lambda: StyleBlock(3, 4, 6)(torch.zeros(1, 3, 2, 2), torch.zeros(1, 6), "const"),
            "noise_mode='const' needs",
        ),
        (
            lambda: StyleBlock(3, 4, 6)(torch.zeros(1, 4, 2, 2), torch.zeros(1, 6)),
            r"x of shape \[N, 3, H, W\], got x.shape=\(1, 4, 2, 2\)",
        ),
        (
            lambda: StyleBlock(3, 4, 6)(torch.zeros(1, 3, 2, 2), torch.zeros(2, 6)),
            r"style of shape \[1, 6\], got style.shape=\(2, 6\)",
        ),
        (lambda: tiny_discriminator()(torch.zeros(4, 3, 16, 8)), r"img of shape \[N, 3, 16, 16\]"),
        (lambda: tiny_discriminator()(torch.zeros(4, 3, 32, 32)), r"img.shape\[2\]=32 must be one"),
        (lambda: tiny_discriminator()(torch.zeros(6, 3, 16, 16)), "batch of 6 .* group_size=4"),
        (lambda: tiny_discriminator(c_dim=4)(torch.zeros(4, 3, 16, 16)), "c=None"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
