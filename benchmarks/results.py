"""One row per measurement, one schema, appended to a CSV file as they come."""

from __future__ import annotations

import csv
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

OK, FAIL, SKIPPED = "ok", "FAIL", "skipped"


@dataclass
class Row:
    """NaN, 0 and "" stand for what was not measured, and are empty in the file."""

    run: str = ""
    """The start of the run, which its rows share."""
    timestamp: str = ""
    op: str = ""
    variant: str = ""
    """What the op does, where it can be several things."""
    layer: str = ""
    shape: str = ""
    dtype: str = ""
    layout: str = ""
    level: str = ""
    mode: str = ""
    provider: str = ""
    status: str = OK
    detail: str = ""
    """Why it was skipped or what failed; which commit a peer is at."""
    gate_error: float = math.nan
    """The largest error as a multiple of its tolerance; above 1 the gate is red."""
    median_us: float = math.nan
    p20_us: float = math.nan
    p80_us: float = math.nan
    n: int = 0
    baseline: str = ""
    speedup: float = math.nan
    """Median of the baseline provider over this one's."""
    bytes: int = 0
    """What must be read and written at least; 0 where it was not counted."""
    flops: int = 0
    copy_gbyte_s: float = math.nan
    """Ceiling: `copy_` between existing tensors, as many bytes as the op's input and output have,
    in the same interleaved rounds."""
    matrix_gflop_s: float = math.nan
    """Ceiling: a large matrix product in the dtype the case computes in."""
    roofline_us: float = math.nan
    """max(bytes / copy rate, flops / matrix rate)"""
    of_roofline: float = math.nan
    peak_bytes: int = 0
    memory_method: str = ""
    launches: int = 0
    """Kernels that one call of a network starts on a GPU."""
    images: str = ""
    """PNG files beside this one."""
    device: str = ""
    processor: str = ""
    cores: str = ""
    threads: str = ""
    clock: str = ""
    load: str = ""
    """Average number of busy processes in the minute before the run."""
    system: str = ""
    preload: str = ""
    python: str = ""
    torch: str = ""
    cuda: str = ""
    triton: str = ""
    stylegan_fast: str = ""
    simd: str = ""
    commit: str = ""
    dirty: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What is measured, and on what."""
        case = (self.op, self.variant, self.shape, self.dtype, self.layout, self.level, self.mode)
        return (self.device, self.processor, self.threads, *case, self.provider)

    def cells(self) -> dict[str, str]:
        return {name: _cell(value) for name, value in asdict(self).items()}


COLUMNS = [field.name for field in fields(Row)]
_EMPTY = asdict(Row(status=""))


def _cell(value: str | int | float) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value) if value else ""


def _value(name: str, cell: str) -> Any:
    empty = _EMPTY[name]
    return type(empty)(cell) if cell else empty


class ResultsFile:
    """<folder>/results.csv; where that has another header, the first free results-<n>.csv."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "results.csv"
        self.avoided: list[Path] = []
        while self.path.exists() and _header(self.path) != COLUMNS:
            self.avoided.append(self.path)
            self.path = folder / f"results-{len(self.avoided) + 1}.csv"

    def append(self, rows: list[Row]) -> None:
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerows(row.cells() for row in rows)


def _header(path: Path) -> list[str]:
    with path.open(newline="") as file:
        return next(csv.reader(file), [])


def read(path: Path) -> list[Row]:
    """The rows of a file, also of one that lacks newer columns. ValueError where it has others."""
    header = _header(path)
    if not header or not set(header) <= set(COLUMNS):
        raise ValueError(f"{path} does not have the columns of this version's results")
    with path.open(newline="") as file:
        return [
            Row(**{name: _value(name, cell) for name, cell in cells.items()})
            for cells in csv.DictReader(file)
        ]
