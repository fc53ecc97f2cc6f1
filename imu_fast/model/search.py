"""Finding a model's head while its first batch runs, and checking that it is one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from imu_fast.errors import NoHeadFoundError
from imu_fast.model.between import named_steps
from imu_fast.model.calls import Call, Seen, leaves_of, searched, steps_of, watched
from imu_fast.model.head import LinearLayer, declared, guess, linear_layers, no_head
from imu_fast.model.logits import Path, ambiguous, candidates, chosen
from imu_fast.model.own_use import asking, check_fed, used_by_code
from imu_fast.model.run import Batch, innermost

Run = Callable[[Batch], Any]

# Steps that compare outputs with something, or weigh them by a matrix: what comes out of them is
# no longer one number per output.
_MIXES = re.compile(r"(mm|mv|dot|linear|conv|dist|bilinear|attention|lstm|gru|rnn)backward", re.I)


@dataclass(frozen=True)
class Head:
    """Which layers make the logits, and where these are.

    Attributes:
        parts: one layer, or those whose outputs are averaged, summed or otherwise joined.
        choice: where the logits are in the output: the caller's ``output=``, or a path.
    """

    parts: list[LinearLayer]
    choice: Any

    @property
    def name(self) -> str:
        """The layer's name; of several, joined by ``+``."""
        return "+".join(part.name for part in self.parts)


def observe(
    run: Run,
    batch: Batch,
    layers: Sequence[LinearLayer],
    leaves: bool | None,
    own: AbstractSet[int] = frozenset(),
) -> Seen:
    """Run a batch and watch some layers."""
    stops = getattr(run, "stops", False)
    with watched(layers, leaves=leaves, own=own, stops=stops) as seen:
        seen.output = run(batch)
    if stops is None and seen.quiet:
        run.settle(batch)  # type: ignore[attr-defined]  # a Runner
        return observe(run, batch, layers, leaves, own)
    return seen


def search(model: nn.Module, run: Run, batch: Batch) -> Seen:
    """Run a batch and watch every layer, see :func:`imu_fast.model.calls.searched`."""
    stops = getattr(run, "stops", False)
    with searched(model, list(linear_layers(model).values()), stops) as every:
        every.output = run(batch)
    if stops is None and every.quiet:
        run.settle(batch)  # type: ignore[attr-defined]  # a Runner
        return search(model, run, batch)
    return every


def find(
    model: nn.Module,
    run: Run,
    batch: Batch,
    explicit: Sequence[LinearLayer],
    output: Any,
    leaves: bool | None = None,
) -> tuple[Head, Seen]:
    """The head, and what a run of the first batch showed of it.

    Where the likely layer is not it, the batch runs a second and a third time.

    Args:
        explicit: the layers that the caller named, or empty.
        leaves: of the likely layers, as of :func:`imu_fast.model.calls.watched`.

    Raises:
        InputError: several outputs may be the logits.
        NoHeadFoundError: no linear layer makes the logits, or not the given one.
    """
    layers = linear_layers(model)
    if not layers:
        raise no_head(model, "no linear head found")
    likely = list(explicit) or guess(model, layers)
    with asking(model, likely) as own:
        seen = observe(run, batch, likely, leaves, own.keys())
    options = _options(model, seen.output, batch, output)
    if len(options) == 1:
        path, logits = next(iter(options.items()))
        direct = directly(seen, logits)
        if direct is not None:
            check_fed(model, [direct.layer], [direct])
            seen.calls = [direct]
            return Head([direct.layer], path if output is None else output), seen
    every = search(model, run, batch)
    options = _options(model, every.output, batch, output)
    path = _decided(options, every)
    parts = _frontier(model, every, options[path], explicit)
    made = options[path]
    if {p.name for p in parts} <= {c.layer.name for c in seen.calls if c.leaf is not None}:
        names = {part.name for part in parts}
        seen.calls = [call for call in seen.calls if call.layer.name in names]
    else:
        every.calls.clear()
        with asking(model, parts) as own:
            seen = observe(run, batch, parts, True, own.keys())
    check_fed(model, parts, seen.calls)
    head = Head(parts, path if output is None else output)
    if not explicit:
        sizes = sum(call.out.numel() for call in seen.calls)
        _check_steps(model, every, made, parts, chosen(seen.output, head.choice), sizes)
    return head, seen


