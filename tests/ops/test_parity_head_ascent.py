"""The head's ascent gradient and whole steps of SGD against the reference."""

from __future__ import annotations

import pytest
import torch
from cases import ASCENT_RATES, CASES, ascent_arguments, assert_close, every_dtype

import imu_fast as imu
from imu_fast import reference
from imu_fast.ops.head_ascent import head_ascent, head_ascent_gradient
from imu_fast.ops.objective import LABEL_OBJECTIVES, OBJECTIVES


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_head_ascent_gradient(name, has_bias):
    theta = torch.randn(4, 5 + has_bias, dtype=torch.float64)
    features, labels = torch.randn(9, 5, dtype=torch.float64), torch.randint(4, (9,))
    auxiliary = torch.randint(4, (9,)) if name == "relabel" else torch.rand(9).double()
    args = (features, labels, torch.rand(9).double(), theta, has_bias, name, auxiliary)
    fast, loss = head_ascent_gradient(*args)
    with imu.use_backend("reference"):
        slow, true_loss = head_ascent_gradient(*args)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(loss, true_loss)


@pytest.mark.parametrize("name", LABEL_OBJECTIVES)
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
