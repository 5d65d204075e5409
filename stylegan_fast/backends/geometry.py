"""What a kernel is told besides its tensors (mirrors csrc/epilogue.h and csrc/upfirdn2d.h)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Geometry(NamedTuple):
    """How a dense tensor looks in memory order: element i of it is
    (outer_index * channels + c) * inner + inner_index.

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


class Fir(NamedTuple):
    """Zero-stuff, pad or crop, filter, decimate: all of upfirdn2d but its tensors."""

    up_x: int
    up_y: int
    down_x: int
    down_y: int
    x0: int
    x1: int
    y0: int
    y1: int
    flip_filter: bool
    gain: float

    @classmethod
    def of(
        cls,
        up: Sequence[int],
        down: Sequence[int],
        padding: Sequence[int],
        flip_filter: bool,
        gain: float,
    ) -> Fir:
        """From the arguments of upfirdn2d."""
        (up_x, up_y), (down_x, down_y), (x0, x1, y0, y1) = up, down, padding
        return cls(up_x, up_y, down_x, down_y, x0, x1, y0, y1, flip_filter, gain)

    def arguments(self) -> tuple[list[int], list[int], list[int], bool, float]:
        """up, down, padding, flip_filter and gain of upfirdn2d."""
        return (
            [self.up_x, self.up_y],
            [self.down_x, self.down_y],
            [self.x0, self.x1, self.y0, self.y1],
            self.flip_filter,
            self.gain,
        )

    def output_size(self, height: int, width: int, taps: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of the result; taps is the size (fw, fh) of the filter."""
        fw, fh = taps
        return (
            (height * self.up_y + self.y0 + self.y1 - fh) // self.down_y + 1,
            (width * self.up_x + self.x0 + self.x1 - fw) // self.down_x + 1,
        )

    def adjoint(self, height: int, width: int, taps: tuple[int, int]) -> Fir:
        """The transposed operator of the one from an image of this size: of the same kind."""
        fw, fh = taps
        out_height, out_width = self.output_size(height, width, taps)
        return Fir(
            up_x=self.down_x,
            up_y=self.down_y,
            down_x=self.up_x,
            down_y=self.up_y,
            x0=fw - self.x0 - 1,
            x1=width * self.up_x - out_width * self.down_x + self.x0 - self.up_x + 1,
            y0=fh - self.y0 - 1,
            y1=height * self.up_y - out_height * self.down_y + self.y0 - self.up_y + 1,
            flip_filter=not self.flip_filter,
            gain=self.gain,
        )


class Tail(NamedTuple):
    """An epilogue: its operands in the types and layouts the kernels take, and its constants."""

    scale: torch.Tensor | None  # [N, C], accumulation type
    noise: torch.Tensor | None  # [pixels] or [N, pixels], accumulation type
    strength: torch.Tensor | None  # [1], accumulation type
    b: torch.Tensor | None  # [C], type of the image
    act: int
    alpha: float
    gain: float
    clamp: float


class FilteredLrelu(NamedTuple):
    """filtered_lrelu, all but its tensors (csrc/filtered_lrelu.h)."""

    up: int
    down: int
    x0: int  # padding: left
    y0: int  # top
    flip_filter: bool
    gain: float
    slope: float
    clamp: float
    sign_height: int
    sign_width: int
    sign_x: int = 0
    sign_y: int = 0

    def transposed(self, up_taps: tuple[int, int], down_taps: tuple[int, int]) -> FilteredLrelu:
        """The transpose of `masked`, which takes the filters in turn; taps are (fw, fh)."""
        return self._replace(
            up=self.down,
            down=self.up,
            x0=up_taps[0] + down_taps[0] - 2 - self.x0,
            y0=up_taps[1] + down_taps[1] - 2 - self.y0,
            flip_filter=not self.flip_filter,
            sign_x=self.sign_x + self.x0 - up_taps[0] + 1,
            sign_y=self.sign_y + self.y0 - up_taps[1] + 1,
        )
