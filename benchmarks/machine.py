"""The conditions of a run, the ceilings of the machine, and the memory a call takes."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..backends import native
from .timing import Call, interleaved, stopwatch

MEMORY_METHODS = {
    "cuda": "torch.cuda.max_memory_allocated above what was allocated before the call",
    "cpu": "largest sum of PyTorch's allocations during the call (torch.profiler)",
}


def conditions(device: torch.device) -> dict[str, str]:
    """What has to be known to repeat a measurement, under the names of the result columns."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    commit, dirty = _commit()
    module, _ = native.load()
    return {
        "device": device.type,
        "processor": _gpu(device) if device.type == "cuda" else _cpu(),
        "cores": str(cores),
        "threads": str(torch.get_num_threads()),
        "clock": _gpu_clock(device) if device.type == "cuda" else _cpu_clock(),
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "",
        "system": f"{platform.system()} {platform.machine()}",
        # A preloaded allocator changes what a call costs.
        "preload": " ".join(Path(p).name for p in os.environ.get("LD_PRELOAD", "").split()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip or "",
        "triton": _version("triton"),
        "stylegan_fast": __version__,
        "simd": module.simd_level() if module is not None else "",
        "commit": commit,
        "dirty": dirty,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    """What a command prints, or nothing where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def git_commit(folder: Path) -> tuple[str, bool]:
    """The commit of a checkout, and whether tracked files differ from it; ("", False) if the
    folder is none."""
    git = ("git", "-C", str(folder))
    if _output(*git, "rev-parse", "--show-prefix"):  # a folder inside somebody else's checkout
        return "", False
    commit = _output(*git, "rev-parse", "HEAD")
    return commit, bool(_output(*git, "status", "--porcelain", "--untracked-files=no"))


def _commit() -> tuple[str, str]:
    commit, dirty = git_commit(Path(__file__).resolve().parent.parent)
    if commit:
        return commit, "yes" if dirty else "no"
    return str(native.build_record().get("commit") or ""), ""


def _cpu_fact(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _cpu() -> str:
    return _cpu_fact("model name") or platform.processor() or platform.machine()


def _cpu_clock() -> str:
    frequency = _cpu_fact("cpu MHz")
    return f"{float(frequency):.0f} MHz at the start" if frequency else ""


def _gpu(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} ({properties.multi_processor_count} SMs)"


def _gpu_clock(device: torch.device) -> str:
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if uuid is None:
        return ""
    query = "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    facts = _output("nvidia-smi", f"--id=GPU-{uuid}", query, "--format=csv,noheader")
    names = ("SM", "memory", "largest SM", "power limit")
    return ", ".join(f"{n} {fact.strip()}" for n, fact in zip(names, facts.split(",")) if fact)


def matrix_product(device: torch.device, dtype: torch.dtype) -> tuple[Call, int]:
    """A large matrix product, the ceiling of what computes, and its FLOPs."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, a, out=out), 2 * size**3


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    call, flops = matrix_product(device, dtype)
    timing = interleaved({"": call}, stopwatch(device), seconds=0.2)[""]
    return flops / timing.median_us * 1e6


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products on tensor cores may round their factors to TF32."""
    flags: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = allowed
        yield
    finally:
        for flag, value in zip(flags, before):
            flag.allow_tf32 = value


def launches(call: Call, device: torch.device) -> int:
    """How many kernels the call starts on a GPU; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    call()  # what is compiled, tuned or loaded at a first call does not count
    return kernels(_trace(call, torch.profiler.ProfilerActivity.CUDA, device))


def kernels(events: list[dict[str, Any]]) -> int:
    """Those in the events of a profile; copies and fills by the driver are none."""
    return sum(event.get("cat") == "kernel" for event in events)


def peak_memory(call: Call, device: torch.device) -> int:
    """The most bytes of tensors the call holds at once, results included and inputs not.

    What libraries allocate without PyTorch's allocator does not count.
    """
    measure: Callable[..., int] = _cuda_peak if device.type == "cuda" else _host_peak
    return measure(call, device)


def _cuda_peak(call: Call, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def _trace(call: Call, activity: Any, device: torch.device) -> list[dict[str, Any]]:
    """The events of one call."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's remarks break the display
    memory = device.type == "cpu"
    with torch.profiler.profile(activities=[activity], profile_memory=memory) as profile:
        result = call()
        if not memory:
            torch.cuda.synchronize(device)
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        return json.loads(trace.read_text())["traceEvents"]


def _host_peak(call: Call, device: torch.device) -> int:
    events = _trace(call, torch.profiler.ProfilerActivity.CPU, device)
    held = peak = 0
    for event in sorted(
        (event for event in events if event.get("name") == "[memory]"), key=lambda e: e["ts"]
    ):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
