"""The training loop on tiny networks: what a step does, resuming, several processes, failures."""

import dataclasses
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from stylegan_fast import checkpoints
from stylegan_fast.__main__ import main
from stylegan_fast.models import stylegan2
from stylegan_fast.testing import assert_matches, tolerance
from stylegan_fast.training import data, lock, loop, snapshots
from stylegan_fast.training.config import TrainingConfig, micro_batch, preset
from stylegan_fast.training.distributed import World
from stylegan_fast.training.logs import Logs, read, save_grid
from stylegan_fast.training.loop import NonFiniteLossError, Trainer
from stylegan_fast.training.networks import Adapter, build

TINY = {
    "resolution": 8, "z_dim": 6, "w_dim": 5, "mapping_layers": 2, "channel_base": 64,
    "channel_max": 8, "mbstd_group": 2, "batch": 4, "micro_batch": 2, "g_reg_interval": 2,
    "d_reg_interval": 2, "r1_gamma": 1.0, "kimg": 0.016, "tick_kimg": 0.008, "snapshot_ticks": 1,
    "ema_kimg": 0.02, "workers": 0,
}  # fmt: skip


class Pictures(Dataset):
    """Nine random images of two classes."""

    img_channels, c_dim, name, enlarged = 3, 2, "pictures", 0

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8, generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], torch.eye(2)[index % 2]


def trainer(out, resume=None, **changes):
    config = TrainingConfig(**{**TINY, **changes})
    return Trainer(config, out, dataset=Pictures(), resume=resume, show=False)


def trained(out, resume=None, **changes):
    run = trainer(out, resume, **changes)
    run.train()
    return run


def weights(run):
    networks = {"g": run.g, "d": run.d, "g_ema": run.g_ema}
    return {
        f"{name}.{key}": value
        for name, network in networks.items()
        for key, value in network.state_dict().items()
    }


def assert_same(a, b):
    """Two runs ended alike, bit for bit: weights, optimisers, everything a checkpoint holds."""
    ours, theirs = weights(a), weights(b)
    assert list(ours) == list(theirs)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    saved = [snapshots.load(snapshots.complete(run.out)[-1]) for run in (a, b)]
    (tensors, state), (other_tensors, other_state) = saved
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, other_tensors[name]), name
    assert {**state, "config": 0} == {**other_state, "config": 0}


