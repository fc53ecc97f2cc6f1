"""The vector updates and dot products of conjugate gradient, m systems in step, no scalar on the
host (Hestenes, Stiefel 1952).

    step = rho / p.Mp,   x += step p,   r -= step M p,   z = about M^-1 r,   p = z + (r.z / rho) p

A system that has converged, or whose curvature ``p.Mp`` is not positive (rounding has used up the
precision of this dtype), stands still from then on, so the host need not look at every iteration.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imu_fast.ops.extension import SUFFIX, loaded_for, threads_for, written
from imu_fast.ops.operation import kernel_dtypes, operation

# Iterations between two looks at who still moves, where a look waits for a device: dearer than a
# few iterations too many.
LOOK_EVERY = 8
# Elements of a row at once on a CPU, where vecdot stores all products before it sums them: memory
# that is new to the process costs more than the products.
_PIECE = 1 << 17


class Iterates(NamedTuple):
    """The state of m iterations.

    x, r, p: [m, ...], solution, residual and direction. rho, size [m, 1 ...]: ``r.z`` and
    ``r.r``. goal: a system has converged where ``size <= goal``. step: the last, 0 where a system
    stands still.
    """

    x: Tensor
    r: Tensor
    p: Tensor
    rho: Tensor
    size: Tensor
    goal: Tensor
    step: Tensor

    @property
    def moving(self) -> Tensor:
        """Which systems go on: [m], bool."""
        return ((self.size > self.goal) & (self.step != 0)).flatten()

    def keep(self, rows: Tensor) -> Iterates:
        """The systems ``rows`` (a mask or indices) alone."""
        return Iterates(*(tensor[rows] for tensor in self))


def iterations_between_looks(device: torch.device) -> int:
    """1 on a CPU, where a look is free and leaves out at once what has ended."""
    return 1 if device.type == "cpu" else LOOK_EVERY


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """``a_j . b_j``: [m, 1 ...], to be broadcast over rows."""
    column = (-1,) + (1,) * (a.dim() - 1)
    a, b = a.flatten(1), b.flatten(1)
    if a.device.type != "cpu" or a.shape[1] <= _PIECE:
        return torch.linalg.vecdot(a, b).view(column)
    pieces = zip(a.split(_PIECE, dim=1), b.split(_PIECE, dim=1), strict=True)
    return torch.stack([torch.linalg.vecdot(*piece) for piece in pieces]).sum(dim=0).view(column)


def start(v: Tensor, z: Tensor, tolerance: float) -> Iterates:
    """The state at x = 0, where r = v.

    Args:
        v: [m, ...], right-hand sides. z: ``M^-1 v``, about, or v itself.
        tolerance: on the relative residual of each.
    """
    size = _dot(v, v)
    goal = tolerance**2 * size
    return Iterates(
        torch.zeros_like(v, memory_format=torch.contiguous_format),
        v.clone(memory_format=torch.contiguous_format),
        z.clone(memory_format=torch.contiguous_format),
        _dot(v, z),
        size,
        goal,
        torch.ones_like(size),
    )


Precondition = Callable[[Tensor], Tensor]


def _kernel_limits(state: Iterates, mp: Tensor, precondition: Precondition | None = None) -> str:
    if state.x.dtype in (torch.bfloat16, torch.float16):
        return f"the vectors are {state.x.dtype}; the kernels take float32"
    return kernel_dtypes(state.x)


def _launch(state: Iterates, mp: Tensor, precondition: Precondition | None = None) -> Iterates:
    from imu_fast.kernels import conjugate_gradient as kernel

    x, r, p, rho, size, goal, _ = state
    written(x, r, p)
    new_size, step = torch.empty_like(size), torch.empty_like(rho)
    sizes = kernel.advance(x, r, p, mp.contiguous(), rho, size, goal, step)
    z = r if precondition is None else precondition(r).contiguous()
    rhos = sizes if precondition is None else kernel.dots(r, z)
    rho = kernel.turn(p, z, rhos, sizes, step, rho, new_size)
    return Iterates(x, r, p, rho, new_size, goal, step)


def _by_definition(
    reference: ModuleType, state: Iterates, mp: Tensor, precondition: Precondition | None = None
) -> Iterates:
    def inverse(r: Tensor) -> Tensor:
        return r if precondition is None else precondition(r.to(state.x.dtype)).double()

    iteration = reference.conjugate_gradient_iteration
    x, r, p, rho, size, goal, _ = state
    *vectors, rho, size, step = iteration(x, r, p, mp, size > goal, inverse)
    for old, new in zip((x, r, p), vectors, strict=True):
        old.copy_(new)
    rho, size, step = (t.to(x.dtype) for t in (rho, size, step))
    return Iterates(x, r, p, rho, size, goal, step)


def _extension(state: Iterates, mp: Tensor) -> Any:
    """The compiled module, for vectors of one dtype with nothing between them; else None."""
    found = loaded_for(state.x)
    if found is None or mp.dtype != state.x.dtype or not state.x.numel():
        return None
    x, r, p = state[:3]
    return found if x.is_contiguous() and r.is_contiguous() and p.is_contiguous() else None


def _by_extension(
    found: Any, state: Iterates, mp: Tensor, precondition: Precondition | None
) -> Iterates:
    x, r, p, rho, size, goal, _ = state
    written(x, r, p)
    rho, size, step = rho.clone(), size.clone(), torch.empty_like(size)
    many, kind, numbers = x.shape[0], SUFFIX[x.dtype], x.numel()
    sizes, threads = (many, numbers // many), threads_for(numbers)
    vectors = (x, r, p, mp.contiguous(), rho, size, goal, step)
    addresses = [tensor.data_ptr() for tensor in vectors]
    getattr(found, f"advance_{kind}")(*addresses, *sizes, precondition is None, threads)
    if precondition is not None:
        z = precondition(r).to(r.dtype).contiguous()
        addresses = [tensor.data_ptr() for tensor in (r, p, z, rho, step)]
        getattr(found, f"turn_{kind}")(*addresses, *sizes, threads)
    return Iterates(x, r, p, rho, size, goal, step)


@operation(
    name="conjugate_gradient_iteration",
    reference=_by_definition,
    kernel=_launch,
    limits=_kernel_limits,
)
def iterate(state: Iterates, mp: Tensor, precondition: Precondition | None = None) -> Iterates:
    """One iteration after its product; x, r and p change in place.

    On a CPU in three passes over memory by ``imu_fast._C``, whose dot products are of 4,096 numbers
    in the vectors' dtype, and of these in float64: their bits differ from those of PyTorch's, not
    with the number of threads.

    Args:
        state: of m systems, as :func:`start` makes it; its x, r and p are changed.
        mp: ``M p``, [m, ...]. precondition: ``r -> about M^-1 r``, symmetric positive definite.

    Returns:
        The state after it, with x, r and p in the memory they had.
    """
    found = _extension(state, mp)
    if found is not None:
        return _by_extension(found, state, mp, precondition)
    x, r, p, rho, size, goal, _ = state
    curvature = _dot(p, mp)
    step = torch.where((curvature > 0) & (size > goal), rho / curvature, 0.0)
    x.addcmul_(p, step)
    r.addcmul_(mp, step, value=-1.0)
    z = r if precondition is None else precondition(r)
    new_rho = _dot(r, z)
    size = new_rho if precondition is None else _dot(r, r)
    moved = step != 0
    p.mul_(torch.where(moved, new_rho / rho, 1.0)).addcmul_(z, moved.to(z.dtype))
    return Iterates(x, r, p, new_rho, size, goal, step)
