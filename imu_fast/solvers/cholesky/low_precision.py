"""Damped Cholesky by blocks, its large products in TF32 or bf16 and everything else in float32.

    U_kk^T U_kk = A_kk + lam I - sum_{j<k} U_jk^T U_jk
    U_ki = round( U_kk^-T (A_ki - sum_{j<k} U_jk^T U_ji) ),   i > k

Right of the diagonal U is rounded where it is stored. So the products, nearly all of the
``P^3 / 3`` FLOPs, round nothing more but their float32 sums, and what is subtracted is the U that
is returned. Rounding is then one term in each block beside the diagonal, none in those on it:

    U^T U = A + lam I + E,   E_ki = U_kk^T D_ki + F_ki,   |D_ki| <= u |U_ki|

with u = 2^-11 (TF32) or 2^-8 (bf16), and F what rounding in float32 does. ``U_kk^T U_kk`` is at
most ``A_kk + lam I``, and the squares of U sum up to the trace of ``A + lam I =: B``, so

    ||E||_F <= u sqrt(2 max_k ||B_kk||_2 tr B) + (P + 8) eps32 tr B

The first term is :func:`rounding_bound`. The second is float32 Cholesky's own, for sums of P
products in any order, rounded or (by matrix units) cut off, which in practice is far from reached.
Rounding is relative to each entry, so the same holds for A scaled to a unit diagonal: graded
matrices do no harm.

U exists if ``lam > ||E||`` for A positive semi-definite (else a leading block of ``B + E`` would be
indefinite). As ``max_k ||B_kk|| <= ||B||``, the first term is at most ``u sqrt(2 r) ||B||``, with
``r = tr B / ||B||`` the effective rank. That is sufficient, not necessary: where rounding errors
are as good as random ``||E||_2`` does not grow with r (0.2 ``u ||A||`` for random A of order 1,000
and 2,048, emulated).

With ``||E|| <= eta lam``, eta < 1, ``(U^T U)^-1 B`` has its spectrum in [1/(1+eta), 1/(1-eta)]:
conjugate gradient preconditioned by U gains ``(sqrt(k)-1)/(sqrt(k)+1)``, ``k = (1+eta)/(1-eta)``,
an iteration. With eta = 1/2 that is 22 iterations to 1e-12.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from imu_fast.precision import torch_multiplies_in
from imu_fast.solvers.cholesky.lapack import settle

# Unit roundoff, rounding to nearest.
ROUNDOFF = {"tf32": 2.0**-11, "bf16": 2.0**-8}

# Rows at a time, and the order up to which all is float32. The triangular solves, which stay in
# float32, are 3 block (P - block) / 2 P^2 of the FLOPs, 16 % of order 4,096, and with the diagonal
# blocks 63 % of order 1,024. By counting; not yet measured on a GPU.
BLOCK = 512

FactorBlock = Callable[[Tensor, float, bool], tuple[Tensor, Tensor]]


def round_tf32(x: Tensor) -> Tensor:
    """x, float32, to TF32's ten bits of mantissa, to nearest, ties to even; not finite: as it is.

    Matrix units cut the other thirteen bits off, which after this are zero.
    """
    bits = x.view(torch.int32)
    odd = (bits >> 13).bitwise_and_(1)
    nearest = odd.add_(bits).add_(0xFFF).bitwise_and_(~0x1FFF).view(torch.float32)
    return torch.where(x.isfinite(), nearest, x)


def rounding_bound(a: Tensor, damping: float, precision: str, block: int | None = None) -> Tensor:
    """What rounding U adds to ``||E||_F`` at most: ``u sqrt(2 max_k ||B_kk||_2 tr B)``, [...].

    Args:
        a: [..., P, P]. ``||B_kk||_2`` is put at the smaller of Frobenius norm and largest row sum.
    """
    order, block = a.shape[-1], block or BLOCK
    norms = []
    for k in range(0, order, block):
        part = a[..., k : k + block, k : k + block].double().triu()
        part = part + part.triu(1).mT
        part.diagonal(dim1=-2, dim2=-1).add_(damping)
        both = (torch.linalg.matrix_norm(part, kind) for kind in ("fro", torch.inf))
        norms.append(torch.minimum(*both))
    trace = a.diagonal(dim1=-2, dim2=-1).double().sum(-1) + order * damping
    return ROUNDOFF[precision] * (2 * torch.stack(norms).amax(0) * trace).sqrt()


def _on_matrix_units(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _multiply_bf16(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of bf16, summed and returned in float32; CUDA only."""
    return torch.mm(left, right, out_dtype=torch.float32)