def logged(run):
    """The rows of log.csv without the times."""
    rows = read(run.out / "log.csv")
    return [{k: v for k, v in row.items() if k != "seconds_per_kimg"} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Four steps."""
    torch.manual_seed(99)  # of no influence
    return trained(tmp_path_factory.mktemp("run"))


@pytest.fixture
def pictures(tmp_path):
    """A folder of the images of `Pictures`."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, image in enumerate(Pictures().images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    return folder


def arguments(pictures, out, *more, config="stylegan2-8", **changes):
    """A command line that trains tiny networks."""
    options = [f"--config={config}", f"--data={pictures}", f"--outdir={out}", "--device=cpu"]
    for name, value in {**TINY, **changes}.items():
        if name != "resolution":
            options.append(f"--{name.replace('_', '-')}={value}")
    return ["train", *options, *more]


def command(*args, **kwargs):
    return main(arguments(*args, **kwargs))


# A run


def test_a_run_learns_logs_and_saves(finished):
    start = weights(trainer(finished.out.parent / "never"))
    end = weights(finished)
    moved = [name for name in start if not torch.equal(start[name], end[name])]
    fixed = {name for name in start if "resample_filter" in name or "noise_const" in name}
    assert set(moved) == set(start) - fixed
    rows = logged(finished)
    assert [int(row["images"]) for row in rows] == [8, 16]
    for row in rows:
        for name in ("loss_g", "loss_d", "r1", "path_length", "path_length_mean", "real_sign"):
            assert np.isfinite(float(row[name])), name
    assert [path.name for path in snapshots.complete(finished.out)] == [
        "checkpoint-000000.008",
        "checkpoint-000000.016",
    ]
    for name in ("reals-000000.000", "fakes-000000.000", "fakes-000000.016"):
        assert Image.open(finished.out / f"{name}.png").size == (64, 64)
    stored = checkpoints.load_networks(snapshots.complete(finished.out)[-1] / snapshots.NETWORKS)
    for key, value in stored["G_ema"].state_dict().items():
        assert torch.equal(value, end[f"g_ema.{key}"]), key


def test_a_run_is_reproducible(finished, tmp_path):
    again = trained(tmp_path)
    assert_same(finished, again)
    assert logged(finished) == logged(again)
    for grid in finished.out.glob("*.png"):
        assert grid.read_bytes() == (tmp_path / grid.name).read_bytes()


def test_another_seed_is_another_run(finished, tmp_path):
    other = weights(trained(tmp_path, seed=1))
    assert not torch.equal(
        other["g.synthesis.b8.conv0.weight"], finished.g.synthesis.b8.conv0.weight
    )


def test_gradients_are_the_mean_over_micro_batches(tmp_path):
    run = trainer(tmp_path)
    seen = []
    run.optimizers["d"].step = lambda *a, **k: seen.append(run.d.b4.out.bias.grad.clone())
    run._update("d", "d", lambda k: ((k + 1) * run.d.b4.out.bias.sum(), {}))
    assert [gradient.tolist() for gradient in seen] == [[1.5]]


def test_the_mean_of_w_follows_all_samples_of_a_step(tmp_path):
    run = trainer(tmp_path, w_avg_beta=0.75, style_mixing=0.0)
    means = []
    for k in range(2):
        run._seed("g", k)
        means.append(run._styles(torch.zeros(2, 0))[1].mean(dim=0))
    run.train_step(run.batches())
    expected = 0.25 * (means[0] + means[1]).double() / 2
    assert_matches(run.g.mapping.w_avg, expected, reduction=8)
    assert torch.equal(run.g_ema.mapping.w_avg, run.g.mapping.w_avg)


STYLEGAN3 = {"network": "stylegan3-t", "synthesis_layers": 3, "style_mixing": 0.0}


def test_a_run_of_stylegan3(tmp_path):
    changes = {**STYLEGAN3, "blur_sigma": 1.5, "blur_kimg": 0.012}
    run = trainer(tmp_path / "whole", **changes)
    start = {name: value.clone() for name, value in weights(run).items()}
    run.train()
    for row in logged(run):
        for name in ("loss_g", "loss_d", "r1", "path_length"):
            assert np.isfinite(float(row[name])), name
    end = weights(run)
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    fixed = ("_filter", "input.transform", "input.freqs", "input.phases")
    assert moved == {name for name in start if not name.endswith(fixed)}
    for name, value in end.items():
        if name.endswith(("w_avg", "magnitude_ema")) and name.startswith("g."):
            assert torch.equal(value, end[f"g_ema.{name[2:]}"]), name

    trained(tmp_path / "parts", kimg=0.008, **changes)
    assert_same(run, trained(tmp_path / "parts", resume="latest", **changes))


def test_magnitudes_follow_all_samples_of_a_step(tmp_path):
    """Every micro-batch moves them from where they were, the step to the mean."""
    run = trainer(tmp_path, **STYLEGAN3)
    for average in run._magnitudes:
        average.fill_(3)
    layer = run.g.synthesis.L1_28_8
    beta = 0.5 ** (4 / 20_000)
    assert layer.magnitude_ema_beta == beta
    layer.magnitude_ema_beta = 0.5
    seen = []
    layer.register_forward_pre_hook(
        lambda layer, args, kwargs: seen.append((kwargs, args[0].detach().square().mean())),
        with_kwargs=True,
    )
    run.train_step(run.batches())
    measured = [mean for kwargs, mean in seen if kwargs.get("update_emas")]
    assert len(measured) == 2
    assert len(seen) > 2
    expected = 0.5 * 3 + 0.5 * torch.stack(measured).double().mean()
    assert_matches(layer.magnitude_ema, expected, reduction=8)
    assert torch.equal(run.g_ema.synthesis.L1_28_8.magnitude_ema, layer.magnitude_ema)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_style_mixing_joins_two_latents_at_a_crossover(tmp_path, share):
    run = trainer(tmp_path, style_mixing=share)
    ws, w = run._styles(torch.zeros(7, 0))
    same = (ws == w[:, None]).all(dim=2)
    assert same[:, 0].all()
    assert (same.int().diff(dim=1) <= 0).all()  # never back to the first latent
    assert same.all() == (share == 0)
    assert same[:, -1].any() == (share == 0)


# Resuming


def test_resuming_is_bit_exact(finished, tmp_path):
    first = trained(tmp_path, kimg=0.008)
    assert first.images_seen == 8
    second = trained(tmp_path, resume="latest")
    assert_same(finished, second)
    assert logged(finished) == logged(second)


def test_a_stop_in_the_middle_of_a_tick_resumes_bit_exactly(finished, tmp_path):
    run = trainer(tmp_path)
    step = run.train_step

    def stopping(batches):
        if run.step == 2:
            run.stop()
        return step(batches)

    run.train_step = stopping
    run.train()
    assert run.stopped and run.images_seen == 12
    second = trained(tmp_path, resume=str(tmp_path / "checkpoint-000000.012"))
    assert_same(finished, second)
    assert logged(finished) == logged(second)


def test_a_run_killed_while_saving_resumes_bit_exactly(finished, tmp_path):
    script = f"""
        import os, signal, sys
        sys.path[:0] = [{str(Path(__file__).parent)!r}]
        from pathlib import Path
        import test_training as t
        rename = Path.rename
        def killing(self, target):
            if target.name == "checkpoint-000000.016":
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, target)
        Path.rename = killing
        t.trained(Path({str(tmp_path)!r}))
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in snapshots.complete(tmp_path)] == ["checkpoint-000000.008"]
    assert list(tmp_path.glob(".unfinished-*"))
    assert len(logged(trainer(tmp_path, resume="latest"))) == 2  # of the future that was lost
    second = trained(tmp_path, resume="latest")
    assert_same(finished, second)
    assert logged(finished) == logged(second)
    assert not list(tmp_path.glob(".unfinished-*"))


def test_transfer_from_a_file_takes_the_weights_only(finished, tmp_path):
    file = snapshots.complete(finished.out)[-1] / snapshots.NETWORKS
    run = trainer(tmp_path, resume=str(file), batch=2, seed=3)
    assert run.step == run.images_seen == 0
    assert not run.optimizers["g"].state
    for name, value in weights(finished).items():
        assert torch.equal(weights(run)[name], value), name


def test_transfer_from_a_generator_alone(finished, tmp_path):
    checkpoints.save_networks(tmp_path / "g.safetensors", {"G_ema": finished.g_ema})
    run = trainer(tmp_path / "run", resume=str(tmp_path / "g.safetensors"))
    fresh = trainer(tmp_path / "fresh")
    for network in (run.g, run.g_ema):
        for key, value in finished.g_ema.state_dict().items():
            assert torch.equal(network.state_dict()[key], value), key
    assert torch.equal(run.d.b4.out.weight, fresh.d.b4.out.weight)


def test_resuming_another_architecture_names_the_fields(finished, tmp_path):
    with pytest.raises(ValueError, match=r"channel_max=8 instead of 4") as error:
        trainer(finished.out, resume="latest", channel_max=4)
    assert "channel_base" not in str(error.value)
    with pytest.raises(ValueError, match="img_resolution=8 instead of 16"):
        trainer(tmp_path, resume=str(finished.out), resolution=16)


def test_transfer_from_other_widths_by_default_names_the_tensors(tmp_path):
    g = stylegan2.Generator(6, 0, 5, 8, 3, {"num_layers": 2}, channel_max=8)
    checkpoints.save_networks(tmp_path / "g.safetensors", {"G": g})
    with pytest.raises(ValueError, match=r"const is \[8, 4, 4\] instead of \[4, 4, 4\]"):
        trainer(tmp_path / "run", resume=str(tmp_path / "g.safetensors"), channel_base=16)


def test_a_folder_with_a_run_is_not_written_over(finished):
    message = r"holds a run up to checkpoint-000000\.016: resume it \(--resume latest\), or use"
    for resume in (None, str(finished.out / "checkpoint-000000.008")):
        with pytest.raises(FileExistsError, match=message):
            trainer(finished.out, resume=resume)


def test_a_damaged_checkpoint_is_named(finished, tmp_path):
    folder = shutil.copytree(finished.out, tmp_path / "copy") / "checkpoint-000000.016"
    tensors = (folder / snapshots.TENSORS).read_bytes()
    state = json.loads((folder / snapshots.STATE).read_text())
    damages = {
        snapshots.TENSORS: tensors[: len(tensors) // 2],
        snapshots.STATE: json.dumps(state)[:-9].encode(),
        snapshots.NETWORKS: b"",
    }
    for name, content in damages.items():
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        with pytest.raises(checkpoints.CheckpointError, match=r"checkpoint-000000\.016"):
            trainer(tmp_path / "other", resume=str(folder))
        (folder / name).write_bytes(good)


@pytest.mark.parametrize(
    "edit, message",
    [
        ({"step": None}, r"state\.json: not the state of a run: step is no int"),
        ({"images_seen": "16"}, "images_seen is no int"),
        ({"history": [1]}, "history is no dict"),
        ({"history": {"loss_g": ["0.5"]}}, "loss_g is no list of numbers"),
        ({"signs": {}}, "signs is no list"),
        ({"scaler": 1}, "scaler is no dict"),
        ({"config": []}, "config is no dict"),
        ({"config": {**TINY, "batch": "4"}}, "batch='4' must be of type int"),
        ({"config": {**TINY, "batch": True}}, "batch=True must be of type int"),
        ({"config": {**TINY, "mirror": 1}}, "mirror=1 must be of type bool"),
        ({"config": {**TINY, "kimg": [1]}}, r"kimg=\[1\] must be of type float"),
        ({"config": {**TINY, "data": None}}, "data=None must be of type str"),
    ],
)
def test_an_edited_state_is_one_line(edit, message, finished, tmp_path, capsys):
    folder = shutil.copytree(finished.out, tmp_path / "copy")
    path = folder / "checkpoint-000000.016" / snapshots.STATE
    path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    assert main(["train", "--resume", "latest", "--outdir", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line


def test_a_state_that_is_none(finished, tmp_path):
    folder = shutil.copytree(finished.out, tmp_path / "copy") / "checkpoint-000000.016"
    (folder / snapshots.STATE).write_text("[" * 5000 + "]" * 5000)
    with pytest.raises(checkpoints.CheckpointError, match="not a checkpoint of a run"):
        trainer(tmp_path / "other", resume=str(folder))
    (folder / snapshots.STATE).write_text("3")
    with pytest.raises(checkpoints.CheckpointError, match=r"state\.json: not the state of a run"):
        trainer(tmp_path / "other", resume=str(folder))


HOLD = """
import sys, pathlib, stylegan_fast.training.lock as lock
with lock.locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_run_in_a_folder_at_a_time(pictures, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout.readline() == b"held\n"
        assert command(pictures, out) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "another process is training there" in line
        holder.kill()
    assert command(pictures, out) == 0


def test_where_there_are_no_locks_training_goes_on(tmp_path, monkeypatch):
    def none(descriptor):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "_lock", none)
    with lock.locked(tmp_path):
        pass


@pytest.mark.parametrize("damage", [b"12,0.5", b"\0\0\0\0\n", b",1\n", b"\xff\xfe\n"])
def test_a_damaged_log_does_not_stop_a_run(damage, tmp_path):
    header = b"images,loss_g\n8,0.25\n"
    (tmp_path / "log.csv").write_bytes(header + damage)
    with Logs(tmp_path, ["loss_g"], 10, 20, show=False):
        assert (tmp_path / "log.csv").read_bytes() == header


def test_old_checkpoints_are_removed_where_asked(tmp_path):
    trained(tmp_path, tick_kimg=0.004, keep=2)
    names = [path.name for path in snapshots.complete(tmp_path)]
    assert names == ["checkpoint-000000.012", "checkpoint-000000.016"]


# Several processes


def test_micro_batches_are_dealt_in_turn():
    def stream(rank, size):
        order = loop._Dealt(9, seed=3, start=4)
        order.deal(2, World(rank, size))
        indices = iter(order)
        return [next(indices) for _ in range(12 // size)]

    whole, first, second = stream(0, 1), stream(0, 2), stream(1, 2)
    assert first == [*whole[0:2], *whole[4:6], *whole[8:10]]
    assert second == [*whole[2:4], *whole[6:8], *whole[10:12]]


def test_two_processes_make_the_weights_of_one(pictures, tmp_path):
    assert main(arguments(pictures, tmp_path / "one")) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*torchrun, "-m", "stylegan_fast", *arguments(pictures, tmp_path / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    one, two = (
        checkpoints.load_networks(tmp_path / name / "checkpoint-000000.016/networks.safetensors")
        for name in ("one", "two")
    )
    for name, network in one.items():
        for key, value in network.state_dict().items():
            assert_matches(two[name].state_dict()[key], value, reduction=4, name=key)
    rows = [read(tmp_path / name / "log.csv") for name in ("one", "two")]
    assert [row["images"] for row in rows[0]] == [row["images"] for row in rows[1]] == ["8", "16"]
    for ours, theirs in zip(*rows):
        for name in ("loss_g", "loss_d", "r1", "path_length"):
            scale = max(1.0, abs(float(ours[name])))
            assert float(theirs[name]) == pytest.approx(
                float(ours[name]), abs=tolerance(torch.float32, 4, scale)
            ), name


# Options


@pytest.mark.slow
def test_overfitting_draws_the_samples_to_the_data(tmp_path):
    """The mean distance from a sample to the nearest of eight crops falls to a third."""
    dataset = data.ImageDataset(data.example(tmp_path / "crops.zip", 32, count=8), 32)
    config = preset(
        "stylegan2-32", batch=8, z_dim=32, w_dim=32, mapping_layers=2, channel_base=256,
        channel_max=64, g_lr=0.005, d_lr=0.005, r1_gamma=1.0, path_length_weight=0.0,
        style_mixing=0.0, ema_kimg=0.5, workers=0,
    )  # fmt: skip
    run = Trainer(config, tmp_path, dataset=dataset, show=False)
    crops = torch.stack([dataset[i][0] for i in range(8)]).flatten(1) / 127.5 - 1

    def distance():
        return torch.cdist(run.samples().flatten(1), crops).amin(dim=1).mean().item()

    before = distance()
    batches = run.batches()
    for _ in range(250):
        run.train_step(batches)
    assert distance() < before / 3


@pytest.mark.parametrize(
    "network, precision, channels_last",
    [
        ("stylegan", "bfloat16", True),
        ("stylegan", "float16", False),
        ("stylegan2", "bfloat16", False),
        ("stylegan2", "float16", True),
        ("stylegan3-t", "bfloat16", False),
        ("stylegan3-r", "float16", True),
    ],
)
def test_mixed_precision_keeps_weights_in_float32(tmp_path, network, precision, channels_last):
    run = trainer(
        tmp_path,
        network=network,
        precision=precision,
        channels_last=channels_last,
        synthesis_layers=3,
    )
    layer = run.d.blocks[0][0] if network == "stylegan" else run.d.b8.conv0
    before = layer.weight.clone()
    seen = []
    layer.register_forward_hook(lambda module, args, out: seen.append(out))
    if network.startswith("stylegan3"):
        layers = [getattr(run.g.synthesis, name) for name in run.g.synthesis.layer_names]
        layers[1].register_forward_hook(lambda module, args, out: seen.append(out))
    losses = run.train_step(run.batches())
    assert all(np.isfinite(value) for value in losses.values())
    assert {x.dtype for x in seen} == {getattr(torch, precision)}
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen) == channels_last
    assert {value.dtype for value in weights(run).values()} == {torch.float32}
    assert not torch.equal(before, layer.weight)
    assert run.scaler.is_enabled() == (precision == "float16")


def test_float16_resumes_with_the_scale_of_its_losses(tmp_path):
    half = {"precision": "float16", "tick_kimg": 0.004}
    whole = trained(tmp_path / "whole", **half)
    trained(tmp_path / "parts", kimg=0.008, **half)
    assert_same(whole, trained(tmp_path / "parts", resume="latest", **half))
    assert whole.scaler.get_scale() > 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("network", ["stylegan", "stylegan2"])
def test_commands_on_a_gpu(pictures, tmp_path, network, precision):
    run, images = tmp_path / "run", tmp_path / "images"
    options = ["--device=cuda", "--augment=ada", *(["--channels-last"] * (precision != "float32"))]
    first = {"config": f"{network}-8", "precision": precision, "kimg": 0.008}
    assert command(pictures, run, *options, **first) == 0
    more = ["--device=cuda", "--resume=latest", "--kimg=0.016"]
    assert main(["train", f"--outdir={run}", *more]) == 0
    rows = read(run / "log.csv")
    assert len(rows) == 2
    assert all(math.isfinite(float(row[name])) for row in rows for name in ("loss_g", "loss_d"))
    generate = ["generate", f"--network={run}", f"--outdir={images}", "--seeds=3", "--device=cuda"]
    assert main(generate) == 0
    (image,) = images.glob("*.png")
    assert Image.open(image).size == (8, 8)


def test_stylegan_grows_while_it_trains(tmp_path):
    growing = {"progressive": True, "fade_kimg": 0.004, "resolution": 16, "kimg": 0.012}
    config = TrainingConfig(**{**TINY, **growing, "network": "stylegan"})
    images = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8)
    dataset = Pictures()
    dataset.images = images
    run = Trainer(config, tmp_path, dataset=dataset, show=False)
    sizes = []
    run.d.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[2]))
    batches = run.batches()
    unused = run.g.synthesis.to_rgbs[2].weight.clone()
    run.train_step(batches)
    assert set(sizes) == {8} and torch.equal(run.g.synthesis.to_rgbs[2].weight, unused)
    sizes.clear()
    run.train_step(batches)  # begins to fade in: the share of 16×16 is 0
    run.train_step(batches)
    assert set(sizes) == {16} and not torch.equal(run.g.synthesis.to_rgbs[2].weight, unused)
    assert run.samples().shape == (64, 3, 16, 16)


