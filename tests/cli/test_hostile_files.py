"""Files that no honest user has: each is one line and exit code 2, or is read right."""

from __future__ import annotations

import csv
import io
import os
import struct
import sys
import zipfile

import numpy as np
import pytest
from toy_command import run, runner

import imu_fast.cli.score_files as score_files
from imu_fast.cli.app import app
from imu_fast.data.image_files import list_images
from imu_fast.errors import InputError

# Bytes that are no UTF-8, as Python shows them.
ODD = os.fsdecode(b"caf\xe9")


# A list of the list before, nine times, and so on: 9^10 of them when shown.
TEN, LAUGHS = range(1, 11), f"[{', '.join(['*l%d'] * 9)}]"


def refused(*arguments):
    """What is said: one line."""
    result = runner.invoke(app, [str(a) for a in arguments])
    assert isinstance(result.exception, SystemExit) and result.exit_code == 2, result.exception
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    "text",
    [
        "data: [digits]",
        "data: {digits: 1}",
        "data: 2020-01-01",
        "data: 3",
        "data: null",
        "data_path: 3",
        "data_path: [a]",
        "archs: 3",
        "archs: {resnet: 1}",
        "archs: null",
        "archs: [[resnet]]",
        "tasks: [3]",
        "tasks: 3",
        "tasks: [null]",
        "tasks: class-" + "9" * 5000,
        "tasks: class-\u0663",
        "tasks: 2020-01-01",
        "methods: [[margin edit]]",
        "methods: 1.5",
        "seeds: [5]",
        "seeds: {}",
        "seeds: true",
        "seeds: 2.0",
        "seeds: null",
        "seeds: -1",
        "seeds: " + "9" * 5000,
        "epochs: 2020-01-01",
        "train: many",
        "train: 0",
        "lr: .nan",
        "lr: .inf",
        "lr: yes",
        "lr: '0.1'",
        "workers: []",
        "max_steps: !!binary aGVsbG8=",
        "1: 2",
        "? [a]\n: 2",
        "null: 2",
        "seeds: 2\nseeds: 3",
        "a: !!python/object/apply:os.system [true]",
        "data: 2020-99-99",
        "data: *nowhere",
        "{" * 5000,
        "- " * 5000,
        "\x00",
        "\t- a",
        "!!set {data}",
        "just text",
        "",
        "a: &a [*a]",
        "\n".join(["l0: &l0 [x, x]", *(f"l{i}: &l{i} {LAUGHS % ((i - 1,) * 9)}" for i in TEN)]),
        "\n".join(["seeds:", "- &l0 [x]", *(f"- &l{i} {LAUGHS % ((i - 1,) * 9)}" for i in TEN)]),
    ],
)
def test_yaml_of_the_wrong_types(tmp_path, text):
    pytest.importorskip("yaml")
    path = tmp_path / "compare.yaml"
    path.write_text(text, encoding="utf-8")
    said = refused("compare", "--config", path, "--out", tmp_path / "out")
    assert len(said) < 1500 and not (tmp_path / "out").exists()


def test_yaml_that_is_no_text(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "compare.yaml"
    path.write_bytes(b"data: \xff\xfe")
    refused("compare", "--config", path, "--out", tmp_path / "out")
    refused("compare", "--config", tmp_path, "--out", tmp_path / "out")
    refused("compare", "--config", tmp_path / "absent.yaml", "--out", tmp_path / "out")


def header(text, version=1):
    raw = text.encode("latin1")
    size = struct.pack("<H" if version == 1 else "<I", len(raw))
    return b"\x93NUMPY" + bytes([version, 0]) + size + raw


def archive(path, x, y=None):
    made = io.BytesIO()
    np.save(made, np.zeros(4, np.int64))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x.npy", x)
        file.writestr("y.npy", made.getvalue() if y is None else y)


SHAPES = ("(-4, 12)", "(4, -12)", "(-4, -12)", "(-1,)", "(4611686018427387904, 4)", "(1" + "0" * 30)
HEADERS = [
    *(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {s}, }}" for s in SHAPES),
    f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**15},), }}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 12.0), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 4), }",
    "{'descr': '<f4', 'fortran_order': 3, 'shape': (4, 12), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (4, 12), }",
    "{'descr': '<f-4', 'fortran_order': False, 'shape': (4, 12), }",
    "{'descr': [('a', '<f4', -1)], 'fortran_order': False, 'shape': (4, 12), }",
    "{'descr': ('<f4', (-1,)), 'fortran_order': False, 'shape': (4, 12), }",
    "{'descr': '<f4'}",
    "{[]: 1}",
    "(" * 3000,
    "'''",
    "__import__('os').system('true')",
]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("text", HEADERS)
def test_headers_of_sizes_that_no_array_has(toy, text, version):
    folder, options, _ = toy
    archive(folder / "forget.npz", header(text, version) + bytes(192))
    assert "forget.npz" in refused("score", *options, "--out", folder / "s.npz")
    assert not (folder / "s.npz").exists()


def test_archives_that_are_none(toy):
    folder, options, _ = toy
    path = folder / "forget.npz"
    good = io.BytesIO()
    np.save(good, np.zeros((4, 12), np.float32))
    whole = good.getvalue()
    for x, y in ((b"no array", None), (b"", None), (whole, b"\x93NUMPY"), (b"\x93NU", b"")):
        archive(path, x, y)
        refused("score", *options, "--out", folder / "s.npz")
    with zipfile.ZipFile(path, "w") as file:  # as bytes, under the names themselves
        file.writestr("x", b"1234")
        file.writestr("y", b"1234")
    assert "is no array" in refused("score", *options, "--out", folder / "s.npz")


