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
from imu_fast.factors.samples import Stored
from imu_fast.losses.output_curvature import StoredCurvature
from imu_fast.ops.tokens import cuts

# Elements of unfolded inputs that exist at once, but for one larger sample.
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Unfolding:
    """How a convolution of one, two or three axes reads its input.

    Attributes:
        kernel, stride, dilation: of each axis. sides: what is padded, as F.pad takes it; mode: how.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    sides: tuple[int, ...]
    mode: str = "constant"

    def windows(self, images: Tensor) -> Tensor:
        """[k, c, *sizes] to ``[k, *positions, c, *kernel]``, a view of the padded images."""
        x = F.pad(images, self.sides, self.mode) if any(self.sides) else images
        axes = list(zip(x.shape[2:], self.kernel, self.stride, self.dilation, strict=True))
        positions = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in axes]
        by_image, by_channel, *steps = x.stride()
        return x.as_strided(
            (len(x), *positions, x.shape[1], *self.kernel),
            (
                by_image,
                *(step * s for step, s in zip(steps, self.stride, strict=True)),
                by_channel,
                *(step * d for step, d in zip(steps, self.dilation, strict=True)),
            ),
            x.storage_offset(),
        )

    def rows(self, images: Tensor, chosen: Tensor, positions: Tensor) -> Tensor:
        """What the kernel sees at some places: [N, c * kernel].

        Args:
            chosen, positions: [N] int64, of the images and of what the kernel is at, row by row.
        """
        view = self.windows(images)
        axes = len(self.kernel)
        found = view[(chosen, *torch.unravel_index(positions, view.shape[1 : 1 + axes]))]
        return found.flatten(1)


@dataclass(frozen=True)
class UnfoldedFactors(Stored[GradientFactors]):
    """The gradients of n samples at a convolution's weight [C, c, *kernel], seen as [C, d].

    ``d = c * kernel``, in the order of ``weight.flatten(1)``. Everything that takes factors takes
    these; chunks are :class:`GradientFactors`.

    Attributes:
        delta: [N, C], the signal at positions that have one; float32 or float64.
        places: [N, 3] int64: of each, the input, the image in it, and the position.
        inputs: of the layer's calls, each [k, c, *sizes].
        offsets: [n + 1] int64; positions ``offsets[i]:offsets[i+1]`` belong to sample i.
        unfolding: how the layer reads them. has_bias: whether it has one. name: the layer's.
        curvature: signals of the Gauss-Newton matrix, where they were captured.
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
        """Samples in order, unfolded; at most ``max_tokens`` positions, or one larger sample."""
        if max_tokens is None:
            max_tokens = max(1, _CHUNK_ELEMENTS // self.feature_dim)
        check_count("max_tokens", max_tokens)
        for first, last in cuts(self.offsets, max_tokens):
            start, stop = int(self.offsets[first]), int(self.offsets[last])
            yield GradientFactors(
                self.delta[start:stop],
                self._unfolded(start, stop),
                self.offsets[first : last + 1] - start,
                self.has_bias,
                name=self.name,
                curvature=self._curvature(start, stop),
            )

    def _unfolded(self, start: int, stop: int) -> Tensor:
        out = self.delta.new_empty(stop - start, self.feature_dim)
        places = self.places[start:stop]
        for call in places[:, 0].unique().tolist():
            rows = torch.nonzero(places[:, 0] == call).flatten()
            _, chosen, positions = places[rows].unbind(1)
            low, high = int(chosen.min()), int(chosen.max()) + 1
            images = self.inputs[call][low:high].to(self.dtype)
            out[rows] = self.unfolding.rows(images, chosen - low, positions)
        return out
