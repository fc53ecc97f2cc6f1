"""Leave-one-out of a head against heads that are truly retrained, by L-BFGS in float64."""

from __future__ import annotations

import pytest
import torch
from cases import LargestTensor
from torch import nn
from torch.nn.functional import cross_entropy, softplus

import imu_fast as imu
from imu_fast.attribution.leave_one_out import _Without
from imu_fast.attribution.newton import Objective
from imu_fast.errors import InputError
from imu_fast.losses.cross_entropy import CrossEntropy

CLASSES = 4


def data(n, d, seed=0, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % CLASSES
    means = torch.randn(CLASSES, d, generator=generator, dtype=torch.float64)
    x = means[y] + noise * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x, y


def augmented(x, bias):
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1) if bias else x


def trained(x, y, weight_decay, reduction="mean", bias=True, decay_bias=True):
    """[W, b] at the optimum, to a gradient of 1e-12."""
    a = augmented(x, bias)
    theta = torch.zeros(CLASSES, a.shape[1], dtype=torch.float64, requires_grad=True)

    def loss(theta):
        decayed = theta if decay_bias or not bias else theta[:, :-1]
        decay = weight_decay / 2 * decayed.square().sum()
        return cross_entropy(a @ theta.T, y, reduction=reduction) + decay

    def closure():
        theta.grad = None
        value = loss(theta)
        value.backward()
        return value

    torch.optim.LBFGS(
        [theta],
        max_iter=3000,
        tolerance_grad=1e-13,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    ).step(closure)
    theta = theta.detach()
    # Its line search ends where losses differ by rounding alone; the gradient is known beyond.
    for _ in range(4):
        hessian = torch.func.hessian(loss)(theta).reshape(theta.numel(), -1)
        step = torch.linalg.pinv(hessian, hermitian=True) @ torch.func.grad(loss)(theta).flatten()
        theta = theta - step.view_as(theta)
    worst = float(torch.func.grad(loss)(theta).abs().max())
    assert worst < 1e-12 * (1 if reduction == "mean" else len(x))
    return theta


def fresh(d, classes=CLASSES, bias=True):
    return nn.Linear(d, classes, bias=bias, dtype=torch.float64)


