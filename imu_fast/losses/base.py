"""What a loss gives: the signal at the outputs, and the curvature of the loss in them."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from imu_fast.options import Options


class OutputCurvature(ABC):
    """``B_t`` [C, C], the second derivative of the loss in the outputs, of N tokens.

    ``1/n sum_t c_t B_t (x) a~_t a~_t^T`` is the generalised Gauss-Newton matrix.

    Attributes:
        scale: [N], float64, the ``c_t``.
    """

    scale: Tensor

    @abstractmethod
    def diagonal(self) -> Tensor:
        """``diag(B_t)``: [N, C], float64, not negative."""

    @abstractmethod
    def diagonal_in(self, basis: Tensor) -> Tensor:
        """``diag(Q^T B_t Q)``: [N, C], float64; basis: Q [C, C]."""

    @abstractmethod
    def weighted_sum(self, weight: Tensor) -> Tensor:
        """``sum_t w_t B_t``: [C, C], in weight's dtype; weight [N]."""


class Loss(Options, ABC):
    """A loss of a token's outputs [C] and its label; a sample's is the mean over its tokens."""

    @abstractmethod
    def check_labels(self, labels: Tensor, num_classes: int) -> None:
        """Raise InputError naming the first label that the loss cannot take."""

    @abstractmethod
    def valid(self, labels: Tensor) -> Tensor:
        """Which tokens have a loss: [N], bool; labels [N]."""

    @abstractmethod
    def residual(
        self, outputs: Tensor, labels: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The signal ``delta_t = c_t d loss_t / d outputs_t`` [N, C], and ``c_t loss_t`` [N].

        Args:
            outputs: [N, C], any floating dtype; half precision is computed in float32.
            labels: [N], of tokens that have a loss. scale: [N], the ``c_t``; None: 1.
        """

    @abstractmethod
    def output_curvature(self, delta: Tensor, labels: Tensor, scale: Tensor) -> OutputCurvature:
        """``B_t`` out of what :meth:`residual` gave; scale [N], float64."""


def mean_scale(counts: Tensor) -> Tensor:
    """``c_t = 1/T_i``, which makes sums over tokens means: [N] float64; counts: the T_i [n]."""
    return torch.repeat_interleave(1.0 / counts.clamp_min(1).double(), counts)
