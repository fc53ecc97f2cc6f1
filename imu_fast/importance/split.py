"""A batched tensor cut into its samples, and the test that the cut is right.

Losses of samples are separate, so with every sample's loss weighted by ``2^k_i`` what belongs to
sample i in a gradient is exactly ``2^k_i`` times what it was. A layout is believed where the sums
over what it gives to each sample are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imu_fast.model.rows import Layout, layouts, levels_of


def by_sample(tensor: Tensor, layout: Layout | None, n: int) -> Tensor:
    """``[n, *tensor.shape]`` as a view where it can be, the layout's axis with m places a sample.

    Args:
        layout: along which axis samples lie, and how; None: all of it is the one sample's.
    """
    if layout is None:
        return tensor[None]
    axis, size = layout.dim, tensor.shape[layout.dim]
    if layout.kind == "batch":
        return tensor.movedim(axis, 0).unsqueeze(axis + 1)
    if layout.kind == "sample by sample":
        return tensor.unflatten(axis, (n, size // n)).movedim(axis, 0)
    return tensor.unflatten(axis, (size // n, n)).movedim(axis + 1, 0)


def part_of(tensor: Tensor, layout: Layout | None, n: int, sample: int) -> Tensor:
    """One sample's share of a tensor that holds all of them, as a view."""
    return by_sample(tensor, layout, n)[sample]


def possible(shape: torch.Size, axes: Sequence[int], n: int) -> list[Layout]:
    """The layouts that a gradient's shape allows."""
    return [
        layout
        for layout in layouts(len(shape))
        if layout.dim in axes and layout.owners(shape[: layout.dim + 1], n) is not None
    ]


def digest(gradient: Tensor, layout: Layout, n: int) -> Tensor:
    """The sum of magnitudes of each sample's share: [n], float32 or float64."""
    shares = by_sample(gradient, layout, n).flatten(1).abs()
    wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    return shares.sum(dim=1, dtype=wide)


class Codes:
    """Powers of two, one for each sample, that tell samples apart."""

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        levels, low = levels_of(dtype)
        generator = torch.Generator().manual_seed(n)
        if n <= levels:
            code = torch.randperm(n, generator=generator)
        else:
            code = torch.randint(levels, (n,), generator=generator)
        self.weights = torch.exp2((code + low).double())
        self._eps = torch.finfo(dtype).eps

    def fit(self, plain: Tensor, coded: Tensor) -> bool:
        """Whether what was coded is each sample's own: digests [n] without and with weights."""
        expected = plain.double() * self.weights.to(plain.device, torch.float64)
        # Passes whose sums run in another order each time (atomics) differ by rounding.
        return bool(((coded.double() - expected).abs() <= self._eps**0.5 * expected).all())
