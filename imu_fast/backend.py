"""Which implementation of an operation runs: what is available here, and what was chosen.

The order of authority is argument (``use_backend``) over environment (``IMU_FAST_BACKEND``) over
automatic. A choice made by name that cannot run here raises; the automatic one falls back. What a
kernel has no form for (float64, say) is in PyTorch under both, and why is logged, once.
``record_backends`` collects which backend ran each operation, and in what precision.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache

import torch

from imu_fast.errors import BackendUnavailableError, check_choice
from imu_fast.setting import Setting

logger = logging.getLogger("imu_fast")

CHOICES = ("auto", "reference", "torch", "triton")
_SETTING = Setting("backend", "IMU_FAST_BACKEND", CHOICES)
_record: ContextVar[BackendRecord | None] = ContextVar("imu_fast_backend_record", default=None)


@dataclass(frozen=True)
class BackendInfo:
    """One backend: its name, whether it can run here, and the reason or version."""

    name: str
    available: bool
    reason: str


class BackendRecord(dict[str, str]):
    """Operation -> the backend that ran it, or all that did: ``"torch, triton"``.

    Attributes:
        reasons: operation -> why it was not in its kernel, the last time that it was to be.
        precisions: operation -> what its matrix products were in, or all that they were:
            ``"ieee, tf32"``: no operand was rounded more coarsely. See ``use_precision``.
    """

    def __init__(self, outer: BackendRecord | None = None) -> None:
        super().__init__()
        self.reasons: dict[str, str] = {}
        self.precisions: dict[str, str] = {}
        self._outer = outer

    def note(self, operation: str, chosen: str, reason: str, precision: str = "") -> None:
        """Of one call."""
        _add(self, operation, chosen)
        if precision:
            _add(self.precisions, operation, precision)
        if reason:
            self.reasons[operation] = reason
        if self._outer is not None:
            self._outer.note(operation, chosen, reason, precision)


def _add(known: dict[str, str], operation: str, name: str) -> None:
    there = known[operation].split(", ") if operation in known else []
    if name not in there:
        known[operation] = ", ".join(sorted([*there, name]))


@lru_cache(maxsize=1)
def _extension() -> BackendInfo:
    try:
        from imu_fast import _C
    except ImportError as error:
        return BackendInfo("extension", False, f"imu_fast._C does not load: {error}")
    return BackendInfo("extension", True, f"compiled with {getattr(_C, '__compiler__', 'C++')}")


@lru_cache(maxsize=1)
def _cuda_extension() -> BackendInfo:
    try:
        from imu_fast import _C_cuda
    except ImportError as error:
        return BackendInfo("cuda", False, f"imu_fast._C_cuda does not load: {error}")
    version = f"compiled with CUDA {_C_cuda.__cuda__ // 1000}.{_C_cuda.__cuda__ % 1000 // 10}"
    if not torch.cuda.is_available():
        return BackendInfo("cuda", False, f"{version}, but no CUDA device")
    return BackendInfo("cuda", True, version)


# That of torch 2.11; an older torch runs without kernels.
_OLDEST_TRITON = (3, 6)


@lru_cache(maxsize=1)
def _triton() -> BackendInfo:
    try:
        import triton
    except ImportError as error:
        return BackendInfo("triton", False, f"triton does not import: {error}")
    version = f"triton {triton.__version__}"
    if tuple(map(int, triton.__version__.split(".")[:2])) < _OLDEST_TRITON:
        oldest = ".".join(map(str, _OLDEST_TRITON))
        return BackendInfo(
            "triton",
            False,
            f"{version} is older than {oldest}, the oldest the kernels are tried on",
        )
    if interpreted():
        return BackendInfo("triton", True, f"{version}, interpreted on the CPU (for tests; slow)")
    if not torch.cuda.is_available():
        return BackendInfo("triton", False, f"{version}, but no CUDA device")
    return BackendInfo("triton", True, version)


def interpreted() -> bool:
    """True where TRITON_INTERPRET=1 runs the kernels on CPU tensors, as the tests do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def backends() -> dict[str, BackendInfo]:
    """What can run here: ``reference``, ``torch``, ``triton``, and the compiled modules.

    Those are ``extension``, the CPU's, and ``cuda``.
    """
    return {
        "reference": BackendInfo("reference", True, "readable loops, float64; slow by design"),
        "torch": BackendInfo("torch", True, f"torch {torch.__version__}"),
        "triton": _triton(),
        "extension": _extension(),
        "cuda": _cuda_extension(),
    }


def why_no_triton() -> str:
    """Why no kernel runs here at all; "" where they do."""
    info = _triton()
    return "" if info.available else info.reason


def current_backend() -> str:
    """The choice in force: one of ``auto``, ``reference``, ``torch``, ``triton``.

    Raises:
        InputError: the environment variable IMU_FAST_BACKEND names no backend.
    """
    return _SETTING.current()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the body with one backend: ``with imu_fast.use_backend("reference"): ...``.

    ``triton``: kernels wherever an operation has one for its operands. Where it has none at all, or
    none for these (float64, in which ``fisher`` and ``ggn`` are solved), PyTorch runs, which is
    logged once and recorded; tensors that are not on a device of kernels are refused.

    Raises:
        InputError: the name is unknown.
        BackendUnavailableError: the backend cannot run here; the message says why.
    """
    check_choice("backend", name, CHOICES)
    if name != "auto" and not (info := backends()[name]).available:
        raise BackendUnavailableError(
            f"backend={name!r} cannot run here: {info.reason}; use 'torch' or 'auto'"
        )
    with _SETTING.chosen(name):
        yield


@contextmanager
def record_backends() -> Iterator[BackendRecord]:
    """Collect which backend ran each operation in the body, and why not its kernel.

    ::

        with imu_fast.record_backends() as ran:
            imu_fast.self_influence(model, data)
        ran          # {"softmax_residual": "triton", "fisher_diagonal": "triton", ...}
        ran.reasons  # {"quadratic_scores": "the square of a sum over tokens has no kernel yet"}
        ran.precisions  # {"fisher_diagonal": "tf32", ...}

    The names are those of ``docs/ops.md``; what a nested body collects, the outer has too. A factor
    of ``damped_cholesky_solve`` is in "extension" (the CPU's), "cuda" or "torch".
    """
    noted = BackendRecord(_record.get())
    token = _record.set(noted)
    try:
        yield noted
    finally:
        _record.reset(token)


def record(operation: str, chosen: str, reason: str = "", precision: str = "") -> None:
    """Note for :func:`record_backends` that a call runs so, why not by a kernel, and in what."""
    noted = _record.get()
    if noted is not None:
        noted.note(operation, chosen, reason, precision)


def is_recording() -> bool:
    """Whether anybody is to be told."""
    return _record.get() is not None
