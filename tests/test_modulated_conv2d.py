"""modulated_conv2d against its definition, sample by sample, and its corners one by one."""

import importlib
import itertools
import math
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from stylegan_fast import backends, no_weight_gradients
from stylegan_fast.activations import ACTIVATIONS
from stylegan_fast.ops import bias_act, conv2d_resample, modulated_conv2d, setup_filter
from stylegan_fast.reference.bias_act import bias_act as reference_bias_act
from stylegan_fast.reference.modulated_conv2d import modulated_conv2d as reference
from stylegan_fast.testing import assert_matches, relative_error

FIR = setup_filter([1, 3, 3, 1])
FORMS = {
    "scaled": dict(backend="reference", fused_modconv=False),
    "grouped": dict(backend="reference", fused_modconv=True),
    "automatic": {},
}
ORDERS = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(autouse=True)
def both_forms(monkeypatch):
    """fused_modconv decides alone, however small the images of these tests are."""
    module = importlib.import_module("stylegan_fast.ops.modulated_conv2d")
    monkeypatch.setattr(module, "_weights_are_smaller", lambda weight, x: x.shape[0] > 0)


def definition(x, weight, styles, demodulate=True, input_gain=None, noise=None, **resampling):
    """One weight a sample, as the two papers write it."""
    if demodulate and input_gain is not None:
        weight = weight / weight.square().mean([1, 2, 3], keepdim=True).sqrt()
        styles = styles / styles.square().mean().sqrt()
    gains = torch.ones_like(styles) if input_gain is None else torch.ones_like(styles) * input_gain
    samples = []
    for image, style, gain in zip(x, styles, gains):
        w = weight * style[:, None, None]
        if demodulate:
            w = w / (w.square().sum([1, 2, 3], keepdim=True) + 1e-8).sqrt()
        samples.append(conv2d_resample(image[None], w * gain[:, None, None], **resampling))
    y = torch.cat(samples)
    return y if noise is None else y + noise


X, WEIGHT, STYLES = randn(2, 3, 5, 7), randn(4, 3, 3, 3, seed=1), randn(2, 3, seed=2) + 1
RESAMPLINGS = {
    "same": dict(padding=1),
    "up": dict(up=2, padding=1, f=FIR, flip_weight=False),
    "down": dict(down=2, padding=1, f=FIR),
    "larger": dict(padding=[2, 0, 1, 3]),
}


def arguments_of(resampling, device):
    arguments = dict(RESAMPLINGS[resampling])
    if "f" in arguments:
        arguments["resample_filter"] = arguments.pop("f").to(device)
    return arguments


@ORDERS
@pytest.mark.parametrize("resampling", RESAMPLINGS)
@pytest.mark.parametrize("demodulate", [False, True])
@pytest.mark.parametrize("input_gain", [None, 0.7, randn(), randn(3), randn(2, 3), randn(2, 1)])
def test_equals_the_definition(input_gain, demodulate, resampling, form, device):
    gain = input_gain.to(device) if isinstance(input_gain, torch.Tensor) else input_gain
    arguments = dict(demodulate=demodulate, **form, input_gain=gain)
    x, weight, styles = X.to(device), WEIGHT.to(device), STYLES.to(device)
    y = modulated_conv2d(x, weight, styles, **arguments_of(resampling, device), **arguments)
    expected = definition(X, WEIGHT, STYLES, demodulate, input_gain, **RESAMPLINGS[resampling])
    assert_matches(y.cpu(), expected)


