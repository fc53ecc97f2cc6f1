"""One way to read a batch, and what the values in it tell of which part is what."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from imu_fast.ambient import default_device_back
from imu_fast.errors import brief
from imu_fast.model.forward import Forward, innermost
from imu_fast.model.guard import preserved
from imu_fast.model.labels import is_integer
from imu_fast.model.logits import tensors_of
from imu_fast.model.nested import as_tensor, copied, is_array
from imu_fast.model.parts import Parts, device_of, to_device

logger = logging.getLogger("imu_fast")

# Positions of a sequence that a model is tried on.
_POSITIONS = 16
# What a forward raises on inputs that it cannot take.
REFUSALS = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    NotImplementedError,
)


@dataclass(frozen=True)
class Rule:
    """One way to read a batch.

    Attributes:
        read: batch -> inputs by position, by keyword, and labels.
        certain: it follows from names or numbers of inputs; otherwise the model is to be asked.
        labels_at: which part of a tuple the labels are, and which parts are not used.
    """

    read: Callable[[Any], tuple[list[Any], dict[str, Any], Any]]
    certain: bool = True
    labels_at: int = -1
    unused: tuple[int, ...] = ()


def like_a_mask(value: Tensor, tokens: Tensor) -> bool:
    """Whether this may say which tokens are padding."""
    whole = not value.is_floating_point() and not tokens.is_floating_point()
    return whole and value.dim() >= 2 and value.shape == tokens.shape


def masked_tokens(items: Sequence[Any], forward: Forward) -> Rule | None:
    """``(input_ids, labels, attention_mask)``, or with the last two the other way round.

    The mask is told by its values, 0 and 1, where the labels have others.
    """
    if len(items) < 3 or "attention_mask" not in forward.names or not all(map(is_array, items[:3])):
        return None
    if forward.positional[:1] != ("input_ids",):
        return None
    tokens, *rest = map(as_tensor, items[:3])
    if not all(like_a_mask(part, tokens) for part in rest):
        return None
    binary = [part.dtype == torch.bool or bool(((part == 0) | (part == 1)).all()) for part in rest]
    if binary[0] == binary[1]:
        return None
    mask, labels = (1, 2) if binary[0] else (2, 1)

    def read(batch: Any) -> tuple[list[Any], dict[str, Any], Any]:
        return [batch[0]], {"attention_mask": batch[mask]}, batch[labels]

    return Rule(read, True, labels, tuple(range(3, len(items))))


def several_in_a_row(parts: Parts) -> bool:
    """Whether positions begin anew within a row: samples packed one after another."""
    positions = parts.kwargs.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] < 2:
        return False
    # Not padding, whose positions may be zeros too.
    anew = (positions[:, 1:-1] == 0) & (positions[:, :-2] != 0) & (positions[:, 2:] == 1)
    return bool(anew.any())


def _outputs(model: nn.Module, parts: Parts, more: dict[str, Any]) -> dict[Any, Tensor]:
    """What a model makes of a batch; nothing where it refuses it."""
    try:
        with default_device_back():
            args, kwargs = copied(list(parts.args)), copied(parts.kwargs | more)
            return tensors_of(innermost(model)(*args, **kwargs))
    except REFUSALS as error:
        logger.info("the model refuses its inputs and %s: %s", list(more), brief(error, 100))
        return {}


# What models were found to do with labels, by their code and what they were asked with.
_found: WeakKeyDictionary[nn.Module, dict[Hashable, bool]] = WeakKeyDictionary()


def needs_labels(model: nn.Module, parts: Parts, name: str) -> bool:
    """Whether a model's outputs at each label are made from the labels, which it takes as ``name``.

    So do those that make their decoder's input of them (BART, T5), and those that leave out
    positions otherwise. The model is asked, with and without, on one sample; once for each form of
    its inputs, until it has another ``forward``, ``config`` or setting of its own.
    """
    if parts.labels.dim() < 2 or not is_integer(parts.labels.dtype):
        return False
    inner = innermost(model)
    if "forward" in vars(inner):  # of this object alone, which may hold the model itself
        return _asked(model, parts, name)
    config = getattr(inner, "config", None)
    own = {k: v for k, v in vars(inner).items() if isinstance(v, bool | int | float | str)}
    settings = str(own) + str(getattr(config, "__dict__", config))
    form = (len(parts.args), tuple(sorted(parts.kwargs)), name)
    asked = (type(inner), type(inner).forward, settings, form)
    known = _found.setdefault(model, {})
    if asked not in known:
        known[asked] = _asked(model, parts, name)
    return known[asked]


def _asked(model: nn.Module, parts: Parts, name: str) -> bool:
    has = (parts.labels >= 0).reshape(parts.n, -1).any(dim=1)
    try:
        one = parts.taken([int(has.int().argmax())])
    except Exception:  # inputs of other libraries, which cannot be cut
        one = parts
    one = to_device(one, device_of(model))
    # A few positions are enough, for a model that takes sequences of any length.
    short = one.window(0, _POSITIONS) if one.labels.shape[1] > _POSITIONS else one
    with preserved(model), torch.no_grad():
        model.eval()
        fed = _outputs(model, short, {name: short.labels})
        if not fed and short is not one:
            short, fed = one, _outputs(model, one, {name: one.labels})
        plain = _outputs(model, short, {})
    rows = tuple(short.labels.shape)
    for path, tensor in fed.items():
        if tuple(tensor.shape[:-1]) != rows:
            continue
        before = plain.get(path)
        if before is None or before.shape != tensor.shape:
            return True
        off = (tensor.float() - before.float()).norm()
        if bool(off > 1e-3 * tensor.float().norm()):
            return True
    return False
