"""Every forget-only method: what defines it, and that it forgets and leaves the rest alone."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import imu_fast as imu
from imu_fast.errors import InputError
from imu_fast.model.batches import ForgetSet
from imu_fast.model.reading import Reading
from imu_fast.ops.objective import NPO_BETA
from imu_fast.unlearning.ascent.network import NetworkSteps
from imu_fast.unlearning.ascent.objectives import NPO
from imu_fast.unlearning.ascent.wrong_labels import nearest_wrong_labels
from imu_fast.unlearning.ascent.wrong_labels import random_wrong_labels as wrong_labels
from imu_fast.unlearning.auto import Auto, is_class
from imu_fast.unlearning.named import methods

CLASSES, WIDTH = 5, 12


@pytest.fixture(scope="module")
def problem():
    """A trained two-layer network, and its training set."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(200) % CLASSES
    centres = 2 * torch.randn(CLASSES, 8, generator=generator)
    x = centres[y] + torch.randn(200, 8, generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, y


def job(model, data, seed=0):
    """As much of a run's job as an objective reads."""
    return SimpleNamespace(
        model=model, forget=ForgetSet(data, 16, model), seed=seed, reading=Reading()
    )


def accuracy(model, x, y):
    return float((model(x).argmax(dim=1) == y).double().mean())


@pytest.mark.parametrize("name", methods())
@pytest.mark.parametrize("kind", ["class", "random"])
def test_every_method_reaches_a_depth(problem, name, kind):
    model, x, y = problem
    rows = y == 2 if kind == "class" else torch.arange(200) < 30
    stop = imu.StopRule(forget_accuracy=0.0 if kind == "class" else 0.5)
    changed = copy.deepcopy(model)
    body = changed[0].weight.clone()
    scope = "all" if name == "boundary_shrink" else "head"
    options = dict(scope=scope, lr=0.3 if scope == "head" else 0.05, epochs=400)
    if name in ("margin_edit", "newton_removal", "self_distillation", "auto"):
        options = {}
    result = imu.unlearn(changed, (x[rows], y[rows]), method=name, stop=stop, **options)
    assert result.stopped_by == "forget_accuracy"
    assert accuracy(changed, x[rows], y[rows]) <= stop.forget_accuracy
    assert result.trajectory[-1]["forget_accuracy"] <= stop.forget_accuracy
    if scope == "head" and name != "self_distillation":
        assert torch.equal(changed[0].weight, body)


def test_relabelling_targets_are_wrong_and_seeded(problem):
    model, x, y = problem
    data = x[:50], y[:50]
    drawn, offsets = wrong_labels(job(model, data, 3))
    assert torch.equal(offsets, torch.arange(51))
    assert torch.equal(drawn, wrong_labels(job(model, data, 3))[0])
    assert not torch.equal(drawn, wrong_labels(job(model, data, 4))[0])
    near, _ = nearest_wrong_labels(job(model, data))
    for targets in (drawn, near):
        assert targets.dtype == torch.int64 and bool((targets != y[:50]).all())
        assert int(targets.min()) >= 0 and int(targets.max()) < CLASSES
    # The nearest class of a confidently classified sample is mostly the runner-up where it is.
    runner_up = model(x[:50]).scatter(1, y[:50, None], -torch.inf).argmax(dim=1)
    assert float((near == runner_up).double().mean()) > 0.7


def test_boundary_shrink_wants_inputs_that_can_move(problem):
    model, _, y = problem
    tokens = nn.Sequential(nn.Embedding(9, 8), nn.Flatten(), *model)
    with pytest.raises(InputError, match="one floating tensor"):
        imu.unlearn(
            tokens, (torch.randint(9, (20, 1)), y[:20]), method="boundary_shrink", scope="all"
        )


def test_npo_starts_as_ascent_and_then_slows_down(problem):
    model, x, y = problem
    losses = NPO().auxiliary(job(model, (x[:40], y[:40]))).values
    expected = nn.functional.cross_entropy(model(x[:40]), y[:40], reduction="none")
    torch.testing.assert_close(losses, expected.detach())
    # At the reference a sample's weight is 2 sigmoid(0) = 1: the first step is plain ascent's.
    npo, plain = copy.deepcopy(model), copy.deepcopy(model)
    options = dict(lr=0.1, epochs=1, batch_size=64)
    imu.unlearn(npo, (x[:40], y[:40]), method="npo", **options)
    imu.unlearn(plain, (x[:40], y[:40]), method="uniform", **options)
    torch.testing.assert_close(npo[2].weight, plain[2].weight)
    options["epochs"] = 60
    imu.unlearn(npo, (x[:40], y[:40]), method="npo", **options)
    imu.unlearn(plain, (x[:40], y[:40]), method="uniform", **options)
    assert 0 < NPO_BETA < 1
    assert (npo[2].weight - model[2].weight).norm() < (plain[2].weight - model[2].weight).norm()


def test_single_row_moves_one_row(problem):
    model, x, y = problem
    changed = copy.deepcopy(model)
    result = imu.unlearn(changed, (x[y == 1], y[y == 1]), method="single_row", epochs=5, lr=0.1)
    moved = (changed[2].weight != model[2].weight).any(dim=1)
    assert moved.tolist() == [False, True, False, False, False]
    assert result.settings["rows"] == "forgotten"


def test_loss_weights_are_roots_of_losses(problem):
    model, x, y = problem
    result = imu.unlearn(
        model, (x[:40], y[:40]), method="loss_weights", inplace=False, clip_quantile=1.0
    )
    losses = nn.functional.cross_entropy(model(x[:40]), y[:40], reduction="none").detach()
    # A float32 loss near zero is good to eps times the logits, about 1e-6; its root to 1e-3.
    torch.testing.assert_close(result.weights, losses[result.indices].sqrt(), rtol=1e-3, atol=1e-3)


def test_auto_takes_a_class_for_a_class(problem):
    model, x, y = problem
    one, two, all_ = torch.zeros(100).long(), torch.tensor([0, 1] * 50), torch.arange(100) % 10
    assert Auto().task_of(one, 10) == Auto().task_of(two, 10) == "class"
    assert Auto().task_of(all_, 10) == Auto(task="samples").task_of(one, 10) == "samples"
    assert Auto(task="class").task_of(all_, 10) == "class"
    assert Auto().edit_of("class")[0] == "single_row"
    assert Auto().edit_of("samples")[0] == "margin_edit"
    # Fifty of a hundred classes' samples hit about 39 of them.
    assert not is_class(torch.arange(39).repeat(2)[:50], 100)
    assert not is_class(torch.tensor([3]), 10), "one sample may be drawn anywhere"
    for rows, name in ((y == 4, "single_row"), (torch.arange(200) < 25, "margin_edit")):
        result = imu.unlearn(
            model,
            (x[rows], y[rows]),
            method="auto",
            stop=imu.StopRule(forget_accuracy=0.2),
            inplace=False,
        )
        assert result.settings["method"] == name
        assert accuracy(result.model, x[rows], y[rows]) <= 0.2


def test_margin_edit_stops_where_it_is_told(problem):
    model, x, y = problem
    forget = (x[:60], y[:60])
    options = dict(method="margin_edit", inplace=False)
    none = imu.unlearn(model, forget, **options)
    assert accuracy(none.model, *forget) == 0.0 and none.stopped_by == "edit"
    half = imu.unlearn(model, forget, stop=imu.StopRule(forget_accuracy=0.5), **options)
    assert accuracy(half.model, *forget) == 0.5 and 0 < half.step_fraction <= 1
    assert [r["forget_accuracy"] for r in half.trajectory][-1] == 0.5
    loss = imu.unlearn(model, forget, stop=imu.StopRule(forget_loss=0.5), **options)
    assert loss.trajectory[-1]["forget_loss"] >= 0.5
    # Other labels, so that the forget set is told from these until it is forgotten.
    unseen = (x[100:], (y[100:] + 1) % CLASSES)
    rule = imu.StopRule(membership_auc=0.8, unseen=unseen)
    assert imu.unlearn(model, forget, stop=rule, **options).stopped_by == "membership_auc"
    there = imu.unlearn(model, forget, stop=imu.StopRule(forget_accuracy=1.0), **options)
    assert torch.equal(there.model[2].weight, model[2].weight) and there.step_fraction == 0.0
    assert (there.steps, none.steps, half.steps) == (0, 1, 1)
    assert len(there.trajectory) == 1


@pytest.mark.parametrize("method", ["uniform", "margin_edit"])
def test_milestones_are_passed_at_their_depth_on_the_way(problem, method):
    model, x, y = problem
    forget, seen = (x[:60], y[:60]), {}
    changed = copy.deepcopy(model)

    def note(name, record):
        seen[name] = (accuracy(changed, *forget), record["forget_accuracy"])

    options = {} if method == "margin_edit" else dict(lr=0.1, epochs=400)
    result = imu.unlearn(
        changed,
        forget,
        method=method,
        **options,
        milestones={k: imu.StopRule(forget_accuracy=v) for k, v in (("a", 0.7), ("b", 0.3))},
        on_milestone=note,
    )
    assert list(seen) == ["a", "b"] and result.stopped_by == "milestones"
    for depth, (measured, recorded) in zip((0.7, 0.3), seen.values(), strict=True):
        assert measured == pytest.approx(recorded) and measured <= depth + 1e-9


def test_milestones_do_not_change_the_run(problem):
    model, x, y = problem
    options = dict(method="uniform", lr=0.1, epochs=3, batch_size=32, inplace=False)
    plain = imu.unlearn(model, (x, y), **options)
    rule = imu.StopRule(forget_accuracy=0.8)
    passed = imu.unlearn(
        model, (x, y), milestones={"a": rule}, stop=imu.StopRule(forget_loss=1e9), **options
    )
    torch.testing.assert_close(plain.model[2].weight, passed.model[2].weight, rtol=0, atol=0)


def test_a_failing_milestone_leaves_the_model_as_it_was(problem):
    model, x, y = problem
    before = copy.deepcopy(model.state_dict())

    def fail(name, record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        imu.unlearn(
            model,
            (x, y),
            method="uniform",
            lr=0.3,
            epochs=200,
            milestones={"a": imu.StopRule(forget_accuracy=0.5)},
            on_milestone=fail,
        )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("which", ["features", "ggn", "kfac", "moment", "fitted"])
def test_preconditioned_directions(problem, which):
    """The first step is along M times the plain gradient, with the plain gradient's norm."""
    model, x, y = problem
    factors = imu.capture(model, (x, y))
    a = torch.cat([factors.act, torch.ones(len(y), 1)], dim=1).double()
    s = a.T @ a / len(a)
    given = {"moment": s.float(), "fitted": imu.fit("fisher_diag", factors, damping=0.1)}
    options = dict(method="uniform", lr=0.1, epochs=1, momentum=0.0, weight_decay=0.0)
    moved = {}
    for key, precondition in (("plain", None), ("with", given.get(which, which))):
        found = imu.unlearn(model, (x, y), precondition=precondition, inplace=False, **options)
        head = torch.cat([found.model[2].weight, found.model[2].bias[:, None]], dim=1)
        start = torch.cat([model[2].weight, model[2].bias[:, None]], dim=1)
        moved[key] = (head - start).detach()
    if which in ("features", "moment"):
        eye = torch.eye(len(s), dtype=torch.float64)
        expected = moved["plain"].double() @ torch.linalg.inv(s + 0.01 * s.trace() / len(s) * eye)
    elif which == "fitted":
        expected = given[which].solve(moved["plain"]).double()
    else:
        from imu_fast.unlearning.ascent.preconditioners import PRECONDITIONERS

        apply = PRECONDITIONERS[which].fit(factors)
        expected = apply(moved["plain"]).double()
    expected *= moved["plain"].double().norm() / expected.norm()
    torch.testing.assert_close(moved["with"].double(), expected, rtol=2e-2, atol=1e-4)


def test_bad_input(problem):
    model, x, y = problem
    forget = (x[:10], y[:10])
    for options, match in (
        (dict(method="margin_edit", scope="all"), "no option scope; it has eps, layer, layers"),
        (dict(method="margin_edit", checkpoint="a"), "no epochs to go on from"),
        (dict(scope="all", rows="forgotten"), "no option rows.*scope='head' would"),
        (dict(scope="all", layers="2"), "no option layers.*scope='layers' would"),
        (dict(method="uniform", damping=0.1), "no option damping.*weights='influence'"),
        (dict(method="uniform", top_fraction=0.1), "no option top_fraction"),
        (dict(method="magic"), "method='magic' is unknown"),
        (dict(precondition=3.0), "precondition is a float"),
        (dict(milestones={"a": 0.5}), "pass imu_fast.StopRule"),
        (dict(milestones={"a": None}), "pass imu_fast.StopRule"),
        (dict(method="margin_edit", margin=0.0), "margin=0.0"),
    ):
        with pytest.raises(InputError, match=match):
            imu.unlearn(model, forget, **options)
    rules = {k: imu.StopRule(membership_auc=0.5, unseen=(x[20:40], y[20:40])) for k in ("a", "b")}
    with pytest.raises(InputError, match="several unseen loaders"):
        imu.unlearn(model, forget, milestones=rules)


def test_margin_edit_where_wrong_samples_contradict_the_others():
    """The same image under two labels: one of the two stays wrong for free, and cannot be held."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(3, 2, bias=False))
    x = torch.eye(3)[[0, 0, 1]]
    with torch.no_grad():
        head[0].weight.copy_(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    y = torch.tensor([0, 1, 0])  # the second is wrong already, and would be right after the edit
    result = imu.unlearn(head, (x, y), method="margin_edit", inplace=False)
    assert (result.model(x).argmax(dim=1) == y).tolist() == [False, True, False]
    assert result.indices.tolist() == [0, 2] or result.indices.tolist() == [2, 0]


def test_batches_do_not_follow_the_order_of_magnitudes(problem):
    """A seed draws the same batches whatever rounding does to scores that are nearly equal."""
    model, x, y = problem
    seen = []

    class Recorded(NetworkSteps):
        def step(self, rows, weights):
            seen[-1].append(rows.tolist())
            return super().step(rows, weights)

    for nudge in (1.0, -1.0):
        seen.append([])
        data = x[:40] + 0.02 * nudge * torch.randn(
            40, 8, generator=torch.Generator().manual_seed(1)
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("imu_fast.unlearning.ascent.scopes.NetworkSteps", Recorded)
            result = imu.unlearn(
                model,
                (data, y[:40]),
                scope="layers",
                epochs=2,
                batch_size=8,
                clip_quantile=1.0,
                inplace=False,
            )
        seen[-1].append(sorted(result.indices.tolist()))
        seen[-1].append(result.indices.tolist())
    assert seen[0][-2] == seen[1][-2], "the same samples"
    assert seen[0][-1] != seen[1][-1], "in another order of magnitude"
    assert seen[0][:-1] == seen[1][:-1]
