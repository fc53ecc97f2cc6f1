"""The GGN's diagonal class blocks: C damped Cholesky solves of size D, batched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from imu_fast.curvature.base import Fitted, Layer, Saved
from imu_fast.curvature.gauss_newton import (
    GaussNewton,
    signal_gradients,
    signals_of,
    warn_of_rounding,
)
from imu_fast.curvature.ggn.dense import class_blocks
from imu_fast.factors.chunked import pack_chunks, unpack_chunks
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.probabilities import augmented, output_curvature
from imu_fast.factors.source import Factors, Remembered
from imu_fast.factors.statistics import ggn_diagonal, trace
from imu_fast.ops.tokens import sum_over_tokens
from imu_fast.options import options
from imu_fast.solvers.cholesky.cholesky import DampedCholesky, damped_cholesky

# Elements of the [classes, D, D] float64 factors that exist at once: 1 GB.
_BLOCK_ELEMENTS = 1 << 27


@options
class GGNBlock(GaussNewton):
    """The GGN's class blocks alone: ``1/n sum_t B_t[c, c] a~ a~^T + lam I`` for class c.

    B_t is the second derivative of a sample's loss in the outputs: of cross-entropy
    ``B[c, c] = p_c (1 - p_c)``, over the sample's number of tokens. At an inner layer a block is
    ``1/n sum_ik g_ik[c] g_ik[c]^T`` over its signals' gradients, rows that meet later included.

    Attributes:
        damping, damping_mode: of lam: see :class:`Damped`.
        fisher: over whose labels: see :class:`imu_fast.curvature.gauss_newton.GaussNewton`.
    """

    name = "ggn_block"

    def fit(self, factors: Factors) -> FittedGGNBlock:
        """The blocks are made where they are first needed.

        Raises:
            InputError: the factors have no curvature of their loss; lam relative to a mean that is
                zero or not finite.
        """
        factors = self.expected(factors)
        lam = self.absolute(factors, lambda: trace(factors))
        if (found := signals_of(factors)) is not None:
            # A block's rank is at most n K, and so its largest eigenvalue at least its trace by it.
            rank = factors.n * found.s.shape[1]
            if rank < factors.width:
                largest = trace(factors) / (factors.num_classes * rank)
                warn_of_rounding(self.name, factors, lam, largest, 0.0)
        return FittedGGNBlock(factors, lam)


class FittedGGNBlock(Fitted):
    """C damped Cholesky factors [D, D], in float64.

    Memory: all C factors where they fit into a gigabyte; else they are made anew, slab of classes
    by slab, for each call.

    Attributes:
        residual: relative residual of the last solve, recomputed (the largest of several).
    """

    def __init__(self, source: Factors, damping: float) -> None:
        super().__init__(GGNBlock.name, Layer.of(source), damping)
        self._source = source
        self._tokens = Remembered(self._weigh)
        self._signals = signals_of(source) is not None
        self._kept: list[tuple[slice, DampedCholesky]] | None = None
        for chunk in source.chunks() if not self._signals else ():  # refused before any work
            self._tokens(chunk)
            break

    @property
    def reads(self) -> Factors:
        """Those that M is of."""
        return self._source

    def _weigh(self, chunk: GradientFactors) -> tuple[Tensor, Tensor]:
        """``B_t[c, c] / n`` [N, C] and a~ [N, D]."""
        variance = output_curvature(chunk).diagonal().div_(self._source.n)
        return variance, augmented(chunk.act, chunk.has_bias)

    def _blocks(self, slab: slice) -> Tensor:
        """Undamped: [classes, D, D]."""
        width = (self._source.width, self._source.width)

        def blocks(chunk: GradientFactors) -> Tensor:
            if self._signals:
                out = chunk.act.new_zeros(slab.stop - slab.start, *width, dtype=torch.float64)
                for g in signal_gradients(chunk):
                    out.baddbmm_(g[:, slab].permute(1, 2, 0), g[:, slab].transpose(0, 1))
                return out.div_(self._source.n)
            variance, a = self._tokens(chunk)
            return class_blocks(variance[:, slab], a)

        return self._source.sums(blocks)

    def _factors(self) -> Iterator[tuple[slice, DampedCholesky]]:
        """Cholesky factors [classes, D, D], slab of classes by slab."""
        if self._kept is not None:
            yield from self._kept
            return
        classes = self._source.num_classes
        step = max(1, _BLOCK_ELEMENTS // self._source.width**2)
        kept = []
        for start in range(0, classes, step):
            slab = slice(start, min(start + step, classes))
            pair = (slab, damped_cholesky(self._blocks(slab), self.damping, overwrite=True))
            if step >= classes:
                kept.append(pair)
            yield pair
        self._kept = kept or None

    def _product(self, v: Tensor) -> Tensor:
        many = (v if v.dim() == 3 else v[None]).double()

        def products(chunk: GradientFactors) -> Tensor:
            if self._signals:
                found = torch.zeros_like(many)
                for g in signal_gradients(chunk):
                    inner = torch.einsum("ncd,mcd->nmc", g, many)
                    found += torch.einsum("nmc,ncd->mcd", inner, g)
                return found.div_(self._source.n)
            variance, a = self._tokens(chunk)
            found = torch.empty_like(many)
            for one, rhs in zip(found, many, strict=True):
                torch.mm((a @ rhs.T).mul_(variance).T, a, out=one)
            return found

        out = self._source.sums(products).add_(many, alpha=self.damping)
        return out.view_as(v)

    def _solve(self, v: Tensor, out: Tensor | None) -> Tensor:
        v = v.double()
        many = v if v.dim() == 3 else v[None]
        x = torch.empty_like(many)
        for slab, factor in self._factors():
            x[:, slab] = factor.solve(many[:, slab].permute(1, 2, 0)).permute(2, 0, 1)
        errors = (many - self._product(x)).flatten(1).norm(dim=1)
        sizes = many.flatten(1).norm(dim=1)
        self.residual = float((errors / sizes.where(sizes > 0, 1.0)).max())
        return x if v.dim() == 3 else x[0]

    def _diagonal(self) -> Tensor:
        return ggn_diagonal(self._source).add_(self.damping)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return pack_chunks(self._source, "curvature='ggn_block'")

    @classmethod
    def _restored(cls, saved: Saved) -> Self:
        source = unpack_chunks(saved.tensors, saved.options, saved.layer.device)
        return cls(source, saved.damping)

    def _self_influence(self, factors: Factors) -> Tensor:
        """``g_i^T M^-1 g_i``: [n], the sum over classes of [n, D] quadratic forms."""
        total: Tensor | None = None
        for slab, factor in self._factors():
            found = factors.each(_quadratic_forms(slab, factor))
            total = found if total is None else total.add_(found)
        assert total is not None
        return total.to(factors.dtype)


def _quadratic_forms(slab: slice, factor: DampedCholesky) -> Callable[[GradientFactors], Tensor]:
    """``sum_c g_i[c]^T M_c^-1 g_i[c]`` over a slab of classes: [n], float64."""

    def forms(chunk: GradientFactors) -> Tensor:
        a = augmented(chunk.act, chunk.has_bias)
        out = a.new_zeros(chunk.n)
        for c in range(slab.start, slab.stop):
            one = replace(factor, factor=factor.factor[c - slab.start], matrix=None)
            g = sum_over_tokens(a * chunk.delta[:, c, None].double(), chunk.offsets)
            out += (one.solve(g.T).T * g).sum(dim=1)
        return out

    return forms
