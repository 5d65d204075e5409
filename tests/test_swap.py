"""The import hook, on stand-ins written here: packages with the module layout and the signatures of
the repositories that it knows. Their ops raise, unless a test imports them before the hook."""

import contextlib
import importlib
import math
import re
import sys
import textwrap
import types

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradgradcheck

from stylegan_fast import ops, swap
from stylegan_fast.__main__ import main
from stylegan_fast.testing import assert_matches, tolerance

NEEDS_A_COMPILER = "raise ImportError('this file would compile an extension')"

NVLABS = {
    "torch_utils/__init__.py": "",
    "torch_utils/ops/__init__.py": "",
    **{
        f"torch_utils/ops/{name}.py": NEEDS_A_COMPILER
        for name in (
            "bias_act",
            "conv2d_gradfix",
            "conv2d_resample",
            "filtered_lrelu",
            "fma",
            "grid_sample_gradfix",
            "upfirdn2d",
        )
    },
}

WORKING_BIAS_ACT = """
    import torch.nn.functional as F

    def bias_act(x, b=None, dim=1, act='linear', alpha=None, gain=None, clamp=None, impl='cuda'):
        assert act == 'relu'
        return F.relu(x + b.reshape(-1, 1, 1))
"""

NETWORKS = """
    import torch
    from torch_utils.ops import conv2d_resample

    calls = []

    def traced(function):
        def wrapper(*args, **kwargs):
            calls.append(function.__name__)
            return function(*args, **kwargs)
        return wrapper

    @traced
    def modulated_conv2d(x, weight, styles, noise=None, up=1, down=1, padding=0,
                         resample_filter=None, demodulate=True, flip_weight=True,
                         fused_modconv=True):
        w = weight[None] * styles[:, None, :, None, None]
        if demodulate:
            w = w * (w.square().sum([2, 3, 4], keepdim=True) + 1e-8).rsqrt()
        n = len(x)
        y = conv2d_resample.conv2d_resample(
            x.flatten(0, 1)[None], w.flatten(0, 1), resample_filter, up, down, padding, groups=n,
            flip_weight=flip_weight)
        y = y.reshape(n, -1, *y.shape[2:])
        return y if noise is None else y + noise
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Writes a repository and puts it first on the path; forgets all that was imported since."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)

    def write(files):
        for name, source in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(source))
        importlib.invalidate_caches()
        return tmp_path

    yield write
    swap.uninstall()
    for name in set(sys.modules) - before:
        if not name.startswith("stylegan_fast"):
            del sys.modules[name]


def image(*shape):
    return torch.randn(shape, dtype=torch.float64)


def test_ops_come_from_here_and_their_packages_from_the_repository(checkout):
    folder = checkout(NVLABS)
    swap.install()
    from torch_utils.ops import bias_act, upfirdn2d

    x, b = image(2, 3, 5, 4), torch.tensor([1.0, -2, 0.5], dtype=torch.float64)
    y = bias_act.bias_act(x, b, act="lrelu", clamp=0.7)
    expected = (F.leaky_relu(x + b[:, None, None], 0.2) * math.sqrt(2)).clamp(-0.7, 0.7)
    assert_matches(y, expected)
    f = upfirdn2d.setup_filter([1, 3, 3, 1])
    assert_matches(upfirdn2d.upsample2d(x, f, impl="ref"), ops.upsample2d(x, f), reduction=16)
    assert sys.modules["torch_utils"].__file__ == str(folder / "torch_utils" / "__init__.py")
    assert set(swap.report().routed) == {"torch_utils.ops.bias_act", "torch_utils.ops.upfirdn2d"}


def test_nothing_is_looked_up_before_it_is_asked_for(checkout):
    checkout(NVLABS)
    swap.install()
    assert not [name for name in sys.modules if name.startswith("torch_utils")]
    assert str(swap.report()) == "nothing was routed to stylegan_fast"


def test_every_module_with_its_private_names(checkout):
    checkout(NVLABS)
    swap.install()
    from torch_utils.ops import (
        bias_act,
        conv2d_gradfix,
        conv2d_resample,
        filtered_lrelu,
        fma,
        grid_sample_gradfix,
        upfirdn2d,
    )
    from torch_utils.ops.upfirdn2d import _get_filter_size, _parse_padding, _parse_scaling

    assert bias_act.activation_funcs["lrelu"].def_gain == math.sqrt(2)
    assert bias_act.activation_funcs["swish"].has_2nd_grad
    z = image(3)
    assert torch.equal(bias_act.activation_funcs["tanh"].func(z), z.tanh())
    assert _parse_padding([1, 2]) == (1, 1, 2, 2)
    assert _parse_scaling(2) == (2, 2)
    assert _get_filter_size(torch.ones(3, 5)) == (5, 3)

    x, w = image(2, 3, 7, 5), image(4, 3, 3, 3)
    y = conv2d_gradfix.conv2d(x, w, stride=2, padding=1)
    assert torch.equal(y, F.conv2d(x, w, stride=2, padding=1))
    y = conv2d_gradfix.conv_transpose2d(x, image(3, 2, 3, 3), None, 2, 1, 1)
    assert y.shape == (2, 2, 14, 10)
    y = conv2d_resample.conv2d_resample(x, w, upfirdn2d.setup_filter([1, 2, 1]), 1, 2, 1)
    assert torch.equal(y, ops.conv2d_resample(x, w, ops.setup_filter([1, 2, 1]), down=2, padding=1))
    a, b = image(2, 3, 1, 1), image(3, 1, 5)
    assert_matches(fma.fma(x, a, b), x * a + b)
    grid = image(2, 4, 6, 2)
    y = grid_sample_gradfix.grid_sample(x, grid)
    assert torch.equal(y, F.grid_sample(x, grid, align_corners=False))
    x.requires_grad_()
    assert gradgradcheck(lambda x: grid_sample_gradfix.grid_sample(x, grid), (x,))
    y = grid_sample_gradfix.grid_sample(x, grid.requires_grad_())
    assert torch.autograd.grad(y.sum(), grid)[0].count_nonzero() > 0
    x = x.detach()
    y = filtered_lrelu.filtered_lrelu(x, up=2, padding=1, impl="ref")
    assert_matches(y, ops.filtered_lrelu(x, up=2, padding=1))

    conv2d_gradfix.enabled = grid_sample_gradfix.enabled = True
    with conv2d_gradfix.no_weight_gradients():
        assert conv2d_gradfix.weight_gradients_disabled
        with conv2d_gradfix.no_weight_gradients(disable=False):
            assert conv2d_gradfix.weight_gradients_disabled
    assert not conv2d_gradfix.weight_gradients_disabled


def test_the_originals_corners(checkout):
    checkout(NVLABS)
    swap.install()
    from torch_utils.ops import bias_act

    y = bias_act.bias_act(torch.ones(1, 2).half(), torch.tensor([0.1, 0.2]))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, torch.tensor([[1.1, 1.2]]))
    with pytest.raises(ValueError, match="impl='gpu' is unknown"):
        bias_act.bias_act(torch.ones(1, 2), impl="gpu")
    with pytest.raises(KeyError, match="gelu"):
        bias_act.bias_act(torch.ones(1, 2), act="gelu")


def test_a_copy_of_the_folder_in_another_package(checkout):
    checkout({f"people/{name}": source for name, source in NVLABS.items()})
    swap.install()
    from people.torch_utils.ops import fma

    assert fma.fma(torch.tensor(2.0), torch.tensor(3.0), torch.tensor(4.0)) == 10


def test_without_a_repository(checkout):
    swap.install()
    from torch_utils.ops import fma

    assert fma.fma(torch.tensor(2.0), torch.tensor(3.0), torch.tensor(4.0)) == 10
    assert "no" in swap.report().routed["torch_utils"]


def test_an_unknown_name_is_refused_and_reported(checkout):
    checkout(NVLABS)
    swap.install()
    with pytest.raises(ImportError, match="sharpen2d"):
        from torch_utils.ops.upfirdn2d import sharpen2d  # noqa: F401
    assert "torch_utils.ops.upfirdn2d.sharpen2d" in swap.report().left


def test_modules_imported_earlier_change_in_place(checkout):
    checkout(
        NVLABS
        | {
            "torch_utils/ops/bias_act.py": WORKING_BIAS_ACT,
            "consumer.py": "from torch_utils.ops.bias_act import bias_act as activate",
        }
    )
    import consumer
    from torch_utils.ops import bias_act

    theirs = bias_act.bias_act
    report = swap.install()
    assert bias_act.bias_act is consumer.activate is not theirs
    y = consumer.activate(torch.tensor([[1.0, -2.0]]), act="lrelu", gain=1)
    torch.testing.assert_close(y, torch.tensor([[1.0, -0.4]]))
    assert "in consumer" in report.routed["torch_utils.ops.bias_act"]
    swap.uninstall()
    assert bias_act.bias_act is consumer.activate is theirs


@pytest.mark.parametrize(
    "source, reason",
    [
        ("def bias_act(x, bias): pass", r"bias_act\(x, bias\) is unknown"),
        ("class bias_act: pass", "no function bias_act"),
        ("", "no function bias_act"),
    ],
)
def test_a_module_that_only_looks_like_a_known_one(checkout, source, reason):
    checkout(NVLABS | {"torch_utils/ops/bias_act.py": source})
    from torch_utils.ops import bias_act

    before = dict(vars(bias_act))
    report = swap.install()
    assert vars(bias_act) == before
    assert list(report.routed) == []
    assert re.search(reason, report.left["torch_utils.ops.bias_act"])


def test_a_failing_install_leaves_nothing_behind(checkout, monkeypatch):
    checkout(NVLABS | {"torch_utils/ops/bias_act.py": WORKING_BIAS_ACT})
    from torch_utils.ops import bias_act

    theirs, finders = bias_act.bias_act, list(sys.meta_path)

    class Odd(types.ModuleType):
        def __getattr__(self, name):
            raise OSError("no such share")

    monkeypatch.setitem(sys.modules, "torch_utils.ops.fma", Odd("torch_utils.ops.fma"))
    with pytest.raises(OSError, match="no such share"):
        swap.install()
    assert bias_act.bias_act is theirs
    assert sys.meta_path == finders
    monkeypatch.delitem(sys.modules, "torch_utils.ops.fma")
    swap.install()
    assert bias_act.bias_act is not theirs


def test_installing_twice_and_uninstalling_twice(checkout):
    checkout(NVLABS)
    finders = list(sys.meta_path)
    first = swap.install()
    import torch_utils.ops.fma

    assert swap.install() is first
    assert len(sys.meta_path) == len(finders) + 2
    swap.uninstall()
    assert sys.meta_path == finders
    assert str(swap.uninstall()) == "nothing was routed to stylegan_fast"
    assert "torch_utils.ops.fma" not in sys.modules
    assert not hasattr(torch_utils.ops, "fma")


def test_uninstalling_names_who_still_uses_it(checkout):
    checkout(NVLABS | {"consumer.py": "from torch_utils.ops.fma import fma"})
    swap.install()
    import consumer

    importlib.import_module("torch_utils.ops.bias_act")
    report = swap.uninstall()
    assert report.left.keys() == {"torch_utils.ops.fma"}
    assert "consumer" in report.left["torch_utils.ops.fma"]
    assert report.routed == {"torch_utils.ops.bias_act": "removed"}
    assert consumer.fma(torch.tensor(2.0), torch.tensor(3.0), torch.tensor(4.0)) == 10
    with pytest.raises(ImportError, match="would compile"):
        importlib.import_module("torch_utils.ops.fma")


ROSINALITY = {
    "op/__init__.py": """
        from .fused_act import FusedLeakyReLU, fused_leaky_relu
        from .upfirdn2d import upfirdn2d
    """,
    "op/fused_act.py": NEEDS_A_COMPILER,
    "op/upfirdn2d.py": NEEDS_A_COMPILER,
    "op/conv2d_gradfix.py": NEEDS_A_COMPILER,
}


def moved(files, prefix):
    return {prefix + name: source for name, source in files.items()}


@pytest.mark.parametrize("prefix", ["", "models/stylegan2/"])
def test_the_op_package(checkout, prefix):
    checkout(moved(ROSINALITY, prefix))
    swap.install()
    op = importlib.import_module(prefix.replace("/", ".") + "op")
    gradfix = importlib.import_module(op.__name__ + ".conv2d_gradfix")

    x = image(2, 3, 5, 4)
    activate = op.FusedLeakyReLU(3, True, 0.1, 1.5).double()
    torch.nn.init.normal_(activate.bias)
    expected = F.leaky_relu(x + activate.bias[:, None, None], 0.1) * 1.5
    assert_matches(activate(x), expected)
    assert_matches(op.fused_leaky_relu(x, negative_slope=0.3), F.leaky_relu(x, 0.3) * 2**0.5)

    k = torch.tensor([[1.0, 2, 3], [4, 5, 6]], dtype=torch.float64)
    expected = ops.upfirdn2d(x, k, 2, 1, [2, 1, 2, 1])
    assert_matches(op.upfirdn2d(x, k, up=2, pad=(2, 1)), expected)
    expected = ops.upfirdn2d(x, k, [1, 2], 1, [3, 1, 0, 2])
    assert_matches(op.upfirdn2d(x, k, up=(1, 2), pad=[3, 1, 0, 2]), expected)
    x = x.contiguous(memory_format=torch.channels_last)
    assert op.upfirdn2d(x, k, down=2, pad=(2, 1)).is_contiguous()
    with pytest.raises(TypeError):
        op.upfirdn2d(x, k, pad=1)
    assert gradfix.enabled
    w = image(2, 3, 3, 3)
    assert torch.equal(gradfix.conv2d(x, w), F.conv2d(x, w))


EARLY = {name: source for name, source in ROSINALITY.items() if "gradfix" not in name}
BASICSR = {
    "basicsr/__init__.py": "",
    "basicsr/ops/__init__.py": "",
    "basicsr/ops/fused_act/__init__.py": ROSINALITY["op/__init__.py"].splitlines()[1],
    "basicsr/ops/fused_act/fused_act.py": NEEDS_A_COMPILER,
    "basicsr/ops/upfirdn2d/__init__.py": "from .upfirdn2d import upfirdn2d",
    "basicsr/ops/upfirdn2d/upfirdn2d.py": NEEDS_A_COMPILER,
}


@pytest.mark.parametrize(
    "files, packages",
    [
        (moved(EARLY, "models/stylegan2/"), ["models.stylegan2.op"] * 2),
        (BASICSR, ["basicsr.ops.fused_act", "basicsr.ops.upfirdn2d"]),
    ],
    ids=["early copy of op", "basicsr"],
)
def test_copies_without_the_argument_bias(checkout, files, packages):
    checkout(files)
    swap.install()
    activations, resampling = (importlib.import_module(name) for name in packages)
    x = image(2, 3, 5, 4)
    activate = activations.FusedLeakyReLU(3, 0.1, 1.5).double()
    torch.nn.init.normal_(activate.bias)
    expected = F.leaky_relu(x + activate.bias[:, None, None], 0.1) * 1.5
    assert_matches(activate(x), expected)
    with pytest.raises(TypeError, match="bias"):
        activations.fused_leaky_relu(x)
    k = torch.ones(2, 2, dtype=torch.float64)
    assert resampling.upfirdn2d(x, k, down=2, pad=(1, 0)).shape == (2, 3, 3, 2)


def test_an_op_package_with_other_modules_is_left_alone(checkout):
    checkout({"op/__init__.py": "", "op/upfirdn2d.py": "mine = 1", "op/other.py": ""})
    swap.install()
    import op.upfirdn2d

    assert op.upfirdn2d.mine == 1
    assert swap.report().left == {"op.upfirdn2d": "its package has the modules other, upfirdn2d"}


def test_mmcv_has_names_of_its_own(checkout):
    names = ("bias_act", "conv2d_gradfix", "filtered_lrelu", "fused_bias_leakyrelu", "upfirdn2d")
    files = {f"mmcv/ops/{name}.py": NEEDS_A_COMPILER for name in names}
    checkout({"mmcv/__init__.py": "", "mmcv/ops/__init__.py": "", **files})
    swap.install()
    from mmcv.ops import bias_act, filtered_lrelu, fused_bias_leakyrelu, upfirdn2d

    x, b, f = image(2, 3, 5, 4), image(3), torch.ones(2, 3)
    y = bias_act.bias_act(input=x, bias=b, act="tanh", use_custom_op=False)
    assert_matches(y, ops.bias_act(x, b, act="tanh"))
    y = upfirdn2d.upsample2d(input=x, filter=f, up=2, padding=[1, 2])
    assert torch.equal(y, ops.upsample2d(x, f, padding=[1, 2]))
    y = upfirdn2d.downsample2d(x, f, down=2, use_custom_op=False)
    assert_matches(y, ops.downsample2d(x, f), reduction=6)
    y = upfirdn2d.filter2d(x, f, flip_filter=True)
    assert torch.equal(y, ops.filter2d(x, f, flip_filter=True))
    y = filtered_lrelu.filtered_lrelu(x, filter_up=f, filter_down=f, bias=b, up=2, padding=2)
    assert torch.equal(y, ops.filtered_lrelu(x, f, f, b, up=2, padding=2))
    layer = fused_bias_leakyrelu.FusedBiasLeakyReLU(3, 0.1)
    expected = F.leaky_relu(x + layer.bias[:, None, None], 0.1) * 2**0.5
    assert_matches(layer.double()(x), expected)


@contextlib.contextmanager
def counted(monkeypatch):
    calls = []

    def counting(*args, **kwargs):
        calls.append(args)
        return modulated_conv2d(*args, **kwargs)

    modulated_conv2d = ops.modulated_conv2d
    monkeypatch.setattr(ops, "modulated_conv2d", counting)
    yield calls


def test_modulated_conv2d_is_found_by_its_first_call(checkout, monkeypatch):
    checkout(
        NVLABS | {"networks.py": NETWORKS, "other.py": "from networks import modulated_conv2d"}
    )
    swap.install()
    import networks
    import other

    x, weight, styles = image(2, 3, 5, 4), image(4, 3, 3, 3), image(2, 3)
    noise, f = image(2, 1, 10, 8), ops.setup_filter([1, 3, 3, 1])
    arguments = (x, weight, styles, noise, 2, 1, 1, f, True, False)
    with counted(monkeypatch) as calls:
        first = networks.modulated_conv2d(*arguments)
        assert calls == [] and networks.calls == ["modulated_conv2d"]
        second = networks.modulated_conv2d(*arguments)
        third = other.modulated_conv2d(*arguments)
        assert len(calls) == 2 and networks.calls == ["modulated_conv2d"]
    limit = tolerance(torch.float64, reduction=27 * 16, scale=first.abs().max().item())
    torch.testing.assert_close(second, first, rtol=0, atol=limit)
    torch.testing.assert_close(third, first, rtol=0, atol=limit)
    assert "stylegan2" in swap.report().routed["networks.modulated_conv2d"]
    swap.uninstall()
    assert networks.modulated_conv2d is other.modulated_conv2d
    networks.modulated_conv2d(*arguments)
    assert networks.calls == ["modulated_conv2d"] * 2


def test_modulated_conv2d_of_code_that_is_no_module(checkout):
    """As the networks of a pickle."""
    checkout(NVLABS)
    swap.install()
    names = {"__name__": "_imported_module_0"}
    exec(compile(textwrap.dedent(NETWORKS), "embedded", "exec"), names)
    theirs = names["modulated_conv2d"]
    theirs(image(1, 3, 5, 4), image(4, 3, 1, 1), image(1, 3))
    assert names["modulated_conv2d"] is not theirs
    swap.uninstall()
    assert names["modulated_conv2d"] is theirs


STYLEGAN3 = """
    import torch
    from torch_utils.ops import conv2d_gradfix

    def modulated_conv2d(x, w, s, demodulate=True, padding=0, input_gain=None):
        if demodulate:
            w = w * w.square().mean([1, 2, 3], keepdim=True).rsqrt()
            s = s * s.square().mean().rsqrt()
        w = w[None] * s[:, None, :, None, None]
        if demodulate:
            w = w * (w.square().sum([2, 3, 4], keepdim=True) + 1e-8).rsqrt()
        if input_gain is not None:
            w = w * input_gain.expand(s.shape)[:, None, :, None, None]
        n = len(x)
        y = conv2d_gradfix.conv2d(x.flatten(0, 1)[None], w.flatten(0, 1), padding=padding, groups=n)
        return y.reshape(n, -1, *y.shape[2:])
