"""Which backend serves a call: automatic and explicit choice, and what is said of the others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stylegan_fast
from stylegan_fast import backends
from stylegan_fast.backends import cuda, native
from stylegan_fast.ops import bias_act

needs_cpu_kernels = pytest.mark.skipif(
    backends.unavailable("cpu") is not None, reason="the cpu backend is not built"
)
needs_no_cuda = pytest.mark.skipif(
    backends.unavailable("cuda") is None, reason="the cuda backend can run here"
)


@pytest.fixture(autouse=True)
def restored_choice(monkeypatch):
    monkeypatch.setattr(backends, "_requested", None)


@pytest.fixture
def restored_simd():
    level = native.load()[0].simd_level()
    yield
    native.load.cache_clear()
    native.load()[0].set_simd_level(level)


def run_python(code, **environment):
    """The finished process of a fresh interpreter, in which nothing is set but `environment`."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("STYLEGAN_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def chosen(x=None):
    return backends.select("bias_act", torch.ones(2, 3) if x is None else x)


# Explicit choice


@needs_cpu_kernels
def test_use_backend_nests_and_restores():
    with stylegan_fast.use_backend("reference"):
        assert chosen() == "reference"
        with stylegan_fast.use_backend("cpu"):
            assert chosen() == "cpu"
            with stylegan_fast.use_backend(None):
                assert backends.requested_backend() is None
            assert chosen() == "cpu"
        assert chosen() == "reference"
    assert backends.requested_backend() is None


def test_use_backend_restores_after_an_exception():
    with pytest.raises(ZeroDivisionError), stylegan_fast.use_backend("reference"):
        raise ZeroDivisionError
    assert backends.requested_backend() is None


@needs_cpu_kernels
def test_use_backend_as_a_setter_lasts():
    stylegan_fast.use_backend("reference")
    assert chosen() == "reference"
    with stylegan_fast.use_backend("cpu"):
        assert chosen() == "cpu"
    assert chosen() == "reference"
    stylegan_fast.use_backend(None)
    assert chosen() == "cpu"


@needs_cpu_kernels
@pytest.mark.parametrize("how", ["use_backend", "argument"])
def test_the_chosen_backend_runs(how, monkeypatch):
    calls = []
    forward = backends.cpu.epilogue_forward
    monkeypatch.setattr(
        backends.cpu, "epilogue_forward", lambda *args: calls.append(1) or forward(*args)
    )

    def run(name):
        if how == "argument":
            return bias_act(torch.tensor([[-1.0, 2.0]]), act="relu", gain=1, backend=name)
        with stylegan_fast.use_backend(name):
            return bias_act(torch.tensor([[-1.0, 2.0]]), act="relu", gain=1)

    assert run("reference").tolist() == [[0, 2]]
    assert calls == []
    assert run("cpu").tolist() == [[0, 2]]
    assert calls == [1]


@needs_cpu_kernels
def test_the_argument_wins_over_use_backend():
    with stylegan_fast.use_backend("reference"):
        assert backends.select("bias_act", torch.ones(2), "cpu") == "cpu"


@pytest.mark.parametrize("name", ["tritn", "", "CPU", 3])
def test_unknown_names_are_refused_with_the_known_ones(name):
    known = "reference, cpu, triton, cuda"
    with pytest.raises(ValueError, match=known):
        stylegan_fast.use_backend(name)
    with pytest.raises(ValueError, match=known):
        bias_act(torch.ones(2, 3), act="relu", backend=name)
    assert backends.requested_backend() is None


@needs_no_cuda
def test_a_backend_that_cannot_run_raises_its_reason():
    reason = backends.unavailable("cuda")
    with pytest.raises(RuntimeError) as error, stylegan_fast.use_backend("reference"):
        stylegan_fast.use_backend("cuda")
    assert "backend 'cuda' cannot run here" in str(error.value) and reason in str(error.value)
    assert backends.requested_backend() is None
    with pytest.raises(RuntimeError) as error:
        bias_act(torch.ones(2, 3), act="relu", backend="cuda")
    assert "backend 'cuda' cannot run bias_act" in str(error.value) and reason in str(error.value)


