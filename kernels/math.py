"""Elementary functions out of tl.exp and tl.log, which every target and the interpreter have.

To the error of those they add about two units in the last place of the result, however small it
is, in float32 and float64; NaN propagates. (A GPU's float32 tl.exp has an error that grows with
|x|, so only differences near 0 are made good here.)
"""

import triton
import triton.language as tl


@triton.jit
def square(x):
    return x * x


@triton.jit
def expm1(x):
    """exp(x) - 1: the Taylor series where that difference would cancel."""
    TERMS: tl.constexpr = 14 if x.dtype == tl.float64 else 7
    series = x * (1 / (TERMS + 1)) + 1
    for n in tl.static_range(TERMS, 1, -1):
        series = series * x * (1 / n) + 1
    return tl.where(tl.abs(x) < 0.5, series * x, tl.exp(x) - 1)


@triton.jit
def log1p(x):
    """log(1 + x): as 2 artanh(x / (2 + x)), a series of odd powers, where 1 + x loses digits."""
    TERMS: tl.constexpr = 16 if x.dtype == tl.float64 else 6
    twice = x / (1 + 0.5 * x)
    z = 0.25 * twice * twice
    series = z * (1 / (2 * TERMS + 1)) + 1 / (2 * TERMS - 1)
    for n in tl.static_range(TERMS - 1, 0, -1):
        series = series * z + 1 / (2 * n - 1)
    return tl.where((x > -0.5) & (x < 1), series * twice, tl.log(1 + x))


@triton.jit
def tanh(x):
    decay = expm1(-2 * tl.abs(x))
    magnitude = -decay / (2 + decay)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))
