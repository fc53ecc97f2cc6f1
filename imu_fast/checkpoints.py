"""A user's architecture and weights, by name and file."""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from imu_fast.capture import logits_of
from imu_fast.errors import InputError
from imu_fast.storage import load_tensors


def load_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from ``.safetensors``, or from a torch file (tensors only, never code).

    Raises:
        InputError: missing, unreadable, or a pickled whole model.
    """
    if not path.is_file():
        raise InputError(f"weights={str(path)!r} does not exist; check the name")
    if path.suffix == ".safetensors":
        return load_tensors(path)[0]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(
            f"weights={str(path)!r} holds more than tensors, or is broken; save "
            "model.state_dict() instead of the model"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"weights={str(path)!r} is no state dict; save model.state_dict()")
    return state


def build_model(arch: str, weights: Path) -> nn.Module:
    """The model of ``arch`` with these weights; the number of classes is read off the weights.

    Args:
        arch: ``torchvision:NAME``, ``timm:NAME``, or ``MODULE:FUNCTION`` of the user's own, called
            without arguments.

    Raises:
        InputError: unknown architecture, or weights that do not fit it.
    """
    source, _, name = arch.partition(":")
    if not name:
        raise InputError(f"arch={arch!r}; write torchvision:NAME, timm:NAME or MODULE:FUNCTION")
    state = load_weights(weights)
    matrices = [v for k, v in state.items() if v.dim() == 2]
    if not matrices:
        raise InputError(f"weights={str(weights)!r} has no linear layer, so no classifier head")
    classes = matrices[-1].shape[0]
    try:
        if source == "torchvision":
            from torchvision.models import get_model

            model = get_model(name, weights=None, num_classes=classes)
        elif source == "timm":
            import timm

            model = timm.create_model(name, pretrained=False, num_classes=classes)
        else:
            model = getattr(importlib.import_module(source), name)()
    except (ImportError, AttributeError, ValueError, RuntimeError) as error:
        raise InputError(f"arch={arch!r} cannot be built: {error}") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"weights={str(weights)!r} do not fit arch={arch!r}: {error}") from error
    return model.eval()


def count_classes(model: nn.Module, x: Tensor) -> int:
    """How many classes the model tells apart, found by running it on one sample.

    Args:
        x: [1, ...], the first sample of the data.

    Raises:
        InputError: the model cannot take it, or returns no logits [1, C].
    """
    try:
        with torch.no_grad():
            logits = logits_of(model(x))
    # What modules raise on shapes and dtypes that they cannot take.
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
        raise InputError(
            f"data: the model cannot take a sample of shape {tuple(x.shape[1:])} and "
            f"{x.dtype}: {brief(error)}"
        ) from error
    if logits.dim() != 2 or len(logits) != 1:
        raise InputError(
            f"arch: the model returns shape {tuple(logits.shape)} for one sample; it must be a "
            "classifier with logits [1, C]"
        )
    return logits.shape[1]


def brief(error: Exception, length: int = 300) -> str:
    """An error of another library on one line, with its kind where it says nothing else."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else f"{text[:length]}..."
