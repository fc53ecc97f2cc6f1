"""The smallest edit of a linear head that makes chosen samples lose their label."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from imu_fast.errors import (
    InfeasibleError,
    InputError,
    check_count,
    check_finite_rows,
    check_positive,
    check_same_device,
)
from imu_fast.solvers.nonnegative_qp import maximise_nonnegative
from imu_fast.unlearning.edit.metric import FeatureMetric, Metric

logger = logging.getLogger("imu_fast")

# An edit with more than this many times the head's own energy 1/2 tr(theta H theta^T) is no edit.
_MAX_ENERGY = 1e3


@dataclass(frozen=True)
class Edit:
    """The edit and its certificate.

    Attributes:
        step: dT [C, D], to be added to theta; theta's dtype and device.
        chosen: [k], the samples whose margins were constrained, the cheapest first.
        rounds: quadratic programs solved; one more than the times runners-up were chosen anew.
        sweeps: coordinate-ascent sweeps, over all rounds.
        gap: the larger of the relative duality gap and the largest violation of a margin relative
            to the largest change asked for, both recomputed in float64 from ``step``.
    """

    step: Tensor
    chosen: Tensor
    rounds: int
    sweeps: int
    gap: float


def _margins(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``z_y - max_{j != y} z_j`` [n], and that j, the runner-up [n]."""
    column = labels[:, None]
    best, runner_up = logits.scatter(1, column, -torch.inf).max(dim=1)
    return logits.gather(1, column).squeeze(1) - best, runner_up


def _against(logits: Tensor, labels: Tensor, rivals: Tensor) -> Tensor:
    """``D_i . z_i = z_y - z_r``: [n]."""
    return (logits.gather(1, labels[:, None]) - logits.gather(1, rivals[:, None])).squeeze(1)


def _directions(labels: Tensor, rivals: Tensor, classes: int) -> Tensor:
    """``D_i = e_label - e_rival``: [n, C], float64."""
    d = torch.zeros(len(labels), classes, dtype=torch.float64, device=labels.device)
    return d.scatter_(1, labels[:, None], 1.0).scatter_(1, rivals[:, None], -1.0)


def _check(
    features: Tensor, labels: Tensor, theta: Tensor, has_bias: bool, second_moment: Tensor | None
) -> None:
    if features.dim() != 2 or len(features) == 0:
        raise InputError(f"features has shape {tuple(features.shape)}; pass [n, d] with n >= 1")
    width = features.shape[1] + has_bias
    if theta.dim() != 2 or theta.shape[1] != width or len(theta) < 2:
        raise InputError(
            f"theta has shape {tuple(theta.shape)}; expected [C, {width}] with C >= 2 for features "
            f"of width {features.shape[1]} and has_bias={has_bias}"
        )
    if labels.shape != features.shape[:1] or labels.dtype != torch.int64:
        raise InputError(
            f"labels is {labels.dtype} of shape {tuple(labels.shape)}; pass int64 [{len(features)}]"
        )
    outside = torch.nonzero((labels < 0) | (labels >= len(theta))).flatten()
    if len(outside):
        raise InputError(
            f"labels[{int(outside[0])}]={int(labels[outside[0]])} lies outside [0, {len(theta)}); "
            "remove this sample or correct its label"
        )
    check_finite_rows("features", features)
    check_finite_rows("theta", theta, "class")
    for name, tensor in (("labels", labels), ("theta", theta)):
        check_same_device("features", features, name, tensor)
    if second_moment is not None:
        check_same_device("features", features, "second_moment", second_moment)
        if second_moment.shape != (width, width):
            raise InputError(
                f"second_moment has shape {tuple(second_moment.shape)}; expected {(width, width)}"
            )


