"""The training loop.

A step shows `batch` images to the discriminator. It is cut into micro-batches, dealt to the
processes in turn: number j goes to process j mod R. All that is drawn for one (latents, mixing,
noise, augmentation) comes from a generator seeded with (seed, step, update, j), and its images from
their place in one shuffled stream. So a result depends neither on the number of processes nor on
where a run was interrupted, and a checkpoint needs no state of a random generator.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import _version
from ..checkpoints import CheckpointError, load_networks
from . import data, snapshots
from .augment import AugmentPipe, adjust
from .config import TrainingConfig, micro_batch
from .distributed import ALONE, World
from .ema import ema_beta, update_ema
from .lock import locked
from .logs import Logs, save_grid
from .losses import LOSSES
from .metrics import Evaluation
from .networks import Adapter, build, load_weights, magnitudes
from .pictures import scaled
from .regularizers import lazy_adam, path_length_penalty, r1_penalty

UPDATES = ("g", "path_length", "d", "r1")
COLUMNS = (
    "loss_g", "loss_d", "r1", "path_length", "path_length_mean", "real_logits",
    "fake_logits", "real_sign", "augment_p", "fid", "kid", "seconds_per_kimg",
)  # fmt: skip
Loss = tuple[Tensor, dict[str, Tensor]]


class NonFiniteLossError(ArithmeticError):
    """A loss is infinite or not a number. The last checkpoint is from before."""


class Trainer:
    """A run of a configuration in the folder `out`.

        Trainer(preset("stylegan2-32", data="photos.zip"), "runs/photos").train()

    `dataset` replaces the one that config.data names. `resume` continues a run or starts from other
    networks, see `snapshots.find`. After `stop()`, which a signal handler may call, `train` ends
    its step, saves and returns.

    ValueError: the configuration does not fit the data, the number of processes or what is resumed.
    FileExistsError: `out` holds a run whose end is not resumed. BlockingIOError: another process
    trains there. OSError, CheckpointError: the disk.
    MetricsUnavailableError, NonFiniteLossError. In each case the last checkpoint is intact.
    """

    def __init__(
        self,
        config: TrainingConfig,
        out: str | Path,
        *,
        dataset: data.ImageDataset | None = None,
        device: torch.device | str = "cpu",
        world: World = ALONE,
        resume: str | None = None,
        show: bool = True,
    ) -> None:
        self.config = config
        self.out = Path(out)
        self.device = torch.device(device)
        self.world = world
        self.show = show
        self.micro_batch = micro_batch(config, world.size)
        self.micro_batches = config.batch // self.micro_batch
        self.step = 0
        self.images_seen = 0
        self.stopped = False
        self._stop_asked = False
        self._changes: list[str] = []
        self._history: dict[str, list[float]] = {}
        self._signs: list[float] = []
        self._facts: dict[str, Tensor] = {}

        source = None if resume is None else snapshots.find(resume, self.out)
        held = snapshots.complete(self.out)
        if held and (source is None or source.resolve() != held[-1].resolve()):
            raise FileExistsError(
                f"{self.out} holds a run up to {held[-1].name}: resume it (--resume latest), "
                "or use another folder"
            )
        if dataset is None:
            dataset = data.ImageDataset(
                config.data, config.resolution, config.labels, config.mirror, config.on_error
            )
        self.dataset = dataset
        self._evaluation: Evaluation | None = None
        if config.metrics and world.leads:
            self._evaluation = Evaluation(dataset, config.metrics.split(","), device)
        self._build()
        if source is not None and source.is_file():
            self._transfer(source)
        elif source is not None:
            self._continue(source)

    def _build(self) -> None:
        config = self.config
        torch.manual_seed(config.seed)
        c_dim = self.dataset.c_dim if config.labels else 0
        g, d = build(config, self.dataset.img_channels, c_dim)
        self.g = g.to(self.device).train()
        self.d = d.to(self.device).train()
        self.g.mapping.eval()  # the mean of w is taken here, over the whole batch
        self.g_ema = copy.deepcopy(self.g).eval().requires_grad_(False)
        self.adapter = Adapter(config, self.device)
        self.path_length_mean = torch.zeros([], device=self.device)
        self._w_sum = torch.zeros(config.w_dim, device=self.device)
        self._magnitudes = magnitudes(self.g)
        self._magnitude_sum = torch.zeros(len(self._magnitudes), device=self.device)
        self.augment: AugmentPipe | None = None
        if config.augment != "none":
            self.augment = AugmentPipe().to(self.device)
            self.augment.p.fill_(config.augment_p)

        betas = (config.beta1, config.beta2)
        g_interval = config.g_reg_interval if config.path_length_weight else 1
        d_interval = config.d_reg_interval if config.r1_gamma else 1
        self.optimizers = {
            "g": torch.optim.Adam(self.g.parameters(), **lazy_adam(config.g_lr, betas, g_interval)),
            "d": torch.optim.Adam(self.d.parameters(), **lazy_adam(config.d_lr, betas, d_interval)),
        }
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")

    # A step

    def train_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Update G and D, with their penalties where these are due; the means of the step.

        `batches` yields this process's micro-batches: images uint8 [N, C, H, W], labels [N, c_dim].
        """
        config = self.config
        self.adapter.grow(self.images_seen)
        real = [self._prepared(*next(batches)) for _ in range(self._rounds)]
        self._facts.clear()
        self._w_sum.zero_()
        self._magnitude_sum.zero_()

        self._update("g", "g", lambda k: self._g_loss(real[k][1]))
        self._average()
        if config.path_length_weight and self.step % config.g_reg_interval == 0:
            self._update("path_length", "g", lambda k: self._path_length(real[k][1]))
        self._update("d", "d", lambda k: self._d_loss(*real[k]))
        if self._lazy_r1 and self.step % config.d_reg_interval == 0:
            self._update("r1", "d", lambda k: self._r1(*real[k]))

        self.step += 1
        self.images_seen += config.batch
        beta = ema_beta(config.batch, 1000 * config.ema_kimg, self.images_seen, config.ema_rampup)
        update_ema(self.g_ema, self.g, beta)
        return self._conclude()

    def _update(self, name: str, network: str, loss: Callable[[int], Loss]) -> None:
        """One step of a network's optimiser along the mean gradient of the micro-batches."""
        optimizer = self.optimizers[network]
        self.g.requires_grad_(network == "g")
        self.d.requires_grad_(network == "d")
        optimizer.zero_grad(set_to_none=True)
        for k in range(self._rounds):
            self._seed(name, k)
            value, facts = loss(k)
            self.scaler.scale(value / self.micro_batches).backward()
            for key, fact in facts.items():
                share = fact.detach() / self.micro_batches
                self._facts[key] = self._facts[key] + share if key in self._facts else share
        self.world.sum_gradients(getattr(self, network).parameters())
        self.scaler.step(optimizer)
        self.scaler.update()

    def _g_loss(self, c: Tensor) -> Loss:
        ws, w = self._styles(c)
        self._w_sum += w.detach().sum(dim=0)
        logits = self._logits(self._measured(ws), c)
        loss = LOSSES[self.config.loss].g_loss(logits)
        return loss, {"loss_g": loss, "fake_logits": logits.mean()}

    def _measured(self, ws: Tensor) -> Tensor:
        """G's images. A micro-batch moves the averages of StyleGAN3's layers as if it were the only
        one; where all of them have moved these, `_average` takes the mean."""
        if not self._magnitudes:
            return self.adapter.synthesis(self.g, ws)
        before = torch.stack(self._magnitudes)
        images = self.adapter.synthesis(self.g, ws, update_emas=True)
        self._magnitude_sum += torch.stack(self._magnitudes)
        self._set_magnitudes(before)
        return images

    def _set_magnitudes(self, values: Tensor) -> None:
        for average, value in zip(self._magnitudes, values):
            average.copy_(value)

    def _path_length(self, c: Tensor) -> Loss:
        config = self.config
        ws, _ = self._styles(c[:: config.path_length_shrink])
        loss, mean = path_length_penalty(
            lambda ws: self.adapter.synthesis(self.g, ws),
            ws,
            self.path_length_mean,
            config.path_length_weight,
        )
        return loss * config.g_reg_interval, {"path_length": loss, "path_length_mean": mean}

    def _d_loss(self, images: Tensor, c: Tensor) -> Loss:
        config = self.config
        penalised = config.r1_gamma > 0 and not self._lazy_r1
        with torch.no_grad():
            fake = self.adapter.synthesis(self.g, self._styles(c)[0])
        fake_logits = self._logits(fake, c)
        images = images.detach().requires_grad_(penalised)
        logits = self._logits(images, c)
        loss = LOSSES[config.loss].d_loss(logits, fake_logits)
        facts = {
            "loss_d": loss,
            "real_logits": logits.mean(),
            "real_sign": logits.sign().mean(),
        }
        if penalised:
            facts["r1"] = r1_penalty(images, logits, config.r1_gamma)
            loss = loss + facts["r1"]
        return loss, facts

    def _r1(self, images: Tensor, c: Tensor) -> Loss:
        images = images.detach().requires_grad_()
        loss = r1_penalty(images, self._logits(images, c), self.config.r1_gamma)
        return loss * self.config.d_reg_interval, {"r1": loss}

    def _styles(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """ws of as many samples as c has, a part of them mixed of two; and the unmixed w."""
        config, mapping, rows = self.config, self.g.mapping, self.g.num_ws
        n = c.shape[0]
        z = torch.randn(n, config.z_dim, device=self.device)
        ws = mapping(z, c)
        w = ws[:, 0]
        if config.style_mixing:
            crossover = torch.randint(1, rows, [n, 1], device=self.device)
            mixed = torch.rand(n, 1, device=self.device) < config.style_mixing
            second = mixed & (torch.arange(rows, device=self.device) >= crossover)
            ws = torch.where(second[:, :, None], mapping(torch.randn_like(z), c), ws)
        return ws, w

    def _logits(self, images: Tensor, c: Tensor) -> Tensor:
        images = self.adapter.blurred(images)
        if self.augment is not None:
            images = self.augment(images)
        return self.adapter.logits(self.d, images, c)

    def _prepared(self, images: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        images = scaled(images.to(self.device, non_blocking=True))
        return self.adapter.real(images), c.to(self.device, non_blocking=True)

    def _seed(self, update: str, k: int) -> None:
        j = k * self.world.size + self.world.rank
        entropy = [self.config.seed, self.step, UPDATES.index(update), j]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))

    def _average(self) -> None:
        """Move the averages in G's buffers, over the whole batch."""
        if hasattr(self.g.mapping, "w_avg"):
            mean = self.world.sum(self._w_sum) / self.config.batch
            self.g.mapping.w_avg.lerp_(mean, 1 - self.config.w_avg_beta)
        if self._magnitudes:
            self._set_magnitudes(self.world.sum(self._magnitude_sum) / self.micro_batches)

    def _conclude(self) -> dict[str, float]:
        """The step's means over all processes, and what follows from them."""
        asked = torch.tensor(float(self._stop_asked), device=self.device)
        values = self.world.sum(torch.stack([*self._facts.values(), asked]))
        *means, asking = values.tolist()
        facts = dict(zip(self._facts, means))
        self.stopped = asking > 0
        if "path_length_mean" in facts:
            self.path_length_mean = values[list(facts).index("path_length_mean")].clone()
        if self.augment is not None and self.config.augment == "ada":
            self._adapt(self.augment, facts["real_sign"])
        return facts

    def _adapt(self, augment: AugmentPipe, sign: float) -> None:
        """Every few steps the probability of augmentation follows the sign of the real logits."""
        config = self.config
        self._signs.append(sign)
        steps = len(self._signs)
        if steps >= config.ada_interval:  # more where a resumed run had a longer interval
            mean = math.fsum(self._signs) / steps
            self._signs.clear()
            change = adjust(mean, config.ada_target, config.batch, steps, config.ada_kimg)
            augment.p.add_(change).clamp_(0, 1)

    @property
    def _rounds(self) -> int:
        return self.micro_batches // self.world.size

    @property
    def _lazy_r1(self) -> bool:
        return self.config.r1_gamma > 0 and self.config.d_reg_interval > 1

    # A run

    def train(self) -> None:
        """Train to config.kimg or until `stop`, and save."""
        if not self.world.leads:
            self._train(None)
            return
        self.out.mkdir(parents=True, exist_ok=True)
        total = round(1000 * self.config.kimg)
        with (
            locked(self.out),
            Logs(self.out, COLUMNS, self.images_seen, total, self.show) as logs,
        ):
            snapshots.remove_unfinished(self.out)
            logs.say(self._outline())
            if self._changes:
                logs.say(f"resumed with {', '.join(self._changes)}")
            if self.images_seen >= 1000 * self.config.kimg:
                logs.say(
                    f"nothing to do: {self.images_seen} images were seen, kimg is "
                    f"{self.config.kimg:g}; a larger one (--kimg) continues"
                )
            if self.step == 0:
                self._write_grid(logs, "reals", scaled(self._shown[0]))
                self._write_grid(logs, "fakes", self.samples())
            self._train(logs)

    def _outline(self) -> str:
        """What is trained on what, in a line."""
        config, dataset = self.config, self.dataset
        g, d = (sum(p.numel() for p in net.parameters()) / 1e6 for net in (self.g, self.d))
        size = f"{config.resolution}×{config.resolution}"
        line = f"{config.network} {size}, G {g:.1f}M and D {d:.1f}M parameters, on {self.device}; "
        line += f"{len(dataset)} images of {dataset.name}"
        if dataset.enlarged:
            line += f"; {dataset.enlarged} files are smaller than {size} and enlarged"
        return line

    def stop(self) -> None:
        """Let `train` return after this step, in all processes."""
        self._stop_asked = True

    def _train(self, logs: Logs | None) -> None:
        config = self.config
        batches = self.batches()
        started, images = time.monotonic(), self.images_seen
        while self.images_seen < 1000 * config.kimg and not self.stopped:
            tick = self._tick
            losses = self.train_step(batches)
            self._check_finite(losses)
            for name, value in losses.items():
                self._history.setdefault(name, []).append(value)
            if logs is not None:
                logs.advance(self.images_seen)
            done = self.images_seen >= 1000 * config.kimg
            ticked = self._tick > tick
            if ticked or done:
                seconds = (time.monotonic() - started) / (self.images_seen - images)
                started, images = time.monotonic(), self.images_seen
                facts = {"seconds_per_kimg": 1000 * seconds}
                if done or self._tick % config.snapshot_ticks == 0:
                    facts.update(self._metrics())
                self._log(logs, facts)
            if done or self.stopped or (ticked and self._tick % config.snapshot_ticks == 0):
                self._snapshot(logs)

    @property
    def _tick(self) -> int:
        return int(self.images_seen / (1000 * self.config.tick_kimg))

    def _log(self, logs: Logs | None, facts: dict[str, float]) -> None:
        """A row of means since the last one, and of the facts."""
        row = {name: math.fsum(values) / len(values) for name, values in self._history.items()}
        self._history.clear()
        if self.augment is not None:
            row["augment_p"] = self.augment.p.item()
        if logs is not None:
            logs.write(self.images_seen, {**row, **facts})

    def _metrics(self) -> dict[str, float]:
        if self._evaluation is None or not self.adapter.grown:
            return {}
        return self._evaluation(self.g_ema, self.config.metric_images)

    def _snapshot(self, logs: Logs | None) -> None:
        if logs is not None:
            self._write_grid(logs, "fakes", self.samples())
            unfinished = "" if self.adapter.grown else ", before the last resolution has grown"
            logs.say(f"saved {self.save()}{unfinished}")
        self.world.barrier()

    def _check_finite(self, losses: dict[str, float]) -> None:
        for name, value in losses.items():
            if not math.isfinite(value):
                saved = snapshots.complete(self.out)
                raise NonFiniteLossError(
                    f"{name} is {value} in tick {self._tick} (step {self.step}, "
                    f"{self.images_seen} images); last checkpoint: {saved[-1] if saved else 'none'}"
                )

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What `train_step` takes, from the images that are next."""
        config, size = self.config, len(self.dataset)
        order = _Dealt(size, seed=config.seed, start=self.images_seen)
        order.deal(self.micro_batch, self.world)
        return iter(data.loader(self.dataset, self.micro_batch, order, config.workers))

    # Samples

    @functools.cached_property
    def _shown(self) -> tuple[Tensor, Tensor]:
        """Images and labels of a grid; of the latter, samples take theirs."""
        order = data.InfiniteSampler(len(self.dataset), seed=self.config.seed)
        items = [self.dataset[i] for i in itertools.islice(order, self._columns**2)]
        images, labels = zip(*items)
        return torch.stack(images), torch.stack(labels)

    @property
    def _columns(self) -> int:
        return 8 if self.config.resolution <= 128 else 4

    @torch.no_grad()
    def samples(self) -> Tensor:
        """Images [N, C, H, W] of the averaged generator, of the same latents at every time."""
        random = torch.Generator().manual_seed(self.config.seed)
        c = self._shown[1].to(self.device)
        z = torch.randn(len(c), self.config.z_dim, generator=random).to(self.device)
        images = [
            self.adapter.synthesis(self.g_ema, self.g_ema.mapping(*part), noise_mode="const")
            for part in zip(z.split(self.micro_batch), c.split(self.micro_batch))
        ]
        return self.adapter.full_size(torch.cat(images))

    def _write_grid(self, logs: Logs, name: str, images: Tensor) -> None:
        path = self.out / f"{name}-{snapshots.kimg(self.images_seen)}.png"
        save_grid(path, images, self._columns)
        logs.image(name, path, self.images_seen)

    # Checkpoints

    def save(self) -> Path:
        """Write a checkpoint of everything the rest of the run depends on; its folder."""
        tensors = {"path_length_mean": self.path_length_mean}
        if self.augment is not None:
            tensors["augment_p"] = self.augment.p
        for name, optimizer in self.optimizers.items():
            for index, values in optimizer.state_dict()["state"].items():
                tensors |= {f"{name}.{index}.{key}": value for key, value in values.items()}
        state = {
            "version": _version.__version__,
            "config": self.config.as_json(),
            "step": self.step,
            "images_seen": self.images_seen,
            "history": self._history,
            "signs": self._signs,
            "scaler": self.scaler.state_dict(),
        }
        networks = {"G": self.g, "D": self.d, "G_ema": self.g_ema}
        path = snapshots.save(self.out, self.images_seen, networks, tensors, state)
        snapshots.remove_old(self.out, self.config.keep)
        return path

    def _transfer(self, file: Path) -> None:
        """Begin with the networks of a file; D as it is where the file has none."""
        stored = load_networks(file)
        generators = [stored[name] for name in ("G", "G_ema") if name in stored]
        if not generators:
            raise CheckpointError(f"{file} holds no generator G or G_ema")
        load_weights(self.g, generators[0], file)
        load_weights(self.g_ema, generators[-1], file)
        if "D" in stored:
            load_weights(self.d, stored["D"], file)

    def _continue(self, folder: Path) -> None:
        """Take up the run of a checkpoint."""
        self._transfer(folder / snapshots.NETWORKS)
        tensors, state = snapshots.load(folder)
        try:
            self.path_length_mean = tensors["path_length_mean"].to(self.device)
            if self.augment is not None and "augment_p" in tensors:
                self.augment.p.copy_(tensors["augment_p"])
            for name, optimizer in self.optimizers.items():
                values: dict[int, dict[str, Tensor]] = {}
                for path, tensor in tensors.items():
                    owner, _, rest = path.partition(".")
                    if owner == name:
                        index, key = rest.split(".")
                        values.setdefault(int(index), {})[key] = tensor
                optimizer.load_state_dict({**optimizer.state_dict(), "state": values})
            if self.scaler.is_enabled() and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
            self.step = state["step"]
            self.images_seen = state["images_seen"]
            self._history = state["history"]
            self._changes = [
                f"{name}={value!r} instead of {state['config'].get(name)!r}"
                for name, value in self.config.as_json().items()
                if value != state["config"].get(name)
            ]
            self._signs = state["signs"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{folder}: not the state of such a run: {error!r}") from error


class _Dealt(data.InfiniteSampler):
    """The stream of one process's images: its micro-batches of those of all processes."""

    def deal(self, micro_batch: int, world: World) -> None:
        self._micro_batch, self._world = micro_batch, world

    def __iter__(self) -> Iterator[int]:
        for place, index in enumerate(super().__iter__()):
            if place // self._micro_batch % self._world.size == self._world.rank:
                yield index
