"""Rows of a layer in the order of their samples, and inputs that several layers read kept once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from imu_fast.model.rows import NOBODY

Packed = tuple[Tensor, Tensor, Tensor]
"""delta [N, C], act [N, d], and the number of rows of each sample [n]."""


@dataclass(frozen=True)
class Packing:
    """Which rows of a call are kept, and where.

    Attributes:
        index: [N] int64 on the CPU, the row that comes at each place, or -1 for zeros; None: all
            rows, as they are. counts: [n], of each sample.
    """

    index: Tensor | None
    counts: Tensor

    @classmethod
    def of(cls, delta: Tensor, owner: Tensor, labelled: Tensor) -> Packing:
        """Rows in the order of their samples, without those that have no gradient.

        A labelled sample that is left without rows gets one of zeros: having no gradient is not
        having no label.

        Args:
            delta: [R, C]. owner: [R] and labelled: [n] bool, on the CPU.
        """
        n = len(labelled)
        if len(owner) == n and bool(labelled.all()) and torch.equal(owner, torch.arange(n)):
            return cls(None, torch.ones(n, dtype=torch.int64))
        index = torch.nonzero((owner != NOBODY) & _alive(delta).cpu()).flatten()
        owner = owner[index]
        counts = torch.bincount(owner, minlength=n)
        missing = torch.nonzero(labelled & (counts == 0)).flatten()
        if len(missing):
            index = torch.cat([index, torch.full_like(missing, -1)])
            owner = torch.cat([owner, missing])
            counts[missing] = 1
        if bool((owner.diff() < 0).any()):
            index = index[torch.argsort(owner, stable=True)]
        if len(index) == len(delta) and torch.equal(index, torch.arange(len(delta))):
            return cls(None, counts)
        return cls(index, counts)

    def __call__(self, rows: Tensor) -> Tensor:
        """``rows`` [R, ...] so: a copy, always."""
        if self.index is None:
            return rows.clone()
        if len(self.index) and int(self.index.min()) < 0:
            rows = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
            index = self.index.where(self.index >= 0, len(rows) - 1)
        else:
            index = self.index
        return rows.index_select(0, index.to(rows.device))

    def is_like(self, other: Packing) -> bool:
        """Whether it makes the same of the same rows."""
        if self.index is None or other.index is None:
            return self.index is other.index
        return torch.equal(self.index, other.index)


def _alive(delta: Tensor) -> Tensor:
    """Where a row [C] is not all zeros: [R]; one that is not finite is not."""
    if not delta.numel():
        return delta.any(dim=1)
    # Its norm says so, in one fast pass, but for squares that vanish.
    alive = torch.linalg.vector_norm(delta, dim=1) != 0
    rest = torch.nonzero(~alive).flatten()
    if len(rest):
        alive[rest] = delta[rest].any(dim=1)
    return alive


def packed(delta: Tensor, act: Tensor, owner: Tensor, labelled: Tensor) -> Packed:
    """The rows of one layer as :meth:`Packing.of` has them; copies."""
    packing = Packing.of(delta, owner, labelled)
    return packing(delta), packing(act), packing.counts


@dataclass
class Inputs:
    """The inputs of one batch's layers: once, where several read the same memory and keep the same
    rows, as the queries, keys and values of an attention do.

    Tensors that were asked for have to stay alive meanwhile.
    """

    _seen: dict[Hashable, list[tuple[Packing, Tensor]]] = field(default_factory=dict)

    def packed(self, act: Tensor, packing: Packing) -> Tensor:
        """``packing(act)``; act [R, d]."""
        key = (act.data_ptr(), tuple(act.shape), act.stride(), act.dtype, act.device)
        kept = self._seen.setdefault(key, [])
        for other, rows in kept:
            if packing.is_like(other):
                return rows
        rows = packing(act)
        kept.append((packing, rows))
        return rows


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
