"""Exact influence beside public libraries doing the same job, on a head of n=2,000, d=128, C=10.

Influence of every training sample on one query, from tensors to scores, one thread. Floor: the
products and the dense alternatives are counted in ``imu_fast.curvature.ggn.solver_costs``.
``pip install dattri pyDVL captum`` for the peers; those absent are skipped.
"""

from __future__ import annotations

import peers
import pytest
import torch
from torch import nn

import imu_fast as imu
from imu_fast.curvature.ggn import solver_costs

N, D, CLASSES, QUERIES, LAM = 2000, 128, 10, 1, 1e-2


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


def ours(head, train, queries, damping=LAM, curvature="ggn"):
    sets = [
        imu.GradientFactors.from_head(x, head.weight, head.bias, y) for x, y in (train, queries)
    ]
    return -imu.pairwise_influence(*sets, curvature=curvature, damping=damping)


def run(benchmark, group, role, function, rounds):
    benchmark.group = group
    benchmark.extra_info.update(role=role, samples=N, dtype="float32")
    if role == "imu_fast" and group == "exact":
        benchmark.extra_info["flops"] = min(solver_costs(N, CLASSES, D + 1, QUERIES).values())
    return benchmark.pedantic(function, rounds=rounds, iterations=1, warmup_rounds=1)


def test_exact_imu_fast(benchmark, problem):
    run(benchmark, "exact", "imu_fast", lambda: ours(*problem), rounds=30)


@pytest.mark.parametrize("name", peers.EXACT)
def test_exact(benchmark, problem, name):
    try:
        theirs = peers.EXACT[name](*problem, LAM)
    except ImportError as error:
        pytest.skip(str(error))
    truth = ours(*problem)
    # No timing on a red gate. Sign and scale are each library's own; CG's tolerances differ.
    correlation = float(torch.corrcoef(torch.stack([theirs.flatten(), truth.flatten()]))[0, 1])
    assert abs(correlation) > 0.999, f"{name} computes something else: {correlation:.4f}"
    run(benchmark, "exact", name, lambda: peers.EXACT[name](*problem, LAM), rounds=3)


def test_products_imu_fast(benchmark, problem):
    call = lambda: ours(*problem, curvature="identity")  # noqa: E731
    run(benchmark, "gradient products", "imu_fast", call, rounds=30)


@pytest.mark.parametrize("name", peers.GRADIENT_PRODUCTS)
def test_products(benchmark, problem, name):
    try:
        theirs = peers.GRADIENT_PRODUCTS[name](*problem, LAM)
    except ImportError as error:
        pytest.skip(str(error))
    truth = ours(*problem, curvature="identity")
    correlation = float(torch.corrcoef(torch.stack([theirs.flatten(), truth.flatten()]))[0, 1])
    assert abs(correlation) > 0.999, f"{name} computes something else: {correlation:.4f}"
    call = lambda: peers.GRADIENT_PRODUCTS[name](*problem, LAM)  # noqa: E731
    run(benchmark, "gradient products", name, call, rounds=3)


@pytest.mark.parametrize("damping", [1e-2, 1e-4])
@pytest.mark.parametrize("relu", [False, True], ids=["normal", "relu"])
def test_scores_of_a_large_head(benchmark, relu, damping):
    """n=2,000, d=512, C=100: a dense Hessian would be 10 GB. Residual recomputed in float64."""
    from problems import random_problem

    from imu_fast import curvature

    factors = random_problem(2000, 512, 100, relu=relu).factors
    target = factors.mean_gradient()

    def solve():
        fitted = curvature.fit("ggn", factors, damping)
        fitted.solve(target)
        return fitted

    fitted = run(benchmark, f"large head, damping {damping:g}", "imu_fast", solve, rounds=5)
    benchmark.extra_info.update(iterations=fitted.iterations, residual=fitted.residual)
    assert fitted.residual <= 1e-6
