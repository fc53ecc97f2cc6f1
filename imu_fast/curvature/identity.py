"""``M = I``: influence is the plain inner product of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from imu_fast.curvature.base import Curvature, Fitted, Layer, Saved
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.outputs import sum_of_outputs
from imu_fast.factors.source import Factors
from imu_fast.ops.bilinear_scores import gradient_norms
from imu_fast.ops.gram import cross_gram
from imu_fast.options import options


@options
class Identity(Curvature):
    """``I``; there is nothing to damp."""

    name = "identity"

    @property
    def separates(self) -> bool:
        """It does."""
        return True

    def fit(self, factors: Factors) -> FittedIdentity:
        """Nothing is read."""
        return FittedIdentity(self.name, Layer.of(factors), 0.0)


class FittedIdentity(Fitted):
    """``I``."""

    def _product(self, v: Tensor) -> Tensor:
        """``v``, a copy."""
        return v.clone()

    def _solve(self, v: Tensor, out: Tensor | None) -> Tensor:
        """``X = v``, a copy unless there is an ``out`` to copy it to."""
        return v.clone() if out is None else v

    def _diagonal(self) -> Tensor:
        return torch.ones(self.shape, dtype=self.dtype, device=self.device)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {}

    @classmethod
    def _restored(cls, saved: Saved) -> Self:
        return cls(saved.curvature, saved.layer, saved.damping)

    def _self_influence(self, factors: Factors) -> Tensor:
        """``||g_i||^2``: [n]."""

        def term(part: Factors, _: slice) -> Tensor:
            return part.each(
                lambda chunk: gradient_norms(chunk.delta, chunk.act, chunk.offsets, chunk.has_bias)
            )

        return sum_of_outputs(factors, term)

    def _pairwise(self, factors: Factors, queries: Factors) -> Tensor:
        """``<g_i, h_j>``: [n, m]."""
        columns = [factors.each(_products_with(query)) for query in queries.chunks()]
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)


def _products_with(query: GradientFactors) -> Callable[[GradientFactors], Tensor]:
    right = (query.delta, query.act, query.offsets)
    return lambda chunk: cross_gram((chunk.delta, chunk.act, chunk.offsets), right, chunk.has_bias)
