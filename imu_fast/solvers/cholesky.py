"""Damped Cholesky solve ``(A + lam I)^-1 b``: the extension on the CPU, torch everywhere else."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imu_fast.backend import logger
from imu_fast.errors import (
    InputError,
    SingularMatrixError,
    check_count,
    check_positive,
    check_same_device,
)
from imu_fast.solvers.conjugate_gradient import Solution, refine

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


def _is_small(order: int, batch: int) -> bool:
    """Whether the extension's own factorisation is the faster one; measured in bench/."""
    return order <= _SMALL or (order <= _SIDE_BY_SIDE and batch >= torch.get_num_threads())


def _threads(order: int) -> int:
    return torch.get_num_threads() if order <= _SIDE_BY_SIDE else 1


@dataclass(frozen=True)
class DampedCholesky:
    """``A + lam I = U^T U``.

    Attributes:
        factor: [..., P, P]; its upper triangle is U, the strict lower one is not used.
        damping: lam, as it was used: larger than asked for after an escalation.
        backend: "extension" or "torch".
        matrix: A, kept by reference for other dampings and refinement; None if overwritten.
    """

    factor: Tensor
    damping: float
    backend: str
    matrix: Tensor | None = None

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
        order, kind = self.factor.shape[-1], _KIND[self.factor.dtype]
        batch, many = self.factor.numel() // order**2, rows.shape[-2]
        if not rows.numel():
            return rows.mT
        pointers = (self.factor.data_ptr(), batch, order, rows.data_ptr(), many, _threads(order))
        # Many right-hand sides are LAPACK's: its triangular solve is a matrix product.
        if _is_small(order, batch) and many <= _FEW:
            getattr(module, f"small_solve_{kind}")(*pointers)
        else:
            potrs = lapack.potrs[self.factor.dtype]
            getattr(module, f"solve_{kind}")(potrs, lapack.set_threads, *pointers)
        return rows.mT

    def solve_refined(self, b: Tensor, tolerance: float = 1e-12) -> Solution:
        """The same to float64 accuracy, by iterative refinement with this factor.

        Args:
            b: as in :meth:`solve`, any floating dtype. tolerance: on each matrix's true relative
                residual, recomputed in float64. Where it is not reached (a float32 factor at a
                condition number beyond 1e7) that is logged, and to be read in ``residual``.

        Returns:
            A Solution; x is float64, of b's shape.

        Raises:
            InputError: as :meth:`solve`, or A was overwritten.
        """
        if self.matrix is None:
            raise InputError("overwrite=True did away with A, which refinement needs; keep it")
        check_positive("tolerance", tolerance)
        self.solve(b.to(self.factor.dtype))  # checks the shape; cheap beside the factorisation
        vector = b.dim() == self.factor.dim() - 1
        order = self.factor.shape[-1]
        wide = self.matrix.double().reshape(-1, order, order)
        columns = (b.unsqueeze(-1) if vector else b).double()
        flat = columns.reshape(len(wide), order, -1)

        def product(x: Tensor) -> Tensor:
            return wide @ x + self.damping * x

        def approximate(r: Tensor) -> tuple[Tensor, int]:
            x = self.solve(r.to(self.factor.dtype).reshape(columns.shape))
            return x.double().reshape(flat.shape), 0

        solution = refine(product, [approximate], flat, tolerance=tolerance, together=True)
        if solution.residual > tolerance:
            logger.warning(
                "refinement stopped at relative residual %.2g, above %.2g: condition about %.2g",
                solution.residual,
                tolerance,
                float(self.condition().max()),
            )
        return replace(solution, x=solution.x.reshape(b.shape))

    def with_damping(self, damping: float) -> DampedCholesky:
        """The factor of ``A + damping I`` of the same A: one point of a sweep of dampings.

        Each costs ``P^3 / 3``. For more than about 25 dampings of one matrix its eigenvalues
        (``torch.linalg.eigh``, about ``9 P^3``) are cheaper.
        """
        if self.matrix is None:
            raise InputError("overwrite=True did away with A, which a sweep needs; keep it")
        return _factor(self.matrix, damping, overwrite=False)

    def logdet(self) -> Tensor:
        """``log det(A + lam I)``: [...]."""
        return 2 * self.factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)

    def condition(self, iterations: int = 12) -> Tensor:
        """A lower bound, usually within a factor of two, on the 2-norm condition number: [...].

        The ratio of Rayleigh quotients after ``iterations`` of the power method with
        ``U^T U`` and with its inverse, from a seeded start.
        """
        upper = self.factor.triu()
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(upper.shape[-1], generator=generator, dtype=torch.float64)
        start = start.to(upper).expand(*upper.shape[:-1]).unsqueeze(-1)

        def largest(apply: Callable[[Tensor], Tensor]) -> Tensor:
            x = start / torch.linalg.vector_norm(start, dim=-2, keepdim=True)
            for _ in range(iterations):
                y = apply(x)
                size = torch.linalg.vector_norm(y, dim=-2, keepdim=True)
                x = y / size
            return size.flatten(-2).squeeze(-1)

        return largest(lambda x: upper.mT @ (upper @ x)) * largest(self.solve)


