"""Every command as a user types it, and what it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

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
