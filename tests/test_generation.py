"""Generation: latents, files, directions, projection, and the commands on top of them."""

import copy
import functools
import hashlib
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from stylegan_fast.__main__ import main
from stylegan_fast.checkpoints import save_networks
from stylegan_fast.generation import directions, images, load, projection, styles
from stylegan_fast.models import rosinality, stylegan, stylegan2, stylegan3

FAMILIES = ("stylegan", "stylegan2", "stylegan3", "rosinality")


@pytest.fixture(scope="module", autouse=True)
def narrow():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rosinality, "_channels", lambda resolution, multiplier: 6)
        yield


def make(family, c_dim=0):
    """An untrained generator of images of 8×8 to 16×16, whose noise and latents matter."""
    torch.manual_seed(1)
    shared = {"mapping_kwargs": {"num_layers": 2}, "channel_max": 7}
    if family == "stylegan":
        network = stylegan.Generator(5, 16, z_dim=6, c_dim=c_dim, **shared)
    elif family == "stylegan2":
        network = stylegan2.Generator(6, c_dim, 5, 8, 3, **shared)
    elif family == "stylegan3":
        radial = {"conv_kernel": 1, "use_radial_filters": True}
        network = stylegan3.Generator(6, c_dim, 5, 16, 3, num_layers=3, **radial, **shared)
    else:
        network = rosinality.Generator(8, 5, 2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    if family != "rosinality":
        network.mapping.w_avg.normal_()
    return network


@pytest.fixture(scope="module")
def files(tmp_path_factory, narrow):
    folder = tmp_path_factory.mktemp("networks")
    for family in FAMILIES:
        save_networks(folder / f"{family}.safetensors", {"G_ema": make(family)})
    save_networks(folder / "labels.safetensors", {"G": make("stylegan", c_dim=3)})
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def generator(files):
    return load(files["stylegan"])


def assert_shows(path, pixels):
    np.testing.assert_array_equal(np.array(Image.open(path)), pixels)


# Latents


def test_latents_of_seeds_are_the_originals(generator):
    z = styles.z_of_seeds(generator, [7, 0])
    assert z.shape == (2, 6)
    first = torch.tensor([1.764052345967664, 0.4001572083672233, 0.9787379841057392])
    torch.testing.assert_close(z[1, :3], first)
    assert torch.equal(z[:1], styles.z_of_seeds(generator, [7]))


def test_labels(files, generator):
    conditional = load(files["labels"])
    assert styles.labels(conditional, 2, 1).tolist() == [[0, 1, 0]] * 2
    assert styles.labels(generator, 2, None) is None


@pytest.mark.parametrize("cutoff", [None, 0, 2])
def test_truncation_is_the_mapping_networks(generator, cutoff):
    z = torch.randn(3, 6)
    expected = generator.mapping(z, truncation_psi=0.3, truncation_cutoff=cutoff)
    actual = styles.truncate(generator, generator.mapping(z), 0.3, cutoff)
    torch.testing.assert_close(actual, expected)


def test_mixing_takes_the_chosen_rows(generator):
    ws, other = torch.randn(2, 3, generator.num_ws, 5)
    mixed = styles.mix(generator, ws, other, [1, 4])
    for row in range(generator.num_ws):
        assert torch.equal(mixed[:, row], (other if row in (1, 4) else ws)[:, row])


@pytest.mark.parametrize("path", styles.PATHS)
@pytest.mark.parametrize("loop", [True, False])
def test_a_way_leads_through_its_keys(path, loop):
    keys = torch.randn(4, 3, 5, dtype=torch.float64)
    way = styles.interpolate(keys, 6, path, loop)
    assert way.shape == (24 if loop else 19, 3, 5)
    torch.testing.assert_close(way[::6], keys)
    assert (way[1:] - way[:-1]).norm(dim=-1).min() > 0


def test_a_linear_way_is_straight():
    keys = torch.tensor([[0.0, 1.0], [4.0, 3.0]])
    expected = torch.tensor([[0.0, 1.0], [1.0, 1.5], [2.0, 2.0], [3.0, 2.5], [4.0, 3.0]])
    torch.testing.assert_close(styles.interpolate(keys, 4, "linear", loop=False), expected)


def test_a_spherical_way_turns_evenly():
    keys = torch.tensor([[2.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    way = styles.interpolate(keys, 3, "spherical", loop=False)
    torch.testing.assert_close(way.norm(dim=1), torch.linspace(2, 4, 4, dtype=torch.float64))
    angles = torch.atan2(way[:, 1], way[:, 0])
    torch.testing.assert_close(angles, torch.linspace(0, math.pi / 2, 4, dtype=torch.float64))


@pytest.mark.parametrize("other", [[2.0, 4.0], [-1.0, -2.0], [0.0, 0.0]])
def test_a_spherical_way_without_a_great_circle_is_straight(other):
    keys = torch.tensor([[1.0, 2.0], other])
    way = styles.interpolate(keys, 3, "spherical")
    torch.testing.assert_close(way, styles.interpolate(keys, 3, "linear"))


def test_a_spline_has_no_corners():
    """The steps before and after a key differ by the square of their length only."""
    keys = torch.randn(4, 5, dtype=torch.float64)
    way = styles.interpolate(keys, 1000, "spline")
    corners = torch.arange(4) * 1000
    before, after = way[corners] - way[corners - 1], way[corners + 1] - way[corners]
    linear = styles.interpolate(keys, 1000, "linear")
    kink = linear[corners] * 2 - linear[corners - 1] - linear[corners + 1]
    assert (before - after).norm() < 0.02 * kink.norm()


# Images


def test_pixels():
    values = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0], dtype=torch.float16)
    pixels = images.to_uint8(values.reshape(1, 1, 2, 3))
    assert pixels.shape == (1, 2, 3, 1)
    assert pixels.flatten().tolist() == [0, 0, 128, 191, 255, 255]


def test_grid():
    cells = np.arange(1, 4, dtype=np.uint8).reshape(3, 1, 1, 1) * np.ones((1, 2, 3, 1), np.uint8)
    expected = [[1] * 3 + [2] * 3] * 2 + [[3] * 3 + [0] * 3] * 2
    assert images.grid(cells, columns=2)[:, :, 0].tolist() == expected


@pytest.mark.parametrize("channels", [1, 3])
def test_png(tmp_path, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    images.save_png(tmp_path / "a.png", pixels)
    assert_shows(tmp_path / "a.png", pixels if channels == 3 else pixels[:, :, 0])


def test_gif(tmp_path):
    frames = [np.full((6, 8, 3), shade, np.uint8) for shade in (0, 100, 250)]
    images.save_video(tmp_path / "a.gif", frames, fps=25)
    with Image.open(tmp_path / "a.gif") as film:
        assert (film.n_frames, film.size, film.info["duration"]) == (3, (8, 6), 40)
        for index, frame in enumerate(frames):
            film.seek(index)
            np.testing.assert_array_equal(np.array(film.convert("RGB")), frame)


@pytest.mark.parametrize("channels", [1, 3])
def test_mp4(tmp_path, channels):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    frames = [np.full((16, 32, channels), shade, np.uint8) for shade in (0, 120, 250)]
    images.save_video(tmp_path / "a.mp4", frames, fps=10)
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "a.mp4"))
    facts = next(reader)
    assert (facts["size"], facts["fps"]) == ((32, 16), 10)
    shown = [np.frombuffer(frame, np.uint8).mean() for frame in reader]
    assert shown == pytest.approx([0, 120, 250], abs=8)


def test_an_mp4_that_cannot_be_written(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    frames = [np.zeros((16, 16, 3), np.uint8)] * 3
    with pytest.raises(ValueError, match=r"missing/a.mp4 cannot be written: .*[Nn]o such file"):
        images.save_video(tmp_path / "missing" / "a.mp4", frames)


def test_an_image_is_cut_to_its_middle(tmp_path):
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:4] = 255, 0, 0
    pixels[:, 4:6] = 0, 255, 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    target = images.read_image(tmp_path / "a.png", 4, 3)
    assert target.shape == (1, 3, 4, 4)
    assert target[0, :, 1].T.tolist() == [[1, -1, -1]] * 2 + [[-1, 1, -1]] * 2
    assert images.read_image(tmp_path / "a.png", 8, 1).shape == (1, 1, 8, 8)


def test_an_image_is_read_as_in_training(tmp_path):
    ramp = np.arange(16, dtype=np.uint16).reshape(4, 4) << 12
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    upside_down = Image.Exif()
    upside_down[0x0112] = 3
    Image.fromarray((ramp >> 8).astype(np.uint8)).save(tmp_path / "turned.png", exif=upside_down)
    deep, turned = (images.read_image(tmp_path / name, 4, 1) for name in ("deep.png", "turned.png"))
    assert ((deep + 1) * 127.5).round().int()[0, 0].tolist() == (ramp >> 8).tolist()
    assert torch.equal(turned, deep.flip(2, 3))


def test_other_programs_are_not_started_to_read_an_image(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("started"))
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.eps")
    with pytest.raises(ValueError, match=r"a\.eps: it is no image"):
        images.read_image(tmp_path / "a.eps", 8, 3)


@pytest.mark.parametrize("noise_mode", ["random", "const", "none"])
def test_rendering_is_deterministic(files, family, noise_mode):
    """Nothing depends on the other samples or on what was drawn before, and the caller's generator
    of random numbers is left as it is."""
    generator = load(files[family])
    ws = torch.randn(3, generator.num_ws, 5)
    state = torch.get_rng_state()
    together = list(images.render(generator, ws, noise_mode, [3, 1, 2]))
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(5)
    (alone,) = images.render(generator, ws[1:2], noise_mode, [1])
    np.testing.assert_array_equal(alone, together[1])
    (other,) = images.render(generator, ws[1:2], noise_mode, [4])
    assert (other == alone).all() == (noise_mode != "random" or family == "stylegan3")


def test_rosinalitys_generator_in_the_packages_view(files):
    network = make("rosinality")
    generator = load(files["rosinality"])
    z = torch.randn(2, 5)
    ws = generator.mapping(z)
    expected, latent = network([z], return_latents=True, randomize_noise=False)
    torch.testing.assert_close(ws, latent)
    torch.testing.assert_close(generator.synthesis(ws, noise_mode="const"), expected)
    assert not torch.allclose(generator.synthesis(ws, noise_mode="none"), expected)
    center = network.mean_latent(100_000)[0]
    assert (generator.mapping.w_avg - center).norm() < 0.1 * center.norm() + 0.1


@pytest.mark.parametrize(
    ("options", "moved"),
    [
        (("--rotate", 90), lambda image: np.rot90(image)),
        (("--rotate", -180), lambda image: np.rot90(image, 2)),
        (("--translate=0.25,-0.125",), lambda image: np.roll(image, (-2, 4), (0, 1))),
        (("--translate=0,0.25", "--rotate", 90), lambda image: np.roll(np.rot90(image), 4, 0)),
    ],
)
def test_stylegan3_moves_and_turns(files, tmp_path, options, moved):
    """By whole pixels and right angles, which the filters of StyleGAN3-R do not see."""
    shared = ("generate", "--network", files["stylegan3"], "--seeds", 1, "--outdir")
    pixels = {}
    for name, given in (("still", ()), ("moved", options)):
        assert command(*shared, tmp_path / name, *given) == 0
        pixels[name] = np.array(Image.open(tmp_path / name / "seed0001.png")).astype(int)
    inside = np.s_[4:12, 4:12]
    expected = moved(pixels["still"])[inside]
    assert np.abs(pixels["moved"][inside] - expected).max() <= 1
    assert np.abs(pixels["still"][inside] - expected).max() > 8


# Directions


def test_style_weights_know_their_rows(files, family):
    """A style layer gets the row of ws that its weight is listed with."""
    generator = load(files[family])
    weights = directions.style_weights(generator)
    rows = torch.arange(generator.num_ws, dtype=torch.float32)[:, None].expand(-1, 5)
    seen = []
    for name, module in generator.synthesis.named_modules():
        if name.endswith(("affine", "modulation")):
            module.register_forward_hook(
                lambda module, args, out: seen.append((int(args[0][0, 0]), module.weight))
            )
    generator.synthesis(rows[None], noise_mode="none")
    assert len(weights) == len(seen)
    for row, weight in weights:
        same = functools.partial(torch.allclose, weight * math.sqrt(5))
        (match,) = [got for got, raw in seen if raw.shape == weight.shape and same(raw)]
        assert match == row


@pytest.mark.parametrize("layers", [None, [0, 1]])
def test_sefa_finds_what_changes_the_styles_most(generator, layers):
    found = directions.find(generator, "sefa", 5, layers, samples=50)
    rows = range(generator.num_ws) if layers is None else layers
    a = torch.cat([w for row, w in directions.style_weights(generator) if row in rows])
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(5), atol=1e-5, rtol=0)
    changes = (found.vectors @ a.T).norm(dim=1)
    torch.testing.assert_close(changes, torch.linalg.svdvals(a))


