"""What a curvature is and what comes of fitting it; single samples without a closed form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.ops.bilinear_scores import bilinear_scores
from imu_fast.options import Options


class Curvature(Options, ABC):
    """A matrix M [P, P] over the parameters of a linear layer, P = C D, damped: what to fit."""

    @abstractmethod
    def fit(self, factors: GradientFactors) -> Fitted:
        """M of these samples.

        Raises:
            InputError: the factors lack what M is made of, or M is too large to be held.
        """


class Fitted(ABC):
    """M of some samples. ``M @ v`` is :meth:`product`.

    Attributes:
        residual: relative residual ``||M X - v|| / ||v||`` of the last solve, the largest where
            there were several right-hand sides; 0.0 where the solve is elementwise.
    """

    residual: float = 0.0

    @abstractmethod
    def product(self, v: Tensor) -> Tensor:
        """``M v``; v [C, D] or [m, C, D]; in v's dtype."""

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.product(v)

    @abstractmethod
    def solve(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """``X = M^-1 v``; v and X [C, D], or [m, C, D].

        X is in v's dtype where the solve is elementwise, and there ``out`` may be v itself, which
        saves memory; else X is float64 and ``out`` is not used.
        """

    @abstractmethod
    def self_influence(self, factors: GradientFactors) -> Tensor:
        """``g_i^T M^-1 g_i`` of every sample of ``factors``: [n]."""

    def pairwise(self, factors: GradientFactors, queries: GradientFactors) -> Tensor:
        """``g_i^T M^-1 h_j`` of the samples of both sets: [n, m]; by one solve per query.

        ``residual`` is the largest of them.
        """
        out, worst = factors.delta.new_empty(factors.n, queries.n), 0.0
        for columns, h in gradient_slabs(queries):
            x = self.solve(h).to(factors.delta)
            out[:, columns] = bilinear_scores(
                factors.delta, factors.act, x, factors.offsets, factors.has_bias
            )
            worst = max(worst, self.residual)
        self.residual = worst
        return out


# Elements of the per-sample gradients [k, C, D] that exist at once: 128 MB in float64.
_ELEMENTS = 1 << 24


def gradients(factors: GradientFactors) -> Tensor:
    """Per-sample gradients [n, C, D]."""
    if not factors.is_flat:
        # A sample's own gradient: the mean over a set of one.
        rows = [factors.select(torch.tensor([i])).mean_gradient() for i in range(factors.n)]
        return torch.stack(rows)
    out = factors.delta.new_empty(factors.n, factors.num_classes, factors.width)
    d = factors.feature_dim
    torch.mul(factors.delta[:, :, None], factors.act[:, None, :], out=out[..., :d])
    if factors.has_bias:
        out[..., d] = factors.delta
    return out


def gradient_slabs(
    factors: GradientFactors, elements: int = _ELEMENTS
) -> Iterator[tuple[slice, Tensor]]:
    """Per-sample gradients ``(samples, [k, C, D])``, about so many elements at a time."""
    step = max(1, elements // (factors.num_classes * factors.width))
    for start in range(0, factors.n, step):
        samples = slice(start, min(start + step, factors.n))
        yield samples, gradients(factors.select(torch.arange(samples.start, samples.stop)))


def self_influence(fitted: Fitted, factors: GradientFactors) -> tuple[Tensor, float]:
    """``g_i^T M^-1 g_i`` [n] by one solve per sample, and the largest residual of them."""
    out, worst = factors.delta.new_empty(factors.n), 0.0
    # In float64 from the start: an ill-conditioned M magnifies the rounding of products.
    for samples, g in gradient_slabs(factors.to(dtype=torch.float64)):
        out[samples] = (fitted.solve(g) * g).sum(dim=(1, 2)).to(out)
        worst = max(worst, fitted.residual)
    return out, worst
