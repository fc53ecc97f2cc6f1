"""Damped Cholesky on CUDA: ``imu_fast._C_cuda``, with cuSOLVER of an installed library beyond it.

Everything is enqueued on torch's current stream of the operand's device; nothing waits for it.
"""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imu_fast.backend import logger
from imu_fast.solvers.cholesky.lapack import settle

# Beyond what fits shared memory (an order of about 270 to 320 in float32, 180 to 220 in float64)
# and up to this one, a batch goes to cuSOLVER's batched call and to solves of our own; larger
# matrices, one after the other, fill the device each by itself.
_SIDE_BY_SIDE = 512

_KIND = {torch.float32: "f32", torch.float64: "f64"}


def _libraries() -> list[str]:
    """Where cuSOLVER of torch's CUDA may be: pip's library beside torch, else by its name alone.

    The loader knows the name where torch has loaded the library already, wherever from.
    """
    version = torch.version.cuda
    if version is None:
        return []
    name = f"libcusolver.so.{12 if int(version.split('.')[0]) >= 13 else 11}"
    beside = Path(torch.__file__).parents[1] / "nvidia"
    return [*map(str, sorted(beside.glob(f"*/lib/{name}"))), name]


@lru_cache(maxsize=1)
def find_cusolver() -> tuple[Any | None, str]:
    """The loaded library as a ``_C_cuda.Cusolver``, and its path; or None, and why not."""
    try:
        from imu_fast import _C_cuda
    except ImportError as error:
        return None, f"imu_fast._C_cuda does not load: {error}"
    reason = "torch is built without CUDA"
    for library in _libraries():
        try:
            return _C_cuda.Cusolver(library), library
        except RuntimeError as error:
            reason = str(error)
    return None, reason


@cache
def _small(device: int) -> dict[torch.dtype, int] | None:
    """The largest order that the extension's own kernels take; None, logged, if it cannot run."""
    try:
        from imu_fast import _C_cuda

        return {
            dtype: getattr(_C_cuda, f"largest_small_order_{kind}")(device)
            for dtype, kind in _KIND.items()
        }
    except (ImportError, RuntimeError) as error:
        logger.warning("imu_fast._C_cuda cannot run (%s); torch factors instead", error)
        return None


@lru_cache(maxsize=1)
def _has_cusolver() -> bool:
    found, reason = find_cusolver()
    if found is None:
        logger.warning("cuSOLVER not found (%s); torch factors large matrices instead", reason)
    return found is not None


def can_factor(a: Tensor) -> bool:
    """Whether :func:`factor` takes a [..., P, P], on CUDA; if not the reason is logged, once."""
    small = _small(a.device.index)
    return small is not None and (a.shape[-1] <= small[a.dtype] or _has_cusolver())


def _fits(order: int, tensor: Tensor) -> bool:
    small = _small(tensor.device.index)
    assert small is not None
    return order <= small[tensor.dtype]


def _where(tensor: Tensor) -> tuple[int, int]:
    """The device and stream that the extension shall use."""
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def factor(a: Tensor, damping: float, overwrite: bool) -> tuple[Tensor, Tensor]:
    """The upper factor of ``A + lam I``, and a status per matrix, both still on their way.

    Args and returns as :func:`imu_fast.solvers.cholesky.lapack.factor`, on a's device.
    """
    from imu_fast import _C_cuda

    source, kind, order = a.contiguous(), _KIND[a.dtype], a.shape[-1]
    status = torch.empty(a.shape[:-2], dtype=torch.int32, device=a.device)
    batch, where = status.numel(), _where(a)
    if _fits(order, a):
        out = source if overwrite else torch.empty_like(source)
        run = getattr(_C_cuda, f"small_factor_{kind}")
        run(source.data_ptr(), out.data_ptr(), batch, order, damping, status.data_ptr(), *where)
        return out, status
    out = source if overwrite else source.clone()
    solver, _ = find_cusolver()
    head = (out.data_ptr(), batch, order, damping, status.data_ptr())
    if batch > 1 and order <= _SIDE_BY_SIDE:
        pointers = torch.empty(batch, dtype=torch.int64, device=a.device)
        getattr(solver, f"factor_batched_{kind}")(*head, pointers.data_ptr(), *where)
    else:
        size = getattr(solver, f"workspace_{kind}")(order, *where)
        workspace = torch.empty(size, dtype=torch.uint8, device=a.device)
        getattr(solver, f"factor_{kind}")(*head, workspace.data_ptr(), size, *where)
    return out, settle(out, status)


def solve(upper: Tensor, rows: Tensor) -> None:
    """``(U^T U)^-1 r`` for each row r of rows [..., m, P], contiguous, in place."""
    from imu_fast import _C_cuda

    order, kind = upper.shape[-1], _KIND[upper.dtype]
    batch, many = upper.numel() // order**2, rows.shape[-2]
    arguments = (upper.data_ptr(), batch, order, rows.data_ptr(), many)
    if _fits(order, upper) or (batch > 1 and order <= _SIDE_BY_SIDE):
        getattr(_C_cuda, f"small_solve_{kind}")(*arguments, *_where(upper))
    else:
        solver, _ = find_cusolver()
        info = torch.empty(1, dtype=torch.int32, device=upper.device)
        getattr(solver, f"solve_{kind}")(*arguments, info.data_ptr(), *_where(upper))
