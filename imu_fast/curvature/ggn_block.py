"""The GGN's diagonal class blocks: C damped Cholesky solves of size D, batched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from imu_fast.curvature.base import Curvature, Fitted
from imu_fast.errors import check_positive
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.probabilities import augmented, probabilities
from imu_fast.ops.tokens import sum_over_tokens
from imu_fast.options import option, options
from imu_fast.solvers.cholesky.cholesky import DampedCholesky, damped_cholesky

# Elements of the [classes, D, D] float64 factors that exist at once: 1 GB.
_BLOCK_ELEMENTS = 1 << 27


@options
class GGNBlock(Curvature):
    """The GGN's class blocks alone: ``1/n sum_t c_t p_c (1 - p_c) a~ a~^T + lam I`` for class c.

    Attributes:
        damping: lam > 0, in units of squared gradients.
    """

    name = "ggn_block"
    damping: float = option(default=1e-2, check=check_positive)

    def fit(self, factors: GradientFactors) -> FittedGGNBlock:
        """Of a softmax head; the blocks are made where they are first needed.

        Raises:
            InputError: not a softmax head.
        """
        p, scale = probabilities(factors)
        variance = p * (1 - p) * (scale / factors.n)[:, None]
        # 1 - p cancels to a tiny negative number where p rounds above one.
        a = augmented(factors.act, factors.has_bias)
        return FittedGGNBlock(variance.clamp_min(0), a, self.damping)


class FittedGGNBlock(Fitted):
    """C damped Cholesky factors [D, D], in float64.

    Memory: all C factors where they fit into a gigabyte; else they are made anew, slab of classes
    by slab, for each call.

    Attributes:
        residual: relative residual of the last solve, recomputed (the largest of several).
    """

    def __init__(self, variance: Tensor, a: Tensor, damping: float) -> None:
        self._variance, self._a, self.damping = variance, a, damping
        self._kept: list[tuple[slice, DampedCholesky]] | None = None

    def _factors(self) -> Iterator[tuple[slice, DampedCholesky]]:
        """Cholesky factors [classes, D, D], slab of classes by slab."""
        if self._kept is not None:
            yield from self._kept
            return
        width, classes = self._a.shape[1], self._variance.shape[1]
        step = max(1, _BLOCK_ELEMENTS // width**2)
        kept = []
        for start in range(0, classes, step):
            slab = slice(start, min(start + step, classes))
            blocks = self._a.new_empty(slab.stop - start, width, width)
            for block, weight in zip(blocks, self._variance[:, slab].T, strict=True):
                torch.matmul((self._a * weight[:, None]).T, self._a, out=block)
            pair = (slab, damped_cholesky(blocks, self.damping, overwrite=True))
            if step >= classes:
                kept.append(pair)
            yield pair
        self._kept = kept or None

    def product(self, v: Tensor) -> Tensor:
        """``M v``; v [C, D] or [m, C, D], in v's dtype."""
        many = (v if v.dim() == 3 else v[None]).double()
        out = many * self.damping
        for one, rhs in zip(out, many, strict=True):
            s = (self._a @ rhs.T).mul_(self._variance)
            one.addmm_(s.T, self._a)
        return out.view_as(v).to(v.dtype)

    def solve(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """``X = M^-1 v``; v [C, D] or [m, C, D]. X is float64 (``out`` is not used)."""
        v = v.double()
        many = v if v.dim() == 3 else v[None]
        x = torch.empty_like(many)
        for slab, factor in self._factors():
            x[:, slab] = factor.solve(many[:, slab].permute(1, 2, 0)).permute(2, 0, 1)
        errors = [(self.product(one) - rhs).norm() for one, rhs in zip(x, many, strict=True)]
        sizes = [rhs.norm() for rhs in many]
        self.residual = max(
            float(e / s) if s > 0 else 0.0 for e, s in zip(errors, sizes, strict=True)
        )
        return x if v.dim() == 3 else x[0]

    def self_influence(self, factors: GradientFactors) -> Tensor:
        """``g_i^T M^-1 g_i``: [n], the sum over classes of [n, D] quadratic forms."""
        a = augmented(factors.act, factors.has_bias)
        out = a.new_zeros(factors.n)
        for slab, factor in self._factors():
            for c in range(slab.start, slab.stop):
                one = replace(factor, factor=factor.factor[c - slab.start], matrix=None)
                g = sum_over_tokens(a * factors.delta[:, c, None].double(), factors.offsets)
                out += (one.solve(g.T).T * g).sum(dim=1)
        return out.to(factors.delta)
