"""scikit-learn's bundled digits: 1,797 real images of 8x8 pixels, no download."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imu_fast.errors import check_installed
from imu_fast.unlearning.depth import StopRule

Samples = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Digits:
    """Images x [n, 1, 8, 8] float32 in [0, 1] and labels [n], split by seed.

    Attributes:
        train: 70 %. calibration: 10 %, which say how deep is deep enough. test: 20 %.
    """

    train: Samples
    calibration: Samples
    test: Samples


@dataclass(frozen=True)
class DigitsTask:
    """What is forgotten, and what must be kept.

    Attributes:
        name: for tables. forget, retain: training images.
        test: test images of the classes that are kept.
        stop: the depth at which every method stops. depth: that in words, ``{unseen}`` in it.
    """

    name: str
    forget: Samples
    retain: Samples
    test: Samples
    stop: StopRule
    depth: str


def load(seed: int) -> Digits:
    """All 1,797 images."""
    check_installed("data='digits'", "sklearn")
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(raw.target, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    cuts = int(0.7 * len(x)), int(0.8 * len(x))
    return Digits(*((x[rows], y[rows]) for rows in order.tensor_split(cuts)))


def class_task(digits: Digits, digit: int) -> DigitsTask:
    """Forget every training image of one digit, down to accuracy zero."""
    (x, y), (tx, ty) = digits.train, digits.test
    f, kept = y == digit, ty != digit
    return DigitsTask(
        f"class {digit}",
        (x[f], y[f]),
        (x[~f], y[~f]),
        (tx[kept], ty[kept]),
        StopRule(forget_accuracy=0.0),
        "forget accuracy 0",
    )


def random_task(digits: Digits, count: int, seed: int, *, flipped: bool = False) -> DigitsTask:
    """Forget a random handful of training images, as deep as data that the model never saw.

    Args:
        flipped: a stress test: until half of them are misclassified, which no retraining does.
    """
    x, y = digits.train
    f = torch.zeros(len(x), dtype=torch.bool)
    f[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed + 1))[:count]] = True
    stop = (
        StopRule(forget_accuracy=0.5) if flipped else StopRule(unseen_accuracy=digits.calibration)
    )
    return DigitsTask(
        f"{count} random" + (", half flipped" if flipped else ""),
        (x[f], y[f]),
        (x[~f], y[~f]),
        digits.test,
        stop,
        "forget accuracy 0.5, a stress test"
        if flipped
        else "the model's own accuracy on calibration images, which it never saw ({unseen:.3f})",
    )
