"""The library's own checkpoints, the recorded arguments in them, and the command `convert`."""

import copy
import errno
import inspect
import json
import os
import struct
import sys

import pytest
import torch
from torch import nn

from stylegan_fast import checkpoints
from stylegan_fast.__main__ import main
from stylegan_fast.checkpoints import CheckpointError
from stylegan_fast.models import rosinality, stylegan2
from stylegan_fast.models._recorded import NETWORKS, recorded

pytest.importorskip("safetensors")

ARGUMENTS = dict(z_dim=5, c_dim=2, w_dim=7, img_resolution=16, img_channels=3, channel_base=80)


def generator(**kwargs):
    return stylegan2.Generator(**ARGUMENTS, mapping_kwargs={"num_layers": 2}, **kwargs)


def discriminator(**kwargs):
    return stylegan2.Discriminator(2, 16, 1, channel_base=80, **kwargs)


# Arguments


@pytest.mark.parametrize(
    "make, expected",
    [
        (
            lambda: stylegan2.Generator(5, 0, 7, 8, 3, conv_clamp=2, half_dtype=torch.bfloat16),
            dict(
                z_dim=5,
                c_dim=0,
                w_dim=7,
                img_resolution=8,
                img_channels=3,
                mapping_kwargs={},
                conv_clamp=2,
                half_dtype="bfloat16",
            ),
        ),
        (
            lambda: stylegan2.Generator(
                5, 0, 7, 8, 3, {"num_layers": 1}, resample_filter=torch.tensor([1.0, 2, 1])
            ),
            dict(
                z_dim=5,
                c_dim=0,
                w_dim=7,
                img_resolution=8,
                img_channels=3,
                mapping_kwargs={"num_layers": 1},
                resample_filter=[1, 2, 1],
            ),
        ),
        (
            lambda: rosinality.Discriminator(8, blur_kernel=(1, 2, 1)),
            dict(size=8, channel_multiplier=2, blur_kernel=[1, 2, 1]),
        ),
    ],
)
def test_networks_remember_their_arguments(make, expected):
    network = make()
    assert network.init_kwargs == expected
    again = type(network)(**json.loads(json.dumps(network.init_kwargs)))
    assert again.init_kwargs == expected
    assert copy.deepcopy(network).init_kwargs == expected


def test_every_network_is_recorded():
    assert {"stylegan2.Generator", "stylegan2.Discriminator"} <= NETWORKS.keys()
    assert {"rosinality.Generator", "rosinality.Discriminator"} <= NETWORKS.keys()
    assert list(inspect.signature(rosinality.Generator).parameters)[:3] == [
        "size",
        "style_dim",
        "n_mlp",
    ]


def test_a_subclass_is_not_its_base():
    class Wider(rosinality.Discriminator):
        def __init__(self):
            super().__init__(8)

    assert not hasattr(Wider(), "init_kwargs")


def test_what_json_cannot_hold(monkeypatch):
    monkeypatch.setattr("stylegan_fast.models._recorded.NETWORKS", {})

    @recorded
    class Network(nn.Module):
        def __init__(self, layers):
            super().__init__()

    with pytest.raises(TypeError, match=r"layers\[1\] cannot be recorded: ReLU"):
        Network([2, nn.ReLU()])


# Files


def test_networks_come_back(tmp_path):
    networks = {
        "G": generator(num_fp16_res=1, fp16_channels_last=True, half_dtype=torch.bfloat16),
        "G_ema": generator().double(),
        "D": discriminator(block_kwargs={"freeze_layers": 2}),
        "theirs": rosinality.Discriminator(4),
    }
    path = tmp_path / "network.safetensors"
    checkpoints.save_networks(path, networks, {"kimg": 3, "config": {"lr": 0.002}})
    assert [file.name for file in tmp_path.iterdir()] == ["network.safetensors"]
    assert checkpoints.read_metadata(path) == {"kimg": 3, "config": {"lr": 0.002}}

    torch.manual_seed(1)
    again = checkpoints.load_networks(path)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)
    assert list(again) == list(networks)
    for name, network in networks.items():
        assert type(again[name]) is type(network)
        assert again[name].init_kwargs == network.init_kwargs
        assert again[name].training
        state = network.state_dict()
        for key, tensor in again[name].state_dict().items():
            assert torch.equal(tensor, state[key]), key
            assert (tensor.dtype, tensor.stride()) == (state[key].dtype, state[key].stride()), key
        assert [p.shape for p in again[name].parameters()] == [
            p.shape for p in network.parameters()
        ]
    z, c = torch.randn(3, 5), torch.randn(3, 2)
    images = [g.eval()(z, c, noise_mode="const") for g in (networks["G"], again["G"])]
    assert torch.equal(*images)


