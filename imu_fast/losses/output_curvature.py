"""The second derivative of the loss in a layer's outputs, token by token, in three forms.

``GGN = 1/n sum_t B_t (x) a~_t a~_t^T``. Of a confident softmax neither ``1 - p`` nor
``diag(p) - p p^T`` may be formed by subtraction, which leaves rounding of the size of one where the
result is tiny: of the likeliest class ``1 - p`` is the sum of the others, and functions of the
classes are taken relative to their value there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from imu_fast.errors import InputError, check_finite_rows, check_tensor
from imu_fast.ops.symmetric import add_symmetric, rows_at_once


def complement(x: Tensor) -> Tensor:
    """What the other entries of a row sum to: [N, C]; x [N, C], not negative.

    Only the largest is more than half of the sum: from that the sum is formed without it.
    """
    top = x.argmax(dim=1, keepdim=True)
    others = x.scatter(1, top, 0.0).sum(dim=1, keepdim=True)
    return (x.sum(dim=1, keepdim=True) - x).scatter_(1, top, others)


class StoredCurvature(ABC):
    """What is kept of each token beside ``delta``, to make ``B_t`` of: dataclasses of tensors."""

    # How it is written down.
    form: ClassVar[Any]

    def tensors(self) -> dict[str, Tensor]:
        """By name, those that there are; the first axis of each is the tokens'."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Of every tensor."""
        return type(self)(**{name: change(x) for name, x in self.tensors().items()})

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The tokens of all, one after the other."""
        names = parts[0].tensors()
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    @abstractmethod
    def resolved(self, delta: Tensor, labels: Tensor | None, scale: Tensor) -> OutputCurvature:
        """``B_t``, in float64; delta [N, C], scale [N], float64: the ``c_t = 1/T_i``."""


class OutputCurvature(StoredCurvature):
    """``B_t`` [C, C] of N tokens: the second derivative of a sample's loss in a token's outputs.

    As delta is the first, so where a sample's loss is a mean over its T tokens, 1/T is in both.
    Made by :meth:`dense`, :meth:`diagonal_of` and :meth:`softmax`.
    """

    @staticmethod
    def dense(b: Tensor) -> OutputCurvature:
        """``B_t`` as they are: [N, C, C], floating, symmetric, positive semidefinite.

        Raises:
            InputError: they are not (says which token).
        """
        _check("curvature", b, 3)
        if b.shape[1] != b.shape[2]:
            raise InputError(f"curvature has shape {tuple(b.shape)}; pass [N, C, C]")
        wide = b.double()
        size = wide.flatten(1).norm(dim=1)
        slack = 64 * torch.finfo(b.dtype).eps * size
        uneven = (wide - wide.mT).flatten(1).norm(dim=1) > slack
        _refuse("curvature", uneven, "is not symmetric")
        if len(b) and b.shape[1]:
            _refuse("curvature", torch.linalg.eigvalsh(wide)[:, 0] < -slack, "is indefinite")
        return Dense(_wide(b))

    @staticmethod
    def diagonal_of(h: Tensor) -> OutputCurvature:
        """``B_t = diag(h_t)``: [N, C], floating, not negative.

        Raises:
            InputError: it is not (says which token).
        """
        _check("curvature", h, 2)
        _refuse("curvature", (h < 0).any(dim=1), "is negative")
        return Diagonal(_wide(h))

    @staticmethod
    def softmax(p: Tensor, weight: Tensor | None = None) -> OutputCurvature:
        """``B_t = weight_t (diag(p_t) - p_t p_t^T)``: p [N, C], weight [N], or None: 1.

        Raises:
            InputError: rows of p are not probabilities, or a weight is negative.
        """
        _check("p", p, 2)
        weight = check_tensor("weight", p.new_ones(len(p)) if weight is None else weight)
        if weight.shape != p.shape[:1] or weight.device != p.device:
            raise InputError(
                f"weight has shape {tuple(weight.shape)} on {weight.device}; expected "
                f"({len(p)},) on {p.device}"
            )
        _check("weight", weight, 1)
        _refuse("weight", weight < 0, "is negative")
        off = (p < 0).any(dim=1) | ((p.double().sum(dim=1) - 1).abs() > 1e-2)
        _refuse("p", off, "is no row of probabilities, which are not negative and sum to one")
        return Softmax(_wide(p, weight), _wide(weight, p))

    @property
    @abstractmethod
    def operand(self) -> Tensor:
        """What :func:`imu_fast.ops.ggn_product.ggn_product` takes for this form."""

    def factor(self) -> Tensor:
        """What multiplies the operand of each token: [N]."""
        return self.operand.new_ones(len(self.operand))

    @abstractmethod
    def diagonal(self) -> Tensor:
        """``diag(B_t)``: [N, C], float64, not negative, a new tensor."""

    @abstractmethod
    def diagonal_in(self, basis: Tensor) -> Tensor:
        """``diag(Q^T B_t Q)``: [N, C], float64, not negative; basis: Q [C, C]."""

    @abstractmethod
    def sum(self, dtype: torch.dtype) -> Tensor:
        """``sum_t B_t``: [C, C], in this dtype."""

    @abstractmethod
    def matrices(self) -> Tensor:
        """``B_t``: [N, C, C]."""

    @abstractmethod
    def root(self) -> Tensor:
        """``S_t`` [N, C, C] with ``S_t S_t^T = B_t``; [N, C] stands for a diagonal one."""

    def size(self) -> Tensor:
        """At least the trace of ``B_t``, and twice its norm: [N]."""
        return 2 * self.diagonal().sum(dim=1)

    def resolved(self, delta: Tensor, labels: Tensor | None, scale: Tensor) -> OutputCurvature:
        """Itself; probabilities of a softmax are normalised in float64."""
        return self.map(Tensor.double)


def _check(name: str, value: Tensor, dims: int) -> None:
    check_tensor(name, value)
    if value.dim() != dims or not value.numel():
        raise InputError(
            f"{name} has shape {tuple(value.shape)}; pass a tensor of {dims} axes, none empty"
        )
    check_finite_rows(name, value, "token")


def _wide(value: Tensor, *others: Tensor) -> Tensor:
    """At least float32, and as wide as what it is multiplied with."""
    dtype = torch.float32
    for tensor in (value, *others):
        dtype = torch.promote_types(dtype, tensor.dtype)
    return value.to(dtype)


def _refuse(name: str, bad: Tensor, why: str) -> None:
    if bool(bad.any()):
        raise InputError(f"{name}[{int(torch.nonzero(bad)[0])}] {why}")


@dataclass(frozen=True, eq=False)
class Softmax(OutputCurvature):
    """``weight (diag(p) - p p^T)``.

    Attributes:
        p: [N, C]; rows sum to one. weight: [N].
    """

    p: Tensor
    weight: Tensor
    form: ClassVar[Any] = "softmax"

    @property
    def operand(self) -> Tensor:
        """p."""
        return self.p

    def factor(self) -> Tensor:
        """The weight."""
        return self.weight

    def resolved(self, delta: Tensor, labels: Tensor | None, scale: Tensor) -> Softmax:
        """Where a row sums to 1 + 1e-7, B has a negative eigenvalue: it is normalised again."""
        p = self.p.double()
        return Softmax(p / p.sum(dim=1, keepdim=True), self.weight.double())

    def top(self) -> Tensor:
        """The likeliest class: [N] int64."""
        return self.p.argmax(dim=1)

    def diagonal(self) -> Tensor:
        """``p (1 - p)``."""
        return complement(self.p).mul_(self.p).mul_(self.weight[:, None])

    def diagonal_in(self, basis: Tensor) -> Tensor:
        """``E q^2 - (E q)^2`` of every column q of Q, relative to q at the likeliest class."""
        top = self.top()
        rest = self.p.scatter(1, top[:, None], 0.0)
        at = basis[top]
        others = rest.sum(dim=1, keepdim=True)
        first = rest @ basis
        second = rest @ basis.square() - at * (2 * first - others * at)
        variance = second.sub_((first - others * at).square_()).clamp_min_(0)
        return variance.mul_(self.weight[:, None])

    def sum(self, dtype: torch.dtype) -> Tensor:
        """``- sum w p p^T`` off the diagonal, some tokens at a time."""
        classes = self.p.shape[1]
        out = self.p.new_zeros(classes, classes, dtype=dtype)
        own = torch.zeros_like(out[0])

        def piece(p: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            own.add_(Softmax(p, weight).diagonal().sum(dim=0))
            q = p.to(dtype)
            return q * weight[:, None].to(dtype), q

        parts = (x.split(rows_at_once(classes)) for x in (self.p, self.weight))
        add_symmetric(out, map(piece, *parts), alpha=-1.0)
        out.diagonal().copy_(own)
        return out

    def matrices(self) -> Tensor:
        """Of rows that sum to zero."""
        out = (self.p * -self.weight[:, None])[:, :, None] * self.p[:, None]
        out.diagonal(dim1=1, dim2=2).copy_(self.diagonal())
        return out

    def root(self) -> Tensor:
        """``sqrt(w) (diag(sqrt p) - p sqrt(p)^T)``."""
        root = self.p.sqrt()
        s = self.p[:, :, None] * -root[:, None, :]
        s.diagonal(dim1=1, dim2=2).copy_(root * complement(self.p))
        return s.mul_(self.weight.sqrt()[:, None, None])

    def size(self) -> Tensor:
        """The weight: the trace is below it, the norm at most half of it."""
        return self.weight


@dataclass(frozen=True, eq=False)
class LabelSoftmax(StoredCurvature):
    """A softmax whose p is in ``delta = weight (p - onehot(label))`` but at the label.

    There ``delta + weight`` would have the absolute rounding of weight, where p may be tiny.

    Attributes:
        label_p: [N], p of the label. size: [N], weight over ``c_t``; None: 1.
    """

    label_p: Tensor
    size: Tensor | None = None
    form: ClassVar[Any] = "label_softmax"

    def resolved(self, delta: Tensor, labels: Tensor | None, scale: Tensor) -> Softmax:
        """p, normalised again."""
        assert labels is not None
        weight = scale if self.size is None else scale * self.size.double()
        # Without weight nothing is known of p, and nothing depends on it.
        p = delta.double() / weight.where(weight > 0, 1.0)[:, None]
        p.scatter_(1, labels[:, None], self.label_p.double()[:, None])
        p.clamp_min_(0)
        return Softmax(p.div_(p.sum(dim=1, keepdim=True)), weight)


@dataclass(frozen=True, eq=False)
class Diagonal(OutputCurvature):
    """``diag(h)``; h: [N, C]."""

    h: Tensor
    form: ClassVar[Any] = "diagonal"

    @property
    def operand(self) -> Tensor:
        """h."""
        return self.h

    def diagonal(self) -> Tensor:
        """h, a copy."""
        return self.h.clone()

    def diagonal_in(self, basis: Tensor) -> Tensor:
        """``sum_c h_c q_c^2``."""
        return self.h @ basis.square()

    def sum(self, dtype: torch.dtype) -> Tensor:
        """``diag(sum h)``."""
        return self.h.sum(dim=0).to(dtype).diag()

    def matrices(self) -> Tensor:
        """``diag(h)``."""
        return torch.diag_embed(self.h)

    def root(self) -> Tensor:
        """``sqrt h``."""
        return self.h.sqrt()


@dataclass(frozen=True, eq=False)
class Dense(OutputCurvature):
    """Any symmetric positive semidefinite ``B_t``; b: [N, C, C]."""

    b: Tensor
    form: ClassVar[Any] = "dense"

    @property
    def operand(self) -> Tensor:
        """b."""
        return self.b

    def diagonal(self) -> Tensor:
        """As it is; rounding below zero is cut off."""
        return self.b.diagonal(dim1=1, dim2=2).clamp_min(0)

    def diagonal_in(self, basis: Tensor) -> Tensor:
        """``q^T B q`` of every column q of Q."""
        return ((self.b @ basis) * basis).sum(dim=1).clamp_min_(0)

    def sum(self, dtype: torch.dtype) -> Tensor:
        """As it is."""
        return self.b.sum(dim=0).to(dtype)

    def matrices(self) -> Tensor:
        """As they are."""
        return self.b

    def root(self) -> Tensor:
        """By the eigenvectors."""
        values, vectors = torch.linalg.eigh(self.b)
        return vectors * values.clamp_min(0).sqrt()[:, None, :]
