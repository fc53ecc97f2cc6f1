"""GradientFactors: per-sample gradients of a linear layer, kept as factors in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from imu_fast.ambient import no_autocast
from imu_fast.errors import (
    InputError,
    check_count,
    check_finite_rows,
    check_same_device,
    check_tensor,
)
from imu_fast.factors.implicit_head import IMPLICIT_BYTES, ImplicitHead
from imu_fast.factors.operands import (
    HALF,
    Array,
    cast,
    check_dtypes,
    check_finite,
    check_offsets,
    check_operands,
    check_result,
    check_target,
    input_dtype,
    remaining,
    tensor_of,
)
from imu_fast.factors.packed import packed, unpacked
from imu_fast.factors.samples import Stored
from imu_fast.factors.squares import diagonal_of
from imu_fast.losses.base import Loss, mean_scale
from imu_fast.losses.cross_entropy import CrossEntropy
from imu_fast.losses.forms import curvature_like
from imu_fast.losses.named import LOSSES, LossName
from imu_fast.losses.output_curvature import StoredCurvature
from imu_fast.ops.mean_gradient import mean_gradient
from imu_fast.ops.softmax_residual import linear_logits
from imu_fast.ops.tokens import cuts, is_flat, picked, sum_over_tokens

# Rows of logits that exist at once while the residual is computed.
LOGITS_AT_ONCE = 2048


@dataclass(frozen=True)
class GradientFactors(Stored["GradientFactors"]):
    """The gradients ``g_i = sum_t delta[i,t] (x) [act[i,t], 1]`` of n samples, as factors.

    Attributes:
        delta: [N, C], the signal at the layer's output; float32 or float64. Detached, as act is.
        act: [N, d], the layer's input; same device and dtype, or, beside a float32 delta, bfloat16
            or float16, as models of half precision have it: sums are in float32 or better.
        offsets: [n+1] int64 on the CPU; tokens ``offsets[i]:offsets[i+1]`` belong to sample i.
        has_bias: whether the layer has a bias, so that D = d + 1.
        labels: [N] int64, or [N, C] floating, for a head whose loss is known.
        losses: [n], each sample's loss, for such a head.
        name: the layer's name in the model.
        loss: what delta is the derivative of, at the layer's output; None where the model does
            more between the two. Labels without a loss or curvature are those of a cross-entropy.
        curvature: the second derivatives ``B_t`` of samples' losses in their tokens' outputs, as
            delta is the first, which ``ggn``, ``ggn_block``, ``kfac`` and ``ekfac`` need: an
            ``imu.OutputCurvature``, or its tensor: [N, C, C], or [N, C] if ``B_t`` is diagonal.
            With a loss it is what the loss keeps; of inner layers the signals that
            ``capture(..., fisher=)`` brings; without any these four take ``fisher="empirical"``.
    """

    delta: Tensor
    act: Tensor
    offsets: Tensor
    has_bias: bool
    labels: Tensor | None = None
    losses: Tensor | None = None
    name: str = "head"
    loss: Loss | None = None
    curvature: StoredCurvature | Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("delta", "act", "offsets", "labels", "losses"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Tensor):
                object.__setattr__(self, name, tensor_of(name, value))
        delta, act, offsets = self.delta, self.act, self.offsets
        check_tensor("delta", delta, "floating", "[N, C]")
        check_tensor("act", act, "floating", "[N, d]")
        if delta.dim() != 2 or act.dim() != 2 or delta.shape[0] != act.shape[0]:
            raise InputError(
                f"delta {tuple(delta.shape)} and act {tuple(act.shape)} must be [N, C] and [N, d] "
                "with the same N"
            )
        if not (delta.shape[1] and act.shape[1]):
            raise InputError(
                f"delta {tuple(delta.shape)} and act {tuple(act.shape)} must have columns: [N, C] "
                "and [N, d] with C >= 1 and d >= 1"
            )
        check_same_device("delta", delta, "act", act)
        check_dtypes(delta, act)
        check_offsets(offsets, len(delta))
        object.__setattr__(self, "offsets", offsets.to("cpu", torch.int64))
        for name, tensor in (("delta", delta), ("act", act)):
            if tensor.requires_grad:
                object.__setattr__(self, name, tensor.detach())
        if self.labels is not None:
            check_tensor("labels", self.labels, "real", "[N]")
            if self.labels.shape[:1] != delta.shape[:1]:
                raise InputError(
                    f"labels has shape {tuple(self.labels.shape)}; expected one for each of "
                    f"delta's {len(delta)} rows"
                )
            check_same_device("delta", delta, "labels", self.labels)
            if not self.labels.is_floating_point() and self.labels.dtype != torch.bool:
                object.__setattr__(self, "labels", self.labels.to(torch.int64))
        if self.labels is not None and self.loss is None and self.curvature is None:
            object.__setattr__(self, "loss", CrossEntropy())
        if self.loss is not None and self.labels is None:
            raise InputError(f"loss={self.loss!r} needs labels; pass both, or neither")
        if self.curvature is not None:
            given = self.curvature
            given = given.detach() if isinstance(given, Tensor) else given
            object.__setattr__(self, "curvature", curvature_like(given, delta))

    def _changed(self, rows: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """What belongs to tokens, changed."""
        of_tokens: dict[str, Any] = {
            name: None if value is None else rows(value)
            for name in ("delta", "act", "labels")
            for value in [getattr(self, name)]
        }
        if isinstance(self.curvature, StoredCurvature):
            of_tokens["curvature"] = self.curvature.map(rows)
        return of_tokens

    @overload
    @classmethod
    def from_head(
        cls,
        features: Array,
        weight: Array,
        bias: Array | None,
        labels: Array,
        offsets: Array | None = None,
        *,
        implicit: Literal[False],
        loss: LossName | Loss = ...,
        ignore_index: int | None = ...,
        chunk_size: int | None = ...,
        name: str = ...,
    ) -> GradientFactors: ...
    @overload
    @classmethod
    def from_head(
        cls,
        features: Array,
        weight: Array,
        bias: Array | None,
        labels: Array,
        offsets: Array | None = None,
        *,
        implicit: bool | None = None,
        loss: LossName | Loss = ...,
        ignore_index: int | None = ...,
        chunk_size: int | None = ...,
        name: str = ...,
    ) -> HeadFactors: ...
    @classmethod
    @no_autocast
    def from_head(
        cls,
        features: Array,
        weight: Array,
        bias: Array | None,
        labels: Array,
        offsets: Array | None = None,
        *,
        loss: LossName | Loss = "cross_entropy",
        ignore_index: int | None = None,
        chunk_size: int | None = None,
        name: str = "head",
        implicit: bool | None = None,
    ) -> HeadFactors:
        """Factors of a linear head under the mean of a loss over tokens: no backward pass.

        Tensors, arrays of numpy (``numpy.memmap`` too, which stays on the disk) or lists.

        Args:
            features: [N, d], the head's input. Half precision is kept as it is, and computed with
                in float32, some tokens at a time.
            weight: [C, d]. bias: [C] or None.
            labels: what the loss takes. For cross-entropy [N] integers in [0, C), or probabilities
                [N, C]; for the binary one and the squared error [N, C], or [N] where C is 1.
                Tokens of ``ignore_index`` are dropped, and a sample left without tokens has
                gradient zero and score zero.
            offsets: [n+1], which tokens belong to which sample; None: one token per sample.
            loss: an object such as ``imu.CrossEntropy(ignore_index=0)``, or a name.
            ignore_index: of the named loss; None: its default, -100.
            chunk_size: rows of logits computed at once; changes memory, not the result.
            implicit: True: keep features and weight as they are, and make delta where it is needed
                (an :class:`ImplicitHead`, of a cross-entropy); False: store delta; None: store it
                up to 256 MB.

        Raises:
            InputError: empty input, shapes or devices that do not match, labels out of range,
                non-finite features, weights or logits (says which sample).
        """
        features, weight = tensor_of("features", features), tensor_of("weight", weight)
        bias = None if bias is None else tensor_of("bias", bias)
        labels = tensor_of("labels", labels)
        offsets = None if offsets is None else tensor_of("offsets", offsets)
        check_operands(features, weight, bias, labels)
        chosen = LOSSES.choose(loss, ignore_index=ignore_index)
        if isinstance(chosen, CrossEntropy) and chosen.shift is True:
            raise InputError(
                "shift=True is for capture, which sees positions; pass rows of features with the "
                "labels that they predict, and a loss without it"
            )
        labels = chosen.prepared(labels.detach(), weight.shape[0])
        chunk = LOGITS_AT_ONCE if chunk_size is None else check_count("chunk_size", chunk_size)

        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        act, weight = features.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
        check_finite(act, weight, bias)
        if offsets is None:
            offsets = torch.arange(len(labels) + 1)
        check_offsets(offsets, len(labels))
        offsets = offsets.to("cpu", torch.int64)
        valid = chosen.valid(labels)
        if not bool(valid.all()):
            offsets, act, labels = remaining(offsets, valid), act[valid], labels[valid]

        size = len(act) * len(weight) * dtype.itemsize
        plain = isinstance(chosen, CrossEntropy) and chosen.plain and labels.dim() == 1
        if implicit is None:
            implicit = size >= IMPLICIT_BYTES and plain
        if implicit:
            if not plain:
                raise InputError(
                    f"implicit=True is of loss='cross_entropy', plain and with class indices, not "
                    f"of {chosen!r} with labels {tuple(labels.shape)}"
                )
            return ImplicitHead.swept(
                act, weight, bias, labels, offsets, loss=chosen, name=name, make=cls
            )

        act, weight = act.to(input_dtype(act.dtype, dtype)), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        many = act.shape[0]
        flat = is_flat(offsets)
        scale = None if flat else mean_scale(offsets.diff()).to(act.device, dtype)
        delta = weight.new_empty(many, weight.shape[0])
        token_losses = weight.new_empty(many)
        kept: list[StoredCurvature] = []
        for start in range(0, max(1, many), chunk):
            rows = slice(start, start + chunk)
            logits = linear_logits(act[rows].to(dtype), weight, bias)
            delta[rows], token_losses[rows], curvature = chosen.residual(
                logits, labels[rows], None if scale is None else scale[rows]
            )
            kept.append(curvature)
        check_finite_rows("logits", delta)
        check_finite_rows("losses", token_losses)
        curvature = kept[0] if len(kept) == 1 else type(kept[0]).joined(kept)
        losses = sum_over_tokens(token_losses, offsets)
        has_bias = bias is not None
        return cls(delta, act, offsets, has_bias, labels, losses, name, chosen, curvature)

    @property
    def feature_dim(self) -> int:
        """d, the width of the layer's input."""
        return self.act.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held by delta and act."""
        return self.delta.nbytes + self.act.nbytes

    def mean_gradient(self) -> Tensor:
        """``gbar = 1/n sum_i g_i``: [C, D]."""
        found = mean_gradient(self.delta, self.act, self.offsets, self.has_bias)
        return check_result("the mean gradient", found, self)

    def fisher_diagonal(self) -> Tensor:
        """``1/n sum_i g_i * g_i``, the empirical Fisher's diagonal: [C, D]."""
        return check_result("the Fisher's diagonal", diagonal_of(self), self)

    def select(self, indices: Tensor) -> GradientFactors:
        """The factors of some samples, in the order given; indices [k] int64."""
        indices = indices.to("cpu", torch.int64)
        offsets, rows = picked(self.offsets, indices)
        rows = rows.to(self.delta.device)
        return replace(
            self,
            **self._changed(lambda x: x[rows]),
            offsets=offsets,
            losses=None if self.losses is None else self.losses[indices.to(self.losses.device)],
        )

    def with_delta(self, delta: Tensor) -> GradientFactors:
        """Other signals at the same inputs: of them no loss or curvature is known. delta [N, C]."""
        return GradientFactors(delta, self.act, self.offsets, self.has_bias, name=self.name)

    def samples(self, first: int, last: int) -> GradientFactors:
        """Samples first:last as views."""
        start, stop = int(self.offsets[first]), int(self.offsets[last])
        return replace(
            self,
            **self._changed(lambda x: x[start:stop]),
            offsets=self.offsets[first : last + 1] - start,
            losses=None if self.losses is None else self.losses[first:last],
        )

    def chunks(self, max_tokens: int | None = None) -> Iterator[GradientFactors]:
        """Consecutive samples as views of at most ``max_tokens`` tokens (or one larger sample).

        None: all of them at once, which is this object.
        """
        if max_tokens is None:
            yield self
            return
        check_count("max_tokens", max_tokens)
        for first, last in cuts(self.offsets, max_tokens):
            yield self.samples(first, last)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> GradientFactors:
        """Move or cast delta, act, losses and what the curvature is made of.

        Half precision is that of act alone; the others are float32 then.

        Raises:
            InputError: dtype is none of float64, float32, bfloat16 and float16; act is beyond its
                range, or all of a token's below it; there is no such device.
        """
        check_target(device, dtype)
        wide = torch.float32 if dtype in HALF else dtype
        changed = self._changed(lambda x: x.to(device=device, dtype=wide))
        changed["act"] = cast("act", self.act, dtype, "token").to(device=device)
        return replace(
            self,
            **changed | {"labels": None if self.labels is None else self.labels.to(device=device)},
            losses=None if self.losses is None else self.losses.to(device=device, dtype=wide),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; under a temporary name first, so it is whole or absent."""
        from imu_fast.storage import save_tensors

        save_tensors(path, *packed(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GradientFactors:
        """Read what :meth:`save` wrote; on the CPU the tensors are memory-mapped.

        Raises:
            InputError: the file is missing or holds no factors.
        """
        from imu_fast.storage import load_tensors

        tensors, metadata = load_tensors(path)
        if not {"delta", "act", "offsets"} <= tensors.keys():
            raise InputError(f"path={str(Path(path))!r} holds no gradient factors")
        return unpacked(cls, tensors, metadata)


HeadFactors = GradientFactors | ImplicitHead[GradientFactors]
"""A head's factors, whose signal is stored or made where it is needed."""
