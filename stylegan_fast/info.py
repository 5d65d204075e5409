"""`python -m stylegan_fast info`: what is installed, what can run here, and why the rest cannot."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
from typing import Any

import torch

from . import __version__, _env, _store, backends
from .backends import choice, native
from .check import dtype_name, print_bold, print_table

KERNEL, PYTORCH = "kernel", "PyTorch"


def collect() -> dict[str, Any]:
    """All that `info` shows, as JSON can hold it."""
    return {
        "versions": _versions(),
        "devices": _devices(),
        "backends": _backends(),
        "automatic": {device: _automatic(device) for device in _device_types()},
        "convolutions": {device: _convolutions(device) for device in _device_types()},
        "requested": backends.requested_backend(),
        "environment": _environment(),
        "build": _build(),
    }


def _versions() -> dict[str, str | None]:
    def installed(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "stylegan_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch's CUDA": torch.version.cuda,
        "torch's HIP": torch.version.hip,
        "triton": installed("triton") or installed("triton-windows"),
        "numpy": installed("numpy"),
        "system": platform.platform(),
    }


def _devices() -> dict[str, Any]:
    module, _ = native.load()
    return {
        "cpu": {
            "model": _store.processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "simd_levels": module.simd_levels() if module else [],
            "simd_level": module.simd_level() if module else None,
        },
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
    }


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    cuda = torch.version.hip is None
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}" if cuda else properties.gcnArchName,
        "memory": properties.total_memory,
    }


def _device_types() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _backends() -> dict[str, dict[str, str]]:
    def cell(name: str) -> str:
        reason = backends.unavailable(name)
        if reason is not None:
            return reason
        return PYTORCH if name == "reference" else KERNEL

    return {op: {name: cell(name) for name in backends.BACKENDS} for op in backends.OPS}


def _automatic(device: str) -> dict[str, str]:
    """The backend of bias_act for each dtype."""
    dtypes = backends.reference.dtypes()
    return {dtype_name(dtype): backends.automatic("bias_act", device, dtype) for dtype in dtypes}


LAYERS = {
    "conv1 512→512 at 16²": (512, 512, 16, 3, 1),
    "conv1 512→512 at 64²": (512, 512, 64, 3, 1),
    "conv1 128→128 at 256²": (128, 128, 256, 3, 1),
    "conv1 32→32 at 1024²": (32, 32, 1024, 3, 1),
    "conv0 512→256 to 128²": (512, 256, 64, 6, 2),
    "conv0 64→32 to 1024²": (64, 32, 512, 6, 2),
    "torgb 32→3 at 1024²": (32, 3, 1024, 1, 1),
}
"""Some convolutions of StyleGAN2: input and output channels, input size, kernel size (of an
upsampling layer with its filter) and factor."""


def _convolutions(device_type: str) -> dict[str, Any]:
    """Who runs the convolutions of an image in float32 and bfloat16, forward."""
    device = torch.device(device_type)
    measured = choice.table(device)
    path = choice.path()
    chosen: dict[str, dict[str, str]] = {}
    for layer, (i, o, size, kernel, up) in LAYERS.items():
        chosen[layer] = {}
        for dtype in (torch.float32, torch.bfloat16):
            name = backends.automatic("modulated_conv2d", device_type, dtype)
            call = choice.ConvClass(
                choice.FORWARD, dtype, dtype != torch.float32, 1, i, o, size, size, kernel, kernel,
                up, 1, kernel // 2, kernel // 2,
            )  # fmt: skip
            own = name != "reference" and choice.own_kernel(
                name, backends.BACKENDS[name], call, device
            )
            chosen[layer][dtype_name(dtype)] = f"{name}'s kernel" if own else PYTORCH
    return {"file": str(path or "off"), "measured": len(measured), "chosen": chosen}


def _environment() -> list[dict[str, str | None]]:
    variables = {**_env.VARIABLES, **_env.BUILD_VARIABLES}
    return [
        {"name": name, "value": os.environ.get(name), "meaning": meaning}
        for name, meaning in variables.items()
    ]


def _build() -> dict[str, Any]:
    """What the module says of itself; without it, what setup.py wrote down."""
    module, _ = native.load()
    return (json.loads(module.build_info) if module else None) or native.build_record()


def show(facts: dict[str, Any]) -> None:
    _show_pairs("Versions", {k: v or "none" for k, v in facts["versions"].items()})
    _show_pairs("Devices", _described_devices(facts["devices"]))
    _show_backends(facts)
    for device, convolutions in facts["convolutions"].items():
        rows = [[layer, *row.values()] for layer, row in convolutions["chosen"].items()]
        print_table([f"Convolutions on {device}", "float32", "bfloat16 nhwc"], rows)
        count, file = convolutions["measured"], convolutions["file"]
        print(f"{count} measured choices (bench --tune) in {file}; the rest by a cost model")
        print()
    print_table(
        ["Environment variable", "value", "meaning"],
        [
            [row["name"], "(unset)" if row["value"] is None else row["value"], row["meaning"]]
            for row in facts["environment"]
        ],
    )
    print()
    _show_build(facts["build"])


def _show_pairs(title: str, pairs: dict[str, str]) -> None:
    print_table([title, ""], list(pairs.items()))
    print()


def _described_devices(devices: dict[str, Any]) -> dict[str, str]:
    cpu = devices["cpu"]
    levels = ", ".join(cpu["simd_levels"])
    described = {
        "CPU": cpu["model"],
        "cores": f"{cpu['cores']}; threads of PyTorch and of the kernels: {cpu['threads']}",
        "SIMD": f"{cpu['simd_level']} (of {levels})" if levels else "no compiled kernels",
    }
    for index, gpu in enumerate(devices["gpus"]):
        memory = f"{gpu['memory'] / 2**30:.1f} GiB"
        described[f"GPU {index}"] = f"{gpu['name']}, capability {gpu['capability']}, {memory}"
    return described


def _show_backends(facts: dict[str, Any]) -> None:
    """The reasons are long and belong to a whole column: they stand below the table."""
    notes: list[str] = []

    def cell(text: str) -> str:
        if text in (KERNEL, PYTORCH):
            return text
        if text not in notes:
            notes.append(text)
        return f"no ({notes.index(text) + 1})"

    names = list(backends.BACKENDS)
    rows = [[op, *(cell(row[name]) for name in names)] for op, row in facts["backends"].items()]
    print_table(["Backends", *names], rows)
    for number, note in enumerate(notes, 1):
        print(f"({number}) {note}")
    print()
    if facts["requested"] is not None:
        print(f"Every op runs on the backend {facts['requested']}, as STYLEGAN_FAST_BACKEND says.")
    for device, choices in facts["automatic"].items():
        dtypes: dict[str, list[str]] = {}
        for dtype, name in choices.items():
            dtypes.setdefault(name, []).append(dtype)
        chosen = "; ".join(f"{name} for {', '.join(served)}" for name, served in dtypes.items())
        print(f"Automatic choice for {device} tensors: {chosen}")
    print()


def _show_build(build: dict[str, Any]) -> None:
    if not build:
        print_bold("Build")
        print("no record: pip compiles the kernels when it installs the package")
        return
    commit = build.get("commit") or "unknown"
    pairs = {"time": build["time"], "commit": commit, "Python": build["python"]}
    for part in ("cpu", "cuda"):
        details = build[part]
        if not details["ok"]:
            # A compiler's last words have many lines.
            pairs[part] = "not built: " + details["reason"].replace("\n", "\n    ")
            continue
        pairs[part] = details["version"]
        pairs[f"{part} flags"] = shlex.join(details["command"] + details["flags"])
        if "architectures" in details:
            pairs[f"{part} architectures"] = ", ".join(details["architectures"])
        for level, flags in details.get("levels", {}).items():
            pairs[f"{part} {level}"] = shlex.join(flags) or "(the flags above)"
    _show_pairs("Build", pairs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Exit status: always 0."""
    facts = collect()
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        show(facts)
    return 0
