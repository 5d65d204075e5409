"""Photographs, and how they look resampled, beside scipy's resampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..ops import upfirdn2d
from .cases import PHOTOGRAPH_VARIANTS, Case
from .gate import Expected
from .upfirdn2d import VARIANTS, Variant, fir_flops, stock
from .workload import Provider, Session, candidates

NAMES = ("astronaut", "chelsea", "coffee", "rocket")
"""Colour photographs inside scikit-image's wheel."""

STRIP = "resampled.png"
TILE = 128
AMPLIFICATION = 4e6

CAPTIONS = {
    STRIP: f"The middle {TILE} × {TILE} pixels of resampled photographs; from left to right "
    f"{', '.join(PHOTOGRAPH_VARIANTS)}; from top to bottom stylegan_fast, scipy.signal.upfirdn, "
    f"and the difference of the two, {AMPLIFICATION:,.0f} times as large.",
}
"""Of the images that a file name does not explain."""


def photographs() -> list[Tensor]:
    """uint8 images [3, H, W]. ImportError without scikit-image."""
    import skimage.data

    images = [getattr(skimage.data, name)() for name in NAMES]
    return [torch.from_numpy(image).permute(2, 0, 1) for image in images]


def crops(images: list[Tensor], count: int, size: int = 64) -> Tensor:
    """[count, 3, size, size] in [-1, 1], from the images in turn, at random places (seed 0)."""
    generator = torch.Generator().manual_seed(0)
    taken = []
    for index in range(count):
        image = images[index % len(images)]
        top, left = (
            int(torch.randint(extent - size + 1, [], generator=generator))
            for extent in image.shape[1:]
        )
        taken.append(image[:, top : top + size, left : left + size])
    return torch.stack(taken).float() / 127.5 - 1


def _middle(image: Tensor, size: int) -> Tensor:
    top, left = ((extent - size) // 2 for extent in image.shape[1:])
    return image[:, top : top + size, left : left + size]


def save(image: Tensor, path: Path) -> None:
    """[3, H, W] in [-1, 1] -> a PNG."""
    from PIL import Image

    pixels = ((image.cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)


def scipy_upfirdn2d(x: Tensor, variant: Variant) -> Tensor:
    """The variant by scipy.signal.upfirdn, in float64. Of f, only a row times a column will do."""
    import scipy.signal

    fir, f = variant.fir, variant.f.double()
    row, column = (f, f) if f.ndim == 1 else (f.sum(0), f.sum(1))  # of sum 1
    height, width = fir.output_size(x.shape[2], x.shape[3], variant.taps)
    y = x.double().numpy()
    for axis, g, up, down, before, size in (
        (3, row, fir.up_x, fir.down_x, fir.x0, width),
        (2, column, fir.up_y, fir.down_y, fir.y0, height),
    ):
        g = g.flip(0) if fir.flip_filter else g
        # scipy starts at the first sample the filter reaches, we `before` samples before the image.
        start = len(g) - 1 - before
        y = scipy.signal.upfirdn(g.numpy(), y, up, 1, axis=axis)
        y = y.take(range(start, start + down * size, down), axis=axis)
    return torch.from_numpy(y) * fir.gain


class Photographs:
    """Photographs resampled in every way of PHOTOGRAPH_VARIANTS, gated against scipy."""

    baseline = "stock"
    arithmetic = torch.float32

    def __init__(self, case: Case, session: Session) -> None:
        self.session = session
        n, _, size, _ = case.shape
        x = torch.stack([_middle(image, size) for image in photographs()[:n]]).float() / 127.5 - 1
        self.scipy = [scipy_upfirdn2d(x, VARIANTS[name]) for name in PHOTOGRAPH_VARIANTS]
        self.x = x.to(session.device)
        self.variants = [
            VARIANTS[name]._replace(f=VARIANTS[name].f.to(session.device))
            for name in PHOTOGRAPH_VARIANTS
        ]
        self.bytes = sum(
            4 * (x.numel() + y.numel() + variant.f.numel())
            for y, variant in zip(self.scipy, self.variants)
        )
        self.flops = sum(fir_flops(variant, case.shape) for variant in self.variants)
        save(self._strip(), session.folder / STRIP)
        self.images = STRIP

    def copy(self) -> Callable[[], object]:
        source = self.x.new_zeros(self.bytes // 8)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def copied_bytes(self) -> int:
        return self.bytes // 8 * 8

    def expected(self) -> list[Expected]:
        return [
            Expected(name, y.to(self.session.device), variant.terms)
            for name, y, variant in zip(PHOTOGRAPH_VARIANTS, self.scipy, self.variants)
        ]

    def providers(self) -> Iterator[Provider]:
        yield Provider("stock", lambda: [stock(self.x, v.f, v.fir) for v in self.variants])
        for name in candidates("upfirdn2d", self.session.device.type, torch.float32):
            yield Provider(name, self._call(name))

    def _call(self, backend: str | None) -> Callable[[], list[Tensor]]:
        return lambda: [v.run(upfirdn2d, self.x, v.f, backend=backend) for v in self.variants]

    def _strip(self) -> Tensor:
        """A column a variant, each of another photograph: ours, scipy's, the difference."""
        columns = []
        for index, (ours, scipy) in enumerate(zip(self._call(None)(), self.scipy)):
            image = index % len(ours)
            left, right = (_middle(t[image].cpu().double(), TILE) for t in (ours, scipy))
            difference = (left - right).abs() * AMPLIFICATION - 1  # black where they agree
            columns.append(torch.cat([left, right, difference], 1))
        return torch.cat(columns, 2)
