"""The command line: info, check, and how they fail."""

import json
import math
import subprocess
import sys

import pytest
import torch

from stylegan_fast import __version__, _env, backends, check, info
from stylegan_fast.__main__ import main
from stylegan_fast.backends import native
from stylegan_fast.reference.bias_act import bias_act as reference
from stylegan_fast.testing import assert_matches, cosine, relative_error, tolerance

needs_cpu_kernels = pytest.mark.skipif(
    backends.unavailable("cpu") is not None, reason="the cpu backend is not built"
)


def lines_of(text, title):
    """The lines of the section with this title."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(title))
    return lines[start : lines.index("", start)]


# info


def test_info_shows_every_op_and_backend(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    table = lines_of(text, "Backends")
    assert table[0].split() == ["Backends", *backends.BACKENDS]
    rows = {line.split()[0]: line for line in table[1 : 1 + len(backends.OPS)]}
    assert list(rows) == list(backends.OPS)
    assert rows["bias_act"].split()[1] == "PyTorch"
    for name in backends.BACKENDS:
        reason = backends.unavailable(name)
        assert reason is None or any(line.endswith(reason) for line in table)
    assert __version__ in text and torch.__version__ in text
    for name in (*_env.VARIABLES, *_env.BUILD_VARIABLES):
        assert name in text


def test_info_as_json(capsys, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["stylegan_fast"] == __version__
    assert facts["versions"]["torch"] == torch.__version__
    values = {row["name"]: row["value"] for row in facts["environment"]}
    assert values["MAX_JOBS"] == "3"
    assert set(values) == {*_env.VARIABLES, *_env.BUILD_VARIABLES}
    assert set(facts["backends"]) == set(backends.OPS)
    for row in facts["backends"].values():
        assert row["reference"] == "PyTorch"
        for name in ("cpu", "triton", "cuda"):
            assert row[name] == (backends.unavailable(name) or "kernel")
    assert facts["automatic"]["cpu"]["float32"] == chosen_on_cpu()
    assert len(facts["devices"]["gpus"]) == torch.cuda.device_count()


def chosen_on_cpu():
    return "cpu" if backends.unavailable("cpu") is None else "reference"


@needs_cpu_kernels
def test_info_shows_the_build_of_the_module(capsys):
    module = native.load()[0]
    built = json.loads(module.build_info)
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"{module.simd_level()} (of {', '.join(module.simd_levels())})" in text
    section = "\n".join(lines_of(text, "Build"))
    assert built["time"] in section and built["cpu"]["version"] in section
    assert " ".join(built["cpu"]["flags"]) in section


def test_info_shows_what_the_compiler_said(capsys, monkeypatch):
    said = "c++ -c csrc/module.cpp exited with status 1\nmodule.cpp:7: error: no such thing"
    record = {
        "time": "2026-01-02T03:04:05+00:00",
        "commit": None,
        "python": "3.12.1",
        "cpu": {"ok": False, "reason": said},
        "cuda": {
            "ok": True,
            "version": "nvcc release 13.0",
            "command": ["nvcc"],
            "flags": ["-O3"],
            "architectures": ["sm_80", "compute_90"],
        },
    }
    monkeypatch.setattr(native, "load", lambda: (None, "the compiled module is missing"))
    monkeypatch.setattr(native, "build_record", lambda: record)
    assert main(["info"]) == 0
    section = lines_of(capsys.readouterr().out, "Build")
    text = "\n".join(" ".join(line.split()) for line in section)
    assert "cpu not built: c++ -c csrc/module.cpp exited with status 1" in text
    assert "module.cpp:7: error: no such thing" in text
    assert "cuda architectures sm_80, compute_90" in text
    assert "commit unknown" in text


def test_info_without_a_build_record(capsys, monkeypatch):
    monkeypatch.setattr(native, "load", lambda: (None, "the compiled module is missing"))
    monkeypatch.setattr(native, "build_record", dict)
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "no record" in text and "the compiled module is missing" in text


def test_info_of_a_gpu():
    gpu = {"name": "H200", "capability": "9.0", "memory": 150 * 2**30}
    cpu = {"model": "A", "cores": 4, "threads": 2, "simd_levels": [], "simd_level": None}
    described = info._described_devices({"cpu": cpu, "gpus": [gpu]})
    assert described["GPU 0"] == "H200, capability 9.0, 150.0 GiB"
    assert described["SIMD"] == "no compiled kernels"


# check


@needs_cpu_kernels
def test_check_of_one_backend_passes(capsys):
    assert main(["check", "--backend", "cpu"]) == 0
    out = capsys.readouterr().out
    rows = [line.split()[:2] for line in out.splitlines()]
    for subject in ("bias_act", "networks", "torch.compile"):
        assert [subject, "cpu"] in rows
    verdict = out.splitlines()[-1]
    assert verdict.startswith("All ") and " checks passed on cpu (" in verdict


def test_check_of_some_ops_passes_and_says_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(backends.cuda, "unavailable", lambda: "there is no toaster")
    monkeypatch.setattr(backends.triton, "unavailable", lambda: "its interpreter takes minutes")
    arguments = ["--device", "cpu", "--op", "setup_filter", "upfirdn2d"]
    assert main(["check", *arguments]) == 0
    out = capsys.readouterr().out
    assert "Not checked here: " in out and "cuda (there is no toaster)" in out
    assert {line.split()[0] for line in out.splitlines()[1:3]} == {"setup_filter", "upfirdn2d"}
    assert "bias_act " not in out


def test_check_restores_what_it_changes():
    def state():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.allow_tf32,
            torch.get_num_threads(),
            torch.random.get_rng_state().tolist(),
            backends.requested_backend(),
        )

    before = state()
    assert main(["check", "--backend", "reference", "--op", "networks", "modulated_conv2d"]) == 0
    assert state() == before


@pytest.fixture
def few_shapes(monkeypatch):
    monkeypatch.setattr(check, "SHAPES", check.SHAPES[:2])
    monkeypatch.setattr(check, "LARGE", ())


def seeded_faults():
    """Function of the cpu backend, what it then does wrong, subject, the result that shows it."""

    def scale(y):
        y.mul_(1.001)

    return {
        "value": ("epilogue_forward", lambda a: scale(a[1]), "bias_act", "y"),
        "lrelu gradient": ("epilogue_masked", lambda a: scale(a[2]), "bias_act", "g_x"),
        "bias gradient": (
            "epilogue_masked",
            lambda a: None if a[3] is None else scale(a[3]),
            "bias_act",
            "g_b",
        ),
        "second gradient": (
            "epilogue_curved",
            lambda a: scale(a[4]) if a[0] == 2 else None,
            "bias_act",
            "gg_x",
        ),
        "unwritten element": (
            "epilogue_forward",
            lambda a: a[1].view(-1)[-1:].fill_(float("nan")) if a[1].is_contiguous() else None,
            "bias_act",
            "y",
        ),
        "training": ("epilogue_masked", lambda a: scale(a[2]), "networks", "path length"),
    }


@needs_cpu_kernels
@pytest.mark.parametrize("fault", seeded_faults())
def test_check_finds_a_seeded_fault(fault, few_shapes, capsys, monkeypatch):
    name, spoil, subject, result = seeded_faults()[fault]
    original = getattr(backends.cpu, name)

    def faulty(*arguments):
        original(*arguments)
        spoil(arguments)

    monkeypatch.setattr(backends.cpu, name, faulty)
    assert main(["check", "--backend", "cpu", "--op", subject]) == 1
    out = capsys.readouterr().out
    first = out[out.index("The first failure: ") :].splitlines()
    assert first[0].startswith(f"The first failure: {subject}, cpu, float64: ")
    assert first[1].startswith(result)
    assert f"python -m stylegan_fast check --backend cpu --device cpu --op {subject}" in out
    assert " checks FAILED on cpu (" in out.splitlines()[-1]
    assert "FAILED (" in out.splitlines()[1]


@needs_cpu_kernels
def test_check_reports_a_crash_and_goes_on(few_shapes, capsys, monkeypatch):
    def crash(*arguments):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(backends.cpu, "epilogue_curved", crash)
    assert main(["check", "--backend", "cpu", "--op", "bias_act"]) == 1
    out = capsys.readouterr().out
    assert "RuntimeError: illegal memory access" in out
    failed, total = out.splitlines()[-1].split(" checks FAILED")[0].split(" of ")
    assert 0 < int(failed) < int(total)


def test_a_machine_without_torch_compile_is_told(capsys, monkeypatch):
    def unsupported(*arguments, **options):
        raise RuntimeError("Dynamo is not supported on this Python")

    monkeypatch.setattr(torch, "compile", unsupported)
    assert main(["check", "--backend", "reference", "--op", "setup_filter", "torch.compile"]) == 0
    out = capsys.readouterr().out
    assert "torch.compile (Dynamo is not supported on this Python)" in out
    assert "All 5 checks passed" in out
    assert main(["check", "--backend", "reference", "--op", "torch.compile"]) == 1
    assert "Nothing was checked." in capsys.readouterr().out


def test_no_operand_is_close_to_a_clamp():
    """Otherwise rounding could decide whether it is clamped, and every implementation be right."""
    for call in check._bias_act_calls():
        clamp = call.arguments.get("clamp")
        if clamp is None:
            continue
        arguments = {**call.arguments, "clamp": None}
        for dtype in check.DTYPES:
            operands = {name: t.to(dtype).double() for name, t in call.operands.items()}
            distance = (reference(**operands, **arguments).abs() - clamp).abs().min()
            assert distance > 10 * torch.finfo(torch.float32).eps


def test_progress_bar_at_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["check", "--backend", "reference", "--op", "setup_filter"]) == 0
    assert "All 5 checks passed on reference" in capsys.readouterr().out


# The comparison that check and the tests rest on


def test_tolerance_grows_with_eps_reduction_and_scale():
    eps = {dtype: torch.finfo(dtype).eps for dtype in check.DTYPES}
    assert tolerance(torch.float32) == 16 * eps[torch.float32]
    assert tolerance(torch.float64, reduction=9) == 32 * eps[torch.float64]
    assert tolerance(torch.float32, scale=3.0) == 48 * eps[torch.float32]
    half = 8 * (eps[torch.float16] + 100 * eps[torch.float32])
    assert tolerance(torch.float16, reduction=10_000) == pytest.approx(half)


def test_a_match_returns_the_largest_fraction_of_the_tolerance():
    expected = torch.tensor([1.0, -4.0, math.inf, math.nan], dtype=torch.float64)
    actual = expected.float()
    assert assert_matches(actual, expected) == 0
    actual[0] += 8 * torch.finfo(torch.float32).eps
    assert assert_matches(actual, expected) == pytest.approx(8 / 64)
    assert assert_matches(torch.empty(0, 3), torch.empty(0, 3)) == 0


@pytest.mark.parametrize(
    "index, value", [(0, 1.00001), (0, math.nan), (0, math.inf), (1, math.inf), (2, 0.0)]
)
def test_a_mismatch_shows_where_and_both_values(index, value):
    expected = torch.tensor([1.0, -math.inf, math.nan], dtype=torch.float64)
    actual = expected.float()
    actual[index] = value
    with pytest.raises(AssertionError) as error:
        assert_matches(actual, expected, name="g_x")
    first, second = str(error.value).splitlines()
    assert first.startswith("g_x: 1 of 3 elements are off by more than")
    shown = f"({index},): {actual[index].item():.9g}, expected {expected[index].item():.9g}"
    assert second.strip() == shown


def test_only_the_first_mismatches_are_shown():
    with pytest.raises(AssertionError, match="12 of 12 elements") as error:
        assert_matches(torch.ones(3, 4), torch.zeros(3, 4))
    assert len(str(error.value).splitlines()) == 6
    with pytest.raises(AssertionError, match=r"shape \(3, 4\), expected \(4, 3\)"):
        assert_matches(torch.ones(3, 4), torch.ones(4, 3))


def test_comparisons_of_vectors():
    a = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    b = torch.tensor([[0.0, 3.0], [0.0, 4.0]])
    assert relative_error(1.5 * a, a) == pytest.approx(0.5)
    assert cosine(-2 * a, a) == pytest.approx(-1)
    assert cosine(a, b) == pytest.approx(16 / 25)


# Errors


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "command"),
        (["tune"], "invalid choice: 'tune'"),
        (["check", "--backend", "tritn"], "invalid choice: 'tritn'"),
        (["check", "--op", "conv3d"], "invalid choice: 'conv3d'"),
        (["info", "--yaml"], "--yaml"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--backend", "cuda"], "backend 'cuda' cannot run here: "),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used here: "),
        (["--device", "toaster"], "device 'toaster' cannot be used here: "),
        (["--backend", "cuda", "--device", "cpu"], "backend 'cuda' cannot run here: "),
    ],
)
def test_check_refuses_what_cannot_run(arguments, message, capsys):
    if arguments == ["--backend", "cuda"] and backends.unavailable("cuda") is None:
        pytest.skip("the cuda backend can run here")
    assert main(["check", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"stylegan_fast check: {message}") and len(error) > len(message) + 30


@needs_cpu_kernels
def test_check_without_anything_to_check(capsys):
    assert main(["check", "--backend", "cpu", "--op", "setup_filter"]) == 2
    assert "--backend reference checks" in capsys.readouterr().err


def test_a_bad_environment_variable_is_no_traceback(capsys, monkeypatch):
    def load():
        return _env.choice("STYLEGAN_FAST_SIMD", ("baseline",))

    monkeypatch.setenv("STYLEGAN_FAST_SIMD", "sse")
    monkeypatch.setattr(native, "load", load)
    with pytest.raises(SystemExit) as exit:
        main(["info"])
    assert exit.value.code == 2
    assert "STYLEGAN_FAST_SIMD='sse' is not one of baseline" in capsys.readouterr().err


def test_out_of_memory_is_one_line(capsys, monkeypatch):
    def run(error):
        def fail(arguments):
            raise error

        monkeypatch.setattr(info, "run", fail)
        return main(["info"])

    words = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes.\nmore"
    for error in (MemoryError(), RuntimeError(words), RuntimeError("CUDA out of memory. Tried")):
        assert run(error) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("stylegan_fast info: out of memory") and "--micro-batch" in line
    with pytest.raises(RuntimeError, match="sizes differ"):
        run(RuntimeError("sizes differ"))


def test_version_and_help(capsys):
    for flag, text in (("--version", f"stylegan_fast {__version__}\n"), ("--help", "bench")):
        with pytest.raises(SystemExit) as exit:
            main([flag])
        assert exit.value.code == 0
        assert text in capsys.readouterr().out


def test_a_closed_pipe_is_no_traceback():
    command = [sys.executable, "-m", "stylegan_fast", "info", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_an_interrupt_is_no_traceback(capsys, monkeypatch):
    def run(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("stylegan_fast.info.run", run)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "stylegan_fast info: interrupted\n"


def test_bench_is_part_of_the_command(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["bench", "--help"])
    assert exit.value.code == 0
    assert "--peer" in capsys.readouterr().out


def test_bench_without_its_packages(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "stylegan_fast.benchmarks", None)
    assert main(["bench"]) == 2
    error = capsys.readouterr().err
    assert "bench cannot start: " in error and "pip install 'stylegan_fast[bench]'" in error
