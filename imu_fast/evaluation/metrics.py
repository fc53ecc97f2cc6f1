"""How a model classifies samples, what membership attacks learn, how far two models are apart."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from imu_fast.capture import as_batches, device_of, logits_of, preserved, split_batch, to_device
from imu_fast.errors import InputError, check_count, check_finite_rows
from imu_fast.factors import check_labels

# Samples per side that the SVC attack is trained on: its cost grows with their square.
_ATTACK_SAMPLES = 1000


@dataclass(frozen=True)
class Outputs:
    """What a classifier said about n >= 1 samples.

    Attributes:
        logits: [n, C], float32 or float64; not finite where a model has diverged.
        labels: [n] int64 in [0, C), on the logits' device.

    Raises:
        InputError: the shapes do not fit, there is no sample, or a label is out of range.
    """

    logits: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.logits.dim() != 2 or self.labels.shape != self.logits.shape[:1]:
            raise InputError(
                f"logits have shape {tuple(self.logits.shape)} and labels "
                f"{tuple(self.labels.shape)}; pass [n, C] and [n]"
            )
        if len(self.labels) == 0:
            raise InputError("logits and labels are empty; pass at least one sample")
        if self.logits.dtype not in (torch.float32, torch.float64):
            raise InputError(f"logits have dtype {self.logits.dtype}; pass float32 or float64")
        check_labels(self.labels, self.logits.shape[1])
        ignored = int((self.labels < 0).sum())
        if ignored:
            raise InputError(f"{ignored} labels are ignore_index; remove these samples")

    @cached_property
    def loss(self) -> Tensor:
        """Cross-entropy of each sample in nats: [n]."""
        return nn.functional.cross_entropy(self.logits, self.labels, reduction="none")

    @cached_property
    def correct(self) -> Tensor:
        """Whether each sample is classified as labelled: [n] bool."""
        return self.logits.argmax(dim=1) == self.labels

    @cached_property
    def confidence(self) -> Tensor:
        """``p_y``, the probability of each sample's label: [n]."""
        return torch.exp(-self.loss)

    @cached_property
    def probabilities(self) -> Tensor:
        """``softmax(logits)``: [n, C]."""
        return torch.softmax(self.logits, dim=1)

    @cached_property
    def accuracy(self) -> float:
        """Fraction classified as labelled."""
        return float(self.correct.double().mean())

    @cached_property
    def mean_loss(self) -> float:
        """Mean cross-entropy in nats."""
        return float(self.loss.mean())


def outputs_of(model: nn.Module, loader: Any) -> Outputs:
    """Run a classifier in evaluation mode, and leave its modes as they were.

    Args:
        loader: DataLoader, iterable of ``(inputs, labels)`` batches, or tensors (X, y).

    Returns:
        Outputs on the model's device; half precision logits are widened to float32.

    Raises:
        InputError: the loader is empty, or a label is out of range.
    """
    all_logits, all_labels = [], []
    device = device_of(model)
    with preserved(model), torch.no_grad():
        model.eval()
        for batch in as_batches(loader):
            args, kwargs, labels = to_device(split_batch(batch), device)
            logits = logits_of(model(*args, **kwargs))
            all_logits.append(logits if logits.dtype == torch.float64 else logits.float())
            all_labels.append(labels)
    if not all_logits:
        raise InputError("loader is empty; pass at least one sample")
    return Outputs(torch.cat(all_logits), torch.cat(all_labels))


def evaluate(model: nn.Module, loader: Any) -> dict[str, Any]:
    """Evaluate a classifier in evaluation mode, and leave its modes as they were.

    Args:
        loader: DataLoader, iterable of ``(inputs, labels)`` batches, or tensors (X, y).

    Returns:
        ``loss`` (mean cross-entropy, nats), ``accuracy`` in [0, 1], ``n``, and ``confidence`` [n],
        the probability of each sample's label.

    Raises:
        As :func:`outputs_of`.
    """
    outputs = outputs_of(model, loader)
    return {
        "loss": outputs.mean_loss,
        "accuracy": outputs.accuracy,
        "n": len(outputs.labels),
        "confidence": outputs.confidence,
    }


