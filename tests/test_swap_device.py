"""Scripts that know no device but CUDA on a CPU, processes that they spawn, and what they use of an
older PyTorch; on scripts and modules written here."""

import io
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from stylegan_fast import swap


@pytest.fixture(autouse=True)
def undone():
    before = set(sys.modules)
    yield
    swap.uninstall()
    for name in set(sys.modules) - before:
        if name.startswith("torch_utils"):
            del sys.modules[name]


@pytest.fixture
def on_cpu():
    return swap.install(device="cpu")


REQUESTS = {
    "torch.zeros": lambda: torch.zeros(2, 3, device="cuda"),
    "torch.randn": lambda: torch.randn([2, 3], device="cuda:1"),
    "torch.as_tensor": lambda: torch.as_tensor([1.0], device="cuda:0"),
    "torch.Tensor.new_ones": lambda: torch.ones(2).new_ones(3, device=0),
    "torch.Tensor.to": lambda: torch.ones(2, 3).to(1, torch.float64, non_blocking=True),
    "torch.Tensor.cuda": lambda: torch.ones(2, 3).cuda(non_blocking=True),
    "torch.Tensor.pin_memory": lambda: torch.ones(2, 3).pin_memory(),
    "_parse_to": lambda: torch.nn.Linear(2, 3).to(0).weight,
    "torch.empty": lambda: torch.nn.Linear(2, 3, device="cuda").weight,
    "torch.device": lambda: torch.nn.Linear(2, 3).to(torch.device("cuda", 1)).bias,
    "torch.Generator": lambda: torch.rand(3, generator=torch.Generator("cuda").manual_seed(0)),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_for_cuda_gets_the_cpu(on_cpu, name):
    assert REQUESTS[name]().device == torch.device("cpu")
    assert on_cpu.routed[name] == "the CPU in place of a CUDA device"


def test_values_and_other_arguments_stay(on_cpu):
    x = torch.tensor([1.5, 2], dtype=torch.float64).to("cuda", torch.float32)
    assert x.tolist() == [1.5, 2]
    assert x.dtype == torch.float32
    assert torch.full((2,), 3, device="cuda").tolist() == [3, 3]
    assert x.to(torch.float16).dtype == torch.float16
    assert torch.empty(1, device="meta").is_meta
    assert torch.device("cuda", 3) == torch.device("cpu")


def test_modules_and_what_they_compute(on_cpu):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5))
    x = torch.randn(2, 3, 7, 6)
    expected = net(x).detach()
    y = net.cuda().to("cuda:0")(x.cuda())
    y.sum().backward()
    assert torch.equal(y, expected)
    assert all(p.grad is not None for p in net.parameters())


def test_events_tell_the_time_and_memory_is_none(on_cpu):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with pytest.raises(RuntimeError, match="must be recorded"):
        start.elapsed_time(end)
    start.record(torch.cuda.current_stream(torch.device("cuda", 0)))
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.synchronize()
    end.record()
    end.synchronize()
    assert 0 <= start.elapsed_time(end) < 60e3
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated(torch.device("cuda")) == 0
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == 1
    torch.manual_seed(0)
    with torch.random.fork_rng():
        torch.cuda.manual_seed_all(1)
        torch.set_rng_state(torch.get_rng_state())
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), first)
    assert {"torch.cuda.Event", "torch.cuda.max_memory_allocated"} <= set(on_cpu.routed)


def test_files_from_a_gpu_are_read(monkeypatch):
    with monkeypatch.context() as saving:
        saving.setattr(torch.serialization, "location_tag", lambda storage: "cuda:1")
        file = io.BytesIO()
        torch.save({"weight": torch.arange(3.0)}, file)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="deserialize object on a CUDA device"):
            torch.load(io.BytesIO(file.getvalue()))
    swap.install(device="cpu")
    for location in (None, "cuda", torch.device("cuda", 0)):
        found = torch.load(io.BytesIO(file.getvalue()), map_location=location)
        assert found["weight"].device.type == "cpu"
        assert found["weight"].tolist() == [0, 1, 2]


def test_all_is_as_before_after_uninstalling():
    before = dict(vars(torch.cuda)), torch.Generator, list(torch.serialization._package_registry)
    swap.install(device="cpu")
    swap.install(device="cpu")
    swap.uninstall()
    assert torch.device("cuda", 1).type == "cuda"
    assert (
        dict(vars(torch.cuda)),
        torch.Generator,
        list(torch.serialization._package_registry),
    ) == before


def test_uninstalling_below_another_mode_leaves_that_alone():
    swap.install(device="cpu")
    with torch.device("meta"):
        swap.uninstall()
        assert torch.zeros(2).is_meta
        assert torch.device("cuda").type == "cuda"
    assert not torch.zeros(2).is_meta
    assert torch.device("cuda").type == "cuda"


def test_without_the_option_devices_are_left_alone():
    swap.install()
    assert torch.device("cuda", 1) == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device='mps' must be 'cpu' or None"):
        swap.install(device="mps")


def test_what_pytorch_gave_up_is_there_again():
    from torch.utils.data import Sampler

    class Endless(Sampler):
        def __init__(self, data):
            super().__init__(data)

    before = Sampler.__init__, torch.optim.Adam.__init__
    swap.install()
    import torch_utils.ops.fma  # noqa: F401

    Endless([1, 2])
    (group,) = torch.optim.Adam([torch.zeros(1)], 0.1, betas=[0, 0.99]).param_groups
    assert group["betas"] == (0.0, 0.99)
    assert group["lr"] == 0.1
    swap.uninstall()
    assert (Sampler.__init__, torch.optim.Adam.__init__) == before


SPAWNING = """
    import multiprocessing
    import sys
    import torch
    from torch_utils.ops import bias_act

    class Adder:
        def __reduce__(self):
            return Adder, ()

    def work(rank, adder, results):
        device = torch.device("cuda", rank)
        x = torch.full([1, 2, 1], -5.0, device=device)
        b = torch.tensor([1.0, 8.0]).cuda()
        y = bias_act.bias_act(x, b, act="relu", gain=2)
        results.put((rank, y.flatten().tolist(), sys.argv[1:]))

    if __name__ == "__main__":
        context = multiprocessing.get_context(sys.argv[1])
        results = context.Queue()
        process = context.Process(target=work, args=(1, Adder(), results))
        process.start()
        print(*results.get())
        process.join()
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_that_are_spawned_have_the_swap_too(tmp_path, method):
    if method == "forkserver" and sys.platform == "win32":
        pytest.skip("there is no forkserver on Windows")
    files = {
        "train.py": SPAWNING,
        "torch_utils/__init__.py": "",
        "torch_utils/ops/__init__.py": "",
        "torch_utils/ops/bias_act.py": "raise ImportError('this file would compile an extension')",
    }
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(source))
    command = ["-m", "stylegan_fast", "swap", "run", "--report", "--device", "cpu", "train.py"]
    done = subprocess.run(
        [sys.executable, *command, method],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == f"1 [0.0, 6.0] ['{method}']\n", done.stderr
    assert "processes spawned" in done.stderr
