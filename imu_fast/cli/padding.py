"""Whether a model says the same of a text with padding behind it: what it is batched by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from imu_fast.data.chat import Encoded
from imu_fast.data.text import Padded
from imu_fast.errors import InputError
from imu_fast.model.guard import door
from imu_fast.model.independence import apart, coarsest_of
from imu_fast.model.outputs import logits_in_batches
from imu_fast.model.reading import Reading


@door
def check_padding(
    model: nn.Module,
    encoded: Sequence[Encoded],
    pad: int,
    argument: str,
) -> None:
    """Raise InputError where the logits of the shortest text are others beside the longest.

    As of models that have no mask (FNet), or that read the last place of a row whatever is in it
    (XLNet's classifier): then a sample's loss is that of its batch.

    Args:
        pad: the token that padding is. argument: of the texts.
    """
    short, long = (of(encoded, key=lambda one: len(one.input_ids)) for of in (min, max))
    if len(short.input_ids) == len(long.input_ids):
        return
    padded = Padded(pad)
    alone = padded([short])
    behind = {name: column[:1] for name, column in padded([short, long]).items()}
    batches: Any = [alone, behind]
    found = logits_in_batches(model, batches, Reading(), "the command")
    a, b = (logits[targets >= 0] for logits, targets in found)
    off = apart(a, b, coarsest_of(model, a.dtype))
    if off is not None:
        raise InputError(
            f"{argument}: what the model says of a text changes with padding behind it (by "
            f"{off:.2g}), so that no line of a batch has a loss of its own; pass --batch-size 1"
        )