def test_adaptive_augmentation_follows_the_signs_and_resumes(tmp_path):
    ada = {"augment": "ada", "augment_p": 0.5, "ada_interval": 3, "ada_kimg": 0.024}
    whole = trained(tmp_path / "whole", **ada)
    signs = [float(row["real_sign"]) for row in read(whole.out / "log.csv")]
    assert abs(abs(whole.augment.p.item() - 0.5) - 0.5) < 1e-6, "12 of 24 images change p by 0.5"
    assert len(whole._signs) == 1
    trained(tmp_path / "parts", kimg=0.008, **ada)
    assert_same(whole, trained(tmp_path / "parts", resume="latest", **ada))
    assert whole.augment.p.item() == (1 if np.mean(signs) > 0.6 else 0)


def test_adaptive_augmentation_goes_on_with_a_shorter_interval(tmp_path):
    trained(tmp_path, augment="ada", augment_p=0.5, ada_interval=8)  # stops after 4 steps
    run = trained(tmp_path, "latest", augment="ada", ada_interval=2, ada_kimg=0.05, kimg=0.024)
    assert len(run._signs) == 1
    assert abs(abs(run.augment.p.item() - 0.5) - 0.4) < 1e-6, "20 of 50 images change p by 0.4"


def test_labels_condition_both_networks(tmp_path):
    run = trained(tmp_path, labels=True, kimg=0.004)
    assert run.g.c_dim == run.d.c_dim == 2
    c = torch.eye(2)
    ws = run.g_ema.mapping(torch.ones(2, 6), c)
    assert not torch.allclose(ws[0], ws[1])


