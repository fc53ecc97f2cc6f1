"""fisher_diagonal: of images one matrix product of squares; of ragged tokens squares of sums."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import roofline
import suites
import torch

from imu_fast import reference
from imu_fast.ops.fisher_diagonal import fisher_diagonal


def formula(delta, act, offsets, has_bias):
    d2, a2 = delta.square(), act.square()
    return torch.cat([d2.T @ a2, d2.sum(dim=0)[:, None]], dim=1) / len(delta)


def naive(delta, act, offsets, has_bias):
    """One sample's gradient after the other."""
    act, total = reference.augment(act, has_bias), 0
    for start, stop in pairwise(offsets.tolist()):
        total = total + (delta[start:stop].T @ act[start:stop]).square()
    return total / (len(offsets) - 1)


IMAGES = suites.Suite(
    "fisher_diagonal",
    suites.image_factors,
    fisher_diagonal,
    reference.fisher_diagonal,
    formula,
    naive,
    suites.gradient_product,
    roofline.fisher_diagonal,
    small={"N": 19, "C": 7, "d": 13},
    few={"N": 32},
)


def make_tokens(problem):
    """Factors of ragged samples, and [n, T] the rows of each, N where a sample is shorter."""
    delta, act, _, has_bias = suites.image_factors(problem)
    offsets = suites.cut(len(delta), problem.sizes["n"])
    rows = offsets[:-1, None] + torch.arange(int(offsets.diff().max()))
    rows = torch.where(rows < offsets[1:, None], rows, len(delta)).to(delta.device)
    return delta, act, offsets, has_bias, rows


def padded_formula(delta, act, offsets, has_bias, rows):
    """All samples' gradients at once, from tokens padded to the longest sample."""
    act = reference.augment(act, has_bias)
    d, a = (torch.cat([x, torch.zeros_like(x[:1])])[rows] for x in (delta, act))
    return (d.transpose(1, 2) @ a).square().mean(dim=0)


TOKENS = replace(
    IMAGES,
    operation="fisher_diagonal of tokens",
    make=make_tokens,
    ours=lambda *operands: fisher_diagonal(*operands[:-1]),
    reference=lambda *operands: reference.fisher_diagonal(*operands[:-1]),
    formula=padded_formula,
    naive=lambda *operands: naive(*operands[:-1]),
    small={"N": 19, "C": 7, "d": 13, "n": 5},
    few={},
)


@suites.problems(
    cpu=[suites.GOAL],
    cuda=[(kind, roofline.IMAGES) for kind in ("bf16", "tf32", "fp32")],
)
def test_fisher_diagonal(benchmark, problem, role):
    suites.measure(benchmark, IMAGES, problem, role)


@suites.problems(
    cpu=[{"N": 2_048, "C": 100, "d": 256, "n": 64}],
    cuda=[(kind, {**roofline.TOKENS, "n": 512}) for kind in ("bf16", "tf32")],
)
def test_fisher_diagonal_of_tokens(benchmark, problem, role):
    suites.measure(benchmark, TOKENS, problem, role)
