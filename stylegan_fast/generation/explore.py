"""`python -m stylegan_fast explore`: images changed along the directions of SeFa or GANSpace."""

from __future__ import annotations

import argparse

import numpy as np
import torch

from .._checks import check_number
from . import directions, styles
from .arguments import (
    add_image_arguments,
    add_latent_arguments,
    add_network_arguments,
    latents,
    layers,
    load_generator,
    output_folder,
    reported,
    say_written,
)
from .images import grid, render, save_latents, save_png, save_video

EPILOG = """
Writes direction-K.png for each direction, the latents in rows, the strengths in columns, and
directions.npz.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add_network_arguments(parser)
    add_image_arguments(parser)
    add_latent_arguments(parser)
    parser.add_argument(
        "--method",
        choices=directions.METHODS,
        default="sefa",
        help="sefa: eigenvectors of the style weights; pca: principal components of w, as GANSpace "
        "(default: sefa)",
    )
    parser.add_argument("--count", type=int, default=5, help="of the directions (default: 5)")
    parser.add_argument(
        "--layers",
        metavar="LIST",
        help="that change, and whose weights SeFa looks at, such as 0-3 (default: all)",
    )
    parser.add_argument(
        "--range",
        type=float,
        default=3,
        help="largest strength, in standard deviations of w (default: 3)",
    )
    parser.add_argument("--steps", type=int, default=7, help="strengths (default: 7)")
    parser.add_argument(
        "--samples", type=int, default=10000, help="w that the statistics are of (default: 10000)"
    )
    parser.add_argument(
        "--format",
        choices=["png", "gif", "mp4"],
        default="png",
        help="gif, mp4: films from one end to the other and back instead (default: png)",
    )
    parser.add_argument("--fps", type=float, default=10, help="frames a second (default: 10)")


@reported
def run(arguments: argparse.Namespace) -> None:
    check_number("--range", arguments.range)
    if arguments.steps < 2 or not 0 < arguments.fps <= 1000:
        raise ValueError(
            f"--steps {arguments.steps} --fps {arguments.fps:g}: at least 2 and positive"
        )
    generator = load_generator(arguments)
    _, _, ws = latents(generator, arguments)
    ws = styles.truncate(generator, ws, arguments.psi, arguments.cutoff)
    chosen = layers(generator, arguments.layers)
    vectors, scales = directions.find(
        generator,
        arguments.method,
        arguments.count,
        chosen,
        c=styles.labels(generator, 1, arguments.label),
        samples=arguments.samples,
    )
    strengths = torch.linspace(-arguments.range, arguments.range, arguments.steps)

    folder = output_folder(arguments)
    names = [f"direction-{number}.{arguments.format}" for number in range(len(vectors))]
    for name, vector, scale in zip(names, vectors, scales):
        columns = []
        for strength in strengths.to(scale):
            edited = directions.edit(ws, vector, strength * scale, chosen)
            columns.append(np.stack(list(render(generator, edited, arguments.noise_mode))))
        path = folder / name
        if arguments.format == "png":
            cells = np.stack(columns, axis=1).reshape(-1, *columns[0].shape[1:])
            save_png(path, grid(cells, columns=len(columns)))
        else:
            frames = [grid(column, columns=len(column)) for column in columns]
            save_video(path, [*frames, *frames[-2:0:-1]], arguments.fps)
    save_latents(
        folder / "directions.npz",
        method=arguments.method,
        layers=chosen,
        directions=vectors,
        scales=scales,
        strengths=strengths,
        ws=ws,
    )
    say_written(folder, *names, "directions.npz")