@pytest.mark.parametrize("changes", [{"loss": "hinge"}, {"loss": "minimax"}])
@pytest.mark.parametrize("interval", [1, 2])
def test_every_loss_with_and_without_lazy_r1(tmp_path, changes, interval):
    run = trainer(tmp_path, d_reg_interval=interval, **changes)
    losses = run.train_step(run.batches())
    assert losses["r1"] > 0 and all(np.isfinite(value) for value in losses.values())


def test_metrics_are_logged_with_every_checkpoint(tmp_path, monkeypatch):
    asked = []

    class Evaluation:
        def __init__(self, dataset, names, device):
            asked.append(names)

        def __call__(self, generator, num):
            asked.append((type(generator).__name__, num))
            return {"fid": 7.5}

    monkeypatch.setattr(loop, "Evaluation", Evaluation)
    run = trained(tmp_path, metrics="fid", metric_images=3, tick_kimg=0.004, snapshot_ticks=2)
    assert [row["fid"] for row in read(run.out / "log.csv")] == ["", "7.5", "", "7.5"]
    assert asked == [["fid"], ("Generator", 3), ("Generator", 3)]


def test_networks_that_grow_have_no_metrics_and_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "Evaluation", lambda *_: lambda *_: pytest.fail("measured"))
    growing = {"network": "stylegan", "progressive": True, "resolution": 16, "kimg": 0.004}
    config = TrainingConfig(**{**TINY, **growing, "metrics": "fid"})
    dataset = Pictures()
    dataset.images = torch.zeros(9, 3, 16, 16, dtype=torch.uint8)
    Trainer(config, tmp_path, dataset=dataset).train()
    saved = "checkpoint-000000.004, before the last resolution has grown\n"
    assert saved in capsys.readouterr().err


