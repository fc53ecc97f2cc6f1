"""bilinear_scores: one matrix product per X whose result is not stored."""

from __future__ import annotations

import roofline
import suites
import torch

from imu_fast import reference
from imu_fast.ops.bilinear_scores import bilinear_scores


def make(problem):
    delta, act, offsets, has_bias = suites.image_factors(problem)
    m = problem.sizes.get("m", 1)
    x = suites.randn(problem, m, delta.shape[1], act.shape[1] + has_bias)
    return delta, act, x[0] if m == 1 else x, offsets, has_bias


def formula(delta, act, x, offsets, has_bias):
    act = reference.augment(act, has_bias)
    if x.dim() == 2:
        return ((delta @ x) * act).sum(dim=1)
    u = (act @ x.flatten(0, 1).T).view(len(act), len(x), -1)
    return (u * delta[:, None]).sum(dim=2)


def naive(delta, act, x, offsets, has_bias):
    act = reference.augment(act, has_bias)
    equation = "nc,cd,nd->n" if x.dim() == 2 else "nc,mcd,nd->nm"
    return torch.einsum(equation, delta, x, act)


def bare(delta, act, x, *_):
    """``delta @ X`` of one; of several ``a @ X^T``, the same FLOPs for a narrower result."""
    x = x[..., : act.shape[1]].contiguous()
    left, right = (delta, x) if x.dim() == 2 else (act, x.flatten(0, 1).T)
    out = left.new_empty(len(left), right.shape[1])
    return lambda: torch.matmul(left, right, out=out)


SUITE = suites.Suite(
    "bilinear_scores",
    make,
    bilinear_scores,
    reference.bilinear_scores,
    formula,
    naive,
    bare,
    roofline.bilinear_scores,
    small={"N": 19, "C": 7, "d": 13},
)


@suites.problems(
    cpu=[suites.GOAL, {"N": 1_000, "C": 100, "d": 512, "m": 8}],
    cuda=[
        *((kind, roofline.IMAGES) for kind in ("bf16", "tf32", "fp32")),
        ("bf16", {**roofline.IMAGES, "m": 8}),
    ],
)
def test_bilinear_scores(benchmark, problem, role):
    suites.measure(benchmark, SUITE, problem, role)
