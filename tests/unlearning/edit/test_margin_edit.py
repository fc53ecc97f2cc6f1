"""The margin edit: against its float64 reference, against scipy's SLSQP, and its certificate."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

import imu_fast as imu
from imu_fast import reference
from imu_fast.errors import InfeasibleError, InputError, SingularMatrixError
from imu_fast.solvers.nonnegative_qp import maximise_nonnegative
from imu_fast.unlearning.edit.metric import HessianMetric
from imu_fast.unlearning.edit.program import smallest_edit as margin_edit
from imu_fast.unlearning.summary.hessian import head_hessian

EPS = 1e-2
MARGIN = 0.1


def problem(n, d, classes, *, has_bias=True, scale=1.0, duplicated=False, label=None, wrong=0):
    """Features, labels, theta; labels are the predictions but for ``wrong`` of them."""
    generator = torch.Generator().manual_seed(1000 * n + d)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    if duplicated:
        x = x[torch.arange(n) // 2 * 2]
    theta = scale * torch.randn(classes, d + has_bias, generator=generator, dtype=torch.float64)
    z = reference.augment(x, has_bias) @ theta.T
    labels = z.argmax(dim=1) if label is None else torch.full((n,), label)
    labels[:wrong] = (labels[:wrong] + 1) % classes
    return x, labels, theta, has_bias


PROBLEMS = {
    "random": problem(11, 7, 5),
    "no bias": problem(11, 7, 5, has_bias=False),
    "one of everything": problem(1, 1, 2),
    "duplicated samples": problem(12, 8, 4, duplicated=True),
    "single class, often wrong": problem(9, 13, 4, label=2),
    "two classes": problem(8, 9, 2),
    "already wrong": problem(9, 20, 3, wrong=9),
    "some already wrong": problem(9, 20, 3, wrong=4),
    "rank-deficient features": problem(4, 40, 6),
    "saturated logits": problem(10, 7, 5, scale=1e3),
}
every_problem = pytest.mark.parametrize("data", PROBLEMS.values(), ids=PROBLEMS.keys())


def damped_moment(x, has_bias, moment=None):
    act = reference.augment(x, has_bias)
    s = act.T @ act / len(act) if moment is None else moment
    return s + EPS * s.trace() / len(s) * torch.eye(len(s), dtype=s.dtype)


def margins(x, labels, theta, has_bias):
    """The margin of each sample and its runner-up."""
    z = reference.augment(x, has_bias) @ theta.T
    best, rivals = z.scatter(1, labels[:, None], -torch.inf).max(dim=1)
    return z.gather(1, labels[:, None])[:, 0] - best, rivals


def energy(step, moment):
    return 0.5 * float((step @ moment * step).sum())


def edit(data, **options):
    x, labels, theta, has_bias = data
    options = {"count": len(x), "margin": MARGIN, "eps": EPS, "tolerance": 1e-12, **options}
    return margin_edit(x, labels, theta, has_bias, **options)


@every_problem
def test_one_round_is_the_reference(data):
    x, labels, theta, has_bias = data
    found = edit(data, max_rounds=1)
    h = damped_moment(x, has_bias)
    rivals = margins(*data)[1]
    truth = reference.margin_edit(x, labels, rivals, theta, has_bias, h, MARGIN, sweeps=400)
    # The energy is strongly convex: a relative gap g puts the edit within sqrt(2 g) of the optimum.
    allowed = math.sqrt(2e-12) + 1e-6
    assert energy(found.step - truth, h) ** 0.5 <= allowed * energy(truth, h) ** 0.5
    assert found.rounds == 1 and found.gap <= 1e-11


@every_problem
def test_every_chosen_margin_is_reached(data):
    x, labels, theta, has_bias = data
    for count in {1, (len(x) + 1) // 2, len(x)}:
        found = edit(data, count=count)
        after = margins(x, labels, theta + found.step, has_bias)[0]
        size = float(margins(*data)[0].abs().max())
        assert len(found.chosen.unique()) == count and found.chosen.shape == (count,)
        assert float(after[found.chosen].max()) <= -MARGIN + 1e-10 * max(size, 1.0)


@pytest.mark.parametrize("classes, has_bias", [(2, True), (3, True), (3, False)])
def test_scipy_finds_no_smaller_edit(classes, has_bias):
    data = x, labels, theta, _ = problem(5, 4, classes, has_bias=has_bias)
    found = edit(data, max_rounds=1)
    h, rivals = damped_moment(x, has_bias), margins(*data)[1]
    act = reference.augment(x, has_bias)
    d = torch.nn.functional.one_hot(labels, classes) - torch.nn.functional.one_hot(rivals, classes)
    rows = torch.einsum("ic,ij->icj", d.double(), act).flatten(1)
    slack = (-MARGIN - rows @ theta.flatten()).numpy()
    rows = rows.numpy()
    big = torch.kron(torch.eye(classes, dtype=torch.float64), h).numpy()
    best = minimize(
        lambda t: float(0.5 * t @ big @ t),
        np.zeros(theta.numel()),
        jac=lambda t: big @ t,
        constraints={
            "type": "ineq",
            "fun": lambda t: slack - rows @ t,
            "jac": lambda t: -rows,
        },
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert best.success
    assert energy(found.step, h) == pytest.approx(best.fun, rel=1e-6)


@every_problem
def test_rounds_only_shrink_the_edit_and_end_where_runners_up_stay(data):
    x, labels, theta, has_bias = data
    h = damped_moment(x, has_bias)
    found = [edit(data, max_rounds=rounds) for rounds in (1, 2, 3, 20)]
    sizes = [energy(f.step, h) for f in found]
    for larger, smaller in itertools.pairwise(sizes):
        assert smaller <= larger * (1 + 1e-9)
    assert found[-1].rounds < 20
    rivals = margins(x, labels, theta + found[-1].step, has_bias)[1]
    again = reference.margin_edit(x, labels, rivals, theta, has_bias, h, MARGIN, sweeps=400)
    assert energy(again, h) == pytest.approx(sizes[-1], rel=1e-6)


def test_rounds_find_a_nearer_class():
    """Random heads of many classes: a third class overtakes for some samples."""
    data = problem(30, 12, 9)
    h = damped_moment(data[0], True)
    one, many = edit(data, max_rounds=1), edit(data)
    assert many.rounds > 1 and energy(many.step, h) < 0.999 * energy(one.step, h)


def test_rounds_undo_a_contradiction_of_the_first_runners_up():
    data = x, labels, theta, has_bias = problem(60, 3, 3, wrong=5)
    with pytest.raises(InfeasibleError):
        edit(data, max_rounds=1)
    found = edit(data, max_rounds=20, tolerance=1e-8)
    after = margins(x, labels, theta + found.step, has_bias)[0]
    assert float(after.max()) <= -MARGIN + 1e-7 * float(margins(*data)[0].max())


def test_chosen_are_those_already_wrong_and_then_the_cheapest():
    data = x, _, _, has_bias = problem(12, 20, 4, wrong=3)
    act = reference.augment(x, has_bias)
    m = torch.linalg.inv(damped_moment(x, has_bias))
    before = margins(*data)[0]
    cost = before**2 / (2 * torch.einsum("ij,jk,ik->i", act, m, act))
    right = torch.nonzero(before > 0).flatten()
    found = edit(data, count=7).chosen
    assert set(found[:3].tolist()) == {0, 1, 2}
    assert found[3:].tolist() == right[cost[right].argsort()][:4].tolist()


def test_nothing_to_do_is_no_edit():
    x, _, theta, has_bias = problem(5, 9, 3)
    least_likely = (reference.augment(x, has_bias) @ theta.T).argmin(dim=1)
    found = edit((x, least_likely, theta, has_bias), margin=0.0)
    assert not found.step.any() and found.gap == 0.0 and found.sweeps == 0


def test_a_stored_second_moment():
    x, labels, theta, has_bias = data = problem(6, 5, 4)
    generator = torch.Generator().manual_seed(5)
    wide = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    stored = wide.T @ wide / 50
    found = edit(data, second_moment=stored, max_rounds=1)
    h, rivals = damped_moment(x, has_bias, stored), margins(*data)[1]
    truth = reference.margin_edit(x, labels, rivals, theta, has_bias, h, MARGIN, sweeps=400)
    torch.testing.assert_close(found.step, truth, rtol=1e-5, atol=1e-6 * float(truth.abs().max()))
    with pytest.raises(InputError, match=r"second_moment has shape \(5, 5\); expected \(6, 6\)"):
        edit(data, second_moment=stored[:5, :5])
    with pytest.raises(SingularMatrixError):
        edit(data, second_moment=stored - 0.9 * torch.diag(torch.eye(6)[0]) * stored[0, 0] * 3)


@pytest.mark.parametrize("kind", ["exact", "blocks", "kfac"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_scipy_finds_no_smaller_edit_in_the_metric_of_a_ggn(kind, has_bias):
    data = x, labels, theta, _ = problem(5, 4, 3, has_bias=has_bias)
    factors = imu.GradientFactors.from_head(
        x, theta[:, :4], theta[:, 4] if has_bias else None, labels
    )
    hessian = head_hessian(factors, kind)
    metric = HessianMetric.of(hessian, EPS, damping=0.3)
    eye = torch.eye(theta.numel(), dtype=torch.float64).view(-1, *theta.shape)
    h = hessian.damped(0.3 + EPS * hessian.mean_eigenvalue).product(eye).flatten(1)
    found, rivals = edit(data, max_rounds=1, metric=metric), margins(*data)[1]
    act = reference.augment(x, has_bias)
    d = torch.nn.functional.one_hot(labels, 3) - torch.nn.functional.one_hot(rivals, 3)
    rows = torch.einsum("ic,ij->icj", d.double(), act).flatten(1)
    slack = (-MARGIN - rows @ theta.flatten()).numpy()
    # The dual, with the dense Q, solved by scipy.
    q = (rows @ torch.linalg.solve(h, rows.T)).numpy()
    dual = minimize(
        lambda a: float(0.5 * a @ q @ a + a @ slack),
        np.zeros(len(x)),
        jac=lambda a: q @ a + slack,
        bounds=[(0, None)] * len(x),
        method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-12, "maxiter": 5000},
    )
    truth = -torch.linalg.solve(h, rows.T @ torch.from_numpy(dual.x)).view_as(theta)
    torch.testing.assert_close(found.step, truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max()))
    step = found.step.flatten()
    assert metric.energy(found.step) == pytest.approx(0.5 * float(step @ h @ step), rel=1e-12)
    assert found.gap <= 1e-10
    cost = margins(*data)[0] ** 2 / torch.from_numpy(q.diagonal().copy())
    assert edit(data, count=2, metric=metric).chosen.tolist() == cost.argsort()[:2].tolist()


def test_a_metric_of_nothing_is_refused():
    factors = imu.GradientFactors(
        torch.zeros(2, 3), torch.ones(2, 2), torch.arange(3), True, torch.zeros(2, dtype=int)
    )
    hessian = head_hessian(factors)
    object.__setattr__(hessian, "matrix", 0 * hessian.matrix)
    with pytest.raises(InputError, match="mean eigenvalue 0; it must be positive"):
        HessianMetric.of(hessian, EPS)


def test_more_samples_than_entries_and_than_a_block():
    """Q is singular: 250 constraints of a 3 x 8 head, in two blocks, need the interior point."""
    data = x, labels, theta, has_bias = problem(300, 7, 3)
    found = edit(data, tolerance=1e-8, count=250)
    after = margins(x, labels, theta + found.step, has_bias)[0]
    assert found.gap <= 1e-7
    assert float(after[found.chosen].max()) <= -MARGIN + 1e-7 * float(margins(*data)[0].max())


def test_both_methods_find_the_same_maximum():
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(150, 200, generator=generator, dtype=torch.float64)
    b = torch.randn(150, generator=generator, dtype=torch.float64)
    start, options = torch.zeros_like(b), {"tolerance": 1e-10}
    ascent = maximise_nonnegative(a @ a.T, b, start, **options)
    interior = maximise_nonnegative(a @ a.T, b, start, max_sweeps=0, **options)
    assert ascent.converged and ascent.interior_steps == 0 and ascent.sweeps > 0
    assert interior.converged and interior.interior_steps > 0 and interior.sweeps == 0
    assert interior.value == pytest.approx(ascent.value, rel=1e-9)


def test_float32_and_its_certificate():
    x, labels, theta, has_bias = problem(40, 12, 6)
    found = margin_edit(x.float(), labels, theta.float(), has_bias, count=40)
    assert found.step.dtype == torch.float32 and found.gap <= 2e-5
    after = margins(x.float(), labels, theta.float() + found.step, has_bias)[0]
    assert float(after.max()) <= -MARGIN + 1e-3


def test_stopping_short_is_reported(caplog):
    q = torch.tensor([[1.0, 0.999], [0.999, 1.0]], dtype=torch.float64)
    b = torch.tensor([1.0, 0.9995], dtype=torch.float64)
    short = maximise_nonnegative(
        q, b, torch.zeros_like(b), tolerance=1e-9, max_sweeps=3, max_interior_steps=1
    )
    assert not short.converged and (short.sweeps, short.interior_steps) == (3, 1)
    full = maximise_nonnegative(q, b, torch.zeros_like(b), tolerance=1e-9)
    assert full.converged
    torch.testing.assert_close(full.alpha, torch.linalg.solve(q, b), rtol=1e-6, atol=1e-6)
    edit(PROBLEMS["random"], tolerance=1e-300)
    assert "margin_edit stopped at gap" in caplog.text


def test_contradictions_are_named():
    """Twice the same features with two labels in a head of two classes: one must stay right."""
    x = torch.ones(2, 3, dtype=torch.float64)
    theta = torch.tensor([[1.0, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.float64)
    contradiction = (x, torch.tensor([0, 1]), theta, True)
    with pytest.raises(InfeasibleError, match="count=2 .*already misclassified contradict"):
        edit(contradiction)
    assert edit(contradiction, count=1).chosen.tolist() == [1]
    x = torch.tensor([[1.0, 2], [0, 0]])
    with pytest.raises(InfeasibleError, match="sample 1, whose features are zero.*count <= 1"):
        margin_edit(x, torch.tensor([0, 0]), torch.eye(2), False, count=2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"count": 0}, "count=0 must be an integer >= 1"),
        ({"count": 12}, "count=12 exceeds the 11 samples"),
        ({"count": 2.0}, "count=2.0"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"eps": -1.0}, "eps=-1.0"),
        ({"eps": math.nan}, "eps=nan"),
        ({"margin": -0.1}, "margin=-0.1"),
        ({"margin": math.inf}, "margin=inf"),
        ({"max_rounds": 0}, "max_rounds=0"),
        ({"tolerance": 0.0}, "tolerance=0.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        edit(PROBLEMS["random"], **options)


def test_bad_tensors():
    x, labels, theta, _ = PROBLEMS["random"]

    def call(x=x, labels=labels, theta=theta):
        margin_edit(x, labels, theta, True, count=1)

    for value in (math.nan, math.inf):
        broken = x.clone()
        broken[3, 1] = value
        with pytest.raises(InputError, match="features is not finite at sample 3"):
            call(x=broken)
    with pytest.raises(InputError, match="theta is not finite at class 0"):
        call(theta=theta * math.nan)
    with pytest.raises(InputError, match=r"labels\[0\]=5 lies outside \[0, 5\)"):
        call(labels=torch.full_like(labels, 5))
    with pytest.raises(InputError, match=r"labels is torch.float32"):
        call(labels=labels.float())
    with pytest.raises(InputError, match=r"theta has shape \(5, 7\); expected \[C, 8\]"):
        call(theta=theta[:, :7])
    with pytest.raises(InputError, match="C >= 2"):
        call(theta=theta[:1])
    with pytest.raises(InputError, match=r"features has shape \(0, 7\)"):
        call(x=x[:0], labels=labels[:0])
    with pytest.raises(InputError, match="second moment has trace 0"):
        margin_edit(x * 0, labels, theta[:, :7], False, count=1)


@pytest.mark.parametrize("right", [29, 57, 58])
def test_no_sample_more_is_flipped_than_the_depth_asks(right):
    """0.29 * 100 is 28.999999999999996, of which the whole part is 28."""
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3).double()
    x = torch.randn(100, 6).double()
    y = model(x).argmax(1)
    rule = imu.StopRule(forget_accuracy=right / 100)
    result = imu.unlearn(model, (x, y), "margin_edit", stop=rule)
    assert result.trajectory[-1]["forget_accuracy"] == right / 100
    assert len(result.indices) == 100 - right
