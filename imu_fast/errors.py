"""Exceptions, and the argument checks that every door of the package shares.

Every message names the argument, the value it had and what to do about it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor


class ImuFastError(Exception):
    """Base of everything this package raises on purpose."""


class InputError(ImuFastError, ValueError):
    """An argument cannot be used; raised before any work is done."""


class WriteError(ImuFastError, OSError):
    """A file cannot be written; what was there before is untouched."""


class EmptySelectionError(InputError):
    """No forget sample supports the forgetting objective (no negative influence)."""


class NoHeadFoundError(InputError):
    """The model has no linear layer that produces its logits."""


class BackendUnavailableError(ImuFastError, RuntimeError):
    """A backend was asked for by name and cannot run here."""


class SingularMatrixError(ImuFastError, ArithmeticError):
    """A matrix is not positive definite after damping.

    Args:
        message: what the user reads.
        pivot: 1-based order of the leading minor that failed.
        index: flat batch index of the matrix, None for a single one.
        smallest_damping: smallest damping that makes it positive definite, if known.
    """

    def __init__(
        self,
        message: str,
        *,
        pivot: int,
        index: int | None = None,
        smallest_damping: float | None = None,
    ) -> None:
        super().__init__(message)
        self.pivot = pivot
        self.index = index
        self.smallest_damping = smallest_damping

    def __reduce__(self) -> tuple[Any, ...]:
        """With its numbers: an exception comes from another process by its message alone."""
        said = {k: getattr(self, k) for k in ("pivot", "index", "smallest_damping")}
        return partial(type(self), **said), self.args


class ProcessError(ImuFastError, RuntimeError):
    """Another process that shares the samples has failed, has ended, or does not answer."""


class NoSamplesError(InputError):
    """The data has no sample; where samples are shared among processes one may have none."""


class InfeasibleError(ImuFastError, ArithmeticError):
    """The constraints of an optimisation problem contradict each other."""


def plain_number(value: Any) -> Any:
    """A number of numpy's or torch's, or a fraction, as Python's own; anything else as it is."""
    if isinstance(value, np.generic) or (
        isinstance(value, Tensor) and not (value.dim() or value.is_meta)
    ):
        return value.item()
    return float(value) if isinstance(value, Fraction | Decimal) else value


def check_positive(name: str, value: float, *, allow_zero: bool = False) -> float:
    """Return ``value`` as a float, or raise InputError unless it is finite and > 0 (>= 0)."""
    bound = ">= 0" if allow_zero else "> 0"
    try:
        # float() would take True and "1", and arrays of one number.
        if isinstance(value, (bool, str)) or getattr(value, "ndim", False):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{name}={value!r} is not a number; pass a number {bound}") from None
    if not math.isfinite(number) or number < 0 or (number == 0 and not allow_zero):
        raise InputError(f"{name}={value!r} must be finite and {bound}")
    return number


def check_count(name: str, value: int, *, minimum: int = 1) -> int:
    """Return ``value`` as an int, or raise InputError unless it is an integer >= ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InputError(f"{name}={value!r} must be an integer >= {minimum}")
    return value


# Beyond it some of those that are seeded (torch, numpy, and what adds an epoch to it) refuse.
_SEEDS = 1 << 32


def check_seed(name: str, value: object) -> int:
    """Return ``value`` as an int, or raise InputError unless it is an integer in [0, 2^32).

    numpy's integers are integers; True and 1.0 are none.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InputError(f"{name}={value!r} must be an integer in [0, 2^32)")
    seed = int(value)
    if not 0 <= seed < _SEEDS:
        raise InputError(f"{name}={seed} must be in [0, 2^32); pass seed % 2**32")
    return seed


_KINDS: dict[str, tuple[str, Callable[[torch.dtype], bool]]] = {
    # float8 has no arithmetic in torch.
    "floating": (
        "float64, float32, bfloat16 or float16",
        lambda dtype: dtype.is_floating_point and dtype.itemsize > 1,
    ),
    "integer": (
        "int64",
        lambda dtype: (
            not (dtype.is_floating_point or dtype.is_complex or dtype in (torch.bool, torch.bits8))
        ),
    ),
    "boolean": ("bool", lambda dtype: dtype == torch.bool),
    "real": (
        "real numbers",
        lambda dtype: not (dtype.is_complex or (dtype.is_floating_point and dtype.itemsize == 1)),
    ),
    "any": ("numbers", lambda dtype: True),
}


def is_dtensor(value: object) -> bool:
    """Whether it is torch.distributed's tensor in parts, whose module is not imported for this."""
    return type(value).__name__ == "DTensor"


