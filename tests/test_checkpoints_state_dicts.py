"""rosinality's .pt and BasicSR's .pth: both directions, against the networks of both families."""

import argparse
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from stylegan_fast import checkpoints
from stylegan_fast.checkpoints import CheckpointError
from stylegan_fast.checkpoints.files import save_as
from stylegan_fast.models import rosinality, stylegan2
from stylegan_fast.testing import relative_error

GOLDEN = Path(__file__).parent / "golden"
STYLE = 7
WIDTHS = {"channel_base": 160, "channel_max": 32}


@pytest.fixture(scope="module", autouse=True)
def narrow():
    """rosinality's networks with few channels, another number at each resolution."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            rosinality,
            "_channels",
            lambda resolution, multiplier: min(160 // resolution, 32),
        )
        yield


def perturbed(network):
    """The network with no parameter at its initial value."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    networks = {
        "g": rosinality.Generator(16, STYLE, 3),
        "d": rosinality.Discriminator(16),
        "g_ema": rosinality.Generator(16, STYLE, 3),
    }
    return {name: perturbed(network) for name, network in networks.items()}


@pytest.fixture(scope="module")
def ours():
    torch.manual_seed(0)
    generator = stylegan2.Generator(STYLE, 0, STYLE, 16, 3, {"num_layers": 3}, **WIDTHS)
    generator.mapping.w_avg.copy_(torch.randn(STYLE))
    discriminator = stylegan2.Discriminator(0, 16, 3, **WIDTHS)
    return {"G_ema": perturbed(generator), "D": perturbed(discriminator)}


def states(networks):
    return {name: network.state_dict() for name, network in networks.items()}


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_file_of_rosinality(zipped, theirs, tmp_path):
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))])
    path = tmp_path / "550000.pt"
    torch.save(
        {
            **states(theirs),
            "g_optim": optimizer.state_dict(),
            "args": argparse.Namespace(size=16, path="lmdb"),
            "ada_aug_p": 0.25,
        },
        path,
        _use_new_zipfile_serialization=zipped,
    )
    first = checkpoints.load_networks(path)
    second = checkpoints.load_networks(path, family="rosinality")
    assert list(first) == list(second)
    assert {name: type(network) for name, network in first.items()} == {
        "G": stylegan2.Generator,
        "D": stylegan2.Discriminator,
        "G_ema": stylegan2.Generator,
    }
    for key, name in {"g": "G", "d": "D", "g_ema": "G_ema"}.items():
        assert type(second[name]) is type(theirs[key])
        assert_same_tensors(second[name].state_dict(), theirs[key].state_dict())

    z = torch.randn(3, STYLE)
    expected, _ = theirs["g_ema"]([z], randomize_noise=False)
    image = first["G_ema"].requires_grad_(False)(z, noise_mode="const")
    # The families add 1e-8 to different weights, and round in another order.
    assert relative_error(image, expected) < 1e-6 * theirs["g_ema"].num_layers
    logits = first["D"].requires_grad_(False)(image)
    torch.testing.assert_close(logits, theirs["d"](image), rtol=1e-4, atol=1e-4)


MODULATED = ("modulated_conv.weight", "modulated_conv.modulation.weight")
MODULATED += ("modulated_conv.modulation.bias",)
STYLED = ("weight", *MODULATED, "activate.bias")
BASICSR = {
    "G": [
        *["style_mlp.1.weight", "style_mlp.1.bias", "style_mlp.2.weight", "style_mlp.2.bias"],
        "constant_input.weight",
        *[f"style_conv1.{name}" for name in STYLED],
        *[f"style_convs.{index}.{name}" for index in (0, 1) for name in STYLED],
        *[f"{layer}.{name}" for layer in ("to_rgb1", "to_rgbs.0") for name in ("bias", *MODULATED)],
        *["noises.noise0", "noises.noise1", "noises.noise2"],
    ],
    "D": [
        *["conv_body.0.0.weight", "conv_body.0.1.bias"],
        *["conv_body.1.conv1.0.weight", "conv_body.1.conv1.1.bias"],
        *["conv_body.1.conv2.1.weight", "conv_body.1.conv2.2.bias", "conv_body.1.skip.1.weight"],
        *["final_conv.0.weight", "final_conv.1.bias"],
        *["final_linear.0.weight", "final_linear.0.bias"],
        *["final_linear.1.weight", "final_linear.1.bias"],
    ],
}


