"""What a linear head saw of all samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from imu_fast.losses.base import Loss
from imu_fast.model.head import LinearLayer


@dataclass(frozen=True)
class HeadFeatures:
    """What a linear head saw.

    Attributes:
        name: of the layer; of several that make the logits together, joined by ``+``.
        head: a linear layer with ``head(features)`` the logits, where ``linear``. It is the model's
            own, or shares its memory (a 1x1 convolution's), unless ``write_back`` says otherwise.
        features: [N, d], the head's inputs, in the model's dtype unless they had to be computed.
        labels: [N] int64, or [N, C] where the loss has a label for each output.
        offsets: [n+1] int64 on the CPU, tokens of each sample.
        linear: whether ``head(features)`` is the model's logits. If not, features are only what
            the layer saw (rows need not be one per label), and ``between`` says what follows.
        between: what stands between the head's output and the logits; empty if nothing.
        write_back: why writing ``head.weight`` is not enough to change the model's logits to
            ``head(features)``; empty if it is.
        parts: the layers themselves, each with its columns of ``[features, 1]``'s weight.
        output: where the logits are in the model's output, for ``logits_of(..., choice=output)``.
        computed: the dtype in which the model computes the head, coarser than the weight's where
            its forward has an autocast of its own.
        sequences: whether a sample has labels at positions, and not one of its own.
        loss: that of one row and its label.
    """

    name: str
    head: nn.Linear
    features: Tensor
    labels: Tensor
    offsets: Tensor
    linear: bool = True
    between: str = ""
    write_back: str = ""
    parts: tuple[tuple[LinearLayer, slice], ...] = ()
    output: Any = None
    computed: torch.dtype = torch.float64
    sequences: bool = False
    loss: Loss | None = None

    @property
    def plain(self) -> bool:
        """Whether the model ends in this layer and in nothing else: it may be trained alone."""
        return not self.why

    @property
    def why(self) -> str:
        """Why not ``plain``; empty if it is."""
        if self.between:
            return f"between the head {self.name!r} and the logits: {self.between}"
        return self.write_back
