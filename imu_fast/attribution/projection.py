"""Random projections of per-sample gradients, made from their factors.

A layer's gradient ``g_i = sum_t delta[i,t] (x) a~[i,t]`` [C, D] is projected on both sides,

    A g_i B^T = sum_t (A delta[i,t]) (x) (B a~[i,t])                         [a, b]

(LoGra: Choe et al. 2024, arXiv 2405.13954), so that no gradient [C, D] is formed. A [a, C] and B
[b, D] have independent entries of random sign over ``sqrt(a)`` and ``sqrt(b)`` (Achlioptas 2003;
TRAK: Park et al. 2023, arXiv 2303.14186, projects whole gradients so), hence ``E[A^T A] = I`` and
``E[B^T B] = I``, and by their independence ``E <A g B^T, A h B^T> = <g, h>``: inner products of
projections are unbiased. A side that is not made smaller is kept as it is.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.grouped import gradients_of_groups
from imu_fast.factors.operands import check_result
from imu_fast.ops.tokens import widened


class Shape(Protocol):
    """A layer whose gradients are [C, D]."""

    @property
    def name(self) -> str: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def width(self) -> int: ...


@dataclass(frozen=True)
class Projection:
    """Of each layer's gradient to at most ``size`` numbers.

    Attributes:
        size: k. seed: of the signs, which a layer has by its name, whatever other layers there are.
    """

    size: int
    seed: int

    def sides(self, layer: Shape) -> tuple[int, int]:
        """``(a, b)``, ``a b <= k``: as near to each other as k and the layer's shape allow.

        The variance of one token's squared norm is at most ``(1 + 2/a) (1 + 2/b) - 1`` of its
        square, which is least where they are alike. A layer of at most k parameters is kept whole.
        """
        a = min(layer.num_classes, math.isqrt(self.size))
        b = min(layer.width, self.size // a)
        return min(layer.num_classes, self.size // b), b

    def widths(self, layers: list[Any]) -> list[int]:
        """How many numbers each layer has."""
        return [math.prod(self.sides(layer)) for layer in layers]

    def matrices(self, layer: Shape) -> tuple[Tensor, Tensor]:
        """A [a, C] and B [b, D], float64 on the CPU: the same wherever they are used."""
        a, b = self.sides(layer)
        return (
            self._signs(f"{layer.name}/outputs", a, layer.num_classes),
            self._signs(f"{layer.name}/inputs", b, layer.width),
        )

    def _signs(self, name: str, rows: int, columns: int) -> Tensor:
        if rows == columns:
            return torch.eye(rows, dtype=torch.float64, device="cpu")
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)
        bits = torch.randint(0, 2, (rows, columns), generator=generator, device="cpu")
        return (2 * bits - 1).double() / math.sqrt(rows)

    def rows(self, layers: list[Any]) -> Tensor:
        """Projections of all samples, layer after layer: [n, K], in the factors' dtype."""
        found = torch.cat([self._of_layer(layer) for layer in layers], dim=1)
        return check_result("projected gradients", found, *layers)

    def _of_layer(self, layer: Any) -> Tensor:
        left, right = (m.to(layer.device, layer.dtype) for m in self.matrices(layer))
        d = layer.feature_dim

        def project(chunk: GradientFactors) -> Tensor:
            delta = chunk.delta @ left.T
            inputs = right[:, :d].T
            parts = [act @ inputs for _, act, _ in widened(chunk.delta, chunk.act, chunk.offsets)]
            act = torch.cat(parts)
            if chunk.has_bias:
                act += right[:, d]
            return gradients_of_groups(delta, act, chunk.offsets, 1).flatten(1)

        found: Tensor = layer.each(project)
        return found
