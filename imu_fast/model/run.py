"""Running the user's model so that its layers can be watched, and leaving it as it was."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from imu_fast.errors import InputError
from imu_fast.model.batches import as_batches, device_of, split_batch, to_device
from imu_fast.model.called import called
from imu_fast.model.forward import innermost as innermost
from imu_fast.model.forward import wrapped
from imu_fast.model.guard import check_trainable, preserved
from imu_fast.model.logits import tensors_of

logger = logging.getLogger("imu_fast")

Batch = tuple[list[Any], dict[str, Any], Tensor]


class _Read(Iterator[Batch]):
    """See :func:`read`."""

    def __init__(self, batches: Iterator[Any], device: torch.device, progress: bool) -> None:
        self._hint = length_hint(batches)
        self._batches = iter(tqdm(batches, desc="capture", unit="batch", disable=not progress))
        self._device = device

    def __length_hint__(self) -> int:
        return self._hint

    def __next__(self) -> Batch:
        args, kwargs, labels = to_device(split_batch(next(self._batches)), self._device)
        return [_usable(a) for a in args], {k: _usable(v) for k, v in kwargs.items()}, labels


def read(model: nn.Module, loader: Any, progress: bool) -> Iterator[Batch]:
    """``(positional inputs, keyword inputs, labels)`` of each batch, on the model's device.

    Its ``length_hint`` is that of :func:`imu_fast.model.batches.as_batches`.
    """
    return _Read(as_batches(loader, model), device_of(model), progress)


def _usable(value: Any) -> Any:
    """A tensor made under inference_mode cannot be saved for a backward pass; its copy can."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _check_runs(model: nn.Module) -> None:
    check_trainable(model)
    outer = model
    while (inside := wrapped(outer)) is not None:
        hooks = outer._forward_hooks or outer._forward_pre_hooks
        if hooks and not isinstance(outer, nn.parallel.DistributedDataParallel):  # it has its own
            raise InputError(
                f"model: a {type(outer).__name__} with hooks of its own; what is run here is the "
                "module inside of it, without them: register them on that"
            )
        outer = inside
    if isinstance(innermost(model), torch.jit.ScriptModule):
        raise InputError(
            "model is a TorchScript module, whose layers cannot be watched; pass the eager module "
            "that it was scripted or traced from"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise InputError(
                f"model: {name!r} normalises by its batch's own statistics, in evaluation mode "
                "too (track_running_stats=False), so that a sample has no loss of its own; give "
                "it running statistics"
            )


class Runner:
    """Runs a batch.

    Attributes:
        stops: whether ``torch.no_grad()`` in the model's code stops gradients, as ``detach()``
            does. It does not where the model as a whole is run so, by a decorator say: there it
            only saves memory. None: nobody had to know yet.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._inner = model, innermost(model)
        self.stops: bool | None = None

    def __call__(self, batch: Batch) -> Any:
        if self._model.training:  # a loader may have meddled
            self._model.eval()
        return called(self._inner, *batch)

    def settle(self, batch: Batch) -> None:
        """Find out ``stops``: whether the outputs have a graph, all parameters asking for one."""
        parameters = [p for p in self._model.parameters() if p.is_floating_point()]
        flags = [p.requires_grad for p in parameters]
        try:
            for p in parameters:
                p.requires_grad_()
            made = tensors_of(self(batch)).values()
            self.stops = any(tensor.requires_grad for tensor in made)
        finally:
            for p, flag in zip(parameters, flags, strict=True):
                p.requires_grad_(flag)


@contextmanager
def evaluated(model: nn.Module) -> Iterator[Runner]:
    """The model in evaluation mode; nothing asks for a gradient but what the caller makes ask.

    So no graph is recorded before a tensor of the caller's, and from there on it is, whatever the
    model's own code does. Yields what runs a batch. Everything is restored, errors included.

    Raises:
        InputError: a model whose layers cannot be watched, or whose samples are not independent.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    _check_runs(model)
    with ExitStack() as stack:
        stack.enter_context(preserved(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules:  # no compiled code without it
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        stack.enter_context(right_batch_norms(model))
        yield Runner(model)


@contextmanager
def right_batch_norms(model: nn.Module) -> Iterator[None]:
    """Backward passes through batch norms are right on the CPU also for one sample, see below."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                stack.callback(module.register_forward_hook(_watch_strides).remove)
        yield


def _watch_strides(module: nn.Module, args: Any, out: Tensor) -> None:
    """torch's CPU batch_norm backward misreads the strides of a gradient's axes of one place."""
    if out.requires_grad and 1 in out.shape:
        out.register_hook(plain_strides)


def plain_strides(gradient: Tensor) -> Tensor:
    """The same numbers, row after row in memory; ``contiguous()`` leaves odd strides of 1 alone."""
    return gradient.clone(memory_format=torch.contiguous_format)


def full_precision(device: torch.device) -> torch.autocast:
    """No autocast: our own products keep their dtype inside the user's autocast."""
    return torch.autocast(device.type, enabled=False)
