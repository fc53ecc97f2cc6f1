"""Watching layers while the model runs: what went in, what came out, what became of it."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from imu_fast.errors import InputError
from imu_fast.model.head import LinearLayer

# An output up to so large is always copied, so that what happens to it can be differentiated; a
# larger one (a vocabulary's logits) only after something turned out to happen to it.
SMALL_BYTES = 1 << 24


@dataclass
class Call:
    """One call of a layer.

    Attributes:
        act: [..., d], detached; a copy, or the model's own memory.
        out: what the layer returned, untouched by what came after unless it is ``given``.
        leaf: the same memory, asking for a gradient; None where the output was only kept.
        given: the tensor that the model went on with; version: of it, at that moment.
        act_version: of act, at that moment.
    """

    layer: LinearLayer
    act: Tensor
    out: Tensor
    leaf: Tensor | None
    given: Tensor
    version: int
    act_version: int = 0
    # Its output went into another layer with weights: not the head's.
    upstream: bool = False
    # Of the parameters that were asked for, those that its input is made of, by id.
    made_of: frozenset[int] = frozenset()

    @property
    def target(self) -> Tensor:
        """What a gradient is taken with respect to."""
        assert self.leaf is not None
        return self.leaf

    @property
    def is_overwritten(self) -> bool:
        """Whether what is kept has been written to since, which copies are not."""
        return self.act._version != self.act_version or (
            self.out is self.given and self.given._version != self.version
        )

    def rows(self, gradient: Tensor | None) -> Tensor:
        """A gradient of the output as [..., C]; zeros where there is none."""
        return self.layer.outputs(torch.zeros_like(self.out) if gradient is None else gradient)

    def is_returned_as(self, logits: Tensor) -> bool:
        """Whether the logits are this output itself: its memory, row by row, never written to.

        Nor with another gradient: a function of the user's may return what it is given, and reverse
        or scale what comes back.
        """
        given = self.layer.outputs(self.given)
        same = (
            given.data_ptr() == logits.data_ptr()
            and given.dtype == logits.dtype
            and given.shape[-1:] == logits.shape[-1:]
            and given.numel() == logits.numel()
            and rows_in_order(given)
            and rows_in_order(logits)
        )
        if not same or (not logits.is_inference() and logits._version != self.version):
            return False
        if self.leaf is not None and any(name.endswith("Backward") for name in steps_of(logits)[0]):
            return False
        # A copy shows what no version counts: writing by .data, or under inference mode.
        out = self.layer.outputs(self.out).reshape(logits.shape)
        kept = self.out.data_ptr() == self.given.data_ptr()
        if kept or torch.equal(out, logits):
            return True
        return bool(((out == logits) | (out.isnan() & logits.isnan())).all())


def rows_in_order(t: Tensor) -> bool:
    """Whether [..., C] lies in memory row after row (axes of length 1 lie anywhere)."""
    expected = 1
    for size, stride in zip(reversed(t.shape), reversed(t.stride()), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


@dataclass
class Seen:
    """What one run of the model showed.

    Attributes:
        calls: of the watched layers, in the order in which they happened.
        output: what the model returned.
        odd: calls that could not be read, as text by layer.
        quiet: whether a call was where the model's own code takes no gradients.
        stopped: layers of which such calls were left out.
        made: modules by the tensor they returned, innermost first.
    """

    calls: list[Call] = field(default_factory=list)
    output: Any = None
    odd: dict[str, str] = field(default_factory=dict)
    quiet: bool = False
    stopped: set[str] = field(default_factory=set)
    made: list[tuple[weakref.ref[Tensor], str, nn.Module]] = field(default_factory=list)

    def maker_of(self, tensor: Tensor) -> tuple[str, nn.Module] | None:
        """The innermost module that returned this tensor."""
        return next(((name, m) for ref, name, m in self.made if ref() is tensor), None)


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


@contextmanager
def watched(
    layers: Sequence[LinearLayer],
    *,
    leaves: bool | None,
    trained: bool = False,
    traced: bool = False,
    copied: bool = True,
    own: AbstractSet[int] = frozenset(),
    stops: bool | None = False,
) -> Iterator[Seen]:
    """Record each call of these layers; the hooks are always removed.

    They come before any hook of the user's, so that ``out`` is the layer's own output and what
    those hooks do to it counts as what happens after the layer.

    Args:
        leaves: True: every output asks for a gradient, and the model goes on with a copy, on which
            in-place operations are allowed; False: outputs are only kept; None: by their size.
        trained: outputs of layers that lie behind each other stay connected (all their gradients
            come from one backward pass); otherwise each output starts a graph of its own.
        traced: only to see what comes from which layer: a leaf is one number that is added, 0, and
            nothing else is kept.
        copied: False: of layers whose output has a graph, inputs and outputs are kept as they are,
            as autograd keeps them; whoever reads them asks for ``is_overwritten`` first.
        own: ids of the layers' parameters, which ask for a gradient; what layers return has none of
            it, and each call says which of these its input is made of.
        stops: whether ``torch.no_grad()`` in the model's code stops gradients, as ``detach()``
            does: calls inside of it are left out. False: they are as all others, of a model that is
            run so as a whole; None: not known yet, see :class:`imu_fast.model.run.Runner`.
    """
    seen = Seen()
    active = True

    def hook(
        layer: LinearLayer, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        if not active:  # a checkpoint runs layers again during backward
            return None
        if not torch.is_grad_enabled():
            seen.quiet = True
            if stops or (stops is None and torch.is_inference_mode_enabled()):
                seen.stopped.add(layer.name)
                return None
        x = _input(args, kwargs)
        if not isinstance(x, Tensor) or not isinstance(output, Tensor):
            seen.odd[layer.name] = f"it maps a {type(x).__name__} to a {type(output).__name__}"
            return None
        if x.is_nested:
            seen.odd[layer.name] = "it maps a nested tensor, whose samples differ in shape"
            return None
        # A linear layer takes sparse inputs; what is made of them is dense.
        act = layer.inputs(x.detach() if x.layout == torch.strided else x.detach().to_dense())
        if act is None:
            seen.odd[layer.name] = "it is a convolution over several positions"
            return None
        if not output.is_floating_point() or output.dim() == 0:
            seen.odd[layer.name] = f"its output is {output.dtype}"
            return None
        made_of = frozenset(leaves_of(x) & own) if own else frozenset[int]()
        detached = bool(own) and output.requires_grad
        output = output.detach() if detached else output
        as_leaf = output.nbytes <= SMALL_BYTES if leaves is None else leaves
        if torch.is_inference_mode_enabled():
            if leaves:
                raise InputError(
                    f"the model runs layer {layer.name!r} under torch.inference_mode(), where no "
                    "gradient can be taken; use torch.no_grad() there, or remove the decorator"
                )
            as_leaf = False
        if not as_leaf:
            unversioned = output.is_inference()
            out = output.clone() if unversioned else output
            version = 0 if unversioned else output._version
            seen.calls.append(Call(layer, act.clone(), out, None, output, version, made_of=made_of))
            return output if detached else None
        torch.set_grad_enabled(True)  # until the model's own no_grad ends
        if torch._C._functorch.is_functorch_wrapped_tensor(output):
            raise InputError(
                f"the model calls layer {layer.name!r} inside a torch.func transform (vmap, grad), "
                "where it cannot be watched; call it on the batch"
            )
        if traced:
            leaf = output.new_zeros(()).requires_grad_()
            seen.calls.append(Call(layer, leaf, leaf, leaf, leaf, 0))
            return output.detach().add_(leaf)  # no copy
        with_graph = trained and output.requires_grad
        if with_graph and not copied and not act.is_inference():
            seen.calls.append(
                Call(layer, act, output, output, output, output._version, act._version)
            )
            return None
        leaf = output if with_graph else output.detach().requires_grad_()
        given = leaf.clone()
        seen.calls.append(
            Call(layer, act.clone(), output, leaf, given, given._version, made_of=made_of)
        )
        return given

    with ExitStack() as stack:
        for layer in layers:

            def forward_hook(
                _: nn.Module, args: Any, kwargs: Any, output: Any, layer: LinearLayer = layer
            ) -> Any:
                return hook(layer, args, kwargs, output)

            handle = layer.module.register_forward_hook(
                forward_hook, prepend=True, with_kwargs=True
            )
            stack.callback(handle.remove)
        try:
            yield seen
        finally:
            active = False


def leaves_of(tensor: Tensor) -> set[int]:
    """The ids of the leaf tensors that a tensor's graph ends in."""
    return {id(leaf) for leaf in _walk(tensor)[0]}


