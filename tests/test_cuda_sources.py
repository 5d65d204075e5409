"""The CUDA kernels without a GPU: what nvcc makes of them, and their source run on the CPU.

tests/cuda_on_cpu has the part of CUDA that the kernels use for an ordinary C++ compiler, so that
AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer watch every kernel while its
results are compared with a plain evaluation.
"""

from __future__ import annotations

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
SANITIZERS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-fsanitize=thread",),
}
REGISTER_FILE = 64 * 1024
THREADS = 256


def run(*command, check: bool = True, timeout: float = 300) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
        text=True,
        errors="replace",
        timeout=timeout,
    )
    if check and done.returncode:
        pytest.fail(f"{command[0]} ended with status {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


class Kernel(NamedTuple):
    name: str
    registers: int
    spilled: int  # bytes of stores and loads

    @property
    def resident_blocks(self) -> int:
        """What the launch bounds of csrc/cuda/epilogue.cu ask for; bounds the registers."""
        return 3 if "Curved" in self.name and ", 8, " in self.name else 4


class Cubin(NamedTuple):
    path: Path
    kernels: list[Kernel]


def demangled(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt") or pytest.skip("c++filt is not installed")
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True).stdout
    text = re.sub(r"stylegan_fast::|cuda::|\(anonymous namespace\)::|^void ", "", text, flags=re.M)
    return [re.match(r"\w+(<.*>)?(?=\()", line)[0] for line in text.splitlines()]


@pytest.fixture(scope="module")
def nvcc() -> str:
    homes = [home for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *(f"{home}/bin" for home in homes)])
    return shutil.which("nvcc", path=path) or pytest.skip("nvcc is not installed")


