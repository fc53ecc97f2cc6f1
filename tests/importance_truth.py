"""Mean squared gradients by float64 autograd, one sample at a time, and small models."""

from __future__ import annotations

import copy

import torch
from per_sample import sample_gradients
from torch import nn
from torch.nn import functional as F

import imu_fast as imu

N, T, D, H, C = 11, 4, 6, 8, 5


def cross_entropy(model, sample):
    x, y = sample
    x = x[None].to(next(model.parameters()).dtype) if x.is_floating_point() else x[None]
    out = model(x)
    return F.cross_entropy(getattr(out, "logits", out).flatten(0, -2), y.reshape(-1))


def truth(model, samples, loss=cross_entropy, dtype=torch.float64):
    parameters = dict(model.named_parameters())
    found = sample_gradients(model, samples, list(parameters), loss, dtype)
    parts = found.square().mean(dim=0).split([p.numel() for p in parameters.values()])
    return {k: g.view(p.shape) for (k, p), g in zip(parameters.items(), parts, strict=True)}


def check(model, x, y, *, sizes=(5, 1, 5), loss=cross_entropy, tolerance=1e-5, reading=None):
    """All parameters, each relative to itself; nothing of the model changes."""
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    found = imu.parameter_importance(
        model, list(zip(x.split(sizes), y.split(sizes), strict=True)), **(reading or {})
    )
    want = truth(model, list(zip(x, y, strict=True)), loss)
    assert list(found) == list(want)
    size = max(float(value.norm()) for value in want.values())
    for name, value in want.items():  # what is zero but for rounding, relative to the largest
        off = float((found[name].double() - value).norm())
        error = off / max(float(value.norm()), 1e-9 * size)
        assert error < tolerance, f"{name}: relative error {error:.2g}"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    return found


class Net(nn.Module):
    """``mix(self, x)`` is the model."""

    def __init__(self, mix, **more):
        super().__init__()
        self.emb, self.fc, self.mix = nn.Linear(D, H), nn.Linear(H, C), mix
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.mix(self, x)


def tokens():
    return torch.randn(N, T, D), torch.randint(C, (N,))


def images(channels=4, size=6):
    return torch.randn(N, channels, size, size), torch.randint(C, (N,))


def pooled(body, width):
    return nn.Sequential(
        body, nn.Tanh(), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, C)
    )
