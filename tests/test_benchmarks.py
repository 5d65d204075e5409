"""The benchmark suite: what it times, that a wrong kernel is caught, what it writes down."""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import math
import re
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from stylegan_fast import _store, backends, benchmarks, swap
from stylegan_fast.backends import choice
from stylegan_fast.benchmarks import (
    cases,
    end_to_end,
    peers,
    photographs,
    report,
    results,
    runner,
    suite,
    timing,
    upfirdn2d,
    workload,
)
from stylegan_fast.benchmarks import filtered_lrelu as filtered_lrelu_benchmark
from stylegan_fast.benchmarks import layers as layer_benchmark
from stylegan_fast.benchmarks import stock as stock_networks
from stylegan_fast.benchmarks import swap as swap_benchmark
from stylegan_fast.benchmarks.bias_act import BiasAct, stock
from stylegan_fast.benchmarks.cases import (
    KINDS,
    LEVELS,
    TARGETS,
    Case,
    ConvLayer,
    conv_layers,
    layers,
    select,
)
from stylegan_fast.benchmarks.gate import Expected, check
from stylegan_fast.benchmarks.layers import ConvolutionLayer
from stylegan_fast.benchmarks.machine import git_commit, kernels, launches, peak_memory, tf32
from stylegan_fast.benchmarks.networks import NetworkForward
from stylegan_fast.benchmarks.results import COLUMNS, Row
from stylegan_fast.benchmarks.upfirdn2d import VARIANTS, Upfirdn2d
from stylegan_fast.benchmarks.workload import Session
from stylegan_fast.layers import Conv2dLayer, SynthesisLayer, ToRGBLayer
from stylegan_fast.models.stylegan2 import Discriminator, Generator
from stylegan_fast.reference.upfirdn2d import upfirdn2d as reference_upfirdn2d

CPU = torch.device("cpu")
SMALL = ["--quick", "--op", "bias_act", "--shape", "4x512x4x4", "--layout", "nchw"]


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    benchmarks.add_arguments(parser)
    return parser.parse_args(["--device", "cpu", *argv])


def bench(folder: Path, *argv: str) -> tuple[int, list[Row]]:
    status = benchmarks.main(["--device", "cpu", "--out", str(folder), *argv])
    path = folder / "results.csv"
    return status, results.read(path) if path.exists() else []


def needs_cpu_kernels() -> None:
    reason = backends.refusal("cpu", "bias_act", "cpu", torch.float32)
    if reason is not None:
        pytest.skip(f"no CPU kernels: {reason}")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """(folder, exit status, seconds) of one `bench --quick`."""
    folder = tmp_path_factory.mktemp("bench")
    start = time.monotonic()
    status, _ = bench(folder, "--quick")
    return folder, status, time.monotonic() - start


# What is timed


@pytest.mark.parametrize("network", [256, 1024])
def test_cases_cover_every_layer_shape(network):
    base = {256: 16384, 1024: 32768}[network]
    with torch.device("meta"):
        G = Generator(512, 0, 512, network, 3, channel_base=base)
        D = Discriminator(0, network, 3, channel_base=base)
    activated = {
        (layer.weight.shape[0], layer.resolution)
        for layer in G.modules()
        if isinstance(layer, SynthesisLayer)
    }
    for block in D.children():
        for name, layer in block.named_children():
            if isinstance(layer, Conv2dLayer) and name != "skip":  # skip has no activation
                resolution = getattr(block, "resolution", 4) // (2 if name == "conv1" else 1)
                activated.add((layer.weight.shape[0], resolution))
    listed = [layer for layer in layers() if f"{network}:b" in layer.name]
    assert {(layer.channels, layer.resolution) for layer in listed} == activated
    timed = {case.shape[1:3] for case in select(parse("--full"), "cpu") if case.op == "bias_act"}
    assert activated <= timed


def test_no_case_twice():
    for device in ("cpu", "cuda"):
        cases = select(parse("--full"), device)
        keys = Counter(dataclasses.replace(c, layer="") for c in cases)
        assert max(keys.values()) == 1


def test_default_cases():
    cases = select(parse(), "cpu")
    bias_act = [c for c in cases if c.op == "bias_act" and c.layout == "nchw"]
    for shape in TARGETS:
        modes = {(c.level, c.mode) for c in bias_act if c.shape == shape}
        assert modes == {(level, mode) for level in ("kernel", "user") for mode in LEVELS[level]}
    assert {c.mode for c in cases if c.op == "training"} == set(LEVELS["training"])
    assert {c.shape[0] for c in cases if c.op == "training"} == {4}
    assert {c.variant for c in cases if c.op == "training"} == end_to_end.WIDTHS.keys()
    assert {c.dtype for c in cases if c.op != "networks"} == {"float32"}
    assert max(math.prod(c.shape) for c in cases) <= 2**24
    on_gpu = [c for c in select(parse(), "cuda") if c.op == "bias_act"]
    assert {c.dtype for c in on_gpu} == {"float32", "bfloat16", "float16"}
    assert max(math.prod(c.shape) for c in on_gpu) * 2 >= 64e6


def test_default_resamplings():
    cases = [c for c in select(parse(), "cpu") if c.op == "upfirdn2d"]
    timed = {(c.variant, c.shape, c.layout, c.level, c.mode) for c in cases}
    for variant in ("same", "up2", "down2", "up2 12-tap", "down2 12-tap"):
        for shape in TARGETS:
            if variant != "down2 12-tap":
                assert (variant, shape, "nchw", "user", "forward") in timed
            for layout in ("nchw", "nhwc"):
                assert (variant, shape, layout, "kernel", "forward") in timed
    for variant in ("same", "up2", "down2"):
        assert (variant, (1, 3, 8, 8), "nchw", "user", "forward") in timed
        assert (variant, TARGETS[0], "nchw", "user", "forward+backward") in timed
    assert ("down2", TARGETS[0], "nchw", "user", "double backward") in timed
    fused = {(c.variant, c.shape[1:]) for c in cases if "+" in c.variant}
    assert fused == {("after conv + epilogue", (64, 257, 257)), ("up2 + add", (3, 128, 128))}


def test_full_resamplings_are_those_of_the_networks():
    cases = [c for c in select(parse("--full"), "cpu") if c.op == "upfirdn2d"]
    assert {c.variant.partition(" + ")[0] for c in cases} == set(VARIANTS)
    shapes = {(c.variant, c.shape[1:]): c.layer for c in cases}
    assert shapes["after conv", (32, 1025, 1025)] == "1024:b1024 G.conv0"
    assert shapes["before conv", (512, 64, 64)] == "1024:b64 D.conv1"
    assert shapes["down2", (64, 256, 256)] == "256:b256 D.skip"
    assert "256:b128" in shapes["up2 + add", (3, 64, 64)]
    assert "1024:b128" in shapes["up2 + add", (3, 64, 64)]
    assert not any(c.variant == "after conv" and c.shape[2] == 5 for c in cases)


