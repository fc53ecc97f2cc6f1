"""Newton removal: its dense formula, and the head that was trained without the forget samples."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import imu_fast as imu
from imu_fast.errors import InputError, SingularMatrixError

LAM = 1e-2
FORGOTTEN = 30


def trained_head(x, y, lam=LAM):
    """The optimum of the mean loss and ``lam/2 ||theta||^2``, on features that stay."""
    torch.manual_seed(0)
    head = nn.Linear(x.shape[1], int(y.max()) + 1).double()
    optimizer = torch.optim.LBFGS(
        head.parameters(),
        max_iter=500,
        tolerance_grad=1e-11,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        norm = sum(p.square().sum() for p in head.parameters())
        loss = nn.functional.cross_entropy(head(x), y) + lam / 2 * norm
        loss.backward()
        return loss

    optimizer.step(closure)
    return nn.Sequential(head)


def matrix(model):
    return torch.cat([model[0].weight, model[0].bias[:, None]], dim=1).detach()


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    """Model, retrained model, features, labels, summary."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 6, generator=generator, dtype=torch.float64)
    noise = torch.randn(400, 4, generator=generator, dtype=torch.float64)
    y = (x[:, :4] + 0.8 * noise).argmax(1)
    model, retrained = trained_head(x, y), trained_head(x[FORGOTTEN:], y[FORGOTTEN:])
    path = tmp_path_factory.mktemp("summary") / "s"
    return model, retrained, x, y, imu.save_summary(model, (x, y), path, weight_decay=LAM)


def removed(problem, **options):
    model, _, x, y, summary = problem
    options = {"summary": summary, "eps": 1e-9, "inplace": False, **options}
    data = options.pop("data", (x[:FORGOTTEN], y[:FORGOTTEN]))
    return imu.unlearn(model, data, "newton_removal", **options)


def dense_step(theta, x, y, kept, n_forget, lam, damping):
    """The formula, by autograd's Hessian of the summed loss on the rows that are kept."""
    act = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)

    def loss(flat, rows):
        z = act[rows] @ flat.view_as(theta).T
        return nn.functional.cross_entropy(z, y[rows], reduction="sum")

    flat = theta.flatten()
    hessian = torch.autograd.functional.hessian(lambda t: loss(t, kept), flat)
    forgotten = slice(0, n_forget)
    gradient = torch.autograd.functional.jacobian(lambda t: loss(t, forgotten), flat)
    matrix = hessian + damping * torch.eye(len(flat), dtype=flat.dtype)
    return torch.linalg.solve(matrix, gradient + n_forget * lam * flat).view_as(theta)


@pytest.mark.parametrize("eps", [1e-9, 1e-2])
def test_it_is_the_dense_formula(problem, eps):
    model, _, x, y, _ = problem
    result = removed(problem, eps=eps)
    damping, theta = result.settings["damping"], matrix(model)
    step = dense_step(theta, x, y, slice(FORGOTTEN, None), FORGOTTEN, LAM, damping)
    torch.testing.assert_close(matrix(result.model) - theta, step, rtol=0, atol=1e-8)
    decay = (len(x) - FORGOTTEN) * LAM
    assert damping > decay and damping == pytest.approx(decay, rel=20 * eps)
    assert (result.stopped_by, result.steps, result.step_fraction) == ("edit", 1, 1.0)
    assert result.settings["hessian"] == "exact" and result.reached is None


def test_it_goes_to_the_head_that_was_trained_without(problem):
    """A few percent of the step are left; more if the forgotten stay in the Hessian."""
    model, retrained, x, y, _ = problem
    before, truth = matrix(model), matrix(retrained)
    size = float((truth - before).norm())
    left = float((matrix(removed(problem).model) - truth).norm()) / size
    whole = dense_step(before, x, y, slice(None), FORGOTTEN, LAM, (len(x) - FORGOTTEN) * LAM)
    kept = float((before + whole - truth).norm()) / size
    assert left < 0.05 and left < 0.5 * kept, (left, kept)
    rows, kl = x[:FORGOTTEN], []
    for m in (removed(problem).model, model):  # and as its outputs for them show
        with torch.no_grad():
            theirs, ours = retrained(rows).softmax(1), m(rows).log_softmax(1)
            kl.append(float(nn.functional.kl_div(ours, theirs, reduction="batchmean")))
    assert kl[0] < 1e-2 * kl[1]


@pytest.mark.parametrize("kind", ["blocks", "kfac"])
def test_an_inexact_summary_is_nearer_than_doing_nothing(problem, kind, tmp_path):
    model, retrained, x, y, _ = problem
    summary = imu.save_summary(model, (x, y), tmp_path / "s", kind=kind, weight_decay=LAM)
    result = removed(problem, summary=summary)
    size = float((matrix(retrained) - matrix(model)).norm())
    left = float((matrix(result.model) - matrix(retrained)).norm()) / size
    assert result.settings["hessian"] == kind and left < 0.5


