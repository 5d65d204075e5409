"""The benchmark suite: what it times, that a wrong kernel is caught, what it writes down."""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from stylegan_fast import backends, benchmarks
from stylegan_fast.benchmarks import end_to_end, peers, report, results, suite, timing
from stylegan_fast.benchmarks.bias_act import BiasAct, stock
from stylegan_fast.benchmarks.cases import LEVELS, TARGETS, Case, layers, select
from stylegan_fast.benchmarks.gate import Expected, check
from stylegan_fast.benchmarks.machine import git_commit, peak_memory
from stylegan_fast.benchmarks.results import COLUMNS, Row
from stylegan_fast.benchmarks.workload import Session
from stylegan_fast.layers import Conv2dLayer, SynthesisLayer
from stylegan_fast.models.stylegan2 import Discriminator, Generator

CPU = torch.device("cpu")
SMALL = ["--quick", "--op", "bias_act", "--shape", "4x512x4x4", "--layout", "nchw"]


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    benchmarks.add_arguments(parser)
    return parser.parse_args(["--device", "cpu", *argv])


def bench(folder: Path, *argv: str) -> tuple[int, list[Row]]:
    status = benchmarks.main(["--device", "cpu", "--out", str(folder), *argv])
    path = folder / "results.csv"
    return status, results.read(path) if path.exists() else []


def needs_cpu_kernels() -> None:
    reason = backends.refusal("cpu", "bias_act", "cpu", torch.float32)
    if reason is not None:
        pytest.skip(f"no CPU kernels: {reason}")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """(folder, exit status, seconds) of one `bench --quick`."""
    folder = tmp_path_factory.mktemp("bench")
    start = time.monotonic()
    status, _ = bench(folder, "--quick")
    return folder, status, time.monotonic() - start


# What is timed


@pytest.mark.parametrize("network", [256, 1024])
def test_cases_cover_every_layer_shape(network):
    base = {256: 16384, 1024: 32768}[network]
    with torch.device("meta"):
        G = Generator(512, 0, 512, network, 3, channel_base=base)
        D = Discriminator(0, network, 3, channel_base=base)
    activated = {
        (layer.weight.shape[0], layer.resolution)
        for layer in G.modules()
        if isinstance(layer, SynthesisLayer)
    }
    for block in D.children():
        for name, layer in block.named_children():
            if isinstance(layer, Conv2dLayer) and name != "skip":  # skip has no activation
                resolution = getattr(block, "resolution", 4) // (2 if name == "conv1" else 1)
                activated.add((layer.weight.shape[0], resolution))
    listed = [layer for layer in layers() if f"{network}:b" in layer.name]
    assert {(layer.channels, layer.resolution) for layer in listed} == activated
    timed = {case.shape[1:3] for case in select(parse("--full"), "cpu") if case.op == "bias_act"}
    assert activated <= timed


def test_no_case_twice():
    for device in ("cpu", "cuda"):
        cases = select(parse("--full"), device)
        keys = Counter((c.op, c.shape, c.dtype, c.layout, c.level, c.mode) for c in cases)
        assert max(keys.values()) == 1


def test_default_cases():
    cases = select(parse(), "cpu")
    for shape in TARGETS:
        modes = {(c.level, c.mode) for c in cases if c.shape == shape and c.layout == "nchw"}
        assert modes == {(level, mode) for level in ("kernel", "user") for mode in LEVELS[level]}
    assert {c.mode for c in cases if c.op == "training"} == {"D + R1", "G + path length"}
    assert {c.dtype for c in cases} == {"float32"}
    assert max(math.prod(c.shape) for c in cases) <= 2**24
    on_gpu = [c for c in select(parse(), "cuda") if c.op == "bias_act"]
    assert {c.dtype for c in on_gpu} == {"float32", "bfloat16", "float16"}
    assert max(math.prod(c.shape) for c in on_gpu) * 2 >= 64e6


def test_filters_choose_among_all_cases():
    cases = select(parse("--shape", "1024:b1024", "--dtype", "float16", "--mode", "forward"), "cpu")
    assert {c.shape for c in cases} == {(1, 32, 1024, 1024)}
    assert {c.dtype for c in cases} == {"float16"}
    assert {(c.level, c.mode) for c in cases} == {("kernel", "forward"), ("user", "forward")}
    assert {c.op for c in select(parse("--op", "training"), "cpu")} == {"training"}


