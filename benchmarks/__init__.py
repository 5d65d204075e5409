"""The benchmark suite: `python -m stylegan_fast bench`.

Every provider of an op (our backends, the stock formulation, torch.compile, peers) is checked
against the float64 reference, then all of them are timed in turns. Rows go to a CSV file; the
report is made from that file alone.
"""

from __future__ import annotations

import argparse
import math

import torch

from .cases import DTYPES, LAYOUTS, MODES, OPS

__all__ = ["add_arguments", "main", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="every layer shape, dtype and layout")
    size.add_argument(
        "--quick", action="store_true", help="small shapes, short timings, no torch.compile"
    )
    choose = parser.add_argument_group("filters, which choose among all cases")
    choose.add_argument("--op", nargs="+", choices=OPS)
    choose.add_argument("--dtype", nargs="+", choices=list(DTYPES))
    choose.add_argument("--layout", nargs="+", choices=list(LAYOUTS))
    choose.add_argument("--mode", nargs="+", choices=MODES, metavar="MODE", help=", ".join(MODES))
    choose.add_argument(
        "--shape",
        nargs="+",
        metavar="PART",
        help="part of a shape, a variant or a layer: 4x64, up2, G.conv0, 1024:b64",
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="measure which convolutions of the chosen layers run faster by PyTorch, and remember",
    )
    parser.add_argument("--list", action="store_true", help="print the chosen cases and stop")
    parser.add_argument("--seconds", type=float, help="time spent on a case (default 1)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        metavar="M",
        help="begin no case after that; what is measured is kept and reported",
    )
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch and of the kernels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--cuda-graph", action="store_true", help="time replays of a CUDA graph, without launches"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="PATH",
        help="a checkout to time beside ours (stylegan2-ada-pytorch, stylegan3, "
        "rosinality/stylegan2-pytorch or a derivative), and its networks with stylegan_fast.swap "
        "beside themselves (also eg3d/eg3d, R3GAN, pixel2style2pixel); may be repeated",
    )
    parser.add_argument("--out", default="bench-out", metavar="DIR", help="default %(default)s")
    parser.add_argument(
        "--report", metavar="CSV", help="only make the report of a file of results again"
    )


def run(arguments: argparse.Namespace) -> int:
    """Exit status: 1 where a gate was red, 2 for a request that cannot be served."""
    from .suite import run

    return run(arguments)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("stylegan_fast.benchmarks", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))