def smallest_edit(
    features: Tensor,
    labels: Tensor,
    theta: Tensor,
    has_bias: bool,
    *,
    count: int,
    margin: float = 0.1,
    eps: float = 1e-2,
    second_moment: Tensor | None = None,
    metric: Metric | None = None,
    max_rounds: int = 5,
    tolerance: float = 1e-5,
) -> Edit:
    """Make ``count`` samples lose their label by the smallest disturbance; no ascent.

        minimise    1/2 <dT, H dT>
        subject to  D_i (theta + dT) a~_i <= -m,   D_i = e_label - e_rival,   for each chosen i

    The chosen are the cheapest by ``margin^2 / Q_ii``, twice the energy that each would cost
    alone; those already wrong are free, come first, and are held where they are. The dual has one
    variable per sample and ``Q_ij = <D_i (x) a~_i, H^-1 (D_j (x) a~_j)>``. Its maximiser gives
    ``dT = - sum_i alpha_i H^-1 (D_i (x) a~_i)``. For ``H = I (x) (S + eps tr(S)/D I)`` Q is a Gram
    matrix of whitened features times a small integer matrix.

    The rival is the runner-up. Where, after a round, another class leads it, the constraint moves
    to that class and the program is solved again: the last edit satisfies the new constraints (the
    new rival is ahead of the old one), so every round can only find a smaller one (the
    convex-concave procedure: Yuille, Rangarajan 2003). Adding a constraint instead would hold both
    rivals above the label, which nobody asked for. First runners-up that contradict each other
    (possible once misclassified samples are among the chosen) are replaced in the same way, by the
    classes that lead at the best compromise.

    Everything is float64; memory is about ``32 count^2`` bytes beside the features, and
    ``16 count C D`` in another metric than S.

    Args:
        features: [n, d]. labels: [n] int64 in [0, C). theta: [C, D] as ``[W, b]``.
        has_bias: whether D = d + 1. count: how many samples to constrain.
        margin: m >= 0; at 0 a sample may end in a tie. eps: relative damping of S, > 0.
        second_moment: S [D, D], say of the training set; else ``mean(a~ a~^T)`` of ``features``.
        metric: H; None: that of S.
        max_rounds: programs solved at most. tolerance: on ``gap``, see
            :func:`~imu_fast.solvers.nonnegative_qp.maximise_nonnegative`; where it is not reached
            that is logged.

    Raises:
        InputError: shapes, labels, devices, values that are not finite, count outside [1, n],
            eps <= 0, margin < 0.
        InfeasibleError: in the last round no edit, or none with less than about a thousand times
            the head's own energy, meets all constraints. Without misclassified samples among the
            chosen some edit always does: the negated head, scaled.
    """
    _check(features, labels, theta, has_bias, second_moment)
    if check_count("count", count) > len(features):
        raise InputError(f"count={count} exceeds the {len(features)} samples; lower it")
    m = check_positive("margin", margin, allow_zero=True)
    check_positive("eps", eps)
    check_count("max_rounds", max_rounds)
    check_positive("tolerance", tolerance)

    act = features.double()
    if has_bias:
        act = torch.cat([act, act.new_ones(len(act), 1)], dim=1)
    wide = theta.double()
    if metric is None:
        moment = act.T @ act / len(act) if second_moment is None else second_moment
        metric = FeatureMetric(moment, eps)
    every = metric.constraints(act)

    margins, rivals = _margins(act @ wide.T, labels)
    reach = every.reach(_directions(labels, rivals, len(theta)))
    # Signed: the most safely wrong first. Nothing moves a sample whose features are zero.
    cost = torch.where(reach > 0, margins * margins.abs() / reach, torch.inf)
    chosen = torch.argsort(cost, stable=True)[:count]
    act, labels, rivals = act[chosen], labels[chosen], rivals[chosen]
    constraints = every.select(chosen)
    if bool((reach[chosen] == 0).any()):
        raise InfeasibleError(
            f"count={count} reaches sample {int(chosen[-1])}, whose features are zero, so that no "
            f"edit moves it; use count <= {int((reach > 0).sum())}"
        )

    logits = act @ wide.T
    alpha, sweeps = torch.zeros(count, dtype=torch.float64), 0
    for rounds in range(1, max_rounds + 1):
        d = _directions(labels, rivals, len(theta))
        q = constraints.gram(d).cpu()
        b = (_against(logits, labels, rivals) + m).cpu()
        alone = 0.5 * float((b.clamp_min(0).square() / q.diagonal()).sum())
        limit = _MAX_ENERGY * (metric.energy(wide) + alone)
        found = maximise_nonnegative(q, b, alpha, tolerance=tolerance, limit=limit)
        alpha, sweeps = found.alpha, sweeps + found.sweeps
        step = -constraints.combined(alpha.to(d.device), d)
        leading = _margins(act @ (wide + step).T, labels)[1]
        last = rounds == max_rounds or bool((leading == rivals).all())
        if found.value > limit:
            if last:
                raise InfeasibleError(
                    f"the margins of these count={count} samples cannot all be brought to {-m:g}: "
                    "samples already misclassified contradict the others (few or repeated "
                    "features); lower count or leave the misclassified ones out"
                )
            alpha = torch.zeros_like(alpha)  # but the classes that lead now may be compatible
        if last:
            break
        rivals = leading

    step = step.to(theta.dtype)
    gap = _certificate(step.double(), act, logits, labels, rivals, alpha, m, metric)
    if gap > 10 * tolerance:  # the rounding of a float32 step is not worth a warning
        logger.warning("margin_edit stopped at gap %.2g, above tolerance %.2g", gap, tolerance)
    return Edit(step, chosen, rounds, sweeps, gap)


def _certificate(
    step: Tensor,
    act: Tensor,
    logits: Tensor,
    labels: Tensor,
    rivals: Tensor,
    alpha: Tensor,
    margin: float,
    metric: Metric,
) -> float:
    """``Edit.gap``: nothing but alpha is taken over from the solver."""
    asked = _against(logits, labels, rivals) + margin
    left = asked + _against(act @ step.T, labels, rivals)
    violation = float(left.max().clamp_min(0) / asked.abs().max())
    primal = metric.energy(step)
    dual = float(alpha.to(asked.device) @ asked) - primal
    return max(violation, abs(primal - dual) / primal) if primal else violation
