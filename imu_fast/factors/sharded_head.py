"""A head whose classes are shared among the processes of torch.distributed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imu_fast import distributed
from imu_fast.ambient import no_autocast
from imu_fast.errors import InputError, check_finite_rows, is_dtensor
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.implicit_head import TOKENS, ImplicitHead
from imu_fast.factors.operands import (
    Array,
    check_finite,
    check_offsets,
    check_operands,
    check_result,
    remaining,
    tensor_of,
)
from imu_fast.losses.base import mean_scale
from imu_fast.losses.cross_entropy import CrossEntropy
from imu_fast.ops.linear_softmax import Head, Normaliser, normaliser


class ShardedHead:
    """The gradients of n samples at a softmax head of which each process holds some classes.

    Every process has all samples' features and its own rows of the weight, one process's classes
    after another's in the order of the ranks, as a vocabulary-parallel head has them. What a token
    needs of all classes, its log-sum-exp and ``1 - p_y``, is put together of each process's (max,
    sum); ``delta`` is made where it is needed, of the process's own classes, and never stored.

    :func:`imu_fast.influence_scores`, :func:`imu_fast.self_influence` and
    :func:`imu_fast.pairwise_influence` take it under curvatures that couple no two outputs
    (``fisher_diag`` but with ``damping_mode="relative"``, ``identity``), and give every process the
    whole head's numbers, to rounding; each has to make the same calls in the same order. What else
    takes factors refuses it.

    Args:
        features: [N, d], the head's input, the same in every process. Half precision is computed in
            float32.
        weight: [C_r, d], this process's rows, at least one; or a DTensor that is sharded by rows
            over the group (``Shard(0)``), of which this process's part is taken.
        bias: [C_r], of the same rows, a tensor or such a DTensor; or None.
        labels: [N] integers in [0, C), of all C classes, the same in every process. Tokens of
            ``ignore_index`` are dropped.
        offsets: [n+1], which tokens belong to which sample; None: one token per sample.
        group: the processes; None: all.
        ignore_index: a label that is none.
        name: of the layer, for messages.

    Attributes:
        num_classes: C. classes: those of this process, start:stop. n, num_tokens, feature_dim,
            width, has_bias, device, dtype: as of :class:`imu_fast.ImplicitHead`. losses: [n], each
            sample's.

    Raises:
        InputError: in every process: no process group, operands that do not fit or are not finite,
            features, labels or offsets that differ among the processes.
    """

    @no_autocast
    def __init__(
        self,
        features: Array,
        weight: Array,
        bias: Array | None,
        labels: Array,
        offsets: Array | None = None,
        *,
        group: distributed.Group = None,
        ignore_index: int = -100,
        name: str = "head",
    ) -> None:
        distributed.check_group(group)
        self.group = group
        with distributed.together("ShardedHead()", group):
            act, rows = tensor_of("features", features), _own_rows("weight", weight, group)
            shift = None if bias is None else _own_rows("bias", bias, group)
            given = tensor_of("labels", labels)
            check_operands(act, rows, shift, given)
            act, rows = act.detach(), rows.detach()
            shift = None if shift is None else shift.detach()
            check_finite(act, rows, shift)
            loss = CrossEntropy(ignore_index=ignore_index, shift=False)
            self.classes, self.num_classes = self._places(act, rows, shift, loss)
            if given.is_floating_point():
                raise InputError(
                    f"labels is {given.dtype}; a head in parts takes class indices [N], and no "
                    "probabilities"
                )
            targets = loss.prepared(given.detach(), self.num_classes)
            cuts = (
                torch.arange(len(targets) + 1) if offsets is None else tensor_of("offsets", offsets)
            )
            check_offsets(cuts, len(targets))
            cuts, valid = cuts.to("cpu", torch.int64), loss.valid(targets)
            self._same("features", act)
            self._same("labels", targets)
            self._same("offsets", cuts)
            if not bool(valid.all()):
                cuts, act, targets = remaining(cuts, valid), act[valid], targets[valid]
            scale = mean_scale(cuts.diff()).to(act.device)
            local, known = self._normalised(act, rows, shift, targets, scale)
            self.own: ImplicitHead[GradientFactors] = ImplicitHead(
                act, rows, shift, local, cuts, known, loss, name, GradientFactors
            )
        self.n, self.num_tokens, self.name = self.own.n, self.own.num_tokens, name
        self.feature_dim, self.width = self.own.feature_dim, self.own.width
        self.has_bias, self.device, self.dtype = bias is not None, act.device, self.own.dtype

    def _places(
        self, act: Tensor, rows: Tensor, bias: Tensor | None, loss: CrossEntropy
    ) -> tuple[slice, int]:
        """This process's classes, and how many there are."""
        dtypes = str(act.dtype), str(rows.dtype)
        kind = (tuple(act.shape), *dtypes, bias is not None, loss.ignore_index)
        found = distributed.gather((len(rows), kind), self.group)
        for rank, (_, other) in enumerate(found):
            if other != found[0][1]:
                raise InputError(
                    f"features: process {rank} has (shape, dtype, the weight's, bias, "
                    f"ignore_index) {other}, process 0 has {found[0][1]}; every process has all "
                    "samples, and its own classes"
                )
        counts = [count for count, _ in found]
        first = sum(counts[: distributed.rank_of(self.group)])
        return slice(first, first + len(rows)), sum(counts)

    def _same(self, argument: str, value: Tensor) -> None:
        if not distributed.alike(value, self.group):
            raise InputError(
                f"{argument} differs among the processes that share the head's classes; pass the "
                "same samples to all"
            )

    def _normalised(
        self, act: Tensor, rows: Tensor, bias: Tensor | None, labels: Tensor, scale: Tensor
    ) -> tuple[Tensor, Normaliser]:
        """Labels among this process's classes (their number: elsewhere), and what is known."""
        here = (labels >= self.classes.start) & (labels < self.classes.stop)
        local = (labels - self.classes.start).where(here, -1)
        found = []
        for start in range(0, max(1, len(act)), TOKENS):
            some = slice(start, start + TOKENS)
            found.append(normaliser(Head(act[some], rows, bias, local[some])))
        lse, others, loss = map(torch.cat, zip(*found, strict=True))
        check_finite_rows("logits", lse)
        # Of the classes but the label's; and the label's own, which one process has.
        rest = torch.where(here, lse + others.log(), lse)
        label = self._summed(lambda: torch.where(here, lse - loss, 0.0))
        # Where no other class has any weight, the largest is no number that a sum is relative to.
        largest = distributed.largest_(rest.clamp_min(torch.finfo(rest.dtype).min), self.group)
        rest = largest + self._summed(lambda: (rest - largest).exp()).log()
        lse = torch.logaddexp(rest, label)
        others = (rest - lse).exp()
        loss = torch.where(others < 0.5, -torch.log1p(-others), lse - label)
        return local.where(here, len(rows)), Normaliser(lse, others, loss * scale.to(loss))

    @property
    def losses(self) -> Tensor:
        """Each sample's loss: [n]."""
        return self.own.losses

    def mean_gradient(self) -> Tensor:
        """The rows of ``gbar = 1/n sum_i g_i`` of this process's classes: [C_r, D]."""
        with distributed.together("mean_gradient()", self.group):
            return self.own.mean_gradient()

    def fisher_diagonal(self) -> Tensor:
        """The rows of ``1/n sum_i g_i * g_i`` of this process's classes: [C_r, D]."""
        with distributed.together("fisher_diagonal()", self.group):
            return self.own.fisher_diagonal()

    def over_classes(self, call: str, spec: Any, part: Callable[[], Tensor]) -> Tensor:
        """A sum over classes, of those of all processes.

        Args:
            call: what it is, the same words in every process. spec: the curvature that it is under.
            part: the sum over this process's own, a new tensor.

        Raises:
            InputError: the curvature couples the outputs; the result is not finite.
        """
        with distributed.together(call, self.group):
            if not spec.separates:
                raise InputError(
                    f"curvature={spec!r} couples the outputs of layer {self.name!r}, which are "
                    "shared among processes; use 'fisher_diag' with damping_mode='add' or 'clamp', "
                    "'identity', or factors of the whole head"
                )
            return check_result("influence", self._summed(part), self.own)

    def _summed(self, part: Callable[[], Tensor]) -> Tensor:
        found: Tensor = distributed.summed_over(part, self.group)
        return found


def _own_rows(name: str, value: Any, group: distributed.Group) -> Tensor:
    """The rows that this process holds.

    Raises:
        InputError: a DTensor that is not sharded by rows over the group, once.
    """
    if not is_dtensor(value):
        return tensor_of(name, value)
    from torch.distributed.tensor import Shard

    placements, mesh = value.placements, value.device_mesh
    kind = type(placements[0]) is Shard and placements[0].dim == 0
    if mesh.ndim != 1 or not kind or not distributed.same_processes(mesh.get_group(), group):
        raise InputError(
            f"{name} is a DTensor of placements {tuple(placements)} over {mesh}; a head in parts "
            "takes rows, (Shard(0),) over one axis of the mesh whose processes are the group's, in "
            f"their order: pass group={name}.device_mesh.get_group(), or {name}.full_tensor() to "
            "GradientFactors.from_head"
        )
    own: Tensor = value.to_local()
    return own
