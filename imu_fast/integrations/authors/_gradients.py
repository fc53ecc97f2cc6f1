"""Per-sample gradients of some parameters: captured in batches, and G [n, P] made when asked."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from imu_fast.curvature.contraction import scores
from imu_fast.curvature.fisher_diag import DampingMode, FisherDiag
from imu_fast.curvature.gradients import gradients
from imu_fast.errors import InputError
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.source import in_memory
from imu_fast.integrations._forgetting import has_label
from imu_fast.integrations.authors._parameters import Chosen
from imu_fast.losses.cross_entropy import CrossEntropy
from imu_fast.model.batches import Reread
from imu_fast.model.capture import capture
from imu_fast.model.head import LinearLayer
from imu_fast.model.parts import Parts

logger = logging.getLogger("imu_fast")

# Samples that run through the model at once.
BATCH = 256
DAMPING = 1e-2
T = Any


def grouped(
    samples: Iterable[T], alike: Callable[[T], Any], size: int = BATCH
) -> Iterator[list[T]]:
    """Consecutive samples with equal ``alike``, at most ``size`` of them at once."""
    waiting: list[T] = []
    key: Any = None
    for sample in samples:
        found = alike(sample)
        if waiting and (len(waiting) == size or found != key):
            yield waiting
            waiting = []
        key = found
        waiting.append(sample)
    if waiting:
        yield waiting


def items(dataset: Any) -> Iterator[Any]:
    """``dataset[0], dataset[1], ...``, each once.

    Raises:
        InputError: there is none.
    """
    if not len(dataset):
        raise InputError("dataset is empty; pass at least one forget sample")
    return (dataset[i] for i in range(len(dataset)))


class Gradients:
    """The gradients of n samples in the chosen parameters, as factors of their layers.

    Args:
        model: run in evaluation mode, and left as it was.
        batches: in the order of the samples. They are read outside of everything that sets random
            states aside, so that a data set that draws random numbers goes on drawing.
        shift: logits at position t predict the label at t + 1.

    """

    def __init__(
        self, model: nn.Module, chosen: Chosen, batches: Iterable[Parts], *, shift: bool = False
    ) -> None:
        self.chosen = chosen
        modules = [layer.module for layer in chosen.layers]
        loss = CrossEntropy(shift=shift)
        parts: list[list[GradientFactors]] = []
        for batch in batches:
            if not has_label(batch.labels, shift):
                logger.warning("%d samples have no label: their gradients are zero", batch.n)
                parts.append([_nothing(layer, batch.n) for layer in chosen.layers])
                continue
            one = Reread(lambda batch=batch: iter([batch]))  # type: ignore[misc]
            found = capture(model, one, layers=modules, loss=loss)
            assert isinstance(found, list)
            parts.append([in_memory(layer, "the authors' procedure") for layer in found])
        self.layers = [joined([part[k] for part in parts]) for k in range(len(modules))]

    @cached_property
    def mean(self) -> Tensor:
        """gbar, [P]."""
        return self.chosen.flat([layer.mean_gradient() for layer in self.layers])

    @property
    def n(self) -> int:
        """Samples."""
        return self.layers[0].n

    def inverse_fisher(self, mode: DampingMode) -> Tensor:
        """``1 / (mean_i g_i^2 + 0.01)``, or ``1 / max(mean_i g_i^2, 0.01)`` by "clamp": [P]."""
        spec = FisherDiag(damping=DAMPING, damping_mode=mode)
        return self.chosen.flat([spec.fit(layer).diagonal() for layer in self.layers]).reciprocal_()

    def products(self, vectors: Tensor) -> Tensor:
        """``<g_i, v>``: [n] for v [P], [n, m] for v [m, P]."""
        out: Tensor | None = None
        for layer, x in zip(self.layers, self.chosen.per_layer(vectors), strict=True):
            part = scores(layer, x)
            out = part if out is None else out.add_(part)
        assert out is not None
        return out

    def influence(self, inverse: Tensor, first_row_is_mean: bool) -> Tensor:
        """``- g_i^T diag(inverse) gbar``: [n]; see :class:`LazyGradients` for the flag."""
        x = inverse.to(self.mean) * self.mean
        out = self.products(x).neg_()
        if first_row_is_mean:
            out[0] = -(x @ self.mean)
        return out

    def own_influence(self, mode: DampingMode) -> Tensor:
        """:meth:`influence` by the samples' own Fisher, layer by layer: nothing of size P."""
        spec, out = FisherDiag(damping=DAMPING, damping_mode=mode), None
        for k, layer in enumerate(self.layers):
            mean = layer.mean_gradient()
            x = spec.fit(layer).solve(mean, out=mean)
            self.chosen.only(k, x)
            part = scores(layer, x)
            out = part if out is None else out.add_(part)
        assert out is not None
        return out.neg_()

    def rows(self, first: int, last: int) -> Tensor:
        """The gradients themselves, of samples first:last: [k, P]."""
        return self.chosen.flat([gradients(layer.samples(first, last)) for layer in self.layers])


def _nothing(layer: LinearLayer, n: int) -> GradientFactors:
    """Of n samples without a label: gradients of zero."""
    weight = layer.weight.detach()
    rows = weight.new_empty(0, sum(weight.shape)).to(
        torch.promote_types(weight.dtype, torch.float32)
    )
    delta, act = rows.split(list(weight.shape), dim=1)
    offsets = torch.zeros(n + 1, dtype=torch.int64)
    return GradientFactors(delta, act, offsets, layer.bias is not None, name=layer.name)


