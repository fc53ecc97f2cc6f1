"""Damped Cholesky on the CPU: ``imu_fast._C``, with LAPACK of an installed library beyond it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imu_fast.backend import logger
from imu_fast.ops.extension import load

# Up to this order the extension's own factorisation beats LAPACK's on one matrix, and in a batch up
# to _SIDE_BY_SIDE; its solve takes a vector at a time, so only a few of them.
_SMALL = 256
_FEW = 8
# Up to this order matrices of a batch are factored side by side, one thread each; larger ones one
# after the other, each on LAPACK's own threads, which by then scale.
_SIDE_BY_SIDE = 512


@dataclass(frozen=True)
class Lapack:
    """Addresses of LAPACK's routines in a library that is already loaded, and its name."""

    name: str
    potrf: dict[torch.dtype, int]
    potrs: dict[torch.dtype, int]
    set_threads: int = 0


_PREFIX = {torch.float32: "s", torch.float64: "d"}
_KIND = {torch.float32: "f32", torch.float64: "f64"}


def _torch_lapack() -> Lapack:
    """The LAPACK that torch itself calls, where its library exports it."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    library = ctypes.CDLL(str(path))

    def address(symbol: str) -> int:
        return ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value or 0

    potrf = {dtype: address(f"{p}potrf_") for dtype, p in _PREFIX.items()}
    potrs = {dtype: address(f"{p}potrs_") for dtype, p in _PREFIX.items()}
    try:
        set_threads = address("MKL_Set_Num_Threads_Local")
    except AttributeError:
        set_threads = 0
    return Lapack("torch", potrf, potrs, set_threads)


def _scipy_lapack() -> Lapack:
    """The LAPACK that scipy brings, through its Cython interface's capsules."""
    from scipy.linalg import cython_lapack

    get_name = ctypes.pythonapi.PyCapsule_GetName
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype = ctypes.c_void_p
    get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]

    def address(symbol: str) -> int:
        capsule = cython_lapack.__pyx_capi__[symbol]
        return get_pointer(capsule, get_name(capsule))

    return Lapack(
        "scipy",
        {dtype: address(f"{p}potrf") for dtype, p in _PREFIX.items()},
        {dtype: address(f"{p}potrs") for dtype, p in _PREFIX.items()},
    )


@lru_cache(maxsize=1)
def find_lapack() -> Lapack | None:
    """LAPACK of an installed library: torch's own, else scipy's; None if neither has one."""
    for find in (_torch_lapack, _scipy_lapack):
        try:
            return find()
        except (OSError, AttributeError, ImportError, KeyError) as error:
            logger.debug("%s: %s", find.__name__, error)
    return None


@lru_cache(maxsize=1)
def extension() -> tuple[Any, Lapack] | None:
    """The compiled module and the LAPACK that it calls; None, and the reason logged, if amiss."""
    module = load()
    if module is None:
        return None
    lapack = find_lapack()
    if lapack is None:
        logger.info("no LAPACK found for imu_fast._C; torch factors instead")
        return None
    return module, lapack


def _loaded() -> tuple[Any, Lapack]:
    found = extension()
    assert found is not None
    return found


def _is_small(order: int, batch: int) -> bool:
    """Whether the extension's own factorisation is the faster one; measured in bench/."""
    return order <= _SMALL or (order <= _SIDE_BY_SIDE and batch >= torch.get_num_threads())


def _threads(order: int) -> int:
    return torch.get_num_threads() if order <= _SIDE_BY_SIDE else 1


def settle(upper: Tensor, status: Tensor) -> Tensor:
    """What a library says of its factor [..., P, P], completed: the status of :func:`factor`.

    What is not finite in A reaches the diagonal of its factor, but a library need not notice. And
    solving with what there is of a failed factor could give numbers that look right: its first
    element becomes NaN. Nothing is read back from the device.
    """
    bad = ~torch.isfinite(upper.diagonal(dim1=-2, dim2=-1))
    first = torch.where(bad.any(dim=-1), bad.int().argmax(dim=-1).int() + 1, 0)
    status = torch.where(status == 0, first, status)
    upper[..., 0, 0].masked_fill_(status != 0, torch.nan)
    return status


def factor(a: Tensor, damping: float, overwrite: bool) -> tuple[Tensor, Tensor]:
    """The upper factor of ``A + lam I``, and a status per matrix.

    Args:
        a: [..., P, P], on the CPU. overwrite: the factor takes a's memory, if a is contiguous.

    Returns:
        factor [..., P, P], whose strict lower triangle is not used; status [...] int32: 0, or the
        order of the leading minor that is not positive definite or not finite. All that is solved
        with such a factor is NaN.
    """
    module, lapack = _loaded()
    source, kind, order = a.contiguous(), _KIND[a.dtype], a.shape[-1]
    status = torch.empty(a.shape[:-2], dtype=torch.int32, device=a.device)
    tail = (status.numel(), order, damping, status.data_ptr(), _threads(order))
    if _is_small(order, status.numel()):
        out = source if overwrite else torch.empty_like(source)
        run = getattr(module, f"small_factor_{kind}")
        run(source.data_ptr(), out.data_ptr(), *tail)
        return out, status
    out = source if overwrite else source.clone()
    run = getattr(module, f"factor_{kind}")
    run(lapack.potrf[a.dtype], lapack.set_threads, out.data_ptr(), *tail)
    return out, settle(out, status)


def solve_once(a: Tensor, damping: float, columns: Tensor) -> tuple[Tensor, bool] | None:
    """``(A + lam I)^-1 B`` in one call, whose factor nobody keeps; None where that is no faster.

    Args:
        a: [..., P, P], with at least one matrix. columns: [..., P, m], of a's batch and dtype.

    Returns:
        X [..., P, m], NaN of a matrix that has no factor, and whether all of it is finite.
    """
    order, many = columns.shape[-2:]
    if not (a.is_cpu and 0 < many <= _FEW) or extension() is None:
        return None
    batch = a.numel() // order**2
    if not _is_small(order, batch):
        return None
    a, columns = a.contiguous(), columns.contiguous()
    x = torch.empty_like(columns)
    run = getattr(_loaded()[0], f"small_damped_solve_{_KIND[a.dtype]}")
    pointers = (a.data_ptr(), columns.data_ptr(), x.data_ptr())
    return x, run(*pointers, batch, order, many, damping, _threads(order))


def solve(upper: Tensor, rows: Tensor) -> None:
    """``(U^T U)^-1 r`` for each row r of rows [..., m, P], contiguous, in place."""
    module, lapack = _loaded()
    order, kind = upper.shape[-1], _KIND[upper.dtype]
    batch, many = upper.numel() // order**2, rows.shape[-2]
    pointers = (upper.data_ptr(), batch, order, rows.data_ptr(), many, _threads(order))
    # Many right-hand sides are LAPACK's: its triangular solve is a matrix product.
    if _is_small(order, batch) and many <= _FEW:
        getattr(module, f"small_solve_{kind}")(*pointers)
    else:
        run = getattr(module, f"solve_{kind}")
        run(lapack.potrs[upper.dtype], lapack.set_threads, *pointers)
