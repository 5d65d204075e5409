"""kernels/tuning.py with a stopwatch of the test's own: no GPU is needed."""

import json
import math
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from stylegan_fast import _env, _store
from stylegan_fast.kernels import tuning


class Config(NamedTuple):
    rows: int
    cols: int


CONFIGS = [Config(128, 64), Config(64, 64), Config(256, 32)]
GPU = torch.device("cuda", 0)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The configurations in the order they were timed; the last of the list is the fastest."""
    timed = []

    def milliseconds(trial, config):
        trial(config)
        return 10.0 - len(timed)

    monkeypatch.setenv("STYLEGAN_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(tuning, "_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return timed


def choose(timed, key=("a", "class"), configs=CONFIGS, device=GPU):
    return tuning.choose(key, configs, timed.append, device)


def another_process():
    tuning._chosen.clear()


def test_the_fastest_is_measured_once(measured, tmp_path):
    assert choose(measured) == choose(measured) == CONFIGS[-1]
    assert measured == CONFIGS
    stored = json.loads((tmp_path / "cache" / "triton.json").read_text())
    assert stored == {"GPU 0": {"a class": [256, 32]}}


def test_a_later_process_reads_it(measured):
    choose(measured)
    choose(measured, ("another", 2), CONFIGS[:2])
    another_process()
    assert choose(measured) == CONFIGS[-1]
    assert choose(measured, ("another", 2), CONFIGS[:2]) == CONFIGS[1]
    assert len(measured) == 5


def test_another_device_measures_anew(measured):
    choose(measured)
    choose(measured, device=torch.device("cuda", 1))
    assert len(measured) == 6


def test_what_is_no_longer_offered_is_measured_anew(measured):
    choose(measured)
    assert choose(measured, configs=CONFIGS[:2]) == CONFIGS[1]
    another_process()
    assert choose(measured, configs=CONFIGS[1:]) == CONFIGS[1]


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"GPU 0": 3}', '{"GPU 0": {"a class": "x"}}', "\udcff"], ids=repr
)
def test_a_corrupt_file_is_replaced(measured, content, tmp_path):
    path = tmp_path / "cache" / "triton.json"
    path.parent.mkdir()
    path.write_bytes(content.encode(errors="surrogateescape"))
    assert choose(measured) == CONFIGS[-1]
    another_process()
    choose(measured)
    assert measured == CONFIGS


def test_a_folder_that_cannot_be_written_costs_only_the_memory(measured, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STYLEGAN_FAST_CACHE", str(tmp_path / "file" / "cache"))
    assert choose(measured) == choose(measured) == CONFIGS[-1]
    assert measured == CONFIGS


def test_a_failed_write_leaves_what_was_there(measured, monkeypatch, tmp_path):
    choose(measured)

    def no_space(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_store.os, "replace", no_space)
    choose(measured, ("another", 2))
    folder = tmp_path / "cache"
    assert json.loads((folder / "triton.json").read_text()) == {"GPU 0": {"a class": [256, 32]}}
    assert [path.name for path in folder.iterdir()] == ["triton.json"]


def test_nothing_is_stored_when_switched_off(measured, monkeypatch, tmp_path):
    monkeypatch.setenv("STYLEGAN_FAST_CACHE", "off")
    choose(measured)
    assert not list(tmp_path.iterdir())
    another_process()
    choose(measured)
    assert len(measured) == 6


@pytest.mark.parametrize("reason", ["interpreter", "CPU", "capture", "one"])
def test_where_nothing_can_be_measured_the_first_is_taken(reason, measured, monkeypatch, tmp_path):
    device, configs = GPU, CONFIGS
    if reason == "interpreter":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    elif reason == "CPU":
        device = torch.device("cpu")
    elif reason == "capture":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    else:
        configs = CONFIGS[:1]
    assert choose(measured, configs=configs, device=device) == CONFIGS[0]
    assert not measured and not list(tmp_path.iterdir())
    if reason == "capture":  # and measured when the capture has ended
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert choose(measured) == CONFIGS[-1]


def test_what_does_not_fit_the_device_is_not_chosen(monkeypatch):
    from triton.runtime.errors import OutOfResources

    def do_bench(run, **options):
        run()
        return 1.0

    def trial(config):
        if config.rows == 256:
            raise OutOfResources(300_000, 227_000, "shared memory")

    monkeypatch.setattr(tuning.triton.testing, "do_bench", do_bench)
    assert [tuning._milliseconds(trial, config) for config in CONFIGS] == [1.0, 1.0, math.inf]


def test_the_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("STYLEGAN_FAST_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert _env.cache_folder() == tmp_path / "xdg" / "stylegan_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert _env.cache_folder() == tmp_path / ".cache" / "stylegan_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _env.cache_folder() == tmp_path / ".cache" / "stylegan_fast"
