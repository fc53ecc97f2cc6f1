"""Factors of convolutions: what the kernel sees, unfolded chunk by chunk, against autograd."""

from __future__ import annotations

import pytest
import torch
from per_sample import assert_scores, sample_gradients, scores
from torch import nn
from torch.nn import functional as F

import imu_fast as imu
from imu_fast.errors import InputError, NoHeadFoundError
from imu_fast.factors import unfolded
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.unfolded import UnfoldedFactors

N, C, CHANNELS = 11, 4, 3

LAYERS = {
    "plain": (2, lambda: nn.Conv2d(CHANNELS, 5, 3)),
    "stride, padding, dilation": (
        2,
        lambda: nn.Conv2d(CHANNELS, 5, (3, 2), (2, 1), (1, 2), (2, 1)),
    ),
    "no bias": (2, lambda: nn.Conv2d(CHANNELS, 5, 3, padding=1, bias=False)),
    "same, even kernel": (2, lambda: nn.Conv2d(CHANNELS, 5, (2, 4), padding="same")),
    "circular": (2, lambda: nn.Conv2d(CHANNELS, 5, 3, padding=(2, 1), padding_mode="circular")),
    "reflect": (2, lambda: nn.Conv2d(CHANNELS, 5, 3, padding=1, padding_mode="reflect")),
    "whole input": (2, lambda: nn.Conv2d(CHANNELS, 5, 6)),
    "patches": (2, lambda: nn.Conv2d(CHANNELS, 5, 2, 2)),
    "one axis": (1, lambda: nn.Conv1d(CHANNELS, 5, 3, 2, 2)),
    "three axes": (3, lambda: nn.Conv3d(CHANNELS, 5, (2, 3, 1), (1, 2, 1), (1, 0, 1))),
}


def network(layer):
    pool = nn.Sequential(nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    return nn.Sequential(layer, nn.Tanh(), pool, nn.Linear(5, C))


def loss(model, sample):
    x, y = sample
    return F.cross_entropy(model(x[None].double()), y[None])


def truth(model, x, y, layer="0"):
    names = [n for n, _ in model.named_parameters() if n.rpartition(".")[0] == layer]
    return sample_gradients(model, zip(x, y, strict=True), names, loss)


def batches(x, y):
    return list(zip(x.split([4, 1, 6]), y.split([4, 1, 6]), strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_scores(name, monkeypatch):
    axes, make = LAYERS[name]
    model, x, y = network(make()), torch.randn(N, CHANNELS, *[6] * axes), torch.randint(C, (N,))
    factors = imu.capture(model, batches(x, y), layers="0")
    assert isinstance(factors, UnfoldedFactors) and factors.n == N
    gradients = truth(model, x, y)
    for elements in (1 << 22, 300, 1):  # all at once, some samples, one
        monkeypatch.setattr(unfolded, "_CHUNK_ELEMENTS", elements)
        for curvature in ("identity", "fisher_diag", "fisher"):
            found = imu.influence_scores(factors, curvature=curvature)
            assert_scores(found, scores(gradients, curvature))
    rows = model[0].weight.flatten(1).shape
    mean = gradients.mean(dim=0)
    expected = mean[: rows.numel()].view(rows)
    got = factors.mean_gradient().double()
    torch.testing.assert_close(got[:, : rows[1]], expected, rtol=1e-5, atol=1e-7)
    assert got.shape[1] == rows[1] + (model[0].bias is not None)
    got = factors.fisher_diagonal().double()[:, : rows[1]]
    expected = gradients.square().mean(dim=0)[: rows.numel()].view(rows)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    shares = [factors.shard(rank, 3) for rank in range(3)]
    assert sum(share.n for share in shares) == N
    for name in ("mean_gradient", "fisher_diagonal"):
        total = sum(getattr(share, name)() * share.n for share in shares) / N
        torch.testing.assert_close(total, getattr(factors, name)(), rtol=1e-5, atol=1e-7)


def test_inputs_are_held_as_they_are(monkeypatch):
    """Not unfolded, which would be nine times as much; chunks are as large as they are told."""
    model = network(nn.Conv2d(CHANNELS, 5, 3, padding=1))
    x, y = torch.randn(N, CHANNELS, 8, 8), torch.randint(C, (N,))
    factors = imu.capture(model, (x, y), layers="0")
    assert sum(kept.nbytes for kept in factors.inputs) == x.nbytes
    assert [chunk.n for chunk in factors.chunks(2 * 64)] == [2] * 5 + [1]
    monkeypatch.setattr(unfolded, "_CHUNK_ELEMENTS", 3 * 64 * 27)
    assert max(chunk.act.numel() for chunk in factors.chunks()) <= 3 * 64 * 27
    assert all(isinstance(chunk, GradientFactors) for chunk in factors.chunks())


def test_layers_of_several_kinds_and_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, C)
            self.one = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            x = self.conv(torch.tanh(self.conv(x))) + self.one(x)
            return self.fc(x.clamp_min(0).mean((2, 3)))

    model, x, y = Twice(), torch.randn(N, 3, 5, 5), torch.randint(C, (N,))
    want = sum(scores(truth(model, x, y, layer)) for layer in ("conv", "one", "fc"))
    found = imu.influence_scores(model, batches(x, y), layers=["conv", "one", "fc"])
    assert_scores(found, want)


def test_images_that_belong_to_samples_in_other_ways():
    class Views(nn.Module):
        """Several images a sample, and one sample's images of another size in the next batch."""

        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 5, 3), nn.Linear(5, C)

        def forward(self, x):
            h = self.conv(x.flatten(0, 1)).tanh().mean((2, 3))
            return self.fc(h.view(*x.shape[:2], 5).mean(1))

    model, y = Views(), torch.randint(C, (N,))
    parts = [torch.randn(4, 2, 3, 5, 5), torch.randn(1, 3, 3, 7, 5), torch.randn(6, 2, 3, 4, 4)]
    samples = [x for part in parts for x in part]
    gradients = sample_gradients(
        model, zip(samples, y, strict=True), ["conv.weight", "conv.bias"], loss
    )
    data = list(zip(parts, y.split([4, 1, 6]), strict=True))
    assert_scores(imu.influence_scores(model, data, layers="conv"), scores(gradients))


def test_refusals():
    x, y = torch.randn(N, 4, 6, 6), torch.randint(C, (N,))
    model = network(nn.Conv2d(4, 5, 3))
    factors = imu.capture(model, (x, y), layers="0")
    for curvature in ("ggn", "kfac"):
        with pytest.raises(InputError, match="'0'"):
            imu.influence_scores(factors, curvature=curvature)

    class Scaled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(NoHeadFoundError, match=r"whose output is not act W\^T"):
        imu.capture(network(Scaled(4, 5, 3)), (x, y), layers="0")
    x[3] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        imu.capture(model, (x, y), layers="0")
