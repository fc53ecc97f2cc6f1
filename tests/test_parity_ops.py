"""Every vectorised operation against reference.py, and the reference against autograd."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, IDS, Case, assert_close
from torch.func import functional_call, grad, vmap

import imu_fast as imu
from imu_fast import reference
from imu_fast.ops.bilinear_scores import bilinear_scores, quadratic_scores
from imu_fast.ops.fisher_diagonal import fisher_diagonal
from imu_fast.ops.head_ascent import (
    OBJECTIVES,
    head_ascent_gradient,
    objective,
    objective_residual,
)
from imu_fast.ops.mean_gradient import mean_gradient
from imu_fast.ops.softmax_residual import softmax_residual

DTYPES = [torch.float64, torch.float32]
every_case = pytest.mark.parametrize("case", CASES, ids=IDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def factors_of(case: Case, dtype: torch.dtype):
    """delta in ``dtype``, made in float64 so that only the operation under test rounds."""
    p = case.make(torch.float64)
    delta, _ = reference.softmax_residual(p.logits, p.labels, p.scale)
    return delta.to(dtype), p.act.to(dtype), p.offsets, p.has_bias


@every_case
@every_dtype
def test_softmax_residual(case, dtype):
    p = case.make(dtype)
    logits = p.logits
    delta, loss = softmax_residual(logits, p.labels, p.scale)
    true_delta, true_loss = reference.softmax_residual(logits, p.labels, p.scale)
    # exp amplifies an absolute error of a logit into a relative one: eps times the logits' size.
    size = float(logits.abs().max()) if len(logits) else 0.0
    assert_close(delta, true_delta, case.classes + int(size))
    assert_close(loss, true_loss, case.classes + int(size))
    assert delta.dtype == loss.dtype == dtype


def test_residual_of_the_label_keeps_its_digits():
    """p_y - 1 of a confident sample: computing p_y first would give zero in float32."""
    logits = torch.tensor([[20.0, 0.0]])
    delta, _ = softmax_residual(logits, torch.tensor([0]))
    truth, _ = reference.softmax_residual(logits, torch.tensor([0]), torch.ones(1))
    torch.testing.assert_close(delta.double(), truth, rtol=1e-5, atol=0)
    assert float(delta[0, 0]) < 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    logits = torch.randn(5, 7).to(dtype)
    delta, loss = softmax_residual(logits, torch.arange(5))
    expected = softmax_residual(logits.float(), torch.arange(5))
    assert delta.dtype == torch.float32
    assert torch.equal(delta, expected[0])
    assert torch.equal(loss, expected[1])


@every_case
@every_dtype
def test_mean_gradient(case, dtype):
    f = factors_of(case, dtype)
    size = float(f[0].abs().max() * f[1].abs().max())
    assert_close(mean_gradient(*f), reference.mean_gradient(*f), len(f[0]), size)


@every_case
@every_dtype
def test_fisher_diagonal(case, dtype):
    f = factors_of(case, dtype)
    size = float((f[0].abs().max() * f[1].abs().max()) ** 2) * max(case.lengths)
    assert_close(fisher_diagonal(*f), reference.fisher_diagonal(*f), len(f[0]), max(size, 1e-30))


@pytest.mark.parametrize("tile", [1, 7, 64])
def test_fisher_diagonal_of_tokens_does_not_depend_on_the_tile(monkeypatch, tile):
    import sys

    module = sys.modules["imu_fast.ops.fisher_diagonal"]
    f = factors_of(Case("ragged tokens", (3, 1, 7, 2, 3, 3), 6, 5), torch.float64)
    expected = reference.fisher_diagonal(*f)
    monkeypatch.setattr(module, "TILE_ELEMENTS", tile)
    torch.testing.assert_close(fisher_diagonal(*f), expected)
    x = torch.rand_like(expected)
    torch.testing.assert_close(
        quadratic_scores(*f[:2], x, *f[2:]), reference.quadratic_scores(*f[:2], x, *f[2:])
    )


@every_case
@every_dtype
@pytest.mark.parametrize("many", [None, 3])
def test_bilinear_scores(case, dtype, many):
    delta, act, offsets, has_bias = factors_of(case, dtype)
    shape = (case.classes, case.features + has_bias)
    x = torch.randn(shape if many is None else (many, *shape), dtype=dtype)
    size = float(delta.abs().sum(1).max() * x.abs().max()) * float(act.abs().max() + 1)
    size *= case.features * max(case.lengths)
    for function in ("bilinear_scores", "quadratic_scores"):
        if function == "quadratic_scores" and many:
            continue
        fast = {"bilinear_scores": bilinear_scores, "quadratic_scores": quadratic_scores}[function]
        slow = getattr(reference, function)
        bound = size if function == "bilinear_scores" else size**2 / float(x.abs().max())
        args = (delta, act, x, offsets, has_bias)
        assert_close(fast(*args), slow(*args), case.classes + case.features, max(bound, 1e-30))


@every_case
def test_reference_gradients_are_autograds(case):
    """sample_gradients against one autograd gradient per sample of the mean token loss."""
    p = case.make(torch.float64)
    delta, losses = reference.softmax_residual(p.logits, p.labels, p.scale)
    g = reference.sample_gradients(delta, p.act, p.offsets, p.has_bias)
    weight = torch.cat([p.weight, p.bias[:, None]], 1) if p.has_bias else p.weight
    spans = zip(p.offsets[:-1].tolist(), p.offsets[1:].tolist(), strict=True)
    for i, (start, stop) in enumerate(spans):
        if start == stop:
            assert not g[i].any()
            continue
        theta = weight.clone().requires_grad_()
        logits = reference.augment(p.act[start:stop], p.has_bias) @ theta.T
        loss = torch.nn.functional.cross_entropy(logits, p.labels[start:stop])
        expected = torch.autograd.grad(loss, theta)[0]
        torch.testing.assert_close(g[i], expected, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(losses[start:stop].sum(), loss.detach())


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_objective_residual_is_the_gradient(name, scale):
    logits = (scale * torch.randn(40, 6, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(6, (40,))
    value = objective(logits, labels, name)
    torch.testing.assert_close(value, reference.objective(logits, labels, name))
    expected = torch.autograd.grad(value.sum(), logits)[0]
    actual = objective_residual(logits.detach(), labels, name)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_margin_pushes_only_samples_still_predicted_as_their_label():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 5.0], [1.0, 1.0, 0.0]])
    residual = objective_residual(logits, torch.tensor([0, 1, 0]), "margin")
    assert residual.tolist() == [[-1, 0, 1], [0, 0, 0], [-1, 1, 0]]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_head_ascent_gradient(name, has_bias):
    theta = torch.randn(4, 5 + has_bias, dtype=torch.float64)
    features, labels = torch.randn(9, 5, dtype=torch.float64), torch.randint(4, (9,))
    args = (features, labels, torch.rand(9, dtype=torch.float64), theta, has_bias, name)
    fast, loss = head_ascent_gradient(*args)
    with imu.use_backend("reference"):
        slow, true_loss = head_ascent_gradient(*args)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(loss, true_loss)


def dense_scores(features, weight, bias, labels, lam):
    """The oracle of the oracle: vmap(grad) of the loss, everything dense, float64."""
    parameters = {"weight": weight.double(), "bias": bias.double()}
    linear = torch.nn.Linear(features.shape[1], weight.shape[0])

    def loss(p, a, y):
        logits = functional_call(linear, p, (a[None],))
        return torch.nn.functional.cross_entropy(logits, y[None])

    rows = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, features.double(), labels)
    g = torch.cat([rows["weight"].flatten(1), rows["bias"]], dim=1)
    return -(g @ (g.mean(0) / (g.square().mean(0) + lam)))


def test_scores_agree_with_a_dense_float64_oracle():
    features, labels = torch.randn(300, 64), torch.randint(100, (300,))
    weight, bias = torch.randn(100, 64) / 8, torch.randn(100)
    truth = dense_scores(features, weight, bias, labels, 1e-2)
    factors = imu.GradientFactors.from_head(features, weight, bias, labels)
    scores = imu.influence_scores(factors, damping=1e-2)
    assert float((scores - truth).norm() / truth.norm()) < 1e-5
    assert float(((scores - truth).abs() / truth.abs().max()).max()) < 1e-5


def test_scores_of_a_resnet_head_agree_with_a_dense_float64_oracle():
    models = pytest.importorskip("torchvision").models
    model = models.resnet18(num_classes=10).eval()
    x, y = torch.randn(16, 3, 64, 64), torch.randint(10, (16,))
    scores = imu.influence_scores(model, (x, y), damping=1e-2)
    found = imu.capture_features(model, (x, y))
    truth = dense_scores(found.features, model.fc.weight.detach(), model.fc.bias.detach(), y, 1e-2)
    assert float((scores - truth).norm() / truth.norm()) < 1e-5
