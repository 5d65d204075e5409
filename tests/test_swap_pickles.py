"""Network pickles of the originals where their repository is absent: of networks written here, and
made in another process, so that this one has neither their classes nor their modules."""

import importlib
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch

from stylegan_fast import swap
from stylegan_fast.testing import assert_matches

NETWORK = """
    import dnnlib
    import torch
    from torch_utils import misc, persistence
    from torch_utils.ops import conv2d_resample, bias_act

    executed = []

    @misc.profiled_function
    def modulated_conv2d(x, weight, styles, noise=None, up=1, down=1, padding=0,
                         resample_filter=None, demodulate=True, flip_weight=True,
                         fused_modconv=True):
        executed.append(1)
        with misc.suppress_tracer_warnings():
            n = int(x.shape[0])
        misc.assert_shape(styles, [n, None])
        w = weight * styles.mean(0)[:, None, None]
        return conv2d_resample.conv2d_resample(x, w, padding=padding)

    @persistence.persistent_class
    class Layer(torch.nn.Module):
        def __init__(self, channels, options={}):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, channels, 3, 3))
            self.register_buffer("scale", misc.constant([2, 3, 4, 5]))

        def forward(self, x, styles):
            y = modulated_conv2d(x, self.weight, styles, padding=1, demodulate=False)
            return bias_act.bias_act(y, self.scale)

    @persistence.persistent_class
    class Generator(torch.nn.Module):
        def __init__(self, channels, **options):
            super().__init__()
            self.layer = Layer(channels)
            self.options = dnnlib.EasyDict(options)

        def forward(self, x, styles):
            return self.layer(x, styles) * self.options.gain
"""

WRITE = """
    import pickle, torch
    from stylegan_fast import swap
    swap.install(pickles=True)
    import network
    torch.manual_seed(0)
    G = network.Generator(3, gain=2.0)
    with open("network.pkl", "wb") as file:
        pickle.dump({"G_ema": G, "G": network.Generator(3, gain=1.0)}, file)
    torch.save(dict(G.state_dict()), "state.pt")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pickles")
    (folder / "network.py").write_text(textwrap.dedent(NETWORK))
    subprocess.run([sys.executable, "-c", textwrap.dedent(WRITE)], cwd=folder, check=True)
    (folder / "network.py").unlink()
    return folder


@pytest.fixture(autouse=True)
def undone():
    before = set(sys.modules)
    yield
    swap.uninstall()
    for name in set(sys.modules) - before:
        if not name.startswith("stylegan_fast"):
            del sys.modules[name]


def test_a_pickle_runs_without_its_repository(folder):
    swap.install(pickles=True)
    with pytest.warns(UserWarning, match="contains code, which is being executed"):
        networks = pickle.loads((folder / "network.pkl").read_bytes())
    net = networks["G_ema"]
    state = torch.load(folder / "state.pt")
    assert net.state_dict().keys() == state.keys()
    assert type(net).__name__ == "Generator"
    assert type(net).__module__ == "torch_utils.persistence"
    assert net.init_args == (3,)
    assert net.init_kwargs.gain == 2.0
    assert type(networks["G"]) is type(net)
    assert networks["G"].options.gain == 1.0

    x, styles = torch.randn(2, 3, 5, 4), torch.randn(1, 3).expand(2, 3)
    w = state["layer.weight"] * styles[0, :, None, None]
    y = torch.nn.functional.conv2d(x, w, padding=1) + state["layer.scale"][:, None, None]
    for _ in range(2):
        assert_matches(net(x, styles), 2 * y.double(), reduction=27)
    module = sys.modules[type(net).__mro__[1].__module__]
    assert module.executed == [1]  # its own modulated_conv2d, once: then it had been found
    where = f"{module.__name__}.modulated_conv2d"
    assert "stylegan2" in swap.report().routed[where]


def test_it_is_refused_unless_asked_for(folder):
    swap.install()
    with pytest.raises(ModuleNotFoundError, match="torch_utils"):
        pickle.loads((folder / "network.pkl").read_bytes())


def test_a_repository_of_ones_own_comes_first(tmp_path, monkeypatch):
    (tmp_path / "torch_utils").mkdir()
    (tmp_path / "torch_utils" / "__init__.py").write_text("")
    (tmp_path / "torch_utils" / "misc.py").write_text("mine = 1")
    monkeypatch.syspath_prepend(tmp_path)
    swap.install(pickles=True)
    assert importlib.import_module("torch_utils.misc").mine == 1


def test_a_hook_sees_and_changes_what_is_loaded(folder):
    swap.install(pickles=True)
    persistence = importlib.import_module("torch_utils.persistence")
    seen = []

    def hook(record):
        seen.append((record.type, record.version, record.class_name, "training" in record.state))
        record.module_src = record.module_src.replace("gain", "gain + 0 * self.options.gain")
        return record

    persistence.import_hook(hook)
    with pytest.warns(UserWarning, match="contains code"):
        net = pickle.loads((folder / "network.pkl").read_bytes())["G"]
    assert ("class", 6, "Generator", True) in seen
    assert net(torch.randn(1, 3, 5, 4), torch.randn(1, 3)).shape == (1, 4, 5, 4)


def test_a_failing_source_leaves_nothing_behind():
    swap.install(pickles=True)
    persistence = importlib.import_module("torch_utils.persistence")
    before = set(sys.modules)
    record = dict(type="class", version=6, module_src="1 / 0", class_name="A", state={})
    for _ in range(2):
        with pytest.warns(UserWarning, match="contains code"), pytest.raises(ZeroDivisionError):
            persistence._reconstruct_persistent_obj(record)
    assert set(sys.modules) == before
    with pytest.raises(ValueError, match="version 7 is unknown"):
        persistence._reconstruct_persistent_obj(record | dict(version=7))


def test_misc_and_dnnlib():
    swap.install(pickles=True)
    misc = importlib.import_module("torch_utils.misc")
    util = importlib.import_module("dnnlib.util")
    misc.assert_shape(torch.ones(2, 3), [None, 3])
    with pytest.raises(AssertionError, match="size 3 of dimension 1, expected 4"):
        misc.assert_shape(torch.ones(2, 3), [2, 4])
    with pytest.raises(AssertionError, match="2 dimensions, expected 1"):
        misc.assert_shape(torch.ones(2, 3), [2])
    assert torch.equal(misc.constant(3.0, shape=[2, 2]), torch.full((2, 2), 3.0))
    a, b = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    torch.nn.init.normal_(a.weight)
    b.weight.requires_grad_(False)
    misc.copy_params_and_buffers(a, b, require_all=True)
    assert torch.equal(a.weight, b.weight)
    assert not b.weight.requires_grad
    with pytest.raises(KeyError, match="weight is missing"):
        misc.copy_params_and_buffers(torch.nn.ReLU(), b, require_all=True)
    d = util.EasyDict(a=1)
    d.b = 2
    del d.a
    assert d == {"b": 2}
    with pytest.raises(AttributeError):
        _ = d.a
    made = util.construct_class_by_name(2, 3, class_name="torch.nn.Linear")
    assert made.weight.shape == (3, 2)
    assert importlib.import_module("dnnlib").EasyDict is util.EasyDict
