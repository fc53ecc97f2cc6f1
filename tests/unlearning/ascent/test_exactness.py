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


@pytest.mark.parametrize("dropout", ["eval", "train"])
@pytest.mark.parametrize("batchnorm", ["eval", "train"])
@pytest.mark.parametrize("retain_loss", ["ce", "kl"])
def test_a_divergence_is_from_the_model_as_it_was_whatever_drops_or_drifts(
    retain_loss, batchnorm, dropout
):
    """Nothing drops in it, its statistics are those of before, and it moves none."""
    torch.manual_seed(0)
    parts = (nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.4), nn.Linear(7, 4))
    model = nn.Sequential(*parts).double()
    model(3 * torch.randn(40, 5).double() + 1)  # statistics of its own
    model.eval()
    x, y = torch.randn(13, 5).double(), torch.arange(13) % 4
    kept_x, kept_y = torch.randn(9, 5).double() + 2, torch.arange(9) % 4
    plain, original = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)
    losses = []
    for epoch in range(3):
        torch.manual_seed(epoch)
        order = torch.randperm(13, generator=torch.Generator().manual_seed(epoch))
        plain[1].train(batchnorm == "train")
        plain[3].train(dropout == "train")
        loss = -cross_entropy(plain(x[order]), y[order])
        rows = torch.randint(9, (13,))
        log_p = plain(kept_x[rows]).log_softmax(1)
        with torch.no_grad():
            log_was = original(kept_x[rows]).log_softmax(1)
        if retain_loss == "kl":
            kept = (log_was.exp() * (log_was - log_p)).sum(1).mean()
        else:
            kept = -log_p.gather(1, kept_y[rows, None]).mean()
        loss = loss + 2 * kept
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    how = {"batchnorm": batchnorm, "dropout": dropout, "scope": "all", "epochs": 3, "lr": LR}
    how |= {"retain": (kept_x, kept_y), "retain_loss": retain_loss, "retain_weight": 2.0}
    result = imu.unlearn(model, (x, y), "uniform", **how)
    assert result.batch_losses == pytest.approx(losses, rel=1e-12)
    assert _apart(model, plain) < 1e-12
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
