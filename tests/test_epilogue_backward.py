"""The first-order backward of a layer in one pass: its gradient and the sums over the pixels."""

import math

import pytest
import torch

from stylegan_fast import backends
from stylegan_fast.activations import ACTIVATIONS
from stylegan_fast.backends.geometry import Geometry
from stylegan_fast.ops.epilogue import backward_op, forward_op
from stylegan_fast.reference.bias_act import bias_act
from stylegan_fast.testing import assert_matches

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")

NCHW, NHWC = torch.contiguous_format, torch.channels_last
SLOPE, GAIN = 0.3, 1.3

PLACES = {
    "NCHW, whole units": ((3, 2, 5, 8), NCHW),
    "NCHW, broken units": ((2, 5, 3, 7), NCHW),
    "NCHW, planes of less than a unit": ((5, 7, 3, 1), NCHW),
    "NCHW, several tiles": ((2, 3, 47, 61), NCHW),
    "NHWC, whole units": ((3, 8, 5, 2), NHWC),
    "NHWC, broken units": ((2, 5, 3, 7), NHWC),
    "NHWC, folded": ((3, 5, 4, 2), NHWC),
    "NHWC, several tiles": ((2, 264, 7, 3), NHWC),
    "one pixel": ((3, 11, 1, 1), NCHW),
    "one channel": ((3, 1, 5, 7), NHWC),
}


def takes(backend, dtype, device):
    return backends.refusal(backend, "bias_act", device.type, dtype) is None


@pytest.fixture(autouse=True)
def only_kernels(request):
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "reference":
        pytest.skip("it has no kernels")


