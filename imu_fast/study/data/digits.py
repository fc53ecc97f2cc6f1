"""scikit-learn's bundled digits: 1,797 real images of 8x8 pixels, no download."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imu_fast.errors import check_installed

Samples = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class DigitsTask:
    """What is forgotten, and what must be kept.

    Attributes:
        name: for tables. forget, retain: training images (x [n, 1, 8, 8] float32 in [0, 1], y [n]).
        test: test images of the classes that are kept.
        depth: the forget accuracy at which every method stops.
    """

    name: str
    forget: Samples
    retain: Samples
    test: Samples
    depth: float


def load(seed: int) -> tuple[Samples, Samples]:
    """Training (70 %) and test images, split by seed."""
    check_installed("data='digits'", "sklearn")
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(raw.target, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    cut = int(0.7 * len(x))
    train, test = order[:cut], order[cut:]
    return (x[train], y[train]), (x[test], y[test])


def class_task(train: Samples, test: Samples, digit: int) -> DigitsTask:
    """Forget every training image of one digit, down to accuracy zero."""
    (x, y), (tx, ty) = train, test
    f, kept = y == digit, ty != digit
    return DigitsTask(
        f"class {digit}", (x[f], y[f]), (x[~f], y[~f]), (tx[kept], ty[kept]), depth=0.0
    )


def random_task(train: Samples, test: Samples, count: int, seed: int) -> DigitsTask:
    """Forget a random handful of training images, until half of them are misclassified."""
    x, y = train
    f = torch.zeros(len(x), dtype=torch.bool)
    f[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed + 1))[:count]] = True
    return DigitsTask(f"{count} random", (x[f], y[f]), (x[~f], y[~f]), test, depth=0.5)
