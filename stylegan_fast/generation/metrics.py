"""`python -m stylegan_fast metrics`: FID and KID of a generator."""

from __future__ import annotations

import argparse

from .._checks import as_int
from ..training.config import LARGEST_SEED
from ..training.data import ImageDataset
from ..training.metrics import DISTANCES, Evaluation
from .arguments import add_network_arguments, load_generator, reported

EPILOG = """
The features are torch-fidelity's; where it or the weights of its network are missing, a message
says where they come from. Nothing is downloaded.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add_network_arguments(parser)
    parser.add_argument(
        "--data", metavar="PATH", required=True, help="folder or zip of the real images"
    )
    parser.add_argument(
        "--metrics",
        metavar="LIST",
        default="fid",
        help=f"separated by commas, of {', '.join(DISTANCES)} (default: fid)",
    )
    parser.add_argument(
        "--images", type=int, default=50_000, help="generated images (default: 50000)"
    )
    parser.add_argument("--mirror", action="store_true", help="take every real image mirrored too")
    parser.add_argument("--seed", type=int, default=0, help="of the latents (default: 0)")


@reported
def run(arguments: argparse.Namespace) -> None:
    as_int("--images", arguments.images, 2)
    as_int("--seed", arguments.seed, 0, LARGEST_SEED)
    generator = load_generator(arguments)
    dataset = ImageDataset(
        arguments.data, generator.img_resolution, generator.c_dim > 0, arguments.mirror
    )
    if dataset.c_dim != generator.c_dim:
        raise ValueError(
            f"{arguments.data} has {dataset.c_dim} classes, the network {generator.c_dim}"
        )
    evaluation = Evaluation(dataset, arguments.metrics.split(","), generator.mapping.w_avg.device)
    for name, value in evaluation(generator, arguments.images, arguments.seed).items():
        print(f"{name} {value:.6g}")