class Problem:
    """Operands at one of the places, with a mask that has nothing to do with them."""

    def __init__(self, place, dtype, device, noise_samples=None):
        (n, c, h, w), self.memory_format = PLACES[place]
        generator = torch.Generator().manual_seed(1)

        def randn(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def image():
            image = randn(n, c, h, w).to(device, dtype)
            return image.contiguous(memory_format=self.memory_format)

        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.dy, self.y = image(), image()
        self.noise = randn(noise_samples or n, 1, h, w).to(device, wide)
        self.scale = randn(n, c).to(device, wide)
        self.negative = (randn(n, c, h, w) < 0).to(device)
        self.clamped = (randn(n, c, h, w) > 1).to(device)

    @property
    def mask(self):
        """Two bytes for every 8 elements in memory order."""

        def memory_order(bits):
            bits = bits.permute(0, 2, 3, 1) if self.memory_format is NHWC else bits
            flat = torch.nn.functional.pad(bits.flatten().int(), (0, -bits.numel() % 8))
            return (flat.view(-1, 8) << torch.arange(8, device=bits.device)).sum(1)

        pair = [memory_order(bits) for bits in (self.negative, self.clamped)]
        return torch.stack(pair, 1).flatten().to(torch.uint8)

    def run(self, backend, slope=SLOPE, gain=GAIN, with_dx=True, **operands):
        names = ("dy", "y", "mask", "noise", "scale")
        operands = [operands[k] if k in operands else getattr(self, k) for k in names]
        return backward_op(*operands, self.dy.stride(), slope, gain, with_dx, backend)

    def expected(self, slope=SLOPE, gain=GAIN, mask=True, **operands):
        """dx and the moments in float64, without a sum where the operand is None."""

        def get(name):
            t = operands.get(name, getattr(self, name))
            return None if t is None else t.double()

        dy, y, noise, scale = (get(name) for name in ("dy", "y", "noise", "scale"))
        factor = torch.full_like(dy, gain)
        if mask:
            factor = torch.where(self.negative, gain * slope, factor)
            factor = torch.where(self.clamped, 0.0, factor)
        dv = torch.where(factor == 0, 0.0, factor * dy)
        dx = dv if scale is None else dv * scale[:, :, None, None]
        moments = [dv, None, None]
        if y is not None:
            moments[1] = torch.where(factor == 0, 0.0, dy * y)
        if noise is not None:
            moments[2] = dv * noise
        return dx, [None if m is None else m.sum((2, 3)) for m in moments]

    def check(self, actual, expected):
        (dx, moments), (expected_dx, expected_moments) = actual, expected
        if dx.numel():
            assert dx.stride() == self.dy.stride()
            assert_matches(dx, expected_dx, name="dx")
        n, c, h, w = self.dy.shape
        assert moments.shape == (3, n, c)
        for row, (moment, wanted) in enumerate(zip(moments, expected_moments)):
            wanted = torch.zeros(n, c) if wanted is None else wanted
            assert_matches(moment.cpu(), wanted.cpu(), reduction=h * w, name=f"moments[{row}]")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_every_place(backend, place, dtype, device):
    if not takes(backend, dtype, device):
        pytest.skip(f"{backend} has no {dtype} kernels")
    problem = Problem(place, dtype, device)
    problem.check(problem.run(backend), problem.expected())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", ["NCHW, whole units", "NHWC, whole units", "NCHW, broken units"])
def test_low_precision(backend, place, dtype, device):
    """The operands are what they are, so that the sums are as exact as float32's."""
    if not takes(backend, dtype, device):
        pytest.skip(f"{backend} has no {dtype} kernels")
    problem = Problem(place, dtype, device, noise_samples=1)
    problem.check(problem.run(backend), problem.expected())


@pytest.mark.parametrize("samples", [1, None], ids=["shared", "of each sample"])
@pytest.mark.parametrize("present", ["y", "noise", "scale", "", "y noise", "y scale"])
@pytest.mark.parametrize("place", ["NCHW, broken units", "NHWC, whole units"])
def test_every_choice_of_operands(backend, place, present, samples, device):
    problem = Problem(place, torch.float32, device, noise_samples=samples)
    absent = {name: None for name in ("y", "noise", "scale") if name not in present}
    problem.check(problem.run(backend, **absent), problem.expected(**absent))


@pytest.mark.parametrize("place", ["NCHW, whole units", "NHWC, broken units"])
def test_gradients_of_the_styles(backend, place, device):
    """Of x -> styles * x: no activation, so no mask; y is x, scale the styles."""
    problem = Problem(place, torch.float32, device)
    x = problem.y.double()
    styles = problem.scale.double().requires_grad_()
    (x.requires_grad_() * styles[:, :, None, None]).backward(problem.dy.double())
    dx, moments = problem.run(backend, 1.0, 1.0, mask=None, noise=None)
    assert_matches(dx, x.grad)
    pixels = problem.dy[0, 0].numel()
    assert_matches(moments[1], styles.grad, reduction=pixels)
    assert_matches(moments[0], problem.dy.double().sum((2, 3)), reduction=pixels)


@pytest.mark.parametrize("place", ["NCHW, broken units", "NHWC, broken units", "NHWC, folded"])
def test_only_the_sums(backend, place, device):
    problem = Problem(place, torch.float32, device)
    dx, moments = problem.run(backend, with_dx=False)
    assert dx.shape == (0,)
    problem.check((dx, moments), problem.expected())
    assert torch.equal(moments, problem.run(backend)[1])


@pytest.mark.parametrize("slope, gain", [(0.0, GAIN), (SLOPE, 0.0), (SLOPE, -GAIN), (1.0, GAIN)])
@pytest.mark.parametrize("place", ["NCHW, whole units", "NHWC, broken units"])
def test_a_factor_of_zero_gives_zero(backend, place, slope, gain, device):
    """Also for what is not finite; elsewhere that spreads, as in PyTorch."""
    problem = Problem(place, torch.float32, device)
    dead = problem.clamped | (problem.negative & (gain * slope == 0)) | (gain == 0)
    wild = torch.tensor([math.nan, math.inf, -math.inf], device=device)
    wild = wild[torch.arange(dead.numel(), device=device) % 3].view(dead.shape)
    problem.y = torch.where(dead, wild, problem.y)
    problem.dy = torch.where(dead, wild.flip(0), problem.dy)
    problem.y = problem.y.contiguous(memory_format=problem.memory_format)
    problem.dy = problem.dy.contiguous(memory_format=problem.memory_format)
    actual = problem.run(backend, slope, gain)
    assert all(t.isfinite().all() for t in actual)
    problem.check(actual, problem.expected(slope, gain))
    if gain == 0:
        return
    n, c, h, w = (~dead).nonzero()[-1].tolist()
    problem.dy[n, c, h, w] = math.nan
    dx, moments = problem.run(backend, slope, gain)
    assert dx.isnan().nonzero().tolist() == [[n, c, h, w]]
    assert moments.isnan().nonzero().tolist() == [[row, n, c] for row in range(3)]


@pytest.mark.parametrize("memory_format", [NCHW, NHWC], ids=str)
@pytest.mark.parametrize(
    "act, clamp", [("lrelu", 0.9), ("lrelu", None), ("relu", 0.9), ("linear", 0.9)]
)
def test_gradients_of_a_layer(backend, act, clamp, memory_format, device):
    """What PyTorch's autograd finds for every operand, from y, the mask and the moments alone."""
    dtype = torch.float64 if takes(backend, torch.float64, device) else torch.float32
    generator = torch.Generator().manual_seed(2)
    shapes = {"u": (2, 3, 5, 7), "scale": (2, 3), "noise": (2, 1, 5, 7), "strength": (), "b": (3,)}
    leaves = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
        for name, shape in shapes.items()
    }
    leaves["u"] = leaves["u"].contiguous(memory_format=memory_format)
    dy = torch.randn(shapes["u"], generator=generator, dtype=torch.float64).to(device)
    u, scale, noise, strength, b = (t.to(dtype) for t in leaves.values())

    row = ACTIVATIONS[act]
    constants = (row.code, SLOPE, GAIN, math.inf if clamp is None else clamp)
    y, mask = forward_op(u, scale, noise, strength, b, 1, *constants, True, backend)
    slope = row.negative_slope(SLOPE)
    dx, (dv, dv_v, dv_noise) = backward_op(
        dy.to(dtype), y, mask, noise, scale, y.stride(), slope, GAIN, True, backend
    )
    # sum of d(v) u, as v = scale u + strength noise + b
    d_scale = (dv_v - strength * dv_noise - b * dv) / scale

    wide = {name: t.to(dtype).double().requires_grad_() for name, t in leaves.items()}
    v = wide["u"] * wide["scale"][:, :, None, None] + wide["noise"] * wide["strength"]
    expected = bias_act(v, wide["b"], 1, act, SLOPE, GAIN, clamp)
    expected.backward(dy.to(dtype).double())
    magnitude = (1 / scale).abs().max().item()
    for name, actual in (
        ("u", dx),
        ("scale", d_scale / magnitude),
        ("strength", dv_noise.sum()),
        ("b", dv.sum(0)),
    ):
        size = magnitude if name == "scale" else 1.0
        assert_matches(actual, wide[name].grad / size, reduction=2 * 3 * 5 * 7, name=name)


