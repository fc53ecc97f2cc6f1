"""K-FAC and EK-FAC of a softmax head: a Kronecker eigenbasis, diagonal in it."""

from __future__ import annotations

import torch
from torch import Tensor

from imu_fast.curvature.base import Curvature, Fitted
from imu_fast.errors import check_positive
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.probabilities import augmented, probabilities
from imu_fast.ops.bilinear_scores import quadratic_scores
from imu_fast.options import option, options

# Elements of a~ that exist at once: large enough for products at full speed.
_CHUNK_ELEMENTS = 1 << 18


class KroneckerEigenbasis(Fitted):
    """``(Q_B (x) Q_A) diag(eigenvalues + lam) (Q_B (x) Q_A)^T``, in float64.

    Attributes:
        basis_out: Q_B [C, C]. basis_in: Q_A [D, D].
        damped: [C, D], eigenvalues + lam.
        residual: ``||M X - v|| / ||v||`` of the last solve, recomputed (the largest of several).
    """

    def __init__(self, basis_out: Tensor, basis_in: Tensor, damped: Tensor) -> None:
        self.basis_out, self.basis_in, self.damped = basis_out, basis_in, damped

    def product(self, v: Tensor) -> Tensor:
        """``M v``; v [..., C, D]; in v's dtype."""
        rotated = self.basis_out.T @ v.to(self.damped) @ self.basis_in
        return (self.basis_out @ (rotated * self.damped) @ self.basis_in.T).to(v.dtype)

    def apply_inverse(self, v: Tensor) -> Tensor:
        """``M^-1 v`` in the bases' dtype; v [..., C, D]."""
        rotated = self.basis_out.T @ v @ self.basis_in
        return self.basis_out @ (rotated / self.damped) @ self.basis_in.T

    def solve(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """``X = M^-1 v``; v [C, D] or [m, C, D]. X is float64 (``out`` is not used)."""
        v = v.double()
        x = self.apply_inverse(v)
        error = (self.product(x) - v).flatten(-2).norm(dim=-1)
        size = v.flatten(-2).norm(dim=-1)
        self.residual = float((error / size.where(size > 0, 1.0)).max())
        return x

    def self_influence(self, factors: GradientFactors) -> Tensor:
        """``g_i^T M^-1 g_i``: [n]; in the eigenbasis the inverse is a diagonal."""
        delta = factors.delta.double() @ self.basis_out
        act = augmented(factors.act, factors.has_bias) @ self.basis_in
        values = quadratic_scores(delta, act, self.damped.reciprocal(), factors.offsets, False)
        return values.to(factors.delta)


def kronecker_factors(
    p: Tensor, weight: Tensor, act: Tensor, has_bias: bool, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """``B = mean(diag(p) - p p^T)`` [C, C] and ``A = mean(a~ a~^T)`` [D, D], tokens by ``weight``.

    weight [N] is ``c_t / n``. B carries the total weight, so that ``B (x) A`` is the GGN where p
    is the same for every token, samples without tokens included. Converted to dtype, augmented and
    summed some tokens at a time.
    """
    p, weight = p.to(dtype), weight.to(dtype)[:, None]
    classes, width = p.shape[1], act.shape[1] + has_bias
    b, a = p.new_zeros(classes, classes), p.new_zeros(width, width)
    step = max(1, _CHUNK_ELEMENTS // max(classes, width))
    for start in range(0, len(act), step):
        rows = slice(start, start + step)
        q, w, wide = p[rows], weight[rows], augmented(act[rows], has_bias, dtype)
        b.addmm_((q * w).T, q, alpha=-1.0)
        a.addmm_((wide * w).T, wide)
    b.diagonal().add_((p * weight).sum(dim=0))
    return b, a / weight.sum().clamp_min(torch.finfo(dtype).tiny)


def _eigenbasis(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values_b, basis_b = torch.linalg.eigh(b)
    values_a, basis_a = torch.linalg.eigh(a)
    # Rounding leaves eigenvalues of -1e-17 where the factor is singular.
    return values_b.clamp_min(0), basis_b, values_a.clamp_min(0), basis_a


def fit_kfac(
    factors: GradientFactors, damping: float, dtype: torch.dtype = torch.float64
) -> KroneckerEigenbasis:
    """K-FAC; in float32 it is good enough for a preconditioner, and takes a third of the time.

    Raises:
        InputError: not a softmax head.
    """
    p, scale = probabilities(factors)
    b, a = kronecker_factors(p, scale / factors.n, factors.act, factors.has_bias, dtype)
    values_b, basis_b, values_a, basis_a = _eigenbasis(b, a)
    return KroneckerEigenbasis(basis_b, basis_a, torch.outer(values_b, values_a) + damping)


@options
class KFAC(Curvature):
    """``mean(diag(p) - p p^T) (x) mean(a~ a~^T) + lam I`` (Martens and Grosse 2015).

    Attributes:
        damping: lam > 0, in units of squared gradients.
    """

    name = "kfac"
    damping: float = option(default=1e-2, check=check_positive)

    def fit(self, factors: GradientFactors) -> KroneckerEigenbasis:
        """Of a softmax head: two eigendecompositions, ``O(C^3 + D^3)``.

        Raises:
            InputError: not a softmax head.
        """
        return fit_kfac(factors, self.damping)


@options
class EKFAC(Curvature):
    """K-FAC's eigenbasis with the GGN's own diagonal in it (George et al. 2018).

    ``eigenvalue[i,j] = 1/n sum_t c_t (Q_B^T (diag(p) - p p^T) Q_B)[i,i] (Q_A^T a~)[j]^2``: of all
    diagonals in this basis the nearest to the GGN. The expectation over the model's labels is
    exact, not sampled.

    Attributes:
        damping: lam > 0, in units of squared gradients.
    """

    name = "ekfac"
    damping: float = option(default=1e-2, check=check_positive)

    def fit(self, factors: GradientFactors) -> KroneckerEigenbasis:
        """Of a softmax head: K-FAC, and two products of ``N C^2`` and ``N D^2``.

        Raises:
            InputError: not a softmax head.
        """
        p, scale = probabilities(factors)
        weight = scale / factors.n
        act, has_bias = factors.act, factors.has_bias
        _, basis_b, _, basis_a = _eigenbasis(*kronecker_factors(p, weight, act, has_bias))
        variance = p @ basis_b.square() - (p @ basis_b).square()
        second = (augmented(act, has_bias) @ basis_a).square()
        values = (variance * weight[:, None]).T @ second
        return KroneckerEigenbasis(basis_b, basis_a, values.clamp_min(0) + self.damping)
