"""Factors of layers from a forward pass that is to be differentiated anyway: no second one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from imu_fast.errors import InputError
from imu_fast.model.calls import Seen, watched
from imu_fast.model.guard import exclusive
from imu_fast.model.head import LinearLayer
from imu_fast.model.layers import LayerFactors, LayersCapture, check_readable
from imu_fast.model.loss import Targets
from imu_fast.model.reading import Reading

Pass = tuple[Seen, Tensor, Targets]


@contextmanager
def listening(layers: Sequence[LinearLayer]) -> Iterator[Seen]:
    """Record the layers' calls; the graph is the caller's, and goes on through them.

    What a layer returns is copied once, so that what happens to it in place can be differentiated.
    Calls where the caller's code takes no gradients have none.
    """
    with watched(layers, leaves=True, trained=True, stops=True) as seen:
        yield seen


def live_factors(
    model: nn.Module,
    layers: Sequence[LinearLayer],
    passes: Sequence[Pass],
    reading: Reading,
    ran: set[str] | None = None,
) -> list[LayerFactors]:
    """Factors of the layers in the order of the passes, whose graphs stay alive.

    One backward pass each, through activations alone, from the logits to the lowest layer; a second
    one while it is not known yet whose each row is, see :mod:`imu_fast.model.proofs`.

    Args:
        ran: names of layers that have run in passes before, and need not in these (experts that
            none of their samples is sent to); those that do are added.

    Raises:
        InputError: a call that cannot be read, or rows that belong to several samples.
    """
    taken = LayersCapture(model, layers, reading, always=False)
    taken.batches = len(passes)
    taken.ran = set() if ran is None else ran
    with exclusive(model), torch.enable_grad():
        for seen, logits, targets in passes:
            check_readable(seen)
            taken.take(seen, logits, targets, _refuse)
        return taken.factors()


def _refuse(name: str) -> None:
    raise InputError(
        f"layers={name!r}: samples share its rows in this forward pass; pass the model and the "
        "batch to imu_fast.batch_weights, which runs samples alone where they can be"
    )
