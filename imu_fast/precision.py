"""How float32 is multiplied in matrix products: what was asked for, and what is used.

The order of authority is argument (``use_precision``) over environment (``IMU_FAST_PRECISION``)
over torch's own setting, which is of float32 operands, over the default of the operands' dtypes:
see ``docs/kernels.md``. float64 is multiplied in float64 whatever is asked. A precision is never
lowered: what has not the one that was asked for takes the next more exact one that it has, and
``record_backends`` says which.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch

from imu_fast.setting import Setting

# From the most exact one on. Sums are in float32 in all of them.
PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16")
# How far an operand x is from itself in a product, in units of |x|. TF32 cuts it to ten bits, bf16
# rounds it to eight. In three products x = h + l, h to the nearest of TF32, so |l| <= 2^-11 |x|; l
# is cut to 2^-10 |l|, on either side, and l l' <= 2^-22 |x x'| is left out: half of it each.
ROUNDING = {"ieee": 0.0, "tf32x3": 2.5 * 2.0**-22, "tf32": 2.0**-10, "bf16": 2.0**-9}
CHOICES = ("auto", *PRECISIONS)
_SETTING = Setting("precision", "IMU_FAST_PRECISION", CHOICES)
# torch's settings are those of the process, so two bodies with other ones may not interleave.
_lock = RLock()


def asked_precision() -> str:
    """The choice in force: "auto" or one of PRECISIONS.

    Raises:
        InputError: the environment variable IMU_FAST_PRECISION names none.
    """
    return _SETTING.current()


@contextmanager
def use_precision(name: str) -> Iterator[None]:
    """Multiply float32 in the body so: ``with imu_fast.use_precision("tf32x3"): ...``.

    Of every call of this package, in the thread that it is called in; for all threads and
    processes there is the environment variable ``IMU_FAST_PRECISION``. Sums are in float32 under
    all of them, and the model's own passes stay as they are.

    - ``ieee``: operands as they are.
    - ``tf32x3``: on the matrix units, in three products; nearly as exact.
    - ``tf32``: operands cut to ten bits. ``bf16``: operands rounded to eight.
    - ``auto``: as torch was asked to multiply float32 (``torch.set_float32_matmul_precision``),
      ``ieee`` unless it was; ``bf16`` where inputs are bfloat16, ``tf32`` where they are float16,
      which it holds.

    float64 is multiplied in float64. Where the one that was asked for cannot be had the next more
    exact one is used (on the CPU ``ieee``), which :func:`imu_fast.record_backends` notes.

    Raises:
        InputError: the name is unknown.
    """
    with _SETTING.chosen(name):
        yield


def precision_of(dtypes: Sequence[torch.dtype]) -> str:
    """The policy for products of operands of these dtypes: one of PRECISIONS."""
    asked = asked_precision()
    if torch.float64 in dtypes:
        return "ieee"
    if asked != "auto":
        return asked
    if torch.float16 in dtypes:  # whose range a signal or its square may leave
        return "tf32"
    if torch.bfloat16 in dtypes:
        return "bf16"
    return "tf32" if float32_products() == "tf32" else "ieee"


def at_least(wanted: str, there: Sequence[str]) -> str:
    """The least exact of those ``there`` that is no less exact than ``wanted``."""
    enough = PRECISIONS[: PRECISIONS.index(wanted) + 1]
    return max(set(there).intersection(enough), key=PRECISIONS.index)


def torch_precision(dtypes: Sequence[torch.dtype], device_type: str) -> str:
    """What products in PyTorch on such a device are to be made in."""
    if device_type == "cuda":
        return at_least(precision_of(dtypes), ("ieee", "tf32"))
    if torch.float64 in dtypes or asked_precision() != "auto":
        return "ieee"
    found = _setting_of(device_type)
    return found if found in PRECISIONS else "ieee"


def float32_products() -> str:
    """How torch was asked to multiply float32 on CUDA: "ieee", "tf32", or "none": it was not."""
    return _setting_of("cuda")


def ask_float32_products(precision: str) -> None:
    """Ask torch for one of the results of :func:`float32_products`, of this process."""
    _set("cuda", precision)


def _setting_of(device_type: str) -> str:
    """Of the CPU it is oneDNN's, which one that has bf16 products follows."""
    if device_type not in ("cpu", "cuda"):
        return "none"
    settings = torch.backends.cuda.matmul if device_type == "cuda" else _onednn()
    if hasattr(settings, "fp32_precision"):
        return str(settings.fp32_precision)
    return "tf32" if getattr(settings, "allow_tf32", False) else "none"  # torch before 2.9


def _set(device_type: str, precision: str) -> None:
    settings: Any = torch.backends.cuda.matmul if device_type == "cuda" else _onednn()
    if hasattr(settings, "fp32_precision"):
        settings.fp32_precision = precision
    elif device_type == "cuda":
        settings.allow_tf32 = precision == "tf32"


def _onednn() -> Any:
    return getattr(torch.backends.mkldnn, "matmul", None)


@contextmanager
def torch_multiplies_in(precision: str, device_type: str = "cuda") -> Iterator[None]:
    """float32 products of torch that begin in the body on such a device are in this precision.

    torch keeps this per process, not per thread: what other threads multiply meanwhile follows it,
    and the older setting's getters (``allow_tf32``, ``get_float32_matmul_precision``) raise there.
    A value inherited from ``torch.backends.fp32_precision`` is restored as the product's own.
    """
    with _lock:
        before = _setting_of(device_type)
        if before != precision:
            _set(device_type, precision)
        try:
            yield
        finally:
            if before != precision:
                _set(device_type, before)


def is_torchs_own(precision: str, device_type: str) -> bool:
    """Whether products are in it as torch is set."""
    before = _setting_of(device_type)
    return precision == (before if before in PRECISIONS else "ieee")
