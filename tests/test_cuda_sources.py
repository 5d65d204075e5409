"""The CUDA kernels without a GPU: what nvcc makes of them, and their source run on the CPU.

tests/cuda_on_cpu has the part of CUDA that the kernels use for an ordinary C++ compiler, so
AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer watch every one of them while its
results are compared with a plain evaluation.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "csrc" / "cuda" / "epilogue.cu"
HARNESS = ROOT / "tests" / "cuda_on_cpu"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
MAX_REGISTERS = {256: 64, 192: 80}
SANITIZERS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-fsanitize=thread",),
}


def run(*command, timeout: float = 300, check: bool = True) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout,
    )
    if check and done.returncode:
        pytest.fail(f"{' '.join(map(str, command))}\nexit status {done.returncode}\n{done.stdout[-4000:]}")
    return done.stdout