def test_grids_are_laid_out_row_by_row(tmp_path):
    images = torch.linspace(-1, 1, 6)[:, None, None, None].expand(6, 3, 2, 5)
    save_grid(tmp_path / "grid.png", images, columns=3)
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    assert picture.shape == (4, 15, 3)
    expected = [[0, 51, 102], [153, 204, 255]]
    assert np.abs(picture[::2, ::5, 0].astype(int) - expected).max() <= 1


# Configurations


def test_presets_are_named_network_and_resolution():
    config = preset("stylegan2-256", batch=16, data="x")
    assert (config.network, config.resolution, config.batch, config.data) == (
        "stylegan2", 256, 16, "x",
    )  # fmt: skip
    assert config.r1_gamma == pytest.approx(0.0002 * 256**2 / 16)
    assert preset("stylegan2-1024").channel_base == 32768
    config = preset("stylegan3-t-512")
    assert config.r1_gamma == pytest.approx(8.2, rel=1e-3)
    assert (config.path_length_weight, config.style_mixing, config.blur_sigma) == (0, 0, 0)
    assert preset("stylegan3-r-256").blur_sigma == 10
    config = preset("stylegan-128")
    assert (config.network, config.path_length_weight, config.d_reg_interval) == ("stylegan", 0, 1)
    assert TrainingConfig.from_json(json.loads(json.dumps(config.as_json()))) == config