def makers(model: nn.Module, run: Run, batch: Batch, choice: Any) -> list[str]:
    """Names of the layers that make a batch's logits, see :func:`find`.

    Raises:
        NoHeadFoundError: none does.
    """
    every = search(model, run, batch)
    return [part.name for part in _frontier(model, every, chosen(every.output, choice), ())]


def locate(model: nn.Module, run: Run, batch: Batch, returned: Any, output: Any) -> Any:
    """Where the logits are in what a model returned for its first batch, as ``output=`` says it.

    Raises:
        InputError: several outputs may be the logits.
    """
    if output is not None:
        return output
    options = _options(model, returned, batch, output)
    if len(options) > 1:
        every = search(model, run, batch)
        return _decided(_options(model, every.output, batch, output), every)
    return next(iter(options))


def _options(model: nn.Module, returned: Any, batch: Batch, output: Any) -> Mapping[Path, Tensor]:
    """Tensors of the model's output that may be the logits."""
    if output is not None:
        return {(): chosen(returned, output)}
    return candidates(returned, batch[2], _declared_classes(model))


def _declared_classes(model: nn.Module) -> int | None:
    """How many classes the model says it has, as timm, torchvision and transformers' do."""
    inner = innermost(model)
    config = getattr(inner, "config", None)
    for found in (getattr(config, "num_labels", None), getattr(inner, "num_classes", None)):
        if isinstance(found, int) and not isinstance(found, bool) and found > 0:
            return found
    return None


def directly(seen: Seen, logits: Tensor) -> Call | None:
    """The one call whose output is the logits, moved about at most; nothing else can count."""
    found = [call for call in seen.calls if call.is_returned_as(logits)]
    if not found and logits.requires_grad:
        reached = leaves_of(logits)
        live = [call for call in seen.calls if call.leaf is not None and id(call.leaf) in reached]
        if len(live) == 1 and not named_steps(steps_of(logits)[0]):
            found = live
    if len(found) != 1 or sum(c.layer.name == found[0].layer.name for c in seen.calls) > 1:
        return None
    return found[0]


def _decided(options: Mapping[Path, Tensor], every: Seen) -> Path:
    """Of several outputs, the one that no other layer's input was made from.

    An embedding that the classifier reads is a step on the way to the logits; what comes out last,
    without one reading another, cannot be told apart.
    """
    last = {id(call.leaf) for call in every.calls if call.leaf is not None}
    final = {
        path: tensor
        for path, tensor in options.items()
        if tensor.requires_grad and leaves_of(tensor) & last
    }
    if len(options) == 1:
        return next(iter(options))
    if len(final) != 1:
        raise ambiguous(final or options)
    return next(iter(final))


