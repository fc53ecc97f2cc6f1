"""Whether samples have losses of their own: a sample's outputs are the same without the others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from imu_fast.errors import InputError
from imu_fast.model.called import called
from imu_fast.model.calls import watched
from imu_fast.model.head import linear_layers
from imu_fast.model.logits import chosen
from imu_fast.model.parts import Parts
from imu_fast.model.run import Batch, innermost

Run = Callable[[Batch], Any]
Outputs = Callable[[Run, Batch], Tensor]
Dtype = torch.dtype | None

logger = logging.getLogger("imu_fast")


def some_samples(batch: Batch, rows: range) -> Batch:
    """A smaller batch.

    Raises:
        InputError: it cannot be cut.
    """
    args, kwargs, labels = Parts(*batch).taken(rows)
    return args, kwargs, labels


class SampleChecks:
    """Looks at the batches of one pass for what the place of samples and classes rests on.

    Args:
        alone: whether samples must be independent; else only which axis is the classes' is seen.
    """

    def __init__(self, model: nn.Module, alone: bool = True) -> None:
        self._model, self._alone, self._axes = model, alone, True

    def look(
        self, run: Run, batch: Batch, logits: Tensor, choice: Any, computed: Any = None
    ) -> None:
        """Of the first batch of several samples; and of the first that is as long as classes are.

        Args:
            choice: where the logits are in what the model returns. computed: the coarsest dtype
                that was seen on the way to them, if any was.

        Raises:
            InputError: see :func:`check_alone` and :func:`check_classes_last`.
        """
        self.look_at(run, lambda run, some: chosen(run(some), choice), batch, logits, computed)
        square = logits.dim() > 2 and logits.shape[1] == logits.shape[-1] > 1
        if square and self._axes:
            self._axes = False
            check_classes_last(self._model, run, batch, logits.shape[-1], choice)

    def look_at(
        self, run: Run, outputs: Outputs, batch: Batch, here: Tensor, computed: Dtype = None
    ) -> None:
        """Of other outputs than the logits, whether samples are independent."""
        if self._alone and len(batch[2]) > 1:
            self._alone = False
            check_alone(self._model, run, outputs, batch, here, computed or here.dtype)


def check_alone(
    model: nn.Module, run: Run, outputs: Outputs, batch: Batch, here: Tensor, computed: torch.dtype
) -> None:
    """Run the last sample alone, and compare with what it was in its batch.

    The last, for it is the one that a capacity leaves out. A batch that cannot be cut, and a model
    that takes neither one sample nor two, show nothing.

    Args:
        run: calls the model. outputs: what is compared, of a batch that is run: [n, ...], or the
            rows of all samples one after another.
        here: of this batch. computed: the coarsest dtype that was seen on the way.

    Raises:
        InputError: they differ by more than rounding, which other kernels for another batch size
            may make; or the first axis of the outputs is not the samples'.
    """
    n = len(batch[2])
    inner = innermost(model)
    for few in (1, 2):  # a batch norm of the batch's own statistics takes no single sample
        if few >= n:
            return
        try:
            some = some_samples(batch, range(n - few, n))
            # Without the hooks of the model itself: the user's may count batches.
            found = outputs(lambda part: called(inner, *part, inner.forward), some)
            break
        except Exception:
            logger.debug("a sample cannot be compared with its batch", exc_info=True)
    else:
        return
    coarsest = coarsest_of(model, computed, here.dtype)
    rows = len(here) // n  # of each sample
    if _comparable(found, here, few, n) and apart(found[-rows:], here[-rows:], coarsest) is None:
        return
    found = outputs(run, some)
    if len(here) == n and len(found) != few:
        raise InputError(
            f"the model's outputs have shape {tuple(here.shape)} for {n} samples and "
            f"{tuple(found.shape)} for {few}: their first axis is not the samples'; say where they "
            "are, output=lambda out: out.transpose(0, 1)"
        )
    if not _comparable(found, here, few, n):
        return
    off = apart(found[-rows:], here[-rows:], coarsest)
    if off is None:
        return
    if apart(outputs(run, some)[-rows:], found[-rows:], coarsest) is not None:
        raise InputError(
            f"the model's outputs for a sample differ from one pass to the next (by {off:.2g}) in "
            "evaluation mode: it draws random numbers, as F.dropout(x) does without "
            "training=self.training; make it deterministic"
        )
    raise InputError(
        f"the model's outputs for a sample change with the rest of its batch (by {off:.2g}), so "
        "that it has no loss of its own: something mixes samples, such as attention without "
        "batch_first=True, or the batch's own mean. Make the model work on each sample by itself, "
        "or pass batches of one sample"
    )


def coarsest_of(model: nn.Module, *dtypes: torch.dtype) -> torch.dtype:
    """Of these and the parameters' dtypes, the one that rounds most."""
    own = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max((*own, *dtypes), key=lambda dtype: torch.finfo(dtype).eps)


