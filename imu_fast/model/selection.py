"""Which layers ``layers=`` stands for: names, last parts of names, patterns, modules."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from imu_fast.errors import InputError, NoHeadFoundError
from imu_fast.model.convolution import scored_layers
from imu_fast.model.head import LinearLayer, resolve
from imu_fast.model.run import innermost


def selected(model: nn.Module, layers: Any) -> tuple[list[LinearLayer], bool]:
    """The linear layers that ``layers=`` stands for, in module order, and whether one is named.

    An entry is a module; the name of one; a pattern (``"*.attn.*"``); or the last parts of names:
    ``"q_proj"`` is every layer ``*.q_proj``. A whole name wins. An adapter's wrapper (one with a
    ``base_layer``) stands for that layer, and ``"lora_A"`` for the linear layers of that name.

    Args:
        layers: an entry, or a sequence of them; what patterns choose counts once.

    Raises:
        InputError: an entry that no linear layer fits, or a layer that is named twice.
    """
    one = isinstance(layers, str | nn.Module)
    if not one and not isinstance(layers, Iterable):
        raise InputError(f"layers={layers!r} is no layer; pass a name, a module, or several")
    wanted = [layers] if one else list(layers)
    if not wanted:
        raise InputError("layers=[] names no layer; pass 'head' or a list of linear layers")
    there = scored_layers(model)
    named: list[str] = []
    found: set[str] = set()
    several = False
    for entry in wanted:
        whole = isinstance(entry, str) and entry in there and not _is_pattern(entry)
        many = None if whole else _many(model, entry, there)
        several |= many is not None
        if many is not None:
            found |= set(many)
            continue
        layer = there[entry] if whole else _resolved(model, entry, there)
        if layer.name in named:
            raise InputError(f"layers names {layer.name!r} twice; its scores would count double")
        named.append(layer.name)
    found |= set(named)
    return [layer for name, layer in there.items() if name in found], one and not several


def _is_pattern(entry: str) -> bool:
    return any(sign in entry for sign in "*?[")


def _resolved(model: nn.Module, entry: Any, there: dict[str, LinearLayer]) -> LinearLayer:
    """The layer that an entry, no pattern, stands for."""
    try:
        return resolve(model, entry, among=there)
    except NoHeadFoundError as error:
        if not _has_parameters(model, entry):
            raise
        raise NoHeadFoundError(
            f"{error}; for the mean squared gradients of parameters of any kind call "
            "imu.parameter_importance(model, loader)"
        ) from None


def _has_parameters(model: nn.Module, entry: Any) -> bool:
    """Whether the entry is a parameter's name, or a module that has some."""
    inner = innermost(model)
    if any(entry in dict(m.named_parameters(remove_duplicate=False)) for m in (model, inner)):
        return True
    module = entry if isinstance(entry, nn.Module) else _inside(model).get(entry)
    inside = isinstance(module, nn.Module) and any(m is module for m in model.modules())
    return inside and next(module.parameters(), None) is not None  # type: ignore[union-attr]


def _many(model: nn.Module, entry: Any, there: dict[str, LinearLayer]) -> list[str] | None:
    """What a pattern, or the end of names, chooses; None where the entry is neither."""
    if not isinstance(entry, str):
        return None
    pattern = _is_pattern(entry)
    modules = dict(model.named_modules(remove_duplicate=False))
    if not pattern and (entry in modules or entry in there or entry in _inside(model)):
        return None
    if pattern:
        found = [name for name in there if fnmatch.fnmatchcase(name, entry)]
        wrappers = [name for name in modules if fnmatch.fnmatchcase(name, entry)]
    else:
        found = [name for name in there if name.endswith(f".{entry}")]
        wrappers = [name for name in modules if name.endswith(f".{entry}")]
    for name in wrappers:
        found += [inner for inner in _held(name, modules[name]) if inner in there]
    if pattern and not found:
        raise InputError(f"layers={entry!r} matches none of the linear layers {list(there)}")
    return found or None


def _held(name: str, module: nn.Module) -> Sequence[str]:
    """The layers that an adapter's wrapper, or a dict of adapters, stands for."""
    if isinstance(getattr(module, "base_layer", None), nn.Module):
        return [f"{name}.base_layer"]
    if isinstance(module, nn.ModuleDict):
        return [f"{name}.{key}" for key in module]
    return []


def _inside(model: nn.Module) -> dict[str, nn.Module]:
    """Names of the model inside a wrapper."""
    return dict(innermost(model).named_modules(remove_duplicate=False))