@pytest.fixture(scope="module")
def cubins(nvcc, tmp_path_factory) -> dict[str, Cubin]:
    folder = tmp_path_factory.mktemp("cubins")
    known = run(nvcc, "--list-gpu-code").split()

    def compiled(architecture: str) -> Cubin:
        path = folder / f"{architecture}.cubin"
        options = ("-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v", "-Werror",
                   "all-warnings", "-I", ROOT / "csrc")  # fmt: skip
        log = run(nvcc, *options, "-cubin", SOURCE, "-o", path)
        names = re.findall(r"Compiling entry function '(\w+)'", log)
        spills = re.findall(
            r"(\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) reg", log
        )
        assert len(names) == len(spills) > 50
        return Cubin(
            path,
            [
                Kernel(name, int(registers), int(stores) + int(loads))
                for name, (stores, loads, registers) in zip(demangled(names), spills)
            ],
        )

    with ThreadPoolExecutor(2) as pool:
        wanted = [architecture for architecture in ARCHITECTURES if architecture in known]
        return dict(zip(wanted, pool.map(compiled, wanted)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_fit_registers(cubins, architecture):
    if architecture not in cubins:
        pytest.skip(f"this nvcc does not know {architecture}")
    print(f"\nregisters on {architecture}")
    for kernel in sorted(cubins[architecture].kernels):
        print(f"{kernel.registers:5}  {kernel.name}")
    for kernel in cubins[architecture].kernels:
        assert kernel.spilled == 0, kernel
        assert kernel.registers <= REGISTER_FILE // THREADS // kernel.resident_blocks, kernel


@pytest.fixture(scope="module")
def sass(cubins) -> dict[str, list[tuple[int, str]]]:
    """Address and text of every instruction of every kernel on sm_90."""
    found = importlib.util.find_spec("triton")
    tools = Path(found.origin).parent / "backends" / "nvidia" / "bin" if found else Path()
    cuobjdump = shutil.which("cuobjdump", path=tools) or shutil.which("cuobjdump")
    if cuobjdump is None:
        pytest.skip("cuobjdump is neither on PATH nor in the triton wheel")
    _, *functions = re.split(r"\n\s*Function : ", run(cuobjdump, "-sass", cubins["sm_90"].path))
    names = demangled([function.split("\n", 1)[0] for function in functions])
    return {
        name: [
            (int(address, 16), text)
            for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?) *;", function)
        ]
        for name, function in zip(names, functions)
    }


def hot(sass, *words: str) -> dict[str, list[tuple[int, str]]]:
    """The kernels of whole packs: 8 elements of 16 bits or 4 of 32."""
    packs = re.compile(r"(forward|derivative)_kernel<(float, 4|__half, 8|__nv_bfloat16, 8),")
    return {
        name: code
        for name, code in sass.items()
        if packs.match(name) and (not words or any(word in name for word in words))
    }


def test_kernels_move_16_bytes(sass):
    kernels = hot(sass)
    assert len(kernels) == 45
    for name, code in kernels.items():
        text = "\n".join(instruction for _, instruction in code)
        assert re.search(r"\bLDG\.E\.128", text), name
        assert re.search(r"\bSTG\.E\.128", text), name
        assert not re.search(r"\b(LDL|STL)\b", text), f"{name} uses local memory"


def test_loops_divide_no_integers(sass):
    """An integer division by a variable begins with a reciprocal or calls a subroutine."""
    kernels = hot(sass, "PiecewiseLinear", "Masked")
    assert len(kernels) == 33
    for name, code in kernels.items():
        jumps = [
            (int(target[1], 16), address)
            for address, text in code
            if (target := re.search(r"\bBRA (0x[0-9a-f]+)", text))
        ]
        start, end = max(
            ((to, at) for to, at in jumps if to < at), key=lambda jump: jump[1] - jump[0]
        )
        body = [text for address, text in code if start <= address <= end]
        assert any("LDG.E.128" in text for text in body), f"{name}: this is not the main loop"
        assert not [text for text in body if re.search(r"MUFU\.RCP|\bCALL", text)], name


@pytest.fixture(scope="module")
def compiler() -> str:
    named = os.environ.get("CXX") or "g++"
    return shutil.which(named) or shutil.which("clang++") or pytest.skip("there is no C++ compiler")


@pytest.fixture(scope="module")
def harness(compiler, tmp_path_factory):
    """A function that compiles sources and the harness to a program, once for each sanitizer."""
    folder = tmp_path_factory.mktemp("cuda_on_cpu")

    def build(sanitizer: str, *sources: Path, name: str, defines: tuple[str, ...] = ()) -> Path:
        program = folder / f"{name}_{sanitizer}"
        if not program.exists():
            # fmt: off
            run(compiler, "-std=c++17", "-Og", "-g1", "-Wall", "-Wno-unknown-pragmas", "-Werror",
                "-I", HARNESS, "-I", ROOT / "csrc", *SANITIZERS[sanitizer], *defines,
                "-x", "c++", *sources, "-o", program)
            # fmt: on
        return program

    return build


def run_sanitized(program: Path, *arguments: str) -> str:
    output = run(program, *arguments, check=False)
    if "unexpected memory mapping" in output:  # too random an address space for this sanitizer
        output = run("setarch", "-R", program, *arguments, check=False)
    return output


@pytest.mark.parametrize(
    "sanitizer, cases, kernels",
    [("address", "all", 61), ("thread", "few", 61), ("address", "far", 10)],
)
def test_kernels_on_cpu(harness, sanitizer, cases, kernels):
    program = harness(sanitizer, SOURCE, HARNESS / "epilogue_test.cpp", name="epilogue")
    output = run_sanitized(program, cases)
    assert output.strip().endswith(f"{kernels} kernels launched, 0 failures"), output[-4000:]
    assert "Sanitizer:" not in output, output[-4000:]


def test_every_kernel_runs_on_cpu(cubins):
    """The number of kernels that the test above expects is that of the whole source."""
    assert {len(cubin.kernels) for cubin in cubins.values()} == {61}


@pytest.mark.parametrize(
    "sanitizer, fault, report",
    [
        ("address", None, "all kernels are right$"),
        ("thread", None, "all kernels are right$"),
        (
            "address",
            "OUT_OF_BOUNDS",
            r"AddressSanitizer: heap-buffer-overflow[^$]*seeded_faults.cpp",
        ),
        ("thread", "MISSING_BARRIER", r"ThreadSanitizer: data race[^$]*seeded_faults.cpp"),
        ("thread", "MISSING_SECOND_BARRIER", r"ThreadSanitizer: data race[^$]*seeded_faults.cpp"),
        ("address", "DIVERGENT_BARRIER", "threads of one block wait at different barriers"),
    ],
)
def test_seeded_faults_are_found(harness, sanitizer, fault, report):
    defines = (f"-DSEED_{fault}",) if fault else ()
    source = HARNESS / "seeded_faults.cpp"
    program = harness(sanitizer, source, name=f"seeded_{fault}", defines=defines)
    output = run_sanitized(program)
    assert re.search(report, output), output
    assert fault or "Sanitizer:" not in output, output
