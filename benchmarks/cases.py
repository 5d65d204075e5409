"""What is timed: (op, variant, layer shape, dtype, layout, level, mode)."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

CHANNEL_BASE = {256: 16384, 1024: 32768}
"""The published StyleGAN2 configurations, by image resolution."""

TARGETS = ((4, 64, 128, 128), (1, 32, 512, 512))
"""The shapes the CPU targets of the project are stated for."""

TINY = {"bias_act": (2, 8, 4, 4), "upfirdn2d": (1, 3, 8, 8)}
"""So small that only the cost of a call is left."""

OVERHEAD = "overhead of a call"

TARGET_VARIANTS = {
    "same": ("forward", "forward+backward"),
    "up2": ("forward", "forward+backward"),
    "down2": ("forward", "forward+backward", "double backward"),  # as R1 has it
    "up2 12-tap": ("forward",),
    "down2 12-tap": (),
}
"""The resamplings those targets are stated for, and the modes of a user's call that are timed by
default; derivatives of the first shape."""

LAYER_BLOCKS = {"cpu": (256, (64,)), "cuda": (1024, (16, 128, 1024))}
"""The network and the blocks whose layers are timed by default: on a GPU one bound by launches, one
by arithmetic and one by memory."""

PHOTOGRAPH_VARIANTS = ("up2", "down2", "up2 12-tap", "blur 61-tap")

TRAINING_WIDTHS = ("128 channels", "512 channels")
"""Of the networks of a training step (end_to_end.WIDTHS)."""

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
    "network": ("forward", "CUDA graph"),
    "training": ("D", "D + R1", "G", "G + path length"),
    "repository": ("G forward", "training step"),
}
"""The modes of each level. A kernel writes into tensors that exist; a user calls the public
function or a layer; a network makes images or judges them; a training step runs both, of ours or
of another repository."""

OPS = (
    "bias_act",
    "upfirdn2d",
    "filtered_lrelu",
    "adain",
    "photographs",
    "layers",
    "networks",
    "training",
    "swap",
)
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
    variant: str = ""
    """What the op does, where it can be several things (upfirdn2d.VARIANTS)."""

    @property
    def shape_name(self) -> str:
        return "x".join(map(str, self.shape))

    def __str__(self) -> str:
        level = "" if self.level in ("network", "training", "repository") else f"{self.level} "
        case = f"{self.shape_name} {self.dtype} {self.layout} {level}{self.mode}"
        return f"{self.op} {self.variant} {case}" if self.variant else f"{self.op} {case}"


class Layer(NamedTuple):
    name: str
    channels: int
    resolution: int


class Kind(NamedTuple):
    kernel_size: int
    up: int = 1
    down: int = 1


KINDS = {
    "G.conv0": Kind(3, up=2),
    "G.conv1": Kind(3),
    "G.torgb": Kind(1),
    "D.fromrgb": Kind(1),
    "D.conv0": Kind(3),
    "D.conv1": Kind(3, down=2),
    "D.skip": Kind(1, down=2),
    "D.conv": Kind(3),
}
"""The convolutions of StyleGAN2's generator (skip) and discriminator (resnet)."""


class ConvLayer(NamedTuple):
    """A convolution on a square image."""

    kind: str
    in_channels: int
    out_channels: int
    size: int
    """Of the image it reads."""

    @classmethod
    def of(cls, case: Case) -> ConvLayer:
        kind, channels = case.variant.split(" ")
        i, o = map(int, channels.split("→"))
        return cls(kind, i, o, case.shape[2])

    @property
    def variant(self) -> str:
        return f"{self.kind} {self.in_channels}→{self.out_channels}"

    @property
    def out_size(self) -> int:
        kind = KINDS[self.kind]
        return self.size * kind.up // kind.down

    @property
    def elements(self) -> int:
        """Of the larger of what it reads and writes, for one image."""
        return max(
            self.in_channels * self.size**2,
            self.out_channels * self.out_size**2,
        )

    @property
    def weights(self) -> int:
        return self.in_channels * self.out_channels * KINDS[self.kind].kernel_size ** 2

    @property
    def flops(self) -> int:
        """Of the convolution for one image: no stuffed zeros, no pixels that are dropped."""
        return 2 * self.weights * min(self.size, self.out_size) ** 2


