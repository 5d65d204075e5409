"""StyleGAN3's generator: recordings of the original, filters, geometry, derivatives, bad input."""

import copy
import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import grad

import stylegan_fast
from stylegan_fast import backends
from stylegan_fast.models.stylegan3 import (
    Generator,
    MappingNetwork,
    SynthesisInput,
    SynthesisLayer,
    SynthesisNetwork,
)
from stylegan_fast.testing import relative_error

GOLDEN = Path(__file__).parent / "golden"
TINY = {"channel_base": 64, "channel_max": 6, "num_layers": 4, "margin_size": 3}
R = {"conv_kernel": 1, "use_radial_filters": True}
CONFIGS = {"t": {}, "r": R}

configs = pytest.mark.parametrize("config", CONFIGS)
lowpass = SynthesisLayer.design_lowpass_filter


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def tiny_generator(config="t", img_resolution=32, c_dim=0, w_avg_beta=0.998, **kwargs):
    """Layers of 6, 6, 3, 2 and 3 channels and 22², 38², 38², 32² and 32² pixels."""
    kwargs = TINY | CONFIGS[config] | kwargs
    return Generator(7, c_dim, 5, img_resolution, 3, {"w_avg_beta": w_avg_beta}, **kwargs).eval()


def perturbed(network):
    """The network with no parameter or average left at 0 or 1, so that each one matters."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if "filter" not in name:
                tensor += 0.1 * torch.randn_like(tensor)
    return network


def layers(synthesis):
    return [getattr(synthesis, name) for name in synthesis.layer_names]


# Against the original


@pytest.fixture(scope="module", params=CONFIGS)
def golden(request):
    with np.load(GOLDEN / f"network_sg3_{request.param}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    config = json.loads(str(arrays.pop("config")))
    return config, {key: torch.from_numpy(value) for key, value in arrays.items()}


def state_of(recorded):
    return {k.removeprefix("G/"): v for k, v in recorded.items() if k.startswith("G/")}


def assert_equals_recording(name, out, ref):
    """max |out - ref| ≤ 1e-5 · max |ref|: relative to the largest element of the tensor."""
    assert (out.shape, out.dtype) == (ref.shape, ref.dtype), name
    error = (out - ref).abs().max().item() / ref.abs().max().item()
    assert error <= 1e-5, f"{name}: relative error {error:.1e}"


# A whole network takes minutes in Triton's interpreter.
@pytest.mark.parametrize("backend", [b for b in backends.BACKENDS if b != "triton"], indirect=True)
def test_generator_equals_the_original(golden, backend, device):
    config, recorded = golden
    generator = Generator(**config["G"]).eval()
    generator.load_state_dict(state_of(recorded), strict=True)
    generator = generator.to(device)
    z, ws = recorded["z"].to(device), recorded["ws"].to(device)
    psi = config["truncation_psi"]
    with stylegan_fast.use_backend(backend), torch.no_grad():
        assert_equals_recording(
            "ws", generator.mapping(z, truncation_psi=psi).cpu(), recorded["ws"]
        )
        assert_equals_recording("img", generator.synthesis(ws).cpu(), recorded["img"])
        img = generator(z, None, truncation_psi=psi, noise_mode="const", force_fp32=True)
    assert_equals_recording("img from z", img.cpu(), recorded["img"])


def test_buffers_of_a_new_network_equal_the_original(golden):
    config, recorded = golden
    own, theirs = Generator(**config["G"]).state_dict(), state_of(recorded)
    assert {k: (v.shape, v.dtype) for k, v in own.items()} == {
        k: (v.shape, v.dtype) for k, v in theirs.items()
    }
    filters = [name for name in own if name.endswith("_filter")]
    assert len(filters) == 12
    for name in filters:
        torch.testing.assert_close(own[name], theirs[name], rtol=1e-6, atol=1e-8)


T256 = """
    L0_36_512 2 2 12 12   9   8 32
    L1_36_512 2 2 12 12   9   8 32
    L2_36_512 2 2 12 12   9   8 32
    L3_52_512 4 2 24 12  -6  -9 16
    L4_52_512 2 2 12 12   9   8 16
    L5_84_512 4 2 24 12  -6  -9 16
    L6_84_512 2 2 12 12   9   8 16
    L7_148_362 4 2 24 12  -6  -9 16
    L8_148_256 2 2 12 12   9   8 16
    L9_148_181 2 2 12 12   9   8 16
    L10_276_128 4 2 24 12  -6  -9 16
    L11_276_91 2 2 12 12   9   8 16
    L12_276_64 2 2 12 12   9   8 16
    L13_256_64 2 2 12 12 -11 -12 16
    L14_256_3 1 1 - - 0 0 16
