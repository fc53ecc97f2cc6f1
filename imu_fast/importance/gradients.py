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

from imu_fast.ops.fisher_diagonal import fisher_diagonal
from imu_fast.ops.squared_products import add_squared_products

# Elements of a product's factor that are copied at once.
_COPIED_ELEMENTS = 1 << 22


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
        if m > 1 and self.left.device.type == "cpu":
            add_squared_products(total, self.left, self.right)
            return
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
        _, ids, sums = self.distinct(len(total))
        total.index_add_(0, ids, sums.square_())

    def distinct(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Samples and ids that go together, each pair once, and the sums of delta there.

        They are no more than the positions.
        """
        owner = torch.arange(self.n, device=self.ids.device)[:, None].expand_as(self.ids)
        valid = self.ids >= 0
        keys = owner[valid] * rows + self.ids[valid]
        distinct, place = keys.unique(return_inverse=True)
        sums = self.delta.new_zeros(len(distinct), self.delta.shape[-1])
        sums.index_add_(0, place, self.delta[valid])
        return distinct // rows, distinct % rows, sums


def joined_squares(parts: list[Gradients], total: Tensor) -> bool:
    """``total += sum_i (sum of the parts' g_i)^2`` of products and looked up rows, as one of each.

    Returns:
        Whether they were such; otherwise nothing is done.
    """
    products = [part for part in parts if isinstance(part, Product)]
    rows = [part for part in parts if isinstance(part, Rows)]
    if len(products) + len(rows) < len(parts):
        return False
    product = looked = None
    if products:
        lefts, rights = [part.left for part in products], [part.right for part in products]
        product = Product(_joined(lefts), _joined(rights))
    if rows:
        looked = Rows(_joined([part.ids for part in rows]), _joined([part.delta for part in rows]))
    if looked is None or product is None:
        for one in (looked, product):
            if one is not None:
                one.add_squares(total)
        return True
    # Few rows of a sample have both parts: they are summed before they are squared, and the product
    # goes without them.
    step = max(1, _COPIED_ELEMENTS // max(1, product.left[0].numel()))
    for first in range(0, looked.n, step):
        some = slice(first, first + step)
        owner, ids, sums = Rows(looked.ids[some], looked.delta[some]).distinct(len(total))
        left, right = product.left[some].clone(), product.right[some]
        both = left[owner, :, ids]  # [distinct, M]
        left[owner, :, ids] = 0
        Product(left, right).add_squares(total)
        counts = owner.bincount(minlength=len(left)).tolist()  # owners are in order
        cut = (value.split(counts) for value in (ids, sums, both))
        for mine, met, one, other in zip(*cut, right, strict=True):
            total.index_add_(0, mine, met.addmm(one, other).square_())
    return True


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)


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

    def add(self, sample: int, rows: slice, out: Tensor) -> None:
        out += self._whole(sample).flatten(1)[rows]

    def add_squares(self, total: Tensor) -> None:
        # What goes in is spread over the outputs; of a transposed convolution it is the outputs.
        inner, outer = (self.delta, self.input) if self.transposed else (self.input, self.delta)
        kernel = self.weight.shape[2:]
        found = patches(inner, kernel, self.stride, self.padding, self.dilation, outer.shape[2:])
        spatial = range(2, outer.dim())
        left = outer.unflatten(1, (self.groups, -1)).permute(1, 0, *(k + 1 for k in spatial), 2)
        right = found.unflatten(-len(kernel) - 1, (self.groups, -1)).movedim(-len(kernel) - 2, 0)
        for share, one, other in zip(
            total.unflatten(0, (self.groups, -1)), left, right, strict=True
        ):
            add_squared_products(share, one, other, len(kernel))

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


def patches(
    x: Tensor,
    kernel: torch.Size,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    places: torch.Size,
) -> Tensor:
    """What a kernel meets at each of its places, a view of x [n, c, ...] with its padding.

    Returns:
        [n, *places, c, *kernel].
    """
    x = F.pad(x, [side for p in reversed(padding) for side in (p, p)])
    first, channel, *steps = x.stride()
    moved = [step * s for step, s in zip(steps, stride, strict=True)]
    within = [step * d for step, d in zip(steps, dilation, strict=True)]
    shape = (len(x), *places, x.shape[1], *kernel)
    return x.as_strided(shape, (first, *moved, channel, *within))