def axes_generator(scales, mean):
    """w = scales · z + mean."""
    scales, mean = torch.tensor(scales), torch.tensor(mean)
    mapping = lambda z, c=None: (scales * z + mean)[:, None]  # noqa: E731
    mapping.w_avg = mean
    return SimpleNamespace(mapping=mapping, z_dim=3, w_dim=3, num_ws=1)


def test_sefas_scale_is_the_deviation_of_w(generator):
    w = generator.mapping(torch.randn(10_000, 6))[:, 0]
    expected = w.var(dim=0).mean().sqrt().item()
    assert directions.find(generator, count=2).scales.tolist() == pytest.approx(
        [expected] * 2, rel=0.1
    )


def test_pca_finds_the_axes_of_w():
    found = directions.find(axes_generator([0.5, 3.0, 1.0], [5.0, 6.0, 7.0]), "pca", 2)
    expected = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(found.vectors, expected, atol=0.05, rtol=0)
    torch.testing.assert_close(found.scales, torch.tensor([3.0, 1.0]), atol=0, rtol=0.05)


def test_edits_change_the_chosen_rows():
    ws, direction = torch.randn(2, 4, 3), torch.randn(3)
    edited = directions.edit(ws, direction, -1.5, [1, 3])
    torch.testing.assert_close(edited[:, [1, 3]], ws[:, [1, 3]] - 1.5 * direction)
    assert torch.equal(edited[:, [0, 2]], ws[:, [0, 2]])