@pytest.mark.parametrize("name", ["G", "D"])
def test_names_of_basicsr(name, tmp_path):
    if name == "G":
        network = stylegan2.Generator(STYLE, 0, STYLE, 8, 3, {"num_layers": 2}, **WIDTHS)
    else:
        network = stylegan2.Discriminator(0, 8, 3, **WIDTHS)
    path = tmp_path / "net.pth"
    save_as(path, "basicsr", {name: network})
    file = torch.load(path, weights_only=True)
    assert list(file) == ["params"]
    assert sorted(file["params"]) == sorted(BASICSR[name])


def test_to_rosinality_and_back(ours, tmp_path):
    path = tmp_path / "ours.pt"
    assert save_as(path, "rosinality", ours) == []
    file = torch.load(path, weights_only=True)
    assert list(file) == ["g_ema", "latent_avg", "d"]
    generator = rosinality.Generator(16, STYLE, 3)
    generator.load_state_dict(file["g_ema"], strict=True)
    discriminator = rosinality.Discriminator(16)
    discriminator.load_state_dict(file["d"], strict=True)

    z = torch.randn(3, STYLE)
    with torch.no_grad():
        expected = ours["G_ema"](z, truncation_psi=0.5, noise_mode="const")
        image, _ = generator(
            [z], truncation=0.5, truncation_latent=file["latent_avg"], randomize_noise=False
        )
        assert relative_error(image, expected) < 1e-6 * generator.num_layers
        torch.testing.assert_close(
            discriminator(expected), ours["D"](expected), rtol=1e-4, atol=1e-4
        )
    again = checkpoints.load_networks(path)
    for name, network in ours.items():
        assert_same_tensors(again[name].state_dict(), network.state_dict())


def test_to_basicsr_and_back(ours, tmp_path):
    generators = {
        "G_ema": ours["G_ema"],
        "G": perturbed(stylegan2.Generator(**ours["G_ema"].init_kwargs)),
    }
    for networks in (generators, {"D": ours["D"]}):
        path = tmp_path / "net.pth"
        notes = save_as(path, "basicsr", networks)
        assert notes == [f"{name}: w_avg is left out" for name in networks if name != "D"]
        again = checkpoints.load_networks(path)
        assert again.keys() == networks.keys()
        for name, network in networks.items():
            actual, expected = again[name].state_dict(), network.state_dict()
            actual.pop("mapping.w_avg", None), expected.pop("mapping.w_avg", None)
            assert_same_tensors(actual, expected)


def test_a_missing_average_is_estimated(ours, tmp_path):
    save_as(tmp_path / "net.pth", "basicsr", {"G": ours["G_ema"]})
    torch.manual_seed(1)
    mapping = checkpoints.load_networks(tmp_path / "net.pth")["G"].mapping
    untouched = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), untouched)
    w = mapping(torch.randn(20_000, STYLE), skip_w_avg_update=True)[:, 0].detach()
    assert ((mapping.w_avg - w.mean(0)).abs() < 6 * w.std(0) / 4096**0.5).all()


