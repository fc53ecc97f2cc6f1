"""Damped Cholesky ``A + lam I = U^T U``: the extensions on the CPU and on CUDA, else torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from imu_fast.backend import logger, record
from imu_fast.errors import (
    InputError,
    SingularMatrixError,
    check_choice,
    check_count,
    check_positive,
    check_same_device,
    is_finite,
)
from imu_fast.solvers.cholesky import cusolver, lapack, low_precision, refined
from imu_fast.solvers.conjugate_gradient import Solution


@dataclass(frozen=True)
class DampedCholesky:
    """``A + lam I = U^T U``.

    Attributes:
        factor: [..., P, P]; its upper triangle is U, the strict lower one is not used.
        damping: lam, as it was used: larger than asked for after an escalation.
        backend: "extension" (the CPU's), "cuda" or "torch".
        dtype: A's, and that of right-hand sides.
        matrix: A, kept by reference for other dampings and refinement; None if overwritten.
        precision: what its products were made in: "ieee" (A's own dtype), "tf32" or "bf16" (the
            factor is float32). Also "ieee" where a lower one was asked for and not used.
    """

    factor: Tensor
    damping: float
    backend: str
    dtype: torch.dtype
    matrix: Tensor | None = None
    precision: str = "ieee"

    @torch.no_grad()
    def solve(self, b: Tensor) -> Tensor:
        """``(A + lam I)^-1 b``; b [..., P] or [..., P, m] with A's batch and dtype. No autograd.

        A vector per matrix is meant where b has one dimension less than the factor. In a lower
        precision this is an approximation, of relative error about ``||E|| / lam`` at worst
        (:mod:`imu_fast.solvers.cholesky.low_precision`); :meth:`solve_refined` has no such error.

        Raises:
            InputError: shape, dtype or device does not match.
        """
        vector = _check_right_hand_side(self.factor, self.dtype, b)
        columns = b.unsqueeze(-1) if vector else b
        if self.dtype == self.factor.dtype:
            out = self.solve_columns(columns)
        else:
            # A float64 A has a float32 factor, whose range may not hold b.
            size = _largest(columns, dim=-2)
            out = self.solve_columns((columns / size).to(self.factor.dtype)).to(b) * size
        return out.squeeze(-1) if vector else out

    def solve_columns(self, columns: Tensor) -> Tensor:
        """:meth:`solve` of columns [..., P, m] in the factor's dtype, unchecked."""
        if self.backend == "torch":
            return torch.cholesky_solve(columns, self.factor, upper=True)
        # One right-hand side per row: LAPACK's and cuSOLVER's column-major b.
        rows = columns.mT.contiguous()
        rows = rows.clone() if rows.data_ptr() == columns.data_ptr() else rows
        if rows.numel():
            _LIBRARIES[self.backend].solve(self.factor, rows)
        return rows.mT

    @torch.no_grad()
    def solve_refined(self, b: Tensor, tolerance: float = 1e-12) -> Solution:
        """The same to float64 accuracy, by iterative refinement with this factor. No autograd.

        A factor in a lower precision preconditions conjugate gradient, in float64, in each round:
        with the factor alone refinement would stall at condition numbers beyond 1e3 (TF32) or 1e2.
        All of A is read, not its upper triangle alone.

        Args:
            b: as in :meth:`solve`, any floating dtype. tolerance: on each right-hand side's true
                relative residual, recomputed in float64, and read back after each round. Where it
                is not reached (a float32 factor at a condition number beyond 1e7, an A that is not
                symmetric) that is logged, and to be read in ``residual``.

        Returns:
            A Solution; x is float64, of b's shape.

        Raises:
            InputError: as :meth:`solve`, b is not finite, or A was overwritten.
        """
        if self.matrix is None:
            raise InputError("overwrite=True did away with A, which refinement needs; keep it")
        check_positive("tolerance", tolerance)
        vector = _check_right_hand_side(self.factor, b.dtype, b)
        check_finite("b", b)
        columns = (b.unsqueeze(-1) if vector else b).double()
        how = refined.together if self.precision == "ieee" else refined.each
        solution = how(self, self.matrix, columns, tolerance)
        if solution.residual > tolerance:
            logger.warning(
                "refinement stopped at relative residual %.2g, above %.2g: condition about %.2g, "
                "or A is not symmetric (all of it is read)",
                solution.residual,
                tolerance,
                float(self.condition().max()),
            )
        return replace(solution, x=solution.x.reshape(b.shape))

    def with_damping(self, damping: float) -> DampedCholesky:
        """The factor of ``A + damping I`` of the same A: one point of a sweep of dampings.

        In the precision that this factor has, "ieee" if it fell back to that.

        Each costs ``P^3 / 3``. For more than about 25 dampings of one matrix its eigenvalues
        (``torch.linalg.eigh``, about ``9 P^3``) are cheaper.
        """
        if self.matrix is None:
            raise InputError("overwrite=True did away with A, which a sweep needs; keep it")
        lam = check_positive("damping", damping)
        return factor_of(self.matrix, lam, overwrite=False, check=True, precision=self.precision)

    def logdet(self) -> Tensor:
        """``log det(A + lam I)``: [...]."""
        return 2 * self.factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)

    def condition(self, iterations: int = 12) -> Tensor:
        """A lower bound, usually within a factor of two, on the 2-norm condition number: [...].

        The ratio of Rayleigh quotients after ``iterations`` of the power method with
        ``U^T U`` and with its inverse, from a seeded start.
        """
        upper = self.factor.triu()
        generator = torch.Generator("cpu").manual_seed(0)
        start = torch.randn(upper.shape[-1], generator=generator, dtype=torch.float64, device="cpu")
        start = start.to(upper).expand(*upper.shape[:-1]).unsqueeze(-1)

        def largest(apply: Callable[[Tensor], Tensor]) -> Tensor:
            x = start / torch.linalg.vector_norm(start, dim=-2, keepdim=True)
            for _ in range(iterations):
                y = apply(x)
                size = torch.linalg.vector_norm(y, dim=-2, keepdim=True)
                x = y / size
            return size.flatten(-2).squeeze(-1)

        return largest(lambda x: upper.mT @ (upper @ x)) * largest(self.solve_columns)


