"""What ascent increases, ``f(l_i)``, at a softmax head, and its residual."""

from __future__ import annotations

import torch
from torch import Tensor

from imu_fast.ops.operation import operation
from imu_fast.ops.softmax_residual import softmax_residual

# Of the label alone; and those that need to know more of each sample, see objective().
LABEL_OBJECTIVES = ("ce", "margin", "log1mp")
NEEDS_AUXILIARY = ("npo", "relabel")
OBJECTIVES = (*LABEL_OBJECTIVES, *NEEDS_AUXILIARY)
# Zhang et al. 2024: the weight of a sample falls to a half once its likelihood ratio is 1.
NPO_BETA = 0.1


@operation(differentiable=True)
def objective(logits: Tensor, labels: Tensor, name: str, auxiliary: Tensor | None = None) -> Tensor:
    """``f(l_i)``, which ascent increases; differentiable in the logits.

    ``ce``: the cross-entropy, unbounded (the paper's). ``margin``: ``-max(0, z_y - max z_j)``, so
    only samples still predicted as their label push. ``log1mp``: ``log(1 - p_y)``. ``npo``:
    ``-2/beta log(1 + (p_y / p_ref)^beta)`` with ``auxiliary = -log p_ref``, the loss before the
    first step (Zhang et al. 2024). ``relabel``: minus the cross-entropy of the class that
    ``auxiliary`` names instead.

    Args:
        logits: [B, C]. labels: [B]. name: one of ``OBJECTIVES``. auxiliary: [B], of two of them.

    Returns:
        [B] in the logits' dtype.
    """
    cross_entropy = torch.nn.functional.cross_entropy
    if name == "ce":
        return cross_entropy(logits, labels, reduction="none")
    if name == "relabel":
        assert auxiliary is not None
        return -cross_entropy(logits, auxiliary, reduction="none")
    if name == "npo":
        assert auxiliary is not None
        ratio = auxiliary - cross_entropy(logits, labels, reduction="none")
        return -2 / NPO_BETA * torch.nn.functional.softplus(NPO_BETA * ratio)
    label = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    if name == "margin":
        return -(label - others.amax(dim=1)).clamp_min(0)
    return others.logsumexp(dim=1) - logits.logsumexp(dim=1)


@operation()
def objective_residual(
    logits: Tensor, labels: Tensor, name: str, auxiliary: Tensor | None = None
) -> Tensor:
    """``d f / d z``, the closed form of :func:`objective`'s gradient.

    ``ce``: ``p - onehot(y)``. ``margin``: ``-1`` on the label and ``+1`` on the runner-up where
    the label still wins. ``log1mp``: ``p_y (q - onehot(y))`` with q the softmax over the others.
    ``npo``: ``ce``'s times ``2 sigmoid(beta log(p_y / p_ref))``. ``relabel``: minus ``ce``'s of the
    other class.

    Args:
        logits, labels, name, auxiliary: as of :func:`objective`.

    Returns:
        [B, C] in the logits' dtype.
    """
    column = labels[:, None]
    if name == "ce":
        return softmax_residual(logits, labels)[0]
    if name == "relabel":
        assert auxiliary is not None
        return softmax_residual(logits, auxiliary)[0].neg_()
    if name == "npo":
        assert auxiliary is not None
        residual, loss = softmax_residual(logits, labels)
        return residual.mul_(2 * torch.sigmoid(NPO_BETA * (auxiliary - loss))[:, None])
    others = logits.scatter(1, column, -torch.inf)
    if name == "margin":
        best, runner_up = others.max(dim=1, keepdim=True)
        push = (logits.gather(1, column) >= best).to(logits.dtype)
        return torch.zeros_like(logits).scatter_(1, column, -push).scatter_(1, runner_up, push)
    label_p = torch.softmax(logits, dim=1).gather(1, column)
    return (torch.softmax(others, dim=1) * label_p).scatter_(1, column, -label_p)
