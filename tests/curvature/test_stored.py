"""An operator in a file: the same bits when it is read, refused by name when it is not whole."""

from __future__ import annotations

import json
import os
import random
import sys

import pytest
import torch
from cases import CASES, Pieces, head_factors
from dense_curvatures import every_curvature, spec_of
from torch import nn

import imu_fast as imu
from imu_fast.curvature.base import OPERATOR_FORMAT
from imu_fast.curvature.named import CURVATURES
from imu_fast.curvature.stored import FITTED
from imu_fast.errors import InputError
from imu_fast.losses.cross_entropy import CrossEntropy
from imu_fast.storage import load_tensors, save_tensors

SOME = pytest.mark.parametrize(
    "case", [CASES[0], CASES[1], CASES[2], CASES[3], CASES[8], CASES[9]], ids=lambda c: c.why
)


def same(saved, loaded, factors, *, wide=torch.float64):
    """Every answer, bit by bit."""
    for key in ("curvature", "layer", "damping", "dtype", "shape", "has_bias", "device"):
        assert getattr(saved, key) == getattr(loaded, key), key
    assert type(saved) is type(loaded)
    saved.residual = loaded.residual = 0.0
    generator = torch.Generator().manual_seed(0)
    many = torch.randn(3, *saved.shape, generator=generator, dtype=wide)
    for answer in (
        lambda m: m.diagonal(),
        lambda m: m @ many,
        lambda m: m @ many[0].float(),
        lambda m: m.solve(many[0]),
        lambda m: m.solve(many),
        lambda m: m.solve(many[1].bfloat16()),
        lambda m: m.self_influence(factors),
        lambda m: m.pairwise(factors, factors),
        lambda m: m.solve(many[0]),
        lambda m: torch.from_numpy(m.linear_operator() @ many[0].double().flatten().numpy()),
    ):
        a, b = answer(saved), answer(loaded)
        assert a.dtype == b.dtype and torch.equal(a, b)
        assert saved.residual == loaded.residual


def test_every_curvature_can_be_read():
    assert set(FITTED) == set(CURVATURES)


@every_curvature
@SOME
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [None, 2], ids=["whole", "pieces"])
def test_what_is_read_gives_the_same_bits(name, case, dtype, tokens, tmp_path):
    whole = head_factors(case, dtype)
    f = whole if tokens is None else Pieces(whole, tokens)
    fitted = imu.fit(spec_of(name), f)
    fitted.save(tmp_path / "new folder" / "m")
    same(fitted, imu.load_operator(tmp_path / "new folder" / "m"), whole)
    assert os.listdir(tmp_path / "new folder") == ["m"], "nothing temporary is left"
    # And again, once it has been solved with, which decides by what the next is solved.
    fitted.save(tmp_path / "m")
    again = imu.load_operator(tmp_path / "m")
    same(fitted, again, whole)
    again.save(tmp_path / "n")
    same(again, imu.load_operator(tmp_path / "n"), whole)


@pytest.mark.parametrize("solver", ["auto", "primal", "dual", "cg"])
@pytest.mark.parametrize("preconditioner", ["none", "kfac", "nystrom"])
def test_every_solver_of_the_ggn(solver, preconditioner, tmp_path, monkeypatch):
    module = sys.modules["imu_fast.curvature.ggn.iterative"]
    monkeypatch.setattr(module, "kfac_cost", lambda *_: -1e9)
    monkeypatch.setattr(module, "_FIRST_GUESS", 0)
    f = head_factors(CASES[7], torch.float32)
    spec = imu.GGN(damping=1e-3, solver=solver, preconditioner=preconditioner, tolerance=1e-9)
    fitted = imu.fit(spec, f)
    for _ in range(2):
        fitted.save(tmp_path / "m")
        loaded = imu.load_operator(tmp_path / "m")
        assert (loaded.solver, loaded.tolerance) == (solver, 1e-9)
        same(fitted, loaded, f)