def test_bytes_and_flops_of_a_case(tmp_path):
    def work(mode: str, dtype: str = "float32") -> BiasAct:
        case = Case("bias_act", "", (2, 3, 5, 8), dtype, "nchw", "user", mode)
        return BiasAct(case, Session(CPU, tmp_path))

    assert work("forward").bytes == 4 * (2 * 240 + 3)
    assert work("forward", "bfloat16").bytes == 2 * (2 * 240 + 3)
    assert work("forward+backward").bytes == 4 * (4 * 240 + 2 * 3) + 2 * 240 // 4
    assert work("forward").flops == 5 * 240


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", LEVELS["user"])
def test_inputs_reach_every_branch_and_no_kink(tmp_path, dtype, mode):
    case = Case("bias_act", "", (2, 19, 40, 36), dtype, "nhwc", "user", mode)
    work = BiasAct(case, Session(CPU, tmp_path))
    v = (work.x.double() + work.b.double()[:, None, None]).detach()
    assert (v.abs() >= 1).all()
    assert ((v * math.sqrt(2) - 256).abs() > 4).all()
    assert 0.01 < (v * math.sqrt(2) > 256).double().mean() < 0.1
    assert 0.3 < (v < 0).double().mean() < 0.7
    assert check(work._call(stock)(), work.expected())[1] == ""


# The gate


def test_gate_sees_one_wrong_element():
    value = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(2, 3, 5)
    right = value.float()
    wrong = right.clone()
    wrong[1, 2, 3] += 1e-4
    assert check([right], [Expected("y", value)])[1] == ""
    error, text = check([wrong], [Expected("y", value)])
    assert error == math.inf
    assert "y: 1 of 30" in text
    wrong[1, 2, 3] = math.nan
    assert check([wrong], [Expected("y", value)])[1] != ""
    assert check([right[:1]], [Expected("y", value)])[1] != ""
    assert check([], [Expected("y", value)])[1] == "0 results, expected 1"


def test_gate_takes_none_for_zeros_only():
    value = torch.zeros(3, dtype=torch.float64)
    assert check([None], [Expected("dx", value)])[1] == ""
    assert check([None], [Expected("dx", value + 1)])[1] != ""


def test_gate_of_a_network_is_a_distance():
    value = torch.tensor([3.0, 4.0], dtype=torch.float64)
    expected = [Expected("gradient of w", value, allowed=5e-4)]
    error, text = check([value * (1 + 5e-5)], expected)
    assert text == ""
    assert error == pytest.approx(0.5)
    assert check([value * (1 + 2e-4)], expected)[1] == "gradient of w: off by 0.001"
    assert check([value * math.nan], expected)[1] != ""
    assert check([None], expected)[1] == "gradient of w: off by 5"


def _wrong_forward(x, y, mask, *arguments):
    y.copy_(x)


def _wrong_sum(dy, mask, dx, total, *arguments):
    original = _wrong_sum.original
    original(dy, mask, dx, total, *arguments)
    if total is not None:
        total[-1] *= 1.01


@pytest.mark.parametrize(
    "kernel, wrong, mode",
    [
        ("epilogue_forward", _wrong_forward, "forward"),
        ("epilogue_masked", _wrong_sum, "forward+backward"),
        ("epilogue_masked", _wrong_sum, "backward"),
    ],
)
def test_a_wrong_kernel_fails(monkeypatch, tmp_path, capsys, kernel, wrong, mode):
    needs_cpu_kernels()
    wrong.original = getattr(backends.BACKENDS["cpu"], kernel)
    monkeypatch.setattr(backends.BACKENDS["cpu"], kernel, wrong)
    status, rows = bench(tmp_path, *SMALL, "--mode", mode)
    assert status == 1
    ours = [row for row in rows if row.provider == "cpu"]
    assert ours
    for row in ours:
        assert row.status == "FAIL"
        assert row.detail
        assert math.isnan(row.median_us) and math.isnan(row.speedup)
    others = [row for row in rows if row.provider != "cpu"]
    assert others and all(row.status == "ok" for row in others)
    lines = [line for line in capsys.readouterr().out.splitlines() if "FAIL:" in line]
    assert len(lines) == len(ours)
    assert not any("×" in line for line in lines)
    assert "FAIL" in (tmp_path / "results.html").read_text()


