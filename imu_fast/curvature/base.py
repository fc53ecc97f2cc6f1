"""What a curvature is and what comes of fitting it; single samples without a closed form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from imu_fast.errors import InputError
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.outputs import sum_of_outputs
from imu_fast.factors.source import Factors
from imu_fast.ops.bilinear_scores import bilinear_scores
from imu_fast.options import Options


class Curvature(Options, ABC):
    """A matrix M [P, P] over the parameters of a linear layer, P = C D, damped: what to fit.

    Attributes:
        separates: whether M couples no two outputs of the layer, so that it may be fitted to some
            of them alone.
    """

    separates: ClassVar[bool] = False

    @abstractmethod
    def fit(self, factors: Factors) -> Fitted:
        """M of these samples.

        Raises:
            InputError: the factors lack what M is made of, or M is too large to be held.
        """


class Fitted(ABC):
    """M of some samples. ``M @ v`` is :meth:`product`. Nothing here is followed by autograd.

    Args:
        shape: (C, D). device: of M, and so of what it is applied to.

    Attributes:
        residual: relative residual ``||M X - v|| / ||v||`` of the last solve, the largest where
            there were several right-hand sides; 0.0 where the solve is elementwise.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.shape, self.device, self.residual = shape, device, 0.0

    @torch.no_grad()
    def product(self, v: Tensor) -> Tensor:
        """``M v``; v [C, D] or [m, C, D]; in v's dtype.

        Raises:
            InputError: v has another shape, is elsewhere or no floating-point tensor.
        """
        self._check("v", v)
        # Half precision is the caller's, not that of sums.
        return self._product(v.float() if v.itemsize < 4 else v).to(v.dtype)

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.product(v)

    @torch.no_grad()
    def solve(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """``X = M^-1 v``; v and X [C, D], or [m, C, D].

        X is float64 but where the solve is elementwise: there it has v's dtype, or the factors' if
        that is wider.

        A residual above the curvature's tolerance is logged, and always to be read in
        ``residual``.

        Args:
            out: where X is to go, in its dtype; may be v itself.

        Raises:
            InputError: as :meth:`product`; v is not finite where it is solved by iteration.
            SingularMatrixError: M is not positive definite in float64.
        """
        self._check("v", v)
        if out is None:
            return self._solve(v, None)
        if out.shape != v.shape:
            raise InputError(f"out has shape {tuple(out.shape)}; expected v's, {tuple(v.shape)}")
        x = self._solve(v, out)
        return out if x is out else out.copy_(x)

    @torch.no_grad()
    def self_influence(self, factors: Factors) -> Tensor:
        """``g_i^T M^-1 g_i`` of every sample of ``factors``: [n].

        Raises:
            InputError: they are of another layer's shape, or elsewhere.
        """
        self._check_layer("factors", factors)
        return self._self_influence(factors)

    @torch.no_grad()
    def pairwise(self, factors: Factors, queries: Factors) -> Tensor:
        """``g_i^T M^-1 h_j`` of the samples of both sets: [n, m].

        ``residual`` is the largest, where queries are solved for.

        Raises:
            InputError: as :meth:`self_influence`, or queries are shared among processes.
        """
        self._check_layer("factors", factors)
        self._check_layer("queries", queries)
        check_whole("queries", queries)
        return self._pairwise(factors, queries)

    @abstractmethod
    def _product(self, v: Tensor) -> Tensor:
        """``M v``, in v's dtype or a wider one."""

    @abstractmethod
    def _solve(self, v: Tensor, out: Tensor | None) -> Tensor:
        """X, which may be written to ``out`` (and then is it); v is not changed otherwise."""

    @abstractmethod
    def _self_influence(self, factors: Factors) -> Tensor: ...

    def _pairwise(self, factors: Factors, queries: Factors) -> Tensor:
        """By one solve per query."""
        out = torch.empty(factors.n_here, queries.n, dtype=factors.dtype, device=factors.device)
        first, worst = 0, 0.0
        for chunk in queries.chunks():
            for _, h in gradient_slabs(chunk):
                x = self._solve(h, None).to(out)
                worst = max(worst, self.residual)
                last = first + len(h)
                out[:, first:last] = scores(factors, x)
                first = last
        self.residual = worst
        return out

    def _check(self, argument: str, v: Tensor) -> None:
        if not isinstance(v, Tensor) or not v.is_floating_point():
            found = str(v.dtype) if isinstance(v, Tensor) else type(v).__name__
            raise InputError(f"{argument} is {found}; pass a floating-point tensor [C, D]")
        if v.dim() not in (2, 3) or tuple(v.shape[-2:]) != self.shape or not len(v):
            classes, width = self.shape
            raise InputError(
                f"{argument} has shape {tuple(v.shape)}; expected [{classes}, {width}], or "
                f"[m, {classes}, {width}] for m >= 1 of them"
            )
        if v.device != self.device:
            raise InputError(f"{argument} is on {v.device}, M on {self.device}; move it with .to()")

    def _check_layer(self, argument: str, factors: Factors) -> None:
        found = (factors.num_classes, factors.width), factors.device
        if found != (self.shape, self.device):
            raise InputError(
                f"{argument} have (C, D) = {found[0]} on {found[1]}, M has {self.shape} on "
                f"{self.device}; capture both from the same model and layer"
            )


def scores(factors: Factors, x: Tensor) -> Tensor:
    """``<g_i, X>`` of every sample that is here: [n], or [n, m] for x [m, C, D]."""

    def term(part: Factors, classes: slice) -> Tensor:
        rows = x[..., classes, :]
        return part.each(
            lambda chunk: bilinear_scores(
                chunk.delta, chunk.act, rows, chunk.offsets, chunk.has_bias
            )
        )

    return sum_of_outputs(factors, term)


def check_whole(argument: str, factors: Factors) -> None:
    """Raise InputError where they are shared among processes."""
    if factors.n_here != factors.n:
        raise InputError(
            f"{argument} are shared among processes ({factors.n_here} of {factors.n} samples are "
            "here), which one solve per sample cannot be; pass all of them to every process"
        )


# Elements of the per-sample gradients [k, C, D] that exist at once: 128 MB in float64.
_ELEMENTS = 1 << 24


def gradients(chunk: GradientFactors) -> Tensor:
    """Per-sample gradients [n, C, D]."""
    if not chunk.is_flat:
        # A sample's own gradient: the mean over a set of one.
        return torch.stack([chunk.samples(i, i + 1).mean_gradient() for i in range(chunk.n)])
    out = chunk.delta.new_empty(chunk.n, chunk.num_classes, chunk.width)
    d = chunk.feature_dim
    torch.mul(chunk.delta[:, :, None], chunk.act[:, None, :], out=out[..., :d])
    if chunk.has_bias:
        out[..., d] = chunk.delta
    return out


def gradient_slabs(
    chunk: GradientFactors, elements: int = _ELEMENTS
) -> Iterator[tuple[slice, Tensor]]:
    """Per-sample gradients ``(samples, [k, C, D])``, about so many elements at a time."""
    step = max(1, elements // (chunk.num_classes * chunk.width))
    for start in range(0, chunk.n, step):
        stop = min(start + step, chunk.n)
        yield slice(start, stop), gradients(chunk.samples(start, stop))


def self_influence(fitted: Fitted, factors: Factors) -> tuple[Tensor, float]:
    """``g_i^T M^-1 g_i`` [n] by one solve per sample, and the largest residual of them."""
    worst = 0.0

    def solved(chunk: GradientFactors) -> Tensor:
        nonlocal worst
        out = chunk.delta.new_empty(chunk.n)
        # In float64 from the start: an ill-conditioned M magnifies the rounding of products.
        for samples, g in gradient_slabs(chunk.to(dtype=torch.float64)):
            out[samples] = (fitted.solve(g) * g).sum(dim=(1, 2)).to(out)
            worst = max(worst, fitted.residual)
        return out

    return factors.each(solved), worst
