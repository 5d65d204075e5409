"""Values, first and second gradients against numbers recorded from the original repositories."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from stylegan_fast import backends, use_backend
from stylegan_fast.ops.bias_act import bias_act
from stylegan_fast.ops.conv2d_resample import conv2d_resample
from stylegan_fast.ops.filtered_lrelu import filtered_lrelu
from stylegan_fast.ops.modulated_conv2d import modulated_conv2d
from stylegan_fast.ops.upfirdn2d import (
    _parse_scaling,
    downsample2d,
    filter2d,
    setup_filter,
    upfirdn2d,
    upsample2d,
)

GOLDEN = Path(__file__).parent / "golden"
FIR_OPS = {
    "downsample2d": downsample2d,
    "filter2d": filter2d,
    "upfirdn2d": upfirdn2d,
    "upsample2d": upsample2d,
}


def with_recorded_gain(op):
    """The recordings multiply float32 taps by gain^(rank/2) and round to float32: so does this."""

    def run(x, f, gain, **arguments):
        f = torch.ones(1, 1, device=x.device) if f is None else f
        stuffing = math.prod(_parse_scaling(arguments["up"])) if op is upsample2d else 1
        taps = f * (gain * stuffing) ** (f.ndim / 2)
        return op(x, taps, gain=1 / stuffing, **arguments)

    return run


def modulated_conv2d_sg3(x, w, s, demodulate, padding, input_gain=None):
    """StyleGAN3 without a gain is a gain of one."""
    input_gain = 1 if input_gain is None else input_gain
    return modulated_conv2d(x, w, s, padding=padding, demodulate=demodulate, input_gain=input_gain)


OPS = {
    "bias_act": bias_act,
    "conv2d_resample": conv2d_resample,
    "filtered_lrelu": filtered_lrelu,
    "modulated_conv2d": modulated_conv2d,
    "modulated_conv2d_sg3": modulated_conv2d_sg3,
    **{name: with_recorded_gain(op) for name, op in FIR_OPS.items()},
}


def recorded(*ops):
    """One test parameter a case; tensors in float64, filters in float32."""
    for op in ops:
        archive = np.load(GOLDEN / f"{op}.npz")
        for case in json.loads(str(archive["manifest"])):
            prefix = case["id"] + "/"
            tensors = {
                name.removeprefix(prefix): torch.from_numpy(archive[name])
                for name in archive.files
                if name.startswith(prefix)
            }
            yield pytest.param(op, case, tensors, id=case["id"])


def on(device, recording):
    return {name: tensor.to(device) for name, tensor in recording.items()}


def arguments_of(case, recording):
    nothing = dict.fromkeys(case["none_inputs"] + case["none_constants"])
    return {name: recording[name] for name in case["constants"]} | nothing | case["kwargs"]


def assert_close(actual, expected, tolerance, what):
    """As vectors: the largest difference, relative to the largest value."""
    assert actual.shape == expected.shape, what
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max(), what


@pytest.fixture
def chosen(backend, device):
    """Runs the test on each backend that has float64 kernels."""
    reason = backends.refusal(backend, "upfirdn2d", device.type, torch.float64)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    with use_backend(backend):
        yield backend


@pytest.mark.parametrize("op, case, recording", list(recorded(*OPS)))
def test_value_and_two_orders_of_gradients(op, case, recording, chosen, device):
    if chosen == "triton":
        pytest.skip("interpreted; test_gain compares its values")
    recording = on(device, recording)
    inputs = {name: recording[name].clone().requires_grad_() for name in case["inputs"]}
    y = OPS[op](**inputs, **arguments_of(case, recording))
    assert_close(y.detach(), recording["y"], 1e-12, "y")

    dy = recording["dy"].clone().requires_grad_()
    gradients = torch.autograd.grad(y, list(inputs.values()), dy, create_graph=True)
    for name, gradient in zip(inputs, gradients):
        assert_close(gradient.detach(), recording[f"g_{name}"], 1e-12, f"g_{name}")

    projection = sum(
        (gradient * recording[f"v_{name}"]).sum() for name, gradient in zip(inputs, gradients)
    )
    wanted = {"dy": dy, **inputs}
    second = torch.autograd.grad(
        projection, list(wanted.values()), allow_unused=True, materialize_grads=True
    )
    for name, gradient in zip(wanted, second):
        expected = recording.get(f"gg_{name}", torch.zeros_like(wanted[name]))
        assert_close(gradient, expected, 1e-12, f"gg_{name}")


@pytest.mark.parametrize("op, case, recording", list(recorded(*FIR_OPS)))
def test_gain(op, case, recording, chosen, device):
    recording = on(device, recording)
    y = FIR_OPS[op](recording["x"], **arguments_of(case, recording))
    assert_close(y, recording["y"], 1e-6, "y")  # the recording rounds its taps to float32


@pytest.mark.parametrize("op, case, recording", list(recorded("modulated_conv2d_sg3")))
def test_stylegan3_form_without_a_gain_differs_by_epsilon_only(op, case, recording, device):
    recording = on(device, recording)
    y = modulated_conv2d(recording["x"], recording["w"], recording["s"], **case["kwargs"])
    gain = recording.get("input_gain", 1)
    assert_close(y * gain, recording["y"], 1e-7, "y")


@pytest.mark.parametrize("op, case, recording", list(recorded("setup_filter")))
def test_setup_filter(op, case, recording):
    taps = setup_filter(case["f"], **case["kwargs"])
    assert taps.dtype == torch.float32
    assert torch.equal(taps, recording["y"])


def ramp(*shape, a=0.7):
    """sin(a i + 0.3) of the flat index i."""
    return torch.sin(a * torch.arange(math.prod(shape), dtype=torch.float64) + 0.3).reshape(shape)


def numbers(text):
    return torch.tensor([float(word) for word in text.split()], dtype=torch.float64)


def assert_six_decimals(y, text):
    """The first values of y in row-major order; all of them, if as many are given."""
    expected = numbers(text)
    torch.testing.assert_close(
        y.detach().flatten()[: expected.numel()], expected, rtol=0, atol=6e-7
    )


IMAGE = torch.tensor([[[[1.0, 2, 3], [4, 5, 6]]]], dtype=torch.float64)
FILTER = torch.tensor([[1.0, 2], [3, 4]])
FIR = setup_filter([1, 3, 3, 1])


@pytest.mark.parametrize(
    "f, arguments, shape, text",
    [
        (FILTER, dict(padding=1), (3, 4), "1 4 7 6 7 23 33 24 12 31 38 24"),
        (FILTER, dict(padding=1, flip_filter=True), (3, 4), "4 11 18 9 18 37 47 21 8 14 17 6"),
        (
            FILTER,
            dict(up=2, padding=[1, 0, 1, 0], gain=4),
            (4, 6),
            "4 8 8 16 12 24 12 16 24 32 36 48 16 32 20 40 24 48 48 64 60 80 72 96",
        ),
        (
            FILTER,
            dict(up=[2, 1], down=[1, 2], padding=[1, 0, 1, 1]),
            (2, 6),
            "1 2 2 4 3 6 12 16 15 20 18 24",
        ),
        (None, dict(padding=[-1, 0, 0, -1]), (1, 2), "2 3"),
        (torch.tensor([1.0, 2, 4]), dict(padding=1), (2, 3), "21 54 60 42 108 120"),
    ],
)
def test_upfirdn2d_by_hand(f, arguments, shape, text):
    y = upfirdn2d(IMAGE, f, **arguments)
    assert y.shape == (1, 1, *shape)
    assert torch.equal(y.flatten(), numbers(text))


def test_resampling_wrappers_by_hand():
    y = upsample2d(IMAGE, FIR)
    assert y.shape == (1, 1, 4, 6)
    assert_six_decimals(
        y,
        ".5625 .9375 1.3125 1.6875 2.0625 1.6875 1.3125 2 2.5 3 3.5 2.8125 "
        "2.4375 3.5 4 4.5 5 3.9375 2.25 3.1875 3.5625 3.9375 4.3125 3.375",
    )
    x = ramp(1, 1, 4, 4)
    assert_six_decimals(downsample2d(x, FIR), ".090723 .074610 .056507 -.048153")
    assert_six_decimals(
        filter2d(x, FIR),
        ".073390 .164368 .215643 .177090 .045510 .090723 .104414 .074610 "
        "-.002342 -.003656 -.002724 -.000657 .048807 .056507 .005276 -.048153",
    )


def test_conv2d_resample_by_hand():
    x, w = ramp(1, 1, 4, 4), ramp(2, 1, 3, 3, a=1.1)
    y = conv2d_resample(x, w, FIR, up=2, padding=1, flip_weight=False)
    assert y.shape == (1, 2, 8, 8)
    assert_six_decimals(y, ".080811 .107850 .094087 .061849 .021360 -.020964 -.054864 -.053704")
    assert_six_decimals(torch.stack([y.sum(), y.square().sum()]), "1.649079 21.523369")
    y = conv2d_resample(x, w, FIR, down=2, padding=1)
    assert_six_decimals(y, ".147514 .151617 .026510 -.121419 -.120652 -.179973 -.045660 .087041")


@pytest.mark.parametrize("fused_modconv", [False, True])
@pytest.mark.parametrize(
    "padding, input_gain, head, sums",
    [
        (1, None, ".469983 1.240961 1.508887 1.047424", "7.290591 84.895156"),
        (2, 0.5, "-.083964 -.147297 -.128481 .005841", ".732868 24.904271"),
    ],
    ids=["stylegan2", "stylegan3"],
)
def test_modulated_conv2d_by_hand(padding, input_gain, head, sums, fused_modconv):
    x, weight = ramp(2, 3, 4, 4, a=0.37), ramp(2, 3, 3, 3, a=0.53)
    styles = ramp(2, 3, a=1.3) + 1.5
    y = modulated_conv2d(
        x, weight, styles, padding=padding, input_gain=input_gain, fused_modconv=fused_modconv
    )
    assert y.shape == (2, 2, 2 + 2 * padding, 2 + 2 * padding)
    assert_six_decimals(y, head)
    assert_six_decimals(torch.stack([y.sum(), y.square().sum()]), sums)


@pytest.mark.parametrize(
    "act, value, slope, curvature",
    [
        (
            "lrelu",
            "-.494975 -.070711 1.060660 3.181981",
            ".282843 .282843 1.414214 1.414214",
            "0 0 0 0",
        ),
        ("relu", "0 0 1.060660 3.181981", "0 0 1.414214 1.414214", "0 0 0 0"),
        (
            "tanh",
            "-.941376 -.244919 .635149 .978026",
            ".113812 .940015 .596586 .043465",
            ".214280 .460454 -.757842 -.085020",
        ),
        (
            "sigmoid",
            ".148047 .437823 .679179 .904651",
            ".126129 .246134 .217895 .086258",
            ".088783 .030608 -.078084 -.069809",
        ),
        ("elu", "-.826226 -.221199 .75 2.25", ".173774 .778801 1 1", ".173774 .778801 0 0"),
        (
            "selu",
            "-1.452587 -.388890 .788026 2.364077",
            ".305512 1.369209 1.050701 1.050701",
            ".305512 1.369209 0 0",
        ),
        (
            "softplus",
            ".160224 .575939 1.136871 2.350207",
            ".148047 .437823 .679179 .904651",
            ".126129 .246134 .217895 .086258",
        ),
        (
            "swish",
            "-.366398 -.154794 .720378 2.878580",
            "-.102784 .532154 1.191616 1.553840",
            ".137020 .685351 .533479 .021845",
        ),
    ],
)
def test_bias_act_by_hand(act, value, slope, curvature):
    x = torch.tensor([[-2, -0.5, 0.5, 2]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([0.25], dtype=torch.float64)
    y = bias_act(x, b, dim=0, act=act)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first + 0 * x).sum(), x)  # + 0 x: the slope may be constant
    assert_six_decimals(y, value)
    assert_six_decimals(first, slope)
    assert_six_decimals(second, curvature)
