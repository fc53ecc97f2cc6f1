"""What a curvature is and what comes of fitting it; single samples without a closed form."""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from imu_fast import distributed
from imu_fast.ambient import no_autocast
from imu_fast.curvature.contraction import scores
from imu_fast.curvature.gradients import gradient_slabs
from imu_fast.curvature.in_step import the_same
from imu_fast.curvature.parameters import scipy_operator
from imu_fast.errors import InputError, check_flag, check_tensor, is_finite
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.joint import joint
from imu_fast.factors.operands import check_result
from imu_fast.factors.sharded import ShardedFactors
from imu_fast.factors.source import Factors, in_memory, is_factors
from imu_fast.options import Options
from imu_fast.storage import save_tensors, writable

# Of the files that Fitted.save writes; a reader refuses any other. 1: K-FAC of convolutions counted
# an input that samples without a signal did not have.
OPERATOR_FORMAT = 2


class Curvature(Options, ABC):
    """A matrix M [P, P] over the parameters of a linear layer, P = C D, damped: what to fit."""

    @property
    def separates(self) -> bool:
        """Whether M couples no two outputs of the layer, so that it may be fitted to some alone."""
        return False

    @abstractmethod
    def fit(self, factors: Factors) -> Fitted:
        """M of these samples.

        Raises:
            InputError: the factors lack what M is made of, or M is too large to be held.
        """


class Layer(NamedTuple):
    """The layer whose parameters [C, D] a matrix is over."""

    num_classes: int
    width: int
    has_bias: bool
    device: torch.device

    @classmethod
    def of(cls, factors: Factors) -> Layer:
        """The factors' own."""
        return cls(factors.num_classes, factors.width, factors.has_bias, factors.device)

    def __str__(self) -> str:
        bias = "with" if self.has_bias else "without"
        return f"({self.num_classes}, {self.width}) {bias} a bias on {self.device}"


@dataclass(frozen=True)
class Saved:
    """What a file says of M."""

    curvature: str
    layer: Layer
    damping: float
    tensors: dict[str, Tensor]
    options: dict[str, Any]