def test_a_depth_is_reached_by_the_scale(problem):
    rule = imu.StopRule(forget_accuracy=0.4)
    for options in ({}, {"summary": None}):
        result = removed(problem, stop=rule, **options)
        assert result.reached and result.stopped_by == "forget_accuracy"
        before = result.trajectory[-2]["forget_accuracy"]
        assert result.trajectory[-1]["forget_accuracy"] <= 0.4 <= before + 0.05
        assert result.trajectory[-1]["step"] == result.step_fraction > 0
    deep = removed(problem, milestones={"a": imu.StopRule(forget_accuracy=0.6)}, stop=rule)
    assert deep.reached and len(deep.indices) == FORGOTTEN
    done = removed(problem, stop=imu.StopRule(forget_accuracy=1.0))
    assert done.steps == done.step_fraction == 0 and torch.equal(
        matrix(done.model), matrix(problem[0])
    )


def test_what_the_step_leaves_of_a_depth_is_left_to_the_margin_edit(problem):
    model, rule = problem[0], imu.StopRule(forget_accuracy=0.3)
    alone = removed(problem, k=2.0)
    assert (alone.step_fraction, alone.settings["k"]) == (2.0, 2.0)
    step = matrix(removed(problem).model) - matrix(model)
    torch.testing.assert_close(matrix(alone.model), matrix(model) + 2 * step)
    assert alone.trajectory[-1]["forget_accuracy"] > 0.3, "so that there is something left"
    result = removed(problem, k=2.0, then="margin_edit", stop=rule, milestones={"a": rule})
    assert result.reached and result.trajectory[-1]["forget_accuracy"] <= 0.3
    first, second, last = (result.trajectory[i] for i in (0, 1, -1))
    assert first == alone.trajectory[0]
    assert second["step"] == 2.0 and last["step"] == 2.0 + result.step_fraction
    assert second["forget_loss"] == pytest.approx(alone.trajectory[-1]["forget_loss"], rel=1e-9)
    other = removed(problem, k=2.0, then="margin_edit", margin=2.0, stop=rule)
    assert not torch.equal(matrix(other.model), matrix(result.model))
    # A depth on the way is had by less of the step.
    shallow = alone.trajectory[4]["forget_loss"]
    early = removed(problem, k=2.0, then="margin_edit", stop=imu.StopRule(forget_loss=shallow))
    assert early.reached and 0 < early.step_fraction < 1.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0.0}, "k=0.0 must be finite and > 0"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"then": "ascent"}, "then='ascent' is unknown; choose one of scale, margin_edit"),
        ({"margin": 0.2}, "margin=0.2 with then='scale'"),
        ({"then": "margin_edit"}, "then='margin_edit' without a depth"),
        ({"summary": None, "k": 2.0}, "k=2.0 with method='newton_removal' and no summary"),
        ({"summary": None, "then": "margin_edit"}, "then='margin_edit' .* and no summary"),
        ({"k": 2.0, "stop": imu.StopRule(forget_accuracy=0.3)}, "k=2.0 with a stop rule"),
        ({"lr": 0.1}, "'newton_removal' has no option lr; it has eps, k, layer, layers, margin, s"),
    ],
)
def test_options_that_contradict(problem, options, message):
    with pytest.raises(InputError, match=message):
        removed(problem, **options)


def test_without_a_summary_a_depth_is_asked_for(problem):
    message = "stop=None with method='newton_removal' and no summary.*load_summary.*unseen_accuracy"
    with pytest.raises(InputError, match=message):
        removed(problem, summary=None)


def test_samples_that_the_summary_is_not_of(problem, tmp_path, caplog):
    """A little beyond it damping is raised, and said; else it is refused, and the model stays."""
    model, _, x, y, _ = problem
    summary = imu.save_summary(model, (x, y), tmp_path / "s")
    given = {"summary": summary, "inplace": True}
    before = matrix(model)
    with pytest.raises(SingularMatrixError, match=r"no Hessian .*pivot.* are to be among those"):
        removed(problem, data=(3 * x[:30], y[:30]), **given)
    with pytest.raises(InputError, match="mean eigenvalue -.*are to be among those"):
        removed(problem, data=(2 * x[:200], y[:200]), **given)
    assert torch.equal(matrix(model), before)
    with caplog.at_level(logging.WARNING, logger="imu_fast"):
        result = removed(problem, data=(2 * x[:100], y[:100]), summary=summary)
    assert "newton_removal: damping raised from 2" in caplog.text
    assert result.settings["damping"] > 1
