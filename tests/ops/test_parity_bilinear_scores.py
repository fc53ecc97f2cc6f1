"""Bilinear and quadratic scores against reference.py, and whole scores against a dense oracle."""

from __future__ import annotations

import pytest
import torch
from cases import assert_close, every_case, every_dtype, factors_of
from torch.func import functional_call, grad, vmap

import imu_fast as imu
from imu_fast import reference
from imu_fast.ops.bilinear_scores import bilinear_scores, quadratic_scores


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
