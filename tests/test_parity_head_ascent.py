"""The head's objectives, their residuals, the ascent gradient and whole steps of SGD."""

from __future__ import annotations

import pytest
import torch
from cases import ASCENT_RATES, CASES, ascent_arguments, assert_close, every_dtype

import imu_fast as imu
from imu_fast import reference
from imu_fast.ops.head_ascent import (
    OBJECTIVES,
    head_ascent,
    head_ascent_gradient,
    objective,
    objective_residual,
)


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


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("case", [c for c in CASES if c.classes > 1], ids=lambda c: c.why)
@every_dtype
def test_head_ascent(case, name, dtype):
    args, length, size = ascent_arguments(case, dtype, name)
    theta, buffer, true_loss = reference.head_ascent(*args, **ASCENT_RATES)
    loss = head_ascent(*args, **ASCENT_RATES)
    assert_close(args[3], theta, length, size)
    assert_close(args[4], buffer, length, size)
    assert_close(loss, true_loss, length, float(theta.abs().sum()) + size)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("alpha", [0.0, 0.05])
def test_head_ascent_is_torchs_sgd_to_the_bit(momentum, alpha):
    args, *_ = ascent_arguments(CASES[1], torch.float64, "ce")
    features, labels, weights, theta, buffer, *options = args
    other = theta.clone()
    optimizer = torch.optim.SGD([other], lr=0.1, momentum=momentum, weight_decay=0.01)
    state = buffer.zero_() if momentum else None
    for _ in range(3):
        other.grad = head_ascent_gradient(features, labels, weights, other, *options)[0]
        other.grad += alpha * other.sign()
        optimizer.step()
        rates = ASCENT_RATES | dict(momentum=momentum, alpha=alpha)
        head_ascent(features, labels, weights, theta, state, *options, **rates)
    assert torch.equal(theta, other)
