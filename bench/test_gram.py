"""gram: the elementwise product of two Gram matrices, neither stored.

The counted FLOPs, and the bare work's, are those of one half, which symmetry allows.
"""

from __future__ import annotations

import roofline
import suites
import torch

from imu_fast import reference
from imu_fast.ops.gram import gram


def formula(delta, act, offsets, has_bias):
    act = reference.augment(act, has_bias)
    return (delta @ delta.T) * (act @ act.T)


def naive(delta, act, offsets, has_bias):
    """From the stored gradients."""
    g = torch.einsum("nc,nd->ncd", delta, reference.augment(act, has_bias)).flatten(1)
    return g @ g.T


def bare(delta, act, *_):
    """The same strips of rows, right of the diagonal."""
    strips = [(x[i : i + 256], x[i:].T) for x in (delta, act) for i in range(0, len(x), 256)]
    outs = [left.new_empty(len(left), right.shape[1]) for left, right in strips]
    return lambda: [torch.matmul(*strip, out=o) for strip, o in zip(strips, outs, strict=True)]


SUITE = suites.Suite(
    "gram",
    suites.image_factors,
    gram,
    reference.gram,
    formula,
    naive,
    bare,
    roofline.gram,
    small={"N": 19, "C": 7, "d": 13},
    few={"N": 64},
    samples=lambda sizes: sizes["N"] ** 2,
)
LARGE = {"N": 16_384, "C": 1_000, "d": 2_048}


@suites.problems(
    cpu=[{"N": 1_500, "C": 100, "d": 512}],
    cuda=[(kind, LARGE) for kind in ("bf16", "tf32", "fp32")],
)
def test_gram(benchmark, problem, role):
    suites.measure(benchmark, SUITE, problem, role)