@pytest.mark.parametrize(
    "name, message",
    [
        ("stylegan2", "config='stylegan2' must be one of"),
        ("stylegan3-32", "config='stylegan3-32' must be one of stylegan-RESOLUTION, .*3-t-RES"),
        ("stylegan4-32", "config='stylegan4-32' must be one of"),
        ("stylegan2-48", "resolution=48 must be a power of two"),
        ("stylegan2-4", "resolution=4 must be a power of two and at least 8"),
        ("stylegan2-2048", "resolution=2048 must be at most 1024"),
    ],
)
def test_unknown_presets_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        preset(name)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss": "wasserstein"}, "loss='wasserstein' must be one of"),
        ({"batch": 0}, "batch=0 must be positive"),
        ({"style_mixing": 1.5}, "style_mixing=1.5 must be between 0 and 1"),
        ({"synthesis_layers": 0}, "synthesis_layers=0 must be positive"),
        ({"network": "stylegan3"}, "network='stylegan3' must be one of"),
        ({"blur_sigma": -1.0}, "blur_sigma=-1.0 must not be negative"),
        ({"r1_gamma": -1.0}, "r1_gamma=-1.0 must not be negative"),
        ({"kimg": float("nan")}, "kimg=nan must be positive"),
        ({"kimg": float("inf")}, "kimg=inf must be finite"),
        ({"tick_kimg": 1e-320}, "tick_kimg=1e-320 must be at least 0.001"),
        ({"seed": 2**63}, f"seed={2**63} must be at most {2**63 - 1}"),
        ({"w_dim": 10**20}, f"w_dim={10**20} must be at most {2**31 - 1}"),
        ({"kimg": 1e308}, "must be at most"),
        ({"ada_target": float("nan")}, "ada_target=nan must be finite"),
        ({"ema_rampup": -1.0}, "ema_rampup=-1.0 must not be negative"),
        ({"channel_base": 16}, "channel_base=16 must be at least resolution=32"),
        ({"progressive": True}, "progressive=True needs network='stylegan'"),
    ],
)
def test_bad_fields_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**changes)


