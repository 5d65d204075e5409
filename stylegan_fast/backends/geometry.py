"""How a dense tensor looks in memory order to an epilogue kernel (mirrors csrc/epilogue.h)."""

from __future__ import annotations

from typing import NamedTuple


class Geometry(NamedTuple):
    """Element i of the buffer is (outer_index * channels + c) * inner + inner_index.

    NCHW: outer = N, inner = H*W. NHWC: outer = N*H*W, inner = 1. `pixels` is the number of pixels
    of a sample, for the per-sample scale and noise.
    """

    outer: int
    channels: int
    inner: int
    pixels: int

    @property
    def numel(self) -> int:
        return self.outer * self.channels * self.inner