def _walk(tensor: Tensor) -> tuple[list[Tensor], list[Any]]:
    """Leaves and inner nodes of a tensor's graph."""
    if tensor.grad_fn is None:
        return ([tensor] if tensor.requires_grad else []), []
    leaves, nodes, seen = [], [], set()
    stack: list[Any] = [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        else:
            nodes.append(node)
            stack.extend(following for following, _ in node.next_functions)
    return leaves, nodes


def steps_of(tensor: Tensor) -> tuple[list[str], list[tuple[int, ...]]]:
    """Operations between the leaves and a tensor: their names, and the shapes that they make."""
    nodes = _walk(tensor)[1]
    names = [node.name().split("::")[-1] for node in nodes]
    shapes = [tuple(m.shape) for node in nodes for m in node._input_metadata]
    return list(dict.fromkeys(names)), list(dict.fromkeys(shapes))


def operations_of(tensor: Tensor) -> Hashable:
    """Which operations are between the leaves and a tensor, and how many of each."""
    return tuple(sorted(Counter(node.name() for node in _walk(tensor)[1]).items()))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors in nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def _cut(value: Any, found: Callable[[Tensor], None]) -> Any:
    """The same arguments with every tensor that asks for a gradient detached, and reported."""
    if isinstance(value, Tensor):
        if not value.requires_grad:
            return value
        found(value)
        return value.detach()
    if isinstance(value, dict) and type(value) is dict:
        return {key: _cut(item, found) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_cut(item, found) for item in value)
    for tensor in tensors_in(value):
        if tensor.requires_grad:
            found(tensor)
    return value


@contextmanager
def searched(
    model: nn.Module, layers: Sequence[LinearLayer], stops: bool | None = False
) -> Iterator[Seen]:
    """Watch every layer, to find those from which the outputs come with no other in between.

    Whatever enters a module with a weight matrix is cut off there, and the layers that it came
    from are marked ``upstream`` and forgotten, so that little more is kept than the model needs.
    """
    with ExitStack() as stack:
        seen = stack.enter_context(watched(layers, leaves=True, traced=True, stops=stops))

        def forget(tensor: Tensor) -> None:
            found = leaves_of(tensor)
            for call in seen.calls:
                if call.leaf is not None and id(call.leaf) in found:
                    call.upstream, call.leaf = True, None

        def enter(_: nn.Module, args: Any, kwargs: Any) -> Any:
            return _cut(args, forget), _cut(dict(kwargs), forget)

        def leave(name: str, module: nn.Module, output: Any) -> None:
            for tensor in tensors_in(output):
                seen.made.append((weakref.ref(tensor), name, module))

        for layer in layers:
            for parameter in layer.module.parameters():
                if parameter.is_floating_point():
                    stack.callback(parameter.requires_grad_, parameter.requires_grad)
                    parameter.requires_grad_()
        for name, module in model.named_modules():
            inside = isinstance(module, torch.jit.ScriptModule)  # hooks fire outside of it only
            own = [p for p in module.parameters(inside) if sum(s > 1 for s in p.shape) > 1]
            if own or isinstance(module, nn.Linear):
                handle = module.register_forward_pre_hook(enter, with_kwargs=True)
                stack.callback(handle.remove)

            def after(module: nn.Module, _: Any, output: Any, name: str = name) -> None:
                leave(name, module, output)

            stack.callback(module.register_forward_hook(after).remove)
        yield seen
