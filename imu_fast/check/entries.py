"""What is checked: each operation's operands, and where its plain form, bounds and counts are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from imu_fast import reference
from imu_fast.check import bounds, counts, plain
from imu_fast.ops.conjugate_gradient import Iterates, start
from imu_fast.ops.linear_softmax import Head, Normaliser
from imu_fast.ops.named import operations
from imu_fast.ops.objective import LABEL_OBJECTIVES, NEEDS_AUXILIARY, OBJECTIVES
from imu_fast.solvers.cholesky.solve import damped_cholesky_solve

Operands = tuple[Any, ...]
DAMPING = 0.1
RATES = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "alpha": 0.05}


@dataclass(frozen=True)
class Shape:
    """Tokens of each sample, classes C and features d; ``why`` is what it is there for."""

    why: str
    lengths: tuple[int, ...]
    C: int
    d: int
    has_bias: bool = True

    @property
    def N(self) -> int:
        return sum(self.lengths)

    @property
    def width(self) -> int:
        return self.d + self.has_bias

    def normal(self, *size: int, of: int = 0) -> Tensor:
        """Normal numbers in float64 on the CPU, the same ones every time."""
        generator = torch.Generator().manual_seed(sum(size) + 1000 * of)
        return torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")

    @property
    def labels(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.N)
        return torch.randint(self.C, (self.N,), generator=generator, device="cpu")

    @property
    def offsets(self) -> Tensor:
        return torch.tensor([0, *self.lengths], device="cpu").cumsum(0)


def flat(why: str, N: int, C: int, d: int) -> Shape:
    return Shape(why, (1,) * N, C, d)


# Against the definition, whose loops are slow, as is the interpreter, which is on the CPU.
_RAGGED = Shape("ragged tokens, samples without any", (0, 3, 1, 0, 21, 7, 2, 34, 0), 35, 33, False)
CHECKED = {
    "cpu": (flat("more than a tile of 64 on every axis", 70, 69, 67), _RAGGED),
    "cuda": (flat("more than a tile on every axis", 150, 140, 139), _RAGGED),
}


def wide(dtype: torch.dtype) -> torch.dtype:
    """What half precision is added up in, and what theta and solvers have beside it."""
    return torch.promote_types(dtype, torch.float32)


def _factors(shape: Shape, dtype: torch.dtype, name: str = "") -> Operands:
    # Below 1 as a loss's are; and their products are within float16's range.
    delta = (0.1 * shape.normal(shape.N, shape.C)).to(dtype)
    return delta, shape.normal(shape.N, shape.d).to(dtype), shape.offsets, shape.has_bias


def _with_x(shape: Shape, dtype: torch.dtype, name: str = "") -> Operands:
    delta, act, *rest = _factors(shape, dtype)
    return delta, act, shape.normal(shape.C, shape.width, of=1).to(dtype), *rest


def _two_sets(shape: Shape, dtype: torch.dtype, name: str = "") -> Operands:
    other = Shape("other", shape.lengths[::-1], shape.C, shape.d, shape.has_bias)
    delta, act = other.normal(other.N, other.C, of=2), other.normal(other.N, other.d, of=3)
    right = ((0.1 * delta).to(dtype), act.to(dtype), other.offsets)
    return _factors(shape, dtype)[:3], right, shape.has_bias


def _curvature(shape: Shape, dtype: torch.dtype, name: str = "") -> Operands:
    p = torch.softmax(shape.normal(shape.N, shape.C), dim=1).to(dtype)
    scale = shape.normal(shape.N).abs().add(0.1).to(wide(dtype))
    v = shape.normal(shape.C, shape.width, of=1).to(wide(dtype))
    act = shape.normal(shape.N, shape.d).to(dtype)
    return p, scale, act, v, len(shape.lengths), DAMPING, shape.has_bias


def _logits(shape: Shape, dtype: torch.dtype, name: str = "") -> Operands:
    return (3 * shape.normal(shape.N, shape.C)).to(dtype), shape.labels


def _named_logits(shape: Shape, dtype: torch.dtype, name: str) -> Operands:
    z, labels = _logits(shape, dtype)
    if name not in NEEDS_AUXILIARY:
        return z, labels, name
    other = (labels + 1) % shape.C if name == "relabel" else shape.normal(shape.N).abs().to(dtype)
    return z, labels, name, other


def _head(shape: Shape, dtype: torch.dtype, name: str = "") -> tuple[Head]:
    weight = shape.normal(shape.C, shape.d) * 2 / shape.d**0.5
    bias = shape.normal(shape.C).to(dtype) if shape.has_bias else None
    features = shape.normal(shape.N, shape.d, of=1).to(dtype)
    return (Head(features, weight.to(dtype), bias, shape.labels, None),)


def _head_and_known(shape: Shape, dtype: torch.dtype, name: str = "") -> Operands:
    (head,) = _head(shape, dtype)
    z = reference.head_logits(*head[:3])
    loss = torch.nn.functional.cross_entropy(z, head.labels, reduction="none")
    found = (z.logsumexp(dim=1), -torch.expm1(-loss), loss)
    known = Normaliser(*(x.to(wide(dtype)) for x in found))
    return head, known, slice(shape.C // 3, shape.C)


def _ascent(shape: Shape, dtype: torch.dtype, name: str) -> Operands:
    theta = (shape.normal(shape.C, shape.width) * 2 / shape.d**0.5).to(wide(dtype))
    weights = shape.normal(shape.N).abs().add(0.1).to(wide(dtype))
    features = shape.normal(shape.N, shape.d, of=1).to(dtype)
    return features, shape.labels, weights, theta, shape.has_bias, name


def _ascent_step(shape: Shape, dtype: torch.dtype, name: str) -> Operands:
    *operands, has_bias, name = _ascent(shape, dtype, name)
    buffer = shape.normal(shape.C, shape.width, of=4).to(wide(dtype))
    return *operands, buffer, has_bias, name


def _systems(shape: Shape, dtype: torch.dtype, name: str = "") -> tuple[Iterates, Tensor]:
    """Three systems of a diagonal M between 1 and 2, at their start."""
    v = shape.normal(3, shape.C, shape.width)
    diagonal = 1 + shape.normal(shape.C, shape.width, of=1).tanh().square()
    state = start(v, v, tolerance=0.0)
    return Iterates(*(x.to(dtype) for x in state)), (diagonal * v).to(dtype)


def _matrix(shape: Shape, dtype: torch.dtype, name: str = "") -> Operands:
    a, b = shape.normal(shape.N, 2 * shape.N), shape.normal(shape.N, 4)
    return (a @ a.T / shape.N).to(dtype), b.to(dtype), DAMPING


@dataclass(frozen=True)
class Entry:
    """One operation: ``make(shape, dtype, name)`` gives its operands on the CPU.

    cost: called with a kind and a timed shape. timed: on a CPU and on a GPU. names: objectives to
    check, the first of which is timed. changed: operands that are results too. in_place: whether
    a call changes any. half: the body in PyTorch takes half precision.
    """

    name: str
    run: Callable[..., Any]
    make: Callable[[Shape, torch.dtype, str], Operands]
    cost: Callable[[str, Shape], counts.Cost]
    timed: tuple[Shape, Shape]
    names: tuple[str, ...] = ("",)
    options: dict[str, float] = field(default_factory=dict)
    changed: tuple[int, ...] = ()
    in_place: bool = False
    half: bool = False

    @property
    def plain(self) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(plain, self.name)
        return found

    @property
    def bounds(self) -> bounds.Bounds:
        found: bounds.Bounds = getattr(bounds, self.name)
        return found

    @property
    def has_kernel(self) -> bool:
        return getattr(self.run, "kernel", None) is not None


IMAGES = (flat("", 2_000, 100, 512), flat("", 16_384, 1_000, 2_048))
PAIRS = (flat("", 700, 100, 512), flat("", 8_192, 1_000, 1_024))
VOCABULARY = (flat("", 256, 4_000, 256), flat("", 4_096, 32_000, 1_024))
ROWS = (flat("", 1_000, 1_000, 1), flat("", 4_096, 8_192, 1))
BATCH = (flat("", 128, 1_000, 512), flat("", 256, 1_000, 2_048))
HEAD = (flat("", 1, 400, 1_024), flat("", 1, 1_000, 2_048))
ORDER = (flat("", 500, 1, 1), flat("", 4_096, 1, 1))


def _count(cost: Callable[..., counts.Cost]) -> Callable[[str, Shape], counts.Cost]:
    return lambda kind, s: cost(kind, s.N, s.C, s.d)


def _rows(cost: Callable[..., counts.Cost]) -> Callable[[str, Shape], counts.Cost]:
    return lambda kind, s: cost(kind, s.N, s.C)


def entries() -> dict[str, Entry]:
    """Every operation by name, those of ``imu_fast/ops`` as they stand there."""
    ops = operations()
    half, ascent = {"half": True}, {"names": LABEL_OBJECTIVES, "half": True}
    rows: list[tuple[str, Any, Any, tuple[Shape, Shape], dict[str, Any]]] = [
        ("mean_gradient", _factors, _count(counts.mean_gradient), IMAGES, {}),
        ("fisher_diagonal", _factors, _count(counts.fisher_diagonal), IMAGES, {}),
        ("bilinear_scores", _with_x, _count(counts.bilinear_scores), IMAGES, {}),
        ("quadratic_scores", _with_x, _count(counts.bilinear_scores), IMAGES, {}),
        ("gradient_norms", _factors, _count(counts.gradient_norms), IMAGES, {}),
        ("gram", _factors, _count(counts.gram), PAIRS, {}),
        ("cross_gram", _two_sets, _count(counts.cross_gram), PAIRS, {}),
        ("ggn_product", _curvature, _count(counts.ggn_product), IMAGES, {}),
        ("softmax_residual", _logits, _rows(counts.softmax_residual), ROWS, half),
        ("linear_softmax_normaliser", _head, _count(counts.normaliser), VOCABULARY, half),
        (
            "linear_softmax_residual",
            _head_and_known,
            lambda kind, s: counts.residual(kind, s.N, s.C - s.C // 3, s.d),
            VOCABULARY,
            half,
        ),
        ("objective", _named_logits, _rows(counts.objective), ROWS, {"names": OBJECTIVES}),
        (
            "objective_residual",
            _named_logits,
            _rows(counts.softmax_residual),
            ROWS,
            {"names": OBJECTIVES},
        ),
        ("head_ascent_gradient", _ascent, _count(counts.head_ascent_gradient), BATCH, ascent),
        (
            "head_ascent",
            _ascent_step,
            _count(counts.head_ascent),
            BATCH,
            {**ascent, "options": RATES, "changed": (3, 4), "in_place": True},
        ),
        (
            "conjugate_gradient_iteration",
            _systems,
            lambda kind, s: counts.conjugate_gradient(kind, s.C, s.d, 3),
            HEAD,
            {"in_place": True},
        ),
    ]
    found = {row[0]: Entry(row[0], ops[row[0]], *row[1:4], **row[4]) for row in rows}
    name = "damped_cholesky_solve"
    found[name] = Entry(
        name,
        damped_cholesky_solve,
        _matrix,
        lambda kind, s: counts.damped_cholesky_solve(kind, s.N, 4),
        ORDER,
    )
    return found
