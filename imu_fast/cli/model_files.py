"""A user's architecture and weights, by name and file."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from imu_fast.errors import InputError, brief, check_installed
from imu_fast.model.outputs import logits_of
from imu_fast.model.parts import device_of
from imu_fast.model.weights import load_weights, unwrapped

# What libraries call their classifier; the first part of the names of its weights.
_HEADS = ("fc", "classifier", "head", "heads", "score")


def build_model(arch: str, weights: Path) -> nn.Module:
    """The model of ``arch`` with these weights; the number of classes is read off the weights.

    Args:
        arch: ``torchvision:NAME``, ``timm:NAME``, ``transformers:FOLDER`` (its ``config.json``,
            of an image classifier), or ``MODULE:FUNCTION`` of the user's own, called without
            arguments; the module may lie in the current directory. It returns the model, or the
            model and how an image becomes its input, which ``model.preprocess`` then is.

    Raises:
        InputError: unknown architecture, or weights that do not fit it.
    """
    source, _, name = arch.partition(":")
    if not name:
        raise InputError(
            f"arch={arch!r}; write torchvision:NAME, timm:NAME, transformers:FOLDER or "
            "MODULE:FUNCTION"
        )
    state = load_weights(weights)
    matrices = {k: v for k, v in state.items() if v.dim() == 2}
    if not matrices:
        raise InputError(f"weights={str(weights)!r} has no linear layer, so no classifier head")
    # A .safetensors file has its own order, so the last matrix need not be the head.
    heads = [v for k, v in unwrapped(matrices).items() if k.split(".")[0] in _HEADS]
    classes = (heads or list(matrices.values()))[-1].shape[0]
    if source == "torchvision":
        model = _torchvision_model(arch, name, classes)
    elif source == "timm":
        model = _timm_model(arch, name, classes)
    elif source == "transformers":
        return _transformers_model(arch, Path(name), weights, state).eval()
    else:
        model = _own_model(arch, source, name)
    try:
        model.load_state_dict(unwrapped(state, model))
    except RuntimeError as error:
        raise InputError(
            f"weights={str(weights)!r} do not fit arch={arch!r}: {brief(error)}"
        ) from error
    return model.eval()


def _torchvision_model(arch: str, name: str, classes: int) -> nn.Module:
    check_installed(f"arch={arch!r}", "torchvision")
    from torchvision import models

    # Classifiers only: others would download weights of their backbone.
    if name not in models.list_models(module=models):
        raise InputError(f"arch={arch!r} cannot be built: torchvision has no classifier {name!r}")
    try:
        return models.get_model(name, weights=None, num_classes=classes)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"arch={arch!r} cannot be built: {brief(error)}") from error


def _timm_model(arch: str, name: str, classes: int) -> nn.Module:
    check_installed(f"arch={arch!r}", "timm", install="timm")
    import timm

    try:
        return timm.create_model(name, pretrained=False, num_classes=classes)
    except (ValueError, RuntimeError, TypeError) as error:
        raise InputError(f"arch={arch!r} cannot be built: {brief(error)}") from error


def _transformers_model(
    arch: str, folder: Path, weights: Path, state: dict[str, Tensor]
) -> nn.Module:
    """By the library itself, which knows the names that weights had in files of all versions."""
    check_installed(f"arch={arch!r}", "transformers", install="transformers")
    from transformers import AutoConfig, AutoModelForImageClassification

    if not (folder / "config.json").is_file():
        raise InputError(f"arch={arch!r}: {str(folder)!r} has no config.json; name its folder")
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        kind = type(AutoModelForImageClassification.from_config(config))
        model, report = kind.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True
        )
    except (ValueError, OSError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"arch={arch!r} cannot be built: {brief(error)}") from error
    wrong = {name: sorted(map(str, keys))[:3] for name, keys in report.items() if keys}
    if wrong:
        raise InputError(f"weights={str(weights)!r} do not fit arch={arch!r}: {wrong}")
    return model


def _own_model(arch: str, source: str, name: str) -> nn.Module:
    """Call the user's function; whatever it raises is the user's to read."""
    with _importing_from_here():
        try:
            function = getattr(importlib.import_module(source), name)
        except Exception as error:  # importing runs the user's code, which may raise anything
            raise InputError(
                f"arch={arch!r} cannot be built: {type(error).__name__}: {brief(error)}; "
                f"python -c 'import {source}' shows where"
            ) from error
        if not callable(function):
            raise InputError(f"arch={arch!r} is a {type(function).__name__}; name a function")
        try:
            inspect.signature(function).bind()
        except TypeError as error:
            raise InputError(
                f"arch={arch!r} needs arguments ({error}); name a function without"
            ) from error
        except ValueError:
            pass  # no signature to be had, as of some compiled functions: the call will tell
        try:
            model = function()
        except Exception as error:  # the user's code again
            raise InputError(
                f"arch={arch!r} raised {type(error).__name__}: {brief(error)}; "
                f"python -c 'import {source}; {source}.{name}()' shows where"
            ) from error
    preprocess = None
    if isinstance(model, tuple) and len(model) == 2:  # as clip.load() and others return it
        model, preprocess = model
    if isinstance(model, nn.Module) and callable(preprocess):
        # In the instance, not by nn.Module: it may be a module, but none of the model's.
        vars(model)["preprocess"] = preprocess
    elif preprocess is not None:
        raise InputError(
            f"arch={arch!r} returned a pair of {type(model).__name__} and "
            f"{type(preprocess).__name__}; it must return a torch.nn.Module, or that and a "
            "function of an image"
        )
    if not isinstance(model, nn.Module):
        raise InputError(
            f"arch={arch!r} returned a {type(model).__name__}; it must return a torch.nn.Module"
        )
    return model


@contextmanager
def _importing_from_here() -> Iterator[None]:
    """The current directory first on sys.path, where a console script does not have it."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def count_classes(model: nn.Module, x: Tensor) -> int:
    """How many classes the model tells apart, found by running it on one sample.

    Args:
        x: [1, ...], the first sample of the data.

    Raises:
        InputError: the model cannot take it, or returns no logits [1, C].
    """
    try:
        with torch.no_grad():
            logits = logits_of(model(x.to(device_of(model))))
    # What modules raise on shapes and dtypes that they cannot take.
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
        own = next((p.dtype for p in model.parameters() if p.is_floating_point()), x.dtype)
        wanted = f"; store x as {str(own).removeprefix('torch.')}" if own != x.dtype else ""
        raise InputError(
            f"data: the model cannot take a sample of shape {tuple(x.shape[1:])} and "
            f"{x.dtype}: {brief(error)}{wanted}"
        ) from error
    if logits.dim() != 2 or len(logits) != 1:
        raise InputError(
            f"arch: the model returns shape {tuple(logits.shape)} for one sample; it must be a "
            "classifier with logits [1, C]"
        )
    return logits.shape[1]
