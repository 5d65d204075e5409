"""`python -m stylegan_fast convert`: checkpoints from one format to another, or what they hold."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .._commands import printable, refused
from .contents import CheckpointError, Contents
from .files import LAYOUTS, build, read, save_as


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input",
        type=Path,
        help="a checkpoint of this library, the originals' "
        "PyTorch releases (.pkl), rosinality (.pt) or BasicSR (.pth)",
    )
    parser.add_argument("output", type=Path, nargs="?", help="the file to write")
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="ours",
        help="of the output (default: ours, a .safetensors file)",
    )
    parser.add_argument(
        "--networks",
        nargs="+",
        metavar="NAME",
        help="which networks to write, of G, D and G_ema (default: all)",
    )
    parser.add_argument("--show", action="store_true", help="only show what the input holds")


def run(arguments: argparse.Namespace) -> int:
    try:
        if arguments.output is None and not arguments.show:
            raise CheckpointError("convert needs a file to write, or --show")
        contents = read(arguments.input)
        _show(arguments.input, contents)
        if not arguments.show:
            _convert(arguments, contents)
    except (CheckpointError, ModuleNotFoundError) as error:
        return refused("convert", error)
    return 0


def _convert(arguments: argparse.Namespace, contents: Contents) -> None:
    networks = build(arguments.input, contents)
    for name in arguments.networks or ():
        if name not in networks:
            raise CheckpointError(f"{arguments.input} has no {name}, but {', '.join(networks)}")
    chosen = {name: networks[name] for name in arguments.networks or networks}
    notes = save_as(arguments.output, arguments.layout, chosen, contents.metadata)
    print(f"\n{arguments.output}: {', '.join(chosen)} as {arguments.layout}")
    for note in notes:
        print(f"  {note}")


def _show(path: Path, contents: Contents) -> None:
    print(f"{path}: {contents.layout}")
    for name, stored in contents.networks.items():
        count = sum(tensor.numel() for tensor in stored.state.values())
        print(f"  {name}: {stored.path}, {count:,} numbers in {len(stored.state)} tensors")
        arguments = ", ".join(f"{key}={value!r}" for key, value in stored.init_kwargs.items())
        print(f"    {printable(arguments)}")
        for note in stored.notes:
            print(f"    {note}")
    if contents.metadata:
        print(f"  metadata: {json.dumps(contents.metadata)}")
