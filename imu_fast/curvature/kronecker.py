"""``B (x) A + lam I`` over a layer's parameters: by its eigenbasis, in float64 or refined to it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from imu_fast.curvature.base import Fitted, Layer, Saved
from imu_fast.errors import InputError
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.probabilities import augmented
from imu_fast.factors.source import Factors
from imu_fast.ops.bilinear_scores import quadratic_scores
from imu_fast.solvers.conjugate_gradient import refine

# Of a matrix with an eigenvalue of 1 the error of an eigendecomposition in float32, and more.
_ROUNDING = 8 * torch.finfo(torch.float32).eps
# Below this order a float64 eigendecomposition takes milliseconds; above this contraction a
# step, refinement may take as long.
_FEWEST, _SMALL = 1024, 1e-2
# To which solutions are refined, and how far the eigenbasis itself is good enough.
_TOLERANCE, _ENOUGH = 1e-12, 2e-6


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

    def in_float64(self) -> KroneckerEigenbasis:
        """The same numbers."""
        bases = (x.double() for x in (self.basis_out, self.basis_in, self.damped))
        return KroneckerEigenbasis(self.curvature, self.layer, self.damping, *bases)

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


class RefinedKronecker(Fitted):
    """``B (x) A + lam I`` by an eigenbasis in float32; products are those of B and A in float64.

    A solve in float32 is off by about ``eps kappa``, ``kappa = ||B|| ||A|| / lam``, so that each
    step of refinement (Wilkinson 1963) gains as much: two or three give what float64 does, where an
    eigendecomposition in float64 takes twice the time. A sample's own influence is not refined: it
    is that of the float32 basis where kappa says that this is right to 2e-6, and else of one in
    float64, made then.

    Args:
        b: B [C, C]. a: A [D, D]. Float64, both.
    """

    def __init__(self, curvature: str, layer: Layer, damping: float, b: Tensor, a: Tensor) -> None:
        super().__init__(curvature, layer, damping)
        self._b, self._a = b, a
        size_b, size_a = _norm(b), _norm(a)
        # Of unit size in float32, where it could overflow or vanish: M is `size` times that.
        self._size = size_b * size_a
        basis = eigenbasis((b / size_b).float(), (a / size_a).float())
        self._basis = in_basis(curvature, layer, damping / self._size, basis)
        self._found: KroneckerEigenbasis | None = None

    @classmethod
    def suits(cls, b: Tensor, a: Tensor, damping: float) -> bool:
        """Whether a float32 basis is worth it, and certain to be refined in few steps."""
        if max(len(b), len(a)) < _FEWEST:
            return False
        size = _norm(b) * _norm(a)
        return 0 < size < math.inf and 1e-30 < size / damping and _error(size, damping) < _SMALL

    def _product(self, v: Tensor) -> Tensor:
        v = v.double()
        return (self._b @ v @ self._a).add_(v, alpha=self.damping)

    def _solve(self, v: Tensor, out: Tensor | None) -> Tensor:
        def single(r: Tensor, _: float) -> tuple[Tensor, int]:
            return self._basis.apply_inverse(r.float()).double().div_(self._size), 0

        def double(r: Tensor, _: float) -> tuple[Tensor, int]:
            return self._exact.apply_inverse(r), 0

        rows = v if v.dim() == 3 else v[None]
        found = refine(self._product, [single, double], rows, tolerance=_TOLERANCE)
        self.residual = found.residual
        return found.x.view_as(v)

    def _diagonal(self) -> Tensor:
        return torch.outer(self._b.diagonal(), self._a.diagonal()).add_(self.damping)

    @property
    def _exact(self) -> KroneckerEigenbasis:
        """In float64, where it is needed."""
        if self._found is None:
            basis = eigenbasis(self._b, self._a)
            self._found = in_basis(self.curvature, self.layer, self.damping, basis)
        return self._found

    def _self_influence(self, factors: Factors) -> Tensor:
        if _error(self._size, self.damping) > _ENOUGH:
            return self._exact._self_influence(factors)
        wide = self._basis.in_float64()
        # Before the result is in the factors' dtype, whose range it would leave in units of size.
        wide.damped.mul_(self._size)
        return wide._self_influence(factors)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"b": self._b, "a": self._a}, {"refined": True}

    @classmethod
    def _restored(cls, saved: Saved) -> Self:
        b, a = (saved.tensors[name].to(saved.layer.device) for name in ("b", "a"))
        return cls(saved.curvature, saved.layer, saved.damping, b, a)


def _norm(x: Tensor) -> float:
    """At least the largest eigenvalue: the largest sum over a row of the sizes in it."""
    return float(x.abs().sum(dim=1).max())


def _error(size: float, damping: float) -> float:
    """A bound on the relative error of solves by an eigenbasis in float32."""
    return _ROUNDING * (1 + size / damping)


Eigenbasis = tuple[Tensor, Tensor, Tensor, Tensor]


def eigenbasis(b: Tensor, a: Tensor) -> Eigenbasis:
    """Eigenvalues and eigenvectors of B, and of A.

    Raises:
        InputError: factors in float64 are not finite. LinAlgError: those in float32.
    """
    if a.dtype == torch.float64 and not bool(a.isfinite().all() & b.isfinite().all()):
        raise InputError(
            "curvature='kfac' and 'ekfac': a mean square of these samples is not finite; leave out "
            "samples with features beyond 1e150, or scale them down"
        )
    values_b, basis_b = torch.linalg.eigh(b)
    values_a, basis_a = torch.linalg.eigh(a)
    # Rounding leaves eigenvalues of -1e-17 where the factor is singular.
    return values_b.clamp_min(0), basis_b, values_a.clamp_min(0), basis_a


def in_basis(
    curvature: str, layer: Layer, damping: float, basis: Eigenbasis
) -> KroneckerEigenbasis:
    """With these eigenvalues, damped."""
    values_b, basis_b, values_a, basis_a = basis
    damped = torch.outer(values_b, values_a).add_(damping)
    return KroneckerEigenbasis(curvature, layer, damping, basis_b, basis_a, damped)
