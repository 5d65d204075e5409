"""E(upfirdn2d(x)) + add in one pass: its values, two orders of gradients, and its launches."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

from stylegan_fast import backends, use_backend
from stylegan_fast.activations import ACTIVATIONS
from stylegan_fast.backends.geometry import Fir
from stylegan_fast.ops import modulated_conv2d, setup_filter, upsample2d
from stylegan_fast.ops.epilogue import epilogue
from stylegan_fast.ops.upfirdn2d import upfirdn2d_epilogue, upsample2d_add
from stylegan_fast.reference.bias_act import Epilogue
from stylegan_fast.reference.bias_act import bias_act as reference_bias_act
from stylegan_fast.reference.modulated_conv2d import modulated_conv2d as reference_modulated_conv2d
from stylegan_fast.reference.upfirdn2d import upfirdn2d as reference_upfirdn2d
from stylegan_fast.testing import assert_matches

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")

CURVED = [name for name, row in ACTIVATIONS.items() if row.curved]
PIECEWISE_LINEAR = [name for name, row in ACTIVATIONS.items() if not row.curved]
F34 = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
FIR = setup_filter([1, 3, 3, 1])
NCHW, NHWC = torch.contiguous_format, torch.channels_last


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def takes(backend, dtype, device):
    return backends.refusal(backend, "upfirdn2d", device.type, dtype) is None


def widest(backend, device):
    return torch.float64 if takes(backend, torch.float64, device) else torch.float32


def interpreted(backend, device):
    """Where an element costs milliseconds."""
    return backend == "triton" and device.type == "cpu"


# Shape of x, memory format, and the resampling. A mask needs rows of whole units of 8 elements:
# widths of NCHW, channels of NHWC; other shapes take two kernels.
PLACES = {
    "NCHW, whole units": ((2, 3, 3, 4), NCHW, ([2, 1], [1, 1], [1, 2, 3, 1])),
    "NCHW, broken units": ((2, 3, 4, 5), NCHW, ([1, 2], [1, 1], [2, 1, 1, 2])),
    "NCHW, down": ((2, 3, 5, 19), NCHW, ([1, 1], [2, 3], [1, 1, 2, 4])),
    "NHWC, whole units": ((2, 8, 4, 3), NHWC, ([1, 2], [1, 1], [2, 1, 1, 2])),
    "NHWC, broken units": ((2, 3, 4, 5), NHWC, ([2, 1], [1, 1], [2, 1, 1, 2])),
    "padding without a sample": ((1, 2, 2, 3), NCHW, ([1, 1], [1, 1], [9, 7, 6, 3])),
    "cropped": ((1, 2, 7, 12), NCHW, ([1, 1], [1, 1], [-2, 1, -1, -1])),
}


class Problem:
    """Operands of E(upfirdn2d(x)) + add at one of the places, and both ways to compute it."""

    def __init__(self, place, dtype, device, noise_samples=None):
        shape, memory_format, resampling = PLACES[place]
        self.fir = Fir.of(*resampling, False, 1.3)
        n, c, h, w = shape
        size = self.fir.output_size(h, w, (4, 3))
        operands = {
            "x": randn(*shape).contiguous(memory_format=memory_format),
            "scale": 1 + 0.4 * randn(n, c, seed=1),
            "noise": randn(noise_samples or n, 1, *size, seed=2),
            "strength": randn(seed=3) / 2,
            "b": randn(c, seed=4),
            "add": randn(n, c, *size, seed=5).contiguous(memory_format=memory_format),
        }
        self.operands = {name: t.to(dtype).to(device) for name, t in operands.items()}
        self.shape, self.memory_format = (n, c, *size), memory_format
        self.f = F34.to(device)
        self.dy = randn(*self.shape, seed=6).to(dtype).to(device)

    def fused(self, backend, act, alpha, gain, clamp):
        def run(x, scale=None, noise=None, strength=None, b=None, add=None):
            if backend == "reference":
                strong = noise if strength is None else noise * strength
                end = Epilogue(scale, strong, b, act, alpha, gain, clamp)
                return upfirdn2d_epilogue(
                    x, self.f, *self.fir.arguments(), end=end, add=add, backend=backend
                )
            return epilogue(
                x, scale, noise, strength, b, 1, act, alpha, gain, clamp, backend,
                f=self.f, fir=self.fir, add=add,
            )  # fmt: skip

        return run

    def composed(self, act, alpha, gain, clamp):
        """One operator of PyTorch after the other, in float64."""

        def run(x, scale=None, noise=None, strength=None, b=None, add=None):
            v = reference_upfirdn2d(x, self.f.double(), *self.fir.arguments())
            v = v if scale is None else v * scale[:, :, None, None]
            if noise is not None:
                v = v + (noise if strength is None else noise * strength)
            y = reference_bias_act(v, b, 1, act, alpha, gain, clamp)
            return y if add is None else y + add

        return run


def orders(function, operands, dy, second):
    """y, its gradients, and those of a combination of them; by name."""
    leaves = {name: t.detach().requires_grad_() for name, t in operands.items()}
    dy = dy.detach().requires_grad_()
    y = function(**leaves)
    first = grad(y, list(leaves.values()), dy, create_graph=second)
    results = {"y": y, **{f"g_{name}": g for name, g in zip(leaves, first)}}
    if second:
        leaves = {"dy": dy, **leaves}
        combination = sum(
            (g * randn(*g.shape, seed=7 + i).to(g)).sum() for i, g in enumerate(first)
        )
        gradients = grad(combination, list(leaves.values()), materialize_grads=True)
        results |= {f"gg_{name}": g for name, g in zip(leaves, gradients)}
    return results


def assert_orders(problem, backend, end, operands=None, second=True):
    operands = problem.operands if operands is None else operands
    wide = {name: t.double() for name, t in operands.items()}
    actual = orders(problem.fused(backend, *end), operands, problem.dy, second)
    expected = orders(problem.composed(*end), wide, problem.dy.double(), second)
    summed = 12 * math.prod(problem.shape)
    for name, value in actual.items():
        assert_matches(value, expected[name], reduction=12 if name == "y" else summed, name=name)
    y = actual["y"]
    assert y.dtype == problem.dy.dtype
    assert y.is_contiguous(memory_format=problem.memory_format)
    return actual


USUAL = (0.3, 1.3, 0.9131)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation_and_order(backend, act, place, device):
    curved_as_well = place == "NHWC, broken units" and act in ("linear", "swish")
    if interpreted(backend, device) and act != "lrelu" and not curved_as_well:
        pytest.skip("one thing at a time in Triton's interpreter")
    problem = Problem(place, widest(backend, device), device)
    assert_orders(problem, backend, (act, *USUAL))


@pytest.mark.parametrize("act", ["linear", "lrelu", "tanh"])
@pytest.mark.parametrize("place", ["NCHW, whole units", "NHWC, whole units", "NCHW, broken units"])
def test_every_choice_of_operands(backend, place, act, device):
    """Values and first gradients, with what each may be saved for, of all 24 combinations."""
    slow = interpreted(backend, device)
    if slow and (act != "lrelu" or place != "NCHW, whole units"):
        pytest.skip("one thing at a time in Triton's interpreter")
    problem = Problem(place, torch.float32, device, noise_samples=1)
    optional = ["scale", "noise", "strength", "b", "add"]
    for present in itertools.product((True, False), repeat=5):
        chosen = [name for name, used in zip(optional, present) if used]
        if "strength" in chosen and "noise" not in chosen:
            continue
        if slow and len(chosen) not in (0, 1, 4):
            continue
        operands = {name: problem.operands[name] for name in ("x", *chosen)}
        wide = {name: t.double() for name, t in operands.items()}
        for clamp in (0.9131,) if slow else (None, 0.9131):
            end = (act, 0.3, 1.0 if act == "linear" else 1.3, clamp)
            actual = orders(problem.fused(backend, *end), operands, problem.dy, False)
            expected = orders(problem.composed(*end), wide, problem.dy.double(), False)
            for name, value in actual.items():
                reduction = 12 * math.prod(problem.shape)
                assert_matches(value, expected[name], reduction=reduction, name=f"{chosen} {name}")


@pytest.mark.parametrize("needed", ["x", "scale", "noise", "strength", "b", "add"])
@pytest.mark.parametrize("act", ["lrelu", "swish"])
def test_one_gradient_alone(backend, act, needed, device):
    """What is not asked for is not computed, and changes nothing."""
    if interpreted(backend, device) and act == "swish":
        pytest.skip("one thing at a time in Triton's interpreter")
    problem = Problem("NCHW, whole units", torch.float32, device)
    end = (act, *USUAL)
    operands = {
        name: t.detach().requires_grad_(name == needed) for name, t in problem.operands.items()
    }
    (g,) = grad(problem.fused(backend, *end)(**operands), operands[needed], problem.dy)
    wide = {
        name: t.detach().double().requires_grad_(name == needed) for name, t in operands.items()
    }
    (expected,) = grad(problem.composed(*end)(**wide), wide[needed], problem.dy.double())
    assert_matches(g, expected, reduction=12 * math.prod(problem.shape))


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("place", ["NCHW, whole units", "NHWC, broken units"])
def test_noise_of_a_batch_or_of_each_sample(backend, place, samples, device):
    problem = Problem(place, widest(backend, device), device, noise_samples=samples)
    assert_orders(problem, backend, ("lrelu", *USUAL), second=not interpreted(backend, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", ["NCHW, whole units", "NHWC, whole units", "NCHW, broken units"])
def test_low_precision(backend, place, dtype, device):
    """Operands of the epilogue in float32, as the layers have them."""
    if backend == "reference" or not takes(backend, dtype, device):
        pytest.skip(f"{backend} has no {dtype} kernels")
    problem = Problem(place, dtype, device)
    operands = dict(problem.operands)
    for name in ("scale", "noise", "strength"):
        operands[name] = operands[name].float()
    end = ("lrelu", *USUAL)
    x = operands["x"].detach().requires_grad_()
    b = operands["b"].detach().requires_grad_()
    y = problem.fused(backend, *end)(**{**operands, "x": x, "b": b})
    wide = {name: t.double() for name, t in operands.items()}
    x_wide, b_wide = (t.detach().double().requires_grad_() for t in (x, b))
    expected = problem.composed(*end)(**{**wide, "x": x_wide, "b": b_wide})
    assert_matches(y, expected, reduction=12)
    # Which elements are clamped, rounding may decide: the gradients are those of the others.
    u = expected - wide["add"]
    dy = problem.dy.where((u.abs() - 0.9131).abs() > 1e-4, 0)
    for actual, wanted in zip(grad(y, (x, b), dy), grad(expected, (x_wide, b_wide), dy.double())):
        assert actual.dtype == dtype
        assert_matches(actual, wanted, reduction=12 * math.prod(problem.shape))


@pytest.mark.parametrize("act", ["linear", "lrelu", "swish"])
def test_gradgradcheck(backend, act, device):
    if not takes(backend, torch.float64, device):
        pytest.skip(f"{backend} has no float64 kernels")
    if interpreted(backend, device):
        pytest.skip("gradgradcheck makes hundreds of launches")
    for place in ("NCHW, whole units", "NHWC, broken units"):
        problem = Problem(place, torch.float64, device)
        function = problem.fused(backend, act, *USUAL)
        names = list(problem.operands)
        leaves = [t.detach().requires_grad_() for t in problem.operands.values()]

        def positional(*tensors, function=function, names=names):
            return function(**dict(zip(names, tensors)))

        assert gradcheck(positional, leaves, fast_mode=True)
        assert gradgradcheck(positional, leaves, fast_mode=True)


def end_of(**parts):
    return Epilogue(**{"gain": 1.0, **parts})


def test_ties_and_kinks_follow_torch(backend, device):
    """A clamped element has no gradient, one on the limit keeps it, lrelu has its slope at 0."""
    x = torch.tensor([-2.0, -1, -0.5, 0, 0.25, 0.5, 1, 2], device=device).view(1, 1, 1, 8)
    for act, clamp in itertools.product(PIECEWISE_LINEAR, (0.5, 1.0)):
        leaf = x.detach().requires_grad_()
        other = x.detach().requires_grad_()
        y = upfirdn2d_epilogue(
            leaf, None, end=end_of(act=act, alpha=0.25, clamp=clamp), backend=backend
        )
        expected = reference_bias_act(other, None, 1, act, 0.25, 1.0, clamp)
        assert torch.equal(y, expected)
        assert torch.equal(grad(y.sum(), leaf)[0], grad(expected.sum(), other)[0])


@pytest.mark.parametrize("width", [8, 5])
def test_mask_is_taken_before_rounding(backend, width, device):
    """181.019 is stored as 181 in float16: a clamped 200 has no gradient, a true 181 keeps it."""
    x = torch.tensor([181.0, 200.0, -200.0, 180.0, 1, 2, 3, 4], dtype=torch.float16, device=device)
    x = x[:width].view(1, 1, 1, width).requires_grad_()
    y = upfirdn2d_epilogue(x, None, end=end_of(clamp=256 * math.sqrt(0.5)), backend=backend)
    (g,) = grad(y.sum(), x)
    assert y.flatten()[:4].tolist() == [181.0, 181.0, -181.0, 180.0]
    assert g.flatten().tolist() == [1.0, 0.0, 0.0, 1.0] + [1.0] * (width - 4)


def test_what_is_added_is_not_clamped(backend, device):
    x = torch.full((1, 2, 3, 8), 5.0, device=device)
    add = torch.full_like(x, 7.0).requires_grad_()
    y = upfirdn2d_epilogue(x, None, end=end_of(clamp=1.0), add=add, backend=backend)
    assert y.eq(8).all()
    assert grad(y.sum(), add)[0].eq(1).all()


def test_infinite_gradients_of_clamped_elements_stop(backend, device):
    x = torch.tensor([3.0, -1, 1, 1, 1, 1, 1, 1], device=device).view(1, 1, 1, 8).requires_grad_()
    dy = torch.ones_like(x)
    dy[..., 0], dy[..., 1] = math.inf, math.nan
    y = upfirdn2d_epilogue(x, None, end=end_of(act="relu", clamp=2.0), backend=backend)
    assert grad(y, x, dy)[0].flatten().tolist() == [0, 0, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_nan_stays_nan(backend, act, device):
    x = torch.zeros(1, 2, 3, 8, device=device)
    x[0, 1, 1, 4] = math.nan
    y = upfirdn2d_epilogue(
        x, FIR.to(device), padding=[1, 2, 2, 1], end=end_of(act=act, clamp=1.0), backend=backend
    )
    assert y[0, 1, :, 3:7].isnan().any() and not y[0, 0].isnan().any()
    assert y.isnan().sum() == 3 * 4


ADDED = {
    "NCHW": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=NHWC),
    "cropped": lambda t: torch.nn.functional.pad(t, [1, 1])[..., 1:-1],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda t: t[:1, :1].expand(t.shape),
}


@pytest.mark.parametrize("layout", ADDED)
@pytest.mark.parametrize("memory_format", [NCHW, NHWC], ids=str)
def test_add_of_any_layout(backend, memory_format, layout, device):
    if interpreted(backend, device) and memory_format == NHWC and layout != "cropped":
        pytest.skip("one thing at a time in Triton's interpreter")
    x = randn(2, 3, 3, 4).float().to(device).contiguous(memory_format=memory_format)
    added = ADDED[layout](randn(2, 3, 6, 8, seed=1).float().to(device)).requires_grad_()
    y = upsample2d_add(x, FIR.to(device), added, backend=backend)
    expected = upsample2d(x.cpu().double(), FIR, backend="reference") + added.detach().cpu()
    assert_matches(y.cpu(), expected, reduction=4)
    assert torch.equal(grad(y.sum(), added)[0], torch.ones_like(added))
    assert backend == "reference" or y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("wide", [False, True], ids=["image", "add"])
def test_add_of_another_dtype_promotes_as_plus_does(backend, wide, device):
    x, add = randn(2, 3, 3, 4).to(device), randn(2, 3, 6, 8, seed=1).to(device)
    x, add = (x.half(), add.float()) if wide else (x.float(), add.half())
    y = upsample2d_add(x, FIR.to(device), add, backend=backend)
    assert y.dtype == torch.float32
    expected = upsample2d(x.cpu().double(), FIR, backend="reference")
    expected = expected.half().double() if wide else expected
    assert_matches(y.half().cpu(), expected + add.cpu(), reduction=4)


def test_rgb_images_grow(backend, device):
    """Four-channel images as well as three, in both orders."""
    for channels in (3, 4):
        x = randn(2, channels, 3, 5, seed=1).to(device, widest(backend, device))
        add = randn(2, channels, 6, 10, seed=2).to(x)
        leaves = [t.detach().requires_grad_() for t in (x, add)]
        y = upsample2d_add(*leaves[:1], FIR.to(device), leaves[1], backend=backend)
        wide = [t.detach().cpu().double().requires_grad_() for t in (x, add)]
        expected = upsample2d(wide[0], FIR, backend="reference") + wide[1]
        for _ in range(2):
            assert_matches(y.cpu(), expected, reduction=200)
            g = grad(y.pow(3).sum(), leaves, create_graph=True)
            g_expected = grad(expected.pow(3).sum(), wide, create_graph=True)
            for actual, wanted in zip(g, g_expected):
                assert_matches(actual.cpu(), wanted, reduction=200)
            y, expected = g[0], g_expected[0]


@pytest.mark.parametrize("noise_shape", [(6, 8), (1, 1, 6, 8), (2, 1, 6, 8), (8,), (6, 1), ()])
def test_noise_that_broadcasts(backend, noise_shape, device):
    x = randn(2, 3, 3, 4).float().to(device).requires_grad_()
    noise = randn(*noise_shape, seed=1).float().to(device).requires_grad_()
    arguments = (2, 1, [2, 1, 2, 1], False, 4)
    end = end_of(noise=noise, act="lrelu", clamp=0.9131)
    y = upfirdn2d_epilogue(x, FIR.to(device), *arguments, end=end, backend=backend)
    wide = [t.detach().cpu().double().requires_grad_() for t in (x, noise)]
    expected = reference_upfirdn2d(wide[0], FIR.double(), *arguments) + wide[1]
    expected = reference_bias_act(expected, None, 1, "lrelu", None, 1.0, 0.9131)
    assert_matches(y.cpu(), expected, reduction=16)
    for actual, wanted in zip(grad(y.sum(), (x, noise)), grad(expected.sum(), wide)):
        assert_matches(actual.cpu(), wanted, reduction=200)


@pytest.mark.parametrize("act", ["lrelu", "tanh"])
def test_empty_batch(backend, act, device):
    x = torch.empty(0, 3, 4, 5, device=device, requires_grad=True)
    b = torch.ones(3, device=device, requires_grad=True)
    y = upfirdn2d_epilogue(
        x, FIR.to(device), up=2, padding=2, end=end_of(b=b, act=act, clamp=1.0), backend=backend
    )
    assert y.shape == (0, 3, 9, 11)
    dx, db = grad(y.sum(), (x, b))
    assert dx.shape == x.shape
    assert db.tolist() == [0.0] * 3


@pytest.mark.parametrize("act", CURVED)
def test_third_order_of_curved_activations_raises(backend, act, device):
    if backend == "reference":
        pytest.skip("the reference has every order")
    if interpreted(backend, device) and act != "swish":
        pytest.skip("one thing at a time in Triton's interpreter")
    x = randn(1, 1, 2, 8).float().to(device).requires_grad_()
    y = upfirdn2d_epilogue(x, None, end=end_of(act=act), backend=backend)
    for _ in range(2):
        (y,) = grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        grad(y.sum(), x)


@pytest.mark.parametrize("act", PIECEWISE_LINEAR)
def test_third_order_of_piecewise_linear_activations(backend, act, device):
    f = F34.to(device)

    def third(backend, dtype):
        x = randn(1, 1, 3, 7).to(device, dtype).requires_grad_()
        end = end_of(act=act, clamp=0.9)
        g = upfirdn2d_epilogue(x, f, padding=2, end=end, backend=backend).pow(4).sum()
        for _ in range(3):
            (g,) = grad(g.sum(), x, create_graph=True)
        return g

    expected = third("reference", torch.float64)
    assert_matches(third(backend, widest(backend, device)), expected, reduction=500)


# How it runs


@pytest.fixture
def launches(backend, monkeypatch):
    """The kernels launched on the backend, in order."""
    names = []
    module = backends.BACKENDS[backend]
    for name in (
        "epilogue_forward", "epilogue_masked", "epilogue_curved",
        "upfirdn2d_forward", "upfirdn2d_masked",
    ):  # fmt: skip
        launch = getattr(module, name, None)
        if launch is None:
            continue

        def recorded(*args, launch=launch, name=name, **options):
            names.append(name)
            return launch(*args, **options)

        monkeypatch.setattr(module, name, recorded)
    return names


@pytest.mark.parametrize("act, clamp, place, forward, backward", [
    ("lrelu", 0.9, "NCHW, whole units", ["upfirdn2d_forward"], ["upfirdn2d_masked"]),
    ("lrelu", 0.9, "NHWC, whole units", ["upfirdn2d_forward"], ["upfirdn2d_masked"]),
    ("linear", None, "NCHW, broken units", ["upfirdn2d_forward"], ["upfirdn2d_masked"]),
    (
        "lrelu",
        0.9,
        "NCHW, broken units",
        ["upfirdn2d_forward", "epilogue_forward"],
        ["epilogue_masked", "upfirdn2d_forward"],
    ),
    (
        "tanh",
        0.9,
        "NCHW, broken units",
        ["upfirdn2d_forward"],
        ["upfirdn2d_forward", "epilogue_curved", "upfirdn2d_forward"],
    ),
])  # fmt: skip
def test_launches(backend, launches, act, clamp, place, forward, backward, device):
    """One kernel forward and one backward, where rows are whole units of a mask or none is kept."""
    if backend == "reference":
        pytest.skip("it has no kernels")
    problem = Problem(place, torch.float32, device)
    operands = dict(problem.operands)
    for name in ("x", "b"):
        operands[name] = operands[name].detach().requires_grad_()
    y = problem.fused(backend, act, 0.2, 1.4, clamp)(**operands)
    assert launches == forward
    launches.clear()
    grad(y, [operands["x"], operands["b"]], problem.dy)
    assert launches == backward
    launches.clear()
    with torch.no_grad():
        problem.fused(backend, act, 0.2, 1.4, clamp)(**operands)
    assert launches == ["upfirdn2d_forward"]


def test_an_epilogue_that_does_nothing_is_no_epilogue(backend, launches, device):
    if backend == "reference":
        pytest.skip("it has no kernels")
    x = randn(1, 2, 3, 5).float().to(device).requires_grad_()
    y = upfirdn2d_epilogue(x, FIR.to(device), padding=2, end=Epilogue(), backend=backend)
    (g,) = grad(y.sum(), x)
    assert launches[0] == "upfirdn2d_forward" and len(launches) == 2
    assert_matches(y.cpu(), reference_upfirdn2d(x.detach().cpu().double(), FIR, padding=2))


def test_saved_memory_is_two_bits_an_element(backend, device):
    """Neither x nor y is kept for the gradients of a piecewise-linear activation."""
    if backend == "reference":
        pytest.skip("PyTorch's operators save what they save")
    x = torch.randn(2, 4, 8, 16, device=device, requires_grad=True)
    b, f = torch.randn(4, device=device, requires_grad=True), FIR.to(device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        end = Epilogue(b=b, act="lrelu", clamp=0.5)
        y = upfirdn2d_epilogue(x, f, 2, 1, [2, 1, 2, 1], end=end, backend=backend)
    kept = sum(t.numel() * t.element_size() for t in saved)
    assert kept == y.numel() // 4 + f.numel() * f.element_size()


def test_bias_gradient_is_reproducible(backend, device):
    size = (2, 2, 4, 8) if interpreted(backend, device) else (3, 16, 33, 40)
    x = torch.randn(size, device=device)
    b = torch.randn(size[1], device=device, requires_grad=True)
    for memory_format in (NCHW, NHWC):
        x = x.contiguous(memory_format=memory_format).detach().requires_grad_()
        y = upfirdn2d_epilogue(
            x, FIR.to(device), padding=[1, 2, 1, 2], end=Epilogue(b=b, act="lrelu"), backend=backend
        )
        dy = torch.randn_like(y)
        runs = [grad(y, b, dy, retain_graph=True)[0] for _ in range(3)]
        assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_threads_agree():
    """Large enough to be shared, in both orders, with the sum over the channels."""
    if backends.unavailable("cpu") is not None:
        pytest.skip("the cpu backend is not built")
    before = torch.get_num_threads()
    end = ("lrelu", *USUAL)
    try:
        for memory_format, channels, width in ((NCHW, 13, 64), (NHWC, 24, 51)):
            x = randn(3, channels, 47, width).float().contiguous(memory_format=memory_format)
            b, scale = randn(channels).float(), 1 + 0.4 * randn(3, channels, seed=1).float()
            leaves = [t.requires_grad_() for t in (x, b)]
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                whole = Epilogue(scale, None, b, *end)
                y = upfirdn2d_epilogue(x, FIR, padding=[1, 2, 1, 2], end=whole, backend="cpu")
                dy = torch.cos(torch.arange(y.numel(), dtype=torch.float32)).view(y.shape)
                results.append([y, *grad(y, leaves, dy)])
            for other in results[1:]:
                assert torch.equal(results[0][0], other[0]) and torch.equal(results[0][1], other[1])
                assert_matches(other[2], results[0][2].double(), reduction=3 * 47 * width)
            wide = [t.detach().double().requires_grad_() for t in leaves]
            v = reference_upfirdn2d(wide[0], FIR.double(), padding=[1, 2, 1, 2])
            v = v * scale[:, :, None, None]
            expected = reference_bias_act(v, wide[1], 1, *end)
            gradients = grad(expected, wide, dy.double())
            for actual, wanted in zip(results[0], (expected, *gradients)):
                assert_matches(actual, wanted, reduction=16 * 3 * 47 * width)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("act", ["lrelu", "swish"])
def test_compiles_to_one_graph(backend, act, device):
    f = FIR.to(device)

    def run(x, scale, noise, b, add):
        end = Epilogue(scale, noise, b, act, None, None, 0.9131)
        return upfirdn2d_epilogue(x, f, 2, 1, [2, 1, 2, 1], end=end, add=add)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with use_backend(backend):
        for memory_format in (NCHW, NHWC):
            x = randn(2, 3, 3, 4).float().contiguous(memory_format=memory_format)
            operands = [x, 1 + randn(2, 3) / 3, randn(6, 8), randn(3), randn(2, 3, 6, 8)]
            operands = [t.float().to(device).detach().requires_grad_() for t in operands]
            y, expected = compiled(*operands), run(*operands)
            torch.testing.assert_close(y, expected)
            assert y.stride() == expected.stride()
            for actual, wanted in zip(*(grad(t.sum(), operands) for t in (y, expected))):
                torch.testing.assert_close(actual, wanted)


def test_transforms_take_the_reference(backend, device):
    x, v = randn(1, 2, 3, 4).float().to(device), randn(1, 2, 3, 4, seed=1).float().to(device)
    f, end = FIR.to(device), end_of(act="tanh")

    def run(x, backend=None):
        return upfirdn2d_epilogue(x, f, padding=2, end=end, backend=backend)

    _, tangent = torch.func.jvp(run, (x,), (v,))
    _, expected = torch.func.jvp(lambda x: run(x, "reference"), (x,), (v,))
    torch.testing.assert_close(tangent, expected)
    if backend != "reference":
        with pytest.raises(NotImplementedError, match="backend='reference'"):
            torch.func.jvp(lambda x: run(x, backend), (x,), (v,))


def test_errors(backend, device):
    x, f = torch.ones(2, 3, 4, 5, device=device), FIR.to(device)
    for add, error, message in (
        (torch.ones(2, 3, 8, 9), ValueError, r"shape \(2, 3, 8, 10\) .* add.shape=\(2, 3, 8, 9\)"),
        (torch.ones(1, 3, 8, 10), ValueError, r"got add\.shape=\(1, 3, 8, 10\)"),
        (torch.ones(3, 8, 10), ValueError, r"add must have 4 dimensions"),
        (torch.ones(2, 3, 8, 10).long(), TypeError, r"add\.dtype=torch\.int64"),
        (torch.ones(2, 3, 8, 10, device="meta"), ValueError, r"add\.device=meta"),
        (1.0, TypeError, r"add must be a torch\.Tensor, got float"),
    ):
        if isinstance(add, torch.Tensor) and add.device.type != "meta":
            add = add.to(device)
        with pytest.raises(error, match=message):
            upsample2d_add(x, f, add, backend=backend)
    with pytest.raises(ValueError, match="increase padding"):
        upfirdn2d_epilogue(x, f, padding=-2, end=end_of(act="lrelu"), backend=backend)
    with pytest.raises(ValueError, match="backend='fast' is unknown"):
        upfirdn2d_epilogue(x, f, end=end_of(act="lrelu"), backend="fast")


@pytest.mark.parametrize("fused_modconv", [False, True])
@pytest.mark.parametrize("size", [(3, 4), (4, 3)], ids=["whole units", "broken units"])
@pytest.mark.parametrize("memory_format", [NCHW, NHWC], ids=str)
def test_convolutions_end_with_it(backend, memory_format, size, fused_modconv, device):
    """modulated_conv2d with up=2: value and both gradients of what a training step needs."""
    if interpreted(backend, device) and not fused_modconv:
        pytest.skip("one thing at a time in Triton's interpreter")
    dtype = widest(backend, device)
    x = randn(2, 3, *size).contiguous(memory_format=memory_format)
    operands = [x, randn(8, 3, 3, 3, seed=1), 1 + randn(2, 3, seed=2) / 3]
    operands += [randn(2 * size[0], 2 * size[1], seed=3), randn(8, seed=4)]
    operands = [t.to(device, dtype).detach().requires_grad_() for t in operands]
    wide = [t.detach().double().requires_grad_() for t in operands]
    end = dict(act="lrelu", clamp=1.1317, fused_modconv=fused_modconv, up=2, padding=1)
    end["resample_filter"] = FIR.to(device)

    def orders(function, leaves):
        *operands, bias = leaves
        y = function(*operands, bias=bias, **end)
        first = grad(y.square().sum(), leaves, create_graph=True)
        return [y, *first, *grad(sum(g.square().sum() for g in first), leaves)]

    actual = orders(partial(modulated_conv2d, backend=backend), operands)
    for ours, expected in zip(actual, orders(reference_modulated_conv2d, wide)):
        assert_matches(ours, expected, reduction=20000)