def linear(theta, bias, dtype=torch.float64):
    d = theta.shape[1] - bias
    head = nn.Linear(d, len(theta), bias=bias, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(theta[:, :d])
        if bias:
            head.bias.copy_(theta[:, d])
    return head


def retrained(x, y, i, *args, **options):
    kept = torch.arange(len(x)) != i
    return trained(x[kept], y[kept], *args, **options)


WAYS = {
    "mean": dict(weight_decay=1e-2),
    "sum": dict(weight_decay=0.5, reduction="sum"),
    "no bias": dict(weight_decay=1e-2, bias=False),
    "bias without decay": dict(weight_decay=1e-2, decay_bias=False),
    "sum, bias without decay": dict(weight_decay=0.5, reduction="sum", decay_bias=False),
    "fewer samples than features": dict(weight_decay=1e-2, d=50),
    "fewer, bias without decay": dict(weight_decay=1e-2, d=50, decay_bias=False),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_against_heads_retrained_without_each_sample(way):
    way = dict(way)
    x, y = data(36, way.pop("d", 5), noise=2.0)
    bias = way.get("bias", True)
    theta = trained(x, y, **way)
    options = {name: value for name, value in way.items() if name != "bias"}
    found = imu.leave_one_out(linear(theta, bias), (x, y), **options)
    assert found.gradient_norm < 1e-10 and found.distance < 1e-9
    a = augmented(x, bias)
    torch.testing.assert_close(found.head_logits, a @ theta.T)
    parameters = found.parameters(range(len(x)))
    torch.testing.assert_close(torch.einsum("icd,id->ic", parameters, a), found.logits)
    torch.testing.assert_close(
        found.losses, cross_entropy(found.logits, y, reduction="none"), rtol=1e-9, atol=1e-12
    )
    for i in range(0, len(x), 5):
        truth = retrained(x, y, i, **way)
        change = (a[i] @ (truth - theta).T).abs().max()
        error = (found.logits[i] - a[i] @ truth.T).abs().max()
        # Of second order in the change.
        assert 1e-3 < change and error < 0.5 * change**2, (i, float(change), float(error))
        bound = 3 * (truth - theta).norm() ** 2
        assert (parameters[i] - truth).norm() < bound


def test_the_error_is_of_second_order():
    """Every sample m times: what one of them changes is 1/m of it, and the error 1/m^2."""
    x, y = data(24, 4, noise=2.0)
    errors = []
    for times in (1, 4, 16):
        many = x.repeat(times, 1), y.repeat(times)
        head = linear(trained(*many, 1e-2), True)
        found = imu.leave_one_out(head, many, weight_decay=1e-2)
        truth = [augmented(x, True)[i] @ retrained(*many, i, 1e-2).T for i in range(6)]
        errors.append(float((found.logits[:6] - torch.stack(truth)).norm()))
    assert errors[0] / errors[1] > 13 and errors[1] / errors[2] > 13, errors


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("d", [5, 40], ids=["many samples", "few samples"])
@pytest.mark.parametrize("start", ["optimum", "zero"])
def test_exact_where_the_loss_is_quadratic(reduction, d, start):
    """Ridge regression, solved anew without each sample; a Newton step arrives from anywhere."""
    x, y = data(25, d)
    a, targets = augmented(x, True), nn.functional.one_hot(y).double()

    def solved(kept):
        decay = 0.1 * (len(kept) if reduction == "mean" else 1)
        gram = 2 * a[kept].T @ a[kept] + decay * torch.eye(a.shape[1]).double()
        return torch.linalg.solve(gram, 2 * a[kept].T @ targets[kept]).T

    every = torch.arange(len(x))
    theta = solved(every) if start == "optimum" else torch.zeros(CLASSES, d + 1).double()
    problem = _Without(x, theta, targets, imu.SquaredError(), True, 0.1, reduction)
    found = problem.result(False, float("inf"))
    assert (found.distance < 1e-9) == (start == "optimum")
    if start == "optimum":
        options = dict(weight_decay=0.1, reduction=reduction, loss="squared_error")
        door = imu.leave_one_out(linear(theta, True), (x, targets), **options)
        torch.testing.assert_close(door.logits, found.logits, rtol=1e-9, atol=1e-9)
    for i in range(len(x)):
        truth = solved(every[every != i])
        torch.testing.assert_close(found.logits[i], a[i] @ truth.T, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.parameters([i])[0], truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("d", [5, 50])
@pytest.mark.parametrize("decay_bias", [True, False])
def test_refit_puts_the_head_at_the_optimum(d, decay_bias):
    x, y = data(36, d, noise=2.0)
    theta = trained(x, y, 1e-2, decay_bias=decay_bias)
    head = linear(torch.randn_like(theta), True)
    before = head.weight.detach().clone()
    options = dict(weight_decay=1e-2, decay_bias=decay_bias)
    found = imu.leave_one_out(head, (x, y), refit=True, **options)
    assert torch.equal(head.weight, before)
    assert found.gradient_norm < 1e-12
    torch.testing.assert_close(found.weight, theta[:, :-1], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.bias.diff(), theta[:, -1].diff(), rtol=1e-8, atol=1e-8)
    expected = imu.leave_one_out(linear(theta, True), (x, y), **options)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-7, atol=1e-9)


def test_confident_samples_and_separable_data():
    """Logits of about 30: probabilities beyond 1 - eps."""
    x, y = data(40, 6, noise=0.01)
    found = imu.leave_one_out(fresh(6), (30 * x, y), weight_decay=1e-9, refit=True)
    truth = retrained(30 * x, y, 3, 1e-9)
    loss = cross_entropy(30 * x[3] @ truth[:, :-1].T + truth[:, -1], y[3])
    assert bool(torch.isfinite(found.losses).all()) and float(found.losses.min()) > 0
    assert abs(float(found.losses[3] / loss) - 1) < 0.3


def test_the_curvature_of_a_confident_sample_is_not_cancelled():
    """Logits 30 and 0: ``p (1 - p)`` is 1e-13, which ``p - p^2`` has to three digits."""
    a = torch.tensor([[1.0]], dtype=torch.float64)
    point = Objective(a, torch.tensor([0]), CrossEntropy(), a[0]).at(30.0 * torch.eye(2, 1).to(a))
    ((_, blocks),) = point.chunks()
    size = torch.tensor(30.0, dtype=torch.float64)
    expected = size.sigmoid() * (-size).sigmoid() * torch.tensor([[1, -1], [-1, 1.0]]).double()
    torch.testing.assert_close(blocks[0], expected, rtol=1e-10, atol=0)


def test_one_binary_label_is_the_formula_of_logistic_regression():
    """``z_-i = z + h (p - y) / (1 - h w)`` of one logit, the difference of two."""
    x, _ = data(30, 3)
    y = torch.randint(2, (30,))
    found = imu.leave_one_out(
        fresh(3, 2, bias=False), (x, y), weight_decay=1.0, reduction="sum", refit=True
    )
    z = found.head_logits[:, 1] - found.head_logits[:, 0]
    p = z.sigmoid()
    # Two opposite halves: of their difference the weight decay is half.
    hessian = x.T @ (x * (p * (1 - p))[:, None]) + 0.5 * torch.eye(3).double()
    h = ((x @ torch.linalg.inv(hessian)) * x).sum(dim=1)
    expected = z + h * (p - y) / (1 - h * p * (1 - p))
    torch.testing.assert_close(found.logits[:, 1] - found.logits[:, 0], expected)
    assert float(softplus(z).max()) < 30


def test_of_a_network_and_its_loader():
    x, y = data(48, 5)
    model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, CLASSES))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x.float(), y), batch_size=7)
    found = imu.leave_one_out(model, loader, weight_decay=0.02, refit=True)
    features = model[:2](x.float()).detach().double()
    alone = imu.leave_one_out(fresh(9), (features, y), weight_decay=0.02, refit=True)
    torch.testing.assert_close(found.logits, alone.logits, rtol=1e-4, atol=1e-4)
    assert found.logits.dtype == torch.float64 and model.training


