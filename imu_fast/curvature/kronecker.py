"""``B (x) A + lam I`` over a layer's parameters: by its eigenbasis, in float64 or refined to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from imu_fast.curvature.base import Fitted, Layer, Saved
from imu_fast.curvature.contraction import Seen, scores
from imu_fast.curvature.gradients import gradients
from imu_fast.errors import InputError
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.probabilities import augmented
from imu_fast.factors.source import Factors
from imu_fast.factors.sums import joined
from imu_fast.ops.bilinear_scores import bilinear_scores, quadratic_scores
from imu_fast.solvers.conjugate_gradient import refine

# Of a matrix with an eigenvalue of 1 the error of an eigendecomposition in float32, and more.
_ROUNDING = 8 * torch.finfo(torch.float32).eps
# Below this order an eigendecomposition in float64 takes no longer than refinement; above this
# contraction a step, refinement may take as long.
_FEWEST, _SMALL = 192, 1e-2
# To which solutions are refined, and how far the eigenbasis itself is good enough.
_TOLERANCE, _ENOUGH = 1e-12, 2e-6
# Numbers of the queries' solutions that exist at once.
_ELEMENTS = 1 << 22
# Columns of a product with A and B at a time.
_STRIP = 512
# Tokens of samples that are turned at once.
_TURNED_TOKENS = 4096


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

    def _pairwise(self, factors: Factors, queries: Factors) -> Tensor:
        found, self.residual = self.pairs(factors, queries, self._product)
        return found

    def pairs(
        self, factors: Factors, queries: Factors, product: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, float]:
        """``g_i^T M^-1 h_j`` [n, m], and a residual: of the sum of the queries' solves, each of
        unit size. One product in place of one per query: rounding errors hardly cancel.

        Args:
            product: with M.
        """
        columns, worst = [], 0.0
        step = max(1, _ELEMENTS // self.damped.numel())
        for chunk in queries.chunks():
            for start in range(0, chunk.n, step):
                some = chunk.samples(start, min(start + step, chunk.n))
                delta = some.delta.to(self.damped)
                act = augmented(some.act, some.has_bias, self.dtype)
                y = self._turned(delta, act, some.offsets)
                size = y.flatten(1).norm(dim=1)
                y.div_(self.damped)
                weight = size.where(size > 0, 1.0).reciprocal_()
                delta = delta * weight.repeat_interleave(some.offsets.diff().to(y.device))[:, None]
                total = self._back(torch.einsum("k,kcd->cd", weight, y))
                worst = max(worst, float(product(total).sub_(delta.T @ act).norm()))
                columns.append(self._scores(factors, y))
                del y  # before the next are made beside it
        return (columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)), worst

    def _scores(self, factors: Factors, y: Tensor) -> Tensor:
        """``<g_i, Q_B Y_j Q_A^T>``: [n, k]; y [k, C, D]. Either side is turned, as is less work."""
        classes, width = self.shape
        back = 2 * len(y) * classes * width * (classes + width)
        if back <= factors.num_tokens * (classes**2 + width**2):
            return scores(factors, self._back(y).to(factors.device))

        def turned(some: Factors, x: Tensor, seen: Seen) -> Tensor:
            """In X's dtype: turns change no norm, and no rounding beside it."""
            basis_out, basis_in = self.basis_out.to(x.dtype), self.basis_in.to(x.dtype)

            def of_part(part: GradientFactors) -> Tensor:
                delta = part.delta.to(x.dtype) @ basis_out
                act = augmented(part.act, part.has_bias, x.dtype) @ basis_in
                return bilinear_scores(delta, act, x, part.offsets, False).to(part.dtype)

            def of_chunk(chunk: GradientFactors) -> Tensor:
                seen(chunk)
                return joined(map(of_part, chunk.chunks(_TURNED_TOKENS)))

            return some.each(of_chunk)

        return scores(factors, y, turned)

    def _back(self, y: Tensor) -> Tensor:
        """``Q_B Y Q_A^T``."""
        return self.basis_out @ y @ self.basis_in.T

    def _turned(self, delta: Tensor, act: Tensor, offsets: Tensor) -> Tensor:
        """``Q_B^T h_j Q_A`` of samples with these delta and a~: [k, C, D]."""
        (classes, width), many = self.shape, len(offsets) - 1
        early = len(delta) * (classes**2 + width**2) <= many * classes * width * (classes + width)
        if early:  # of few tokens: factor by factor
            delta, act = delta @ self.basis_out, act @ self.basis_in
        h = gradients(GradientFactors(delta, act, offsets, False))
        return h if early else self.basis_out.T @ h @ self.basis_in