@ORDERS
@pytest.mark.parametrize("demodulate", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 5, 7), (1, 1, 5, 7), (5, 7), (7,), (), (2, 4, 5, 7)])
def test_noise_broadcasts(shape, demodulate, form):
    noise = randn(*shape)
    arguments = dict(demodulate=demodulate, padding=1)
    y = modulated_conv2d(X, WEIGHT, STYLES, noise, **form, **arguments)
    assert_matches(y, definition(X, WEIGHT, STYLES, noise=noise, **arguments))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("up, down", [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("input_gain", [None, 1.5])
@pytest.mark.parametrize("demodulate", [False, True])
def test_all_forms_agree(demodulate, input_gain, up, down, kernel):
    inputs = [
        t.clone().requires_grad_()
        for t in (X, randn(4, 3, kernel, kernel), STYLES, randn(2, 1, 1, 1))
    ]
    results = []
    for form in FORMS.values():
        y = modulated_conv2d(
            *inputs,
            up,
            down,
            kernel // 2,
            FIR,
            demodulate,
            **form,
            input_gain=input_gain,
        )
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        results.append([y, *first, *second])
    for scaled, grouped, automatic in zip(*results):
        assert_matches(grouped, scaled, reduction=1000)
        assert_matches(automatic, scaled, reduction=1000)


@ORDERS
@pytest.mark.parametrize("input_gain", [None, 0.8])
@pytest.mark.parametrize("demodulate", [False, True])
@pytest.mark.parametrize("up", [1, 2])
def test_gradients(up, demodulate, input_gain, form, device):
    shapes = (2, 2, 2, 3), (1, 2, 2, 1), (2, 2), (2, 1, 1, 1)
    inputs = [randn(*s, seed=i).to(device).requires_grad_() for i, s in enumerate(shapes)]
    filter_ = torch.tensor([[1.0, 2, 1], [0.5, 1, 3]], device=device)

    def run(*inputs):
        return modulated_conv2d(
            *inputs,
            up=up,
            padding=1,
            resample_filter=filter_,
            demodulate=demodulate,
            **form,
            input_gain=input_gain,
        )

    gradients = torch.autograd.grad(run(*inputs).square().sum(), inputs, create_graph=True)
    assert all(g.requires_grad for g in gradients)  # gradgradcheck leaves out those that do not
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs, fast_mode=True)


def test_gradient_of_the_input_gain():
    gain = randn(2, 3).requires_grad_()
    assert gradcheck(lambda gain: modulated_conv2d(X, WEIGHT, STYLES, input_gain=gain), gain)


@ORDERS
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_tail_is_bias_act(act, form):
    bias = randn(4)
    tail = dict(act=act, alpha=0.3, gain=0.9, clamp=0.7)
    y = modulated_conv2d(X, WEIGHT, STYLES, padding=1, bias=bias, **form, **tail)
    linear = modulated_conv2d(X, WEIGHT, STYLES, padding=1, **form)
    by_hand = reference_bias_act if form else bias_act
    assert torch.equal(y, by_hand(linear, bias, **tail))
    assert (y.abs() == 0.7).any()


@pytest.mark.parametrize("tail", [
    dict(bias=randn(4)), dict(act="lrelu"), dict(gain=0.5), dict(clamp=0.1), dict(act="relu"),
])  # fmt: skip
def test_each_part_of_the_tail_alone(tail):
    y = modulated_conv2d(X, WEIGHT, STYLES, **tail)
    linear = modulated_conv2d(X, WEIGHT, STYLES)
    assert not torch.equal(y, linear)
    assert torch.equal(y, bias_act(linear, b=tail.pop("bias", None), **tail))


@pytest.mark.parametrize("act", ["lrelu", "swish"])
@pytest.mark.parametrize("up, kernel", [(1, "epilogue_forward"), (2, "upfirdn2d_forward")])
def test_tail_runs_in_one_kernel(up, kernel, act, backend, device, monkeypatch):
    x, weight, styles = (t.float().to(device) for t in (X, WEIGHT, STYLES))
    bias, noise = randn(4).float().to(device), randn(up * X.shape[2], up * X.shape[3]).to(device)
    arguments = dict(up=up, padding=1, resample_filter=FIR.to(device), act=act, clamp=1.5)
    expected = reference(
        *(t.double() for t in (x, weight, styles, noise)), bias=bias.double(), **arguments
    )

    calls = []
    for name in ("epilogue_forward", "upfirdn2d_forward"):
        run = getattr(backends.BACKENDS[backend], name, None)
        if run is not None:
            recording = partial(
                lambda run, name, *args: (calls.append(name), run(*args)), run, name
            )
            monkeypatch.setattr(backends.BACKENDS[backend], name, recording)
    y = modulated_conv2d(x, weight, styles, noise.float(), bias=bias, backend=backend, **arguments)
    assert_matches(y, expected, reduction=27)
    assert calls == ([] if backend == "reference" else [kernel])


@ORDERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("demodulate", [False, True])
@pytest.mark.parametrize("input_gain", [None, 0.9])
def test_dtypes(input_gain, demodulate, dtype, form, device):
    """Images in 16 bits with weights and styles in float32, as the networks call it."""
    x = randn(2, 16, 6, 5).to(device, dtype)
    weight, styles = randn(8, 16, 3, 3).float().to(device), randn(2, 16).float().to(device) + 1
    if not demodulate:
        styles = styles / 12
    noise, bias = randn(2, 1, 6, 5).float().to(device), randn(8).float().to(device)
    arguments = dict(padding=1, demodulate=demodulate, input_gain=input_gain)
    y = modulated_conv2d(x, weight, styles, noise, bias=bias, **form, **arguments)
    assert y.dtype == dtype
    wide = (t.double() for t in (x, weight, styles, noise))
    expected = modulated_conv2d(*wide, bias=bias.double(), **arguments)
    assert relative_error(y, expected) < 2 * torch.finfo(dtype).eps


@ORDERS
@pytest.mark.parametrize("magnitude", [1, 3e4])
def test_float16_does_not_overflow(magnitude, form):
    """512 channels of weights and styles that, unnormalized, exceed float16."""
    x, weight = randn(2, 512, 4, 5).half(), randn(3, 512, 3, 3).float() * magnitude
    styles = (randn(2, 512).float() + 1) * magnitude
    leaves = [t.requires_grad_() for t in (x, weight, styles)]
    y = modulated_conv2d(*leaves, padding=1, **form)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = modulated_conv2d(*wide, padding=1)
    assert relative_error(y, expected) < 2e-3
    gradients = torch.autograd.grad(y.float().square().sum(), leaves)
    wanted = torch.autograd.grad(expected.square().sum(), wide)
    for gradient, want in zip(gradients, wanted):
        assert relative_error(gradient, want) < 5e-3


def test_the_guard_is_for_float16_with_demodulation_only():
    weight, styles = WEIGHT.float() * 1e-5, STYLES.float()  # so small that the 1e-8 counts
    unguarded = modulated_conv2d(X.float(), weight, styles)
    assert relative_error(modulated_conv2d(X.bfloat16(), weight, styles), unguarded) < 0.02
    guarded = modulated_conv2d(X.half(), weight, styles)
    assert relative_error(guarded, unguarded) > 0.5
    normalized = modulated_conv2d(X.float(), WEIGHT.float(), styles)
    assert relative_error(guarded, normalized) < 2e-3
    off = modulated_conv2d(X.half(), WEIGHT.half(), styles.half(), demodulate=False)
    assert relative_error(off, modulated_conv2d(X, WEIGHT, STYLES, demodulate=False)) < 2e-3


@ORDERS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("input_gain", [None, 1.5])
@pytest.mark.parametrize("zeros", ["one style row", "all styles", "one weight channel"])
def test_rows_of_zeros_stay_zero(zeros, input_gain, dtype, form):
    weight, styles = WEIGHT.clone(), STYLES.clone()
    if zeros == "one weight channel":
        weight[1] = 0
    else:
        styles[slice(0, 1) if zeros == "one style row" else slice(None)] = 0
    leaves = [t.to(dtype).requires_grad_() for t in (X.clone(), weight, styles)]
    y = modulated_conv2d(*leaves, padding=1, input_gain=input_gain, **form)
    dead = y[:, 1] if zeros == "one weight channel" else y[:1]
    assert not dead.any()
    assert y.isfinite().all()
    gradients = torch.autograd.grad(y.float().sum() / 100, leaves, create_graph=True)
    assert all(g.isfinite().all() for g in gradients)
    if dtype != torch.float16:  # in float16 the square of 1e4, what 1e-8 leaves of d, overflows
        total = sum(g.float().square().sum() for g in gradients)
        assert all(g.isfinite().all() for g in torch.autograd.grad(total, leaves))


@ORDERS
@pytest.mark.parametrize("factor", [1e-10, 1e5])
def test_the_magnitude_of_weights_cancels_beside_an_input_gain(factor, form):
    y = modulated_conv2d(X.float(), WEIGHT.float(), STYLES.float(), input_gain=1.5, **form)
    scaled = modulated_conv2d(
        X.float(), WEIGHT.float() * factor, STYLES.float(), input_gain=1.5, **form
    )
    assert_matches(scaled, y.double(), reduction=WEIGHT[0].numel())


@ORDERS
@pytest.mark.parametrize("resampling", ["same", "up", "down"])
@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_layouts(batch, nhwc, resampling, form, device):
    memory_format = torch.channels_last if nhwc else torch.contiguous_format
    x, weight, styles = X[:batch].to(device), WEIGHT.to(device), STYLES[:batch].to(device)
    expected = definition(X[:batch], WEIGHT, STYLES[:batch], noise=0.5, **RESAMPLINGS[resampling])
    noise = torch.full(expected.shape[2:], 0.5, dtype=torch.float64, device=device)
    y = modulated_conv2d(
        x.contiguous(memory_format=memory_format),
        weight.contiguous(memory_format=memory_format),
        styles,
        noise,
        **form,
        **arguments_of(resampling, device),
    )
    assert y.is_contiguous(memory_format=memory_format)
    assert_matches(y.cpu(), expected)


@ORDERS
@pytest.mark.parametrize("input_gain", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_empty_batch(dtype, input_gain, form):
    x = torch.empty(0, 3, 5, 7, dtype=dtype, requires_grad=True)
    weight, styles = WEIGHT.float().requires_grad_(), torch.empty(0, 3, requires_grad=True)
    y = modulated_conv2d(x, weight, styles, input_gain=input_gain, **form, act="lrelu")
    assert y.shape == (0, 4, 3, 5)
    assert y.dtype == dtype
    dx, dw, ds = torch.autograd.grad(y.sum(), [x, weight, styles])
    assert (dx.shape, ds.shape) == (x.shape, styles.shape)
    assert torch.equal(dw, torch.zeros_like(weight))


@ORDERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("image_dtype", [torch.float32, "autocast"], ids=str)
def test_autocast(image_dtype, dtype, form):
    weight, styles = randn(8, 64, 3, 3).float(), randn(2, 64).float() + 1
    x = randn(2, 64, 6, 5).to(dtype if image_dtype == "autocast" else image_dtype)
    with torch.autocast("cpu", dtype=dtype):
        y = modulated_conv2d(x, weight, styles, padding=1, **form)
        wide = modulated_conv2d(x.double(), weight.double(), styles.double(), padding=1)
    assert y.dtype == dtype
    assert wide.dtype == torch.float64
    expected = modulated_conv2d(x.double(), weight.double(), styles.double(), padding=1)
    assert torch.equal(wide, expected)
    assert relative_error(y, expected) < 2 * torch.finfo(dtype).eps


def test_demodulation_is_float32_under_autocast():
    """A demodulated weight of one element is 1 or -1, unless its square was rounded to 8 bits."""
    weight = randn(256, 1, 1, 1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = modulated_conv2d(torch.ones(1, 1, 1, 1), weight, torch.ones(1, 1), **FORMS["grouped"])
    assert torch.equal(y.flatten(), weight.flatten().sign().bfloat16())


def test_float16_autocast_is_guarded_too():
    weight, styles = randn(3, 512, 3, 3).float() * 3e4, randn(2, 512).float() * 3e4
    x = randn(2, 512, 4, 5).float()
    expected = modulated_conv2d(x.double(), weight.double(), styles.double(), fused_modconv=False)
    with torch.autocast("cpu", dtype=torch.float16):
        y = modulated_conv2d(x, weight, styles, fused_modconv=False)
    assert relative_error(y, expected) < 2e-3


@pytest.mark.parametrize("fused_modconv, resampling, input_gain, noise", [
    (True, "same", None, True),
    (False, "up", None, True),
    (True, "up", None, False),
    (False, "same", 0.5, False),
])  # fmt: skip
def test_compiles_to_one_graph(fused_modconv, resampling, input_gain, noise):
    bias = randn(4)

    def run(x, weight, styles):
        return modulated_conv2d(
            x,
            weight,
            styles,
            bias[0] if noise else None,
            fused_modconv=fused_modconv,
            input_gain=input_gain,
            bias=bias,
            act="lrelu",
            clamp=1.0,
            **arguments_of(resampling, "cpu"),
        )

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    inputs = [t.clone().requires_grad_() for t in (X, WEIGHT, STYLES)]
    y, expected = compiled(*inputs), run(*inputs)
    assert_matches(y, expected)
    assert y.stride() == expected.stride()
    for actual, wanted in zip(
        *(torch.autograd.grad(t.square().sum(), inputs) for t in (y, expected))
    ):
        assert_matches(actual, wanted)


def test_meta_tensors_have_the_same_shape():
    inputs = [t.to("meta") for t in (X, WEIGHT, STYLES)]
    assert modulated_conv2d(*inputs, **arguments_of("up", "meta")).shape == (2, 4, 10, 14)


@ORDERS
@pytest.mark.parametrize("skip", [False, True])
def test_path_length_is_the_same_without_weight_gradients(skip, form):
    weights = [WEIGHT.clone().requires_grad_(), randn(2, 4, 3, 3).requires_grad_()]
    styles = [STYLES.clone().requires_grad_(), randn(2, 4).requires_grad_()]

    def synthesis(*styles):
        y = modulated_conv2d(X, weights[0], styles[0], padding=1, **form, act="lrelu")
        return modulated_conv2d(y, weights[1], styles[1], padding=1, **form, act="tanh")

    with no_weight_gradients(skip):
        lengths = torch.autograd.grad(synthesis(*styles).sum(), styles, create_graph=True)
    loss = sum(g.square().sum() for g in lengths)
    gradients = torch.autograd.grad(loss, [*weights, *styles], retain_graph=True)

    expected = torch.autograd.grad(synthesis(*styles).sum(), styles, create_graph=True)
    for actual, want in zip(lengths, expected):
        assert want.abs().max() > 0.1
        assert torch.equal(actual, want)
    loss = sum(g.square().sum() for g in expected)
    for actual, want in zip(gradients, torch.autograd.grad(loss, [*weights, *styles])):
        assert want.abs().max() > 0.1
        assert torch.equal(actual, want)


@ORDERS
def test_backward_inside_leaves_the_weight_alone(form):
    x, weight, styles = (t.clone().requires_grad_() for t in (X, WEIGHT, STYLES))
    y = modulated_conv2d(x, weight, styles, **form)
    expected = torch.autograd.grad(y.square().sum(), [x, weight, styles], retain_graph=True)
    with no_weight_gradients():
        y.square().sum().backward(retain_graph=True)
    assert weight.grad is None
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(styles.grad, expected[2])
    y.square().sum().backward()
    assert torch.equal(weight.grad, expected[1])


@pytest.mark.parametrize("arguments, error, message", [
    (dict(x=None), TypeError, r"x must be a torch\.Tensor, got NoneType"),
    (dict(x=X[0]), ValueError, r"x must have 4 dimensions, got x\.shape=\(3, 5, 7\)"),
    (dict(x=X[..., :0]), ValueError, r"only the batch may be empty"),
    (dict(x=X.long()), TypeError, r"x\.dtype=torch\.int64"),
    (dict(weight=WEIGHT.numpy()), TypeError, r"weight must be a torch\.Tensor, got ndarray"),
    (dict(weight=WEIGHT[0]), ValueError, r"weight must have 4 dimensions"),
    (dict(weight=WEIGHT[:, :2]), ValueError, r"weight must have the shape \(4, 3, 3, 3\)"),
    (dict(weight=WEIGHT[:0]), ValueError, r"weight must not be empty"),
    (dict(weight=WEIGHT.to("meta")), ValueError, r"weight\.device=meta but x\.device=cpu"),
    (dict(styles=1.0), TypeError, r"styles must be a torch\.Tensor, got float"),
    (dict(styles=STYLES[:1]), ValueError, r"styles must have the shape \(2, 3\) .* got .*\(1, 3\)"),
    (dict(styles=STYLES.long()), TypeError, r"styles\.dtype=torch\.int64"),
    (dict(styles=STYLES.to("meta")), ValueError, r"use styles\.to\(x\.device\)"),
    (dict(noise=1.0), TypeError, r"noise must be a torch\.Tensor, got float"),
    (dict(noise=randn(5, 7)), ValueError, r"noise must broadcast to \(2, 4, 3, 5\)"),
    (dict(noise=randn(1, 2, 4, 3, 5)), ValueError, r"got noise\.shape=\(1, 2, 4, 3, 5\)"),
    (dict(input_gain=randn(2)), ValueError, r"input_gain must broadcast to \(2, 3\)"),
    (dict(input_gain="1"), TypeError, r"input_gain must be a number, got input_gain='1'"),
    (dict(input_gain=math.nan), ValueError, r"input_gain must be finite"),
    (dict(bias=randn(3)), ValueError, r"bias must have the shape \(4,\) .* got bias\.shape=\(3,\)"),
    (dict(bias=torch.ones(4).long()), TypeError, r"bias\.dtype=torch\.int64"),
    (dict(up=0), ValueError, "up must be at least 1, got 0"),
    (dict(up=[2, 2]), TypeError, r"up takes integers, got \[2, 2\]"),
    (dict(down=2.0), TypeError, "down takes integers, got 2.0"),
    (dict(padding="same"), TypeError, "padding takes integers, got 'same'"),
    (dict(padding=-2), ValueError, "the output would have -1 x 1 pixels"),
    (dict(resample_filter=[1, 3, 3, 1]), TypeError, r"resample_filter must be a torch\.Tensor or"),
    (dict(resample_filter=FIR.clone().requires_grad_()), NotImplementedError, "detach"),
    (dict(act="gelu"), KeyError, "act='gelu' is unknown"),
    (dict(act=None), KeyError, "act=None is unknown"),
    (dict(clamp=-1), ValueError, "clamp must be at least 0"),
    (dict(gain="2"), TypeError, "gain must be a number"),
    (dict(backend="fast"), ValueError, "backend='fast' is unknown"),
    (dict(backend="cuda"), RuntimeError, "'cuda' cannot run modulated_conv2d"),
])  # fmt: skip
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        modulated_conv2d(**{"x": X, "weight": WEIGHT, "styles": STYLES, **arguments})


def test_the_result_never_aliases_an_input():
    identity = torch.eye(3, dtype=torch.float64)[:, :, None, None]
    inputs = X.clone(), identity, torch.ones_like(STYLES)
    for form, noise in itertools.product(FORMS.values(), (None, torch.zeros(5, 7))):
        y = modulated_conv2d(*inputs, noise, demodulate=False, **form)
        assert torch.equal(y, X)
        y.zero_()
        assert torch.equal(inputs[0], X)


def test_one_output_channel(backend, device):
    """Scale and shared noise are those of each sample, also where a batch is one run of memory."""
    x, weight, styles = (t.float().to(device) for t in (X, WEIGHT[:1], STYLES))
    noise = randn(*X.shape[2:], seed=3).float().to(device)
    arguments = dict(padding=1, act="lrelu")
    y = modulated_conv2d(x, weight, styles, noise, backend=backend, **arguments)
    expected = reference(*(t.double() for t in (x, weight, styles, noise)), **arguments)
    assert_matches(y, expected, reduction=27)