def test_published_widths_of_stylegan3():
    with torch.device("meta"):
        for name, width in (("stylegan3-t-256", 512), ("stylegan3-r-512", 1024)):
            g, d = build(preset(name), 3, 0)
            assert (g.synthesis.input.channels, d.b4.out.in_features) == (width, 512)
            assert len(g.synthesis.layer_names) == 15
            assert not any(
                getattr(g.synthesis, layer).use_fp16 for layer in g.synthesis.layer_names
            )


def test_the_blur_fades():
    adapter = Adapter(TrainingConfig(blur_sigma=4.0, blur_kimg=0.1), torch.device("cpu"))
    impulse = torch.zeros(1, 1, 65, 49, dtype=torch.float64)
    impulse[:, :, 32, 24] = 1
    x = torch.arange(49) - 24
    for seen, deviation in ((0, 4), (50, 2), (75, 1)):
        adapter.grow(seen)
        blurred = adapter.blurred(impulse)[0, 0]
        assert blurred.sum().item() == pytest.approx(1)
        expected = (-x.square() / (2 * deviation**2)).exp() * (x.abs() <= 3 * deviation)
        torch.testing.assert_close(blurred.sum(0).float(), expected / expected.sum())
        torch.testing.assert_close(blurred[8:57], blurred[8:57].T)
    for seen in (100, 1000):
        adapter.grow(seen)
        assert adapter.blurred(impulse) is impulse


def test_micro_batches_divide_the_batch():
    config = TrainingConfig(batch=12, mbstd_group=4)
    assert [micro_batch(config, processes) for processes in (1, 3)] == [12, 4]
    with pytest.raises(ValueError, match="micro_batch=6 must be a multiple of mbstd_group=4"):
        micro_batch(config, 2)
    with pytest.raises(ValueError, match="multiple of micro_batch=3 on each of 5"):
        micro_batch(config, 5)
    with pytest.raises(ValueError, match="multiple of micro_batch=8 on each of 1"):
        micro_batch(dataclasses.replace(config, micro_batch=8), 1)


def test_progressive_growing_rests_and_fades():
    config = preset("stylegan-32", progressive=True, fade_kimg=1)
    adapter = Adapter(config, torch.device("cpu"))
    schedule = {0: (8, 1), 999: (8, 1), 1500: (16, 0.5), 2500: (16, 1), 3250: (32, 0.25)}
    for images, (resolution, alpha) in {**schedule, 4500: (32, 1), 10**6: (32, 1)}.items():
        adapter.grow(images)
        shown = adapter.real(torch.randn(1, 3, 32, 32))
        assert shown.shape == (1, 3, resolution, resolution)
        assert adapter._fade["alpha"] == pytest.approx(alpha)
        assert adapter.grown == (images >= 4000)
        assert adapter.full_size(shown).shape == (1, 3, 32, 32)
    adapter.grow(3250)
    image = torch.rand(1, 3, 32, 32)
    blocks = image.reshape(1, 3, 16, 2, 16, 2)
    coarse = blocks.mean(dim=(3, 5), keepdim=True).expand_as(blocks).reshape(image.shape)
    assert_matches(adapter.real(image), (0.25 * image + 0.75 * coarse).double(), reduction=4)


# Failures


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    run = trainer(tmp_path, tick_kimg=0.004)
    step = run.train_step

    def failing(batches):
        losses = step(batches)
        return {**losses, "loss_d": float("nan")} if run.step == 3 else losses

    run.train_step = failing
    with pytest.raises(NonFiniteLossError, match=r"loss_d is nan in tick 3 \(step 3, 12 images\)"):
        run.train()
    assert [path.name for path in snapshots.complete(tmp_path)] == [
        "checkpoint-000000.004",
        "checkpoint-000000.008",
    ]
    trainer(tmp_path, resume="latest")


