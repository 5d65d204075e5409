"""Shared fixtures. STYLEGAN_FAST_TEST_DEVICE=cuda runs the same tests on a GPU (`make gpu`)."""

import os

DEVICE = os.environ.get("STYLEGAN_FAST_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    # Before any kernel is decorated: Triton then interprets them on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from stylegan_fast import backends

ON_GPU = DEVICE != "cpu"
IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ

LONG = (
    "test_cuda_sources",
    "test_cpu_sources",
    "test_packaging",
    "test_triton_compile",
    "test_benchmarks",
)
"""Files that take minutes. They come first, so that no worker is left alone with one at the end."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    for item in items:
        if {"device", "backend"}.intersection(item.fixturenames):
            item.add_marker(pytest.mark.device)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish():
    """After an illegal access nothing runs in a process any more: xdist starts another one, and
    names the test in which this one ended."""
    if ON_GPU and IN_WORKER and not _gpu_works():
        os._exit(1)


def _gpu_works() -> bool:
    try:
        torch.cuda.synchronize()
    except Exception:  # one that leaves a hook would end all workers
        return False
    return True


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture(params=list(backends.BACKENDS))
def backend(request) -> str:
    """Every backend that can run on the test device; the others are skipped with their reason."""
    reason = backends.refusal(request.param, "bias_act", DEVICE, torch.float32)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN, so an element that no kernel wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=ON_GPU)
def kernels_finished():
    """An error in a kernel shows in the test that launched it."""
    yield
    torch.cuda.synchronize()
