"""Rows of tokens, and batches of them that every door of the package takes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

# Rows that are run at once where nothing is trained.
_ROWS = 128


@dataclass(frozen=True)
class Sequences:
    """Rows for a causal model, each [n, T] int64, padded on the right.

    Attributes:
        ids: tokens. mask: 1 where there is one, 0 where there is padding.
        labels: the tokens that count, at their own places; -100 elsewhere.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Tensor | slice) -> Self:
        return type(self)(self.ids[rows], self.mask[rows], self.labels[rows])

    @classmethod
    def of(cls, ids: Tensor) -> Self:
        """Rows without padding, of which every token counts (the first is never predicted)."""
        return cls(ids, torch.ones_like(ids), ids)

    @classmethod
    def joined(cls, parts: Sequence[Sequences]) -> Self:
        """One after another; all of one length."""
        columns = zip(*((p.ids, p.mask, p.labels) for p in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))

    @property
    def targets(self) -> Tensor:
        """What each position but the last predicts: [n, T - 1], -100 where nothing."""
        return self.labels[:, 1:]

    def batch(self, rows: Tensor | slice = slice(None)) -> dict[str, Tensor]:
        """Some rows as a model of transformers takes them, without columns that are padding."""
        some = self[rows]
        used = slice(0, int(some.mask.sum(dim=1).max()))
        return {
            "input_ids": some.ids[:, used],
            "attention_mask": some.mask[:, used],
            "labels": some.labels[:, used],
        }

    def batches(self, size: int = _ROWS) -> list[dict[str, Tensor]]:
        """All of them, in order."""
        return [self.batch(slice(start, start + size)) for start in range(0, len(self), size)]

    def fingerprint(self) -> str:
        """SHA-256 of all that they hold, shortened."""
        found = hashlib.sha256()
        for tensor in (self.ids, self.mask, self.labels):
            found.update(repr(tuple(tensor.shape)).encode())
            found.update(tensor.contiguous().numpy().tobytes())
        return found.hexdigest()[:16]
