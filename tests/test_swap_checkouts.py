"""The swap on real checkouts, where STYLEGAN_FAST_TEST_CHECKOUTS names a folder of them.

A checkout runs in processes of its own: with the swap, with its layers converted too, and without,
where what it compiles at import and `pkg_resources` are stubs. Images, logits, and all gradients of
a logistic loss, of path length and of R1 must agree, as far as these depend on the eighth digit of
the latents.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from stylegan_fast.testing import relative_error

CHECKOUTS = os.environ.get("STYLEGAN_FAST_TEST_CHECKOUTS")

needs_checkouts = pytest.mark.skipif(
    CHECKOUTS is None, reason="STYLEGAN_FAST_TEST_CHECKOUTS names no folder of checkouts"
)

MOCKS = """
    import importlib.abc, importlib.machinery, sys, types
    from unittest import mock

    class Mocked(types.ModuleType):
        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return mock.MagicMock()

    class Mocks(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in mocked:
                return importlib.machinery.ModuleSpec(name, self, is_package=True)

        def create_module(self, spec):
            return Mocked(spec.name)

        def exec_module(self, module):
            pass

    sys.meta_path.append(Mocks())
"""
"""What a network's module imports and this network does not use."""

SIMPLE_D = """
    D = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 4, 4),
        torch.nn.Softplus(),
        torch.nn.Flatten(),
        torch.nn.Linear(512, 1),
    )
    logits = D
"""

NVLABS = """
    G = Generator(64, 0, 64, 32, 3, channel_base=1024, channel_max=48{more})
    D = Discriminator(0, 32, 3, channel_base=1024, channel_max=48)
    latents = lambda z: G.mapping(z, None)
    image = lambda ws: G.synthesis(ws{noise})
    logits = lambda img: D(img, None)
"""
NVLABS = textwrap.dedent(NVLABS)
STYLEGAN2 = NVLABS.format(more="", noise=", noise_mode='const'")
EARLIER = STYLEGAN2.replace("channel_base=1024, channel_max=48)", "synthesis_kwargs=small)", 1)

REPOSITORIES = {
    "stylegan2-ada-pytorch": "from training.networks import Generator, Discriminator\n"
    "small = dict(channel_base=1024, channel_max=48)" + EARLIER,
    "stylegan3": "from training.networks_stylegan2 import Generator, Discriminator" + STYLEGAN2,
    "eg3d/eg3d": "from training.networks_stylegan2 import Generator, Discriminator" + STYLEGAN2,
    "stylegan3 T": "from training.networks_stylegan3 import Generator\n"
    "from training.networks_stylegan2 import Discriminator"
    + NVLABS.format(more=", num_layers=6", noise=""),
    "stylegan3 R": "from training.networks_stylegan3 import Generator\n"
    "from training.networks_stylegan2 import Discriminator"
    + NVLABS.format(more=", num_layers=6, conv_kernel=1, use_radial_filters=True", noise=""),
    "stylegan2-pytorch": """
        torch.set_default_dtype(torch.float64)  # so wide that some activation is always at its kink
        from model import Generator, Discriminator
        G = Generator(16, 64, 2, channel_multiplier=1).double()
        D = Discriminator(16, channel_multiplier=1).double()
        latents = G.style
        image = lambda w: G([w], input_is_latent=True, randomize_noise=False)[0]
        logits = D
    """,
    "R3GAN": """
        from R3GAN.Networks import Generator, Discriminator
        G = Generator(64, [32, 32, 32], [4, 4, 4], [2, 2, 2], 2)
        D = Discriminator([32, 32, 32], [4, 4, 4], [2, 2, 2], 2)
        latents = lambda z: z * 1
        image, logits = G, D
    """,
    "DragGAN": "from training.networks_stylegan2 import Generator, Discriminator" + STYLEGAN2,
    "stylegan-xl": "from training.networks_stylegan2 import Generator, Discriminator" + STYLEGAN2,
    "stylegan-t": (
        "mocked = 'open_clip', 'timm', 'torchvision'",
        MOCKS,
        SIMPLE_D,
        """
        from networks.generator import SynthesisNetwork
        G = SynthesisNetwork(64, 32, 3, channel_base=1024, channel_max=64, num_fp16_res=0)
        latents = lambda z: z[:, None].repeat(1, G.num_ws, 1)
        image = lambda ws: G(ws, noise_mode="const")
    """,
    ),
    "GFPGAN": (
        "mocked = 'basicsr',",
        MOCKS,
        SIMPLE_D,
        """
        import importlib.util
        import basicsr.utils.registry
        registry = types.SimpleNamespace(register=lambda: lambda cls: cls)
        basicsr.utils.registry.ARCH_REGISTRY = registry
        file = "gfpgan/archs/stylegan2_clean_arch.py"
        spec = importlib.util.spec_from_file_location("stylegan2_clean_arch", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        G = module.StyleGAN2GeneratorClean(32, 64, 2, 1, narrow=0.125)
        latents = G.style_mlp
        image = lambda w: G([w], input_is_latent=True, randomize_noise=False)[0]
    """,
    ),
}

OWN = """
    import sys, types
    import torch.utils.cpp_extension
    from torch.torch_version import TorchVersion
    torch.utils.cpp_extension.load = lambda *args, **kwargs: types.SimpleNamespace()
    sys.modules["pkg_resources"] = types.SimpleNamespace(parse_version=TorchVersion)
"""
SWAPPED = """
    import stylegan_fast.swap
    stylegan_fast.swap.install()
"""
CONVERTED = """
    for network in (G, D):
        stylegan_fast.swap.convert(network)
"""
STEP = """
    results = {}
    for seed in range(2):  # the second with the modulated_conv2d that the first revealed
        torch.manual_seed(seed)
        z = (torch.randn(3, 64) * (1 + nudge)).requires_grad_()
        ws = latents(z)
        img = image(ws)
        (lengths,) = torch.autograd.grad((img * torch.randn_like(img)).sum(), ws, create_graph=True)
        real = torch.randn_like(img).requires_grad_()
        judged = logits(real)
        (r1,) = torch.autograd.grad(judged.sum(), real, create_graph=True)
        loss = F.softplus(-logits(img)).mean() + lengths.square().mean() + r1.square().mean()
        parameters = dict(G.named_parameters()) | {"D " + n: p for n, p in D.named_parameters()}
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        found = dict(zip(parameters, gradients)) | dict(img=img, logits=judged, r1=r1)
        results |= {f"{seed} {n}": t.detach() for n, t in found.items() if t is not None}
    torch.save(results, sys.argv[1])
"""
SETUP = """
    for name, p in [*G.named_parameters(), *D.named_parameters()]:
        if p.ndim < 2 and "affine" not in name and "modulation" not in name:
            torch.nn.init.normal_(p, std=0.3)
"""


def run(folder, path, *parts, backend="reference"):
    """What a script of these parts saves."""
    script = "import sys, torch\nimport torch.nn.functional as F\ntorch.manual_seed(0)\n"
    script += "torch.set_num_threads(1)\n" + "\n".join(textwrap.dedent(part) for part in parts)
    environment = {**os.environ, "PYTHONPATH": str(folder), "STYLEGAN_FAST_BACKEND": backend}
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]
    return torch.load(path)


@needs_checkouts
@pytest.mark.parametrize("repository", REPOSITORIES)
def test_a_checkout_computes_the_same(repository, tmp_path):
    folder = Path(CHECKOUTS, repository.split()[0])
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}")
    networks = REPOSITORIES[repository]
    networks = [networks] if isinstance(networks, str) else networks
    own = run(folder, tmp_path / "own", OWN, *networks, SETUP, "nudge = 0", STEP)
    nudged = run(folder, tmp_path / "nudged", OWN, *networks, SETUP, "nudge = 1e-6", STEP)
    swapped = [SWAPPED, *networks, SETUP, "nudge = 0"]
    for parts in (swapped, [*swapped, CONVERTED]):
        found = run(folder, tmp_path / "swapped", *parts, STEP)
        assert own.keys() == found.keys()
        assert len(own) > 40
        for name, expected in own.items():
            error, sensitivity = (relative_error(t[name], expected) for t in (found, nudged))
            assert error < 1e-5 + 5 * sensitivity, name