@pytest.mark.parametrize("name", ["ggn", "ggn_block", "kfac", "ekfac"])
@pytest.mark.parametrize(
    "loss",
    [
        imu.CrossEntropy(label_smoothing=0.1, class_weights=(1.0, 0.5, 2.0)),
        imu.BinaryCrossEntropy(),
        imu.SquaredError(),
    ],
    ids=lambda loss: loss.name,
)
def test_every_loss(name, loss, tmp_path):
    torch.manual_seed(0)
    labels = torch.rand(9, 3) if loss.name != "cross_entropy" else torch.arange(9) % 3
    f = imu.GradientFactors.from_head(
        torch.randn(9, 4), torch.randn(3, 4), torch.randn(3), labels, loss=loss
    )
    given = imu.GradientFactors(
        f.delta, f.act, f.offsets, True, curvature=torch.eye(3).expand(9, 3, 3).contiguous()
    )
    for factors in (f, given):
        fitted = imu.fit(name, factors, damping_mode="relative")
        fitted.save(tmp_path / "m")
        same(fitted, imu.load_operator(tmp_path / "m"), f)


@every_curvature
def test_a_head_whose_signal_is_not_stored(name, tmp_path, monkeypatch):
    torch.manual_seed(0)
    module = sys.modules["imu_fast.factors.implicit_head"]
    monkeypatch.setattr(module, "_TILE_BYTES", 200)
    monkeypatch.setattr(module, "_FEWEST_CLASSES", 3)
    act, weight = torch.randn(9, 4), torch.randn(11, 4)
    f = imu.GradientFactors.from_head(act, weight, None, torch.arange(9), implicit=True)
    assert len(list(f.chunks())) > 2
    fitted = imu.fit(spec_of(name), f)
    fitted.save(tmp_path / "m")
    same(fitted, imu.load_operator(tmp_path / "m"), f.stored())


