"""The head's ascent gradient against autograd of the reference."""

from __future__ import annotations

import pytest
import torch

import imu_fast as imu
from imu_fast.ops.head_ascent import head_ascent_gradient
from imu_fast.ops.objective import OBJECTIVES


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
