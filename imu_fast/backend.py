"""Which implementation of an operation runs: what is available here, and what was chosen.

The order of authority is argument (``use_backend``) over environment (``IMU_FAST_BACKEND``) over
automatic. A choice made by name that cannot run raises; the automatic one falls back and logs why,
once. ``record_backends`` collects which backend ran each operation.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from imu_fast.errors import BackendUnavailableError, check_choice

logger = logging.getLogger("imu_fast")

CHOICES = ("auto", "reference", "torch", "triton")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ENVIRONMENT = "IMU_FAST_BACKEND"
_choice: ContextVar[str | None] = ContextVar("imu_fast_backend", default=None)
_record: ContextVar[dict[str, str] | None] = ContextVar("imu_fast_backend_record", default=None)


@dataclass(frozen=True)
class BackendInfo:
    """One backend: its name, whether it can run here, and the reason or version."""

    name: str
    available: bool
    reason: str


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


@lru_cache(maxsize=1)
def _triton() -> BackendInfo:
    try:
        import triton
    except ImportError as error:
        return BackendInfo("triton", False, f"triton does not import: {error}")
    version = f"triton {triton.__version__}"
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


def kernel_limits(*tensors: Tensor) -> str:
    """Why the Triton kernels cannot take these operands; "" where they can."""
    for tensor in tensors:
        if tensor.dtype not in KERNEL_DTYPES:
            return f"{tensor.dtype} is not among float32, bfloat16 and float16"
    return ""


def input_precision() -> str:
    """How kernels multiply float32: "ieee", or "tf32" on request.

    The request is torch's own: ``torch.backends.cuda.matmul.fp32_precision = "tf32"``, or the older
    ``torch.set_float32_matmul_precision("high")`` or ``"medium"``, which sets it too (while the
    older setting's getter raises once the newer one has been used).
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def current_backend() -> str:
    """The choice in force: one of ``auto``, ``reference``, ``torch``, ``triton``.

    Raises:
        InputError: the environment variable IMU_FAST_BACKEND names no backend.
    """
    chosen = _choice.get()
    if chosen is not None:
        return chosen
    return check_choice(_ENVIRONMENT, os.environ.get(_ENVIRONMENT, "auto"), CHOICES)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the body with one backend: ``with imu_fast.use_backend("reference"): ...``.

    Raises:
        InputError: the name is unknown.
        BackendUnavailableError: the backend cannot run here; the message says why.
    """
    check_choice("backend", name, CHOICES)
    if name != "auto" and not (info := backends()[name]).available:
        raise BackendUnavailableError(
            f"backend={name!r} cannot run here: {info.reason}; use 'torch' or 'auto'"
        )
    token = _choice.set(name)
    try:
        yield
    finally:
        _choice.reset(token)


@contextmanager
def record_backends() -> Iterator[dict[str, str]]:
    """Collect ``{operation: backend}`` for every operation run in the body."""
    token = _record.set({})
    try:
        record = _record.get()
        assert record is not None
        yield record
    finally:
        _record.reset(token)


def resolve(
    operation: str,
    implemented: tuple[str, ...],
    tensor: Tensor | None = None,
    unsupported: str = "",
    needs_kernel: bool = True,
) -> str:
    """The backend that runs ``operation``, out of those that implement it. Only ops/ calls this.

    Args:
        implemented: names of backends.
        tensor: the main operand; its device decides what "auto" means.
        unsupported: why the kernel cannot take these operands (a dtype, a size); "" where it can.
        needs_kernel: False for what is one matrix product: "triton" then runs (and records) torch.

    Raises:
        BackendUnavailableError: a backend was chosen by name and does not implement the operation,
            or cannot take these operands.
    """
    chosen = current_backend()
    if chosen == "triton" and not needs_kernel:
        chosen = "torch"
    if chosen == "auto":
        chosen = "torch"
        if tensor is not None and tensor.is_cuda and "triton" in implemented:
            reason = unsupported or ("" if (info := _triton()).available else info.reason)
            if reason:
                _warn_once(operation, reason)
            else:
                chosen = "triton"
    elif chosen not in implemented:
        raise BackendUnavailableError(
            f"backend={chosen!r} does not implement {operation}; choose one of "
            f"{', '.join(implemented)} or 'auto'"
        )
    elif chosen == "triton":
        if tensor is not None and not tensor.is_cuda and not interpreted():
            unsupported = f"its input is on {tensor.device}, not on a CUDA device"
        if unsupported:
            raise BackendUnavailableError(
                f"backend='triton' cannot run {operation}: {unsupported}; use 'torch' or 'auto'"
            )
    record = _record.get()
    if record is not None:
        record[operation] = chosen
    return chosen


@cache
def _warn_once(operation: str, reason: str) -> None:
    logger.warning("%s runs in PyTorch, not in its Triton kernel: %s", operation, reason)
