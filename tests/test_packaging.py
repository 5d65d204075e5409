"""The sdist, the wheel, what is installed from them, and builds that must fail or must not."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("benchmarks", "csrc", "kernels", "stylegan_fast", "tests", "tools")
INSTALLED_AS = {
    "benchmarks": "stylegan_fast/benchmarks",
    "kernels": "stylegan_fast/kernels",
    "stylegan_fast": "stylegan_fast",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
QUICKLY = {"STYLEGAN_FAST_CUDA": "off", "STYLEGAN_FAST_LEVELS": "baseline", "CXXFLAGS": "-O0"}
HAS_COMPILER = bool(os.environ.get("CXX") or os.environ.get("CC") or shutil.which("c++"))


def run(*command, cwd, check=True, **environment) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **QUICKLY, **environment},
        capture_output=True,
        text=True,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def files_of(folder: str, pattern: str = "*.py") -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)}


def extension_modules(names) -> list[str]:
    return [name for name in names if re.search(r"/_C\..*(so|pyd)$", str(name))]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    pytest.importorskip("build", reason="PyPA's build makes the archives; it is in the extra dev")
    checkout = tmp_path_factory.mktemp("checkout")
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, checkout)
    # Left by an editable installation; neither may travel.
    (checkout / "stylegan_fast" / "_build.json").write_text("{}")
    (checkout / "stylegan_fast" / "_C.stale.so").write_text("")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", cwd=checkout)
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def tree(sdist, tmp_path_factory) -> Path:
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("tree")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    (root,) = folder.iterdir()
    return root


@pytest.fixture(scope="module")
def wheel(tree) -> Path:
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=tree, **QUICKLY)
    (path,) = (tree / "dist").glob("*.whl")
    return path


def environment_with_torch(folder: Path) -> Path:
    """The interpreter of a new virtual environment that sees the packages of this one."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    purelib = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    ).stdout.strip()
    Path(purelib, "torch.pth").write_text(str(Path(torch.__file__).parent.parent))
    return python


def install(python: Path, *what, **environment) -> dict:
    """pip install without a network; the build record of what is installed."""
    pytest.importorskip("pip")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps"]
    run(*pip, "--no-build-isolation", *what, cwd=python.parent, **environment)
    code = (
        "import stylegan_fast as s, pathlib; print((pathlib.Path(s.__file__).parent/'_build.json')"
    )
    return json.loads(run(python, "-I", "-c", f"{code}.read_text())", cwd=python.parent).stdout)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """An interpreter with the wheel installed."""
    python = environment_with_torch(tmp_path_factory.mktemp("installed") / "venv")
    install(python, wheel)
    return python


def test_listed_packages_are_the_directories():
    directories = {
        Path(target, path.parent.relative_to(ROOT / source))
        for source, target in INSTALLED_AS.items()
        for path in (ROOT / source).rglob("*.py")
    }
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(".".join(path.parts) for path in directories)


@pytest.mark.parametrize("source", INSTALLED_AS)
def test_every_directory_is_a_package(source):
    directories = {path.parent for path in (ROOT / source).rglob("*.py")}
    assert [path for path in directories if not (path / "__init__.py").exists()] == []


def test_development_extra_has_the_build_requirements():
    build = set(PROJECT["build-system"]["requires"])
    assert build <= set(PROJECT["project"]["optional-dependencies"]["dev"])


def test_sdist_contains_all_sources_and_nothing_built(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"LICENSE", "Makefile", "README.md", "pyproject.toml", "setup.py"}
    wanted |= {"csrc/module.cpp", "stylegan_fast/py.typed", "tests/golden/bias_act.npz"}
    wanted |= files_of("csrc", "*.*").union(*(files_of(folder) for folder in FOLDERS))
    assert wanted <= names
    assert not {name for name in names if re.search(r"\.so$|\.py[cod]$|_build\.json$", name)}


