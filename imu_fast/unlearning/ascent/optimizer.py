"""Optimizers of an ascent."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

OptimizerFactory = Callable[[list[Tensor]], torch.optim.Optimizer]


def plain_sgd(optimizer: torch.optim.Optimizer) -> tuple[float, float, float] | None:
    """lr, momentum and weight decay of an SGD that does nothing else; None for other optimizers.

    Subclasses, hooks, schedulers that wrap ``step``, dampening and the like all do something else.
    """
    watched = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    if type(optimizer) is not torch.optim.SGD or "step" in vars(optimizer) or watched:
        return None
    group = optimizer.param_groups[0]
    if any(group[key] for key in ("dampening", "nesterov", "maximize", "differentiable")):
        return None
    if isinstance(group["lr"], Tensor):
        return None
    return group["lr"], group["momentum"], group["weight_decay"]
