"""A conjugate-gradient iteration's vector updates and dot products, m systems in step.

Around each product ``M p`` three launches: ``p.Mp`` in partial sums; the step, whose programs each
finish those sums, move x and r and leave partial sums of ``r.r``; the direction, whose programs
finish those and turn p. A preconditioner adds one, for ``r.z``. No scalar ever visits the host.

Bytes per entry: 8 for the dot product, 24 for the step, 12 for the direction; FLOPs are negligible.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from imu_fast.kernels.specialisation import Specialisation, specialise

# Entries that a program takes at once, and into how many pieces a row is cut at most: every
# program of a row adds all their sums.
BLOCK = 2048
PIECES = 512
NUM_WARPS = 4


@triton.jit
def sum_of_pieces(partial_ptr, j, PIECES: tl.constexpr):
    """The sum of row j of partial_ptr [m, pieces], always in the same order."""
    piece = tl.arange(0, PIECES)
    mask = piece < tl.num_programs(0)
    return tl.sum(
        tl.load(partial_ptr + j * tl.num_programs(0) + piece, mask=mask, other=0.0), axis=0
    )


@triton.jit
def dot_kernel(left_ptr, right_ptr, partial_ptr, P, per_piece, BLOCK: tl.constexpr):
    """One program: one piece of ``left_j . right_j``; [m, P] twice to [m, pieces], float32."""
    piece, j = tl.program_id(0), tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    stop = tl.minimum(P, (piece + 1) * per_piece)
    for start in range(piece * per_piece, stop, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < stop
        left = tl.load(left_ptr + j * P + i, mask=mask, other=0.0)
        total += left * tl.load(right_ptr + j * P + i, mask=mask, other=0.0)
    tl.store(partial_ptr + j * tl.num_programs(0) + piece, tl.sum(total, axis=0))


@triton.jit
def advance_kernel(
    x_ptr,
    r_ptr,
    p_ptr,
    mp_ptr,
    curvature_ptr,
    rho_ptr,
    size_ptr,
    goal_ptr,
    step_ptr,
    partial_ptr,
    P,
    per_piece,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one piece of ``x += step p``, ``r -= step M p`` and of ``r.r``.

    ``step = rho / (p.Mp)``; 0, for good, where the system has converged (``size <= goal``) or the
    curvature ``p.Mp`` is not positive.

    x_ptr, r_ptr, p_ptr, mp_ptr [m, P]; curvature_ptr, partial_ptr [m, pieces]; the others [m].
    """
    piece, j = tl.program_id(0), tl.program_id(1).to(tl.int64)
    curvature = sum_of_pieces(curvature_ptr, j, PIECES)
    moves = (curvature > 0) & (tl.load(size_ptr + j) > tl.load(goal_ptr + j))
    step = tl.where(moves, tl.load(rho_ptr + j) / curvature, 0.0)
    tl.store(step_ptr + j, step, mask=piece == 0)

    total = tl.zeros([BLOCK], tl.float32)
    stop = tl.minimum(P, (piece + 1) * per_piece)
    for start in range(piece * per_piece, stop, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < stop
        i += j * P
        x = tl.load(x_ptr + i, mask=mask, other=0.0)
        p = tl.load(p_ptr + i, mask=mask, other=0.0)
        tl.store(x_ptr + i, x + step * p, mask=mask)
        r = tl.load(r_ptr + i, mask=mask, other=0.0)
        r -= step * tl.load(mp_ptr + i, mask=mask, other=0.0)
        tl.store(r_ptr + i, r, mask=mask)
        total += r * r
    tl.store(partial_ptr + j * tl.num_programs(0) + piece, tl.sum(total, axis=0))


@triton.jit
def turn_kernel(
    p_ptr,
    z_ptr,
    rho_partial_ptr,
    size_partial_ptr,
    step_ptr,
    rho_ptr,
    new_rho_ptr,
    size_ptr,
    P,
    per_piece,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one piece of ``p = z + (r.z / rho) p``; p stays where the step was 0.

    Every program of a row reads rho and one writes the new one, so they are two arrays.

    p_ptr, z_ptr [m, P]; rho_partial_ptr, size_partial_ptr [m, pieces], of r.z and r.r; the others
    [m].
    """
    piece, j = tl.program_id(0), tl.program_id(1).to(tl.int64)
    new_rho = sum_of_pieces(rho_partial_ptr, j, PIECES)
    size = sum_of_pieces(size_partial_ptr, j, PIECES)
    moved = tl.load(step_ptr + j) != 0
    beta = tl.where(moved, new_rho / tl.load(rho_ptr + j), 1.0)
    tl.store(new_rho_ptr + j, new_rho, mask=piece == 0)
    tl.store(size_ptr + j, size, mask=piece == 0)

    stop = tl.where(moved, tl.minimum(P, (piece + 1) * per_piece), 0)
    for start in range(piece * per_piece, stop, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < stop
        i += j * P
        p = tl.load(p_ptr + i, mask=mask, other=0.0)
        z = tl.load(z_ptr + i, mask=mask, other=0.0)
        tl.store(p_ptr + i, z + beta * p, mask=mask)


def _cut(x: torch.Tensor) -> tuple[tuple[int, int], int, int]:
    """The grid (pieces, m), the entries of a row, and those of a piece, for x [m, ...]."""
    P = x[0].numel()
    per_piece = triton.cdiv(triton.cdiv(P, PIECES), BLOCK) * BLOCK
    return (triton.cdiv(P, per_piece), len(x)), P, per_piece


def dots(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Partial sums [m, pieces] float32 of ``left_j . right_j``; both [m, ...], contiguous."""
    grid, P, per_piece = _cut(left)
    partial = torch.empty(grid[::-1], dtype=torch.float32, device=left.device)
    dot_kernel[grid](left, right, partial, P, per_piece, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return partial


def advance(
    x: torch.Tensor,
    r: torch.Tensor,
    p: torch.Tensor,
    mp: torch.Tensor,
    rho: torch.Tensor,
    size: torch.Tensor,
    goal: torch.Tensor,
    step: torch.Tensor,
) -> torch.Tensor:
    """Move x and r [m, ...] in place, write step [m]; returns partial sums of r.r, [m, pieces]."""
    grid, P, per_piece = _cut(x)
    curvature = dots(p, mp)
    partial = torch.empty_like(curvature)
    advance_kernel[grid](
        x, r, p, mp, curvature, rho, size, goal, step, partial, P, per_piece, PIECES=PIECES,
        BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return partial


def turn(
    p: torch.Tensor,
    z: torch.Tensor,
    rho_partial: torch.Tensor,
    size_partial: torch.Tensor,
    step: torch.Tensor,
    rho: torch.Tensor,
    size: torch.Tensor,
) -> torch.Tensor:
    """Turn p [m, ...] and write size [m], in place; returns the new rho [m]."""
    grid, P, per_piece = _cut(p)
    new_rho = torch.empty_like(rho)
    turn_kernel[grid](
        p, z, rho_partial, size_partial, step, rho, new_rho, size, P, per_piece, PIECES=PIECES,
        BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return new_rho


def specialisations() -> Iterator[Specialisation]:
    """The three kernels, each in its one form."""
    for kernel in (dot_kernel, advance_kernel, turn_kernel):
        yield specialise(
            f"conjugate_gradient {kernel.__name__}",
            kernel,
            {arg: "*fp32" for arg in kernel.arg_names if arg.endswith("_ptr")},
            {k: v for k, v in (("PIECES", PIECES), ("BLOCK", BLOCK)) if k in kernel.arg_names},
            {"num_warps": NUM_WARPS},
        )