def test_a_kernel_that_raises_fails(monkeypatch, tmp_path):
    needs_cpu_kernels()

    def broken(*arguments):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(backends.BACKENDS["cpu"], "epilogue_forward", broken)
    status, rows = bench(tmp_path, *SMALL, "--mode", "forward")
    assert status == 1
    assert {row.detail for row in rows if row.status == "FAIL"} == {
        "RuntimeError: no such instruction"
    }


# Timing


class Recorder:
    """A stopwatch whose time is the number of its calls."""

    def __init__(self):
        self.order = []

    def time(self, call):
        self.order.append(call())
        return len(self.order)

    def read(self, ticket):
        return ticket

    def synchronize(self):
        self.order.append("|")


def test_providers_take_turns():
    watch = Recorder()
    calls = {name: (lambda name=name: name) for name in "ABC"}
    timings = timing.interleaved(calls, watch, seconds=0, least=4)
    assert "".join(watch.order) == "ABC|ABC|ABC|ABC|"
    assert [timings[name].n for name in "ABC"] == [4, 4, 4]
    assert timings["A"].median_us == pytest.approx((5 + 9) / 2)
    assert timings["C"].p20_us == pytest.approx(3 + 0.6 * 4)


def test_timing_ends_after_its_seconds():
    start = time.monotonic()
    timings = timing.interleaved(
        {"sleep": lambda: time.sleep(0.01)}, timing.HostStopwatch(), seconds=0.2, least=2
    )
    assert 0.2 <= time.monotonic() - start < 5
    assert timings["sleep"].n >= 2
    assert 9e3 < timings["sleep"].p20_us <= timings["sleep"].median_us <= timings["sleep"].p80_us


def test_peak_memory_counts_results_and_temporaries():
    def call():
        a = torch.ones(1000)  # 4000 bytes
        b = a * 2  # 8000 with a
        del a
        return b + 1  # 8000 with b

    scalars = 64  # PyTorch makes tensors of Python's numbers
    assert 8000 <= peak_memory(call, CPU) <= 8000 + scalars


# A run


def test_quick_run(quick):
    folder, status, seconds = quick
    assert status == 0
    assert seconds < 60
    assert (folder / "real.png").read_bytes()[1:4] == b"PNG"
    assert (folder / "generated-untrained.png").read_bytes()[1:4] == b"PNG"


def test_every_row_carries_its_conditions(quick):
    folder, _, _ = quick
    rows = results.read(folder / "results.csv")
    assert {row.level for row in rows} == {"kernel", "user", "training"}
    assert {row.status for row in rows} == {"ok"}
    for row in rows:
        assert 0 < row.p20_us <= row.median_us <= row.p80_us
        assert row.n >= 3
        assert row.matrix_gflop_s > 0 and row.roofline_us > 0
        # As written, with six digits.
        assert row.of_roofline == pytest.approx(row.roofline_us / row.median_us, rel=1e-4)
        for name in ("run", "timestamp", "device", "processor", "cores", "threads", "system"):
            assert getattr(row, name), name
        assert row.torch == torch.__version__
        if row.level == "training":
            assert row.flops > 1e9
            assert row.baseline == "reference"
        else:
            assert row.copy_gbyte_s > 0
            assert row.bytes >= 2 * 4 * 512 * 16
        if row.level != "kernel":
            assert row.peak_bytes > 0 and row.memory_method
    by_provider = {row.provider: row for row in rows if row.mode == "D + R1"}
    ratio = by_provider["reference"].median_us / by_provider["automatic"].median_us
    assert by_provider["automatic"].speedup == pytest.approx(ratio, rel=1e-4)


def test_fused_call_holds_less_memory_than_stock(quick):
    needs_cpu_kernels()
    folder, _, _ = quick
    rows = [row for row in results.read(folder / "results.csv") if row.shape == "4x512x16x16"]
    peak = {(row.layout, row.mode, row.provider): row.peak_bytes for row in rows}
    size = 4 * 512 * 16 * 16 * 4
    for layout in ("nchw", "nhwc"):
        assert size <= peak[layout, "forward", "cpu"] < 1.1 * size
        assert peak[layout, "forward", "stock"] >= 2 * size


