"""The authors' unlearning loop: SGD, epochs of a shuffling loader, their learning-rate schedule."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from imu_fast.errors import InputError, check_choice
from imu_fast.model.batches import device_of
from imu_fast.model.guard import exclusive, modes, preserved, rolled_back
from imu_fast.model.nested import mapped

logger = logging.getLogger("imu_fast")
Mode = Literal["train", "eval"]

# Of their command line.
_DEFAULTS: dict[str, Any] = {
    "alpha": 0.2,
    "batch_size": 256,
    "decreasing_lr": "91,136",
    "lr": 0.1,
    "momentum": 0.9,
    "rewind_epoch": 0,
    "top_data": 0.1,
    "unlearn_epochs": 10,
    "unlearn_lr": 0.01,
    "warmup": 0,
    "weight_decay": 5e-4,
}


class Arguments:
    """Their ``args``, with the defaults of their command line where something is missing."""

    def __init__(self, args: Any) -> None:
        self._args = args
        if self.rewind_epoch:
            raise InputError(
                f"args.rewind_epoch={self.rewind_epoch}: rewinding loads a pruned initialisation; "
                "load the weights into the model first, and pass 0"
            )

    def __getattr__(self, name: str) -> Any:
        if name not in _DEFAULTS:
            raise AttributeError(name)
        return getattr(self._args, name, _DEFAULTS[name])


def mode_of(name: str, value: str) -> Mode:
    """``"train"`` or ``"eval"``."""
    return "train" if check_choice(name, value, ("train", "eval")) == "train" else "eval"


def loader_of(dataset: Any, batch_size: int, shuffle: bool) -> DataLoader[Any]:
    """As theirs makes them: the order comes from torch's own random state."""
    pinned = torch.cuda.is_available()
    return DataLoader(
        dataset, batch_size=batch_size, num_workers=0, pin_memory=pinned, shuffle=shuffle
    )


def ascend(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    batches: DataLoader[Any],
    loss_of: Callable[[Any], tuple[Tensor, Tensor, Tensor] | None],
    args: Arguments,
    mask: Any,
    mode: Mode,
    *,
    begin: Callable[[], None] = lambda: None,
    seen_twice: bool = False,
) -> None:
    """Epochs of steps; on an error the model is as before.

    Args:
        loss_of: ``(loss, image, target)`` of a batch on the model's device; None: no step.
        mask: parameter name -> a factor of its gradient, or None.
        begin: called before each epoch.
        seen_twice: after its step each batch runs through the model once more, for the accuracy
            that is logged, which in training mode moves running statistics a second time.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    own = {names[id(p)] for p in parameters}
    if mask and not own <= set(mask):
        raise InputError(f"mask lacks {sorted(own - set(mask))}; pass a factor for each of {own}")
    device = device_of(model)

    def there(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    milestones = [int(epoch) for epoch in str(args.decreasing_lr).split(",")]
    with exclusive(model), preserved(model, buffers=False), rolled_back(model, sorted(own)):
        optimizer = torch.optim.SGD(
            parameters,
            args.unlearn_lr,
            momentum=args.momentum,
            weight_decay=args.weight_decay,
        )
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
        for epoch in range(args.unlearn_epochs):
            begin()
            losses, right, count = 0.0, 0, 0
            for i, batch in enumerate(batches):
                if epoch < args.warmup:
                    _warm_up(optimizer, args, epoch * len(batches) + i + 1, len(batches))
                made = loss_of(mapped(batch, there))
                if made is None:
                    continue
                loss, image, target = made
                optimizer.zero_grad()
                loss.backward()
                for p in parameters:
                    if mask and p.grad is not None:
                        p.grad *= mask[names[id(p)]].to(p.grad)
                optimizer.step()
                losses, count = losses + float(loss.detach()) * len(target), count + len(target)
                if seen_twice:
                    with torch.no_grad(), modes(model, batchnorm=mode, dropout=mode):
                        right += int((model(image).argmax(dim=1) == target).sum())
            schedule.step()
            logger.info("epoch %d: loss %.4f", epoch, losses / max(count, 1))
            if seen_twice:
                logger.info("epoch %d: accuracy %.3f", epoch, 100 * right / max(count, 1))


def _warm_up(optimizer: torch.optim.Optimizer, args: Arguments, step: int, per_epoch: int) -> None:
    """A rate that rises to ``args.lr`` over ``args.warmup`` epochs."""
    for group in optimizer.param_groups:
        group["lr"] = min(args.lr * step / (args.warmup * per_epoch), args.lr)
