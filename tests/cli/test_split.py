"""Data in two on the command line: both parts are read by the other commands as the whole was."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from toy_command import run

import imu_fast as imu


def test_an_npz_becomes_two(toy):
    folder, options, (x, y) = toy
    data, out = ["--data", folder / "forget.npz"], folder / "new" / "split"
    assert "7 to forget, 13 stay" in run("split", *data, "--classes", 1, "--out", out)
    parts = imu.split((x, y), classes=1)
    for name, (inputs, labels) in zip(("forget", "retain"), parts, strict=True):
        with np.load(out / f"{name}.npz") as file:
            np.testing.assert_array_equal(file["x"], inputs.numpy())
            np.testing.assert_array_equal(file["y"], labels.numpy())
    scored = run("score", *options[:4], "--data", out / "forget.npz", "--out", folder / "s.csv")
    assert "7 scores" in scored
    assert sorted(p.name for p in out.parent.iterdir()) == ["split"]
    run("split", *data, "--fraction", 0.25, "--seed", 4, "--out", folder / "drawn")
    forget, _ = imu.split((x, y), fraction=0.25, seed=4)
    np.testing.assert_array_equal(np.load(folder / "drawn" / "forget.npz")["x"], forget[0].numpy())
    assert "is there already" in run("split", *data, "--classes", 1, "--out", out, code=2)


@pytest.fixture
def images(tmp_path):
    pytest.importorskip("torchvision")
    image = pytest.importorskip("PIL.Image")
    for name in ("cat", "dog", "owl"):
        (tmp_path / "images" / name / "more").mkdir(parents=True)
        for i in range(2):
            pixels = np.random.default_rng(i).integers(0, 255, (2, 2, 3), dtype=np.uint8)
            image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    os.replace(tmp_path / "images/dog/1.png", tmp_path / "images/dog/more/1.png")
    return tmp_path / "images"


def found(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("linked", [True, False])
def test_a_folder_becomes_two(images, toy, monkeypatch, linked):
    folder, options, _ = toy
    if not linked:

        def refused(*_):
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr("os.link", refused)
    whole, out = found(images), folder / "split"
    text = run("split", "--data", images, "--classes", "dog, owl", "--out", out)
    assert "4 to forget, 2 stay" in text and f"--classes {images}" in text
    forget = ["dog/0.png", "dog/more/1.png", "owl/0.png", "owl/1.png"]
    assert found(out / "forget") == forget and found(out / "retain") == ["cat/0.png", "cat/1.png"]
    assert (out / "forget/dog/0.png").samefile(images / "dog/0.png") is linked
    assert found(images) == whole
    for name in forget:
        assert (out / "forget" / name).read_bytes() == (images / name).read_bytes()
    run("split", "--data", images, "--fraction", 0.5, "--seed", 1, "--out", folder / "drawn")
    drawn = [found(folder / "drawn" / part) for part in ("forget", "retain")]
    assert len(drawn[0]) == 3 and sorted(drawn[0] + drawn[1]) == whole
    options = [*options[:4], "--image-size", 2, "--data", out / "forget", "--classes", images]
    assert "4 scores" in run("score", *options, "--out", folder / "scores.csv")


def test_what_cannot_be_split_is_one_line_and_writes_nothing(images, toy):
    folder, _, _ = toy
    npz, out = folder / "forget.npz", ["--out", folder / "split"]
    np.savez(folder / "odd.npz", x=np.zeros((2, 3)), y=np.zeros(3))
    for flags, message in [
        ([npz], "pass exactly one, --classes or --fraction"),
        ([npz, "--classes", 1, "--fraction", 0.5], "pass exactly one"),
        ([npz, "--classes", 1, "--seed", 1], "seed=1: classes draws nothing"),
        ([npz, "--classes", "cat"], "of an .npz, class indices"),
        ([npz, "--classes", 9], "no label is 9"),
        ([npz, "--fraction", 1.5], "fraction=1.5 must lie in (0, 1)"),
        ([npz, "--fraction", 0.001], "is none; pass at least"),
        ([folder / "odd.npz", "--classes", 0], "(2, 3) and y (3,)"),
        ([folder / "weights.pt", "--classes", 0], "is neither a folder"),
        ([folder / "nowhere", "--classes", 0], "is neither a folder"),
        ([images, "--classes", "bee"], "has no sub-folder 'bee'; it has cat, dog, owl"),
        ([images, "--classes", "cat,dog,owl"], "forgets all 6"),
        ([images, "--classes", "cat", "--out", images / "split"], "where it would be a class"),
    ]:
        before = found(folder)
        text = run("split", *out, "--data", *flags, code=2)
        assert text.startswith("error: ") and message in text, text
        assert found(folder) == before


def test_any_dtype_is_split(toy):
    folder, _, _ = toy
    x = torch.randint(0, 255, (6, 4), dtype=torch.uint8).numpy()
    np.savez(folder / "bytes.npz", x=x, y=np.array([0, 1] * 3, dtype=">i2"))
    run("split", "--data", folder / "bytes.npz", "--classes", 1, "--out", folder / "split")
    np.testing.assert_array_equal(np.load(folder / "split" / "forget.npz")["x"], x[1::2])
