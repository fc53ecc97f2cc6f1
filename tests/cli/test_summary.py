"""``imu-fast summary`` and ``imu-fast unlearn --summary``: the library's own."""

import numpy as np
import torch
from safetensors.torch import load_file
from toy_command import run, toy_model

import imu_fast as imu


def samples(folder, name, seed, count):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 3, 2, 2)).astype(np.float32)
    model = toy_model()
    with torch.no_grad():
        y = model(torch.from_numpy(x)).argmax(1).numpy()
    y[::4] = (y[::4] + 1) % 3
    np.savez(folder / name, x=x, y=y)
    return folder / name, (torch.from_numpy(x), torch.from_numpy(y))


def test_it_is_the_librarys_and_unlearn_takes_it(toy):
    folder, options, _ = toy
    model = dict(zip(options[::2], options[1::2], strict=True))
    model.pop("--data")
    model = [part for pair in model.items() for part in pair]
    train, data = samples(folder, "train.npz", 1, 120)
    unseen, held = samples(folder, "unseen.npz", 2, 40)
    out = folder / "summary.safetensors"
    text = run("summary", *model, "--data", train, "--out", out, "--unseen", unseen)
    kept = imu.save_summary(toy_model(), data, folder / "library", unseen=held)
    assert repr(imu.load_summary(out)) == repr(kept) and f"{kept!r}; written to" in text
    assert "is there already" in run("summary", *model, "--data", train, "--out", out, code=2)
    assert "must end in" in run("summary", *model, "--data", train, "--out", "a.npz", code=2)
    bare = ("--inner-layers", "none", "--out", folder / "bare.safetensors")
    assert "no layer before it" in run("summary", *model, "--data", train, *bare)
    other = ("--inner-layers", "none at all", "--out", folder / "c.safetensors")
    assert "none at all" in run("summary", *model, "--data", train, *other, code=2)
    nowhere = ("--unseen", "nowhere", "--out", folder / "b.safetensors")
    assert "neither an accuracy" in run("summary", *model, "--data", train, *nowhere, code=2)

    forget, some = folder / "forget.npz", (data[0][1:24], data[1][1:24])
    np.savez(forget, x=some[0].numpy(), y=some[1].numpy())
    told = ("--method", "self_distillation", "--summary", out, "--stop-accuracy", 0.5)
    done = folder / "done.safetensors"
    run("unlearn", *model, "--data", forget, *told, "--out", done)
    ours = imu.unlearn(
        toy_model(),
        some,
        "self_distillation",
        summary=kept,
        stop=imu.StopRule(forget_accuracy=0.5),
    )
    for name, tensor in load_file(done).items():
        assert torch.allclose(tensor, ours.model.state_dict()[name], atol=1e-5), name
    same = ("--method", "auto", "--summary", out, "--out", out)
    assert "is summary=" in run("unlearn", *model, "--data", forget, *same, code=2)
