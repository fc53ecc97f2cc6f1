"""``imu-fast unlearn``: the depth of random samples; files that are read are never written over."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toy_command import run, toy_model

import imu_fast as imu


def of(folder, name="unseen.npz"):
    """Samples with labels of which the toy model gets about half."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(40, 3, 2, 2)).astype(np.float32)
    y = rng.integers(0, 3, 40)
    np.savez(folder / name, x=x, y=y)
    return folder / name, (torch.from_numpy(x), torch.from_numpy(y))


def test_unseen_is_an_accuracy_or_data(toy):
    folder, options, _ = toy
    path, data = of(folder)
    line = imu.evaluate(toy_model(), data)["accuracy"]
    for name, given in (("accuracy", str(line)), ("data", path)):
        out = folder / f"{name}.safetensors"
        text = run("unlearn", *options, "--method", "margin_edit", "--unseen", given, "--out", out)
        assert "unseen_accuracy" in text
    assert "unseen_accuracy=1.5 must lie" in run("unlearn", *options, "--unseen", "1.5", code=2)
    assert "neither an accuracy" in run("unlearn", *options, "--unseen", "nowhere", code=2)


def test_auto_leaves_alone_what_is_predicted_no_better_than_unseen_data(toy):
    """As the library does: --unseen is its option, and --stop-accuracy a rule, which insists."""
    folder, options, _ = toy
    x = np.random.default_rng(4).normal(size=(9, 3, 2, 2)).astype(np.float32)
    with torch.no_grad():
        y = toy_model()(torch.from_numpy(x)).argmax(1).numpy()
    forget, out = folder / "few.npz", folder / "few.safetensors"
    np.savez(forget, x=x, y=y)
    named = dict(zip(options[::2], options[1::2], strict=True)) | {"--data": forget}
    few = [part for pair in named.items() for part in pair]
    few += ["--method", "auto", "--set", "task=samples", "--out", out]
    text = run("unlearn", *few, "--unseen", "0.9")
    assert "9 of 9 forget samples are right" in text and "(left_alone)" in text
    kept = toy_model().state_dict()
    assert all(torch.equal(v, kept[k]) for k, v in load_file(out).items())
    assert "(forget_accuracy)" in run("unlearn", *few, "--stop-accuracy", "0.5", "--force")


@pytest.mark.parametrize("command", ["score", "unlearn"])
def test_what_is_read_is_not_written_over(toy, command):
    folder, options, _ = toy
    named = dict(zip(options[::2], options[1::2], strict=True))
    for name in ("--data", "--weights"):
        before = open(named[name], "rb").read()
        text = run(command, *options, "--out", named[name], code=2)
        assert f"is {name[2:]}=" in text or "must end in" in text
        if command == "unlearn":
            text = run(command, *options, "--checkpoint", named[name], code=2)
            assert f"is {name[2:]}=" in text
        assert open(named[name], "rb").read() == before
    if command == "unlearn":
        same = folder / "same.safetensors"
        text = run(command, *options, "--out", same, "--checkpoint", same, code=2)
        assert "is checkpoint=" in text and not same.exists()
