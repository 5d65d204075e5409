"""`python -m stylegan_fast project`: the latents whose image is nearest to a given one."""

from __future__ import annotations

import argparse

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from .._checks import as_int
from ..training.config import LARGEST_SEED
from . import projection, styles
from .arguments import (
    NOISE,
    add_image_arguments,
    add_network_arguments,
    load_generator,
    output_folder,
    reported,
    say_written,
)
from .images import grid, read_image, render, save_latents, save_png, save_video, to_uint8

EPILOG = """
Writes target.png, projection.png, comparison.png, which has both, and projection.npz, which
generate --latents reads.
"""


FRAMES, FPS = 100, 20
"""Of the film, about."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add_network_arguments(parser)
    add_image_arguments(parser)
    parser.add_argument("--target", metavar="IMAGE", required=True, help="what to project")
    parser.add_argument(
        "--space",
        choices=projection.SPACES,
        default="w+",
        help="one latent for all layers, or one for each (default: w+)",
    )
    parser.add_argument("--steps", type=int, default=500, help="of the optimiser (default: 500)")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate (default: 0.1)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise in w (default: 0)")
    parser.add_argument(
        "--optimize-noise", action="store_true", help="find the layers' noise maps too"
    )
    parser.add_argument(
        "--perceptual",
        metavar="FILE",
        nargs="?",
        const="",
        help="compare the features of torchvision's VGG16 too; FILE holds its weights (default: "
        "where torchvision keeps them)",
    )
    parser.add_argument(
        "--format", choices=["gif", "mp4"], help="write a film from the mean to the projection too"
    )


@reported
def run(arguments: argparse.Namespace) -> None:
    if not 0 < arguments.lr < float("inf"):
        raise ValueError(f"--lr {arguments.lr:g} must be positive")
    if arguments.steps < 1:
        raise ValueError(f"--steps {arguments.steps} must be at least 1")
    as_int("--seed", arguments.seed, 0, LARGEST_SEED)
    generator = load_generator(arguments)
    if arguments.optimize_noise:
        projection.noise_maps(generator.synthesis)  # refuses a network that has none
    like = generator.mapping.w_avg
    target = read_image(arguments.target, generator.img_resolution, generator.img_channels)
    c = styles.labels(generator, 1, arguments.label)
    perceptual = None
    if arguments.perceptual is not None:
        perceptual = projection.vgg16_features(arguments.perceptual or None).to(like)
    folder = output_folder(arguments)
    history: list[Tensor] = []
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("project", total=arguments.steps)

        def progress(loss: float, w: Tensor) -> None:
            history.append(w.clone())
            bar.update(task, advance=1, description=f"project, loss {loss:.4f}")

        found = projection.project(
            generator,
            target.to(like),
            space=arguments.space,
            steps=arguments.steps,
            lr=arguments.lr,
            c=c,
            perceptual=perceptual,
            optimize_noise=arguments.optimize_noise,
            seed=arguments.seed,
            progress=progress,
        )
    pixels = np.concatenate([to_uint8(target), to_uint8(found.image)])
    save_png(folder / "target.png", pixels[0])
    save_png(folder / "projection.png", pixels[1])
    save_png(folder / "comparison.png", grid(pixels, columns=2))
    noises = {NOISE + name: noise for name, noise in found.noises.items()}
    save_latents(folder / "projection.npz", ws=found.ws, losses=found.losses, **noises)
    names = ["target.png", "projection.png", "comparison.png", "projection.npz"]
    if arguments.format is not None:
        ws = torch.cat(history[:: max(1, arguments.steps // FRAMES)])
        frames = render(generator, ws.expand(-1, generator.num_ws, -1))
        names.append(f"projection.{arguments.format}")
        save_video(folder / names[-1], frames, FPS)
    say_written(folder, *names)
