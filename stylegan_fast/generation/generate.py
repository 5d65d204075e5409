"""`python -m stylegan_fast generate`: images, matrices of mixed styles, ways in latent space."""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch
from torch import Tensor

from . import styles
from .arguments import (
    add_image_arguments,
    add_latent_arguments,
    add_network_arguments,
    latents,
    layers,
    load_generator,
    numbers,
    output_folder,
    reported,
    say_written,
    seeded,
)
from .images import grid, render, save_latents, save_png, save_video
from .networks import Generator

SPACES = ("z", "w", "w+")
EPILOG = """
Without --mix and --interpolate: seedSEED.png for each seed, and all of them in grid.png. Latents go
to latents.npz, which --latents reads.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add_network_arguments(parser)
    add_image_arguments(parser)
    add_latent_arguments(parser)
    parser.add_argument(
        "--mix",
        metavar="LIST",
        help="write mix.png, the latents in rows, these seeds in columns: each image has the "
        "column's style in --layers and the row's in the others",
    )
    parser.add_argument(
        "--layers", metavar="LIST", help="of --mix and of --space w+, such as 0-3 (default: all)"
    )
    parser.add_argument(
        "--interpolate",
        choices=styles.PATHS,
        help="write interpolation.gif or .mp4, a way from latent to latent and back to the first",
    )
    parser.add_argument(
        "--space",
        choices=SPACES,
        default="w",
        help="where the way leads: z, w, or w+, in which only --layers move (default: w)",
    )
    parser.add_argument(
        "--frames", type=int, default=30, help="from one latent to the next (default: 30)"
    )
    parser.add_argument("--fps", type=float, default=30, help="frames a second (default: 30)")
    parser.add_argument("--format", choices=["gif", "mp4"], default="gif", help="default: gif")
    parser.add_argument("--no-loop", action="store_true", help="end at the last latent")
    parser.add_argument(
        "--translate",
        metavar="X,Y",
        help="StyleGAN3: move the images right and down, 1 being their width (--translate=-0.5,0)",
    )
    parser.add_argument(
        "--rotate",
        type=float,
        metavar="DEGREES",
        help="StyleGAN3: turn the images counter-clockwise about their centre, before they move",
    )


@reported
def run(arguments: argparse.Namespace) -> None:
    if arguments.mix is not None and arguments.interpolate is not None:
        raise ValueError("choose one of --mix and --interpolate")
    if arguments.layers is not None and arguments.mix is None and arguments.space != "w+":
        raise ValueError("--layers needs --mix or --space w+")
    if arguments.frames < 1 or not 0 < arguments.fps <= 1000:
        raise ValueError(
            f"--frames {arguments.frames} --fps {arguments.fps:g}: both must be positive"
        )
    generator = load_generator(arguments)
    if arguments.translate is not None or arguments.rotate is not None:
        styles.move(generator, _pair("--translate", arguments.translate), arguments.rotate or 0)
    seeds, z, ws = latents(generator, arguments)
    if arguments.mix is not None:
        _mix(generator, arguments, seeds, ws)
    elif arguments.interpolate is not None:
        _interpolate(generator, arguments, z, ws)
    else:
        _images(generator, arguments, seeds, z, ws)


def _images(
    generator: Generator,
    arguments: argparse.Namespace,
    seeds: list[int],
    z: Tensor | None,
    ws: Tensor,
) -> None:
    ws = styles.truncate(generator, ws, arguments.psi, arguments.cutoff)
    folder = output_folder(arguments)
    name = "seed" if arguments.latents is None else "latent"
    pixels = []
    for seed, image in zip(seeds, render(generator, ws, arguments.noise_mode, seeds)):
        save_png(folder / f"{name}{seed:04d}.png", image)
        pixels.append(image)
    names = [f"{len(pixels)} image{'s' * (len(pixels) > 1)} {name}NUMBER.png", "latents.npz"]
    if len(pixels) > 1:
        save_png(folder / "grid.png", grid(np.stack(pixels), columns=_square(len(pixels))))
        names.insert(1, "grid.png")
    save_latents(folder / "latents.npz", seeds=seeds, z=z, ws=ws)
    say_written(folder, *names)


def _mix(
    generator: Generator, arguments: argparse.Namespace, seeds: list[int], rows: Tensor
) -> None:
    """A first row and column of what is mixed, and the mixtures."""
    mixed = layers(generator, arguments.layers)
    column_seeds = numbers("--mix", arguments.mix)
    _, columns = seeded(generator, arguments, column_seeds)
    rows, columns = (
        styles.truncate(generator, ws, arguments.psi, arguments.cutoff) for ws in (rows, columns)
    )
    folder = output_folder(arguments)
    noise_mode = arguments.noise_mode
    top = np.stack(list(render(generator, columns, noise_mode)))
    cells = [np.zeros_like(top[:1]), top]
    mixtures = []
    for row in rows.split(1):
        ws = styles.mix(generator, row.expand_as(columns), columns, mixed)
        mixtures.append(ws)
        cells += [np.stack(list(render(generator, part, noise_mode))) for part in (row, ws)]
    save_png(folder / "mix.png", grid(np.concatenate(cells), columns=len(columns) + 1))
    save_latents(
        folder / "latents.npz",
        seeds=seeds,
        mix=column_seeds,
        layers=mixed,
        ws=torch.cat(mixtures),
    )
    say_written(folder, "mix.png", "latents.npz")


def _interpolate(
    generator: Generator, arguments: argparse.Namespace, z: Tensor | None, ws: Tensor
) -> None:
    def way(keys: Tensor) -> Tensor:
        loop = not arguments.no_loop
        return styles.interpolate(keys, arguments.frames, arguments.interpolate, loop)

    if arguments.space == "z":
        if z is None:
            raise ValueError("--space z needs --seeds")
        z = way(z)
        ws = generator.mapping(z, styles.labels(generator, len(z), arguments.label))
    elif arguments.space == "w":
        ws = way(ws)
    else:
        moving = way(ws)
        still = ws[:1].expand_as(moving)
        ws = styles.mix(generator, still, moving, layers(generator, arguments.layers))
    ws = styles.truncate(generator, ws, arguments.psi, arguments.cutoff)
    folder = output_folder(arguments)
    frames = render(generator, ws, arguments.noise_mode)
    film = f"interpolation.{arguments.format}"
    save_video(folder / film, frames, arguments.fps)
    save_latents(folder / "latents.npz", ws=ws)
    say_written(folder, film, "latents.npz")


def _pair(option: str, text: str | None) -> tuple[float, float]:
    """(0.3, 1) of "0.3,1"; ValueError naming the option."""
    try:
        x, y = map(float, (text or "0,0").split(","))
    except ValueError:
        raise ValueError(f"{option} {text!r} is not two numbers such as 0.3,1") from None
    return x, y


def _square(count: int) -> int:
    """Columns of a grid that is about a square."""
    return math.ceil(math.sqrt(count))
