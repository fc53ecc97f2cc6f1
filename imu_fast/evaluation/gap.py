"""How far an unlearned model is from one that was retrained without the forget set."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from imu_fast.errors import InputError, check_positive, check_seed
from imu_fast.model.outputs import Outputs, check_outputs

GAPS = ("forget_accuracy", "retain_accuracy", "test_accuracy", "membership")


def average_gap(ours: Mapping[str, float], retrained: Mapping[str, float]) -> float:
    """Mean absolute difference to the retrained model over four measures, in [0, 1].

    The field's measure (average gap: UA, RA, TA, MIA; Jia et al. 2023, Fan et al. 2024). It can be
    gamed: predictions flipped at random have a small gap (:func:`random_flips`), so read it beside
    the Kullback-Leibler divergence of :func:`imu_fast.evaluation.metrics.distance`.

    Args:
        ours, retrained: ``forget_accuracy``, ``retain_accuracy``, ``test_accuracy`` and
            ``membership``, the fraction of the forget set that an attack calls members.

    Raises:
        InputError: a measure is missing, or outside [0, 1].
    """
    for which, values in (("ours", ours), ("retrained", retrained)):
        for name in GAPS:
            if name not in values:
                raise InputError(f"{which} has no {name!r}; it needs {', '.join(GAPS)}")
            if check_positive(f"{which}[{name!r}]", values[name], allow_zero=True) > 1:
                raise InputError(f"{which}[{name!r}]={values[name]!r} must lie in [0, 1]")
    return sum(abs(ours[name] - retrained[name]) for name in GAPS) / len(GAPS)


def random_flips(outputs: Outputs, accuracy: float, *, seed: int = 0) -> Outputs:
    """The outputs of a model that was made wrong on samples drawn at random, and on nothing else.

    No unlearning: a floor that shows what the average gap alone does not see. Each drawn sample
    trades the logit of its label for the largest of the others; where the two are equal, that one
    becomes the next larger number.

    Args:
        accuracy: in [0, 1]; as many right samples are made wrong as bring it to this or just below.

    Raises:
        InputError: accuracy is outside [0, 1], or there is but one class.
    """
    if check_positive("accuracy", accuracy, allow_zero=True) > 1:
        raise InputError(f"accuracy={accuracy!r} must lie in [0, 1]")
    seed = check_seed("seed", seed)
    check_outputs("outputs", outputs)
    if outputs.logits.shape[1] < 2:
        raise InputError("outputs have one class: no prediction can be another")
    right = torch.nonzero(outputs.correct.cpu()).flatten()
    wrong = max(0, len(right) - int(accuracy * len(outputs.labels) + 1e-9))
    order = torch.randperm(len(right), generator=torch.Generator().manual_seed(seed))
    rows = right[order[:wrong]].to(outputs.logits.device)
    logits, labels = outputs.logits.clone(), outputs.labels[rows]
    others = logits[rows].scatter(1, labels[:, None], float("-inf"))
    best, runner_up = others.max(dim=1)
    own = logits[rows, labels]
    # Of equal logits the first is predicted, and a trade changes nothing.
    above = torch.nextafter(own, torch.full_like(own, torch.inf))
    logits[rows, labels], logits[rows, runner_up] = best, own.where(own > best, above)
    return Outputs(logits, outputs.labels)