"""


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("gain", [None, 0.7])
def test_modulated_conv2d_of_stylegan3(checkout, monkeypatch, demodulate, gain):
    checkout(NVLABS | {"networks3.py": STYLEGAN3})
    swap.install()
    import networks3

    gain = None if gain is None else torch.tensor(gain, dtype=torch.float64)
    arguments = (image(2, 3, 5, 4), image(4, 3, 3, 3), image(2, 3), demodulate, [2, 1], gain)
    with counted(monkeypatch) as calls:
        expected = networks3.modulated_conv2d(*arguments)
        y = networks3.modulated_conv2d(*arguments)
        assert len(calls) == 1
    assert y.shape == (2, 4, 7, 4)
    assert_matches(y, expected, reduction=27)
    x = arguments[0].contiguous(memory_format=torch.channels_last)
    assert networks3.modulated_conv2d(x, *arguments[1:]).is_contiguous()


def test_an_unknown_modulated_conv2d_is_left_alone(checkout):
    source = textwrap.dedent(NETWORKS).replace("fused_modconv=True", "fused_modconv=True, fancy=1")
    checkout(NVLABS | {"networks.py": source})
    swap.install()
    import networks

    theirs = networks.modulated_conv2d
    theirs(image(1, 3, 5, 4), image(4, 3, 1, 1), image(1, 3))
    assert networks.modulated_conv2d is theirs
    assert "fancy" in swap.report().left["networks.modulated_conv2d"]


def test_installing_imports_nothing():
    before = set(sys.modules)
    swap.install()
    assert set(sys.modules) == before
    swap.uninstall()


@pytest.fixture
def command(checkout, monkeypatch):
    """Runs `python -m stylegan_fast swap ...` here."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", list(sys.argv))
        monkeypatch.setattr(sys, "path", list(sys.path))
        return main(["swap", *map(str, arguments)])

    return run


