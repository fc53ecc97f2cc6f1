"""Exact influence beside public libraries doing the same job, on a head of n=2,000, d=128, C=10.

From tensors to scores, one thread, for three users: influence of every training sample on one
query; on 200 queries; and self-influence of every training sample. Without curvature ("gradient
products") and with the exact one. Floor: the dense alternatives are counted in
``imu_fast.curvature.ggn.costs``. ``pip install dattri pyDVL captum`` for the peers; those absent
are skipped. Ours is certified: its relative residual, in float64, is at most 1e-6; the peers' is
whatever float32 leaves.
"""

from __future__ import annotations

import peers
import pytest
import torch
from problems import random_problem
from torch import nn

import imu_fast as imu

N, D, CLASSES, QUERIES, LAM = 2000, 128, 10, 200, 1e-2
# Peers that take one conjugate gradient per query get this many queries of the 200; their time per
# pair is the same.
FEW = 10
SLOW = ("dattri CG", "pyDVL Cg")


@pytest.fixture(scope="module")
def problem():
    """Features of ten overlapping clusters and a head trained on them."""
    torch.manual_seed(0)
    centres = torch.randn(CLASSES, D) / D**0.25
    y = torch.randint(CLASSES, (N + QUERIES,))
    x = (centres[y] + torch.randn(N + QUERIES, D)).relu()
    head = nn.Linear(D, CLASSES)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.05, momentum=0.9)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(x[:N]), y[:N]).backward()
        optimizer.step()
    return head, (x[:N], y[:N]), (x[N:], y[N:])


def factors(head, samples):
    x, y = samples
    return imu.GradientFactors.from_head(x, head.weight, head.bias, y)


def of(name, damping):
    """The identity has nothing to damp."""
    return imu.Identity() if name == "identity" else imu.GGN(damping=damping)


def pairs(name):
    return lambda head, train, queries, damping: (
        -imu.pairwise_influence(
            factors(head, train), factors(head, queries), curvature=of(name, damping)
        )
    )


def own(name):
    return lambda head, train, queries, damping: imu.self_influence(
        factors(head, train), curvature=of(name, damping)
    )


# Group: what ours is, the peers that do the same, and the number of queries (0: self-influence).
GROUPS = {
    "exact, 1 query": (pairs("ggn"), peers.EXACT, 1),
    "exact, 200 queries": (pairs("ggn"), peers.EXACT, QUERIES),
    "exact, self-influence": (own("ggn"), peers.EXACT_SELF, 0),
    "gradient products, 1 query": (pairs("identity"), peers.GRADIENT_PRODUCTS, 1),
    "gradient products, 200 queries": (pairs("identity"), peers.GRADIENT_PRODUCTS, QUERIES),
    "gradient norms": (own("identity"), peers.GRADIENT_NORMS, 0),
}
CASES = [(group, role) for group in GROUPS for role in ("imu_fast", *GROUPS[group][1])]


@pytest.mark.parametrize("group, role", CASES, ids=str)
def test_influence(benchmark, problem, group, role):
    ours, theirs, many = GROUPS[group]
    head, train, (x, y) = problem
    count = min(many, FEW) if role in SLOW else many
    arguments = head, train, (x[:count], y[:count]), LAM
    function = ours if role == "imu_fast" else theirs[role]
    try:
        found = function(*arguments)
    except ImportError as error:
        pytest.skip(str(error))
    if role != "imu_fast":
        # No timing on a red gate. Sign and scale are each library's own; CG's tolerances differ.
        both = torch.stack([found.flatten(), ours(*arguments).flatten()])
        correlation = float(torch.corrcoef(both)[0, 1])
        assert abs(correlation) > 0.999, f"{role} computes something else: {correlation:.4f}"
    benchmark.group = group
    # Per pair, so that the table compares 10 queries with 200.
    benchmark.extra_info.update(role=role, samples=N * max(1, count), dtype="float32")
    exact = theirs is peers.EXACT or theirs is peers.EXACT_SELF
    slow = exact and role not in ("imu_fast", "closed form")
    rounds = 2 if slow or role.endswith("batches of 1") else 15
    benchmark.pedantic(lambda: function(*arguments), rounds=rounds, iterations=1)


@pytest.mark.parametrize("damping", [1e-2, 1e-4])
@pytest.mark.parametrize("relu", [False, True], ids=["normal", "relu"])
def test_scores_of_a_large_head(benchmark, relu, damping):
    """n=2,000, d=512, C=100: a dense Hessian would be 10 GB. Residual recomputed in float64."""
    large = random_problem(2000, 512, 100, relu=relu).factors
    target = large.mean_gradient()

    def solve():
        fitted = imu.fit("ggn", large, damping=damping)
        fitted.solve(target)
        return fitted

    benchmark.group = f"large head, damping {damping:g}"
    benchmark.extra_info.update(role="imu_fast", samples=2000, dtype="float32")
    fitted = benchmark.pedantic(solve, rounds=5, iterations=1, warmup_rounds=1)
    benchmark.extra_info.update(iterations=fitted.iterations, residual=fitted.residual)
    assert fitted.residual <= 1e-6