def test_commit_is_that_of_the_folder_itself(quick):
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        pytest.skip("not in a git checkout")
    commit, _ = git_commit(root)
    assert len(commit) == 40
    assert {row.commit for row in results.read(quick[0] / "results.csv")} == {commit}
    assert git_commit(root / "tests") == ("", False)


def test_list_measures_nothing(tmp_path, capsys):
    status, rows = bench(tmp_path / "out", *SMALL, "--list")
    assert status == 0
    assert rows == [] and not (tmp_path / "out").exists()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert "bias_act 4x512x4x4 float32 nchw kernel forward" in lines


@pytest.mark.parametrize("argv", [["--cuda-graph"], ["--shape", "no such shape"]])
def test_requests_that_cannot_be_served(tmp_path, capsys, argv):
    status, rows = bench(tmp_path / "out", *argv)
    assert status == 2
    assert rows == []
    assert capsys.readouterr().out.strip()


def test_interrupted_run_keeps_its_rows(monkeypatch, tmp_path, capsys):
    measured = []

    def measure(case, *arguments):
        if measured:
            raise KeyboardInterrupt
        measured.append(case)
        return [Row(op=case.op, mode=case.mode, provider="cpu", median_us=1.0)]

    monkeypatch.setattr(suite, "measure", measure)
    status, rows = bench(tmp_path, *SMALL)
    assert status == 130
    assert [row.mode for row in rows] == [measured[0].mode]
    assert (tmp_path / "results.html").exists()
    assert "interrupted" in capsys.readouterr().out


def test_without_photographs_training_is_skipped(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    status, rows = bench(tmp_path, "--quick", "--op", "training", "--mode", "D + R1")
    assert status == 0
    assert [(row.provider, row.status) for row in rows] == [("all", "skipped")]
    assert "pip install" in rows[0].detail


def test_without_a_compiler_torch_compile_is_skipped(monkeypatch, tmp_path):
    def no_compiler(function, **kwargs):
        def call(*arguments):
            raise RuntimeError("no C++ compiler found")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    argv = [word for word in SMALL if word != "--quick"]
    status, rows = bench(tmp_path, *argv, "--mode", "forward", "double backward", "--seconds", "0")
    assert status == 0
    compiled = {row.mode: row for row in rows if row.provider == "torch.compile"}
    assert {row.status for row in compiled.values()} == {"skipped"}
    assert compiled["forward"].detail == "RuntimeError: no C++ compiler found"
    assert "91469" in compiled["double backward"].detail


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [[], ["--cuda-graph"]])
def test_quick_run_on_a_gpu(tmp_path, graph):
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA device")
    argv = ["--quick", "--op", "bias_act", "--out", str(tmp_path), "--device", "cuda", *graph]
    assert benchmarks.main(argv) == 0
    rows = results.read(tmp_path / "results.csv")
    assert {"triton", "stock", "reference"} <= {row.provider for row in rows}
    assert {row.status for row in rows} == {"ok"}


# What is written down


def a_row(**changes) -> Row:
    values = {
        "run": "2026-01-01T00:00:00+00:00",
        "op": "bias_act",
        "shape": "4x64x128x128",
        "dtype": "float32",
        "layout": "nchw",
        "level": "user",
        "mode": "forward",
        "provider": "cpu",
        "median_us": 1234.5,
        "p20_us": 1200.0,
        "p80_us": 1300.0,
        "n": 17,
        "baseline": "stock",
        "speedup": 3.25,
        "bytes": 33554688,
        "flops": 20971520,
        "copy_gbyte_s": 30.0,
        "matrix_gflop_s": 100.0,
        "of_roofline": 0.876,
        "peak_bytes": 16777216,
        "device": "cpu",
        "processor": "A & B <CPU>",
        "threads": "2",
    }
    return Row(**{**values, **changes})