# Projection


@pytest.mark.parametrize("space", projection.SPACES)
def test_projection_finds_an_image_of_the_generator(files, family, space):
    generator = load(files[family])
    before = copy.deepcopy(generator.synthesis.state_dict())
    seeded = torch.Generator().manual_seed(0)
    ws = generator.mapping(torch.randn(1, generator.z_dim, generator=seeded))
    target = generator.synthesis(ws, noise_mode="const")

    found = projection.project(generator, target, space=space, steps=60)
    assert found.losses[-1] < 0.1 * found.losses[0]
    assert torch.equal(found.image, generator.synthesis(found.ws, noise_mode="const"))
    assert found.ws.shape == ws.shape
    assert (found.ws == found.ws[:, :1]).all() == (space == "w")
    for name, value in generator.synthesis.state_dict().items():
        assert torch.equal(value, before[name])


def test_projection_with_noise_and_features(generator):
    """The noise maps found are white, and what is not a map of noise is not touched."""
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3))
    features = projection.PerceptualFeatures(layers)
    found = projection.project(
        generator, torch.zeros(1, 3, 16, 16), steps=5, optimize_noise=True, perceptual=features
    )
    maps = {k for k, _ in generator.synthesis.named_buffers() if k.endswith("noise_const")}
    assert found.noises.keys() == maps
    assert len(maps) == generator.num_ws
    for name, noise in found.noises.items():
        assert noise.mean().item() == pytest.approx(0, abs=1e-5)
        assert noise.square().mean().item() == pytest.approx(1, abs=1e-4)
        assert not torch.equal(noise, generator.synthesis.get_buffer(name))