def joined(parts: Sequence[GradientFactors]) -> GradientFactors:
    """Factors of consecutive samples of one layer as one."""
    first, *rest = parts
    if not rest:
        return first
    counts = torch.cat([part.offsets.diff() for part in parts])
    return GradientFactors(
        torch.cat([part.delta for part in parts]),
        torch.cat([part.act for part in parts]),
        torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        first.has_bias,
        name=first.name,
    )


class LazyGradients:
    """G [n, P], one row per sample, kept as factors until an entry is asked for.

    It acts as the tensor: ``G @ v``, ``G * row @ v`` and ``G.mean(0)`` are computed from the
    factors; rows are made alone (``G[i]``, ``for g in G``); everything else (any other operation,
    method or torch function) makes G, once.

    Args:
        scale: [P], of every row.
        first_row_is_mean: row 0 is gbar: a defect of the authors' code, whose in-place sum
            overwrites it.
    """

    def __init__(
        self, of: Gradients, first_row_is_mean: bool = False, scale: Tensor | None = None
    ) -> None:
        self._of, self._first, self._scale = of, first_row_is_mean, scale
        self._made: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self._of.n, self._of.chosen.size))

    @property
    def device(self) -> torch.device:
        return self._of.mean.device

    @property
    def dtype(self) -> torch.dtype:
        return self._of.mean.dtype

    @property
    def ndim(self) -> int:
        return 2

    def dim(self) -> int:
        """2."""
        return 2

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self._of.n

    def __repr__(self) -> str:
        state = "in memory" if self._made is not None else "as factors"
        return f"LazyGradients({list(self.shape)}, {self.dtype}, {self.device}, {state})"

    def tensor(self) -> Tensor:
        """G itself: [n, P]."""
        if self._made is None:
            self._made = self._rows(0, len(self))
        return self._made

    def _rows(self, first: int, last: int) -> Tensor:
        rows = self._of.rows(first, last)
        if self._first and first == 0 and last > 0:
            rows[0] = self._of.mean
        return rows if self._scale is None else rows.mul_(self._scale)

    def __getitem__(self, index: Any) -> Tensor:
        if self._made is None and isinstance(index, int):
            row = range(len(self))[index]
            return self._rows(row, row + 1)[0]
        return self.tensor()[index]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __matmul__(self, other: Tensor) -> Tensor:
        """[n] for [P], [n, m] for [P, m]."""
        if self._made is not None or not isinstance(other, Tensor) or other.dim() not in (1, 2):
            return self.tensor() @ other
        if other.shape[0] != self.shape[1]:
            raise InputError(f"G is {tuple(self.shape)}; it cannot multiply {tuple(other.shape)}")
        vectors = (other if other.dim() == 1 else other.T).to(self.device)
        scaled = vectors if self._scale is None else vectors * self._scale
        out = self._of.products(scaled.to(self.dtype))
        if self._first:
            out[0] = scaled.to(self.dtype) @ self._of.mean
        return out

    def __mul__(self, other: Any) -> Any:
        """G with scaled columns, lazily too, by [P] or [1, P]; anything else makes G."""
        size = self.shape[1]
        if self._made is not None or not isinstance(other, Tensor) or other.numel() != size:
            return self.tensor() * other
        row = other.reshape(size)
        return LazyGradients(
            self._of, self._first, row if self._scale is None else row * self._scale
        )

    __rmul__ = __mul__

    def mean(self, dim: Any = None, keepdim: bool = False, **options: Any) -> Tensor:
        """As of a tensor; over samples it is known already."""
        if dim not in (0, (0,), -2) or options or self._made is not None:
            return self.tensor().mean(dim, keepdim, **options)
        out = self._of.mean
        if self._first:
            out = out + (out - self._of.rows(0, 1)[0]) / len(self)
        out = out.clone() if self._scale is None else out * self._scale
        return out[None] if keepdim else out

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """G, elsewhere or of another dtype."""
        return self.tensor().to(*args, **kwargs)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tensor().cpu().__array__(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"LazyGradients has no attribute {name!r}")
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Any function of torch, on G; a product with a row stays lazy, whichever comes first."""
        if function in (torch.mul, Tensor.mul, Tensor.__rmul__) and len(args) == 2 and not kwargs:
            first, second = args
            return first * second if isinstance(first, LazyGradients) else second * first
        return function(*_made(args), **_made(kwargs or {}))


def _made(value: Any) -> Any:
    if isinstance(value, LazyGradients):
        return value.tensor()
    if isinstance(value, dict):
        return {key: _made(item) for key, item in value.items()}
    return type(value)(map(_made, value)) if type(value) in (list, tuple) else value


def _operator(name: str) -> Callable[..., Tensor]:
    function = getattr(operator, name, None) or getattr(Tensor, name)

    def apply(self: LazyGradients, *others: Any) -> Tensor:
        return function(self.tensor(), *_made(others))

    apply.__name__ = name
    return apply


# Operators are looked up on the class, not by __getattr__.
for _name in (
    *("add", "radd", "sub", "rsub", "truediv", "rtruediv", "pow", "neg", "abs", "rmatmul"),
    *("eq", "ne", "lt", "le", "gt", "ge"),
):
    setattr(LazyGradients, f"__{_name}__", _operator(f"__{_name}__"))
