"""Problems that every operation is tested on, and the tolerance that each may use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import imu_fast as imu
from imu_fast import reference
from imu_fast.factors.sums import joined, summed
from imu_fast.ops.conjugate_gradient import iterate, start


@dataclass(frozen=True)
class Case:
    """Sizes of one problem; ``why`` is what the sizes are there for."""

    why: str
    lengths: tuple[int, ...]
    classes: int
    features: int
    has_bias: bool = True
    scale: float = 1.0
    duplicated: bool = False

    def make(self, dtype: torch.dtype) -> Problem:
        """Random data of these sizes, the same on every default device; offsets are on the CPU."""
        with torch.device("cpu"):
            problem = self._make(dtype)
        device = torch.get_default_device()
        act, weight, bias, labels, offsets, scale = (
            None if x is None else x.to(device) for x in vars(problem).values()
        )
        return Problem(act, weight, bias, labels, offsets.cpu(), scale)

    def _make(self, dtype: torch.dtype) -> Problem:
        generator = torch.Generator().manual_seed(len(self.why))
        tokens, wide = sum(self.lengths), torch.float64
        act = torch.randn(tokens, self.features, generator=generator, dtype=wide)
        if self.duplicated:
            act = act[:1].expand(tokens, -1).clone()
        weight = torch.randn(self.classes, self.features, generator=generator, dtype=wide)
        weight *= self.scale
        bias = torch.randn(self.classes, generator=generator, dtype=wide)
        labels = torch.randint(self.classes, (tokens,), generator=generator)
        counts = torch.tensor(self.lengths)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        return Problem(
            act.to(dtype),
            weight.to(dtype),
            bias.to(dtype) if self.has_bias else None,
            labels,
            offsets,
            torch.repeat_interleave(1.0 / counts.clamp_min(1).double(), counts).to(dtype),
        )


@dataclass(frozen=True)
class Problem:
    """Tensors of a case: act [N, d], weight [C, d], bias [C], labels [N], offsets, scale [N]."""

    act: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    offsets: Tensor
    scale: Tensor

    @property
    def has_bias(self) -> bool:
        return self.bias is not None

    @property
    def logits(self) -> Tensor:
        return torch.nn.functional.linear(self.act, self.weight, self.bias)


FLAT = (1,)
CASES = [
    Case("one of everything", (1,), 2, 1),
    Case("odd and prime", FLAT * 13, 7, 5),
    Case("no bias", FLAT * 13, 7, 5, has_bias=False),
    Case("one class: softmax is constant", FLAT * 6, 1, 4),
    Case("more samples than a chunk of rows", FLAT * 1031, 3, 2),
    Case("saturated softmax", FLAT * 17, 5, 9, scale=100.0),
    Case("duplicated rows", FLAT * 8, 4, 6, duplicated=True),
    Case("ragged tokens", (3, 1, 7, 2, 3), 6, 5),
    Case("ragged, an empty sample first, middle and last", (0, 2, 0, 3, 0), 6, 5),
    Case("ragged without bias", (2, 5, 1), 11, 3, has_bias=False),
    Case("one sample of many tokens", (129,), 4, 3),
    Case("a token or none", (1, 0, 1, 1, 0), 5, 4),
]
IDS = [case.why for case in CASES]


def assert_close(
    actual: Tensor,
    truth: Tensor,
    length: int,
    scale: float | None = None,
    rounding: float = 0.0,
) -> None:
    """Compare with a float64 truth.

    A sum of ``length`` products in a dtype of unit roundoff u has error at most about
    ``length * u`` times the largest sum of magnitudes; half a dozen roundings of the factors come
    on top. ``scale``: that magnitude, where cancellation makes the truth smaller than its terms.
    ``rounding``: relative error of each operand of the products, see
    ``imu_fast.precision.ROUNDING``: there are two, and as much again for what is made of them.
    """
    scale = float(truth.abs().max()) if scale is None else scale
    eps = torch.finfo(actual.dtype).eps
    bound = (length + 8) * eps + 4 * rounding
    bound *= max(scale, torch.finfo(actual.dtype).tiny)
    error = float((actual.double() - truth.double()).abs().max()) if truth.numel() else 0.0
    assert actual.shape == truth.shape
    assert error <= bound, f"error {error:.3g} > {bound:.3g}"


@dataclass(frozen=True)
class Call:
    """An operation's operands for one case, and what bounds its error.

    length: of the sums that it makes. sizes: the magnitude of their terms, of each result in turn;
    None where the results' own will do. changes: which operands it changes, in place.
    """

    args: tuple[Any, ...]
    length: int
    sizes: Sequence[float | None] = (None,)
    named: dict[str, Any] = field(default_factory=dict)
    changes: tuple[int, ...] = ()


DTYPES = [torch.float64, torch.float32]
every_case = pytest.mark.parametrize("case", CASES, ids=IDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def factors_of(case: Case, dtype: torch.dtype):
    """delta in ``dtype``, made in float64 so that only the operation under test rounds."""
    p = case.make(torch.float64)
    delta, _ = reference.softmax_residual(p.logits, p.labels, p.scale)
    return delta.to(dtype), p.act.to(dtype), p.offsets, p.has_bias


ASCENT_RATES = dict(lr=0.1, momentum=0.9, weight_decay=0.01, alpha=0.05)


def ascent_arguments(case: Case, dtype: torch.dtype, name: str):
    """A step's operands, features in ``dtype`` and theta at least float32; also the length of its
    sums, which grows with the logits that are exponentiated, and their magnitude."""
    p = case.make(torch.float64)
    wide = torch.promote_types(dtype, torch.float32)
    theta = torch.cat([p.weight, p.bias[:, None]], dim=1) if p.has_bias else p.weight
    theta = theta.to(wide)
    weights = (torch.rand(len(p.labels)) + 0.1).to(wide)
    features = p.act.to(dtype)
    args = (features, p.labels, weights, theta, torch.randn_like(theta), p.has_bias, name)
    length = len(features) + case.classes + (case.features + 3) * int(p.logits.abs().max() + 1)
    return args, length, float(features.abs().max()) + float(theta.abs().max()) + 1


def positive_systems(shape: tuple[int, ...], dtype: torch.dtype):
    """A matrix [P, P] of condition below 5, right-hand sides [m, ...] and about its inverse."""
    order = torch.Size(shape[1:]).numel()
    a = torch.randn(order, order, dtype=torch.float64)
    matrix = torch.eye(order, dtype=torch.float64) + a @ a.T / order
    inverse = torch.diag(1 / matrix.diagonal())
    v = torch.randn(shape, dtype=torch.float64)
    return matrix.to(dtype), v.to(dtype), inverse.to(dtype)


def check_conjugate_gradient(shape: tuple[int, ...], preconditioned: bool, dtype: torch.dtype):
    """Up to three iterations of each system, against the reference's."""
    matrix, v, inverse = positive_systems(shape, dtype)
    inverse = inverse if preconditioned else torch.eye(len(matrix), dtype=dtype)

    def times(m: Tensor):
        return lambda x: (x.flatten(1) @ m).view_as(x)

    precondition = times(inverse) if preconditioned else None
    state = start(v, times(inverse)(v), tolerance=0.0)
    for iterations in range(1, min(3, len(matrix)) + 1):
        state = iterate(state, times(matrix)(state.p), precondition)
        for x, rhs in zip(state.x, v, strict=True):
            truth = reference.conjugate_gradient(matrix, rhs.flatten(), iterations, inverse)
            # Each iteration's rounding grows by at most the condition.
            assert_close(x.flatten(), truth, 5 * iterations * (len(matrix) + 8))


