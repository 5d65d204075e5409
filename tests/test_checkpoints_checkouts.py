"""Checkpoints that the repositories themselves write, where STYLEGAN_FAST_TEST_CHECKOUTS names a
folder of checkouts: a process of each makes small networks and writes them, as its training does,
and what they give; here, where nothing of it can be imported, the file gives the same.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from stylegan_fast import checkpoints
from stylegan_fast.__main__ import main
from stylegan_fast.testing import relative_error

CHECKOUTS = os.environ.get("STYLEGAN_FAST_TEST_CHECKOUTS")

needs_checkouts = pytest.mark.skipif(
    CHECKOUTS is None, reason="STYLEGAN_FAST_TEST_CHECKOUTS names no folder of checkouts"
)

BEGIN = """
    import copy, pickle, sys, types
    import torch, torch.utils.cpp_extension
    from torch.torch_version import TorchVersion
    torch.utils.cpp_extension.load = lambda *args, **kwargs: types.SimpleNamespace()
    sys.modules["pkg_resources"] = types.SimpleNamespace(parse_version=TorchVersion)
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def changed(net):
        for p in net.parameters():
            p.data += 0.1 * torch.randn_like(p)
        return net.eval().requires_grad_(False)
"""

NVLABS = """
    from dnnlib import EasyDict
    c_dim = {c_dim}
    small = EasyDict(channel_base=1024, channel_max=48, num_fp16_res=2, conv_clamp=256)
    G = Generator(64, c_dim, w_dim=48, img_resolution=32, img_channels=3, {generator})
    D = Discriminator(c_dim, 32, 3, architecture="resnet", block_kwargs=EasyDict(freeze_layers=1),
                      epilogue_kwargs=EasyDict(mbstd_group_size=3), **small)
    G.mapping.w_avg.normal_()
    make = lambda G, z, c: G(z, c, truncation_psi=0.7, noise_mode="const", force_fp32=True)
    judge = lambda img, c: D(img, c, force_fp32=True)

    def write(path, **networks):
        with open(path, "wb") as file:
            pickle.dump(dict(networks, augment_pipe=None, training_set_kwargs=EasyDict()), file)
"""
EARLIER = "    from training.networks import Generator, Discriminator" + NVLABS.replace(
    "{generator}", "mapping_kwargs=EasyDict(num_layers=3), synthesis_kwargs=small"
)
LATER = "    from training.networks_stylegan2 import Generator, Discriminator" + NVLABS.replace(
    "{generator}", "fused_modconv_default='inference_only', **small"
)

ALIAS_FREE = (
    "    from training.networks_stylegan3 import Generator\n"
    "    from training.networks_stylegan2 import Discriminator"
    + NVLABS.format(c_dim="{c_dim}", generator="num_layers=5, {config}**small")
)
RADIAL = "conv_kernel=1, use_radial_filters=True, "

SMALL = """
    G = Generator(32, 64, 2, channel_multiplier=1)
    D = Discriminator(32, channel_multiplier=1)
    c_dim, average = 0, torch.randn(64)
    judge = lambda img, c: D(img)
"""
ROSINALITY = f"""
    from model import Generator, Discriminator{SMALL}
    def make(G, z, c):
        return G([z], truncation=0.7, truncation_latent=average, randomize_noise=False)[0]

    def write(path, G, D, G_ema):
        state = dict(g=G.state_dict(), d=D.state_dict(), g_ema=G_ema.state_dict())
        optimizer = torch.optim.Adam(G.parameters()).state_dict()
        torch.save(dict(state, g_optim=optimizer, ada_aug_p=0.5, latent_avg=average), path)
"""
BASICSR = f"""
    import stylegan_fast.swap
    stylegan_fast.swap.install()  # its operators have no form for the CPU
    for name in ("basicsr", "basicsr.archs", "basicsr.utils"):  # without all that these import
        package = sys.modules[name] = types.ModuleType(name)
        package.__path__ = [name.replace(".", "/")]
    from basicsr.archs.stylegan2_arch import StyleGAN2Generator as Generator
    from basicsr.archs.stylegan2_arch import StyleGAN2Discriminator as Discriminator{SMALL}
    make = lambda G, z, c: G([z], randomize_noise=False)[0]

    def write(path, G, D, G_ema):
        torch.save(dict(params=G.state_dict(), params_ema=G_ema.state_dict()), path)
        torch.save(dict(params=D.state_dict()), path + ".d")
"""
REPOSITORIES = {
    "stylegan2-ada-pytorch": EARLIER.format(c_dim=0),
    "stylegan2-ada-pytorch with labels": EARLIER.format(c_dim=5),
    "stylegan3": LATER.format(c_dim=0),
    "stylegan3 with labels": LATER.format(c_dim=5),
    "stylegan3 T": ALIAS_FREE.format(c_dim=0, config=""),
    "stylegan3 R with labels": ALIAS_FREE.format(c_dim=5, config=RADIAL),
    "stylegan2-pytorch": ROSINALITY,
    "BasicSR": BASICSR,
}

END = """
    changed(G), changed(D)
    G_ema = changed(copy.deepcopy(G))
    write(sys.argv[1], G=G, D=D, G_ema=G_ema)
    z, c = torch.randn(3, 64), torch.eye(5)[:3] if c_dim else None
    img = make(G, z, c)
    torch.save(dict(z=z, c=c, G=img, G_ema=make(G_ema, z, c), D=judge(img, c)), sys.argv[2])
"""


@needs_checkouts
@pytest.mark.parametrize("repository", REPOSITORIES)
def test_a_file_of_a_checkout_gives_what_it_gives_there(repository, tmp_path, monkeypatch):
    folder = Path(CHECKOUTS, repository.split()[0])
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}")
    file, results = tmp_path / "networks", tmp_path / "results"
    script = "\n".join(textwrap.dedent(part) for part in (BEGIN, REPOSITORIES[repository], END))
    done = subprocess.run(
        [sys.executable, "-c", script, file, results],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "STYLEGAN_FAST_BACKEND": "reference"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]
    expected = torch.load(results)

    monkeypatch.setenv("STYLEGAN_FAST_BACKEND", "reference")
    networks = checkpoints.load_networks(file)
    if repository == "BasicSR":
        networks |= checkpoints.load_networks(f"{file}.d")
    assert sorted(networks) == ["D", "G", "G_ema"]
    z, c = expected["z"], expected["c"]
    psi = 1 if repository == "BasicSR" else 0.7  # its files have no mean of w
    with torch.no_grad():
        for name in ("G", "G_ema"):
            img = networks[name].eval()(z, c, truncation_psi=psi, noise_mode="const")
            assert relative_error(img, expected[name]) < 1e-5, name
        assert relative_error(networks["D"].eval()(expected["G"], c), expected["D"]) < 1e-5
    assert not torch.equal(expected["G"], expected["G_ema"])

    out = tmp_path / "out"
    chosen = ["--class", "2"] if c is not None else []
    command = ["generate", "--network", str(file), "--outdir", str(out), "--seeds", "3,5", *chosen]
    assert main(command) == 0
    assert (out / "grid.png").is_file()