def damaged(content, rng):
    raw = bytearray(content)
    at = rng.randrange(len(raw))
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(raw[:at])
    if kind == 1:
        raw[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        raw[at:at] = rng.randbytes(3)
    else:
        raw[at : at + 4] = rng.randbytes(4)
    return bytes(raw) if bytes(raw) != content else content[:-1]


@every_curvature
def test_damage_is_refused_by_name(name, tmp_path):
    path = tmp_path / "m"
    imu.fit(spec_of(name), head_factors(CASES[1])).save(path)
    content, rng = path.read_bytes(), random.Random(0)
    for _ in range(60):
        path.write_bytes(damaged(content, rng))
        with pytest.raises(InputError, match=r"m' is (damaged|no readable)"):
            imu.load_operator(path)
    path.write_bytes(content)
    imu.load_operator(path)


def rewritten(path, change):
    tensors, metadata = load_tensors(path)
    text = json.loads(metadata["operator"])
    change(text, tensors)
    save_tensors(path, tensors, {"operator": json.dumps(text)})


@every_curvature
def test_what_does_not_belong_together_is_refused(name, tmp_path):
    """Written with a right checksum, by something else."""
    path = tmp_path / "m"
    fitted = imu.fit(spec_of(name), head_factors(CASES[1]))

    def drop(text, tensors):
        tensors.pop(next(iter(tensors)))

    changes = {
        "other shape": lambda text, _: text.update(shape=[6, 7]),
        "no shape": lambda text, _: text.pop("shape"),
        "a dtype": lambda text, _: text.update(dtype="float16"),
        "no bias": lambda text, _: text.pop("has_bias"),
        "another solver": lambda text, _: text["options"].update(solver="lu"),
        "no options": lambda text, _: text.pop("options"),
    }
    if name != "identity":
        changes["a tensor less"] = drop
        changes["a damping"] = lambda text, _: text.update(damping=-1.0)
    if name != "ggn":
        changes.pop("another solver")
    if name == "identity":
        changes.pop("other shape"), changes.pop("no options")
    for what, change in changes.items():
        fitted.save(path)
        rewritten(path, change)
        if what == "no options" and name in ("fisher_diag",):
            continue
        with pytest.raises(InputError, match=r"m' is damaged or was changed"):
            imu.load_operator(path)


def test_what_is_of_another_format_or_kind_is_refused(tmp_path):
    path = tmp_path / "m"
    fitted = imu.fit("kfac", head_factors(CASES[1]))
    fitted.save(path)
    rewritten(path, lambda text, _: text.update(format=OPERATOR_FORMAT + 1))
    with pytest.raises(InputError, match="m' has the operator format 3, this version reads 2"):
        imu.load_operator(path)
    fitted.save(path)
    rewritten(path, lambda text, _: text.update(curvature="shampoo"))
    with pytest.raises(InputError, match="m' holds curvature='shampoo', which this version"):
        imu.load_operator(path)
    head_factors(CASES[1]).save(path)
    with pytest.raises(InputError, match="m' holds no fitted curvature; save one by"):
        imu.load_operator(path)
    with pytest.raises(InputError, match="holds no gradient factors"):
        fitted.save(path)
        imu.GradientFactors.load(path)
    with pytest.raises(InputError, match="device='nowhere' cannot be used here"):
        imu.load_operator(path, device="nowhere")
    with pytest.raises(InputError, match="does not exist"):
        imu.load_operator(tmp_path / "nothing")
    path.write_bytes(b"")
    with pytest.raises(InputError, match="no readable safetensors file"):
        imu.load_operator(path)


@every_curvature
def test_a_place_that_cannot_be_written_is_refused_first(name, tmp_path):
    fitted = imu.fit(spec_of(name), head_factors(CASES[1]))
    with pytest.raises(InputError, match="is a folder"):
        fitted.save(tmp_path)


class Mine(CrossEntropy):
    """A loss that no file can name."""


def test_what_a_file_cannot_hold_is_refused_before_it_is_written(tmp_path, monkeypatch):
    f = head_factors(CASES[1])
    mine = imu.GradientFactors(f.delta, f.act, f.offsets, True, f.labels, loss=Mine())
    with pytest.raises(InputError, match="loss=Mine.*, which no file can name"):
        imu.fit("ggn", mine).save(tmp_path / "m")
    imu.fit("kfac", mine).save(tmp_path / "k")
    monkeypatch.setattr(sys.modules["imu_fast.factors.chunked"], "MAX_GATHERED", 100)
    with pytest.raises(InputError, match="holds its samples' factors, which are .* GB"):
        imu.fit("ggn", f).save(tmp_path / "m")
    assert os.listdir(tmp_path) == ["k"]


def test_the_trained_layer_it_came_from_need_not_be_there(tmp_path):
    """From a model to a file to a step, elsewhere."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(20, 6), torch.randint(3, (20,))
    factors = imu.capture(model, [(x, y)])
    fitted = imu.fit("kfac", factors, damping_mode="relative")
    gradient = factors.mean_gradient()
    step = fitted.solve(gradient)
    fitted.save(tmp_path / "kfac.safetensors")
    del model, factors, fitted
    again = imu.load_operator(tmp_path / "kfac.safetensors", device=torch.device("cpu"))
    assert again.shape == (3, 9) and again.has_bias
    assert torch.equal(again.solve(gradient), step) and step.dtype == torch.float32


@pytest.mark.parametrize("solver", ["auto", "cg"])
def test_what_was_made_for_earlier_solves_is_remembered(solver, tmp_path):
    """A factor makes all later solves cheap, and K-FAC is used from the first iteration on."""
    torch.manual_seed(0)
    weight = torch.randn(20, 40) / 6
    f = imu.GradientFactors.from_head(
        torch.rand(400, 40) + 1, weight, None, torch.randint(20, (400,))
    )
    fitted = imu.fit("ggn", f, damping=1e-4, solver=solver)
    v = torch.randn(50, 20, 40, dtype=torch.float64)
    first = fitted.solve(v[0])
    assert (fitted.direct.made, fitted.iterative.pays) == (None, True), "that took iterations"
    fitted.solve(v if solver == "auto" else v[1])
    fitted.save(tmp_path / "m")
    loaded = imu.load_operator(tmp_path / "m")
    assert loaded.direct.made == fitted.direct.made == ("primal" if solver == "auto" else None)
    later = loaded.solve(v[0])
    assert not torch.equal(later, first), "it is solved in another way by now"
    assert torch.equal(later, fitted.solve(v[0])) and loaded.residual == fitted.residual
    assert loaded.iterations == fitted.iterations
