"""Importance where samples lie in rows in other ways, or are not independent."""

from __future__ import annotations

import pytest
import torch
from importance_truth import C, D, H, N, Net, T, check, tokens, truth
from torch import nn
from torch.nn import functional as F

import imu_fast as imu
from imu_fast.errors import InputError


def sorted_by_the_data(self, x):
    h = self.emb(x).mean(1)
    order = h[:, 0].detach().argsort() if float(h.detach()[0, 1]) > 0 else torch.arange(len(x))
    return self.fc(F.gelu(self.a(h[order]))[order.argsort()])


def test_a_layout_that_changes_with_the_data():
    model, n = Net(sorted_by_the_data, a=nn.Linear(H, H)), 5 * 12
    x, y = torch.randn(n, T, D), torch.randint(C, (n,))
    sign = model.emb(x).detach().mean(1).view(5, 12, H)[:, 0, 1]
    order = sign.argsort()  # the sorted batches come last
    x = x.view(5, 12, T, D)[order].flatten(0, 1)
    check(model, x, y, sizes=[12] * 5)


def turned(self, x):
    """Whether rows are turned is one number, which no function's name shows."""
    h = self.emb(x).mean(1)
    by = int(h.detach()[0, 1] > 0) * (len(x) // 2)
    h = F.gelu(self.a(torch.cat([h[by:], h[:by]])))
    return self.fc(torch.cat([h[len(x) - by :], h[: len(x) - by]]))


def branched(self, x):
    h = self.emb(x).mean(1)
    if float(h.detach()[0, 1]) > 0:
        return self.fc(F.gelu(self.a(h.flip(0))).flip(0))
    return self.fc(F.gelu(self.a(h)))


@pytest.mark.parametrize("mix", [turned, branched], ids=lambda f: f.__name__)
def test_code_that_lays_rows_out_in_another_way_later(mix):
    model, size, count = Net(mix, a=nn.Linear(H, H)), 12, 9
    x, y = torch.randn(size * count, T, D), torch.randint(C, (size * count,))
    parts = [part if k else part.flip(0) for k, part in enumerate(x.split(size))]
    order = [model.emb(part).detach().mean(1)[0, 1] for part in parts]
    parts = [parts[k] for k in torch.stack(order).argsort().tolist()]
    for part in (parts[0], *parts[-3:]):  # the first is straight, the last are not
        straight = part is parts[0]
        while (float(model.emb(part).detach().mean(1)[0, 1]) <= 0) != straight:
            part[0] = torch.randn(T, D)
    check(model, torch.cat(parts), y, sizes=[size] * count)
    batches = list(zip(parts, y.split(size), strict=True))
    if mix is branched:  # its code shows it, so that one pass is enough
        found = imu.parameter_importance(model, iter(batches))
        for name, value in imu.parameter_importance(model, batches).items():
            torch.testing.assert_close(found[name], value)
    else:
        with pytest.raises(InputError, match="in one way in some"):
            imu.parameter_importance(model, iter(batches))


def test_rows_that_are_always_sorted():
    """Those of all samples together; in the first batch they come in order."""

    def mix(self, x):
        h = self.emb(x).flatten(0, 1)
        order = h[:, 0].detach().argsort()
        return self.fc(F.gelu(self.a(h[order]))[order.argsort()].view(len(x), T, H).mean(1))

    model, size = Net(mix, a=nn.Linear(H, H)), 12
    x, y = torch.randn(3 * size, T, D), torch.randint(C, (3 * size,))
    rows = x[:size].flatten(0, 1)
    x[:size] = rows[model.emb(rows).detach()[:, 0].argsort()].view(size, T, D)
    batches = list(zip(x.split(size), y.split(size), strict=True))
    found = imu.parameter_importance(model, iter(batches))
    for name, value in truth(model, list(zip(x, y, strict=True))).items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-9)


def test_an_input_that_is_overwritten_after_its_use():
    def overwritten(self, x):
        z = torch.tanh(x)
        h = self.emb(z)
        z.mul_(0)
        return self.fc(h.mean(1))

    with pytest.raises(InputError, match=r"no gradient in emb\.bias, emb\.weight.*inplace"):
        imu.parameter_importance(Net(overwritten), tokens())


def test_samples_that_are_not_independent():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.fc = nn.Linear(D, H), nn.Linear(H, C)

        def forward(self, x):
            h = self.emb(x.reshape(self.samples, D))
            return self.fc(torch.tanh(h - h.mean(0)))

    for samples, message in (
        (-1, "change with the rest of its batch"),
        (N, r"emb.*samples of a batch are not\s+independent"),  # a batch that cannot be cut
    ):
        Own.samples = samples
        with pytest.raises(InputError, match=message):
            imu.parameter_importance(Own(), (torch.randn(N, D), torch.randint(C, (N,))))
    normed = nn.Sequential(nn.Linear(D, H), nn.BatchNorm1d(H, track_running_stats=False))
    with pytest.raises(InputError, match="own statistics"):
        imu.parameter_importance(normed, (torch.randn(N, D), torch.randint(C, (N,))))
    functional = nn.Sequential(nn.Linear(D, H), Batch(), nn.Linear(H, C))
    with pytest.raises(InputError, match="change with the rest of its batch"):
        imu.parameter_importance(functional, (torch.randn(N, D), torch.randint(C, (N,))))
    assert all(p.requires_grad for p in functional.parameters())


class Batch(nn.Module):
    """Normalises by the batch, in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(H))

    def forward(self, x):
        return F.batch_norm(x, None, None, self.scale, training=True)
