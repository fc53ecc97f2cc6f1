"""Factors of a convolution: its inputs are kept as they are, and unfolded some samples at a time.

A weight of kernel ``kh x kw`` sees every input at up to ``kh kw`` places, so that unfolded inputs
would take as many times the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from imu_fast.errors import InputError, check_count
from imu_fast.factors.gradient_factors import GradientFactors, check_offsets
from imu_fast.factors.grouped import Tokens, by_column, by_group
from imu_fast.factors.operands import input_dtype
from imu_fast.factors.samples import Stored
from imu_fast.losses.output_curvature import StoredCurvature
from imu_fast.losses.signals import GroupedRows
from imu_fast.ops.tokens import cuts

# Elements of unfolded inputs that exist at once, but for one larger sample.
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Unfolding:
    """How a convolution of one, two or three axes reads its input.

    A transposed one is a plain one that reads an input whose elements are set apart, by a kernel
    that is turned round (Dumoulin and Visin 2016).

    Attributes:
        kernel, stride, dilation: of each axis. sides: what is padded, as F.pad takes it; mode: how.
        apart: of a transposed one, how far apart its elements are set; empty: it is a plain one.
        groups: G; each sees its own share of the channels.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    sides: tuple[int, ...]
    mode: str = "constant"
    apart: tuple[int, ...] = ()
    groups: int = 1

    def grid(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """At how many positions of each axis the kernel meets an image of these sizes."""
        apart = self.apart or (1,) * len(self.kernel)
        before, after = self.sides[-2::-2], self.sides[::-2]
        padded = [
            (size - 1) * a + 1 + low + high
            for size, a, low, high in zip(sizes, apart, before, after, strict=True)
        ]
        axes = zip(padded, self.kernel, self.stride, self.dilation, strict=True)
        return tuple((size - d * (k - 1) - 1) // s + 1 for size, k, s, d in axes)

    def windows(self, images: Tensor) -> Tensor:
        """[k, c, *sizes] to ``[k, *positions, c, *kernel]``, a view of the padded images.

        The kernel of a transposed one is as it reads: turned round.
        """
        x = self._set_apart(images) if any(a > 1 for a in self.apart) else images
        x = F.pad(x, self.sides, self.mode) if any(self.sides) else x
        by_image, by_channel, *steps = x.stride()
        return x.as_strided(
            (len(x), *self.grid(images.shape[2:]), x.shape[1], *self.kernel),
            (
                by_image,
                *(step * s for step, s in zip(steps, self.stride, strict=True)),
                by_channel,
                *(step * d for step, d in zip(steps, self.dilation, strict=True)),
            ),
            x.storage_offset(),
        )

    def every(self, images: Tensor, grid: Sequence[int]) -> Tensor:
        """What the kernel sees at the first ``grid`` positions: [k, positions, c * kernel]."""
        places: list[slice] = [slice(size) for size in grid]
        view, axes = self.windows(images)[(slice(None), *places)], len(self.kernel)
        return self._turned(view).flatten(1 + axes).flatten(1, axes)

    def rows(self, images: Tensor, chosen: Tensor, positions: Tensor) -> Tensor:
        """What the kernel sees at some places: [N, c * kernel].

        Args:
            chosen, positions: [N] int64, of the images and of what the kernel is at, row by row.
        """
        view = self.windows(images)
        axes = len(self.kernel)
        found = view[(chosen, *torch.unravel_index(positions, view.shape[1 : 1 + axes]))]
        return self._turned(found).flatten(1)

    def _set_apart(self, images: Tensor) -> Tensor:
        sizes = [(s - 1) * a + 1 for s, a in zip(images.shape[2:], self.apart, strict=True)]
        out = images.new_zeros(*images.shape[:2], *sizes)
        axes: list[slice] = [slice(None, None, a) for a in self.apart]
        out[(slice(None), slice(None), *axes)] = images
        return out

    def _turned(self, seen: Tensor) -> Tensor:
        """[..., *kernel] in the order of the weight."""
        return seen.flip(tuple(range(-len(self.kernel), 0))) if self.apart else seen


@dataclass(frozen=True)
class UnfoldedFactors(Stored[GradientFactors]):
    """The gradients of n samples at a convolution's weight [C, c, *kernel], seen as [C, d].

    ``d = c * kernel``, in the order of ``weight.flatten(1)``; with G groups c is what each output
    sees, a G-th of the input's channels. A transposed convolution, whose weight is [G c, C / G,
    *kernel], is seen so too: [C, c, *kernel], flattened. Everything that takes factors takes these;
    chunks are :class:`GradientFactors`.

    Attributes:
        delta: [P, C], the signal at positions that have one; float32 or float64.
        places: [P, 3] int64: of each, the input, the image in it, and the position; -1 of a row
            of zeros.
        inputs: of the layer's calls, each [k, G c, *sizes]; half precision as it came.
        offsets: [n + 1] int64; positions ``offsets[i]:offsets[i+1]`` belong to sample i.
        unfolding: how the layer reads them. feature_dim: d. has_bias: whether it has one. name: the
            layer's.
        curvature: signals of the Gauss-Newton matrix, where they were captured; of one group.
    """

    delta: Tensor
    places: Tensor
    inputs: Sequence[Tensor]
    offsets: Tensor
    unfolding: Unfolding
    feature_dim: int
    has_bias: bool
    name: str
    curvature: StoredCurvature | None = None

    def __post_init__(self) -> None:
        check_offsets(self.offsets, len(self.delta))
        if self.places.shape != (len(self.delta), 3):
            raise InputError(
                f"places has shape {tuple(self.places.shape)}; expected ({len(self.delta)}, 3)"
            )

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.delta.nbytes + self.places.nbytes + sum(x.nbytes for x in self.inputs)

    @property
    def num_tokens(self) -> int:
        """N, tokens of all chunks: positions, where there is one group."""
        return int(self._tokens()[-1])

    def samples(self, first: int, last: int) -> UnfoldedFactors:
        """Samples first:last as views; inputs of all of them stay."""
        start, stop = int(self.offsets[first]), int(self.offsets[last])
        return replace(
            self,
            delta=self.delta[start:stop],
            places=self.places[start:stop],
            offsets=self.offsets[first : last + 1] - start,
            curvature=self._curvature(start, stop),
        )

    def _curvature(self, start: int, stop: int) -> StoredCurvature | None:
        kept = self.curvature
        return None if kept is None else kept.map(lambda x: x[start:stop])

    def chunks(self, max_tokens: int | None = None) -> Iterator[GradientFactors]:
        """Samples in order, unfolded; at most ``max_tokens`` tokens, or one larger sample.

        Tokens are positions; with several groups one for each group of a position, or for each
        column of a sample's gradient, whichever are fewer.
        """
        if max_tokens is not None:
            check_count("max_tokens", max_tokens)
        tokens = self._tokens()
        for first, last in cuts(self.offsets, self._positions_at_once):
            for a, b in cuts(
                tokens[first : last + 1] - tokens[first], max_tokens or max(1, int(tokens[-1]))
            ):
                yield self._chunk(first + a, first + b)

    @property
    def columns_are_smaller(self) -> bool:
        """Whether :meth:`by_columns` takes fewer elements, and there are several groups."""
        held = self.delta.numel() + sum(x.numel() for x in self.inputs)
        columns = self.n * self.width * (self.num_classes + self.feature_dim)
        return self._groups > 1 and columns <= held

    def by_columns(self) -> GradientFactors:
        """The same in memory, with a token for each column of a sample's gradient."""
        found = [
            self._factors(*self._by_column(first, last))
            for first, last in cuts(self.offsets, self._positions_at_once)
        ]
        counts = torch.cat([one.offsets.diff() for one in found])
        return self._factors(
            torch.cat([one.delta for one in found]),
            torch.cat([one.act for one in found]),
            torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        )

    @property
    def _groups(self) -> int:
        return self.unfolding.groups

    @property
    def _has_fewer_columns(self) -> bool:
        """Whether samples have fewer columns than positions, counted once for each group."""
        groups = self._groups
        return groups > 1 and self.n * self.width <= len(self.delta) * groups

    @property
    def _positions_at_once(self) -> int:
        groups, each = self._groups, self.feature_dim
        if groups > 1 and not self._has_fewer_columns:
            each += self.num_classes
        return max(1, _CHUNK_ELEMENTS // (groups * each))

    def _tokens(self) -> Tensor:
        """Of each sample, as offsets [n + 1]."""
        if not self._has_fewer_columns:
            return self.offsets * self._groups
        counts = (self.offsets.diff() > 0).long() * self.width
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    def _chunk(self, first: int, last: int) -> GradientFactors:
        if self._has_fewer_columns:
            return self._factors(*self._by_column(first, last))
        delta, act, offsets = self._positions(first, last)
        if self._groups > 1:
            return self._factors(*by_group(delta, act, offsets, self._groups))
        start, stop = int(self.offsets[first]), int(self.offsets[last])
        found = self._factors(delta, act, offsets)
        return replace(found, curvature=self._curvature(start, stop))

    def _factors(self, delta: Tensor, act: Tensor, offsets: Tensor) -> GradientFactors:
        several = GroupedRows() if self._groups > 1 else None
        return GradientFactors(
            delta, act, offsets, self.has_bias, name=self.name, curvature=several
        )

    def _by_column(self, first: int, last: int) -> Tokens:
        return by_column(*self._positions(first, last), self._groups, self.has_bias)

    def _positions(self, first: int, last: int) -> Tokens:
        """Of some samples: delta [P, C], act [P, G d] and offsets."""
        start, stop = int(self.offsets[first]), int(self.offsets[last])
        return (
            self.delta[start:stop],
            self._unfolded(start, stop),
            self.offsets[first : last + 1] - start,
        )

    def _unfolded(self, start: int, stop: int) -> Tensor:
        kept = input_dtype(self.inputs[0].dtype, self.dtype) if self.inputs else self.dtype
        size = stop - start, self._groups * self.feature_dim
        out = self.delta.new_zeros(size, dtype=kept)
        places = self.places[start:stop]
        for call in places[:, 0].unique().tolist() if self.inputs else []:
            if call < 0:
                continue
            rows = torch.nonzero(places[:, 0] == call).flatten()
            _, chosen, positions = places[rows].unbind(1)
            low, high = int(chosen.min()), int(chosen.max()) + 1
            images = self.inputs[call][low:high].to(kept)
            out[rows] = self.unfolding.rows(images, chosen - low, positions)
        return out
