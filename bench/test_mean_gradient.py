"""mean_gradient: one matrix product, torch's own on every backend, straight into its result."""

from __future__ import annotations

import roofline
import suites
import torch

from imu_fast import reference
from imu_fast.ops.mean_gradient import mean_gradient


def formula(delta, act, offsets, has_bias):
    n = len(offsets) - 1
    return torch.cat([delta.T @ act, delta.sum(dim=0)[:, None]], dim=1) / n


def naive(delta, act, offsets, has_bias):
    return torch.einsum("nc,nd->cd", delta, reference.augment(act, has_bias)) / len(delta)


SUITE = suites.Suite(
    "mean_gradient",
    suites.image_factors,
    mean_gradient,
    reference.mean_gradient,
    formula,
    naive,
    suites.gradient_product,
    roofline.mean_gradient,
    small={"N": 19, "C": 7, "d": 13},
)


@suites.problems(
    cpu=[suites.GOAL],
    cuda=[(kind, roofline.IMAGES) for kind in ("bf16", "tf32", "fp32")],
)
def test_mean_gradient(benchmark, problem, role):
    suites.measure(benchmark, SUITE, problem, role)
