"""What is timed: (op, layer shape, dtype, layout, level, mode)."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import NamedTuple

import torch

CHANNEL_BASE = {256: 16384, 1024: 32768}
"""The published StyleGAN2 configurations, by image resolution."""

TARGETS = ((4, 64, 128, 128), (1, 32, 512, 512))
"""The shapes the CPU targets of the project are stated for."""

TINY = (2, 8, 4, 4)
"""So small that only the cost of a call is left."""

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

LEVELS = {
    "kernel": ("forward", "backward"),
    "user": ("forward", "forward+backward", "double backward"),
    "training": ("D + R1", "G + path length"),
}
"""The modes of each level. A kernel writes into tensors that exist; a user calls the public
function; a training step runs both networks."""

OPS = {"bias_act": ("kernel", "user"), "training": ("training",)}
MODES = tuple(dict.fromkeys(mode for modes in LEVELS.values() for mode in modes))


@dataclass(frozen=True)
class Case:
    op: str
    layer: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    level: str
    mode: str

    @property
    def shape_name(self) -> str:
        return "x".join(map(str, self.shape))

    def __str__(self) -> str:
        level = "" if self.level == "training" else f"{self.level} "
        return f"{self.op} {self.shape_name} {self.dtype} {self.layout} {level}{self.mode}"


class Layer(NamedTuple):
    name: str
    channels: int
    resolution: int


def layers(networks: tuple[int, ...] = tuple(CHANNEL_BASE)) -> list[Layer]:
    """Every output of conv0 and conv1 in the generators: one shape per network and resolution.

    The discriminators' fromrgb, conv0, conv1 and b4.conv have the same ones.
    """
    names: dict[tuple[int, int], list[str]] = {}
    for network in networks:
        for log2 in range(2, network.bit_length()):
            resolution = 2**log2
            channels = min(CHANNEL_BASE[network] // resolution, 512)
            names.setdefault((channels, resolution), []).append(f"{network}:b{resolution}")
    return [Layer(" ".join(names[key]), *key) for key in names]


def batch(layer: Layer, device_type: str) -> int:
    """What fits the device's memory and patience, small for layers of many elements."""
    elements = layer.channels * layer.resolution**2
    if device_type == "cpu":
        return 4 if elements <= 2**20 else 1
    return 32 if elements <= 2**22 else 8


def _shapes(size: str, device_type: str) -> dict[tuple[int, ...], str]:
    """Shape -> names of the layers that have it."""
    if size == "full":
        chosen = layers()
    else:  # every second resolution
        largest = 16 if size == "quick" else 256
        chosen = [layer for layer in layers((256,))[::2] if layer.resolution <= largest]
    shapes: dict[tuple[int, ...], str] = {
        (batch(layer, device_type), layer.channels, layer.resolution, layer.resolution): layer.name
        for layer in chosen
    }
    if size != "quick":
        for target in TARGETS:
            shapes.setdefault(target, "target")
        shapes[TINY] = "overhead of a call"
    return shapes


def _dtypes(size: str, device_type: str) -> list[str]:
    if device_type == "cpu":
        return list(DTYPES) if size == "full" else ["float32"]
    return ["float32", "bfloat16", "float16"][: 1 if size == "quick" else 3]


def select(arguments: argparse.Namespace, device_type: str) -> list[Case]:
    """The cases of a size (quick, default or full). A filter chooses among everything there is;
    what no filter names stays as the size has it."""
    size = "full" if arguments.full else "quick" if arguments.quick else "default"
    shapes = _shapes("full" if arguments.shape else size, device_type)
    dtypes = arguments.dtype or _dtypes(size, device_type)
    images = {"quick": 2, "default": 8, "full": 8}[size] * (1 if device_type == "cpu" else 4)
    cases = [
        Case("bias_act", layer, shape, dtype, layout, level, mode)
        for shape, layer in shapes.items()
        for dtype in dtypes
        for layout in LAYOUTS
        for level in OPS["bias_act"]
        for mode in LEVELS[level]
    ]
    cases += [
        Case("training", "StyleGAN2 64x64", (images, 3, 64, 64), "float32", "nchw", level, mode)
        for level in OPS["training"]
        for mode in LEVELS[level]
    ]
    return [case for case in cases if _wanted(case, arguments)]


def _wanted(case: Case, arguments: argparse.Namespace) -> bool:
    filters = {"op": case.op, "dtype": case.dtype, "layout": case.layout, "mode": case.mode}
    for name, value in filters.items():
        allowed = getattr(arguments, name)
        if allowed and value not in allowed:
            return False
    text = f"{case.shape_name} {case.layer}"
    return not arguments.shape or any(part in text for part in arguments.shape)
