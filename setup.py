"""Build stylegan_fast._C, one pybind11 module, with ninja. All metadata is in pyproject.toml.

The CPU kernels need g++ or clang++, the CUDA kernels nvcc; nothing needs torch or a GPU. A part
that does not compile is left out, and stylegan_fast/_build.json keeps the reason. Environment:

    STYLEGAN_FAST_CUDA    auto (default): CUDA kernels if nvcc builds them; on: or fail; off: none
    STYLEGAN_FAST_LEVELS  all (default) SIMD levels; baseline: that one only, which compiles sooner
    TORCH_CUDA_ARCH_LIST  such as "8.0;9.0+PTX"; default: those of CUDA_ARCHITECTURES nvcc knows
    STYLEGAN_FAST_COMMIT  the commit to record where there is no git checkout
    CC, CXX, CXXFLAGS, LDFLAGS, CUDA_HOME, MAX_JOBS    as everywhere
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from datetime import datetime, timezone
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# csrc/cpu/<name>.cpp, once a level
SIMD_SOURCES = ["adain", "conv2d", "demodulation", "epilogue", "filtered_lrelu", "upfirdn2d"]
X86_LEVELS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden"]
NVCC_FLAGS += ["-Xfatbin=-compress-all", f"--threads={os.environ.get('MAX_JOBS') or 0}"]
CUDA_ARCHITECTURES = ["80", "90", "100", "120"]

# Kept from build to build, unlike the folders that pip and setuptools make.
BUILD = Path("build", f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}")
MODULE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


class BuildError(Exception):
    """A part of the module cannot be built; the message says why."""


def run(*command):
    """The command's output; where it fails, BuildError with the last lines of it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        done = subprocess.run(command, text=True, errors="replace", **pipes)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        head = f"{shlex.join(command)} exited with status {done.returncode}"
        raise BuildError("\n".join([head, *done.stdout.splitlines()[-30:]]))
    return done.stdout


def write(name, text):
    """Write BUILD/name, unless it is so already: ninja would compile again."""
    path = BUILD / name
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return str(path)


def choice(variable, *allowed):
    """The variable's value, the first of those allowed where it is unset."""
    value = os.environ.get(variable) or allowed[0]
    if value not in allowed:
        *others, last = allowed
        raise ValueError(f"{variable}={value!r}: choose {', '.join(others)} or {last}")
    return value


def words(variable):
    return shlex.split(os.environ.get(variable, ""))


def host_compiler():
    sibling = {"gcc": "g++", "clang": "clang++", "cc": "c++"}
    name = re.compile(r"\b(gcc|clang|cc)(?=[-.\d]*$)")
    command = words("CXX") or [name.sub(lambda m: sibling[m[1]], w) for w in words("CC")] or ["c++"]
    version = run(*command, "--version").partition("\n")[0]
    x86 = run(*command, "-dumpmachine").startswith("x86_64")
    flags = CXX_FLAGS + words("CXXFLAGS")
    probe = write(
        "openmp.cpp", "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
    )
    try:
        run(*command, "-fopenmp", probe, "-o", f"{BUILD}/openmp")
        flags.append("-fopenmp")
    except BuildError:
        pass  # the kernels then run on one thread
    levels = {"baseline": [], **(X86_LEVELS if x86 else {})}
    if choice("STYLEGAN_FAST_LEVELS", "all", "baseline") == "baseline":
        levels = {"baseline": []}
        flags.append("-DSTYLEGAN_FAST_BASELINE_ONLY")
    return {"ok": True, "version": version, "command": command, "flags": flags, "levels": levels}


def cuda_compiler():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    usual = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else usual)
    if nvcc is None:
        raise BuildError(f"no nvcc in CUDA_HOME={home}" if home else "no nvcc on PATH")
    version = re.search(r"release .*|$", run(nvcc, "--version"))[0]
    codes = architectures(nvcc)
    flags = [f"-gencode=arch={code.replace('sm', 'compute')},code={code}" for code in codes]
    for compiler in [word for word in words("CXX") if not word.startswith("-")][-1:]:
        flags += ["-ccbin", compiler]
    # Toolkits differ in where their libraries are, and nvcc may be a script that calls another.
    linked = re.search(r"^#\$ LIBRARIES=(.*)$", run(nvcc, "-dryrun", "kernels.o"), re.MULTILINE)
    libraries = shlex.split(linked[1]) if linked else []
    return {
        "ok": True,
        "version": f"nvcc {version}",
        "command": [nvcc],
        "flags": NVCC_FLAGS + flags,
        "architectures": codes,
        "libraries": [*libraries, "-lcudart_static", "-lrt", "-ldl", "-lpthread"],
    }


