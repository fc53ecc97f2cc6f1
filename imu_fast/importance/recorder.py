"""Every use of a parameter while the model runs, whatever code uses it.

Torch's functions are watched, not modules: where a function takes a parameter, or a tensor that was
made of parameters alone (a view, a normalised weight, position embeddings of fixed positions),
beside something that the samples enter, that use is a *site*. There the parameter goes in without
its graph, and the gradient at the site gives each sample's share. A parameter whose graph is still
found under the logits had a use that no rule covers, and is told.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from imu_fast.errors import InputError
from imu_fast.importance.gradients import Dense, Gradients, wide
from imu_fast.importance.split import by_sample, part_of
from imu_fast.model.rows import Layout
from imu_fast.model.run import plain_strides

# A site's gradient, how samples lie in it, and how many -> the source's gradients.
Maker = Callable[[Tensor, Layout | None, int], Gradients]
Rule = Callable[["Recorder", tuple[Any, ...], dict[str, Any]], Any]

_ASKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
ELEMENTWISE = frozenset(
    "add sub mul div true_divide divide multiply subtract rsub where maximum minimum lerp addcmul "
    "addcdiv pow radd rmul rpow rdiv rtruediv truediv iadd isub imul itruediv idiv".split()
)
# Which rows of a tensor go where may depend on the samples' values here.
_MOVES_BY_DATA = frozenset(
    "index_select gather take masked_select index_add scatter index_put argsort sort topk "
    "index_copy scatter_add scatter_reduce take_along_dim masked_scatter roll".split()
)


@dataclass
class Use:
    """A tensor's part in a site.

    Attributes:
        source: a parameter, or what was made of parameters alone.
        gradients: how its gradients follow from the site's.
    """

    source: Tensor
    gradients: Maker


@dataclass
class Site:
    """Where parameters meet samples.

    Attributes:
        uses: of one or several tensors. axes: of the gradient along which samples may lie.
        kind: of function. shape: of the gradient.
        inputs: what the gradients are made of, with their versions: they must not change until.
    """

    uses: list[Use]
    axes: Sequence[int]
    kind: str
    shape: torch.Size
    inputs: list[tuple[Tensor, int]] = field(default_factory=list)

    def unchanged(self) -> bool:
        """Whether the inputs are what they were."""
        return all(tensor._version == version for tensor, version in self.inputs)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Tensors among arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))


def mapped(value: Any, leaf: Callable[[Tensor], Any]) -> Any:
    """Arguments with every tensor replaced."""
    if isinstance(value, Tensor):
        return leaf(value)
    if type(value) in (list, tuple):
        return type(value)(mapped(item, leaf) for item in value)
    if isinstance(value, dict):
        return {key: mapped(item, leaf) for key, item in value.items()}
    return value


@functools.cache
def opened(function: types.FunctionType) -> Callable[..., Any]:
    """One of torch's functions that are written in Python, without its question for overrides.

    Called under a mode, what it calls is seen by the mode; as it is it would only ask again.
    """
    never = dict.fromkeys(_ASKS, lambda *_: False)
    made = types.FunctionType(
        function.__code__,
        {**function.__globals__, **never},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _asks(function: Any) -> bool:
    found = isinstance(function, types.FunctionType)
    return found and any(name in function.__globals__ for name in _ASKS)


class Recorder(TorchFunctionMode):
    """Notes sites while it is entered around one run of the model.

    Args:
        rules: by torch's function; they return NotImplemented for operands that they do not know.

    Attributes:
        sites: in the order of the run. anchors: what a backward pass has to reach.
        moves: whether rows were chosen by the samples' values.
        code: the names of all functions that samples went through, in the order of the run.
    """

    def __init__(self, model: nn.Module, rules: dict[Any, Rule]) -> None:
        super().__init__()
        self.rules = rules
        self.sites: list[Site] = []
        self.anchors: list[Tensor] = []
        self.moves = False
        self.code: list[str] = []
        self.sink: Callable[[Site, Tensor], None] = lambda site, gradient: None
        self._fixed: dict[int, tuple[Tensor, int]] = {}
        for module in model.modules():
            kept = [v for v in vars(module).values() if isinstance(v, Tensor)]
            kept += [*module._parameters.values(), *module._buffers.values()]  # type: ignore
            for tensor in kept:
                if tensor is not None and not tensor.is_inference():
                    self._note(tensor)

    def _note(self, value: Any) -> None:
        for tensor in tensors_of(value):
            if not tensor.is_inference():
                self._fixed[id(tensor)] = tensor, tensor._version

    def is_fixed(self, tensor: Any) -> bool:
        """Whether no sample has entered this tensor."""
        if not isinstance(tensor, Tensor):
            return False
        kept = self._fixed.get(id(tensor))
        return kept is not None and kept[0] is tensor and kept[1] == tensor._version

    def is_source(self, tensor: Any) -> bool:
        """Whether it is a parameter or made of parameters, and of nothing that samples entered."""
        return self.is_fixed(tensor) and tensor.requires_grad

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(tensors_of(args))
        tensors += tensors_of(kwargs)
        fixed = [t for t in tensors if self.is_fixed(t)]
        if len(fixed) == len(tensors):
            out = func(*args, **kwargs)
            self._note(out)
            return out
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in fixed):
            self._look(func, args)
            return func(*args, **kwargs)
        rule = self.rules.get(func)
        if rule is not None:
            out = rule(self, args, kwargs)
            if out is not NotImplemented:
                return out
        elif _asks(func):
            with self:
                return opened(func)(*args, **kwargs)
        name = getattr(func, "__name__", "")
        plain = name.strip("_")
        in_place = name == "__setitem__" or (plain.startswith("i") and plain[1:] in ELEMENTWISE)
        in_place |= name.endswith("_") and not name.endswith("__")
        if in_place and args and self.is_fixed(args[0]):  # whoever holds it would miss a copy
            return func(*args, **kwargs)
        return self.as_rows(func, args, kwargs, plain)

    def _look(self, func: Any, args: tuple[Any, ...]) -> None:
        """Note what may lay rows out by the samples' values."""
        name = getattr(func, "__name__", "").strip("_")
        self.code.append(name)
        if not self.moves and args and isinstance(args[0], Tensor):
            indices = tensors_of(args[1:2]) if name in ("getitem", "setitem") else iter(())
            by_index = next(indices, None) is not None
            self.moves = by_index or name in _MOVES_BY_DATA

    def as_rows(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
        """A use of which nothing is known but that each place of the source is some sample's.

        In elementwise functions that is so of the source after broadcasting.
        """
        shape: torch.Size | None = None
        if name in ELEMENTWISE:
            sizes = [t.shape for t in (*tensors_of(args), *tensors_of(kwargs))]
            shape = torch.broadcast_shapes(*sizes)

        def replaced(tensor: Tensor) -> Tensor:
            if not self.is_source(tensor):
                return tensor
            full = tensor.shape if shape is None else shape
            use = Use(tensor, functools.partial(reduced, tensor))
            site = Site([use], range(len(full)), name, full)
            return self.watched(tensor.detach().expand(full).clone(), site)

        return func(*mapped(args, replaced), **mapped(kwargs, replaced))

    def watched(self, out: Tensor, site: Site) -> Tensor:
        """``out``, or what has its place, so that its gradient comes to the site."""
        if not out.is_floating_point() or out.is_inference():
            raise InputError(
                f"the model takes parameters into {site.kind}, which gives {out.dtype}"
                f"{' under inference_mode' if out.is_inference() else ''}: there is no gradient"
            )
        if not out.requires_grad:
            anchor = out.new_zeros(()).requires_grad_()
            self.anchors.append(anchor)
            out = out.detach().add_(anchor)
        self.sites.append(site)

        def arrived(gradient: Tensor) -> Tensor | None:
            self.sink(site, gradient)
            odd = site.kind == "batch_norm" and 1 in gradient.shape
            return plain_strides(gradient) if odd else None

        out.register_hook(arrived)
        return out


def versioned(*tensors: Tensor) -> list[tuple[Tensor, int]]:
    """Inputs of a site, as they are now."""
    return [(t.detach(), t._version) for t in tensors if not t.is_inference()]


def reduced(source: Tensor, gradient: Tensor, layout: Layout | None, n: int) -> Gradients:
    """Gradients of what was broadcast to the gradient's shape: sums over the axes that it lacks."""
    lacks = gradient.dim() - source.dim()
    shares = wide(by_sample(gradient, layout, n))
    own = layout is not None and layout.dim >= lacks and source.shape[layout.dim - lacks] > 1
    if layout is not None and own:
        inner = Layout(layout.kind, layout.dim - lacks)
        places: torch.Size = by_sample(source.detach(), inner, n).shape[1:]
    else:
        places = source.shape
    values = shares.sum_to_size(n, *[1] * lacks, *places).reshape(n, *places)
    if not own:
        return Dense(values)
    return Dense(values, source.shape, lambda tensor, i: part_of(tensor, inner, n, i))
