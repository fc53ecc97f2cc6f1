"""A scoring run that is ended goes on from its last part, to the same bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_command import run

from imu_fast.cli import chunks
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.losses.cross_entropy import CrossEntropy


def test_a_run_goes_on_from_its_last_part(toy, monkeypatch):
    folder, options, _ = toy
    monkeypatch.setattr(chunks, "SAMPLES", 4)
    how = ["score", *options, "--batch-size", 2, "--curvature", "kfac", "--self-influence"]
    run(*how, "--checkpoint", folder / "whole", "--out", folder / "whole.npz")
    real, saved = GradientFactors.save, []

    def ends(self, path):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path)
        real(self, path)

    monkeypatch.setattr(GradientFactors, "save", ends)
    again = [*how, "--checkpoint", folder / "parts", "--out", folder / "again.npz"]
    with pytest.raises(BaseException):  # noqa: B017  # of typer's, or the interrupt itself
        run(*again)
    assert not (folder / "again.npz").exists() and len(saved) == 3
    later = []
    monkeypatch.setattr(
        GradientFactors, "save", lambda self, path: (later.append(path), real(self, path))[1]
    )
    assert "20 scores" in run(*again)
    assert len(later) == 2
    found, truth = np.load(folder / "again.npz"), np.load(folder / "whole.npz")
    for name in ("influence", "weight", "self_influence"):
        assert np.array_equal(found[name], truth[name])


def test_parts_of_another_run_are_refused(toy):
    folder, options, (x, y) = toy
    how = ["score", *options, "--checkpoint", folder / "parts", "--force"]
    out = ["--out", folder / "scores.npz"]
    run(*how, *out)
    truth = np.load(folder / "scores.npz")["influence"]
    run(*how, *out)  # all of it is there
    assert np.array_equal(np.load(folder / "scores.npz")["influence"], truth)
    assert "its reading is another" in run(*how, *out, "--layers", "1", code=2)
    np.savez(folder / "forget.npz", x=x.numpy() + 1, y=y.numpy())
    assert "its data is another" in run(*how, *out, code=2)
    np.savez(folder / "forget.npz", x=x.numpy(), y=y.numpy())
    state = torch.load(folder / "weights.pt")
    state["1.weight"] += 1
    torch.save(state, folder / "weights.pt")
    assert "its model is another" in run(*how, *out, code=2)
    (folder / "mine").mkdir()
    (folder / "mine" / "notes").write_text("")
    how[how.index(folder / "parts")] = folder / "mine"
    assert "other files" in run(*how, *out, code=2)


def test_parts_that_are_read_in_different_ways_are_refused(toy, monkeypatch):
    folder, options, _ = toy
    monkeypatch.setattr(chunks, "SAMPLES", 4)
    real, seen = GradientFactors.load, []

    def loads(path):
        found = real(path)
        seen.append(path)
        return replace(found, loss=CrossEntropy(label_smoothing=0.1 * (len(seen) > 1)))

    monkeypatch.setattr(GradientFactors, "load", loads)
    how = ["score", *options, "--batch-size", 2, "--checkpoint", folder / "parts"]
    assert "different ways" in run(*how, "--out", folder / "scores.npz", code=2)


def test_parts_are_of_the_classes_that_names_stood_for(toy):
    """Which class a folder is stands in a file beside the data."""
    pytest.importorskip("torchvision")
    image = pytest.importorskip("PIL.Image")
    folder, options, _ = toy
    for name in ("cat", "dog"):
        (folder / "images" / name).mkdir(parents=True)
        image.new("RGB", (2, 2), (9, 99, 200)).save(folder / "images" / name / "0.png")
    names = folder / "names.txt"
    names.write_text("cat\ndog\nemu\n")
    how = ["score", *options[:4], "--data", folder / "images", "--image-size", 2, "--force"]
    how += ["--classes", names, "--out", folder / "s.csv", "--checkpoint", folder / "parts"]
    run(*how)
    names.write_text("dog\ncat\nemu\n")
    assert "were read in another way" in run(*how, code=2)
