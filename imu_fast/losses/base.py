"""What a loss gives: the signal at the outputs, and the curvature of the loss in them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imu_fast.errors import InputError
from imu_fast.losses.output_curvature import StoredCurvature
from imu_fast.options import Options


class Signal(NamedTuple):
    """What a loss says of N tokens.

    delta [N, C]: ``c_t d loss_t / d outputs_t``. losses [N]: ``c_t loss_t``. curvature: what is
    kept to make the second derivative of, see :class:`StoredCurvature`.
    """

    delta: Tensor
    losses: Tensor
    curvature: StoredCurvature


class Loss(Options, ABC):
    """A loss of a token's outputs [C] and its label; a sample's is the mean over its tokens."""

    @abstractmethod
    def prepared(self, labels: Tensor, num_classes: int) -> Tensor:
        """Labels in the form that the other methods take: [N], or [N, C].

        Args:
            labels: one row for each token, in any form that the loss takes.

        Raises:
            InputError: names the first label that the loss cannot take.
        """

    @abstractmethod
    def valid(self, labels: Tensor) -> Tensor:
        """Which tokens have a loss: [N], bool; labels as :meth:`prepared`."""

    @abstractmethod
    def residual(self, outputs: Tensor, labels: Tensor, scale: Tensor | None) -> Signal:
        """The loss, its derivative and what its second derivative is made of.

        Args:
            outputs: [N, C], any floating dtype; half precision is computed in float32.
            labels: as :meth:`prepared`, of tokens that have a loss.
            scale: [N], the ``c_t``; None: 1.
        """

    def recovered(self, delta: Tensor, labels: Tensor) -> StoredCurvature:
        """What :meth:`residual` keeps, out of delta with ``c_t`` divided out, as far as it tells.

        Raises:
            InputError: it does not.
        """
        raise InputError(
            f"delta alone does not tell the curvature of loss={self!r}; pass curvature= with it, "
            "or make factors by GradientFactors.from_head or imu_fast.capture"
        )


def mean_scale(counts: Tensor) -> Tensor:
    """``c_t = 1/T_i``, which makes sums over tokens means: [N] float64; counts: the T_i [n]."""
    return torch.repeat_interleave(1.0 / counts.clamp_min(1).double(), counts)


def compute_dtype(outputs: Tensor) -> torch.dtype:
    """float64 of float64, else float32."""
    return torch.float64 if outputs.dtype == torch.float64 else torch.float32


def per_output(labels: Tensor, num_outputs: int, what: str) -> Tensor:
    """One finite number for each output: [N, L], floating; labels [N, L], or [N] where L is 1.

    Raises:
        InputError: another shape, or not finite.
    """
    found = labels[:, None] if labels.dim() == 1 and num_outputs == 1 else labels
    if found.dim() != 2 or found.shape[1] != num_outputs:
        one = " or [N]" if num_outputs == 1 else ""
        raise InputError(
            f"labels has shape {tuple(labels.shape)}; {what} of {num_outputs} outputs takes "
            f"[N, {num_outputs}]{one}"
        )
    if found.dtype == torch.float64:
        wide = found
    elif found.is_complex():
        raise InputError(f"labels have dtype {found.dtype}; pass real numbers")
    else:
        # Integers beyond float32's are exact in float64.
        wide = found.float() if found.is_floating_point() else found.double()
    finite = torch.isfinite(wide).all(dim=1)
    if not bool(finite.all()):
        raise InputError(f"labels[{int(torch.nonzero(~finite)[0])}] is not finite")
    return wide


def numbers(name: str, value: Any) -> tuple[float, ...] | None:
    """Finite numbers that are not negative, as a tuple: of a tensor, an array or a sequence.

    Raises:
        InputError: anything else.
    """
    if value is None:
        return None
    listed = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        listed = [listed]
    good = [isinstance(v, (int, float)) and not isinstance(v, bool) for v in listed]
    if not listed or not all(good) or any(not math.isfinite(v) or v < 0 for v in listed):
        raise InputError(f"{name}={value!r}; pass finite numbers that are not negative")
    return tuple(float(v) for v in listed)
