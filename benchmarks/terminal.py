"""What is seen of a run: the lines of a table, and a progress bar where there is a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .results import FAIL, OK, Row

WIDTHS = {
    "op": 31,
    "shape": 14,
    "dtype": 8,
    "layout": 6,
    "mode": 16,
    "provider": 13,
    "median": 8,
    "vs stock": 10,
    "of roofline": 11,
    "memory": 7,
    "launches": 8,
}


UNSTEADY = "~"
"""Before a median: p80 is more than half as much again as p20."""


def significant(value: float) -> str:
    return f"{value:.3g}" if value < 99.95 else f"{value:.0f}"


def time_text(microseconds: float) -> str:
    for unit, factor in (("µs", 1), ("ms", 1e3), ("s", 1e6)):
        if microseconds < 999.5 * factor or unit == "s":
            break
    return f"{significant(microseconds / factor)} {unit}"


def size_text(count: int) -> str:
    return f"{significant(count / 1e6)} MB" if count else ""


def mode_text(row: Row) -> str:
    return f"kernel {row.mode}" if row.level == "kernel" else row.mode


def op_text(row: Row) -> str:
    return f"{row.op} {row.variant}" if row.variant else row.op


def cells(row: Row) -> list[str]:
    """The row under the headings; what has no timing says why instead."""
    case = [op_text(row), row.shape, row.dtype, row.layout, mode_text(row), row.provider]
    if row.status != OK:
        return [*case, f"{row.status}: {row.detail}"]
    against = "" if row.baseline == "stock" else f" {row.baseline[:3]}."
    speedup = "" if math.isnan(row.speedup) else f"{row.speedup:.2f}×{against}"
    roofline = "" if math.isnan(row.of_roofline) else f"{row.of_roofline:.0%}"
    median = UNSTEADY * (row.p80_us > 1.5 * row.p20_us) + time_text(row.median_us)
    launches = str(row.launches or "")
    return [*case, median, speedup, roofline, size_text(row.peak_bytes), launches]


class Terminal:
    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)

    def say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False)

    def heading(self) -> None:
        self.say(_line(WIDTHS), "bold")

    def rows(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.say(_line(cells(row)), {OK: None, FAIL: "bold red"}.get(row.status, "dim"))

    def progress(self) -> Progress:
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        return Progress(
            *columns,
            console=self.console,
            auto_refresh=False,  # nothing else runs while a case is timed
            transient=True,
            disable=not self.console.is_terminal,
        )


def _line(texts: Iterable[str]) -> str:
    return "  ".join(text.ljust(width) for text, width in zip(texts, WIDTHS.values())).rstrip()
