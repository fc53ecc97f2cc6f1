"""Loss and accuracy of a classifier or a language model."""

from __future__ import annotations

from typing import Any

from torch import nn
from typing_extensions import Unpack

from imu_fast.model.outputs import measured
from imu_fast.model.reading import Reading, ReadingOptions


def evaluate(model: nn.Module, loader: Any, **reading: Unpack[ReadingOptions]) -> dict[str, Any]:
    """Evaluate a model in evaluation mode, and leave its modes as they were.

    Args:
        loader: DataLoader, iterable of ``(inputs, labels)`` batches, or tensors (X, y).
        reading: as of :func:`imu_fast.capture_features`.

    Returns:
        ``loss`` (mean cross-entropy, nats), ``accuracy`` in [0, 1], ``n``, and ``confidence`` [n],
        the probability of each sample's label. Of sequences a sample's loss is the mean over its
        tokens that have a label, its accuracy the fraction of them whose likeliest class is it, its
        confidence the geometric mean of their probabilities; samples without such a token are left
        out. ``tokens``: how many there are, and ``token_loss``: the mean over all of them, which is
        what a language model calls its loss.

    Raises:
        InputError: the loader is empty, a label is out of range, or the logits of a sample are NaN
            or +inf, which have no likeliest class.
    """
    found = measured(model, loader, Reading.of("evaluate()", reading), "evaluate()")
    result = {
        "loss": found.mean_loss,
        "accuracy": found.accuracy,
        "n": len(found.loss),
        "confidence": found.confidence,
    }
    if bool((found.tokens == 1).all()):
        return result
    return result | {"tokens": int(found.tokens.sum()), "token_loss": found.token_loss}