# Where a factor and its solves are ours: its name, as in DampedCholesky.backend, and the module.
_LIBRARIES = {"extension": lapack, "cuda": cusolver}


def backend_of(a: Tensor) -> str:
    if a.device.type == "cpu" and lapack.extension() is not None:
        return "extension"
    if a.is_cuda and cusolver.can_factor(a):
        return "cuda"
    return "torch"


def check_matrices(a: Tensor) -> None:
    """Raise InputError unless a is [..., P, P], float32 or float64."""
    if a.dim() < 2 or a.shape[-1] != a.shape[-2]:
        raise InputError(f"A has shape {tuple(a.shape)}; pass square matrices [..., P, P]")
    if a.dtype not in (torch.float32, torch.float64):
        raise InputError(f"A is {a.dtype}; pass float32 or float64")


def _largest(x: Tensor, dim: int) -> Tensor:
    """Largest magnitude along ``dim``, kept; 1 where all is zero."""
    size = x.abs().amax(dim=dim, keepdim=True)
    return size.where(size > 0, 1.0)


def _check_right_hand_side(a: Tensor, dtype: torch.dtype, b: Tensor) -> bool:
    """Whether b, of that dtype, is one vector per matrix of a, or raise InputError."""
    check_same_device("A", a, "b", b)
    if b.dtype != dtype:
        raise InputError(f"b is {b.dtype}, A is {dtype}; convert one with .to()")
    vector = b.dim() == a.dim() - 1
    shape = b.shape if vector else b.shape[:-1]
    if b.dim() not in (a.dim() - 1, a.dim()) or shape != a.shape[:-1]:
        raise InputError(
            f"b has shape {tuple(b.shape)}; expected {tuple(a.shape[:-1])}, or with "
            "a last dimension of right-hand sides"
        )
    return vector


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise InputError unless all of it is finite."""
    if not is_finite(tensor):
        raise InputError(f"{name} is not finite; remove the NaN or infinite entries")


def _torch_factor(a: Tensor, damping: float, overwrite: bool) -> tuple[Tensor, Tensor]:
    """As :func:`imu_fast.solvers.cholesky.lapack.factor`, on any device."""
    damped = a if overwrite else a.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping)
    factor, status = torch.linalg.cholesky_ex(damped, upper=True)
    factor = damped.copy_(factor) if overwrite else factor
    return factor, lapack.settle(factor, status)


def factor_plain(a: Tensor, damping: float, overwrite: bool) -> tuple[Tensor, Tensor]:
    """As :func:`imu_fast.solvers.cholesky.lapack.factor`, wherever a is."""
    backend = backend_of(a)
    record("damped_cholesky_solve", backend)
    run = _torch_factor if backend == "torch" else _LIBRARIES[backend].factor
    return run(a, damping, overwrite)


def solve_once(a: Tensor, damping: float, columns: Tensor) -> tuple[Tensor, bool | None]:
    """``(A + lam I)^-1 B`` [..., P, m], whose factor nobody keeps, unchecked.

    And whether all of it is finite; None where that is not known yet.
    """
    found = lapack.solve_once(a, damping, columns)
    if found is not None:
        record("damped_cholesky_solve", "extension")
        return found
    return factor_of(a, damping, overwrite=False, check=False).solve_columns(columns), None


def factor_of(
    a: Tensor, damping: float, overwrite: bool, check: bool, precision: str = "ieee"
) -> DampedCholesky:
    """Factor, or (where that is checked) raise SingularMatrixError or InputError."""
    a, order = a.detach(), a.shape[-1]
    kept = None if overwrite else a
    if precision != "ieee" and order > low_precision.BLOCK:
        factor, status = low_precision.factor(a, damping, overwrite, precision, factor_plain)
        if not check or not bool(status.any()):
            return DampedCholesky(factor, damping, backend_of(factor), a.dtype, kept, precision)
        if overwrite:
            _raise_overwritten(damping, status, order, f" in {precision}")
        found = factor_of(a, damping, overwrite, check)
        logger.warning(
            "A + %g I has no Cholesky factor in %s, so it is factored in %s; "
            "a damping of about %.2g would do for %s",
            damping,
            precision,
            a.dtype,
            float(low_precision.rounding_bound(a, damping, precision).max()),
            precision,
        )
        return found
    factor, status = factor_plain(a, damping, overwrite)
    if check and bool(status.any()):
        if overwrite:
            _raise_overwritten(damping, status, order)
        check_finite("A", a)
        raise_singular(a, damping, status)
    return DampedCholesky(factor, damping, backend_of(a), a.dtype, kept)


def _raise_overwritten(damping: float, status: Tensor, order: int, where: str = "") -> NoReturn:
    """A itself is gone, so what would have worked cannot be told."""
    first = int(torch.nonzero(status.flatten())[0])
    raise SingularMatrixError(
        f"A + {damping:g} I is not positive definite{where} or not finite: pivot "
        f"{int(status.flatten()[first])} of {order} failed; pass overwrite=False to "
        + (
            "have it factored in its own dtype"
            if where
            else "be told the smallest damping that works"
        ),
        pivot=int(status.flatten()[first]),
        index=None if status.dim() == 0 else first,
    )


def damped_cholesky(
    a: Tensor,
    damping: float,
    *,
    overwrite: bool = False,
    max_escalations: int = 0,
    check: bool = True,
    precision: str = "ieee",
) -> DampedCholesky:
    """Factor ``A + lam I`` for solving again and again.

    On CUDA everything is enqueued on the current stream; the host waits once, to read the status,
    or not at all.

    Args:
        a: [..., P, P], symmetric positive semi-definite, float32 or float64; only its upper
            triangle is read (by ``solve_refined`` all of it).
        damping: lam > 0.
        overwrite: the factor may take a's memory (if a is contiguous); a is then lost.
        max_escalations: how often the damping (of the whole batch) may be multiplied by ten while
            a matrix stays indefinite (Levenberg 1944). Logged; ``.damping`` is what was used.
        check: False does not read the status, so the host does not wait. Where a matrix is
            indefinite or not finite all that ``solve`` gives with its factor is NaN.
        precision: of the products inside. "ieee" is A's own dtype. "tf32" and "bf16" make a float32
            factor, of a float64 A too, that is up to about ``||A||`` 2^-11 and 2^-8 off, for
            matrix units of CUDA (a CPU emulates them, slowly): a factor for
            :meth:`DampedCholesky.solve_refined`. It may not exist where lam is below that
            (:mod:`imu_fast.solvers.cholesky.low_precision` says when): then A's dtype is used
            after all, which is logged. So it is up to order 512, where there is nothing to gain.
            The factor's ``precision`` is what was used. Not yet run on a GPU.

    Raises:
        InputError: shape, dtype, a non-finite entry, damping not positive and finite, or an
            unknown precision; escalation of a matrix that may be overwritten, or unchecked.
        SingularMatrixError: a matrix is indefinite even after damping; names the matrix, the pivot
            and the smallest damping that works.
    """
    check_matrices(a)
    if not a.numel():
        raise InputError(f"A has shape {tuple(a.shape)}, in which there is nothing to factor")
    lam = check_positive("damping", damping)
    check_choice("precision", precision, ("ieee", *low_precision.ROUNDOFF))
    check_count("max_escalations", max_escalations, minimum=0)
    if overwrite and max_escalations:
        raise InputError("overwrite=True loses A at the first attempt; set max_escalations=0")
    if max_escalations and not check:
        raise InputError("check=False does not learn of a failure; set max_escalations=0")
    for attempt in range(max_escalations + 1):
        try:
            found = factor_of(a, lam, overwrite, check, precision)
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


def raise_singular(a: Tensor, damping: float | Tensor, status: Tensor) -> NoReturn:
    """Name the first matrix whose status is not 0.

    Args:
        a: [..., P, P]. damping: of all, or of each, [...]. status: [...].
    """
    flat = status.flatten()
    index = int(torch.nonzero(flat)[0])
    if isinstance(damping, Tensor):
        damping = float(damping.flatten()[index])
    matrix = a.reshape(-1, *a.shape[-2:])[index].double()
    eigenvalues = torch.linalg.eigvalsh(matrix, UPLO="U")
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
