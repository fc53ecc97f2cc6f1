"""Every command as a user types it, what it writes, and the errors a tired user gets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from toy_command import run, toy_model

import imu_fast as imu
from imu_fast.cli.score_files import save_scores
from imu_fast.errors import InputError
from imu_fast.storage import load_tensors, replacing


@pytest.mark.parametrize("ending", ["npz", "parquet", "csv"])
def test_score_writes_what_the_library_computes(toy, ending):
    folder, options, data = toy
    out = folder / "out" / f"scores.{ending}"
    assert "20 scores" in run("score", *options, "--out", out)
    truth = imu.influence_scores(toy_model(), data).numpy()
    if ending == "npz":
        read = np.load(out)["influence"]
    elif ending == "parquet":
        pq = pytest.importorskip("pyarrow.parquet")
        read = pq.read_table(out)["influence"].to_numpy()
    else:
        lines = out.read_text().splitlines()
        assert lines[0] == "sample,influence,weight"
        read = np.array([float(line.split(",")[1]) for line in lines[1:]])
    np.testing.assert_allclose(read, truth, rtol=1e-6)
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_score_takes_a_damping_relative_to_the_mean_eigenvalue(toy):
    folder, options, data = toy
    how = {"curvature": "kfac", "damping": 0.3, "damping_mode": "relative"}
    flags = [x for key, value in how.items() for x in (f"--{key.replace('_', '-')}", value)]
    run("score", *options, *flags, "--out", folder / "scores.npz")
    truth = imu.influence_scores(toy_model(), data, **how).numpy()
    np.testing.assert_allclose(np.load(folder / "scores.npz")["influence"], truth, rtol=1e-5)


def test_unlearn_writes_weights_that_forget(toy):
    folder, options, (x, _) = toy
    data = (x, torch.zeros(20, dtype=torch.int64))  # one class can always be forgotten
    np.savez(folder / "forget.npz", x=data[0].numpy(), y=data[1].numpy())
    out = folder / "unlearned.safetensors"
    text = run("unlearn", *options, "--out", out, "--stop-accuracy", 0.0, "--epochs", 500)
    assert "forget_accuracy" in text
    model = toy_model()
    model.load_state_dict(load_tensors(out)[0])
    assert imu.evaluate(model, data)["accuracy"] == 0.0


def test_image_folder_and_torchvision_model(tmp_path):
    models = pytest.importorskip("torchvision").models
    image = pytest.importorskip("PIL.Image")
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(2):
            pixels = np.random.default_rng(i).integers(0, 255, (40, 36, 3), dtype=np.uint8)
            image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    weights = tmp_path / "resnet.safetensors"
    from imu_fast.storage import save_tensors

    save_tensors(weights, models.resnet18(num_classes=2).state_dict(), {})
    out = tmp_path / "scores.csv"
    run(
        "score",
        "--arch",
        "torchvision:resnet18",
        "--weights",
        weights,
        "--data",
        tmp_path / "images",
        "--image-size",
        32,
        "--out",
        out,
    )
    assert [line.split(",")[0] for line in out.read_text().splitlines()[1:]] == [
        "cat/0.png",
        "cat/1.png",
        "dog/0.png",
        "dog/1.png",
    ]


def test_one_class_folder_is_scored_under_its_own_class(toy):
    folder, options, _ = toy
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    (folder / "forget" / "dog").mkdir(parents=True)
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (2, 2, 3), dtype=np.uint8)
        image.fromarray(pixels).save(folder / "forget" / "dog" / f"{i}.png")
    options = [*options[:4], "--data", folder / "forget", "--image-size", 2]
    out = folder / "scores.npz"
    for command in ("score", "unlearn"):
        assert "the model 3 classes; say which" in run(command, *options, code=2)
    (folder / "classes.txt").write_text("cat\nzebra\ndog\n")
    run("score", *options, "--classes", folder / "classes.txt", "--out", out)
    found = np.load(out)["influence"]
    (folder / "forget" / "dog").rename(folder / "forget" / "2")
    run("score", *options, "--out", out, "--force")
    np.testing.assert_array_equal(found, np.load(out)["influence"])
    (folder / "forget" / "2").rename(folder / "forget" / "0")
    run("score", *options, "--out", out, "--force")
    assert not np.allclose(found, np.load(out)["influence"])


def test_own_architecture_beside_the_user(toy, monkeypatch):
    """A console script has its own folder on sys.path, not the current one."""
    folder, options, _ = toy
    monkeypatch.undo()
    script = folder / "bin" / "imu-fast"
    script.parent.mkdir()
    script.write_text(
        "import sys\n"
        "from imu_fast.cli.app import app\n"
        "before = list(sys.path)\n"
        "try:\n    app()\nfinally:\n    assert sys.path == before\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    command = [sys.executable, script, "score", *options, "--out", folder / "scores.csv"]
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "20 scores" in done.stdout


def test_weights_as_wrappers_save_them(toy):
    folder, options, _ = toy
    state = toy_model().state_dict()
    for prefix in ("module.", "_orig_mod.", "_orig_mod.module."):
        torch.save({prefix + k: v for k, v in state.items()}, folder / "weights.pt")
        assert "20 scores" in run("score", *options, "--out", folder / "scores.csv", "--force")


def test_data_of_another_dtype_and_a_folder_of_weights_are_told_the_way_out(toy):
    folder, options, (x, y) = toy
    np.savez(folder / "forget.npz", x=x.double().numpy(), y=y.numpy())
    assert "store x as float32" in run("score", *options, code=2)
    options[3] = folder
    assert "is a folder; name the file" in run("score", *options, code=2)


def test_weights_of_a_head_that_is_not_the_last_tensor(tmp_path):
    """safetensors sorts its tensors, so the head's name counts and not its place."""
    timm = pytest.importorskip("timm")
    from imu_fast.cli.model_files import build_model
    from imu_fast.storage import save_tensors

    model = timm.create_model("tiny_vit_5m_224", num_classes=7)
    save_tensors(tmp_path / "weights.safetensors", model.state_dict(), {})
    built = build_model("timm:tiny_vit_5m_224", tmp_path / "weights.safetensors")
    assert built.get_classifier().out_features == 7


