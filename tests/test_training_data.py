"""Datasets of images: what is read, what is refused, and in which order."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="Pillow is in the extra train")

from PIL import Image

from stylegan_fast.__main__ import main
from stylegan_fast.training.data import (
    DatasetError,
    ImageDataset,
    InfiniteSampler,
    example,
    loader,
    write_zip,
)


def pixels(seed: int, height: int = 8, width: int = 8, *channels: int) -> np.ndarray:
    random = np.random.Generator(np.random.Philox(seed))
    return random.integers(0, 256, (height, width, *channels), np.uint8)


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def bare_png(width: int, height: int, data: bytes) -> bytes:
    """A gray PNG of any claimed size around these compressed bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def broken_pixels(side: int = 8) -> bytes:
    """The header is right, the pixels are not."""
    return bare_png(side, side, b"no zlib stream")


@pytest.fixture(params=["folder", "zip"])
def write(request, tmp_path):
    """Writes {name: bytes or array} as a dataset and returns its path."""

    def write(files):
        files = {
            name: png(content) if isinstance(content, np.ndarray) else content
            for name, content in files.items()
        }
        if request.param == "zip":
            path = tmp_path / "data.zip"
            with zipfile.ZipFile(path, "w") as archive:
                for name, content in files.items():
                    archive.writestr(name, content)
            return path
        path = tmp_path / "data"
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
        return path

    return write


def labels_of(*entries) -> bytes:
    return json.dumps({"labels": entries}).encode()


def test_images_come_in_natural_order_and_the_rest_is_ignored(write):
    images = {name: pixels(i, 8, 8, 3) for i, name in enumerate(["a/2.png", "a/10.png", "b.png"])}
    other = {"a/3.txt": b"text", "__MACOSX/a/._2.png": b"", ".hidden/1.png": b"", "notes.md": b""}
    data = ImageDataset(write({**dict(reversed(images.items())), **other}))
    assert data.names == list(images)
    assert (data.resolution, data.img_channels, data.c_dim, data.name) == (8, 3, 0, "data")
    for i, array in enumerate(images.values()):
        image, label = data[i]
        assert image.dtype == torch.uint8 and label.dtype == torch.float32
        assert label.shape == (0,)
        assert torch.equal(image, torch.from_numpy(array).permute(2, 0, 1))
    with pytest.raises(IndexError, match="3"):
        data[3]


def test_mirror_doubles_the_dataset(write):
    data = ImageDataset(write({"0.png": pixels(0, 8, 8, 3), "1.png": pixels(1, 8, 8, 3)}))
    mirrored = ImageDataset(data._source.path, mirror=True)
    assert len(mirrored) == 4
    for i in range(2):
        assert torch.equal(mirrored[i][0], data[i][0])
        assert torch.equal(mirrored[2 + i][0], data[i][0].flip(2))


def test_classes_become_one_hot_and_count_all_labels(write):
    files = {f"{i}.png": pixels(i) for i in range(3)}
    labels = labels_of(["2.png", 0], ["0.png", 2], ["1.png", 1], ["no.png", 4], ["x.png", [1]])
    data = ImageDataset(write({**files, "dataset.json": labels}), labels=True)
    assert data.c_dim == 5
    assert [data[i][1].tolist().index(1) for i in range(3)] == [2, 1, 0]
    assert all(data[i][1].sum() == 1 and data[i][1].shape == (5,) for i in range(3))
    assert ImageDataset(data._source.path).c_dim == 0


def test_vectors_stay_as_they_are_also_in_a_folder_inside(write):
    files = {f"all/x/{i}.png": pixels(i) for i in range(2)}
    labels = labels_of(["x\\0.png", [0.5, -2]], ["x/1.png", [3, 0.25]])
    data = ImageDataset(write({**files, "all/dataset.json": labels}), labels=True, mirror=True)
    assert data[0][1].tolist() == data[2][1].tolist() == [0.5, -2]
    assert data.label(3).tolist() == [3, 0.25]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no labels"),
        (json.dumps({"labels": None}).encode(), "no labels"),
        (labels_of(["0.png", 1]), "no label of 1.png"),
        (labels_of(["0.png", 1], ["1.png", [1.0]]), "all be classes"),
        (labels_of(["0.png", [1]], ["1.png", [1, 2]]), "all be classes"),
        (labels_of(["0.png", "cat"], ["1.png", "dog"]), "all be classes"),
        (labels_of(["0.png", [1.0]], ["1.png", [float("nan")]]), "all be classes"),
        (labels_of(["0.png", 0], ["1.png", -1]), "class -1"),
        (labels_of("0.png"), "expected"),
        (b"{]", "dataset.json: expected"),
        (b"[]", "dataset.json: expected"),
        (b"[" * 10**5, "dataset.json: expected"),
    ],
)
def test_labels_that_cannot_be_used(write, content, message):
    files = {"0.png": pixels(0), "1.png": pixels(1)}
    with pytest.raises(DatasetError, match=message):
        ImageDataset(
            write({**files, **({"dataset.json": content} if content else {})}), labels=True
        )


