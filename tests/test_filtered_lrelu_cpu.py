"""The CPU kernels of filtered_lrelu beside the definition in csrc/filtered_lrelu.h, tap by tap."""

import math

import pytest
import torch

from stylegan_fast.backends import native
from stylegan_fast.backends.geometry import FilteredLrelu
from stylegan_fast.ops import filtered_lrelu
from stylegan_fast.ops.filtered_lrelu import forward_op, masked_op
from stylegan_fast.reference.upfirdn2d import upfirdn2d
from stylegan_fast.testing import assert_matches

if native.load()[0] is None:
    pytest.skip(native.load()[1], allow_module_level=True)

LEVELS = native.load()[0].simd_levels()
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INF = math.inf


def ramp(*shape, seed=0):
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(1.7 * i + 0.013 * i * i + seed).reshape(shape)


def taps(*shape):
    f = (ramp(*shape, seed=3) + 1.5).float()
    return f / f.sum()


# fu, fd, up, down, (x0, y0), shape, output size, flip_filter
CASES = {
    "2 2": (taps(12), taps(12), 2, 2, (9, 10), (2, 19, 9, 23), (7, 19), False),
    "2 2 cropped": (taps(12), taps(12), 2, 2, (-4, -7), (1, 5, 17, 40), (4, 21), True),
    "4 2": (taps(24), taps(12), 4, 2, (-6, -9), (1, 21, 11, 15), (5, 9), False),
    "4 2 padded": (taps(24), taps(12), 4, 2, (19, 24), (1, 3, 7, 13), (18, 31), False),
    "2 4": (taps(12), taps(24), 2, 4, (28, 31), (1, 17, 10, 37), (11, 24), True),
    "2 4 odd": (taps(12), taps(24), 2, 4, (13, 6), (2, 3, 13, 22), (3, 6), True),
    "wide": (taps(12), taps(12), 2, 2, (9, 9), (1, 1, 3, 2100), (2, 2090), False),
    "wide 2 4": (taps(12), taps(24), 2, 4, (20, 12), (1, 16, 2, 400), (1, 197), False),
    "more padding than image": (taps(12), taps(12), 2, 2, (41, 36), (1, 3, 2, 3), (41, 40), False),
    "down 2": (None, taps(12), 1, 2, (5, 6), (1, 5, 14, 19), (6, 9), False),
    "up 2": (taps(12), None, 2, 1, (6, 5), (1, 9, 6, 8), (11, 16), False),
    "odd taps": (taps(11), taps(7), 2, 2, (9, 8), (1, 33, 7, 8), (7, 8), True),
    "3 2": (taps(5), taps(4), 3, 2, (4, -2), (1, 2, 7, 6), (8, 9), False),
    "one tap, 4": (taps(1), taps(2), 4, 3, (2, 1), (1, 18, 5, 6), (7, 8), False),
    "no filters": (None, None, 1, 1, (0, 0), (2, 3, 4, 21), (4, 21), False),
    "no filters, padded": (None, None, 1, 1, (1, -1), (2, 18, 5, 4), (4, 6), False),
    "full down": (taps(12), taps(12, 11), 2, 2, (9, 10), (1, 18, 9, 13), (7, 9), False),
    "full up": (taps(11, 12), taps(12), 2, 2, (9, 10), (1, 3, 9, 23), (7, 18), True),
    "full": (taps(3, 5), taps(4, 2), 2, 1, (2, 3), (1, 17, 4, 6), (6, 8), False),
}


def between(x, problem, fu, height, width):
    """u, of this size, from its definition."""
    fw, fh = (1, 1) if fu is None else (fu.shape[-1], fu.shape[0])
    x1 = width + fw - 1 - x.shape[3] * problem.up - problem.x0
    y1 = height + fh - 1 - x.shape[2] * problem.up - problem.y0
    padding = [problem.x0, x1, problem.y0, y1]
    fu = None if fu is None else fu.double()
    return upfirdn2d(x, fu, problem.up, 1, padding, problem.flip_filter, problem.gain)


def down(v, problem, fd):
    fd = None if fd is None else fd.double()
    return upfirdn2d(v, fd, 1, problem.down, 0, problem.flip_filter)


def case(name, dtype, channels_last, sign_size=None, **constants):
    fu, fd, up, factor, (x0, y0), shape, size, flip = CASES[name]
    fw, fh = (1, 1) if fd is None else (fd.shape[-1], fd.shape[0])
    height, width = ((o - 1) * factor + f for o, f in zip(size, (fh, fw), strict=True))
    constants = {"gain": 1.3, "slope": 0.25, "clamp": 0.31, **constants}
    sign_height, sign_width = sign_size or (height, width)
    problem = FilteredLrelu(
        up, factor, x0, y0, flip, sign_height=sign_height, sign_width=sign_width, **constants
    )
    x = ramp(*shape).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return x, fu, fd, problem, size, (height, width)


