"""``imu-fast evaluate`` beside the library, and where the commands run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from toy_command import run, runner, toy_model

import imu_fast as imu
from imu_fast.cli.app import app
from imu_fast.cli.devices import device_named


def as_json(*arguments):
    """What is on stdout, alone."""
    done = runner.invoke(app, ["evaluate", *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_evaluate_says_what_the_library_does(toy):
    folder, options, data = toy
    before = sorted(p.name for p in folder.iterdir())
    found, truth = as_json(*options), imu.evaluate(toy_model(), data)
    assert found.keys() == {"accuracy", "loss", "n"} and found["n"] == 20
    assert found["accuracy"] == truth["accuracy"]
    assert found["loss"] == pytest.approx(truth["loss"], rel=1e-6)
    text = run("evaluate", *options, "--batch-size", 7, "--device", "cpu")
    assert text == f"accuracy {truth['accuracy']:.4f}, loss {truth['loss']:.4f}, n 20"
    names = sorted(p.name for p in folder.iterdir() if p.name != "__pycache__")
    assert names == before, "nothing is written"


def test_evaluate_reads_folders_as_the_others_do(toy):
    folder, options, _ = toy
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    for name in ("0", "2"):
        (folder / "images" / name).mkdir(parents=True)
        pixels = np.full((2, 2, 3), 40 * int(name), np.uint8)
        image.fromarray(pixels).save(folder / "images" / name / "a.png")
    options = [*options[:4], "--data", folder / "images", "--image-size", 2]
    assert as_json(*options)["n"] == 2, "the line on preprocessing is not on stdout"
    assert "images: shorter side 2" in run("evaluate", *options)


def test_evaluate_of_a_language_model(tmp_path):
    pytest.importorskip("transformers")
    import text_models as tm

    tm.folder(tmp_path / "gpt2", "gpt2")
    options = ["--model", tmp_path / "gpt2", "--data", tm.pairs(tmp_path / "qa.jsonl")]
    found = as_json(*options)
    assert found.keys() == {"accuracy", "loss", "n", "tokens", "token_loss"}
    assert found["n"] == len(tm.PAIRS) and found["tokens"] > found["n"]
    assert f"loss {found['loss']:.4f}, n {found['n']}, tokens" in run("evaluate", *options)


def test_what_cannot_be_evaluated_is_one_line(toy):
    folder, options, _ = toy
    for change, message in [
        (["--weights", folder / "none.pt"], "none.pt' does not exist"),
        (["--data", folder / "nowhere"], "is neither a folder"),
        (["--model", folder], "goes with --arch"),
        (["--batch-size", 0], "batch_size=0"),
    ]:
        text = run("evaluate", *options, *change, code=2)
        assert text.startswith("error: ") and message in text, text


@pytest.mark.parametrize("command", ["score", "unlearn", "evaluate"])
@pytest.mark.parametrize("name", ["mars", "meta", "cuda:97"])
def test_a_device_that_is_not_there_is_refused_first(toy, command, name):
    folder, options, _ = toy
    options = [*options, "--weights", folder / "none.pt", "--device", name]
    text = run(command, *options, code=2)
    assert text.startswith(f"error: device={name!r} is not to be had") and "there is cpu" in text


def test_the_default_is_a_gpu_where_there_is_one(monkeypatch):
    for there, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr("torch.cuda.is_available", lambda there=there: there)
        assert device_named(None) == torch.device(kind)
    assert device_named("cpu") == torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_says_what_the_cpu_does(toy):
    _, options, _ = toy
    here, there = (as_json(*options, "--device", name) for name in ("cpu", "cuda"))
    assert here["accuracy"] == there["accuracy"]
    assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)
