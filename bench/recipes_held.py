"""Targets for self-distillation out of held-out data or shifted images, and a removal of layers."""

from __future__ import annotations

import copy

import torch
from recipes_models import Problem
from torch import Tensor, nn

import imu_fast as imu
from imu_fast.model.convolution import scored_layers
from imu_fast.model.parts import Parts
from imu_fast.model.reading import Reading
from imu_fast.unlearning.depth import bisect
from imu_fast.unlearning.edit.inverse import damped_inverse
from imu_fast.unlearning.summary.inner import inner_hessians

# Damping of the last block's matrices, relative to their mean eigenvalue.
_EPS = 0.1


def shifted(problem: Problem) -> Tensor:
    """Predictions averaged over images shifted by up to a pixel, mirrored too where that is one."""
    x, _ = problem.sets["forget"]
    height, width = x.shape[2:]
    wide = nn.functional.pad(x, (1, 1, 1, 1), mode="replicate")
    views = [wide[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    if problem.models.data.mirror:
        views += [view.flip(3) for view in views]
    with torch.no_grad():
        return torch.stack([problem.model(view).softmax(dim=1) for view in views]).mean(dim=0)


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    """``z_y - log sum of the others' exponentials``: the log odds of the label."""
    column = labels[:, None]
    others = logits.scatter(1, column, -torch.inf).logsumexp(dim=1)
    return logits.gather(1, column).squeeze(1) - others


def quantiles(problem: Problem) -> Tensor:
    """Predictions whose labels' log odds have the quantiles of those on held-out data, in order."""
    (x, y), (unseen, labels) = problem.sets["forget"], problem.models.data.validation
    with torch.no_grad():
        z = problem.model(x)
        theirs = _margins(problem.model(unseen), labels)
    own = _margins(z, y)
    at = (torch.arange(len(y)) + 0.5) / len(y)
    wanted = torch.empty_like(own)
    wanted[own.argsort()] = torch.quantile(theirs, at.to(theirs))
    moved = z.gather(1, y[:, None]) + (wanted - own)[:, None]
    return z.scatter(1, y[:, None], moved).softmax(dim=1)


def last_block_removal(
    problem: Problem, summary: imu.TrainingSummary, stop: imu.StopRule
) -> nn.Module:
    """The Newton step of ``newton_removal`` at the head and the summary's layers, to the depth.

    Each layer by its own K-FAC: ``k (H_l - H_F,l + damping)^-1 (sum_F g_i + n lam theta_l)``.
    """
    model, (x, y) = copy.deepcopy(problem.model), problem.sets["forget"]
    names = [*summary.inner, summary.head]
    of_forget = inner_hessians(model, [Parts([x], {}, y)], names, Reading(), 10)
    of_all = inner_hessians(model, _batches(problem), [summary.head], Reading(), 10)
    of_all |= summary.inner
    layers = {name: scored_layers(model)[name] for name in names}
    loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
    start, steps = [], []
    for name, layer in layers.items():
        parameters = list(layer.module.parameters())
        gradient = torch.autograd.grad(loss, parameters, retain_graph=True)
        columns = [layer.like_weight(gradient[0]), *(g[:, None] for g in gradient[1:])]
        full = torch.cat(columns, dim=1).double()
        full += len(y) * summary.weight_decay * layer.matrix
        decay = (summary.n - len(y)) * summary.weight_decay
        inverse = damped_inverse(of_all[name] - of_forget[name], decay, _EPS, "newton_removal")
        step = inverse.solve(full).float()
        width = layer.weight.shape[1]
        parts = [step[:, :width].reshape(parameters[0].shape), *step[:, width:].unbind(1)]
        start += [(p, p.detach().clone()) for p in parameters]
        steps += parts

    def reached(k: float) -> bool:
        with torch.no_grad():
            for (p, before), step in zip(start, steps, strict=True):
                p.copy_(before + k * step)
            right = model(x).argmax(dim=1) == y
        assert stop.accuracy is not None
        return float(right.double().mean()) <= stop.accuracy

    k = 2.0**-8
    while not reached(k) and k < 2.0**8:
        k *= 2
    if reached(k):
        part = bisect(lambda t: reached(k * (0.5 + 0.5 * t)))
        reached(k * (0.5 + 0.5 * part))
    return model


def _batches(problem: Problem) -> list[Parts]:
    x, y = problem.models.data.train
    return [Parts([a], {}, b) for a, b in zip(x.split(500), y.split(500), strict=True)]