"""
R1024 = """
    L0_36_1024 2 2 12 12x12 11 10 32
    L1_36_1024 2 2 12 12x12 11 10 32
    L2_52_1024 4 2 24 12x12 -2 -5 32
    L3_52_1024 2 2 12 12x12 11 10 32
    L4_84_1024 4 2 24 12x12 -2 -5 32
    L5_148_1024 4 2 24 12x12 -2 -5 16
    L6_148_1024 2 2 12 12x12 11 10 16
    L7_276_645 4 2 24 12x12 -2 -5 16
    L8_276_406 2 2 12 12x12 11 10 16
    L9_532_256 4 2 24 12x12 -2 -5 16
    L10_1044_161 4 2 24 12x12 -2 -5 16
    L11_1044_102 2 2 12 12x12 11 10 16
    L12_1044_64 2 2 12 12 11 10 16
    L13_1024_64 2 2 12 12 -9 -10 16
    L14_1024_3 1 1 - - 0 0 16
"""
PUBLISHED = {
    "t": (T256, 256, {"channel_base": 16384}),
    "r": (R1024, 1024, {"channel_base": 65536, "channel_max": 1024}),
}


@configs
def test_geometry_of_the_published_networks(config):
    """Name, up, down, taps up, taps down, padding before and after, bits."""
    table, resolution, widths = PUBLISHED[config]

    def taps(f):
        return "-" if f is None else "x".join(map(str, f.shape))

    with torch.device("meta"):
        synthesis = SynthesisNetwork(512, resolution, 3, **widths, **CONFIGS[config])
    rows = [
        [name, layer.up_factor, layer.down_factor, taps(layer.up_filter), taps(layer.down_filter),
         *layer.padding[:2], 16 if layer.use_fp16 else 32]
        for name, layer in zip(synthesis.layer_names, layers(synthesis))
    ]  # fmt: skip
    assert [list(map(str, row)) for row in rows] == [
        line.split() for line in table.split("\n")[1:-1]
    ]
    assert all(layer.padding[:2] == layer.padding[2:] for layer in layers(synthesis))
    assert synthesis.num_ws == 16
    first = layers(synthesis)[0]
    sizes = (synthesis.input.channels, synthesis.input.width, synthesis.input.height)
    assert sizes == (first.in_channels, first.in_size, first.in_size)


@pytest.mark.parametrize("c_dim", [0, 4])
@configs
def test_state_dict_schema(config, c_dim):
    expected = {
        "mapping.w_avg": (5,),
        "mapping.fc0.weight": (5, 12 if c_dim else 7),
        "mapping.fc0.bias": (5,),
        "mapping.fc1.weight": (5, 5),
        "mapping.fc1.bias": (5,),
        "synthesis.input.weight": (6, 6),
        "synthesis.input.affine.weight": (4, 5),
        "synthesis.input.affine.bias": (4,),
        "synthesis.input.transform": (3, 3),
        "synthesis.input.freqs": (6, 2),
        "synthesis.input.phases": (6,),
    }
    if c_dim:
        expected |= {"mapping.embed.weight": (5, 4), "mapping.embed.bias": (5,)}
    kernel = 1 if config == "r" else 3
    down = (12, 12) if config == "r" else (12,)
    for name, out, in_, k, up_filter, down_filter in (
        ("L0_22_6", 6, 6, kernel, (12,), down),
        ("L1_38_6", 6, 6, kernel, (24,), down),
        ("L2_38_2", 2, 6, kernel, (12,), (12,)),
        ("L3_32_2", 2, 2, kernel, (12,), (12,)),
        ("L4_32_3", 3, 2, 1, None, None),
    ):
        tensors = {
            "weight": (out, in_, k, k),
            "bias": (out,),
            "affine.weight": (in_, 5),
            "affine.bias": (in_,),
            "magnitude_ema": (),
            "up_filter": up_filter,
            "down_filter": down_filter,
        }
        expected |= {f"synthesis.{name}.{key}": v for key, v in tensors.items() if v is not None}
    generator = tiny_generator(config, c_dim=c_dim)
    assert {k: tuple(v.shape) for k, v in generator.state_dict().items()} == expected
    buffers = ("w_avg", "transform", "freqs", "phases", "_ema", "_filter")
    assert {name for name, _ in generator.named_buffers()} == {
        name for name in expected if name.endswith(buffers)
    }


# Filters


def test_lowpass_filters_as_recorded():
    half = [0.000792, 0.010018, 0.038950, 0.092413, 0.156526, 0.201302]
    torch.testing.assert_close(
        lowpass(12, 2.0, 12.0, 32), torch.tensor(half + half[::-1]), rtol=0, atol=5e-7
    )
    half = [0.000205, 0.002279, 0.008198, 0.018542, 0.030533, 0.038755]
    radial = lowpass(12, 2.0, 12.0, 32, radial=True)
    assert radial.shape == (12, 12)
    torch.testing.assert_close(radial[5], torch.tensor(half + half[::-1]), rtol=0, atol=5e-7)
    torch.testing.assert_close(radial, radial.T.flip(0), rtol=1e-6, atol=0)
    assert lowpass(1, 2.0, 12.0, 32) is None


@pytest.mark.parametrize(
    "numtaps, cutoff, width, fs",
    [
        (12, 2.0, 12.0, 32),
        (24, 5.3, 4.1, 64),
        (13, 3.0, 0.5, 16),
        (12, 3.0, 2.0, 32),
        (9, 1, 7, 16),
    ],
)
def test_lowpass_filters_equal_scipys(numtaps, cutoff, width, fs):
    """In all three ranges of the attenuation."""
    signal = pytest.importorskip("scipy.signal")
    special = pytest.importorskip("scipy.special")
    taps = signal.firwin(numtaps, cutoff, width=width, fs=fs)
    ours = lowpass(numtaps, cutoff, width, fs)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), torch.from_numpy(taps), rtol=1e-6, atol=1e-9)

    beta = signal.kaiser_beta(signal.kaiser_atten(numtaps, width / (fs / 2)))
    window = np.kaiser(numtaps, beta)
    x = (np.arange(numtaps) - (numtaps - 1) / 2) / fs
    r = np.maximum(np.hypot(x, x[:, None]), 1e-9)
    radial = special.j1(2 * cutoff * np.pi * r) / (np.pi * r) * np.outer(window, window)
    ours = lowpass(numtaps, cutoff, width, fs, radial=True).double()
    torch.testing.assert_close(ours, torch.from_numpy(radial / radial.sum()), rtol=1e-6, atol=1e-9)


# Input


def test_input_formula():
    """The formula with matrices, wave by wave."""
    layer = perturbed(SynthesisInput(5, 4, [7, 6], 16, 2.5)).double()
    matrix = functools.partial(torch.tensor, dtype=torch.float64)
    layer.transform.copy_(matrix([[0.9, 0.3, 0.2], [-0.4, 1.1, -0.1], [0, 0, 1]]))
    layer.freqs.mul_(3)
    ws = torch.randn(3, 5, dtype=torch.float64)
    out = layer(ws)
    assert out.shape == (3, 4, 6, 7)
    x = (torch.arange(7) + 0.5 - 7 / 2).double() / 16
    y = (torch.arange(6)[:, None] + 0.5 - 6 / 2).double() / 16
    amplitudes = []
    for n, w in enumerate(ws):
        t = layer.affine(w)
        r0, r1, move_x, move_y = (t / t[:2].square().sum().sqrt()).tolist()
        turn = matrix([[r0, -r1, 0], [r1, r0, 0], [0, 0, 1]])
        move = matrix([[1, 0, -move_x], [0, 1, -move_y], [0, 0, 1]])
        total = turn @ move @ layer.transform
        waves = []
        for freq, phase in zip(layer.freqs, layer.phases):
            phase = phase + freq @ total[:2, 2]
            freq = freq @ total[:2, :2]
            amplitudes.append(min(max(1 - (freq.norm().item() - 2.5) / (16 / 2 - 2.5), 0), 1))
            wave = (2 * math.pi * (freq[0] * x + freq[1] * y + phase)).sin()
            waves.append(amplitudes[-1] * wave)
        expected = torch.einsum("dc,chw->dhw", layer.weight / 2, torch.stack(waves))
        torch.testing.assert_close(out[n], expected, rtol=1e-12, atol=1e-12)
    assert 0 < min(amplitudes) < max(amplitudes) == 1


def test_new_waves_are_within_the_band():
    layer = SynthesisInput(5, 4000, 36, 16, 2.0)
    radii = layer.freqs.norm(dim=1)
    assert 0 < radii.min() < 0.2
    assert 1.9 < radii.max() <= 2
    assert -0.5 <= layer.phases.min() < -0.49 < 0.49 < layer.phases.max() < 0.5
    assert torch.equal(layer.affine(torch.randn(2, 5)), torch.tensor([[1.0, 0, 0, 0]] * 2))


def test_waves_move_and_turn():
    layer = SynthesisInput(5, 6, 20, 16, 2.0)
    w = torch.randn(2, 5)
    still = layer(w)
    bias = layer.affine.bias.data
    bias.copy_(torch.tensor([2.0, 0, 2 * 3 / 16, 2 * -2 / 16]))  # 3 pixels right, 2 up
    torch.testing.assert_close(layer(w)[:, :, :-2, 3:], still[:, :, 2:, :-3], rtol=0, atol=1e-5)
    bias.copy_(torch.tensor([0.0, 1, 0, 0]))
    turned = layer(w)
    torch.testing.assert_close(turned, still.rot90(1, (2, 3)), rtol=0, atol=1e-5)
    layer.transform.copy_(torch.tensor([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]]))
    torch.testing.assert_close(layer(w), still, rtol=0, atol=1e-5)


# Derivatives


def float64_copy(network):
    return copy.deepcopy(network).double().cpu()


@configs
def test_gradients_equal_those_in_float64(config, backend, device):
    if backend == "triton":
        pytest.skip("interpreted; its kernels have tests of their own")
    generator = perturbed(tiny_generator(config)).to(device)
    exact = float64_copy(generator)
    ws = torch.randn(3, generator.num_ws, 5)
    weights = torch.randn(3, 3, 32, 32)

    def gradients(network, ws, weights):
        ws = ws.clone().requires_grad_()
        img = network.synthesis(ws)
        parameters = dict(network.synthesis.named_parameters())
        found = grad((img * weights).sum(), [ws, *parameters.values()])
        return dict(zip(["ws", *parameters], found)) | {"img": img}

    with stylegan_fast.use_backend(backend):
        ours = gradients(generator, ws.to(device), weights.to(device))
    with stylegan_fast.use_backend("reference"):
        expected = gradients(exact, ws.double(), weights.double())
    assert expected["img"].dtype == torch.float64
    for name, gradient in ours.items():
        assert expected[name].any(), name
        assert relative_error(gradient.cpu(), expected[name]) < 2e-5, name


def test_path_length_gradient_equals_a_finite_difference():
    synthesis = perturbed(tiny_generator(num_layers=3, img_resolution=16)).double().synthesis
    ws = torch.randn(2, synthesis.num_ws, 5, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    direction = torch.randn_like(ws)

    def penalty(ws):
        (gradient,) = grad((synthesis(ws) * noise).sum(), ws, create_graph=True)
        return gradient.square().sum()

    (exact,) = grad(penalty(ws), ws)
    step = 1e-6
    higher, lower = (
        penalty((ws + sign * step * direction).detach().requires_grad_()) for sign in (1, -1)
    )
    numeric = ((higher - lower) / (2 * step)).item()
    assert (exact * direction).sum().item() == pytest.approx(numeric, rel=1e-5)


# Averages


def test_averages_move_where_asked_to():
    generator = perturbed(tiny_generator(magnitude_ema_beta=0.9, w_avg_beta=0.8))
    z = torch.randn(4, 7)
    before = {name: buffer.clone() for name, buffer in generator.named_buffers()}
    still = generator.train()(z)
    assert all(torch.equal(buffer, before[name]) for name, buffer in generator.named_buffers())

    seen = {}
    for name, layer in zip(generator.synthesis.layer_names, layers(generator.synthesis)):
        layer.register_forward_pre_hook(
            lambda layer, args, name=name: seen.update({name: args[0].detach().square().mean()})
        )
    moved = generator.eval()(z, update_emas=True)
    assert len(seen) == 5
    for name, magnitude in seen.items():
        average = getattr(generator.synthesis, name).magnitude_ema
        expected = 0.9 * before[f"synthesis.{name}.magnitude_ema"] + 0.1 * magnitude
        torch.testing.assert_close(average, expected)
    expected = 0.8 * before["mapping.w_avg"] + 0.2 * generator.mapping(z)[:, 0].mean(0)
    torch.testing.assert_close(generator.mapping.w_avg, expected)
    assert not torch.allclose(moved, still)
    torch.testing.assert_close(generator(z), moved)  # the averages moved before they were used


def test_an_average_is_a_gain():
    """ToRGB: a magnitude four times as high halves the image, but for the bias."""
    generator = tiny_generator()
    z = torch.randn(2, 7)
    img = generator(z)
    layers(generator.synthesis)[-1].magnitude_ema.mul_(4)
    torch.testing.assert_close(generator(z), img / 2)


# Networks


@configs
@pytest.mark.parametrize("c_dim", [0, 4])
@pytest.mark.parametrize("resolution", [8, 16])
def test_shapes(config, c_dim, resolution):
    generator = tiny_generator(config, resolution, c_dim, channel_base=30)
    c = torch.randn(3, 4) if c_dim else None
    img = generator(torch.randn(3, 7), c)
    assert (img.shape, img.dtype) == ((3, 3, resolution, resolution), torch.float32)
    empty = generator(torch.randn(0, 7), c[:0] if c_dim else None, update_emas=True)
    assert empty.shape == (0, *img.shape[1:])
    assert all(buffer.isfinite().all() for buffer in generator.buffers())


def test_attributes_and_recorded_arguments():
    generator = tiny_generator("r", 16, 4, half_dtype=torch.bfloat16)
    names = ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels", "num_ws")
    assert [getattr(generator, name) for name in names] == [7, 4, 5, 16, 3, 6]
    assert generator.mapping.w_avg.shape == (5,)
    again = Generator(**json.loads(json.dumps(generator.init_kwargs))).eval()
    again.load_state_dict(generator.state_dict(), strict=True)
    z, c = torch.randn(2, 7), torch.randn(2, 4)
    assert torch.equal(again(z, c), generator(z, c))
    assert torch.equal(copy.deepcopy(generator)(z, c), generator(z, c))


def test_labels_matter_where_there_are_any():
    z, c = torch.randn(4, 7), torch.randn(4, 4)
    generator = perturbed(tiny_generator(img_resolution=16, c_dim=4))
    assert not torch.allclose(generator(z, c), generator(z, c.flip(0)))
    generator = tiny_generator(img_resolution=16)
    assert torch.equal(generator(z, torch.zeros(4, 0)), generator(z))


def test_truncation():
    generator = perturbed(tiny_generator(img_resolution=16))
    z = torch.randn(2, 7)
    ws = generator.mapping(z)
    half = generator.mapping.w_avg.lerp(ws, 0.5)
    torch.testing.assert_close(generator.mapping(z, None, 0.5), half)
    cut = generator.mapping(z, truncation_psi=0.5, truncation_cutoff=2)
    torch.testing.assert_close(cut, torch.cat([half[:, :2], ws[:, 2:]], dim=1))
    img = generator(z, None, 0.5, 2)
    torch.testing.assert_close(img, generator.synthesis(cut))


@configs
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_layers(config, channels_last, dtype):
    """16-bit layers run on the CPU when asked to, and stay within their rounding of float32."""
    half = {"half_dtype": dtype, "fp16_channels_last": channels_last, "num_fp16_res": 1}
    generator = perturbed(tiny_generator(config, **half))
    formats = {}

    def record(layer, args, out, name):
        last = out.is_contiguous(memory_format=torch.channels_last)
        formats[name] = (out.dtype, last and not out.is_contiguous())

    for name, layer in zip(generator.synthesis.layer_names, layers(generator.synthesis)):
        layer.register_forward_hook(lambda *args, name=name: record(*args, name))
    z = torch.randn(4, 7)
    full = generator(z)
    assert set(formats.values()) == {(torch.float32, False)}
    img = generator(z, force_fp32=False)
    wide, narrow = (torch.float32, False), (dtype, channels_last)
    assert list(formats.values()) == [wide, narrow, narrow, narrow, narrow]
    assert img.dtype == torch.float32
    assert img.is_contiguous()
    # Four layers of a rounding after each of convolution, filter, activation and filter.
    assert 0 < relative_error(img, full) < 16 * torch.finfo(dtype).eps
    assert torch.equal(generator(z, force_fp32=True), full)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@configs
def test_sixteen_bit_layers_are_automatic_on_a_gpu(config):
    generator = perturbed(tiny_generator(config)).cuda()
    z = torch.randn(4, 7, device="cuda")
    full = generator(z, force_fp32=True)
    img = generator(z)
    assert img.dtype == torch.float32
    assert 0 < relative_error(img, full) < 16 * torch.finfo(torch.float16).eps


def test_autocast():
    """Convolutions run in bfloat16, the waves of the input do not; images and averages neither."""
    generator = perturbed(tiny_generator(img_resolution=16, c_dim=4))
    z, c = torch.randn(4, 7), torch.randn(4, 4)
    ws = generator.mapping(z, c)
    waves, full = generator.synthesis.input(ws[:, 0]), generator.synthesis(ws)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(generator.synthesis.input(ws[:, 0]), waves)
        img = generator.synthesis(ws, update_emas=False)
        generator(z, c, update_emas=True)
    assert img.dtype == generator.mapping.w_avg.dtype == torch.float32
    assert 0 < relative_error(img, full) < 16 * torch.finfo(torch.bfloat16).eps
    img.sum().backward()
    assert all(p.grad.isfinite().all() for p in generator.synthesis.parameters())


def test_clamp_bounds_every_activation():
    generator = perturbed(tiny_generator(img_resolution=16, conv_clamp=0.05))
    peaks = []
    layers(generator.synthesis)[-1].register_forward_hook(
        lambda layer, args, out: peaks.append(out.abs().max().item())
    )
    img = generator(torch.randn(4, 7))
    assert peaks == [pytest.approx(0.05)]
    assert img.abs().max().item() == pytest.approx(0.05 * 0.25)


# Compilers


def test_compile_without_graph_breaks():
    torch._dynamo.reset()
    synthesis = perturbed(tiny_generator("t", 16, num_layers=1, num_critical=0).synthesis)
    compiled = torch.compile(synthesis, fullgraph=True, backend="aot_eager")
    ws = torch.randn(4, synthesis.num_ws, 5, requires_grad=True)
    eager, fast = synthesis(ws), compiled(ws)
    torch.testing.assert_close(fast, eager)
    torch.testing.assert_close(grad(fast.sum(), ws), grad(eager.sum(), ws))


@configs
def test_export(config):
    synthesis = perturbed(tiny_generator(config, 16, num_layers=2, num_critical=1).synthesis)
    batch = {0: torch.export.Dim("batch", min=2)}
    ws = torch.randn(3, synthesis.num_ws, 5)
    program = torch.export.export(synthesis, (ws,), dynamic_shapes=(batch,))
    other = torch.randn(7, synthesis.num_ws, 5)
    torch.testing.assert_close(program.module()(other), synthesis(other))


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tiny_generator(img_resolution=24), "img_resolution=24 must be a power of two"),
        (lambda: tiny_generator(img_resolution=4), "bandwidth=2 must be .* sampling_rate=4"),
        (lambda: tiny_generator(num_layers=2), "num_layers=2 must be more than num_critical=2"),
        (lambda: tiny_generator(num_critical=-1), "num_critical=-1, which must not be negative"),
        (lambda: tiny_generator(channel_base=1), "channel_base=1 and channel_max"),
        (lambda: tiny_generator(conv_clamp=-1), "conv_clamp must be at least 0"),
        (lambda: tiny_generator(half_dtype=torch.float64), "half_dtype=torch.float64 "),
        (lambda: tiny_generator(lrelu_upsampling=0.5), "in_sampling_rate=16 must divide"),
        (lambda: MappingNetwork(0, 0, 5, 4), "z_dim=0 and c_dim=0"),
        (
            lambda: tiny_generator()(torch.zeros(2, 5)),
            r"z of shape \[N, 7\], got z.shape=\(2, 5\)",
        ),
        (lambda: tiny_generator(c_dim=4)(torch.zeros(2, 7)), r"c=None: .* shape \[N, 4\]"),
        (
            lambda: tiny_generator(c_dim=4)(torch.zeros(2, 7), torch.zeros(3, 4)),
            r"c of shape \[2, 4\], got c.shape=\(3, 4\)",
        ),
        (
            lambda: tiny_generator().synthesis(torch.zeros(2, 5, 5)),
            r"ws of shape \[N, 6, 5\], got ws.shape=\(2, 5, 5\)",
        ),
        (
            lambda: layers(tiny_generator().synthesis)[1](torch.zeros(2, 6, 9, 9), None),
            r"x of shape \[N, 6, 22, 22\]",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_any_number_of_16_bit_resolutions():
    """Also one of a hostile file, as a power of two an endless one."""
    layers = [m for m in tiny_generator(num_fp16_res=10**15).modules() if hasattr(m, "use_fp16")]
    assert layers
    assert all(layer.use_fp16 for layer in layers)
