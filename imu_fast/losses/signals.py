"""Signals whose gradients' outer products add up to the Gauss-Newton matrix at an inner layer.

Behind a layer is the rest of the network, so rows of one sample meet before the loss, and no matrix
of each row says what the loss's curvature is. It is a sum over samples i and signals k instead:

    G = 1/n sum_ik g_ik g_ik^T        g_ik = sum_r s[i,r,k] (x) a~[i,r]

where ``s[.,.,k]`` is what a backward pass brings to the layer of one column of a root of the loss's
second derivative in the logits. All columns make G itself; labels drawn from the model's own
predictions make an estimate whose mean is G (the true Fisher, Martens and Grosse 2015); the data's
labels make the empirical Fisher, which is another matrix (Kunstner et al. 2019).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self

from imu_fast.errors import InputError
from imu_fast.losses.output_curvature import OutputCurvature, StoredCurvature
from imu_fast.ops.symmetric import add_symmetric


@dataclass(frozen=True, eq=False)
class Signals(StoredCurvature):
    """K signals of each of N rows.

    Attributes:
        s: [N, K, C].
    """

    s: Tensor
    form: ClassVar[Any] = "signals"
    # Over which labels the expectation is: "exact", "sampled" or "empirical".
    kind: ClassVar[str] = ""

    def resolved(self, delta: Tensor, labels: Tensor | None, scale: Tensor) -> OutputCurvature:
        """There is no ``B_t``.

        Raises:
            InputError: always.
        """
        raise InputError(
            "factors of an inner layer have signals of its Gauss-Newton matrix, and no curvature "
            "of each row; this needs layers='head'"
        )

    def sum(self, dtype: torch.dtype) -> Tensor:
        """``sum_rk s s^T``: [C, C], in this dtype."""
        out = self.s.new_zeros(self.s.shape[2], self.s.shape[2], dtype=dtype)
        return add_symmetric(out, ((one, one) for one in self.columns(dtype)))

    def padded(self, most: int) -> Self:
        """With signals of zero up to so many: sequences of other samples may be longer."""
        missing = most - self.s.shape[1]
        return self.map(lambda s: F.pad(s, (0, 0, 0, missing))) if missing else self

    def columns(self, dtype: torch.dtype) -> list[Tensor]:
        """Each signal of all rows [N, C], as a delta."""
        return [one.to(dtype) for one in self.s.unbind(1)]


class ExactSignals(Signals):
    """All columns of the root: the expectation over the model's labels, exactly."""

    form: ClassVar[Any] = "exact_signals"
    kind: ClassVar[str] = "exact"


class SampledSignals(Signals):
    """Of labels that were drawn from the model's predictions."""

    form: ClassVar[Any] = "sampled_signals"
    kind: ClassVar[str] = "sampled"


class EmpiricalSignals(Signals):
    """Of the data's own labels: delta itself."""

    form: ClassVar[Any] = "empirical_signals"
    kind: ClassVar[str] = "empirical"


@dataclass(frozen=True, eq=False)
class GroupedRows(StoredCurvature):
    """Of a layer of several groups: its tokens make its gradients up, and are no rows of it."""

    form: ClassVar[Any] = "grouped_rows"

    def resolved(self, delta: Tensor, labels: Tensor | None, scale: Tensor) -> OutputCurvature:
        """There is no ``B_t``.

        Raises:
            InputError: always.
        """
        raise InputError(
            "a layer of several groups has no curvature of the loss in its outputs here; use "
            "'fisher_diag', 'fisher', or fisher='empirical' of 'ggn' and 'ggn_block'"
        )


KINDS: dict[str, type[Signals]] = {
    kind.kind: kind for kind in (ExactSignals, SampledSignals, EmpiricalSignals)
}
