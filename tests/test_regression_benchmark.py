"""A small record of speed for pytest-benchmark: `pytest tests/test_regression_benchmark.py`,
`--benchmark-autosave` to keep it and `--benchmark-compare` to look back. What fails is a wrong
value, never a time."""

from __future__ import annotations

import pytest

pytest.importorskip("pytest_benchmark")

from stylegan_fast.benchmarks.cases import LEVELS, Case
from stylegan_fast.benchmarks.gate import check
from stylegan_fast.benchmarks.runner import WORKLOADS
from stylegan_fast.benchmarks.workload import Session

LAYOUTS = ("nchw", "nhwc")
BIAS_ACT = [
    Case("bias_act", "regression", (2, 24, 40, 36), "float32", layout, level, mode)
    for layout in LAYOUTS
    for level in ("kernel", "user")
    for mode in LEVELS[level]
]
MODES = {
    "same": {"kernel": LEVELS["kernel"], "user": LEVELS["user"]},
    "up2": {"kernel": ("forward",), "user": ("forward",)},
    "down2": {"kernel": ("forward",), "user": ("forward",)},
    "up2 12-tap": {"kernel": ("forward",), "user": ("forward",)},
    "after conv + epilogue": {"kernel": LEVELS["kernel"], "user": ("forward", "forward+backward")},
}
UPFIRDN2D = [
    Case("upfirdn2d", "regression", (2, 24, 41, 33), "float32", layout, level, mode, variant)
    for layout in LAYOUTS
    for variant, levels in MODES.items()
    for level, modes in levels.items()
    for mode in modes
]


@pytest.mark.parametrize("provider", ["stock", "reference", "cpu", "triton", "cuda"])
@pytest.mark.parametrize("case", BIAS_ACT + UPFIRDN2D, ids=str)
def test_speed(benchmark, case, provider, device, tmp_path):
    work = WORKLOADS[case.op](case, Session(device, tmp_path, compiles=False))
    calls = {found.name: found.call for found in work.providers()}
    if provider not in calls:
        pytest.skip(f"{provider} has no {case.level} call that can be timed on {device}")
    benchmark.group = str(case)
    results = benchmark.pedantic(calls[provider], rounds=5, warmup_rounds=1)
    assert check(results, work.expected())[1] == ""
