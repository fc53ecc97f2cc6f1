"""A float64 model is ascended in float64: a plain loop to its rounding, not to float32's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import imu_fast as imu

EPOCHS, LR = 6, 0.03


def _model_and_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    return model, torch.randn(13, 5).double(), torch.arange(13) % 4


def _apart(ours: nn.Module, theirs: nn.Module) -> float:
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("scope", ["head", "layers", "all"])
def test_uniform_ascent_is_the_plain_loop_in_float64(scope):
    model, x, y = _model_and_data()
    plain = copy.deepcopy(model)
    trained = plain if scope == "all" else plain[2]
    optimizer = torch.optim.SGD(trained.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)
    for _ in range(EPOCHS):
        optimizer.zero_grad()
        (-cross_entropy(plain(x), y)).backward()
        optimizer.step()
    imu.unlearn(model, (x, y), "uniform", scope=scope, epochs=EPOCHS, lr=LR)
    assert _apart(model, plain) < 1e-13


@pytest.mark.parametrize("retain_loss", ["ce", "kl"])
def test_retain_data_is_kept_alike_by_the_head_and_by_the_network(retain_loss):
    model, x, y = _model_and_data()
    found = []
    for scope in ("head", "layers"):
        found.append(copy.deepcopy(model))
        how = {"scope": scope, "epochs": EPOCHS, "lr": LR, "retain_loss": retain_loss}
        imu.unlearn(found[-1], (x, y), "uniform", retain=(x.flip(0), y.flip(0)), **how)
    assert _apart(*found) < 1e-13
