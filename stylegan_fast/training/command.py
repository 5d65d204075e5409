"""`python -m stylegan_fast train`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Any

from .._commands import refused
from . import snapshots
from .config import CHOICES, NETWORKS, TrainingConfig, defaults, field_types, preset
from .distributed import from_environment, local_device
from .loop import NonFiniteLossError, Trainer
from .metrics import MetricsUnavailableError

EPILOG = """
Files of a run: log.csv, TensorBoard events, reals-*.png, fakes-KIMG.png (the same latents at every
time), checkpoint-KIMG/. Several processes: torchrun --nproc-per-node=2 -m stylegan_fast train ...
Ctrl-C finishes the step, saves and exits with status 130.
"""
STDERR = 2
STOPPING = b"\nstopping after this step; once more: at once, without saving\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "--config",
        metavar="NAME",
        help=f"NETWORK-RESOLUTION, the network one of {', '.join(NETWORKS)}: published settings, "
        "from which the options below deviate; by default those of the run that is resumed",
    )
    parser.add_argument("--outdir", metavar="FOLDER", help="where the run's files go")
    parser.add_argument(
        "--resume",
        metavar="WHAT",
        help="continue the run in FOLDER/checkpoint-KIMG, the last one in FOLDER, or of --outdir "
        "(latest); or start from the networks in a FILE of any known kind",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    settings = parser.add_argument_group("settings")
    types, shared = field_types(), defaults()
    for field in dataclasses.fields(TrainingConfig):
        kind, _ = types[field.name]
        text = field.metadata["help"]
        if field.name not in shared:
            text += " (default: of --config)"
        elif kind is not bool and shared[field.name] not in ("", None):
            text += f" (default: {shared[field.name]})"
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif field.name in CHOICES:
            options["choices"] = CHOICES[field.name]
        else:
            options.update(type=kind, metavar=kind.__name__.upper())
        settings.add_argument(f"--{field.name.replace('_', '-')}", **options)


def run(arguments: argparse.Namespace) -> int:
    """Exit status 0, 2 for what the user can mend, 128 + n after signal n."""
    try:
        device = local_device(arguments.device)
        with from_environment(device) as world:
            trainer = Trainer(
                _config(arguments),
                arguments.outdir,
                device=device,
                world=world,
                resume=arguments.resume,
            )
            return _train(trainer)
    except (ValueError, OSError, NonFiniteLossError, MetricsUnavailableError) as error:
        return refused("train", error)
    except KeyboardInterrupt:
        print("stylegan_fast train: interrupted, not saved", file=sys.stderr)
        return 128 + signal.SIGINT


def _train(trainer: Trainer) -> int:
    """Train; the first SIGINT or SIGTERM ends it in good order, the second at once, unless torchrun
    may have sent it, which repeats what reached all processes."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def stop(number: int, frame: object) -> None:
        received.append(number)
        if trainer.world.size == 1:
            signal.signal(number, previous[number])
            os.write(STDERR, STOPPING)  # print is not reentrant
        trainer.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, stop)
    try:
        trainer.train()
    finally:
        for which, handler in previous.items():
            signal.signal(which, handler)
    if not trainer.stopped:
        return 0
    print(
        f"stylegan_fast train: stopped after {trainer.images_seen} images; "
        f"--resume latest --outdir {trainer.out} continues",
        file=sys.stderr,
    )
    return 128 + (received[0] if received else signal.SIGINT)


def _config(arguments: argparse.Namespace) -> TrainingConfig:
    """The preset or the resumed run's configuration, with the options given."""
    given = {name: value for name, value in vars(arguments).items() if name in field_types()}
    if arguments.outdir is None:
        raise ValueError("--outdir FOLDER is missing: where the run's files go")
    if arguments.config is not None:
        config = preset(arguments.config, **given)
    else:
        stored = _resumed(arguments)
        if stored is None:
            raise ValueError("--config NAME is missing, such as stylegan2-256")
        config = TrainingConfig.from_json({**stored, **given})
    if not config.data:
        raise ValueError("--data PATH is missing: a folder or a zip of images")
    return config


def _resumed(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The configuration of the run that is to be continued, if one is."""
    if arguments.resume is None:
        return None
    source = snapshots.find(arguments.resume, Path(arguments.outdir))
    return None if source.is_file() else snapshots.load(source)[1]["config"]
