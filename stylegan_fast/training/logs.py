"""What a run tells: log.csv, TensorBoard where it is installed, progress, grids of samples."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from .pictures import grid, picture, to_uint8

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:
    SummaryWriter = None  # type: ignore[assignment, misc]

CSV = "log.csv"


class Logs:
    """The logs of a run in the folder `out`, continued after `images_seen` of `total` images.

    log.csv has a row a tick: the number of images seen, and `columns`, empty where there is no
    value. Rows of a future that a resumed run left are dropped. `show=False` prints nothing.
    """

    def __init__(
        self, out: Path, columns: Sequence[str], images_seen: int, total: int, show: bool = True
    ) -> None:
        self.path = out / CSV
        rows = [row for row in read(self.path) if int(row["images"]) <= images_seen]
        text = io.StringIO()
        self._columns = ["images", *columns]
        writer = csv.DictWriter(text, self._columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text.getvalue())
        temporary.replace(self.path)
        self._board = None
        if SummaryWriter is not None:
            self._board = SummaryWriter(str(out), purge_step=images_seen + 1)
        self._progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("images"),
            TimeRemainingColumn(),
            console=Console(stderr=True, quiet=not show),
        )
        self._task = self._progress.add_task("", total=total, completed=images_seen)

    def __enter__(self) -> Logs:
        if self._progress.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress.console.is_terminal:
            self._progress.stop()
        if self._board:
            self._board.close()

    def advance(self, images_seen: int) -> None:
        self._progress.update(self._task, completed=images_seen)

    def say(self, line: str) -> None:
        self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def write(self, images_seen: int, row: dict[str, float]) -> None:
        """Add a row to log.csv and to TensorBoard, and print it."""
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            writer.writerow({"images": images_seen, **row})
        if self._board:
            for name, value in row.items():
                self._board.add_scalar(name, value, images_seen)
        self.say("  ".join([f"{images_seen} images", *(f"{k} {v:.4g}" for k, v in row.items())]))

    def image(self, name: str, path: Path, images_seen: int) -> None:
        """Show the picture at `path` in TensorBoard."""
        if self._board:
            picture = np.asarray(Image.open(path).convert("RGB"))
            self._board.add_image(name, picture, images_seen, dataformats="HWC")


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a log, without those that a crash of the machine damaged; none where there is no
    file."""
    if not path.exists():
        return []
    with path.open(newline="", errors="replace") as file:
        rows = csv.DictReader(line.replace("\0", "") for line in file)
        return [row for row in rows if (row.get("images") or "").isdecimal()]


def save_grid(path: Path, images: Tensor, columns: int) -> None:
    """Images [N, C, H, W] in [-1, 1] as one PNG, row by row."""
    picture(grid(to_uint8(images), columns)).save(path)
