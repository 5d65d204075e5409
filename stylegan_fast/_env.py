"""Every environment variable this package reads at run time, parsed strictly, in one place."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLES = {
    "STYLEGAN_FAST_BACKEND": "backend of every op: reference, cpu, triton or cuda",
    "STYLEGAN_FAST_SIMD": "level of the CPU kernels: baseline, avx2 or avx512 (default: widest)",
    "STYLEGAN_FAST_CACHE": "folder of measured choices, or off (default: in the user's cache)",
    "STYLEGAN_FAST_WINOGRAD": "0: no Winograd convolutions on the CPU, only direct sums",
    "STYLEGAN_FAST_HUGE_PAGES": "0: the CPU kernels do not ask Linux for huge pages",
    "TRITON_INTERPRET": "1: run Triton kernels on the CPU in Triton's interpreter (for tests)",
}

BUILD_VARIABLES = {
    "STYLEGAN_FAST_CUDA": "auto, on or off: compile the CUDA kernels (read by setup.py)",
    "STYLEGAN_FAST_LEVELS": "all or baseline: SIMD levels to compile (read by setup.py)",
    "TORCH_CUDA_ARCH_LIST": "GPU architectures to compile for, as 8.0;9.0+PTX (read by setup.py)",
    "MAX_JOBS": "number of parallel compiler processes (read by setup.py)",
    "CXX": "C++ compiler; also CC, CXXFLAGS, LDFLAGS (read by setup.py)",
    "CUDA_HOME": "CUDA toolkit whose nvcc to use (read by setup.py)",
    "STYLEGAN_FAST_COMMIT": "commit to record where there is no git checkout (read by setup.py)",
}


def choice(name: str, allowed: tuple[str, ...]) -> str | None:
    """The variable's value, or None where it is unset or empty. ValueError for anything else."""
    value = os.environ.get(name, "")
    if not value:
        return None
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}; {VARIABLES[name]}")
    return value


def flag(name: str) -> bool:
    return os.environ.get(name, "") == "1"


def cache_folder() -> Path | None:
    """Where measured choices are kept between processes; None: nowhere."""
    folder = os.environ.get("STYLEGAN_FAST_CACHE", "")
    if folder == "off":
        return None
    if folder:
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME", "")
    # By the XDG specification a path that is not absolute is as good as none.
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "stylegan_fast"