def test_pyramid_distance():
    checkers = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    distance = projection.pyramid_distance(checkers.expand(1, 3, 16, 16), torch.zeros(1, 3, 16, 16))
    assert distance.item() == pytest.approx((1 + 0) / 2)
    shifted = projection.pyramid_distance(torch.full((1, 1, 16, 16), 3.0), torch.ones(1, 1, 16, 16))
    assert shifted.item() == pytest.approx(4)


def test_noise_penalty():
    assert projection.noise_penalty(torch.ones(16, 16)).item() == pytest.approx(2 * 1 + 2 * 4**2)
    stripes = (torch.arange(8) % 2 * 2.0 - 1).expand(8, 8)
    assert projection.noise_penalty(stripes).item() == pytest.approx(2)
    expected = 2 * (1 / 8**2 + 1 / 16**2 + 1 / 32**2)
    assert projection.noise_penalty(torch.randn(32, 32)).item() < 10 * expected


def test_perceptual_features_have_unit_length_a_pixel():
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.MaxPool2d(2), nn.Conv2d(4, 5, 1), nn.MaxPool2d(2), nn.Conv2d(5, 6, 1)
    )
    features = projection.PerceptualFeatures(layers)(torch.randn(2, 1, 6, 6))
    assert features.shape == (2, 4 * 36 + 5 * 9)
    torch.testing.assert_close(features[:, :144].square().sum(dim=1), torch.ones(2))
    torch.testing.assert_close(features[:, 144:].square().sum(dim=1), torch.ones(2))


