"""Route other StyleGAN repositories' operators through this library, without editing them.

import stylegan_fast.swap
stylegan_fast.swap.install()        # at the top of a script; or, with no edit at all:

python -m stylegan_fast swap run train.py --outdir out
"""

from . import state
from .conversion import convert
from .hook import install, uninstall
from .report import Report

__all__ = ["Report", "convert", "install", "report", "uninstall"]


def report() -> Report:
    """What was routed since the last `install`, what was not, and why."""
    return state.report