class RefinedKronecker(Fitted):
    """``B (x) A + lam I`` by an eigenbasis in float32; products are those of B and A in float64.

    A solve in float32 is off by about ``eps kappa``, ``kappa = ||B|| ||A|| / lam``, so that each
    step of refinement (Wilkinson 1963) gains as much: two or three give what float64 does, where an
    eigendecomposition in float64 takes twice the time. A sample's own influence and pairs are not
    refined, unless these are few: they are those of the float32 basis where kappa says that this is
    right to 2e-6, and else of one in float64. Either basis is made where it is first needed, and
    which is used does not depend on what was solved before.

    Args:
        b: B [C, C]. a: A [D, D]. Float64, both.
    """

    def __init__(self, curvature: str, layer: Layer, damping: float, b: Tensor, a: Tensor) -> None:
        super().__init__(curvature, layer, damping)
        self._b, self._a = b, a
        self._sizes = _norm(b), _norm(a)
        self._size = math.prod(self._sizes)

    @property
    def suits(self) -> bool:
        """Whether a float32 basis is worth it, and certain to be refined in few steps."""
        kappa = self._size / self.damping
        return self._size < math.inf and kappa > 1e-30 and _error(kappa) < _SMALL

    def _product(self, v: Tensor) -> Tensor:
        v = v.double()
        out = v * self.damping
        # By strips of A's columns: a solve's memory is what of v's size exists beside it.
        for start in range(0, len(self._a), _STRIP):
            columns = slice(start, start + _STRIP)
            out[..., columns] += self._b @ (v @ self._a[:, columns])
        return out

    def _solve(self, v: Tensor, out: Tensor | None) -> Tensor:
        basis = self._single

        def single(r: Tensor, _: float) -> tuple[Tensor, int]:
            assert basis is not None
            return basis.apply_inverse(r.float()).double().div_(self._size), 0

        def double(r: Tensor, _: float) -> tuple[Tensor, int]:
            return self._exact.apply_inverse(r), 0

        steps = [double] if basis is None else [single, double]
        # A residual of that much leaves an error of X below its rounding to v's dtype.
        enough = torch.finfo(v.dtype).eps / (8 * (1 + self._size / self.damping))
        rows, goal = v if v.dim() == 3 else v[None], max(_TOLERANCE, enough)
        found = refine(self._product, steps, rows, tolerance=goal)
        self.residual = found.residual
        return found.x.view_as(v)

    def _diagonal(self) -> Tensor:
        return torch.outer(self._b.diagonal(), self._a.diagonal()).add_(self.damping)

    @cached_property
    def _single(self) -> KroneckerEigenbasis | None:
        """Of M in units of ``size``, as M could overflow or vanish in float32.

        None: it did not converge, which may be where eigenvalues repeat.
        """
        b, a = self._b, self._a
        try:
            unit = ((x / size).float() for x, size in zip((b, a), self._sizes, strict=True))
            basis = eigenbasis(*unit)
        except torch.linalg.LinAlgError:
            return None
        return in_basis(self.curvature, self.layer, self.damping / self._size, basis)

    @cached_property
    def _exact(self) -> KroneckerEigenbasis:
        """In float64."""
        basis = eigenbasis(self._b, self._a)
        return in_basis(self.curvature, self.layer, self.damping, basis)

    def _of_many(self) -> KroneckerEigenbasis:
        """For samples that are too many to be solved for one by one: in float64."""
        rough = _error(self._size / self.damping) > _ENOUGH
        if rough or self._single is None:
            return self._exact
        wide = self._single.in_float64()
        # Before the result is in the factors' dtype, whose range it would leave in units of size.
        wide.damped.mul_(self._size)
        return wide

    def _self_influence(self, factors: Factors) -> Tensor:
        return self._of_many()._self_influence(factors)

    def _pairwise(self, factors: Factors, queries: Factors) -> Tensor:
        classes, width = self.shape
        # A query takes about eight such products, an eigendecomposition in float64 fourteen.
        if queries.n * classes * width * (classes + width) <= classes**3 + width**3:
            return super()._pairwise(factors, queries)
        found, self.residual = self._of_many().pairs(factors, queries, self._product)
        return found

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"b": self._b, "a": self._a}, {"refined": True}

    @classmethod
    def _restored(cls, saved: Saved) -> Self:
        b, a = (saved.tensors[name].to(saved.layer.device) for name in ("b", "a"))
        return cls(saved.curvature, saved.layer, saved.damping, b, a)


def worth_it(b: Tensor, a: Tensor) -> bool:
    """Whether an eigenbasis in float64 takes longer than refinement from one in float32."""
    return max(len(b), len(a)) >= _FEWEST


def _norm(x: Tensor) -> float:
    """At least the largest eigenvalue: the largest sum over a row of the sizes in it."""
    return float(torch.linalg.vector_norm(x, 1, dim=1).max())


def _error(kappa: float) -> float:
    """A bound on the relative error of solves by an eigenbasis in float32."""
    return _ROUNDING * (1 + kappa)


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
