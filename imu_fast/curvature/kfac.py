"""K-FAC and EK-FAC of a layer: a Kronecker eigenbasis, diagonal in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from imu_fast.curvature.base import Fitted, Layer, Saved
from imu_fast.curvature.gauss_newton import GaussNewton, signals_of, warn_of_rounding
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
from imu_fast.ops.bilinear_scores import quadratic_scores
from imu_fast.ops.fisher_diagonal import fisher_diagonal
from imu_fast.options import options

# Elements of a~ that exist at once: large enough for products at full speed.
_CHUNK_ELEMENTS = 1 << 18


class KroneckerEigenbasis(Fitted):
    """``(Q_B (x) Q_A) diag(eigenvalues + lam) (Q_B (x) Q_A)^T``, in float64.

    Attributes:
        basis_out: Q_B [C, C]. basis_in: Q_A [D, D].
        damped: [C, D], eigenvalues + lam.
        residual: ``||M X - v|| / ||v||`` of the last solve, recomputed (the largest of several).
    """

    def __init__(
        self,
        curvature: str,
        layer: Layer,
        damping: float,
        basis_out: Tensor,
        basis_in: Tensor,
        damped: Tensor,
    ) -> None:
        super().__init__(curvature, layer, damping, damped.dtype)
        self.basis_out, self.basis_in, self.damped = basis_out, basis_in, damped

    def _product(self, v: Tensor) -> Tensor:
        # Matrices of this size are what a solve's memory is: no more of them than are needed.
        x = self.basis_out.T @ v.to(self.damped)
        x = (x @ self.basis_in).mul_(self.damped)
        x = self.basis_out @ x
        return x @ self.basis_in.T

    def apply_inverse(self, v: Tensor) -> Tensor:
        """``M^-1 v`` in the bases' dtype; v [..., C, D]."""
        x = self.basis_out.T @ v
        x = (x @ self.basis_in).div_(self.damped)
        x = self.basis_out @ x
        return x @ self.basis_in.T

    def _solve(self, v: Tensor, out: Tensor | None) -> Tensor:
        v = v.double()
        x = self.apply_inverse(v)
        error = self._product(x).sub_(v).flatten(-2).norm(dim=-1)
        size = v.flatten(-2).norm(dim=-1)
        self.residual = float((error / size.where(size > 0, 1.0)).max())
        return x

    def _diagonal(self) -> Tensor:
        return self.basis_out.square() @ self.damped @ self.basis_in.square().T

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        names = ("basis_out", "basis_in", "damped")
        # Eigenvectors are column-major, of which products have other bits than of a copy by rows.
        tensors = {name: getattr(self, name) for name in names}
        columns = [name for name, x in tensors.items() if not x.is_contiguous()]
        tensors |= {name: tensors[name].T for name in columns}
        return tensors, {"columns": columns}

    @classmethod
    def _restored(cls, saved: Saved) -> Self:
        tensors = {name: x.to(saved.layer.device) for name, x in saved.tensors.items()}
        tensors |= {name: tensors[name].T for name in saved.options["columns"]}
        return cls(saved.curvature, saved.layer, saved.damping, **tensors)

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


def _eigenbasis(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Raises InputError where factors in float64 are not finite, LinAlgError in float32."""
    if a.dtype == torch.float64 and not bool(a.isfinite().all() & b.isfinite().all()):
        raise InputError(
            "curvature='kfac' and 'ekfac': a mean square of these samples is not finite; leave out "
            "samples with features beyond 1e150, or scale them down"
        )
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
    return _kfac(source, lambda _: damping, outputs, dtype)


def _kfac(
    source: Factors,
    damping: Callable[[Tensor], float],
    outputs: Outputs,
    dtype: torch.dtype = torch.float64,
) -> KroneckerEigenbasis:
    """damping: of the undamped eigenvalues."""
    values_b, basis_b, values_a, basis_a = _eigenbasis(*kronecker_factors(source, outputs, dtype))
    values = torch.outer(values_b, values_a)
    lam = damping(values)
    return KroneckerEigenbasis(KFAC.name, Layer.of(source), lam, basis_b, basis_a, values + lam)


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

    def fit(self, factors: Factors) -> KroneckerEigenbasis:
        """Two eigendecompositions, ``O(C^3 + D^3)``.

        Raises:
            InputError: the factors have no curvature of their loss; lam relative to a mean that is
                zero or not finite.
        """
        # Not remembered: they would take memory beside the eigendecompositions.
        factors = self.expected(factors)

        def damping(values: Tensor) -> float:
            lam = self.absolute(factors, values.sum)
            _warn(self.name, factors, lam, values)
            return lam

        return _kfac(factors, damping, signals_or_curvature)


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
        _, basis_b, _, basis_a = _eigenbasis(*kronecker_factors(factors, outputs))

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