def test_only_slabs_of_samples_are_formed(monkeypatch):
    monkeypatch.setattr("imu_fast.attribution.newton._SLAB", 500)
    x, y = data(600, 6)
    head = fresh(6)
    with LargestTensor() as seen:
        cut = imu.leave_one_out(head, (x, y), weight_decay=0.1, refit=True)
    assert seen.largest <= 600 * 7, "not n x C D, which is 600 x 28"
    monkeypatch.undo()
    torch.testing.assert_close(
        cut.logits, imu.leave_one_out(head, (x, y), weight_decay=0.1, refit=True).logits
    )


def test_refusals():
    x, y = data(20, 5)
    theta = trained(x, y, 1e-2)
    head = linear(theta, True)

    def run(model=head, data=(x, y), **options):
        return imu.leave_one_out(model, data, **{"weight_decay": 1e-2, **options})

    for wrong in (dict(weight_decay=2e-2), dict(reduction="sum"), dict(decay_bias=False)):
        with pytest.raises(InputError, match=r"not at the optimum .* norm is .* refit=True"):
            run(**wrong)
    assert run(weight_decay=1.001e-2).distance > 0, "within the tolerance"
    with pytest.raises(InputError, match="not at the optimum"):
        run(weight_decay=1.001e-2, tolerance=1e-6)
    for option, value in [
        ("weight_decay", 0.0),
        ("reduction", "total"),
        ("decay_bias", 1),
        ("refit", "yes"),
        ("tolerance", -1.0),
    ]:
        with pytest.raises(InputError, match=f"{option}="):
            run(**{option: value})
    with pytest.raises(InputError, match="sample 2 has 0 labels"):
        run(data=(x, y.clone().index_fill_(0, torch.tensor([2]), -100)))
    with pytest.raises(InputError, match="one sample"):
        run(data=(x[:1], y[:1]))

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = head

        def forward(self, x):
            return self.fc(x) / 2

    with pytest.raises(InputError, match="between the head 'fc' and the logits"):
        run(Scaled())
    with pytest.raises(InputError, match="order C D = 2000000, beyond 20000"):
        imu.leave_one_out(
            nn.Linear(1999, 1000),
            (torch.randn(2001, 1999), torch.arange(2001) % 1000),
            weight_decay=1.0,
            refit=True,
        )