def conv_layers(network: int) -> list[tuple[int, ConvLayer]]:
    """(resolution of the block, layer) of the generator and the discriminator of a resolution."""

    def channels(resolution: int) -> int:
        return min(CHANNEL_BASE[network] // resolution, 512)

    found = []
    resolutions = [2**log2 for log2 in range(2, network.bit_length())]
    for r in resolutions:
        if r > 4:
            found.append((r, ConvLayer("G.conv0", channels(r // 2), channels(r), r // 2)))
        found.append((r, ConvLayer("G.conv1", channels(r), channels(r), r)))
        found.append((r, ConvLayer("G.torgb", channels(r), 3, r)))
    found.append((network, ConvLayer("D.fromrgb", 3, channels(network), network)))
    for r in reversed(resolutions[1:]):
        found.append((r, ConvLayer("D.conv0", channels(r), channels(r), r)))
        found.append((r, ConvLayer("D.conv1", channels(r), channels(r // 2), r)))
        found.append((r, ConvLayer("D.skip", channels(r), channels(r // 2), r)))
    found.append((4, ConvLayer("D.conv", channels(4) + 1, channels(4), 4)))  # + 1: deviations
    return found


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


def _layers(size: str) -> list[Layer]:
    if size == "full":
        return layers()
    largest = 16 if size == "quick" else 256
    return [layer for layer in layers((256,))[::2] if layer.resolution <= largest]


def _shapes(size: str, device_type: str) -> dict[tuple[int, ...], str]:
    """Shape -> names of the layers that have it."""
    shapes: dict[tuple[int, ...], str] = {
        (batch(layer, device_type), layer.channels, layer.resolution, layer.resolution): layer.name
        for layer in _layers(size)
    }
    if size != "quick":
        for target in TARGETS:
            shapes.setdefault(target, "target")
        shapes[TINY["bias_act"]] = OVERHEAD
    return shapes


def _resamplings(size: str, device_type: str) -> dict[tuple[str, tuple[int, ...]], str]:
    """(variant, shape of the input) -> where it is found.

    A block of the generator filters after the transposed convolution of conv0 and enlarges the
    image of the block before; a block of the discriminator filters before conv1 and halves its
    input for the skip connection.
    """
    found: dict[tuple[str, tuple[int, ...]], list[str]] = {}

    def add(variant: str, channels: int, size: int, where: str) -> None:
        n = batch(Layer(where, channels, size), device_type)
        found.setdefault((variant, (n, channels, size, size)), []).append(where)

    for names, channels, resolution in _layers(size)[0 if size == "full" else -1 :]:
        if resolution == 4:  # the first block resamples nothing
            continue
        add("after conv + epilogue", channels, resolution + 1, f"{names} G.conv0")
        add("up2 + add", 3, resolution // 2, f"{names} G image")
        if size == "full":
            add("after conv", channels, resolution + 1, f"{names} G.conv0")
            add("up2", 3, resolution // 2, f"{names} G image")
            add("before conv", channels, resolution, f"{names} D.conv1")
            add("down2", channels, resolution, f"{names} D.skip")
    if size == "full":
        for resolution in CHANNEL_BASE:
            add("up2 12-tap", 3, resolution, "ADA")
            add("down2 12-tap crop", 3, 2 * resolution, "ADA")
            add("blur 61-tap", 3, resolution, "StyleGAN3-R D")
        add("down2 crop", 3, 512, "EG3D D")
        add("up4 47x47", 3, 256, "StyleGAN3 viewer")
        add("up4 127x127", 3, 64, "StyleGAN3 equivariance")
        add("blur 1x61", 3, 256, "StyleGAN3 equivariance")
    resamplings = {key: " ".join(dict.fromkeys(places)) for key, places in found.items()}
    for variant in TARGET_VARIANTS:
        if size != "quick":
            for target in TARGETS:
                resamplings.setdefault((variant, target), "target")
        if "12-tap" not in variant:
            resamplings[variant, TINY["upfirdn2d"]] = OVERHEAD
    return resamplings


def _timed(size: str, case: Case) -> bool:
    """Whether the size has this resampling. The full one leaves out what measures nothing of its
    own, the others what takes long: in NHWC, calls of the filter alone; most derivatives."""
    fused = "+" in case.variant
    if case.variant.endswith("+ add") and case.level == "kernel" and case.mode == "backward":
        return False  # that of the filter alone
    if fused and case.mode == "double backward":
        return False
    if case.shape == TINY["upfirdn2d"]:
        wanted = case.mode == "forward" or size == "quick"
        return (case.level, case.layout) == ("user", "nchw") and wanted
    if size == "full":
        return True
    if case.mode == "backward":
        return False
    if fused or case.level == "kernel":
        return True
    wanted = case.mode in TARGET_VARIANTS[case.variant]
    return wanted and case.layout == "nchw" and (case.mode == "forward" or case.shape == TARGETS[0])


def _bent(size: str, device_type: str) -> dict[tuple[str, tuple[int, ...]], str]:
    """(variant, shape of the input) -> the layer of StyleGAN3 that has it."""
    found = {("up2 down2", 512, 38): "256-T L1"}
    if size != "quick":
        found |= {
            ("up4 down2", 181, 150): "256-T L10",
            ("up2 down2", 91, 278): "256-T L12",
            ("up2 down2 radial", 256, 84): "R L4",
        }
    if size == "full":
        found |= {("up4 down2", 323, 278): "1024-T L10", ("up2 down2", 51, 1046): "1024-T L12"}
    shapes = {}
    for (variant, channels, width), where in found.items():
        n = batch(Layer(where, channels, width), device_type)
        shapes[variant, (n, channels, width, width)] = where
    return shapes


def _normalised(size: str) -> dict[tuple[int, ...], str]:
    """Shape -> where it is found, of what StyleGAN normalises."""
    if size == "quick":
        return {TINY["bias_act"]: OVERHEAD}
    shapes = {TARGETS[0]: "target"}
    if size == "full":
        shapes |= {(4, 512, 16, 16): "StyleGAN b16", (1, 16, 1024, 1024): "StyleGAN b1024"}
    return shapes


def _conv_layers(size: str, device_type: str) -> dict[tuple[ConvLayer, int], str]:
    """(layer, batch) -> the blocks that have it."""
    small = device_type == "cpu"
    network, blocks = LAYER_BLOCKS["cpu" if small else "cuda"]
    networks = tuple(CHANNEL_BASE) if size == "full" else (network,)
    batches = {"quick": (1,), "default": (1,), "full": (1, 4) if small else (1, 8, 32)}[size]
    found: dict[tuple[ConvLayer, int], list[str]] = {}
    for network in networks:
        for resolution, layer in conv_layers(network):
            if size != "full" and resolution not in ((8,) if size == "quick" else blocks):
                continue
            for n in batches:
                if small and n > 1 and n * layer.elements > 2**24:
                    continue  # minutes, and more memory than most machines have
                found.setdefault((layer, n), []).append(f"{network}:b{resolution}")
    return {key: " ".join(dict.fromkeys(places)) for key, places in found.items()}


def _formats(
    op: str, size: str, device_type: str, arguments: argparse.Namespace
) -> list[tuple[str, str]]:
    """(dtype, layout) of layers or networks. By default float32 in NCHW, and 16 bits in NHWC, as
    tensor cores want it."""
    dtypes = arguments.dtype or ["float32", "bfloat16", "float16"]
    if not arguments.dtype:
        few = size == "quick" or (op, size, device_type) == ("layers", "default", "cpu")
        many = (size, device_type) == ("full", "cuda")
        dtypes = dtypes[: 1 if few else 3 if many else 2]
    every = arguments.layout or (LAYOUTS if size == "full" else ())
    return [
        (dtype, layout)
        for dtype in dtypes
        if dtype != "float64"
        for layout in every or ["nchw" if dtype == "float32" else "nhwc"]
    ]


def _network_cases(size: str, device_type: str, formats: list[tuple[str, str]]) -> list[Case]:
    cases = []
    resolutions = tuple(CHANNEL_BASE)[: 1 if size == "quick" else None]
    letters = ("G",) if size == "quick" else ("G", "D", "G3")
    for letter, resolution, (dtype, layout) in itertools.product(letters, resolutions, formats):
        if (dtype, layout) == ("float32", "nhwc"):
            continue  # only 16-bit blocks work in it
        if letter == "G3" and (
            (device_type == "cpu" and (resolution > 256 or dtype != "float32"))
            or (size != "full" and resolution > 256)
        ):
            continue  # that takes minutes
        batches = {"quick": (1,), "default": (1, 8), "full": (1, 8, 32)}[size]
        if device_type == "cpu":
            batches = (1, 4) if size == "full" and resolution == 256 else (1,)
            if size != "full" and dtype != "float32" and resolution > 256:
                continue
        for n, mode in itertools.product(batches, LEVELS["network"]):
            if mode == "CUDA graph" and (device_type == "cpu" or n > 1):
                continue  # beside the work of a larger batch, launches cost nothing
            shape, variant = (n, 3, resolution, resolution), f"{letter} {resolution}"
            cases.append(Case("networks", "", shape, dtype, layout, "network", mode, variant))
    return cases


def _dtypes(size: str, device_type: str) -> list[str]:
    if device_type == "cpu":
        return list(DTYPES) if size == "full" else ["float32"]
    return ["float32", "bfloat16", "float16"][: 1 if size == "quick" else 3]


def select(
    arguments: argparse.Namespace, device_type: str, of_peers: Sequence[Case] = ()
) -> list[Case]:
    """The cases of a size (quick, default or full), and those of the peers. A filter chooses among
    everything there is; what no filter names stays as the size has it."""
    size = "full" if arguments.full else "quick" if arguments.quick else "default"
    shapes = _shapes("full" if arguments.shape else size, device_type)
    dtypes = arguments.dtype or _dtypes(size, device_type)
    of_layers, of_networks = (
        _formats(op, size, device_type, arguments) for op in ("layers", "networks")
    )
    images = {"quick": 2, "default": 4, "full": 4}[size] * (1 if device_type == "cpu" else 8)
    cases = [
        Case("bias_act", layer, shape, dtype, layout, level, mode)
        for shape, layer in shapes.items()
        for dtype in dtypes
        for layout in LAYOUTS
        for level in ("kernel", "user")
        for mode in LEVELS[level]
    ]
    size = "full" if arguments.shape else size
    resamplings = [
        Case("upfirdn2d", layer, shape, dtype, layout, level, mode, variant)
        for (variant, shape), layer in _resamplings(size, device_type).items()
        for dtype in dtypes
        for layout in LAYOUTS
        for level in ("kernel", "user")
        for mode in LEVELS[level]
    ]
    cases += [case for case in resamplings if _timed(size, case)]
    cases += [
        Case("filtered_lrelu", layer, shape, dtype, layout, level, mode, variant)
        for (variant, shape), layer in _bent(size, device_type).items()
        for dtype in dtypes
        for layout in LAYOUTS
        for level in ("kernel", "user")
        for mode in LEVELS[level]
        if mode != "double backward" or size == "full"
    ]
    cases += [
        Case("adain", layer, shape, dtype, layout, level, mode)
        for shape, layer in _normalised(size).items()
        for dtype in dtypes
        for layout in LAYOUTS
        for level in ("kernel", "user")
        for mode in LEVELS[level]
    ]
    photographs = ", ".join(PHOTOGRAPH_VARIANTS)
    shape = (2 if size == "quick" else 4, 3, 256, 256)
    cases.append(Case("photographs", photographs, shape, "float32", "nchw", "user", "forward"))
    cases += [
        Case("layers", where, shape, dtype, layout, "user", mode, layer.variant)
        for (layer, n), where in _conv_layers(size, device_type).items()
        for shape in ((n, layer.in_channels, layer.size, layer.size),)
        for dtype, layout in of_layers
        for mode in LEVELS["user"]
    ]
    cases += _network_cases(size, device_type, of_networks)
    widths = TRAINING_WIDTHS[:1] if size == "quick" else TRAINING_WIDTHS
    cases += [
        Case(
            "training", "StyleGAN2", (images, 3, 64, 64), "float32", "nchw", "training", mode, width
        )
        for width in widths
        for mode in LEVELS["training"]
    ]
    return [case for case in (*cases, *of_peers) if _wanted(case, arguments)]


def _wanted(case: Case, arguments: argparse.Namespace) -> bool:
    filters = {"op": case.op, "dtype": case.dtype, "layout": case.layout, "mode": case.mode}
    for name, value in filters.items():
        allowed = getattr(arguments, name)
        if allowed and value not in allowed:
            return False
    text = f"{case.variant} {case.shape_name} {case.layer}"
    return not arguments.shape or any(part in text for part in arguments.shape)
