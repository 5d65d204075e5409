"""rosinality's networks: their state_dict, and the images of the first family's networks with the
same weights."""

import copy
import inspect
import random

import pytest
import torch

from stylegan_fast.models import rosinality, stylegan2
from stylegan_fast.testing import relative_error

STYLE = 7
CHANNELS = rosinality._channels
NARROW = {"channel_base": 160, "channel_max": 32}


@pytest.fixture(scope="module", autouse=True)
def narrow():
    """Few channels, another number at each resolution."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rosinality, "_channels", narrow_channels)
        yield


def narrow_channels(resolution, multiplier):
    return min(NARROW["channel_base"] // resolution, NARROW["channel_max"])


def perturbed(network):
    """The network in float64 with every parameter moved off its initial value."""
    network = network.double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return network


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    return perturbed(rosinality.Generator(16, STYLE, 2)).requires_grad_(False)


def first_family_generator(size, **widths):
    return stylegan2.Generator(STYLE, 0, STYLE, size, 3, {"num_layers": 2}, **widths)


def generator_weights(network):
    """The state_dict of rosinality's generator with the weights of the first family's."""
    mapping, synthesis = network.mapping, network.synthesis
    weights = {"input.input": synthesis.b4.const[None]}

    def add_linear(target, layer):
        weights[f"{target}.weight"] = layer.weight
        weights[f"{target}.bias"] = layer.bias

    def add_conv(target, layer):
        weights[f"{target}.conv.weight"] = layer.weight[None]
        add_linear(f"{target}.conv.modulation", layer.affine)
        weights[f"{target}.noise.weight"] = layer.noise_strength[None]
        weights[f"{target}.activate.bias"] = layer.bias

    def add_rgb(target, layer):
        weights[f"{target}.conv.weight"] = layer.weight[None]
        add_linear(f"{target}.conv.modulation", layer.affine)
        weights[f"{target}.bias"] = layer.bias.reshape(1, 3, 1, 1)

    for index in range(mapping.num_layers):
        add_linear(f"style.{index + 1}", getattr(mapping, f"fc{index}"))
    add_conv("conv1", synthesis.b4.conv1)
    add_rgb("to_rgb1", synthesis.b4.torgb)
    noises = [synthesis.b4.conv1.noise_const]
    for k, resolution in enumerate(synthesis.block_resolutions[1:], start=1):
        block = getattr(synthesis, f"b{resolution}")
        add_conv(f"convs.{2 * k - 2}", block.conv0)
        add_conv(f"convs.{2 * k - 1}", block.conv1)
        add_rgb(f"to_rgbs.{k - 1}", block.torgb)
        noises += [block.conv0.noise_const, block.conv1.noise_const]
        f = block.resample_filter * 4
        weights[f"convs.{2 * k - 2}.conv.blur.kernel"] = f
        weights[f"to_rgbs.{k - 1}.upsample.kernel"] = f
    weights.update({f"noises.noise_{i}": noise[None, None] for i, noise in enumerate(noises)})
    return weights


def discriminator_weights(network):
    """The state_dict of rosinality's discriminator with the weights of the first family's."""
    weights = {}

    def add(layer, weight, bias):
        weights[weight] = layer.weight
        if bias is not None:
            weights[bias] = layer.bias

    top = network.block_resolutions[0]
    add(getattr(network, f"b{top}").fromrgb, "convs.0.0.weight", "convs.0.1.bias")
    for j, resolution in enumerate(network.block_resolutions, start=1):
        block, target = getattr(network, f"b{resolution}"), f"convs.{j}"
        add(block.conv0, f"{target}.conv1.0.weight", f"{target}.conv1.1.bias")
        add(block.conv1, f"{target}.conv2.1.weight", f"{target}.conv2.2.bias")
        add(block.skip, f"{target}.skip.1.weight", None)
        weights[f"{target}.conv2.0.kernel"] = block.resample_filter
        weights[f"{target}.skip.0.kernel"] = block.resample_filter
    add(network.b4.conv, "final_conv.0.weight", "final_conv.1.bias")
    add(network.b4.fc, "final_linear.0.weight", "final_linear.0.bias")
    add(network.b4.out, "final_linear.1.weight", "final_linear.1.bias")
    return weights


def test_generator_equals_the_first_family():
    first = perturbed(first_family_generator(32, **NARROW))
    second = rosinality.Generator(32, STYLE, 2).double()
    second.load_state_dict(generator_weights(first), strict=True)
    z = torch.randn(2, STYLE, dtype=torch.float64)
    expected = first.synthesis(first.mapping(z), noise_mode="const")
    image, latent = second([z], randomize_noise=False, return_latents=True)
    torch.testing.assert_close(latent, first.mapping(z))
    # The families add 1e-8 to different weights: 1e-8 / 2 of each demodulated layer's output.
    assert relative_error(image, expected) < 1e-8 * second.num_layers
    assert expected.std() > 0.1


def test_discriminator_equals_the_first_family():
    first = perturbed(stylegan2.Discriminator(0, 32, 3, **NARROW))
    second = rosinality.Discriminator(32).double()
    second.load_state_dict(discriminator_weights(first), strict=True)
    image = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    logits = first(image)
    assert logits.std() > 0.1
    torch.testing.assert_close(second(image), logits)


@pytest.mark.parametrize(("size", "multiplier"), [(8, 2), (256, 1), (1024, 2)])
def test_widths_are_those_of_the_first_family(size, multiplier, monkeypatch):
    monkeypatch.setattr(rosinality, "_channels", CHANNELS)
    widths = {"channel_base": 16384 * multiplier}
    with torch.device("meta"):
        pairs = [
            (
                rosinality.Generator(size, STYLE, 2, multiplier),
                generator_weights(first_family_generator(size, **widths)),
            ),
            (
                rosinality.Discriminator(size, multiplier),
                discriminator_weights(stylegan2.Discriminator(0, size, 3, **widths)),
            ),
        ]
    for network, expected in pairs:
        got = network.state_dict()
        assert {name: t.shape for name, t in got.items()} == {
            name: t.shape for name, t in expected.items()
        }


def test_signatures():
    def bare(function):
        signature = inspect.signature(function)
        empty = inspect.Parameter.empty
        parameters = [p.replace(annotation=empty) for p in signature.parameters.values()]
        return str(inspect.Signature(parameters))

    assert bare(rosinality.Generator) == (
        "(size, style_dim, n_mlp, channel_multiplier=2, blur_kernel=(1, 3, 3, 1), lr_mlp=0.01)"
    )
    assert bare(rosinality.Generator.forward) == (
        "(self, styles, return_latents=False, inject_index=None, truncation=1, "
        "truncation_latent=None, input_is_latent=False, noise=None, randomize_noise=True)"
    )
    assert bare(rosinality.Discriminator) == (
        "(size, channel_multiplier=2, blur_kernel=(1, 3, 3, 1))"
    )


def test_a_latent_a_row_of_latents_and_a_z_agree(generator):
    z = torch.randn(2, STYLE, dtype=torch.float64)
    image, latent = generator([z], return_latents=True, randomize_noise=False)
    assert image.shape == (2, 3, 16, 16)
    assert latent.shape == (2, generator.n_latent, STYLE)
    w = generator.get_latent(z)
    torch.testing.assert_close(latent, w[:, None].expand_as(latent))
    for styles in ([w], [latent]):
        again, none = generator(styles, input_is_latent=True, randomize_noise=False)
        torch.testing.assert_close(again, image)
        assert none is None


def test_style_mixing(generator):
    z = torch.randn(2, 2, STYLE, dtype=torch.float64)
    first, second = generator.style(z[0]), generator.style(z[1])
    rows = generator.n_latent
    for inject_index in (0, 2, rows):
        _, latent = generator(list(z), return_latents=True, inject_index=inject_index)
        for row in range(rows):
            torch.testing.assert_close(latent[:, row], first if row < inject_index else second)

    random.seed(1)
    _, latent = generator(list(z), return_latents=True)
    random.seed(1)
    index = random.randint(1, rows - 1)
    torch.testing.assert_close(latent[:, index - 1], first)
    torch.testing.assert_close(latent[:, index], second)


def test_truncation(generator):
    z = torch.randn(2, STYLE, dtype=torch.float64)
    centre = torch.randn(1, STYLE, dtype=torch.float64)
    _, latent = generator([z], return_latents=True, truncation=0.3, truncation_latent=centre)
    w = generator.style(z)
    torch.testing.assert_close(latent[:, 0], centre + 0.3 * (w - centre))


def test_mean_latent(generator):
    torch.manual_seed(1)
    mean = generator.mean_latent(5)
    torch.manual_seed(1)
    z = torch.randn(5, STYLE, dtype=torch.float64)
    torch.testing.assert_close(mean, generator.style(z).mean(0, keepdim=True))


def test_noise(generator):
    z = torch.randn(1, STYLE, dtype=torch.float64)
    buffers = [getattr(generator.noises, f"noise_{i}") for i in range(generator.num_layers)]
    drawn = generator.make_noise()
    assert [t.shape for t in drawn] == [t.shape for t in buffers]
    constant, _ = generator([z], randomize_noise=False)
    torch.testing.assert_close(generator([z], noise=buffers)[0], constant)
    assert relative_error(generator([z], noise=drawn)[0], constant) > 1e-2
    torch.manual_seed(1)
    randomized, _ = generator([z])
    torch.manual_seed(1)
    torch.testing.assert_close(generator([z])[0], randomized)
    assert relative_error(randomized, constant) > 1e-2


def test_networks_do_not_depend_on_the_mode(generator):
    z = torch.randn(3, STYLE, dtype=torch.float64)
    train, evaluate = copy.deepcopy(generator).train(), generator.eval()
    torch.testing.assert_close(
        train([z], randomize_noise=False)[0], evaluate([z], randomize_noise=False)[0]
    )


def test_every_parameter_gets_a_gradient():
    generator = rosinality.Generator(8, STYLE, 2)
    discriminator = rosinality.Discriminator(8)
    with torch.no_grad():
        for noise in (m.noise for m in generator.modules() if hasattr(m, "activate")):
            noise.weight.fill_(0.1)
    image, latent = generator([torch.randn(4, STYLE)], return_latents=True)
    (slope,) = torch.autograd.grad(
        (image * torch.randn_like(image)).sum(), latent, create_graph=True
    )
    (discriminator(image).sum() + slope.square().sum()).backward()
    for network in (generator, discriminator):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


def test_r1_gradient_equals_a_finite_difference():
    discriminator = perturbed(rosinality.Discriminator(8))
    image = torch.randn(4, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    weight = discriminator.convs[1].conv2[1].weight

    def penalty():
        (slope,) = torch.autograd.grad(discriminator(image).sum(), image, create_graph=True)
        return slope.square().sum()

    (exact,) = torch.autograd.grad(penalty(), weight)
    direction, step = torch.randn_like(weight), 1e-5
    with torch.no_grad():
        weight += step * direction
    above = penalty().item()
    with torch.no_grad():
        weight -= 2 * step * direction
    below = penalty().item()
    slope = (exact * direction).sum().item()
    assert (above - below) / (2 * step) == pytest.approx(slope, rel=1e-5)


def test_compile_without_graph_breaks():
    torch._dynamo.reset()
    generator = perturbed(rosinality.Generator(8, STYLE, 1))
    z = torch.randn(2, STYLE, dtype=torch.float64)
    compiled = torch.compile(generator, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled([z], randomize_noise=False)[0], generator([z], randomize_noise=False)[0]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"styles": []}, "styles must hold one or two tensors, got 0"),
        (
            {"styles": [torch.zeros(2, 5)], "input_is_latent": True},
            r"styles\[0\] of shape \[N, 7\], got styles\[0\].shape=\(2, 5\)",
        ),
        (
            {"styles": [torch.zeros(2, STYLE), torch.zeros(3, STYLE)]},
            r"styles\[1\] of shape \[2, 7\], got styles\[1\].shape=\(3, 7\)",
        ),
        (
            {"styles": [torch.zeros(2, 3, STYLE)], "input_is_latent": True},
            r"styles\[0\] of shape \[N, 6, 7\], got styles\[0\].shape=\(2, 3, 7\)",
        ),
        ({"styles": [torch.zeros(2, STYLE)], "truncation": 0.5}, "truncation_latent=None"),
        ({"styles": [torch.zeros(2, STYLE)], "noise": [None]}, "noise must hold 5 tensors, got 1"),
    ],
)
def test_bad_input(arguments, message, generator):
    styles = [style.double() for style in arguments["styles"]]
    with pytest.raises(ValueError, match=message):
        generator(**{**arguments, "styles": styles})


def test_bad_size():
    with pytest.raises(ValueError, match="size=24 must be a power of two"):
        rosinality.Generator(24, STYLE, 2)
    with pytest.raises(ValueError, match=r"input of shape \[N, 3, 8, 8\]"):
        rosinality.Discriminator(8)(torch.zeros(4, 3, 16, 16))