def test_recorded_images_through_rosinality(monkeypatch, tmp_path):
    monkeypatch.setattr(rosinality, "_channels", lambda resolution, _: min(512 // resolution, 16))
    with np.load(GOLDEN / "network_sg2_skip.npz") as file:
        recorded = {name: torch.from_numpy(file[name]) for name in file.files if name != "config"}
        config = json.loads(str(file["config"]))
    generator = stylegan2.Generator(**config["G"])
    state = {k.removeprefix("G/"): v for k, v in recorded.items() if k.startswith("G/")}
    generator.load_state_dict(state)
    save_as(tmp_path / "sg2.pt", "rosinality", {"G_ema": generator})
    image = checkpoints.load_generator(tmp_path / "sg2.pt")(
        recorded["z"], truncation_psi=config["truncation_psi"], noise_mode="const"
    )
    assert (image - recorded["img"]).abs().max() <= 1e-5 * recorded["img"].abs().max()


def test_other_filters(tmp_path):
    taps = [1.0, 2.0, 4.0, 3.0]
    generator = perturbed(rosinality.Generator(16, STYLE, 1, blur_kernel=taps))
    discriminator = perturbed(rosinality.Discriminator(16, blur_kernel=taps))
    torch.save({"g": generator.state_dict(), "d": discriminator.state_dict()}, tmp_path / "f.pt")
    again = checkpoints.load_networks(tmp_path / "f.pt")
    z = torch.randn(2, STYLE)
    expected, _ = generator([z], randomize_noise=False)
    with torch.no_grad():
        image = again["G"](z, noise_mode="const")
        assert relative_error(image, expected) < 1e-6 * generator.num_layers
        torch.testing.assert_close(again["D"](image), discriminator(image), rtol=1e-4, atol=1e-4)
    back = checkpoints.load_networks(tmp_path / "f.pt", family="rosinality")["G"]
    assert_same_tensors(back.state_dict(), generator.state_dict())
    assert len(save_as(tmp_path / "net.pth", "basicsr", {"G": back})) == 1


@pytest.mark.parametrize(
    "network, arguments, message",
    [
        (stylegan2.Generator, dict(architecture="resnet"), "synthesis.b4.torgb.weight"),
        (stylegan2.Generator, dict(c_dim=2), "mapping.embed.weight"),
        (stylegan2.Generator, dict(use_noise=False), "noise_strength"),
        (stylegan2.Generator, dict(activation="relu"), "activation='relu' instead of 'lrelu'"),
        (stylegan2.Generator, dict(mapping_kwargs={"lr_multiplier": 1}), "lr_multiplier=1 instead"),
        (stylegan2.Generator, dict(z_dim=5), "style.1.weight"),
        (stylegan2.Generator, dict(img_channels=1), "to_rgb1.conv.weight"),
        (stylegan2.Generator, dict(channel_max=16), "input.input"),
        (stylegan2.Discriminator, dict(architecture="orig"), "skip.weight"),
        (
            stylegan2.Discriminator,
            dict(epilogue_kwargs={"mbstd_group_size": 2}),
            "mbstd_group_size=2 instead of 4",
        ),
    ],
)
def test_what_has_no_form_elsewhere(network, arguments, message, tmp_path):
    named = dict(c_dim=0, img_resolution=16, img_channels=3, **WIDTHS)
    if network is stylegan2.Generator:
        named.update(z_dim=STYLE, w_dim=STYLE)
    with pytest.raises(CheckpointError, match=f"no form in rosinality: .*{message}"):
        save_as(tmp_path / "x.pt", "rosinality", {"G": network(**{**named, **arguments})})
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_out_is_told(tmp_path):
    generator = stylegan2.Generator(STYLE, 0, STYLE, 16, 3, conv_clamp=3, **WIDTHS)
    notes = save_as(tmp_path / "x.pt", "rosinality", {"G": generator})
    assert notes == ["G: conv_clamp=3 is left out"]


def test_basicsr_has_one_kind_of_network_a_file(ours, tmp_path):
    with pytest.raises(CheckpointError, match="D: a file of basicsr"):
        save_as(tmp_path / "x.pth", "basicsr", {"G": ours["G_ema"], "D": ours["D"]})


# Files that cannot be loaded


def edited(theirs, change):
    state = dict(theirs["g"].state_dict())
    change(state)
    return {"g": state}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("conv1.activate.bias"), "without conv1.activate.bias"),
        (lambda s: s.update(surplus=torch.zeros(2)), "with surplus"),
        (lambda s: s.update({"input.input": torch.zeros(1, 5, 4, 4)}), "synthesis.b4.const is"),
        (lambda s: s.update({"input.input": torch.zeros(3, 5, 4, 4)}), "input.input is"),
        (lambda s: s.update({"conv1.conv.weight": torch.zeros(())}), "conv1.conv.weight is"),
        (lambda s: s.update({"to_rgb1.bias": torch.zeros(2)}), "to_rgb1.bias is"),
        (lambda s: s.update({"convs.2.conv.weight": torch.zeros(1, 9, 5, 3, 3)}), "no common rule"),
        (lambda s: s["to_rgbs.1.upsample.kernel"].mul_(2), "have different filters"),
        (
            lambda s: s.update({f"to_rgbs.{k}.bias": torch.zeros(2) for k in range(99)}),
            "a network of 99 blocks",
        ),
    ],
)
def test_other_tensors(change, message, theirs, tmp_path):
    torch.save(edited(theirs, change), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=rf"x\.pt cannot be loaded: .*{message}"):
        checkpoints.load_networks(tmp_path / "x.pt")


