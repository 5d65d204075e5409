"""Checkpoints of a run: folders OUT/checkpoint-KIMG that exist whole or not at all.

    networks.safetensors   G, D, G_ema: what generation and other runs need
    state.safetensors      tensors of the optimisers, of the augmentation and the mean path length
    state.json             configuration, counters, everything else

A checkpoint is written beside its place, flushed to the disk and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from ..checkpoints import CheckpointError, save_networks

NETWORKS = "networks.safetensors"
TENSORS = "state.safetensors"
STATE = "state.json"
PREFIX = "checkpoint-"
UNFINISHED = ".unfinished-"
FIELDS = {
    "config": dict, "step": int, "images_seen": int, "history": dict, "signs": list, "scaler": dict,
}  # fmt: skip
"""Of state.json, besides the version."""


def save(
    out: Path,
    images_seen: int,
    networks: Mapping[str, nn.Module],
    tensors: Mapping[str, Tensor],
    state: dict[str, Any],
) -> Path:
    """Write one checkpoint and return its folder. OSError: nothing is left of it."""
    target = out / f"{PREFIX}{kimg(images_seen)}"
    remove_unfinished(out)
    folder = out / f"{UNFINISHED}{target.name}"
    try:
        folder.mkdir()
        save_networks(folder / NETWORKS, networks, {"images_seen": images_seen})
        dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        (folder / TENSORS).write_bytes(safetensors.torch.save(dense))
        (folder / STATE).write_text(json.dumps(state, indent=1))
        for path in (folder / TENSORS, folder / STATE, folder):
            flush(path)
        folder.rename(target)
        flush(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return target


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state beside the networks. CheckpointError names the file."""
    try:
        state = json.loads((folder / STATE).read_text())
        tensors = safetensors.torch.load((folder / TENSORS).read_bytes())
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a checkpoint of a run: {error}") from None
    _check_state(folder / STATE, state)
    return tensors, state


def _check_state(path: Path, state: Any) -> None:
    """CheckpointError unless the state has its fields, of their types."""
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not the state of a run")
    for name, kind in FIELDS.items():
        if not isinstance(state.get(name), kind):
            raise CheckpointError(f"{path}: not the state of a run: {name} is no {kind.__name__}")
    for name, values in {**state["history"], "signs": state["signs"]}.items():
        if not isinstance(values, list) or not all(isinstance(v, (int, float)) for v in values):
            raise CheckpointError(f"{path}: not the state of a run: {name} is no list of numbers")


def kimg(images_seen: int) -> str:
    """Thousands of images as file names hold them, so that they sort."""
    return f"{images_seen / 1000:010.3f}"


def complete(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(path for path in out.glob(f"{PREFIX}*") if (path / STATE).is_file())


def find(resume: str, out: Path) -> Path:
    """What --resume means: "latest" of the run in `out`, a checkpoint's folder, the last one of
    another run's folder, or a file of networks. CheckpointError where there is none."""
    path = out if resume == "latest" else Path(resume)
    if path.is_file() or (path / STATE).is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    if found := complete(path):
        return found[-1]
    raise CheckpointError(f"{path}: holds no checkpoint of a run")


def remove_unfinished(out: Path) -> None:
    """Remove what a killed process left while it was saving."""
    for path in out.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def remove_old(out: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints; 0 keeps all."""
    for path in complete(out)[:-keep] if keep else []:
        shutil.rmtree(path)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