def test_gradient_in_place(backend, device):
    """dx may be dy itself."""
    for place, (shape, memory_format) in PLACES.items():
        if "several" in place:
            continue
        problem = Problem(place, torch.float32, device)
        expected = problem.expected()
        n, c, h, w = shape
        nhwc = memory_format is NHWC and c > 1
        geometry = Geometry(n * h * w, c, 1, h * w) if nhwc else Geometry(n, c, h * w, h * w)
        moments = torch.full((3, n, c), math.nan, device=device)
        noise = problem.noise.view(n, h * w)
        buffers = (noise, problem.scale, problem.dy, moments)
        backends.BACKENDS[backend].epilogue_backward(
            problem.dy, problem.y, problem.mask, *buffers, geometry, SLOPE, GAIN
        )
        problem.check((problem.dy, moments), expected)


@pytest.mark.parametrize("place", ["NCHW, broken units", "NHWC, whole units"])
def test_only_the_gradient(backend, place, device):
    """Without moments: nothing but dx is written."""
    problem = Problem(place, torch.float32, device)
    n, c, h, w = problem.dy.shape
    nhwc = problem.memory_format is NHWC
    geometry = Geometry(n * h * w, c, 1, h * w) if nhwc else Geometry(n, c, h * w, h * w)
    dx = torch.empty_like(problem.dy)
    backends.BACKENDS[backend].epilogue_backward(
        problem.dy, None, problem.mask, None, problem.scale, dx, None, geometry, SLOPE, GAIN
    )
    assert_matches(dx, problem.expected()[0])


@pytest.mark.parametrize("memory_format", [NCHW, NHWC], ids=str)
def test_dy_and_y_are_laid_out_as_asked(backend, memory_format, device):
    problem = Problem("NHWC, whole units", torch.float32, device)
    other = problem.dy.contiguous(memory_format=memory_format)
    actual = problem.run(backend, dy=other, y=problem.y.clone(memory_format=memory_format))
    problem.check(actual, problem.expected())


def test_empty_batch(backend, device):
    dy = torch.empty(0, 3, 4, 5, device=device)
    dx, moments = backward_op(dy, dy, None, None, None, dy.stride(), 1.0, 1.0, True, backend)
    assert dx.shape == dy.shape and moments.shape == (3, 0, 3)
    dy = torch.empty(2, 3, 0, 5, device=device)
    moments = backward_op(dy, dy, None, None, None, dy.stride(), 1.0, 1.0, True, backend)[1]
    assert moments.flatten().tolist() == [0.0] * 18


@pytest.mark.parametrize("place", ["NCHW, broken units", "NHWC, whole units"])
@pytest.mark.parametrize("with_dx", [True, False])
def test_opcheck(backend, place, with_dx, device):
    problem = Problem(place, torch.float32, device)
    operands = (problem.dy, problem.y, problem.mask, problem.noise, problem.scale)
    for absent in ((), (1, 2, 4)):
        chosen = [None if i in absent else t for i, t in enumerate(operands)]
        torch.library.opcheck(
            backward_op, (*chosen, problem.dy.stride(), SLOPE, GAIN, with_dx, backend)
        )


def test_sums_are_reproducible(backend, device):
    for place in ("NCHW, several tiles", "NHWC, several tiles"):
        problem = Problem(place, torch.float32, device)
        assert torch.equal(problem.run(backend)[1], problem.run(backend)[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape, memory_format", [
    ((2, 3, 147, 161), NCHW),  # planes shared by threads
    ((5, 113, 9, 23), NCHW),
    ((3, 24, 47, 51), NHWC),  # a sample shared by threads
    ((31, 37, 8, 9), NHWC),
])  # fmt: skip
def test_threads_agree(monkeypatch, shape, memory_format, dtype):
    """Large enough to be shared."""
    if backends.unavailable("cpu") is not None:
        pytest.skip("the cpu backend is not built")
    monkeypatch.setitem(PLACES, "large", (shape, memory_format))
    problem = Problem("large", dtype, torch.device("cpu"))
    expected = problem.expected()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(problem.run("cpu"))
            problem.check(results[-1], expected)
            assert torch.equal(problem.run("cpu")[1], results[-1][1])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(dx, results[0][0]) for dx, _ in results)
