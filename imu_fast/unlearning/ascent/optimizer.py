"""What makes the steps: plain SGD by default, or any torch optimizer."""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from imu_fast.errors import InputError, brief, check_positive
from imu_fast.options import Options, Table, option, options

logger = logging.getLogger("imu_fast")

Make = Callable[..., torch.optim.Optimizer]


def _check_not_negative(name: str, value: float | None) -> None:
    if value is not None:
        check_positive(name, value, allow_zero=True)


def _check_rate(name: str, value: float | None) -> None:
    if value is not None:
        check_positive(name, value)


class Optimizer(Options, ABC):
    """Makes a torch optimizer of the tensors that are trained (for the head one, [C, D])."""

    @abstractmethod
    def make(self, tensors: list[Tensor]) -> torch.optim.Optimizer:
        """The optimizer of these tensors."""


@options
class SGD(Optimizer):
    """``torch.optim.SGD``; on a head its step is one fused operation."""

    name = "sgd"
    lr: float = option(default=0.01, check=check_positive)
    momentum: float = option(default=0.9, check=_check_not_negative)
    weight_decay: float = option(default=5e-4, check=_check_not_negative)

    def make(self, tensors: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            tensors, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )


@options
class Custom(Optimizer):
    """Any torch optimizer.

    Args:
        factory: called with a list of tensors, and by keyword with those of the options below
            that are given: an optimizer's class (``torch.optim.Adam``) or a function of the
            tensors alone (``lambda tensors: Adam(tensors, lr=1e-3)``). Before the work it is called
            with stand-ins of the tensors, for a step on trial.

    Raises:
        InputError: an option is given that the factory does not take; or, when it is to train,
            no optimizer of these tensors comes of it, or none that can make a step.
    """

    factory: Make = option()
    lr: float | None = option(default=None, check=_check_rate)
    momentum: float | None = option(default=None, check=_check_not_negative)
    weight_decay: float | None = option(default=None, check=_check_not_negative)

    @property
    def _given(self) -> dict[str, float]:
        every = {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}
        return {name: value for name, value in every.items() if value is not None}

    def check(self) -> None:
        try:
            signature = inspect.signature(self.factory)
        except (TypeError, ValueError):
            return  # no signature to be had: the call itself will tell
        for name in self._given:
            try:
                signature.bind([], **{name: 0.0})
            except TypeError:
                raise InputError(
                    f"optimizer={self._called} takes no {name}; set it inside the optimizer, or "
                    f"leave {name} out"
                ) from None

    @property
    def _called(self) -> str:
        return getattr(self.factory, "__qualname__", repr(self.factory))

    def make(self, tensors: list[Tensor]) -> torch.optim.Optimizer:
        self._try(tensors)
        return self._made(tensors)

    def _try(self, tensors: list[Tensor]) -> None:
        """One step on stand-ins of the tensors.

        Raises:
            InputError: the optimizer cannot be made, or cannot make a step.
        """
        try:
            return self._step([_stand_in(t, [min(s, 2) for s in t.shape]) for t in tensors])
        except (InputError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:
            logger.debug("optimizer=%s fails on small tensors", self._called, exc_info=True)
        try:  # it may want more than two rows
            self._step([_stand_in(t, t.shape) for t in tensors])
        except (InputError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            shapes = sorted({tuple(t.shape) for t in tensors}, key=len)
            raise InputError(
                f"optimizer={self._called} cannot train what it is given, dense tensors of "
                f"shapes {', '.join(map(str, shapes[:4]))} ({type(error).__name__}: "
                f"{brief(error)}); use one that can, such as torch.optim.Adam, or a function "
                "of the tensors that makes one"
            ) from error

    def _step(self, tensors: list[Tensor]) -> None:
        self._made(tensors).step()

    def _made(self, tensors: list[Tensor]) -> torch.optim.Optimizer:
        made = self.factory(tensors, **self._given)
        if not isinstance(made, torch.optim.Optimizer):
            raise InputError(
                f"optimizer={self._called} returned a {type(made).__name__}; it must return a "
                "torch.optim.Optimizer"
            )
        try:
            # The class's own: a scheduler's around it has the signature of what it wraps.
            inspect.signature(type(made).step).bind(made)
        except TypeError:
            raise InputError(
                f"optimizer={self._called} makes a {type(made).__name__}, whose step needs a "
                "closure; use one that steps by gradients that are there, such as Adam"
            ) from None
        held = {id(p) for group in made.param_groups for p in group["params"]}
        if held != {id(t) for t in tensors}:
            raise InputError(
                f"optimizer={self._called} holds other tensors than it was called with; it must "
                "train those that it is given, for example lambda tensors: Adam(tensors)"
            )
        return made


def _stand_in(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of this shape with a gradient, and otherwise like ``tensor``."""
    made = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(made)
    made.requires_grad_(tensor.requires_grad)
    made.grad = torch.full_like(made, 1e-3)
    return made


def _custom(value: Any) -> Optimizer | None:
    if isinstance(value, torch.optim.Optimizer):
        raise InputError(
            f"optimizer is a {type(value).__name__} that exists already; pass what makes it of the "
            f"trained tensors, for example optimizer=torch.optim.{type(value).__name__}"
        )
    return Custom(factory=value) if callable(value) and not isinstance(value, Options) else None


OptimizerName = Literal["sgd"]
OPTIMIZERS: Table[Optimizer] = Table(
    "optimizer",
    Optimizer,  # type: ignore[type-abstract]
    {"sgd": SGD},
    _custom,
)


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
