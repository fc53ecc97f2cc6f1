"""Whether the logits of every batch come from the layers that made those of the first."""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor, nn

from imu_fast.errors import NoHeadFoundError
from imu_fast.model.between import Piece
from imu_fast.model.calls import operations_of
from imu_fast.model.run import Batch
from imu_fast.model.search import Head, Run, makers


class Makers:
    """Looks at batches whose logits are more than the head's output.

    A model may send each sample to a head of its own. What makes the logits is searched for anew
    where the model does something else with its outputs than so far, or nothing for a sample.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._operations = model, set[Hashable]()

    def check(
        self, run: Run, batch: Batch, head: Head, logits: Tensor, piece: Piece, searched: bool
    ) -> None:
        """Raise NoHeadFoundError where layers make logits that made none in the first batch.

        Args:
            logits: with their graph. piece: made of them. searched: whether the head was found in
                this batch, or named.
        """
        operations = operations_of(logits)
        known = operations in self._operations and bool(piece.act.any(dim=1).all())
        self._operations.add(operations)
        if known or searched:
            return
        others = set(makers(self._model, run, batch, head.choice)) - {p.name for p in head.parts}
        if others:
            raise NoHeadFoundError(
                f"the logits of some samples are made by {', '.join(map(repr, sorted(others)))}, "
                f"of those before by {head.name!r} alone: samples have heads of their own. Begin "
                "with a batch that has all of them, or name one head: layers=[...]"
            )
