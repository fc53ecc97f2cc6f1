"""A checkpoint says what it belongs to, and is refused by name where anything differs."""

from __future__ import annotations

import copy
import json
import warnings

import every_option
import pytest
import torch

import imu_fast as imu
from imu_fast.storage import load_tensors, save_tensors

PROBLEM = every_option.problems()["random"]


def run(path, epochs=3, model=None, data=None, **options):
    model = copy.deepcopy(PROBLEM.model if model is None else model)
    options = {"method": "uniform", "batch_size": 8, "lr": 0.02, **options}
    return imu.unlearn(model, data or PROBLEM.data, epochs=epochs, checkpoint=path, **options)


def other_model():
    model = copy.deepcopy(PROBLEM.model)
    with torch.no_grad():
        model.fc1.bias[0] += 1e-6
    return model


def other_inputs():
    x, y = PROBLEM.data
    return x + 1e-9 * (torch.arange(len(x)) == 3)[:, None], y


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": other_model()}, "model"),
        ({"data": other_inputs()}, "forget set"),
        ({"data": (PROBLEM.data[0], PROBLEM.data[1].roll(1))}, "forget set"),
        ({"data": tuple(t.flip(0) for t in PROBLEM.data)}, "forget set"),
        ({"lr": 0.03}, "lr"),
        ({"seed": 1}, "seed"),
        ({"method": "npo"}, "method"),
        ({"optimizer": torch.optim.Adam}, "optimizer"),
        ({"weights": "loss"}, "weights"),
    ],
)
def test_another_run_is_refused_by_name(tmp_path, changed, said):
    path = tmp_path / "run.safetensors"
    run(path)
    before = path.read_bytes()
    with pytest.raises(imu.InputError, match=rf"another run \(differs in .*'{said}"):
        run(path, epochs=5, **changed)
    assert path.read_bytes() == before
    run(path, epochs=5, resume=False, **changed)
    assert path.read_bytes() != before


@pytest.mark.parametrize("factory", [torch.optim.Adam, torch.optim.RMSprop])
def test_optimizers_of_a_name_with_other_settings(tmp_path, factory):
    path = tmp_path / "run.safetensors"
    settings = {"optimizer": lambda t: factory(t, lr=0.01), "lr": None}
    whole = run(None, epochs=4, **settings)
    run(path, epochs=2, **settings)
    resumed = run(path, epochs=4, **settings)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(imu.InputError, match="differs in .*'optimizer state'"):
        run(path, epochs=6, optimizer=lambda t: factory(t, lr=0.02), lr=None)