class _Rows:
    """The block rows of U so far, in what their products are made of.

    On CUDA bf16 takes a copy of half U's size; TF32 is cut from float32 by the matrix units.
    Elsewhere the same rounded numbers are multiplied in float32, which is the same sum but for its
    order.
    """

    def __init__(self, u: Tensor, precision: str) -> None:
        self._u, self._precision = u, precision
        self._cuda = _on_matrix_units(u)
        copied = self._cuda and precision == "bf16"
        self._bf16 = torch.empty_like(u, dtype=torch.bfloat16) if copied else None

    def store(self, rows: slice, columns: slice, x: Tensor) -> None:
        """``U[rows, columns] = round(x)``."""
        rounded = round_tf32(x) if self._precision == "tf32" else x.bfloat16()
        self._u[rows, columns] = rounded
        if self._bf16 is not None:
            self._bf16[rows, columns] = rounded

    def subtract_product(self, rows: slice, columns: slice) -> None:
        """``U[rows, columns] -= U[above, rows]^T U[above, columns]``, above all of rows."""
        above, target = slice(0, rows.start), self._u[rows, columns]
        if self._bf16 is not None:
            target.sub_(_multiply_bf16(self._bf16[above, rows].mT, self._bf16[above, columns]))
            return
        with torch_multiplies_in("tf32") if self._cuda else nullcontext():
            target.addmm_(self._u[above, rows].mT, self._u[above, columns], alpha=-1)


def _factor_one(
    u: Tensor, damping: float, precision: str, factor_block: FactorBlock, block: int
) -> Tensor:
    """A becomes U, in place, above the diagonal: u [P, P]; returns the status, []."""
    order, done = len(u), _Rows(u, precision)
    status = torch.zeros((), dtype=torch.int32, device=u.device)
    for start in range(0, order, block):
        end = min(start + block, order)
        rows, right = slice(start, end), slice(end, order)
        if start:
            done.subtract_product(rows, slice(start, order))
        upper, failed = factor_block(u[rows, rows], damping, True)
        u[rows, rows] = upper
        status = torch.where((status == 0) & (failed != 0), failed + start, status)
        if end < order:
            # X^T U_kk = R^T: transposed, so that rows are the solver's columns.
            x = torch.linalg.solve_triangular(upper, u[rows, right].mT, upper=True, left=False)
            done.store(rows, right, x.mT)
    return status


def factor(
    a: Tensor,
    damping: float,
    overwrite: bool,
    precision: str,
    factor_block: FactorBlock,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The upper factor of ``A + lam I``, float32, and a status per matrix; nothing is waited for.

    Matrices of a batch come one after the other.

    Args:
        a: [..., P, P], float32 or float64 (of which the float32 copy is factored).
        overwrite: the factor takes a's memory, if a is float32 and contiguous.
        precision: "tf32" or "bf16". block: rows at a time, :data:`BLOCK` if None.
        factor_block: :func:`imu_fast.solvers.cholesky.lapack.factor`, or its like, of a diagonal
            block, float32.

    Returns:
        As :func:`imu_fast.solvers.cholesky.lapack.factor`.
    """
    out = a.to(torch.float32, copy=not overwrite, memory_format=torch.contiguous_format)
    out = out.contiguous()
    order = a.shape[-1]
    # A global TF32 must not reach the triangular solves: the bound has them in float32.
    guard = torch_multiplies_in("ieee") if _on_matrix_units(a) else nullcontext()
    with guard:
        statuses = [
            _factor_one(u, damping, precision, factor_block, block or BLOCK)
            for u in out.view(-1, order, order)
        ]
    status = torch.stack(statuses).view(a.shape[:-2])
    return out, settle(out, status)
