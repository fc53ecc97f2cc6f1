"""Rows of a layer in the order of their samples, and which layers read the same input."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from imu_fast.factors.operands import input_dtype
from imu_fast.model.rows import NOBODY


@dataclass(frozen=True)
class Packing:
    """Which rows of a call are kept, and where.

    Attributes:
        index: [N] int64 on the CPU, the row that comes at each place; None: all, as they are.
        counts: [n], of each sample.
        padded: whether the index goes to a row of zeros, which comes after the last; where rows
            are places to read at, of -1.
    """

    index: Tensor | None
    counts: Tensor
    padded: bool = False

    @classmethod
    def of(cls, alive: Tensor, owner: Tensor, labelled: Tensor) -> Packing:
        """Rows in the order of their samples, without those that have no gradient.

        A labelled sample that is left without rows gets one of zeros: having no gradient is not
        having no label.

        Args:
            alive: [R] bool, whether a row has a gradient. owner: [R] int64. labelled: [n] bool.
                All on the CPU.
        """
        index = torch.nonzero((owner != NOBODY) & alive).flatten()
        owner = owner[index]
        counts = torch.bincount(owner, minlength=len(labelled))
        missing = torch.nonzero(labelled & (counts == 0)).flatten()
        if len(missing):
            index = torch.cat([index, torch.full_like(missing, len(alive))])
            owner = torch.cat([owner, missing])
            counts[missing] = 1
        if bool((owner.diff() < 0).any()):
            index = index[torch.argsort(owner, stable=True)]
        if len(index) == len(alive) and torch.equal(index, torch.arange(len(alive))):
            return cls(None, counts)
        return cls(index, counts, len(missing) > 0)

    def __call__(self, rows: Tensor) -> Tensor:
        """``rows`` [R, ...] so: a copy, always."""
        if self.index is None:
            return rows.clone()
        if self.padded:
            # Integers are places to read at, of which 0 is one.
            fill = 0 if rows.is_floating_point() else NOBODY
            rows = torch.cat([rows, rows.new_full((1, *rows.shape[1:]), fill)])
        return rows.index_select(0, self.index.to(rows.device))

    def size(self, rows: Tensor) -> int:
        """How many of ``rows`` are kept."""
        return len(rows) if self.index is None else len(self.index)

    def put(self, rows: Tensor, out: Tensor) -> None:
        """The same into ``out``, without a second copy."""
        if self.index is None:
            out.copy_(rows)
        elif self.padded or out.dtype != rows.dtype:
            out.copy_(self(rows))
        else:
            torch.index_select(rows, 0, self.index.to(rows.device), out=out)


@dataclass(frozen=True, eq=False)
class Input:
    """What a call read, ``rows`` [R, d], and which of them are kept; one object of all that keep
    the same rows of the same memory in the same ``dtype``.
    """

    rows: Tensor
    packing: Packing
    dtype: torch.dtype


@dataclass(frozen=True)
class Part:
    """One batch's rows of a layer, where they came.

    Attributes:
        signal: rows [R, C] that ``packing`` makes delta [N, C] of. input: act [N, d] is made of it.
        counts: [n], of each sample. finite: whether the signal is known to be.
    """

    signal: Tensor
    packing: Packing
    input: Input
    finite: bool

    @property
    def counts(self) -> Tensor:
        """[n], of each sample."""
        return self.packing.counts

    @property
    def delta(self) -> Tensor:
        """[N, C], a copy."""
        return self.packing(self.signal)

    @property
    def act(self) -> Tensor:
        """[N, d], a copy."""
        return self.packing(self.input.rows)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What factors of such a signal are held in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _alive(delta: Tensor) -> tuple[Tensor, bool]:
    """Where a row [C] is not all zeros, or not finite: [R]; and whether all are known to be finite.

    A row's norm says both, in one fast pass, but for squares that vanish or overflow.
    """
    if not delta.numel():
        return delta.any(dim=1), True
    norms = torch.linalg.vector_norm(delta, dim=1, dtype=_norm_dtype(delta))
    alive = norms != 0
    rest = torch.nonzero(~alive).flatten()
    if len(rest):
        alive[rest] = delta[rest].any(dim=1)
    return alive, math.isfinite(float(norms.sum()))


def _norm_dtype(delta: Tensor) -> torch.dtype:
    return torch.promote_types(delta.dtype, torch.float32)


class BatchPacker:
    """Rows of one batch's layers as :meth:`Packing.of` has them; nothing is copied yet.

    The inputs of layers that read the same memory and keep the same rows, as the queries, keys and
    values of an attention do, are one :class:`Input`.

    Args:
        labelled: [n] bool, on the CPU.
    """

    def __init__(self, labelled: Tensor) -> None:
        self._labelled, self._all = labelled, bool(labelled.all())
        self._packings: list[tuple[Tensor, Tensor, Packing]] = []
        # What was read stays alive in them, or its place could be another's.
        self._inputs: dict[Hashable, Input] = {}

    def __call__(self, delta: Tensor, act: Tensor, owner: Tensor) -> Part:
        """delta [R, C], which nobody writes to any more; act [R, d]; owner [R] on the CPU."""
        packing, finite = self._packing(delta, owner)
        dtype = input_dtype(act.dtype, wide(delta.dtype)) if act.is_floating_point() else act.dtype
        place = (act.data_ptr(), tuple(act.shape), act.stride(), act.dtype, act.device)
        key = (*place, id(packing), dtype)
        if key not in self._inputs:
            self._inputs[key] = Input(act, packing, dtype)
        return Part(delta, packing, self._inputs[key], finite)

    def _packing(self, delta: Tensor, owner: Tensor) -> tuple[Packing, bool]:
        n, finite = len(self._labelled), False
        if len(owner) == n and self._all and torch.equal(owner, torch.arange(n)):
            alive = torch.ones(n, dtype=torch.bool)
        else:
            found, finite = _alive(delta)
            alive = found.cpu()
        for other, others, packing in self._packings:
            if torch.equal(other, alive) and torch.equal(others, owner):
                return packing, finite
        packing = Packing.of(alive, owner, self._labelled)
        self._packings.append((alive, owner, packing))
        return packing, finite