def test_rows_survive_the_file(tmp_path):
    rows = [a_row(), Row(op="training", status="FAIL", detail='a, "b"\nc')]
    file = results.ResultsFile(tmp_path / "new" / "folder")
    file.append(rows[:1])
    file.append(rows[1:])
    assert [row.cells() for row in results.read(file.path)] == [row.cells() for row in rows]
    with file.path.open(newline="") as lines:
        table = list(csv.reader(lines))
    assert table[0] == COLUMNS
    assert len(table) == 3
    assert results.read(file.path)[0].bytes == 33554688
    assert math.isnan(results.read(file.path)[1].median_us)


def test_a_file_with_other_columns_is_left_alone(tmp_path):
    (tmp_path / "results.csv").write_text("op,time\nx,1\n")
    file = results.ResultsFile(tmp_path)
    assert file.path.name == "results-2.csv"
    assert [path.name for path in file.avoided] == ["results.csv"]
    file.append([a_row()])
    assert results.ResultsFile(tmp_path).path.name == "results-2.csv"
    assert (tmp_path / "results.csv").read_text() == "op,time\nx,1\n"
    with pytest.raises(ValueError, match=r"results\.csv"):
        results.read(tmp_path / "results.csv")


@pytest.fixture
def results_file(tmp_path) -> Path:
    file = results.ResultsFile(tmp_path)
    (tmp_path / "real.png").write_bytes(b"\x89PNG pixels")
    rows = [
        a_row(speedup=9.99, median_us=1.0),  # superseded by the next
        a_row(),
        a_row(level="kernel", baseline="", speedup=math.nan, of_roofline=0.75),
        a_row(provider="peer:x", status="FAIL", detail="y: 1 < 2", median_us=math.nan),
        a_row(op="training", level="training", mode="D + R1", images="real.png gone.png", bytes=0),
    ]
    file.append(rows)
    return file.path


def test_report_is_made_from_the_file_alone(results_file, capsys):
    pytest.importorskip("matplotlib")
    assert benchmarks.main(["--report", str(results_file)]) == 0
    page = results_file.with_suffix(".html").read_text()
    assert str(results_file.with_suffix(".html")) in capsys.readouterr().out
    assert "1.23 ms" in page and "3.25×" in page and "88%" in page and "75%" in page
    assert "9.99×" not in page
    assert "A &amp; B &lt;CPU&gt;" in page and "FAIL: y: 1 &lt; 2" in page
    assert "1 of 4 rows FAIL" in page
    assert page.count("data:image/svg+xml;base64,") == 4
    assert page.count("data:image/png;base64,") == 1
    assert "http" not in page


