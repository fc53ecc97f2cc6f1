"""Weights that a model had at other times: out of files, and in the model for a while."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imu_fast.ambient import finish
from imu_fast.errors import InputError, brief
from imu_fast.model.guard import copies_of, preserved, put_back
from imu_fast.model.run import innermost
from imu_fast.storage import load_tensors

# What wrappers (DataParallel, torch.compile) put before the names of what they wrap.
_WRAPPERS = ("module.", "_orig_mod.")

Checkpoint = Mapping[str, Tensor] | str | os.PathLike[str]


def load_weights(path: Path, argument: str = "weights") -> dict[str, Tensor]:
    """A state dict from ``.safetensors``, or from a torch file (tensors only, never code).

    Args:
        argument: under which the user passed it, for messages.

    Raises:
        InputError: missing, unreadable, or a pickled whole model.
    """
    if path.is_dir():
        raise InputError(f"{argument}={str(path)!r} is a folder; name the file in it")
    if not path.is_file():
        raise InputError(f"{argument}={str(path)!r} does not exist; check the name")
    if path.suffix == ".safetensors":
        try:
            return load_tensors(path)[0]
        except InputError as error:
            raise InputError(
                f"{argument}={str(path)!r} is broken: {error}; save it again"
            ) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # What the archive reader and the restricted unpickler raise on damaged files.
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        struct.error,
        AssertionError,
    ) as error:
        raise InputError(
            f"{argument}={str(path)!r} holds more than tensors, or is broken; save "
            "model.state_dict() instead of the model"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{argument}={str(path)!r} is no state dict; save model.state_dict()")
    return state


class Checkpoints:
    """Several state dicts of one model, one of which is in it at a time; see :func:`visiting`.

    Args:
        model: whose parameters and buffers they are, under the names in it or in a wrapper.
        argument: under which the user passed them, for messages.
    """

    def __init__(self, model: nn.Module, given: Sequence[Checkpoint], argument: str) -> None:
        self._model, self._given, self._argument = innermost(model), list(given), argument
        tensors = [*self._model.parameters(), *self._model.buffers()]
        live = {_memory(tensor) for tensor in tensors if tensor.numel()}
        first: dict[frozenset[tuple[str, int]], int] = {}
        for k, checkpoint in enumerate(self._given):
            if not isinstance(checkpoint, Mapping):
                continue
            held = {_memory(t) for t in checkpoint.values() if isinstance(t, Tensor) and t.numel()}
            if held and (other := first.setdefault(frozenset(held), k)) != k:
                raise InputError(
                    f"{argument}[{other}] and [{k}] are the same memory, so the same weights: "
                    "state_dict() gives references; keep copy.deepcopy(model.state_dict())"
                )
            if held & live:  # of the model as it is: putting another one there would change it
                self._given[k] = {
                    name: tensor.clone() if isinstance(tensor, Tensor) else tensor
                    for name, tensor in checkpoint.items()
                }

    def __len__(self) -> int:
        return len(self._given)

    def enter(self, k: int) -> None:
        """Put the k-th into the model.

        Raises:
            InputError: it does not fit, is not finite, or cannot be read.
        """
        shown, state = f"{self._argument}[{k}]", self._given[k]
        if isinstance(state, str | os.PathLike):
            state = load_weights(Path(state), shown)
        if not isinstance(state, Mapping):
            raise InputError(
                f"{shown} is a {type(state).__name__}; pass a state dict, or the path of one"
            )
        for name, tensor in state.items():
            if isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
                raise InputError(f"{shown}: {name} is not finite; leave this checkpoint out")
        try:
            with torch.no_grad():
                self._model.load_state_dict(unwrapped(state, self._model))
        # What modules raise that load what is not theirs.
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise InputError(
                f"{shown} does not fit the model: {brief(error, 600)}; pass state dicts of this "
                "very architecture"
            ) from error


def unwrapped(state: Mapping[str, Any], model: nn.Module | None = None) -> dict[str, Any]:
    """Without a wrapper's prefix, where all names have one that the model's, if any, have not."""
    out = dict(state)
    for prefix in (*_WRAPPERS, *_WRAPPERS):  # one around the other, in either order
        own = model is not None and any(name.startswith(prefix) for name in model.state_dict())
        if out and not own and all(name.startswith(prefix) for name in out):
            out = {name.removeprefix(prefix): tensor for name, tensor in out.items()}
    return out


def _memory(tensor: Tensor) -> tuple[str, int]:
    return str(tensor.device), tensor.untyped_storage().data_ptr()


@contextmanager
def visiting(
    model: nn.Module, checkpoints: Sequence[Checkpoint], argument: str = "checkpoints"
) -> Iterator[Callable[[int], None]]:
    """Yields what puts the k-th checkpoint into the model; its own weights come back, always.

    Each has been in it once before: what does not fit is refused before any work.

    Args:
        checkpoints: state dicts, or files of them: safetensors, or torch's with tensors alone.

    Raises:
        InputError: none of them, or one that does not fit, is not finite or cannot be read; two of
            them are the same tensors.
    """
    if isinstance(checkpoints, str | os.PathLike | Mapping | Tensor):
        raise InputError(f"{argument} is a {type(checkpoints).__name__}; pass a list of them")
    if not isinstance(checkpoints, Sequence) or not checkpoints:
        raise InputError(
            f"{argument}={checkpoints!r} has none; pass a list of state dicts or paths"
        )
    with preserved(model):
        kept = copies_of(model.parameters())
        try:
            every = Checkpoints(model, checkpoints, argument)
            for k in range(len(every)):
                every.enter(k)
            yield every.enter
        finally:
            finish([lambda: put_back(kept)])