def head_factors(case: Case, dtype: torch.dtype = torch.float64) -> imu.GradientFactors:
    """Of the case's softmax head."""
    p = case.make(dtype)
    return imu.GradientFactors.from_head(p.act, p.weight, p.bias, p.labels, p.offsets)


class Pieces:
    """Factors that are nowhere in one piece: what the protocol asks for, and nothing more."""

    PROPERTIES = (
        *("n", "n_here", "num_tokens", "num_classes", "feature_dim", "width"),
        *("has_bias", "name", "device", "dtype"),
    )

    def __init__(self, whole: imu.GradientFactors, tokens: int) -> None:
        for name in self.PROPERTIES:
            setattr(self, name, getattr(whole, name))
        # Copies, so that no piece shares memory with another.
        self._cut = [c.select(torch.arange(c.n)) for c in whole.chunks(tokens)]
        self.passes = 0

    def chunks(self, max_tokens: int | None = None):
        """New objects at every pass, as a file's are."""
        self.passes += 1
        for chunk in self._cut:
            yield chunk.samples(0, chunk.n)

    def sums(self, statistic):
        return summed(statistic(chunk) for chunk in self.chunks())

    def each(self, statistic):
        return joined(statistic(chunk) for chunk in self.chunks())


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.untyped_storage().nbytes() // out.itemsize)
        return out