def test_doctor_and_version_and_help():
    text = run("doctor")
    assert "torch" in text and "imu_fast._C" in text and "LAPACK" in text
    assert "imu_fast._C_cuda" in text and "cuSOLVER" in text
    assert run("--version") == imu.__version__
    for command in ("demo", "score", "unlearn", "check", "doctor"):
        assert command in run("--help")
        run(command, "--help")


def test_doctor_prints_remedies_whole_and_as_json(monkeypatch):
    from imu_fast.cli import doctor

    def absent(name):
        raise ModuleNotFoundError(name) if name != "timm" else OSError("[a] broken\nlibrary")

    there = {one["component"]: one for one in json.loads(run("doctor", "--json"))["components"]}
    assert there["torch"] == {
        "component": "torch",
        "here": torch.__version__,
        "available": True,
        "purpose": "the vectorised path; always there",
        "remedy": None,
    }
    monkeypatch.setattr(doctor, "import_module", absent)
    found = json.loads(run("doctor", "--json"))
    assert found["imu_fast"] == imu.__version__ and found["python"] in sys.version
    rows = {one["component"]: one for one in found["components"]}
    assert rows["matplotlib"]["remedy"] == "pip install 'imu_fast[demo]'"
    assert not rows["matplotlib"]["available"] and rows["matplotlib"]["here"] == "missing"
    assert rows["timm"]["here"] == "broken: [a] broken library"
    text = run("doctor")
    assert "'imu_fast[demo]'" in text and "'imu_fast[text]'" in text and "[a] broken" in text