def test_the_generator_to_make_images_with(tmp_path):
    path = tmp_path / "network.safetensors"
    networks = {"G": generator(), "D": discriminator(), "G_ema": generator()}
    for held in (["G", "D", "G_ema"], ["D", "G"]):
        checkpoints.save_networks(path, {name: networks[name] for name in held})
        chosen = checkpoints.load_generator(path)
        expected = networks["G_ema" if "G_ema" in held else "G"]
        assert torch.equal(chosen.mapping.fc1.weight, expected.mapping.fc1.weight)
        assert not chosen.training
        assert not any(parameter.requires_grad for parameter in chosen.parameters())
    checkpoints.save_networks(path, {"D": networks["D"]})
    with pytest.raises(CheckpointError, match="holds D, but no generator"):
        checkpoints.load_generator(path)


@pytest.mark.parametrize(
    "networks, metadata, error, message",
    [
        ({"G": nn.Linear(2, 3)}, {}, TypeError, "G is a torch.nn.modules.linear.Linear, not one"),
        ({"G.ema": discriminator()}, {}, ValueError, "identifier, got 'G.ema'"),
        ({"G": discriminator()}, {"lr": torch.zeros(2)}, TypeError, "Tensor is not JSON"),
    ],
)
def test_what_cannot_be_saved(networks, metadata, error, message, tmp_path):
    path = tmp_path / "network.safetensors"
    path.write_text("before")
    with pytest.raises(error, match=message):
        checkpoints.save_networks(path, networks, metadata)
    assert path.read_text() == "before"


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "network.safetensors"
    checkpoints.save_networks(path, {"D": discriminator()}, {"kimg": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        checkpoints.save_networks(path, {"D": discriminator()}, {"kimg": 2})
    assert checkpoints.read_metadata(path) == {"kimg": 1}
    assert os.listdir(tmp_path) == ["network.safetensors"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.json"
    path.write_text("before")

    def write(path):
        with checkpoints.atomic_write(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["state.json"]
    with pytest.raises(CheckpointError, match="nowhere/x cannot be written: No such file"):
        write(tmp_path / "nowhere" / "x")


@pytest.fixture
def header(tmp_path):
    """Writes a file whose header is changed, and returns its path."""
    path = tmp_path / "network.safetensors"
    checkpoints.save_networks(path, {"G": generator()})
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    entries = json.loads(content[8 : 8 + length])

    def write(change):
        description = json.loads(entries["__metadata__"]["stylegan_fast"])
        entries["__metadata__"]["stylegan_fast"] = change(description) or json.dumps(description)
        changed = json.dumps(entries).encode()
        path.write_bytes(struct.pack("<Q", len(changed)) + changed + content[8 + length :])
        return path

    return write


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.update(format=2), "the version 2"),
        (lambda d: d["networks"]["G"].update({"class": "os.system"}), "'os.system', not one of"),
        (lambda d: d["networks"]["G"].update(init_kwargs=3), "header cannot be understood"),
        (lambda d: d["networks"]["G"]["init_kwargs"].update(z_dim=6), "mapping.fc0.weight is"),
        (lambda d: d["networks"]["G"]["init_kwargs"].update(z_dim=2**70), "cannot be made"),
        (lambda d: d["networks"]["G"]["init_kwargs"].update(conv_clamp="1"), "conv_clamp='1'"),
        (lambda d: d["networks"]["G"]["init_kwargs"].update(channel_base=2**50), "instead of"),
        (
            lambda d: d["networks"]["G"]["init_kwargs"].update(
                mapping_kwargs={"num_layers": 10**9}
            ),
            "num_layers=1000000000 with",
        ),
        (lambda d: d["networks"].update(H=d["networks"].pop("G")), "header cannot be understood"),
        (lambda d: "[" * 5000, "header cannot be understood"),
        (lambda d: "{}", "header cannot be understood"),
    ],
)
def test_malformed_headers(change, message, header):
    path = header(change)
    with pytest.raises(
        CheckpointError, match=rf"network\.safetensors cannot be loaded: .*{message}"
    ):
        checkpoints.load_networks(path)


def test_truncated_and_foreign_safetensors(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "network.safetensors"
    checkpoints.save_networks(path, {"D": discriminator()})
    content = path.read_bytes()
    for length in (9, 300, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        for load in (checkpoints.load_networks, checkpoints.read_metadata):
            with pytest.raises(CheckpointError, match=r"network\.safetensors"):
                load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="does not say which networks"):
        checkpoints.load_networks(path)


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'stylegan_fast\[train\]'"):
        checkpoints.save_networks(tmp_path / "x", {"D": discriminator()})


def test_family_is_checked(tmp_path):
    with pytest.raises(ValueError, match="family='stylegan3' must be one of stylegan2, rosinality"):
        checkpoints.load_networks(tmp_path, family="stylegan3")


# The command


def test_convert(tmp_path, capsys):
    torch.manual_seed(0)
    arguments = dict(z_dim=512, c_dim=0, w_dim=512, img_resolution=8, img_channels=3)
    network = stylegan2.Generator(**arguments, mapping_kwargs={"num_layers": 1}, conv_clamp=256)
    ours, theirs, back = (tmp_path / name for name in ("a.safetensors", "b.pt", "c.safetensors"))
    checkpoints.save_networks(ours, {"G": discriminator(), "G_ema": network}, {"kimg": 5})

    assert main(["convert", "--show", str(ours)]) == 0
    shown = capsys.readouterr().out
    assert "G_ema: stylegan2.Generator, " in shown
    assert "z_dim=512" in shown
    assert '{"kimg": 5}' in shown

    command = ["convert", str(ours), str(theirs), "--layout", "rosinality", "--networks", "G_ema"]
    assert main(command) == 0
    assert "G_ema: conv_clamp=256 is left out" in capsys.readouterr().out
    assert main(["convert", str(theirs), str(back)]) == 0
    again = checkpoints.load_networks(back)["G_ema"]
    for key, tensor in network.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_names_in_a_file_do_not_reach_the_terminal(tmp_path, capsys):
    from safetensors.torch import save_file

    network = {"class": "stylegan2.Generator", "init_kwargs": {"\x1b[31mz_dim\n": "\x07"}}
    header = {"format": 1, "networks": {"G": network}, "metadata": {"\x1b]0;": "\x9b"}}
    path = tmp_path / "hostile.safetensors"
    save_file({"G.\x1b[2J": torch.zeros(1)}, path, {"stylegan_fast": json.dumps(header)})
    assert main(["convert", "--show", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "\\x1b[31mz_dim\\n=" in shown
    assert main(["convert", str(path), str(tmp_path / "out")]) == 2
    assert all(c.isprintable() or c == "\n" for c in shown + capsys.readouterr().err)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{}"], "needs a file to write, or --show"),
        (["{}", "out", "--networks", "G_ema"], "has no G_ema, but D"),
        (["{}", "out", "--layout", "rosinality"], "D has no form in rosinality"),
        (["--show", "nowhere"], "nowhere cannot be loaded: No such file"),
    ],
)
def test_convert_tells_what_is_wrong(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "network.safetensors"
    checkpoints.save_networks(path, {"D": discriminator()})
    assert main(["convert", *(argument.format(path) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == ["network.safetensors"]
