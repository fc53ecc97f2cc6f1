"""The user's forward, called: its own errors pass, those of data that it cannot take say so.

It gets copies, for it may write to what it is given (``x.div_(255)``): a batch is read several
times here, and is the user's.
"""

from __future__ import annotations

import dis
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from imu_fast.ambient import default_device_back
from imu_fast.errors import InputError, brief
from imu_fast.model.forward import innermost
from imu_fast.model.labels import is_integer
from imu_fast.model.nested import copied

# What torch and Python raise of data that an operation cannot take; never a subclass, which
# is an error of the user's own, or says that memory ran out.
_REFUSALS = (
    RuntimeError,
    NotImplementedError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    KeyError,
    AssertionError,
)
# Of the machine, and not of the data.
_MACHINE = re.compile(r"out of memory|can't allocate|ALLOC_FAILED|(CUDA|HIP) error", re.IGNORECASE)
# The last is where an error thrown into a generator comes from.
_RAISING = ("RAISE_VARARGS", "RERAISE", "RETURN_GENERATOR")
_TORCH = str(Path(torch.__file__).parent)


def called(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    labels: Tensor,
    run: Callable[..., Any] | None = None,
) -> Any:
    """``model(*args, **kwargs)``, under the default device of the user's call.

    Of a wrapper the module inside: a call of DistributedDataParallel waits for those of all other
    processes where the model has buffers, and one of ours is this process's alone.

    Args:
        labels: of these samples, for the message. run: instead of that module; in a training step
            the model as it is, for a wrapper sums gradients only after a call of its own.

    Raises:
        InputError: from what torch or Python raised where the model cannot take the batch.
            What the model's own code raises, and a lack of memory, pass as they are.
    """
    try:
        with default_device_back():
            return (run or innermost(model))(*copied(list(args)), **copied(dict(kwargs)))
    except _REFUSALS as error:
        if type(error) not in _REFUSALS or _MACHINE.search(str(error)) or _is_own(error):
            raise
        raise InputError(_message(error, model, args, kwargs, labels)) from error


def _is_own(error: Exception) -> bool:
    """Whether Python code outside torch raised the error: somebody's own message.

    And not an operation that it called: then the last instruction is another.
    """
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    code = last.tb_frame.f_code
    if code.co_filename.startswith(_TORCH):
        return code.co_name == "__getattr__"  # a module that lacks what its own code asks for
    if last.tb_lasti < 0:  # thrown into a generator
        return True
    return dis.opname[code.co_code[last.tb_lasti]] in _RAISING


def _message(
    error: Exception,
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    labels: Tensor,
) -> str:
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    given = [*map(_shown, args), *(f"{key}={_shown(value)}" for key, value in kwargs.items())]
    has = "no parameters"
    if parameter is not None:
        has = f"parameters of {_dtype(parameter.dtype)} on {parameter.device}"
    first = (str(error).strip().splitlines() or [""])[0]
    what = f"{type(error).__name__}: {brief(ValueError(first))}" if first else type(error).__name__
    return (
        f"the model cannot take this batch ({what}). It was given {', '.join(given) or 'nothing'} "
        f"with labels {_shown(labels)}, and has {has}; {_way_out(args, kwargs, parameter)}"
    )


def _way_out(args: Sequence[Any], kwargs: Mapping[str, Any], parameter: nn.Parameter | None) -> str:
    """Dtypes first, where they differ; then what is what."""
    inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    ways = []
    if parameter is not None:
        to = f"x.to(torch.{_dtype(parameter.dtype)})"
        to = "x.float()" if parameter.dtype == torch.float32 else to
        if any(not is_integer(x.dtype) and x.dtype != parameter.dtype for x in inputs):
            ways.append(f"convert the inputs ({to}), or the model")
        elif any(is_integer(x.dtype) for x in inputs):
            ways.append(f"convert what are no indices ({to}; bytes of images to [0, 1])")
    ways.append("give inputs of the shape that the model was built for")
    ways.append(
        "where a batch is not (inputs, labels), say what is what by "
        "imu_fast.Data(loader, inputs=..., labels=...)"
    )
    return "; ".join(ways)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        shape = "nested" if value.is_nested else list(value.shape)
        return f"{_dtype(value.dtype)} {shape}"
    if isinstance(value, Mapping):
        inside = ", ".join(f"{key}: {_shown(item)}" for key, item in list(value.items())[:4])
        return f"{{{inside}}}"
    if isinstance(value, list | tuple) and value:
        more = ", ..." if len(value) > 4 else ""
        return f"{type(value).__name__} of {', '.join(map(_shown, value[:4]))}{more}"
    return type(value).__name__


@contextmanager
def from_sample(start: int) -> Iterator[None]:
    """Errors of a batch that is not the first say which samples it begins with."""
    try:
        yield
    except InputError as error:
        if not start:
            raise
        raise type(error)(f"samples from {start} on: {error}") from error.__cause__
