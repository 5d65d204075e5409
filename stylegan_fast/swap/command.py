"""`python -m stylegan_fast swap`: run a script of another repository on this library's ops, or show
what of a repository would be."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path

from . import hook, known, state
from .report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)
    running = actions.add_parser(
        "run", help="run a script, as python does, with the ops of this library"
    )
    running.add_argument(
        "--report", action="store_true", help="show at the end what was routed, on stderr"
    )
    running.add_argument(
        "--pickles",
        action="store_true",
        help="also supply what the originals' pickles need without their repository; "
        "loading one executes the code inside",
    )
    running.add_argument(
        "--device",
        choices=["cpu"],
        help="answer requests for a CUDA device by the CPU, for scripts that know no other",
    )
    running.add_argument(
        "-m",
        dest="module",
        nargs=argparse.REMAINDER,
        metavar="module ...",
        help="run a module, as python -m does, with its arguments",
    )
    running.add_argument(
        "script",
        nargs=argparse.REMAINDER,
        metavar="script.py ...",
        help="the script and its arguments",
    )
    showing = actions.add_parser("report", help="show which modules of a repository are routed")
    showing.add_argument("folder", type=Path, nargs="?", default=Path(), help="default: this one")


def run(arguments: argparse.Namespace) -> int:
    if arguments.action == "report":
        return _show(arguments.folder)
    if not (arguments.module or arguments.script):
        return _fail("swap run needs a script, or -m and a module")
    if arguments.script and not os.path.isfile(arguments.script[0]):
        return _fail(f"there is no file {arguments.script[0]}")
    hook.install(pickles=arguments.pickles, device=arguments.device)
    try:
        if arguments.module:
            sys.argv = arguments.module
            sys.path[0] = os.getcwd()
            runpy.run_module(arguments.module[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments.script
            sys.path[0] = os.path.dirname(os.path.abspath(arguments.script[0]))
            runpy.run_path(arguments.script[0], run_name="__main__")
    finally:
        if arguments.report:
            print(state.report, file=sys.stderr)
    return 0


def _show(folder: Path) -> int:
    if not folder.is_dir():
        return _fail(f"there is no folder {folder}")
    found = Report()
    for path in sorted(folder.rglob("*.py")):
        module = ".".join(path.relative_to(folder).with_suffix("").parts)
        try:
            if known.replacement(module, [str(path.parent)]) is not None:
                found.routed[module] = "from its first import on"
        except known.UnknownVariantError as why:
            found.left[module] = str(why)
    print(found)
    return 0


def _fail(message: str) -> int:
    print(f"stylegan_fast: {message}", file=sys.stderr)
    return 2
