"""The classifier of a model: which linear layer it is."""

from __future__ import annotations

from typing import Any

from torch import nn

from imu_fast.errors import NoHeadFoundError

# The name of a model that is itself the linear layer.
WHOLE_MODEL = "(model)"


_HEAD_NAMES = ("fc", "classifier", "head", "heads", "score")


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {k or WHOLE_MODEL: m for k, m in model.named_modules() if isinstance(m, nn.Linear)}


def no_head(model: nn.Module, reason: str) -> NoHeadFoundError:
    shapes = {k: (m.out_features, m.in_features) for k, m in linears(model).items()}
    return NoHeadFoundError(f"{reason}; the model's linear layers (C, d) are {shapes or 'none'}")


def linear_layers_matching(model: nn.Module, substring: str) -> list[str]:
    """Names of the linear layers whose name contains ``substring``, in module order."""
    return [name for name in linears(model) if substring in name]


def find_head(model: nn.Module, head: Any = None) -> tuple[str, nn.Linear]:
    """The classifier by name, without running the model.

    Args:
        head: a module or its dotted name; None looks for timm's ``get_classifier``, the usual
            attribute names, and then the last linear layer.

    Raises:
        NoHeadFoundError: lists the candidates.
    """
    layers = linears(model)
    if isinstance(head, nn.Module):
        for name, module in layers.items():
            if module is head:
                return name, module
        raise no_head(model, f"head={head!r} is no linear layer of the model")
    if head is not None and head != "head":
        if head not in layers:
            raise no_head(model, f"head={head!r} is no linear layer of the model")
        return head, layers[head]
    get_classifier = getattr(model, "get_classifier", None)
    found = get_classifier() if callable(get_classifier) else None
    for name, module in layers.items():
        if module is found:
            return name, module
    for wanted in _HEAD_NAMES:
        inside = [k for k in layers if k == wanted or k.startswith(f"{wanted}.")]
        if inside:
            return inside[-1], layers[inside[-1]]
    if not layers:
        raise no_head(model, "no linear head found")
    return list(layers.items())[-1]