def _comparable(found: Tensor, here: Tensor, few: int, n: int) -> bool:
    """Whether both have as many rows of each sample, of the same shape."""
    return found.shape[1:] == here.shape[1:] and 0 < len(found) * n == len(here) * few


def check_classes_last(model: nn.Module, run: Run, batch: Batch, classes: int, choice: Any) -> None:
    """Raise InputError where logits [n, T, C] with T = C turn out to be [n, C, T].

    Whatever is done to them, logits that differ in their class come from the same rows of the
    head's output, and those of other positions from others, which gradients show.
    """
    layers = [layer for layer in linear_layers(model).values() if layer.width == classes]
    if not layers:
        return
    with torch.enable_grad(), watched(layers, leaves=True) as seen:
        logits = chosen(run(batch), choice)
        # Of one place, if the last axis is the classes'.
        first = logits[(0,) * (logits.dim() - 1)][:4].unbind()
    calls = [call for call in seen.calls if call.leaf is not None]
    if not calls or not logits.requires_grad:
        return
    targets = [call.target for call in calls]
    reached = []
    for logit in first:
        found = torch.autograd.grad(logit, targets, retain_graph=True, allow_unused=True)
        rows = [call.rows(g).any(dim=-1).flatten() for call, g in zip(calls, found, strict=True)]
        reached.append(torch.cat(rows))
    if any(bool(rows.any()) and not bool((rows & reached[0]).any()) for rows in reached[1:]):
        raise InputError(
            f"logits have shape {tuple(logits.shape)}, and their last axis is not the classes; say "
            "so, output=lambda out: out.movedim(1, -1)"
        )


def apart(a: Tensor, b: Tensor, coarsest: torch.dtype) -> float | None:
    """The largest difference, where it is more than rounding; what is not finite is left out."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.detach().to(wide), b.detach().to(wide)
    both = torch.isfinite(a) & torch.isfinite(b)
    a, b = torch.where(both, a, 0), torch.where(both, b, 0)
    eps = torch.finfo(coarsest).eps
    if a.is_cuda and wide == torch.float32:
        eps = max(eps, 2.0**-11)  # TF32, where convolutions and products may use it
    bound = max(64 * torch.finfo(wide).eps ** 0.75, 16 * eps) * (a.abs().max() + b.abs().max())
    off = (a - b).abs().max()
    return float(off) if bool(off > bound) else None


def check_independent(
    model: nn.Module, run: Run, batch: Batch, logits: Tensor, name: str, output: Any
) -> None:
    """Raise InputError unless a sample's logits are the same without the rest of its batch.

    Then its gradient is its own too, even at rows that all samples share.
    """
    n = len(batch[2])
    for sample in {0, n - 1}:
        try:
            one = some_samples(batch, range(sample, sample + 1))
            found = chosen(run(one), output)[0]
        except Exception as error:
            raise _mixes(name, f"and a sample cannot be run alone ({error})") from error
        here = logits[sample]
        same = found.shape == here.shape
        if not same or apart(found, here, coarsest_of(model, here.dtype)) is not None:
            raise _mixes(name, "and a sample's logits change with the rest of its batch")


def _mixes(name: str, why: str) -> InputError:
    return InputError(
        f"layers={name!r}: the gradient at a row comes from several samples, {why}; there is no "
        "gradient of one sample at this layer. Choose another, or batches of one sample"
    )
