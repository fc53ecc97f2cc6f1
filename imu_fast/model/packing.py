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

    def __call__(self, delta: Tensor, act: Tensor, owner: Tensor) -> Packed:
        """delta [R, C], act [R, d], owner [R] on the CPU."""
        packing = self._packing(delta, owner)
        place = (act.data_ptr(), tuple(act.shape), act.stride(), act.dtype, act.device)
        key = (*place, id(packing))
        if key not in self._inputs:
            self._inputs[key] = act, packing(act)
        return packing(delta), self._inputs[key][1], packing.counts

    def _packing(self, delta: Tensor, owner: Tensor) -> Packing:
        n = len(self._labelled)
        one_each = len(owner) == n and self._all and torch.equal(owner, torch.arange(n))
        alive = torch.ones(n, dtype=torch.bool) if one_each else _alive(delta).cpu()
        for other, others, packing in self._packings:
            if torch.equal(other, alive) and torch.equal(others, owner):
                return packing
        packing = Packing.of(alive, owner, self._labelled)
        self._packings.append((alive, owner, packing))
        return packing


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
