"""adain out of PyTorch's own operators."""

from __future__ import annotations

import torch

from .bias_act import bias_act


def adain(
    x: torch.Tensor,
    styles: torch.Tensor,
    eps: float = 1e-8,
    noise: torch.Tensor | None = None,
    noise_strength: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> torch.Tensor:
    """See `stylegan_fast.ops.adain`."""
    v = widened(x, noise, noise_strength)
    b = None if b is None else b.to(v.dtype)
    return styled(bias_act(v, b, 1, act, alpha, gain, clamp), styles, eps).to(x.dtype)


def widened(
    x: torch.Tensor, noise: torch.Tensor | None, noise_strength: torch.Tensor | None
) -> torch.Tensor:
    """x + noise_strength * noise in float32 at least."""
    v = x if x.dtype == torch.float64 else x.float()
    if noise is None:
        return v
    noise = noise.to(v.dtype)
    if noise_strength is not None:
        noise = noise * noise_strength.to(v.dtype).reshape(-1, 1, 1)
    return v + noise


def styled(u: torch.Tensor, styles: torch.Tensor, eps: float) -> torch.Tensor:
    """The planes of u with the variance 1, or 0 where they are constant, scaled and shifted."""
    # The mean of equal numbers is rounded; of zeros it is not.
    u = u - u[:, :, :1, :1].detach()
    u = u - u.mean((2, 3), keepdim=True)
    rstd = (u.square().mean((2, 3), keepdim=True) + eps).rsqrt()
    scale, shift = styles.to(u.dtype)[:, :, None, None].chunk(2, 1)
    return (scale + 1) * rstd * u + shift