# Commands


def command(*arguments):
    """On the CPU, as what the tests expect of it, unless they say otherwise."""
    device = [] if "--device" in arguments else ["--device", "cpu"]
    return main([*map(str, arguments), *device])


def contents(folder):
    """A digest of every picture and film, the arrays of every .npz."""
    found = {}
    for path in sorted(Path(folder).iterdir()):
        if path.suffix == ".npz":
            with np.load(path) as file:
                found[path.name] = {name: file[name].tolist() for name in file.files}
        else:
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.mark.parametrize("noise_mode", ["random", "const"])
def test_generate_images(files, family, tmp_path, noise_mode):
    shared = ("generate", "--network", files[family], "--noise-mode", noise_mode, "--psi", 0.8)
    for name, seeds in (("a", "1-3,7"), ("b", "1-3,7"), ("c", "3")):
        assert command(*shared, "--seeds", seeds, "--outdir", tmp_path / name) == 0
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert set(a) == {*(f"seed{i:04d}.png" for i in (1, 2, 3, 7)), "grid.png", "latents.npz"}
    assert len(set(map(str, a.values()))) == len(a)
    assert c["seed0003.png"] == a["seed0003.png"]

    generator = load(files[family])
    ws = generator.mapping(styles.z_of_seeds(generator, [3]))
    ws = styles.truncate(generator, ws, 0.8)
    torch.testing.assert_close(torch.tensor(c["latents.npz"]["ws"]), ws)
    (pixels,) = images.render(generator, ws, noise_mode, [3])
    assert_shows(tmp_path / "c" / "seed0003.png", pixels)


def test_generate_from_latents(files, tmp_path):
    shared = ("generate", "--network", files["stylegan"])
    command(*shared, "--seeds", "4,9", "--psi", 0.5, "--outdir", tmp_path / "a")
    latents = tmp_path / "a" / "latents.npz"
    assert command(*shared, "--latents", latents, "--outdir", tmp_path / "b") == 0
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert [b["latent0000.png"], b["latent0001.png"]] == [a["seed0004.png"], a["seed0009.png"]]