def _frontier(
    model: nn.Module, every: Seen, logits: Tensor, explicit: Sequence[LinearLayer]
) -> list[LinearLayer]:
    """The layers from whose outputs the logits come with no other layer in between."""
    layers = linear_layers(model)
    reached = leaves_of(logits) if logits.requires_grad else set()
    live = [call for call in every.calls if call.leaf is not None and id(call.leaf) in reached]
    parts = list({call.layer.name: call.layer for call in live}.values())
    names = {part.name for part in parts}
    if explicit:
        wanted = "/".join(layer.name for layer in explicit)
        if not all(layer.name in names for layer in explicit):
            odd = [every.odd[layer.name] for layer in explicit if layer.name in every.odd]
            reason = f" ({odd[0]})" if odd else f"; that is {_maker(model, every, logits)}"
            raise no_head(model, f"{wanted}: not the producer of the logits{reason}")
        parts = list(explicit)
    else:
        # Beside what makes one output per class, a gate or a learned temperature is no head.
        classes = logits.shape[-1]
        fitting = [part for part in parts if part.width == classes]
        unasked = [
            name
            for name, layer in layers.items()
            if _weight(layer) in reached and name not in every.odd
        ]
        if unasked and not fitting:
            raise no_head(
                model,
                f"the model's code uses the weight of {unasked[0]!r} itself instead of calling the "
                "layer; call it, or pass features and weight to GradientFactors.from_head",
            )
        parts = fitting or parts
        own = declared(model, layers)  # of several, those that the model calls so
        parts = own if own and all(layer in parts for layer in own) else parts
    again = [c.layer.name for c in every.calls if c.upstream and c.layer in parts]
    if again:
        raise NoHeadFoundError(
            f"layer {again[0]!r} makes the logits, but also what leads to them: it runs several "
            f"times, one after another; capture all of its calls with layers=[{again[0]!r}]"
        )
    if len({id(part.module.weight) for part in parts}) < len(parts):
        raise NoHeadFoundError(
            f"the logits are made by {', '.join(repr(part.name) for part in parts)}, which share a "
            "weight; make them one layer that is called several times"
        )
    for part in parts:
        for name, parameter in part.module.named_parameters():
            if id(parameter) in reached:
                raise used_by_code(part, name)
    if not parts:
        unread = "".join(f"; layer {name!r}: {why}" for name, why in every.odd.items())
        maker = _maker(model, every, logits)
        raise no_head(
            model,
            f"no linear layer makes the logits: they come from {maker}{unread}; {_way_out(None)}",
        )
    adapters = [part.name for part in parts if "lora" in part.name.lower()]
    if adapters and not explicit:
        raise NoHeadFoundError(
            f"the logits are made by {', '.join(repr(part.name) for part in parts)}, one of them "
            "an adapter; merge it into the head's weight first (merge_and_unload() of a peft "
            "model), or name one layer: layers=[...]"
        )
    return parts


def _weight(layer: LinearLayer) -> int:
    """What :func:`leaves_of` calls the layer's own parameter."""
    return id(layer.module._parameters.get("weight"))


def _check_steps(
    model: nn.Module,
    every: Seen,
    made: Tensor,
    parts: Sequence[LinearLayer],
    logits: Tensor,
    outputs: int,
) -> None:
    """Raise NoHeadFoundError where the layers' outputs are compared with something, or weighed.

    Args:
        every, made: of the search, whose logits tell who made them.
        logits: with the graph from the parts alone. outputs: numbers in all the parts' outputs.
    """
    classes = logits.shape[-1]
    steps, shapes = steps_of(logits)
    mixing = [name for name in steps if _MIXES.search(name)]
    # Every output beside every class: what a comparison with one vector per class looks like.
    expanded = any(
        shape.count(classes) > tuple(logits.shape).count(classes)
        and math.prod(shape) >= outputs * classes
        for shape in shapes
    )
    kept = all(part.width == classes for part in parts)
    sliced = all(part.width > classes for part in parts) and not named_steps(steps)
    binary = classes == 2 and all(part.width == 1 for part in parts)
    if mixing or expanded or not (kept or sliced or binary):
        what = named_steps(mixing) or ["a comparison with other vectors" if expanded else "a step"]
        widths = ", ".join(str(part.width) for part in parts)
        raise no_head(
            model,
            f"the model's {classes} logits are made by {what[0]} out of "
            f"{', '.join(repr(part.name) for part in parts)} ({widths} outputs), in "
            f"{_maker(model, every, made)}; {_way_out(parts[0].name)}",
        )


def _maker(model: nn.Module, every: Seen, logits: Tensor) -> str:
    made = every.maker_of(logits)
    if made is None or not made[0]:
        return f"the code of {type(innermost(model)).__name__} itself"
    return f"{made[0]!r}, a {type(made[1]).__name__}"


def _way_out(layer: str | None) -> str:
    name = "[names of linear layers]" if layer is None else f"[{layer!r}]"
    return (
        f"score layers={name} instead, or pass the head's own features and weight to "
        "GradientFactors.from_head"
    )
