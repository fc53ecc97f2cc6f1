"""Factors in memory as the chunks that they came in, so that sums over them have the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from imu_fast.errors import InputError
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.packed import packed, unpacked
from imu_fast.factors.protocol import is_shared
from imu_fast.factors.source import MAX_GATHERED, Factors
from imu_fast.factors.sums import S, joined, summed
from imu_fast.losses.base import Loss
from imu_fast.losses.named import LOSSES


class ChunkedFactors:
    """One layer's samples, chunk after chunk; at least one chunk."""

    def __init__(self, chunks: Sequence[GradientFactors]) -> None:
        self._chunks = list(chunks)
        first = self._chunks[0]
        self.n = self.n_here = sum(chunk.n for chunk in self._chunks)
        self.num_tokens = sum(chunk.num_tokens for chunk in self._chunks)
        self.num_classes, self.feature_dim = first.num_classes, first.feature_dim
        self.width, self.has_bias, self.name = first.width, first.has_bias, first.name
        self.device, self.dtype = first.device, first.dtype

    @property
    def losses(self) -> Tensor | None:
        """Each sample's loss [n], where it is known."""
        there = [chunk.losses for chunk in self._chunks if chunk.losses is not None]
        return torch.cat(there) if len(there) == len(self._chunks) else None

    def chunks(self, max_tokens: int | None = None) -> Iterator[GradientFactors]:
        """As they are, or cut further."""
        for chunk in self._chunks:
            yield from chunk.chunks(max_tokens)

    def sums(self, statistic: Callable[[GradientFactors], S]) -> S:
        """See :class:`imu_fast.factors.source.Factors`."""
        return summed(map(statistic, self.chunks()))

    def each(self, statistic: Callable[[GradientFactors], Tensor]) -> Tensor:
        """See :class:`imu_fast.factors.source.Factors`."""
        return joined(map(statistic, self.chunks()))


def _named(loss: Loss) -> bool:
    return loss.name in set(LOSSES) and type(LOSSES[loss.name]) is type(loss)


def pack_chunks(source: Factors, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a file holds of them; :func:`unpack_chunks` is its inverse.

    Args:
        what: holds them, for the message.

    Raises:
        InputError: they are shared among processes, beyond MAX_GATHERED bytes, or their loss is
            none that can be named in a file.
    """
    if is_shared(source):
        raise InputError(
            f"{what} holds its samples, which are shared among processes ({source.n_here} of "
            f"{source.n} are here); fit it on factors.gathered(), or save 'fisher_diag' or 'kfac'"
        )
    size = source.num_tokens * (source.num_classes + source.feature_dim) * source.dtype.itemsize
    if size > MAX_GATHERED:
        raise InputError(
            f"{what} holds its samples' factors, which are {size / 1e9:.1f} GB, more than "
            f"{MAX_GATHERED / 1e9:.1f}; save 'fisher_diag' or 'kfac', or fit fewer samples"
        )
    tensors: dict[str, Tensor] = {}
    texts: list[dict[str, str]] = []
    for i, chunk in enumerate(source.chunks()):
        if chunk.loss is not None and not _named(chunk.loss):
            raise InputError(
                f"{what} holds samples of loss={chunk.loss!r}, which no file can name; pass their "
                "curvature= beside delta, without the loss"
            )
        own, text = packed(chunk)
        tensors |= {f"{i}.{key}": value for key, value in own.items()}
        texts.append(text)
    return tensors, {"chunks": json.dumps(texts)}


def unpack_chunks(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], device: torch.device
) -> Factors:
    """The chunks that were packed, on this device."""
    found = []
    for i, text in enumerate(json.loads(metadata["chunks"])):
        own = {
            key.removeprefix(f"{i}."): value if key.endswith(".offsets") else value.to(device)
            for key, value in tensors.items()
            if key.startswith(f"{i}.")
        }
        found.append(unpacked(GradientFactors, own, text))
    return found[0] if len(found) == 1 else ChunkedFactors(found)
