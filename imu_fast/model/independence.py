"""Whether samples have losses of their own: a sample's outputs are the same without the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from imu_fast.errors import InputError
from imu_fast.model.called import called
from imu_fast.model.calls import Call
from imu_fast.model.nested import taken
from imu_fast.model.run import Batch, innermost

Run = Callable[[Batch], Any]

logger = logging.getLogger("imu_fast")


def some_samples(batch: Batch, rows: range) -> Batch:
    """A smaller batch.

    Raises:
        InputError: it cannot be cut.
    """
    n = len(batch[2])
    args, kwargs, labels = (taken(part, rows, n) for part in batch)
    return args, kwargs, labels


def check_alone(
    model: nn.Module,
    run: Run,
    outputs: Callable[[Run, Batch], Tensor],
    batch: Batch,
    here: Tensor,
    computed: torch.dtype,
) -> None:
    """Run the last sample alone, and compare with what it was in its batch.

    The last, for it is the one that a capacity leaves out. A batch that cannot be cut, and a model
    that takes neither one sample nor two, show nothing.

    Args:
        run: calls the model. outputs: what is compared, of a batch that is run: [n, ...].
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
            alone = some_samples(batch, range(n - few, n))
            # Without the hooks of the model itself: the user's may count batches.
            found = outputs(lambda part: called(inner, *part, inner.forward), alone)
            break
        except Exception:
            logger.debug("a sample cannot be compared with its batch", exc_info=True)
    else:
        return
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    coarsest = max((*dtypes, computed, here.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    if _same(found, here, coarsest):
        return
    found = outputs(run, alone)
    if len(here) == n and len(found) != few:
        raise InputError(
            f"the model's outputs have shape {tuple(here.shape)} for {n} samples and "
            f"{tuple(found.shape)} for {few}: their first axis is not the samples'; say where they "
            "are, output=lambda out: out.transpose(0, 1)"
        )
    if len(here) != n or found.shape[1:] != here.shape[1:]:
        return
    off = _apart(found[-1], here[-1], coarsest)
    if off is None:
        return
    again = outputs(run, alone)
    if _apart(again[-1], found[-1], coarsest) is not None:
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


def _same(found: Tensor, here: Tensor, coarsest: torch.dtype) -> bool:
    same_shape = found.dim() == here.dim() and found.shape[1:] == here.shape[1:]
    return same_shape and _apart(found[-1], here[-1], coarsest) is None


def check_classes_last(calls: Sequence[Call], logits: Tensor) -> None:
    """Raise InputError where logits [n, T, C] with T = C turn out to be [n, C, T].

    A row of logits comes from one row of the head's output, all of it; a column from one output of
    every row, which a gradient shows.
    """
    if logits.dim() != 3 or logits.shape[1] != logits.shape[2] or not logits.requires_grad:
        return
    targets = [call.leaf for call in calls if call.leaf is not None]
    found = torch.autograd.grad(logits[0, 0].sum(), targets, retain_graph=True, allow_unused=True)
    rows = [call.rows(g) for call, g in zip(calls, found, strict=True) if g is not None]
    if any(int((g != 0).any(dim=-1).sum()) > 1 and not _all_of_a_row(g) for g in rows):
        raise InputError(
            f"logits have shape {tuple(logits.shape)}, and their last axis is not the classes; say "
            "so, output=lambda out: out.transpose(1, 2)"
        )


def _all_of_a_row(gradient: Tensor) -> bool:
    """Whether several outputs of some row are reached, as by a mean over rows."""
    return bool(((gradient != 0).sum(dim=-1) > 1).any())


def _apart(a: Tensor, b: Tensor, coarsest: torch.dtype) -> float | None:
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
