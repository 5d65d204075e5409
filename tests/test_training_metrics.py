"""FID and KID against closed forms, and evaluated without Inception."""

from __future__ import annotations

import itertools
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

pytest.importorskip("PIL", reason="Pillow is in the extra train")

from stylegan_fast.__main__ import main
from stylegan_fast.checkpoints import load_generator, save_networks
from stylegan_fast.models.stylegan2 import Generator
from stylegan_fast.training import metrics
from stylegan_fast.training.data import ImageDataset, example
from stylegan_fast.training.metrics import (
    MetricsUnavailableError,
    frechet_distance,
    kernel_distance,
    polynomial_mmd,
)


def sample(n: int, mean, covariance, seed: int = 0) -> torch.Tensor:
    """[n, d] whose mean and covariance are exactly these."""
    d = len(mean)
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T
    root = torch.linalg.cholesky(torch.as_tensor(covariance, dtype=torch.float64))
    return x @ root.T + torch.as_tensor(mean, dtype=torch.float64)


def test_frechet_distance_of_independent_variables():
    x = sample(50, [0.0, 1, 2], np.diag([4.0, 9, 1]))
    y = sample(70, [1.0, 1, 0], np.diag([1.0, 16, 25]), seed=1)
    # 1² + 2² of the means, (2-1)² + (3-4)² + (1-5)² of the deviations
    assert frechet_distance(x, y) == pytest.approx(5 + 18)


def test_frechet_distance_of_any_covariances():
    root = np.random.Generator(np.random.Philox(0)).normal(size=(2, 5, 5))
    a, b = root @ root.transpose(0, 2, 1) + 0.1 * np.eye(5)
    x, y = sample(40, np.zeros(5), a), sample(30, np.full(5, 0.5), b, seed=1)
    expected = 5 * 0.25 + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert frechet_distance(x, y) == pytest.approx(expected)


def test_frechet_distance_of_fewer_samples_than_dimensions():
    x = torch.randn(5, 20).double()
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, x + 0.5) == pytest.approx(20 * 0.25)


def test_polynomial_mmd_is_its_definition():
    x, y = torch.randn(5, 3), torch.randn(4, 3) + 0.5

    def k(a, b):
        return (np.dot(a, b) / 3 + 1) ** 3

    def mean(pairs):
        return np.mean([k(a, b) for a, b in pairs])

    a, b = x.double().numpy(), y.double().numpy()
    expected = (
        mean(itertools.permutations(a, 2))
        + mean(itertools.permutations(b, 2))
        - 2 * mean(itertools.product(a, b))
    )
    assert polynomial_mmd(x, y) == pytest.approx(expected)


def test_polynomial_mmd_is_unbiased():
    """Over all ways of cutting one set in two halves it is zero in the mean."""
    x = torch.randn(6, 2).double()
    halves = list(itertools.combinations(range(6), 3))
    values = [
        polynomial_mmd(x[[*half]], x[[i for i in range(6) if i not in half]]) for half in halves
    ]
    assert np.mean(values) == pytest.approx(0, abs=1e-12) and np.std(values) > 0.01


def test_kernel_distance_is_the_mean_over_subsets():
    x, y = torch.randn(8, 3), torch.randn(6, 3) + 1
    assert kernel_distance(y, x[:6], subsets=1) == pytest.approx(polynomial_mmd(y, x[:6]))
    means = [kernel_distance(x, y, subsets=60, size=4, seed=seed) for seed in (0, 0, 1)]
    assert means[0] == means[1] != means[2]
    single = [kernel_distance(x, y, subsets=1, size=4, seed=seed) for seed in range(60)]
    assert abs(np.mean(single) - means[0]) < 6 * np.std(single) / np.sqrt(60)


@pytest.mark.parametrize("function", [frechet_distance, polynomial_mmd])
def test_too_few_samples(function):
    with pytest.raises(ValueError, match=r"y must be at least two rows, got y.shape=\(1, 3\)"):
        function(torch.zeros(4, 3), torch.zeros(1, 3))


class Copies(torch.nn.Module):
    """A generator that knows the images of a dataset by their labels."""

    z_dim = 3

    def __init__(self, dataset, shift=0):
        super().__init__()
        self.images = torch.stack([dataset[i][0] for i in range(dataset.c_dim)]) / 127.5 - 1
        self.shift = shift

    def mapping(self, z, c):
        assert z.shape == (len(c), 3)
        return c.argmax(1)

    def synthesis(self, ws, noise_mode):
        assert noise_mode == "const"
        return self.images[ws] + self.shift


def moments(images):
    assert images.dtype == torch.uint8 and images.shape[1] == 3
    return torch.cat([images.double().mean((2, 3)), images.double().std((2, 3))], 1) / 255


@pytest.fixture(scope="module")
def dataset_path(tmp_path_factory):
    return example(tmp_path_factory.mktemp("data") / "e.zip", 16, count=4)