@pytest.mark.parametrize("scope", ["head", "all"])
def test_milestones_do_not_fire_twice(tmp_path, scope):
    path, fired = tmp_path / "run.safetensors", []
    options = {
        "milestones": {f"{d:g}": imu.StopRule(forget_loss=d) for d in (0.2, 1.0, 1e9)},
        "on_milestone": lambda name, record: fired.append(name),
        "lr": 0.2,
        "scope": scope,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the last one is out of reach
        run(path, epochs=6, **options)
        assert "0.2" in fired
        run(path, epochs=12, **options)
        assert len(fired) == len(set(fired))


def test_a_run_that_has_ended_is_not_run_again(tmp_path):
    path, options = tmp_path / "run.safetensors", {"lr": 0.1, "stop": imu.StopRule(forget_loss=1.5)}
    first = run(path, epochs=200, **options)
    again = run(path, epochs=200, **options)
    assert again.stopped_by == first.stopped_by == "forget_loss"
    assert again.step_fraction == first.step_fraction and again.reached is True
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(imu.InputError, match=r"has ended at .*forget_loss=1.5.*go to .*=2\)"):
        run(path, epochs=200, lr=0.1, stop=imu.StopRule(forget_loss=2.0))


def damaged(path):
    """``(what, file)`` of damaged copies of a checkpoint."""
    whole, copies = path.read_bytes(), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        cut = int(torch.randint(len(whole), (1,), generator=generator))
        bit = 1 << int(torch.randint(8, (1,), generator=generator))
        flipped = bytearray(whole)
        flipped[cut] ^= bit
        copies += [(f"cut at {cut}", whole[:cut]), (f"bit at {cut}", bytes(flipped))]
    noise = torch.randint(256, (300,), generator=generator, dtype=torch.uint8)
    copies += [("noise", noise.numpy().tobytes()), ("empty", b""), ("text", b"checkpoint\n")]
    for k, (what, content) in enumerate(copies):
        file = path.with_name(f"damaged-{k}.safetensors")
        file.write_bytes(content)
        yield what, file


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    run(path)
    for what, file in damaged(path):
        with pytest.raises(imu.InputError, match=r"checkpoint=|path="):
            run(file, epochs=4)
            pytest.fail(what)


@pytest.mark.parametrize("missing", ["epochs", "passed", "belongs", "format", "indices"])
def test_files_that_lack_something(tmp_path, missing):
    path = tmp_path / "run.safetensors"
    run(path)
    tensors, metadata = load_tensors(path)
    record = json.loads(metadata["imu_fast"])
    record.pop(missing, None)
    kept = {k: v for k, v in tensors.items() if k != missing}
    save_tensors(path, kept, {"imu_fast": json.dumps(record)})
    with pytest.raises(imu.InputError, match="lacks|format"):
        run(path, epochs=4)


def test_a_budget_that_is_used_up(tmp_path):
    path = tmp_path / "run.safetensors"
    run(path, epochs=4)
    assert run(path, epochs=4).epochs == 4
    for options in ({"epochs": 3}, {"epochs": 9, "max_steps": 5}):
        with pytest.raises(imu.InputError, match="has made 4 epochs and 16 steps, more than"):
            run(path, **options)
    assert run(path, epochs=9, max_steps=16).steps == 16


@pytest.mark.parametrize("name", ["watch", "unseen"])
def test_sets_that_are_measured_belong_to_the_run(tmp_path, name):
    path, (x, y) = tmp_path / "run.safetensors", PROBLEM.data

    def options(labels):
        if name == "watch":
            return {"watch": {"w": (x[:5], labels)}}
        return {"stop": imu.StopRule(membership_auc=0.0, unseen=(x[:5], labels))}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(path, **options(y[:5]))
        with pytest.raises(imu.InputError, match="differs in .*set '(w|unseen)'"):
            run(path, epochs=4, **options((y[:5] + 1) % 4))


def test_the_target_is_tried_before_the_work(tmp_path):
    calls = []
    with pytest.raises(imu.InputError, match="checkpoint=.* is a folder"):
        run(tmp_path, callback=calls.append)
    assert not calls


def test_no_name_of_a_file_is_refused_before_the_work(tmp_path):
    calls = []
    for bad in (str(tmp_path / ("x" * 300)), "a\0b"):
        with pytest.raises(imu.InputError, match="^checkpoint=.*no file can have this name"):
            run(bad, callback=calls.append)
    assert not calls


def test_what_cannot_be_gone_on_from_says_the_way_out(tmp_path):
    path = tmp_path / "run.safetensors"
    run(path)
    tensors, metadata = load_tensors(path)
    record = json.loads(metadata["imu_fast"])

    def write(**changes):
        save_tensors(path, tensors, {"imu_fast": json.dumps(record | changes)})

    for spoil in (
        lambda: path.write_bytes(b"hello"),
        lambda: path.write_bytes(path.read_bytes()[:-3]),
        lambda: save_tensors(path, tensors, {}),
        lambda: save_tensors(path, tensors, {"imu_fast": "hello"}),
        lambda: save_tensors(path, {}, {"imu_fast": json.dumps(record)}),
        lambda: write(format=0),
        lambda: write(belongs={}),
    ):
        write()
        spoil()
        way_out = "^checkpoint=.*pass resume=False to overwrite it, or another name$"
        with pytest.raises(imu.InputError, match=way_out):
            run(path)
        run(path, resume=False)


@pytest.mark.parametrize("augments", [False, True])
def test_a_measured_set_may_shuffle_and_augment(tmp_path, augments):
    """What is only measured has no order that a run depends on."""
    x, y = PROBLEM.data

    class Noisy(torch.utils.data.TensorDataset):
        def __getitem__(self, i):
            a, b = super().__getitem__(i)
            return a + augments * torch.randn(a.shape, dtype=a.dtype), b

    def watched(labels=y):
        data = Noisy(x, labels)
        return {"w": torch.utils.data.DataLoader(data, batch_size=3, shuffle=True)}

    path = tmp_path / "run.safetensors"
    run(path, watch=watched())
    assert run(path, epochs=4, watch=watched()).epochs == 4
    with pytest.raises(imu.InputError, match="differs in .*set 'w'"):
        run(path, epochs=5, watch=watched((y + 1) % 4))


def test_another_order_of_the_forget_set_is_named(tmp_path):
    data = torch.utils.data.TensorDataset(*PROBLEM.data)
    path = tmp_path / "run.safetensors"

    def loader(seed):
        order = torch.Generator().manual_seed(seed)
        return torch.utils.data.DataLoader(data, batch_size=8, shuffle=True, generator=order)

    run(path, data=loader(1))
    assert run(path, epochs=4, data=loader(1)).epochs == 4
    with pytest.raises(imu.InputError, match=r"in \{'forget set, order'.*shuffle=False, or with"):
        run(path, epochs=5, data=loader(2))
