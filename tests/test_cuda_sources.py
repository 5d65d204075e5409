"""The CUDA kernels without a GPU: what nvcc makes of them, and their source run on the CPU.

tests/cuda_on_cpu has the part of CUDA that the kernels use for an ordinary C++ compiler, so that
AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer watch every kernel while its
results are compared with a plain evaluation.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from stylegan_fast.backends import cuda

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
# How many kernels each source has; every one of them runs on the CPU below.
KERNELS = {"adain": 96, "demodulation": 2, "epilogue": 70, "filtered_lrelu": 48, "upfirdn2d": 66}
SUMS = 13  # of the epilogue's kernels, upfirdn2d launches those that only add up d(v)
HARNESS = ROOT / "tests" / "cuda_on_cpu"
ARCHITECTURES = [
    "sm_90",
    *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("sm_80", "sm_100", "sm_120")),
]
SANITIZERS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-fsanitize=thread",),
}
REGISTER_FILE = 64 * 1024


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
    local: int  # bytes of the stack and of spills

    @property
    def most_registers(self) -> int:
        """What leaves room for as many threads on a multiprocessor as the launch bounds ask for."""
        if self.name.startswith("stream_kernel"):
            threads = 128 * (4 if re.search(r"Shape<\d, \d, 6>", self.name) else 5)
        elif self.name.startswith("tile_kernel"):
            threads = 256 * 3
        elif self.name.startswith("planes_kernel"):
            threads = 128 * 6
        elif self.name.startswith("pixels_kernel"):
            threads = 256 * 2
        elif self.name.startswith("moments_kernel"):
            threads = 256 * (3 if "<float" in self.name else 2)
        elif self.name.startswith("adain_"):
            threads = 256 * 2
        else:
            threads = 256 * (3 if "Curved" in self.name and ", 8, " in self.name else 4)
        return REGISTER_FILE // threads


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
def cubin(nvcc, tmp_path_factory):
    """A function that compiles a source for an architecture, once."""
    folder = tmp_path_factory.mktemp("cubins")
    known = run(nvcc, "--list-gpu-code").split()

    @functools.cache
    def compiled(source: str, architecture: str) -> Cubin:
        if architecture not in known:
            pytest.skip(f"this nvcc does not know {architecture}")
        path = folder / f"{source}_{architecture}.cubin"
        options = ("-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v", "-Werror",
                   "all-warnings", "-I", ROOT / "csrc")  # fmt: skip
        log = run(nvcc, *options, "-cubin", CUDA / f"{source}.cu", "-o", path)
        names = re.findall(r"Compiling entry function '(\w+)'", log)
        used = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
            r".*Used (\d+) reg",
            log,
        )
        assert len(names) == len(used)
        return Cubin(
            path,
            [
                Kernel(name, int(registers), int(stack) + int(stores) + int(loads))
                for name, (stack, stores, loads, registers) in zip(demangled(names), used)
            ],
        )

    return compiled


@pytest.mark.parametrize("source", KERNELS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_fit_registers(cubin, source, architecture):
    kernels = cubin(source, architecture).kernels
    assert len(kernels) == KERNELS[source]
    print(f"\nregisters on {architecture}")
    for kernel in sorted(kernels):
        print(f"{kernel.registers:5}  {kernel.name}")
    for kernel in kernels:
        assert kernel.local == 0, kernel
        assert kernel.registers <= kernel.most_registers, kernel


@pytest.fixture(scope="module")
def sass(cubin) -> dict[str, list[tuple[int, str]]]:
    """Address and text of every instruction of every kernel on sm_90."""
    found = importlib.util.find_spec("triton")
    tools = Path(found.origin).parent / "backends" / "nvidia" / "bin" if found else Path()
    cuobjdump = shutil.which("cuobjdump", path=tools) or shutil.which("cuobjdump")
    if cuobjdump is None:
        pytest.skip("cuobjdump is neither on PATH nor in the triton wheel")
    code = {}
    for source in KERNELS:
        text = run(cuobjdump, "-sass", cubin(source, "sm_90").path)
        _, *functions = re.split(r"\n\s*Function : ", text)
        names = demangled([function.split("\n", 1)[0] for function in functions])
        for name, function in zip(names, functions):
            instructions = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?) *;", function)
            code[name] = [(int(address, 16), text) for address, text in instructions]
    return code


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


def test_adain_moves_packs(sass):
    kernels = {
        name: code
        for name, code in sass.items()
        if re.match(r"adain_\w+<(float, 4|__half, 8|__nv_bfloat16, 8),", name)
    }
    assert len(kernels) == 4 * 2 * 4  # of float both kinds of activation
    for name, code in kernels.items():
        text = "\n".join(instruction for _, instruction in code)
        assert re.search(r"\bLDG\.E\.128", text), name
        writes = name.startswith(("adain_forward", "adain_backward"))
        assert not writes or re.search(r"\bSTG\.E\.128", text), name


def test_demodulation_reads_packs(sass):
    text = "\n".join(instruction for _, instruction in sass["demodulation_kernel<true>"])
    assert re.search(r"\bLDG\.E\.128", text) and re.search(r"\bSTS\.128", text)


@pytest.mark.parametrize("values", ["float, {}, 2", "__half, {}, 4", "__nv_bfloat16, {}, 4"])
@pytest.mark.parametrize("shape", ["Shape<1, 1, 4>", "Shape<2, 1, 2>", "Shape<1, 2, 2>"])
def test_streams_move_packs(sass, values, shape):
    """NHWC moves 8 bytes at a time, NCHW stores 4 columns at a time."""
    packs = [
        code for name, code in sass.items() if f"stream_kernel<{values.format(shape)}," in name
    ]
    assert len(packs) == (3 if shape == "Shape<1, 1, 4>" else 1)
    for code in packs:
        text = "\n".join(instruction for _, instruction in code)
        assert re.search(r"\bLDG\.E\.64", text) and re.search(r"\bSTG\.E\.64", text)
    kind = values.split(",")[0]
    planes = [code for name, code in sass.items() if f"stream_kernel<{kind}, {shape}, 1," in name]
    assert len(planes) == len(packs)
    store = "STG.E.128" if kind == "float" else "STG.E.64"
    for code in planes:
        assert any(store in instruction for _, instruction in code)


@pytest.mark.parametrize("kind", ["float", "__half", "__nv_bfloat16"])
def test_filtered_lrelu_moves_packs(sass, kind):
    """Four outputs of NCHW leave together, two where the image shrinks more."""
    strips = [
        (shape, "\n".join(instruction for _, instruction in code))
        for name, code in sass.items()
        if (match := re.match(rf"planes_kernel<{kind}, Shape<(\d, \d), ", name))
        for shape in match.groups()
    ]
    assert len(strips) == 6
    for shape, text in strips:
        width = (32 if kind == "float" else 16) * (2 if shape == "2, 4" else 4)
        assert re.search(rf"\bSTG\.E\.{width}\b" if width > 32 else r"\bSTG\.E ", text), shape
        assert re.search(r"\bLDS\.128", text) and re.search(r"\bSTS\.128", text)
    for masked in ("true", "false"):
        code = sass[f"pointwise_kernel<{kind}, {masked}>"]
        text = "\n".join(instruction for _, instruction in code)
        assert re.search(r"\bLDG\.E\.128", text) and re.search(r"\bSTG\.E\.128", text)


def loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """The instructions of each loop."""
    jumps = [
        (int(target[1], 16), address)
        for address, text in code
        if (target := re.search(r"\bBRA (0x[0-9a-f]+)", text))
    ]
    return [
        [text for address, text in code if start <= address <= end]
        for start, end in jumps
        if start < end
    ]


def count(word: str, body: list[str]) -> int:
    return sum(word in text for text in body)


def divides(body: list[str]) -> bool:
    """An integer division by a variable begins with a reciprocal or calls a subroutine."""
    return any(re.search(r"MUFU\.RCP|\bCALL", text) for text in body)


def test_loops_divide_no_integers(sass):
    kernels = hot(sass, "PiecewiseLinear", "Masked")
    assert len(kernels) == 33
    for name, code in kernels.items():
        body = max(loops(code), key=len)
        assert count("LDG.E.128", body), f"{name}: this is not the main loop"
        assert not divides(body), name


def test_filter_loops_divide_no_integers(sass):
    kernels = {name: code for name, code in sass.items() if re.match("stream_|direct_", name)}
    assert len(kernels) == 48
    for name, code in kernels.items():
        body = max(loops(code), key=lambda body: count("FFMA", body))
        assert count("FFMA", body) and count("LDG", body), f"{name}: this is not the main loop"
        assert not divides(body), name
    strips = {name: code for name, code in sass.items() if re.match("planes_|pixels_", name)}
    assert len(strips) == 36
    for name, code in strips.items():
        body = max(loops(code), key=len)
        assert count("FFMA", body) >= 150, f"{name}: this is not the main loop"
        assert not divides(body), name
    tiles = {name: code for name, code in sass.items() if name.startswith("tile_")}
    assert len(tiles) == 18
    for name, code in tiles.items():
        filters = sorted((body for body in loops(code) if count("FFMA", body)), key=len)
        assert len(filters) >= 2, name
        assert not any(divides(body) for body in filters[:2]), name


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
    "source, sanitizer, cases, kernels",
    [
        ("demodulation", "address", "all", KERNELS["demodulation"]),
        pytest.param(
            "demodulation", "thread", "few", KERNELS["demodulation"], marks=pytest.mark.exhaustive
        ),
        ("epilogue", "address", "few", KERNELS["epilogue"]),
        pytest.param(
            "epilogue", "address", "all", KERNELS["epilogue"], marks=pytest.mark.exhaustive
        ),
        pytest.param(
            "epilogue", "thread", "few", KERNELS["epilogue"], marks=pytest.mark.exhaustive
        ),
        ("epilogue", "address", "far", 10),
        ("upfirdn2d", "address", "few", KERNELS["upfirdn2d"] + SUMS),
        pytest.param(
            "upfirdn2d", "address", "all", KERNELS["upfirdn2d"] + SUMS, marks=pytest.mark.exhaustive
        ),
        ("upfirdn2d", "thread", "few", KERNELS["upfirdn2d"] + SUMS),
        ("upfirdn2d", "address", "far", 10),
    ],
)
def test_kernels_on_cpu(harness, source, sanitizer, cases, kernels):
    program = harness(sanitizer, *sources_of(source), name=source)
    output = run_sanitized(program, cases)
    assert output.strip().endswith(f"{kernels} kernels launched, 0 failures"), output[-4000:]
    assert "Sanitizer:" not in output, output[-4000:]


def test_filtered_lrelu_takes_what_has_room():
    """The filters that the harness proves to fit in shared memory, no larger ones."""
    refusal = functools.partial(cuda.filtered_lrelu_refusal, torch.float16)
    assert refusal(None, None, 1, 1) is None
    assert refusal(torch.ones(32), torch.ones(31, 32), 4, 3) is None
    assert "33" in refusal(torch.ones(12), torch.ones(4, 33), 2, 2)
    assert "33" in refusal(torch.ones(33), None, 2, 1)
    assert "down=5" in refusal(None, torch.ones(12), 1, 5)
    assert "up=6" in refusal(torch.ones(12), None, 6, 1)


def sources_of(name: str, folder: Path = CUDA) -> list[Path]:
    units = ["epilogue", "upfirdn2d"] if name == "upfirdn2d" else [name]
    return [*(folder / f"{unit}.cu" for unit in units), HARNESS / f"{name}_test.cpp"]


@pytest.mark.parametrize(
    "source, sanitizer, right, wrong, report",
    [
        (  # the middle of a tile is read before all of it is written
            "upfirdn2d",
            "thread",
            "  __syncthreads();\n\n  const int lanes = plan.x.out() * C",
            "\n  const int lanes = plan.x.out() * C",
            r"ThreadSanitizer: data race[^$]*upfirdn2d.cu",
        ),
        (  # a tile lacks the last column and row of its halo
            "upfirdn2d",
            "address",
            "+ lead + taps - 1) / up + 1)",
            "+ lead + taps - 2) / up + 1)",
            r"y\[\d+\] is .*[1-9]\d* failures",
        ),
        (  # a strip reads one column too many
            "upfirdn2d",
            "address",
            "first + i < plan.x.in)",
            "first + i <= plan.x.in)",
            r"AddressSanitizer: heap-buffer-overflow[^$]*upfirdn2d.cu",
        ),
        (  # a strip of planes is filtered along x before all of its rows are there
            "filtered_lrelu",
            "thread",
            "    __syncthreads();\n\n#pragma unroll 1\n    for (int i = thread; i < L::in_rows",
            "#pragma unroll 1\n    for (int i = thread; i < L::in_rows",
            r"ThreadSanitizer: data race[^$]*filtered_lrelu.cu",
        ),
        (  # rows of signs begin in whole units
            "filtered_lrelu",
            "address",
            "const int shift = sign_column & (kUnit - 1);",
            "const int shift = 0;",
            r"y\[\d+\] is .*[1-9]\d* failures",
        ),
        (  # a strip of planes reads one column too many
            "filtered_lrelu",
            "address",
            "has_column[k] = i >= 0 && i < call.x.in;",
            "has_column[k] = i >= 0 && i <= call.x.in;",
            r"AddressSanitizer: heap-buffer-overflow[^$]*filtered_lrelu.cu",
        ),
    ],
    ids=["barrier", "halo", "bounds", "strip-barrier", "strip-signs", "strip-bounds"],
)
@pytest.mark.exhaustive
def test_faults_are_found(harness, tmp_path, source, sanitizer, right, wrong, report):
    shutil.copytree(ROOT / "csrc", tmp_path, dirs_exist_ok=True)
    replace(tmp_path / "cuda" / f"{source}.cu", right, wrong)
    for line in ("case DType::float16: return f(__half());",
                 "case DType::bfloat16: return f(__nv_bfloat16());"):  # fmt: skip
        replace(tmp_path / "cuda" / "epilogue.cuh", line, "")  # to compile sooner
    sources = sources_of(source, tmp_path / "cuda")
    program = harness(sanitizer, *sources, name=f"fault_{tmp_path.name}")
    output = run_sanitized(program, "float32")
    assert re.search(report, output, re.DOTALL), output[-4000:]


@pytest.mark.parametrize(
    "source, sanitizer, cases, dtypes, kernels",
    [
        ("adain", "address", "few", ("float32",), 32),
        pytest.param(
            "adain", "address", "all", ("float32", "float16"), 64, marks=pytest.mark.exhaustive
        ),
        pytest.param("adain", "thread", "few", ("float32",), 32, marks=pytest.mark.exhaustive),
        ("filtered_lrelu", "address", "few", ("float16",), 16),
        ("filtered_lrelu", "address", "far", ("float16",), 8),
        ("filtered_lrelu", "thread", "few", ("float32",), 16),
        pytest.param(
            "filtered_lrelu",
            "address",
            "all",
            ("float32", "float16", "bfloat16"),
            48,
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_kernels_of_some_dtypes_on_cpu(
    harness, tmp_path, source, sanitizer, cases, dtypes, kernels
):
    """Without the dtypes that are not named, to compile sooner."""
    shutil.copytree(ROOT / "csrc", tmp_path, dirs_exist_ok=True)
    names = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}
    for dtype in names.keys() - dtypes:
        line = f"case DType::{dtype}: return f({names[dtype]}());"
        replace(tmp_path / "cuda" / "epilogue.cuh", line, "")
    program = harness(
        sanitizer, *sources_of(source, tmp_path / "cuda"), name=f"{source}_{'_'.join(dtypes)}"
    )
    output = run_sanitized(program, cases, *dtypes)
    assert output.strip().endswith(f"{kernels} kernels launched, 0 failures"), output[-4000:]
    assert "Sanitizer:" not in output, output[-4000:]


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new))


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
