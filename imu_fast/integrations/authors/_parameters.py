"""Some of a model's parameters as the authors choose them: by name, flattened one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from imu_fast.errors import InputError
from imu_fast.model.head import LinearLayer, linear_layers


def named(model: nn.Module, wanted: Callable[[str], bool], rule: str) -> dict[str, nn.Parameter]:
    """The parameters whose names are wanted, in the model's order.

    Args:
        rule: what a wanted name is like, for the message.

    Raises:
        InputError: there is none.
    """
    found = {name: p for name, p in model.named_parameters() if wanted(name)}
    if not found:
        layers = list(linear_layers(model))
        raise InputError(
            f"model has no parameter with {rule} in its name, which the authors' code takes; its "
            f"linear layers are {layers}. Rename the layer, or use imu_fast.influence_scores, "
            "which finds the head by what it does"
        )
    return found


def l1_norm(parameters: Sequence[Tensor]) -> Tensor:
    """``||theta||_1`` of all of them: a scalar with its graph."""
    return torch.stack([p.abs().sum() for p in parameters]).sum()


@contextmanager
def asking(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Only these parameters ask for a gradient; afterwards again those that did before.

    A graph that is recorded inside keeps what it was recorded with.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    wanted = {id(p) for p in parameters}
    try:
        for p, _ in flags:
            p.requires_grad_(id(p) in wanted)
        with torch.enable_grad():
            yield
    finally:
        for p, flag in flags:
            if p.requires_grad != flag:
                p.requires_grad_(flag)


@dataclass(frozen=True)
class Chosen:
    """Parameters of linear layers, and the order in which their entries are one vector [P].

    Attributes:
        layers: the layers, in module order.
        parts: ``(index of the layer, whether it is the bias)`` of each parameter, in the order of
            ``named_parameters``.
    """

    layers: list[LinearLayer]
    parts: list[tuple[int, bool]]

    @classmethod
    def of(cls, model: nn.Module, wanted: Callable[[str], bool], rule: str) -> Chosen:
        """The parameters whose names are wanted.

        Raises:
            InputError: none is, or one belongs to no linear layer.
        """
        owner = {
            id(parameter): (layer, key == "bias")
            for layer in linear_layers(model).values()
            for key, parameter in layer.module._parameters.items()
            if parameter is not None
        }
        layers: list[LinearLayer] = []
        parts = []
        for name, parameter in named(model, wanted, rule).items():
            if id(parameter) not in owner:
                raise InputError(
                    f"model: the parameter {name!r} has {rule} in its name, and belongs to no "
                    "linear layer, whose gradients alone are kept as factors; rename it"
                )
            layer, is_bias = owner[id(parameter)]
            if layer not in layers:
                layers.append(layer)
            parts.append((layers.index(layer), is_bias))
        order = {name: k for k, name in enumerate(linear_layers(model))}
        ordered = sorted(layers, key=lambda layer: order[layer.name])
        place = {layers.index(layer): k for k, layer in enumerate(ordered)}
        return cls(ordered, [(place[k], is_bias) for k, is_bias in parts])

    def _shape(self, part: tuple[int, bool]) -> tuple[int, int]:
        classes, width = self.layers[part[0]].weight.shape
        return (classes, 1) if part[1] else (classes, width)

    @property
    def size(self) -> int:
        """P."""
        return sum(rows * columns for rows, columns in map(self._shape, self.parts))

    def _columns(self, part: tuple[int, bool]) -> slice:
        width = self.layers[part[0]].weight.shape[1]
        return slice(width, None) if part[1] else slice(0, width)

    def flat(self, per_layer: Sequence[Tensor]) -> Tensor:
        """[..., C, D] of each layer as [..., P]."""
        blocks = [per_layer[part[0]][..., self._columns(part)] for part in self.parts]
        return torch.cat([block.flatten(-2) for block in blocks], dim=-1)

    def per_layer(self, flat: Tensor) -> list[Tensor]:
        """[P] or [m, P] as [..., C, D] of each layer; zero where a parameter is not chosen."""
        lead = flat.shape[:-1]
        out = [
            flat.new_zeros(
                *lead, len(layer.weight), layer.weight.shape[1] + (layer.bias is not None)
            )
            for layer in self.layers
        ]
        sizes = [rows * columns for rows, columns in map(self._shape, self.parts)]
        for part, block in zip(self.parts, flat.split(sizes, dim=-1), strict=True):
            out[part[0]][..., self._columns(part)] = block.view(*lead, *self._shape(part))
        return out

    def only(self, layer: int, x: Tensor) -> None:
        """Zero what is not of the chosen parameters in one layer's [C, D]."""
        for is_bias in (False, True):
            if (layer, is_bias) not in self.parts:
                x[:, self._columns((layer, is_bias))] = 0

    def check(self, argument: str, flat: Tensor, device: torch.device) -> Tensor:
        """A vector of the caller's, on the device.

        Raises:
            InputError: it is not [P].
        """
        if not isinstance(flat, Tensor) or tuple(flat.shape) != (self.size,):
            found = tuple(flat.shape) if isinstance(flat, Tensor) else type(flat).__name__
            raise InputError(
                f"{argument} is {found}; expected the ({self.size},) entries of the parameters of "
                f"{[layer.name for layer in self.layers]}, which the Fisher function returns"
            )
        return flat.to(device)