class Fitted(ABC):
    """M of some samples, damped: a symmetric positive definite operator on [C, D].

    ``M @ v`` is :meth:`product`. Nothing here is followed by autograd. Of a layer with a bias the
    last of the D columns is the bias.

    Args:
        curvature: the name of what was fitted. layer: whose parameters M is over.

    Attributes:
        shape: (C, D). has_bias: whether D = d + 1. device: of M, and so of what it is applied to.
        dtype: what M is held in.
        damping: lam, as it was added (or is the least of a diagonal that is clamped): in absolute
            terms also where it was given relative to the mean eigenvalue; 0.0 of the identity.
        residual: relative residual ``||M X - v|| / ||v||`` of the last solve, the largest where
            there were several right-hand sides; 0.0 where the solve is elementwise.
    """

    def __init__(
        self, curvature: str, layer: Layer, damping: float, dtype: torch.dtype = torch.float64
    ) -> None:
        self.curvature, self.layer, self.damping, self.dtype = curvature, layer, damping, dtype
        self.shape, self.has_bias = (layer.num_classes, layer.width), layer.has_bias
        self.device, self.residual = layer.device, 0.0

    @property
    def reads(self) -> Factors | None:
        """The samples that products and solves go on reading, if any."""
        return None

    @joint
    @no_autocast
    @torch.no_grad()
    def product(self, v: Tensor) -> Tensor:
        """``M v``; v [C, D] or [m, C, D]; in v's dtype.

        Half precision is multiplied and added up in float32 or better, and rounded once.

        Raises:
            InputError: v has another shape, is elsewhere, not finite or no floating-point tensor,
                or another in each of the processes that share M's samples; the result is beyond
                the range of v's dtype.
        """
        v = self._check("v", v)
        found = _rounded("M v", self._product(_at_least_single(v)), v.dtype)
        return _finite("M v", found)

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.product(v)

    @joint
    @no_autocast
    @torch.no_grad()
    def solve(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """``X = M^-1 v``; v and X [C, D], or [m, C, D]; in v's dtype.

        Solved in float64, but in v's or M's dtype where the solve is elementwise (half precision
        in float32), and rounded once. For the digits that float32 has not, pass ``v.double()``.

        A residual above the curvature's tolerance is logged, and always to be read in
        ``residual``, which is that of X before it is rounded.

        Args:
            out: where X is to go, in its dtype; may be v itself.

        Raises:
            InputError: as :meth:`product`.
            SingularMatrixError: M is not positive definite in float64.
        """
        v = self._check("v", v)
        if out is not None:
            check_tensor("out", out, "floating", "of v's shape")
        if out is not None and out.shape != v.shape:
            raise InputError(f"out has shape {tuple(out.shape)}; expected v's, {tuple(v.shape)}")
        return _finite("M^-1 v", self._answer(v, out))

    def _answer(self, v: Tensor, out: Tensor | None) -> Tensor:
        """X of a v that fits, in its dtype or in ``out``; finite or not."""
        x = self._solve(_at_least_single(v), out)
        if out is None:
            return _rounded("M^-1 v", x, v.dtype)
        return out if x is out else out.copy_(_rounded("M^-1 v", x, out.dtype, "out"))

    @joint
    @no_autocast
    @torch.no_grad()
    def diagonal(self) -> Tensor:
        """The diagonal of M, damping included: [C, D], in the dtype that M is held in; a copy."""
        return self._diagonal()

    def linear_operator(self, inverse: bool = False) -> Any:
        """M, or its inverse, as a ``scipy.sparse.linalg.LinearOperator`` of shape (P, P), P = C D.

        Float64; to be passed to ``eigsh``, ``cg`` and the like. The order of the P parameters is
        PyTorch's, that of ``parameters_to_vector(layer.parameters())``: ``[weight.flatten(),
        bias]``; :func:`imu_fast.matrix_to_vector` and :func:`imu_fast.vector_to_matrix` go between
        it and [C, D].

        Args:
            inverse: each application is a solve, to the curvature's tolerance.

        Raises:
            InputError: scipy is not installed (``pip install 'imu_fast[demo]'``).
        """
        check_flag("inverse", inverse)
        apply = self.solve if inverse else self.product
        return scipy_operator(apply, self.shape, self.has_bias, self.device)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write M to a safetensors file, which :func:`imu_fast.load_operator` reads.

        Under a temporary name first, so that it is whole or absent, and with a checksum. What was
        loaded gives the same bits as this on the same machine. Its size: nothing of ``identity``,
        8 C D bytes of ``fisher_diag`` (4 from float32), at most 8 (C D + C^2 + D^2) of ``kfac``
        and ``ekfac``; ``ggn``, ``ggn_block`` and ``fisher`` keep their samples' factors, about
        N (C + d) numbers in these's dtype, and the curvature of their loss
        where delta does not tell it, and factor anew.

        Raises:
            InputError: the path cannot be written; the samples are shared among processes, or
                their factors beyond 4 GB.
            WriteError: the file system refuses; what was there is untouched.
        """
        writable(path)
        tensors, options = self._state()
        writable(path, size=sum(tensor.nbytes for tensor in tensors.values()))
        found = {
            "format": OPERATOR_FORMAT,
            "curvature": self.curvature,
            "damping": self.damping,
            "shape": list(self.shape),
            "has_bias": self.has_bias,
            "dtype": str(self.dtype).removeprefix("torch."),
            "options": options,
        }
        save_tensors(path, tensors, {"operator": json.dumps(found)})

    @joint
    @no_autocast
    @torch.no_grad()
    def self_influence(self, factors: Factors) -> Tensor:
        """``g_i^T M^-1 g_i`` of every sample of ``factors``: [n].

        Raises:
            InputError: they are of another layer's shape, or elsewhere.
        """
        self._check_layer("factors", factors)
        return check_result("self-influence", self._self_influence(factors), factors)

    @joint
    @no_autocast
    @torch.no_grad()
    def pairwise(self, factors: Factors, queries: Factors) -> Tensor:
        """``g_i^T M^-1 h_j`` of the samples of both sets: [n, m].

        ``residual`` is the largest, where queries are solved for (under ``kfac`` and ``ekfac`` of
        their sum, each of unit size). Shared queries are gathered in each process.

        Raises:
            InputError: as :meth:`self_influence`.
        """
        self._check_layer("factors", factors)
        self._check_layer("queries", queries)
        if isinstance(queries, ShardedFactors):
            queries, own = queries.gathered(), slice(None)
        else:
            queries, own = self._of_all(queries)
        found = self._pairwise(factors, queries)[:, own]
        return check_result("influence", found, factors, queries)

    def _of_all(self, factors: Factors) -> tuple[Factors, slice]:
        """Samples to be solved for one by one, which processes that share M's have to do in step.

        Returns:
            Those of all processes where each has its own, and the places of this one's.
        """
        if not isinstance(self.reads, ShardedFactors):
            return factors, slice(None)
        if not isinstance(factors, ShardedFactors):
            whole, group = in_memory(factors, "queries"), self.reads.group
            same = [distributed.alike(x, group) for x in (whole.delta, whole.act, whole.offsets)]
            if all(same):
                return whole, slice(None)
            factors = ShardedFactors(whole, group)
        return factors.gathered(), factors.here

    @abstractmethod
    def _product(self, v: Tensor) -> Tensor:
        """``M v``, in v's dtype or a wider one."""

    @abstractmethod
    def _solve(self, v: Tensor, out: Tensor | None) -> Tensor:
        """X, which may be written to ``out`` (and then is it); v is not changed otherwise."""

    @abstractmethod
    def _diagonal(self) -> Tensor:
        """Of M: [C, D], a new tensor."""

    @abstractmethod
    def _self_influence(self, factors: Factors) -> Tensor: ...

    @abstractmethod
    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What M is made of, for a file: tensors, and what json can write."""

    @classmethod
    @abstractmethod
    def _restored(cls, saved: Saved) -> Self:
        """M of what :meth:`_state` gave: the same bits, whatever was solved with it before."""

    def _pairwise(self, factors: Factors, queries: Factors) -> Tensor:
        """By one solve per query."""
        out = torch.empty(factors.n_here, queries.n, dtype=factors.dtype, device=factors.device)
        first, worst = 0, 0.0
        for chunk in queries.chunks():
            for _, h in gradient_slabs(chunk):
                x = self._solve(h, h).to(out.device)  # h is ours
                worst = max(worst, self.residual)
                last = first + len(h)
                out[:, first:last] = scores(factors, x)
                first = last
        self.residual = worst
        return out

    def _check(self, argument: str, v: Tensor) -> Tensor:
        """v; where M's samples are shared among processes, the same bits in all of them."""
        check_tensor(argument, v, "floating", "[C, D]")
        if v.dim() not in (2, 3) or tuple(v.shape[-2:]) != self.shape or not len(v):
            classes, width = self.shape
            raise InputError(
                f"{argument} has shape {tuple(v.shape)}; expected [{classes}, {width}], or "
                f"[m, {classes}, {width}] for m >= 1 of them"
            )
        if v.device != self.device:
            raise InputError(f"{argument} is on {v.device}, M on {self.device}; move it with .to()")
        if not is_finite(v):
            raise InputError(f"{argument} is not finite; remove the NaN or infinite entries")
        return v if self.reads is None else the_same(argument, v, self.reads)

    def _check_layer(self, argument: str, factors: Factors) -> None:
        if not is_factors(factors):
            raise InputError(
                f"{argument} is a {type(factors).__name__}; pass GradientFactors of one layer, "
                "which imu_fast.capture(model, data) makes"
            )
        found = Layer.of(factors)
        if found != self.layer:
            raise InputError(
                f"{argument} have (C, D) = {found}, M has {self.layer}; capture both from the same "
                "model and layer"
            )


def _at_least_single(v: Tensor) -> Tensor:
    return v.float() if v.itemsize < 4 else v


def _rounded(what: str, x: Tensor, dtype: torch.dtype, argument: str = "v") -> Tensor:
    """x in the dtype of an argument; raise InputError where that makes infinity of a number."""
    if torch.finfo(dtype).max < torch.finfo(x.dtype).max:
        largest = float(x.abs().max())
        if torch.finfo(dtype).max < largest < math.inf:
            raise InputError(
                f"{argument} is {dtype}, in which {what}, up to {largest:.3g}, is infinite; pass "
                f"{argument} in a wider dtype"
            )
    return x.to(dtype)


def _finite(what: str, x: Tensor) -> Tensor:
    """x; raise InputError where it is beyond the range of its dtype."""
    if is_finite(x):
        return x
    raise InputError(
        f"{what} is not finite in {x.dtype}: v is too large for this damping; pass v.double(), or "
        "a larger damping"
    )


@no_autocast
@torch.no_grad()
def solved(fitted: Fitted, v: Tensor, out: Tensor | None = None) -> Tensor:
    """X of a v that is known to fit, as it is solved for, in float64 or in v's dtype: for scores.

    What is not finite in v or X shows there, so that nothing of size [C, D] is looked through.

    Args:
        out: where X may go, in v's dtype; may be v itself.
    """
    return fitted._solve(_at_least_single(v), out)


def self_influence(fitted: Fitted, factors: Factors) -> tuple[Tensor, float]:
    """``g_i^T M^-1 g_i`` [n] by one solve per sample, and the largest residual of them."""
    worst = 0.0

    def solved(chunk: GradientFactors) -> Tensor:
        nonlocal worst
        out = chunk.delta.new_empty(chunk.n)
        # In float64 from the start: an ill-conditioned M magnifies the rounding of products.
        for samples, g in gradient_slabs(chunk.to(dtype=torch.float64)):
            # What is not finite shows in the sums, which are looked at once, all of them.
            out[samples] = (fitted._solve(g, None) * g).sum(dim=(1, 2)).to(out)
            worst = max(worst, fitted.residual)
        return out

    return factors.each(solved), worst