def images(folder, *classes, count=2):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 255, (2, 2, 3), dtype=np.uint8)
            image.fromarray(pixels).save(folder / name / f"{i}.png")


@pytest.mark.parametrize("link", ["0/up", "0/deep/up", "up", "0/self", "self"])
def test_folders_that_loop(toy, link):
    """A walk that follows them would give each image forty times."""
    folder, options, _ = toy
    data = folder / "images"
    images(data, "0", "2")
    (data / "0" / "deep").mkdir()
    target = data / link
    target.symlink_to(target if link.endswith("self") else data)
    options = [*options[:4], "--data", data, "--image-size", 2, "--out"]
    for command in (
        ("score", *options, folder / "s.csv"),
        ("unlearn", *options, folder / "u.safetensors"),
    ):
        assert "images" in refused(*command)
    refused("split", "--data", data, "--fraction", 0.5, "--out", folder / "parts")
    target.unlink()
    run("score", *options, folder / "s.csv")
    names = [line.split(",")[0] for line in (folder / "s.csv").read_text().splitlines()[1:]]
    assert names == ["0/0.png", "0/1.png", "2/0.png", "2/1.png"]


def test_a_link_to_another_folder_is_no_loop(tmp_path):
    images(tmp_path / "data", "0", "2")
    images(tmp_path / "elsewhere", "more")
    (tmp_path / "data" / "0" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    (tmp_path / "data" / "0" / "twice").symlink_to(tmp_path / "elsewhere")
    assert len(list_images(tmp_path / "data")[0]) == 8
    with pytest.raises(InputError, match="cannot be read"):
        list_images(tmp_path / "absent")


@pytest.mark.parametrize("argument", ["--data", "--weights", "--out", "--classes"])
def test_a_name_that_leads_to_itself_or_is_too_long(toy, argument):
    folder, options, _ = toy
    loop = folder / "loop.npz"
    loop.symlink_to(loop)
    images(folder / "images", "0")
    given = dict(zip(options[::2], options[1::2], strict=True)) | {"--out": folder / "s.npz"}
    if argument == "--classes":
        given |= {"--data": folder / "images", "--image-size": 2}
    for name in (loop, folder / ("n" * 300 + ".npz")):
        given[argument] = name
        refused("score", *(x for pair in given.items() for x in pair))
    given["--out"] = loop
    refused("split", "--data", loop, "--fraction", 0.5, "--out", folder / "parts")
    refused("split", "--data", folder / "forget.npz", "--fraction", 0.5, "--out", loop)


@pytest.mark.parametrize("ending", ["csv", "npz", "parquet"])
def test_names_that_are_no_utf8(toy, ending):
    """In the data, of what is read and of what is written."""
    if ending == "parquet":
        pytest.importorskip("pyarrow.parquet")
    folder, options, _ = toy
    images(folder / ODD, "0", "2")
    os.rename(folder / ODD / "0" / "0.png", folder / ODD / "0" / f"={ODD}.png")
    os.rename(folder / "weights.pt", folder / f"{ODD}.pt")
    given = [*options[:3], folder / f"{ODD}.pt", "--data", folder / ODD, "--image-size", 2]
    out = folder / f"{ODD}.{ending}"
    run("score", *given, "--out", out)
    names = {"0/1.png", "2/0.png", "2/1.png"}
    if ending == "csv":
        with open(out, encoding="utf-8", newline="") as file:
            found = {row["sample"] for row in csv.DictReader(file)}
        names |= {r"0/=caf\udce9.png"}
    elif ending == "npz":
        found, names = set(np.load(out)["sample"]), names | {f"0/={ODD}.png"}
    else:
        import pyarrow.parquet as pq

        with open(out, "rb") as file:
            found = set(pq.read_table(file)["sample"].to_pylist())
        names |= {r"0/=caf\udce9.png"}
    assert found == names
    run("split", "--data", folder / ODD, "--fraction", 0.5, "--out", folder / f"{ODD} parts")
    for name in ("absent", "absent.npz", "absent.jsonl"):
        refused("score", *options[:4], "--data", folder / f"{ODD}{name}", "--out", folder / "s.npz")


def test_such_names_in_a_pipe(toy, monkeypatch):
    """stdout itself takes no half of a pair, whatever a test's does."""
    folder, options, _ = toy
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, "utf-8", "strict"))
    options = [*options, "--out", folder / f"{ODD}.npz"]
    app(["score", *map(str, options)], standalone_mode=False)
    sys.stdout.flush()
    assert rb"caf\udce9.npz" in written.getvalue() and (folder / f"{ODD}.npz").is_file()


@pytest.mark.parametrize("name", ["=1+1", "+a", "-a", "@a", "\ta", "\ra", "\n=a"])
def test_names_of_a_csv_are_no_formulas(tmp_path, name):
    import torch

    path = tmp_path / "s.csv"
    score_files.save_scores(path, [name, "a"], {"influence": torch.tensor([-0.5, 0.5])})
    with open(path, encoding="utf-8", newline="") as file:
        assert list(csv.reader(file))[1:] == [[f"'{name}", "-0.5"], ["a", "0.5"]]
