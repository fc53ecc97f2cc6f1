"""Convolutions over several positions, as layers that are linear in what their kernel sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from imu_fast.factors.unfolded import Unfolding
from imu_fast.model.head import WHOLE_MODEL, LinearLayer, linear_layers

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Elements that are unfolded at once.
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Convolution(LinearLayer):
    """``act W^T + b`` where act [.., c * kernel] is what the kernel sees at each position.

    Its calls keep the images that went in.
    """

    @property
    def unfolding(self) -> Unfolding:
        """How the module reads its input."""
        module = self.module
        mode = module.padding_mode
        return Unfolding(
            tuple(module.kernel_size),  # type: ignore[arg-type]
            tuple(module.stride),  # type: ignore[arg-type]
            tuple(module.dilation),  # type: ignore[arg-type]
            tuple(module._reversed_padding_repeated_twice),  # type: ignore[arg-type]
            "constant" if mode == "zeros" else mode,  # type: ignore[arg-type]
        )

    def inputs(self, x: Tensor) -> Tensor | None:
        """The images: [k, c, *sizes]."""
        axes = len(self.module.kernel_size)  # type: ignore[arg-type]
        return x[None] if x.dim() == axes + 1 else x

    def places(self, rows: torch.Size, call: int) -> Tensor:
        """The call, the image and the position of each row of the output [*rows, C]."""
        axes = len(self.unfolding.kernel)
        positions = rows[len(rows) - axes :].numel()
        index = torch.arange(rows.numel())
        found = torch.stack(
            [torch.full_like(index, call), index // positions, index % positions], 1
        )
        return found.view(*rows, 3)

    def pieces(self, act: Tensor, delta: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """``(act [R, d], delta [R, C])`` of some images after the others."""
        signal = delta.reshape(len(act), -1, delta.shape[-1])
        step = max(1, _CHUNK_ELEMENTS // max(1, signal.shape[1] * self.weight.shape[1]))
        for images, share in zip(act.split(step), signal.split(step), strict=True):
            seen = self.unfolding.windows(images)
            yield seen.reshape(-1, self.weight.shape[1]), share.flatten(0, 1)


def scored_layers(model: nn.Module) -> dict[str, LinearLayer]:
    """Every layer that may have factors, in module order, by its first name.

    Convolutions of a single position are as they are; with several groups there is no one matrix.
    """
    linear = linear_layers(model)
    found = {}
    for name, module in model.named_modules():
        name = name or WHOLE_MODEL
        if isinstance(module, _KINDS) and not module.transposed and module.groups == 1:
            plain = name in linear and all(
                k == s == 1 for k, s in zip(module.kernel_size, module.stride, strict=True)
            )
            found[name] = linear[name] if plain else Convolution(name, module)
        elif name in linear:
            found[name] = linear[name]
    return found
