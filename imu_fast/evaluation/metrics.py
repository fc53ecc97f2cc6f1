"""How a model classifies samples, what membership attacks learn, how far two models are apart."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from imu_fast.errors import (
    InputError,
    check_count,
    check_finite_rows,
    check_installed,
    check_seed,
    check_tensor,
)
from imu_fast.model.outputs import Outputs, check_outputs

# Samples per side that the SVC attack is trained on: its cost grows with their square.
_ATTACK_SAMPLES = 1000


def roc_auc(positive: Tensor, negative: Tensor) -> float:
    """Probability that a positive exceeds a negative, ties counted half: the area under the ROC.

    Args:
        positive: [n]. negative: [m]. n, m >= 1.

    Raises:
        InputError: one is empty, or holds NaN.
    """
    for name, values in (("positive", positive), ("negative", negative)):
        check_tensor(name, values, "real", "[n]")
        if values.dim() != 1 or len(values) == 0 or bool(values.isnan().any()):
            raise InputError(
                f"{name} has shape {tuple(values.shape)} or holds NaN; pass numbers [n], n >= 1"
            )
    ordered, values = negative.detach().double().sort().values, positive.detach().double()
    values = values.to(ordered.device)
    # Mann-Whitney's U, doubled to stay a whole number.
    below = torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)
    return int(below.sum()) / (2 * len(values) * len(ordered))


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
    check_installed("membership_accuracy()", "sklearn")
    from sklearn.svm import SVC

    seed = check_seed("seed", seed)
    for name, values in (("retain", retain), ("test", test), ("forget", forget)):
        check_tensor(name, values, "floating", "[n]")
        if values.dim() != 1 or len(values) == 0:
            raise InputError(f"{name} has shape {tuple(values.shape)}; pass [n] with n >= 1")
        check_finite_rows(name, values)
    retain, test, forget = retain.detach(), test.detach(), forget.detach()
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
    check_outputs(name, outputs)
    check_finite_rows(f"{name}.logits", outputs.logits)
    return outputs.confidence.double().cpu().numpy()


def membership(
    forget: Outputs,
    retain: Outputs,
    unseen: Outputs,
    *,
    heldout: Outputs | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """What an observer of one model's confidences learns about who was in its training set.

    Args:
        forget, retain, unseen: outputs of one model; ``unseen`` of samples like the forget set
            that it never saw (of a forgotten class: held-out samples of that class).
        heldout: of samples like the retain set that it never saw, which the attack ``svc`` learns
            from beside the retain set; None: ``unseen``, which is right where the forget set is of
            the same kind as the retain set. Of a forgotten class it is not: held-out samples of a
            class that is not predicted any more differ from any member, whatever was trained on.
        seed: of the SVC attack's balanced subsample, at most 1,000 of each side.

    Returns:
        ``auc``: how well confidence tells forget (positive) from unseen samples, 0.5 if not at
        all; below it forgetting has gone past the unseen, and betrays as much. ``ks``: the
        Kolmogorov-Smirnov distance of the same two samples, 0 to 1, which sees any difference of
        distribution. ``svc``: fraction of forget called members, see :func:`membership_accuracy`;
        the attack learns from ``retain`` and ``heldout``.

    Raises:
        InputError: logits are not finite (the model has diverged).
    """
    check_installed("membership()", "scipy", "sklearn")
    seed = check_seed("seed", seed)
    from scipy.stats import ks_2samp

    forgotten, other = _finite_confidence("forget", forget), _finite_confidence("unseen", unseen)
    if heldout is None:
        heldout = unseen
    for name, outputs in (("retain", retain), ("heldout", heldout)):
        check_outputs(name, outputs)
        check_finite_rows(f"{name}.logits", outputs.logits)
    return {
        "auc": roc_auc(torch.from_numpy(forgotten), torch.from_numpy(other)),
        # The p-value is not used: "asymp" spares the exact one's cost.
        "ks": float(ks_2samp(forgotten, other, method="asymp").statistic),
        "svc": membership_accuracy(
            retain.confidence,
            heldout.confidence,
            forget.confidence,
            seed=seed,
            max_samples=_ATTACK_SAMPLES,
        ),
    }


def distance(ours: Outputs, reference: Outputs) -> dict[str, float]:
    """How far a model is from a reference model (the retrained one) on the same samples.

    Args:
        ours, reference: outputs of the two models; same samples and classes in the same order.

    Returns:
        ``w1``: Wasserstein-1 distance of the two distributions of confidence, 0 to 1. ``kl``:
        mean over samples of KL(reference || ours) in nats. ``agreement``: fraction of samples
        that both models classify alike.

    Raises:
        InputError: shapes or labels differ, or logits are not finite (a model has diverged).
    """
    check_installed("distance()", "scipy")
    from scipy.stats import wasserstein_distance

    check_outputs("ours", ours)
    check_outputs("reference", reference)
    if ours.logits.shape != reference.logits.shape:
        alike = len(ours.labels) == len(reference.labels)
        way_out = (
            "give both the same classes in the same order, the forgotten one too"
            if alike
            else "run both models on the same samples"
        )
        raise InputError(
            f"ours has logits of shape {tuple(ours.logits.shape)} and reference "
            f"{tuple(reference.logits.shape)}; {way_out}"
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
    p = log_p.exp()
    # What the reference never says costs nothing, however unlikely it is: 0 times infinity is 0.
    kl = (p * (log_p - log_q)).where(p > 0, 0.0).sum(dim=1)
    return {
        "w1": float(w1),
        "kl": float(kl.clamp_min(0).mean()),  # rounding may leave -1e-17
        "agreement": float((z.argmax(dim=1) == z_ref.argmax(dim=1)).double().mean()),
    }