def test_generate_from_a_runs_folder(files, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    for name, network in (("000000.008", "labels"), ("000001.000", "stylegan")):
        folder = run / f"checkpoint-{name}"
        folder.mkdir(parents=True)
        shutil.copy(files[network], folder / "networks.safetensors")
        (folder / "state.json").write_text("{}")
    assert command("generate", "--network", run, "--outdir", out, "--seeds", "3,7") == 0
    written = "2 images seedNUMBER.png, grid.png, latents.npz"
    assert capsys.readouterr().out == f"{out}: {written}\n"
    shown = np.asarray(Image.open(out / "seed0003.png"))
    assert command("generate", "--network", files["stylegan"], "--outdir", out, "--seeds", "3") == 0
    assert np.array_equal(np.asarray(Image.open(out / "seed0003.png")), shown)
    assert capsys.readouterr().out == f"{out}: 1 image seedNUMBER.png, latents.npz\n"
    assert command("generate", "--network", out, "--outdir", out, "--seeds", "3") == 2
    assert f"{out}: holds no checkpoint of a run" in capsys.readouterr().err


def test_generate_labels(files, tmp_path):
    for label in (0, 2):
        out = tmp_path / str(label)
        arguments = ("--seeds", 1, "--class", label, "--outdir", out)
        assert command("generate", "--network", files["labels"], *arguments) == 0
    assert contents(tmp_path / "0") != contents(tmp_path / "2")


def test_generate_a_matrix_of_styles(files, family, tmp_path):
    shared = ("generate", "--network", files[family], "--outdir", tmp_path, "--mix", "5-7")
    assert command(*shared, "--seeds", "1,2", "--layers", "0-1") == 0
    generator = load(files[family])
    rows, columns = (
        generator.mapping(styles.z_of_seeds(generator, seeds)) for seeds in ([1, 2], [5, 6, 7])
    )
    with np.load(tmp_path / "latents.npz") as file:
        ws = torch.from_numpy(file["ws"]).reshape(2, 3, generator.num_ws, 5)
    torch.testing.assert_close(ws[:, :, :2], columns[None, :, :2].expand(2, -1, -1, -1))
    torch.testing.assert_close(ws[:, :, 2:], rows[:, None, 2:].expand(-1, 3, -1, -1))

    size = generator.img_resolution
    picture = np.array(Image.open(tmp_path / "mix.png")).reshape(3, size, 4, size, 3)
    assert not picture[0, :, 0].any()
    cells = list(images.render(generator, torch.cat([columns, rows, ws[1]])))
    shown = [*((0, i + 1) for i in range(3)), (1, 0), (2, 0), *((2, i + 1) for i in range(3))]
    for (row, column), cell in zip(shown, cells, strict=True):
        np.testing.assert_array_equal(picture[row, :, column], cell)


@pytest.mark.parametrize(
    ("options", "frames"),
    [
        (("--space", "z", "--interpolate", "spherical"), 12),
        (("--space", "w", "--interpolate", "linear", "--no-loop"), 9),
        (("--space", "w+", "--interpolate", "spline", "--layers", "2-3"), 12),
    ],
)
def test_generate_a_film(files, tmp_path, options, frames):
    shared = ("generate", "--network", files["stylegan"], "--seeds", "1-3", "--frames", 4)
    for name in "ab":
        assert command(*shared, *options, "--outdir", tmp_path / name) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with Image.open(tmp_path / "a" / "interpolation.gif") as film:
        assert film.n_frames == frames
    with np.load(tmp_path / "a" / "latents.npz") as file:
        ws = torch.from_numpy(file["ws"])
    generator = load(files["stylegan"])
    keys = generator.mapping(styles.z_of_seeds(generator, [1, 2, 3]))
    if "w+" in options:
        keys[:, [0, 1, 4, 5]] = keys[:1, [0, 1, 4, 5]].clone()
    torch.testing.assert_close(ws[::4][:3], keys)


@pytest.mark.parametrize("method", directions.METHODS)
def test_explore(files, family, tmp_path, method):
    shared = ("explore", "--network", files[family], "--method", method, "--samples", 100)
    options = ("--seeds", "1,2", "--count", 2, "--layers", "1-2", "--steps", 3)
    for name in "ab":
        assert command(*shared, *options, "--outdir", tmp_path / name) == 0
    a = contents(tmp_path / "a")
    assert a == contents(tmp_path / "b")
    assert set(a) == {"direction-0.png", "direction-1.png", "directions.npz"}

    generator = load(files[family])
    ws = generator.mapping(styles.z_of_seeds(generator, [1, 2]))
    vectors, scales = directions.find(generator, method, 2, [1, 2], samples=100)
    edited = directions.edit(ws, vectors[1], 3 * scales[1], [1, 2])
    size = generator.img_resolution
    cells = np.array(Image.open(tmp_path / "a" / "direction-1.png")).reshape(2, size, 3, size, 3)
    for row in range(2):
        middle, last = images.render(generator, torch.stack([ws[row], edited[row]]))
        np.testing.assert_array_equal(cells[row, :, 1], middle)
        np.testing.assert_array_equal(cells[row, :, 2], last)


def test_explored_latents_are_latents(files, tmp_path):
    shared = ("--network", files["stylegan"])
    explore = ("--seeds", "1,2", "--count", 1, "--samples", 50, "--outdir", tmp_path / "a")
    command("explore", *shared, *explore)
    found = ("--latents", tmp_path / "a" / "directions.npz", "--outdir", tmp_path / "b")
    assert command("generate", *shared, *found) == 0
    generator = load(files["stylegan"])
    ws = generator.mapping(styles.z_of_seeds(generator, [1, 2]))
    for index, pixels in enumerate(images.render(generator, ws)):
        assert_shows(tmp_path / "b" / f"latent{index:04d}.png", pixels)


def test_explore_as_a_film(files, tmp_path):
    shared = ("explore", "--network", files["stylegan2"], "--samples", 50, "--count", 1)
    assert command(*shared, "--seeds", "1-3", "--format", "gif", "--outdir", tmp_path) == 0
    with Image.open(tmp_path / "direction-0.gif") as film:
        assert (film.size, film.n_frames) == ((24, 8), 12)


def test_project(files, tmp_path):
    command("generate", "--network", files["stylegan"], "--seeds", 5, "--outdir", tmp_path)
    shared = ("project", "--network", files["stylegan"], "--target", tmp_path / "seed0005.png")
    options = ("--steps", 8, "--optimize-noise", "--format", "gif")
    for name in "ab":
        assert command(*shared, *options, "--outdir", tmp_path / name) == 0
    a = contents(tmp_path / "a")
    assert a == contents(tmp_path / "b")
    names = {"target.png", "projection.png", "comparison.png", "projection.gif", "projection.npz"}
    assert set(a) == names
    assert_shows(tmp_path / "a/target.png", np.array(Image.open(tmp_path / "seed0005.png")))

    found = ("--latents", tmp_path / "a" / "projection.npz", "--outdir", tmp_path / "c")
    assert command("generate", "--network", files["stylegan"], *found) == 0
    assert_shows(tmp_path / "c/latent0000.png", np.array(Image.open(tmp_path / "a/projection.png")))


@pytest.fixture
def bad(files, tmp_path):
    """Files that are not what they should be."""
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "text.npz").write_text("no arrays")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    np.savez(tmp_path / "other.npz", ws=np.zeros((1, 3, 4), np.float32))
    (tmp_path / "nothing.npz").touch()
    noise = {"ws": np.zeros((1, 6, 5), np.float32), "noise/w_avg": np.zeros(5, np.float32)}
    np.savez(tmp_path / "noise.npz", **noise)
    np.savez(tmp_path / "words.npz", ws=np.array(["a"]))
    np.savez(tmp_path / "empty.npz", w=np.zeros(3, np.float32))
    return {**files, **{path.name: path for path in tmp_path.iterdir()}, "none": tmp_path / "none"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("generate --network {none} --seeds 1", "none cannot be loaded: No such file"),
        ("generate --network {text.png} --seeds 1", "text.png cannot be loaded: "),
        ("generate --network {stylegan} --seeds 1-", "--seeds '1-' is not a list of numbers"),
        ("generate --network {stylegan} --seeds 3-1", "--seeds '3-1': 3-1 is not a range"),
        ("generate --network {stylegan} --seeds 4294967296", "seed 4294967296 must be between"),
        ("generate --network {stylegan}", "either --seeds LIST or --latents FILE"),
        ("generate --network {stylegan} --seeds 1 --psi nan", "psi must be finite"),
        ("generate --network {stylegan} --seeds 1 --cutoff 9", "cutoff=9 must be between 0 and"),
        ("generate --network {stylegan} --seeds 1 --class 0", "class 0: this network has no"),
        ("generate --network {labels} --seeds 1", "this network has 3 classes: choose one"),
        ("generate --network {labels} --seeds 1 --class 3", "class 3: this network has the"),
        ("generate --network {stylegan} --seeds 1 --mix 2 --layers 4-6", "layer 6: this network"),
        ("generate --network {stylegan} --seeds 1 --layers 1", "--layers needs --mix or"),
        ("generate --network {stylegan} --seeds 1 --interpolate linear", "a way needs two keys"),
        ("generate --network {stylegan2} --seeds 1 --rotate 9", "only the images of a StyleGAN3"),
        ("generate --network {stylegan3} --seeds 1 --translate 1", "--translate '1' is not two"),
        ("generate --network {stylegan3} --seeds 1 --translate 1,inf", "translate must be finite"),
        ("generate --network {stylegan3} --seeds 1 --rotate nan", "rotate must be finite"),
        (
            "project --network {stylegan3} --target {red.png} --optimize-noise",
            "this network has no noise maps",
        ),
        ("generate --network {stylegan} --seeds 1 --frames 0", "--frames 0 --fps 30: both"),
        ("generate --network {stylegan} --seeds 1 --device tpu", "device='tpu': "),
        ("generate --network {stylegan} --latents {text.npz}", "text.npz: it is no .npz file"),
        ("generate --network {stylegan} --latents {nothing.npz}", "nothing.npz: it is no .npz"),
        ("generate --network {stylegan} --latents {words.npz}", "words.npz: it is no .npz file"),
        ("generate --network {stylegan} --latents {noise.npz}", "noise/w_avg is no noise map of"),
        ("generate --network {stylegan} --latents {none}", "none: No such file"),
        ("generate --network {stylegan} --latents {empty.npz}", "empty.npz holds no ws, not ws of"),
        ("generate --network {stylegan} --latents {other.npz}", "ws of shape [1, 3, 4], not ws of"),
        ("explore --network {stylegan} --seeds 1 --count 6", "count=6 must be between 1 and"),
        ("explore --network {stylegan} --seeds 1 --steps 1", "--steps 1 --fps 10: at least 2"),
        (
            "explore --network {stylegan} --seeds 1 --layers x",
            "explore: --layers 'x' is not a",
        ),
        ("explore --network {stylegan} --seeds 1 --range inf", "--range must be finite"),
        ("project --network {stylegan} --target {red.png} --steps 0", "--steps 0 must be at"),
        ("project --network {stylegan} --target {red.png} --lr 0", "--lr 0 must be positive"),
        ("project --network {labels} --target {red.png}", "this network has 3 classes: choose"),
        ("project --network {stylegan} --target {none}", "none: No such file"),
        ("project --network {stylegan} --target {text.png}", "text.png: it is no image"),
        (
            "project --network {stylegan} --target {red.png} --seed 18446744073709551616",
            "--seed must not exceed 9223372036854775807",
        ),
        ("project --network {stylegan} --target {cut.png}", "cut.png: it is no image"),
    ],
)
def test_bad_input_is_one_line(bad, tmp_path, capsys, arguments, message):
    parts = arguments.split()
    parts = [str(bad[part[1:-1]]) if part.startswith("{") else part for part in parts]
    assert command(*parts, "--outdir", tmp_path / "out") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"stylegan_fast {parts[0]}: ")
    assert message in lines[0]