def test_report_without_matplotlib(results_file, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert benchmarks.main(["--report", str(results_file)]) == 0
    assert "matplotlib is missing" in capsys.readouterr().out
    page = results_file.with_suffix(".html").read_text()
    assert "3.25×" in page and "svg" not in page


def test_report_of_what_is_no_result(tmp_path, capsys):
    (tmp_path / "other.csv").write_text("a,b\n")
    for name in ("other.csv", "missing.csv"):
        assert benchmarks.main(["--report", str(tmp_path / name)]) == 2
        assert "no report" in capsys.readouterr().out


def test_machines_have_sections_of_their_own(tmp_path):
    file = results.ResultsFile(tmp_path)
    file.append([a_row(), a_row(processor="another")])
    page = report.write(file.path)[0].read_text()
    assert page.count("<h2>") == 2


# Peers


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


FORMULA = """
import torch
def formula(x, b, alpha, gain, clamp):
    y = torch.nn.functional.leaky_relu(x + b.reshape([1, -1] + [1] * (x.ndim - 2)), alpha) * gain
    return y if clamp is None else y.clamp(-clamp, clamp)
"""


def torch_utils_family(root: Path, name: str, slope: float = 0.2, head: str = "") -> Path:
    """A checkout with the interface of the originals' ops."""
    return write_tree(
        root / name,
        {
            "torch_utils/__init__.py": "",
            "torch_utils/ops/__init__.py": "",
            "torch_utils/misc.py": FORMULA,
            "torch_utils/ops/bias_act.py": head
            + f"""
misc = None
def bias_act(x, b=None, dim=1, act='linear', alpha=None, gain=None, clamp=None, impl='cuda'):
    global misc
    if misc is None:  # as an extension is compiled at the first call
        from .. import misc
    assert (act, dim, impl) == ('lrelu', 1, 'ref')
    return misc.formula(x, b, {slope} if alpha is None else alpha, 2 ** 0.5, clamp)
""",
        },
    )


def op_family(root: Path, name: str) -> Path:
    """A checkout that compiles extensions when it is imported."""
    return write_tree(
        root / name,
        {
            "op/__init__.py": """
from torch.utils.cpp_extension import load
from .formula import formula
extension = load('fused', sources=['nowhere.cpp'])
def fused_leaky_relu(input, bias=None, negative_slope=0.2, scale=2 ** 0.5):
    return formula(input, bias, negative_slope, scale, None)
""",
            "op/formula.py": FORMULA,
        },
    )


def test_peers_of_both_families_are_timed(tmp_path):
    checkouts = [
        torch_utils_family(tmp_path, "right"),
        torch_utils_family(tmp_path, "wrong", slope=0.1),
        op_family(tmp_path, "other"),
    ]
    argv = [word for path in checkouts for word in ("--peer", str(path))]
    status, rows = bench(tmp_path / "out", *SMALL, "--mode", "double backward", *argv)
    found = {row.provider: row for row in rows if row.provider.startswith("peer:")}
    assert found["peer:right"].status == found["peer:other"].status == "ok"
    assert found["peer:right"].speedup > 0
    assert found["peer:wrong"].status == "FAIL"
    assert status == 1
    left = {name.split(".")[0] for name in sys.modules} & {"torch_utils", "op", "pkg_resources"}
    assert left <= {"pkg_resources"}
    assert not any(str(path) in sys.path for path in checkouts)


def test_peer_that_needs_pkg_resources(tmp_path):
    head = "from pkg_resources import parse_version as v\nassert v('2.4') < v('2.13')"
    peer = peers.load(str(torch_utils_family(tmp_path, "later", head=head)), CPU)
    assert peer.problem == ""


@pytest.mark.parametrize(
    "files, message",
    [
        ({"README": ""}, "neither"),
        ({"torch_utils/ops/bias_act.py": "import no_such_module"}, "No module named"),
        ({"torch_utils/ops/bias_act.py": "bias_act = 3"}, "TypeError"),
        ({"op/__init__.py": "raise OSError('no compiler')"}, "OSError: no compiler"),
    ],
)
def test_peer_that_cannot_be_imported(tmp_path, files, message):
    checkout = write_tree(tmp_path / "peer", files)
    status, rows = bench(
        tmp_path / "out", *SMALL, "--mode", "forward", "--peer", str(checkout), "--dtype", "float32"
    )
    (row,) = [row for row in rows if row.provider == "peer:peer"]
    assert status == 0
    assert row.status == "skipped"
    assert message in row.detail


def test_peer_that_is_not_there(tmp_path):
    assert "no such folder" in peers.load(str(tmp_path / "missing"), CPU).problem


NETWORKS = {
    "networks_stylegan2": "from stylegan_fast.models.stylegan2 import Discriminator, Generator\n",
    "networks": """
from stylegan_fast.models import stylegan2
from stylegan_fast.models.stylegan2 import Discriminator
def Generator(z_dim, c_dim, w_dim, img_resolution, img_channels, synthesis_kwargs={}):
    size = (z_dim, c_dim, w_dim, img_resolution, img_channels)
    return stylegan2.Generator(*size, **synthesis_kwargs)
""",
}


@pytest.mark.parametrize("module", NETWORKS)
def test_networks_of_a_peer_take_our_weights(tmp_path, monkeypatch, module):
    monkeypatch.setattr(end_to_end, "WIDTH", {**end_to_end.WIDTH, "channel_max": 8})
    checkout = torch_utils_family(tmp_path, "peer")
    write_tree(checkout, {f"training/{module}.py": NETWORKS[module]})
    argv = ("--quick", "--op", "training", "--mode", "D + R1", "--seconds", "0")
    status, rows = bench(tmp_path / "out", *argv, "--peer", str(checkout))
    assert status == 0
    found = {row.provider: row for row in rows}
    assert found["peer:peer"].status == "ok"
    assert found["peer:peer"].gate_error < 1


def test_networks_of_another_family_are_left_out(tmp_path):
    peer = peers.load(str(op_family(tmp_path, "other")), CPU)
    assert peer.networks is None and "differ" in peer.networks_problem
