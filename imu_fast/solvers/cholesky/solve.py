"""The damped Cholesky solve ``(A + lam I)^-1 B``: broadcast, with derivatives where asked for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imu_fast.errors import (
    InputError,
    check_flag,
    check_positive,
    check_same_device,
    check_tensor,
    is_finite,
)
from imu_fast.solvers.cholesky import library
from imu_fast.solvers.cholesky.cholesky import check_finite, check_matrices, factor_of, solve_once


def damped_cholesky_solve(
    a: Tensor, b: Tensor, damping: float | Tensor, *, check: bool = True
) -> Tensor:
    """``X = (A + lam I)^-1 B``, batched, on the CPU and on CUDA.

    Batches of A, lam and B broadcast. Matrices that share a factor share it: the factor is of A's
    and lam's batch, not of B's.

    Derivatives of every order in A, lam and B use the factor of the forward pass. That in A is
    symmetric, as ``torch.linalg.cholesky``'s is: it is the derivative along symmetric changes,
    both triangles', though only the upper one is read. ``torch.func``'s ``grad``, ``vjp``,
    ``jacrev`` and ``vmap`` take it, in each other too, and ``torch.compile`` and ``torch.export``
    without a graph break (not ``vmap`` of ``grad``, which torch compiles of nothing that has a
    derivative of its own). There is no forward mode: ``torch.func.jvp`` raises.

    Args:
        a: [..., P, P], symmetric, float32 or float64; only its upper triangle is read.
        b: one vector per matrix, [..., P], where b has fewer dimensions than a; columns
            [..., P, m] where it has as many or more. Of a's dtype and device.
        damping: lam >= 0, for all matrices, or a tensor [...] of one for each.
        check: False reads nothing back from the device: the solution of a matrix that is not
            positive definite or not finite is NaN, and so is that for a b which is not finite;
            dampings of a tensor are taken as they are. Under ``torch.compile`` checks are made
            when the compiled code runs, and errors are these; capture in a CUDA graph needs False.

    Returns:
        X, of the batch that A, lam and B broadcast to: [..., P] or [..., P, m].

    Raises:
        InputError: shape, dtype or device does not match; A, lam or B is not finite; lam negative.
        SingularMatrixError: ``A + lam I`` is not positive definite: names the pivot, the smallest
            damping that works, and the matrix, counted in the batch of A and lam (under ``vmap``
            in that of all of them, what is mapped over first).
    """
    check_flag("check", check)
    check_tensor("A", a, "floating", "[..., P, P]")
    check_tensor("b", b, "floating", "[..., P] or [..., P, m]")
    if isinstance(damping, Tensor):
        check_tensor("damping", damping, "real", "[...]")
    check_matrices(a)
    vector = _check_right_hand_side(a, b)
    columns = b.unsqueeze(-1) if vector else b
    if isinstance(damping, Tensor):
        damping = _dampings(a, damping)
    elif torch.compiler.is_compiling():
        # A number that changes is a symbol here: it is checked where the compiled code runs.
        damping = torch.full((), damping, dtype=a.dtype, device=a.device)
    else:
        damping = check_positive("damping", damping, allow_zero=True)
        if columns.shape[:-2] == a.shape[:-2] and a.numel() and not _is_followed(a, b):
            x = _solved(a, columns, damping, check)
            return x.squeeze(-1) if vector else x
        damping = torch.full((), damping, dtype=a.dtype, device=a.device)
    same = a.shape[:-2] == damping.shape == columns.shape[:-2]
    x = (_of_one_batch if same else _broadcast)(a, columns, damping, check)
    return x.squeeze(-1) if vector else x


def _solved(a: Tensor, columns: Tensor, damping: float, check: bool) -> Tensor:
    """Without derivatives, of one damping and one batch, whose factor nobody keeps."""
    a, columns = a.detach(), columns.detach()
    # The one read: a failed factor, and what is not finite in b, show in the solution.
    x, finite = solve_once(a, damping, columns)
    if check and not (x.numel() and (is_finite(x) if finite is None else finite)):
        check_finite("b", columns)
        factor_of(a, damping, overwrite=False, check=True)
    return x


def _broadcast(a: Tensor, columns: Tensor, damping: Tensor, check: bool) -> Tensor:
    """X [*batch, P, m]; axes of the batch along which there is one matrix become columns."""
    order, many = columns.shape[-2:]
    matrices = torch.broadcast_shapes(a.shape[:-2], damping.shape)
    try:
        batch = torch.broadcast_shapes(matrices, columns.shape[:-2])
    except RuntimeError:
        raise InputError(
            f"b's batch {tuple(columns.shape[:-2])} does not broadcast with {tuple(matrices)}, of "
            "A and damping; b is vectors where it has fewer dimensions than A, columns else"
        ) from None
    ahead = (1,) * (len(batch) - len(matrices))
    own = [axis for axis, size in enumerate((*ahead, *matrices)) if size == batch[axis]]
    shared = [axis for axis in range(len(batch)) if axis not in own]
    axes = (*own, len(batch), *shared, len(batch) + 1)
    sizes, beside = [batch[axis] for axis in own], [batch[axis] for axis in shared]
    b = columns.expand(*batch, order, many).permute(axes)
    b = b.reshape(*sizes, order, math.prod(beside) * many)
    a = a.expand(*matrices, order, order).reshape(*sizes, order, order)
    x = _of_one_batch(a, b, damping.expand(matrices).reshape(sizes), check)
    back = sorted(range(len(axes)), key=axes.__getitem__)
    return x.reshape(*sizes, order, *beside, many).permute(back)


def _of_one_batch(a: Tensor, b: Tensor, damping: Tensor, check: bool) -> Tensor:
    """X of operands of one batch, followed by whoever asks."""
    if _is_followed(a, b, damping):
        factor = library.factor(a.detach(), damping.detach(), check)
        return library.differentiable(a, damping, factor, b, check)
    with torch.no_grad():
        return library.applied(library.factored(a, damping, check), b, check)


def _is_followed(*tensors: Tensor) -> bool:
    """Whether autograd, a transform or a compiler follows what is done with these."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors)
        or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


def _check_right_hand_side(a: Tensor, b: Tensor) -> bool:
    """Whether b is vectors, or raise InputError; batches are for broadcasting to check."""
    check_same_device("A", a, "b", b)
    if b.dtype != a.dtype:
        raise InputError(f"b is {b.dtype}, A is {a.dtype}; convert one with .to()")
    vector, order = 0 < b.dim() < a.dim(), a.shape[-1]
    if not b.dim() or b.shape[-1 if vector else -2] != order:
        raise InputError(
            f"b has shape {tuple(b.shape)}; expected {(*a.shape[:-2], order)}, or with a last "
            "dimension of right-hand sides"
        )
    return vector


def _dampings(a: Tensor, damping: Tensor) -> Tensor:
    """In a's dtype; a single one on the CPU may be anybody's."""
    if damping.dtype == torch.bool or damping.is_complex():
        raise InputError(f"damping is {damping.dtype}; pass numbers >= 0")
    if damping.dim():
        check_same_device("A", a, "damping", damping)
    try:
        torch.broadcast_shapes(a.shape[:-2], damping.shape)
    except RuntimeError:
        raise InputError(
            f"damping has shape {tuple(damping.shape)}, which does not broadcast with A's batch "
            f"{tuple(a.shape[:-2])}"
        ) from None
    return damping.to(device=a.device, dtype=a.dtype)