def test_quick_demo(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    out = tmp_path / "demo"
    text = run("demo", "--out", out, "--quick")
    results = json.loads((out / "results.json").read_text())
    assert {row["method"] for row in results["rows"]} == {
        "original (nothing done)",
        "retrained without",
        "retrained, another seed",
        "random flips",
        "auto (head)",
        "IMU (head)",
    }
    for row in results["rows"]:
        assert f"{row['retain']:.3f}" in text
        if row["steps"] is not None:
            random = row["task"] == "50 random"
            assert row["stopped_by"] == ("unseen_accuracy" if random else "forget_accuracy")
            line = {"class 3": 0.0, "50 random": results["unseen_accuracy"]}
            assert row["forget"] <= line.get(row["task"], 0.5)
        if row["method"] == "retrained without":
            assert row["gap"] == row["kl"] == 0
    assert len(results["files"]) == 9
    for name in results["files"]:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert results["versions"]["torch"] == torch.__version__
    again = tmp_path / "again"
    run("demo", "--out", again, "--quick")
    keep = ("task", "method", "forget", "retain", "test", "member", "lr", "steps")
    repeated = json.loads((again / "results.json").read_text())
    assert [[r[k] for k in keep] for r in results["rows"]] == [
        [r[k] for k in keep] for r in repeated["rows"]
    ]


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


def test_files_are_whole_or_absent(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("old")
    with pytest.raises(ValueError, match="zip"):
        save_scores(path, ["a"], {"influence": torch.zeros(2)})
    assert path.read_text() == "old"
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["scores.csv"]
    with pytest.raises(InputError, match="must end"):
        save_scores(tmp_path / "scores.xls", ["a"], {"influence": torch.zeros(1)})


def test_membership_attack_on_what_it_can_and_cannot_tell():
    pytest.importorskip("sklearn")
    from imu_fast.evaluation.metrics import membership_accuracy

    high, low = 0.9 + 0.1 * torch.rand(200), 0.3 * torch.rand(200)
    assert membership_accuracy(high, low, 0.9 + 0.1 * torch.rand(50)) == 1.0
    assert membership_accuracy(high, low, 0.3 * torch.rand(50)) == 0.0


def test_evaluate():
    model, (x, y) = toy_model().train(), (torch.randn(9, 12), torch.arange(9) % 3)
    found = imu.evaluate(model, (x, y))
    logits = model(x).detach()
    assert found["n"] == 9 and model.training
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, y)))
    assert found["accuracy"] == pytest.approx(float((logits.argmax(1) == y).double().mean()))
    torch.testing.assert_close(found["confidence"], logits.softmax(1)[range(9), y])
    with pytest.raises(InputError, match="loader is empty"):
        imu.evaluate(model, [])


def test_real_photographs_from_an_image_folder(tmp_path, data_dir):
    """CIFAR-10's JPEG files, as a user would have them on disk, through the command line."""
    models = pytest.importorskip("torchvision").models
    from imu_fast.storage import save_tensors

    with np.load(data_dir / "cifar10_jpeg.npz") as file:
        content, offsets = file["test_bytes"], file["test_offsets"]
        labels, classes = file["test_labels"], file["classes"]
    for label in (0, 3):
        folder = tmp_path / "images" / str(classes[label])
        folder.mkdir(parents=True)
        for i in np.flatnonzero(labels == label)[:6]:
            (folder / f"{i}.jpg").write_bytes(content[offsets[i] : offsets[i + 1]].tobytes())
    weights = tmp_path / "resnet.safetensors"
    torch.manual_seed(0)
    save_tensors(weights, models.resnet18(num_classes=2).state_dict(), {})
    out = tmp_path / "scores.npz"
    where = ["--weights", weights, "--data", tmp_path / "images", "--image-size", 32]
    assert "12 scores" in run("score", "--arch", "torchvision:resnet18", *where, "--out", out)
    assert np.isfinite(np.load(out)["influence"]).all()


@pytest.mark.parametrize("module", ["imu_fast", "imu_fast.cli"])
def test_as_a_module(module):
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Usage: imu-fast" in done.stdout
