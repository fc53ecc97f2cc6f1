"""A head's gradients from features and weight: the signal is made where it is needed, never stored.

``delta [N, C]`` of a large vocabulary is the one array that does not fit. What is kept instead is
what it is made of, features [N, d] and weight [C, d] in the model's dtype, and three numbers of
each token that one sweep over the classes finds. Whatever separates over classes (mean gradient,
Fisher diagonal, scores under both) reads ``delta[:, classes]`` in one more sweep, some classes at a
time; anything else reads chunks of tokens with all classes. A sweep costs 2 N C d FLOPs, as does
each product with delta.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from imu_fast.errors import InputError, check_count, check_finite_rows
from imu_fast.factors.operands import cast, check_target
from imu_fast.factors.protocol import Chunk
from imu_fast.factors.samples import Chunks, Samples
from imu_fast.losses.base import Loss, mean_scale
from imu_fast.losses.output_curvature import LabelSoftmax
from imu_fast.ops.linear_softmax import SLAB, Head, Normaliser, normaliser, residual
from imu_fast.ops.tokens import cuts, picked, sum_over_tokens

# From so many bytes of delta [N, C] on, a head's signal is made where it is needed.
IMPLICIT_BYTES = 1 << 28
# Bytes of delta, and of matrices [classes, D], that exist at once; a GPU needs more to be filled.
_TILE_BYTES, _GPU_TILE_BYTES = 1 << 25, 1 << 29
# Fewer classes at a time cost more in slower products than they save in memory.
_FEWEST_CLASSES = 256
# Tokens that are swept over at once.
TOKENS = 2048

F = TypeVar("F", bound=Chunk)  # GradientFactors, whose file imports this one
Make = Callable[..., F]


def is_kept(tokens: int, classes: int, itemsize: int = 4) -> bool:
    """Whether delta of so many tokens and classes is stored, to be read several times."""
    return tokens * classes * itemsize <= IMPLICIT_BYTES


def tokens_at_once(classes: int, itemsize: int = 4, tile: int = _TILE_BYTES) -> int:
    """Tokens whose delta over all classes is a tile."""
    return max(1, tile // (itemsize * classes))


def classes_at_once(
    tokens: int, classes: int, width: int, itemsize: int = 4, tile: int = _TILE_BYTES
) -> int:
    """Classes whose delta and two matrices [classes, D] are a tile together, not below 256."""
    tokens = tokens if is_kept(tokens, _FEWEST_CLASSES, itemsize) else TOKENS
    fitting = tile // (itemsize * (tokens + 2 * width)) // 64 * 64
    return min(classes, max(_FEWEST_CLASSES, fitting))


@dataclass(frozen=True, eq=False)
class ImplicitHead(Samples[F]):
    """The gradients ``g_i = sum_t delta[i,t] (x) [act[i,t], 1]`` of n samples at a softmax head.

    ``imu.GradientFactors.from_head`` and ``imu.capture`` give it where ``delta`` would take 256 MB
    or more, and every call that takes ``GradientFactors`` takes it. Features and weight are held,
    not copied, so that it is refused once one of them was changed in place.

    Attributes:
        features: [N, d], weight: [C, d], bias: [C] or None: as they were given; products of half
            precision are of the numbers as they are, added up in float32.
        labels: [N] int64, all of them classes. offsets: [n+1] int64 on the CPU.
        known: what the first sweep found of each token.
        loss: a plain cross-entropy. name: the layer's name in the model.
        make: of ``delta, act, offsets, has_bias, labels, losses, name, loss, curvature``: what
            chunks are.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    offsets: Tensor
    known: Normaliser
    loss: Loss
    name: str
    make: Make[F]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_versions", self._now())
        counts = self.offsets.diff()
        scale = None if bool((counts == 1).all()) else mean_scale(counts)
        object.__setattr__(self, "_scale", scale if scale is None else scale.to(self.known.lse))

    @classmethod
    def swept(
        cls,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        offsets: Tensor,
        *,
        loss: Loss,
        name: str,
        make: Make[F],
    ) -> ImplicitHead[F]:
        """Of operands that were checked: one sweep over the classes.

        Raises:
            InputError: logits are not finite (says of which token).
        """
        scale = mean_scale(offsets.diff()).to(features.device)
        found = []
        for start in range(0, max(1, len(features)), TOKENS):
            rows = slice(start, start + TOKENS)
            found.append(normaliser(Head(features[rows], weight, bias, labels[rows], scale[rows])))
        known = Normaliser(*map(torch.cat, zip(*found, strict=True)))
        check_finite_rows("logits", known.lse)
        return cls(features, weight, bias, labels, offsets, known, loss, name, make)

    @property
    def num_tokens(self) -> int:
        """N, the number of packed tokens."""
        return len(self.features)

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.weight)

    @property
    def feature_dim(self) -> int:
        """d."""
        return self.features.shape[1]

    @property
    def has_bias(self) -> bool:
        """Whether D = d + 1."""
        return self.bias is not None

    @property
    def device(self) -> torch.device:
        """Of features and weight."""
        return self.features.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the signal: float64 for float64 features, else float32."""
        return self.known.lse.dtype

    @property
    def nbytes(self) -> int:
        """Bytes held by the features; the weight is the model's own."""
        return self.features.nbytes

    @property
    def losses(self) -> Tensor:
        """Each sample's loss: [n]."""
        return sum_over_tokens(self.known.loss, self.offsets)

    def select(self, indices: Tensor) -> ImplicitHead[F]:
        """The factors of some samples, in the order given; indices [k] int64."""
        offsets, rows = picked(self.offsets, indices.to("cpu", torch.int64))
        return self._rows(rows.to(self.device), offsets)

    def samples(self, first: int, last: int) -> ImplicitHead[F]:
        """Samples first:last as views."""
        rows = slice(int(self.offsets[first]), int(self.offsets[last]))
        return self._rows(rows, self.offsets[first : last + 1] - rows.start)

    def _rows(self, rows: Any, offsets: Tensor) -> ImplicitHead[F]:
        self._check_unchanged()
        return replace(
            self,
            features=self.features[rows],
            labels=self.labels[rows],
            offsets=offsets,
            known=Normaliser(*(t[rows] for t in self.known)),
        )

    def stored(self) -> F:
        """The same factors with their signal stored: ``delta`` [N, C]."""
        return next(self.chunks(max(1, self.num_tokens)))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ImplicitHead[F]:
        """Move or cast features and weight; of another precision they are swept over again.

        Raises:
            InputError: as :meth:`GradientFactors.to`, of features, weight and bias.
        """
        self._check_unchanged()
        check_target(device, dtype)
        bias = self.bias
        features = cast("features", self.features, dtype, "token").to(device=device)
        weight = cast("weight", self.weight, dtype, "class", small=False).to(device=device)
        if bias is not None:
            bias = cast("bias", bias, dtype, "class", small=False).to(device=device)
        return ImplicitHead.swept(
            features,
            weight,
            bias,
            self.labels.to(device=device),
            self.offsets,
            loss=self.loss,
            name=self.name,
            make=self.make,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`stored` to a safetensors file, which ``GradientFactors.load`` reads."""
        stored: Any = self.stored()
        stored.save(path)

    def chunks(self, max_tokens: int | None = None) -> Iterator[F]:
        """Consecutive samples with all their classes, made anew at each pass.

        None: as many tokens as 32 MB of delta hold (512 MB on a GPU).
        """
        if max_tokens is None:
            max_tokens = tokens_at_once(self.num_classes, self.dtype.itemsize, self._tile)
        check_count("max_tokens", max_tokens)
        losses, every = self.losses, slice(0, self.num_classes)
        for first, last in cuts(self.offsets, max_tokens):
            rows = slice(int(self.offsets[first]), int(self.offsets[last]))
            yield self.make(
                self.signal(rows, every),
                self.features[rows],
                self.offsets[first : last + 1] - rows.start,
                self.has_bias,
                self.labels[rows],
                losses[first:last],
                self.name,
                self.loss,
                LabelSoftmax(self._label_p(rows)),
            )

    def _label_p(self, rows: slice) -> Tensor:
        scale: Tensor | None = self.__dict__["_scale"]
        losses = self.known.loss[rows]
        return torch.exp(-losses if scale is None else -losses / scale[rows])

    @property
    def outputs_at_once(self) -> int:
        """Classes whose delta and two matrices [classes, D] are 32 MB together (512 MB on a GPU);
        not below 256, where that is more.
        """
        sizes = (self.num_tokens, self.num_classes, self.width)
        return classes_at_once(*sizes, self.dtype.itemsize, self._tile)

    def outputs(self, classes: slice) -> OutputsOfHead[F]:
        """The same samples at some classes alone; their signal is stored if 256 MB hold it."""
        kept = is_kept(self.num_tokens, classes.stop - classes.start, self.dtype.itemsize)
        every = slice(0, self.num_tokens)
        return OutputsOfHead(self, classes, self.signal(every, classes) if kept else None)

    def signal(self, rows: slice, classes: slice) -> Tensor:
        """``delta[rows, classes]``, made anew.

        Raises:
            InputError: features, weight or bias were changed in place.
        """
        self._check_unchanged()
        tiles = [
            (slice(t, min(t + TOKENS, rows.stop)), slice(c, min(c + SLAB, classes.stop)))
            for c in range(classes.start, classes.stop, SLAB)
            for t in range(rows.start, rows.stop, TOKENS)
        ]
        if len(tiles) == 1:
            return self._tile_of_signal(*tiles[0])
        delta = self.known.lse.new_empty(rows.stop - rows.start, classes.stop - classes.start)
        for some, part in tiles:
            into = delta[some.start - rows.start : some.stop - rows.start]
            into[:, part.start - classes.start : part.stop - classes.start] = self._tile_of_signal(
                some, part
            )
        return delta

    def _tile_of_signal(self, rows: slice, classes: slice) -> Tensor:
        scale: Tensor | None = self.__dict__["_scale"]
        head = Head(
            self.features[rows],
            self.weight,
            self.bias,
            self.labels[rows],
            scale if scale is None else scale[rows],
        )
        return residual(head, Normaliser(*(t[rows] for t in self.known)), classes)

    @property
    def _tile(self) -> int:
        return _TILE_BYTES if self.device.type == "cpu" else _GPU_TILE_BYTES

    def _now(self) -> list[int]:
        """How often each operand was written to."""
        operands = (self.features, self.weight, self.bias)
        return [0 if t is None or t.is_inference() else t._version for t in operands]

    def _check_unchanged(self) -> None:
        if self._now() != self.__dict__["_versions"]:
            raise InputError(
                f"factors of layer {self.name!r} are made from its weight and features where they "
                "are needed, and one of these was changed in place since: use them before the "
                "model changes, or pass a copy of its weight to GradientFactors.from_head"
            )


class OutputsOfHead(Chunks[F]):
    """What :meth:`ImplicitHead.outputs` gives: factors of a layer that has only these outputs.

    Args:
        delta: [N, classes]; None: made anew at each pass, some tokens at a time.
    """

    def __init__(self, head: ImplicitHead[F], classes: slice, delta: Tensor | None) -> None:
        self._head, self._classes, self._delta = head, classes, delta
        self.num_classes = classes.stop - classes.start
        self.n = self.n_here = head.n
        self.num_tokens, self.feature_dim = head.num_tokens, head.feature_dim
        self.width, self.has_bias, self.name = head.width, head.has_bias, head.name
        self.device, self.dtype = head.device, head.dtype

    def chunks(self, max_tokens: int | None = None) -> Iterator[F]:
        """Views of delta."""
        head, delta = self._head, self._delta
        if max_tokens is None:
            max_tokens = TOKENS if delta is None else max(1, self.num_tokens)
        check_count("max_tokens", max_tokens)
        for first, last in cuts(head.offsets, max_tokens):
            rows = slice(int(head.offsets[first]), int(head.offsets[last]))
            yield head.make(
                head.signal(rows, self._classes) if delta is None else delta[rows],
                head.features[rows],
                head.offsets[first : last + 1] - rows.start,
                self.has_bias,
                name=self.name,
            )