def test_a_full_disk_leaves_the_last_checkpoint(pictures, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    save, calls = snapshots.save_networks, []

    def filling(path, *arguments):
        save(path, *arguments)
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(snapshots, "save_networks", filling)
    assert command(pictures, out) == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("stylegan_fast train: ") and "No space left" in last_line
    assert [path.name for path in snapshots.complete(out)] == ["checkpoint-000000.008"]
    assert not list(out.glob(".unfinished-*"))
    trainer(out, resume="latest")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves(pictures, tmp_path, monkeypatch, capfd, number):
    out = tmp_path / "run"
    update = Trainer._update

    def interrupted(self, name, *arguments):
        if self.step == 2 and name == "g":
            os.kill(os.getpid(), number)
        return update(self, name, *arguments)

    monkeypatch.setattr(Trainer, "_update", interrupted)
    before = signal.getsignal(number)
    assert command(pictures, out) == 128 + number
    assert signal.getsignal(number) is before
    *lines, last_line = capfd.readouterr().err.splitlines()
    assert "stopping after this step; once more: at once, without saving" in lines
    assert "stopped after 12 images" in last_line and "--resume latest" in last_line
    assert snapshots.complete(out)[-1].name == "checkpoint-000000.012"


def test_the_command_continues_a_run_with_its_configuration(pictures, tmp_path, capsys):
    out = tmp_path / "run"
    assert command(pictures, out, kimg=0.008) == 0
    assert main(["train", "--outdir", str(out), "--resume", "latest", "--kimg", "0.016"]) == 0
    assert "resumed with kimg=0.016 instead of 0.008\n" in capsys.readouterr().err
    assert main(["train", "--outdir", str(out), "--resume", "latest"]) == 0
    *_, line = capsys.readouterr().err.splitlines()
    assert line == (
        "nothing to do: 16 images were seen, kimg is 0.016; a larger one (--kimg) continues"
    )
    state = json.loads((out / "checkpoint-000000.016" / snapshots.STATE).read_text())
    assert state["config"]["channel_base"] == TINY["channel_base"]
    assert state["config"]["kimg"] == 0.016


def test_a_run_says_what_it_trains(pictures, tmp_path, capsys):
    assert command(pictures, tmp_path / "run", config="stylegan2-16", kimg=0.004) == 0
    first, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith("stylegan2 16×16, G 0.0M and D 0.0M parameters, on cpu; 9 images of")
    assert first.endswith("pictures; 9 files are smaller than 16×16 and enlarged")


def test_help_tells_defaults_that_are_not_the_presets(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "thousands of images that D sees (default: 25000)" in text
    assert "images of a step (default: of --config)" in text
    assert "from one R1 to the next; 1: in the main update (default: of --config)" in text


def test_bad_input_is_one_line_and_status_2(pictures, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    photo = pictures / "0.png"
    most = 2**31 - 1
    cases = {
        "no such folder": lambda: command(tmp_path / "missing", tmp_path / "a"),
        "no images": lambda: command(empty, tmp_path / "a"),
        "must be a power of two": lambda: command(pictures, tmp_path / "a", config="stylegan2-12"),
        "must be one of": lambda: command(pictures, tmp_path / "a", config="biggan-8"),
        "cannot be loaded": lambda: command(pictures, tmp_path / "a", "--resume", str(photo)),
        "no such file": lambda: command(pictures, tmp_path / "a", "--resume", "nowhere"),
        "holds no checkpoint": lambda: command(pictures, empty, "--resume", "latest"),
        "multiple of micro_batch=3": lambda: command(pictures, tmp_path / "a", micro_batch=3),
        "--config NAME is missing": lambda: main(["train", "--outdir", str(tmp_path / "a")]),
        "--outdir FOLDER is missing": lambda: main(["train", "--config", "stylegan2-8"]),
        "unknown metric 'is'": lambda: command(pictures, tmp_path / "a", metrics="is"),
        "out of memory": lambda: command(pictures, tmp_path / "a", z_dim=most, w_dim=most),
        "seed=18446744073709551616 must be": lambda: command(pictures, tmp_path / "a", seed=2**64),
        "device='warp'": lambda: command(pictures, tmp_path / "a", "--device", "warp"),
        "device='meta'": lambda: command(pictures, tmp_path / "a", "--device", "meta"),
    }
    for message, call in cases.items():
        assert call() == 2, message
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and message in lines[0], (message, lines)
        assert lines[0].startswith("stylegan_fast train: ")
