"""Where the logits are in what a model returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from imu_fast.errors import InputError, brief

# Where a tensor is in a model's output: keys, attributes and indices, from the outside in.
Path = tuple[str | int, ...]
_DEPTH = 3


def _parts(output: Any) -> dict[str | int, Any] | None:
    """What is inside a mapping, sequence, dataclass or plain object, or None."""
    if isinstance(output, Mapping):
        return dict(output.items())
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return dict(zip(output._fields, output, strict=True))
    if isinstance(output, tuple | list):
        return dict(enumerate(output))
    if isinstance(output, str | bytes | int | float | Tensor | nn.Module) or output is None:
        return None
    return dict(vars(output)) if hasattr(output, "__dict__") else None


def tensors_of(output: Any, depth: int = _DEPTH) -> dict[Path, Tensor]:
    """Every floating tensor in a model's output, by where it is."""
    if isinstance(output, Tensor):
        return {(): output} if output.is_floating_point() else {}
    found: dict[Path, Tensor] = {}
    if depth:
        for key, part in (_parts(output) or {}).items():
            found |= {(key, *path): t for path, t in tensors_of(part, depth - 1).items()}
    return found


def follow(output: Any, path: Path) -> Any:
    """What is at a path.

    Raises:
        InputError: the output has no such part; lists those that it has.
    """
    for step in path:
        parts = _parts(output) or {}
        if step in parts:
            output = parts[step]
        elif isinstance(step, int) and -len(parts) <= step < len(parts):
            output = list(parts.values())[step]
        elif isinstance(step, str) and hasattr(output, step):
            output = getattr(output, step)
        else:
            raise InputError(
                f"output={step!r}: the model returned a {type(output).__name__} with "
                f"{', '.join(map(repr, parts)) or 'nothing inside'}"
            )
    return output


def named(path: Path) -> str:
    """A path as users would write it."""
    return ".".join(map(str, path)) or "the output"


def candidates(
    output: Any, labels: Tensor | None, classes: int | None = None
) -> dict[Path, Tensor]:
    """Tensors in a model's output that may be the logits, by where they are.

    A tensor, or what is called ``logits``, is them. Otherwise those whose shape fits the labels,
    [*labels.shape, C] with every label below C; of several, the one with as many ``classes`` as
    the model says it has.

    Raises:
        InputError: there is none.
    """
    if isinstance(output, Tensor):
        return {(): _checked(output, "the model's output is")}
    parts = _parts(output) or {}
    logits = parts.get("logits", getattr(output, "logits", None))
    if isinstance(logits, Tensor):
        return {("logits",): _checked(logits, "'logits' in the model's output is")}
    every = tensors_of(output)
    if labels is None:
        fitting = {path: t for path, t in every.items() if t.dim() >= 2}
    else:
        whole = not labels.is_floating_point() and labels.numel() > 0
        largest = int(labels.max()) if whole else 0
        fitting = {
            path: t
            for path, t in every.items()
            if (t.shape[:-1] == labels.shape and t.dim() > 1 and t.shape[-1] > largest)
            or (labels.is_floating_point() and labels.dim() > 1 and t.shape == labels.shape)
        }
    if not fitting:
        shapes = {named(path): tuple(t.shape) for path, t in every.items()}
        wanted = "" if labels is None else f" of shape {(*labels.shape, 'C')}, for these labels"
        raise InputError(
            f"the model returned a {type(output).__name__} without logits{wanted}; its tensors are "
            f"{shapes or 'none'}; say where the logits are with output= (a key, an index, or a "
            "function of the output)"
        )
    declared = {path: t for path, t in fitting.items() if t.shape[-1] == classes}
    return declared if len(fitting) > 1 and len(declared) == 1 else fitting


def ambiguous(found: Mapping[Path, Tensor], why: str = "") -> InputError:
    """Which of these are the logits?"""
    shapes = {named(path): tuple(t.shape) for path, t in found.items()}
    return InputError(
        f"several tensors in the model's output may be its logits: {shapes}{why}; say which with "
        "output= (a key, an index, or a function of the output)"
    )


def chosen(output: Any, choice: Any) -> Tensor:
    """What ``output=`` names: a key, an attribute, an index, a path of these, or a function.

    Raises:
        InputError: it is not there, or no tensor.
    """
    if choice == ():
        return _checked(output, "the model's output is")
    if not callable(choice):
        path = choice if isinstance(choice, tuple) else (choice,)
        return _checked(follow(output, path), f"output={choice!r} gives")
    name = f"output={getattr(choice, '__qualname__', choice)}"
    try:
        found = choice(output)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(
            f"{name} raised {type(error).__name__}: {brief(error)}; it is called with what the "
            f"model returns, {_shown(output)}, and must return the logits in it"
        ) from error
    return _checked(found, f"{name} gives")


def _checked(found: Any, what: str) -> Tensor:
    """What is to be the logits.

    Raises:
        InputError: it cannot be.
    """
    if isinstance(found, Tensor) and found.is_floating_point() and found.dim() >= 2:
        return found
    way_out = "say where the logits [n, C] are with output= (a key, an index, or a function)"
    if isinstance(found, Tensor) and found.is_floating_point() and found.dim() == 1:
        way_out = "one logit a sample is to be [n, 1], as output=lambda o: o[:, None] makes it"
    raise InputError(f"{what} a {_shown(found)}; it must be the logits: {way_out}")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} tensor of shape {tuple(value.shape)}"
    inside = {named(path): tuple(t.shape) for path, t in tensors_of(value).items()}
    return type(value).__name__ + (f" with {inside}" if inside else "")


def logits_of(output: Any, labels: Tensor | None = None, choice: Any = None) -> Tensor:
    """The logits in a model's output: a tensor, what is called ``logits``, or the one that fits.

    Args:
        labels: what the logits are for, [n] or [n, T]; without, only one tensor may be there.
        choice: the caller's ``output=``, see :func:`chosen`.

    Raises:
        InputError: there are none, or several fit and nothing decides.
    """
    if choice is not None:
        return chosen(output, choice)
    found = candidates(output, labels)
    if len(found) > 1:
        raise ambiguous(found)
    return next(iter(found.values()))
