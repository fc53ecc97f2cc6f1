"""K-FAC and EK-FAC of a layer: a Kronecker eigenbasis, diagonal in it."""

from __future__ import annotations

import torch
from torch import Tensor

from imu_fast.curvature.base import Layer
from imu_fast.curvature.gauss_newton import GaussNewton, signals_of, warn_of_rounding
from imu_fast.curvature.kronecker import (
    KroneckerEigenbasis,
    RefinedKronecker,
    eigenbasis,
    in_basis,
    worth_it,
)
from imu_fast.errors import InputError
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.probabilities import (
    Outputs,
    augmented,
    signals_or_curvature,
    token_scale,
)
from imu_fast.factors.source import MAX_GATHERED, Factors, Remembered
from imu_fast.factors.sums import summed
from imu_fast.losses.signals import Signals
from imu_fast.ops.fisher_diagonal import fisher_diagonal
from imu_fast.ops.symmetric import add_symmetric, rows_at_once
from imu_fast.options import options


def _moments(act: Tensor, has_bias: bool, weight: Tensor) -> Tensor:
    """``sum_t w_t a~ a~^T``: [D, D], in weight's dtype; converted and augmented by the piece."""
    width = act.shape[1] + has_bias

    def piece(rows: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        wide = augmented(rows, has_bias, weight.dtype)
        return wide * w[:, None], wide

    parts = (x.split(rows_at_once(width)) for x in (act, weight))
    return add_symmetric(weight.new_zeros(width, width), map(piece, *parts))


def kronecker_factors(
    source: Factors, outputs: Outputs, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """``B = 1/n sum_t B_t`` [C, C] and ``A = mean(a~ a~^T)`` [D, D], weighted by ``c_t = 1/T_i``.

    ``B (x) A`` is the GGN where ``B_t / c_t`` is the same for every token, samples without tokens
    included. Of an inner layer ``B = 1/n sum s s^T`` over all signals of all rows: rows are taken
    as independent ("expand" of Eschenhagen et al. 2023).

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


def fit_kfac(
    source: Factors, damping: float, outputs: Outputs, dtype: torch.dtype = torch.float64
) -> KroneckerEigenbasis:
    """K-FAC; in float32 it is good enough for a preconditioner, and takes a third of the time.

    Args:
        outputs: the curvature of the loss in a chunk's outputs.
    """
    basis = eigenbasis(*kronecker_factors(source, outputs, dtype))
    return in_basis(KFAC.name, Layer.of(source), damping, basis)


def _warn(curvature: str, source: Factors, damping: float, values: Tensor) -> None:
    """Of inner layers: at a head gradients have no part in what a softmax leaves out."""
    if signals_of(source) is not None:
        warn_of_rounding(curvature, source, damping, float(values.max()), float(values.min()))


@options
class KFAC(GaussNewton):
    """``mean(B_t) (x) mean(a~ a~^T) + lam I`` (Martens and Grosse 2015).

    B_t is the second derivative of the loss in the outputs, ``diag(p) - p p^T`` of cross-entropy:
    at the head the expectation over the model's labels is exact, not sampled. At an inner layer the
    first factor is ``1/n sum s s^T`` over the signals of all rows and the second the mean over
    samples of ``mean(a~ a~^T)`` over a sample's rows that have a gradient.

    Attributes:
        damping, damping_mode: of lam: see :class:`Damped`.
        fisher: over whose labels: see :class:`imu_fast.curvature.gauss_newton.GaussNewton`.
    """

    name = "kfac"
    of_rows = True

    def fit(self, factors: Factors) -> KroneckerEigenbasis | RefinedKronecker:
        """Two eigendecompositions, ``O(C^3 + D^3)``; of float32 factors in float32 where lam lets
        solves be refined to what float64 gives.

        Raises:
            InputError: the factors have no curvature of their loss; lam relative to a mean that is
                zero or not finite.
        """
        # Not remembered: they would take memory beside the eigendecompositions.
        factors, layer = self.expected(factors), Layer.of(factors)
        b, a = kronecker_factors(factors, signals_or_curvature)
        lam = self.absolute(factors, lambda: b.trace() * a.trace())
        if factors.dtype == torch.float32 and worth_it(b, a):
            refined = RefinedKronecker(self.name, layer, lam, b, a)
            if refined.suits:
                return refined
        fitted = in_basis(self.name, layer, lam, eigenbasis(b, a))
        _warn(self.name, factors, lam, fitted.damped - lam)
        return fitted


@options
class EKFAC(GaussNewton):
    """K-FAC's eigenbasis with the GGN's own diagonal in it (George et al. 2018).

    ``eigenvalue[i,j] = 1/n sum_t (Q_B^T B_t Q_B)[i,i] (Q_A^T a~)[j]^2``, at an inner layer
    ``1/n sum_ik (Q_B^T g_ik Q_A)[i,j]^2`` over its signals' gradients: of all diagonals in this
    basis the nearest to the GGN.

    Attributes:
        damping, damping_mode: of lam: see :class:`Damped`.
        fisher: over whose labels: see :class:`imu_fast.curvature.gauss_newton.GaussNewton`.
    """

    name = "ekfac"
    of_rows = True

    def fit(self, factors: Factors) -> KroneckerEigenbasis:
        """K-FAC, and two products of ``N C^2`` and ``N D^2``: a second pass over the samples.

        Raises:
            InputError: as :meth:`KFAC.fit`.
        """
        outputs, factors = Remembered(signals_or_curvature), self.expected(factors)
        _, basis_b, _, basis_a = eigenbasis(*kronecker_factors(factors, outputs))

        def eigenvalues(chunk: GradientFactors) -> Tensor:
            found = outputs(chunk)
            turned = augmented(chunk.act, chunk.has_bias) @ basis_a
            if isinstance(found, Signals):
                squares = (
                    fisher_diagonal(s @ basis_b, turned, chunk.offsets, False)
                    for s in found.columns(torch.float64)
                )
                return summed(squares).mul_(chunk.n / factors.n)
            variance = found.diagonal_in(basis_b).div_(factors.n)
            return variance.T @ turned.square()

        values = factors.sums(eigenvalues).clamp_min(0)
        lam = self.absolute(factors, values.sum)
        _warn(self.name, factors, lam, values)
        layer = Layer.of(factors)
        return KroneckerEigenbasis(self.name, layer, lam, basis_b, basis_a, values + lam)
