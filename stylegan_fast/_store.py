"""What was measured on this machine and is remembered between processes: JSON files in the user's
cache folder, {machine: {key: value}}."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

from . import _env


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()


def path(name: str) -> Path | None:
    folder = _env.cache_folder()
    return None if folder is None else folder / name


def read(name: str, machine: str) -> dict[str, Any]:
    """What is stored; nothing where the file is missing, unreadable or not of this form."""
    entries = _read(path(name)).get(machine)
    return entries if isinstance(entries, dict) else {}


def add(name: str, machine: str, entries: dict[str, Any]) -> bool:
    """Adds to what is stored. False, and nothing written, where the folder cannot be written."""
    target = path(name)
    if target is None:
        return False
    stored = _read(target)
    known = stored.get(machine)
    stored[machine] = {**(known if isinstance(known, dict) else {}), **entries}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            written = Path(folder, name)
            written.write_text(json.dumps(stored, indent=1, sort_keys=True))
            os.replace(written, target)
    except OSError:
        return False
    return True


def _read(target: Path | None) -> dict[str, Any]:
    try:
        stored = {} if target is None else json.loads(target.read_text())
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}
