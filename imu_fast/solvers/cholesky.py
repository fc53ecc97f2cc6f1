"""Damped Cholesky solve ``(A + lam I)^-1 b``: the extension on the CPU, torch everywhere else."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imu_fast.backend import logger
from imu_fast.errors import (
    InputError,
    SingularMatrixError,
    check_positive,
    check_same_device,
)

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
def _extension() -> tuple[Any, Lapack] | None:
    try:
        from imu_fast import _C
    except ImportError as error:
        logger.info("imu_fast._C does not load (%s); torch factors instead", error)
        return None
    lapack = find_lapack()
    if lapack is None:
        logger.info("no LAPACK found for imu_fast._C; torch factors instead")
        return None
    return _C, lapack


def _threads(order: int) -> int:
    return torch.get_num_threads() if order <= _SIDE_BY_SIDE else 1


@dataclass(frozen=True)
class DampedCholesky:
    """``A + lam I = U^T U``.

    Attributes:
        factor: [..., P, P]; its upper triangle is U, the strict lower one is not used.
        damping: lam.
        backend: "extension" or "torch".
    """

    factor: Tensor
    damping: float
    backend: str

    def solve(self, b: Tensor) -> Tensor:
        """``(A + lam I)^-1 b``; b [..., P] or [..., P, m] with the factor's batch, same dtype.

        A vector per matrix is meant where b has one dimension less than the factor.

        Raises:
            InputError: shape, dtype or device does not match.
        """
        check_same_device("A", self.factor, "b", b)
        if b.dtype != self.factor.dtype:
            raise InputError(f"b is {b.dtype}, A is {self.factor.dtype}; convert one with .to()")
        vector = b.dim() == self.factor.dim() - 1
        shape = b.shape if vector else b.shape[:-1]
        if b.dim() not in (self.factor.dim() - 1, self.factor.dim()) or (
            shape != self.factor.shape[:-1]
        ):
            raise InputError(
                f"b has shape {tuple(b.shape)}; expected {tuple(self.factor.shape[:-1])}, or with "
                "a last dimension of right-hand sides"
            )
        columns = b.unsqueeze(-1) if vector else b
        if self.backend == "extension":
            out = self._solve_extension(columns)
        else:
            out = torch.cholesky_solve(columns, self.factor, upper=True)
        return out.squeeze(-1) if vector else out

    def _solve_extension(self, b: Tensor) -> Tensor:
        found = _extension()
        assert found is not None
        module, lapack = found
        # One right-hand side per row: LAPACK's column-major b.
        rows = b.mT.contiguous()
        rows = rows.clone() if rows.data_ptr() == b.data_ptr() else rows
        order, dtype = self.factor.shape[-1], self.factor.dtype
        if rows.numel():
            solve = module.solve_f32 if dtype == torch.float32 else module.solve_f64
            solve(
                lapack.potrs[dtype],
                lapack.set_threads,
                self.factor.data_ptr(),
                self.factor.numel() // order**2,
                order,
                rows.data_ptr(),
                rows.shape[-2],
                _threads(order),
            )
        return rows.mT

    def logdet(self) -> Tensor:
        """``log det(A + lam I)``: [...]."""
        return 2 * self.factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)


def _check_matrix(a: Tensor) -> None:
    if a.dim() < 2 or a.shape[-1] != a.shape[-2] or a.numel() == 0:
        raise InputError(f"A has shape {tuple(a.shape)}; pass square matrices [..., P, P]")
    if a.dtype not in _PREFIX:
        raise InputError(f"A is {a.dtype}; pass float32 or float64")
    if not bool(torch.isfinite(a).all()):
        raise InputError("A is not finite; remove the NaN or infinite entries")


def damped_cholesky(a: Tensor, damping: float) -> DampedCholesky:
    """Factor ``A + lam I`` for solving again and again.

    Args:
        a: [..., P, P], symmetric positive semi-definite; not changed. float32 or float64.
        damping: lam > 0.

    Raises:
        InputError: shape, dtype, a non-finite entry, or damping not positive and finite.
        SingularMatrixError: a matrix is indefinite even after damping; names the matrix, the pivot
            and the smallest damping that works.
    """
    _check_matrix(a)
    check_positive("damping", damping)
    order, batch = a.shape[-1], a.shape[:-2]
    found = _extension() if a.device.type == "cpu" else None
    if found is not None:
        module, lapack = found
        factor = a.detach().clone(memory_format=torch.contiguous_format)
        status = torch.empty(batch, dtype=torch.int32)
        run = module.factor_f32 if a.dtype == torch.float32 else module.factor_f64
        run(
            lapack.potrf[a.dtype],
            lapack.set_threads,
            factor.data_ptr(),
            max(1, status.numel()),
            order,
            float(damping),
            status.data_ptr(),
            _threads(order),
        )
    else:
        damped = a.detach().clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(damping)
        factor, status = torch.linalg.cholesky_ex(damped, upper=True)
    if bool(status.any()):
        _raise_singular(a, damping, status)
    return DampedCholesky(factor, float(damping), "torch" if found is None else "extension")


def _raise_singular(a: Tensor, damping: float, status: Tensor) -> None:
    flat = status.flatten()
    index = int(torch.nonzero(flat)[0])
    matrix = a.reshape(-1, *a.shape[-2:])[index].double()
    eigenvalues = torch.linalg.eigvalsh(matrix)
    # Rounding of the factorisation itself: P eps ||A||, the backward error bound.
    margin = len(matrix) * torch.finfo(a.dtype).eps * float(eigenvalues.abs().max())
    smallest = float(-eigenvalues[0]) + 2 * margin
    where = "" if a.dim() == 2 else f" (matrix {index} of {len(flat)})"
    raise SingularMatrixError(
        f"A + {damping:g} I is not positive definite{where}: pivot {int(flat[index])} of "
        f"{len(matrix)} failed; the smallest damping that works is about {smallest:.3g}",
        pivot=int(flat[index]),
        index=None if a.dim() == 2 else index,
        smallest_damping=smallest,
    )


def damped_cholesky_solve(a: Tensor, b: Tensor, damping: float) -> Tensor:
    """``(A + lam I)^-1 b``, batched, on the CPU and on CUDA.

    Args:
        a: [..., P, P], symmetric positive semi-definite. b: [..., P] or [..., P, m].
        damping: lam > 0.

    Returns:
        As b. Errors as in :func:`damped_cholesky` and :meth:`DampedCholesky.solve`.
    """
    if isinstance(b, Tensor) and not bool(torch.isfinite(b).all()):
        raise InputError("b is not finite; remove the NaN or infinite entries")
    return damped_cholesky(a, damping).solve(b)
