"""The C++ kernels under the sanitizers, and for processors that are not here."""

import shutil
import subprocess
from pathlib import Path

import pytest

from stylegan_fast.backends import native

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "cpu"
DRIVERS = ROOT / "tests" / "cpu_sources"
FAMILIES = ("adain", "conv2d", "demodulation", "epilogue", "filtered_lrelu", "upfirdn2d")
FLAGS = ["-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-Wno-unknown-pragmas"]
X86_LEVELS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}


def build(compiler, family, level, directory, *flags):
    """The driver of this family and level: one object a source, compiled side by side."""
    define = f"-DSTYLEGAN_FAST_SIMD={level}"
    command = [compiler, *FLAGS, *flags, *X86_LEVELS[level], define]
    sources = (KERNELS / f"{family}.cpp", DRIVERS / f"{family}_driver.cpp")
    objects = {source: directory / f"{source.stem}.o" for source in sources}
    running = [
        subprocess.Popen([*command, "-c", source, "-o", output], stderr=subprocess.PIPE, text=True)
        for source, output in objects.items()
    ]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    executable = directory / "driver"
    subprocess.run([*command, *objects.values(), "-o", executable], check=True)
    return executable


def widest_level():
    module, _ = native.load()
    return module.simd_level() if module else "baseline"


# What compiles sooner is enough to find an access out of bounds; make test-all takes the rest.
SANITIZED = [
    ("baseline", ("-O0", "-fsanitize=address")),
    *(
        pytest.param(level, ("-O1", "-fsanitize=address,undefined"), marks=pytest.mark.exhaustive)
        for level in sorted({"baseline", widest_level()})
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("level, flags", SANITIZED)
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_under_the_sanitizers(family, level, flags, tmp_path):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    driver = build(compiler, family, level, tmp_path, "-fopenmp", "-g1", *flags)
    done = subprocess.run([driver], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 100_000
    assert not done.stderr


SLOW_TO_COMPILE = ("epilogue", "filtered_lrelu", "upfirdn2d")


@pytest.mark.slow
@pytest.mark.parametrize("family", [
    pytest.param(family, marks=pytest.mark.exhaustive if family in SLOW_TO_COMPILE else ())
    for family in FAMILIES
])  # fmt: skip
def test_kernels_on_arm64(family, tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")
    if compiler is None:
        pytest.skip("no aarch64-linux-gnu-g++ to compile for arm64")
    driver = build(compiler, family, "baseline", tmp_path, "-O1", "-static")
    if emulator is None:
        pytest.skip("compiled for arm64; no qemu-aarch64-static to run it")
    done = subprocess.run([emulator, driver], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