@pytest.mark.slow
def test_wheel_contains_the_package_and_its_record(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        record = json.loads(archive.read("stylegan_fast/_build.json"))
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(metadata).decode()
    modules = {
        target + name.removeprefix(source)
        for source, target in INSTALLED_AS.items()
        for name in files_of(source)
    }
    assert modules | {"stylegan_fast/py.typed"} <= names
    assert len([name for name in names if name.endswith(".dist-info/licenses/LICENSE")]) == 1
    assert all(re.match(r"stylegan_fast(/|-[\d.]+\.dist-info/)", name) for name in names)
    assert "License-Expression: Apache-2.0" in metadata
    assert not wheel.name.endswith("-none-any.whl")
    assert len(extension_modules(names)) == record["cpu"]["ok"]
    assert record["cpu"]["ok"] or not HAS_COMPILER, record["cpu"]["reason"]
    assert record["cuda"] == {"ok": False, "reason": "STYLEGAN_FAST_CUDA=off"}


@pytest.mark.slow
def test_installed_wheel_works_anywhere(installed, tmp_path):
    code = """
import json, pathlib, sys
import torch
import stylegan_fast
from stylegan_fast import benchmarks, kernels, ops

folder = pathlib.Path(stylegan_fast.__file__).parent
assert folder.is_relative_to(sys.prefix), folder
assert pathlib.Path(kernels.__file__).parent == folder / "kernels"
assert pathlib.Path(benchmarks.__file__).parent == folder / "benchmarks"
record = json.loads((folder / "_build.json").read_text())
backends = ["reference"]
if record["cpu"]["ok"]:
    from stylegan_fast import _C
    assert json.loads(_C.build_info) == record
    assert "baseline" in _C.simd_levels()
    backends.append("cpu")
x = torch.tensor([[-1.0, 2.0, -3.0], [4.0, -5.0, 6.0]])
b = torch.tensor([1.0, 0.0, 0.5])
for backend in backends:
    y = ops.bias_act(x, b, act="lrelu", gain=2, clamp=9, backend=backend)
    torch.testing.assert_close(y, torch.tensor([[0.0, 4.0, -1.0], [9.0, -2.0, 9.0]]))
print(*backends)
"""
    ran = run(installed, "-I", "-c", code, cwd=tmp_path).stdout.split()
    assert ran == (["reference", "cpu"] if HAS_COMPILER else ["reference"])


@pytest.mark.slow
def test_installed_command_runs(installed, tmp_path):
    command = shutil.which("stylegan-fast", path=installed.parent)
    assert command is not None
    by_name = run(command, "--help", cwd=tmp_path).stdout
    by_module = run(installed, "-I", "-m", "stylegan_fast", "--help", cwd=tmp_path).stdout
    for verb in ("info", "check", "bench"):
        assert verb in by_name and verb in by_module


def test_code_for_one_simd_level_is_not_shared():
    """The linker keeps one copy of an inline function of all objects: it must run everywhere."""
    objects = sorted(ROOT.glob("build/*/*.avx*.o"))
    if not objects or not shutil.which("nm"):
        pytest.skip("needs nm and the objects of an installation from this checkout, on x86-64")
    for path in objects:
        level = path.name.split(".")[-2]
        lines = run("nm", "-C", path, cwd=ROOT).stdout.splitlines()
        shared = [line for line in lines if re.search(r" [VWu] (?!DW\.ref\.)", line)]
        assert [line for line in shared if f"stylegan_fast::cpu::{level}::" not in line] == []


def test_without_a_compiler_the_package_installs_and_says_why(tree, tmp_path):
    python = environment_with_torch(tmp_path / "venv")
    record = install(python, tree, CXX="/bin/false")
    assert not record["cpu"]["ok"] and "/bin/false --version" in record["cpu"]["reason"]
    assert not record["cuda"]["ok"]
    code = """
import torch
from stylegan_fast import ops
assert ops.bias_act(torch.tensor([[-1.0, 2.0]]), act="relu", gain=1).tolist() == [[0.0, 2.0]]
ops.bias_act(torch.zeros(1, 2), backend="cpu")
"""
    failed = run(python, "-I", "-c", code, cwd=tmp_path, check=False).stderr
    assert "RuntimeError: backend 'cpu' cannot run" in failed
    assert "stylegan_fast info" in failed
    assert not extension_modules((tmp_path / "venv").rglob("*"))


def build_extension(tree, folder, check=True, **environment) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder]
    return run(*command, cwd=tree, check=check, **environment)


def test_a_compiler_error_is_recorded(tree, tmp_path):
    done = build_extension(tree, tmp_path, CXXFLAGS="-std=c++nonsense")
    record = json.loads((tmp_path / "stylegan_fast" / "_build.json").read_text())
    assert not record["cpu"]["ok"] and "c++nonsense" in record["cpu"]["reason"]
    assert len(record["cpu"]["reason"].splitlines()) <= 31
    assert "NO CPU KERNELS" in done.stderr
    assert not extension_modules(tmp_path.rglob("*"))


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"STYLEGAN_FAST_CUDA": "maybe"}, "STYLEGAN_FAST_CUDA='maybe': choose auto, on or off"),
        ({"STYLEGAN_FAST_LEVELS": "sse"}, "STYLEGAN_FAST_LEVELS='sse': choose all or baseline"),
        ({"STYLEGAN_FAST_CUDA": "on", "CUDA_HOME": "/nowhere"}, "no nvcc in CUDA_HOME=/nowhere"),
        ({"STYLEGAN_FAST_CUDA": "on", "CXX": "/bin/false"}, "/bin/false --version"),
    ],
)
def test_an_explicit_wish_that_cannot_be_met_fails(tree, tmp_path, environment, message):
    done = build_extension(tree, tmp_path, check=False, **environment)
    assert done.returncode != 0 and message in done.stderr
    assert not extension_modules(tmp_path.rglob("*"))


BROKEN_NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release 99.1, V99.1.2" ;;
  --list-gpu-arch) echo compute_80; echo compute_90 ;;
  -dryrun) echo '#$ LIBRARIES=  "-L/toolkit/lib64"' ;;
  *) echo "kernel.cu(7): error: this toolkit is broken" >&2; exit 2 ;;