def _check_shape(a: Tensor) -> None:
    if a.dim() < 2 or a.shape[-1] != a.shape[-2] or a.numel() == 0:
        raise InputError(f"A has shape {tuple(a.shape)}; pass square matrices [..., P, P]")
    if a.dtype not in _KIND:
        raise InputError(f"A is {a.dtype}; pass float32 or float64")


def _check_finite(a: Tensor) -> None:
    if not bool(torch.isfinite(a).all()):
        raise InputError("A is not finite; remove the NaN or infinite entries")


def _factor(a: Tensor, damping: float, overwrite: bool) -> DampedCholesky:
    """Factor, or raise SingularMatrixError."""
    order, batch = a.shape[-1], a.shape[:-2]
    found = _extension() if a.device.type == "cpu" else None
    kept = None if overwrite else a
    if found is None:
        _check_finite(a)
        damped = a.detach() if overwrite else a.detach().clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(damping)
        factor, status = torch.linalg.cholesky_ex(damped, upper=True)
        if overwrite:
            factor = damped.copy_(factor)
        result = DampedCholesky(factor, damping, "torch", kept)
    else:
        module, lapack = found
        source, kind = a.detach().contiguous(), _KIND[a.dtype]
        status = torch.empty(batch, dtype=torch.int32)
        count = max(1, status.numel())
        tail = (count, order, damping, status.data_ptr(), _threads(order))
        if _is_small(order, count):
            # A factor of what is not finite is not finite: the status says so, at no extra pass.
            factor = source if overwrite else torch.empty_like(source)
            run = getattr(module, f"small_factor_{kind}")
            run(source.data_ptr(), factor.data_ptr(), *tail)
        else:
            _check_finite(a)
            factor = source if overwrite else source.clone()
            run = getattr(module, f"factor_{kind}")
            run(lapack.potrf[a.dtype], lapack.set_threads, factor.data_ptr(), *tail)
        result = DampedCholesky(factor, damping, "extension", kept)
    if bool(status.any()):
        if overwrite:
            # A itself is gone, so what would have worked cannot be told.
            first = int(torch.nonzero(status.flatten())[0])
            raise SingularMatrixError(
                f"A + {damping:g} I is not positive definite or not finite: pivot "
                f"{int(status.flatten()[first])} of {order} failed; pass overwrite=False to be "
                "told the smallest damping that works",
                pivot=int(status.flatten()[first]),
                index=None if a.dim() == 2 else first,
            )
        _check_finite(a)
        _raise_singular(a, damping, status)
    return result


def damped_cholesky(
    a: Tensor, damping: float, *, overwrite: bool = False, max_escalations: int = 0
) -> DampedCholesky:
    """Factor ``A + lam I`` for solving again and again.

    Args:
        a: [..., P, P], symmetric positive semi-definite, float32 or float64; only its upper
            triangle is read.
        damping: lam > 0.
        overwrite: the factor may take a's memory (if a is contiguous); a is then lost.
        max_escalations: how often the damping (of the whole batch) may be multiplied by ten while
            a matrix stays indefinite (Levenberg 1944). Logged; ``.damping`` is what was used.

    Raises:
        InputError: shape, dtype, a non-finite entry, or damping not positive and finite;
            escalation of a matrix that may be overwritten.
        SingularMatrixError: a matrix is indefinite even after damping; names the matrix, the pivot
            and the smallest damping that works.
    """
    _check_shape(a)
    lam = check_positive("damping", damping)
    check_count("max_escalations", max_escalations, minimum=0)
    if overwrite and max_escalations:
        raise InputError("overwrite=True loses A at the first attempt; set max_escalations=0")
    for attempt in range(max_escalations + 1):
        try:
            found = _factor(a, lam, overwrite)
        except SingularMatrixError:
            if attempt == max_escalations:
                raise
            lam *= 10
            continue
        if attempt:
            logger.warning(
                "damping escalated from %g to %g: the matrix was indefinite", damping, lam
            )
        return found
    raise AssertionError("unreachable")


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