@pytest.fixture(scope="module")
def dataset(dataset_path):
    return ImageDataset(dataset_path, labels=True)


def test_evaluation_sees_all_data_and_labels_as_they_are_drawn(dataset):
    run = metrics.Evaluation(dataset, ["fid", "kid"], features=moments, batch=3)
    same = run(Copies(dataset), num=400)
    other = run(Copies(dataset, 0.3), num=400)
    assert list(same) == ["fid", "kid"]
    # Labels are drawn, so copies of four images come in about equal parts.
    assert 0 <= same["fid"] < 0.02 and other["fid"] > 3 * 0.1**2
    assert abs(same["kid"]) < other["kid"]
    assert run(Copies(dataset), num=400) == same


def test_evaluation_of_a_network_and_of_gray_images(tmp_path):
    from PIL import Image

    from stylegan_fast.training.data import write_zip

    gray = (Image.effect_noise((16, 16), 40 + i) for i in range(4))
    dataset = ImageDataset(write_zip(tmp_path / "gray.zip", ((image, None) for image in gray)))
    g = Generator(8, 0, 8, 16, 1, {"num_layers": 1}, channel_base=128).eval()
    run = metrics.Evaluation(dataset, ["fid"], features=moments, batch=4)
    value = run(g, num=6)["fid"]
    assert 0 < value < 10 and run(g, num=6)["fid"] == value != run(g, num=6, seed=1)["fid"]


def test_an_unknown_metric(dataset):
    with pytest.raises(ValueError, match="unknown metric 'is'; there are fid, kid"):
        metrics.Evaluation(dataset, ["is"])


def test_missing_library_and_weights_are_named(monkeypatch, tmp_path, dataset):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(MetricsUnavailableError, match=r"pip install 'stylegan_fast\[metrics\]'"):
        metrics.Evaluation(dataset, ["fid"])

    class Extractor(torch.nn.Module):
        def __init__(self, name, features, feature_extractor_weights_path):
            super().__init__()
            assert features == ["2048"]
            assert Path(feature_extractor_weights_path) == weights
            if weights.read_bytes() == b"damaged":
                raise EOFError

        def forward(self, images):
            return (moments(images),)

    name = "torch_fidelity.feature_extractor_inceptionv3"
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(
        sys.modules, name, types.SimpleNamespace(FeatureExtractorInceptionV3=Extractor)
    )
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    weights = tmp_path / "checkpoints" / metrics.WEIGHTS
    with pytest.raises(MetricsUnavailableError, match=f"download https://.* to {weights}"):
        metrics.Evaluation(dataset, ["fid"])
    weights.parent.mkdir()
    weights.write_bytes(b"damaged")
    with pytest.raises(MetricsUnavailableError, match=f"{weights} does not hold the weights of"):
        metrics.Evaluation(dataset, ["fid"])
    weights.write_bytes(b"")
    assert metrics.Evaluation(dataset, ["kid"])(Copies(dataset), num=8).keys() == {"kid"}


def test_the_command(monkeypatch, tmp_path, capsys, dataset, dataset_path):
    monkeypatch.setattr(metrics, "inception", lambda device: moments)
    torch.manual_seed(0)
    for c_dim in (4, 2):
        g = Generator(8, c_dim, 8, 16, 3, {"num_layers": 1}, channel_base=128).eval()
        save_networks(tmp_path / f"{c_dim}.safetensors", {"G": g})

    def run(network, *more, images="6"):
        command = ["metrics", "--data", str(dataset_path), "--images", images, *more]
        return main([*command, "--network", str(tmp_path / f"{network}.safetensors")])

    assert run(4, "--metrics", "fid,kid", "--device", "cpu") == 0
    g = load_generator(tmp_path / "4.safetensors")
    expected = metrics.Evaluation(dataset, ["fid", "kid"], features=moments)(g, 6)
    lines = [f"{name} {value:.6g}" for name, value in expected.items()]
    assert capsys.readouterr().out.splitlines() == lines
    for refused, message in (
        (lambda: run(2), "has 4 classes, the network 2"),
        (lambda: run(4, images="1"), "--images must be at least 2"),
        (lambda: run(4, "--metrics", "is"), "unknown metric 'is'"),
        (lambda: run(4, "--seed", str(2**64)), "--seed must not exceed"),
    ):
        assert refused() == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("stylegan_fast metrics: ") and message in line


def test_the_command_says_what_is_missing(monkeypatch, tmp_path, capsys, dataset_path):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    g = Generator(8, 0, 8, 16, 3, {"num_layers": 1}, channel_base=128)
    save_networks(tmp_path / "g.safetensors", {"G": g})
    command = ["metrics", "--data", str(dataset_path), "--network", str(tmp_path / "g.safetensors")]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'stylegan_fast[metrics]'" in line
