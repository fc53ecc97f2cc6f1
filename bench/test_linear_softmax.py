"""linear_softmax: features and weight of a large vocabulary to scores, no ``[N, C]`` array stored.

The bare work is the five products with all classes at once.
"""

from __future__ import annotations

import roofline
import suites
import torch

import imu_fast as imu
from imu_fast import reference

LAM = 1e-2


def make(problem):
    """The head's operands and offsets of one token per sample."""
    n, classes, d = (problem.sizes[name] for name in ("N", "C", "d"))
    features, weight = suites.randn(problem, n, d), suites.randn(problem, classes, d) / d**0.5
    y = suites.labels(problem, n, classes)
    return features, weight, suites.randn(problem, classes), y, torch.arange(n + 1)


def ours(features, weight, bias, labels, offsets):
    factors = imu.GradientFactors.from_head(features, weight, bias, labels, offsets, implicit=True)
    return imu.influence_scores(factors, damping=LAM), factors.known.loss


def truth(features, weight, bias, labels, offsets):
    head = features, weight, bias, labels, None
    return reference.linear_softmax_scores(head, offsets, LAM, "add")


def formula(features, weight, bias, labels, offsets):
    """With delta, Fisher diagonal and mean gradient stored whole."""
    features = features.float()
    log_p = torch.log_softmax(features @ weight.float().T + bias.float(), dim=1)
    one_hot = torch.arange(len(weight), device=weight.device) == labels[:, None]
    delta, act = log_p.exp() - one_hot.float(), reference.augment(features, True)
    n = len(features)
    x = (delta.T @ act / n) / (delta.square().T @ act.square() / n + LAM)
    return -((delta @ x) * act).sum(dim=1), -log_p.gather(1, labels[:, None])[:, 0]


def bare(features, weight, *_):
    wide = torch.float32
    n, (classes, d) = len(features), weight.shape
    z = torch.empty(n, classes, dtype=features.dtype, device=features.device)
    delta, act = z.to(wide), features.to(wide)
    x, scores = torch.empty(classes, d, dtype=wide, device=z.device), torch.empty_like(act)

    def products():
        for _ in range(2):
            torch.matmul(features, weight.T, out=z)
            torch.matmul(delta.T, act, out=x)
        torch.matmul(delta, x, out=scores)

    return products


SUITE = suites.Suite(
    "linear_softmax",
    make,
    ours,
    truth,
    formula,
    formula,
    bare,
    roofline.linear_softmax_scores,
    small={"N": 19, "C": 37, "d": 13},
)
VOCABULARY = {"N": 8_192, "C": 128_256, "d": 4_096}


@suites.problems(
    cpu=[{"N": 512, "C": 8_000, "d": 256}],
    cuda=[("bf16", VOCABULARY), ("tf32", VOCABULARY)],
)
def test_linear_softmax(benchmark, problem, role):
    suites.measure(benchmark, SUITE, problem, role)