def unpack(signs, n, channels, height, width, channels_last):
    """Whether u <= 0, whether it is clamped: [N, C, H, W] of bool."""
    rows = (n, height, width) if channels_last else (n, channels, height)
    row = channels if channels_last else width
    units = signs.reshape(*rows, -1, 2)
    bits = (units[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
    bits = bits.transpose(-2, -3).flatten(-2)[..., :row].bool()
    planes = bits.unbind(-2)
    return [p.permute(0, 3, 1, 2) if channels_last else p for p in planes]


@pytest.fixture(params=LEVELS)
def level(request):
    module, _ = native.load()
    before = module.simd_level()
    module.set_simd_level(request.param)
    yield request.param
    module.set_simd_level(before)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_its_signs(name, channels_last, level):
    for dtype in DTYPES if level == LEVELS[0] else DTYPES[1:2]:
        x, fu, fd, problem, size, inner = case(name, dtype, channels_last)
        b = ramp(x.shape[1], seed=1).mul(0.1).to(dtype)
        u = between(x.double() + b.double().reshape(-1, 1, 1), problem, fu, *inner)
        leaky = torch.where(u <= 0, problem.slope * u, u)
        expected = down(leaky.clamp(-problem.clamp, problem.clamp), problem, fd)
        arguments = (x, b, fu, fd, *problem, size, channels_last)
        y, signs = forward_op(*arguments, True, "cpu")
        assert_matches(y, expected, reduction=288, name=f"{name} {dtype}")
        assert torch.equal(y, forward_op(*arguments, False, "cpu")[0])
        negative, clamped = unpack(signs, *x.shape[:2], *inner, channels_last)
        # On an edge float32 may decide otherwise than float64.
        sure = ((u == 0) | (u.abs() > 1e-5)) & ((leaky.abs() - problem.clamp).abs() > 1e-5)
        if fd is not None:
            sure &= seen(inner, size, fd, problem.down)
        assert sure.float().mean() > 0.4
        assert torch.equal(negative[sure], (u <= 0)[sure])
        assert torch.equal(clamped[sure], (leaky.abs() > problem.clamp)[sure])


def seen(inner, size, fd, factor):
    """Rows and columns between the filters that an output sees: gaps where factor > taps."""
    rows, columns = torch.zeros(inner[0], dtype=bool), torch.zeros(inner[1], dtype=bool)
    for o in range(size[0]):
        rows[o * factor : o * factor + fd.shape[0]] = True
    for o in range(size[1]):
        columns[o * factor : o * factor + fd.shape[-1]] = True
    return rows[:, None] & columns


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", CASES)
def test_masked_with_signs_elsewhere(name, channels_last, level):
    torch.manual_seed(5)
    for dtype in DTYPES if level == LEVELS[0] else DTYPES[1:2]:
        for sign_y, sign_x in ((0, 0), (2, 5), (-3, -11), (1, 8)):
            x, fu, fd, problem, size, inner = case(name, dtype, channels_last)
            height, width = max(1, inner[0] - 2), inner[1] + 3
            problem = problem._replace(
                sign_height=height, sign_width=width, sign_y=sign_y, sign_x=sign_x
            )
            n, c = x.shape[:2]
            rows, row = (height * width, c) if channels_last else (c * height, width)
            signs = torch.randint(0, 256, (n * rows * -(-row // 8) * 2,), dtype=torch.uint8)
            negative, dropped = unpack(signs, n, c, height, width, channels_last)
            factor = torch.where(negative, problem.slope, 1.0).double() * ~dropped
            here = torch.zeros(n, c, *inner, dtype=torch.float64)
            for Y in range(max(0, -sign_y), min(inner[0], height - sign_y)):
                first, last = max(0, -sign_x), min(inner[1], width - sign_x)
                if first < last:
                    there = factor[:, :, Y + sign_y, first + sign_x : last + sign_x]
                    here[:, :, Y, first:last] = there
            u = between(x.double(), problem, fu, *inner)
            y = masked_op(x, signs, fu, fd, *problem, size, channels_last, "cpu")
            assert_matches(y, down(here * u, problem, fd), reduction=288, name=f"{name} {dtype}")


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", ["2 2", "4 2 padded", "2 4", "odd taps", "full down", "full up"])
def test_nan_goes_where_a_tap_sees_it(name, channels_last, level):
    x, fu, fd, problem, size, inner = case(name, torch.float32, channels_last, clamp=INF)
    x[0, 1, 3, 7] = math.nan
    x[0, 2, 5, 2] = INF
    arguments = (x, None, fu, fd, *problem, size, channels_last)
    y, signs = forward_op(*arguments, True, "cpu")
    v = between(x.double(), problem, fu, *inner)
    expected = down(torch.where(v <= 0, problem.slope * v, v), problem, fd)
    assert expected.isnan().any() and not expected.isnan().all()
    assert torch.equal(y.isnan(), expected.isnan())
    # Where the mask is 0 so is the result.
    dropped = torch.full_like(signs, 255)
    y = masked_op(x, dropped, fu, fd, *problem, size, channels_last, "cpu")
    assert torch.equal(y, torch.zeros_like(y))
    problem = problem._replace(slope=0.0)
    negative = torch.tensor([255, 0], dtype=torch.uint8).repeat(signs.numel() // 2)
    y = masked_op(x, negative, fu, fd, *problem, size, channels_last, "cpu")
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", ["2 2", "4 2", "2 4", "wide", "3 2", "full down"])
def test_threads_agree(name, channels_last):
    _, fu, fd, up, factor, (x0, y0), (_, c, h, w), _, flip = 0, *CASES[name]
    x = ramp(2, c, h + 40, w + 10).float()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    padding = [x0, 30, y0, 30]
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        y = filtered_lrelu(leaf, fu, fd, None, up, factor, padding, clamp=0.4, flip_filter=flip,
                           backend="cpu")  # fmt: skip
        (dx,) = torch.autograd.grad(y, leaf, torch.cos(y.detach()))
        results.append((y.detach(), dx))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