@pytest.mark.parametrize("network", [256, 1024])
def test_layers_are_those_of_the_networks(network):
    with torch.device("meta"):
        base = {256: 16384, 1024: 32768}[network]
        G = Generator(512, 0, 512, network, 3, channel_base=base)
        D = Discriminator(0, network, 3, channel_base=base)
    found = Counter()
    for name, layer in [*G.synthesis.named_modules(), *D.named_modules()]:
        if not isinstance(layer, (SynthesisLayer, ToRGBLayer, Conv2dLayer)):
            continue
        of_g = not isinstance(layer, Conv2dLayer)
        block, _, kind = name.partition(".")
        up, down = getattr(layer, "up", 1), getattr(layer, "down", 1)
        kind = f"{'G' if of_g else 'D'}.{kind}"
        assert KINDS[kind] == (layer.weight.shape[2], up, down)
        o, i = layer.weight.shape[:2]
        found[int(block[1:]), ConvLayer(kind, i, o, int(block[1:]) // up)] += 1
    assert Counter(conv_layers(network)) == found


@pytest.mark.parametrize("network, of_g, of_d", [(256, 14.90, 15.38), (1024, 74.26, 76.7)], ids=str)
def test_arithmetic_of_the_networks(network, of_g, of_d):
    """In 10⁹ multiplications and additions an image, as counted by hand from the papers."""
    for letter, giga in (("G", of_g), ("D", of_d)):
        flops = sum(layer.flops for _, layer in conv_layers(network) if layer.kind[0] == letter)
        assert flops / 2e9 == pytest.approx(giga, rel=1e-3)


@pytest.mark.parametrize("device, batches", [("cpu", {1, 4}), ("cuda", {1, 8, 32})])
def test_full_run_has_every_layer(device, batches):
    cases = [c for c in select(parse("--full"), device) if c.op == "layers"]
    timed = {(ConvLayer.of(c), c.shape[0], c.mode) for c in cases}
    for network in (256, 1024):
        for _, layer in conv_layers(network):
            for mode in ("forward", "forward+backward", "double backward"):
                assert (layer, 1, mode) in timed
                if layer.size <= 64 or device == "cuda":
                    assert all((layer, n, mode) in timed for n in batches)
    assert {c.layout for c in cases} == {"nchw", "nhwc"}
    names = {c.layer for c in cases if ConvLayer.of(c) == ("G.conv1", 512, 512, 32)}
    assert names == {"256:b32 1024:b32"}


def test_layers_and_networks_of_a_default_run():
    cases = select(parse(), "cpu")
    kinds = {c.variant.split(" ")[0] for c in cases if c.op == "layers"}
    assert kinds == {"G.conv0", "G.conv1", "G.torgb", "D.conv0", "D.conv1", "D.skip"}
    networks = {(c.variant, c.dtype, c.layout) for c in cases if c.op == "networks"}
    assert networks == {
        *((f"{name} {size}", "float32", "nchw") for name in "GD" for size in (256, 1024)),
        *((f"{name} 256", "bfloat16", "nhwc") for name in "GD"),
        ("G3 256", "float32", "nchw"),
    }
    on_gpu = [c for c in select(parse(), "cuda") if c.op == "networks"]
    assert {c.shape[0] for c in on_gpu if c.mode == "forward"} == {1, 8}
    assert {c.shape[0] for c in on_gpu if c.mode == "CUDA graph"} == {1}
    chosen = select(parse("--shape", "G.conv0 64", "--mode", "forward", "--layout", "nhwc"), "cpu")
    assert [(c.shape, c.dtype, c.layout) for c in chosen] == [
        ((1, 64, 512, 512), "float32", "nhwc")
    ]


def test_filters_choose_among_all_cases():
    argv = ("--shape", "1024:b1024", "--dtype", "float16", "--mode", "forward")
    cases = select(parse("--op", "bias_act", *argv), "cpu")
    assert {c.shape for c in cases} == {(1, 32, 1024, 1024)}
    assert {c.dtype for c in cases} == {"float16"}
    assert {(c.level, c.mode) for c in cases} == {("kernel", "forward"), ("user", "forward")}
    cases = select(parse("--shape", "12-tap crop"), "cpu")
    assert {c.shape for c in cases} == {(4, 3, 512, 512), (1, 3, 2048, 2048)}
    assert {(c.op, c.variant) for c in cases} == {("upfirdn2d", "down2 12-tap crop")}
    assert {c.op for c in select(parse("--op", "training"), "cpu")} == {"training"}


def test_bytes_and_flops_of_a_case(tmp_path):
    def work(mode: str, dtype: str = "float32") -> BiasAct:
        case = Case("bias_act", "", (2, 3, 5, 8), dtype, "nchw", "user", mode)
        return BiasAct(case, Session(CPU, tmp_path))

    assert work("forward").bytes == 4 * (2 * 240 + 3)
    assert work("forward", "bfloat16").bytes == 2 * (2 * 240 + 3)
    assert work("forward+backward").bytes == 4 * (4 * 240 + 2 * 3) + 2 * 240 // 4
    assert work("forward").flops == 5 * 240


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", LEVELS["user"])
def test_inputs_reach_every_branch_and_no_kink(tmp_path, dtype, mode):
    case = Case("bias_act", "", (2, 19, 40, 36), dtype, "nhwc", "user", mode)
    work = BiasAct(case, Session(CPU, tmp_path))
    v = (work.x.double() + work.b.double()[:, None, None]).detach()
    assert (v.abs() >= 1).all()
    assert ((v * math.sqrt(2) - 256).abs() > 4).all()
    assert 0.01 < (v * math.sqrt(2) > 256).double().mean() < 0.1
    assert 0.3 < (v < 0).double().mean() < 0.7
    assert check(work._call(stock)(), work.expected())[1] == ""


# Resampling


def resampling(
    folder: Path,
    variant: str,
    mode: str = "forward",
    level: str = "user",
    shape: tuple[int, ...] = (2, 3, 5, 8),
    dtype: str = "float32",
    layout: str = "nchw",
) -> Upfirdn2d:
    case = Case("upfirdn2d", "", shape, dtype, layout, level, mode, variant)
    return Upfirdn2d(case, Session(CPU, folder, compiles=False))


def test_variants_are_the_workloads_of_the_originals():
    """(x0, x1, y0, y1), gain and taps as the originals' networks pass them."""

    def facts(name: str) -> tuple:
        f, fir = VARIANTS[name]
        return (fir.x0, fir.x1, fir.y0, fir.y1), fir.gain, tuple(f.shape)

    assert facts("same") == ((2, 1, 2, 1), 1, (4, 4))
    assert facts("up2") == ((2, 1, 2, 1), 4, (4, 4))
    assert facts("down2") == ((1, 1, 1, 1), 1, (4, 4))
    assert facts("after conv") == ((1, 1, 1, 1), 4, (4, 4))
    assert facts("before conv") == ((2, 2, 2, 2), 1, (4, 4))
    assert facts("up2 12-tap") == ((6, 5, 6, 5), 4, (12,))
    assert facts("down2 12-tap") == ((5, 5, 5, 5), 1, (12,))
    assert facts("down2 12-tap crop") == ((-1, -1, -1, -1), 1, (12,))
    assert facts("down2 crop") == ((0, 0, 0, 0), 1, (4, 4))
    assert facts("blur 61-tap") == ((30, 30, 30, 30), 1, (61,))
    assert facts("up4 47x47") == ((23, 23, 23, 23), 16, (47, 47))
    assert facts("up4 127x127")[1:] == (16, (127, 127))
    assert facts("blur 1x61") == ((40, 20, 0, 0), 1, (1, 61))
    for name in ("down2 12-tap crop", "down2 crop"):
        assert VARIANTS[name].fir.flip_filter


@pytest.mark.parametrize(
    "variant, mode, moved, flops",
    [
        # 240 elements in, 240 out, 16 taps; of a row, then of a column.
        ("same", "forward", 4 * (240 + 240 + 16), 2 * 6 * (5 * 8 * 4 + 5 * 8 * 4)),
        # 10 × 16 out; a phase has 2 taps.
        ("up2", "forward", 4 * (240 + 960 + 16), 2 * 6 * (5 * 16 * 2 + 10 * 16 * 2)),
        # 2 × 4 out; columns first leave fewer pixels.
        ("down2", "forward", 4 * (240 + 48 + 16), 2 * 6 * (2 * 8 * 4 + 2 * 4 * 4)),
        ("down2", "backward", 4 * (240 + 48 + 16), 2 * 6 * (2 * 8 * 4 + 2 * 4 * 4)),
        ("down2", "forward+backward", 2 * 4 * (240 + 48 + 16), 4 * 6 * (2 * 8 * 4 + 2 * 4 * 4)),
        ("down2", "double backward", 3 * 4 * (240 + 48 + 16), 6 * 6 * (2 * 8 * 4 + 2 * 4 * 4)),
        ("up2 12-tap", "forward", 4 * (240 + 960 + 12), 2 * 6 * (5 * 16 * 6 + 10 * 16 * 6)),
        # A single column: its axis costs nothing.
        ("blur 1x61", "forward", 4 * (240 + 240 + 61), 2 * 6 * 5 * 8 * 61),
        # 20 × 32 out, not separable: 47² / 16 taps a pixel.
        ("up4 47x47", "forward", 4 * (240 + 3840 + 47**2), 2 * 3840 * 47**2 // 16),
        ("up2 + add", "forward", 4 * (240 + 2 * 960 + 16), 5760 + 960),
        ("up2 + add", "forward+backward", 4 * (2 * 240 + 3 * 960 + 32), 2 * 5760 + 960),
        # 4 × 7 out: x, y, taps, noise, scale, b.
        ("after conv + epilogue", "forward", 4 * (240 + 168 + 16 + 56 + 6 + 3), 2880 + 8 * 168),
        # dy, mask, dx, taps, scale, db
        (
            "after conv + epilogue",
            "backward",
            42 + 4 * (168 + 240 + 16 + 6 + 3),
            2880 + 3 * 168 + 240,
        ),
        # both, the mask written, and for the gradient of scale x and its result
        (
            "after conv + epilogue",
            "forward+backward",
            1956 + 42 + 1774 + 4 * (240 + 6),
            2 * 2880 + 11 * 168 + 3 * 240,
        ),
    ],
)
def test_bytes_and_flops_of_a_resampling(tmp_path, variant, mode, moved, flops):
    work = resampling(tmp_path, variant, mode)
    assert (work.bytes, work.flops) == (moved, flops)
    if variant == "up2":
        assert work.copied_bytes() == 4 * (240 + 960)
        assert resampling(tmp_path, variant, dtype="bfloat16").bytes == 2 * (240 + 960) + 4 * 16


@pytest.mark.parametrize("flip_filter", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_stock_formulation_is_upfirdn2d(name, flip_filter):
    variant = VARIANTS[name]
    variant = variant._replace(fir=variant.fir._replace(flip_filter=flip_filter))
    x = torch.randn(1, 2, 14, 17, dtype=torch.float64)
    expected = variant.run(reference_upfirdn2d, x, variant.f)
    y = upfirdn2d.stock(x, variant.f.double(), variant.fir)
    assert y.shape[2:] == variant.fir.output_size(14, 17, variant.taps)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "variant, mode",
    [
        ("up2", "double backward"),
        ("down2 12-tap", "forward+backward"),
        ("after conv + epilogue", "forward"),
        ("after conv + epilogue", "forward+backward"),
        ("up2 + add", "forward+backward"),
    ],
)
def test_formulations_of_resampling_pass_their_gate(tmp_path, variant, mode, dtype, layout):
    shape = (2, 19, 17, 9)  # more than one slice of channels
    work = resampling(tmp_path, variant, mode, "user", shape, dtype, layout)
    calls = {provider.name: provider.call for provider in work.providers()}
    expected = work.expected()
    for name in ("stock", "reference"):
        assert check(calls[name](), expected)[1] == "", name
    if mode != "forward":
        wrong = list(calls["stock"]())
        wrong[1] = wrong[1] * 1.1
        assert "gradient of x" in check(wrong, expected)[1]


def test_epilogue_inputs_reach_every_branch_and_no_kink(tmp_path):
    work = resampling(tmp_path, "after conv + epilogue", shape=(3, 19, 30, 21))
    x, scale, b = (t.double() for t in work.inputs)
    u = work.variant.run(reference_upfirdn2d, x, work.f)
    v = work._scaled(u, scale) + b[:, None, None]
    assert (v.abs() > 50).all()
    assert ((v * math.sqrt(2) - 256).abs() > 50).all()
    assert 0.2 < (v * math.sqrt(2) > 256).double().mean() < 0.3
    assert 0.4 < (v < 0).double().mean() < 0.6
    assert work.noise.unique(dim=0).shape[0] == 3


class PythonKernels:
    """The contract of a backend's kernels in PyTorch, off by `error` in the last element."""

    def __init__(self, error: float = 0.0):
        self.error = error
        self.slopes = {}

    def filtered(self, x, f, fir):
        assert f.dtype == torch.promote_types(x.dtype, torch.float32)
        return upfirdn2d.stock(x.to(f.dtype), f, fir)

    def upfirdn2d_forward(self, x, f, fir, y, add=None, mask=None, geometry=None, tail=None):
        u = self.filtered(x, f, fir)
        if tail is not None:
            n, c, h, w = y.shape
            assert geometry.numel == y.numel() and geometry.pixels == h * w
            assert geometry.inner == (1 if y.stride(1) == 1 else h * w)
            v = u
            if tail.scale is not None:
                noise = tail.noise.reshape(n, 1, h, w)
                v = tail.scale[:, :, None, None] * u + noise + tail.b[:, None, None]
            u = torch.where(v > 0, 1, tail.alpha) * v * tail.gain
            if mask is not None:
                assert mask.numel() == (y.numel() + 7) // 8 * 2
                self.slopes[mask.data_ptr()] = torch.where(v > 0, 1, tail.alpha) * (
                    u.abs() <= tail.clamp
                )
            u = u.clamp(-tail.clamp, tail.clamp)
        y.copy_(u if add is None else u + add)
        y[-1, -1, -1, -1] += self.error

    def upfirdn2d_masked(self, dy, mask, dx, total, scale, f, fir, geometry, slope, gain):
        dv = dy * gain * (1 if mask is None else self.slopes[mask.data_ptr()])
        if total is not None:
            total.copy_(dv.sum([0, 2, 3]))
        dx.copy_(self.filtered(dv, f, fir))
        if scale is not None:
            dx.mul_(scale[:, :, None, None])
        dx[-1, -1, -1, -1] += self.error


RESAMPLING_KERNELS = [
    ("same", "forward"),
    ("down2 12-tap", "backward"),
    ("up2 + add", "forward"),
    ("after conv + epilogue", "forward"),
    ("after conv + epilogue", "backward"),
]


@pytest.fixture
def python_kernels(monkeypatch) -> PythonKernels:
    """Stands in for the kernels of the cpu backend."""
    kernels = PythonKernels()
    for name in ("upfirdn2d_forward", "upfirdn2d_masked"):
        monkeypatch.setattr(backends.BACKENDS["cpu"], name, getattr(kernels, name))
    monkeypatch.setattr(backends.BACKENDS["cpu"], "unavailable", lambda: None)
    return kernels


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("variant, mode", RESAMPLING_KERNELS)
def test_resampling_kernels_are_called_as_the_contract_says(
    python_kernels, tmp_path, variant, mode, layout
):
    work = resampling(tmp_path, variant, mode, "kernel", (2, 19, 9, 12), layout=layout)
    (provider,) = work.providers()
    assert provider.name == "cpu"
    error, wrong = check(provider.call(), work.expected())
    assert wrong == "" and error < 0.5


@pytest.mark.parametrize("variant, mode", RESAMPLING_KERNELS)
def test_a_wrong_resampling_kernel_fails(python_kernels, tmp_path, variant, mode):
    python_kernels.error = 0.01
    work = resampling(tmp_path, variant, mode, "kernel", (2, 19, 9, 12))
    (provider,) = work.providers()
    wrong = check(provider.call(), work.expected())[1]
    assert wrong.startswith(f"{'y' if mode == 'forward' else 'gradient of x'}: 1 of ")


def test_a_wrong_resampling_is_not_timed(python_kernels, tmp_path):
    python_kernels.error = 0.01
    argv = ("--quick", "--op", "upfirdn2d", "--shape", "before conv 4x512x8x8", "--seconds", "0")
    status, rows = bench(tmp_path, *argv, "--layout", "nchw", "--mode", "forward")
    kernels = {row.provider: row for row in rows if row.level == "kernel"}
    assert status == 1
    assert kernels["cpu"].status == "FAIL" and math.isnan(kernels["cpu"].median_us)
    assert kernels["copy_"].status == "ok"


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("variant", ["down2", "after conv + epilogue", "up2 + add"])
def test_calls_are_gated_on_every_backend(python_kernels, tmp_path, variant, mode):
    work = resampling(tmp_path, variant, mode, "user", (2, 19, 9, 17))
    expected = work.expected()
    (call,) = [p.call for p in work.providers() if p.name == "cpu"]
    assert check(call(), expected)[1] == ""
    python_kernels.error = 0.01
    assert check(call(), expected)[1].startswith("y: 1 of ")


# Layers and networks

SMALL_LAYERS = {
    "G.conv0": (10, 6, 5),
    "G.conv1": (6, 7, 9),
    "G.torgb": (9, 3, 8),
    "D.fromrgb": (3, 9, 8),
    "D.conv0": (7, 6, 9),
    "D.conv1": (7, 9, 8),
    "D.skip": (6, 9, 8),
    "D.conv": (7, 6, 4),
}


def layer_work(folder: Path, kind: str, mode: str, dtype: str, layout: str) -> ConvolutionLayer:
    i, o, size = SMALL_LAYERS[kind]
    case = Case("layers", "", (3, i, size, size), dtype, layout, "user", mode, f"{kind} {i}→{o}")
    return ConvolutionLayer(case, Session(CPU, folder, compiles=False))


def calls_of(work) -> dict:
    return {provider.name: provider.call for provider in work.providers()}


@pytest.mark.parametrize("dtype, layout", [("float32", "nchw"), ("bfloat16", "nhwc")])
@pytest.mark.parametrize("mode", LEVELS["user"])
@pytest.mark.parametrize("kind", SMALL_LAYERS)
def test_formulations_of_a_layer_pass_their_gate(tmp_path, kind, mode, dtype, layout):
    assert SMALL_LAYERS.keys() == KINDS.keys()
    work = layer_work(tmp_path, kind, mode, dtype, layout)
    expected = work.expected()
    names = [e.name for e in expected]
    assert len(set(names)) == len(names) == {"forward": 1}.get(mode, len(names))
    if mode != "forward":
        parameters = {f"gradient of {name}" for name, _ in work.module.named_parameters()}
        assert parameters | {"gradient of x"} <= set(names)
        assert ("gradient of w" in names) == kind.startswith("G.")
    for name, call in calls_of(work).items():
        assert check(call(), expected)[1] == "", name


@pytest.mark.parametrize("kind", ["G.conv0", "D.conv1"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_layer_fails(tmp_path, kind, dtype):
    work = layer_work(tmp_path, kind, "double backward", dtype, "nchw")
    expected = work.expected()
    results_of = calls_of(work)["stock"]()
    for index, e in enumerate(expected):
        wrong = list(results_of)
        if wrong[index] is None or not e.value.any():
            continue
        wrong[index] = wrong[index] * (1.01 if dtype == "float32" else 1.2)
        assert e.name in check(wrong, expected)[1]


def test_branches_that_rounding_decides_do_not_count(tmp_path):
    work = layer_work(tmp_path, "D.conv0", "double backward", "bfloat16", "nchw")
    y = work.expected()[0].value
    assert 0.02 < (~work.counted).double().mean() < 0.3
    assert (work.dy[~work.counted] == 0).all()
    assert (y[work.counted].abs() > 0.06).all()
    assert ((y[work.counted].abs() - 2).abs() > 0.06).all()
    assert (y.abs() == 2).double().mean() > 0.02


def test_bytes_and_flops_of_a_layer(tmp_path):
    work = layer_work(tmp_path, "D.conv1", "forward+backward", "float32", "nchw")
    x, y, weight = 3 * 7 * 64, 3 * 9 * 16, 7 * 9 * 9
    assert work.bytes == 3 * 4 * (x + y + weight)
    assert work.flops == 3 * 2 * 3 * weight * 16
    work = layer_work(tmp_path, "G.conv0", "forward", "bfloat16", "nhwc")
    assert work.bytes == 2 * (3 * 10 * 25 + 3 * 6 * 100 + 540)
    assert work.flops == 2 * 3 * 540 * 25


def test_a_layer_is_compiled(tmp_path, monkeypatch):
    found = []

    def compiler(function, **options):
        found.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compiler)
    work = layer_work(tmp_path, "G.conv0", "forward+backward", "float32", "nchw")
    work.session = Session(CPU, tmp_path)
    assert check(calls_of(work)["torch.compile"](), work.expected())[1] == ""
    assert found == [{"fullgraph": True, "dynamic": False}]


@pytest.fixture
def small_networks(monkeypatch):
    """Networks for images of 16 × 16 pixels, with 4 to 16 channels."""
    monkeypatch.setitem(cases.CHANNEL_BASE, 16, 64)


def network_work(folder, name, dtype="float32", layout="nchw", found=()) -> NetworkForward:
    case = Case("networks", "", (3, 3, 16, 16), dtype, layout, "network", "forward", f"{name} 16")
    return NetworkForward(case, Session(CPU, folder, tuple(found), compiles=False))


def test_the_stock_networks_are_the_networks(tmp_path, small_networks):
    for name, formulation in (("G", stock_networks.Generator), ("D", stock_networks.Discriminator)):
        work = network_work(tmp_path, name)
        network = copy.deepcopy(work.network).double()
        c = torch.zeros(3, 0, dtype=torch.float64)
        options = {"noise_mode": "const"} if name == "G" else {}
        expected = network(work.x.double(), c, **options)
        y = formulation(network)(work.x.double(), c)
        assert expected.std() > 0
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "dtype, layout", [("float32", "nchw"), ("bfloat16", "nhwc"), ("float16", "nchw")]
)
@pytest.mark.parametrize("name", ["G", "D"])
def test_networks_pass_their_gate(tmp_path, small_networks, name, dtype, layout):
    work = network_work(tmp_path, name, dtype, layout)
    blocks = getattr(work.network, "synthesis", work.network)
    assert blocks.b16.use_fp16 == blocks.b8.use_fp16 == (dtype != "float32")
    assert blocks.b16.channels_last == (layout == "nhwc")
    expected = work.expected()
    calls = calls_of(work)
    assert list(calls) == ["stock", "reference", "automatic"]
    for provider, call in calls.items():
        assert check(call(), expected)[1] == "", provider
    blocks.b8.conv1.weight.data[0] *= -1
    for provider, call in calls.items():
        assert check(call(), expected)[1] != "", provider


@pytest.mark.parametrize("name", ["G", "D"])
def test_peers_networks_as_shipped_and_tuned(tmp_path, small_networks, name):
    checkout = torch_utils_family(tmp_path, "peer")
    write_tree(checkout, {"training/networks.py": NETWORKS["networks"]})
    peer = peers.load(str(checkout), CPU)
    work = network_work(tmp_path, name, "float16", "nchw", [peer])
    shipped, tuned = (work._peer(peer, tuned=tuned) for tuned in (False, True))
    assert (shipped.name, tuned.name) == ("peer:peer", "peer:peer tuned")
    assert "num_fp16_res=4" in shipped.detail
    assert "num_fp16_res=16, channels_last, TF32" in tuned.detail
    expected = work.expected()
    assert check(shipped.call(), expected)[1] == check(tuned.call(), expected)[1] == ""
    assert list(calls_of(work))[3:] == ["peer:peer"]  # tuned is for GPUs
    work = network_work(tmp_path, name, "bfloat16", "nhwc", [peer])
    assert work._peer(peer, tuned=True).detail == "its 16-bit blocks are float16"


def test_a_peers_networks_find_their_own_modules(tmp_path, small_networks):
    """The originals' pickle themselves when they are made."""
    checkout = torch_utils_family(tmp_path, "peer")
    pickled = (
        "import pickle\n"
        "from torch_utils import misc\n"
        "from stylegan_fast.models.stylegan2 import Discriminator, Generator as Plain\n"
        "class Generator(Plain):\n"
        "    def __init__(self, *args, **kwargs):\n"
        "        super().__init__(*args, **kwargs)\n"
        "        pickle.dumps(type(self))\n"
    )
    write_tree(checkout, {"training/networks_stylegan2.py": pickled})
    peer = peers.load(str(checkout), CPU)
    work = network_work(tmp_path, "G", found=[peer])
    provider = work._peer(peer, tuned=False)
    assert provider.call is not None, provider.detail
    assert check(provider.call(), work.expected())[1] == ""
    assert not {"torch_utils", "training"} & set(sys.modules)


@pytest.mark.parametrize("radial", ["", " radial"])
@pytest.mark.parametrize("mode", ["forward", "forward+backward", "double backward"])
def test_filtered_lrelu_passes_its_gate(tmp_path, mode, radial):
    for level in ("user", "kernel"):
        if level == "kernel" and mode == "double backward":
            continue
        kernel_mode = mode if level == "user" or mode == "forward" else "backward"
        case = Case(
            "filtered_lrelu", "", (2, 3, 11, 11), "float32", "nhwc", level, kernel_mode,
            f"up2 down2{radial}",
        )  # fmt: skip
        work = filtered_lrelu_benchmark.FilteredLrelu(case, Session(CPU, tmp_path, compiles=False))
        expected = work.expected()
        calls = calls_of(work)
        assert "cpu" in calls
        for provider, call in calls.items():
            results = call()
            assert check(results, expected)[1] == "", provider
            wrong = [None if r is None else -r for r in results]
            assert check(wrong, expected)[1] != "", provider


def test_layers_of_a_peer(tmp_path):
    checkout = torch_utils_family(tmp_path, "peer")
    layers_of_ours = (
        "from stylegan_fast.layers import Conv2dLayer, SynthesisLayer, ToRGBLayer as Plain\n"
        "class ToRGBLayer(Plain):\n"
        "    def forward(self, *inputs, **options):\n"
        "        return super().forward(*inputs, **options) * 1.01\n"
    )
    write_tree(checkout, {"training/networks.py": layers_of_ours})
    peer = peers.load(str(checkout), CPU)
    for kind in SMALL_LAYERS:
        work = layer_work(tmp_path, kind, "forward+backward", "float32", "nchw")
        work.session = Session(CPU, tmp_path, (peer,), compiles=False)
        wrong = check(calls_of(work)["peer:peer"](), work.expected())[1]
        assert wrong.startswith("y: off by") if kind == "G.torgb" else wrong == ""


def test_kernels_of_a_profile():
    assert launches(lambda: torch.ones(3) + 1, CPU) == 0
    events = [{"cat": "kernel"}, {"cat": "gpu_memcpy"}, {"name": "[memory]"}, {"cat": "kernel"}]
    assert kernels(events) == 2


def test_tf32_is_put_back():
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    for allowed in (True, False):
        with tf32(allowed):
            assert [flag.allow_tf32 for flag in flags] == [allowed] * 2
        assert [flag.allow_tf32 for flag in flags] == before


# Training


def step_row(mode: str, provider: str, median: float, **changes) -> Row:
    values = {
        "op": "training",
        "level": "training",
        "mode": mode,
        "provider": provider,
        "baseline": "reference",
        "median_us": median,
        "p20_us": 0.9 * median,
        "p80_us": 1.1 * median,
        "n": 5,
        "flops": 1000,
        "roofline_us": median / 2,
        "peak_bytes": round(median),
        "bytes": 0,
    }
    return a_row(**{**values, **changes})


def test_lazy_iteration_weighs_the_steps():
    times = {"D": 100.0, "D + R1": 300.0, "G": 200.0, "G + path length": 500.0}
    rows = [step_row(mode, "reference", t) for mode, t in times.items()]
    rows += [step_row(mode, "automatic", t / 2) for mode, t in times.items()]
    rows += [
        step_row(mode, "stock", t, status="FAIL" * (mode == "G") or "ok")
        for mode, t in times.items()
    ]
    rows += [a_row()]
    found = {row.provider: row for row in end_to_end.lazy_iteration(rows)}
    mean = (15 * 100 + 300 + 12 * 200 + 4 * 500) / 16
    assert found.keys() == {"reference", "automatic"}
    assert found["reference"].median_us == pytest.approx(mean)
    assert found["reference"].p80_us == pytest.approx(1.1 * mean)
    assert found["reference"].peak_bytes == 500
    assert found["reference"].of_roofline == pytest.approx(0.5)
    assert found["reference"].flops == 2000  # of a D and a G step
    assert found["automatic"].speedup == pytest.approx(2)
    assert {row.mode for row in found.values()} == {"lazy iteration"}
    assert end_to_end.lazy_iteration(rows[:3]) == []
    wider = [dataclasses.replace(row, variant="wider", median_us=2 * row.median_us) for row in rows]
    both = {(r.variant, r.provider): r for r in end_to_end.lazy_iteration(rows + wider)}
    assert both["wider", "automatic"].median_us == pytest.approx(mean)
    assert both["wider", "automatic"].speedup == pytest.approx(2)


# Photographs


def test_strip_of_photographs(tmp_path):
    pytest.importorskip("skimage")
    image = pytest.importorskip("PIL.Image")
    status, rows = bench(tmp_path, "--quick", "--op", "photographs", "--seconds", "0")
    assert status == 0
    assert {"stock", "reference"} <= {row.provider for row in rows}
    assert {row.images for row in rows} == {"resampled.png"}
    assert all(row.gate_error < 1 and row.of_roofline > 0 for row in rows)
    with image.open(tmp_path / "resampled.png") as strip:
        assert (strip.format, strip.mode, strip.size) == ("PNG", "RGB", (4 * 128, 3 * 128))
        pixels = torch.tensor(list(strip.tobytes()), dtype=torch.int16).reshape(3, 128, 4, 128, 3)
    ours, scipy, difference = pixels
    assert (ours - scipy).abs().max() <= 1
    for variant in range(4):
        assert ours[:, variant].float().std() > 10
        # Both of rounding alone, and some of it: the amplification shows it.
        assert difference[:, variant].max() > 0
        assert difference[:, variant].float().mean() < 128
    page = (tmp_path / "results.html").read_text()
    assert "scipy.signal.upfirdn" in page
    assert page.count("data:image/png;base64,") == 1


def test_photographs_are_gated_against_scipy(monkeypatch, tmp_path):
    pytest.importorskip("skimage")

    def shifted(x, *arguments, **keywords):
        return reference_upfirdn2d(x.roll(1, 3), *arguments)

    monkeypatch.setattr(photographs, "upfirdn2d", shifted)
    case = Case("photographs", "", (4, 3, 256, 256), "float32", "nchw", "user", "forward")
    work = photographs.Photographs(case, Session(CPU, tmp_path))
    wrong = {p.name: check(p.call(), work.expected())[1] for p in work.providers()}
    assert wrong["stock"] == ""
    assert wrong["reference"].startswith("up2: ")


# The gate


def test_gate_sees_one_wrong_element():
    value = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(2, 3, 5)
    right = value.float()
    wrong = right.clone()
    wrong[1, 2, 3] += 1e-4
    assert check([right], [Expected("y", value)])[1] == ""
    error, text = check([wrong], [Expected("y", value)])
    assert error == math.inf
    assert "y: 1 of 30" in text
    wrong[1, 2, 3] = math.nan
    assert check([wrong], [Expected("y", value)])[1] != ""
    assert check([right[:1]], [Expected("y", value)])[1] != ""
    assert check([], [Expected("y", value)])[1] == "0 results, expected 1"


def test_gate_takes_none_for_zeros_only():
    value = torch.zeros(3, dtype=torch.float64)
    assert check([None], [Expected("dx", value)])[1] == ""
    assert check([None], [Expected("dx", value + 1)])[1] != ""


def test_gate_of_a_network_is_a_distance():
    value = torch.tensor([3.0, 4.0], dtype=torch.float64)
    expected = [Expected("gradient of w", value, allowed=5e-4)]
    error, text = check([value * (1 + 5e-5)], expected)
    assert text == ""
    assert error == pytest.approx(0.5)
    assert check([value * (1 + 2e-4)], expected)[1] == "gradient of w: off by 0.001"
    assert check([value * math.nan], expected)[1] != ""
    assert check([None], expected)[1] == "gradient of w: off by 5"
    expected[0].counted = torch.tensor([True, False])
    assert check([torch.tensor([3.0, 9.0])], expected)[1] == ""
    assert check([torch.tensor([3.1, 4.0])], expected)[1] == "gradient of w: off by 0.1"


def _wrong_forward(x, y, mask, *arguments):
    y.copy_(x)


def _wrong_sum(dy, mask, dx, total, *arguments):
    original = _wrong_sum.original
    original(dy, mask, dx, total, *arguments)
    if total is not None:
        total[-1] *= 1.01


@pytest.mark.parametrize(
    "kernel, wrong, mode",
    [
        ("epilogue_forward", _wrong_forward, "forward"),
        ("epilogue_masked", _wrong_sum, "forward+backward"),
        ("epilogue_masked", _wrong_sum, "backward"),
    ],
)
def test_a_wrong_kernel_fails(monkeypatch, tmp_path, capsys, kernel, wrong, mode):
    needs_cpu_kernels()
    wrong.original = getattr(backends.BACKENDS["cpu"], kernel)
    monkeypatch.setattr(backends.BACKENDS["cpu"], kernel, wrong)
    status, rows = bench(tmp_path, *SMALL, "--mode", mode)
    assert status == 1
    ours = [row for row in rows if row.provider == "cpu"]
    assert ours
    for row in ours:
        assert row.status == "FAIL"
        assert row.detail
        assert math.isnan(row.median_us) and math.isnan(row.speedup)
    others = [row for row in rows if row.provider != "cpu"]
    assert others and all(row.status == "ok" for row in others)
    lines = [line for line in capsys.readouterr().out.splitlines() if "FAIL:" in line]
    assert len(lines) == len(ours)
    assert not any("×" in line for line in lines)
    assert "FAIL" in (tmp_path / "results.html").read_text()


def test_a_kernel_that_raises_fails(monkeypatch, tmp_path):
    needs_cpu_kernels()

    def broken(*arguments):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(backends.BACKENDS["cpu"], "epilogue_forward", broken)
    status, rows = bench(tmp_path, *SMALL, "--mode", "forward")
    assert status == 1
    assert {row.detail for row in rows if row.status == "FAIL"} == {
        "RuntimeError: no such instruction"
    }


# Timing


class Recorder:
    """A stopwatch whose time is the number of its calls."""

    def __init__(self):
        self.order = []

    def time(self, call):
        self.order.append(call())
        return len(self.order)

    def read(self, ticket):
        return ticket

    def synchronize(self):
        self.order.append("|")


def test_providers_take_turns():
    watch = Recorder()
    calls = {name: (lambda name=name: name) for name in "ABC"}
    timings = timing.interleaved(calls, watch, seconds=0, least=4)
    assert "".join(watch.order) == "ABC|ABC|ABC|ABC|"
    assert [timings[name].n for name in "ABC"] == [4, 4, 4]
    assert timings["A"].median_us == pytest.approx((5 + 9) / 2)
    assert timings["C"].p20_us == pytest.approx(3 + 0.6 * 4)


def test_timing_ends_after_its_seconds():
    start = time.monotonic()
    timings = timing.interleaved(
        {"sleep": lambda: time.sleep(0.01)}, timing.HostStopwatch(), seconds=0.2, least=2
    )
    assert 0.2 <= time.monotonic() - start < 5
    assert timings["sleep"].n >= 2
    assert 9e3 < timings["sleep"].p20_us <= timings["sleep"].median_us <= timings["sleep"].p80_us


def test_peak_memory_counts_results_and_temporaries():
    def call():
        a = torch.ones(1000)  # 4000 bytes
        b = a * 2  # 8000 with a
        del a
        return b + 1  # 8000 with b

    scalars = 64  # PyTorch makes tensors of Python's numbers
    assert 8000 <= peak_memory(call, CPU) <= 8000 + scalars


# A run


def test_quick_run(quick):
    folder, status, seconds = quick
    assert status == 0
    assert seconds < 240  # less than a minute alone; CI runs another test beside it
    assert (folder / "real.png").read_bytes()[1:4] == b"PNG"
    assert (folder / "generated-untrained.png").read_bytes()[1:4] == b"PNG"


def test_every_row_carries_its_conditions(quick):
    folder, _, _ = quick
    rows = results.read(folder / "results.csv")
    assert {row.level for row in rows} == {"kernel", "user", "network", "training"}
    assert {row.status for row in rows} == {"ok"}
    for row in rows:
        assert 0 < row.p20_us <= row.median_us <= row.p80_us
        assert row.n >= 3
        assert row.matrix_gflop_s > 0 and row.roofline_us > 0
        # As written, with six digits.
        assert row.of_roofline == pytest.approx(row.roofline_us / row.median_us, rel=1e-4)
        for name in ("run", "timestamp", "device", "processor", "cores", "threads", "system"):
            assert getattr(row, name), name
        assert row.torch == torch.__version__
        if row.level in ("network", "training"):
            assert row.flops > 1e9
            assert row.baseline == "reference"
        else:
            assert row.copy_gbyte_s > 0
            assert row.bytes >= (2 * 4 * 512 * 16 if row.op == "bias_act" else 1)
            assert row.flops > 0 or row.provider == "copy_"
        if row.level != "kernel":
            assert row.peak_bytes > 0 and row.memory_method
    steps = Counter(row.mode for row in rows if row.level == "training")
    assert steps == dict.fromkeys((*LEVELS["training"], "lazy iteration"), 3)
    by_provider = {row.provider: row for row in rows if row.mode == "D + R1"}
    ratio = by_provider["reference"].median_us / by_provider["automatic"].median_us
    assert by_provider["automatic"].speedup == pytest.approx(ratio, rel=1e-4)


def test_fused_call_holds_less_memory_than_stock(quick):
    needs_cpu_kernels()
    folder, _, _ = quick
    rows = results.read(folder / "results.csv")
    rows = [row for row in rows if (row.op, row.shape) == ("bias_act", "4x512x16x16")]
    peak = {(row.layout, row.mode, row.provider): row.peak_bytes for row in rows}
    size = 4 * 512 * 16 * 16 * 4
    for layout in ("nchw", "nhwc"):
        assert size <= peak[layout, "forward", "cpu"] < 1.1 * size
        assert peak[layout, "forward", "stock"] >= 2 * size


def test_commit_is_that_of_the_folder_itself(quick):
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        pytest.skip("not in a git checkout")
    commit, _ = git_commit(root)
    assert len(commit) == 40
    assert {row.commit for row in results.read(quick[0] / "results.csv")} == {commit}
    assert git_commit(root / "tests") == ("", False)


def test_list_measures_nothing(tmp_path, capsys):
    status, rows = bench(tmp_path / "out", *SMALL, "--list")
    assert status == 0
    assert rows == [] and not (tmp_path / "out").exists()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert "bias_act 4x512x4x4 float32 nchw kernel forward" in lines


@pytest.mark.parametrize(
    "argv, reason",
    [
        (["--cuda-graph"], "a CUDA graph needs a CUDA device, got --device cpu"),
        (["--mode", "CUDA graph"], "a CUDA graph needs a CUDA device, got --device cpu"),
        (["--shape", "no such shape"], "no case matches"),
    ],
)
def test_requests_that_cannot_be_served(tmp_path, capsys, argv, reason):
    status, rows = bench(tmp_path / "out", *argv)
    assert status == 2
    assert rows == []
    assert reason in capsys.readouterr().out


def test_interrupted_run_keeps_its_rows(monkeypatch, tmp_path, capsys):
    measured = []

    def measure(case, *arguments):
        if measured:
            raise KeyboardInterrupt
        measured.append(case)
        return [Row(op=case.op, mode=case.mode, provider="cpu", median_us=1.0)]

    monkeypatch.setattr(suite, "measure", measure)
    status, rows = bench(tmp_path, *SMALL)
    assert status == 130
    assert [row.mode for row in rows] == [measured[0].mode]
    assert (tmp_path / "results.html").exists()
    assert "interrupted" in capsys.readouterr().out


def test_minutes_end_a_run(monkeypatch, tmp_path, capsys):
    def measure(case, *arguments):
        time.sleep(0.05)
        return [Row(op=case.op, mode=case.mode, provider="cpu", median_us=1.0)]

    monkeypatch.setattr(suite, "measure", measure)
    status, rows = bench(tmp_path, *SMALL, "--minutes", "0.0005")
    assert status == 0
    assert len(rows) == 1
    assert (tmp_path / "results.html").exists()
    assert re.search(r"the time is up; [1-9]\d* cases are left", capsys.readouterr().out)


def test_a_case_that_raises_fails_alone(monkeypatch, tmp_path):
    class Broken(BiasAct):
        def expected(self):
            if self.case.mode == "forward":
                raise RuntimeError("no engine for this")
            return super().expected()

    monkeypatch.setitem(runner.WORKLOADS, "bias_act", Broken)
    status, rows = bench(tmp_path, *SMALL, "--mode", "forward", "backward", "--seconds", "0")
    assert status == 1
    failed = [row for row in rows if row.status == "FAIL"]
    assert {(row.mode, row.detail) for row in failed} == {
        ("forward", "RuntimeError: no engine for this")
    }
    assert "ok" in {row.status for row in rows if row.mode == "backward"}


def test_without_photographs_training_is_skipped(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    status, rows = bench(tmp_path, "--quick", "--op", "training", "--mode", "D + R1")
    assert status == 0
    assert [(row.provider, row.status) for row in rows] == [("all", "skipped")]
    assert "pip install" in rows[0].detail


def test_without_a_compiler_torch_compile_is_skipped(monkeypatch, tmp_path):
    def no_compiler(function, **kwargs):
        def call(*arguments):
            raise RuntimeError("no C++ compiler found")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    argv = [word for word in SMALL if word != "--quick"]
    status, rows = bench(tmp_path, *argv, "--mode", "forward", "double backward", "--seconds", "0")
    assert status == 0
    compiled = {row.mode: row for row in rows if row.provider == "torch.compile"}
    assert {row.status for row in compiled.values()} == {"skipped"}
    assert compiled["forward"].detail == "RuntimeError: no C++ compiler found"
    assert "91469" in compiled["double backward"].detail


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [[], ["--cuda-graph"]])
def test_quick_run_on_a_gpu(tmp_path, graph):
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA device")
    argv = ["--quick", "--op", "bias_act", "--out", str(tmp_path), "--device", "cuda", *graph]
    assert benchmarks.main(argv) == 0
    rows = results.read(tmp_path / "results.csv")
    assert {"triton", "stock", "reference"} <= {row.provider for row in rows}
    assert {row.status for row in rows} == {"ok"}


@pytest.mark.gpu
def test_launches_and_replays_of_a_network_on_a_gpu(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA device")
    argv = ["--op", "networks", "--shape", "G 256", "--dtype", "float32", "--seconds", "0"]
    assert benchmarks.main([*argv, "--out", str(tmp_path), "--device", "cuda"]) == 0
    rows = results.read(tmp_path / "results.csv")
    assert {row.mode for row in rows} == {"forward", "CUDA graph"}
    assert all(row.status == "ok" and row.launches > 0 for row in rows if row.shape[:2] == "1x")


# What is written down


def a_row(**changes) -> Row:
    values = {
        "run": "2026-01-01T00:00:00+00:00",
        "op": "bias_act",
        "shape": "4x64x128x128",
        "dtype": "float32",
        "layout": "nchw",
        "level": "user",
        "mode": "forward",
        "provider": "cpu",
        "median_us": 1234.5,
        "p20_us": 1200.0,
        "p80_us": 1300.0,
        "n": 17,
        "baseline": "stock",
        "speedup": 3.25,
        "bytes": 33554688,
        "flops": 20971520,
        "copy_gbyte_s": 30.0,
        "matrix_gflop_s": 100.0,
        "of_roofline": 0.876,
        "peak_bytes": 16777216,
        "device": "cpu",
        "processor": "A & B <CPU>",
        "threads": "2",
    }
    return Row(**{**values, **changes})


def test_rows_survive_the_file(tmp_path):
    rows = [a_row(), Row(op="training", status="FAIL", detail='a, "b"\nc')]
    file = results.ResultsFile(tmp_path / "new" / "folder")
    file.append(rows[:1])
    file.append(rows[1:])
    assert [row.cells() for row in results.read(file.path)] == [row.cells() for row in rows]
    with file.path.open(newline="") as lines:
        table = list(csv.reader(lines))
    assert table[0] == COLUMNS
    assert len(table) == 3
    assert results.read(file.path)[0].bytes == 33554688
    assert math.isnan(results.read(file.path)[1].median_us)


def test_a_file_without_newer_columns_is_read(tmp_path):
    file = results.ResultsFile(tmp_path)
    file.append([a_row()])
    with file.path.open(newline="") as lines:
        table = [
            [cell for name, cell in row.items() if name != "launches"]
            for row in csv.DictReader(lines)
        ]
    names = [name for name in COLUMNS if name != "launches"]
    with file.path.open("w", newline="") as lines:
        csv.writer(lines).writerows([names, *table])
    assert [row.cells() for row in results.read(file.path)] == [a_row().cells()]
    file.path.write_text("")
    with pytest.raises(ValueError, match=r"results\.csv"):
        results.read(file.path)


def test_a_file_with_other_columns_is_left_alone(tmp_path):
    (tmp_path / "results.csv").write_text("op,time\nx,1\n")
    file = results.ResultsFile(tmp_path)
    assert file.path.name == "results-2.csv"
    assert [path.name for path in file.avoided] == ["results.csv"]
    file.append([a_row()])
    assert results.ResultsFile(tmp_path).path.name == "results-2.csv"
    assert (tmp_path / "results.csv").read_text() == "op,time\nx,1\n"
    with pytest.raises(ValueError, match=r"results\.csv"):
        results.read(tmp_path / "results.csv")


@pytest.fixture
def results_file(tmp_path) -> Path:
    file = results.ResultsFile(tmp_path)
    (tmp_path / "real.png").write_bytes(b"\x89PNG pixels")
    rows = [
        a_row(speedup=9.99, median_us=1.0),  # superseded by the next
        a_row(),
        a_row(level="kernel", baseline="", speedup=math.nan, of_roofline=0.75),
        a_row(provider="peer:x", status="FAIL", detail="y: 1 < 2", median_us=math.nan),
        a_row(op="training", level="training", mode="D + R1", images="real.png gone.png", bytes=0),
        a_row(op="networks", level="network", variant="G 256", launches=35, bytes=0),
    ]
    file.append(rows)
    return file.path


def test_report_is_made_from_the_file_alone(results_file, capsys):
    pytest.importorskip("matplotlib")
    assert benchmarks.main(["--report", str(results_file)]) == 0
    page = results_file.with_suffix(".html").read_text()
    assert str(results_file.with_suffix(".html")) in capsys.readouterr().out
    assert "1.23 ms" in page and "3.25×" in page and "88%" in page and "75%" in page
    assert "9.99×" not in page
    assert "A &amp; B &lt;CPU&gt;" in page and "FAIL: y: 1 &lt; 2" in page
    assert "1 of 5 rows FAIL" in page
    assert "<td>35</td>" in page
    assert page.count("data:image/svg+xml;base64,") == 5
    assert page.count("data:image/png;base64,") == 1
    assert "http" not in page


def test_report_without_matplotlib(results_file, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert benchmarks.main(["--report", str(results_file)]) == 0
    assert "matplotlib is missing" in capsys.readouterr().out
    page = results_file.with_suffix(".html").read_text()
    assert "3.25×" in page and "svg" not in page


def test_report_of_what_is_no_result(tmp_path, capsys):
    (tmp_path / "other.csv").write_text("a,b\n")
    for name in ("other.csv", "missing.csv"):
        assert benchmarks.main(["--report", str(tmp_path / name)]) == 2
        assert "no report" in capsys.readouterr().out


def test_machines_have_sections_of_their_own(tmp_path):
    file = results.ResultsFile(tmp_path)
    file.append([a_row(), a_row(processor="another")])
    page = report.write(file.path)[0].read_text()
    assert page.count("<h2>") == 2


# Peers


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


FORMULA = """
import torch
def formula(x, b, alpha, gain, clamp):
    y = torch.nn.functional.leaky_relu(x + b.reshape([1, -1] + [1] * (x.ndim - 2)), alpha) * gain
    return y if clamp is None else y.clamp(-clamp, clamp)
"""


UPFIRDN2D = """
from stylegan_fast.reference.upfirdn2d import upfirdn2d as formula
"""


def torch_utils_family(root: Path, name: str, slope: float = 0.2, head: str = "") -> Path:
    """A checkout with the interface of the originals' ops."""
    return write_tree(
        root / name,
        {
            "torch_utils/__init__.py": "",
            "torch_utils/ops/__init__.py": "",
            "torch_utils/misc.py": FORMULA,
            "torch_utils/ops/bias_act.py": head
            + f"""
misc = None
def bias_act(x, b=None, dim=1, act='linear', alpha=None, gain=None, clamp=None, impl='cuda'):
    global misc
    if misc is None:  # as an extension is compiled at the first call
        from .. import misc
    assert (act, dim, impl) == ('lrelu', 1, 'ref')
    return misc.formula(x, b, {slope} if alpha is None else alpha, 2 ** 0.5, clamp)
""",
            "torch_utils/ops/upfirdn2d.py": UPFIRDN2D
            + """
def upfirdn2d(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1, impl='cuda'):
    assert impl == 'ref' and len(up) == len(down) == 2 and len(padding) == 4
    return formula(x, f, up, down, padding, flip_filter, gain)
""",
        },
    )


def op_family(root: Path, name: str) -> Path:
    """A checkout that compiles extensions when it is imported."""
    return write_tree(
        root / name,
        {
            "op/__init__.py": """
from torch.utils.cpp_extension import load
from .formula import formula
extension = load('fused', sources=['nowhere.cpp'])
def fused_leaky_relu(input, bias=None, negative_slope=0.2, scale=2 ** 0.5):
    return formula(input, bias, negative_slope, scale, None)
from .fir import formula as resample
def upfirdn2d(input, kernel, up=1, down=1, pad=(0, 0)):
    assert kernel.ndim == 2
    return resample(input, kernel, up, down, [*pad, *pad])
""",
            "op/formula.py": FORMULA,
            "op/fir.py": UPFIRDN2D,
        },
    )


def test_peers_of_both_families_are_timed(tmp_path):
    checkouts = [
        torch_utils_family(tmp_path, "right"),
        torch_utils_family(tmp_path, "wrong", slope=0.1),
        op_family(tmp_path, "other"),
    ]
    argv = [word for path in checkouts for word in ("--peer", str(path))]
    status, rows = bench(tmp_path / "out", *SMALL, "--mode", "double backward", *argv)
    found = {row.provider: row for row in rows if row.provider.startswith("peer:")}
    assert found["peer:right"].status == found["peer:other"].status == "ok"
    assert found["peer:right"].speedup > 0
    assert found["peer:wrong"].status == "FAIL"
    assert status == 1
    left = {name.split(".")[0] for name in sys.modules} & {"torch_utils", "op", "pkg_resources"}
    assert left <= {"pkg_resources"}
    assert not any(str(path) in sys.path for path in checkouts)


@pytest.mark.parametrize("variant", ["down2 12-tap crop", "up2 + add", "after conv + epilogue"])
def test_resampling_of_peers(tmp_path, variant):
    checkouts = [torch_utils_family(tmp_path, "right"), op_family(tmp_path, "other")]
    wrong = torch_utils_family(tmp_path, "wrong")
    ops = wrong / "torch_utils" / "ops" / "upfirdn2d.py"
    ops.write_text(ops.read_text().replace("flip_filter, gain)", "flip_filter, gain * 1.001)"))
    found = tuple(peers.load(str(path), CPU) for path in (*checkouts, wrong))
    case = Case(
        "upfirdn2d", "", (2, 5, 24, 19), "float32", "nchw", "user", "forward+backward", variant
    )
    work = Upfirdn2d(case, Session(CPU, tmp_path, found, compiles=False))
    expected = work.expected()
    gates = {p.name: check(p.call(), expected)[1] for p in work.providers() if "peer" in p.name}
    assert gates["peer:right"] == gates["peer:other"] == ""
    assert gates["peer:wrong"] != ""


def test_peer_without_upfirdn2d(tmp_path):
    checkout = torch_utils_family(tmp_path, "old")
    (checkout / "torch_utils" / "ops" / "upfirdn2d.py").unlink()
    peer = peers.load(str(checkout), CPU)
    assert peer.bias_act is not None and peer.problem == ""
    assert "No module named" in peer.upfirdn2d_problem
    work = resampling(tmp_path, "up2")
    work.session = Session(CPU, tmp_path, (peer,), compiles=False)
    (provider,) = [p for p in work.providers() if p.name == "peer:old"]
    assert provider.call is None and provider.detail == peer.upfirdn2d_problem


def test_peer_that_pads_axes_alike(tmp_path):
    peer = peers.load(str(op_family(tmp_path, "other")), CPU)
    f, fir = VARIANTS["blur 1x61"]
    with pytest.raises(ValueError, match="pads both axes alike"):
        peer.upfirdn2d(torch.ones(1, 1, 70, 70), f, fir)


def test_peer_that_needs_pkg_resources(tmp_path):
    head = "from pkg_resources import parse_version as v\nassert v('2.4') < v('2.13')"
    peer = peers.load(str(torch_utils_family(tmp_path, "later", head=head)), CPU)
    assert peer.problem == ""


@pytest.mark.parametrize(
    "files, message",
    [
        ({"README": ""}, "neither"),
        ({"torch_utils/ops/bias_act.py": "import no_such_module"}, "No module named"),
        ({"torch_utils/ops/bias_act.py": "bias_act = 3"}, "TypeError"),
        ({"op/__init__.py": "raise OSError('no compiler')"}, "OSError: no compiler"),
    ],
)
def test_peer_that_cannot_be_imported(tmp_path, files, message):
    checkout = write_tree(tmp_path / "peer", files)
    status, rows = bench(
        tmp_path / "out", *SMALL, "--mode", "forward", "--peer", str(checkout), "--dtype", "float32"
    )
    (row,) = [row for row in rows if row.provider == "peer:peer"]
    assert status == 0
    assert row.status == "skipped"
    assert message in row.detail


def test_peer_that_is_not_there(tmp_path):
    assert "no such folder" in peers.load(str(tmp_path / "missing"), CPU).problem


NETWORKS = {
    "networks_stylegan2": "from stylegan_fast.models.stylegan2 import Discriminator, Generator\n",
    "networks": """
from stylegan_fast.models import stylegan2
from stylegan_fast.models.stylegan2 import Discriminator
def Generator(z_dim, c_dim, w_dim, img_resolution, img_channels, synthesis_kwargs={}):
    size = (z_dim, c_dim, w_dim, img_resolution, img_channels)
    return stylegan2.Generator(*size, **synthesis_kwargs)
""",
}


@pytest.mark.parametrize("module", NETWORKS)
def test_networks_of_a_peer_take_our_weights(tmp_path, monkeypatch, module):
    narrow = {name: {**width, "channel_max": 8} for name, width in end_to_end.WIDTHS.items()}
    monkeypatch.setattr(end_to_end, "WIDTHS", narrow)
    checkout = torch_utils_family(tmp_path, "peer")
    write_tree(checkout, {f"training/{module}.py": NETWORKS[module]})
    argv = ("--quick", "--op", "training", "--mode", "D + R1", "--seconds", "0")
    status, rows = bench(tmp_path / "out", *argv, "--peer", str(checkout))
    assert status == 0
    found = {row.provider: row for row in rows}
    assert found["peer:peer"].status == "ok"
    assert found["peer:peer"].gate_error < 1


def test_networks_of_another_family_are_left_out(tmp_path):
    peer = peers.load(str(op_family(tmp_path, "other")), CPU)
    assert peer.networks is None and "differ" in peer.networks_problem


SWAPPED = {
    "op/__init__.py": """
from .fused_act import fused_leaky_relu
from .upfirdn2d import upfirdn2d
""",
    "op/conv2d_gradfix.py": "",
    "op/fused_act.py": """
from torch import nn
from torch.utils.cpp_extension import load
extension = load('fused', sources=['nowhere.cpp'])
def fused_leaky_relu(input, bias=None, negative_slope=0.2, scale=2 ** 0.5):
    y = input if bias is None else input + bias.reshape([1, -1] + [1] * (input.ndim - 2))
    return nn.functional.leaky_relu(y, SLOPE) * scale
""",
    "op/upfirdn2d.py": "def upfirdn2d(input, kernel, up=1, down=1, pad=(0, 0)): pass",
    "model.py": """
import torch
from torch import nn
from op import fused_leaky_relu

class ToRGB(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = ModulatedConv2d()
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))

    def forward(self, input, style, skip=None):
        return self.conv(input, style) + self.bias

class ModulatedConv2d(nn.Module):
    demodulate = upsample = downsample = False
    scale = 5 ** -0.5

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 3, 5, 1, 1))
        self.modulation = nn.Linear(128, 5)

    def forward(self, input, style):
        styles = self.modulation(style)[:, None]
        weight = self.scale * self.weight[:, :, :, 0, 0] * styles
        return torch.einsum('noi,nihw->nohw', weight, input)

class Generator(nn.Module):
    def __init__(self, size, style_dim, n_mlp, channel_multiplier):
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, 5, size, size))
        self.rgb = ToRGB()

    def forward(self, styles, randomize_noise):
        x = fused_leaky_relu(self.input, torch.ones(5)).expand(len(styles[0]), -1, -1, -1)
        return self.rgb(x, styles[0]), None

class Discriminator(nn.Module):
    def __init__(self, size, channel_multiplier):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.unused = nn.Parameter(torch.randn(3, 3))

    def forward(self, image):
        return fused_leaky_relu(image * 1.5, self.weight).square().mean([1, 2, 3])[:, None]
""",
}


def swapped_family(root: Path, name: str, slope: float = 0.2) -> Path:
    """A checkout with the layout of rosinality's, one layer of which can be converted."""
    write_tree(root / name, SWAPPED)
    act = root / name / "op" / "fused_act.py"
    act.write_text(act.read_text().replace("SLOPE", str(slope)))
    return root / name


SWAP = ("--quick", "--op", "swap", "--seconds", "0")


@pytest.mark.parametrize("mode", LEVELS["repository"])
def test_a_repository_with_the_swap_beside_itself(tmp_path, mode):
    checkout = swapped_family(tmp_path, "theirs")
    status, rows = bench(tmp_path / "out", *SWAP, "--mode", mode, "--peer", str(checkout))
    assert status == 0
    assert [row.provider for row in rows] == ["shipped", "swap", "swap + convert"]
    for row in rows:
        assert (row.status, row.variant, row.mode) == ("ok", "theirs StyleGAN2", mode)
        assert row.gate_error < 1
        assert row.baseline == "shipped"
        assert row.median_us > 0
    assert rows[0].speedup == 1
    assert rows[2].detail == "converted: ModulatedConv2d, ToRGB"
    assert not swap.report().left
    assert not any(name.split(".")[0] in ("op", "model") for name in sys.modules)
    assert sys.meta_path == [f for f in sys.meta_path if "stylegan_fast" not in type(f).__module__]


def test_a_repository_that_computes_something_else_is_not_timed(tmp_path):
    checkout = swapped_family(tmp_path, "theirs", slope=0.1)
    status, rows = bench(tmp_path / "out", *SWAP, "--mode", "G forward", "--peer", str(checkout))
    assert status == 1
    assert {row.provider: row.status for row in rows} == {
        "shipped": "FAIL",
        "swap": "ok",
        "swap + convert": "ok",
    }


@pytest.mark.parametrize(
    "file, head, shipped, swapped",
    [
        ("op/fused_act.py", "raise RuntimeError('no compiler')\n", "skipped", "ok"),
        ("model.py", "raise RuntimeError('too old')\n", "skipped", "skipped"),
        ("model.py", "import op.fused_act\nassert op.fused_act.SHIPPED\n", "ok", "FAIL"),
    ],
)
def test_a_repository_that_does_not_run(tmp_path, file, head, shipped, swapped):
    checkout = swapped_family(tmp_path, "theirs")
    with (checkout / "op" / "fused_act.py").open("a") as act:
        act.write("SHIPPED = True\n")
    (checkout / file).write_text(head + (checkout / file).read_text())
    _, rows = bench(tmp_path / "out", *SWAP, "--mode", "G forward", "--peer", str(checkout))
    found = {row.provider: row.status for row in rows}
    assert (found["shipped"], found["swap"]) == (shipped, swapped)


def test_the_networks_of_a_checkout_are_told_by_its_files(tmp_path):
    files = {
        "ada": ["training/networks.py"],
        "sg3": ["training/networks_stylegan2.py", "training/networks_stylegan3.py"],
        "r3": ["R3GAN/Networks.py", "training/networks.py"],
        "psp": ["models/stylegan2/model.py", "models/stylegan2/op/fused_act.py"],
        "none": ["model.py"],
    }
    found = {}
    for name, paths in files.items():
        write_tree(tmp_path / name, dict.fromkeys(paths, ""))
        found[name] = {case.variant for case in swap_benchmark.cases(str(tmp_path / name))}
    assert found == {
        "ada": {"ada StyleGAN2"},
        "sg3": {"sg3 StyleGAN2", "sg3 StyleGAN3-T"},
        "r3": {"r3 R3GAN"},
        "psp": {"psp StyleGAN2"},
        "none": set(),
    }


# Choices


def test_other_kernels_than_the_automatic_ones_run_whole_networks(monkeypatch):
    assert workload.alternatives("cpu", torch.float32) == []
    refused = {"cpu": "it runs on cpu tensors"}
    monkeypatch.setattr(backends, "refusal", lambda name, *rest: refused.get(name))
    assert workload.alternatives("cuda", torch.float32) == ["triton"]


def test_tune_goes_on_after_a_layer_that_fails(tmp_path, monkeypatch, capsys):
    needs_cpu_kernels()
    monkeypatch.setenv("STYLEGAN_FAST_CACHE", str(tmp_path / "cache"))
    choice.table.cache_clear()
    build, broken = layer_benchmark.build, []

    def build_all_but_one(layer, module):
        if not broken:
            broken.append(layer)
            raise RuntimeError("cannot be compiled")
        return build(layer, module)

    monkeypatch.setattr(layer_benchmark, "build", build_all_but_one)
    argv = ["--tune", "--quick", "--mode", "forward", "--seconds", "0", "--out", str(tmp_path)]
    assert benchmarks.main(argv) == 1
    said = capsys.readouterr().out
    assert "RuntimeError: cannot be compiled" in said
    assert "cpu forward float32" in said
    choice.table.cache_clear()


def test_tune_writes_what_the_library_reads(tmp_path, monkeypatch, capsys):
    needs_cpu_kernels()
    monkeypatch.setenv("STYLEGAN_FAST_CACHE", str(tmp_path / "cache"))
    choice.table.cache_clear()
    argv = ["--tune", "--quick", "--mode", "forward", "--seconds", "0", "--out", str(tmp_path)]
    assert benchmarks.main(argv) == 0
    said = capsys.readouterr().out
    measured = _store.read(choice.FILE, choice.machine(CPU))
    assert f"{len(measured)} choices" in " ".join(said.split())
    assert all(key.startswith("cpu forward float32") for key in measured)
    assert set(measured.values()) <= {choice.KERNEL, choice.PYTORCH}
    assert choice.table(CPU) == measured
    assert not list(tmp_path.glob("*.csv"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STYLEGAN_FAST_CACHE", str(tmp_path / "file"))
    choice.table.cache_clear()
    assert benchmarks.main(argv) in (0, 2)  # 0 where no choice was worth keeping
    choice.table.cache_clear()
