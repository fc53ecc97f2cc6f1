"""Linear layers of a model: what counts as one, their names, and which looks like the head."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from imu_fast.errors import InputError, NoHeadFoundError
from imu_fast.model.guard import modes
from imu_fast.model.run import innermost

logger = logging.getLogger("imu_fast")

# The name of a model that is itself the linear layer.
WHOLE_MODEL = "(model)"

_HEAD_NAMES = ("fc", "classifier", "head", "heads", "score")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def made(module: nn.Module, name: str) -> Any:
    """``module.<name>`` as a forward pass in evaluation mode has it.

    Reading a weight that a parametrization makes runs it: in training mode spectral_norm's goes on
    by an iteration, and changes its buffers.
    """
    if not parametrize.is_parametrized(module, name):
        return getattr(module, name)
    parametrization: Any = module.parametrizations[name]  # type: ignore[index]
    with modes(parametrization, batchnorm="eval", dropout="eval"):
        return getattr(module, name)


@dataclass(frozen=True)
class LinearLayer:
    """A layer that is ``act W^T + b`` at every position: nn.Linear, or a convolution used as one.

    A convolution is one where its kernel is a single position, or covers the whole input; GPT-2's
    Conv1D, which keeps W^T, always.
    """

    name: str
    module: nn.Module

    @property
    def kind(self) -> str:
        """The module's class, for messages."""
        return type(self.module).__name__

    @property
    def weight(self) -> Tensor:
        """[C, d]; a view of the module's own where that is a parameter."""
        return self.like_weight(made(self.module, "weight").detach())

    def like_weight(self, stored: Tensor) -> Tensor:
        """What has the shape of the module's weight, as [C, d]."""
        return stored.T if _is_transposed(self.module) else stored.flatten(1)

    @property
    def groups(self) -> int:
        """G: each C / G outputs see d inputs of their own, so that act is [..., G d]."""
        return 1

    @property
    def bias(self) -> Tensor | None:
        """[C], or None."""
        bias = made(self.module, "bias")
        return bias.detach() if isinstance(bias, Tensor) else None

    @property
    def matrix(self) -> Tensor:
        """``[W, b]``: [C, D]."""
        bias = [] if self.bias is None else [self.bias[:, None]]
        return torch.cat([self.weight, *bias], dim=1)

    @property
    def width(self) -> int:
        """C, the number of outputs."""
        return len(self.weight)

    @property
    def derived(self) -> bool:
        """Whether the weight is made from other parameters (weight_norm, spectral_norm, ...)."""
        return not isinstance(self.module._parameters.get("weight"), nn.Parameter)

    def inputs(self, x: Tensor) -> Tensor | None:
        """The module's input as act [..., d]; None where the layer is not linear on it."""
        if not isinstance(self.module, _CONVOLUTIONS):
            return x
        spatial = self.module.weight.dim() - 2
        kernel = self.module.kernel_size
        if all(k == 1 for k in kernel) and all(s == 1 for s in self.module.stride):
            return x.movedim(-1 - spatial, -1)
        if tuple(x.shape[-spatial:]) == tuple(kernel):
            return x.flatten(-1 - spatial)[(..., *[None] * spatial, slice(None))]
        return None

    def outputs(self, y: Tensor) -> Tensor:
        """The module's output, or a gradient of it, as [..., C]."""
        if not isinstance(self.module, _CONVOLUTIONS):
            return y
        return y.movedim(1 - self.module.weight.dim(), -1)

    def pieces(self, act: Tensor, delta: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """``(act [R, d], delta [R, C])``: all rows, in one piece or several."""
        yield act.reshape(-1, act.shape[-1]), delta.reshape(-1, delta.shape[-1])

    def as_linear(self) -> nn.Linear:
        """The module, or for another kind an nn.Linear that shares its memory."""
        return self.module if isinstance(self.module, nn.Linear) else self.held()

    def held(self) -> nn.Linear:
        """An nn.Linear of the weight and the bias as they are, in their memory."""
        bias = self.bias
        classes, width = self.weight.shape
        linear = nn.Linear(width, classes, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        return linear


def _is_transposed(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D: ``x W + b``, W [d, C]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def _may_be_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear) or _is_transposed(module):
        return True
    if not isinstance(module, _CONVOLUTIONS) or module.transposed or module.groups != 1:
        return False
    padded = module.padding if isinstance(module.padding, tuple) else (module.padding != "valid",)
    return not any(padded) and all(d == 1 for d in module.dilation)


def linear_layers(model: nn.Module) -> dict[str, LinearLayer]:
    """Every layer that may be linear, in module order, by its first name."""
    found = {}
    for name, module in model.named_modules():
        if _may_be_linear(module):
            name = name or WHOLE_MODEL
            found[name] = LinearLayer(name, module)
    return found


def linears(model: nn.Module) -> dict[str, LinearLayer]:
    """The linear layers that are no convolution."""
    found = linear_layers(model).items()
    return {k: layer for k, layer in found if not isinstance(layer.module, _CONVOLUTIONS)}


def no_head(model: nn.Module, reason: str) -> NoHeadFoundError:
    modules = {k: layer.module for k, layer in linears(model).items()}
    shapes = {
        k: (m.out_features, m.in_features) if isinstance(m, nn.Linear) else (m.nf, m.nx)
        for k, m in modules.items()
    }
    return NoHeadFoundError(
        f"{reason}; the model's linear layers (C, d) are {shapes or 'none'}; logits whose classes "
        "do not come last are brought into that layout by output=, a function"
    )


def linear_layers_matching(model: nn.Module, substring: str) -> list[str]:
    """Names of the linear layers whose name contains ``substring``, in module order."""
    return [name for name in linears(model) if substring in name]


Uses = dict[int, list[tuple[str, nn.Module]]]


def uses_of(model: nn.Module) -> Uses:
    """Of each parameter, by its id, under which names it is there, and the modules."""
    found: Uses = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                where = f"{name}.{key}" if name else key
                found.setdefault(id(parameter), []).append((where, module))
    return found


def shared_with(model: nn.Module, layer: LinearLayer, uses: Uses | None = None) -> list[str]:
    """Other parameters of the model that are the layer's weight or bias, under their names.

    Args:
        uses: of the model's parameters, for many layers at once.
    """
    own = {id(p) for p in layer.module.parameters(recurse=False)}
    places = uses_of(model) if uses is None else uses
    return [
        name for key in own for name, module in places.get(key, []) if module is not layer.module
    ]


def say_of_weight(model: nn.Module, layer: LinearLayer, uses: Uses | None = None) -> None:
    """Log a warning where gradients are not those of parameters that the layer alone uses."""
    if layer.derived:
        logger.warning(
            "layer %r makes its weight from other parameters: gradients are those of the weight "
            "that it computes with",
            layer.name,
        )
    if others := shared_with(model, layer, uses):
        logger.warning(
            "layer %r shares its weight with %s: gradients are those of the layer's own use of it",
            layer.name,
            ", ".join(others),
        )


def check_not_frozen(model: nn.Module, name: str, head: Sequence[nn.Module]) -> None:
    """Raise InputError where the user keeps the parameters of a head that nobody has named.

    A model of which nothing is trained keeps nothing in particular.

    Args:
        head: its modules. name: theirs.
    """
    own = [(n, p) for layer in head for n, p in layer.named_parameters()]
    frozen = [n.rpartition(".")[2] for n, p in own if not p.requires_grad]
    if not frozen or not any(p.requires_grad for p in model.parameters()):
        return
    what = "" if len(frozen) == len(own) else f"'s {' and '.join(frozen)}"
    raise InputError(
        f"the head {name!r}{what} has requires_grad=False while other parameters do not; ask for "
        f"it by name, layers={name!r}, or use scope='all' for those that are not frozen"
    )


def check_gradients(layers: Iterable[nn.Module]) -> None:
    """Raise InputError where the user changes gradients, as to keep some rows as they are."""
    for layer in layers:
        for key, parameter in layer.named_parameters():
            if parameter._backward_hooks:
                raise InputError(
                    f"a {type(layer).__name__} that is to change has a hook on the gradient of its "
                    f"{key} (Tensor.register_hook), which only autograd runs; remove it, or use an "
                    "ascent with scope='layers'"
                )


def resolve(
    model: nn.Module,
    wanted: Any,
    argument: str = "layers",
    among: dict[str, LinearLayer] | None = None,
) -> LinearLayer:
    """The linear layer that a name or a module of the model stands for.

    Args:
        among: the layers it may be; None: those of :func:`linear_layers`.

    Raises:
        InputError: not of this model, or not linear; lists what is near.
    """
    layers = linear_layers(model) if among is None else among
    if isinstance(wanted, nn.Module):
        for layer in layers.values():
            if layer.module is wanted:
                return layer
    every = dict(model.named_modules(remove_duplicate=False))
    if isinstance(wanted, nn.Module):
        named = next((name for name, module in every.items() if module is wanted), None)
        if named is None:
            raise no_head(
                model,
                f"{argument}={_short(wanted)} is no linear layer of the model: it belongs to "
                "another one, or to a copy; pass its name",
            )
        wanted = named or WHOLE_MODEL
    if not isinstance(wanted, str):
        raise InputError(
            f"{argument}={wanted!r} is a {type(wanted).__name__}; pass names of linear layers, or "
            "the modules"
        )
    if wanted in layers:
        return layers[wanted]
    module = every.get(wanted)
    module = getattr(module, "base_layer", module)  # an adapter's wrapper
    if module is None:  # names of the model inside a wrapper are good too
        module = dict(innermost(model).named_modules(remove_duplicate=False)).get(wanted)
    for layer in layers.values():
        if layer.module is module:
            return layer
    if module is not None:
        inside = [name for name in layers if name.startswith(f"{wanted}.")]
        hint = f"; it holds {', '.join(map(repr, inside[:5]))}" if inside else ""
        raise no_head(
            model,
            f"{argument}={wanted!r} is no linear layer of the model but a {_short(module)}{hint}",
        )
    near = difflib.get_close_matches(wanted, [*layers, *every], n=3, cutoff=0.5)
    hint = f" (did you mean {' or '.join(map(repr, dict.fromkeys(near)))}?)" if near else ""
    raise no_head(model, f"{argument}={wanted!r} is no linear layer of the model{hint}")


def _short(module: nn.Module) -> str:
    return f"{type(module).__name__}(...)" if len(str(module)) > 80 else str(module)


def find_head(model: nn.Module, head: Any = None) -> tuple[str, nn.Linear]:
    """The classifier by name, without running the model.

    Args:
        head: a module or its dotted name; None looks for timm's ``get_classifier``, the usual
            attribute names, and then the last linear layer.

    Raises:
        NoHeadFoundError: lists the candidates.
    """
    if head is not None and not (isinstance(head, str) and head == "head"):
        found = resolve(model, head, "head")
        return found.name, found.as_linear()
    guessed = guess(model, linears(model))
    if not guessed:
        raise no_head(model, "no linear head found")
    return guessed[0].name, guessed[0].as_linear()


def declared(model: nn.Module, layers: dict[str, LinearLayer]) -> list[LinearLayer]:
    """What timm's ``get_classifier`` names: the last linear layer in it, or in each of several."""
    get_classifier = getattr(innermost(model), "get_classifier", None)
    try:
        found = get_classifier() if callable(get_classifier) else None
    except Exception:  # a method of another kind, which wants arguments
        return []
    several = isinstance(found, tuple | list | nn.ModuleList)
    out = []
    for part in found if several else [found]:  # type: ignore[union-attr]
        inside = {id(m) for m in part.modules()} if isinstance(part, nn.Module) else set()
        out += [layer for layer in layers.values() if id(layer.module) in inside][-1:]
    return out


def guess(model: nn.Module, layers: dict[str, LinearLayer]) -> list[LinearLayer]:
    """What is probably the head, the likeliest first; only a run of the model can tell."""
    named = declared(model, layers)
    if named or not layers:
        return named
    names = {id(module): name for name, module in innermost(model).named_modules()}
    for wanted in _HEAD_NAMES:
        within = [
            layer
            for layer in layers.values()
            if f"{names.get(id(layer.module))}.".startswith(f"{wanted}.")
        ]
        if within:
            return within[-1:]
    return list(layers.values())[-1:]
