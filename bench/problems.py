"""Forget sets of real and random data, with features of networks trained here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import imu_fast as imu
from imu_fast.study.data import cifar, digits


@dataclass(frozen=True)
class Problem:
    """A forget set at a head; ``network`` and ``x`` where all parameters can be taken."""

    name: str
    factors: imu.GradientFactors
    network: nn.Module | None = None
    x: Tensor | None = None


def train(make: Callable[[], nn.Module], x: Tensor, y: Tensor, epochs: int, lr: float) -> nn.Module:
    """SGD with momentum, cosine decay, batches of 128; seeded."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def digits_network() -> nn.Module:
    """64 - 32 - 10, small enough (2,410 parameters) for dense matrices over all of them."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def cifar_network() -> nn.Module:
    """Four convolutions with BatchNorm, 128 pooled features."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128), (128, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(128 * 4, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def _sets(name: str, model: nn.Module, x: Tensor, y: Tensor, count: int, small: bool):
    drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:count]
    for kind, rows in (("class 3", torch.nonzero(y == 3).flatten()), (f"{count} random", drawn)):
        factors = imu.capture(model, (x[rows], y[rows]))
        yield Problem(f"{name}, {kind}", factors, model if small else None, x[rows])


def random_problem(n: int = 2000, d: int = 512, classes: int = 100, relu: bool = False) -> Problem:
    """Normal features (or their positive part), a random head and random labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    weight = torch.randn(classes, d, generator=generator) / d**0.5
    labels = torch.randint(classes, (n,), generator=generator)
    factors = imu.GradientFactors.from_head(
        x.relu() if relu else x, weight, torch.zeros(classes), labels
    )
    return Problem(f"random{', relu' if relu else ''}, C={classes}", factors)


def problems(data: Path | None, epochs: int = 6) -> list[Problem]:
    """Digits, CIFAR-10 where ``data`` names its ``.npz``, and random features."""
    x, y = digits.load(0).train
    found = list(_sets("digits", train(digits_network, x, y, 40, 0.1), x, y, 100, small=True))
    if data is not None:
        x, y = cifar.load(data, "train", 10_000)
        model = train(cifar_network, x, y, epochs, 0.05)
        found += _sets("CIFAR-10", model, x, y, 500, small=False)
    return [*found, random_problem(1000, 64, 10), random_problem(1000, 64, 10, relu=True)]
