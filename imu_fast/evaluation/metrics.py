"""How a model classifies a set of samples, and what a membership attack makes of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from imu_fast.capture import as_batches, device_of, logits_of, preserved, split_batch, to_device
from imu_fast.errors import InputError
from imu_fast.factors import check_labels


def evaluate(model: nn.Module, loader: Any) -> dict[str, Any]:
    """Evaluate a classifier in evaluation mode, and leave its modes as they were.

    Args:
        loader: DataLoader, iterable of ``(inputs, labels)`` batches, or tensors (X, y).

    Returns:
        ``loss`` (mean cross-entropy, nats), ``accuracy`` in [0, 1], ``n``, and ``confidence`` [n],
        the probability of each sample's label.

    Raises:
        InputError: the loader is empty, or a label is out of range.
    """
    losses, correct = [], []
    device = device_of(model)
    with preserved(model), torch.no_grad():
        model.eval()
        for batch in as_batches(loader):
            args, kwargs, labels = to_device(split_batch(batch), device)
            logits = logits_of(model(*args, **kwargs))
            check_labels(labels, logits.shape[-1])
            losses.append(nn.functional.cross_entropy(logits, labels, reduction="none"))
            correct.append(logits.argmax(dim=1) == labels)
    if not losses:
        raise InputError("loader is empty; pass at least one sample")
    loss, right = torch.cat(losses), torch.cat(correct)
    return {
        "loss": float(loss.mean()),
        "accuracy": float(right.double().mean()),
        "n": len(right),
        "confidence": torch.exp(-loss),
    }


def membership_accuracy(retain: Tensor, test: Tensor, forget: Tensor, *, seed: int = 0) -> float:
    """Fraction of the forget set that a membership attack calls members of the training set.

    The attack of the unlearning literature: a support vector classifier on the confidence p_y,
    trained on as many retain (member) as test (non-member) samples, applied to the forget set.

    Args:
        retain, test, forget: confidences [n], as :func:`evaluate` returns them.
        seed: of the balanced subsample.
    """
    from sklearn.svm import SVC

    k = min(len(retain), len(test))
    generator = torch.Generator().manual_seed(seed)
    member = retain[torch.randperm(len(retain), generator=generator)[:k]]
    other = test[torch.randperm(len(test), generator=generator)[:k]]
    x = torch.cat([member, other])[:, None].double().cpu().numpy()
    attack = SVC(C=3, gamma="auto", kernel="rbf").fit(x, [1] * k + [0] * k)
    return float(attack.predict(forget[:, None].double().cpu().numpy()).mean())
