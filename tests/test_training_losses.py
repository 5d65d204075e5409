"""Losses, penalties and averages of training against their formulas."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy

from stylegan_fast.models import stylegan2
from stylegan_fast.testing import assert_matches
from stylegan_fast.training.ema import ema_beta, update_ema
from stylegan_fast.training.losses import LOSSES
from stylegan_fast.training.regularizers import lazy_adam, path_length_penalty, r1_penalty

REAL = torch.tensor([[-1.5], [0.25], [3.0]])
FAKE = torch.tensor([[0.75], [-2.0], [0.0]])


def cross_entropy(logits, label):
    probability = logits.double().sigmoid()
    return binary_cross_entropy(probability, torch.full_like(probability, label))


EXPECTED = {
    "logistic": (cross_entropy(REAL, 1) + cross_entropy(FAKE, 0), cross_entropy(FAKE, 1)),
    "minimax": (cross_entropy(REAL, 1) + cross_entropy(FAKE, 0), -cross_entropy(FAKE, 0)),
    # (2.5 + 0.75 + 0)/3 + (1.75 + 0 + 1)/3 and -(0.75 - 2 + 0)/3
    "hinge": (torch.tensor(2.0).double(), torch.tensor(1.25 / 3).double()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_their_formulas(name):
    d_expected, g_expected = EXPECTED[name]
    assert_matches(LOSSES[name].d_loss(REAL, FAKE), d_expected, reduction=6, name="d_loss")
    assert_matches(LOSSES[name].g_loss(FAKE), g_expected, reduction=3, name="g_loss")


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_huge_logits_are_finite_and_have_gradients(name):
    huge = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    losses = LOSSES[name].d_loss(huge, huge), LOSSES[name].g_loss(huge)
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss, huge)
        assert loss.isfinite() and gradient.isfinite().all() and gradient.any()


def test_r1_of_a_quadratic_discriminator():
    """D(x) = ½ Σ a x² has the gradient a x: R1 = γ/2 · a² · mean ‖x‖², ∂R1/∂a = 2/a · R1."""
    images = torch.randn(3, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    penalty = r1_penalty(images, (a / 2 * images.square()).sum([1, 2, 3])[:, None], gamma=3)
    (by_a,) = torch.autograd.grad(penalty, a)
    expected = 1.5 * 0.49 * images.detach().square().sum() / 3
    assert_matches(penalty, expected, reduction=40)
    assert_matches(by_a, 2 / 0.7 * expected, reduction=40)


def test_r1_reaches_every_weight_of_a_discriminator():
    """Nothing of the second derivative is skipped with the first's weight gradients."""
    d = stylegan2.Discriminator(0, 8, 3, channel_base=64, channel_max=8).double()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    penalty = r1_penalty(images, d(images), gamma=2)
    (plain,) = torch.autograd.grad(d(images).sum(), images, create_graph=True)
    expected = plain.square().sum([1, 2, 3]).mean()
    assert_matches(penalty, expected.detach(), reduction=192)
    parameters = [p for name, p in d.named_parameters() if name.endswith("weight")]
    for actual, wanted in zip(
        torch.autograd.grad(penalty, parameters), torch.autograd.grad(expected, parameters)
    ):
        assert wanted.any()
        assert_matches(actual, wanted, reduction=4 * 3 * 8 * 8)


def test_path_length_of_a_linear_synthesis():
    """synthesis(ws) = s · (w₀ + 2 w₁) as an image: Jᵀy = (s y, 2 s y), ℓ = s ‖y‖ √(5/2)."""
    n, h, w = 3, 4, 5
    s = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    ws = torch.randn(n, 2, h * w, dtype=torch.float64, requires_grad=True)
    before = torch.tensor(0.25, dtype=torch.float64)

    torch.manual_seed(1)
    penalty, mean = path_length_penalty(
        lambda ws: s * (ws[:, 0] + 2 * ws[:, 1]).reshape(n, 1, h, w), ws, before, 2, 0.01
    )
    torch.manual_seed(1)
    y = torch.randn(n, 1, h, w, dtype=torch.float64) / math.sqrt(h * w)
    lengths = 1.5 * y.square().sum([1, 2, 3]).sqrt() * math.sqrt(2.5)
    expected_mean = 0.99 * before + 0.01 * lengths.mean()
    assert_matches(mean, expected_mean, reduction=h * w)
    assert_matches(penalty, 2 * (lengths - expected_mean).square().mean(), reduction=h * w)
    (by_s,) = torch.autograd.grad(penalty, s)
    expected = (4 * (lengths - expected_mean) * lengths / 1.5).mean()
    assert_matches(by_s, expected, reduction=h * w)


def test_lazy_adam_scales_rate_and_decays():
    lazy = lazy_adam(0.002, (0.5, 0.99), 4)
    assert lazy["lr"] == pytest.approx(0.0016)
    assert lazy["betas"] == pytest.approx((0.5**0.8, 0.99**0.8))
    assert lazy_adam(0.002, (0.5, 0.99), 1) == {"lr": 0.002, "betas": (0.5, 0.99)}


def test_ema_halves_in_its_half_life_and_ramps_up():
    assert ema_beta(32, 64, 10**6, None) == pytest.approx(0.5**0.5)
    assert ema_beta(32, 64, 640, 0.05) == pytest.approx(0.5)
    assert ema_beta(32, 64, 0, 0.05) == 0
    assert ema_beta(32, 0, 100, None) == 0


def test_ema_averages_parameters_and_copies_buffers():
    average, network = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    network.weight.data = torch.tensor([3.0, 5.0, 9.0])
    network.running_mean.fill_(7)
    update_ema(average, network, 0.75)
    assert average.weight.tolist() == [1.5, 2.0, 3.0]
    assert average.running_mean.tolist() == [7, 7, 7]
    update_ema(average, network, 0)
    assert average.weight.tolist() == [3, 5, 9]