def test_resolution_crops_at_the_centre_and_resizes(write):
    wide = pixels(0, 16, 22, 3)
    data = ImageDataset(write({"0.png": wide, "1.png": pixels(1, 21, 5, 3)}), resolution=8)
    square = Image.fromarray(wide[:, 3:19])
    expected = np.asarray(square.resize((8, 8), Image.Resampling.LANCZOS))
    assert torch.equal(data[0][0], torch.from_numpy(expected.copy()).permute(2, 0, 1))
    assert data[1][0].shape == (3, 8, 8)


def test_channels_by_majority(tmp_path):
    gray, color = pixels(0), pixels(1, 8, 8, 3)
    clear = np.dstack([color, np.zeros((8, 8), np.uint8)])
    g, c, t = (Image.fromarray(array) for array in (gray, color, clear))
    palette = c.quantize(4)
    deep = Image.fromarray(gray.astype(np.uint16) * 256 + 7)

    def read(name, *images):
        data = ImageDataset(write_zip(tmp_path / name, [(image, None) for image in images]))
        return [data[i][0] for i in range(len(images))]

    grays = read("gray.zip", g, deep, c)
    colors = read("color.zip", t, palette, g, c)
    tie = read("tie.zip", g, c)
    assert all(image.shape == (1, 8, 8) for image in grays)
    assert torch.equal(grays[0][0], torch.from_numpy(gray))
    assert torch.equal(grays[1][0], torch.from_numpy(gray))
    luma = torch.from_numpy(color).double() @ torch.tensor([0.299, 0.587, 0.114]).double()
    assert (grays[2][0] - luma).abs().max() <= 1
    assert all(image.shape == (3, 8, 8) for image in colors + tie)
    assert (colors[0] == 255).all()
    reduced = torch.from_numpy(np.asarray(palette.convert("RGB")).copy())
    assert torch.equal(colors[1], reduced.permute(2, 0, 1))
    assert torch.equal(colors[2], torch.from_numpy(gray).expand(3, 8, 8))


@pytest.mark.parametrize("size", [(8, 16), (16, 16), (12, 12)])
def test_odd_sizes_are_named_or_left_out(write, size):
    path = write({"0.png": pixels(0), "1.png": pixels(1, *size), "2.png": pixels(2)})
    with pytest.raises(DatasetError, match=rf"1\.png: the image is {size[1]}×{size[0]}, not 8×8"):
        ImageDataset(path)
    with pytest.warns(UserWarning, match=r"1 of 3 images left out: .*1\.png"):
        data = ImageDataset(path, on_error="skip")
    assert data.names == ["0.png", "2.png"] and data.resolution == 8
    assert len(ImageDataset(path, resolution=4)) == 3


def test_no_size_fits(write):
    path = write({"0.png": pixels(0, 12, 12), "1.png": pixels(1, 8, 4)})
    with pytest.raises(
        DatasetError, match=r"0\.png: the image is 12×12, not a square with a power"
    ):
        ImageDataset(path)
    with pytest.raises(DatasetError, match=r"none of 2 images is usable; .*12×12"):
        ImageDataset(path, on_error="skip")


@pytest.mark.parametrize(
    "content, cause",
    [
        (b"", "not a known image"),
        (b"GIF? no", "not a known image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not a known image"),
        (bare_png(100_000, 100_000, b""), "100000×100000|exceeds limit"),
        (bare_png(10_000, 10_000, b""), "10000×10000 is more than Pillow's limit"),
    ],
)
def test_broken_headers_are_named_or_left_out(write, content, cause):
    path = write({"good.png": pixels(0), "wrong.png": content})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DatasetError, match=rf"wrong\.png: .*({cause})"):
            ImageDataset(path)
    with pytest.warns(UserWarning, match=r"1 of 2 images left out: .*wrong\.png"):
        assert ImageDataset(path, on_error="skip").names == ["good.png"]


