"""tools/gpu.sh without a GPU: what it would run, and what it does when that fails or hangs."""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("rich")

from stylegan_fast import benchmarks
from stylegan_fast.benchmarks.cases import select

TREE = Path(__file__).parent.parent
SCRIPT = TREE / "tools" / "gpu.sh"
PHASES = ["build", "check", "test", "triton", "peers", "tune", "bench", "sanitize"]

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs a checkout of the sources")


@pytest.fixture
def tree(tmp_path):
    """The script in a folder of its own, and a `python` that does what PYTHON says."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "gpu.sh").write_text(SCRIPT.read_text())
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("python", "compute-sanitizer"):
        (commands / name).write_text('#!/usr/bin/env bash\necho "ran $*"\neval "$PYTHON"\n')
        (commands / name).chmod(0o755)
    return tmp_path


def start(tree, *arguments, python="true", **environment):
    path = f"{tree / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHON": python, "WORKERS": "3", **environment}
    return subprocess.Popen(
        ["bash", "tools/gpu.sh", *arguments],
        cwd=tree,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        # A CI that runs in the background ignores Ctrl-C, and what it starts inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(tree, *arguments, **environment):
    process = start(tree, *arguments, **environment)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def phases_of(output):
    return re.findall(r"^== (\w+)$", output, re.MULTILINE)


def commands_of(output):
    return [line[2:] for line in output.splitlines() if line.startswith("+ ")]


def test_a_dry_run_prints_every_phase_and_runs_nothing(tree):
    status, output = run(tree, "-n", python="exit 1")
    assert status == 0
    assert phases_of(output) == PHASES
    assert "ran " not in output
    assert not (tree / "gpu-out").exists()
    assert "python -m pip install --no-deps --no-build-isolation -e ." in commands_of(output)


def test_phases_are_chosen_by_name(tree):
    assert phases_of(run(tree, "-n", "check", "build")[1]) == ["check", "build"]
    status, output = run(tree, "build", "benhc")
    assert status == 2
    assert "no phase 'benhc'; choose among: build check" in output


def test_what_fails_stops_no_other_phase(tree):
    python = '[[ "$*" != *" -k not triton"* ]] || { echo "no kernel"; exit 1; }'
    status, output = run(tree, "check", "test", "triton", python=python)
    assert status == 1
    assert phases_of(output) == ["check", "test", "triton"]
    assert output.splitlines()[-1] == "FAILED: test"
    log = (tree / "gpu-out" / "gpu.log").read_text()
    assert "no kernel" in log and "== triton" in log


def test_only_the_log_names_what_passes(tree):
    passed = "tests/a.py::b[c d] \n[gw0] [  1%] PASSED tests/a.py::b[c d]"
    lines = f"{passed}\n[gw1] [  2%] FAILED tests/a.py::e"
    _, output = run(tree, "test", python=f"echo {shlex.quote(lines)}")
    assert "FAILED tests/a.py::e" in output
    assert "b[c d]" not in output
    assert lines in (tree / "gpu-out" / "gpu.log").read_text()


def test_a_phase_ends_at_its_limit(tree):
    python = "[[ $* != *check* ]] || exec sleep 40"
    begun = time.monotonic()
    status, output = run(tree, "check", "test", python=python, LIMIT="2")
    assert status == 1
    assert time.monotonic() - begun < 30
    assert output.splitlines()[-1] == "FAILED: check"
    assert phases_of(output) == ["check", "test"]


def test_all_phases_end_in_time(tree):
    begun = time.monotonic()
    python = "[[ $1 = -c ]] || exec sleep 40"
    status, output = run(tree, "check", "test", "triton", python=python, TOTAL="3")
    assert status == 1
    assert time.monotonic() - begun < 30
    assert phases_of(output) == ["check", "test", "triton"]
    assert output.splitlines()[-1] == "FAILED: check test triton"
    assert output.count("no time is left for this") == 2
    commands = commands_of(run(tree, "-n", "bench", TOTAL="200")[1])
    minutes = [float(re.search(r"--minutes (\S+)", command)[1]) for command in commands]
    assert 2.5 < sum(minutes) < 200 / 60


def test_ctrl_c_ends_the_phase_and_starts_no_other(tree):
    python = 'trap "echo kept; exit 2" INT; echo ready; while sleep 0.1; do :; done'
    process = start(tree, "check", "test", python=python)
    for line in process.stdout:
        if line == "ready\n":
            break
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode
    assert "kept" in output
    assert phases_of(output) == []


def test_a_missing_checker_is_said(tree):
    (tree / "bin" / "compute-sanitizer").unlink()
    status, output = run(tree, "sanitize")
    assert status == 0
    assert "no memory and race checks" in output


def test_peers_are_timed_once_they_are_compiled(tree):
    assert "no checkouts in peers/" in run(tree, "peers")[1]
    for name in ("ada", "three"):
        (tree / "peers" / name).mkdir(parents=True)
    assert "--peer" not in run(tree, "bench")[1]
    assert run(tree, "peers", python="exit 1")[0] == 1
    assert "--peer" not in run(tree, "bench")[1]
    assert run(tree, "peers")[0] == 0
    timed = commands_of(run(tree, "bench")[1])
    assert len(timed) == 7
    assert all(command.endswith("--peer peers/ada/ --peer peers/three/") for command in timed)


def test_choices_are_handed_out(tree):
    python = 'echo "{}" > "$STYLEGAN_FAST_CACHE/convolutions.json"'
    python = f'[ "$STYLEGAN_FAST_CACHE" = off ] || {python}'
    assert run(tree, "tune", python=python, OUT="elsewhere")[0] == 0
    assert (tree / "elsewhere" / "convolutions.json").read_text() == "{}\n"


def test_every_benchmark_it_asks_for_exists(tree):
    _, output = run(tree, "-n", "peers", "tune", "bench")
    (tree / "peers" / "ada").mkdir(parents=True)
    output += run(tree, "-n", "peers")[1]
    commands = [shlex.split(c.partition(" bench ")[2]) for c in commands_of(output)]
    assert len(commands) == 17
    parser = argparse.ArgumentParser()
    benchmarks.add_arguments(parser)
    for arguments in commands:
        parsed = parser.parse_args(arguments)
        if parsed.tune:
            parsed.op = ["layers"]
        assert select(parsed, "cuda")


def test_every_test_it_names_exists(tree):
    _, output = run(tree, "-n", "sanitize")
    for command in commands_of(output):
        files = re.findall(r"tests/\S+\.py", command)
        sources = [(TREE / file).read_text() for file in files]
        names = re.search(r"-k cuda and \((.*?)\)", command)[1].split(" or ")
        for name in names:
            assert any(re.search(rf"def test_\w*{name}\w*\(", text) for text in sources), name
        for file, text in zip(files, sources):
            assert any(re.search(rf"def test_\w*{name}\w*\(", text) for name in names), file


@pytest.mark.exhaustive
def test_a_worker_that_lost_its_gpu_is_replaced(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (tmp_path / "test_gpu.py").write_text(
        "import pytest, torch\n"
        "lost = []\n"
        "def synchronize():\n"
        "    if lost:\n"
        "        raise RuntimeError('an illegal memory access was encountered')\n"
        "torch.cuda.synchronize = synchronize\n"
        "@pytest.mark.parametrize('i', range(5))\n"
        "def test(i):\n"
        "    assert not lost\n"
        "    lost.extend([i] * (i == 2))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "1", "-p", "no:cacheprovider", str(tmp_path)],
        env={**os.environ, "STYLEGAN_FAST_TEST_DEVICE": "cuda"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "1 failed, 5 passed, 1 error" in done.stdout
    assert "ERROR test_gpu.py::test[2] - RuntimeError: an illegal memory" in done.stdout