def check_tensor(name: str, value: object, kind: str = "floating", shape: str = "") -> Tensor:
    """Return ``value``, or raise InputError unless it is a dense tensor with numbers in it.

    Of no device, strides, size or values anything is said: these are for the doors to check.

    Args:
        kind: "floating" (no float8), "integer" (no bool), "boolean", "real" or "any".
        shape: what is expected, such as "[N, d]", for the message.
    """
    wanted, fits = _KINDS[kind]
    if (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not (value.is_nested or value.is_quantized or value.is_meta or is_dtensor(value))
        and fits(value.dtype)
    ):
        return value
    expected = f"a tensor {shape} of {wanted}" if shape else f"a tensor of {wanted}"
    if not isinstance(value, Tensor):
        made = type(value).__name__
        way = "torch.as_tensor() makes one" if hasattr(value, "__len__") else "nothing else fits"
        raise InputError(f"{name} is a {made}, not a tensor; pass {expected} ({way})")
    if is_dtensor(value):
        raise InputError(
            f"{name} is a DTensor, of which each process holds a part; pass {name}.full_tensor(), "
            "and share the samples among processes (ShardedFactors, group=) instead, or, of a head "
            "in rows, its classes (ShardedHead)"
        )
    if value.is_nested:
        raise InputError(f"{name} is a nested tensor; pass {expected}: rows, and offsets for them")
    if value.is_quantized:
        raise InputError(f"{name} is quantised ({value.dtype}); pass {name}.dequantize()")
    if value.layout != torch.strided:
        raise InputError(f"{name} is sparse ({value.layout}); pass {name}.to_dense()")
    if value.is_meta:
        raise InputError(f"{name} is on the meta device, without numbers; pass {expected}")
    raise InputError(f"{name} has dtype {value.dtype}; pass {expected}")


def check_fraction(name: str, value: float) -> float:
    """Return ``value`` as a float, or raise InputError unless 0 < value <= 1."""
    number = check_positive(name, value)
    if number > 1:
        raise InputError(f"{name}={value!r} must lie in (0, 1]; 1 keeps everything")
    return number


def check_flag(name: str, value: object) -> bool:
    """Return ``value``, or raise InputError unless it is True or False."""
    if not isinstance(value, bool):
        raise InputError(f"{name}={value!r} must be True or False")
    return value


def check_choice(name: str, value: object, known: Iterable[str]) -> str:
    """Return ``value``, or raise InputError that lists the known choices."""
    choices = list(known)
    if value not in choices:
        between = "; " if any("," in choice for choice in choices) else ", "
        raise InputError(f"{name}={value!r} is unknown; choose one of {between.join(choices)}")
    return str(value)


def one_of(*known: str) -> Callable[[str, object], str]:
    """:func:`check_choice` with these choices."""
    return lambda name, value: check_choice(name, value, known)


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is: one reduction, and a second look where the sum overflows."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    total = tensor.detach().sum(dtype=torch.float32 if tensor.itemsize < 4 else None)
    return math.isfinite(float(total)) or bool(torch.isfinite(tensor).all())


def check_finite_rows(name: str, tensor: Tensor, what: str = "sample") -> None:
    """Raise InputError naming the first row of ``tensor`` [N, ...] that is not finite."""
    # One reduction decides the common case: a finite sum has only finite terms. A sum that is not
    # may have overflowed, and only then is the row-wise test paid for.
    if math.isfinite(float(tensor.sum(dtype=torch.float32 if tensor.itemsize < 4 else None))):
        return
    bad = ~torch.isfinite(tensor.reshape(tensor.shape[0], -1)).all(dim=1)
    rows = torch.nonzero(bad).flatten()
    if rows.numel() == 0:
        return
    raise InputError(
        f"{name} is not finite at {what} {int(rows[0])} ({rows.numel()} of {tensor.shape[0]} "
        f"rows); remove these samples or repair the model (NaN weights, fp16 overflow)"
    )


# What modules are called where they are installed from, where that is another name.
_DISTRIBUTIONS = {
    "PIL": "pillow",
    "rouge_score": "rouge-score",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}


def check_installed(what: str, *modules: str, install: str = "'imu_fast[demo]'") -> None:
    """Raise InputError unless these optional modules can be imported; to be asked before the work.

    Args:
        what: that needs them, as the message begins.
        install: what pip is to install.
    """
    for module in modules:
        try:
            import_module(module)
        except (ImportError, RuntimeError) as error:  # RuntimeError: libraries that do not match
            name = module.split(".")[0]
            raise InputError(
                f"{what} needs {_DISTRIBUTIONS.get(name, name)}, which does not load "
                f"({brief(error)}); pip install {install}"
            ) from error


def check_same_device(first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Raise InputError unless both tensors live on one device."""
    if a.device != b.device:
        raise InputError(
            f"{second} is on {b.device} but {first} is on {a.device}; move one with .to()"
        )


def brief(error: Exception, length: int = 300) -> str:
    """An error of another library on one line, with its kind where it says nothing else."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else f"{text[:length]}..."
