"""How well a model classifies a set of samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from imu_fast.capture import as_batches, logits_of, split_batch


def evaluate(model: nn.Module, loader: Any) -> dict[str, Any]:
    model.eval()
    losses, correct = [], []
    with torch.no_grad():
        for batch in as_batches(loader):
            args, kwargs, labels = split_batch(batch)
            z = logits_of(model(*args, **kwargs))
            losses.append(nn.functional.cross_entropy(z, labels, reduction="none"))
            correct.append(z.argmax(1) == labels)
    loss = torch.cat(losses)
    c = torch.cat(correct)
    return dict(
        loss=float(loss.mean()),
        accuracy=float(c.double().mean()),
        n=len(c),
        confidence=(-loss).exp(),
    )