def test_many_broken_images_are_counted_and_the_first_ones_named(write):
    path = write({"0.png": pixels(0), **{f"{i}.png": b"" for i in range(1, 9)}})
    with pytest.warns(UserWarning, match=r"8 of 9 images left out: .*5\.png.*; and 3 more"):
        ImageDataset(path, on_error="skip")


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_pixels_are_named_in_one_line(write, workers):
    files = {"0.png": pixels(0), "1.png": broken_pixels(), "2.png": pixels(2)}
    data = ImageDataset(write(files))
    with pytest.raises(DatasetError, match=r"1\.png: ") as caught:
        list(itertools.islice(loader(data, 3, InfiniteSampler(3), workers), 1))
    assert "\n" not in str(caught.value)


def test_the_next_good_image_stands_in_for_broken_pixels(write):
    whole = png(pixels(0, 64, 64, 3))
    labels = labels_of(["0.png", 0], ["1.png", 1], ["2.png", 2], ["3.png", 3])
    files = {
        "0.png": pixels(0, 64, 64, 3),
        "1.png": broken_pixels(64),
        "2.png": whole[: len(whole) // 2],
        "3.png": pixels(3, 64, 64, 3),
        "dataset.json": labels,
    }
    path = write(files)
    data = ImageDataset(path, labels=True, mirror=True, on_error="skip")
    with (
        pytest.warns(UserWarning, match=r"replaced by the next: .*1\.png"),
        pytest.warns(UserWarning, match=r"replaced by the next: .*2\.png: .*truncated"),
    ):
        image, label = data[1]
    assert torch.equal(image, data[3][0]) and label.tolist() == [0, 0, 0, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(data[6][0], image.flip(2))


def test_nothing_but_broken_pixels(write):
    data = ImageDataset(write({"0.png": broken_pixels()}), on_error="skip")
    with pytest.warns(UserWarning, match="replaced"), pytest.raises(DatasetError, match="no image"):
        data[0]


def test_paths_that_are_no_dataset(tmp_path):
    with pytest.raises(DatasetError, match="absent: no such folder"):
        ImageDataset(tmp_path / "absent")
    (tmp_path / "text.zip").write_text("text")
    with pytest.raises(DatasetError, match=r"text\.zip: neither a folder nor a zip"):
        ImageDataset(tmp_path / "text.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="empty: no images"):
        ImageDataset(tmp_path / "empty")


def test_damaged_zips(tmp_path):
    good = write_zip(tmp_path / "good.zip", [(Image.new("RGB", (8, 8)), 3)]).read_bytes()
    path = tmp_path / "bad.zip"
    path.write_bytes(good.replace(b'{"labels"', b'{"kabels"'))
    with pytest.raises(DatasetError, match=r"bad\.zip/dataset\.json: .*CRC"):
        ImageDataset(path, labels=True)
    directory = good.rindex(b"PK\1\2")
    path.write_bytes(good[: directory + 6] + b"\xff" + good[directory + 7 :])  # the version needed
    with pytest.raises(DatasetError, match=r"bad\.zip: neither a folder nor a zip file.*version"):
        ImageDataset(path)


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"resolution": 12}, r"resolution must be a power of two, got 12"),
        ({"resolution": 2}, "resolution must be at least 4, got 2"),
        ({"on_error": "ignore"}, "on_error must be 'raise' or 'skip', got 'ignore'"),
    ],
)
def test_arguments(tmp_path, arguments, error):
    with pytest.raises(ValueError, match=error):
        ImageDataset(tmp_path, **arguments)


def test_a_pickled_dataset_and_a_forked_one_open_the_zip_anew(tmp_path):
    data = ImageDataset(example(tmp_path / "data.zip", 8, count=6))
    handle = data._source._opened()
    copy = pickle.loads(pickle.dumps(data))
    assert copy._source._opened() is not handle
    assert all(torch.equal(data[i][0], copy[i][0]) for i in range(6))
    read = loader(data, 4, InfiniteSampler(6, seed=2), workers=2)
    alone = loader(data, 4, InfiniteSampler(6, seed=2))
    for (images, _), (expected, _) in itertools.islice(zip(read, alone), 5):
        assert torch.equal(images, expected)
    assert data._source._archive == (os.getpid(), handle)


def test_the_loader_leaves_the_state_of_the_training_alone(tmp_path):
    data = ImageDataset(example(tmp_path / "data.zip", 8, count=6))
    state = torch.get_rng_state()
    next(iter(loader(data, 4, InfiniteSampler(6))))
    assert torch.equal(torch.get_rng_state(), state)


