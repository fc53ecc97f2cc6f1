"""Rows of a layer, batch after batch: each is copied once, into memory that is taken for all."""

from __future__ import annotations

import torch
from torch import Tensor

from imu_fast.errors import check_finite_rows
from imu_fast.model.packing import Input, Packing, Part, wide

# Memory that was taken for batches that did not come is kept up to so many times what is used.
_SPARE = 4 / 3


class Stack:
    """Rows [N, k] one after another.

    Args:
        batches: how many come; 0: not known. A guess: of more there is one copy in the end.
    """

    def __init__(self, batches: int) -> None:
        self._left = batches
        self._rooms: list[tuple[Tensor, int]] = []  # memory, and how many rows of it are used
        self._last = 0
        self._checked = False

    def add(self, rows: Tensor, packing: Packing, dtype: torch.dtype) -> None:
        """One batch's; ``packing`` says which of ``rows`` [R, k]."""
        new = packing.size(rows)
        room, used = self._rooms[-1] if self._rooms else (rows.new_empty(0), 0)
        if room.dim() != 2 or room.dtype != dtype or len(room) - used < new:
            # As many rows as this batch has for each that is to come.
            count = new * max(1, self._left)
            try:
                room = rows.new_empty(count, rows.shape[1], dtype=dtype)
            except (RuntimeError, OverflowError):  # a length that was made up, say
                if count == new:
                    raise
                self._left = 0
                room = rows.new_empty(new, rows.shape[1], dtype=dtype)
            self._rooms.append((room, 0))
            used = 0
        packing.put(rows, room[used : used + new])
        self._rooms[-1] = room, used + new
        self._left, self._last = max(0, self._left - 1), new

    def before(self) -> Stack:
        """Another one of all batches but the last."""
        made = Stack(self._left + 1)
        *full, (room, used) = self._rooms
        made._rooms = [(r[:k], k) for r, k in (*full, (room, used - self._last)) if k]
        return made

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """[N, k] in ``dtype``: each time the same."""
        parts = [room[:used] for room, used in self._rooms]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        if whole.untyped_storage().nbytes() > _SPARE * whole.nbytes:
            whole = whole.clone()
        whole = whole.to(dtype)
        self._rooms = [(whole, len(whole))]
        return whole

    def finite(self, dtype: torch.dtype, layer: str) -> Tensor:
        """:meth:`tensor`; raises InputError, which names the layer, unless it is finite."""
        whole = self.tensor(dtype)
        if not self._checked:
            check_finite_rows(f"input of {layer}", whole, "position")
        self._checked = True
        return whole


class LayerRows:
    """What a capture keeps of one layer.

    Args:
        batches: as of :class:`Stack`. apart: the signals of batches stay apart, as they may differ
            in width.

    Attributes:
        counts: [n] of each batch's samples, how many rows they have. finite: whether all signals
            are known to be. dtype: of the signal. read: of what was read. deltas: of each batch,
            where they stay apart.
    """

    def __init__(self, batches: int, apart: bool) -> None:
        self._batches = batches
        self.counts: list[Tensor] = []
        self.finite, self.dtype = True, torch.float32
        self.read: torch.dtype | None = None
        self.deltas: list[Tensor] | None = [] if apart else None
        self._signal = Stack(batches)
        self.inputs: Stack | None = None

    def add(self, part: Part, batch: dict[Stack, Input]) -> None:
        """One batch's.

        Args:
            batch: which input each stack has of it by now; of all layers.
        """
        self.counts.append(part.counts)
        self.finite &= part.finite
        dtype = wide(part.signal.dtype)
        self.dtype = torch.promote_types(self.dtype, dtype)
        read = part.input.rows.dtype
        self.read = read if self.read is None else torch.promote_types(self.read, read)
        if self.deltas is None:
            self._signal.add(part.signal, part.packing, dtype)
        else:
            self.deltas.append(part.delta)
        self.inputs = self._stack(part.input, batch)
        if self.inputs not in batch:
            batch[self.inputs] = part.input
            self.inputs.add(part.input.rows, part.packing, part.input.dtype)

    def _stack(self, read: Input, batch: dict[Stack, Input]) -> Stack:
        """The one for this input: shared with other layers as long as they read the same."""
        own = self.inputs
        if own is None:
            same = (stack for stack, other in batch.items() if other is read)
            return next(same, None) or Stack(self._batches)
        return own.before() if batch.get(own, read) is not read else own

    def delta(self) -> Tensor:
        """[N, C]."""
        return self._signal.tensor(self.dtype)