def architectures(nvcc):
    """What to generate: sm_N is machine code, compute_N is PTX."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;,")
    if not wanted:
        known = re.findall(r"compute_(\w+)", run(nvcc, "--list-gpu-arch"))
        numbers = [number for number in CUDA_ARCHITECTURES if number in known]
        if not numbers:
            raise BuildError(f"{nvcc} knows none of the architectures {CUDA_ARCHITECTURES}")
        return [f"sm_{number}" for number in numbers] + [f"compute_{numbers[-1]}"]
    codes = []
    for item in re.split(r"[;,\s]+", wanted):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", item)
        if not match:
            message = f"{item!r} is not of the form 9.0 or 9.0+PTX"
            raise ValueError(f"TORCH_CUDA_ARCH_LIST={wanted!r}: {message}")
        codes.append(f"sm_{match[1]}{match[2]}")
        if match[3]:
            codes.append(f"compute_{match[1]}{match[2]}")
    return codes


def write_ninja_file(info, headers):
    from ninja.ninja_syntax import Writer

    host, cuda = info["cpu"], info["cuda"]
    cxx = [*host["command"], *host["flags"]]
    # The symbols of static libraries stay hidden: torch loads other versions of the same ones.
    shared = ["-shared", "-Wl,--exclude-libs,ALL"]
    if sys.platform == "darwin":
        shared = ["-bundle", "-undefined", "dynamic_lookup"]
    libraries = words("LDFLAGS") + (cuda["libraries"] if cuda["ok"] else [])

    def command(*parts):
        return shlex.join(map(str, parts)).replace("$", "$$")

    with open(BUILD / "build.ninja", "w") as file:
        ninja = Writer(file)
        ninja.variable("builddir", str(BUILD))
        compiling = "$flags -c $in -o $out -MD -MF $out.d"
        tracking = {"deps": "gcc", "depfile": "$out.d"}
        ninja.rule("cxx", f"{command(*cxx)} {compiling}", **tracking)
        ninja.rule("link", f"{command(*cxx, *shared)} $in -o $out {command(*libraries)}")
        objects = []

        def compile(rule, source, *flags, suffix=""):
            objects.append(str(BUILD / f"{Path(source).stem}{suffix}.o"))
            ninja.build(objects[-1], rule, str(source), variables={"flags": command(*flags)})

        python = ["-isystem", headers, "-isystem", sysconfig.get_path("include")]
        with_cuda = ["-DSTYLEGAN_FAST_WITH_CUDA"] if cuda["ok"] else []
        compile("cxx", "csrc/module.cpp", f"-I{BUILD}", *python, *with_cuda)
        compile("cxx", BUILD / "build_info.cpp")
        for source in sorted(Path("csrc/cpu").glob("*.cpp")):
            if source.stem in SIMD_SOURCES:
                for level, flags in host["levels"].items():
                    define = f"-DSTYLEGAN_FAST_SIMD={level}"
                    compile("cxx", source, define, *flags, suffix=f".{level}")
            else:
                compile("cxx", source)
        if cuda["ok"]:
            nvcc = command(*cuda["command"], *cuda["flags"])
            ninja.rule("nvcc", f"{nvcc} {compiling}", **tracking)
            for source in sorted(Path("csrc/cuda").glob("*.cu")):
                compile("nvcc", source, suffix=".cuda")
        ninja.build(str(BUILD / MODULE), "link", objects)


def compile_module(info):
    """Compile the module that `info` describes."""
    try:
        import ninja  # noqa: F401
        import pybind11
    except ImportError as error:
        raise BuildError(str(error)) from None
    # A copy: pip's isolated environment is at a new place each time, so everything would look new.
    headers = BUILD / f"pybind11-{pybind11.__version__}"
    if not headers.exists():
        shutil.copytree(pybind11.get_include(), headers)
    info["pybind11"] = pybind11.__version__
    declaration = "namespace stylegan_fast { extern const char* const build_info; }\n"
    macro = "#define STYLEGAN_FAST_BUILD_INFO stylegan_fast::build_info\n"
    definition = f'const char* const stylegan_fast::build_info = R"json({json.dumps(info)})json";\n'
    write("build_info.h", f"#pragma once\n{declaration}{macro}")
    write("build_info.cpp", declaration + definition)
    write_ninja_file(info, headers)
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    run(sys.executable, "-m", "ninja", "-f", f"{BUILD}/build.ninja", *jobs)
    run(sys.executable, "-c", f'import sys; sys.path.insert(0, "{BUILD}"); import _C')


def build(wish):
    """Build what can be built; a description of the result."""
    info = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "cuda": {"ok": False, "reason": "the C++ compiler does not work"},
    }
    try:
        info["cpu"] = host_compiler()
        try:
            if wish == "off":
                raise BuildError("STYLEGAN_FAST_CUDA=off")
            info["cuda"] = cuda_compiler()
            compile_module(info)
        except BuildError as error:
            if wish == "on":
                raise
            info["cuda"] = {"ok": False, "reason": str(error)}
            compile_module(info)
    except BuildError as error:
        if wish == "on":
            raise
        info["cpu"] = {"ok": False, "reason": str(error)}
    return info


def commit():
    if not Path(".git").exists():
        return os.environ.get("STYLEGAN_FAST_COMMIT")
    try:
        return run("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").strip()
    except BuildError:
        return None


class BuildModule(build_ext):
    def run(self):
        wish = choice("STYLEGAN_FAST_CUDA", "auto", "on", "off")
        package = Path("." if self.inplace else self.build_lib, "stylegan_fast")
        BUILD.mkdir(parents=True, exist_ok=True)
        package.mkdir(parents=True, exist_ok=True)
        # An old module may neither survive a failed build nor change under a running process.
        (package / MODULE).unlink(missing_ok=True)
        info = build(wish)
        if info["cpu"]["ok"]:
            shutil.copy(BUILD / MODULE, package)
        (package / "_build.json").write_text(json.dumps(info, indent=2) + "\n")
        for part in ("cpu", "cuda"):
            if not info[part]["ok"]:
                reason = info[part]["reason"]
                print(f"stylegan_fast: NO {part.upper()} KERNELS: {reason}", file=sys.stderr)


setup(ext_modules=[Extension("stylegan_fast._C", [])], cmdclass={"build_ext": BuildModule})