def zip_file(members, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


FILES = {
    "empty": (b"", "it is empty"),
    "jpeg": (b"\xff\xd8\xff\xe0\x00\x10JFIF" + b"\0" * 99, "it is a JPEG image"),
    "png": (b"\x89PNG\r\n\x1a\n" + b"\0" * 99, "it is a PNG image"),
    "page": (b"<!DOCTYPE html><html>", "a page of HTML"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    "text": (b"StyleGAN\n", "none of the formats"),
    "images": (zip_file({"00000/img.png": b"\x89PNG"}), "a zip file, but not one of torch.save"),
    "bomb": (
        zip_file({"x/data.pkl": b"\0" * 10**6}, zipfile.ZIP_DEFLATED),
        "compressed or overlapping",
    ),
    "name in no encoding": (
        zip_file({"\xe9/data.pkl": b"N."}).replace(b"\xc3\xa9", b"\xff\xff"),
        "damaged or incomplete zip file",
    ),
    "big endian": (zip_file({"x/data.pkl": b"N.", "x/byteorder": b"big"}), "big-endian"),
    "other state_dict": (
        saved({"conv.weight": torch.zeros(2)}),
        "no network of StyleGAN, but a dictionary of conv.weight",
    ),
    "other value": (saved([1, 2]), "no network of StyleGAN, but a list"),
    "tensors elsewhere": (
        zip_file({"x/data.pkl": saved(torch.zeros(2)).split(b"PK")[0] + b"N."}),
        "no network of StyleGAN, but a NoneType",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_checkpoint(name, tmp_path):
    content, message = FILES[name]
    path = tmp_path / "file"
    path.write_bytes(content)
    for load in (checkpoints.load_networks, checkpoints.load_generator):
        with pytest.raises(CheckpointError, match=f"file cannot be loaded: .*{message}"):
            load(path)


def test_what_is_no_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot be loaded: (Is a dir|Permission denied)"):
        checkpoints.load_networks(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere cannot be loaded: No such file"):
        checkpoints.load_networks(tmp_path / "nowhere")


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # of Python's pickletools
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_of_torch_save(zipped, tmp_path):
    """Whatever is cut off or changes: a network or a CheckpointError."""
    file = io.BytesIO()
    generator = rosinality.Generator(8, 2, 1)
    torch.save({"g": generator.state_dict()}, file, _use_new_zipfile_serialization=zipped)
    data, path = file.getvalue(), tmp_path / "x.pt"
    for length in np.linspace(0, len(data) - 1, 30, dtype=int):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            checkpoints.load_networks(path)
    random, refused = np.random.default_rng(0), 0
    for position in random.choice(4000, 60, replace=False):  # most of what is not weights
        changed = bytearray(data)
        changed[position] ^= 1 << random.integers(8)
        path.write_bytes(changed)
        try:
            checkpoints.load_networks(path)
        except CheckpointError:
            refused += 1
    assert refused > 10