def membership_accuracy(
    retain: Tensor, test: Tensor, forget: Tensor, *, seed: int = 0, max_samples: int | None = None
) -> float:
    """Fraction of the forget set that a membership attack calls members of the training set.

    The attack of the unlearning literature: a support vector classifier on the confidence p_y,
    trained on as many retain (member) as test (non-member) samples, applied to the forget set.

    Args:
        retain, test, forget: confidences [n], as :func:`evaluate` returns them.
        seed: of the balanced subsample.
        max_samples: of each side to train on; None takes as many as the smaller side has.
    """
    from sklearn.svm import SVC

    k = min(len(retain), len(test))
    if max_samples is not None:
        k = min(k, check_count("max_samples", max_samples))
    generator = torch.Generator().manual_seed(seed)
    member = retain[torch.randperm(len(retain), generator=generator)[:k]]
    other = test[torch.randperm(len(test), generator=generator)[:k]]
    x = torch.cat([member, other])[:, None].double().cpu().numpy()
    attack = SVC(C=3, gamma="auto", kernel="rbf").fit(x, [1] * k + [0] * k)
    return float(attack.predict(forget[:, None].double().cpu().numpy()).mean())


def _finite_confidence(name: str, outputs: Outputs) -> np.ndarray:
    """Confidences [n] in float64, or InputError where the model has diverged."""
    check_finite_rows(f"{name}.logits", outputs.logits)
    return outputs.confidence.double().cpu().numpy()


def membership(
    forget: Outputs, retain: Outputs, unseen: Outputs, *, seed: int = 0
) -> dict[str, float]:
    """What an observer of one model's confidences learns about who was in its training set.

    Args:
        forget, retain, unseen: outputs of one model; ``unseen`` of samples it never saw.
        seed: of the SVC attack's balanced subsample, at most 1,000 of each side.

    Returns:
        ``auc``: how well confidence tells forget (positive) from unseen samples, 0.5 if not at
        all; below it forgetting has gone past the unseen, and betrays as much. ``ks``: the
        Kolmogorov-Smirnov distance of the same two samples, 0 to 1, which sees any difference of
        distribution. ``svc``: fraction of forget called members, see :func:`membership_accuracy`.

    Raises:
        InputError: logits are not finite (the model has diverged).
    """
    from scipy.stats import ks_2samp
    from sklearn.metrics import roc_auc_score

    forgotten, other = _finite_confidence("forget", forget), _finite_confidence("unseen", unseen)
    check_finite_rows("retain.logits", retain.logits)
    member = [1] * len(forgotten) + [0] * len(other)
    return {
        "auc": float(roc_auc_score(member, np.concatenate([forgotten, other]))),
        # The p-value is not used: "asymp" spares the exact one's cost.
        "ks": float(ks_2samp(forgotten, other, method="asymp").statistic),
        "svc": membership_accuracy(
            retain.confidence,
            unseen.confidence,
            forget.confidence,
            seed=seed,
            max_samples=_ATTACK_SAMPLES,
        ),
    }


def distance(ours: Outputs, reference: Outputs) -> dict[str, float]:
    """How far a model is from a reference model (the retrained one) on the same samples.

    Args:
        ours, reference: outputs of the two models; same samples in the same order.

    Returns:
        ``w1``: Wasserstein-1 distance of the two distributions of confidence, 0 to 1. ``kl``:
        mean over samples of KL(reference || ours) in nats. ``agreement``: fraction of samples
        that both models classify alike.

    Raises:
        InputError: shapes or labels differ, or logits are not finite (a model has diverged).
    """
    from scipy.stats import wasserstein_distance

    if ours.logits.shape != reference.logits.shape:
        raise InputError(
            f"ours has logits of shape {tuple(ours.logits.shape)} and reference "
            f"{tuple(reference.logits.shape)}; run both models on the same samples"
        )
    z, z_ref = ours.logits.double().cpu(), reference.logits.double().cpu()
    differ = torch.nonzero(ours.labels.cpu() != reference.labels.cpu()).flatten()
    if len(differ):
        raise InputError(
            f"labels of ours and reference differ first at sample {int(differ[0])}; run both "
            "models on the same samples, in the same order"
        )
    w1 = wasserstein_distance(
        _finite_confidence("ours", ours), _finite_confidence("reference", reference)
    )
    # From log-probabilities, which stay finite where probabilities round to 0.
    log_q, log_p = torch.log_softmax(z, dim=1), torch.log_softmax(z_ref, dim=1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    return {
        "w1": float(w1),
        "kl": float(kl.clamp_min(0).mean()),  # rounding may leave -1e-17
        "agreement": float((z.argmax(dim=1) == z_ref.argmax(dim=1)).double().mean()),
    }
