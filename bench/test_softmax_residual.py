"""softmax_residual: bound by bytes; a thousand classes, and a vocabulary."""

from __future__ import annotations

import roofline
import suites
import torch
from torch.nn.functional import cross_entropy

from imu_fast import reference
from imu_fast.ops.softmax_residual import softmax_residual


def make(problem):
    n, classes = problem.sizes["N"], problem.sizes["C"]
    return 3 * suites.randn(problem, n, classes), suites.labels(problem, n, classes)


def formula(logits, labels):
    log_p = torch.log_softmax(logits.float(), dim=1)
    one_hot = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    return log_p.exp() - one_hot.float(), -log_p.gather(1, labels[:, None])[:, 0]


def naive(logits, labels):
    """By autograd."""
    z = logits.float().requires_grad_()
    loss = cross_entropy(z, labels, reduction="none")
    return torch.autograd.grad(loss.sum(), z)[0], loss.detach()


SUITE = suites.Suite(
    "softmax_residual",
    make,
    softmax_residual,
    lambda z, y: reference.softmax_residual(z, y, torch.ones(len(z))),
    formula,
    naive,
    lambda z, y: suites.copy_of(z.nbytes + 4 * z.numel(), z.device),
    roofline.softmax_residual,
    small={"N": 19, "C": 37},
)
WIDE = {"N": 4_096, "C": 128_256}


@suites.problems(
    cpu=[{"N": 2_000, "C": 1_000}, {"N": 64, "C": 128_256}],
    cuda=[("bf16", {"N": 50_000, "C": 1_000}), ("bf16", WIDE), ("fp32", WIDE)],
)
def test_softmax_residual(benchmark, problem, role):
    suites.measure(benchmark, SUITE, problem, role)
