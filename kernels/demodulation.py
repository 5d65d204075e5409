"""The demodulation coefficients in one kernel; csrc/demodulation.h states the contract.

    energy[o, i] = sum over taps of weight[o, i, tap]^2
    d[n, o] = (sum over i of styles[n, i]^2 * energy[o, i] + eps)^-1/2

A program takes an output and up to 16 samples, and walks along the channels.
"""

import torch
import triton
import triton.language as tl

_TILE = 2048  # numbers of the weight: 16 for each thread of the default 4 warps
_MOST_CHANNELS = 256
_MOST_SAMPLES = 16


# The sizes differ from layer to layer; specialising on them would compile each layer anew.
@triton.jit(do_not_specialize=["samples", "outputs", "channels", "taps"])
def demodulation_kernel(
    weight, styles, energy, d, eps, samples, outputs, channels, taps,
    CHANNELS_LAST: tl.constexpr, ALIGNED: tl.constexpr, SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    if ALIGNED:  # tells the compiler that every row starts a pack
        channels = channels // 8 * 8
    output = tl.program_id(0).to(tl.int64)
    weight += output * channels * taps
    energy += output * channels
    sample = tl.program_id(1).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    tap = tl.arange(0, TAPS)[None, :]
    total = tl.zeros([SAMPLES], weight.dtype.element_ty)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        is_channel = channel < channels
        if CHANNELS_LAST:
            place = tap * channels + channel[:, None]
        else:
            place = channel[:, None] * taps + tap
        w = tl.load(weight + place, is_channel[:, None] & (tap < taps), 0)
        squares = tl.sum(w * w, 1)
        if tl.program_id(1) == 0:
            tl.store(energy + channel, squares, is_channel)
        inside = (sample < samples)[:, None] & is_channel[None, :]
        s = tl.load(styles + sample[:, None] * channels + channel[None, :], inside, 0)
        total += tl.sum(s * s * squares[None, :], 1)
    tl.store(d + sample * outputs + output, 1 / tl.sqrt(total + eps), sample < samples)


def demodulation(
    weight: torch.Tensor, styles: torch.Tensor, energy: torch.Tensor, d: torch.Tensor, eps: float
) -> None:
    outputs, channels, *kernel_size = weight.shape
    samples, taps = styles.shape[0], kernel_size[0] * kernel_size[1]
    tile_taps = triton.next_power_of_2(taps)
    tile_samples = min(max(triton.next_power_of_2(samples), 1), _MOST_SAMPLES)
    tile_channels = min(
        triton.next_power_of_2(channels), max(_TILE // tile_taps, 1), _MOST_CHANNELS
    )
    grid = outputs, max(triton.cdiv(samples, tile_samples), 1)
    channels_last = taps == 1 or not weight.is_contiguous()
    demodulation_kernel[grid](
        weight, styles, energy, d, eps, samples, outputs, channels, taps,
        channels_last, channels % 8 == 0, tile_samples, tile_channels, tile_taps,
    )  # fmt: skip
