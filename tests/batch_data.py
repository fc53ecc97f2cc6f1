"""A small model, its data and the scores that every form of the data must have."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.data import (
    Dataset,
    IterableDataset,
)

import imu_fast as imu

N, WIDTH, CLASSES = 14, 6, 5


DAMPING = 1e-2


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Linear(WIDTH, 7), nn.Linear(7, CLASSES)

    def logits(self, x):
        return self.fc(torch.relu(self.body(x)))

    def forward(self, x):
        return self.logits(x)


class TwoInputs(Net):
    def forward(self, x, z):
        return self.logits(x + z)


def oracle(model, x, y, z=None):
    """``-g_i^T (diag(mean g^2) + damping)^-1 gbar`` of the head: float64, a sample at a time."""
    model = copy.deepcopy(model).double().eval()
    inputs = x.double() if z is None else x.double() + z.double()
    rows = []
    for sample, label in zip(inputs, y, strict=True):
        loss = nn.functional.cross_entropy(model.logits(sample[None]), label[None].long())
        gradient = torch.autograd.grad(loss, list(model.fc.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradient]))
    g = torch.stack(rows)
    mean = g.mean(0)
    return -(g @ (mean / ((g * g).mean(0) + DAMPING)))


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, WIDTH, generator=generator)
    z = torch.randn(N, WIDTH, generator=generator)
    return x, torch.randint(0, CLASSES, (N,), generator=generator), z


def scores_of_both_doors(model, loader):
    """Scores by ``influence_scores`` and by ``unlearn``; the model stays."""
    model = copy.deepcopy(model)
    scored = imu.influence_scores(model, loader, damping=DAMPING)
    result = imu.unlearn(
        model, loader, epochs=1, damping=DAMPING, on_empty="uniform", inplace=False
    )
    return scored, result.scores


def check(model, loader, want):
    for got in scores_of_both_doors(model, loader):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


class Pairs(Dataset):
    """A map-style dataset of samples."""

    def __init__(self, make):
        self.make = make

    def __len__(self):
        return N

    def __getitem__(self, i):
        x, y, _ = data()
        return self.make(x[i], y[i], i)


class Stream(IterableDataset):
    def __init__(self, batched=False):
        self.batched = batched

    def __iter__(self):
        x, y, _ = data()
        if self.batched:
            return iter(list(zip(x.split(5), y.split(5), strict=True)))
        return iter(list(zip(x, y, strict=True)))


def halves(make):
    x, y, _ = data()
    return [make(x[:9], y[:9]), make(x[9:], y[9:])]


def as_list(batch):
    return batch
