"""The user's model comes back as it was: modes, flags, buffers, weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def modes(model: nn.Module, *, batchnorm: str, dropout: str) -> Iterator[None]:
    """The model in evaluation mode, but for the kinds of layers asked for in training mode."""
    saved = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for module in model.modules():
            norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            if (batchnorm if norm else dropout) == "train":
                module.training = True
        yield
    finally:
        for module, training in saved:
            module.training = training


@contextmanager
def preserved(model: nn.Module, *, buffers: bool = True) -> Iterator[None]:
    """Restore training modes, requires_grad and (``buffers``) normalisation buffers, always."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    norms = [m for m in model.modules() if hasattr(m, "running_mean")] if buffers else []
    saved = [(b, b.detach().clone()) for m in norms for b in m.buffers(recurse=False)]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


Kept = list[tuple[Tensor, Tensor]]


def copies_of(tensors: Iterable[Tensor]) -> Kept:
    return [(tensor, tensor.detach().clone()) for tensor in tensors]


@contextmanager
def rolled_back(model: nn.Module, trained: list[str]) -> Iterator[Kept]:
    """On any exception, Ctrl-C included, put the trained parameters and all buffers back.

    Yields the list of ``(tensor, copy)`` that is put back; whoever changes another tensor adds it.
    On success nothing is undone, the drift of BatchNorm that ``batchnorm="train"`` asked for
    included; ``preserved`` restores modes, flags and hooks either way.
    """
    parameters = dict(model.named_parameters())
    kept = copies_of(parameters[name] for name in trained)
    if trained:
        kept += copies_of(model.buffers())
    gradients = {name: p.grad for name, p in parameters.items()}
    try:
        yield kept
    except BaseException:
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)
        raise
    finally:
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]
