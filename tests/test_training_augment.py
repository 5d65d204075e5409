"""Augmentation: every transformation against a formula of its own, and to second order."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from stylegan_fast.testing import assert_matches, tolerance
from stylegan_fast.training import augment
from stylegan_fast.training.augment import STRENGTHS, AugmentPipe, adjust

NONE = dict.fromkeys(STRENGTHS, 0.0)


def only(p: float = 1, **strengths: float) -> AugmentPipe:
    pipe = AugmentPipe(**{**NONE, **strengths})
    pipe.p.fill_(p)
    return pipe


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5), dtype=dtype) * 2 - 1


def smooth(n: int, h: int, w: int) -> torch.Tensor:
    """[n, 3, h, w] of low frequencies."""
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    phases = torch.arange(3 * n).reshape(n, 3, 1, 1)
    return (0.35 * x + 0.1 * y + phases).sin() * (0.3 * y - 0.2 * x).cos() * 0.9


def matrices(*rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def reflected(image: np.ndarray, pad: int) -> np.ndarray:
    return np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")


# As a whole


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_p_zero_changes_no_bit(dtype, channels):
    images = noise(5, channels, 8, 8).to(dtype)
    pipe = AugmentPipe(imgfilter=1, noise=1, cutout=1)
    assert pipe.p == 0
    assert torch.equal(pipe(images), images)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_all_transformations_are_finite_and_keep_shape_and_dtype(channels, layout):
    pipe = AugmentPipe(imgfilter=1, noise=1, cutout=1)
    pipe.p.fill_(0.9)
    images = noise(6, channels, 16, 16, dtype=torch.float32).to(memory_format=layout)
    half = pipe(images.half(), generator=torch.Generator().manual_seed(1))
    single = pipe(images.half().float(), generator=torch.Generator().manual_seed(1))
    assert half.dtype == torch.float16 and single.shape == images.shape
    assert single.isfinite().all()
    assert torch.equal(half, single.half())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same = pipe(images.half().float(), generator=torch.Generator().manual_seed(1))
    assert torch.equal(same, single)


def test_the_generator_decides():
    pipe = AugmentPipe(imgfilter=1, noise=1, cutout=1)
    pipe.p.fill_(0.7)
    images = noise(4, 3, 8, 8, dtype=torch.float32)
    first, second, other = (
        pipe(images, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)
    torch.manual_seed(1)
    assert torch.equal(pipe(images), first)


@pytest.mark.parametrize("name", STRENGTHS)
def test_probability_is_p_times_strength(name):
    images = smooth(1, 8, 8).float().expand(800, 3, 8, 8)
    changed = (only(0.6, **{name: 0.5})(images) != images).flatten(1).any(1)
    # Some draw what changes nothing (the shift rounds to -1, 0 or 1, each half of the time 0), and
    # four bands are chosen one by one.
    chance = {"xflip": 1 / 2, "lumaflip": 1 / 2, "rotate90": 3 / 4, "xint": 3 / 4}.get(name, 1)
    expected = 1 - 0.7**4 if name == "imgfilter" else 0.3 * chance
    deviation = math.sqrt(expected * (1 - expected) / 800)
    assert abs(changed.double().mean().item() - expected) < 4 * deviation


def test_every_device_draws_the_same(device):
    pipe = AugmentPipe(imgfilter=1, cutout=1)
    pipe.p.fill_(0.7)
    images = noise(12, 3, 16, 16)
    exact = pipe(images, generator=torch.Generator().manual_seed(1))
    result = pipe.to(device)(images.float().to(device), generator=torch.Generator().manual_seed(1))
    assert_matches(result.cpu(), exact, reduction=144 * 4 + 43 * 43)


def test_p_beyond_one_is_one():
    images = noise(3, 3, 8, 8)
    assert (only(3.0, rotate=2)(images) != images).flatten(1).any(1).all()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: AugmentPipe(zoom=1), TypeError, "unknown zoom; there are xflip"),
        (lambda: AugmentPipe(hue=-1), ValueError, "hue must be at least 0"),
        (lambda: AugmentPipe()(torch.zeros(2, 2, 8, 8)), ValueError, "1 or 3 channels"),
        (lambda: AugmentPipe()(torch.zeros(2, 3, 8, 9)), ValueError, "square images, got 8×9"),
        (lambda: AugmentPipe()(torch.zeros(3, 8, 8)), ValueError, "4 dimensions"),
    ],
)
def test_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_state_is_p_alone():
    assert list(AugmentPipe().state_dict()) == ["p"]


def test_adjust_moves_p_towards_the_target():
    assert adjust(0.8, 0.6, batch=64, interval=4, kimg=500) == 64 * 4 / 500_000
    assert adjust(0.1, 0.6, batch=32, interval=4, kimg=100) == -32 * 4 / 100_000
    assert adjust(0.6, 0.6, batch=32, interval=4, kimg=100) == 0


# Geometry


def test_flip():
    images = noise(3, 3, 5, 7)
    assert torch.equal(only(xflip=1)(images, debug_percentile=0.9), images.flip(3))
    assert torch.equal(only(xflip=1)(images, debug_percentile=0.1), images)


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_quarter_turns(quarters):
    images = noise(2, 3, 7, 7)
    turned = only(rotate90=1)(images, debug_percentile=(quarters + 0.5) / 4)
    assert torch.equal(turned, images.rot90(-quarters, (2, 3)))  # y points down


@pytest.mark.parametrize("percentile, part", [(0.05, -0.1125), (0.9, 0.1), (1.0, 0.125)])
def test_integer_translation_reflects(percentile, part):
    images = noise(2, 3, 24, 40)
    dy, dx = round(part * 24), round(part * 40)
    assert dx != dy
    moved = only(xint=1)(images, debug_percentile=percentile)
    for image, result in zip(images.numpy(), moved.numpy()):
        padded = reflected(image, 8)
        assert np.array_equal(result, padded[:, 8 - dy : 32 - dy, 8 - dx : 48 - dx])


def test_blits_together_are_those_one_after_the_other():
    pipe = only(xflip=1, rotate90=1, xint=1)
    images = noise(2, 3, 16, 16)
    turned = images.flip(3).rot90(-3, (2, 3))
    expected = F.pad(turned, [2, 0, 2, 0], mode="reflect")[:, :, :16, :16]
    assert torch.equal(pipe(images, debug_percentile=0.99), expected)


def test_the_wavelets_are_orthonormal_with_vanishing_moments():
    for taps in (augment.SYM6, augment.SYM2):
        h = np.array(taps)
        products = [h[2 * m :] @ h[: len(h) - 2 * m] for m in range(len(h) // 2)]
        np.testing.assert_allclose(products, [1] + [0] * (len(h) // 2 - 1), atol=2e-12)
        signs, k = (-1.0) ** np.arange(len(h)), np.arange(len(h)) - (len(h) - 1) / 2
        for power in range(len(h) // 2):
            terms = signs * h * k**power
            assert abs(terms.sum()) <= 1e-11 * abs(terms).sum()


def test_resampling_without_a_transformation_gives_the_image_back():
    images = noise(2, 3, 9, 14)
    same = augment.warp(images, torch.eye(3).double().expand(2, 3, 3), AugmentPipe().wavelet)
    # The filter's coefficients are float32.
    limit = tolerance(torch.float32, 12 * 12 * 4, 1.0)
    assert (same - images).abs().max() <= limit


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_turns_in_the_geometric_path(quarters):
    images = smooth(2, 20, 20)
    matrix = augment._rotation(torch.full((2,), quarters * math.pi / 2, dtype=torch.float64))
    turned = augment.warp(images, matrix, AugmentPipe().wavelet)
    error = (turned - images.rot90(-quarters, (2, 3))).abs()[:, :, 4:-4, 4:-4].max().item()
    assert error <= lookup_error(images)


@pytest.mark.parametrize(
    "name, percentile, inverse",
    [
        ("scale", 0.9, lambda x: [[2 ** (-0.2 * x), 0, 0], [0, 2 ** (-0.2 * x), 0]]),
        ("aniso", 0.2, lambda x: [[2 ** (-0.2 * x), 0, 0], [0, 2 ** (0.2 * x), 0]]),
        ("xfrac", 0.7, lambda x: [[1, 0, -0.125 * x * 28], [0, 1, -0.125 * x * 20]]),
    ],
)
def test_smooth_images_are_scaled_and_shifted(name, percentile, inverse):
    quantile = math.sqrt(2) * torch.erfinv(torch.tensor(2 * percentile - 1).double()).item()
    check_geometry(only(**{name: 1}), percentile, inverse(quantile))


def test_smooth_images_are_turned_twice():
    cosine, sine = math.cos(0.2 * math.pi), math.sin(0.2 * math.pi)
    check_geometry(only(rotate=1), 0.55, [[cosine, sine, 0], [-sine, cosine, 0]])


def lookup_error(images: torch.Tensor) -> float:
    """Bilinear lookup at half a pixel's distance errs by a 32nd of the second derivatives; twice
    that, for the filters."""
    curvature = images.diff(n=2, dim=2).abs().max() + images.diff(n=2, dim=3).abs().max()
    return 2 * curvature.item() / 32


def check_geometry(pipe: AugmentPipe, percentile: float, inverse: list[list[float]]) -> None:
    """Where an output pixel comes from well within the image, a spline tells its value."""
    h, w = 20, 28
    images = smooth(2, h, w)
    result = pipe(images, debug_percentile=percentile)
    y, x = np.meshgrid(np.arange(h) - (h - 1) / 2, np.arange(w) - (w - 1) / 2, indexing="ij")
    from_x, from_y = np.tensordot(np.array(inverse), np.stack([x, y, np.ones_like(x)]), 1)
    inside = (np.abs(from_x) < (w - 9) / 2) & (np.abs(from_y) < (h - 9) / 2)
    assert inside.mean() > 0.3
    at = [from_y + (h - 1) / 2, from_x + (w - 1) / 2]
    for image, warped in zip(images.flatten(0, 1).numpy(), result.flatten(0, 1).numpy()):
        expected = ndimage.map_coordinates(image, at, order=5, mode="mirror")
        assert abs(warped - expected)[inside].max() <= lookup_error(images)


def test_beyond_the_border_is_a_reflection():
    images = smooth(1, 16, 16)
    half_size = matrices([[0.5, 0, 0], [0, 0.5, 0], [0, 0, 1]])
    small = augment.warp(images, half_size, AugmentPipe().wavelet)
    wide = F.pad(images, [15] * 4, mode="reflect")
    wide = augment.warp(wide, half_size, AugmentPipe().wavelet)[:, :, 15:31, 15:31]
    assert_matches(small[:, :, 2:-2, 2:-2], wide[:, :, 2:-2, 2:-2], reduction=144 * 4)


# Second order


def test_grid_sample_is_closed_under_differentiation(device):
    x = noise(2, 3, 4, 5).to(device).requires_grad_()
    grid = noise(2, 6, 7, 2).to(device) * 1.2
    assert torch.equal(
        augment.GridSample.apply(x, grid), F.grid_sample(x, grid, align_corners=False)
    )
    # CUDA adds in any order.
    assert torch.autograd.gradcheck(augment.GridSample.apply, (x, grid), nondet_tol=1e-12)
    square = lambda x: augment.GridSample.apply(x, grid).square()  # noqa: E731
    assert torch.autograd.gradgradcheck(square, x, nondet_tol=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
def test_second_order_through_everything(channels, device):
    pipe = AugmentPipe(imgfilter=1, noise=1, cutout=1).to(device)
    pipe.p.fill_(0.5)
    images = noise(3, channels, 4, 4).to(device).requires_grad_()

    def augmented(x):
        return pipe(x, generator=torch.Generator().manual_seed(3)).square()

    assert (augmented(images) != images.square()).flatten(1).any(1).all()
    assert torch.autograd.gradcheck(augmented, images, fast_mode=True, nondet_tol=1e-12)
    assert torch.autograd.gradgradcheck(augmented, images, fast_mode=True, nondet_tol=1e-12)


def test_r1_through_the_pipe_equals_the_derivative_of_the_penalty():
    """A discriminator w·(x - x³/9) of augmented images, whose penalty is known by finite steps."""
    pipe = AugmentPipe()
    pipe.p.fill_(0.8)
    images, w = noise(2, 3, 6, 6), noise(3, 6, 6).requires_grad_()

    def penalty(w):
        real = images.clone().requires_grad_()
        x = pipe(real, generator=torch.Generator().manual_seed(1))
        logits = (w * (x - x.pow(3) / 9)).sum((1, 2, 3))
        (g,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
        return g.square().sum()

    (slope,) = torch.autograd.grad(penalty(w), w)
    step = 1e-5 * noise(3, 6, 6).sign()
    difference = (penalty(w + step) - penalty(w - step)).item() / 2
    assert abs((slope * step).sum().item() - difference) <= 1e-6 * abs(difference) + 1e-12


# Colours


def colored(*rgb: float) -> torch.Tensor:
    return torch.tensor(rgb, dtype=torch.float64)[None, :, None, None].expand(1, 3, 2, 3)


def after(pipe: AugmentPipe, percentile: float, *rgb: float) -> list[float]:
    return pipe(colored(*rgb), debug_percentile=percentile)[0, :, 1, 2].tolist()


def test_brightness():
    shift = 0.2 * math.sqrt(2) * torch.erfinv(torch.tensor(0.5, dtype=torch.float64)).item()
    result = after(only(brightness=1), 0.75, 0.5, -0.25, 0.0)
    assert result == pytest.approx([0.5 + shift, -0.25 + shift, shift])


def test_contrast():
    factor = 2 ** (0.5 * math.sqrt(2) * torch.erfinv(torch.tensor(-0.5).double()).item())
    result = after(only(contrast=1), 0.25, 0.5, -0.25, 0.125)
    assert result == pytest.approx([0.5 * factor, -0.25 * factor, 0.125 * factor])


def test_luma_flip():
    # The mean changes its sign, the differences stay.
    assert after(only(lumaflip=1), 0.9, 0.5, -0.25, 0.05) == pytest.approx([0.3, -0.45, -0.15])
    assert after(only(lumaflip=1), 0.1, 0.5, -0.25, 0.05) == [0.5, -0.25, 0.05]


def test_hue():
    # A third of a turn moves red to green, green to blue, blue to red.
    third = only(hue=1)
    assert after(third, 0.5 + 1 / 3, 0.5, -0.25, 0.125) == pytest.approx([0.125, 0.5, -0.25])
    assert after(third, 0.5 - 1 / 3, 0.5, -0.25, 0.125) == pytest.approx([-0.25, 0.125, 0.5])
    turned = after(only(hue=1), 0.6, 0.5, -0.25, 0.125)
    assert sum(turned) == pytest.approx(0.375)
    assert np.linalg.norm(turned) == pytest.approx(np.linalg.norm([0.5, -0.25, 0.125]))
    hue = colorsys.rgb_to_hsv(*after(only(hue=1), 0.5 + 1 / 6, 1, 0, 0))[0]
    assert hue == pytest.approx(1 / 6)


def test_saturation():
    factor = 2 ** (math.sqrt(2) * torch.erfinv(torch.tensor(0.8).double()).item())
    result = after(only(saturation=1), 0.9, 0.5, -0.25, 0.05)
    assert result == pytest.approx([0.1 + factor * d for d in (0.4, -0.35, -0.05)])
    gray = augment.recolor(colored(0.5, -0.25, 0.05), saturated(0.0))
    assert gray[0, :, 0, 0].tolist() == pytest.approx([0.1] * 3)


def saturated(strength: float) -> torch.Tensor:
    a, b = (1 + 2 * strength) / 3, (1 - strength) / 3
    return matrices([[a, b, b, 0], [b, a, b, 0], [b, b, a, 0], [0, 0, 0, 1]])


def test_gray_images_are_the_mean_of_what_becomes_of_their_gray():
    pipe = AugmentPipe(xflip=0, rotate90=0, xint=0, scale=0, rotate=0, aniso=0, xfrac=0)
    gray = noise(4, 1, 3, 5)
    result = pipe(gray, debug_percentile=0.8)
    expected = pipe(gray.expand(4, 3, 3, 5), debug_percentile=0.8).mean(1, keepdim=True)
    assert not torch.equal(result, gray)
    assert_matches(result, expected, reduction=9)


def test_only_chosen_images_change_color():
    images = noise(40, 3, 2, 2)
    changed = (only(0.5, hue=1)(images) != images).flatten(1).any(1)
    assert 0 < changed.sum() < 40


# Filters, noise, cutout


def test_bands_sum_to_one_and_keep_their_octave():
    bands = augment.BANDS
    reach = bands.shape[1] // 2
    delta = torch.zeros(bands.shape[1], dtype=torch.float64)
    delta[reach] = 1
    assert_matches(bands.sum(0), delta, reduction=16)
    assert torch.equal(bands, bands.flip(1)) or assert_matches(bands, bands.flip(1)) < 1
    angles = torch.tensor([0, 3 / 16, 3 / 8, 1]) * math.pi  # the middle of every octave
    positions = torch.arange(-reach, reach + 1)
    response = bands @ (angles.double() * positions[:, None]).cos()
    assert response.diag().min() > 0.7 and (response - response.diag().diag()).abs().max() < 0.3


def test_filter_amplifies_one_band_at_a_time():
    gains = matrices([1, 3, 0.5, 2])
    images = noise(1, 3, 6, 9)
    f = (gains @ augment.BANDS)[0].numpy()
    expected = images.numpy()
    for axis in (2, 3):  # scipy's mirror is numpy's reflect, and has no end
        expected = ndimage.correlate1d(expected, f, axis=axis, mode="mirror")
    assert_matches(augment.amplify(images, gains), torch.from_numpy(expected), reduction=43 * 43)


def test_band_gains_keep_the_expected_power():
    draw = augment.Draw(50, 1, {"imgfilter": 1})
    gains = augment.band_gains(draw)
    assert (gains > 0).all() and len(gains.unique()) > 100
    single = augment.Draw(1, 1, {"imgfilter": 1}, percentile=0.5 + 1e-9)
    np.testing.assert_allclose(augment.band_gains(single), np.ones((1, 4)), atol=1e-7)
    # Of one band: t = 2 there and 1 elsewhere, divided by the root of the expected power.
    steps = iter([0.0, 1.0, 0.0, 0.0])
    draw = type("One", (), {"n": 1, "__call__": lambda *_: torch.tensor([next(steps)]).double()})()
    expected = np.array([1, 2, 1, 1]) / math.sqrt((10 + 4 + 1 + 1) / 13)
    np.testing.assert_allclose(augment.band_gains(draw)[0], expected)


def test_noise_has_the_drawn_deviation():
    images = torch.zeros(2, 3, 60, 70)
    sigma = 0.1 * math.sqrt(2) * torch.erfinv(torch.tensor(0.8)).item()
    noisy = only(noise=1)(images, debug_percentile=0.8)
    assert not torch.equal(noisy[0], noisy[1])
    count = noisy.numel()
    assert abs(noisy.std().item() / sigma - 1) < 4 / math.sqrt(2 * count)
    assert abs(noisy.mean().item()) < 4 * sigma / math.sqrt(count)


def test_cutout_zeroes_a_rectangle():
    images = torch.ones(200, 3, 12, 20)
    result = only(cutout=1)(images)
    assert torch.equal(result[:, :1].expand(-1, 3, -1, -1), result)
    cut = result[:, 0] == 0
    assert ((result == 0) | (result == 1)).all()
    rows, columns = cut.any(2).sum(1), cut.any(1).sum(1)
    assert torch.equal(rows * columns, cut.sum((1, 2)))
    assert rows.max() == 6 and rows.min() >= 2 and columns.max() == 10 and columns.min() >= 4
    whole = (cut[:, [0, -1]].any(2).sum(1) == 0) & (cut[:, :, [0, -1]].any(1).sum(1) == 0)
    assert (rows[whole] == 6).all() and (columns[whole] == 10).all() and whole.sum() > 20