@needs_cpu_kernels
def test_a_tensor_elsewhere_is_refused():
    x = torch.ones(2, 3, device="meta")
    with pytest.raises(RuntimeError, match="it runs on cpu tensors, x is on meta"):
        bias_act(x, act="relu", backend="cpu")
    assert chosen(x) == "reference"


def test_a_dtype_without_kernels_is_refused(monkeypatch):
    monkeypatch.setattr(backends.cpu, "unavailable", lambda: None)
    monkeypatch.setattr(backends.cpu, "dtypes", lambda: (torch.float32, torch.float16))
    monkeypatch.setattr(backends, "_selected", {})
    message = "'cpu' cannot run bias_act: it has kernels for float32, float16, x is bfloat16"
    with pytest.raises(RuntimeError, match=message):
        bias_act(torch.ones(2, 3, dtype=torch.bfloat16), act="relu", backend="cpu")


# Automatic choice


@pytest.fixture
def gpu_backends(monkeypatch):
    """As if there were a GPU, on which both backends run."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for backend in (backends.cuda, backends.triton):
        monkeypatch.setattr(backend, "unavailable", lambda: None)


def test_cuda_comes_first_on_a_gpu(gpu_backends):
    assert backends.automatic("bias_act", "cuda", torch.float16) == "cuda"


def test_triton_comes_second_on_a_gpu(gpu_backends, monkeypatch):
    monkeypatch.setattr(backends.cuda, "unavailable", lambda: "no nvcc")
    assert backends.automatic("bias_act", "cuda", torch.float16) == "triton"


def test_the_reference_serves_float64_on_a_gpu(gpu_backends):
    assert backends.automatic("bias_act", "cuda", torch.float64) == "reference"


def test_the_reference_serves_other_devices():
    assert backends.automatic("bias_act", "mps", torch.float32) == "reference"


@pytest.mark.parametrize(
    "capability, runs",
    [((7, 5), False), ((8, 0), True), ((8, 6), True), ((10, 0), False), ((12, 1), True)],
)
def test_architectures_the_kernels_were_built_for(capability, runs, monkeypatch):
    record = {"cuda": {"architectures": ["sm_80", "sm_90", "compute_120"]}}
    monkeypatch.setattr(native, "build_record", lambda: record)
    reason = backends.cuda._architecture_mismatch(capability)
    assert (reason is None) == runs
    if not runs:
        device = "sm_{}{}".format(*capability)
        assert "sm_80, sm_90, compute_120" in reason and device in reason


# The environment


@needs_cpu_kernels
def test_environment_variables_are_obeyed():
    done = run_python(
        "import torch, stylegan_fast\n"
        "from stylegan_fast import backends\n"
        "assert backends.requested_backend() == 'reference'\n"
        "assert backends.select('bias_act', torch.ones(2)) == 'reference'\n"
        "assert backends.native.load()[0].simd_level() == 'baseline'\n",
        STYLEGAN_FAST_BACKEND="reference",
        STYLEGAN_FAST_SIMD="baseline",
    )
    assert done.returncode == 0, done.stderr


def test_an_unknown_backend_in_the_environment_is_refused():
    done = run_python("import stylegan_fast", STYLEGAN_FAST_BACKEND="gpu")
    assert done.returncode == 1
    message = "STYLEGAN_FAST_BACKEND='gpu' is not one of reference, cpu, triton, cuda"
    assert f"ValueError: {message}" in done.stderr


@needs_no_cuda
def test_a_backend_in_the_environment_that_cannot_run_is_refused_when_used():
    done = run_python(
        "import torch, stylegan_fast\n"
        "print('imported')\n"
        "stylegan_fast.ops.bias_act(torch.ones(2, 3), act='relu')\n",
        STYLEGAN_FAST_BACKEND="cuda",
    )
    assert done.stdout == "imported\n"
    assert "RuntimeError: backend 'cuda' cannot run bias_act" in done.stderr
    assert backends.unavailable("cuda") in done.stderr


@needs_cpu_kernels
def test_the_simd_level_of_the_environment(monkeypatch, restored_simd):
    for level in native.load()[0].simd_levels():
        monkeypatch.setenv("STYLEGAN_FAST_SIMD", level)
        native.load.cache_clear()
        assert native.load()[0].simd_level() == level


@needs_cpu_kernels
def test_an_unknown_simd_level_is_refused(monkeypatch, restored_simd):
    monkeypatch.setenv("STYLEGAN_FAST_SIMD", "sse")
    native.load.cache_clear()
    message = "STYLEGAN_FAST_SIMD='sse' is not one of baseline, avx2, avx512"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            backends.unavailable("cpu")
    monkeypatch.delenv("STYLEGAN_FAST_SIMD")


# Missing parts


BLOCKED = """
import sys
sys.modules["stylegan_fast._C"] = sys.modules["triton"] = None
import torch
import stylegan_fast
from stylegan_fast import backends, ops
from stylegan_fast.__main__ import main
"""


def test_without_compiled_module_and_triton():
    done = run_python(
        BLOCKED + "assert backends.usable('cpu') == ['reference']\n"
        "assert 'compiled module is missing' in backends.unavailable('cpu')\n"
        "assert 'compiled module is missing' in backends.unavailable('cuda')\n"
        "assert 'triton is not installed' in backends.unavailable('triton')\n"
        "x = torch.tensor([[-1.0, 2.0]], requires_grad=True)\n"
        "y = ops.bias_act(x, act='lrelu', gain=1)\n"
        "torch.testing.assert_close(y, torch.tensor([[-0.2, 2]]))\n"
        "assert main(['info']) == 0\n"
        "assert main(['check', '--op', 'setup_filter']) == 0\n"
        "ops.bias_act(x, act='lrelu', backend='cpu')\n"
    )
    assert "RuntimeError: backend 'cpu' cannot run bias_act: the compiled module" in done.stderr
    assert "the package triton is not installed" in done.stdout
    assert "All 5 checks passed on reference" in done.stdout
    assert "cpu (the compiled module is missing" in done.stdout


def test_starting_is_cheap():
    """Neither the commands' own modules nor what they draw and compile with."""
    done = run_python(
        "import sys, stylegan_fast.__main__\n"
        "names = ['check', 'info', 'testing', 'benchmarks', 'kernels', '_C']\n"
        "names = [f'stylegan_fast.{name}' for name in names] + ['rich', 'matplotlib']\n"
        "print([name for name in names if name in sys.modules])\n"
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["sm_80", "sm_90", "compute_120"], (9, 0), True),
        (["sm_80"], (8, 9), True),
        (["sm_86"], (8, 0), False),
        (["sm_80"], (9, 0), False),
        (["sm_80", "compute_80"], (12, 1), True),
        (["compute_90"], (8, 6), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a", "compute_100a"], (10, 3), False),
        (["sm_100f"], (10, 3), True),
        ([], (7, 5), True),
    ],
)
def test_architectures_the_module_was_built_for(monkeypatch, architectures, capability, runs):
    record = {"cuda": {"architectures": architectures}}
    monkeypatch.setattr(native, "build_record", lambda: record)
    reason = cuda._architecture_mismatch(capability)
    assert reason is None if runs else f"sm_{capability[0]}{capability[1]}" in reason


def test_backend_of_another_type_is_refused():
    with pytest.raises(ValueError, match="unknown"):
        bias_act(torch.ones(2, 3), act="relu", backend=["cpu"])


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ADVISED = """
import torch
from stylegan_fast.ops import bias_act

def advised(y):
    inside = False
    for line in open("/proc/self/smaps"):
        first = line.split(" ", 1)[0]
        if "-" in first:
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= y.data_ptr() + (y.nbytes // 2) < end
        elif inside and first == "VmFlags:":
            return "hg" in line.split()

x = torch.zeros(1, 3, 1920, 2048)
print(advised(bias_act(x, act="relu", backend="cpu")), advised(x.relu()))
"""


@needs_cpu_kernels
@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="a system without transparent huge pages")
@pytest.mark.parametrize(("variable", "expected"), [("", "True False"), ("0", "False False")])
def test_large_results_ask_for_huge_pages(variable, expected):
    environment = {**os.environ, "STYLEGAN_FAST_HUGE_PAGES": variable, "THP_MEM_ALLOC_ENABLE": "0"}
    command = [sys.executable, "-c", ADVISED]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == expected