SCRIPT = """
    import sys
    from torch_utils.ops import fma

    if __name__ == "__main__":
        print(sys.argv[1:], "stylegan_fast" in fma.__file__)
        if "--fail" in sys.argv:
            sys.exit(3)
"""


def test_a_script_runs_without_an_edit(checkout, command, capsys):
    folder = checkout(moved(NVLABS | {"generate.py": SCRIPT}, "repository/")) / "repository"
    assert command("run", folder / "generate.py", "--outdir", "out", "train", "-m") == 0
    assert capsys.readouterr().out == "['--outdir', 'out', 'train', '-m'] True\n"
    with pytest.raises(SystemExit, match="3"):
        command("run", "--report", folder / "generate.py", "--fail")
    assert "torch_utils.ops.fma  instead of" in capsys.readouterr().err


def test_a_module_runs_without_an_edit(checkout, command, capsys, monkeypatch):
    files = NVLABS | {"tool/__init__.py": "", "tool/generate.py": SCRIPT}
    monkeypatch.chdir(checkout(moved(files, "repository/")) / "repository")
    assert command("run", "-m", "tool.generate", "--report") == 0
    assert capsys.readouterr().out == "['--report'] True\n"


def test_what_would_be_routed(checkout, command, capsys):
    odd = {"bad/op/__init__.py": "", "bad/op/upfirdn2d.py": "", "bad/op/sharpen.py": ""}
    folder = checkout(moved(NVLABS, "a/") | moved(ROSINALITY, "b/") | odd | {"train.py": ""})
    assert command("report", folder) == 0
    routed, left = capsys.readouterr().out.split("left alone:")
    assert routed.count("\n") == 1 + 7 + 3
    assert "b.op.fused_act" in routed
    assert re.fullmatch(r"\s+bad.op.upfirdn2d .* modules sharpen, upfirdn2d\n", left)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run"], "swap run needs a script"),
        (["run", "nothing.py"], "there is no file nothing.py"),
        (["report", "nothing"], "there is no folder nothing"),
    ],
)
def test_a_wrong_command(command, capsys, arguments, message):
    assert command(*arguments) == 2
    assert message in capsys.readouterr().err
