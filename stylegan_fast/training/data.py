"""Images for training: a folder or a zip of them, in any sub-folders, `dataset.json` beside them.

    00000/img00000000.png ...
    dataset.json    {"labels": [["00000/img00000000.png", 3], ...]}  or  {"labels": null}

A label is the number of a class or a vector. Images are sorted naturally (2 before 10), and what is
no image is ignored.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .._checks import as_int
from .._commands import printable

try:
    from PIL import Image, ImageOps
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "stylegan_fast.training.data needs Pillow: pip install 'stylegan_fast[train]'",
        name=error.name,
    ) from None

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What a file of these names may hold: no format of which Pillow starts other programs."""

_GRAY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L")
_LABELS = "dataset.json"
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
"""The photographs of scikit-image that `example` cuts up; their positions are its classes."""


class DatasetError(ValueError):
    """Names the dataset or the file, and what is wrong with it."""

    def __init__(self, message: str):
        # Out of a worker, DataLoader makes the message a traceback, of which this is the end.
        message = message.rpartition(f"{type(self).__name__}: ")[2].rstrip()
        super().__init__(printable(message))


class ImageDataset(Dataset):
    """`[i]` is (image, uint8 [C, H, W]; label, float32 [c_dim]) of a folder or zip of images.

    resolution: a power of two; images are cropped at the centre and resized (Lanczos). None demands
        images of one size, square, its side a power of two.
    labels: read them from dataset.json, classes as one-hot vectors; without them c_dim is 0.
    mirror: append all images again, mirrored.
    on_error: 'raise' a DatasetError that names the file, or 'skip' it with a warning. The headers
        of all files are read here. An image whose pixels turn out to be broken only when they are
        read raises then, or the next good one stands in for it, with the label of that one.

    img_channels is 1 if most images are gray, else 3; the others are converted, 16 bits to 8, and
    what is transparent lies on white. `enlarged` counts the files with a side shorter than the
    resolution.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        resolution: int | None = None,
        labels: bool = False,
        mirror: bool = False,
        on_error: str = "raise",
    ):
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        if resolution is not None:
            _check_resolution(resolution)
        self._source = _open(Path(path))
        self._skip = on_error == "skip"
        self._reported: set[str] = set()
        self.mirror = mirror
        self.name = self._source.path.stem

        found = sorted(filter(_is_image, self._source.names), key=_naturally)
        if not found:
            raise DatasetError(f"{path}: no images; looked for {' '.join(_SUFFIXES)}")
        headers, broken = {}, {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused by _read
            for name in found:
                try:
                    headers[name] = self._read(name, lambda image: (image.size, image.mode))
                except DatasetError as error:
                    broken[name] = str(error)
        if resolution is None:
            broken |= self._odd_sizes({name: size for name, (size, _) in headers.items()})
        if broken and not self._skip:
            raise DatasetError(next(broken[name] for name in found if name in broken))
        self.names = [name for name in found if name not in broken]
        if not self.names:
            raise DatasetError(f"{path}: none of {len(found)} images is usable; {broken[found[0]]}")
        if broken:
            _warn(f"{path}: {len(broken)} of {len(found)} images left out", broken.values())

        self.resolution = resolution or headers[self.names[0]][0][0]
        gray = sum(headers[name][1] in _GRAY for name in self.names)
        self.img_channels = 1 if 2 * gray > len(self.names) else 3
        self.enlarged = sum(min(headers[name][0]) < self.resolution for name in self.names)
        self.c_dim = 0
        self._labels: np.ndarray | None = None
        if labels:
            self.c_dim, self._labels = self._read_labels()

    def __len__(self) -> int:
        return len(self.names) * (2 if self.mirror else 1)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        mirrored, first = divmod(index % len(self), len(self.names))
        for step in range(len(self.names)):
            position = (first + step) % len(self.names)
            name = self.names[position]
            try:
                pixels = self._read(name, self._pixels)
                break
            except DatasetError as error:
                if not self._skip:
                    raise
                if name not in self._reported:
                    self._reported.add(name)
                    _warn("an image is replaced by the next", [str(error)])
        else:
            raise DatasetError(f"{self._source.path}: no image can be read")
        pixels = pixels[:, ::-1] if mirrored else pixels
        pixels = pixels.reshape(*pixels.shape[:2], self.img_channels).transpose(2, 0, 1)
        return torch.from_numpy(pixels.copy()), self.label(position)

    def label(self, index: int) -> torch.Tensor:
        """The label of item `index`, float32 [c_dim], without its image."""
        if self._labels is None:
            return torch.zeros(0)
        label = self._labels[index % len(self.names)]
        if label.ndim:
            return torch.from_numpy(label.copy())
        return torch.nn.functional.one_hot(torch.tensor(label), self.c_dim).float()

    def images(self) -> Iterator[tuple[Image.Image, Any]]:
        """Once through the good images, unmirrored, with their labels in dataset.json or None."""
        labels = self.raw_labels() or [None] * len(self.names)
        for name, label in zip(self.names, labels, strict=True):
            try:
                yield Image.fromarray(self._read(name, self._pixels)), label
            except DatasetError as error:
                if not self._skip:
                    raise
                _warn("an image is left out", [str(error)])

    def raw_labels(self) -> list | None:
        """The labels as dataset.json has them, in the order of `names`; None if it has none."""
        entries = self._source.labels()
        if entries is None:
            return None
        known = dict(entries)
        missing = next((name for name in self.names if name not in known), None)
        if missing is not None:
            raise DatasetError(f"{self._source.path}: {_LABELS} has no label of {missing}")
        return [known[name] for name in self.names]

    def _read_labels(self) -> tuple[int, np.ndarray]:
        """c_dim, and classes [len(names)] or vectors [len(names), c_dim]."""
        where, labels = f"{self._source.path}: {_LABELS}", self.raw_labels()
        if labels is None:
            raise DatasetError(f"{where} is missing or has no labels, but labels are asked for")
        try:
            array = np.array(labels)
        except ValueError:
            array = np.zeros(())
        if array.ndim == 1 and array.dtype.kind == "i":
            if array.min() < 0:
                raise DatasetError(f"{where} has the class {array.min()}")
            # Classes of images that are left out count, so that c_dim does not depend on them.
            every = (label for _, label in self._source.labels() or [])
            return 1 + max(label for label in every if isinstance(label, int)), array
        if array.ndim == 2 and array.dtype.kind in "if" and np.isfinite(array).all():
            return array.shape[1], array.astype(np.float32)
        raise DatasetError(
            f"{where}: labels must all be classes (0, 1, ...) or all finite vectors of one length"
        )

    def _read(self, name: str, result: Callable[[Image.Image], Any]) -> Any:
        try:
            with (
                self._source.open(name) as file,
                Image.open(file, formats=FORMATS) as image,
            ):
                if image.width * image.height > (Image.MAX_IMAGE_PIXELS or float("inf")):
                    raise ValueError(f"{image.width}×{image.height} is more than Pillow's limit")
                return result(image)
        except Exception as error:  # Pillow's decoders raise whatever they stumble over
            cause = (
                "not a known image" if isinstance(error, Image.UnidentifiedImageError) else error
            )
            raise DatasetError(f"{self._source.path}/{name}: {cause or repr(error)}") from None

    def _odd_sizes(self, sizes: dict[str, tuple[int, int]]) -> dict[str, str]:
        """Images that are not of the dataset's size: the first one's, or the most common."""
        fitting = [(w, h) for w, h in sizes.values() if w == h and _is_power_of_two(w)]
        if not fitting:
            expected = None
        else:
            expected = Counter(fitting).most_common(1)[0][0] if self._skip else fitting[0]
        odd = {}
        for name, (w, h) in sizes.items():
            if (w, h) != expected:
                rule = "a square with a power of two as its side"
                if expected:
                    rule = f"{expected[0]}×{expected[1]}, as the others"
                odd[name] = (
                    f"{self._source.path}/{name}: the image is {w}×{h}, not {rule}; "
                    "give a resolution to crop and resize all"
                )
        return odd

    def _pixels(self, image: Image.Image) -> np.ndarray:
        return pixels(image, self.resolution, self.img_channels)


class InfiniteSampler(Sampler[int]):
    """Positions of a dataset of `size`, without end, each epoch in an order of its own.

    The order is a function of the seed and of the number of the epoch alone, so `start`, the number
    of images the whole world has seen, resumes exactly. Rank r of R takes every R-th position,
    beginning with the r-th: batches of the ranks are together the batch of a single process, whose
    image k is the image k // R of rank k % R.
    """

    def __init__(
        self, size: int, rank: int = 0, num_replicas: int = 1, seed: int = 0, start: int = 0
    ):
        self.size = as_int("size", size, 1)
        self.num_replicas = as_int("num_replicas", num_replicas, 1)
        self.rank = as_int("rank", rank, 0, self.num_replicas - 1)
        self.seed = as_int("seed", seed, 0, 2**63)
        self.start = as_int("start", start, 0, 2**62)

    def __iter__(self) -> Iterator[int]:
        position, epoch = self.start + self.rank, -1
        while True:
            if position // self.size != epoch:
                epoch = position // self.size
                order = self._order(epoch)
            yield int(order[position % self.size])
            position += self.num_replicas

    def _order(self, epoch: int) -> np.ndarray:
        # Raw bits of a counter-based generator, which NumPy promises never to change.
        bits = np.random.Philox(key=[self.seed, epoch]).random_raw(self.size)
        return bits.argsort(kind="stable")


def loader(dataset: Dataset, batch: int, sampler: InfiniteSampler, workers: int = 0) -> DataLoader:
    """Batches of the dataset in the order of the sampler, read by worker processes."""
    return DataLoader(
        dataset,
        batch_size=batch,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_ignore_interrupts,
        pin_memory=torch.cuda.is_available(),
        # Its own, or the workers' seeds would be drawn from the state of the training.
        generator=torch.Generator().manual_seed(sampler.seed),
    )


def pixels(image: Image.Image, side: int, channels: int) -> np.ndarray:
    """[side, side] or, of 3 channels, [side, side, 3]: cropped at the centre and resized."""
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(_square(image.convert("L" if channels == 1 else "RGB"), side))


def example(path: str | os.PathLike, resolution: int = 32, count: int = 512, seed: int = 0) -> Path:
    """Writes a zip of `count` random crops of photographs, the photograph being the class.
    ValueError for a resolution that is no power of two up to 256; else as `write_zip`."""
    _check_resolution(resolution, 256)
    as_int("count", count, 1)
    try:
        import skimage.data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the example is made of scikit-image's photographs, and {error}; "
            "pip install 'stylegan_fast[train]'",
            name=error.name,
        ) from None
    photographs = [Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOGRAPHS]
    random = np.random.Generator(np.random.Philox(as_int("seed", seed, 0)))

    def crops() -> Iterator[tuple[Image.Image, int]]:
        for index in range(count):
            label = index % len(photographs)
            photograph = photographs[label]
            side = int(random.integers(resolution, min(photograph.size), endpoint=True))
            left, top = (int(random.integers(0, n - side, endpoint=True)) for n in photograph.size)
            crop = photograph.crop((left, top, left + side, top + side))
            yield _square(crop, resolution), label

    return write_zip(path, crops())


def write_zip(path: str | os.PathLike, items: Iterable[tuple[Image.Image, Any]]) -> Path:
    """Writes (image, label or None) in this module's layout; the file appears when complete.
    DatasetError unless the path is new, in an existing folder, and ends in .zip."""
    path = Path(path)
    if path.suffix != ".zip":
        raise DatasetError(f"{path}: the name of the new dataset must end in .zip")
    if path.exists():
        raise DatasetError(f"{path}: exists already; remove it or choose another name")
    if not path.parent.is_dir():
        raise DatasetError(f"{path}: there is no folder {path.parent}")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(part, "w") as archive:
            labels = []
            for index, (image, label) in enumerate(items):
                name = f"{index // 1000:05d}/img{index:08d}.png"
                png = io.BytesIO()
                image.save(png, "PNG")
                archive.writestr(_undated(name), png.getvalue())
                labels.append((name, label))
            labeled = any(label is not None for _, label in labels)
            archive.writestr(_undated(_LABELS), json.dumps({"labels": labels if labeled else None}))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _undated(name: str) -> zipfile.ZipInfo:
    """Equal content gives equal archives."""
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o644 << 16
    return entry


class _Source:
    """Files of a dataset, by their names relative to its root, with / between folders."""

    path: Path
    names: list[str]

    def open(self, name: str) -> IO[bytes]:
        raise NotImplementedError

    def labels(self) -> list[tuple[str, Any]] | None:
        """Names and labels of dataset.json, None where there are none."""
        found = [name for name in self.names if name.rpartition("/")[2] == _LABELS]
        if not found:
            return None
        name = min(found, key=lambda name: name.count("/"))  # zips often hold one folder of all
        root = name.removesuffix(_LABELS)
        try:
            with self.open(name) as file:
                entries = json.load(file)["labels"]
            if entries is None:
                return None
            return [(root + name.replace("\\", "/"), label) for name, label in entries]
        except Exception as error:  # a zip may be damaged too
            raise DatasetError(
                f'{self.path}/{name}: expected {{"labels": [[name, label], ...]}}, got {error!r}'
            ) from None


class _Folder(_Source):
    def __init__(self, path: Path):
        self.path = path
        self.names = [
            Path(folder, file).relative_to(path).as_posix()
            for folder, _, files in os.walk(path)
            for file in files
        ]

    def open(self, name: str) -> IO[bytes]:
        return (self.path / name).open("rb")


class _Zip(_Source):
    def __init__(self, path: Path):
        self.path = path
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        self.names = [entry.filename for entry in self._opened().infolist() if not entry.is_dir()]

    def open(self, name: str) -> IO[bytes]:
        return self._opened().open(name)

    def _opened(self) -> zipfile.ZipFile:
        """One handle a process: a forked one would share its position in the file."""
        if self._archive is None or self._archive[0] != os.getpid():
            self._archive = os.getpid(), zipfile.ZipFile(self.path)
        return self._archive[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}


def _open(path: Path) -> _Source:
    if path.is_dir():
        return _Folder(path)
    if not path.exists():
        raise DatasetError(f"{path}: no such folder or zip file")
    try:
        return _Zip(path)
    except Exception as error:  # zipfile raises more than BadZipFile
        raise DatasetError(f"{path}: neither a folder nor a zip file: {error}") from None


def _is_image(name: str) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
    return not hidden and name.lower().endswith(_SUFFIXES)


def _naturally(name: str) -> tuple:
    parts = re.split("([0-9]+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def _is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def _check_resolution(resolution: int, maximum: int = 2**14) -> None:
    if not _is_power_of_two(as_int("resolution", resolution, 4, maximum)):
        raise ValueError(f"resolution must be a power of two, got {resolution}")


def _square(image: Image.Image, side: int) -> Image.Image:
    """The largest square at the centre, resized."""
    w, h = image.size
    if (w, h) == (side, side):
        return image
    crop = min(w, h)
    left, top = (w - crop) // 2, (h - crop) // 2
    image = image.crop((left, top, left + crop, top + crop))
    return image.resize((side, side), Image.Resampling.LANCZOS)


def _warn(message: str, causes: Iterable[str], shown: int = 5) -> None:
    causes = list(causes)
    rest = f"; and {len(causes) - shown} more" if len(causes) > shown else ""
    warnings.warn(f"{message}: {'; '.join(causes[:shown])}{rest}", stacklevel=3)


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches the whole group; the main process decides when the workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
