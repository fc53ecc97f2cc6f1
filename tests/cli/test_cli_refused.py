"""The errors that a tired user gets: one line, by name, before the work; files whole or absent."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy_command import run, toy_model

from imu_fast.storage import load_tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--out", "scores.txt"], "must end in one of .npz, .parquet, .csv"),
        (["--data", "nowhere"], "data='nowhere' is neither a folder"),
        (["--weights", "none.pt"], "weights='none.pt' does not exist"),
        (["--arch", "resnet18"], "write torchvision:NAME"),
        (["--arch", "timm:no_such_model"], "cannot be built"),
        (["--arch", "no_such_module:f"], "cannot be built"),
        (["--arch", "torchvision:resnet18"], "do not fit"),
        (["--curvature", "hessian"], "curvature='hessian' is unknown"),
        (["--damping", "0"], "damping=0.0 must be finite and > 0"),
        (["--damping-mode", "half"], "damping_mode='half' is unknown; choose one of add,"),
        (["--damping", "-1"], "damping=-1.0 must be finite and > 0"),
        (["--damping", "nan"], "damping=nan must be finite and > 0"),
        (["--arch", "torchvision:fasterrcnn_resnet50_fpn"], "has no classifier"),
        (["--arch", ":make"], "cannot be built"),
        (["--batch-size", "0"], "batch_size=0"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(toy, monkeypatch, change, message):
    folder, options, _ = toy
    monkeypatch.chdir(folder)
    before = sorted(p.name for p in folder.iterdir() if p.name != "__pycache__")
    text = run("score", *options, *change, code=2)
    assert "error: " in text and message in text
    assert "Traceback" not in text
    assert sorted(p.name for p in folder.iterdir() if p.name != "__pycache__") == before


def test_bad_files(toy):
    folder, options, _ = toy
    rest = options[:4]
    np.savez(folder / "a.npz", images=np.zeros((2, 3)))
    assert "it needs x" in run("score", *rest, "--data", folder / "a.npz", code=2)
    np.savez(folder / "a.npz", x=np.zeros((2, 3)), y=np.zeros(3))
    assert "(2, 3) and y (3,)" in run("score", *rest, "--data", folder / "a.npz", code=2)
    np.savez(folder / "a.npz", x=np.zeros((2, 3), dtype=np.uint8), y=np.zeros(2))
    assert "float32" in run("score", *rest, "--data", folder / "a.npz", code=2)
    (folder / "empty").mkdir()
    assert "sub-folder per class" in run(
        "score", *rest, "--data", folder / "empty", "--image-size", 8, code=2
    )
    torch.save(toy_model(), folder / "whole.pt")
    whole = [*options, "--weights", folder / "whole.pt"]
    assert "save model.state_dict()" in run("score", *whole, code=2)
    torch.save([1, 2], folder / "list.pt")
    assert "no state dict" in run("score", *options, "--weights", folder / "list.pt", code=2)
    torch.save({"a": torch.zeros(2)}, folder / "flat.pt")
    assert "no linear layer" in run("score", *options, "--weights", folder / "flat.pt", code=2)
    assert ".safetensors" in run("unlearn", *options, "--out", folder / "a.pt", code=2)


def arrays(**named):
    def write(path):
        np.savez(path, **named)

    return write


def content(raw):
    def write(path):
        path.write_bytes(raw)

    return write


def shortened(path):
    np.savez(path, x=X, y=Y)
    path.write_bytes(path.read_bytes()[:-200])


def damaged(path):
    np.savez_compressed(path, x=X, y=Y)
    raw = bytearray(path.read_bytes())
    raw[120:160] = bytes(40)
    path.write_bytes(raw)


def single_array(path):
    with open(path, "wb") as file:
        np.save(file, X)


X, Y = np.ones((4, 12), np.float32), np.zeros(4, np.int64)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (content(b"not a zip"), "cannot be read"),
        (content(b""), "cannot be read"),
        (shortened, "cannot be read"),
        (damaged, "cannot be read"),
        (single_array, "a single array"),
        (arrays(x=X, y=np.array([0, 1, None, 2])), "cannot be read (Object arrays"),
        (arrays(x=X, y=Y.astype(float)), "y is float64; store class indices"),
        (arrays(x=X, y=Y > 1), "y is bool; store class indices"),
        (arrays(x=X, y=Y - 1), "y[0]=-1 is outside [0, 3)"),
        (arrays(x=X, y=np.array([0, 2, 3, 1])), "y[2]=3 is outside [0, 3); the model has 3"),
        (arrays(x=X, y=Y[:, None]), "(4, 12) and y (4, 1)"),
        (arrays(x=np.float32(1), y=Y), "store x [n, ...] and y [n]"),
        (arrays(x=X[:0], y=Y[:0]), "n >= 1"),
        (arrays(x=X[:, :11], y=Y), "cannot take a sample of shape (11,) and torch.float32"),
        (arrays(x=X.astype(np.float64), y=Y), "cannot take a sample of shape (12,) and torch.fl"),
        (arrays(x=X.astype(np.longdouble), y=Y), "store what the model takes"),
        (arrays(x=X.astype(complex), y=Y), "store what the model takes"),
        (arrays(x=X * np.nan, y=Y), "not finite at "),
    ],
)
@pytest.mark.parametrize("command", ["score", "unlearn"])
def test_bad_arrays(toy, command, write, message):
    folder, options, _ = toy
    path = folder / "forget.npz"
    write(path)
    before = sorted(folder.iterdir())
    text = run(command, *options, "--out", folder / ENDS[command], code=2)
    assert text.startswith("error: ") and message in text
    if "not finite" not in message:
        assert "data" in text
    assert sorted(p for p in folder.iterdir() if p.name != "__pycache__") == [
        p for p in before if p.name != "__pycache__"
    ]


ENDS = {"score": "scores.npz", "unlearn": "unlearned.safetensors"}


def test_arrays_of_another_machine(toy):
    folder, options, (x, y) = toy
    run("score", *options, "--out", folder / "a.npz")
    np.savez(folder / "forget.npz", x=x.numpy().astype(">f4"), y=y.numpy().astype(">u2"))
    run("score", *options, "--out", folder / "b.npz")
    np.testing.assert_array_equal(
        np.load(folder / "a.npz")["influence"], np.load(folder / "b.npz")["influence"]
    )


@pytest.mark.parametrize("command", ["score", "unlearn"])
def test_out_is_checked_before_the_work(toy, monkeypatch, command):
    folder, options, _ = toy
    monkeypatch.setattr("imu_fast.cli.model_files.build_model", None)  # the work would begin here
    name = ENDS[command]
    (folder / "sub" / name).mkdir(parents=True)
    text = run(command, *options, "--out", folder / "sub" / name, code=2)
    assert "is a folder; add a file name" in text
    text = run(command, *options, "--out", folder / "weights.pt" / "new" / name, code=2)
    assert "weights.pt' is no folder" in text
    monkeypatch.setattr(
        "os.access", lambda path, mode: not mode & os.W_OK
    )  # root may write anywhere
    text = run(command, *options, "--out", folder / "new" / name, code=2)
    assert f"the folder '{folder}' cannot be written to" in text
    assert not (folder / "new").exists()


def _arrays(path):
    """What a result file holds, by name."""
    return dict(np.load(path)) if path.suffix == ".npz" else load_tensors(path)[0]


def test_a_disk_that_fills_at_the_end_loses_no_result(toy, monkeypatch):
    folder, options, _ = toy
    whole = {command: folder / f"whole-{name}" for command, name in ENDS.items()}
    for command, out in whole.items():
        run(command, *options, "--out", out)
    (folder / "full").mkdir()
    (folder / "here").mkdir()
    monkeypatch.chdir(folder / "here")
    replace = os.replace

    def full(source, target):
        if "full" in str(target):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("os.replace", full)
    for command, name in ENDS.items():
        text = run(command, *options, "--out", folder / "full" / name, code=2)
        assert "cannot be written" in text and "No space left" in text
        kept = Path(re.search(r"the result is in '(.*)': move it", text)[1])
        assert kept.parent == folder / "here"
        ours, theirs = _arrays(kept), _arrays(whole[command])
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
    assert not list((folder / "full").iterdir())

    def everywhere(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", everywhere)
    for command, name in ENDS.items():
        text = run(command, *options, "--out", folder / "full" / name, code=2)
        assert "No space left" in text and "move it" not in text


def test_a_disk_that_is_too_small_is_said_before_the_work(toy, monkeypatch):
    folder, options, _ = toy
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    monkeypatch.setattr("imu_fast.unlearning.unlearn.unlearn", None)
    text = run("unlearn", *options, "--out", folder / "out.safetensors", code=2)
    assert "0 MB are free" in text


def test_demo_out_is_a_file(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    assert "is no folder" in run("demo", "--out", tmp_path / "file", code=2)
    assert "seed=-1" in run("demo", "--out", tmp_path / "new", "--seed", -1, code=2)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def make(:", "cannot be built: SyntaxError"),
        ("raise KeyError('x')", "cannot be built: KeyError"),
        ("make = 3", "is a int; name a function"),
        ("def other(): pass", "has no attribute 'make'"),
        ("def make(width): pass", "needs arguments (missing a required argument: 'width')"),
        ("def make(): return {}['depth']", "raised KeyError: 'depth'; python -c"),
        ("def make(): return None", "returned a NoneType; it must return a torch.nn.Module"),
        ("def make(): return nn.Linear(12, 3)", "weights.pt' do not fit arch='own_arch:make'"),
        ("def make(): return Odd(lambda x: x @ x[0, 0, 0, :1])", "cannot take a sample"),
        ("def make(): return Odd(lambda x: 3)", "returned a int without logits"),
        ("def make(): return Odd(lambda x: x.sum())", "of shape (); it must be the logits"),
        ("def make(): return Odd(lambda x: x[:, :3, 0, 0].exp())", "no linear layer makes"),
    ],
)
def test_bad_architectures(toy, monkeypatch, body, message):
    folder, options, _ = toy
    odd = (
        "from torch import nn\n"
        "class Odd(nn.Sequential):\n"
        "    def __init__(self, f):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))\n"
        "        self.f = f\n"
        "    def forward(self, x):\n"
        "        return self.f(x)\n"
    )
    (folder / "own_arch.py").write_text(odd + body + "\n")
    monkeypatch.delitem(sys.modules, "own_arch", raising=False)
    text = run("score", *options, "--arch", "own_arch:make", "--out", folder / "a.csv", code=2)
    monkeypatch.delitem(sys.modules, "own_arch", raising=False)
    assert text.startswith("error: ") and message in text


@pytest.mark.parametrize("cut", [0, 5, 40, -30])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_damaged_weights(toy, cut, ending):
    from imu_fast.storage import save_tensors

    folder, options, _ = toy
    path = folder / f"weights.{ending}"
    if ending == "safetensors":
        save_tensors(path, toy_model().state_dict(), {})
    for raw in (path.read_bytes()[:cut], b"\x80\x02" + bytes(range(256)), b"GARBAGE" * 9):
        path.write_bytes(raw)
        text = run("score", *options, "--weights", path, "--out", folder / "a.csv", code=2)
        assert text.startswith("error: weights=") and "broken" in text


def test_bad_checkpoints(toy):
    from imu_fast.storage import save_tensors

    folder, options, _ = toy
    path = folder / "run.safetensors"
    options += ["--out", folder / "out.safetensors", "--checkpoint"]
    save_tensors(folder / "other", {"a": torch.zeros(2)}, {"format": "pt"})
    save_tensors(folder / "json", {"a": torch.zeros(2)}, {"imu_fast": "{"})
    whole = (folder / "other").read_bytes()
    for raw in (b"", b"GARBAGE" * 9, whole, whole[:-3], (folder / "json").read_bytes()):
        path.write_bytes(raw)
        text = run("unlearn", *options, path, code=2)
        assert "is no checkpoint of unlearn, or is broken" in text and "delete it" in text
    assert "is a folder" in run("unlearn", *options, folder, code=2)
    assert not (folder / "out.safetensors").exists()


@pytest.mark.parametrize(
    "change",
    [
        ["--lr", "0"],
        ["--epochs", "0"],
        ["--seed", "-1"],
        ["--method", "magic"],
        ["--scope", "tail"],
        ["--preset", "pamphlet"],
        ["--preset", "paper"],
        ["--objective", "mse"],
        ["--precondition", "labels"],
        ["--stop-accuracy", "2"],
        ["--image-size", "0"],
        ["--lr", "1e30", "--epochs", "50", "--method", "uniform", "--scope", "all"],
    ],
)
def test_bad_options_of_unlearn(toy, change):
    folder, options, _ = toy
    out = folder / "out.safetensors"
    text = run("unlearn", *options, "--out", out, *change, code=2)
    assert text.startswith("error: ") and change[0][2:].replace("-", "_")[-8:] in text
    assert not out.exists()
