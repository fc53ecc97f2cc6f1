"""Convolutions, plain, grouped and transposed, as layers that are linear in what a kernel sees."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from imu_fast.factors.unfolded import Unfolding
from imu_fast.model.head import WHOLE_MODEL, LinearLayer, linear_layers

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Elements that are unfolded at once.
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Convolution(LinearLayer):
    """``act W^T + b`` where act [.., G d] is what the kernel sees at each position, group by group.

    Of a transposed one the weight [G c, C / G, *kernel] is seen as [C, c, *kernel]. Its calls keep
    the images that went in.
    """

    @property
    def unfolding(self) -> Unfolding:
        """How the module reads its input."""
        module: Any = self.module
        kernel, dilation = tuple(module.kernel_size), tuple(module.dilation)
        if not self.is_transposed:
            mode = module.padding_mode
            return Unfolding(
                kernel,
                tuple(module.stride),
                dilation,
                tuple(module._reversed_padding_repeated_twice),
                "constant" if mode == "zeros" else mode,
                groups=self.groups,
            )
        sides: list[int] = []
        for k, s, d, p in zip(kernel, module.stride, dilation, module.padding, strict=True):
            border = d * (k - 1) - p
            # The output's size may be chosen at each call: the largest that there is.
            sides = [border, border + max(s, d) - 1, *sides]
        ones = (1,) * len(kernel)
        apart = tuple(module.stride)
        return Unfolding(kernel, ones, dilation, tuple(sides), apart=apart, groups=self.groups)

    @property
    def is_transposed(self) -> bool:
        """Whether inputs are spread over outputs."""
        return isinstance(self.module, _TRANSPOSED)

    @property
    def groups(self) -> int:
        return int(self.module.groups)  # type: ignore[arg-type]

    def like_weight(self, stored: Tensor) -> Tensor:
        if not self.is_transposed:
            return stored.flatten(1)
        return stored.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)

    def inputs(self, x: Tensor) -> Tensor | None:
        """The images: [k, c, *sizes]."""
        return x[None] if x.dim() == self._axes + 1 else x

    def outputs(self, y: Tensor) -> Tensor:
        return y.movedim(-1 - self._axes, -1)

    @property
    def _axes(self) -> int:
        return len(self.module.kernel_size)  # type: ignore[arg-type]

    def places(self, rows: torch.Size, call: int, images: Tensor) -> Tensor:
        """The call, the image and the position of each row of the output [*rows, C]."""
        found, grid = rows[len(rows) - self._axes :], self.unfolding.grid(images.shape[2:])
        index, positions = torch.arange(rows.numel()), math.prod(found)
        at = index % positions
        if tuple(found) != grid:
            at = torch.zeros_like(index)
            by_axis = torch.unravel_index(index % positions, found)
            for size, place in zip(grid, by_axis, strict=True):
                at = at * size + place
        places = torch.stack([torch.full_like(index, call), index // positions, at], 1)
        return places.view(*rows, 3)

    def pieces(self, act: Tensor, delta: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """``(act [R, G d], delta [R, C])`` of some images after the others."""
        grid, width = delta.shape[-1 - self._axes : -1], self.weight.shape[1] * self.groups
        signal = delta.reshape(len(act), -1, delta.shape[-1])
        step = max(1, _CHUNK_ELEMENTS // max(1, signal.shape[1] * width))
        for images, share in zip(act.split(step), signal.split(step), strict=True):
            yield self.unfolding.every(images, grid).flatten(0, 1), share.flatten(0, 1)


def scored_layers(model: nn.Module) -> dict[str, LinearLayer]:
    """Every layer that may have factors, in module order, by its first name.

    Convolutions of one group and a single position are as they are.
    """
    linear = linear_layers(model)
    found = {}
    for name, module in model.named_modules():
        name = name or WHOLE_MODEL
        plain = name in linear and (
            not isinstance(module, _KINDS)
            or all(k == s == 1 for k, s in zip(module.kernel_size, module.stride, strict=True))
        )
        if plain:
            found[name] = linear[name]
        elif isinstance(module, _KINDS + _TRANSPOSED):
            found[name] = Convolution(name, module)
    return found
