"""Per-sample gradients at one use of a tensor, as what they are made of, and their squares.

Of a tensor [R, ...] all of them speak as of a matrix [R, K]. None holds [n, R, K] where that is
more than the activations that it comes from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from imu_fast.ops.fisher_diagonal import add_squared_products, fisher_diagonal

# Elements of what is unfolded, or gathered, at once.
_CHUNK_ELEMENTS = 1 << 22


def matrix_shape(tensor: Tensor) -> tuple[int, int]:
    """[R, K] of a tensor of any shape."""
    if tensor.dim() == 0:
        return 1, 1
    rows = tensor.shape[0]
    return rows, tensor.numel() // max(1, rows)


def wide(tensor: Tensor) -> Tensor:
    """In float32, or float64 where it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class Gradients(ABC):
    """Gradients of n samples in one tensor, at one of its uses."""

    n: int

    @abstractmethod
    def add(self, sample: int, rows: slice, out: Tensor) -> None:
        """Add one sample's gradient in some rows of [R, K] to ``out``."""

    def put(self, sample: int, rows: slice, out: Tensor) -> None:
        """The same in the place of what ``out`` held."""
        self.add(sample, rows, out.zero_())

    @abstractmethod
    def add_squares(self, total: Tensor) -> None:
        """Add ``sum_i g_i * g_i`` to ``total`` [R, K]."""


@dataclass
class Product(Gradients):
    """``g_i = left_i^T right_i``: left [n, M, R], right [n, M, K]."""

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        self.n = len(self.left)

    def add(self, sample: int, rows: slice, out: Tensor) -> None:
        out.addmm_(self.left[sample, :, rows].t(), self.right[sample])

    def put(self, sample: int, rows: slice, out: Tensor) -> None:
        torch.mm(self.left[sample, :, rows].t(), self.right[sample], out=out)

    def add_squares(self, total: Tensor) -> None:
        n, m, _ = self.left.shape
        left, right = self.left.flatten(0, 1), self.right.flatten(0, 1)
        total += fisher_diagonal(left, right, torch.arange(n + 1) * m, False).mul_(n)


@dataclass
class Dense(Gradients):
    """As they are: values [n, ...].

    Attributes:
        shape: of the tensor, where a sample's gradient is zero but for a part of it.
        part: that part, of a tensor of this shape and a sample.
    """

    values: Tensor
    shape: torch.Size | None = None
    part: Callable[[Tensor, int], Tensor] | None = None

    def __post_init__(self) -> None:
        self.n = len(self.values)

    def whole(self, sample: int) -> Tensor:
        """One sample's, in the tensor's shape."""
        if self.part is None or self.shape is None:
            return self.values[sample]
        out = self.values.new_zeros(self.shape)
        self.part(out, sample).copy_(self.values[sample])
        return out

    def add(self, sample: int, rows: slice, out: Tensor) -> None:
        start, stop, _ = rows.indices(1 << 62)
        whole = self.whole(sample)
        out += whole.reshape(whole.shape[0] if whole.dim() else 1, -1)[start:stop]

    def add_squares(self, total: Tensor) -> None:
        if self.part is None:
            total += self.values.square().sum(dim=0).view_as(total)
            return
        for i in range(self.n):
            total += self.whole(i).square_().view_as(total)


@dataclass
class Rows(Gradients):
    """Rows that were looked up: ids [n, M] int64, delta [n, M, K]; negative ids: no gradient."""

    ids: Tensor
    delta: Tensor

    def __post_init__(self) -> None:
        self.n = len(self.ids)

    def add(self, sample: int, rows: slice, out: Tensor) -> None:
        start, stop, _ = rows.indices(1 << 62)
        ids = self.ids[sample]
        inside = torch.nonzero((ids >= start) & (ids < min(stop, start + len(out)))).flatten()
        if len(inside):
            out.index_add_(0, ids[inside] - start, self.delta[sample, inside])

    def add_squares(self, total: Tensor) -> None:
        """Over the distinct ``(sample, id)``, which are no more than the positions."""
        owner = torch.arange(self.n, device=self.ids.device)[:, None].expand_as(self.ids)
        valid = self.ids >= 0
        keys = owner[valid] * len(total) + self.ids[valid]
        distinct, place = keys.unique(return_inverse=True)
        sums = self.delta.new_zeros(len(distinct), self.delta.shape[-1])
        sums.index_add_(0, place, self.delta[valid])
        total.index_add_(0, distinct % len(total), sums.square_())


@dataclass
class Convolved(Gradients):
    """Of a convolution's weight [C, c, *kernel]: input [n, c * groups, ...], delta [n, C, ...].

    Attributes:
        weight: for its shape. options: stride, padding, dilation, each a tuple.
    """

    weight: Tensor
    input: Tensor
    delta: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.n = len(self.input)
        self._unfolds = not self.transposed and self.weight.dim() <= 4

    def add(self, sample: int, rows: slice, out: Tensor) -> None:
        out += self._whole(sample).flatten(1)[rows]

    def add_squares(self, total: Tensor) -> None:
        if not self._unfolds:
            for i in range(self.n):
                g = self._whole(i).view_as(total)
                total.addcmul_(g, g)
            return
        groups, delta = self.groups, self.delta.flatten(2)
        sizes = total.numel() // len(total) * groups * delta.shape[-1]
        step = max(1, _CHUNK_ELEMENTS // max(1, sizes))
        for first in range(0, self.n, step):
            chosen = slice(first, first + step)
            unfolded = self.unfolded(self.input[chosen]).unflatten(1, (groups, -1))
            signal = delta[chosen].unflatten(1, (groups, -1))
            for group, share in enumerate(total.unflatten(0, (groups, -1))):
                add_squared_products(share, signal[:, group], unfolded[:, group].transpose(1, 2))

    def unfolded(self, x: Tensor) -> Tensor:
        """Patches [k, c * groups * kernel, positions] of inputs [k, c * groups, ...]."""
        return unfold(x, self.weight.shape[2:], self.stride, self.padding, self.dilation)

    def _whole(self, sample: int) -> Tensor:
        one = slice(sample, sample + 1)
        spatial = self.weight.dim() - 2
        found: Any = torch.ops.aten.convolution_backward(
            self.delta[one],
            self.input[one],
            self.weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding or (0,) * spatial,
            self.groups,
            [False, True, False],
        )
        return found[1]


def unfold(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """Patches of [k, c, length] or [k, c, height, width]: [k, c * kernel, positions]."""
    if len(kernel) == 1:
        x = x.unsqueeze(2)
        kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
        padding = (0, *padding)
    return F.unfold(x, kernel, dilation, padding, stride)
