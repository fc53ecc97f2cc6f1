"""Linear datamodeling score and memorisation: where the truth is known, and as a whole run."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from typer.testing import CliRunner

import imu_fast as imu
from imu_fast.cli.app import app
from imu_fast.evaluation.datamodels import (
    linear_datamodeling_score,
    memorisation,
    random_subsets,
)
from imu_fast.evaluation.lira import lira
from imu_fast.evaluation.trak import trak
from imu_fast.evaluation.validate import Candidate, candidates
from imu_fast.evaluation.validate import _best as best_of

nan = math.nan


def problem(n=40, m=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n + m, 5, generator=g)
    y = (x[:, 0] + 0.5 * torch.randn(n + m, generator=g) > 0).long()
    return (x[:n], y[:n]), (x[n:], y[n:])


def fitted(samples, seed):
    """Ridge-penalised logistic regression, to its optimum; the seed changes nothing."""
    torch.manual_seed(0)
    model = nn.Linear(5, 2)
    x, y = samples
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        penalty = sum((p**2).sum() for p in model.parameters())
        loss = nn.functional.cross_entropy(model(x), y) + 0.05 * penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return model.eval()


def test_score_is_spearmans_correlation_of_sums():
    g = torch.Generator().manual_seed(0)
    tau, outputs = torch.randn(12, 3, generator=g), torch.randn(7, 3, generator=g)
    tau[:, 2] = 1.0  # sums of equal numbers over subsets of equal size order nothing
    subsets = random_subsets(12, 7, seed=1)
    found = linear_datamodeling_score(tau, subsets, outputs)
    for j in range(2):
        sums = [float(tau[subset, j].sum()) for subset in subsets]
        assert float(found[j]) == pytest.approx(spearmanr(sums, outputs[:, j]).statistic)
    assert math.isnan(found[2])
    additive = subsets.double() @ tau[:, :2].double()
    perfect = linear_datamodeling_score(tau[:, :2], subsets, additive**3)
    assert perfect.tolist() == pytest.approx([1, 1]), "any monotone output"


@pytest.mark.parametrize("scale", [1.0, 1e-300, 1e300])
def test_sums_that_are_equal_are_tied_whatever_their_order(scale):
    g = torch.Generator().manual_seed(0)
    subsets, outputs = random_subsets(60, 40, seed=3), torch.randn(40, 5, generator=g)
    whole = torch.randint(0, 3, (60, 5), generator=g)
    found = linear_datamodeling_score(whole.double() * 0.1 * scale, subsets, outputs)
    sums = (subsets.long() @ whole).numpy()
    expected = [spearmanr(sums[:, j], outputs[:, j]).statistic for j in range(5)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_equal_attributions_order_nothing():
    g = torch.Generator().manual_seed(0)
    for n in (37, 2000):
        subsets, outputs = random_subsets(n, 40, seed=1), torch.randn(40, 3, generator=g)
        for value in (0.1, 0.0, -1 / 3):
            tau = torch.full((n, 3), value, dtype=torch.float64)
            assert linear_datamodeling_score(tau, subsets, outputs).isnan().all()


def test_memorisation_by_hand():
    subsets = torch.tensor([[True, False, True], [False, True, True]])
    losses = torch.tensor([[1.0, 5.0, 2.0], [4.0, 3.0, 2.0]])
    found = memorisation(subsets, losses)
    assert found[:2].tolist() == [3.0, 2.0] and math.isnan(found[2]), "no model lacks the third"


def test_subsets():
    subsets = random_subsets(10, 5, fraction=0.3, seed=3)
    assert subsets.shape == (5, 10) and subsets.sum(1).tolist() == [3] * 5
    assert torch.equal(subsets, random_subsets(10, 5, fraction=0.3, seed=3))
    assert len({tuple(s.tolist()) for s in subsets}) > 1
    for bad in (dict(fraction=1.0), dict(fraction=0.01), dict(fraction=nan)):
        with pytest.raises(imu.InputError, match="fraction"):
            random_subsets(10, 5, **bad)


def test_trak_is_the_product_of_its_papers_two_means():
    data, queries = (
        tuple(part.double() if part.is_floating_point() else part for part in one)
        for one in problem()
    )
    models = [
        fitted((data[0][rows].float(), data[1][rows]), 0).double()
        for rows in (slice(0, 25), slice(15, 40))
    ]

    def gradients(model, samples):
        rows = []
        for x, y in zip(*samples, strict=True):
            model.zero_grad()
            p = model(x).softmax(0)[y]
            torch.log(p / (1 - p)).backward()
            rows.append(torch.cat([q.grad.flatten() for q in model.parameters()]))
        return torch.stack(rows)

    g = torch.Generator().manual_seed(0)
    terms, rests = [], []
    for model in models:
        projection = (torch.randn(12, 8, generator=g) / 8**0.5).double()
        phi, theirs = (gradients(model, part) @ projection for part in (data, queries))
        # Of two classes the margin's gradients span six dimensions, so the ridge decides the rest.
        gram = phi.T @ phi
        gram += 1e-6 * gram.diagonal().mean() * torch.eye(8)
        terms.append(phi @ torch.linalg.solve(gram, theirs.T))
        rests.append(1 - model(data[0]).softmax(1)[range(40), data[1]].detach())
    expected = -(sum(rests) / 2)[:, None] * (sum(terms) / 2)
    found = trak(models, data, queries, width=8)
    # The system's condition is about 1e7: so many units of float64's last place.
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


def test_trak_of_a_double_model_in_training_mode():
    """It runs in evaluation mode, where dropout is nothing, and is left in training mode."""
    (x, y), (xq, yq) = problem()
    plain = fitted((x, y), 0)
    model = nn.Sequential(nn.Dropout(0.5), plain).double().train()
    found = trak([model], (x.double(), y), (xq.double(), yq), width=8)
    expected = trak([plain.double()], (x.double(), y), (xq.double(), yq), width=8)
    torch.testing.assert_close(found, expected)
    assert model.training


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x, y: (x, y + 9), r"is outside \[0, "),
        (lambda x, y: (x, torch.full_like(y, -100)), "samples have no label"),
        (lambda x, y: (x, y.float()), "integer class indices"),
        (lambda x, y: (x, y > 0), "torch.bool"),
        (lambda x, y: (x, y[:-1]), "inputs and"),
    ],
)
@pytest.mark.parametrize("which", [0, 1])
def test_trak_is_of_class_indices(change, match, which):
    pair = list(problem())
    model = fitted(pair[0], 0)
    pair[which] = change(*pair[which])
    with pytest.raises(imu.InputError, match=match):
        trak([model], *pair, width=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trak_of_a_half_precision_model_multiplies_in_float32(dtype):
    """Its gradients are rounded; their products with 512 columns are not rounded again."""
    (x, y), (xq, yq) = problem()
    model = fitted((x, y), 0).to(dtype)
    data, queries = (x.to(dtype), y), (xq.to(dtype), yq)
    found = trak([model], data, queries, width=4)
    wide = [(part[0].double(), part[1]) for part in (data, queries)]
    expected = trak([copy.deepcopy(model).double()], *wide, width=4)
    size = float(expected.abs().max())
    assert float((found - expected).abs().max()) < 8 * torch.finfo(dtype).eps * size
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(trak([model], data, queries, width=4), found)


def test_trak_of_logits_beyond_a_billion():
    model = nn.Linear(5, 3).double()
    (x, y), (xq, yq) = problem()
    data, queries = (x.double(), y), (xq.double(), yq)
    model.weight.data *= 1e11
    shifted = copy.deepcopy(model)
    shifted.bias.data += 1e12  # of all classes alike: the same probabilities
    found, other = (trak([m], data, queries, width=4) for m in (model, shifted))
    torch.testing.assert_close(found, other, rtol=1e-2, atol=1e-3 * float(found.abs().max()))


def test_trak_is_of_models_that_return_logits():
    broken = fitted(problem()[0], 0)
    with torch.no_grad():
        broken.weight[0, 0] = nan
    with pytest.raises(imu.InputError, match="a model's gradients is not finite"):
        trak([broken], *problem(), width=8)
    (x, y), queries = problem()
    for bad in ((x.numpy(), y), (x, y.tolist()), [(x, y)], (x[:0], y[:0])):
        with pytest.raises(imu.InputError, match=r"^data(\[\d\])? (is a|has 0)"):
            trak([fitted((x, y), 0)], bad, queries, width=8)

    with pytest.raises(imu.InputError, match="models is empty"):
        trak([], *problem())
    with pytest.raises(imu.InputError, match=r"returns .*; trak\(\) takes models that return"):
        trak([nn.Flatten(0)], *problem())


def test_a_setting_without_a_score_is_not_the_best():
    assert best_of({"a": nan, "b": -0.1, "c": -0.2}) == "b"
    assert best_of({"a": nan, "b": nan}) == "a"


def test_exact_influence_predicts_retraining_and_chance_does_not(tmp_path):
    data, test = problem()
    given = dict(subsets=60, repeats=1, progress=False, folder=tmp_path, layers=None)
    found = imu.validate(fitted, data, test, **given)
    scores = {row["candidate"]: row for row in found.lds}
    assert set(scores) == set(candidates()) and set(imu.curvatures()) < set(scores)
    assert scores["ggn"]["lds"] > 0.6 > 0.4 > abs(scores["random"]["lds"])
    assert all(row["low"] <= row["lds"] <= row["high"] for row in found.lds)
    assert {row["setting"] for row in found.grid if row["candidate"] == "identity"} == {""}
    memorised = {row["candidate"]: row["spearman"] for row in found.memorisation}
    assert memorised["ggn"] > 0.6 and "TRAK" not in memorised
    # What is kept is not trained again; another seed is.
    fresh = []
    again = imu.validate(lambda s, seed: fresh.append(seed) or fitted(s, seed), data, test, **given)
    assert again == found and len(fresh) == 1 + 5, "the whole, and TRAK's halves"
    imu.validate(lambda s, seed: fresh.append(seed) or fitted(s, seed), data, test, **given, seed=9)
    assert len(fresh) == 6 + 60 + 6
    path = next(iter(tmp_path.glob("subset-000-*")))
    path.write_bytes(path.read_bytes()[:-3] + b"abc")
    with pytest.raises(imu.InputError, match=path.name):
        for seed in (0, 9):
            imu.validate(fitted, data, test, **given, seed=seed)


def test_data_are_tensors_with_class_indices():
    """What cannot be told from other data by its digest would have the losses of other data."""
    data, test = problem()
    one_hot = nn.functional.one_hot(data[1], 2)
    for bad, match in (
        ((data[0].numpy(), data[1].numpy()), r"data\[0\] is a ndarray"),
        ((data[0], data[1].tolist()), r"data\[1\] is a list"),
        ([data], "data is a list"),
        ((data[0], data[1].float()), "data: labels have dtype torch.float32; pass integer"),
        ((data[0], one_hot.float()), r"data: .*one-hot.*argmax"),
        ((data[0], data[1] > 0), "data: labels have dtype torch.bool"),
    ):
        with pytest.raises(imu.InputError, match=match):
            imu.validate(pytest.fail, bad, test, subsets=2)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (lambda t: t.numpy(), "is a ndarray"),
        (lambda t: t.tolist(), "is a list"),
        (lambda t: t + 0j, "dtype torch.complex"),
        (lambda t: t.to("meta"), "meta device"),
        (lambda t: t.to_sparse(), "is sparse"),
    ],
)
def test_measures_are_of_dense_real_tensors(bad, match):
    """A complex number would lose its imaginary part."""
    subsets, tau, outputs = random_subsets(6, 4), torch.randn(6, 2), torch.randn(4, 2)
    plain = torch.randn(4, 6)
    for call in (
        lambda: linear_datamodeling_score(bad(tau), subsets, outputs),
        lambda: linear_datamodeling_score(tau, subsets, bad(outputs)),
        lambda: linear_datamodeling_score(tau, bad(subsets), outputs),
        lambda: memorisation(subsets, bad(plain)),
        lambda: lira(bad(plain[0]), plain),
        lambda: lira(plain[0], bad(plain)),
        lambda: lira(plain[0], plain, bad(plain)),
    ):
        with pytest.raises(imu.InputError, match=match):
            call()


def test_a_candidate_of_ones_own_and_bad_input():
    data, test = problem()
    mine = {"mine": Candidate({"": lambda model, halves, d, q: torch.ones(len(d[1]), len(q[1]))})}
    found = imu.validate(fitted, data, test, subsets=2, repeats=1, progress=False, extra=mine)
    assert math.isnan({row["candidate"]: row["lds"] for row in found.lds}["mine"])
    for name, bad in (("data", (data[0][:3], data[1][:3])), ("test", (test[0], test[1][:4]))):
        with pytest.raises(imu.InputError, match=f"{name} has"):
            imu.validate(fitted, **{"data": data, "test": test, name: bad})
    for few in (0, 1):  # before anything is trained
        with pytest.raises(imu.InputError, match="subsets"):
            imu.validate(pytest.fail, data, test, subsets=few)

    trained = []

    def noted(samples, seed):
        trained.append(seed)
        return fitted(samples, seed)

    def broken(model, halves, d, q):
        raise RuntimeError("no such layer")

    failing = {"mine": Candidate({"": broken})}
    with pytest.raises(imu.InputError, match=r"'mine' cannot .*no such layer.*without=\('mine',\)"):
        imu.validate(noted, data, test, extra=failing, progress=False)
    assert len(trained) == 1, "before the retraining"
    left = imu.validate(
        fitted,
        data,
        test,
        subsets=2,
        repeats=1,
        extra=failing,
        without=("mine", "TRAK"),
        progress=False,
    )
    assert not {"mine", "TRAK"} & {row["candidate"] for row in left.lds}
    with pytest.raises(imu.InputError, match="without='magic' is unknown"):
        imu.validate(fitted, data, test, without=("magic",))

    def diverged(samples, seed):
        model = fitted(samples, seed)
        with torch.no_grad():
            model.weight.fill_(nan)
        return model

    with pytest.raises(imu.InputError, match="finite"):
        imu.validate(diverged, data, test, subsets=2, progress=False)


def test_command(tmp_path):
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["validate", "--quick", "--subsets", "4", "--out", str(out)])
    assert done.exit_code == 0, done.output
    results = json.loads((out / "results.json").read_text())
    assert results["subsets"] == 4 and results["quick"] is True
    table = (out / "table.md").read_text()
    assert all(name in table for name in candidates()) and "nan" not in table
    assert (out / "lds.png").read_bytes()[:4] == b"\x89PNG"
    failed = CliRunner().invoke(app, ["validate", "--data", "mnist", "--out", str(tmp_path / "b")])
    assert failed.exit_code == 2 and "data='mnist' is unknown" in failed.output
