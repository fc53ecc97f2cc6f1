"""Loss and accuracy of a classifier."""

from __future__ import annotations

from typing import Any

from torch import nn
from typing_extensions import Unpack

from imu_fast.model.outputs import outputs_of
from imu_fast.model.reading import ReadingOptions


def evaluate(model: nn.Module, loader: Any, **reading: Unpack[ReadingOptions]) -> dict[str, Any]:
    """Evaluate a classifier in evaluation mode, and leave its modes as they were.

    Args:
        loader: DataLoader, iterable of ``(inputs, labels)`` batches, or tensors (X, y).
        reading: as of :func:`outputs_of`.

    Returns:
        ``loss`` (mean cross-entropy, nats), ``accuracy`` in [0, 1], ``n``, and ``confidence`` [n],
        the probability of each sample's label.

    Raises:
        As :func:`outputs_of`.
    """
    outputs = outputs_of(model, loader, **reading)
    return {
        "loss": outputs.mean_loss,
        "accuracy": outputs.accuracy,
        "n": len(outputs.labels),
        "confidence": outputs.confidence,
    }
