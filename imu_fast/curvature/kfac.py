"""K-FAC and EK-FAC of a head: a Kronecker eigenbasis, diagonal in it."""

from __future__ import annotations

import torch
from torch import Tensor

from imu_fast.curvature.base import Curvature, Fitted
from imu_fast.errors import InputError, check_positive
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.probabilities import augmented, output_curvature, token_scale
from imu_fast.factors.source import MAX_GATHERED, Factors, Remembered
from imu_fast.losses.output_curvature import OutputCurvature
from imu_fast.ops.bilinear_scores import quadratic_scores
from imu_fast.options import option, options

# Elements of a~ that exist at once: large enough for products at full speed.
_CHUNK_ELEMENTS = 1 << 18

Outputs = Remembered[OutputCurvature]


class KroneckerEigenbasis(Fitted):
    """``(Q_B (x) Q_A) diag(eigenvalues + lam) (Q_B (x) Q_A)^T``, in float64.

    Attributes:
        basis_out: Q_B [C, C]. basis_in: Q_A [D, D].
        damped: [C, D], eigenvalues + lam.
        residual: ``||M X - v|| / ||v||`` of the last solve, recomputed (the largest of several).
    """

    def __init__(self, basis_out: Tensor, basis_in: Tensor, damped: Tensor) -> None:
        super().__init__((len(basis_out), len(basis_in)), damped.device)
        self.basis_out, self.basis_in, self.damped = basis_out, basis_in, damped

    def _product(self, v: Tensor) -> Tensor:
        rotated = self.basis_out.T @ v.to(self.damped) @ self.basis_in
        return self.basis_out @ (rotated * self.damped) @ self.basis_in.T

    def apply_inverse(self, v: Tensor) -> Tensor:
        """``M^-1 v`` in the bases' dtype; v [..., C, D]."""
        rotated = self.basis_out.T @ v @ self.basis_in
        return self.basis_out @ (rotated / self.damped) @ self.basis_in.T

    def _solve(self, v: Tensor, out: Tensor | None) -> Tensor:
        v = v.double()
        x = self.apply_inverse(v)
        error = (self._product(x) - v).flatten(-2).norm(dim=-1)
        size = v.flatten(-2).norm(dim=-1)
        self.residual = float((error / size.where(size > 0, 1.0)).max())
        return x

    def _self_influence(self, factors: Factors) -> Tensor:
        """``g_i^T M^-1 g_i``: [n]; in the eigenbasis the inverse is a diagonal."""
        inverse = self.damped.reciprocal()

        def rotated(chunk: GradientFactors) -> Tensor:
            delta = chunk.delta.double() @ self.basis_out
            act = augmented(chunk.act, chunk.has_bias) @ self.basis_in
            return quadratic_scores(delta, act, inverse, chunk.offsets, False).to(chunk.delta)

        return factors.each(rotated)


def _moments(act: Tensor, has_bias: bool, weight: Tensor) -> Tensor:
    """``sum_t w_t a~ a~^T``: [D, D], in weight's dtype; converted and augmented by the piece."""
    width = act.shape[1] + has_bias
    out = weight.new_zeros(width, width)
    step = max(1, _CHUNK_ELEMENTS // width)
    for start in range(0, len(act), step):
        wide = augmented(act[start : start + step], has_bias, weight.dtype)
        out.addmm_((wide * weight[start : start + step, None]).T, wide)
    return out


def kronecker_factors(
    source: Factors, outputs: Outputs, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """``B = 1/n sum_t B_t`` [C, C] and ``A = mean(a~ a~^T)`` [D, D], weighted by ``c_t = 1/T_i``.

    ``B (x) A`` is the GGN where ``B_t / c_t`` is the same for every token, samples without tokens
    included.

    Raises:
        InputError: B would take more than MAX_GATHERED bytes.
    """

    size = 8 * source.num_classes**2
    if size > MAX_GATHERED:
        raise InputError(
            f"curvature='kfac' and 'ekfac' need a matrix of classes by classes, which of "
            f"{source.num_classes} takes {size / 1e9:.0f} GB, more than {MAX_GATHERED / 1e9:.1f}; "
            "use 'fisher_diag' or 'identity'"
        )

    def sums(chunk: GradientFactors) -> tuple[Tensor, ...]:
        weight = (token_scale(chunk) / source.n).to(dtype)
        moments = _moments(chunk.act, chunk.has_bias, weight)
        return outputs(chunk).sum(dtype).div_(source.n), moments, weight.sum()

    b, a, total = source.sums(sums)
    return b, a / total.clamp_min(torch.finfo(dtype).tiny)


def _eigenbasis(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values_b, basis_b = torch.linalg.eigh(b)
    values_a, basis_a = torch.linalg.eigh(a)
    # Rounding leaves eigenvalues of -1e-17 where the factor is singular.
    return values_b.clamp_min(0), basis_b, values_a.clamp_min(0), basis_a


def fit_kfac(
    source: Factors, damping: float, outputs: Outputs, dtype: torch.dtype = torch.float64
) -> KroneckerEigenbasis:
    """K-FAC; in float32 it is good enough for a preconditioner, and takes a third of the time.

    Args:
        outputs: the curvature of the loss in a chunk's outputs.
    """
    values_b, basis_b, values_a, basis_a = _eigenbasis(*kronecker_factors(source, outputs, dtype))
    return KroneckerEigenbasis(basis_b, basis_a, torch.outer(values_b, values_a) + damping)


@options
class KFAC(Curvature):
    """``mean(B_t) (x) mean(a~ a~^T) + lam I`` (Martens and Grosse 2015).

    B_t is the second derivative of the loss in the outputs, ``diag(p) - p p^T`` of cross-entropy:
    the expectation over the model's labels is exact, not sampled.

    Attributes:
        damping: lam > 0, in units of squared gradients.
    """

    name = "kfac"
    damping: float = option(default=1e-2, check=check_positive)

    def fit(self, factors: Factors) -> KroneckerEigenbasis:
        """Two eigendecompositions, ``O(C^3 + D^3)``.

        Raises:
            InputError: the factors have no curvature of their loss.
        """
        return fit_kfac(factors, self.damping, Remembered(output_curvature))


@options
class EKFAC(Curvature):
    """K-FAC's eigenbasis with the GGN's own diagonal in it (George et al. 2018).

    ``eigenvalue[i,j] = 1/n sum_t (Q_B^T B_t Q_B)[i,i] (Q_A^T a~)[j]^2``: of all diagonals in
    this basis the nearest to the GGN.

    Attributes:
        damping: lam > 0, in units of squared gradients.
    """

    name = "ekfac"
    damping: float = option(default=1e-2, check=check_positive)

    def fit(self, factors: Factors) -> KroneckerEigenbasis:
        """K-FAC, and two products of ``N C^2`` and ``N D^2``: a second pass over the samples.

        Raises:
            InputError: the factors have no curvature of their loss.
        """
        outputs = Remembered(output_curvature)
        _, basis_b, _, basis_a = _eigenbasis(*kronecker_factors(factors, outputs))

        def eigenvalues(chunk: GradientFactors) -> Tensor:
            variance = outputs(chunk).diagonal_in(basis_b).div_(factors.n)
            second = (augmented(chunk.act, chunk.has_bias) @ basis_a).square()
            return variance.T @ second

        values = factors.sums(eigenvalues)
        return KroneckerEigenbasis(basis_b, basis_a, values.clamp_min(0) + self.damping)
