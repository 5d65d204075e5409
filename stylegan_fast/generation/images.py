"""Images as files: PNG, GIF and MP4."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..training import data
from ..training.pictures import grid, picture, scaled, to_uint8
from .networks import Generator

__all__ = [
    "grid", "picture", "read_image", "render", "save_latents", "save_png", "save_video", "to_uint8",
]  # fmt: skip
VIDEOS = (".gif", ".mp4")


@torch.no_grad()
def render(
    generator: Generator, ws: Tensor, noise_mode: str = "const", seeds: Sequence[int] | None = None
) -> Iterator[np.ndarray]:
    """Pixels [H, W, C] of every ws[n], one after the other, so that none depends on the others.
    Random noise is drawn from seeds[n], by default from 0 for all."""
    for index, row in enumerate(ws.split(1)):
        with torch.random.fork_rng():
            torch.manual_seed(0 if seeds is None else seeds[index])
            image = generator.synthesis(row, noise_mode=noise_mode)
        yield to_uint8(image)[0]


def save_png(path: str | os.PathLike[str], pixels: np.ndarray) -> None:
    picture(pixels).save(path, format="PNG")


def save_video(path: str | os.PathLike[str], frames: Iterable[np.ndarray], fps: float = 30) -> None:
    """Frames uint8 [H, W, C] as a GIF that repeats, or as H.264, by the name's ending; ValueError
    for another ending, or where ffmpeg is missing or fails."""
    path = Path(path)
    if path.suffix == ".gif":
        pictures = [picture(frame) for frame in frames]
        duration = max(round(1000 / fps), 20)  # players slow shorter ones down
        pictures[0].save(
            path, format="GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0
        )
    elif path.suffix == ".mp4":
        _save_mp4(path, frames, fps)
    else:
        raise ValueError(f"{path}: the name of a video ends with {' or '.join(VIDEOS)}")


def _save_mp4(path: Path, frames: Iterable[np.ndarray], fps: float) -> None:
    try:
        import imageio_ffmpeg

        ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    except (ModuleNotFoundError, RuntimeError) as error:
        raise ValueError(
            f"{path}: {error}; pip install 'stylegan_fast[train]' brings it, .gif needs nothing"
        ) from error
    frames = iter(frames)
    first = next(frames)
    height, width = first.shape[:2]
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps)]
    h264 = ["-c:v", "libx264", "-crf", "18", "-pix_fmt", "yuv420p", str(path.absolute())]
    with subprocess.Popen(
        [ffmpeg, "-y", "-loglevel", "error", *raw, "-i", "-", *h264],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # its last words say why
            for frame in (first, *frames):
                process.stdin.write(np.broadcast_to(frame, (height, width, 3)).tobytes())
        _, words = process.communicate()
    if process.returncode != 0:
        reason = words.decode(errors="replace").strip().rpartition("\n")[2]
        raise ValueError(f"{path} cannot be written: {reason or 'ffmpeg failed'}")


def read_image(path: str | os.PathLike[str], resolution: int, channels: int) -> Tensor:
    """[1, channels, resolution, resolution] in [-1, 1]: an image as training would see it, its
    middle square resized.

    ValueError, naming the file, if it is no image.
    """
    try:
        with Image.open(path, formats=data.FORMATS) as image:
            pixels = data.pixels(image, resolution, channels)
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        reason = getattr(error, "strerror", None) or "it is no image that can be read"
        raise ValueError(f"{path}: {reason}") from error
    x = torch.tensor(pixels).reshape(1, resolution, resolution, channels)
    return scaled(x.permute(0, 3, 1, 2))


def save_latents(path: str | os.PathLike[str], **arrays: Tensor | Sequence | None) -> None:
    """An .npz file of what is not None."""
    plain: dict[str, Any] = {
        name: value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        for name, value in arrays.items()
        if value is not None
    }
    np.savez(path, **plain)
