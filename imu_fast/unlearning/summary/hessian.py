"""The undamped GGN of a softmax head, summed over samples: exact, as class blocks or as K-FAC.

A sum, not a mean: the part of the forget samples can be taken away from the training set's. For a
linear softmax head it is the Hessian of the summed loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from imu_fast.curvature.ggn.dense import class_blocks, contrasts, primal_matrix
from imu_fast.curvature.kfac import kronecker_factors
from imu_fast.errors import InputError, SingularMatrixError
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.probabilities import (
    NoCurvatureError,
    augmented,
    signals_or_curvature,
    softmax,
)
from imu_fast.factors.source import Factors
from imu_fast.factors.sums import S, summed
from imu_fast.losses.output_curvature import Softmax
from imu_fast.solvers.cholesky.cholesky import damped_cholesky

Kind = Literal["exact", "blocks", "kfac"]
# The exact matrix is kept up to this order, (C - 1) D: 100 MB as a triangle, 200 MB in memory.
EXACT_ORDER = 5000
# Samples whose features are float64 at once.
_SAMPLES = 1 << 13

Apply = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Damped:
    """``M = H + damping I``: a symmetric positive definite operator on [C, D].

    Attributes:
        solve: ``M^-1 v``. product: ``M v``. Both of v [..., C, D], float64.
    """

    damping: float
    solve: Apply
    product: Apply


@dataclass(frozen=True, eq=False)
class HeadHessian(ABC):
    """``H = sum_i (diag(p_i) - p_i p_i^T) (x) a~_i a~_i^T`` over n samples, in float64.

    Attributes:
        n: samples that it is the sum over. shape: (C, D).
    """

    n: int
    shape: tuple[int, int]
    kind: ClassVar[Kind]
    loses: ClassVar[str]

    @classmethod
    @abstractmethod
    def of(cls, factors: Factors) -> Self:
        """Of these samples, undamped.

        Raises:
            InputError: their loss is no softmax cross-entropy.
        """

    def tensors(self) -> dict[str, Tensor]:
        """All that it holds, by name, for a file."""
        return self._held()

    @classmethod
    @abstractmethod
    def restored(cls, n: int, shape: tuple[int, int], tensors: dict[str, Tensor]) -> Self:
        """Of what :meth:`tensors` gave."""

    @abstractmethod
    def trace(self) -> float:
        """The sum of its eigenvalues."""

    @abstractmethod
    def damped(self, damping: float) -> Damped:
        """``H + damping I``, factored; damping > 0.

        Raises:
            SingularMatrixError: it is not positive definite; says how large a damping works.
        """

    @property
    def mean_eigenvalue(self) -> float:
        """The trace over C D."""
        return self.trace() / (self.shape[0] * self.shape[1])

    def __sub__(self, other: HeadHessian) -> Self:
        """Without the samples of another sum of the same kind."""
        return self._joined(other, -1)

    def __add__(self, other: HeadHessian) -> Self:
        """With the samples of another sum of the same kind."""
        return self._joined(other, 1)

    def _joined(self, other: HeadHessian, sign: int) -> Self:
        assert isinstance(other, type(self)) and other.shape == self.shape
        theirs = other._held()
        held: dict[str, Any] = {k: x + sign * theirs[k] for k, x in self._held().items()}
        return replace(self, n=self.n + sign * other.n, **held)

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        moved: dict[str, Any] = {name: x.to(device) for name, x in self._held().items()}
        return replace(self, **moved)

    @property
    def nbytes(self) -> int:
        """Of :meth:`tensors`."""
        return sum(x.nbytes for x in self._held().values())

    def _held(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _sum_over(factors: Factors, term: Callable[[Softmax, Tensor], S]) -> S:
    """A sum over samples; term: of their curvature and a~ [n, D], float64; new tensors."""

    def parts(chunk: GradientFactors) -> Iterator[S]:
        for part in chunk.chunks(_SAMPLES):
            yield term(softmax(part), augmented(part.act, part.has_bias))

    return factors.sums(lambda chunk: summed(parts(chunk)))


def _shape(factors: Factors) -> tuple[int, int]:
    return factors.num_classes, factors.width


@dataclass(frozen=True, eq=False)
class ExactHessian(HeadHessian):
    """The matrix itself, between contrasts of the classes: ``(C - 1) D`` squared.

    A constant over the classes changes no probability, so along it H is zero.

    Attributes:
        matrix: its upper triangle is complete, the lower one is not used.
    """

    matrix: Tensor
    kind = "exact"
    loses = "nothing: the Hessian of the head's summed loss is kept whole"

    @classmethod
    def of(cls, factors: Factors) -> Self:
        def term(outputs: Softmax, a: Tensor) -> Tensor:
            return primal_matrix(outputs.p, outputs.weight, a)

        return cls(factors.n, _shape(factors), _sum_over(factors, term))

    @property
    def order(self) -> int:
        return len(self.matrix)

    def tensors(self) -> dict[str, Tensor]:
        return {"triangle": self.matrix[_upper(self.matrix)]}

    @property
    def nbytes(self) -> int:
        return self.matrix.itemsize * self.order * (self.order + 1) // 2

    @classmethod
    def restored(cls, n: int, shape: tuple[int, int], tensors: dict[str, Tensor]) -> Self:
        order, triangle = (shape[0] - 1) * shape[1], tensors["triangle"]
        matrix = triangle.new_zeros(order, order)
        matrix[_upper(matrix)] = triangle
        return cls(n, shape, matrix)

    def trace(self) -> float:
        return float(self.matrix.diagonal().sum())

    def damped(self, damping: float) -> Damped:
        basis = contrasts(self.shape[0]).to(self.matrix)
        factor = damped_cholesky(self.matrix, damping)

        def between(v: Tensor, apply: Apply, along: float) -> Tensor:
            """``apply`` to what v is between contrasts, ``along`` times what is left of it."""
            turned = basis.T @ v
            found = apply(turned.flatten(-2).reshape(-1, self.order).T).T.reshape(turned.shape)
            return basis @ found + along * (v - basis @ turned)

        def product(x: Tensor) -> Tensor:
            upper, own = self.matrix.triu(), self.matrix.diagonal()
            return upper @ x + upper.T @ x + (damping - own)[:, None] * x

        return Damped(
            damping,
            lambda v: between(v, factor.solve, 1 / damping),
            lambda v: between(v, product, damping),
        )


def _upper(matrix: Tensor) -> Tensor:
    """Which entries are of the upper triangle."""
    return torch.ones_like(matrix, dtype=torch.bool).triu_()


@dataclass(frozen=True, eq=False)
class BlockHessian(HeadHessian):
    """The class blocks on its diagonal alone; blocks: [C, D, D]."""

    blocks: Tensor
    kind = "blocks"
    loses = "what couples the rows of two classes: blocks of one class each are kept"

    @classmethod
    def of(cls, factors: Factors) -> Self:
        def term(outputs: Softmax, a: Tensor) -> Tensor:
            return class_blocks(outputs.diagonal(), a)

        return cls(factors.n, _shape(factors), _sum_over(factors, term))

    @classmethod
    def restored(cls, n: int, shape: tuple[int, int], tensors: dict[str, Tensor]) -> Self:
        return cls(n, shape, tensors["blocks"])

    def trace(self) -> float:
        return float(self.blocks.diagonal(dim1=1, dim2=2).sum())

    def damped(self, damping: float) -> Damped:
        factor = damped_cholesky(self.blocks, damping)

        def by_class(v: Tensor, apply: Apply) -> Tensor:
            rows = v.reshape(-1, *self.shape).permute(1, 2, 0)
            return apply(rows).permute(2, 0, 1).reshape(v.shape)

        return Damped(
            damping,
            lambda v: by_class(v, factor.solve),
            lambda v: by_class(v, lambda x: self.blocks @ x) + damping * v,
        )


@dataclass(frozen=True, eq=False)
class KroneckerHessian(HeadHessian):
    """``B (x) A / n``, the sums over samples of the outputs' curvature and of ``a~ a~^T`` (K-FAC).

    Both are sums, so that of the samples that are left is had from the sums that are left.

    Attributes:
        outputs: B [C, C]. inputs: A [D, D].
    """

    outputs: Tensor
    inputs: Tensor
    kind = "kfac"
    loses = "how a sample's confidence and its features go together: K-FAC keeps a mean of each"

    @classmethod
    def of(cls, factors: Factors) -> Self:
        def term(outputs: Softmax, a: Tensor) -> tuple[Tensor, ...]:
            return outputs.sum(torch.float64), a.T @ a

        return cls(factors.n, _shape(factors), *_sum_over(factors, term))

    @classmethod
    def of_layer(cls, factors: Factors) -> Self:
        """Of an inner layer, by the signals that ``capture(..., fisher=)`` brings to it.

        B is the sum over all rows of all samples, A that over samples of the mean over their rows.
        """
        outputs, inputs = kronecker_factors(factors, signals_or_curvature)
        n = factors.n
        return cls(n, _shape(factors), n * outputs, n * inputs)

    @classmethod
    def restored(cls, n: int, shape: tuple[int, int], tensors: dict[str, Tensor]) -> Self:
        return cls(n, shape, tensors["outputs"], tensors["inputs"])

    def without_inputs_of(self, other: KroneckerHessian) -> Self:
        """Without some samples whose outputs' curvature is of other draws: they have a share of it.

        Their part ``n' / n`` of B, as if their predictions were those of any; A exactly.
        """
        outputs = self.outputs * (1 - other.n / self.n)
        left = self.n - other.n
        return replace(self, n=left, outputs=outputs, inputs=self.inputs - other.inputs)

    def trace(self) -> float:
        return float(self.outputs.trace() * self.inputs.trace()) / self.n

    def damped(self, damping: float) -> Damped:
        values_out, basis_out = torch.linalg.eigh(self.outputs)
        values_in, basis_in = torch.linalg.eigh(self.inputs)
        values = torch.outer(values_out, values_in) / self.n
        shifted = values + damping
        if not bool((shifted > 0).all()):
            least = float(values.min())
            raise SingularMatrixError(
                f"B (x) A / n + {damping:g} I is not positive definite: its least eigenvalue is "
                f"{least + damping:.3g}; the smallest damping that works is about {-least:.3g}",
                pivot=int(shifted.argmin()) + 1,
                smallest_damping=-least,
            )

        def within(v: Tensor, by: Tensor) -> Tensor:
            return basis_out @ ((basis_out.T @ v @ basis_in) * by) @ basis_in.T

        return Damped(
            damping,
            lambda v: within(v, shifted.reciprocal()),
            lambda v: within(v, shifted),
        )


HESSIANS: dict[Kind, type[HeadHessian]] = {
    "exact": ExactHessian,
    "blocks": BlockHessian,
    "kfac": KroneckerHessian,
}


def kind_for(classes: int, width: int) -> Kind:
    """Exact up to EXACT_ORDER, K-FAC beyond."""
    return "exact" if (classes - 1) * width <= EXACT_ORDER else "kfac"


def head_hessian(factors: Factors, kind: Kind | None = None) -> HeadHessian:
    """Of these samples; kind None: :func:`kind_for` their layer.

    Raises:
        InputError: their loss is no softmax cross-entropy of the head's own output, or there is but
            one class.
    """
    if factors.num_classes < 2:
        raise InputError(
            f"the head has {factors.num_classes} output: a softmax needs two classes or more"
        )
    try:
        return HESSIANS[kind or kind_for(*_shape(factors))].of(factors)
    except NoCurvatureError as error:
        raise InputError(
            f"between the head {factors.name!r} and the logits are steps (a softmax, a norm), so "
            "that the Hessian at its output is not in closed form; use an ascent with "
            "scope='layers' (default: the head) or scope='all', which runs the model itself"
        ) from error
