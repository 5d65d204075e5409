"""`python -m stylegan_fast dataset`: make a dataset of a folder of images, or the example."""

from __future__ import annotations

import argparse

from rich.progress import track

from .._commands import refused
from .data import DatasetError, ImageDataset, example, write_zip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="?", help="folder or zip of images of any size")
    parser.add_argument("out", nargs="?", help="the zip to write")
    parser.add_argument(
        "--example", metavar="OUT", help="write crops of scikit-image's photographs; no download"
    )
    parser.add_argument(
        "--resolution",
        type=int,
        help="power of two: crop at the centre and resize (default: keep; the example: 32)",
    )
    parser.add_argument("--count", type=int, default=512, help="crops of the example (512)")
    parser.add_argument("--seed", type=int, default=0, help="of the example's crops (0)")
    parser.add_argument(
        "--skip-broken", action="store_true", help="leave out broken or odd-sized images"
    )


def run(arguments: argparse.Namespace) -> int:
    given = [value for value in (arguments.source, arguments.out, arguments.example) if value]
    if len(given) != (1 if arguments.example else 2):
        return refused("dataset", "give SOURCE and OUT, or --example OUT")
    try:
        if arguments.example:
            path = example(
                arguments.example, arguments.resolution or 32, arguments.count, arguments.seed
            )
        else:
            on_error = "skip" if arguments.skip_broken else "raise"
            source = ImageDataset(arguments.source, arguments.resolution, on_error=on_error)
            images = track(source.images(), "images", len(source.names), transient=True)
            path = write_zip(arguments.out, images)
        made = ImageDataset(path)
    except (DatasetError, ImportError, OSError, TypeError, ValueError) as error:
        return refused("dataset", error)
    labels = "no labels" if made.raw_labels() is None else "labels in dataset.json"
    print(
        f"{path}: {len(made)} images, {made.resolution}×{made.resolution}, "
        f"{made.img_channels} channel{'s' * (made.img_channels > 1)}, {labels}"
    )
    return 0
