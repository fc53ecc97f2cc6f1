"""The preset that behaves as the authors' code does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import imu_fast as imu


class FcNet(nn.Module):
    """Two layers whose name contains 'fc', as the authors' networks have."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(self.norm(x))))


def authors_scores(model, x, y, first_row_is_mean):
    """The authors' scores, written out: rows of G from autograd, one sample at a time."""
    parameters = [p for k, p in model.named_parameters() if "fc" in k]
    rows = []
    for i in range(len(x)):
        loss = nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    g = torch.stack(rows)
    inverse = 1 / (g.square().mean(dim=0) + 0.01)
    mean = g.mean(dim=0)
    if first_row_is_mean:
        g[0] = mean
    return -(g @ (inverse * mean))


@pytest.mark.parametrize("first_row_is_mean", [False, True])
def test_preset_paper_behaves_as_the_authors_code(first_row_is_mean):
    torch.manual_seed(0)
    model = FcNet().double().eval()
    x, y = torch.randn(30, 6, dtype=torch.float64), torch.randint(4, (30,))
    expected_scores = authors_scores(model, x, y, first_row_is_mean)
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    result = imu.unlearn(
        ours,
        (x, y),
        preset="paper",
        top_fraction=1.0,
        first_row_is_mean=first_row_is_mean,
        lr=0.01,
        epochs=2,
        batch_size=64,
    )
    torch.testing.assert_close(result.scores, expected_scores, rtol=1e-9, atol=1e-12)
    assert result.settings["alpha"] == 0.2
    assert (result.settings["batchnorm"], result.settings["dropout"]) == ("train", "train")

    # Their loop: training mode, SGD on the fc parameters, weighted mean plus L1.
    theirs.train()
    fc = [p for k, p in theirs.named_parameters() if "fc" in k]
    optimizer = torch.optim.SGD(fc, lr=0.01, momentum=0.9, weight_decay=5e-4)
    keep = torch.nonzero(expected_scores < 0).flatten()
    w = expected_scores[keep].abs().sqrt()
    w = w.clamp_max(torch.quantile(w, 0.93))
    for _ in range(2):
        optimizer.zero_grad()
        losses = nn.functional.cross_entropy(theirs(x[keep]), y[keep], reduction="none")
        loss = -(w * losses).sum() / w.sum() + 0.2 * sum(p.abs().sum() for p in fc)
        loss.backward()
        optimizer.step()
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[key], rtol=1e-9, atol=1e-11)
    assert not torch.equal(ours.norm.running_mean, model.norm.running_mean)