def test_an_outdir_that_cannot_be_one(bad, capsys):
    out = bad["text.png"]
    assert command("generate", "--network", bad["stylegan"], "--seeds", 1, "--outdir", out) == 2
    assert capsys.readouterr().err == f"stylegan_fast generate: --outdir {out}: File exists\n"


def test_a_perceptual_loss_downloads_nothing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ValueError, match="needs torchvision"):
        projection.vgg16_features()
    models = SimpleNamespace(vgg16=lambda: pytest.fail("made a network without weights"))
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"vgg16-397923af.pth: no such file"):
        projection.vgg16_features()
    models.vgg16 = lambda: nn.Linear(1, 1)
    (tmp_path / "text").write_text("no weights")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other")
    for name in ("text", "other"):
        with pytest.raises(ValueError, match=f"{name}: it does not hold the weights of VGG16"):
            projection.vgg16_features(tmp_path / name)


def test_without_safetensors(files, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    out = tmp_path / "out"
    assert command("generate", "--network", files["stylegan"], "--seeds", 1, "--outdir", out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'stylegan_fast[train]'" in line


def test_a_projection_that_diverges(generator):
    size = generator.img_resolution
    with pytest.raises(
        ValueError, match=r"the loss is (inf|nan) after \d+ steps; try less than lr="
    ):
        projection.project(generator, torch.zeros(1, 3, size, size), lr=1e30, steps=6)
