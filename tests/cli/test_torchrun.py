"""Commands in several processes write what one process writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from toy_command import run, toy_model

from imu_fast.storage import load_tensors

TESTS = Path(__file__).resolve().parents[1]


def test_two_processes_write_what_one_writes(toy):
    folder, options, (x, _) = toy
    kfac = ["--curvature", "kfac", "--self-influence"]
    layers = ["--layers", "1,3", "--curvature", "ekfac"]  # of drawn labels
    np.savez(folder / "one.npz", x=x[:1].numpy(), y=np.array([1]))
    one = [*options[:-1], folder / "one.npz"]
    np.savez(folder / "class.npz", x=x.numpy(), y=np.zeros(20, dtype=np.int64))
    forget = [*options[:-1], folder / "class.npz", "--stop-accuracy", 0.0, "--epochs", 500]
    (folder / "there.csv").write_text("mine")
    parts = ["--checkpoint", folder / "parts", "--batch-size", 3]
    commands = [
        ["score", *options, *kfac, "--out", folder / "two.npz"],
        ["score", *options, *layers, "--out", folder / "two.csv"],
        ["score", *one, "--out", folder / "two-of-one.npz"],
        ["unlearn", *forget, "--out", folder / "two.safetensors"],
        ["score", *options, "--out", folder / "there.csv"],
        ["score", *options, "--device", "cuda:0", "--out", folder / "no.csv"],
        ["score", *options, *kfac, *parts, "--out", folder / "parts.npz"],
        ["summary", *options, "--out", folder / "no.safetensors"],
    ]
    together = [str(a) for c in commands for a in ("--then", *c)][1:]
    command = [sys.executable, "-W", "ignore", str(TESTS / "commands.py"), str(folder), *together]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [[(folder / f"said-{r}-{k}").read_text() for k in range(8)] for r in range(2)]
    assert "20 scores" in said[0][0] and said[1][0] == "code 0\n"
    run("score", *options, *kfac, "--out", folder / "alone.npz")
    truth = np.load(folder / "alone.npz")
    for found in map(np.load, (folder / "two.npz", folder / "parts.npz")):
        assert found["sample"].tolist() == truth["sample"].tolist()
        for name in ("influence", "weight", "self_influence"):
            np.testing.assert_allclose(found[name], truth[name], rtol=1e-5, atol=2e-6)
    run("score", *options, *layers, "--out", folder / "alone.csv")
    rows = [np.genfromtxt(folder / f"{k}.csv", delimiter=",")[1:] for k in ("two", "alone")]
    np.testing.assert_allclose(*rows, rtol=1e-4, atol=1e-7)
    assert len(np.load(folder / "two-of-one.npz")["influence"]) == 1
    run("unlearn", *forget, "--out", folder / "alone.safetensors")
    (found, _), (truth, _) = (load_tensors(folder / f"{k}.safetensors") for k in ("two", "alone"))
    for name, tensor in toy_model().state_dict().items():
        torch.testing.assert_close(found[name], truth[name], rtol=1e-5, atol=1e-6)
        assert found[name].shape == tensor.shape
    assert "there already" in said[0][4] and said[1][4] == "code 2\n"
    assert (folder / "there.csv").read_text() == "mine"
    assert "--device cuda" in said[0][5]
    assert "runs in one process" in said[0][7] and not (folder / "no.safetensors").exists()
