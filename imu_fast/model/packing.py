"""Rows of a layer in the order of their samples, and inputs that several layers read kept once."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from imu_fast.model.rows import NOBODY

# A signal waits for its one copy as it came, unless it holds memory of so much more than its rows.
_HELD = 4 / 3


@dataclass(frozen=True)
class Packing:
    """Which rows of a call are kept, and where.

    Attributes:
        index: [N] int64 on the CPU, the row that comes at each place; None: all, as they are.
        counts: [n], of each sample.
        padded: whether the index goes to a row of zeros, which comes after the last.
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
            rows = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
        return rows.index_select(0, self.index.to(rows.device))

    def put(self, rows: Tensor, out: Tensor) -> None:
        """The same into ``out``, without a second copy."""
        if self.index is None:
            out.copy_(rows)
        elif self.padded or out.dtype != rows.dtype:
            out.copy_(self(rows))
        else:
            torch.index_select(rows, 0, self.index.to(rows.device), out=out)

    def is_worth_holding(self, rows: Tensor) -> bool:
        """Whether ``rows`` [R, C] hold little more memory than what is made of them."""
        kept = int(self.counts.sum()) * rows.shape[1] * rows.itemsize
        return rows.untyped_storage().nbytes() <= _HELD * kept


@dataclass(frozen=True)
class Part:
    """One batch's rows of a layer.

    Attributes:
        signal: rows that ``packing`` makes delta [N, C] of. act: [N, d]. counts: [n], of each
            sample. finite: whether the signal is known to be.
    """

    signal: Tensor
    packing: Packing
    act: Tensor
    counts: Tensor
    finite: bool

    @property
    def delta(self) -> Tensor:
        """[N, C], a copy."""
        return self.packing(self.signal)


def delta_of(parts: Sequence[Part], dtype: torch.dtype) -> Tensor:
    """Batches' signals one after another: [N, C]."""
    sizes = [int(part.counts.sum()) for part in parts]
    first = parts[0].signal
    out = torch.empty(sum(sizes), first.shape[1], dtype=dtype, device=first.device)
    for part, rows in zip(parts, out.split(sizes), strict=True):
        part.packing.put(part.signal, rows)
    return out


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
    """Rows of one batch's layers as :meth:`Packing.of` has them, what they share made once.

    The inputs of layers that read the same memory and keep the same rows, as the queries, keys and
    values of an attention do, are one tensor. What was given has to stay alive meanwhile.

    Args:
        labelled: [n] bool, on the CPU.
    """

    def __init__(self, labelled: Tensor) -> None:
        self._labelled, self._all = labelled, bool(labelled.all())
        self._packings: list[tuple[Tensor, Tensor, Packing]] = []
        # What was read stays alive beside what was made of it, or its place could be another's.
        self._inputs: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def __call__(self, delta: Tensor, act: Tensor, owner: Tensor) -> Part:
        """delta [R, C], which nobody writes to any more; act [R, d]; owner [R] on the CPU."""
        packing, finite = self._packing(delta, owner)
        place = (act.data_ptr(), tuple(act.shape), act.stride(), act.dtype, act.device)
        key = (*place, id(packing))
        if key not in self._inputs:
            self._inputs[key] = act, packing(act)
        made = self._inputs[key][1]
        if packing.is_worth_holding(delta):
            return Part(delta, packing, made, packing.counts, finite)
        return Part(packing(delta), Packing(None, packing.counts), made, packing.counts, finite)

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


@dataclass
class Joined:
    """Batches' parts one after another: once, where several layers have the same parts."""

    _seen: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def __call__(self, parts: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, bool]:
        """Joined in ``dtype``, and whether it is the first time; the parts have to stay alive."""
        key = (dtype, *map(id, parts))
        first = key not in self._seen
        if first:
            self._seen[key] = torch.cat(list(parts)).to(dtype)
        return self._seen[key], first
