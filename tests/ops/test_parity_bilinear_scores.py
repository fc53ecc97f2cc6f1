"""Operands of bilinear and quadratic scores, and whole scores against a dense oracle."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from cases import Call, Case, LargestTensor, factors_of
from torch.func import functional_call, grad, vmap

import imu_fast as imu
from imu_fast import reference
from imu_fast.ops.bilinear_scores import bilinear_scores, quadratic_scores


def operands(case, dtype, many):
    """x: one X, or several; the order of the products is by their number."""
    delta, act, offsets, has_bias = factors_of(case, dtype)
    shape = (case.classes, case.features + has_bias)
    x = torch.randn(shape if many is None else (many, *shape), dtype=dtype)
    size = float(delta.abs().sum(1).max() * x.abs().max()) * float(act.abs().max() + 1)
    size *= case.features * max(case.lengths)
    length = case.classes + case.features
    return Call((delta, act, x, offsets, has_bias), length, [max(size, 1e-30)])


def squares(case, dtype):
    made = operands(case, dtype, None)
    size = made.sizes[0] ** 2 / float(made.args[2].abs().max())
    return Call(made.args, made.length, [max(size, 1e-30)])


def norms(case, dtype):
    delta, act, offsets, has_bias = factors_of(case, dtype)
    size = float(delta.abs().sum(1).max() * (act.abs().sum(1).max() + 1)) * max(case.lengths)
    length = case.classes + case.features
    return Call((delta, act, offsets, has_bias), length, [max(size**2, 1e-30)])


OPERANDS = {
    "bilinear_scores": {
        "one": partial(operands, many=None),
        "three": partial(operands, many=3),
        "as many as features": partial(operands, many=20),
    },
    "quadratic_scores": {"": squares},
    "gradient_norms": {"": norms},
}


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("many", [3, 20])
@pytest.mark.parametrize("rows", [1, 5])
def test_pieces_of_many_scores_change_nothing(many, has_bias, rows, monkeypatch):
    """Thirteen tokens in pieces whose last is short, in either order of the products."""
    args = operands(Case("in pieces", (1,) * 13, 7, 6, has_bias), torch.float64, many).args
    expected = reference.bilinear_scores(*args)
    module = sys.modules["imu_fast.ops.bilinear_scores"]
    monkeypatch.setattr(module, "_FEWEST_TOKENS", rows)
    monkeypatch.setattr(module, "_GRADIENT_ELEMENTS", 1)
    monkeypatch.setattr(module, "TILE_ELEMENTS", rows * many * 7)
    torch.testing.assert_close(bilinear_scores(*args), expected)


def test_many_scores_store_the_smaller_of_the_two_products():
    """Of a token: classes by features, or classes by how many there are."""
    for many, largest in ((4, 4 * 50), (40, 50 * 11)):
        delta, act = torch.randn(64, 50), torch.randn(64, 10)
        x = torch.randn(many, 50, 11)
        with LargestTensor() as mode:
            bilinear_scores(delta, act, x, torch.arange(65), True)
        assert mode.largest <= max(64 * largest, x.numel())


def test_the_square_of_a_sum_has_no_kernel():
    args = squares(Case("ragged tokens", (3, 1), 6, 5), torch.float32).args
    assert quadratic_scores.limits(*args) == "the square of a sum over tokens has no kernel yet"
    wide = squares(Case("ragged tokens", (3, 1), 6, 5), torch.float64).args
    assert "torch.float64" in quadratic_scores.limits(*wide)


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
