"""8-bit pixels of what a generator gives, what it is shown of pixels, and grids of them."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def quantized(images: Tensor) -> Tensor:
    """⌊127.5 x + 128⌋ between 0 and 255, uint8, of images x in [-1, 1] of any shape."""
    return (images.detach().float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def scaled(pixels: Tensor) -> Tensor:
    """x / 127.5 - 1, float32, of pixels x from 0 to 255 of any shape."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> np.ndarray:
    """`quantized` pixels [N, H, W, C] of images [N, C, H, W]; ValueError unless C is 1 or 3."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, got images.shape={tuple(images.shape)}")
    return quantized(images).permute(0, 2, 3, 1).cpu().numpy()


def grid(pixels: np.ndarray, columns: int) -> np.ndarray:
    """[R·H, columns·W, C]: images [N, H, W, C] row by row, black where the last row ends early.
    ValueError without an image or a column."""
    if columns < 1 or not len(pixels):
        raise ValueError(f"a grid needs an image and a column, got {len(pixels)} and {columns=}")
    count, height, width, channels = pixels.shape
    rows = -(-count // columns)
    cells = np.zeros((rows * columns, height, width, channels), np.uint8)
    cells[:count] = pixels
    cells = cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return cells.reshape(rows * height, columns * width, channels)


def picture(pixels: np.ndarray) -> Image.Image:
    """Pixels [H, W, C] as Pillow has them."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
