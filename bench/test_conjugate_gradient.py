"""conjugate_gradient: an iteration's vector updates and dot products, without the product M p.

The iteration is the first one, of a diagonal matrix, from a state made anew every round.
"""

from __future__ import annotations

import roofline
import suites
import torch

from imu_fast import reference
from imu_fast.ops.conjugate_gradient import Iterates, iterate, start


def make(problem):
    """The seven tensors of the state at x = 0, ``M p``, and M's diagonal; vectors [m, C, D]."""
    m, classes, d = (problem.sizes[name] for name in ("m", "C", "d"))
    v = suites.randn(problem, m, classes, d + 1)
    diagonal = 1 + suites.randn(problem, classes, d + 1).square()
    return *start(v, v, tolerance=0.0), diagonal * v, diagonal


def ours(*operands):
    *state, mp, _ = operands
    return iterate(Iterates(*state), mp)[:3]


def truth(*operands):
    """One system after the other: x after an iteration, then r and p by their definitions."""
    v, diagonal = operands[1].double(), operands[-1].double()
    matrix, eye = torch.diag(diagonal.flatten()), torch.eye(diagonal.numel())
    x = [reference.conjugate_gradient(matrix, one.flatten(), 1, eye).view_as(one) for one in v]
    x = torch.stack(x)
    r = v - diagonal * x
    turn = r.square().sum((1, 2), keepdim=True) / v.square().sum((1, 2), keepdim=True)
    return x, r, r + turn * v


def formula(x, r, p, rho, size, goal, step, mp, diagonal):
    axes = (1, 2)
    curvature = (p * mp).sum(axes, keepdim=True)
    step = torch.where((curvature > 0) & (size > goal), rho / curvature, 0.0)
    x, r = x + step * p, r - step * mp
    size = (r * r).sum(axes, keepdim=True)
    moved = step != 0
    return x, r, torch.where(moved, r, 0.0) + torch.where(moved, size / rho, 1.0) * p


def naive(x, r, p, rho, size, goal, step, mp, diagonal):
    """One system after the other, its scalars on the host."""
    for j in range(len(x)):
        step = float(rho[j]) / float((p[j] * mp[j]).sum())
        x[j] += step * p[j]
        r[j] -= step * mp[j]
        p[j] = r[j] + float(r[j].square().sum()) / float(rho[j]) * p[j]
    return x, r, p


SUITE = suites.Suite(
    "conjugate_gradient",
    make,
    ours,
    truth,
    formula,
    naive,
    lambda x, *_: suites.copy_of(44 * x.numel(), x.device),
    roofline.conjugate_gradient,
    small={"C": 3, "d": 6},
    samples=lambda sizes: sizes["m"],
    in_place=True,
    calls=10,
)
SIZES = [{"C": 1_000, "d": 2_048, "m": m} for m in (1, 8)]


@suites.problems(cpu=SIZES[:1], cuda=[("fp32", sizes) for sizes in SIZES])
def test_conjugate_gradient(benchmark, problem, role):
    suites.measure(benchmark, SUITE, problem, role)
