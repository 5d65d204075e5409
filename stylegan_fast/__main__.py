"""`python -m stylegan_fast`, also installed as `stylegan-fast`."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from . import __version__, backends
from ._commands import is_out_of_memory, refused

COMMANDS = {
    "info": ("stylegan_fast.info", "versions, devices, what each backend can run here and why not"),
    "check": ("stylegan_fast.check", "compare every op with its definition on this machine"),
    "convert": ("stylegan_fast.checkpoints.convert", "convert checkpoints, or show what one holds"),
    "dataset": ("stylegan_fast.training.dataset", "make a dataset of images, or the example"),
    "generate": ("stylegan_fast.generation.generate", "images and films from a trained generator"),
    "explore": ("stylegan_fast.generation.explore", "change images along directions in W"),
    "project": ("stylegan_fast.generation.project", "find the latents of a given image"),
    "metrics": ("stylegan_fast.generation.metrics", "FID and KID of a trained generator"),
    "train": ("stylegan_fast.training.command", "train a generator on a folder or zip of images"),
    "swap": ("stylegan_fast.swap.command", "run another repository's script on these ops"),
    "bench": ("stylegan_fast.benchmarks", "time the ops beside PyTorch's and other formulations"),
}
"""Modules with add_arguments(parser) and run(arguments) -> exit status, imported when called."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        "python -m stylegan_fast", description="Fused StyleGAN operators for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"stylegan_fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    chosen = next((argument for argument in argv if argument in COMMANDS), None)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
        if name == chosen:
            try:
                implementation = importlib.import_module(module)
            except ModuleNotFoundError as error:
                extra = "bench" if name == "bench" else "train"
                advice = f"pip install 'stylegan_fast[{extra}]' brings what it needs"
                print(f"stylegan_fast: {name} cannot start: {error}; {advice}", file=sys.stderr)
                return 2
            implementation.add_arguments(command)
            command.set_defaults(run=implementation.run)
    arguments = parser.parse_args(argv)
    try:
        backends.unavailable("cpu")  # reads the environment variables
    except ValueError as error:
        parser.error(str(error))
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"stylegan_fast {arguments.command}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        advice = "smaller batches (train: --micro-batch), images or networks take less"
        return refused(arguments.command, f"out of memory: {error}; {advice}")
    return status


if __name__ == "__main__":
    sys.exit(main())