def take(count, **arguments) -> list[int]:
    return list(itertools.islice(InfiniteSampler(**arguments), count))


def test_sampler_shuffles_each_epoch():
    order = take(21, size=7, seed=3)
    epochs = [order[:7], order[7:14], order[14:]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert take(21, size=7, seed=3) == order != take(21, size=7, seed=4)
    assert take(4, size=5, seed=0) == [0, 2, 1, 4]  # NumPy promises these bits


@pytest.mark.parametrize("start", [0, 5, 7, 30])
def test_sampler_resumes_exactly(start):
    assert take(20, size=7, seed=1, start=start) == take(50, size=7, seed=1)[start : start + 20]


def test_the_world_of_three_is_the_world_of_one():
    alone = take(36, size=7, seed=1, start=4)
    ranks = [take(12, size=7, seed=1, start=4, rank=r, num_replicas=3) for r in range(3)]
    assert [i for step in zip(*ranks) for i in step] == alone


@pytest.mark.parametrize(
    "arguments", [{"size": 0}, {"size": 3, "rank": 2, "num_replicas": 2}, {"size": 3, "start": -1}]
)
def test_sampler_refuses(arguments):
    with pytest.raises(ValueError, match=f"{list(arguments)[-1].split('_')[0]}|rank"):
        InfiniteSampler(**arguments)


def test_example_is_made_of_photographs_and_reproducible(tmp_path):
    first = example(tmp_path / "a.zip", 16, count=9, seed=1)
    second = example(tmp_path / "b.zip", 16, count=9, seed=1)
    assert first.read_bytes() == second.read_bytes()
    data = ImageDataset(first, labels=True)
    assert (len(data), data.resolution, data.img_channels, data.c_dim) == (9, 16, 3, 4)
    assert [data[i][1].argmax().item() for i in range(9)] == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    images = torch.stack([data[i][0] for i in range(9)]).double()
    assert len(images.flatten(1).unique(dim=0)) == 9
    assert (images.std(dim=(1, 2, 3)) > 5).all()


def test_write_zip_leaves_nothing_unfinished(tmp_path):
    def failing():
        yield Image.new("L", (8, 8)), None
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_zip(tmp_path / "a.zip", failing())
    assert list(tmp_path.iterdir()) == []


def test_a_name_in_a_zip_does_not_reach_the_terminal(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "hostile.zip", "w") as archive:
        archive.writestr("\x1b[2Ja.png", b"no image")
    assert main(["dataset", str(tmp_path / "hostile.zip"), str(tmp_path / "out.zip")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "\\x1b[2Ja.png: not a known image" in line and line.isprintable()


def test_enlarged_files_are_counted(write):
    files = {"a.png": pixels(0, 8, 8), "b.png": pixels(1, 7, 9), "c.png": pixels(2, 16, 9)}
    assert ImageDataset(write(files), 8, mirror=True).enlarged == 1
    assert ImageDataset(write(files), 4).enlarged == 0


def test_command(tmp_path, capsys, write):
    labels = labels_of(["x/0.png", 0], ["x/1.png", 1], ["x/2.png", 5])
    files = {"x/0.png": pixels(0, 9, 11), "x/1.png": broken_pixels(), "x/2.png": pixels(2, 8, 8)}
    source, out = str(write({**files, "dataset.json": labels})), str(tmp_path / "out.zip")
    assert main(["dataset", source, out, "--resolution", "4"]) == 2
    assert "x/1.png" in capsys.readouterr().err
    with pytest.warns(UserWarning, match=r"left out: .*1\.png"):
        assert main(["dataset", source, out, "--resolution", "4", "--skip-broken"]) == 0
    assert "2 images, 4×4, 1 channel, labels" in capsys.readouterr().out
    made = ImageDataset(out, labels=True)
    assert made.names == ["00000/img00000000.png", "00000/img00000001.png"]
    assert [made[i][1].argmax().item() for i in range(2)] == [0, 5]
    assert main(["dataset", source, out]) == 2
    assert main(["dataset", "--example", str(tmp_path / "e.zip"), "--count", "5"]) == 0
    assert "5 images, 32×32, 3 channels" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["absent", "out.zip"], "absent: no such folder"),
        (["absent"], "give SOURCE and OUT"),
        (["--example", "out.png"], "must end in .zip"),
        (["--example", "no/such/out.zip"], "there is no folder"),
        (["--example", "out.zip", "--resolution", "12"], "power of two, got 12"),
        (["--example", "out.zip", "--count", "0"], "count must be at least 1"),
    ],
)
def test_command_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["dataset", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]
