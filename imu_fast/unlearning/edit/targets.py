"""What self-distillation teaches: predictions with the labels' logits lowered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imu_fast.errors import InputError
from imu_fast.unlearning.depth import bisect

# Beyond this temperature predictions are uniform.
_HOTTEST = 2.0**10


def lowered(logits: Tensor, labels: Tensor, accuracy: float, margin: float) -> Tensor:
    """Logits [n, C] with the labels' lowered by one constant, so that accuracy is what is asked.

    The constant is the least c >= 0 with which so many samples lose their label by ``margin`` that
    the others are the fraction ``accuracy`` or less.
    """
    n, column = len(labels), labels[:, None]
    wrong = n - int(accuracy * n + 1e-9)
    if not wrong:
        return logits
    own = logits.gather(1, column)
    ahead = own.squeeze(1) - logits.scatter(1, column, -torch.inf).amax(dim=1)
    constant = (ahead.sort().values[wrong - 1] + margin).clamp_min(0)
    return logits.scatter(1, column, own - constant)


def softened(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits [n, C] over the temperature >= 1 at which their mean confidence is their accuracy.

    Temperature scaling (Guo et al. 2017), with the forget set's own labels.
    """
    accuracy = float((logits.argmax(dim=1) == labels).double().mean())

    def confidence(temperature: float) -> float:
        return float((logits / temperature).softmax(dim=1).amax(dim=1).mean())

    low, high = 1.0, 1.0
    while confidence(high) > accuracy and high < _HOTTEST:
        low, high = high, 2 * high
    if high == 1.0:
        return logits
    part = bisect(lambda t: confidence(low + t * (high - low)) <= accuracy)
    return logits / (low + part * (high - low))


def check_targets(name: str, value: Any) -> None:
    """Raise InputError unless these are probabilities [n, C], or not given."""
    if value is None:
        return
    good = isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point()
    if good:
        ones = value.double().sum(dim=1)
        good = bool((value >= 0).all()) and bool(((ones - 1).abs() < 1e-3).all())
    if not good:
        raise InputError(
            f"{name}={type(value).__name__}: pass probabilities [n, C], a row for each forget "
            "sample in the order of the data, or leave it out for the model's own"
        )
