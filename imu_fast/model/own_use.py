"""Whether a layer's parameters act through the layer alone: else its calls are not all they do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from imu_fast.errors import InputError, NoHeadFoundError
from imu_fast.model.calls import Call
from imu_fast.model.head import LinearLayer, Uses, uses_of

# Random vectors that a weight's gradient is compared on.
_VECTORS = 4

Names = dict[int, str]


def own_parameters(
    model: nn.Module, layers: Sequence[LinearLayer], uses: Uses | None = None
) -> Names:
    """Names of the layers' parameters, by id, but for those that other modules have too.

    Of these the log speaks: :func:`imu_fast.model.head.say_of_weight`.
    """
    places = uses_of(model) if uses is None else uses
    found: Names = {}
    for layer in layers:
        inside = {id(module) for module in layer.module.modules()}
        for name, parameter in layer.module.named_parameters():
            others = [m for _, m in places.get(id(parameter), []) if id(m) not in inside]
            if parameter.is_floating_point() and not others:
                found[id(parameter)] = name
    return found


@contextmanager
def asking(model: nn.Module, layers: Sequence[LinearLayer]) -> Iterator[Names]:
    """The layers' own parameters ask for a gradient, so that what is made of them has a graph."""
    own = own_parameters(model, layers)
    with ExitStack() as stack:
        for layer in layers:
            for parameter in layer.module.parameters():
                if id(parameter) in own and not parameter.requires_grad:
                    stack.callback(parameter.requires_grad_, False)
                    parameter.requires_grad_()
        yield own


def check_fed(model: nn.Module, parts: Sequence[LinearLayer], calls: Sequence[Call]) -> None:
    """Raise NoHeadFoundError where what a head reads is made of its own parameters.

    Args:
        calls: of the parts, made while their parameters were :func:`asking`.
    """
    made_of = frozenset[int]().union(*(call.made_of for call in calls))
    for layer in parts:
        for key, name in own_parameters(model, [layer]).items():
            if key in made_of:
                raise used_by_code(layer, name)


def used_by_code(layer: LinearLayer, name: str) -> NoHeadFoundError:
    """What is said of a head whose parameter ``name`` acts outside of it as well."""
    return NoHeadFoundError(
        f"layer {layer.name!r} makes the logits, and so does its {name} where the model's code "
        "uses it outside of the layer; a head's parameters must be used by the head alone. Call "
        "the layer there, or pass features and weight to GradientFactors.from_head"
    )


Whole = dict[tuple[str, str], Tensor]
"""Parameters, by their layer's name and their own."""
OfWhole = dict[tuple[str, str], Tensor | None]
"""Their gradients."""


def whole_parameters(
    model: nn.Module, layers: Sequence[LinearLayer], calls: Sequence[Call]
) -> Whole:
    """Parameters of layers that ran whose gradients the calls must be all of."""
    ran, uses = {call.layer.name for call in calls}, uses_of(model)
    found: Whole = {}
    for layer in layers:
        own = own_parameters(model, [layer], uses) if layer.name in ran else {}
        for name, parameter in layer.module._parameters.items():
            if parameter is not None and id(parameter) in own and parameter.requires_grad:
                found[layer.name, name] = parameter
    return found


def check_whole(
    layers: Sequence[LinearLayer],
    calls: Sequence[Call],
    at_calls: Sequence[Tensor],
    whole: OfWhole,
) -> None:
    """Raise InputError where the calls are not all that a layer's parameters do to the loss.

    ``sum_t delta_t a_t^T`` and the weight's gradient are compared by what they make of a few random
    vectors (Freivalds 1977), which needs no second product of their size; ``sum_t delta_t`` and the
    bias's as they are.

    Args:
        at_calls: the gradient at each call's rows [..., C]. whole: of the parameters.
    """
    for layer in layers:
        rows = [(c, g) for c, g in zip(calls, at_calls, strict=True) if c.layer == layer]
        for name in ("weight", "bias"):
            gradient = whole.get((layer.name, name))
            if gradient is None:
                continue
            wide = torch.promote_types(gradient.dtype, torch.float32)
            if name == "weight":
                vectors = _vectors(layer.like_weight(gradient), wide)
                expected = layer.like_weight(gradient).to(wide) @ vectors
                pieces = _on_vectors(layer, rows, vectors)
            else:
                expected = gradient.to(wide)[:, None]
                pieces = _of_bias(rows, wide)
            off, size, count = -expected, torch.zeros_like(expected), 0
            for signal, seen in pieces:
                off += torch.einsum("rgc,rgv->gcv", signal, seen).flatten(0, 1)
                size += torch.einsum("rgc,rgv->gcv", signal.abs(), seen.abs()).flatten(0, 1)
                count += len(signal)
            eps = torch.finfo(at_calls[0].dtype).eps
            # Where a sum cancels (a bias that a softmax takes out), its rounding is all there is.
            rounding = 4 * eps * max(1, count) ** 0.5 * size.norm()
            if off.norm() > 8 * eps**0.5 * expected.norm() + rounding:
                raise InputError(
                    f"layers={layer.name!r}: the model's code uses its {name} outside of the layer "
                    "too, so that its calls are not all of the gradient; call the layer there"
                )


def _vectors(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """[d, k] for a gradient [C, d]."""
    d = gradient.shape[1]
    generator = torch.Generator().manual_seed(d)
    return torch.randn(d, _VECTORS, generator=generator, dtype=dtype).to(gradient.device)


def _on_vectors(
    layer: LinearLayer, rows: Sequence[tuple[Call, Tensor]], vectors: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Signals [R, G, C / G] and what their inputs are on the vectors [R, G, k], in pieces."""
    for call, g in rows:
        for act, delta in layer.pieces(call.act, g):
            seen = act.unflatten(1, (layer.groups, -1)).to(vectors) @ vectors
            yield delta.unflatten(1, (layer.groups, -1)).to(vectors), seen


def _of_bias(
    rows: Sequence[tuple[Call, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Signals [R, 1, C], and a one for each."""
    for _, g in rows:
        signal = g.reshape(-1, 1, g.shape[-1]).to(dtype)
        yield signal, signal.new_ones(len(signal), 1, 1)