esac
"""


@pytest.fixture
def broken_toolkit(tmp_path) -> Path:
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(BROKEN_NVCC)
    nvcc.chmod(0o755)
    return nvcc.parent.parent


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
def test_a_failing_nvcc_costs_only_the_cuda_kernels(tree, wheel, tmp_path, broken_toolkit):
    auto = {**QUICKLY, "STYLEGAN_FAST_CUDA": "auto", "CUDA_HOME": str(broken_toolkit)}
    auto["TORCH_CUDA_ARCH_LIST"] = ""
    done = build_extension(tree, tmp_path, **auto)
    record = json.loads((tmp_path / "stylegan_fast" / "_build.json").read_text())
    assert record["cpu"]["ok"] and not record["cuda"]["ok"]
    assert "kernel.cu(7): error: this toolkit is broken" in record["cuda"]["reason"]
    assert "NO CUDA KERNELS" in done.stderr and "NO CPU KERNELS" not in done.stderr
    assert len(extension_modules(tmp_path.rglob("*"))) == 1
    failed = build_extension(tree, tmp_path, False, **{**auto, "STYLEGAN_FAST_CUDA": "on"})
    assert failed.returncode != 0 and "this toolkit is broken" in failed.stderr


@pytest.fixture
def setup_module(monkeypatch):
    """The functions of setup.py."""
    command = ModuleType("setuptools.command.build_ext")
    command.build_ext = object
    package = ModuleType("setuptools")
    package.Extension = package.setup = lambda *arguments, **keywords: None
    monkeypatch.setitem(sys.modules, "setuptools", package)
    monkeypatch.setitem(sys.modules, "setuptools.command", ModuleType("setuptools.command"))
    monkeypatch.setitem(sys.modules, command.__name__, command)
    spec = importlib.util.spec_from_file_location("setup_module", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "wanted, codes",
    [
        ("8.0;9.0+PTX", ["sm_80", "sm_90", "compute_90"]),
        ("8.0 9.0a, 12.0", ["sm_80", "sm_90a", "sm_120"]),
        ("10.0f+PTX;", ["sm_100f", "compute_100f"]),
        ("", ["sm_80", "sm_90", "compute_90"]),
    ],
)
def test_architectures(setup_module, monkeypatch, broken_toolkit, wanted, codes):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    assert setup_module.architectures(str(broken_toolkit / "bin" / "nvcc")) == codes


@pytest.mark.parametrize("wanted", ["Hopper", "9", "8.0;sm_90", "9.0+ptx"])
def test_architectures_that_cannot_be_read_raise(setup_module, monkeypatch, wanted):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    with pytest.raises(ValueError, match=r"TORCH_CUDA_ARCH_LIST=.* not of the form 9\.0"):
        setup_module.architectures("nvcc")


@pytest.mark.parametrize(
    "variables, command",
    [
        ({}, "c++"),
        ({"CC": "gcc-12"}, "g++-12"),
        ({"CC": "ccache /opt/clang-17/bin/clang -m64"}, "ccache /opt/clang-17/bin/clang++ -m64"),
        ({"CC": "aarch64-linux-gnu-gcc"}, "aarch64-linux-gnu-g++"),
        ({"CC": "gcc", "CXX": "clang++"}, "clang++"),
    ],
)
def test_compiler_choice(setup_module, monkeypatch, variables, command):
    for name in ("CC", "CXX", "CXXFLAGS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(setup_module, "run", lambda *command: "aarch64-linux-gnu\n")
    monkeypatch.setattr(setup_module, "write", lambda name, text: name)
    host = setup_module.host_compiler()
    assert host["command"] == command.split()
    assert list(host["levels"]) == ["baseline"]


IMPORT = """
import sys
import torch
before = set(sys.modules)
import stylegan_fast
heavy = {"triton", "rich", "matplotlib", "torch._dynamo"}
heavy |= {"stylegan_fast.kernels", "stylegan_fast.benchmarks"}
print(end=" ".join((set(sys.modules) - before) & heavy))
print(end="CUDA is initialised" if torch.cuda.is_initialized() else "")
"""


def test_import_is_silent_and_light(tmp_path):
    done = run(sys.executable, "-c", IMPORT, cwd=tmp_path)
    assert done.stdout + done.stderr == ""


def test_import_and_reference_work_without_triton(tmp_path):
    code = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.startswith("triton") else find(name, *rest)
import torch
from stylegan_fast import ops
x = torch.tensor([[-1.0, 2.0]], requires_grad=True)
ops.bias_act(x, act="relu", gain=3, backend="reference").sum().backward()
assert x.grad.tolist() == [[0.0, 3.0]]
try:
    ops.bias_act(x, backend="triton")
except RuntimeError as error:
    print(error)
"""
    message = run(sys.executable, "-c", code, cwd=tmp_path).stdout
    assert message.startswith("backend 'triton' cannot run")
