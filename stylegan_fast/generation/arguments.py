"""What the commands of this package have in common on the command line."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .._commands import refused
from ..layers.synthesis import NOISE_MODES
from ..training.distributed import local_device
from ..training.metrics import MetricsUnavailableError
from . import networks, styles
from .networks import Generator

MOST_NUMBERS = 100_000
NOISE = "noise/"
"""Begins the names of noise maps in a file of latents."""

UNREADABLE = (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile)
"""What NumPy and PyTorch raise on files that are no .npz of arrays of numbers."""


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--network",
        metavar="FILE",
        required=True,
        help="a checkpoint of any known format, or the folder of a training run",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--outdir", metavar="FOLDER", required=True, help="where the files go")
    parser.add_argument("--class", dest="label", type=int, metavar="N", help="label of all images")


def add_latent_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", metavar="LIST", help="latents of these seeds, such as 0-3,7")
    parser.add_argument(
        "--latents", metavar="FILE", help="latents ws of an .npz file that a command here wrote"
    )
    parser.add_argument(
        "--psi", type=float, default=1, help="truncation: 1 is none, 0 the mean image (default: 1)"
    )
    parser.add_argument(
        "--cutoff", type=int, metavar="N", help="truncate the first N layers only (default: all)"
    )
    parser.add_argument(
        "--noise-mode",
        choices=NOISE_MODES,
        default="const",
        help="the noise of every layer: of the checkpoint, drawn from the seed, or absent",
    )


def reported(run: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], int]:
    """The command's exit status: 0, or 2 after one line on stderr about what the user can mend."""

    @wraps(run)
    def command(arguments: argparse.Namespace) -> int:
        try:
            run(arguments)
        except (ValueError, OSError, ModuleNotFoundError, MetricsUnavailableError) as error:
            return refused(arguments.command, error)
        return 0

    return command


def load_generator(arguments: argparse.Namespace) -> Generator:
    return networks.load(arguments.network, local_device(arguments.device))


def output_folder(arguments: argparse.Namespace) -> Path:
    folder = Path(arguments.outdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--outdir {folder}: {error.strerror}") from error
    return folder


def say_written(folder: Path, *names: str) -> None:
    print(f"{folder}: {', '.join(names)}")


def numbers(option: str, text: str) -> list[int]:
    """[0, 1, 2, 3, 7] of "0-3,7"; ValueError naming the option."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise ValueError(f"{option} {text!r} is not a list of numbers such as 0-3,7")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= MOST_NUMBERS:
            raise ValueError(
                f"{option} {text!r}: {part.strip()} is not a range that can be counted"
            )
        found += range(first, last + 1)
    return found


def layers(generator: Generator, text: str | None) -> list[int]:
    """The layers of --layers, by default all."""
    if text is None:
        return list(range(generator.num_ws))
    chosen = numbers("--layers", text)
    try:
        return styles.check_layers(generator, chosen)
    except ValueError as error:
        raise ValueError(f"--layers {text!r}: {error}") from error


def seeded(
    generator: Generator, arguments: argparse.Namespace, seeds: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """(z, ws) of seeds, ws not yet truncated."""
    z = styles.z_of_seeds(generator, seeds)
    with torch.no_grad():
        return z, generator.mapping(z, styles.labels(generator, len(z), arguments.label))


def latents(
    generator: Generator, arguments: argparse.Namespace
) -> tuple[list[int], Tensor | None, Tensor]:
    """(seeds, z, ws not yet truncated) of --seeds, or of --latents, numbered from 0 and without
    z."""
    if (arguments.seeds is None) == (arguments.latents is None):
        raise ValueError("choose latents by either --seeds LIST or --latents FILE")
    if arguments.seeds is not None:
        seeds = numbers("--seeds", arguments.seeds)
        return seeds, *seeded(generator, arguments, seeds)
    ws = read_latents(generator, arguments.latents)
    return list(range(len(ws))), None, ws


def read_latents(generator: Generator, path: str) -> Tensor:
    """ws [N, num_ws, w_dim] of an .npz file, whose noise maps replace the generator's."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {
                name: torch.from_numpy(file[name])
                for name in file.files
                if name == "ws" or name.startswith(NOISE)
            }
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or "it is no .npz file of arrays"
        raise ValueError(f"--latents {path}: {reason}") from error
    ws = arrays.get("ws")
    shape = (generator.num_ws, generator.w_dim)
    if ws is None or ws.ndim != 3 or ws.shape[1:] != shape or not len(ws):
        got = "no ws" if ws is None else f"ws of shape {list(ws.shape)}"
        raise ValueError(
            f"--latents {path} holds {got}, not ws of shape [N, {shape[0]}, {shape[1]}]"
        )
    buffers = dict(generator.synthesis.named_buffers())
    del arrays["ws"]
    for name, noise in arrays.items():
        buffer = buffers.get(name.removeprefix(NOISE))
        if buffer is None or buffer.shape != noise.shape:
            raise ValueError(f"--latents {path}: {name} is no noise map of this network")
        buffer.copy_(noise)
    return ws.to(generator.mapping.w_avg)
