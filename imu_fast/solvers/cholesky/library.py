"""The damped Cholesky solve as operators of torch.library, which autograd, vmap and compilers know.

    X = (A + lam I)^-1 B,   G = (A + lam I)^-1 dX
    dB = G,   dA = -(G X^T + X G^T) / 2,   dlam = -sum(G * X)

``factor`` has no derivative, and none is missing: ``apply`` is differentiated as a function of A,
lam and B. G is one more ``apply``, so every order of derivatives uses the factor that there is.

Operands have one batch, and right-hand sides are columns: :mod:`imu_fast.solvers.cholesky.solve`
broadcasts. Each operator's body is a plain function too, for who needs no derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imu_fast.errors import InputError, is_finite
from imu_fast.solvers.cholesky import cholesky
from imu_fast.solvers.cholesky.cholesky import (
    DampedCholesky,
    check_finite,
    factor_plain,
    raise_singular,
)


def factored(a: Tensor, damping: Tensor, check: bool) -> Tensor:
    """``A + lam I = U^T U``: [..., P, P] in new memory, whose strict lower triangle is not used.

    Args:
        a: [..., P, P]. damping: [...], of A's dtype and batch.
        check: False reads nothing back: where a matrix fails, all that is solved with U is NaN.

    Raises:
        InputError: A or lam is not finite, or lam negative.
        SingularMatrixError: a matrix is not positive definite.
    """
    out = a.clone(memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    out.diagonal(dim1=-2, dim2=-1).add_(damping[..., None])
    upper, status = factor_plain(out, 0.0, True)
    # A damping that is not finite fails as a pivot.
    if check and bool(((status != 0) | (damping < 0)).any()):
        usable = torch.isfinite(damping) & (damping >= 0)
        if not bool(usable.all()):
            first = int(torch.nonzero(~usable.flatten())[0])
            raise InputError(
                f"damping={float(damping.flatten()[first])!r} of matrix {first} must be finite "
                "and >= 0"
            )
        check_finite("A", a)
        raise_singular(a, damping, status)
    return upper


def applied(factor: Tensor, b: Tensor, check: bool) -> Tensor:
    """``(U^T U)^-1 B``, columns one after the other in new memory; U, B [..., P, P], [..., P, m].

    Raises:
        InputError: check, and B is not finite.
    """
    if not b.numel():
        return torch.empty_like(b.mT, memory_format=torch.contiguous_format).mT
    solver = DampedCholesky(factor, 0.0, cholesky.backend_of(factor), factor.dtype)
    x = solver.solve_columns(b).mT.contiguous().mT
    if check and not is_finite(x):
        check_finite("b", b)
    return x


@torch.library.custom_op("imu_fast::damped_cholesky_factor", mutates_args=())
def factor(a: Tensor, damping: Tensor, check: bool) -> Tensor:
    """:func:`factored`."""
    return factored(a, damping, check)


@torch.library.custom_op("imu_fast::damped_cholesky_apply", mutates_args=())
def apply(a: Tensor, damping: Tensor, factor: Tensor, b: Tensor, check: bool) -> Tensor:
    """:func:`applied`, as a function of A, lam and B."""
    return applied(factor, b, check)


@factor.register_fake
def _(a: Tensor, damping: Tensor, check: bool) -> Tensor:
    return torch.empty_like(a, memory_format=torch.contiguous_format)


@apply.register_fake
def _(a: Tensor, damping: Tensor, factor: Tensor, b: Tensor, check: bool) -> Tensor:
    return torch.empty_like(b.mT, memory_format=torch.contiguous_format).mT


class _Transformed(torch.autograd.Function):
    """:func:`apply` for transforms of torch.func, which find no operator's own derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, damping: Tensor, factor: Tensor, b: Tensor, check: bool) -> Tensor:
        return apply(a, damping, factor, b, check)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        # A compiler may take operands that a transform wrapped for ones that need no gradient.
        return _gradients(ctx, dx, (True, True))


def differentiable(a: Tensor, damping: Tensor, factor: Tensor, b: Tensor, check: bool) -> Tensor:
    """:func:`apply`, whoever asks for derivatives."""
    if torch._C._are_functorch_transforms_active():
        out: Tensor = _Transformed.apply(a, damping, factor, b, check)
        return out
    return apply(a, damping, factor, b, check)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, damping, factor, _, _ = inputs
    ctx.save_for_backward(a, damping, factor, output)


def _gradients(ctx: Any, dx: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    a, damping, factor, x = ctx.saved_tensors
    g = differentiable(a, damping, factor, dx, False)
    da = ddamping = None
    if wanted[0]:
        with torch.autocast(x.device.type, enabled=False):
            product = g @ x.mT
        da = (product + product.mT) * -0.5
    if wanted[1]:
        ddamping = -(g * x).sum(dim=(-2, -1))
    return da, ddamping, None, g, None


def _backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, dx, ctx.needs_input_grad)


apply.register_autograd(_backward, setup_context=_save)


def _in_front(size: int, tensors: tuple[Tensor, ...], dims: tuple[int | None, ...]) -> list[Tensor]:
    return [
        t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, dims, strict=True)
    ]


@factor.register_vmap
def _(info: Any, dims: Any, a: Tensor, damping: Tensor, check: bool) -> tuple[Tensor, int]:
    a, damping = _in_front(info.batch_size, (a, damping), dims[:2])
    return factor(a, damping, check), 0


@apply.register_vmap
def _(
    info: Any, dims: Any, a: Tensor, damping: Tensor, factor: Tensor, b: Tensor, check: bool
) -> tuple[Tensor, int]:
    if dims[:3] == (None, None, None):
        # More right-hand sides of the same matrices.
        columns = b.movedim(dims[3], -2)
        x = apply(a, damping, factor, columns.flatten(-2), check)
        return x.unflatten(-1, columns.shape[-2:]).movedim(-2, 0), 0
    operands = _in_front(info.batch_size, (a, damping, factor, b), dims[:4])
    return apply(*operands, check), 0
